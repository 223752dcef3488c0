"""What one device holds during a training step: state, from the plan's shardings; activations by name, from traces of
the layers; and what XLA allocates for the compiled step."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.run import RunConfig
from orogen.cost.activations import WEIGHTS, bytes_by_name, kept_by_layer
from orogen.cost.assemble import assemble
from orogen.cost.ledger import Workload
from orogen.data.packing import NEXT, NEXT_WEIGHT, Batch
from orogen.model.layout import Layout
from orogen.model.lm import Built
from orogen.parallel.plan import Plan, make_plan
from orogen.precision.policy import working_copy
from orogen.train import carry
from orogen.train.formats import in_formats
from orogen.train.next_token import NEXT_TOKENS
from orogen.train.state import TrainState, abstract_state, state_shardings
from orogen.train.step import BATCH_AXES, make_step
from orogen.train.trained import narrow_frozen, optimizer_of, trained_mask

# Our names for the parts of a program's memory, and XLA's.
COMPILED = {
    "arguments": "argument_size_in_bytes",
    "outputs": "output_size_in_bytes",
    "aliased": "alias_size_in_bytes",
    "temporary": "temp_size_in_bytes",
    "program": "generated_code_size_in_bytes",
}


def describe_memory(config: RunConfig, work: Workload, *, largest: RunConfig | None = None) -> dict[str, Any]:
    """Bytes on one device. Nothing is allocated; compiling needs as many devices as the plan, which may be simulated.

    parameters: float32 masters as they are stored; working: the copies that the step computes with; gradients: float32
    sums, sharded like the masters unless they are scattered only at the end of the step (fsdp='optimizer'); optimizer:
    its state. activations: {letter: layers, bytes of one layer by name}, of one microbatch, with all its layers live at
    once. compiled: XLA's numbers for the whole step, which donates the state. largest: the run with the shape of the
    batches that are compiled, of which `work` is a microbatch; None: the config's.
    """
    config.need("model", "train", "optimizer")
    laid = placed_state(config)
    layers = activations(config.model, config.plan, work, dtype=config.train.compute_dtype, layout=laid.built.layout)
    held = {name: _held(getattr(laid.state, name)) for name in ("buffers", "carried")}
    return {
        "devices": config.plan.devices,
        "state": {
            **state_bytes(config, laid),
            "buffers": held["buffers"],
            **({"carried": held["carried"]} if config.train.carry_states else {}),
        },
        "activations": layers,
        "activation_bytes": sum(each["layers"] * sum(each["bytes"].values()) for each in layers.values()),
        "compiled": compiled_bytes(compiled_step(largest or config, laid)),
    }


class Placed(NamedTuple):
    """A plan, the model laid out for it, its optimizer, and the abstract state with its shardings."""

    plan: Plan
    built: Built
    optimizer: Any
    state: TrainState


def placed_state(config: RunConfig, devices: Sequence[Any] | None = None) -> Placed:
    """What a run trains, abstract, over `devices`; None: over this process's, as many as the plan has."""
    plan, wide = assemble(config.model, config.plan, length=config.train.sequence_length, devices=devices)
    built = narrow_frozen(wide, config)
    optimizer = optimizer_of(config, built)
    state = abstract_state(built, optimizer, carry.abstract(config.train, built))
    return Placed(plan, built, optimizer, jax.tree.map(_placed, state, state_shardings(state, plan)))


def state_bytes(config: RunConfig, laid: Placed) -> dict[str, int]:
    """Bytes of one device's parameters, working copies, gradients and optimizer state."""
    plan, built = laid.plan, laid.built
    summed, trained = laid.state.params, trained_mask(built, config.optimizer)
    if config.plan.fsdp == "optimizer":
        summed = _in_step(built, plan)
    if trained is not None:
        pairs = zip(jax.tree.leaves(summed), jax.tree.leaves(trained), strict=True)
        summed = [leaf for leaf, kept in pairs if kept]
    return {
        "parameters": _held(laid.state.params),
        "working": _working(built, plan, config.train.compute_dtype),
        "gradients": _held(summed),
        "optimizer": _held(laid.state.optimizer),
    }


