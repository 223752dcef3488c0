"""The task of `orogen dpo`: pairs of answers, compared with the model that the run started from, or scored by a reward
model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from orogen.config.checks import require
from orogen.config.preference import BRADLEY_TERRY
from orogen.config.run import RunConfig
from orogen.config.streams import say
from orogen.cost.assemble import assemble
from orogen.data.loader import Corpus
from orogen.data.packing import Batch
from orogen.data.tokenizer import Tokenizer
from orogen.model.lm import Built
from orogen.parallel import distributed, placement
from orogen.posttrain.documents import answer_log_probs
from orogen.posttrain.pair_batches import PairSource, References, packed, pair_batch
from orogen.posttrain.pairs import PairCorpus, open_pairs
from orogen.posttrain.preference import ACCURACY, LOSS, MARGIN, preference
from orogen.posttrain.reference import DocumentNumbers, Reference
from orogen.posttrain.sft import keep_template, with_template
from orogen.train.formats import in_formats, is_switched
from orogen.train.heldout import heldout_plan, measure
from orogen.train.state import TrainState
from orogen.train.step import batch_to_devices
from orogen.train.task import Objective, Task

SCORES = (LOSS, ACCURACY, MARGIN)


def make_dpo(config: RunConfig, origin: Path | None, run_dir: Path) -> Task:
    """The task of `config.preference`. origin: the folder in which the model's own chat template may be. Raises
    ConfigError for settings that pairs cannot use."""
    chosen = config.need("preference", "data", "train", "model").preference
    _check(config)
    objective, kept = preference(chosen), []

    def open_(config: RunConfig, tokenizer: Tokenizer | None) -> Corpus:
        tokenizer, template = with_template(config.data, chosen.template, origin, tokenizer)
        return open_pairs(config.data, chosen, template, tokenizer, length=config.train.sequence_length)

    def reference(config: RunConfig, corpus: Corpus) -> Reference | None:
        """One for the source and the evaluation."""
        assert isinstance(corpus, PairCorpus)
        if chosen.loss != BRADLEY_TERRY and not kept:
            _, built = assemble(config.model, config.plan, length=config.train.sequence_length)
            numbers = DocumentNumbers(config, built, answer_log_probs, pad_id=corpus.tokenizer.pad_id)
            log = say if distributed.first() else lambda line: None
            kept.append(Reference(run_dir, corpus, numbers, log))
        return kept[0] if kept else None

    def source(config: RunConfig, corpus: Corpus) -> PairSource:
        assert isinstance(corpus, PairCorpus)
        data, train = config.data, config.train
        identity = {"corpus": corpus.content_hash, "tokenizer": corpus.tokenizer.fingerprint, "seed": data.seed}
        return PairSource(
            corpus.pairs["train"], reference(config, corpus), size=train.batch_size, length=train.sequence_length,
            pad_id=corpus.tokenizer.pad_id, seed=train.seed if data.shuffle else None, identity=identity,
        )  # fmt: skip

    def evaluation(config: RunConfig, built: Built, corpus: Corpus) -> "PairScores | None":
        assert isinstance(corpus, PairCorpus)
        if not corpus.pairs["heldout"]:
            return None
        return PairScores(config, built, corpus, objective, reference(config, corpus))

    def keep(corpus: Corpus, run_dir: Path) -> None:
        assert isinstance(corpus, PairCorpus)
        keep_template(corpus.template, run_dir)

    return Task(objective=objective, open=open_, source=source, evaluation=evaluation, keep=keep)


def _check(config: RunConfig) -> None:
    """Raises ConfigError for settings that pairs cannot use."""
    train, expected = config.train, "none here: batches of pairs have one shape"
    require(not train.phases, train, "phases", expected)
    require(train.batch_ramp is None, train, "batch_ramp", expected)
    require(not train.carry_states, train, "carry_states", "False here: answers are whole documents")
    require(train.ngram_order == 0, train, "ngram_order", "0 here: an n-gram model is fitted on texts")
    if config.preference.loss == BRADLEY_TERRY:
        expected = "True with PreferenceConfig.loss = 'bradley_terry', whose scores it gives"
        require(config.model.score_head, config.model, "score_head", expected)


class PairScores:
    """Scores the pairs of the held-out split: evenly spread rows of them, or all. Experts drop no token."""

    def __init__(
        self, config: RunConfig, built: Built, corpus: PairCorpus, objective: Objective, reference: Reference | None
    ):
        self._config, self._built, self._objective, self._reference = config, built, objective, reference
        self._pairs, self._pad_id = corpus.pairs["heldout"], corpus.tokenizer.pad_id
        self._plan, self._programs = heldout_plan(config), {}
        self._rows = packed(self._pairs, length=config.train.sequence_length)
        self.sampled = tuple(f"heldout_{name}" for name in SCORES)
        self.whole = tuple(f"whole_{name}" for name in self.sampled)
        self.progress: Callable[[], None] = lambda: None

    def sample(self, state: TrainState) -> dict[str, float]:
        """The scores of about `evaluate_rows` rows."""
        count = min(len(self._rows), self._config.train.evaluate_rows)
        chosen = np.arange(count) * len(self._rows) // count
        return dict(zip(self.sampled, self._means(state, [self._rows[row] for row in chosen]), strict=True))

    def full(self, state: TrainState) -> dict[str, float]:
        """The scores of the whole split."""
        return dict(zip(self.whole, self._means(state, self._rows), strict=True))

    def _means(self, state: TrainState, rows: Sequence[Sequence[int]]) -> list[float]:
        train = self._config.train
        references = self._references(state)
        params = jax.jit(placement.working, static_argnums=1)(state.params, self._plan)
        measured = self._measured(is_switched(self._config.precision, int(state.step)))
        sums, count = np.zeros(len(SCORES)), 0.0
        for start in range(0, len(rows), train.batch_size):
            batch: Batch = pair_batch(
                rows[start : start + train.batch_size], self._pairs, references, size=train.batch_size,
                length=train.sequence_length, pad_id=self._pad_id,
            )  # fmt: skip
            found = jax.device_get(measured(params, state.buffers, batch_to_devices(batch, self._plan)))
            sums, count = sums + [float(found[name].sum) for name in SCORES], count + float(found[LOSS].count)
            self.progress()
        return (sums / count).tolist()

    def _references(self, state: TrainState) -> References | None:
        return None if self._reference is None else self._reference.of("heldout", state, self.progress)

    def _measured(self, switched: bool) -> Callable[..., Any]:
        if switched not in self._programs:
            config = self._config
            plan = in_formats(self._plan, config.precision, config.model, switched=switched)
            made = measure(self._built, self._objective, config.model, plan, config.train.compute_dtype)
            self._programs[switched] = distributed.compiled_together(made)
        return self._programs[switched]
