"""Evaluation configs: light to import, typed for OmegaConf, composed from configs/evaluation, checked."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from clip_train.errors import UserError
from clip_train.evaluation.classify.config import ClassifyConfig
from clip_train.evaluation.config import EvaluationConfig
from clip_train.evaluation.group_audit.config import GroupAuditConfig
from clip_train.evaluation.retrieve.config import RetrieveConfig
from clip_train.schema import CHOICES

CONFIGS = Path(__file__).parents[2] / "configs"


def test_importing_the_configs_does_not_import_torch_or_numpy():
    code = "import sys, clip_train.evaluation.config; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CONFIGS.parent)


@pytest.mark.parametrize("config", [EvaluationConfig, *CHOICES["evaluation"].values()])
def test_the_configs_are_typed_for_omegaconf(config):
    assert "every" in OmegaConf.structured(config)


def test_fields_out_of_range_are_refused_by_name():
    for make, message in [
        (lambda: ClassifyConfig(root="x", every=-1), "every=-1"),
        (lambda: ClassifyConfig(root="x", batch_size=0), "batch_size=0"),
        (lambda: RetrieveConfig(shards="x", recall_k=[0, 5]), "recall_k="),
        (lambda: RetrieveConfig(shards="x", workers=-1), "workers=-1"),
        (lambda: GroupAuditConfig(root="x", skew_k=0), "skew_k=0"),
        (lambda: GroupAuditConfig(root="x", npy_columns=["year"], values={"region": ["Asia"]}), "values names region"),
    ]:
        with pytest.raises(UserError, match=message):
            make()


@pytest.mark.parametrize("choice", sorted(p.stem for p in (CONFIGS / "evaluation").glob("*.yaml")))
def test_every_choice_composes_to_its_type_under_its_own_key(choice):
    store = ConfigStore.instance()
    choices = CHOICES["evaluation"]
    for name, node in choices.items():
        store.store(group="evaluation", name=f"base_{name}", node=node)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(overrides=[f"+evaluation=[{choice}]", f"++evaluation.{choice}.every=7"])
    section = config.evaluation[choice]
    assert OmegaConf.get_type(section) in choices.values()
    assert section.every == 7
