"""Vocabularies with byte fallback: the ids of a text, its exact bytes, and their use in training data."""

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.data import vocabularies
from tokenizers import decoders, models, normalizers, pre_tokenizers

from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.data.loader import open_corpus
from orogen.data.packing import piece_texts, prefix_byte_count, target_byte_count
from orogen.data.tokenizer import Tokenizer
from orogen.data.vocabulary import byte_tokenizer


def wrapped(backend: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(backend, pad="</s>", bos="<s>", eos="</s>")


TOKENIZERS = {name: wrapped(backend) for name, backend in vocabularies.pipelines().items()}
PARTS = [
    "▁",
    " ",
    "  ",
    "a",
    "ab",
    "<0x41>",
    "<s>",
    "</s>",
    "<unk>",
    "\r\n",
    "\t",
    "é",
    "e\u0301",
    "漢",
    "🙂",
    "\0",
    "�",
]
TEXT = st.one_of(
    st.lists(st.sampled_from(PARTS), max_size=9).map("".join),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=20),
)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=80, deadline=None)
@given(text=TEXT)
@example(text="  ▁ <0x20>a")
def test_every_text_survives_to_the_byte(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode_document(text)
    assert tokenizer.text_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert not set(ids.tolist()) & {0, 1, 2}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_they_are_accepted_for_training(name):
    TOKENIZERS[name].check_lossless()


# By hand: ▁ 259, a 260, b 261, c 262, é 263, ▁a 264, ab 265, ▁▁ 266, ▁▁▁▁ 267, ▁ab 268; byte b is b + 3.
IDS = {
    ("dummy prefix", "ab"): [268],
    ("dummy prefix", " ab"): [266, 265],
    ("dummy prefix", "x"): [259, ord("x") + 3],
    ("dummy prefix", ""): [],
    ("dummy prefix", "a▁"): [264, 0xE2 + 3, 0x96 + 3, 0x81 + 3],
    ("dummy prefix", "a<0x41>"): [264, *(ord(c) + 3 for c in "<0x41>")],
    ("metaspace first", "ab"): [268],
    ("metaspace first", " ab"): [268],
    ("metaspace never", "ab"): [265],
    ("replace", "a a"): [260, 264],
}


@pytest.mark.parametrize(("name", "text"), IDS)
def test_ids(name, text):
    assert TOKENIZERS[name].encode(text).tolist() == IDS[name, text]


def test_a_leading_space_that_the_pipeline_swallows_is_a_byte_in_documents():
    assert TOKENIZERS["metaspace first"].encode_document(" ab").tolist() == [0x20 + 3, 268]


def test_a_continuation_keeps_its_first_space():
    tokenizer = TOKENIZERS["dummy prefix"]
    assert tokenizer.decode([268]) == "ab"
    assert tokenizer.decode([268], after=[1, 264]) == " ab"
    assert tokenizer.decode([268], after=[1]) == "ab"


def test_each_byte_of_an_incomplete_character_decodes_to_a_replacement_character():
    """As the ByteFallback decoder does; a byte-level vocabulary has one for the whole part of a character."""
    assert TOKENIZERS["replace"].decode([0xE6 + 3, 0xBC + 3, 260]) == "��a"
    assert byte_tokenizer().decode([0xE6 + 3, 0xBC + 3, ord("a") + 3]) == "�a"


@pytest.mark.parametrize("name", ["dummy prefix", "metaspace first", "replace"])
def test_training_counts_the_documents_bytes(name, tmp_path):
    """Rows are shorter than some documents; neither the counted bytes nor the text have the dummy prefix's space."""
    (tmp_path / "text").mkdir()
    texts = ["ab a", " a", "", "a" * 40, "x ▁ y", "  "]
    for number, text in enumerate(texts):
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    folder = vocabularies.save(tmp_path / "tokenizer", vocabularies.pipelines()[name])
    fractions = {"heldout_fraction": 0.0, "tuning_fraction": 0.0}
    corpus = open_corpus(DataConfig(corpus=str(tmp_path / "text"), tokenizer=str(folder), **fractions))
    batches = list(corpus.heldout_batches("train", batch_size=2, sequence_length=7))
    counted = sum(
        target_byte_count(b, corpus.tokenizer.byte_length_v) - prefix_byte_count(b, corpus.tokenizer) for b in batches
    )
    assert counted == sum(len(text.encode()) for text in texts)
    (whole,) = corpus.heldout_batches("train", batch_size=8, sequence_length=64)
    assert sorted(piece_texts([whole], corpus.tokenizer)) == sorted(text.encode() for text in texts)


def changed(**changes) -> tokenizers.Tokenizer:
    backend = byte_tokenizer()._backend
    for part, value in changes.items():
        setattr(backend, part, value)
    return backend


def byte_level(token: tokenizers.AddedToken) -> tokenizers.Tokenizer:
    backend = changed()
    backend.add_tokens([token])
    return backend


def missing_byte() -> tokenizers.Tokenizer:
    vocabulary = {t: i for i, t in enumerate((*vocabularies.SPECIALS, *vocabularies.BYTES[:-1], "▁", "a"))}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = vocabularies.DUMMY_PREFIX
    backend.add_special_tokens(list(vocabularies.SPECIALS))
    return backend


def spaced(**flags) -> tokenizers.Tokenizer:
    backend = vocabularies.bpe(vocabularies.DUMMY_PREFIX, strip=True)
    backend.add_tokens([vocabularies.added("<tool>", **flags)])
    return backend


ONLY_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
LOSSY = {
    "left strip": byte_level(vocabularies.added("<tool>", lstrip=True)),
    "right strip": byte_level(vocabularies.added("<tool>", rstrip=True)),
    "a letter that takes spaces": byte_level(vocabularies.added("q", lstrip=True)),
    "lower case": changed(normalizer=normalizers.Lowercase()),
    "nested NFKC": changed(normalizer=normalizers.Sequence([normalizers.Sequence([normalizers.NFKC()])])),
    "strip": changed(normalizer=normalizers.Strip()),
    "prepend": changed(normalizer=normalizers.Prepend("x")),
    "spaces dropped": changed(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), ONLY_BYTES])),
    "first space": changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)),
    "removed pattern": changed(
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split("\r", "removed"), ONLY_BYTES])
    ),
    "no bytes": changed(pre_tokenizer=pre_tokenizers.Whitespace()),
    "a byte without a token": missing_byte(),
    "a space for every added token": spaced(),
    "NFC with byte fallback": vocabularies.bpe(
        normalizers.Sequence([normalizers.NFC(), vocabularies.DUMMY_PREFIX]), strip=True
    ),
}


