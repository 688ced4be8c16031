import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from clip_train.distributed.config import DistributedConfig, Strategy
from clip_train.distributed.world import World
from clip_train.errors import UserError
from clip_train.loss.config import ClipLossConfig, Duplicates, SigLipLossConfig


@pytest.mark.parametrize(
    "wrong",
    [{"timeout_seconds": 0}, {"shard_ranks": 2}, {"shard_ranks": 0, "strategy": Strategy.fsdp}, {"cpu_offload": True}],
)
def test_a_value_out_of_range_is_named(wrong):
    with pytest.raises(UserError, match=f"distributed.{next(iter(wrong))}="):
        DistributedConfig(**wrong)


def test_offloading_to_the_host_without_a_device_is_refused():
    config = DistributedConfig(strategy=Strategy.fsdp, cpu_offload=True)
    with pytest.raises(UserError, match=r"distributed\.cpu_offload=true needs CUDA"):
        config.parallelize(None, world=World(), precision="fp32", compile_blocks=False)


def test_configs_are_readable_by_omegaconf():
    for kind in (DistributedConfig, ClipLossConfig, SigLipLossConfig):
        assert OmegaConf.to_object(OmegaConf.structured(kind)) == kind()
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ClipLossConfig), {"duplicates": "ignore"}))
    assert config.duplicates is Duplicates.ignore


def test_config_modules_do_not_import_torch():
    modules = "clip_train.loss.config, clip_train.optim.config, clip_train.distributed.config"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
