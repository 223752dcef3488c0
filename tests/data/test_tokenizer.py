"""Round trips, specials, files and determinism of both tokenizers."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.data.loader import open_corpus
from orogen.data.specials import SPECIALS
from orogen.data.tokenizer import Tokenizer, check_vocab_size
from orogen.data.vocabulary import byte_tokenizer, make_tokenizer, train_bpe

TEXTS = [
    f"def function_{i}(value):\n    '''Returns the value {i}.'''\n    return value + {i * 37}  # café\r\n"
    for i in range(40)
]
TOKENIZERS = {"byte": byte_tokenizer(), "bpe": train_bpe(TEXTS, vocab_size=330)}
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)  # Cs: surrogates, which UTF-8 cannot hold
AWKWARD = [
    "",
    " ",
    "   leading",
    "tail   ",
    "\r\n\r\n\n\r",
    "\t\x00\x01\x1f\x7f\x85",
    "🙂👩‍👩‍👧 é é 漢字",
    "\ufeffbom \ufffd",
    "<bos>a<eos><pad>",
    "Ġ Ċ",
]


@pytest.fixture(params=sorted(TOKENIZERS))
def tokenizer(request):
    return TOKENIZERS[request.param]


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
def test_any_text_survives(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.byte_length_v[ids].sum() == len(text.encode())


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts_survive_and_hold_no_special(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.dtype == np.int32
    assert not set(ids.tolist()) & {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}


def test_batch_encodes_as_one_by_one(tokenizer):
    for one, ids in zip(AWKWARD, tokenizer.encode_batch(AWKWARD), strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(one))
        assert ids.dtype == np.int32


def test_the_names_of_specials_in_a_marked_text_are_these_tokens(tokenizer):
    words = tokenizer.encode
    expected = [*words("a "), tokenizer.bos_id, *words(" b\n"), tokenizer.eos_id, *words("<bos")]
    assert tokenizer.encode_marked("a <bos> b\n<eos><bos").tolist() == expected
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(words("a <bos> b\n<eos>").tolist())


def test_specials_are_0_1_2_and_decode_to_nothing(tokenizer):
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.decode([1, *tokenizer.encode("ab"), 2, 0, 0]) == "ab"
    assert tokenizer.byte_length_v[:3].tolist() == [0, 0, 0]


def test_a_split_character_decodes_to_its_bytes(tokenizer):
    ids = tokenizer.encode("🙂")
    assert len(ids) == 4
    assert tokenizer.decode_bytes(ids[:2]) == "🙂".encode()[:2]
    assert tokenizer.decode(ids[:2]) == "\ufffd"


@pytest.mark.parametrize("wrong", [-1, 10**6, 2**63, -(2**63) - 1])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer, wrong):
    for ids in ([5, wrong], iter([5, wrong])):
        with pytest.raises(ConfigError, match=rf"token ids from {min(5, wrong)} to {max(5, wrong)}: expected 0 to "):
            tokenizer.decode_bytes(ids)


def test_bytes_are_their_value_plus_three():
    assert byte_tokenizer().encode("a\x00ÿ").tolist() == [ord("a") + 3, 3, 0xC3 + 3, 0xBF + 3]
    assert byte_tokenizer().vocab_size == 259


@settings(max_examples=100, deadline=None)
@given(text=ANY_TEXT)
@example(text="<bos>")
def test_the_byte_lookup_agrees_with_its_tokenizers_file(text):
    tokenizer = TOKENIZERS["byte"]
    assert tokenizer._token_of_byte is not None
    assert [tokenizer.bos_id, *tokenizer.encode(text).tolist()] == tokenizer._backend.encode(text).ids


def test_bpe_has_the_requested_size_and_merges(tokenizer):
    bpe = TOKENIZERS["bpe"]
    assert bpe.vocab_size == 330
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_saved_files_load_to_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    for path in (tmp_path / "new" / "folder", tmp_path / "new" / "folder" / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode("<bos> é\r\n").tolist() == tokenizer.encode("<bos> é\r\n").tolist()
        assert (loaded.pad_id, loaded.bos_id, loaded.eos_id) == (0, 1, 2)
    assert sorted(f.name for f in (tmp_path / "new" / "folder").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_the_saved_file_is_a_hugging_face_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert backend.decode(backend.encode("a  b\r\n🙂").ids) == "a  b\r\n🙂"
    assert [backend.id_to_token(i) for i in range(3)] == list(SPECIALS)


def test_specials_are_named_by_the_config_beside_the_file(tmp_path):
    byte_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<bos>"}, "bos_token": None}))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.pad_id, loaded.bos_id, loaded.eos_id) == (1, 1, 1)


@pytest.mark.parametrize("role", ["pad_token", "bos_token", "eos_token"])
@pytest.mark.parametrize("name", [["x"], 7, {"content": ["x"]}])
def test_a_special_whose_name_is_not_a_string_is_refused(tmp_path, role, name):
    byte_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", role: name}))
    with pytest.raises(ConfigError, match=rf"tokenizer_config\.json: {role} is .*: expected the name of a token"):
        Tokenizer.load(tmp_path)


def test_training_twice_gives_one_file():
    """In two more processes, whose hash seeds, which order Python's and Rust's tables, differ."""
    command = (
        "import sys, json; from orogen.data.vocabulary import train_bpe;"
        "print(train_bpe(json.load(sys.stdin), vocab_size=330).fingerprint)"
    )
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", command], input=json.dumps(TEXTS), capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == TOKENIZERS["bpe"].fingerprint


def test_a_vocabulary_out_of_reach_is_refused():
    with pytest.raises(ValueError, match=r"DataConfig.vocab_size = 5000: expected at most \d+"):
        train_bpe(TEXTS, vocab_size=5000)


def test_model_and_tokenizer_must_agree_on_the_vocabulary():
    check_vocab_size(TOKENIZERS["byte"], 259)
    with pytest.raises(ValueError, match=r"ModelConfig.vocab_size = 256: expected 259"):
        check_vocab_size(TOKENIZERS["byte"], 256)


def test_a_tokenizer_path_checks_vocab_size(tmp_path):
    TOKENIZERS["bpe"].save(tmp_path)
    config = DataConfig(corpus="stdlib", tokenizer=str(tmp_path), vocab_size=330)
    assert make_tokenizer(config, []).fingerprint == TOKENIZERS["bpe"].fingerprint
    with pytest.raises(ValueError, match=r"DataConfig.vocab_size = 331: expected 330"):
        make_tokenizer(DataConfig(corpus="stdlib", tokenizer=str(tmp_path), vocab_size=331), [])


def test_files_without_a_byte_level_tokenizer_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.*expected 'byte', 'bpe' or a tokenizer.json"):
        Tokenizer.load(tmp_path / "absent")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken.json.*expected a Hugging Face tokenizer.json"):
        Tokenizer.load(tmp_path / "broken.json")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁word": 0}, unk_token="▁word"))
    words.add_special_tokens(list(SPECIALS))
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(ValueError, match=r"token 0 is '▁word': expected a byte-level vocabulary"):
        Tokenizer.load(tmp_path / "words.json")
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(tmp_path / "bare.json"))
    with pytest.raises(ValueError, match=r"no token '<pad>'"):
        Tokenizer.load(tmp_path / "bare.json")


def edited(folder, **changes) -> Tokenizer:
    """The tests' BPE with `changes` to its tokenizer.json; a dict changes the keys inside."""
    TOKENIZERS["bpe"].save(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(content[key], dict) else value
    file.write_text(json.dumps(content))
    return Tokenizer.load(folder)


PADDING = {"strategy": {"Fixed": 500}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
CHANGING = {
    "truncation": {"truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}},
    "padding": {"padding": {**PADDING, "pad_type_id": 0, "pad_token": "<pad>"}},
    "dropout": {"model": {"dropout": 0.9}},
}


@pytest.mark.parametrize("changes", CHANGING.values(), ids=CHANGING)
def test_truncation_padding_and_dropout_in_a_file_are_ignored(tmp_path, changes):
    tokenizer = edited(tmp_path, **changes)
    for ids in (tokenizer.encode(TEXTS[0]), *tokenizer.encode_batch([TEXTS[0]])):
        assert ids.tolist() == TOKENIZERS["bpe"].encode(TEXTS[0]).tolist()


def without_the_byte_tab() -> dict:
    model = json.loads(TOKENIZERS["bpe"]._backend.to_str())["model"]
    return {**model, "vocab": {token.replace("ĉ", "ĉĉ"): i for token, i in model["vocab"].items()}}


LOSSY = {
    "normalizer": ({"normalizer": {"type": "NFC"}}, "has a normalizer"),
    "a byte": ({"model": without_the_byte_tab()}, "no token for byte 9; expected all 256"),
    "prefix space": (
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}},
        "expected no change",
    ),
}


@pytest.mark.parametrize(("changes", "message"), LOSSY.values(), ids=LOSSY)
def test_training_refuses_a_tokenizer_that_loses_text(tmp_path, changes, message):
    lossy = edited(tmp_path / "tokenizer", **changes)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("text")
    fractions = {"heldout_fraction": 0.0, "tuning_fraction": 0.0}
    config = DataConfig(corpus=str(tmp_path / "text"), tokenizer=str(tmp_path / "tokenizer"), **fractions)
    for tokenizer in (None, lossy):
        with pytest.raises(ConfigError, match=message):
            open_corpus(config, tokenizer=tokenizer)


@pytest.mark.parametrize("ids", [[-1], [259], [5, 4096]])
def test_decoding_refuses_ids_outside_the_vocabulary(ids):
    with pytest.raises(ValueError, match="expected 0 to 258"):
        TOKENIZERS["byte"].decode(ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab": {"a": 2**32 - 1}}, "model.vocab is"),  # a list of as many entries would not fit in memory
        ({"vocab": {"a": -1}}, "model.vocab is"),
        ({"continuing_subword_prefix": "##"}, "continuing_subword_prefix is '##'; expected none"),
        ({"merges": [[1, 2]]}, "expected a Hugging Face tokenizer.json"),
    ],
)
def test_a_tokenizer_of_wrong_types_or_ranges_is_refused(tmp_path, change, message):
    byte_tokenizer().save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"] |= change
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(message)):
        Tokenizer.load(tmp_path)