@pytest.mark.parametrize("name", LOSSY)
def test_tokenizers_that_change_text_are_refused(name):
    backend = LOSSY[name]
    pad, bos, eos = ("<pad>", "<bos>", "<eos>") if backend.token_to_id("<eos>") is not None else ("</s>", "<s>", "</s>")
    with pytest.raises(ConfigError, match="to train with"):
        Tokenizer(backend, pad=pad, bos=bos, eos=eos).check_lossless()


def test_a_document_that_a_rare_rule_changes_is_named(tmp_path):
    """No list of probes knows every rule: each document's ids are compared with its bytes."""
    odd = pre_tokenizers.Sequence([pre_tokenizers.Split("xyzzy", "removed"), ONLY_BYTES])
    folder = vocabularies.save(tmp_path / "odd", changed(pre_tokenizer=odd), {"eos_token": "<eos>"})
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text('{"text": "fine"}\n{"text": "say xyzzy twice"}\n')
    fractions = {"heldout_fraction": 0.0, "tuning_fraction": 0.0}
    corpus = open_corpus(DataConfig(corpus=str(tmp_path / "text"), tokenizer=str(folder), **fractions))
    with pytest.raises(ConfigError, match=r"document a\.jsonl:2: the tokenizer turns 'say xyzzy tw' into 'say  twice'"):
        list(corpus.heldout_batches("train", batch_size=1, sequence_length=32))


@pytest.mark.parametrize("normalizer", [normalizers.Sequence([]), normalizers.Sequence([normalizers.Sequence([])])])
def test_an_empty_sequence_of_normalizers_is_accepted(normalizer):
    tokenizer = Tokenizer(changed(normalizer=normalizer), pad="<pad>", bos="<bos>", eos="<eos>")
    tokenizer.check_lossless()
    text = "Å e\u0301 ﬁ  a \n\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_too_large_for_any_model_are_refused():
    backend = tokenizers.Tokenizer(models.BPE({"<eos>": 0, "a": 2**31}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    with pytest.raises(ConfigError, match=r"largest id is 2147483648; expected 0 to 16777215"):
        Tokenizer(backend, pad="<eos>", bos="<eos>", eos="<eos>")


def test_ids_without_a_token_are_known():
    backend = tokenizers.Tokenizer(models.BPE({"<eos>": 0, "a": 1, "b": 4}, []))
    backend.add_special_tokens(["<eos>"])
    tokenizer = Tokenizer(backend, pad="<eos>", bos="<eos>", eos="<eos>")
    np.testing.assert_array_equal(tokenizer.is_token_v, [True, True, False, False, True])
