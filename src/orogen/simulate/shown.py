"""Predictions as lines of text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orogen.simulate.decode import Inference
from orogen.simulate.hardware import KINDS, PROGRAMS, Shares
from orogen.simulate.prediction import Prediction

GIB = 2**30


def prediction_lines(found: Prediction) -> list[str]:
    """A step, its time by part, its memory by stage, its slowest operations and its traffic."""
    devices, seconds = f"{found.devices} x {found.hardware}", found.step_seconds
    lines = [
        f"{devices}, routing {found.routing} (busiest expert rank {found.imbalance:.2f} of an even share)",
        f"step {_time(seconds)}, {found.tokens_per_second:,.0f} tokens/s, "
        f"{found.tokens_per_second_per_device:,.0f} per device, {100 * found.mfu:.1f} % MFU, "
        f"{found.tflops_per_device:,.4g} TFLOP/s per device",
        "FLOPs per step: " + ", ".join(f"{name} {flops:.4g}" for name, flops in found.flops.items()),
        f"limited by {found.limit}",
        *([found.left_out] if found.left_out else []),
        "",
        "seconds of a step, on the stage that is busy longest",
        *(f"  {part:12} {n:>12.4g}  {100 * n / seconds:>5.1f} %" for part, n in found.seconds.items() if n),
        f"  bubble of all stages {100 * found.bubble:.1f} %",
        "",
        f"GiB on one device of each stage, of {found.memory_limit_bytes / GIB:.1f}{_fullest(found)}",
        *_memory(found),
        "",
        "operations, by time of one microbatch in all layers",
        *_rooflines(found),
    ]
    if found.communication:
        lines += ["", "traffic of one device per step", *_traffic(found)]
    if found.goodput < 1:
        lines += ["", f"goodput {100 * found.goodput:.1f} % with failures and checkpoints"]
    return [*lines, "", *_shapes(found), budget_line(found.budget)]


def budget_line(budget: Mapping[str, float]) -> str:
    """What the whole run takes."""
    dollars = f", {budget['dollars']:,.0f} dollars" if "dollars" in budget else ""
    return (
        f"all steps: {budget['hours']:,.1f} hours, {budget['device_hours']:,.0f} device hours, "
        f"{budget['kwh']:,.0f} kWh{dollars}"
    )


def inference_lines(found: Inference) -> list[str]:
    """An engine's memory and speed."""
    parts = [f"  {name:12} {size / GIB:>9.3f}" for name, size in found.memory.items()]
    return [
        f"{found.slots} requests of {found.prompt_tokens} + {found.new_tokens} tokens",
        f"first token after {_time(found.first_token_seconds)}, then {found.tokens_per_second:,.0f} tokens/s in all, "
        f"{_time(found.step_seconds)} per step; limited by {found.limit}",
        f"GiB on one device: {found.device_memory_bytes / GIB:.2f} of {found.memory_limit_bytes / GIB:.1f}",
        *parts,
        f"longest context with {found.slots} requests: {found.longest_context:,} tokens",
    ]


def hardware_facts() -> dict[str, Any]:
    """All hardware and programs, their constants and what the constants mean."""
    kinds = {name: {**vars(kind), "shares": vars(kind.shares)} for name, kind in KINDS.items()}
    meanings = {}
    for known in (Shares, type(next(iter(PROGRAMS.values())))):
        meanings |= {name: hint.__metadata__[0] for name, hint in known.__annotations__.items()}
    return {"hardware": kinds, "software": {name: vars(p) for name, p in PROGRAMS.items()}, "constants": meanings}


