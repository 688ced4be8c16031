"""Remote folders of shards as local ones, for what reads and writes an index beside shards.

A mirror holds copies of the folder's small files. A shard is there only while it is read: a link into the cache.

    ROOT/https/host/folder/index.json, NAME.idx, NAME_stats.json
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from clip_train.data.files import write_atomically
from clip_train.data.index.files import idx_path, listing_path, read_listing
from clip_train.data.index.jobs import run_jobs
from clip_train.data.index.walk import index_shard, publish_index
from clip_train.data.remote.index import DOWNLOADS, mirror_folder
from clip_train.errors import UserError
from clip_train.storage.remote import beside, folder_of, read_file, upload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clip_train.data.index.files import ShardEntry
    from clip_train.data.index.walk import IndexedShard, IndexOptions, IndexSummary
    from clip_train.data.shard_file import ShardFile


def mirrored(
    files: Sequence[ShardFile], *, root: Path, captions: tuple[str, ...], own_index: bool = False
) -> list[ShardFile]:
    """Return remote shards that appear below `root` while they are read, beside their index and statistics.

    Args:
        files: remote ones.
        root: of the mirror.
        captions: whose index is fetched.
        own_index: keep the index that the mirror has; nothing is fetched but statistics.

    Raises:
        UserError: a place is forbidden.
        IntegrityError: it cannot be reached.
    """
    moved = [replace(file, folder=mirror_folder(folder_of(file.location), root=root)) for file in files]
    folders = {file.folder: folder_of(file.location) for file in moved if file.folder is not None}
    copies: dict[Path, str] = {}
    for folder, url in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        listing = listing_path(folder, captions=captions)
        if not own_index:
            _copy(f"{url}/{listing.name}", listing)
    for file in moved:
        copies[file.path.with_name(f"{file.path.stem}_stats.json")] = beside(file.location, "_stats.json")
        records = idx_path(file.path, captions=captions)
        if not own_index and listing_path(records.parent, captions=captions).exists():
            copies[records] = beside(file.location, records.name.removeprefix(file.path.stem))
    with ThreadPoolExecutor(2 * DOWNLOADS) as pool:
        list(pool.map(lambda copy: _copy(copy[1], copy[0]), copies.items()))
    return moved


def index_remote(
    files: Sequence[ShardFile], *, options: IndexOptions, jobs: int, index_dir: Path | None
) -> IndexSummary:  # fmt: skip
    """Index remote shards as `index_shards` does local ones, and store the index beside them or below `index_dir`.

    Args:
        files: remote ones, read through their cache.
        options: as for local shards.
        jobs: processes.
        index_dir: folder for the index; None stores it where the shards are.

    Raises:
        UserError: as for local shards, or the place may not be written.
        IntegrityError: as for local shards, or something does not arrive.
    """
    urls = list(dict.fromkeys(folder_of(file.location) for file in files))
    if index_dir is None and (web := next((url for url in urls if url.startswith(("http://", "https://"))), None)):
        raise UserError(
            f"{web} cannot be written: keep the index elsewhere with --index-dir and data.index_dir, or index the "
            "shards before they are put there"
        )
    with ExitStack() as stack:
        root = index_dir or Path(stack.enter_context(TemporaryDirectory()))
        captions = options.captions
        moved = mirrored(files, root=root, captions=captions, own_index=index_dir is not None)
        folders = {mirror_folder(url, root=root): url for url in urls}
        earlier = {folder: read_listing(folder, captions=captions) for folder in folders}
        tasks = [(file, earlier[file.path.parent].get(file.name)) for file in moved]
        indexed = list(run_jobs(partial(_index_file, options=options), tasks, jobs=jobs))
        # Whoever writes a listing drops shards that are gone; those of other calls are still where they were.
        others = {folder / name for folder, listing in earlier.items() for name in listing}
        for path in others:
            path.touch()
        try:
            summary = publish_index(indexed, options=options)
        finally:
            for path in others:
                path.unlink()
        if index_dir is None:
            _store(summary.shards, folders=folders, captions=captions)
        return replace(summary, cuts=tuple(_named(cut, moved) for cut in summary.cuts))


def _index_file(task: tuple[ShardFile, ShardEntry | None], *, options: IndexOptions) -> IndexedShard:
    file, earlier = task
    with file.here() as path:
        return index_shard(path, options=options, earlier=earlier)


def _named(message: str, files: Sequence[ShardFile]) -> str:
    return reduce(lambda text, file: file.named(text), files, message)


def _store(entries: Sequence[ShardEntry], *, folders: dict[Path, str], captions: tuple[str, ...]) -> None:
    """Store records, then listings, beside the shards: a reader meets no listing whose records are not there yet."""
    for entry in entries:
        upload(entry.idx_path, f"{folders[entry.path.parent]}/{entry.idx_path.name}")
    for folder, url in folders.items():
        listing = listing_path(folder, captions=captions)
        upload(listing, f"{url}/{listing.name}")


def _copy(url: str, path: Path) -> None:
    content = read_file(url)
    if content is not None:
        write_atomically(path, content)
