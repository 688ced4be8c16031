"""What grids and sweeps train on."""

import pytest

from clip_train.data.scenes.write import write_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    write_scenes(out, num_train=40, num_val=10, seed=0)
    return out
