import io
import json
import tarfile

import pytest
import torch

import clip_train
from clip_train.config import load
from clip_train.data.scenes.write import write_scenes
from clip_train.errors import IntegrityError, UserError
from clip_train.tokenizer.config import Cleaning, HuggingFaceTokenizerConfig
from clip_train.tools.train_tokenizer import END, START, train_tokenizer
from clip_train.train import train


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    write_scenes(out, num_train=96, num_val=8, seed=0)
    return out


@pytest.fixture(scope="module")
def path(scenes):
    path = scenes / "tokenizer.json"
    said = train_tokenizer(f"{scenes}/train", path, vocab_size=330, cleaning=Cleaning.clip)
    assert "330 ids from 96 captions" in said and f"tokenizer.path={path}" in said
    return path


def build(path, **more):
    return HuggingFaceTokenizerConfig(path=str(path), bos=START, eos=END, **more).build(context_length=64)


def test_every_text_decodes_to_itself(path):
    tokenizer = build(path, cleaning=Cleaning.none)
    for text in (
        "a red cross",
        "фото",
        "हिन्दी में",
        "日本語 のテキスト",
        "🙂",
        "  two  spaces ",
        "it's 1,000.50",
        "\x00",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_frequent_words_are_one_token_wherever_they_stand(path):
    tokenizer = build(path)
    (red,) = tokenizer.encode("red")
    assert tokenizer.encode("a red")[-1] == red
    assert len(tokenizer.encode("zyx")) > 1


def test_the_end_token_has_the_largest_id_and_all_bytes_are_there(path):
    tokenizer = build(path)
    assert (tokenizer.start_id, tokenizer.end_id, tokenizer.vocab_size) == (328, 329, 330)
    assert len(json.loads(path.read_text())["model"]["merges"]) == 330 - 2 - 256


def test_mistakes_are_refused(path, scenes, tmp_path):
    with pytest.raises(UserError, match="exists and is not replaced"):
        train_tokenizer(f"{scenes}/train", path, vocab_size=330, cleaning=Cleaning.clip)
    with pytest.raises(UserError, match="must be at least 258"):
        train_tokenizer(f"{scenes}/train", tmp_path / "t.json", vocab_size=100, cleaning=Cleaning.clip)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="SHARDS="):
        train_tokenizer(str(tmp_path / "empty"), tmp_path / "t.json", vocab_size=330, cleaning=Cleaning.clip)


@pytest.mark.slow
def test_a_model_trains_with_it_and_is_loaded_and_continued_with_it(path, scenes, tmp_path):
    copy = tmp_path / "mine.json"
    copy.write_bytes(path.read_bytes())
    arguments = [
        f"data.train={scenes}/train", f"run_dir={tmp_path}/run", "model=tiny", "data.workers=0", "device=cpu",
        "precision=fp32", "global_batch_size=8", "tokenizer=huggingface", f"tokenizer.path={copy}",
        f"tokenizer.bos='{START}'", f"tokenizer.eos='{END}'", "tokenizer.context_length=24",
    ]  # fmt: skip
    train(load("train", [*arguments, "steps=2"]))
    copy.unlink()  # the run has its own
    model, _ = clip_train.load(tmp_path / "run", device="cpu")
    assert (model.vocab_size, model.context_length, model.config.text.end_id) == (330, 24, None)
    tokens = model.tokenize(["a red cross"])
    assert tokens.equal(build(path)(["a red cross"], context_length=24))
    assert torch.equal(model.encode_text(["a red cross"]), model.encode_text(tokens))
    train(load("train", [*arguments, "steps=3"]))
    copy.write_text(path.read_text().replace("red", "der"))
    with pytest.raises(UserError, match="is not the file that this run began with"):
        train(load("train", [*arguments, "steps=4"]))


def write_json_shard(path, captions):
    with tarfile.open(path, "w") as tar:
        for i, caption in enumerate(captions):
            for name, content in ((f"{i}.png", b"x"), (f"{i}.json", json.dumps({"alt": caption}).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_captions_come_from_a_json_field_too_and_samples_without_one_are_passed_over(tmp_path):
    write_json_shard(tmp_path / "0.tar", ["grün grün", ["grün", "blau"], None, ["rot"]])
    said = train_tokenizer(str(tmp_path), tmp_path / "t.json", vocab_size=264, caption="json:alt")
    assert "from 3 captions (1 samples have none that can be used)" in said
    assert len(build(tmp_path / "t.json").encode("grün")) == 1


def test_captions_without_text_are_refused(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w"):
        pass
    with pytest.raises(IntegrityError, match="no sample has a caption in txt"):
        train_tokenizer(str(tmp_path), tmp_path / "t.json", vocab_size=330, cleaning=Cleaning.clip)
