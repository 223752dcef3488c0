"""Samples of a rollout, and the packed batches that a step learns them from.

Letters: b batch, t time.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from orogen.config.rl import RLConfig
from orogen.data.packing import Batch, Start, Stream, empty_batch, pack_rows, starts
from orogen.infer.lookup import NONE
from orogen.posttrain.advantages import corrected, taught
from orogen.posttrain.objective import ADVANTAGE, IMPORTANCE, OLD, REFERENCE, ROLLOUT, WEIGHT
from orogen.train.loss import ROUTING


@dataclasses.dataclass
class Track:
    """A token sequence of an episode. chosen: which tokens the policy chose; rollout: their log-probabilities as the
    engine reported them, 0 for the others; versions: of the weights that chose them, likewise; experts: (n, l, k) those
    of the first n tokens in each layer of experts, None where nobody records them."""

    ids: list[int]
    chosen: list[bool]
    rollout: list[float]
    versions: list[int] = dataclasses.field(default_factory=list)
    experts: np.ndarray | None = None

    @classmethod
    def of_prompt(cls, ids: Sequence[int]) -> "Track":
        """A sequence of which nothing is chosen yet."""
        return cls(list(ids), [False] * len(ids), [0.0] * len(ids), [0] * len(ids))

    def add(
        self, ids: Sequence[int], rollout: Sequence[float] | None = None, versions: Sequence[int] | None = None
    ) -> None:
        """Appends tokens; with log-probabilities they were chosen."""
        self.ids += ids
        self.chosen += [rollout is not None] * len(ids)
        self.rollout += [0.0] * len(ids) if rollout is None else rollout
        self.versions += [0] * len(ids) if versions is None else versions

    def routed(self, experts: np.ndarray) -> None:
        """Takes the experts (n, l, k) of the first n tokens, as the engine read them for the last answer. Tokens of
        earlier answers keep those with which they were written: a later turn reads them again."""
        known = 0 if self.experts is None else len(self.experts)
        self.experts = experts if self.experts is None else np.concatenate([self.experts, experts[known:]])


@dataclasses.dataclass
class Sample:
    """One answer to a task. group: of answers to one task. reward: the sum of `rewards`, NaN if the verifier failed,
    for the reason `fault`. left_out: parts of the reward that `rewards` does not name. overlong: an answer reached its
    most tokens, or the episode its row. sizes: characters of all thoughts and of all contents; longest: tokens of the
    longest turn; divergence: the sum over its tokens of log π - log π_teacher, None without a teacher."""

    environment: str
    number: int
    group: int
    key: str
    prompt: str
    tracks: list[Track] = dataclasses.field(default_factory=list)
    said: list[str] = dataclasses.field(default_factory=list)
    rewards: dict[str, float] = dataclasses.field(default_factory=dict)
    reward: float = math.nan
    left_out: int = 0
    fault: str | None = None
    overlong: bool = False
    sizes: tuple[int, int] = (0, 0)
    longest: int = 0
    advantage: float = 0.0
    largest_gap: float = 0.0
    divergence: float | None = None

    @property
    def tokens(self) -> int:
        """How many the policy chose."""
        return sum(sum(track.chosen) for track in self.tracks)

    def row(self) -> dict[str, Any]:
        """What the table of samples shows of it."""
        shown = ("environment", "number", "key", "prompt", "said", "rewards", "fault", "overlong", "advantage")
        reward = None if math.isnan(self.reward) else self.reward
        gap = {"tokens": self.tokens, "largest_gap": self.largest_gap}
        return {name: getattr(self, name) for name in shown} | {"reward": reward} | gap


class Mismatch(NamedTuple):
    """How far the trainer's log-probabilities are from the rollout's: largest, summed, over so many tokens; tokens
    whose weight became 0, and sequences left out, of so many."""

    largest: float = 0.0
    total: float = 0.0
    tokens: int = 0
    masked: int = 0
    left_out: int = 0
    sequences: int = 0

    def plus(self, other: "Mismatch") -> "Mismatch":
        """Of both."""
        sums = Mismatch(*(a + b for a, b in zip(self, other, strict=True)))  # pyright: ignore[reportArgumentType]
        return sums._replace(largest=max(self.largest, other.largest))


# Log-probabilities (b, t) of a packed batch; each position's are those of the next token.
Score = Callable[[Batch, Sequence[Track], Sequence[Start]], np.ndarray]
# Those under the teachers of the samples' environments, by the environments that have one.
Taught = Callable[[Sequence[Sample], Batch], Mapping[str, np.ndarray]]


def batch_of(
    samples: Sequence[Sample], rl: RLConfig, score: Score, *, reference: Score | None, shape: tuple[int, int],
    pad_id: int, teachers: Taught | None = None,
) -> tuple[Batch, Mismatch]:  # fmt: skip
    """The samples as packed rows with what the objective needs, and their mismatch.

    shape: rows and tokens of a batch; samples that need more rows get a multiple of them. reference: only with a
    divergence. Samples without a reward, and overlong ones if so configured, have weight 0. A teacher's judgement of
    each token takes the place of the rewards' advantage.
    """
    rows, length = shape
    held = [(sample, track) for sample in samples for track in sample.tracks]
    tracks = [track for _, track in held]
    at = starts([len(track.ids) for track in tracks], length)
    streams = [Stream(np.array(t.ids, np.int32), np.array(t.chosen, np.float32)) for t in tracks]
    batch = _whole(pack_rows(streams, at, length, pad_id), rows, pad_id)
    routing = {ROUTING: _routing(tracks, at, batch.tokens_bt.shape)} if rl.router_replay else {}
    trainer_bt = score(batch._replace(extras=routing), tracks, at)
    extras = {name: np.zeros(batch.tokens_bt.shape, np.float32) for name in (WEIGHT, ADVANTAGE, IMPORTANCE, ROLLOUT)}
    extras |= routing
    if rl.updates > 1:
        extras[OLD] = trainer_bt
    if reference is not None:
        extras[REFERENCE] = reference(batch, tracks, at)
    by_teacher = {} if teachers is None else teachers(samples, batch)
    found = Mismatch()
    for (sample, track), start in zip(held, at, strict=True):
        row = _Row(start, trainer_bt, by_teacher.get(sample.environment), extras)
        found = found.plus(_lay(sample, track, rl, row))
    return batch._replace(extras=extras), found


def _routing(tracks: Sequence[Track], at: Sequence[Start], shape: tuple[int, int]) -> np.ndarray:
    """(b, t, l, k) int32: the recorded experts of packed tokens, NONE for others, such as the last of a sequence, which
    no engine reads."""
    known = [track.experts for track in tracks if track.experts is not None]
    if len(known) < len(tracks) or not known:
        raise ValueError("samples without experts; expected an engine that reports them")
    found = np.full((*shape, *known[0].shape[1:]), NONE, np.int32)
    for experts, start in zip(known, at, strict=True):
        found[start.row, start.start : start.start + len(experts)] = experts
    return found


class _Row(NamedTuple):
    """Where a sequence lies, and the arrays (b, t) of its batch. teacher_bt: None without a teacher."""

    start: Start
    trainer_bt: np.ndarray
    teacher_bt: np.ndarray | None
    extras: dict[str, np.ndarray]


def _lay(sample: Sample, track: Track, rl: RLConfig, at: _Row) -> Mismatch:
    """Writes what the objective needs of one sequence: at position i what is about token i + 1."""
    chosen_t = np.flatnonzero(track.chosen)
    where = at.start.row, at.start.start + chosen_t - 1
    rollout_t = np.array(track.rollout, np.float32)[chosen_t]
    fixed = corrected(at.trainer_bt[where], rollout_t, rl)
    sample.largest_gap = max(sample.largest_gap, fixed.largest)
    filtered = sample.overlong and rl.chosen("overlong") == "filter"
    judged = at.teacher_bt is not None or not math.isnan(sample.reward)
    counts = fixed.kept and not filtered and judged and len(chosen_t) > 0
    by_token = 1.0 if rl.chosen("mean") == "token" else 1 / max(len(chosen_t), 1)
    at.extras[WEIGHT][where] = by_token * counts
    at.extras[ADVANTAGE][where] = _advantage(sample, at, where, rl)
    at.extras[IMPORTANCE][where] = fixed.weight_t
    at.extras[ROLLOUT][where] = rollout_t
    masked = int((fixed.weight_t == 0).sum())
    return Mismatch(fixed.largest, fixed.total, len(chosen_t), masked, int(not fixed.kept), 1)


def _advantage(sample: Sample, at: _Row, where: tuple[int, np.ndarray], rl: RLConfig) -> float | np.ndarray:
    """Of the chosen tokens of one sequence. The sample's own becomes their sum where a teacher judges them."""
    if at.teacher_bt is None:
        return sample.advantage
    gap_t = taught(at.teacher_bt[where], at.trainer_bt[where])
    before = sample.divergence or 0.0
    sample.divergence = before - float(gap_t.sum())
    sample.advantage = -sample.divergence
    return taught(at.teacher_bt[where], at.trainer_bt[where], clip=rl.advantage_clip)


def _whole(batch: Batch, rows: int, pad_id: int) -> Batch:
    """The batch with empty rows up to the next multiple of `rows`."""
    missing = -len(batch.tokens_bt) % rows or (rows if not len(batch.tokens_bt) else 0)
    empty = empty_batch(missing, sequence_length=batch.tokens_bt.shape[1], pad_id=pad_id)
    return batch.map(lambda *parts: np.concatenate(parts), empty)
