"""Batches that the weights about to train on them have written: the source of a run of reinforcement learning.

Letters: b batch, t time, n samples of a group.
"""

import base64
import collections
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.config.run import RunConfig
from orogen.data.packing import Batch, Place
from orogen.infer.engine import Engine
from orogen.infer.exact_scores import ExactScores
from orogen.posttrain.advantages import advantages, length_bonus, overlong_penalty
from orogen.posttrain.curriculum import Curriculum
from orogen.posttrain.likelihood import Likelihoods
from orogen.posttrain.measures import is_flat, measured
from orogen.posttrain.rollout import Draw, Rollouts
from orogen.posttrain.samples import Mismatch, Sample, Taught, Track, batch_of

TABLES = "rollouts"  # the folder of the run folder that holds the tables of samples
# Gives parameters and buffers of the model that KL refers to, as they are stored between steps.
Reference = Callable[[], tuple[Any, Any]]


class RolloutSource:
    """An endless stream of batches. In each, `prompts` tasks are answered `samples` times by the weights that train.

    All randomness derives from the seed, the number of the rollout and the place in it, so a run that is killed and
    resumed writes the same samples again. With several updates per rollout, the batches that are left are part of the
    position, since later weights could not write them again.
    """

    def __init__(
        self, config: RunConfig, rollouts: Rollouts, tasks: dict[str, Sequence[int]], scorer: Likelihoods, *,
        identity: dict[str, Any], pad_id: int, run_dir: Path, reference: Reference | None,
        teachers: Taught | None = None,
    ) -> None:  # fmt: skip
        self._config, self._rl, self._rollouts, self._scorer = config, config.rl, rollouts, scorer
        self._identity, self._pad_id, self._run_dir, self._reference = identity, pad_id, run_dir, reference
        self._tasks, self._teachers = tasks, teachers
        steps = -(-config.train.steps // self._rl.updates)
        self._curriculum = Curriculum(self._rl, tasks, seed=config.train.seed, steps=steps)
        self._rollout, self._left, self._packed = 0, [], ""
        self._measures: dict[str, float] = {}
        self._exact: ExactScores | None = None
        self.progress: Callable[[], None] = lambda: None

    def take(self, state: Any) -> Batch:
        """The next batch."""
        if not self._left:
            self._left = self._batches(state)
            self._packed = ""
            self._rollout += 1
        else:
            self._measures = {}
        batch, *self._left = self._left
        self._packed = _packed(self._left) if self._left else ""
        return batch

    def state(self) -> dict[str, Any]:
        """The position after the last batch taken."""
        return {
            "identity": self._identity, "rollout": self._rollout, "left": self._packed, "measures": self._measures,
            "curriculum": self._curriculum.state(),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `state` was saved. Raises ConfigError if it is from other environments,
        another tokenizer, another seed, or another model that KL refers to."""
        if state.get("identity") != self._identity:
            raise ConfigError(
                f"the position is of {state.get('identity')}; expected one of {self._identity}: environments, "
                "tokenizer, seed and the model of KL must be those of the run"
            )
        self._rollout, self._packed, self._measures = state["rollout"], state["left"], dict(state["measures"])
        self._left = _unpacked(self._packed)
        self._curriculum.restore(state["curriculum"])

    def _batches(self, state: Any) -> list[Batch]:
        """One batch per update, of samples that the weights of `state` write."""
        began, spent = time.perf_counter(), self._rollouts.spent
        before = spent.writing, spent.verifying, spent.tokens
        faults = collections.Counter(self._rollouts.faults)
        engine = self._rollouts.take(state.params, state.buffers)
        if self._curriculum.profile_due(self._rollout):
            self._curriculum.profiled(self._profile(engine))
        samples, resampled = self._groups(engine)
        wrote = time.perf_counter()
        groups = _by_group(samples)
        share = len(groups) // self._rl.updates
        parts = [sum(groups[n * share : (n + 1) * share], []) for n in range(self._rl.updates)]
        made = [self._batch(part, state, engine) for part in parts]
        mismatch = Mismatch()
        for _, one in made:
            mismatch = mismatch.plus(one)
        self._measures = measured(samples, groups, mismatch, self._rl) | {
            "resampled_groups": float(resampled),
            **_named_faults(collections.Counter(self._rollouts.faults) - faults),
            "rollout_ms": 1e3 * (spent.writing - before[0]),
            "verify_ms": 1e3 * (spent.verifying - before[1]),
            "score_ms": 1e3 * (time.perf_counter() - wrote),
            "rollout_tokens_per_second": (spent.tokens - before[2]) / max(wrote - began, 1e-9),
        }
        self._write_table(samples)
        return [batch for batch, _ in made]

    def _groups(self, engine: Engine) -> tuple[list[Sample], int]:
        """The judged samples of the batch's tasks, and how many groups were replaced because they had no gradient."""
        drawn = self._curriculum.draw(self._rollout)
        samples = self._write(drawn, engine, round_=0)
        replaced = 0
        for round_ in range(1, int(self._rl.chosen("resample")) + 1):
            groups = _by_group(samples)
            dull = [place for place, group in enumerate(groups) if is_flat(group)]
            if not dull:
                break
            names = [groups[place][0].environment for place in dull]
            again = [(name, self._curriculum.more(name, 1, self._rollout)[0]) for name in names]
            fresh = _by_group(self._write(again, engine, round_=round_))
            for place, group in zip(dull, fresh, strict=True):
                if not is_flat(group):
                    for sample in group:
                        sample.group = place
                    groups[place] = group
                    replaced += 1
            samples = sum(groups, [])
        return samples, replaced

    def _write(self, drawn: Sequence[tuple[str, int]], engine: Engine, *, round_: int) -> list[Sample]:
        seed = self._config.train.seed
        draws = [
            Draw(name, number, group, (seed, self._rollout, round_, group, sample))
            for group, (name, number) in enumerate(drawn)
            for sample in range(self._rl.samples)
        ]
        samples = self._sampled(draws, engine)
        for group in _by_group(samples):
            self._judge(group)
        return samples

    def _sampled(self, draws: Sequence[Draw], engine: Engine) -> list[Sample]:
        return self._rollouts.write(draws, engine, temperature=self._rl.temperature, progress=self.progress)

    def _profile(self, engine: Engine) -> dict[str, list[float]]:
        """The mean reward, from 0 to 1, of each task; a sample whose verifier failed counts as 0."""
        found = {}
        for name, numbers in self._tasks.items():
            draws = [
                Draw(name, int(number), place, (self._config.train.seed, "profile", self._rollout, number, sample))
                for place, number in enumerate(numbers)
                for sample in range(self._rl.profile_samples)
            ]
            groups = _by_group(self._sampled(draws, engine))
            means = (np.nan_to_num(_rewards(group), nan=0.0).mean() for group in groups)
            found[name] = [float(np.clip(mean, 0, 1)) for mean in means]
        return found

    def _judge(self, group: Sequence[Sample]) -> None:
        """The advantages of a group, from rewards with what is added for their lengths."""
        rl, reward_n = self._rl, _rewards(group)
        if rl.chosen("overlong") == "penalty":
            settings = {"most": rl.max_tokens, "buffer": rl.overlong_buffer, "penalty": rl.overlong_penalty}
            reward_n = reward_n + [overlong_penalty(sample.longest, **settings) for sample in group]
        if rl.length_control or rl.concise_bonus:
            sizes = [np.array([sample.sizes[part] for sample in group]) for part in (0, 1)]
            settings = {"weight": rl.length_control, "concise": rl.concise_bonus}
            reward_n = reward_n + length_bonus(reward_n, sizes, **settings)
        found_n = advantages(
            reward_n, baseline=rl.baseline, normalise=rl.normalise, clip=rl.advantage_clip
        )  # fmt: skip
        for sample, value in zip(group, found_n, strict=True):
            sample.advantage = float(value)

    def _batch(self, samples: Sequence[Sample], state: Any, engine: Engine) -> tuple[Batch, Mismatch]:
        train = self._config.train

        def trained(batch: Batch, tracks: Sequence[Track], at: Sequence[Place]) -> np.ndarray:
            if self._rl.exact:
                return self._exactly(batch, tracks, at, engine)
            return self._scorer.of(state.params, state.buffers, batch)

        def referred(batch: Batch, tracks: Sequence[Track], at: Sequence[Place]) -> np.ndarray:
            assert self._reference is not None
            return self._scorer.of(*self._reference(), batch)

        return batch_of(
            samples, self._rl, trained, reference=referred if self._rl.kl else None,
            shape=(train.batch_size, train.sequence_length), pad_id=self._pad_id, teachers=self._teachers,
        )  # fmt: skip

    def _exactly(self, batch: Batch, tracks: Sequence[Track], at: Sequence[Place], engine: Engine) -> np.ndarray:
        """As `Likelihoods.of`, of chosen tokens, rounded as the engine rounds."""
        if self._exact is None:
            self._exact = ExactScores(engine)
        starts = [max(1, track.chosen.index(True)) if any(track.chosen) else len(track.ids) for track in tracks]
        found_bt = np.zeros(batch.tokens_bt.shape, np.float32)
        scores = self._exact.of([track.ids for track in tracks], starts)
        for place, start, score_t in zip(at, starts, scores, strict=True):
            first = place.start + start - 1
            found_bt[place.row, first : first + len(score_t)] = score_t
        return found_bt

    def _write_table(self, samples: Sequence[Sample]) -> None:
        """Some samples of this rollout, evenly spread, in a file of its own, which a repeated rollout rewrites."""
        if not self._rl.table_rows:
            return
        folder = self._run_dir / TABLES
        folder.mkdir(parents=True, exist_ok=True)
        count = min(self._rl.table_rows, len(samples))
        chosen = [samples[n * len(samples) // count] for n in range(count)]
        lines = "".join(json.dumps(sample.row(), ensure_ascii=False) + "\n" for sample in chosen)
        write_atomically(folder / f"{self._rollout:08d}.jsonl", lines.encode("utf-8", "surrogatepass"))


def _named_faults(faults: Mapping[str, int]) -> dict[str, float]:
    return {f"faults/{kind}": float(count) for kind, count in sorted(faults.items())}


def _rewards(group: Sequence[Sample]) -> np.ndarray:
    return np.array([sample.reward for sample in group], np.float64)


def _by_group(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The samples of each group, in the order of the groups."""
    found: dict[int, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.group, []).append(sample)
    return [found[group] for group in sorted(found)]


def _packed(batches: Sequence[Batch]) -> str:
    """Batches as text, for a position that is plain JSON."""
    arrays = {}
    for number, batch in enumerate(batches):
        named = {**dict(zip(Batch._fields[:4], batch[:4], strict=True)), **batch.extras}
        arrays |= {f"{number}/{name}": array for name, array in named.items()}
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return base64.b64encode(stream.getvalue()).decode()


def _unpacked(text: str) -> list[Batch]:
    """The inverse of `_packed`. Raises ValueError for a text that is none; nothing in it is executed."""
    if not text:
        return []
    with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as stored:
        found: dict[int, dict[str, np.ndarray]] = {}
        for key in stored.files:
            number, name = key.split("/", 1)
            found.setdefault(int(number), {})[name] = stored[key]
    batches = []
    for number in sorted(found):
        own = [found[number].pop(name) for name in Batch._fields[:4]]
        batches.append(Batch(*own, extras=found[number]))
    return batches
