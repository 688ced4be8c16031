"""Every shipped config composes, and a config survives being written and read."""

from pathlib import Path

import pytest

from clip_train.config import changes, from_yaml, load, to_yaml
from clip_train.data.remote.config import CacheConfig
from clip_train.errors import UserError
from clip_train.schema import TrainConfig

CONFIGS = Path(__file__).parent.parent / "configs"
BASE = ["steps=100", "optim.warmup=1", "data.train=x"]
NEEDED = {  # what a choice leaves to the user
    **{
        f"evaluation=[{n}]": f"evaluation.{n}.path=x"
        for n in (
            "choose",
            "sugarcrepe",
            "winoground",
            "aro",
            "coco_order",
            "flickr30k_order",
            "countbench",
            "winogavil",
        )
    },
    "evaluation=[classify]": "evaluation.classify.root=x",
    "evaluation=[wds]": "evaluation.wds.root=x",
    "evaluation=[coco]": "evaluation.coco.annotations=x",
    "evaluation=[flickr30k]": "evaluation.flickr30k.annotations=x",
    "evaluation=[group_audit]": "evaluation.group_audit.root=x",
    "evaluation=[probe]": "evaluation.probe.root=x",
    **{
        f"evaluation=[{n}]": f"evaluation.{n}.root=x"
        for n in (
            "calibrate",
            "classify",
            "dollar_street",
            "fairface",
            "geode",
            "group_audit",
            "imagenet_ood",
            "reject",
        )
    },
    "evaluation=[imagenet]": "evaluation.imagenet.root=x",
    "evaluation=[retrieve]": "evaluation.retrieve.shards=x",
    "evaluation=[val]": "data.val=x",
    "loss=siglip": "model.init_logit_bias=-10",
    "tokenizer=huggingface": "tokenizer.path=x tokenizer.eos=x",
}
EXPERIMENTS = sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml"))
EVALUATIONS = sorted(p.stem for p in (CONFIGS / "evaluation").glob("*.yaml"))
USUAL_MODELS = ("model=tiny", "model=demo", "model=timm", "model=ViT-B-32", "model=RN50", "model=ViT-B-16-SigLIP")
CHOICES = [
    pytest.param(choice, marks=[pytest.mark.slow] if group.name == "model" and choice not in USUAL_MODELS else [])
    for group in sorted(CONFIGS.iterdir())
    if group.is_dir() and group.name not in ("evaluation", "experiment", "suite")
    for choice in (f"{group.name}={p.stem}" for p in sorted(group.glob("*.yaml")))
]


def test_all_evaluations_compose_together_and_read_back(tmp_path):
    needed = [key for name in EVALUATIONS for key in NEEDED.get(f"evaluation=[{name}]", "").split()]
    config = load("train", [*BASE, f"evaluation=[{','.join(EVALUATIONS)}]", *needed])
    assert sorted(config.evaluation) == EVALUATIONS
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert from_yaml(path) == config


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_and_reads_back(choice, tmp_path):
    config = load("train", [*BASE, choice, *NEEDED.get(choice, "").split()])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert from_yaml(path) == config


@pytest.mark.parametrize("suite", sorted(p.stem for p in (CONFIGS / "suite").glob("*.yaml")))
def test_every_suite_composes_and_carries_its_own_name(suite):
    config = load("evaluate", ["checkpoint=x", f"suite={suite}", "evaluation_root=/data"])
    assert config.suite == suite and config.evaluation


def test_held_out_pairs_can_be_named_without_training_data():
    config = load("evaluate", ["checkpoint=x", "evaluation=[val]", "evaluation.val.shards=y"])
    assert config.evaluation["val"].shards == "y"
    assert config.evaluation["val"].cache == CacheConfig()


def test_what_is_wrong_with_an_evaluation_is_told_with_its_name():
    given = ["checkpoint=x", "evaluation=[val,classify]", "evaluation.val.shards=y", "evaluation.classify.root=z"]
    with pytest.raises(UserError, match=r"^evaluation\.val: every=-3 must be 0"):
        load("evaluate", [*given, "evaluation.val.every=-3"])
    with pytest.raises(UserError, match=r"^evaluation\.classify: batch_size=0 must be at least 1$"):
        load("evaluate", [*given, "evaluation.classify.batch_size=0"])


def test_held_out_pairs_that_are_not_named_are_asked_for():
    with pytest.raises(
        UserError, match=r"evaluation\.val\.shards= is required: `clip-train evaluate` has no data\.val"
    ):
        load("evaluate", ["checkpoint=x", "evaluation=[val]"])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_recipe_composes_and_carries_its_own_name(experiment):
    config = load("train", [f"experiment={experiment}"])
    assert config.name == experiment
    assert config.run_dir == f"runs/{experiment}"


