"""Trains the arms of a study with one compiled step per arm: seeds and learning rates are its arguments.

`orogen sweep` gives each run a process and a folder, which is what long runs need. Here an arm's runs follow one
another in one process, without checkpoints: many short runs of a model whose compilation takes as long as one of them.
The results are those of `orogen sweep`, up to rounding, and have its form. Several processes may share a GPU or a host:
each takes some of the arms and a folder of its own, and their lines are concatenated. With one --lock they compile side
by side and train one after another: a GPU divides its time between processes, and each loop waits for the host.

PYTHONPATH=src python experiments/packed.py --gin_file STUDY --run DIR [--arms NAME,NAME] [--lock FILE]
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from orogen.config.checks import ConfigError
from orogen.config.load import load_sweep
from orogen.config.precision import PrecisionConfig
from orogen.config.run import OptimizerConfig, RunConfig
from orogen.cost.assemble import assemble
from orogen.data.loader import Corpus, open_corpus
from orogen.model.count import count
from orogen.parallel.runtime import configure
from orogen.report.series import load_violation
from orogen.sweep.command import best_rates
from orogen.sweep.parameters import totals
from orogen.sweep.plan import Arms, Run, make_arms
from orogen.sweep.results import Results
from orogen.train.heldout import Heldout
from orogen.train.next_token import NEXT_TOKENS
from orogen.train.optimizer import learning_rate, make_optimizer
from orogen.train.pretraining import train_loader
from orogen.train.run_folder import environment
from orogen.train.state import TrainState, create_state
from orogen.train.step import batch_to_devices, make_step

AHEAD = 16  # steps that may be dispatched before the first of them is waited for


class Rated(NamedTuple):
    """The state of `rated`: the rate of the next update, and the state of an optimizer whose rate is one."""

    rate: Array
    inner: Any


def rated(inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose updates are those of `inner` times the rate in its state. AdamW's and Muon's updates, decay
    included, are proportional to their rate, so `inner` with a rate of one gives those of any rate."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Rated]:
        updates, kept = inner.update(updates, state.inner, params, **extra)
        return jax.tree.map(lambda u: u * state.rate, updates), Rated(state.rate, kept)

    return optax.GradientTransformationExtraArgs(lambda params: Rated(jnp.zeros(()), inner.init(params)), update)


class Packed:
    """The compiled programs of one arm, and its runs. example: the config of any run of the arm."""

    def __init__(self, example: RunConfig, corpus: Corpus):
        if example.precision != PrecisionConfig():
            raise ConfigError(f"PrecisionConfig.recipe={example.precision.recipe!r}; expected runs of plain numbers")
        # What differs between runs of an arm must not be in a program: steps, rate, schedule and seed.
        alike = OptimizerConfig(**{
            **vars(example.optimizer), "learning_rate": 1.0, "schedule": "constant", "warmup_steps": 0,
            "decay_steps": 0, "min_ratio": OptimizerConfig.min_ratio,
        })  # fmt: skip
        train = dataclasses.replace(example.train, seed=0, steps=1)
        self.config, self.corpus = dataclasses.replace(example, train=train, optimizer=alike), corpus
        self.plan, self.built = assemble(example.model, example.plan, length=train.sequence_length)
        self.optimizer = rated(make_optimizer(alike, 1, self.built.params))
        self.step = make_step(self.built, NEXT_TOKENS, self.config, self.plan, self.optimizer)
        self.parameters = count(example.model)["total"]

    def train(self, config: RunConfig) -> dict[str, float]:
        """The numbers of a model that begins afresh."""
        state, found = self.steps(self.start(config.train.seed), config)
        return {**found, **self.heldout.full(state)}

    @functools.cached_property
    def heldout(self) -> Heldout:
        return Heldout(self.config, self.built, self.corpus)

    def compile(self) -> None:
        """One step and one batch of the evaluation, so that the first run need not wait for the compiler."""
        state = self.start(0)
        state, _ = self.step(state, batch_to_devices(next(train_loader(self.config, self.corpus)), self.plan))
        self.heldout.totals(state, self.heldout.sample_batches()[:1], 1)

    def start(self, seed: int) -> TrainState:
        return create_state(self.config.model, self.built, self.optimizer, self.plan, seed)

    def steps(self, state: TrainState, config: RunConfig) -> tuple[TrainState, dict[str, float]]:
        """The state after all steps of a run, and the numbers that its steps give. The state is donated."""
        rates = jax.device_get(jax.vmap(learning_rate(config.optimizer, config.train.steps))(_steps(config)))
        loader, waiting, loads, losses = train_loader(config, self.corpus), deque(), [], []
        for rate in np.asarray(rates, np.float32):
            state = self._rated(state, rate)
            state, metrics = self.step(state, batch_to_devices(next(loader), self.plan))
            losses.append(metrics.loss)
            loads.append(metrics.load_le)
            waiting.append(metrics.loss)
            if len(waiting) > AHEAD:
                waiting.popleft().block_until_ready()
        if skipped := int(state.skipped):
            raise RuntimeError(f"{skipped} steps of {config.train.steps} were not finite; expected none")
        last = max(1, len(losses) // 10)
        found = {"train_loss": float(np.mean(jax.device_get(losses[-last:])))}
        violation = load_violation([{"expert_load": load.tolist()} for load in jax.device_get(loads)])
        return state, {**found, **({} if violation is None else {"load_violation": violation})}

    def _rated(self, state: TrainState, rate: np.float32) -> TrainState:
        known: Any = state.optimizer
        return state._replace(optimizer=known._replace(rate=jax.device_put(rate, self.plan.sharding())))


@contextlib.contextmanager
def turn(lock: Path | None) -> Iterator[None]:
    """Waits until no other process is between these lines with the same file; None: never."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _steps(config: RunConfig) -> Array:
    return jnp.arange(config.train.steps)


