"""Rollouts: episodes that the training weights write, by an engine in the same process unless `server` is set.

On one plan, without staleness, that engine reads the very arrays that train, no copy (in bfloat16, the working copies
that a step would make too). A plan with stages, on which no engine runs, or with context, which does nothing for short
prompts, is left for one whose devices are data ranks, and the weights are laid out anew there. Turns of all episodes
are written together, then verified together. Without staleness what runs beside a request depends on no clock: a
repeated rollout is equal to the bit.
"""

import dataclasses
import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from orogen.checkpoint.open import Opened
from orogen.config.checks import ConfigError
from orogen.config.engine import EngineConfig
from orogen.config.lora import base_of
from orogen.config.plan import PlanConfig
from orogen.config.rl import RLConfig
from orogen.config.run import RunConfig
from orogen.cost.assemble import assemble
from orogen.data.tokenizer import Tokenizer
from orogen.infer.engine import Engine
from orogen.infer.request import ERROR, LENGTH, Output, Request, Sampling
from orogen.infer.sizes import sizes_of
from orogen.layers.adapter import apart, merged
from orogen.model.lm import Built
from orogen.parallel import placement
from orogen.posttrain import dialogue
from orogen.posttrain.environments.interface import Environment, Example, Turn
from orogen.posttrain.environments.pool import Asked, Fault, Pool
from orogen.posttrain.remote import RemoteEngine
from orogen.posttrain.samples import Sample, Track
from orogen.precision.policy import working_copy
from orogen.train.heldout import at_work

PAGE, PIECE = 16, 64  # tokens of a page, and of a piece of a prompt where texts are long
SHORT = 256  # tokens of a text below which a piece is one page
UNREADABLE = "unreadable"  # a conversation that cannot be continued, since its template or tokenizer fails at it
READ = 2048  # prompt tokens that are read at a time

Weights = tuple[Any, Any]  # parameters and buffers, as an engine reads them


class Answering(Protocol):
    """What writes answers: an engine of this process, or a server's."""

    def run(self, requests: Iterable[Request], progress: Callable[[], None]) -> list[list[Output]]:
        """The outputs of each request. progress: called on the way, between two calls of decoding."""
        ...


class Draw(NamedTuple):
    """An answer to write: to task `number` of an environment, in a group, by a seed."""

    environment: str
    number: int
    group: int
    seed: tuple[int | str, ...]


@dataclasses.dataclass
class Spent:
    """Seconds of writing and verifying, and tokens that were written."""

    writing: float = 0.0
    verifying: float = 0.0
    tokens: int = 0


@dataclasses.dataclass
class _Episode:
    draw: Draw
    example: Example
    state: Any
    messages: list[dict[str, Any]]
    sample: Sample
    opened: dialogue.Opened | None = None
    turn: int = 0


