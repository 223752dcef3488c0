"""The task of `orogen train`: the next tokens of a corpus, packed into rows, scored on held-out documents."""

from collections.abc import Iterator, Mapping
from typing import Any

from orogen.config.run import RunConfig
from orogen.data.blend import at_step, measures
from orogen.data.loader import Corpus, Loader, open_corpus
from orogen.data.packing import Batch
from orogen.data.tokenizer import Tokenizer
from orogen.model.lm import Built
from orogen.train.heldout import Heldout
from orogen.train.next_token import NEXT_TOKENS
from orogen.train.task import Task


def _open(config: RunConfig, tokenizer: Tokenizer | None) -> Corpus:
    return open_corpus(config.data, tokenizer=tokenizer)


def train_loader(config: RunConfig, corpus: Corpus) -> Loader:
    """The run's stream of batches, from the beginning."""
    train = config.train
    if config.varies:
        return corpus.blend_loader(config.stretches(), shuffle_seed=train.seed)
    return corpus.train_loader(
        batch_size=train.batch_size, sequence_length=train.sequence_length, shuffle_seed=train.seed,
        lanes=train.carry_states,
    )  # fmt: skip


def batches_until(
    config: RunConfig, corpus: Corpus, step: int, jumps: Mapping[int, dict[str, Any]] | None = None
) -> Iterator[Batch]:
    """The batches that the first `step` steps of the run took. jumps: by step, where the data went on after a
    roll-back to it; see `report.lost`."""
    loader = train_loader(config, corpus)
    for done in range(step):
        if jumps and done in jumps:
            loader.restore(at_step(jumps[done], done))
        yield next(loader)


def _evaluation(config: RunConfig, built: Built, corpus: Corpus) -> Heldout | None:
    return Heldout(config, built, corpus) if len(corpus.splits["heldout"]) else None


PRETRAINING = Task(objective=NEXT_TOKENS, open=_open, source=train_loader, evaluation=_evaluation, measures=measures)
