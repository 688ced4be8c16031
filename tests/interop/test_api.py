import subprocess
import sys

import pytest

import clip_train


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, clip_train; clip_train.available_models; "
        "heavy = {'torch', 'numpy', 'PIL', 'torchvision', 'ftfy', 'hydra'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_names_are_there_and_others_are_not():
    for name in clip_train.__all__:
        assert callable(getattr(clip_train, name))
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = clip_train.lod
    assert set(clip_train.__all__) <= set(dir(clip_train))  # a notebook completes them


def test_names_of_open_clip_say_what_takes_their_place():
    with pytest.raises(AttributeError, match=r"'create_model_and_transforms': load\('ViT-B-32:"):
        _ = clip_train.create_model_and_transforms
    with pytest.raises(AttributeError, match=r"model\.tokenize"):
        _ = clip_train.get_tokenizer
    assert not hasattr(clip_train, "list_models")


def test_tokenize_has_openais_signature_and_error():
    assert clip_train.tokenize("a dog").shape == (1, 77)
    assert clip_train.tokenize(["a dog", "a cat"], 8).shape == (2, 8)
    with pytest.raises(RuntimeError, match="context_length=4"):
        clip_train.tokenize("a big dog", 4)
    assert clip_train.tokenize("a big dog", 4, True)[0, -1] == 49407
