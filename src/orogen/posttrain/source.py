"""Batches that the weights about to train on them, or with staleness earlier ones, have written: the source of a run of
reinforcement learning.

Letters: b batch, t time, n samples of a group.
"""

import base64
import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.config.run import RunConfig
from orogen.data.packing import Batch, Start
from orogen.infer.engine import Engine
from orogen.infer.exact_scores import ExactScores
from orogen.posttrain.ahead import Ahead
from orogen.posttrain.groups import Groups, batches_of, by_group
from orogen.posttrain.likelihood import Likelihoods
from orogen.posttrain.measures import aged, measured
from orogen.posttrain.rollout import Rollouts
from orogen.posttrain.samples import Mismatch, Sample, Taught, Track, batch_of

TABLES = "rollouts"  # the folder of the run folder that holds the tables of samples
# Gives parameters and buffers of the model that KL refers to, as a training state stores them, beside that state.
Reference = Callable[[Any], tuple[Any, Any]]


class RolloutSource:
    """An endless stream of batches. In each, `prompts` tasks are answered `samples` times, without staleness by the
    weights that train, else also by earlier ones (`ahead.py`).

    All randomness derives from the seed, the number of the rollout and the place in it, so without staleness a run that
    is killed and resumed writes the same samples again. With several updates per rollout, the batches that are left are
    part of the position, since later weights could not write them again.
    """

    def __init__(
        self, config: RunConfig, rollouts: Rollouts, tasks: dict[str, Sequence[int]], scorer: Likelihoods, *,
        identity: dict[str, Any], pad_id: int, run_dir: Path, reference: Reference | None,
        teachers: Taught | None = None,
    ) -> None:  # fmt: skip
        self._config, self._rl, self._rollouts, self._scorer = config, config.rl, rollouts, scorer
        self._identity, self._pad_id, self._run_dir, self._reference = identity, pad_id, run_dir, reference
        self._teachers = teachers
        self._groups = Groups(config, rollouts, tasks)
        self._curriculum = self._groups.curriculum.state()
        self._ahead = None
        if self._rl.staleness:
            self._ahead = Ahead(rollouts, self._groups, most=self._rl.staleness, total=batches_of(config))
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
            "curriculum": self._curriculum,
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
        if self._ahead is not None:
            self._ahead.stop()
        self._curriculum = state["curriculum"]
        self._groups.curriculum.restore(self._curriculum)

    def _batches(self, state: Any) -> list[Batch]:
        """One batch per update, of samples that the weights of `state` write."""
        began = time.perf_counter()
        if self._ahead is not None:
            engine, weights = None, (state.params, state.buffers)
            written = self._ahead.take(self._rollout, *weights, self.progress)
        else:
            engine = self._rollouts.take(state.params, state.buffers, self.progress)
            written = self._groups.write(self._rollout, engine, self.progress)
        wrote, samples, self._curriculum = time.perf_counter(), written.samples, written.curriculum
        groups = by_group(samples)
        per_update = len(groups) // self._rl.updates
        parts = [sum(groups[n * per_update : (n + 1) * per_update], []) for n in range(self._rl.updates)]
        made = [self._batch(part, state, engine) for part in parts]
        mismatch = Mismatch()
        for _, one in made:
            mismatch = mismatch.plus(one)
        self._measures = measured(samples, groups, mismatch, self._rl) | {
            **written.measures, "score_ms": 1e3 * (time.perf_counter() - wrote),
        }  # fmt: skip
        if self._ahead is not None:
            self._measures |= {"waited_ms": 1e3 * (wrote - began), **aged(samples, self._rollout)}
        self._write_table(samples)
        return [batch for batch, _ in made]

    def _batch(self, samples: Sequence[Sample], state: Any, engine: Any) -> tuple[Batch, Mismatch]:
        train = self._config.train

        def trained(batch: Batch, tracks: Sequence[Track], at: Sequence[Start]) -> np.ndarray:
            if self._rl.exact:
                return self._exactly(batch, tracks, at, engine)
            return self._scorer.of(state.params, state.buffers, batch)

        def referred(batch: Batch, tracks: Sequence[Track], at: Sequence[Start]) -> np.ndarray:
            assert self._reference is not None
            return self._scorer.of(*self._reference(state), batch._replace(extras={}))  # it routes by itself

        return batch_of(
            samples, self._rl, trained, reference=referred if self._rl.kl else None,
            shape=(train.batch_size, train.sequence_length), pad_id=self._pad_id, teachers=self._teachers,
        )  # fmt: skip

    def _exactly(self, batch: Batch, tracks: Sequence[Track], at: Sequence[Start], engine: Engine) -> np.ndarray:
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
