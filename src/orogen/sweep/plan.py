"""The runs of a sweep: their configs, with equal budgets by construction."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from orogen.config.checks import ConfigError
from orogen.config.load import load_arm
from orogen.config.model import ModelConfig
from orogen.config.run import RunConfig
from orogen.config.sweep import Arm, SweepConfig
from orogen.config.text import run_text
from orogen.cost.flops import training_flops_per_token

# The most by which an arm's budget may differ from the control's: steps are whole numbers.
TOLERANCE = 0.005


class Run(NamedTuple):
    """One run of an arm. search: whether it only helps to choose the arm's learning rate. checkpoint: the folder whose
    weights it begins with; None: it starts afresh."""

    arm: Arm
    name: str
    config: RunConfig
    search: bool = False
    checkpoint: str | None = None

    @property
    def text(self) -> str:
        """The gin file that it trains."""
        return run_text(self.config)

    @property
    def hash(self) -> str:
        """SHA-256 of that file, and of the checkpoint's path if there is one."""
        return hashlib.sha256(self.text.encode() + (self.checkpoint or "").encode()).hexdigest()

    @property
    def tokens(self) -> int:
        """Positions in all batches, padding included."""
        return _tokens(self.config)

    @property
    def flops(self) -> float:
        """Operations of all forward and backward passes, for rows of one document each."""
        return self.tokens * _flops_per_token(self.config)


class Arms(NamedTuple):
    """The arms of a sweep with their configs, whose steps keep to the budget."""

    sweep: SweepConfig
    configs: dict[Arm, RunConfig]

    def searches(self) -> list[Run]:
        """The runs that choose learning rates: one per arm and rate."""
        sweep = self.sweep
        return [
            self._run(arm, f"{arm.name}-lr{rate:g}", self._searching(config, rate), search=True)
            for arm, config in self.configs.items()
            for rate in sweep.learning_rates
        ]

    def runs(self, rates: dict[str, float]) -> list[Run]:
        """The runs that are compared: seed by seed, all arms of one before those of the next. rates: the learning rate
        by the arm's name; an arm without one keeps what it binds."""
        found = []
        for seed in self.sweep.seeds:
            for arm, config in self.configs.items():
                if arm.name in rates:
                    config = _with_rate(config, rates[arm.name])
                found.append(self._run(arm, f"{arm.name}-seed{seed}", _with_seed(config, seed)))
        return found

    def _run(self, arm: Arm, name: str, config: RunConfig, *, search: bool = False) -> Run:
        """The arm's run of this config. A search starts from the checkpoint of the first seed: there is none for its
        own."""
        seed = self.sweep.seeds[0] if search else config.train.seed
        return Run(arm, name, config, search, self.sweep.checkpoint(arm, seed))

    def _searching(self, config: RunConfig, rate: float) -> RunConfig:
        steps = max(1, round(config.train.steps * self.sweep.search_share))
        return _with_seed(_with_rate(_with_steps(config, steps), rate), self.sweep.search_seed)


def make_arms(
    sweep: SweepConfig, files: Sequence[str | Path], bindings: Sequence[str],
    parameters: Callable[[Sequence[ModelConfig]], Sequence[int]],
) -> Arms:  # fmt: skip
    """The arms of the sweep that the files describe. parameters: counts those of models.

    Raises ConfigError for an arm that cannot be built, whose parameters differ too much from the control's, or whose
    budget no number of steps meets.
    """
    bound = {arm: load_arm(files, bindings, arm).need("model", "data", "train", "optimizer") for arm in sweep.arms()}
    for arm, config in bound.items():
        _check_phases(sweep, arm, config)
    control = next(config for arm, config in bound.items() if arm.values == sweep.control)
    if sweep.parameters_within:
        counts = parameters([control.model, *(config.model for config in bound.values())])
        _check_parameters(sweep, counts[0], dict(zip(bound, counts[1:], strict=True)))
    return Arms(sweep, {arm: _on_budget(sweep, arm, config, control) for arm, config in bound.items()})


def _check_phases(sweep: SweepConfig, arm: Arm, config: RunConfig) -> None:
    """Phases may change the blend, and the rate if none is searched for."""
    shapes = {(stretch.batch_size, stretch.sequence_length) for stretch in config.stretches()}
    if len(shapes) > 1:
        expected = "expected one, without TrainConfig.batch_ramp and phases of other shapes: budgets are counted for it"
        raise ConfigError(f"arm {arm.name} has batches of {len(shapes)} shapes; {expected}")
    if sweep.learning_rates and config.train.rates:
        expected = "expected none: SweepConfig.learning_rates are peaks of the schedule alone"
        raise ConfigError(f"arm {arm.name} has PhaseConfig.learning_rate {config.train.rates[0][1]:g}; {expected}")


def _check_parameters(sweep: SweepConfig, expected: int, counts: dict[Arm, int]) -> None:
    for arm, count in counts.items():
        if abs(count - expected) > sweep.parameters_within * expected:
            raise ConfigError(
                f"arm {arm.name} has {count:,} parameters; expected the control's {expected:,}, within "
                f"SweepConfig.parameters_within = {sweep.parameters_within:g} of them"
            )


def _on_budget(sweep: SweepConfig, arm: Arm, config: RunConfig, control: RunConfig) -> RunConfig:
    if sweep.budget == "steps":
        return config
    spent: Callable[[RunConfig], float] = _tokens if sweep.budget == "tokens" else _flops
    wanted, per_step = spent(control), spent(config) / config.train.steps
    steps = max(1, round(wanted / per_step))
    if abs(steps * per_step - wanted) > TOLERANCE * wanted:
        raise ConfigError(
            f"arm {arm.name} spends {per_step:.4g} {sweep.budget} per step; expected a number of them within "
            f"{TOLERANCE:.1%} of the control's {wanted:.4g}, but {steps} steps spend {steps * per_step:.4g}"
        )
    return _with_steps(config, steps)


def _tokens(config: RunConfig) -> int:
    return config.train.steps * config.train.batch_size * config.train.sequence_length


def _flops(config: RunConfig) -> float:
    return _tokens(config) * _flops_per_token(config)


def _flops_per_token(config: RunConfig) -> float:
    return training_flops_per_token(config.model, config.train.sequence_length)


def _with_steps(config: RunConfig, steps: int) -> RunConfig:
    """The config with so many steps; warm-up, decay and phases keep their shares of them."""
    scale = functools.partial(_scaled, steps / config.train.steps)
    optimizer = dataclasses.replace(
        config.optimizer, warmup_steps=scale(config.optimizer.warmup_steps),
        decay_steps=scale(config.optimizer.decay_steps),
    )  # fmt: skip
    phases = tuple(dataclasses.replace(phase, after=scale(phase.after)) for phase in config.train.phases)
    train = dataclasses.replace(config.train, steps=steps, phases=phases)
    return dataclasses.replace(config, train=train, optimizer=optimizer).check()


def _scaled(share: float, steps: int) -> int:
    return max(1, int(steps * share)) if steps else 0  # rounded down, so that the parts still fit into the whole


def _with_seed(config: RunConfig, seed: int) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))


def _with_rate(config: RunConfig, rate: float) -> RunConfig:
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=rate))