class Rollouts:
    """An engine for the weights of a run, and its environments. Raises ConfigError for a model that none can serve."""

    def __init__(
        self, config: RunConfig, tokenizer: Tokenizer, environments: Mapping[str, Environment],
        form: dialogue.Plain | dialogue.Templated,
    ) -> None:  # fmt: skip
        self.rl: RLConfig = config.rl
        self._config, self._tokenizer, self._environments, self._form = config, tokenizer, environments, form
        self._trained = assemble(config.model, config.plan, length=config.train.sequence_length).built
        self._plan, self._built = assemble(config.model, _engine_plan(config.plan))
        self.settings = _engine_config(config, self._plan.config)
        self._engine: Engine | None = None
        self.server: RemoteEngine | None = None
        self._stops: list[Callable[[], None]] = []
        if self.rl.server is None:
            sizes_of(config.model, self._plan.config, self.settings)
        else:
            self.server = RemoteEngine(self.rl, base_of(config.model), tokenizer)
            self.on_close(self.server.close)
        self._unreadable = 0
        self.spent, self.rounds = Spent(), 0  # rounds: looks at engine, server and verifiers, of another thread
        self.lock = threading.RLock()  # held while the engine or the verifiers are used, if several threads do
        self._pools: dict[str, Pool] = {}
        try:
            for one in self.rl.environments:
                self._pools[one.name] = Pool(one, workers=self.rl.workers)
        except ConfigError:
            self.close()
            raise

    @property
    def faults(self) -> dict[str, int]:
        """Verifications that came to nothing, by kind, since this process began, in evaluations too."""
        found = {UNREADABLE: self._unreadable} if self._unreadable else {}
        for pool in self._pools.values():
            for kind, count in pool.faults.items():
                found[kind] = found.get(kind, 0) + count
        return found

    def close(self) -> None:
        """Ends the processes that verify, and what `on_close` named."""
        for stop in reversed(self._stops):
            stop()
        for pool in self._pools.values():
            pool.close()

    def on_close(self, stop: Callable[[], None]) -> None:
        """Calls `stop` before the verifiers end, and before what was to be called earlier."""
        self._stops.append(stop)

    def take(self, params: Any, buffers: Any, progress: Callable[[], None]) -> Answering:
        """The engine with the weights of a training state. progress: as of `given`."""
        return self.given(self._here(params, buffers), version=0, progress=progress)

    def given(self, weights: Weights, *, version: int, progress: Callable[[], None]) -> Answering:
        """The engine with these weights, as a new one; see `Engine.give`. progress: as of `RemoteEngine.give`."""
        if self.server is not None:
            self.server.give(*weights, version=version, in_flight=False, progress=progress)
            return self.server
        if self._engine is None:
            opened = Opened(self._config.model, self._plan, self._built, *weights, self._tokenizer)
            self._engine = Engine(opened, self.settings)
            self._engine.version = version
        else:
            self._engine.give(*weights, version=version)
        return self._engine

    def swap(self, weights: Weights, *, version: int, progress: Callable[[], None]) -> None:
        """Gives them to the engine in the midst of its answers; see `Engine.swap`. progress: as of `given`."""
        if self.server is not None:
            self.server.give(*weights, version=version, in_flight=True, progress=progress)
        elif self._engine is not None:
            self._engine.swap(*weights, version=version)

    def forget(self) -> None:
        """Lets go of the engine, whatever it does."""
        self._engine = None

    def copied(self, params: Any, buffers: Any) -> Weights:
        """The weights of a training state, as the engine reads them, in arrays of their own, which no step takes."""
        return jax.tree.map(jnp.copy, self._here(params, buffers))

    def _here(self, params: Any, buffers: Any) -> Weights:
        """Parameters and buffers as the engine reads them, in its dtype; of the whole model for a server."""
        if self.server is not None:
            whole, lora = (self._trained.whole(params), self._trained.whole(buffers)), self._config.lora
            return whole if lora is None else (merged(*apart(whole[0]), lora.scale), whole[1])
        dtype = self.settings.compute_dtype
        if dtype != "float32":
            params = _cast(params, dtype)
        if self._config.plan.stage == self._config.plan.context == 1:
            return at_work(params, self._plan), buffers
        return self._moved(params), self._moved(buffers)

    def _moved(self, tree: Any) -> Any:
        laid = jax.jit(partial(_relaid, self._trained, self._built))(tree)
        return jax.device_put(laid, placement.shardings(laid, self._plan))

    def write(
        self,
        draws: Sequence[Draw],
        engine: Answering,
        *,
        temperature: float,
        progress: Callable[[], None] = lambda: None,
    ) -> list[Sample]:
        """The sample of each draw. progress: called on the way. Raises ConfigError for a task whose prompt leaves no
        room, FloatingPointError if logits are no numbers."""
        episodes = [self._begin(draw) for draw in draws]
        live = [episode for episode in episodes if self._open(episode)]
        while live:
            began = time.perf_counter()
            texts = self._speak(live, engine, temperature, progress)
            spoke = time.perf_counter()
            turns = self._verify(live, texts, progress)
            self.spent.writing += spoke - began
            self.spent.verifying += time.perf_counter() - spoke
            live = [one for one, turn in zip(live, turns, strict=True) if self._goes_on(one, turn)]
        return [episode.sample for episode in episodes]

    def _begin(self, draw: Draw) -> _Episode:
        environment = self._environments[draw.environment]
        example = environment.example(draw.number)
        messages = [dict(message) for message in example.messages]
        shown = "\n".join(str(message["content"]) for message in messages)
        sample = Sample(draw.environment, draw.number, draw.group, example.key, shown)
        return _Episode(draw, example, environment.start(example), messages, sample)

    def _open(self, episode: _Episode) -> bool:
        """Whether there is room for another turn, which is then opened."""
        tracks = episode.sample.tracks
        before = tracks[-1].ids if tracks else None
        opened = self._form.open(episode.example, episode.messages, before)
        if len(opened.ids) >= self._config.train.sequence_length:
            if not tracks:
                raise ConfigError(
                    f"task {episode.example.key!r} of {episode.draw.environment} has a prompt of {len(opened.ids)} "
                    f"tokens; expected fewer than TrainConfig.sequence_length = {self._config.train.sequence_length}"
                )
            return False
        episode.opened = opened
        if before is not None and opened.ids[: len(before)] == before:
            tracks[-1].add(opened.ids[len(before) :])
        else:
            tracks.append(Track.of_prompt(opened.ids))
        return True

    def _speak(
        self, live: Sequence[_Episode], engine: Answering, temperature: float, progress: Callable[[], None]
    ) -> list[str]:
        """What each episode says next, which is added to its tracks."""
        room = self._config.train.sequence_length
        requests = []
        for episode in live:
            assert episode.opened is not None
            ids = tuple(episode.opened.ids)
            sampling = Sampling(temperature=temperature, seed=seed_of(*episode.draw.seed, episode.turn))
            most = min(self.rl.max_tokens, room - len(ids))
            requests.append(
                Request(prompt=ids, max_tokens=most, sampling=sampling, logprobs=0, shown=self._form.shown)
            )  # fmt: skip
        found = engine.run(requests, progress)
        return [self._said(episode, outputs) for episode, outputs in zip(live, found, strict=True)]

    def _said(self, episode: _Episode, outputs: Sequence[Output]) -> str:
        last = outputs[-1]
        if last.finish == ERROR:
            raise FloatingPointError(f"a rollout failed: {last.error}")
        tokens = [token for output in outputs for token in output.tokens]
        versions = [output.version for output in outputs for _ in output.tokens]
        track = episode.sample.tracks[-1]
        track.add([token.id for token in tokens], [float(token.logprob or 0) for token in tokens], versions)
        if self.rl.router_replay:
            # No engine reads the last token of an answer, though one may have that is stopped by its text.
            read = np.concatenate([output.experts for output in outputs if output.experts is not None])
            track.routed(read[: len(track.ids) - 1])
        episode.sample.overlong |= last.finish == LENGTH
        episode.sample.longest = max(episode.sample.longest, len(tokens))
        self.spent.tokens += len(tokens)
        return "".join(output.text for output in outputs)

    def _verify(
        self, live: Sequence[_Episode], texts: Sequence[str], progress: Callable[[], None]
    ) -> list[Turn | Fault]:
        """What comes of each turn: one environment after another, each in its own processes."""
        asked: dict[str, list[tuple[int, Asked]]] = {}
        for place, (episode, text) in enumerate(zip(live, texts, strict=True)):
            assert episode.opened is not None
            said = dialogue.said_of(text, episode.opened, episode.example.tools)
            episode.sample.said.append(text)
            thought, content = episode.sample.sizes
            episode.sample.sizes = thought + len(said.reasoning), content + len(said.content)
            episode.messages.append(dialogue.message_of(said))
            turn = Asked(episode.draw.number, episode.state, said)
            asked.setdefault(episode.draw.environment, []).append((place, turn))
        found: dict[int, Turn | Fault] = {}
        for name, turns in asked.items():
            results = self._pools[name].verify([turn for _, turn in turns], progress)
            found |= {place: result for (place, _), result in zip(turns, results, strict=True)}
        return [found[place] for place in range(len(live))]

    def _goes_on(self, episode: _Episode, turn: Turn | Fault) -> bool:
        sample = episode.sample
        if isinstance(turn, Fault):
            sample.fault = f"{turn.kind}: {turn.reason}"
            return False
        episode.state, episode.turn = turn.state, episode.turn + 1
        if turn.rewards is None:
            episode.messages += turn.replies
            try:
                if self._open(episode):
                    return True
            except Exception as error:  # templates and tokenizers may raise anything at what a model wrote
                reason = str(error).splitlines()[:1]
                sample.fault = f"{UNREADABLE}: {type(error).__name__}: {''.join(reason)}"
                self._unreadable += 1
                return False
            sample.overlong = True
            sample.reward = 0.0  # the row is full before the episode is over
            return False
        sample.rewards, sample.left_out = dict(turn.rewards), turn.left_out
        sample.reward = math.fsum(turn.rewards.values())
        return False


