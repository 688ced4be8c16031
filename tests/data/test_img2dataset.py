"""The folder that img2dataset leaves is trained from, filtered and checked as it is."""

import hashlib
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from clip_train.config import load
from clip_train.data.shards.check import check_source
from clip_train.data.shards.index import index_source
from clip_train.metrics.sinks import read_metrics
from clip_train.tokenizer.bpe import ClipTokenizer
from clip_train.train import train
from tests.data.made import encoded, picture, write_shard

LANGUAGES = ("en", "de", "fr")


def img2dataset_folder(folder: Path, *, shards: int = 3, rows: int = 40) -> Path:
    """Write what img2dataset 1.x writes: NNNNN.tar, NNNNN.parquet and NNNNN_stats.json; every tenth download failed."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        samples, table = [], []
        for row in range(rows):
            number = shard * rows + row
            failed = number % 10 == 9
            jpg = encoded(picture(number, size=(64, 48)), "JPEG", quality=95)
            meta = {
                "url": f"https://pictures.example/{number}.jpg", "caption": f"picture number {number}",
                "LANGUAGE": LANGUAGES[number % 3], "similarity": number / (shards * rows),
                "key": f"{shard:05d}{row:04d}", "status": "failed_to_download" if failed else "success",
                "error_message": "HTTP Error 404: Not Found" if failed else None,
                "width": None if failed else 64, "height": None if failed else 48,
                "original_width": None if failed else 640, "original_height": None if failed else 480,
                "exif": None if failed else "{}", "sha256": None if failed else hashlib.sha256(jpg).hexdigest(),
            }  # fmt: skip
            table.append(meta)
            if not failed:
                sample = {"jpg": jpg, "json": json.dumps(meta, indent=4).encode(), "txt": meta["caption"].encode()}
                samples.append({"__key__": meta["key"], **sample})
        write_shard(folder / f"{shard:05d}.tar", samples)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), folder / f"{shard:05d}.parquet")
        statistics = {
            "count": rows, "successes": len(samples), "failed_to_download": rows - len(samples), "failed_to_resize": 0,
            "duration": 1.5, "start_time": 1.7e9, "end_time": 1.7e9 + 1.5,
            "status_dict": {"success": len(samples), "HTTP Error 404: Not Found": rows - len(samples)},
        }  # fmt: skip
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(statistics, indent=4))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("caption", ["txt", "json:caption"])
def test_a_run_trains_from_it_without_conversion(tmp_path, caption):
    folder = img2dataset_folder(tmp_path / "laion")
    settings = [
        f"data.train={folder}", f"data.caption={caption}", f"run_dir={tmp_path / 'run'}", "model=tiny", "device=cpu",
        "precision=fp32", "steps=20", "global_batch_size=27", "optim.warmup=2", "optim.lr=1e-3", "data.workers=1",
        "logging.every=1",
    ]  # fmt: skip
    train(load("train", settings))
    losses = [row["train/loss"] for row in read_metrics(tmp_path / "run") if "train/loss" in row]
    assert len(losses) == 20 and losses[-1] < losses[0]


def test_it_is_indexed_filtered_and_checked_by_its_own_metadata(tmp_path):
    folder = img2dataset_folder(tmp_path / "laion")
    assert index_source(str(folder)).num_samples == 108
    summary = index_source(str(folder), conditions=["similarity>=0.5", "LANGUAGE=en"])
    expected = sum(n >= 60 and n % 3 == 0 and n % 10 != 9 for n in range(120))
    assert summary.num_samples == expected
    report = check_source(str(folder), tokenizer=ClipTokenizer(), batch_size=8)
    assert (report.numbers["samples"], report.numbers["left_out_by_filter"]) == (expected, 108 - expected)
    assert report.numbers["members"] == {"jpg": 108, "json": 108, "txt": 108}
    assert report.defects == []
