"""How long an operation takes on a kind of hardware: its products or its bytes, whichever takes longer."""

import math
from collections.abc import Sequence

from orogen.config.plan import PlanConfig
from orogen.cost.operation import Operation
from orogen.simulate.hardware import Hardware, Software
from orogen.simulate.prediction import Roofline


class Clock:
    """Times operations on a kind of hardware under a plan. dtype: of most products."""

    def __init__(self, hardware: Hardware, software: Software, plan: PlanConfig, dtype: str):
        self.hardware, self.shares = hardware, hardware.shares
        eight = plan.linear == "fp8" and "fp8" in hardware.peak_flops
        self.dense = "fp8" if eight else dtype
        self.grouped = "fp8" if eight and software.grouped_fp8 else dtype
        self.dtype = dtype
        self.slower = {"forward": software.ssd_forward_time, "backward": software.ssd_backward_time}
        # Kinds of products whose operands are cast to 8 bits.
        self.eight = {kind for kind, format_ in (("matmul", self.dense), ("grouped", self.grouped)) if format_ == "fp8"}

    def forward(self, unit: str, operation: Operation, phase: str = "forward") -> Roofline:
        """The forward pass of an operation."""
        compute = self._compute(operation, [operation.shape], operation.flops, backward=False)
        return self._roofline(unit, operation, phase, (operation.flops, operation.bytes), compute)

    def backward(self, unit: str, operation: Operation) -> Roofline:
        """Its backward pass."""
        m, k, n = operation.shape
        compute = self._compute(operation, [(m, n, k), (k, m, n)], operation.back[0], backward=True)
        return self._roofline(unit, operation, "backward", operation.back, compute)

    def _compute(self, operation: Operation, shapes: Sequence, flops: float, *, backward: bool) -> float:
        """Seconds of its products alone."""
        shares, peaks = self.shares, self.hardware.peak_flops
        if operation.kind == "matmul":
            format_ = self.dense if operation.name not in ("head", "router") else self.dtype
            share = shares.matmul_fp8 if format_ == "fp8" else shares.matmul
            each = flops / len(shapes) / (peaks[format_] * share)
            return sum(each / self._shape_share(*shape) for shape in shapes)
        if operation.kind == "grouped":
            share = shares.grouped * (shares.matmul_fp8 / shares.matmul if self.grouped == "fp8" else 1)
            rows = operation.shape[0] / operation.groups
            padded = rows + shares.padding
            depth = operation.shape[1] / (operation.shape[1] + shares.depth)
            return flops / (peaks[self.grouped] * share * depth) * padded / max(rows, 1e-9)
        share = shares.scores
        if operation.kind == "attention":
            share = shares.attention_backward if backward else shares.attention_forward
            share *= operation.length / (operation.length + shares.attention_length)
        return flops / (peaks[self.dtype] * share)

    def _shape_share(self, m: float, k: float, n: float) -> float:
        """What is left of a product's share at its size: whole tiles on whole waves of cores, and a finite depth."""
        rows, columns = self.hardware.tile
        tiles = math.ceil(m / rows) * math.ceil(n / columns)
        filled = m * n / (tiles * rows * columns)
        waves = tiles / self.hardware.cores
        return filled * waves / math.ceil(waves) * k / (k + self.shares.depth)

    def _roofline(
        self, unit: str, operation: Operation, phase: str, work: tuple[float, float], compute: float
    ) -> Roofline:
        flops, moved = work
        shares = self.shares
        share = shares.memory
        if operation.kind == "ssd":
            share = shares.ssd_backward if phase == "backward" else shares.ssd_forward
        memory = moved / (self.hardware.bandwidth * share)
        # Attention that writes its scores alternates between products and passes over them.
        longer = compute + memory if operation.kind == "scores" else max(compute, memory)
        if operation.name == "ssd":
            longer *= self.slower["backward" if phase == "backward" else "forward"]
        kernels = operation.kernels * (2 if phase == "backward" else 1) if flops or moved else 0
        seconds = longer + kernels * shares.launch
        return Roofline(unit, operation.name, phase, flops, moved, compute, memory, seconds, 1)