def test_a_command_line_beats_the_recipe_and_the_recipe_beats_the_defaults():
    plain, recipe, mine = (load("train", x) for x in (BASE, ["experiment=demo"], ["experiment=demo", "optim.lr=0.125"]))
    assert recipe.optim.lr != plain.optim.lr
    assert mine.optim.lr == 0.125
    assert mine.global_batch_size == recipe.global_batch_size


def test_the_environment_never_reaches_a_saved_config(monkeypatch):
    monkeypatch.setenv("CLIP_TRAIN_TEST_VALUE", "hunter2")
    with pytest.raises(UserError, match=r"data\.train=.*does not read the environment") as refused:
        load("train", [*BASE, "data.train='${oc.env:CLIP_TRAIN_TEST_VALUE}'"])
    assert "hunter2" not in str(refused.value)
    with pytest.raises(UserError, match="password"):
        load("train", [*BASE, "data.password=x"])


def test_a_changed_model_shows_as_a_change_and_a_longer_run_does_not():
    old = to_yaml(load("train", BASE))
    assert changes(old, to_yaml(load("train", [*BASE, "steps=200", "data.workers=1"]))) == []
    shown = changes(old, to_yaml(load("train", [*BASE, "model=tiny"])))
    assert any(line.startswith("model.embed_dim: 512 -> 64") for line in shown)


def test_a_run_continues_with_what_messages_advise_and_with_data_that_have_moved():
    base = [*BASE, "loss=siglip", "model=ViT-B-16-SigLIP"]
    advised = [
        "optim.max_grad_norm=1", "optim.lr=1e-5", "on_nonfinite=rewind", "model.checkpointing=1", "distributed=fsdp",
        "micro_batch_size=4", "data.max_bad_fraction=0.5", "data.on_change=new_segment", "data.workers=0",
    ]  # fmt: skip
    moved = ["data.train=/new/train", "data.val=/new/val", "data.index_dir=/new/index", "evaluation=[val]"]
    computed = ["model.compile=true", "model.ragged=off", "loss.exchange=ring"]
    new = to_yaml(load("train", [*base, *advised, *moved, *computed]))
    assert changes(to_yaml(load("train", base)), new) == []


def test_a_config_of_another_version_names_the_unknown_key(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(load("train", BASE)) + "shiny_new_key: 3\n")
    with pytest.raises(UserError, match="shiny_new_key"):
        from_yaml(path)


def test_yaml_that_is_not_yaml_names_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("a: b: c\n\t- x")
    with pytest.raises(UserError, match=r"config\.yaml"):
        from_yaml(path)


@pytest.mark.parametrize(
    "length", ["epochs=1e300", "epochs=1e308", "samples=1" + 19 * "0", "steps=1" + 300 * "0", "steps=92233720368547759"]
)
def test_a_run_of_more_samples_than_can_be_counted_is_refused(length):
    overrides = [length, "optim.warmup=1", "data.train=x", "global_batch_size=100"]
    with pytest.raises(UserError, match=f"{length.partition('=')[0]}=.* is a run of more samples than can be counted"):
        load("train", overrides).total_steps(1000)


@pytest.mark.parametrize(
    "key", ["watchdog_seconds", "distributed.timeout_seconds", "distributed.arrival_seconds"]
)  # fmt: skip
def test_a_wait_that_no_clock_can_hold_is_refused(key):
    with pytest.raises(UserError, match=f"{key}=1e.300 must be "):
        load("train", [*BASE, f"{key}=1e300"])


def test_samples_and_epochs_become_steps():
    config = load("train", ["samples=10240", "optim.warmup=1", "data.train=x"])
    assert config.total_steps(123) == 10
    config = load("train", ["epochs=2", "optim.warmup=1", "data.train=x", "global_batch_size=100"])
    assert config.total_steps(1000) == 20 and config.total_steps(1090) == 22
    config.optim.warmup = 20
    with pytest.raises(UserError, match="must be below steps=20"):
        config.total_steps(1000)
    assert isinstance(config, TrainConfig)


@pytest.mark.parametrize(("profile", "steps"), [("10:13", (10, 13)), ("7", (7, 7)), ("null", None)])
def test_profiled_steps_are_a_range_or_one(profile, steps):
    assert load("train", [*BASE, f"profile={profile}"]).profiled_steps() == steps


@pytest.mark.parametrize("profile", ["0", "13:10", "10-13", "90:101"])
def test_profiled_steps_that_cannot_be_are_refused(profile):
    with pytest.raises(UserError, match=f"profile={profile} must"):
        load("train", [*BASE, f"profile={profile}"])
