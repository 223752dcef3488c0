"""The model that is evaluated: it scores given tokens and continues prompts, on its plan."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from orogen.checkpoint.folders import HuggingFaceFolder, OrogenFolder, RunFolder, read_kept
from orogen.checkpoint.open import Opened
from orogen.config.checks import ConfigError
from orogen.config.engine import EngineConfig
from orogen.config.evaluate import EvaluateConfig
from orogen.config.json_file import read_json
from orogen.convert.defaults import DEFAULTS
from orogen.data.specials import SETTINGS
from orogen.data.tokenizer import Tokenizer
from orogen.evaluate.carried import PIECE, Carrier, Held
from orogen.evaluate.likelihood import Row, Score, Scorer
from orogen.infer.engine import Engine
from orogen.infer.generate import check_length, rounded
from orogen.infer.request import ERROR, MOST_STOPS, Request, Sampling
from orogen.train.heldout import at_work

WINDOW = 2048  # as lm-eval takes for models that do not say how long their texts may be
LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")  # in lm-eval's order
UNLIMITED = int(1e30)  # what transformers writes as model_max_length where there is no limit
TOGETHER = 4  # prompts per slot that an engine gets at a time, after which progress is reported


class Stated(NamedTuple):
    """How many tokens a text of a checkpoint's model may have, and where the checkpoint says so, in words."""

    length: int
    source: str


class Prompt(NamedTuple):
    """What is to be continued: ids, by at most so many tokens, up to the first of these strings, in which the name of a
    special token is that token."""

    ids: tuple[int, ...]
    tokens: int
    stops: tuple[str, ...] = ()
    sampling: Sampling = Sampling(temperature=0)


class Room(Protocol):
    """Raises ConfigError for what the memory has no room for, such as texts that are longer than the config says."""

    def scoring(self, longest: int, shapes: Iterable[tuple[int, int]]) -> None:
        """Batches of these shapes (rows, length). longest: tokens of the longest text."""
        ...

    def carrying(self, longest: int, held: Held) -> None:
        """What is carried while texts are read piece by piece. longest: tokens of the longest one."""
        ...

    def writing(self, engine: EngineConfig) -> None:
        """An engine for prompts that are longer than its config said."""
        ...


