"""The shipped class names and templates are the published ones, byte for byte."""

import hashlib

import pytest

from clip_train.errors import IntegrityError, UserError
from clip_train.evaluation.prompts import files
from clip_train.evaluation.prompts.files import (
    fill,
    imagenet_classnames,
    imagenet_wnids,
    load_prompts,
    load_templates,
    read_lines,
)

# SHA-256 of the lines joined by newlines, as published by OpenAI (names, templates) and of the sorted synset ids.
CLASSNAMES = "571ae1c583b4be7da87519494c52bf405a46af05d5815627c7a0dee997068b60"
TEMPLATES = "4f976686fb651bb5803d4689dcd849f75efe0ef19a3c801355bc9a6f03c8a5af"
WNIDS = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"


def sha256(lines):
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_imagenet_names_templates_and_ids_are_the_published_ones():
    assert sha256(imagenet_classnames()) == CLASSNAMES
    assert sha256(load_templates("imagenet")) == TEMPLATES
    assert sha256(imagenet_wnids()) == WNIDS


def test_imagenet_has_998_distinct_names_and_79840_distinct_prompts():
    names, templates = imagenet_classnames(), load_templates("imagenet")
    assert [i for i, n in enumerate(names) if n in ("missile", "sunglasses")] == [657, 744, 836, 837]
    prompts = [fill(t, classname=n) for n in names for t in templates]
    assert (len(prompts), len(set(prompts))) == (80_000, 79_840)


def test_the_class_order_is_the_sorted_order_of_the_ids():
    wnids = imagenet_wnids()
    assert wnids == sorted(wnids)
    assert (wnids[0], wnids[-1], len(wnids)) == ("n01440764", "n15075141", 1000)


@pytest.mark.slow
def test_class_order_equals_timms():
    info = pytest.importorskip("timm.data").ImageNetInfo()
    assert imagenet_wnids() == info.label_names()


def test_both_placeholders_are_accepted_and_names_are_not_formatted(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("a {c} of wood\n\n{} again\n")
    assert [fill(t, classname="{c} & {0}") for t in load_templates(str(path))] == [
        "a {c} & {0} of wood",
        "{c} & {0} again",
    ]


def test_a_template_without_placeholder_is_refused_by_name(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("a photo\n")
    with pytest.raises(UserError, match=r"'a photo' must contain \{\} or \{c\}"):
        load_templates(str(path))


def test_a_template_is_taken_as_it_is_whatever_its_length():
    assert load_templates("a photo of a {}, on film") == ["a photo of a {}, on film"]
    assert load_templates("{c}" + " very" * 1000) == ["{c}" + " very" * 1000]


def test_the_mark_that_editors_put_before_utf_8_is_no_part_of_the_text(tmp_path):
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\n")
    (tmp_path / "prompts.json").write_bytes(b'\xef\xbb\xbf{"cat": ["a cat"], "dog": ["a dog"]}')
    assert read_lines(tmp_path / "names.txt") == ["cat", "dog"]
    assert load_prompts(str(tmp_path / "prompts.json"), classnames=["cat"]) == {"cat": ["a cat"]}


def test_an_unknown_choice_of_templates_is_refused():
    with pytest.raises(UserError, match="templates=imagnet is neither"):
        load_templates("imagnet")


def test_a_changed_list_of_this_package_is_an_error_and_not_a_number(tmp_path, monkeypatch):
    (tmp_path / "simple_templates.txt").write_text("a drawing of a {}.\n")
    monkeypatch.setattr(files, "_FOLDER", tmp_path)
    files._shipped.cache_clear()
    with pytest.raises(IntegrityError, match=r"simple_templates\.txt is not the published list any more"):
        load_templates("simple")
    files._shipped.cache_clear()
