"""Where a folder names its specials, what ends a text, and what is put around a prompt."""

import json

import pytest
import tokenizers
from tests.data import vocabularies
from tests.data.vocabularies import template
from tokenizers import processors

from orogen.config.checks import ConfigError
from orogen.data.tokenizer import Tokenizer
from orogen.data.vocabulary import byte_tokenizer, train_bpe

BOTH = {"bos_token": "<s>", "eos_token": "</s>"}
FRONT, BACK = template("<s>"), template("", "</s>")
# name: (tokenizer_config.json, post-processor, ids before the text, ids after it)
RULES = {
    "nothing is said": (BOTH, None, [], []),
    "add_bos_token": (BOTH | {"add_bos_token": True}, None, [1], []),
    "add_eos_token": (BOTH | {"add_eos_token": True}, None, [], [2]),
    "both": (BOTH | {"add_bos_token": True, "add_eos_token": True}, None, [1], [2]),
    "post-processor": (BOTH, FRONT, [1], []),
    "post-processor at the end": (BOTH, BACK, [], [2]),
    "post-processor with two": (BOTH, template("<s> <s>", "</s>"), [1, 1], [2]),
    "the post-processor wins over a setting": (BOTH | {"add_bos_token": False}, FRONT, [1], []),
    "and over one of the other end": (BOTH | {"add_eos_token": True}, FRONT, [1], []),
    "no BOS to add": ({"bos_token": None, "eos_token": "</s>", "add_bos_token": True}, None, [], []),
    "a BOS that is not added": (BOTH | {"add_bos_token": False}, None, [], []),
}


def folder_of(tmp_path, settings, processor=None, **files):
    backend = vocabularies.bpe(vocabularies.DUMMY_PREFIX, strip=True)
    if processor is not None:
        backend.post_processor = processor
    return vocabularies.save(tmp_path / "hf", backend, settings, **files)


@pytest.mark.parametrize("name", RULES)
def test_the_folder_says_what_is_put_around_a_prompt(tmp_path, name):
    settings, processor, front, back = RULES[name]
    tokenizer = Tokenizer.load(folder_of(tmp_path, settings, processor))
    assert tokenizer.prompt_ids("ab") == [*front, 268, *back]


@pytest.mark.parametrize("pad", [True, False])
def test_truncation_and_padding_do_not_change_prompts(tmp_path, pad):
    backend = vocabularies.bpe(vocabularies.DUMMY_PREFIX, strip=True)
    backend.post_processor = template("<s>", "</s>")
    if pad:
        backend.enable_padding(length=8)
    else:
        backend.enable_truncation(2)
    tokenizer = Tokenizer.load(vocabularies.save(tmp_path / "hf", backend, BOTH))
    assert tokenizer.prompt_ids("ab") == [1, 268, 2]


@pytest.mark.parametrize("single", ["<s>", "<s> $B", "<gone> $A"])
def test_a_post_processor_that_drops_the_text_or_panics_is_refused(tmp_path, single):
    folder = folder_of(tmp_path, BOTH, FRONT)
    file = json.loads((folder / "tokenizer.json").read_text())
    steps = [{"Sequence": {"id": n[1:]}} if n[0] == "$" else {"SpecialToken": {"id": n}} for n in single.split()]
    file["post_processor"]["single"] = [{kind: {**step, "type_id": 0} for kind, step in s.items()} for s in steps]
    (folder / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(ConfigError, match="post-processor"):
        Tokenizer.load(folder)


def test_an_empty_prompt_is_bos(tmp_path):
    assert Tokenizer.load(folder_of(tmp_path, BOTH)).prompt_ids("") == [1]
    assert Tokenizer.load(folder_of(tmp_path, {"eos_token": "</s>"})).prompt_ids("") == [2]


def test_our_own_tokenizers_put_bos_in_front(tmp_path):
    byte_tokenizer().save(tmp_path)
    assert Tokenizer.load(tmp_path).prompt_ids("a") == byte_tokenizer().prompt_ids("a") == [1, ord("a") + 3]


OFFSETS = processors.ByteLevel(trim_offsets=True)
POST = {
    "none": None,
    "offsets": OFFSETS,
    "bos and eos": template("<s>", "</s>"),
    "offsets, bos and eos": processors.Sequence([OFFSETS, template("<s>", "</s>")]),
    "roberta": processors.RobertaProcessing(("</s>", 2), ("<s>", 1)),
}


@pytest.mark.parametrize("name", POST)
def test_the_saved_tokenizer_of_a_run_puts_bos_in_front_for_other_readers_too(name, tmp_path):
    before = Tokenizer.load(folder_of(tmp_path, BOTH, POST[name])).as_in_training()
    before.save(tmp_path / "saved")
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    for text in ("ab", "", "<s> a"):
        assert backend.encode(text).ids[:1] == [1]
    assert backend.encode("ab").ids == before.prompt_ids("ab") == [1, 268]
    again = Tokenizer.load(tmp_path / "saved")
    assert again.fingerprint == before.fingerprint == again.as_in_training().fingerprint
    assert again.prompt_ids("ab") == [1, 268]
    kept = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())["post_processor"]
    assert ("processors" in kept) == ("offsets" in name)  # what only moves offsets stays


