"""Find out how many samples each shard of a remote source holds, before training begins.

1. An index beside the shards (`index.json`, written by `clip-train shards`) is taken as it is; before that, one that
   `clip-train shards index --index-dir` wrote.
2. Else the counts of an earlier pass over the same shards, kept in the cache.
3. Else, if the user says so, the counts in img2dataset's `NAME_stats.json`, checked when a shard is first opened.
4. Else every shard is downloaded and walked once; as many as fit stay in the cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_train.data.files import write_atomically
from clip_train.data.index.files import INDEX_FORMAT, INDEX_VERSION, idx_path, listing_path, parse_listing
from clip_train.data.remote.cache import RemoteShard, ShardCache
from clip_train.errors import IntegrityError, UserError
from clip_train.redact import unsigned
from clip_train.storage.remote import beside, folder_of, read_file, size_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

logger = logging.getLogger(__name__)

DOWNLOADS = 8  # at a time
_SECONDS_BETWEEN_LINES = 10.0


def load_remote_index(
    urls: Sequence[str], *, cache: ShardCache, captions: tuple[str, ...], counts_from_stats: bool, field: str,
    index_dir: Path | None = None, leave_if_asked: Callable[[], None] = lambda: None,
) -> list[RemoteShard]:  # fmt: skip
    """Return the entries of remote shards, in the order of `urls`.

    Args:
        urls: the shards.
        cache: where they and the results of a pass are kept.
        captions: extensions of the members that hold captions.
        counts_from_stats: trust img2dataset's counts until a shard is opened.
        field: what to call the shards in messages.
        index_dir: where an index of theirs may be besides.
        leave_if_asked: called after each shard that is walked; its error ends the pass, which keeps what it has found.

    Raises:
        UserError: a shard is absent or forbidden.
        IntegrityError: a shard or an index is damaged or does not arrive, or no shard holds a sample.
    """
    found: dict[str, RemoteShard] = {}
    signed = {unsigned(url): url for url in urls}  # a signature expires, and what was found of the shard stays true
    for folder in dict.fromkeys(map(folder_of, urls)):
        found |= _listed(folder, signed=signed, cache=cache, captions=captions, index_dir=index_dir)
    missing = [url for url in urls if url not in found]
    if missing and counts_from_stats:
        with ThreadPoolExecutor(2 * DOWNLOADS) as pool:
            counted = list(pool.map(lambda url: _from_stats(url, cache=cache, captions=captions), missing))
        found |= {shard.url: shard for shard in counted}
    elif missing:
        found |= _index(missing, cache=cache, captions=captions, field=field, leave_if_asked=leave_if_asked)
    shards = [found[url] for url in urls]
    if not any(shard.n for shard in shards):
        raise IntegrityError(f"{field}: no shard holds a pair of picture and caption, {urls[0]} the first of them")
    return shards


def _listed(
    folder: str, *, signed: Mapping[str, str], cache: ShardCache, captions: tuple[str, ...], index_dir: Path | None
) -> dict[str, RemoteShard]:
    """Return those of some shards that an index of ours, or that beside them, lists, else those of an earlier pass."""
    name = listing_path(Path(), captions=captions).name
    place = folder if index_dir is None else str(mirror_folder(folder, root=index_dir))
    content = None if index_dir is None else _content(Path(place) / name)
    if content is None:
        content, place = read_file(f"{folder}/{name}", public_only=cache.public_only), folder
    origin, has_records = f"{place}/{name}", content is not None
    if content is None:
        kept = _kept_path(folder, cache=cache, captions=captions)
        content, origin = _content(kept), str(kept)
        if content is None:
            return {}
    found: dict[str, RemoteShard] = {}
    for row in parse_listing(content, origin=origin, advice="remove it"):
        url = signed.get(f"{folder}/{row['name']}")
        if url is None:
            continue
        records = idx_path(Path(row["name"]), captions=captions).name
        found[url] = RemoteShard(
            path=cache.path(url), n=row["n"], bytes=row["bytes"], idx_sha256=row["idx_sha256"], captions=captions,
            filter_sha256=row.get("filter_sha256"), url=url, sha256=row.get("sha256"),
            records=f"{place}/{records}" if has_records else None,
        )  # fmt: skip
    return found


def mirror_folder(url: str, *, root: Path) -> Path:
    """Return the local folder below `root` that stands for a remote folder."""
    return root / unsigned(url).replace("://", "/", 1)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _from_stats(url: str, *, cache: ShardCache, captions: tuple[str, ...]) -> RemoteShard:
    origin = beside(url, "_stats.json")
    content = read_file(origin, public_only=cache.public_only)
    size = size_of(url, public_only=cache.public_only)
    if content is None or size is None:
        what = f"{origin} is not there" if content is None else f"the server does not tell the size of {url}"
        raise UserError(f"data.cache.counts_from_stats=true: {what}")
    try:
        count = int(json.loads(content)["successes"])
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{origin} is not img2dataset's: it has no number `successes`") from error
    return RemoteShard(path=cache.path(url), n=count, bytes=size, idx_sha256="", captions=captions, url=url)


def _index(
    urls: Sequence[str], *, cache: ShardCache, captions: tuple[str, ...], field: str, leave_if_asked: Callable[[], None]
) -> dict[str, RemoteShard]:
    print(
        f"{field}: {len(urls):,} remote shards have no index and are downloaded once to count their samples; "
        "`clip-train shards index` where they are saves that",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    found: dict[str, RemoteShard] = {}
    skipped: Counter[str] = Counter()
    said = time.monotonic()
    pool = ThreadPoolExecutor(DOWNLOADS)
    try:
        for done in as_completed(pool.submit(cache.index, url, captions=captions) for url in urls):
            shard, incomplete = done.result()
            found[shard.url] = shard
            skipped += incomplete
            leave_if_asked()
            if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                print(f"{field}: {len(found):,} of {len(urls):,} shards indexed", file=sys.stderr, flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
        _keep(found, cache=cache, captions=captions)  # also what an interrupted pass has found
    for parts, count in skipped.items():
        logger.warning("%s: %d samples have only %s and are left out", field, count, parts)
    return found


def _keep(found: dict[str, RemoteShard], *, cache: ShardCache, captions: tuple[str, ...]) -> None:
    by_folder: dict[str, dict[str, dict[str, Any]]] = {}
    for shard in found.values():
        folder = folder_of(shard.url)
        name = unsigned(shard.url).removeprefix(f"{folder}/")
        row = {"name": name, "n": shard.n, "bytes": shard.bytes, "idx_sha256": shard.idx_sha256, "sha256": shard.sha256}
        by_folder.setdefault(folder, {})[name] = row
    for folder, rows in by_folder.items():
        path = _kept_path(folder, cache=cache, captions=captions)
        if path.exists():
            former = parse_listing(path.read_bytes(), origin=str(path), advice="remove it")
            rows = {row["name"]: row for row in former} | rows
        listed = [rows[name] for name in sorted(rows)]
        document = {
            "format": INDEX_FORMAT, "version": INDEX_VERSION, "folder": folder, "shards": listed,
            "N": sum(row["n"] for row in listed),
        }  # fmt: skip
        write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())


def _kept_path(folder: str, *, cache: ShardCache, captions: tuple[str, ...]) -> Path:
    name = hashlib.sha256(f"{folder}\t{'+'.join(captions)}".encode()).hexdigest()
    return cache.folder / "listings" / f"{name}.json"