class Subject:
    """A model on its plan, with what an evaluation asks of it. engine: of generation; its `max_length` grows with the
    prompts. progress: called after each part of the work. stated: see `stated_length`. room: refuses what exceeds the
    memory before it is computed; None: nothing does."""

    def __init__(
        self, opened: Opened, config: EvaluateConfig, engine: EngineConfig,
        progress: Callable[[], None] = lambda: None, *, stated: Stated | None = None, room: Room | None = None,
    ):  # fmt: skip
        self.opened, self.config, self.progress = opened, config, progress
        self._stated, self._room = stated, room
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
        """The most tokens of a window. Raises ConfigError if the model has fewer positions."""
        positions, asked = self.opened.config.learned_positions, self.config.max_length
        if positions is not None and asked is not None and asked > positions:
            raise ConfigError(
                f"EvaluateConfig.max_length is {asked}; expected at most ModelConfig.learned_positions = {positions}"
            )
        return asked or min(WINDOW, positions or WINDOW)

    @property
    def request_length(self) -> int:
        """The most tokens that a request of lm-eval reads: as its Hugging Face backend, what the checkpoint states,
        unless the config says."""
        return self._stated.length if self._stated and not self.config.max_length else self.max_length

    @property
    def request_limit(self) -> str:
        """`request_length` and what decides it, in words."""
        if self.config.max_length:
            return f"EvaluateConfig.max_length = {self.max_length}"
        if self._stated:
            return f"{self._stated.source} = {self._stated.length}, in place of which EvaluateConfig.max_length counts"
        return f"{self.max_length}, as EvaluateConfig.max_length is None and the checkpoint does not say"

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """See `Scorer.score`. Raises ConfigError before the first batch if there is no room for some batch."""
        if self._room is not None and rows:
            self._room.scoring(max(len(row.tokens_t) for row in rows), self.scorer.shapes(rows))
        return self.scorer.score(rows, (self.opened.params, self.opened.buffers), self.progress)

    def carry(self, rows: Sequence[Row]) -> list[Score]:
        """See `Carrier.score`. Raises ConfigError before the first piece if there is no room for what is carried."""
        if self._room is not None and rows:
            self._room.carrying(max(len(row.tokens_t) for row in rows), self._carrier.held(rows))
        return self._carrier.score(rows, (self.opened.params, self.opened.buffers), self.progress)

    @functools.cached_property
    def _carrier(self) -> Carrier:
        return Carrier(self.opened, piece=self.config.max_length or PIECE, dtype=self._settings.compute_dtype)

    def write(self, prompts: Sequence[Prompt]) -> list[str]:
        """The continuation of each prompt, decoded by itself. Raises ConfigError for what the model has no room for,
        FloatingPointError if logits are no numbers."""
        if not prompts:
            return []
        for prompt in prompts:
            check_length(self.opened, len(prompt.ids), prompt.tokens)
        engine = self._engine_of(max(len(prompt.ids) + prompt.tokens for prompt in prompts))
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number].ids))
        texts, at_once = [""] * len(prompts), TOGETHER * engine.config.slots
        for start in range(0, len(order), at_once):
            numbers = order[start : start + at_once]
            outputs = engine.run([self._request(prompts[number]) for number in numbers])
            for number, found in zip(numbers, outputs, strict=True):
                if found[-1].finish == ERROR:
                    raise FloatingPointError(f"a continuation failed: {found[-1].error}")
                text = self.tokenizer.decode(chosen.id for output in found for chosen in output.tokens)
                texts[number] = shortened(text, prompts[number].stops)
            self.progress()
        return texts

    def _engine_of(self, length: int) -> Engine:
        """An engine for texts of so many tokens; a longer one replaces it."""
        if self._engine is None or self._engine.length < length:
            settings = self._settings
            if settings.max_length < length:
                settings = dataclasses.replace(settings, max_length=rounded(length))
                if self._room is not None:
                    self._room.writing(settings)
            params = at_work(self.opened.params, self.opened.plan)
            self._engine = Engine(self.opened._replace(params=params), settings)
        return self._engine

    def _request(self, prompt: Prompt) -> Request:
        """The names of specials in stop strings are shown in the text that is searched, and so end it."""
        stops = tuple(stop for stop in dict.fromkeys(prompt.stops) if stop)[:MOST_STOPS]
        specials = self.tokenizer.specials if stops else {}
        shown = tuple(i for i, name in specials.items() if any(str(name) in stop for stop in stops))
        return Request(prompt=prompt.ids, max_tokens=prompt.tokens, stop=stops, sampling=prompt.sampling, shown=shown)


def shortened(text: str, stops: Sequence[str]) -> str:
    """The text before the first of each stop string in turn, as lm-eval shortens texts: of two that overlap, the one
    named first decides. An engine watches for MOST_STOPS of them only."""
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text


def stated_length(folder: RunFolder | OrogenFolder | HuggingFaceFolder) -> Stated | None:
    """How many tokens a text of the model may have, as lm-eval's Hugging Face backend finds it: in config.json, or else
    beside the tokenizer. None: neither says."""
    hugging_face = isinstance(folder, HuggingFaceFolder)
    values = folder.values if hugging_face else read_kept(folder.folder).get("config", {})
    known = {**DEFAULTS.get(values.get("model_type", ""), {}), **values}
    for name in LENGTHS:
        length = known.get(name)
        if type(length) is int and length > 1:
            return Stated(length, f"{name} in the model's config.json")
    beside = folder.folder if hugging_face and not folder.stored else folder.folder / "tokenizer"
    settings = read_json(beside / SETTINGS) if (beside / SETTINGS).is_file() else {}
    found = settings.get("model_max_length")
    if type(found) is int and 1 < found < UNLIMITED:
        return Stated(found, f"model_max_length in {SETTINGS}")
    return None
