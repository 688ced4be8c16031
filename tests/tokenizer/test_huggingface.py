import pickle

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from clip_train.errors import UserError
from clip_train.tokenizer.config import Cleaning, HuggingFaceTokenizerConfig
from tests.tokenizer.made import TEXTS, write_bpe, write_unigram

SPECIALS = {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_bpe(tmp_path_factory.mktemp("bpe") / "tokenizer.json")


def build(path, *, context_length=24, cleaning=Cleaning.none, **specials):
    config = HuggingFaceTokenizerConfig(path=str(path), cleaning=cleaning, **(specials or SPECIALS))
    return config.build(context_length=context_length)


def librarys_own(path, *, template, context_length, pad):
    """The same file with the library's own template, truncation and padding."""
    reference = Tokenizer.from_file(str(path))
    names = [(name, reference.token_to_id(name)) for name in ("<s>", "</s>") if name in template]
    reference.post_processor = TemplateProcessing(single=template, special_tokens=names)
    reference.enable_truncation(context_length)
    reference.enable_padding(length=context_length, pad_id=reference.token_to_id(pad), pad_token=pad)
    reference.encode_special_tokens = True
    return reference


def test_ids_equal_those_of_the_librarys_own_template_truncation_and_padding(path):
    reference = librarys_own(path, template="<s> $A </s>", context_length=24, pad="<pad>")
    want = [encoding.ids for encoding in reference.encode_batch(TEXTS)]
    assert build(path)(TEXTS, truncate=True).tolist() == want


def test_without_a_start_token_and_padded_with_the_end_as_siglip_does(tmp_path):
    path = write_unigram(tmp_path / "tokenizer.json")
    reference = librarys_own(path, template="$A </s>", context_length=64, pad="</s>")
    tokenizer = build(path, context_length=64, eos="</s>")
    texts = [text for text in TEXTS if "</s>" not in text]
    assert tokenizer(texts, truncate=True).tolist() == [encoding.ids for encoding in reference.encode_batch(texts)]
    assert (tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id) == (None, 1, 1)


def test_user_text_never_yields_the_start_or_end_token(path):
    for kind in (path, write_unigram(path.with_name("unigram.json"))):
        tokenizer = build(kind, eos="</s>")
        assert tokenizer.end_id not in tokenizer.encode("a </s> b <s> c")
    assert "</s>" in build(path).decode(build(path).encode("a </s> b"))


def test_the_length_counts_special_tokens_and_a_cut_keeps_the_end(path):
    tokens, length, cut = build(path, context_length=8).encode_padded("very long " * 40)
    assert (length, cut) == (8, True) and tokens[0] == 1 and tokens[-1] == 3
    tokens, length, cut = build(path, context_length=24).encode_padded("a cat")
    assert not cut and tokens[length - 1] == 3 and (tokens[length:] == 0).all()
    with pytest.raises(RuntimeError, match="context_length=8"):
        build(path, context_length=8)(["very long " * 40])


@pytest.mark.parametrize(
    ("cleaning", "want"),
    [
        ("none", "Don’t  STOP_it &amp; go!"),
        ("whitespace", "Don't STOP_it & go!"),
        ("clip", "don't stop_it & go!"),
        ("canonicalize", "dont stop it go"),
    ],
)
def test_text_is_cleaned_as_asked_before_the_files_own_rules(path, cleaning, want):
    own = build(path, context_length=64, cleaning=Cleaning(cleaning)).encode("Don’t  STOP_it &amp; go!")
    assert own == build(path, context_length=64).encode(want)


def test_a_pickled_tokenizer_gives_the_same_ids(path):
    tokenizer = build(path, cleaning=Cleaning.clip)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy(TEXTS, truncate=True).equal(tokenizer(TEXTS, truncate=True))
    assert copy.files() == tokenizer.files() == {"tokenizer.json": path.read_bytes()}


@pytest.mark.parametrize(
    ("specials", "message"),
    [
        ({"eos": "<end>"}, r"tokenizer\.eos=<end>: no such token in .*tokenizer"),
        ({"eos": "</s>", "bos": "[CLS]"}, r"tokenizer\.bos=\[CLS\]"),
        ({"eos": "<unk>"}, r"tokenizer\.eos=<unk> has id 2, which transformers would misread"),
    ],
)
def test_a_special_token_that_cannot_be_is_named(path, specials, message):
    with pytest.raises(UserError, match=message):
        build(path, **specials)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.path=.*absent\.json cannot be read"):
        build(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text('{"model": 1}')
    with pytest.raises(UserError, match=r"broken\.json: not a tokenizer\.json"):
        build(tmp_path / "broken.json")


def test_a_runs_copy_counts_and_must_not_be_contradicted(path, tmp_path):
    config = HuggingFaceTokenizerConfig(path=str(tmp_path / "mine.json"), **SPECIALS)
    run = tmp_path / "run"
    run.mkdir()
    (run / "tokenizer.json").write_bytes(path.read_bytes())
    assert config.build(context_length=24, kept_in=run).vocab_size == 350  # the named file is gone
    write_bpe(tmp_path / "mine.json", vocab_size=300)
    with pytest.raises(UserError, match=r"mine\.json is not the file that this run began with"):
        config.build(context_length=24, kept_in=run)
    assert config.build(context_length=24).vocab_size == 300


@pytest.mark.slow
def test_ids_equal_open_clips_on_a_folder_of_transformers(path, tmp_path):
    transformers = pytest.importorskip("transformers")
    open_clip = pytest.importorskip("open_clip")
    backend = librarys_own(path, template="<s> $A </s>", context_length=24, pad="<pad>")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.save_pretrained(tmp_path)
    for ours, theirs in (("whitespace", "whitespace"), ("clip", "lower"), ("canonicalize", "canonicalize")):
        reference = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=24, clean=theirs)
        texts = [text for text in TEXTS if "</s>" not in text]
        assert build(path, cleaning=Cleaning(ours))(texts, truncate=True).equal(reference(texts)), ours
