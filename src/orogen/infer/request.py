"""What a user asks of the engine, and what it answers. Importing this does not import jax."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Annotated, Any

from orogen.config.checks import check_types, require, require_choice

# How a reasoning budget ends: at its last token, or at the first newline after it, at most GRACE tokens later
# (the recipe of Nano 2; arXiv:2508.14444).
BUDGETS, GRACE = ("hard", "grace"), 500
# Why a request ended: an end token or stop string, its `max_tokens`, its client, or a fault that `Output.error` names.
STOP, LENGTH, CANCELLED, ERROR = "stop", "length", "cancelled", "error"
MOST_LOGPROBS, MOST_BIASES, MOST_STOPS, MOST_HELD = 20, 300, 16, 32
SEEDS = 2**63


class Full(Exception):
    """The queue has no room for a request now; later it may."""


class EngineFailed(Exception):
    """The engine has failed before, and takes nothing more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens of a request are chosen. The defaults sample from the model's own distribution.

    Applied in this order: `logit_bias`, penalties, temperature, then `top_k`, `top_p` and `min_p`.
    """

    temperature: Annotated[float, "0: the most likely token"] = 1.0
    top_k: Annotated[int, "only the k most likely tokens; 0: all"] = 0
    top_p: Annotated[float, "only the smallest set of most likely tokens with this probability"] = 1.0
    min_p: Annotated[float, "only tokens with this share of the most likely one's probability"] = 0.0
    presence_penalty: Annotated[float, "subtracted from the logits of tokens generated so far"] = 0.0
    frequency_penalty: Annotated[float, "subtracted once for each time a token was generated"] = 0.0
    repetition_penalty: Annotated[float, "divides positive and multiplies negative logits of all tokens so far"] = 1.0
    logit_bias: Annotated[tuple[tuple[int, float], ...], "(token id, what is added to its logit)"] = ()
    seed: Annotated[int | None, "of this request's random numbers; None: the engine draws one"] = None

    def __post_init__(self) -> None:
        check_types(self)
        require(0 <= self.temperature < math.inf, self, "temperature", "0 or more")
        require(self.top_k >= 0, self, "top_k", "0 or more")
        require(0 < self.top_p <= 1, self, "top_p", "above 0 up to 1")
        require(0 <= self.min_p <= 1, self, "min_p", "from 0 to 1")
        for field in ("presence_penalty", "frequency_penalty"):
            require(-2 <= getattr(self, field) <= 2, self, field, "from -2 to 2")
        require(0 < self.repetition_penalty < math.inf, self, "repetition_penalty", "above 0")
        fits = len(self.logit_bias) <= MOST_BIASES and all(-100 <= bias <= 100 for _, bias in self.logit_bias)
        require(fits, self, "logit_bias", f"at most {MOST_BIASES} numbers from -100 to 100")
        require(self.seed is None or 0 <= self.seed < SEEDS, self, "seed", "a whole number from 0 to 2**63 - 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """At most so many tokens between `<think>` and `</think>`, which is then forced. See BUDGETS."""

    tokens: int
    form: str = "hard"

    def __post_init__(self) -> None:
        check_types(self)
        require(self.tokens >= 0, self, "tokens", "0 or more")
        require_choice(self, "form", BUDGETS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grammar:
    """What a request's text must match, as text: a JSON schema, a regular expression, or a grammar, which is written as
    Lark does, with the first rule `start`, or as GBNF does, with `root`."""

    kind: str
    text: str

    def __post_init__(self) -> None:
        check_types(self)
        require_choice(self, "kind", ("json_schema", "regex", "grammar"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One continuation of a prompt. Of several samples of one prompt, each is a request; they share the prefix cache.

    stop: the text ends before the first of these strings. stop_ids: token ids that end it, besides the model's own,
    which `ignore_eos` makes tokens like any other. logprobs: how many most likely tokens are reported with each chosen
    one; None: none, and no log-probability. prompt_logprobs: the same for the prompt's own tokens but the first; such a
    request reads its whole prompt, since the prefix cache has no logits, and its `max_tokens` may be 0. shown: special
    tokens whose names the text shows, as `<think>`; others add no text. priority: lower goes first, then who came
    first. min_tokens: the tokens `held`, such as the model's own ends, are not among the first so many, and no stop
    string is looked for in them.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    min_tokens: int = 0
    held: tuple[int, ...] = ()
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    budget: Budget | None = None
    grammar: Grammar | None = None
    shown: tuple[int, ...] = ()
    priority: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        require(len(self.prompt) > 0, self, "prompt", "at least one token")
        scored = self.prompt_logprobs is not None
        require(self.max_tokens >= (0 if scored else 1), self, "max_tokens", "above 0, or 0 with prompt_logprobs")
        require(0 <= self.min_tokens <= self.max_tokens, self, "min_tokens", f"0 to max_tokens, {self.max_tokens}")
        require(len(self.held) <= MOST_HELD, self, "held", f"at most {MOST_HELD} tokens")
        require(len(self.stop) <= MOST_STOPS and all(self.stop), self, "stop", f"at most {MOST_STOPS} texts, not empty")
        for field in ("logprobs", "prompt_logprobs"):
            fits = (count := getattr(self, field)) is None or 0 <= count <= MOST_LOGPROBS
            require(fits, self, field, f"None, or from 0 to {MOST_LOGPROBS}")

    @property
    def cacheable(self) -> tuple[int, ...]:
        """The part of the prompt that need not be read if it was before."""
        return self.prompt if self.prompt_logprobs is None else ()


def held_back(request: Request, end_ids: Iterable[int]) -> Request:
    """The request with all that may end it held back until its `min_tokens`. end_ids: the tokenizer's.

    Raises ConfigError for more `stop_ids` than can be.
    """
    if not request.min_tokens:
        return request
    own = () if request.ignore_eos else sorted(end_ids)
    most = max(0, MOST_HELD - len(request.held) - len(own))
    require(len(request.stop_ids) <= most, request, "stop_ids", f"at most {most} beside min_tokens")
    return dataclasses.replace(request, held=(*request.held, *request.stop_ids, *own))


@dataclasses.dataclass(frozen=True)
class Chosen:
    """One token: its id, its log-probability under the model's own softmax (temperature 1, before biases, penalties and
    what is left out), and the most likely tokens with theirs. Where these were not requested: None, ()."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Output:
    """What came of a request since its last output.

    number: of the request. tokens: new ones. text: what they add, as far as it can be told (bytes of a character that
    is not yet complete, or what may begin a stop string, wait for the next). finish: why it ended, None while it goes
    on. stop: the stop string, or the one of `Request.stop_ids`, that ended it. error: what was wrong, where `finish` is
    ERROR. cached: tokens of the prompt that the prefix cache had; prompt: its tokens but the first, if their
    log-probabilities were requested. Both in the first output alone. experts: where the engine reports them, a numpy
    array (n, l, k) of those that the tokens read for this output went to: all of the prompt in the first one, later
    the tokens before the new ones. version: of the weights that chose the tokens, see `Engine.swap`.
    """

    number: int
    tokens: tuple[Chosen, ...] = ()
    text: str = ""
    finish: str | None = None
    error: str | None = None
    stop: str | int | None = None
    cached: int | None = None
    prompt: tuple[Chosen, ...] = ()
    experts: Any = None
    version: int = 0
