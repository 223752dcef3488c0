"""Log-probabilities of answers under the model that a run starts from, computed before its first step and kept.

They take the place of a second model in memory. RUN/reference/HASH, the hash of the corpus, holds them in parts of PART
pairs, each written when it is done: a run that is stopped in between goes on behind the last one.

Letters: b batch (rows), t time, r rows of the global batch, n documents of a row, p pairs.
"""

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.config.run import RunConfig
from orogen.data.packing import Batch
from orogen.model.lm import Built, LanguageModel
from orogen.parallel import distributed, placement
from orogen.parallel.plan import Plan
from orogen.parallel.varying import vary_like
from orogen.posttrain.documents import answer_lengths
from orogen.posttrain.pair_batches import ROW, References, packed, pair_batch
from orogen.posttrain.pairs import Pair, PairCorpus
from orogen.train.formats import in_formats
from orogen.train.heldout import heldout_plan, measure
from orogen.train.state import TrainState
from orogen.train.step import batch_to_devices
from orogen.train.task import ByName, Objective

PART = 4096  # pairs of a file
FOLDER = "reference"
SPLITS = "train", "heldout"  # those that a run reads
SAID = "said"
# (model, hidden states, batch, plan) -> a number (b, n) of each document.
PerDocument = Callable[..., Array]


def by_document(rows: int, count: int, number: PerDocument) -> Objective:
    """An objective that only measures: `number` of each document, (r · n,), of a global batch whose rows are numbered
    in its extra ROW, together with the numbers of learned tokens."""

    def whole(x_bn: Array, batch: Batch, plan: Plan) -> Array:
        # The ranks of context that share a row all have its numbers, which count once. Stages are not here together.
        row_b = plan.agreed(batch.extras[ROW][:, 0], "batch", "stage")
        zeros_rn = vary_like(jnp.zeros((rows, count), jnp.float32), (x_bn, row_b))
        return zeros_rn.at[row_b].add(x_bn).reshape(-1)

    def counts(batch: Batch, depths: int, plan: Plan) -> ByName:
        return {SAID: whole(answer_lengths(batch, plan, count=count), batch, plan)}

    def sums(model: LanguageModel, hidden: list[Array], batch: Batch, plan: Plan) -> ByName:
        return {SAID: whole(number(hidden[0], model, batch, plan, count=count), batch, plan)}

    return Objective(counts=counts, sums=sums, shares=lambda config, depths: {}, deeper=False)


class DocumentNumbers:
    """Computes a number of each answer of pairs, by forward passes in which experts drop no token."""

    def __init__(self, config: RunConfig, built: Built, number: PerDocument, *, pad_id: int):
        self._plan = in_formats(heldout_plan(config), config.precision, config.model)
        self._config, self._built, self._number = config, built, number
        self._shape = {"size": config.train.batch_size, "length": config.train.sequence_length}
        self._pad_id = pad_id
        self._gather = jax.jit(placement.working, static_argnums=1)

    def __call__(
        self, state: TrainState, pairs: Sequence[Pair], progress: Callable[[], None], *, batches: int | None = None
    ) -> np.ndarray:
        """(p, 2) float32. progress is called after each batch. batches: how many of them to compute, None: all; the
        other pairs have NaN."""
        params, size = self._gather(state.params, self._plan), self._shape["size"]
        rows, found = packed(pairs, length=self._shape["length"]), np.full((len(pairs), 2), np.nan, np.float32)
        for start in range(0, len(rows), size)[:batches]:
            some = rows[start : start + size]
            batch = pair_batch(some, pairs, None, **self._shape, pad_id=self._pad_id)
            metrics = jax.device_get(self._program(params, state.buffers, batch_to_devices(batch, self._plan)))
            numbers_rpk = np.asarray(metrics[SAID].sum).reshape(size, -1, 2)
            for numbers_pk, of_row in zip(numbers_rpk, some, strict=False):
                found[of_row] = numbers_pk[: len(of_row)]
            progress()
        return found

    @functools.cached_property
    def _program(self) -> Callable[..., Any]:
        size, count = self._shape["size"], self._shape["length"] // 2 // 2 * 2
        objective = by_document(size, count, self._number)
        train = self._config.train
        made = measure(self._built, objective, self._config.model, self._plan, train.compute_dtype)
        return distributed.compiled_together(made)


class Reference:
    """The references of the splits of a run's pairs that it reads. numbers: what computes them.

    A run's first state is the reference model. Raises ConfigError where a run that has begun lacks its files.
    """

    def __init__(self, run_dir: Path, corpus: PairCorpus, numbers: DocumentNumbers, log: Callable[[str], None]):
        self._folder = run_dir / FOLDER / corpus.content_hash[:16]
        self._corpus, self._numbers, self._log = corpus, numbers, log
        self._known: dict[str, References] = {}

    def of(self, split: str, state: TrainState, progress: Callable[[], None]) -> References:
        """Those of a split's pairs, (p, 2), in their order. state: from which they are computed if it is the run's
        first, and if they are not in the files. progress is called after each batch."""
        if not self._known:
            pairs = self._corpus.pairs
            self._known = {name: self._split(name, pairs[name], state, progress) for name in SPLITS}
        return self._known[split]

    def _split(self, name: str, pairs: Sequence[Pair], state: TrainState, progress: Callable[[], None]) -> References:
        first = int(state.step) == 0
        parts, stale = [np.zeros((0, 2), np.float32)], False
        for start in range(0, len(pairs), PART):
            file, some = self._folder / f"{name}-{start // PART:05d}.npy", pairs[start : start + PART]
            kept = None if stale else distributed.from_first(functools.partial(_read, file, len(some)))
            if kept is None and not first:
                raise ConfigError(
                    f"{file} is missing or broken, and the run has left the model that it holds log-probabilities of; "
                    "expected the file, or a run from the beginning"
                )
            if (
                kept is not None
                and first
                and start == 0
                and self._differ(state, some, np.asarray(kept, np.float32), progress)
            ):
                kept, stale = None, True
            if kept is None:
                kept = self._numbers(state, some, progress)
                distributed.from_first(functools.partial(_write, file, kept))
                self._log(f"reference: log-probabilities of {start + len(some)} of {len(pairs)} pairs of {name}")
            parts.append(np.asarray(kept, np.float32))
        return np.concatenate(parts)

    def _differ(self, state: TrainState, pairs: Sequence[Pair], kept: np.ndarray, progress: Callable[[], None]) -> bool:
        """Whether the first batch of the pairs now has other numbers: a run that starts over may start from another
        model."""
        now = self._numbers(state, pairs, progress, batches=1)
        return not np.array_equal(now, np.where(np.isnan(now), np.nan, kept), equal_nan=True)


def _read(file: Path, pairs: int) -> list[list[float]] | None:
    """The numbers of a file; None unless it holds those of so many pairs."""
    if not file.is_file():
        return None
    try:
        found = np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)
    except (ValueError, EOFError):
        return None
    return found.tolist() if found.shape == (pairs, 2) and found.dtype == np.float32 else None


def _write(file: Path, found: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, found, allow_pickle=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, buffer.getvalue())