@partial(jax.jit, static_argnums=1)
def _cast(params: Any, dtype: str) -> Any:
    return working_copy(params, dtype)


def _relaid(before: Built, after: Built, tree: Any) -> Any:
    return after.laid(before.whole(tree))


def seed_of(*parts: int | str) -> int:
    """A seed below 2**63 that depends on all parts."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _engine_plan(plan: PlanConfig) -> PlanConfig:
    """The plan itself, for evaluation; with stages or context, all but `tensor` become data."""
    plain = plan.evaluating()
    if plain.stage == plain.context == 1:
        return plain
    kept = {field: getattr(plain, field) for field in ("tensor", "cross_entropy", "logit_rows", "attention")}
    return PlanConfig(data=plain.devices // plain.tensor, **kept)


def _engine_config(config: RunConfig, plan: PlanConfig) -> EngineConfig:
    rl, unit = config.rl, plan.data * plan.tensor
    # The prefix cache keeps the prompts of a group, in whole pieces. In exact mode a token costs a pass over a piece.
    length = config.train.sequence_length
    return EngineConfig(
        slots=-(-rl.slots // unit) * unit, max_length=length, page=PAGE,
        chunk=PAGE if rl.exact or length <= SHORT else PIECE, prefill_tokens=READ, queue=2**20, written_out=False,
        exact=rl.exact, compute_dtype=config.train.compute_dtype, report_experts=rl.router_replay,
        prefix_cache=not rl.router_replay,
    )  # fmt: skip
