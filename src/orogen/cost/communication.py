"""Analytic costs of a plan's collectives: for each layer, the operations over each axis and the bytes that they send;
`ledger` has the conventions."""

import math
from typing import Any

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.cost.collectives import embedded, load, outer
from orogen.cost.kind import costs_of
from orogen.cost.ledger import (
    COUNTING,
    FLOAT32,
    LOAD,
    MTP,
    OUTER,
    PIPELINE,
    Collective,
    Ledger,
    Workload,
)
from orogen.cost.weights import weights
from orogen.parallel.schedule import plan_schedule


def unit_collectives(unit: str, model: ModelConfig, plan: PlanConfig, work: Workload) -> list[Collective]:
    """The collectives of one layer of a letter, or of the model's OUTER, MTP or LOAD."""
    ledger, own = Ledger(unit, plan, model, work), ()
    if unit == LOAD:
        load(ledger)
    elif unit == PIPELINE:
        turns = 2 * plan_schedule(plan, model).ticks
        ledger.add("stream", "forward", "collective-permute", ("stage",), ledger.own_stream, count=turns)
    elif unit == MTP:
        own = weights(model).mtp
    elif unit == OUTER:
        return _outer(ledger)
    else:
        costs_of(unit).collectives(ledger)
        own = weights(model).layers[unit]
    for weight in own:
        ledger.gathered(weight)
    ledger.summed(own)
    return ledger.records


def _outer(ledger: Ledger) -> list[Collective]:
    """The collectives of embedding, final norm, head and loss, at every depth of prediction."""
    outer(ledger)
    parts = weights(ledger.model, ledger.plan.vocab_rows(ledger.model.vocab_size)).parts
    each = [weight for name, part in parts.items() if name != "resampler" for weight in part]
    if ledger.model.tie_word_embeddings:  # the matrix is embedding and head
        each += [weight for weight in parts["embedding"] if "vocab" in weight.axes]
    for weight in (*each * (1 + ledger.model.mtp_depths), *parts.get("resampler", ())):
        ledger.gathered(weight)
    # If embedding and head are paired, a stage holds the one or the other.
    ledger.summed([w for name, part in parts.items() if not (name == "head" and ledger.paired) for w in part])
    return ledger.records


def step_collectives(model: ModelConfig, plan: PlanConfig, work: Workload) -> dict[str, list[Collective]]:
    """{unit: the collectives of all its applications in one step}, where `work` is one of the plan's microbatches.

    For a pipeline these are those of the average stage, so counts may be fractions. The multi-token-prediction block is
    applied once per depth, and sums its gradients once. Layers that the model's stack repeats in a loop share one
    collective for their counts: the program then has fewer collectives than this table, with the same bytes.
    """
    pattern, depths = model.layers, model.mtp_depths
    units = [*dict.fromkeys(pattern.main + pattern.mtp), *([MTP] if depths else []), OUTER, LOAD]
    found = {}
    for unit in units:
        main, deeper = pattern.main.count(unit), pattern.mtp.count(unit)
        if unit in (OUTER, MTP, LOAD):
            main, deeper = int(unit != MTP), int(unit == MTP)
        turns = (main + depths * deeper) * plan.microbatches / plan.stage
        records = unit_collectives(unit, model, plan, work)
        # Units other than layers are on every stage.
        updates = (main + deeper) / (1 if unit in (OUTER, MTP) else plan.stage)
        found[unit] = [_times(r, updates if r.phase == "update" else turns) for r in records]
    if plan.stage > 1:
        found[PIPELINE] = unit_collectives(PIPELINE, model, plan, work)
    if model.router_balance == "global" and model.router_aux_loss_coef > 0 and plan.microbatches > 1 and "E" in units:
        found[COUNTING] = _counting(model, plan, work, found)
    return found


def _counting(
    model: ModelConfig, plan: PlanConfig, work: Workload, step: dict[str, list[Collective]]
) -> list[Collective]:
    """The collectives of the pass over all microbatches that counts assignments if routers are balanced over the global
    batch: the forward collectives of `step`, without those that only losses need. A pipeline's pass has these too."""
    ledger = Ledger(COUNTING, plan, model, work)
    uses = model.layers.main.count("E") + model.mtp_depths * model.layers.mtp.count("E")
    everywhere = ("data", "context", "tensor")
    ledger.add("assignments", "forward", "all-reduce", everywhere, model.n_routed_experts * FLOAT32)
    turns = plan.microbatches / plan.stage
    records = [_times(r, uses * turns) for r in ledger.records]
    forward = [(unit, r) for unit, found in step.items() for r in found if r.phase == "forward" and unit != LOAD]
    if plan.stage > 1:
        ticks = plan_schedule(plan, model)
        share = ticks.forward_only().ticks / ticks.ticks
        return records + [_times(r, share if unit == PIPELINE else 1) for unit, r in forward]
    records += [r for unit, r in forward if unit != OUTER and r.part != "router statistics"]
    outer = Ledger(OUTER, plan, model, work)
    for depth in range(1 + model.mtp_depths):
        embedded(outer, depth)
        for weight in weights(model, plan.vocab_rows(model.vocab_size)).parts["embedding"]:
            outer.gathered(weight)
    return records + [_times(r, turns) for r in outer.records if r.phase == "forward"]


def describe_collectives(model: ModelConfig, plan: PlanConfig, work: Workload) -> dict[str, Any]:
    """The records of one application of each unit, and the bytes that a step sends in all, by axes."""
    step: dict[str, float] = {}
    found = step_collectives(model, plan, work)
    for record in (record for records in found.values() for record in records):
        axes = " x ".join(record.axes)
        step[axes] = step.get(axes, 0) + record.bytes
    units = {u: [r._asdict() for r in unit_collectives(u, model, plan, work)] for u in found if u != COUNTING}
    return {**work._asdict(), "units": units, "step_bytes": step}


def collective_lines(facts: dict[str, Any]) -> list[str]:
    """The facts of `describe_collectives` for a person: one line per unit, part, operation and axes."""
    table: dict[tuple[str, ...], dict[str, float]] = {}
    for unit, records in facts["units"].items():
        for r in records:
            key = unit, r["part"], r["operation"], " x ".join(r["axes"])
            sent = table.setdefault(key, dict.fromkeys(("forward", "recompute", "backward", "update"), 0))
            sent[r["phase"]] += r["bytes"]
    lines = [
        f"bytes sent by one device per microbatch ({facts['rows']} sequences of {facts['tokens']} tokens) and layer:",
        f"{'':5} {'':18} {'':18} {'':28} {'forward':>9} {'recompute':>9} {'backward':>9} {'update':>9}",
    ]
    for (unit, part, operation, axes), sent in table.items():
        numbers = " ".join(f"{_short(n):>9}" for n in sent.values())
        lines.append(f"{unit:5} {part:18} {operation:18} {axes:28} {numbers}")
    total = ", ".join(f"{axes} {_short(size)}" for axes, size in facts["step_bytes"].items())
    return [*lines, f"per step, over {total}" if total else "nothing is sent: one device"]


def _short(size: float) -> str:
    """Bytes to three digits, `-` for none."""
    if not size:
        return "-"
    power = min(max(int(math.log(size, 1000)), 0), 4)
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _times(record: Collective, turns: float) -> Collective:
    return record._replace(count=record.count * turns, bytes=record.bytes * turns)
