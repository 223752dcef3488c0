"""The task of `orogen distill`: a student learns a teacher's distribution over the next token.

Letters: b batch, t time, d model.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from orogen.checkpoint.folders import Folder
from orogen.config.checks import ConfigError, require
from orogen.config.distill import DistillConfig
from orogen.config.model import ModelConfig
from orogen.config.run import RunConfig
from orogen.data.loader import Corpus, Loader
from orogen.data.packing import Batch
from orogen.data.tokenizer import Tokenizer
from orogen.kernels.divergence import Mix
from orogen.model.heads import distilled, token_nats
from orogen.model.lm import Built, LanguageModel
from orogen.parallel import distributed, placement
from orogen.parallel.plan import Plan
from orogen.posttrain.chats import ChatCorpus
from orogen.posttrain.sft import make_sft
from orogen.posttrain.states import check_states, compared
from orogen.posttrain.stored_logits import StoredLogits
from orogen.posttrain.teacher import Teacher, fingerprint_of, knowledge, require_same_vocabulary, teacher_plan
from orogen.train.formats import in_formats, is_switched
from orogen.train.heldout import Heldout, heldout_plan, measure
from orogen.train.next_token import LOSS, MTP_LOSS, target_weights, targets
from orogen.train.pretraining import PRETRAINING, train_loader
from orogen.train.state import TrainState
from orogen.train.step import batch_to_devices
from orogen.train.task import ByName, Evaluation, Metric, Objective, Task

# Metrics: the mix that is minimised; nats of the divergence; the comparison of hidden states. LOSS is measured too.
DISTILLATION, DIVERGENCE, STATES = "distillation", "divergence", "states"
SCORE = "heldout_divergence"


def make_objective(distill: DistillConfig) -> Objective:
    """divergence x KL(teacher || student) + cross_entropy x the nats of the next token, both per target, and
    state_weight x the comparison of hidden states, if there is one.

    A multi-token-prediction block, which a teacher's next-token distribution says nothing of, learns the text as in
    pretraining. Sources: arXiv:1503.02531; arXiv:2601.20088, eq. 1.
    """
    mix = Mix(distill.divergence, distill.cross_entropy, distill.temperature, distill.rest)

    def sums(
        model: LanguageModel, hidden: list[Array], batch: Batch, plan: Plan, *, frozen: Any = None, streams: Any = ()
    ) -> ByName:
        target = targets(batch, 0, plan), target_weights(batch, 0, plan)
        found = distilled(hidden[0], model, knowledge(batch, frozen, plan), *target, mix=mix, plan=plan)
        named = {DISTILLATION: found.total, DIVERGENCE: found.divergence, LOSS: found.cross_entropy}
        if streams:
            named[STATES] = compared(streams, batch, target[1], distill.state_loss, plan)
        deeper = [
            token_nats(h_btd, model, targets(batch, depth, plan), target_weights(batch, depth, plan), plan)
            for depth, h_btd in enumerate(hidden[1:], 1)
        ]
        return named | ({MTP_LOSS: jnp.stack(deeper)} if deeper else {})

    def counts(batch: Batch, depths: int, plan: Plan) -> ByName:
        counted = [jnp.abs(target_weights(batch, depth, plan)).sum() for depth in range(depths + 1)]
        named = dict.fromkeys((DISTILLATION, DIVERGENCE, LOSS, *([STATES] if distill.states else [])), counted[0])
        return named | ({MTP_LOSS: jnp.stack(counted[1:])} if depths else {})

    def shares(config: ModelConfig, depths: int) -> Mapping[str, float]:
        found = {DISTILLATION: 1.0} | ({STATES: distill.state_weight} if distill.states else {})
        return found | ({MTP_LOSS: config.mtp_loss_scale / depths} if depths else {})

    watched = tuple(student for student, _ in distill.state_pairs)
    return Objective(counts=counts, sums=sums, shares=shares, watched=watched)


class TaughtBatches:
    """A `Source`: the batches of a loader, in a position that names the teacher and how many of its most likely tokens
    are learned, None for all: whether it runs or its logits are stored may change, and these not. add: what is known of
    a batch without its pass."""

    def __init__(
        self, loader: Loader, teacher: str, top_k: int | None, add: Callable[[Batch], Batch] = lambda batch: batch
    ):
        self._loader, self._taught, self._add = loader, {"teacher": teacher, "top_k": top_k}, add
        self.progress: Callable[[], None] = lambda: None

    def take(self, state: Any) -> Batch:
        """The next batch."""
        return self._add(self._loader.take(state))

    def state(self) -> dict[str, Any]:
        """The position after the last batch taken."""
        found = self._loader.state()
        return {**found, "identity": {**found["identity"], **self._taught}}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `state` was taken. Raises ConfigError if it is from other data, another
        teacher or another number of its tokens."""
        for name, value in self._taught.items():
            known = state.get("identity", {}).get(name)
            if known != value:
                raise ConfigError(f"the saved data position has {name} = {known!r}; expected {value!r}, as here")
        self._loader.restore(state)


