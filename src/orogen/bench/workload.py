"""What `orogen bench train` times: a model, a batch and a plan, and the gin bindings that they are read from."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from orogen.bench.cpu_train import CONFIGS
from orogen.config.checks import ConfigError
from orogen.config.load import load, parse
from orogen.config.plan import FOR_GPU, PlanConfig
from orogen.config.reads import unread
from orogen.config.run import RunConfig
from orogen.parallel.runtime import asks_for_same_bits

# Default bindings of the benchmark, which those of the command override.
PASS = {
    **{f"PlanConfig.{field}": repr(kernel) for field, kernel in FOR_GPU.items()},
    "PlanConfig.unroll": "3", "PlanConfig.logit_rows": "4096",
    "PlanConfig.remat": "'elementwise'", "TrainConfig.compute_dtype": "'bfloat16'",
}  # fmt: skip
# Fields that options set, so that bindings may not.
OPTIONS = {
    "TrainConfig.sequence_length": "--sequence_length", "TrainConfig.batch_size": "--rows, and PlanConfig.microbatches",
}  # fmt: skip
# Tokens per microbatch, unless the number of its sequences is given.
TOKENS = 16384
# In whole steps, and with more than LONG tokens per microbatch and device, memory is short: matrix products are kept
# and cheap intermediates are recomputed, by letter. R1 then keeps 12 GB instead of 21, beside a state of 26 GB and
# accumulated gradients; hybrid_1b at 65,536 tokens keeps 59 GB instead of 85, on a device that has 80
# (`cost/activations.py`).
LONG = 32768
CHEAP = {
    "M": "M:norm,conv,gated_norm", "-": "-:norm,activation", "E": "E:norm,rows,expert_activation,shared_activation",
}  # fmt: skip
STEP = {
    "PlanConfig.microbatches": "4", "OptimizerConfig.learning_rate": "1e-4", "OptimizerConfig.schedule": "'constant'",
    "OptimizerConfig.moment_dtype": "'bfloat16'",
}  # fmt: skip
# A batch that the ranks and microbatches of any usual plan divide: bindings are parsed before its size is known.
DIVISIBLE = 2**20 * 3**4 * 5**2 * 7**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What is timed.

    model: the stem of a file in gin_configs/models. rows: sequences per microbatch of the global batch, which the ranks
    of `data` share; None: as many as hold TOKENS, at least one. sequence_length: tokens per sequence. part:
    `forward_backward`, of one microbatch (of all, if the plan has stages) with parameters in the compute dtype, or
    `whole_step`. weak_scaling: `rows` or `length`, which is then multiplied by the plan's number of devices, so that
    each device has as many tokens under every plan; None: neither. bindings: gin bindings that override the
    benchmark's. If XLA is asked for the same bits in every run, attention is `blocked`. routing: `real`, by the
    routers of the model with its random weights, or `balanced`: see `orogen.bench.balanced`.
    """

    model: str = "r1"
    rows: int | None = None
    sequence_length: int = 8192
    part: str = "forward_backward"
    weak_scaling: str | None = None
    bindings: tuple[str, ...] = ()
    routing: str = "real"

    def microbatches(self, plan: PlanConfig) -> int:
        """How many microbatches a run has."""
        return plan.microbatches if self.part == "whole_step" or plan.stage > 1 else 1

    def config(self) -> RunConfig:
        """The configuration of a run with this workload as its step. Raises ConfigError."""
        file = CONFIGS / f"{self.model}.gin"
        if not file.is_file():
            raise ConfigError(f"--model {self.model!r}; expected the name of a file in {CONFIGS}")
        fixed = {"TrainConfig.steps": 1000, "TrainConfig.seed": 0, "TrainConfig.sequence_length": self.sequence_length}
        defaults = {**PASS, **(STEP if self.part == "whole_step" else {}), **fixed}
        if asks_for_same_bits():
            defaults["PlanConfig.attention"] = "'blocked'"
        # The batch size depends on the plan, and recomputation on the pattern. The bindings may change both, so they
        # are parsed first, without those of the recipe, which could not number the tokens of so large a batch.
        bindings = [binding for binding in self.bindings if not binding.startswith("PrecisionConfig.")]
        first, _ = parse([file], [*_bindings(defaults, bindings), f"TrainConfig.batch_size={DIVISIBLE}"])
        plan, (rows, length) = first.plan, self._shape(first.plan)
        if rows % plan.data:
            raise ConfigError(f"--rows {rows}; expected a multiple of PlanConfig.data = {plan.data}")
        for setting in unread(first):  # kernels of layers that the model lacks
            defaults.pop(setting.name, None)
        entries = tuple(entry for letter, entry in CHEAP.items() if letter in first.model.layers.main)
        if entries and (self.part == "whole_step" or rows * length // (plan.data * plan.context) > LONG):
            defaults["PlanConfig.remat"] = repr(entries)
        defaults["TrainConfig.sequence_length"] = length
        defaults["TrainConfig.batch_size"] = rows * self.microbatches(plan)
        return load([file], _bindings(defaults, self.bindings))[0]

    def _shape(self, plan: PlanConfig) -> tuple[int, int]:
        """Sequences per microbatch, and tokens per sequence."""
        rows, length = self.rows or max(1, TOKENS // self.sequence_length), self.sequence_length
        return (
            rows * (plan.devices if self.weak_scaling == "rows" else 1),
            length * (plan.devices if self.weak_scaling == "length" else 1),
        )


def _bindings(defaults: dict[str, Any], asked: Sequence[str]) -> list[str]:
    """`asked`, and before it the defaults that it does not override. Raises ConfigError if it binds a field that an
    option sets."""
    taken = {binding.partition("=")[0].strip() for binding in asked}
    for name, option in OPTIONS.items():
        if name in taken:
            raise ConfigError(f"--gin_bindings {name}; expected {option}")
    return [f"{name}={value}" for name, value in defaults.items() if name not in taken] + list(asked)
