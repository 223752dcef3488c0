"""A plan over devices, and a model laid out for it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.cost.split import TYPICAL_LENGTH, stage_patterns
from orogen.model.layout import Layout, Whole
from orogen.model.lm import Built, build
from orogen.model.stages import Stages
from orogen.parallel.plan import Plan, make_plan


class Assembled(NamedTuple):
    """A plan, and the model laid out for it."""

    plan: Plan
    built: Built


def assemble(
    model: ModelConfig, config: PlanConfig, *, length: int = TYPICAL_LENGTH, abstract: bool = False,
    devices: Sequence[Any] | None = None,
) -> Assembled:  # fmt: skip
    """The plan of `config`, and the model laid out for it, for sequences of `length` tokens. Nothing is allocated.

    abstract: a plan over no devices. devices: None: this process group's. Raises ConfigError as `make_plan` does.
    """
    plan = make_plan(config, model, abstract=abstract, devices=devices)
    return Assembled(plan, build(model, layout(model, plan, length), config.vocab_rows(model.vocab_size)))


def layout(model: ModelConfig, plan: Plan, length: int = TYPICAL_LENGTH) -> Layout:
    """The layout of the layers on the plan's devices. If the plan has stages and the pattern has no |, segments take
    about equally many FLOPs for sequences of `length` tokens."""
    if plan.schedule is None:
        return Whole(model.layers.main, model.layers.mtp)
    return Stages(stage_patterns(model, plan.config, length), model.layers.mtp, plan.schedule.stages)