def hardware_lines(facts: Mapping[str, Any]) -> list[str]:
    """The same for a person."""
    lines = []
    for name, kind in facts["hardware"].items():
        peak = ", ".join(f"{dtype} {flops / 1e12:,.4g}" for dtype, flops in kind["peak_flops"].items())
        lines += [
            f"{name}: {kind['title']}; TFLOP/s {peak}; {kind['memory_bytes'] / GIB:.0f} GiB at "
            f"{kind['bandwidth'] / 1e9:,.0f} GB/s; {kind['node_size']} per node at {kind['node_bandwidth'] / 1e9:,.0f} "
            f"GB/s, {kind['network_bandwidth'] / 1e9:,.4g} GB/s between nodes; {kind['watts']:,.0f} W",
            f"  source: {kind['source']}",
            f"  constants fitted on: {kind['fitted']}",
        ]
    lines += ["", f"{'constant':18} {'a100':>9} {'h100':>9} {'gb200':>9}"]
    programs = facts["software"]
    for name, meaning in facts["constants"].items():
        owners = [facts["hardware"][k]["shares"] for k in ("a100", "h100", "gb200")]
        if name in owners[0]:
            lines.append(f"{name:18} " + " ".join(f"{owner[name]:>9.4g}" for owner in owners) + f"  {meaning}")
    lines += ["", f"{'constant':18} " + " ".join(f"{name:>12}" for name in programs)]
    for name, meaning in facts["constants"].items():
        if all(name in program for program in programs.values()):
            values = " ".join(f"{program[name]:>12.4g}" for program in programs.values())
            lines.append(f"{name:18} {values}  {meaning}")
    return lines


def _fullest(found: Prediction) -> str:
    """The length of the sequences that need most memory, if the run has several lengths."""
    most = max(found.shapes, key=lambda shape: shape.device_memory_bytes, default=None)
    return f"; sequences of {most.sequence_length:,} tokens" if most and len(found.shapes) > 1 else ""


def _shapes(found: Prediction) -> Iterable[str]:
    for shape in found.shapes if len(found.shapes) > 1 else ():
        yield (
            f"{shape.batch_size:,} x {shape.sequence_length:,} tokens: {_time(shape.step_seconds)} per step, "
            f"{shape.device_memory_bytes / GIB:.1f} GiB, {shape.tokens:.4g} tokens"
        )


def _memory(found: Prediction) -> Iterable[str]:
    names = list(found.memory[0].parts)
    yield f"  {'stage':>5} {'all':>8} " + " ".join(f"{name:>11}" for name in names) + f" {'host':>8}"
    stages = found.memory
    alike = len({tuple(stage.parts.values()) for stage in stages}) == 1 and len(stages) > 1
    for stage in stages[:1] if alike else stages:
        cells = " ".join(f"{stage.parts[name] / GIB:>11.3f}" for name in names)
        label = "each" if alike else str(stage.stage)
        yield f"  {label:>5} {stage.total / GIB:>8.2f} {cells} {stage.host / GIB:>8.2f}"


def _rooflines(found: Prediction) -> list[str]:
    table: dict[tuple[str, str], list[float]] = {}
    bounds: dict[tuple[str, str], str] = {}
    for line in found.rooflines:
        key = line.unit, line.operation
        values = table.setdefault(key, [0.0, 0.0, 0.0])
        for index, value in enumerate((line.seconds, line.flops, line.bytes)):
            values[index] += value * line.count
        bounds[key] = line.bound
    whole = sum(values[0] for values in table.values())
    ranked: Sequence = sorted(table.items(), key=lambda item: -item[1][0])[:12]
    return [
        f"  {unit:10} {name:18} {_time(seconds):>10}  {100 * seconds / whole:>5.1f} %  "
        f"{flops / seconds / 1e12:>8,.3g} TFLOP/s  {moved / seconds / 1e9:>8,.4g} GB/s  {bounds[unit, name]}"
        for (unit, name), (seconds, flops, moved) in ranked
    ]


def _traffic(found: Prediction) -> list[str]:
    return [
        f"  {' x '.join(t.axes):24} {t.operation:18} {t.link:8} {t.bytes / 1e9:>10.4g} GB {_time(t.seconds):>10}, "
        f"of which {_time(t.exposed_seconds)} exposed"
        for t in sorted(found.communication, key=lambda t: -t.seconds)
        if t.seconds > 0
    ]


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
