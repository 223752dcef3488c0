"""The tokenizer of a new run: the 256 bytes, a byte-pair encoding trained on its texts, or an existing one."""

from collections.abc import Iterable

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.data import long_text
from orogen.data.panics import panics_refused
from orogen.data.specials import BOS, EOS, PAD, SPECIALS
from orogen.data.token_bytes import BYTE_OF_CHARACTER
from orogen.data.tokenizer import Tokenizer, check_vocab_size

# Words with their leading space, numbers by threes, punctuation, line ends, indentation: the split that OpenAI's
# cl100k_base uses (github.com/openai/tiktoken, tiktoken_ext/openai_public.py), without possessive quantifiers.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_tokenizer() -> Tokenizer:
    """The 256 bytes after the three specials: byte b is token b + 3."""
    characters = sorted(BYTE_OF_CHARACTER, key=lambda c: BYTE_OF_CHARACTER[c])
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate((*SPECIALS, *characters))}, merges=[])
    )
    backend.add_special_tokens(list(SPECIALS))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, pad=PAD, bos=BOS, eos=EOS).as_in_training()


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Byte-level BPE trained on the texts: specials, 256 bytes, then merges. The same texts give the same file.

    Raises ConfigError if the texts have too few repeated pairs for `vocab_size`. Source: arXiv:1508.07909.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(BYTE_OF_CHARACTER),
        show_progress=False,
    )
    # The cutter has a copy: the library locks a tokenizer while it trains, and the texts are split meanwhile.
    cutter = long_text.Cutter(tokenizers.Tokenizer.from_str(backend.to_str()), [], [])
    with panics_refused():
        backend.train_from_iterator((piece for text in texts for piece in cutter.pieces(text)), trainer)
    if backend.get_vocab_size() != vocab_size:
        raise ConfigError(
            f"DataConfig.vocab_size = {vocab_size}: expected at most {backend.get_vocab_size()}, "
            "which is all that the train split's repeated pairs give"
        )
    return Tokenizer(backend, pad=PAD, bos=BOS, eos=EOS).as_in_training()


def make_tokenizer(config: DataConfig, train_texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that the config names, with bos before prompts; `train_texts` are read only to train one.

    Raises ConfigError.
    """
    if config.tokenizer == "byte":
        return byte_tokenizer()
    if config.tokenizer == "bpe":
        assert config.vocab_size is not None
        return train_bpe(train_texts, vocab_size=config.vocab_size)
    tokenizer = Tokenizer.load(config.tokenizer)
    if config.vocab_size is not None:
        check_vocab_size(tokenizer, config.vocab_size, name="DataConfig.vocab_size")
    return tokenizer.as_in_training()
