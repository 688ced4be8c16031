"""The data section of a config: typed, checked, and free of heavy imports."""

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clip_train.data.config import DataConfig
from clip_train.distributed.world import World
from clip_train.errors import UserError
from tests.data.made import ByteTokenizer, numbered_shards


@pytest.mark.parametrize(
    "train",
    ["shards/{00..09}.tar", ["a", "b"], {"cc": {"shards": "a", "weight": 0.5}, "own": {"shards": ["b"], "weight": 1}}],
)
def test_patterns_lists_and_mixtures_pass_through_the_schema(train):
    merged = OmegaConf.merge(OmegaConf.structured(DataConfig), {"train": train, "on_bad": "mask"})
    config = OmegaConf.to_object(merged)
    assert isinstance(config, DataConfig)
    assert config.train == train and config.on_bad == "mask"


@pytest.mark.parametrize("row", [{"workers": "many"}, {"decode": "blurred"}, {"nonsense": 1}])
def test_wrong_types_and_unknown_keys_are_refused(row):
    with pytest.raises(OmegaConfBaseException):
        OmegaConf.merge(OmegaConf.structured(DataConfig), row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"train": 3}, r"data\.train=3"),
        ({"train": {"a": {"shard": "x"}}}, r"data\.train\.a="),
        ({"train": {"a": {"shards": "x", "weight": 0}}}, r"data\.train\.a\.weight=0"),
        ({"train": {"a": {"shards": "x", "weight": 1}, "b": {"shards": "y"}}}, "every source a weight or none"),
        ({"val": {"a": 1}}, r"data\.val="),
        ({"crop_scale": [0.0, 1.0]}, r"data\.crop_scale=\[0\.0, 1\.0\]"),
        ({"crop_scale": [0.5]}, r"data\.crop_scale=\[0\.5\]"),
        ({"workers": -1}, r"data\.workers=-1"),
        ({"max_bad_fraction": 1.5}, r"data\.max_bad_fraction=1\.5"),
        ({"lanes": 0}, r"data\.lanes=0"),
        ({"window": 0}, r"data\.window=0"),
    ],
)
def test_values_out_of_range_are_named(row, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**row)


def test_shards_that_are_not_given_are_asked_for(tmp_path):
    with pytest.raises(UserError, match=r"data\.train is not set"):
        DataConfig().open_train(world=World())
    with pytest.raises(UserError, match=r"data\.val is not set"):
        DataConfig().val_shards()


def test_training_on_held_out_shards_or_on_shards_of_several_sources_warns(tmp_path, caplog):
    numbered_shards(tmp_path, [8, 8])
    train = {"all": {"shards": str(tmp_path)}, "first": {"shards": str(tmp_path / "s-000.tar")}}
    config = DataConfig(train=train, val=str(tmp_path / "s-001.tar"))
    config.build_train(world=World(), seed=0, global_batch_size=8, tokenizer=ByteTokenizer(), image_size=16)
    assert "1 shards are also in data.train" in caplog.text
    assert f"1 shards are in several sources, such as {tmp_path / 's-000.tar'}" in caplog.text


def test_the_choice_in_configs_sets_known_fields_only():
    path = Path(__file__).parents[2] / "configs" / "data" / "shards.yaml"
    values = OmegaConf.load(path)
    del values["defaults"]
    OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), values))


def test_importing_the_config_imports_neither_torch_nor_numpy():
    code = "import sys, clip_train.data.config; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