class Distance:
    """Scores the held-out split as `Heldout` does, and the student's mean divergence from the teacher there."""

    def __init__(self, heldout: Heldout, teacher: Teacher, config: RunConfig, built: Built, objective: Objective):
        self._heldout, self._teacher = heldout, teacher
        self.progress: Callable[[], None] = lambda: None
        self.sampled, self.whole = (*heldout.sampled, SCORE), (*heldout.whole, f"whole_{SCORE}")
        self._plan, self._precision, self._measured = heldout_plan(config), config.precision, []
        for switched in (False, True) if config.precision.switch_step is not None else (False,):
            plan = in_formats(self._plan, config.precision, config.model, switched=switched)
            settings: Any = {"frozen": teacher.variables}
            measured = measure(built, objective, config.model, plan, config.train.compute_dtype, **settings)
            self._measured.append(distributed.compiled_together(measured))

    def sample(self, state: TrainState) -> dict[str, float]:
        """The scores of a sample."""
        self._heldout.progress = self.progress
        return {**self._heldout.sample(state), SCORE: self._mean(state, self._heldout.sample_batches())}

    def full(self, state: TrainState) -> dict[str, float]:
        """The scores of the whole split."""
        self._heldout.progress = self.progress
        batches = (batch for one in self._heldout.passes.values() for batch in one)
        return {**self._heldout.full(state), f"whole_{SCORE}": self._mean(state, batches)}

    def _mean(self, state: TrainState, batches: Iterable[Batch]) -> float:
        params = jax.jit(placement.working, static_argnums=1)(state.params, self._plan)
        measured = self._measured[is_switched(self._precision, int(state.step))]
        total = count = 0.0
        for batch in batches:
            placed = batch_to_devices(batch, self._plan)
            placed = placed._replace(extras={**placed.extras, **self._teacher.extras(batch)})
            found: dict[str, Metric] = measured(params, state.buffers, placed, self._teacher.variables)
            one = jax.device_get(found[DIVERGENCE])
            total, count = total + float(one.sum), count + float(one.count)
            self.progress()
        return total / max(count, 1)


class Distillation:
    """The parts of the task that share a teacher. folder: that of the teacher, which stays open; None if its logits are
    stored, unless it is to be compared with theirs; student: that from which the student starts, None for a new one;
    run_dir: of the run, which keeps a chat template once it has begun."""

    def __init__(self, folder: Folder | None, distill: DistillConfig, *, run_dir: Path, student: Path | None):
        self._folder, self._distill = folder, distill
        kept = any(run_dir.glob("chat_template.*"))
        self._chats = make_sft(run_dir if kept else student)
        self._objective = make_objective(distill)
        self._teacher: Teacher | None = None
        self._stored: StoredLogits | None = None

    def task(self) -> Task:
        """The task itself."""
        live = self._distill.logits is None
        return Task(
            objective=self._objective, open=self.open, source=self._source, evaluation=self._evaluation,
            measures=PRETRAINING.measures, keep=self._keep, frozen=self._frozen if live else None,
            more_rows=self._folder is not None,
        )  # fmt: skip

    def open(self, config: RunConfig, tokenizer: Tokenizer | None) -> Corpus:
        """The data, as the student's tokenizer or, for a new student, the teacher's has them. Raises ConfigError if the
        teacher, or what is stored of it, does not suit the run."""
        of_teacher, tokens = None, config.model.vocab_size
        expected = f"at most {tokens}, as many as ModelConfig.vocab_size"
        require(self._distill.top_k is None or self._distill.top_k <= tokens, self._distill, "top_k", expected)
        if self._folder is not None:
            require_same_vocabulary(self._folder.config, config.model)
            check_states(config, self._folder.config)
            RunConfig(model=self._folder.config, plan=teacher_plan(config, self._distill), train=config.train).check()
            of_teacher = self._folder.tokenizer()
        if tokenizer is None and of_teacher is not None:
            tokenizer = of_teacher.as_in_training()
        corpus = (PRETRAINING if config.chat is None else self._chats).open(config, tokenizer)
        if of_teacher is not None and of_teacher.as_in_training().fingerprint != corpus.tokenizer.fingerprint:
            raise ConfigError("the data have another tokenizer than the teacher; expected the teacher's")
        if self._distill.logits is not None:
            self._stored = StoredLogits(Path(self._distill.logits), config, corpus)
            if self._folder is not None and fingerprint_of(self._folder, config) != self._stored.teacher:
                logits = f"the logits in {self._distill.logits!r}"
                raise ConfigError(f"{logits} are of another teacher than --checkpoint; expected its own")
        return corpus

    def _keep(self, corpus: Corpus, run_dir: Path) -> None:
        (self._chats if isinstance(corpus, ChatCorpus) else PRETRAINING).keep(corpus, run_dir)

    def _frozen(self, config: RunConfig, plan: Plan) -> Teacher:
        assert self._folder is not None
        self._teacher = Teacher(self._folder, config, plan, top_k=self._distill.top_k)
        return self._teacher

    def _source(self, config: RunConfig, corpus: Corpus) -> TaughtBatches:
        if self._stored is not None:
            loader = train_loader(config, self._stored.numbered(corpus))
            return TaughtBatches(loader, self._stored.teacher, self._stored.top_k, self._stored.add)
        assert self._teacher is not None
        return TaughtBatches(train_loader(config, corpus), self._teacher.fingerprint, self._distill.top_k)

    def _evaluation(self, config: RunConfig, built: Built, corpus: Corpus) -> Evaluation | None:
        heldout = PRETRAINING.evaluation(config, built, corpus)
        if heldout is None or self._teacher is None:
            return heldout
        assert isinstance(heldout, Heldout)
        return Distance(heldout, self._teacher, config, built, self._objective)
