"""Held-out scores: which sequences, which bytes, and no drops, against scores computed from logits."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from tests.helpers import hybrid, run_config

from orogen.config.data import DataConfig
from orogen.data.loader import ONLY, open_corpus
from orogen.layers.documents import documents
from orogen.model.lm import build
from orogen.parallel.plan import make_plan
from orogen.train.heldout import Heldout
from orogen.train.optimizer import make_optimizer
from orogen.train.state import create_state

# Room for one token per rank and expert: an evaluation with this capacity would drop most assignments.
DROPPING = {"capacity_factor": 0.1}
ROWS = 3


class Scored:
    """A corpus whose letters take one to three bytes, a random model and its scores."""

    def __init__(self, folder: Path):
        words = ("strata ", "Größe ", "→ ", "fold\n")
        for number in range(60):
            text = "".join(words[(number * k) % 4] for k in range(1, 2 + number % 11))
            (folder / f"{number:02}.txt").write_text(text)
        data = DataConfig(corpus=str(folder), tokenizer="byte", heldout_fraction=0.3, tuning_fraction=0.0)
        model = hybrid(pattern="E-", mtp_depths=0, vocab_size=259)
        self.config = run_config(model, plan=DROPPING, batch_size=2, sequence_length=24, evaluate_rows=ROWS)
        self.config = dataclasses.replace(self.config, data=data)
        self.corpus, self.built = open_corpus(data), build(model)
        plan = make_plan(self.config.plan, model)
        optimizer = make_optimizer(self.config.optimizer, 10, self.built.params)
        self.state = create_state(model, self.built, optimizer, plan, 5)
        heldout = Heldout(self.config, self.built, self.corpus)
        self.sample, self.whole = heldout.sample(self.state), heldout.full(self.state)
        first, *others = heldout.passes[ONLY]
        self.rows = first.map(lambda *parts: np.concatenate(parts), *others)

    def nats_and_targets(self, rows: list[int]) -> tuple[float, int]:
        """Of the next tokens in these rows, from logits of the whole model on a plan without drops."""
        plan = make_plan(dataclasses.replace(self.config.plan, capacity_factor=None), self.config.model)
        batch = self.rows.map(lambda x: x[rows])
        model = nnx.merge(self.built.graph, self.state.params, self.state.buffers)
        logits_btv = model.logits(batch.tokens_bt, documents(batch.segments_bt), plan)
        likelihood_btv = np.asarray(jax.nn.log_softmax(logits_btv))
        nats, count = 0.0, 0
        for b, t in np.ndindex(len(rows), batch.tokens_bt.shape[1] - 1):
            if batch.segments_bt[b, t] and batch.segments_bt[b, t] == batch.segments_bt[b, t + 1]:
                nats -= likelihood_btv[b, t, batch.tokens_bt[b, t + 1]]
                count += 1
        return nats, count

    def text_bytes(self, rows: list[int]) -> int:
        """Bytes of the targets in these rows: a token below 256 is one, and no document's first token is a target."""
        tokens_bt, segments_bt = self.rows.tokens_bt[rows], self.rows.segments_bt[rows]
        inside_bt = (segments_bt[:, 1:] != 0) & (segments_bt[:, 1:] == segments_bt[:, :-1])
        specials = {self.corpus.tokenizer.bos_id, self.corpus.tokenizer.eos_id, self.corpus.tokenizer.pad_id}
        return int((inside_bt & ~np.isin(tokens_bt[:, 1:], list(specials))).sum())


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Scored:
    return Scored(tmp_path_factory.mktemp("texts"))


def test_the_whole_split_is_scored_by_all_its_bytes_and_nothing_is_dropped(scored):
    rows = list(range(len(scored.rows.tokens_bt)))
    nats, count = scored.nats_and_targets(rows)
    n_bytes = sum(len(document.text.encode()) for document in scored.corpus.splits["heldout"].documents)
    assert n_bytes == scored.text_bytes(rows)
    assert scored.whole["whole_heldout_loss"] == pytest.approx(nats / count, rel=1e-5)
    assert scored.whole["whole_heldout_bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_a_sample_is_of_spread_rows_and_scored_by_their_own_bytes(scored):
    """A request for three rows takes four, in batches of two: at each quarter of the rows that are not padding."""
    kept = int((scored.rows.segments_bt != 0).any(1).sum())
    rows = [i * kept // 4 for i in range(4)]
    assert kept > 8 and rows != [0, 1, 2, 3]
    nats, count = scored.nats_and_targets(rows)
    assert scored.sample["heldout_loss"] == pytest.approx(nats / count, rel=1e-5)
    assert scored.sample["heldout_bits_per_byte"] == pytest.approx(
        nats / math.log(2) / scored.text_bytes(rows), rel=1e-5
    )
