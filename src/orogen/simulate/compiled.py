"""The real step of a config, compiled for devices that need not exist, beside what the simulator predicts of it.

Nothing is allocated. For a GPU it is the step that the GPU would run, kernels included. For CPUs both sides are of
another step, since XLA:CPU multiplies and sends bfloat16 as float32: in float32, with implementations that run on a CPU
in place of GPU kernels, and with padded exchanges with experts in place of the ragged all-to-all, for which XLA:CPU
gathers everything.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from orogen.config.cluster import ClusterConfig
from orogen.config.dtype import BYTES
from orogen.config.plan import FOR_GPU, PlanConfig
from orogen.config.run import RunConfig
from orogen.cost.communication import step_collectives
from orogen.cost.ledger import Workload
from orogen.simulate.hardware import Hardware
from orogen.simulate.predict import fullest, predict
from orogen.simulate.prediction import StageMemory
from orogen.simulate.shapes import without_blend

GIB = 2**30
# Of padded exchanges, if a ragged dispatch has no bound.
CAPACITY = 1.25
# What stands in for kernels that only a GPU has.
ON_CPU = {**{name: getattr(PlanConfig(), name) for name in FOR_GPU}, "attention": "blocked"}


def on_cpu(config: RunConfig) -> RunConfig:
    """The run in float32, with implementations that a CPU has, and nothing offloaded."""
    changed: dict[str, Any] = {
        name: ON_CPU[name] for name, kernel in FOR_GPU.items() if getattr(config.plan, name) == kernel
    }
    if config.plan.dispatch == "ragged":
        factor = config.plan.buffer_factor or CAPACITY
        changed |= {"dispatch": "alltoall", "capacity_factor": factor, "buffer_factor": None}
    plan = dataclasses.replace(config.plan, **changed, linear="plain", offload=(), offload_optimizer=False)
    train = dataclasses.replace(config.train, compute_dtype="float32")
    return without_blend(dataclasses.replace(config, plan=plan, train=train))


def compare(config: RunConfig, gpu: Hardware | None = None) -> dict[str, Any]:
    """{memory: analytic and compiled bytes by part; traffic: analytic and compiled bytes by operation and mesh axes;
    target: what was compiled for; dtype; seconds: of tracing and compiling; peak_bytes: of this process's memory}.

    gpu: compile for this card, which need not exist; None: for CPU devices, as many as the plan has. Raises ConfigError
    if the card cannot be compiled for here, or lacks a kernel of the plan. Without a GPU, XLA knows no workspaces of
    cuDNN, so neither side has them; workspace: what they add by formula.
    """
    config = on_cpu(config) if gpu is None else without_blend(config)
    largest = fullest(config)
    from orogen.simulate.memory import compiled_bytes, state_bytes

    start = time.monotonic()
    laid, program = _compiled(config, largest, gpu)
    seconds = time.monotonic() - start
    found, train = predict(config, ClusterConfig()), largest.train
    work = Workload(
        train.batch_size // (config.plan.data * config.plan.microbatches),
        train.sequence_length // config.plan.context,
        BYTES[train.compute_dtype],
        train.carry_states,
    )
    parts, workspace = apart(found.memory)
    return {
        "memory": {
            "analytic": parts,
            "state": state_bytes(config, laid),
            "compiled": compiled_bytes(program),
        },
        "traffic": _traffic(config, work, laid.plan, program, unbounded=None if gpu is None else 0),
        "sequence_length": train.sequence_length,
        "stages": config.plan.stage,
        "target": "simulated devices" if gpu is None else gpu.title,
        "dtype": train.compute_dtype,
        "workspace": workspace,
        "seconds": seconds,
        "peak_bytes": _peak(),
    }


def apart(memory: Sequence[StageMemory]) -> tuple[dict[str, float], float]:
    """The parts of the stage that holds most without cuDNN's workspaces, and these."""
    parts = dict(max(memory, key=lambda stage: stage.total - stage.parts["workspace"]).parts)
    workspace = parts.pop("workspace")
    return parts, workspace


def _compiled(config: RunConfig, largest: RunConfig, gpu: Hardware | None) -> tuple[Any, Any]:
    """What the run trains as it lies on the devices, and the program of its step with the largest batches."""
    from orogen.simulate.memory import compiled_step, placed_state
    from orogen.simulate.target import OPTIONS, devices, traced_for

    if gpu is None:
        laid = placed_state(config)
        return laid, compiled_step(largest, laid)
    found = devices(gpu, config.plan.devices)
    with traced_for(found[0]):
        laid = placed_state(config, found)
        return laid, compiled_step(largest, laid, OPTIONS)


def _traffic(
    config: RunConfig, work: Workload, plan: Any, program: Any, *, unbounded: int | None
) -> list[dict[str, Any]]:
    """Analytic and compiled bytes by operation and mesh axes. unbounded: a ragged exchange has as many further rounds
    as uneven routing makes: none, as in the analytic numbers."""
    from orogen.simulate.aot import table_of
    from orogen.simulate.hlo import Traffic, hlo_collectives

    records = [r for each in step_collectives(config.model, config.plan, work).values() for r in each]
    analytic = table_of(records, config.plan, config.model)
    sent = hlo_collectives(program.as_text() or "", dict(plan.mesh.shape), unbounded=unbounded)
    nothing = Traffic(0, 0)
    return [
        {
            "operation": operation,
            "mesh_axes": list(axes),
            "analytic": analytic.get((operation, axes), nothing).bytes,
            "compiled": sent.get((operation, axes), nothing).bytes,
        }
        for operation, axes in sorted(analytic.keys() | sent.keys())
    ]


def whole(memory: Mapping[str, Mapping[str, float]]) -> tuple[float, float]:
    """Analytic and compiled bytes of all that one device holds during the step."""
    compiled = memory["compiled"]
    return sum(memory["analytic"].values()), compiled["arguments"] + compiled["temporary"] + compiled["outputs"] - (
        compiled["aliased"]
    )


def compared_lines(facts: Mapping[str, Any]) -> list[str]:
    """The facts of `compare` as lines of text."""
    memory = facts["memory"]
    analytic, compiled = whole(memory)
    state = memory["state"]
    lines = [
        f"compiled in {facts['dtype']} for {facts['target']} in {facts['seconds']:.0f} s, "
        f"{facts['peak_bytes'] / GIB:.1f} GiB; sequences of {facts['sequence_length']:,} tokens",
        f"{'GiB on one device':20} {'analytic':>10} {'compiled':>10}",
        *(f"{part:20} {memory['analytic'][part] / GIB:>10.4f} {state[part] / GIB:>10.4f}" for part in state),
        f"{'all':20} {analytic / GIB:>10.4f} {compiled / GIB:>10.4f}  {100 * (analytic / compiled - 1):+.1f} %",
        *([f"{'cuDNN beside it':20} {facts['workspace'] / GIB:>10.4f}"] if facts["workspace"] else []),
        f"{'bytes sent':49} {'analytic':>16} {'compiled':>16}"
        + ("  (of a pipeline: as if each of its conditionals took every branch)" if facts["stages"] > 1 else ""),
    ]
    for entry in facts["traffic"]:
        axes = " x ".join(entry["mesh_axes"])
        lines.append(f"{entry['operation']:20} {axes:28} {entry['analytic']:>16,.0f} {entry['compiled']:>16,.0f}")
    return lines


def _peak() -> int:
    """The most memory that this process has held, bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
