"""Continuations of several prompts, by an engine of their own."""

from collections.abc import Sequence

from orogen.checkpoint.open import Opened
from orogen.config.checks import ConfigError
from orogen.config.engine import EngineConfig
from orogen.config.run import MAX_LENGTH
from orogen.infer.engine import Engine
from orogen.infer.request import ERROR, SEEDS, Request, Sampling

MOST_SLOTS = 64  # of prompts that are continued together
SHORTEST = 256  # tokens to which an engine's texts are rounded up at least, so that prompts share programs


def generate(
    opened: Opened, prompts: Sequence[str], *, tokens: int, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0
) -> list[str]:
    """Continuations of `prompts`, each up to `tokens` tokens or the first that ends a text.

    The tokenizer's folder decides what is put around a prompt; rows of the vocabulary without a token are not sampled.
    Row i is drawn with the seed `seed` + i, so that equal prompts are continued differently. Raises ConfigError for a
    model without a tokenizer, and if prompt and continuation have more than MAX_LENGTH tokens or need more positions
    than the model has learned; FloatingPointError if logits are no numbers.
    """
    tokenizer = opened.tokenizer
    if tokenizer is None:
        raise ConfigError("the checkpoint has no tokenizer.json; expected one, to read the prompt with")
    ids = [tuple(tokenizer.prompt_ids(prompt)) for prompt in prompts]
    longest = max(map(len, ids))
    check_length(opened, longest, tokens)
    requests = [
        Request(
            prompt=one,
            max_tokens=tokens,
            sampling=Sampling(temperature=temperature, top_p=top_p, seed=(seed + row) % SEEDS),
        )
        for row, one in enumerate(ids)
    ]
    outputs = Engine(opened, engine_for(rows=len(ids), length=longest + tokens)).run(requests)
    for prompt, (*_, last) in zip(prompts, outputs, strict=True):
        if last.finish == ERROR:
            raise FloatingPointError(f"the continuation of {prompt!r} failed: {last.error}")
    return ["".join(output.text for output in each) for each in outputs]


def check_length(opened: Opened, prompt: int, tokens: int) -> None:
    """Raises ConfigError if a prompt of so many tokens and so many new ones are more than the model, or anyone, has
    room for."""
    positions = opened.config.learned_positions
    most = MAX_LENGTH if positions is None else min(positions, MAX_LENGTH)
    if tokens > most - prompt:
        expected = f"{most} in all" if most != positions else f"ModelConfig.learned_positions = {positions}"
        raise ConfigError(f"a prompt of {prompt} tokens and {tokens} new ones; expected at most {expected}")


def engine_for(*, rows: int, length: int) -> EngineConfig:
    """For texts of at most `length` tokens each, used once: nothing is cached, and layers that repeat are compiled
    once."""
    return EngineConfig(
        slots=min(rows, MOST_SLOTS), queue=max(rows, 1), max_length=rounded(length), prefix_cache=False,
        written_out=False,
    )  # fmt: skip


def rounded(length: int) -> int:
    """The next power of two, at least SHORTEST."""
    return max(SHORTEST, 1 << (length - 1).bit_length())
