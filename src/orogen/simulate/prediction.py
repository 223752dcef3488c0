"""What the simulator predicts of a training step."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from orogen.simulate.timeline import Work

# Parts of a device's memory, in the order in which pictures stack them.
MEMORY_PARTS = ("parameters", "working", "gradients", "optimizer", "activations", "temporary", "workspace")
# Those of them that passes hold and steps do not.
PASSING = MEMORY_PARTS[4:]
# Parts of a step's time on the stage that is busy longest; they add up to `step_seconds`.
TIME_PARTS = ("compute", "tensor", "context", "expert", "data", "stage", "bubble", "optimizer", "straggler", "host")


class StageMemory(NamedTuple):
    """Bytes on one device of a stage, by MEMORY_PARTS; host: bytes offloaded to the host by that device.

    temporary: arrays that live within the backward pass of a layer or within the loss. workspace: what the most that
    cuDNN works in adds to that.
    """

    stage: int
    parts: Mapping[str, float]
    host: float

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return sum(self.parts.values())


class Roofline(NamedTuple):
    """One kind of operation of one layer, one microbatch on one device.

    unit: a letter of the pattern, `mtp`, or `ends` (embedding, head and loss). phase: forward, recompute or backward.
    bytes: read and written in device memory. seconds: the longer of `compute_seconds` and `memory_seconds`, and the
    overhead of its kernels. count: how often the whole model has it.
    """

    unit: str
    operation: str
    phase: str
    flops: float
    bytes: float
    compute_seconds: float
    memory_seconds: float
    seconds: float
    count: float

    @property
    def bound(self) -> str:
        """`compute` or `memory`, whichever takes longer."""
        return "compute" if self.compute_seconds >= self.memory_seconds else "memory"


class PredictedShape(NamedTuple):
    """Batches of one sequence length in a run: the largest of them, the tokens in all, and what a step takes."""

    sequence_length: int
    batch_size: int
    tokens: int
    step_seconds: float
    device_memory_bytes: float


class Traffic(NamedTuple):
    """What one device sends in a step over some axes by one operation, and how long that takes.

    axes: logical axes (parallel/fold.py). link: `node` (NVLink, or a TPU's links) or `network` (between nodes).
    exposed_seconds: the part of `seconds` beside which nothing is computed.
    """

    axes: tuple[str, ...]
    operation: str
    link: str
    bytes: float
    seconds: float
    exposed_seconds: float

    @property
    def overlapped_seconds(self) -> float:
        """The part of `seconds` that is hidden behind compute."""
        return self.seconds - self.exposed_seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """A step of a plan on a cluster.

    flops: by convention (cost.conventions), the model's FLOPs of one step, all devices together, without recomputation;
    mfu: that of the convention `orogen` over the bfloat16 peak. tflops_per_device: the same in TFLOP/s.
    routing: how tokens were assumed to choose experts, and `imbalance`, the busiest expert rank's share of the rows
    over an even one. device_memory_bytes: the fullest stage's; memory_limit_bytes: what a device has.
    bubble: idle share of the pipeline's time. timeline: each stage's passes, seconds from the start of the step; of a
    long schedule those of the microbatches that were played (simulate/pipeline.py).
    seconds: step_seconds by TIME_PARTS. limit: what limits the plan, in words.
    goodput: share of the time that makes progress, with the failures of the cluster; 1 without.
    shapes: of the run's batches, by sequence length; memory is that of the shape that needs most, budget of them all.
    overlapping: microbatches whose activations are held at once; that they hide each other's exchanges is not counted.
    """

    step_seconds: float
    tokens_per_second: float
    tokens_per_second_per_device: float
    mfu: float
    tflops_per_device: float
    flops: Mapping[str, float]
    hardware: str
    devices: int
    routing: str
    imbalance: float
    device_memory_bytes: float
    memory_limit_bytes: float
    memory: tuple[StageMemory, ...]
    rooflines: tuple[Roofline, ...]
    communication: tuple[Traffic, ...]
    timeline: tuple[Work, ...]
    bubble: float
    seconds: Mapping[str, float]
    limit: str
    goodput: float = 1.0
    budget: Mapping[str, float] = dataclasses.field(default_factory=dict)
    shapes: tuple[PredictedShape, ...] = ()
    overlapping: int = 1

    @property
    def fits(self) -> bool:
        """Whether the fullest stage fits into a device's memory."""
        return self.device_memory_bytes <= self.memory_limit_bytes

    @property
    def left_out(self) -> str:
        """A sentence on what of the plan is not counted; empty if all is."""
        if self.overlapping == 1:
            return ""
        return f"The activations of {self.overlapping} overlapping microbatches are counted, not what they hide."

    def facts(self) -> dict[str, Any]:
        """The prediction as JSON can hold it; properties are among the keys."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("memory", "rooflines", "communication", "timeline", "shapes"):
            found[name] = [entry._asdict() for entry in found[name]]
        return {
            **found,
            "flops": dict(self.flops),
            "seconds": dict(self.seconds),
            "budget": dict(self.budget),
            "fits": self.fits,
        }
