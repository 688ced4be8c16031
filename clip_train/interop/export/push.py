"""Upload an export to the hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clip_train.errors import UserError
from clip_train.interop.export.publish import RESULTS_FOLDER
from clip_train.interop.hub import login_hint

if TYPE_CHECKING:
    from pathlib import Path


def push(folder: Path, *, repository: str) -> str:
    """Upload the folder to `ORG/NAME`, which is made if it is new, and return its address.

    Raises:
        UserError: the hub is not reachable, or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=repository, commit_message="Export by clip-train",
            ignore_patterns=f"{RESULTS_FOLDER}/*",  # names and answers of every item; the card has the scores
        )  # fmt: skip
    except Exception as error:  # the errors of its transport, which changes between versions, have no common base
        why = str(error).splitlines()[0] + login_hint(error)
        raise UserError(f"--push {repository}: not uploaded ({why}); the export itself is in {folder}") from error
    return str(address)