def facts(packed: Packed, run: Run, numbers: tuple[str, ...]) -> dict[str, Any]:
    """Trains a run; what its line says."""
    began = time.perf_counter()
    found = packed.train(run.config)
    seconds = round(time.perf_counter() - began, 3)
    metric, *further = numbers
    known = environment()
    return {
        "metric": metric, "value": found[metric],
        **({"further": {name: found[name] for name in further}} if further else {}), "train_loss": found["train_loss"],
        "seconds": seconds, "parameters": packed.parameters, "corpus": packed.corpus.content_hash,
        **{name: known[name] for name in ("commit", "packages", "devices")},
    }  # fmt: skip


def run_arm(arms: Arms, name: str, corpus: Corpus, results: Results, lock: Path | None) -> None:
    """The runs of one arm that have no result yet, those that choose its rate first. lock: see `turn`."""
    sweep = arms.sweep
    searches = [run for run in arms.searches() if run.arm.name == name]
    packed = Packed(next(config for arm, config in arms.configs.items() if arm.name == name), corpus)
    packed.compile()

    def do(runs: list[Run]) -> None:
        for run in runs:
            if results.of(run) is None:
                with turn(lock):
                    results.add(run, facts(packed, run, sweep.numbers))
                done = results.of(run)
                assert done is not None
                print(
                    f"{run.name}: {done['value']:.4f}, rate {done['learning_rate']:g}, {done['seconds']} s", flush=True
                )

    do(searches)
    rates, edges = best_rates(sweep, searches, results)
    if edges:
        print(f"{name}: the best rate, {rates[name]:g}, is an end of those searched", flush=True)
    do([run for run in arms.runs(rates) if run.arm.name == name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gin_file", type=Path, required=True, metavar="STUDY", help="a recipe with a SweepConfig")
    parser.add_argument("--gin_bindings", action="append", default=[], metavar="X.y=1", help="on top of the file's")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="where results.jsonl is written")
    parser.add_argument("--arms", default="", metavar="NAME,NAME", help="those to run; all by default")
    parser.add_argument("--lock", type=Path, metavar="FILE", help="of all processes that train in turn")
    options = parser.parse_args()
    sweep, _ = load_sweep([options.gin_file], options.gin_bindings)
    arms = make_arms(sweep, [options.gin_file], options.gin_bindings, totals)
    names = [arm.name for arm in arms.configs]
    chosen = options.arms.split(",") if options.arms else names
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--arms has {unknown[0]!r}; expected some of {', '.join(names)}")
    configure(0)  # compiled programs are kept between processes
    options.run.mkdir(parents=True, exist_ok=True)
    results = Results(options.run, sweep.numbers)
    corpora = {}
    for name in chosen:
        data = next(config for arm, config in arms.configs.items() if arm.name == name).data
        if data not in corpora:
            corpora[data] = open_corpus(data)
        run_arm(arms, name, corpora[data], results, options.lock)


if __name__ == "__main__":
    main()
