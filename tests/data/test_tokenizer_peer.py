"""Encoding and decoding against transformers' AutoTokenizer, with tokenizers made here."""

import pytest
from tests.data import vocabularies
from tests.data.test_specials import RULES

from orogen.data.tokenizer import Tokenizer

TEXTS = ["ab", " ab", "  ab c", "a b\r\n\tc ", "é 漢 🙂 x", "abc" * 9, "   ", "don't , stop ."]
# Rules that transformers 5.23 ignores: without a post-processor it does not read these settings of a folder.
OURS = ("add_bos_token", "add_eos_token", "both")
SEQUENCES = [[268, 259, 260], [264, 0xE6 + 3, 0xBC + 3, 260, 0xA9 + 3], [1, 266, 265, 2], [0xE2 + 3]]


@pytest.fixture
def auto():
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained


@pytest.mark.peer
@pytest.mark.parametrize("name", [name for name in RULES if name not in OURS])
def test_prompts_have_the_ids_of_transformers(auto, tmp_path, name):
    settings, processor, _, _ = RULES[name]
    backend = vocabularies.bpe(vocabularies.DUMMY_PREFIX, strip=True)
    if processor is not None:
        backend.post_processor = processor
    vocabularies.save(tmp_path, backend, settings)
    ours, theirs = Tokenizer.load(tmp_path), auto(tmp_path)
    for text in TEXTS:
        assert ours.prompt_ids(text) == theirs(text).input_ids


@pytest.mark.peer
@pytest.mark.parametrize("name", vocabularies.pipelines())
def test_ids_and_texts_are_those_of_transformers(auto, tmp_path, name):
    vocabularies.save(tmp_path, vocabularies.pipelines()[name])
    ours, theirs = Tokenizer.load(tmp_path), auto(tmp_path)
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert ids == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    for ids in SEQUENCES:
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
