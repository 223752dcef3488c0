"""Small tokenizers of the kinds that published models have, made with the `tokenizers` library, and their folders."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIALS = ("<unk>", "<s>", "</s>")
PIECES = ("▁", "a", "b", "c", "é", "▁a", "ab", "▁▁", "▁▁▁▁", "▁ab", "bc")
MERGES = [("a", "b"), ("▁", "a"), ("▁", "▁"), ("▁▁", "▁▁"), ("▁", "ab"), ("b", "c")]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
UNSPACED = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
DUMMY_PREFIX = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def bpe(normalizer=None, pre_tokenizer=None, *, strip: bool) -> Tokenizer:
    """BPE with byte fallback: <unk> <s> </s> are ids 0 to 2, byte b is b + 3, the pieces begin at 259."""
    vocabulary = {token: i for i, token in enumerate((*SPECIALS, *BYTES, *PIECES))}
    return _piped(
        Tokenizer(models.BPE(vocabulary, MERGES, unk_token="<unk>", byte_fallback=True, fuse_unk=True)),
        normalizer,
        pre_tokenizer,
        strip=strip,
    )


def unigram(normalizer=None, pre_tokenizer=None, *, strip: bool) -> Tokenizer:
    """The same ids as `bpe`, segmented by likelihood; byte tokens are likely, since they have score 0."""
    scores = [(token, 0.0) for token in (*SPECIALS, *BYTES)] + [(p, -float(i + 2)) for i, p in enumerate(PIECES)]
    return _piped(Tokenizer(models.Unigram(scores, 0, byte_fallback=True)), normalizer, pre_tokenizer, strip=strip)


def _piped(tokenizer: Tokenizer, normalizer, pre_tokenizer, *, strip: bool) -> Tokenizer:
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence([*UNSPACED, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


def metaspace(scheme: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)


def pipelines() -> dict[str, Tokenizer]:
    """A tokenizer for each way in which models with byte fallback treat spaces."""
    to_space = normalizers.Replace(" ", "▁")
    return {
        "dummy prefix": bpe(DUMMY_PREFIX, strip=True),
        "metaspace first": bpe(None, metaspace("first"), strip=True),
        "metaspace always": bpe(None, metaspace("always"), strip=True),
        "metaspace never": bpe(None, metaspace("never"), strip=False),
        "replace": bpe(to_space, pre_tokenizers.Split(" ", "merged_with_previous"), strip=False),
        "unigram": unigram(DUMMY_PREFIX, strip=True),
        "unigram metaspace": unigram(normalizers.Sequence([]), metaspace("first"), strip=True),
    }


def template(front: str = "", back: str = "") -> processors.PostProcessor:
    return processors.TemplateProcessing(single=f"{front} $A {back}".strip(), special_tokens=[("<s>", 1), ("</s>", 2)])


def added(content: str, **flags: bool) -> AddedToken:
    return AddedToken(content, special=False, **{"normalized": False, **flags})


def save(folder: Path, tokenizer: Tokenizer, settings: dict[str, Any] | None = None, **files: dict[str, Any]) -> Path:
    """A folder with tokenizer.json, tokenizer_config.json and `files`, by name without `.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} if settings is None else settings
    files = {"tokenizer_config": plain | named, **files}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