def activations(
    model: ModelConfig, sizes: PlanConfig, work: Workload, *, dtype: str, layout: Layout
) -> dict[str, dict[str, Any]]:
    """{letter: the layers live at once, with those of the MTP block once per depth, and one layer's bytes by name}, of
    a microbatch; for a pipeline, of the fullest chunk, once per slot of the stash."""
    pattern, found = model.layers, {}
    plan, one_stage = (make_plan(c, model, abstract=True) for c in (sizes, dataclasses.replace(sizes, stage=1)))
    for letter in dict.fromkeys(pattern.main + pattern.mtp):
        found[letter] = bytes_by_name(kept_by_layer(letter, model, one_stage, work, dtype=dtype))
        found[letter].pop(WEIGHTS, None)
    chunks = [main + model.mtp_depths * mtp for main, mtp in layout.chunks]
    fullest = max(chunks, key=lambda chunk: sum(sum(found[letter].values()) for letter in chunk))
    slots = max(plan.schedule.stash_slots) if plan.schedule else 1
    return {letter: {"layers": slots * fullest.count(letter), "bytes": kept} for letter, kept in found.items()}


def _placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _held(tree: Any) -> int:
    """Bytes of one device's shards."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _working(built: Built, plan: Plan, dtype: str) -> int:
    """Bytes of one device's working copies; 0 where the step computes with the masters themselves."""
    if dtype == "float32":
        return 0
    cast = jax.eval_shape(lambda p: working_copy(p, dtype), _in_step(built, plan))
    pairs = zip(jax.tree.leaves(_in_step(built, plan)), jax.tree.leaves(cast), strict=True)
    return _held([_placed(copy, master.sharding) for master, copy in pairs if copy.dtype != master.dtype])


def _in_step(built: Built, plan: Plan) -> Any:
    """The float32 parameters, sharded as inside the step."""
    shardings = jax.tree.map(lambda spec: jax.sharding.NamedSharding(plan.mesh, spec), plan.specs(built.params))
    return jax.tree.map(_placed, built.params, shardings)


def compiled_step(config: RunConfig, laid: Placed, options: dict[str, str] | None = None) -> Any:
    """The whole step as XLA compiles it. options: XLA's, beside the plan's own."""
    plan = laid.plan
    shape, sharding = (config.train.batch_size, config.train.sequence_length), plan.sharding(*BATCH_AXES)
    integers: Any = jax.ShapeDtypeStruct(shape, "int32", sharding=sharding)
    weights: Any = jax.ShapeDtypeStruct(shape, "float32", sharding=sharding)
    plan = in_formats(plan, config.precision, config.model)
    step: Any = make_step(laid.built, NEXT_TOKENS, config, plan, laid.optimizer)
    extras = {NEXT: integers, NEXT_WEIGHT: weights} if config.train.carry_states else {}
    return step.lower(laid.state, Batch(integers, integers, integers, weights, extras)).compile(options)


def compiled_bytes(program: Any) -> dict[str, int]:
    """XLA's numbers for a compiled program, by the names of COMPILED."""
    analysis = program.memory_analysis()
    return {name: int(getattr(analysis, field)) for name, field in COMPILED.items()}


def memory_lines(facts: Mapping[str, Any]) -> list[str]:
    """The facts of `describe_memory` as lines of text."""
    state, compiled = facts["state"], facts["compiled"]
    of = f", with sequences of {facts['sequence_length']:,} tokens" if "sequence_length" in facts else ""
    lines = [f"bytes on each of {facts['devices']} devices{of}"]
    lines += [_row("state", name, size) for name, size in state.items()]
    for letter, each in facts["activations"].items():
        kept = each["bytes"].items() if each["layers"] else ()
        lines += [_row(f"{letter} x {each['layers']}", name, each["layers"] * n) for name, n in kept]
    lines.append(_row("layers", "all activations", facts["activation_bytes"]))
    return lines + [_row("step, compiled", name, size) for name, size in compiled.items()]


def _row(group: str, name: str, size: int) -> str:
    return f"  {group:<16} {name:<20} {size:>18,}  {size / 2**30:>10.3f} GiB"
