"""What a batch of requests asks of the sampler, as arrays that the host builds. Importing this does not import jax.

Letters: b batch (rows), v vocabulary, k biases, n tokens that are held back, w words of a mask.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from orogen.config.checks import ConfigError
from orogen.infer.request import GRACE, MOST_BIASES, MOST_HELD, MOST_LOGPROBS, Request

MASK_BITS = 32
_SMALLEST, _LARGEST = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
_ALL = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """What a compiled program must be able to do; what no request of the batch asks for costs nothing.

    draws: some temperature is above 0. restricts: some top_k, top_p or min_p. holds: some min_tokens. logprobs: None,
    or how many of the most likely tokens are reported: 0 or MOST_LOGPROBS, so that there are few programs.
    """

    draws: bool = False
    restricts: bool = False
    penalties: bool = False
    biases: bool = False
    masks: bool = False
    holds: bool = False
    budgets: bool = False
    logprobs: int | None = None

    @functools.cached_property
    def values(self) -> tuple[bool | int | None, ...]:
        """In the order of the fields."""
        return dataclasses.astuple(self)


class Knobs(NamedTuple):
    """The settings of each row, float32 unless said otherwise. A row without a request has those that do nothing.

    temperature_b: 0, or a normal number of float32: greedy below the smallest, which devices flush to 0. top_k_b int32.
    key_b2 uint32: threefry key of the request's seed. bias_ids_bk int32, bias_values_bk: padded with the id -1 and
    the value 0; k is 0 without the feature `biases`. budget_b int32: tokens between the markers of thinking, -1 without
    a budget; grace_b int32: how many more while no line ends. once_b bool: what follows the prompt's thought is no text
    in which another could begin, for a grammar says what it is. least_b int32: how many tokens come before any of
    held_ids_bn int32, padded with -1; n is 0 without the feature `holds`.
    """

    temperature_b: Any
    top_k_b: Any
    top_p_b: Any
    min_p_b: Any
    presence_b: Any
    frequency_b: Any
    repetition_b: Any
    key_b2: Any
    bias_ids_bk: Any
    bias_values_bk: Any
    budget_b: Any
    grace_b: Any
    once_b: Any
    least_b: Any
    held_ids_bn: Any


def features_of(requests: Iterable[Request]) -> Features:
    """What the requests ask for together."""
    requests = list(requests)
    samplings = [r.sampling for r in requests]
    drawn = [s for s in samplings if s.temperature >= _SMALLEST]
    asked = [r.logprobs for r in requests if r.logprobs is not None]
    return Features(
        draws=bool(drawn),
        restricts=any(s.top_k or s.top_p < 1 or s.min_p for s in drawn),
        penalties=any(s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1 for s in samplings),
        biases=any(s.logit_bias for s in samplings),
        masks=any(r.grammar is not None for r in requests),
        holds=any(r.min_tokens and r.held for r in requests),
        budgets=any(r.budget is not None for r in requests),
        logprobs=(MOST_LOGPROBS if max(asked) else 0) if asked else None,
    )


def check_ids(request: Request, vocab_size: int) -> None:
    """Raises ConfigError unless every token that is biased or held back is one of the vocabulary's."""
    biased = [token for token, _ in request.sampling.logit_bias]
    for name, ids in (("Sampling.logit_bias", biased), ("Request.held", request.held)):
        if odd := [token for token in ids if not 0 <= token < vocab_size]:
            raise ConfigError(f"{name} has token id {odd[0]}; expected 0 to {vocab_size - 1}")


def knobs_of(requests: Sequence[Request | None], features: Features) -> Knobs:
    """The settings of each row as numpy arrays; None: a row without a request, which is greedy.

    Raises ConfigError for a request without a seed, which the engine draws.
    """
    bias_ids_bk, bias_values_bk = _biases(requests, MOST_BIASES if features.biases else 0)
    samplings = [None if r is None else r.sampling for r in requests]
    budgets = [None if r is None else r.budget for r in requests]

    def column(field: str, none: float, low: float = -_LARGEST) -> np.ndarray:
        values = [none if s is None else min(max(getattr(s, field), low), _LARGEST) for s in samplings]
        return np.array(values, np.float32)

    temperature_b = column("temperature", 0)
    return Knobs(
        temperature_b=np.where(temperature_b < _SMALLEST, np.float32(0), temperature_b),
        top_k_b=np.array([min(s.top_k or _ALL, _ALL) if s else _ALL for s in samplings], np.int32),
        top_p_b=column("top_p", 1),
        min_p_b=column("min_p", 0),
        presence_b=column("presence_penalty", 0),
        frequency_b=column("frequency_penalty", 0),
        repetition_b=column("repetition_penalty", 1, _SMALLEST),
        key_b2=np.array([_key(None if s is None else s.seed, s is None) for s in samplings], np.uint32).reshape(-1, 2),
        bias_ids_bk=bias_ids_bk,
        bias_values_bk=bias_values_bk,
        budget_b=np.array([min(b.tokens, _ALL) if b else -1 for b in budgets], np.int32),
        # A budget of 0 asks for no thought at all, in both forms.
        grace_b=np.array([GRACE if b and b.form == "grace" and b.tokens else 0 for b in budgets], np.int32),
        once_b=np.array([r is not None and r.grammar is not None for r in requests], bool),
        least_b=np.array([min(r.min_tokens, _ALL) if r else 0 for r in requests], np.int32),
        held_ids_bn=_held(requests, MOST_HELD if features.holds else 0),
    )


def _key(seed: int | None, free: bool) -> tuple[int, int]:
    if seed is None and not free:
        raise ConfigError("Sampling.seed is None; expected a number by the time that a request is run")
    return (seed or 0) >> 32, (seed or 0) & 0xFFFFFFFF


def _biases(requests: Sequence[Request | None], width: int) -> tuple[np.ndarray, np.ndarray]:
    ids_bk = np.full((len(requests), width), -1, np.int32)
    values_bk = np.zeros((len(requests), width), np.float32)
    for row, request in enumerate(requests):
        for place, (token, value) in enumerate(request.sampling.logit_bias if request else ()):
            ids_bk[row, place], values_bk[row, place] = token, value
    return ids_bk, values_bk


def _held(requests: Sequence[Request | None], width: int) -> np.ndarray:
    held_ids_bn = np.full((len(requests), width), -1, np.int32)
    for row, request in enumerate(requests):
        held = request.held[:width] if request else ()
        held_ids_bn[row, : len(held)] = held
    return held_ids_bn


def words_of_mask(vocab_size: int) -> int:
    """How many uint32 hold a mask of allowed tokens: token i is bit i % 32 of word i // 32."""
    return -(-vocab_size // MASK_BITS)
