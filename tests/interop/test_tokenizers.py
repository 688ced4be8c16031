"""Vocabularies beside a model, against what the library that they are for makes of a text."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import clip_train
from clip_train.errors import UserError
from clip_train.interop.tokenizers import read_tokenizer

from . import files

WORDS = ["<pad>", "</s>", "<unk>", "a", "photo", "of", "cat", "dog"]
TEXTS = ["A photo of a cat!", "dog, dog", "a a a a a a a a"]


def write_vocabulary(folder, *, template="$A </s>"):
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("</s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    named = {"pad_token": "<pad>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


def open_clip_folder(path, *, cleaning="canonicalize"):
    """Write a model whose captions have eight words."""
    model = files.small_model(text={"vocab_size": 8, "context_length": 6, "width": 64, "heads": 1, "layers": 1})
    folder = files.write_open_clip_folder(model, path)
    values = json.loads((folder / "open_clip_config.json").read_text())
    values["model_cfg"]["text_cfg"] |= {
        "hf_tokenizer_name": "some/where", "tokenizer_kwargs": {"clean": cleaning}, "pool_type": "eos", "eos_id": 1,
    }  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("template", ["$A </s>", None])
def test_a_vocabulary_beside_an_open_clip_model_is_its_tokenizer(tmp_path, template):
    folder = open_clip_folder(tmp_path / "model")
    write_vocabulary(folder, template=template)
    ids = clip_train.load(folder, device="cpu")[0].tokenize(TEXTS, truncate=True)
    assert ids.tolist() == [[3, 4, 5, 3, 6, 1], [7, 7, 1, 0, 0, 0], [3, 3, 3, 3, 3, 1]]


@pytest.mark.slow
def test_a_vocabulary_beside_an_open_clip_model_gives_open_clips_ids(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    folder = open_clip_folder(tmp_path / "model")
    write_vocabulary(folder)
    theirs = open_clip.tokenizer.HFTokenizer(str(folder), context_length=6, clean="canonicalize")(TEXTS)
    assert torch.equal(clip_train.load(folder, device="cpu")[0].tokenize(TEXTS, truncate=True), theirs)


def test_a_vocabulary_that_is_not_there_is_missed_when_text_comes(tmp_path):
    folder = open_clip_folder(tmp_path / "model")
    model, _ = clip_train.load(folder, device="cpu")
    assert model.encode_text(torch.tensor([[3, 1, 0, 0, 0, 0]])).shape == (1, 64)
    with pytest.raises(UserError, match=r"has no tokenizer.json, and its vocabulary of 8 is not CLIP's"):
        model.encode_text("a cat")


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path):
    folder = open_clip_folder(tmp_path / "model", cleaning="stem")
    write_vocabulary(folder)
    with pytest.raises(UserError, match="cleaned by 'stem'"):
        clip_train.load(folder)
    folder = open_clip_folder(tmp_path / "other")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json: not a tokenizer.json"):
        clip_train.load(folder)
    text = clip_train.create_model("tiny", text={"vocab_size": 4, "width": 64, "heads": 1, "layers": 1}).config.text
    write_vocabulary(folder)
    with pytest.raises(UserError, match="8 ids, but the model has 4"):
        read_tokenizer(folder, text=text, cleaning="none", is_clips=True)
