"""The task of `orogen rl`: answers that the training weights write, judged by environments."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from orogen.checkpoint.adapters import with_adapters
from orogen.checkpoint.open import open_folder
from orogen.config.checks import ConfigError, require
from orogen.config.precision import PrecisionConfig
from orogen.config.rl import PLAIN, RLConfig
from orogen.config.run import RunConfig
from orogen.cost.assemble import assemble
from orogen.data import corpora
from orogen.data.loader import ONLY, Corpus, Source
from orogen.data.readers import Document
from orogen.data.splits import TokenizedSplit
from orogen.data.tokenizer import Tokenizer, check_vocab_size
from orogen.data.vocabulary import make_tokenizer
from orogen.infer.chat import Chat
from orogen.layers.adapter import without_adapters
from orogen.model.lm import Built
from orogen.parallel import distributed
from orogen.posttrain.dialogue import Plain, Templated
from orogen.posttrain.environments.interface import Environment
from orogen.posttrain.environments.make import make_environment
from orogen.posttrain.heldout_tasks import HeldoutTasks
from orogen.posttrain.likelihood import Likelihoods
from orogen.posttrain.objective import policy_objective, terms_of
from orogen.posttrain.rollout import Rollouts
from orogen.posttrain.sft import keep_template, template_of
from orogen.posttrain.source import Reference, RolloutSource
from orogen.posttrain.task_split import SplitTasks, split_tasks
from orogen.posttrain.teachers import Teachers
from orogen.train.task import Task

ENVIRONMENTS = "environments"  # DataConfig.corpus: tasks come from RLConfig.environments


class Tasks(Corpus):
    """The tasks of all environments, as a corpus of their prompts.

    template: None for plain text.
    """

    def __init__(
        self, run: RunConfig, environments: Mapping[str, Environment], split: SplitTasks,
        template: str | dict[str, str] | None, **fields: Any,
    ) -> None:  # fmt: skip
        super().__init__(**fields)
        self._run, self.environments, self.split, self.template = run, environments, split, template

    @cached_property
    def rollouts(self) -> Rollouts:
        """The engine and the verifiers, which training and evaluation share."""
        form = Plain(self.tokenizer) if self.template is None else Templated(Chat(self.tokenizer, self.template))
        return Rollouts(self._run, self.tokenizer, self.environments, form)

    def describe(self) -> dict[str, Any]:
        """As a corpus of text, with the number of tasks of each environment, and the environments whose held-out
        questions are trained on too."""
        tasks = {name: len(one) for name, one in self.environments.items()}
        return {**super().describe(), "tasks": tasks, "heldout_repeats_training": self.split.repeated}

    def close(self) -> None:
        """Ends the processes that verify."""
        if "rollouts" in self.__dict__:
            self.rollouts.close()


def make_rl(rl: RLConfig, origin: Path | None, run_dir: Path, until: ExitStack | None = None) -> Task:
    """The task. origin: the folder with the first checkpoint, from which KL is measured, and perhaps a template. until:
    with its end, the processes that verify end too; None: with `Tasks.close`."""

    def open_(config: RunConfig, tokenizer: Tokenizer | None) -> Corpus:
        _check(config)
        data = config.data
        if tokenizer is None:
            if data.tokenizer == "bpe":
                raise ConfigError("DataConfig.tokenizer is 'bpe'; expected one that exists: the model's own")
            tokenizer = make_tokenizer(data, ())
        if data.vocab_size is not None:
            check_vocab_size(tokenizer, data.vocab_size, name="DataConfig.vocab_size")
        kept = run_dir if any(run_dir.glob("chat_template.*")) else origin
        template = None if rl.template == PLAIN else template_of(rl.template, kept, tokenizer)
        tasks = _open_tasks(config, tokenizer, template)
        if until is not None:
            until.callback(tasks.close)
        return tasks

    def source(config: RunConfig, corpus: Corpus) -> RolloutSource:
        assert isinstance(corpus, Tasks)
        built = assemble(config.model, config.plan, length=config.train.sequence_length).built
        scorer = Likelihoods(config, built)
        identity, reference = _identity(config, corpus), _reference(config, origin, built, scorer)
        if reference is not None and not _is_within(config):
            identity["reference"] = _fingerprint(built, *reference(None))
        if teachers := Teachers(config, corpus.tokenizer):
            identity["teachers"] = teachers.fingerprints(_fingerprint)
        return RolloutSource(
            config, corpus.rollouts, dict(corpus.split.numbers["train"]), scorer, identity=identity,
            pad_id=corpus.tokenizer.pad_id, run_dir=run_dir, reference=reference,
            teachers=teachers.scores if teachers else None,
        )  # fmt: skip

    return Task(
        objective=policy_objective(terms_of(rl)), open=open_, source=source, evaluation=_evaluation,
        measures=lambda position: dict(position["measures"]), keep=_keep,
    )  # fmt: skip


def _evaluation(config: RunConfig, built: Built, corpus: Corpus) -> HeldoutTasks | None:
    assert isinstance(corpus, Tasks)
    tasks = corpus.split.numbers["heldout"]
    if not any(tasks.values()):
        return None
    return HeldoutTasks(corpus.rollouts, tasks, count=config.train.evaluate_rows, repeated=corpus.split.repeated)


def _keep(corpus: Corpus, run_dir: Path) -> None:
    assert isinstance(corpus, Tasks)
    if corpus.template is not None:
        keep_template(corpus.template, run_dir)


def _check(config: RunConfig) -> None:
    """Raises ConfigError for what reinforcement learning has no use for."""
    data, train, rl = config.data, config.need("rl").train, config.rl
    require(data.corpus == ENVIRONMENTS, data, "corpus", f"{ENVIRONMENTS!r}: tasks come from RLConfig.environments")
    require(not train.carry_states, train, "carry_states", "False: rollouts do not continue each other")
    require(not train.phases, train, "phases", "none: every batch is a rollout")
    require(train.batch_ramp is None, train, "batch_ramp", "None: every batch is a rollout")
    require(train.ngram_order == 0, train, "ngram_order", "0: there is no text to fit on")
    length = train.sequence_length
    require(rl.max_tokens < length, rl, "max_tokens", f"less than TrainConfig.sequence_length = {length}")
    for field in ("recipe", "keep", "switch_step"):
        kept = getattr(PrecisionConfig(), field)
        expected = f"{kept!r}: rollouts and the trainer's log-probabilities are not quantised"
        require(getattr(config.precision, field) == kept, config.precision, field, expected)
    devices = config.plan.devices
    require(not rl.exact or devices == 1, rl, "exact", f"False on {devices} devices")
    # Two threads would start programs with collectives there in different orders, which then wait for each other.
    apart = devices == 1 or rl.server is not None
    require(not rl.staleness or apart, rl, "staleness", f"0 on {devices} devices, or a server")
    if rl.router_replay:
        require("E" in config.model.layers.main, rl, "router_replay", "False: the model has no experts")
        require(config.plan.stage == 1, config.plan, "stage", "1 with RLConfig.router_replay")
        require(config.plan.capacity_factor is None, config.plan, "capacity_factor", "None with RLConfig.router_replay")
    if distributed.count() > 1:
        raise ConfigError(f"{distributed.count()} processes; expected one: its engine writes the rollouts")


def _open_tasks(config: RunConfig, tokenizer: Tokenizer, template: str | dict[str, str] | None) -> Tasks:
    environments = {one.name: make_environment(one) for one in config.rl.environments}
    split = split_tasks(environments, config.data)
    splits = {part: TokenizedSplit(found, tokenizer) for part, found in split.texts.items()}
    # Tasks and templates decide what is written: a resumed run must have the same.
    known = json.dumps([corpora.content_hash(split.documents), template], sort_keys=True)
    source = Source(corpora.content_hash([Document("tasks", known)]), splits, None)
    return Tasks(
        config, environments, split, template, config=config.data, sources={ONLY: source}, tokenizer=tokenizer
    )  # fmt: skip


def _identity(config: RunConfig, corpus: Tasks) -> dict[str, Any]:
    """What a position belongs to."""
    rl = json.loads(json.dumps(dataclasses.asdict(config.rl)))
    places = ("server", "server_weights", "server_timeout", "server_deadline", "server_retries")
    for free in ("slots", "workers", "table_rows", *places):  # speed, and a place
        del rl[free]
    for one in rl["environments"]:
        del one["teacher"]  # known by what it computes
        del one["url"]  # where a verifier listens; what it judges are the tasks
    for later in ("router_replay", "staleness"):  # positions of earlier versions do not name them
        if not rl[later]:
            del rl[later]
    return {
        "tasks": corpus.content_hash, "tokenizer": corpus.tokenizer.fingerprint, "seed": config.train.seed, "rl": rl
    }  # fmt: skip


def _reference(config: RunConfig, origin: Path | None, built: Built, scorer: Likelihoods) -> Reference | None:
    """The weights that KL refers to: those of the run without its adapters or, in other runs, the first checkpoint's,
    read once."""
    rl, lora = config.rl, config.lora
    if not rl.kl:
        return None
    if _is_within(config):
        return lambda state: (without_adapters(state.params), state.buffers)
    if origin is None:
        raise ConfigError(f"RLConfig.kl is {rl.kl}; expected --checkpoint DIR too, the model from which it is measured")
    held: list[tuple[Any, Any]] = []

    def reference(state: Any) -> tuple[Any, Any]:
        if not held:
            with open_folder(origin) as folder:
                given = folder if lora is None else with_adapters(folder, lora, seed=config.train.seed)
                held.append(given.read(built, scorer.plan, "float32"))
        return held[0]

    return reference


def _is_within(config: RunConfig) -> bool:
    """Whether the run itself holds what it began with: it trains nothing but adapters."""
    return config.lora is not None and not config.need("optimizer").optimizer.trained


def _fingerprint(built: Built, *states: Any) -> str:
    """Of parameters and buffers of a laid-out model: a hash of each array's bits, weighted by their places and summed
    modulo 2**32, so that neither the plan nor the order of the sum changes it."""

    def sums(states: Any) -> list[Array]:
        return [_weighted_bits(leaf) for leaf in jax.tree.leaves(list(map(built.whole, states)))]

    found = [int(one) for one in jax.device_get(jax.jit(sums)(list(states)))]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _weighted_bits(x: Array) -> Array:
    words = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32).ravel()
    return jnp.sum(words * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)
