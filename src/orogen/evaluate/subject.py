"""The model that is evaluated: it scores given tokens and continues prompts, on its plan."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from orogen.checkpoint.open import Opened
from orogen.config.checks import ConfigError
from orogen.config.engine import EngineConfig
from orogen.config.evaluate import EvaluateConfig
from orogen.data.tokenizer import Tokenizer
from orogen.evaluate.carried import PIECE, Carrier
from orogen.evaluate.likelihood import Row, Score, Scorer
from orogen.infer.engine import Engine
from orogen.infer.generate import check_length, rounded
from orogen.infer.request import ERROR, MOST_STOPS, Request, Sampling
from orogen.train.heldout import at_work

WINDOW = 2048  # as lm-eval takes for models that do not say how long their texts may be
TOGETHER = 4  # prompts per slot that an engine gets at a time, after which progress is reported


class Prompt(NamedTuple):
    """What is to be continued: ids, by at most so many tokens, up to the first of these strings."""

    ids: tuple[int, ...]
    tokens: int
    stops: tuple[str, ...] = ()
    sampling: Sampling = Sampling(temperature=0)


class Subject:
    """A model on its plan, with what an evaluation asks of it. engine: of generation; its `max_length` grows with the
    prompts. progress: called after each part of the work."""

    def __init__(
        self, opened: Opened, config: EvaluateConfig, engine: EngineConfig, progress: Callable[[], None] = lambda: None
    ):
        self.opened, self.config, self.progress = opened, config, progress
        self.scorer = Scorer(opened, dtype=engine.compute_dtype, batch_tokens=config.batch_tokens)
        self._settings = engine
        self._engine: Engine | None = None

    def give(self, params: Any, buffers: Any) -> None:
        """Takes other weights of the same model."""
        self.opened = self.opened._replace(params=params, buffers=buffers)
        self._engine = None

    def release(self) -> None:
        """Lets go of the weights, and of what was computed with them; what was compiled for scores stays."""
        self.give(None, None)

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ConfigError if the checkpoint has none."""
        if self.opened.tokenizer is None:
            raise ConfigError("the checkpoint has no tokenizer.json; expected one, to read texts with")
        return self.opened.tokenizer

    @property
    def max_length(self) -> int:
        """The most tokens of a window, or of a request of lm-eval. Raises ConfigError if the model has fewer
        positions."""
        positions, asked = self.opened.config.learned_positions, self.config.max_length
        if positions is not None and asked is not None and asked > positions:
            raise ConfigError(
                f"EvaluateConfig.max_length is {asked}; expected at most ModelConfig.learned_positions = {positions}"
            )
        return asked or min(WINDOW, positions or WINDOW)

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """See `Scorer.score`."""
        return self.scorer.score(rows, (self.opened.params, self.opened.buffers), self.progress)

    def carry(self, rows: Sequence[Row]) -> list[Score]:
        """See `Carrier.score`."""
        return self._carrier.score(rows, (self.opened.params, self.opened.buffers), self.progress)

    @functools.cached_property
    def _carrier(self) -> Carrier:
        return Carrier(self.opened, piece=self.config.max_length or PIECE, dtype=self._settings.compute_dtype)

    def write(self, prompts: Sequence[Prompt]) -> list[str]:
        """The continuation of each prompt. Raises ConfigError for what the model has no room for, FloatingPointError if
        logits are no numbers."""
        if not prompts:
            return []
        for prompt in prompts:
            check_length(self.opened, len(prompt.ids), prompt.tokens)
        engine = self._engine_of(max(len(prompt.ids) + prompt.tokens for prompt in prompts))
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number].ids))
        texts, at_once = [""] * len(prompts), TOGETHER * engine.config.slots
        for start in range(0, len(order), at_once):
            numbers = order[start : start + at_once]
            outputs = engine.run([_request(prompts[number]) for number in numbers])
            for number, (*before, last) in zip(numbers, outputs, strict=True):
                if last.finish == ERROR:
                    raise FloatingPointError(f"a continuation failed: {last.error}")
                text = "".join(output.text for output in (*before, last))
                texts[number] = shortened(text, prompts[number].stops)
            self.progress()
        return texts

    def _engine_of(self, length: int) -> Engine:
        """An engine for texts of so many tokens; a longer one replaces it."""
        if self._engine is None or self._engine.length < length:
            settings = self._settings
            if settings.max_length < length:
                settings = dataclasses.replace(settings, max_length=rounded(length))
            params = at_work(self.opened.params, self.opened.plan)
            self._engine = Engine(self.opened._replace(params=params), settings)
        return self._engine


def _request(prompt: Prompt) -> Request:
    stops = tuple(stop for stop in dict.fromkeys(prompt.stops) if stop)[:MOST_STOPS]
    return Request(prompt=prompt.ids, max_tokens=prompt.tokens, stop=stops, sampling=prompt.sampling)


def shortened(text: str, stops: Sequence[str]) -> str:
    """The text before the first of `stops`: an engine watches for MOST_STOPS of them only."""
    return text[: min((place for stop in stops if stop and (place := text.find(stop)) >= 0), default=len(text))]