@pytest.mark.peer
@pytest.mark.parametrize("name", ["byte", "bpe", *POST])
def test_transformers_puts_the_same_around_a_text(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    if name in POST:
        tokenizer = Tokenizer.load(folder_of(tmp_path, BOTH, POST[name])).as_in_training()
    else:
        tokenizer = byte_tokenizer() if name == "byte" else train_bpe(["to be or not to be"] * 3, vocab_size=262)
    tokenizer.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in ("ab", "", "a  b\n é"):
        ids = theirs(text)["input_ids"]
        assert ids == tokenizer.prompt_ids(text) and ids[0] == tokenizer.bos_id
    assert theirs.decode(theirs("a b")["input_ids"], skip_special_tokens=True) == "a b"


def test_a_run_puts_bos_in_front_whatever_its_tokenizer_came_from(tmp_path):
    tokenizer = Tokenizer.load(folder_of(tmp_path, BOTH))
    assert tokenizer.as_in_training().prompt_ids("ab") == [1, 268]
    assert tokenizer.prompt_ids("ab") == [268]


# name: (tokenizer_config.json, other files, pad, bos, eos, end_ids)
PLACES = {
    "the tokenizer's own": (BOTH, {}, 2, 1, 2, {2}),
    "special_tokens_map.json": ({}, {"special_tokens_map": BOTH}, 2, 1, 2, {2}),
    "the map has precedence": (
        {"eos_token": "<unk>"},
        {"special_tokens_map": {"eos_token": {"content": "</s>"}}},
        2,
        2,
        2,
        {2},
    ),
    "except beside added_tokens_decoder": (
        {"eos_token": "</s>", "added_tokens_decoder": {}},
        {"special_tokens_map": {"eos_token": "<unk>"}},
        2,
        2,
        2,
        {2},
    ),
    "ids of config.json": ({}, {"config": {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}}, 0, 1, 2, {2}),
    "ids of generation_config.json": ({}, {"generation_config": {"eos_token_id": [2, 260]}}, 2, 2, 2, {2, 260}),
    "several ends": (BOTH, {"generation_config": {"eos_token_id": [261, 262]}}, 2, 1, 2, {2, 261, 262}),
    "ends of both": (
        BOTH,
        {"generation_config": {"eos_token_id": 261}, "config": {"eos_token_id": [260]}},
        2,
        1,
        2,
        {2, 260, 261},
    ),
    "none": (BOTH, {"config": {"eos_token_id": None, "pad_token_id": -1}}, 2, 1, 2, {2}),
}


@pytest.mark.parametrize("name", PLACES)
def test_specials_are_found_where_folders_name_them(tmp_path, name):
    settings, files, pad, bos, eos, end_ids = PLACES[name]
    tokenizer = Tokenizer.load(folder_of(tmp_path, settings, **files))
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (pad, bos, eos)
    assert tokenizer.end_ids == end_ids


def test_a_checkpoint_folder_keeps_the_ends_above_its_tokenizer(tmp_path):
    folder = folder_of(tmp_path, BOTH)
    folder.rename(tmp_path / "tokenizer")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 261]}))
    (tmp_path / "huggingface.json").write_text(json.dumps({"config": {"eos_token_id": 262}}))
    assert Tokenizer.load(tmp_path / "tokenizer").end_ids == {2, 261, 262}


@pytest.mark.parametrize("value", ["x", 2.0, True, [2, "x"], {"a": 1}])
def test_malformed_ids_are_refused(tmp_path, value):
    folder = folder_of(tmp_path, BOTH, generation_config={"eos_token_id": value})
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id is .*: expected a token's id"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "{", '"x"', "\x00"])
@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "config", "generation_config"])
def test_malformed_files_beside_are_refused(tmp_path, name, text):
    folder = folder_of(tmp_path, BOTH)
    (folder / f"{name}.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"{name}\.json.* expected (JSON|a JSON object|less)"):
        Tokenizer.load(folder)


def test_a_folder_that_names_no_eos_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: eos_token is None: expected the name of a token"):
        Tokenizer.load(folder_of(tmp_path, {"bos_token": "<s>"}))
