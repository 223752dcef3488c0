"""Costs of a plan's collectives: the analytic table equals what the traced step sends, and what XLA compiles.

A collective that the table lacks fails, and so does one that only the table has.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from tests.helpers import hybrid

from orogen.config.plan import PlanConfig
from orogen.config.run import TrainConfig
from orogen.cost.communication import collective_lines, describe_collectives, unit_collectives
from orogen.cost.communication import step_collectives as analytic
from orogen.cost.ledger import OUTER, PIPELINE, Collective, Workload, sent_bytes
from orogen.data.packing import NEXT, NEXT_WEIGHT, Batch
from orogen.model.lm import build
from orogen.parallel.plan import make_plan
from orogen.simulate.aot import compiled, step_collectives, table_of, traced
from orogen.simulate.hlo import Traffic
from orogen.simulate.jaxprs import jaxpr_collectives
from orogen.simulate.units import unit_of
from orogen.train import carry
from orogen.train.next_token import NEXT_TOKENS
from orogen.train.step import gradients

WORK = Workload(rows=2, tokens=20)
# Every letter; and layers with all options that add parameters or change communication.
EVERY = hybrid(
    pattern="ME*-mw+", mtp_depths=0, mamba_intermediate_size=40, time_step_rank=3, sliding_window=5, kv_lora_rank=16,
    q_lora_rank=24, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=6, rope_theta=1e4,
)  # fmt: skip
FULLER = hybrid(
    pattern="E-*Mm", mtp_depths=0, norm="layer", mlp_gated=True, mlp_bias=True, moe_shared_expert_gate=True,
    learned_positions=40, attention_bias="all", qk_norm=True, attention_sinks=True, router_bias=True,
    mamba_norm_groups=1, mamba_intermediate_size=40, time_step_rank=3, moe_latent_size=None,
)  # fmt: skip

PLANS = {
    "tensor": {"tensor": 2},
    "data-tensor": {"data": 2, "tensor": 2, "expert": 2, "fsdp": "optimizer"},
    "folded-alltoall": {"data": 2, "tensor": 2, "expert": 4, "dispatch": "alltoall"},
    "copies": {"data": 2, "tensor": 4, "expert": 2, "fsdp": "parameters", "cross_entropy": "full"},
    "zero-2": {"data": 4, "tensor": 2, "expert": 2, "fsdp": "gradients", "fsdp_size": 2},
    "zero-3-copies": {"data": 4, "tensor": 2, "expert": 2, "fsdp": "parameters", "fsdp_size": 2},
    "capacity": {"data": 4, "tensor": 2, "expert": 4, "dispatch": "alltoall", "capacity_factor": 1.5,
                 "fsdp": "parameters"},
    "shared": {"data": 2, "tensor": 4, "expert": 2, "expert_tensor": 2, "fsdp": "parameters"},
    "shared-alltoall": {"data": 4, "tensor": 2, "expert": 2, "expert_tensor": 2, "dispatch": "alltoall"},
    "state": {"context": 4, "tensor": 2},
    "three-ranks": {"context": 3, "tensor": 2, "expert": 2},
    "whole": {"data": 2, "tensor": 2, "expert": 4, "dispatch": "alltoall", "stream": "whole"},
}  # fmt: skip
# XLA:CPU merges equal exchanges of segments and targets, and those that remat repeats: the program may send less.
# SENT names the units of each plan that are compiled, not only traced: together all, and all of the first.
MERGED = {
    "ring": {"context": 4, "tensor": 2, "expert": 2, "remat": "full"},
    "ring-by-alltoall": {"context": 3, "tensor": 2, "shift": "alltoall"},
    "gathered-keys": {"context": 2, "tensor": 2, "data": 2, "context_attention": "allgather", "remat": "full"},
    "heads": {"context": 2, "tensor": 4, "context_attention": "alltoall", "context_ssm": "heads",
              "remat": "elementwise"},
}  # fmt: skip
SENT = {"ring": "*wMm+E", "ring-by-alltoall": "wM", "gathered-keys": "*+", "heads": "wMm"}
# The ragged exchange, which XLA:CPU lacks and replaces by all-gathers.
RAGGED = {
    "ragged": {"data": 4, "tensor": 2, "expert": 4, "dispatch": "ragged", "remat": "full"},
    "ragged-shared": {"data": 2, "context": 2, "tensor": 2, "expert": 2, "expert_tensor": 2, "dispatch": "ragged",
                      "buffer_factor": 0.4},
}  # fmt: skip


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, traffic in expected.items():
        assert found[key].count == traffic.count, key
        assert found[key].bytes == pytest.approx(traffic.bytes, rel=1e-12), key


def at_most(found, expected):
    """Only what is expected, and no more of it."""
    for key, traffic in found.items():
        assert key in expected, key
        assert traffic.count <= expected[key].count, key
        assert traffic.bytes <= expected[key].bytes * (1 + 1e-12), key


def inside(records: list[Collective]) -> list[Collective]:
    """The records that the step itself states; XLA's partitioner adds the gathers of ZeRO-1's masters."""
    return [record for record in records if record.part != "masters"]


# Compiling a unit takes longer than tracing it. Only these plans are compiled, which together have every axis, dispatch
# and way to shard: all units of the first, whose masters XLA's partitioner gathers, and some of each other, so that
# every unit is compiled under several plans.
COMPILED = {
    "data-tensor": ("M", "E", "*", "-", "m", "w", "+", OUTER), "copies": ("M", "E", "*", OUTER),
    "capacity": ("E", "-", "m"), "zero-2": ("*", "+", OUTER), "shared-alltoall": ("M", "E", "w"),
    "state": ("M", "m", "w", "+", OUTER),
}  # fmt: skip
CASES = [(name, EVERY) for name in PLANS] + [(name, FULLER) for name in ("data-tensor", "copies", "whole")]


def test_compiled_plans_have_every_axis_dispatch_and_way_to_shard():
    compared = [PlanConfig(**PLANS[name]) for name in COMPILED]
    for field in ("data", "context", "tensor", "expert", "expert_tensor"):
        assert any(getattr(plan, field) > 1 for plan in compared), field
    for field in ("dispatch", "fsdp", "cross_entropy"):
        assert {getattr(plan, field) for plan in compared} == {getattr(PlanConfig(**p), field) for p in PLANS.values()}
    assert any(plan.fsdp_size and plan.fsdp != "none" for plan in compared)
    assert any(plan.capacity_factor for plan in compared)
    for unit in (*EVERY.layers.main, OUTER):
        assert sum(unit in units for units in COMPILED.values()) >= 2, unit


def test_split_sequences_are_compiled_with_every_unit():
    """The first plan compiles every unit that context ranks change, and each of the others compiles some."""
    assert SENT.keys() == MERGED.keys() and all(SENT.values())
    assert set("".join(SENT.values())) == set("*wMm+E") == set(SENT[next(iter(MERGED))])


@pytest.mark.parametrize(("name", "model"), CASES)
def test_each_unit_sends_what_the_table_says(name, model):
    config = PlanConfig(**PLANS[name])
    plan = make_plan(config, model)
    # On one context rank a window sends what all attention does: a few plans show that, with FSDP and a whole stream.
    windows = config.context > 1 or name in {*COMPILED, "whole"}
    letters = [letter for letter in model.layers.main if letter != "w" or windows]
    for unit in (*letters, OUTER):
        records = unit_collectives(unit, model, config, WORK)
        built = unit_of(unit, model, plan, WORK)
        same(traced(built, plan), table_of(inside(records), config, model))
        if unit not in COMPILED.get(name, ()):
            continue
        # XLA:CPU drops the barrier between the two passes around a ring and merges their first turns, which are equal.
        check = at_most if unit in (OUTER, *"*w+") and config.context > 1 else same
        check(compiled(built, plan), table_of(records, config, model))


@pytest.mark.parametrize("name", MERGED)
def test_sequences_over_ranks_send_what_the_table_says(name):
    config = PlanConfig(**MERGED[name])
    plan = make_plan(config, EVERY)
    for unit in "*wMm+" + "E" * (config.expert > 1):
        expected = table_of(unit_collectives(unit, EVERY, config, WORK), config, EVERY)
        built = unit_of(unit, EVERY, plan, WORK)
        same(traced(built, plan), expected)
        if unit in SENT[name]:
            at_most(compiled(built, plan), expected)


@pytest.mark.parametrize("remat", ["none", "elementwise", "full"])
@pytest.mark.parametrize("method", ["ring", "allgather"])
def test_keys_for_a_fused_kernel_are_sent_in_both_passes(method, remat, monkeypatch):
    """Keys, values and segments in each pass, and their gradients in float32."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # the kernel is traced, not run
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda *_: 91400)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda *_: False)
    config = PlanConfig(context=4, tensor=2, attention="cudnn", context_attention=method, remat=remat)
    model, work = dataclasses.replace(EVERY, head_dim=8), WORK._replace(itemsize=2)
    plan = make_plan(config, model, abstract=True)
    built = unit_of("*", model, plan, work, dtype="bfloat16")
    records = unit_collectives("*", model, config, work)
    same(traced(built, plan), table_of(records, config, model))


def test_windows_that_ranks_share_are_sent_once_per_step():
    """Two groups on four ranks of tensor: what the traced step sends, less what it sends without carried states."""
    model, config = hybrid(pattern="MEM", mtp_depths=0), PlanConfig(data=2, tensor=4, expert=2, microbatches=3)
    plan, built = make_plan(config, model), build(model)
    size, length = config.data * config.microbatches * WORK.rows, WORK.tokens
    train = TrainConfig(steps=1, batch_size=size, sequence_length=length, seed=0, carry_states=True)
    ids_bt, numbers_bt = (jax.ShapeDtypeStruct((size, length), dtype) for dtype in (jnp.int32, jnp.float32))
    batch = Batch(ids_bt, ids_bt, ids_bt, numbers_bt, {NEXT: ids_bt, NEXT_WEIGHT: numbers_bt})

    def sent(carried):
        step = gradients(built, NEXT_TOKENS, model, plan, "float32", carried=carried)
        jaxpr = jax.make_jaxpr(step)(built.params, built.buffers, batch, None, carried).jaxpr
        return jaxpr_collectives(jaxpr, dict(plan.mesh.shape))

    with_states, without = sent(carry.abstract(train, built)), sent(None)
    more = {key: traffic.bytes - without.get(key, Traffic(0, 0)).bytes for key, traffic in with_states.items()}
    work = WORK._replace(carried=True)
    records = [r for r in analytic(model, config, work)["M"] if r.part == "windows"]
    assert {key: size for key, size in more.items() if size} == {
        key: traffic.bytes for key, traffic in table_of(records, config, model).items()
    }
    # 6 sequences per rank, 3 earlier tokens, 5 float32 numbers, B and C, 2 layers; 2 ranks' all-reduce sends all once.
    assert sum(r.bytes for r in records) == 6 * 3 * 5 * 4 * 2 * 2
    assert not [r for r in analytic(model, config, WORK)["M"] if r.part == "windows"]


@pytest.mark.parametrize("name", RAGGED)
def test_ragged_exchanges_send_what_the_table_says(name):
    """The trace has what accelerators run; the program for CPUs has all-gathers of as many buffers instead."""
    config = PlanConfig(**RAGGED[name])
    plan = make_plan(config, EVERY)
    expected = table_of(unit_collectives("E", EVERY, config, WORK), config, EVERY)
    built = unit_of("E", EVERY, plan, WORK)
    same(traced(built, plan), expected)
    program = compiled(built, plan)
    (key,) = (key for key in expected if key[0] == "ragged-all-to-all")
    assert key not in program
    gather = "all-gather", key[1]
    assert program.pop(gather).count == expected.pop(gather).count + expected.pop(key).count
    same(program, expected)


# Layers that keep the result of a collective by name do not repeat the collective.
NAMED = [
    ("ring", "*wMm+", "paper"),
    ("ring", "*M", "attention"),
    ("heads", "*Mm", "selective"),
    ("gathered-keys", "*m", "core"),
    ("state", "Mm", ("ssd_states", "scan_states")),
    ("data-tensor", "*-ME", "selective"),
    ("whole", "*-mE", "full"),
    ("copies", "E", ("rows", "combined")),
    ("ragged-shared", "E", "routing"),
    ("ragged", "E", ("E:rows,expert_out", "*:core")),
]


@pytest.mark.parametrize(("name", "units", "remat"), NAMED)
def test_what_is_kept_by_name_is_not_sent_again(name, units, remat):
    config = PlanConfig(**{**(PLANS | MERGED | RAGGED)[name], "remat": remat})
    plan = make_plan(config, EVERY, abstract=True)
    for unit in units:
        expected = table_of(inside(unit_collectives(unit, EVERY, config, WORK)), config, EVERY)
        same(traced(unit_of(unit, EVERY, plan, WORK), plan), expected)


# The whole model, with recomputation, accumulation and deeper predictions; its layers are compared one by one above.
# XLA:CPU merges equal gathers of one parameter, which undoes recomputation: the program is not compared.
STEPS = [
    (hybrid(pattern="ME*-/*E", mtp_depths=2, tie_word_embeddings=True), "float32",
     {"data": 2, "tensor": 4, "expert": 4, "fsdp": "parameters", "microbatches": 3}),
    (hybrid(pattern="E*E/E"), "bfloat16",
     {"data": 2, "tensor": 2, "expert": 2, "dispatch": "alltoall", "remat": "full", "fsdp": "parameters"}),
    (EVERY, "bfloat16", {"data": 4, "tensor": 2, "expert": 8, "remat": "elementwise"}),
    (FULLER, "bfloat16", {"data": 4, "tensor": 2, "expert": 2, "fsdp": "gradients", "fsdp_size": 2, "microbatches": 2}),
    # With projection biases Mamba-2's time step has two biases, whose equal gradients XLA sums once: not in FULLER.
    (dataclasses.replace(FULLER, pattern="E-M", mamba_proj_bias=True), "bfloat16",
     {"data": 2, "tensor": 2, "expert": 4, "fsdp": "parameters", "remat": "full"}),
    (hybrid(pattern="M*/E", mtp_depths=2), "bfloat16",
     {"context": 2, "tensor": 4, "expert": 2, "expert_tensor": 2, "dispatch": "ragged", "fsdp": "parameters",
      "remat": "full"}),
    (dataclasses.replace(EVERY, pattern="M*mE"), "bfloat16",
     {"context": 4, "data": 2, "context_attention": "alltoall", "context_ssm": "heads", "expert": 4,
      "dispatch": "alltoall", "shift": "alltoall", "microbatches": 2}),
    (hybrid(pattern="ME-/*E", mtp_depths=2, router_balance="global", learned_positions=99), "bfloat16",
     {"data": 2, "context": 2, "tensor": 2, "expert": 4, "fsdp": "parameters", "remat": "full", "microbatches": 3}),
    (dataclasses.replace(FULLER, pattern="*Em"), "bfloat16",
     {"context": 2, "tensor": 2, "context_attention": "allgather", "dispatch": "ragged", "buffer_factor": 1.2}),
    (dataclasses.replace(FULLER, pattern="E*M"), "bfloat16",
     {"data": 2, "tensor": 4, "stream": "whole", "fsdp": "parameters", "remat": "full"}),
    (hybrid(pattern="M*/E", mtp_depths=2, router_balance="global"), "bfloat16",
     {"context": 2, "tensor": 2, "stream": "whole", "microbatches": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("model", "dtype", "sizes"), STEPS)
def test_a_step_sends_what_its_layers_do(model, dtype, sizes):
    config = PlanConfig(**sizes)
    plan = make_plan(config, model, abstract=True)
    batch = WORK.rows * config.data * config.microbatches
    found = step_collectives(model, plan, batch, WORK.tokens * config.context, dtype=dtype)
    work = WORK._replace(itemsize=2 if dtype == "bfloat16" else 4)
    records = [record for records in analytic(model, config, work).values() for record in inside(records)]
    same(found, table_of(records, config, model))


@pytest.mark.parametrize(
    ("choices", "changes", "over"),
    [
        ({"schedule": "gpipe"}, {"pattern": "*-|*"}, {("data",), ("stage", "data", "tensor")}),
        ({"schedule": "interleaved"}, {"pattern": "*|-|*|-", "tie_word_embeddings": True},
         {("stage", "data"), ("stage", "data", "tensor")}),
        ({"schedule": "gpipe", "stream": "whole"}, {"pattern": "*-|*"}, {("data",), ("stage", "data", "tensor")}),
    ],
    ids=["gpipe", "interleaved-tied", "gpipe-whole"],
)  # fmt: skip
def test_stages_pass_on_what_the_table_says(choices, changes, over):
    """Each tick passes a microbatch's residual stream both ways; gradients of what every stage holds are summed over
    the stages, except those of an embedding and a head on different stages."""
    config = PlanConfig(stage=2, tensor=2, data=2, microbatches=4, **choices)
    model = dataclasses.replace(EVERY, **changes)
    found = step_collectives(model, make_plan(config, model), config.data * 4 * WORK.rows, WORK.tokens)
    table = analytic(model, config, WORK)
    passed = table_of(table[PIPELINE], config, model)
    (key,) = passed
    assert key == ("collective-permute", ("stage",))
    assert found[key] == passed[key]
    summed = table_of([r for r in table[OUTER] if r.part == "gradients"], config, model)
    assert {axes for _, axes in summed} == over
    # Layers sum over data too, as do statistics of every tick; the vocabulary's part is what grows with its size.
    wider = dataclasses.replace(model, vocab_size=2 * model.vocab_size)
    more = step_collectives(wider, make_plan(config, wider), config.data * 4 * WORK.rows, WORK.tokens)
    grown = table_of([r for r in analytic(wider, config, WORK)[OUTER] if r.part == "gradients"], config, wider)
    for key, traffic in summed.items():
        if "stage" in key[1]:
            assert found[key].bytes == pytest.approx(traffic.bytes, rel=1e-12), key
        difference = grown[key].bytes - traffic.bytes
        assert more[key].bytes - found[key].bytes == pytest.approx(difference, rel=1e-12), key


def test_sequence_parallel_blocks_are_scattered_not_all_reduced():
    """An MLP of 2 x 20 tokens of 48 numbers on two ranks: 7,680 bytes whole, a half of it sent four times."""
    config = PlanConfig(tensor=2)
    records = [r for r in unit_collectives("-", EVERY, config, WORK) if r.phase != "update"]
    assert {(r.phase, r.operation, r.axes, r.count, r.bytes) for r in records} == {
        ("forward", "all-gather", ("tensor",), 1, 3840),
        ("forward", "reduce-scatter", ("tensor",), 1, 3840),
        ("backward", "all-gather", ("tensor",), 1, 3840),
        ("backward", "reduce-scatter", ("tensor",), 1, 3840),
    }
    plan = make_plan(config, EVERY)
    program = compiled(unit_of("-", EVERY, plan, WORK), plan)
    # What is all-reduced is the norm's gradient: 48 numbers, each half twice.
    assert program["all-reduce", ("tensor",)] == (1, 48 * 4)


def test_a_whole_stream_is_all_reduced_once_forward_and_once_backward():
    """An MLP of 2 x 20 tokens of 48 numbers on two ranks: 7,680 bytes whole, each half sent twice by an all-reduce."""
    records = unit_collectives("-", EVERY, PlanConfig(tensor=2, stream="whole"), WORK)
    assert {(r.phase, r.operation, r.axes, r.count, r.bytes) for r in records if r.phase != "update"} == {
        ("forward", "all-reduce", ("tensor",), 1, 7680),
        ("backward", "all-reduce", ("tensor",), 1, 7680),
    }


def test_parameters_are_gathered_by_fsdp_alone():
    operations = {r.operation for r in unit_collectives("-", EVERY, PlanConfig(data=2), WORK)}
    assert operations == {"all-reduce"}
    config = PlanConfig(data=2, fsdp="parameters")
    gathers = [r for r in unit_collectives("-", EVERY, config, WORK) if r.operation == "all-gather"]
    # Two matrices of 48 x 72, of which a device has half and sends it.
    assert [(r.axes, r.bytes) for r in gathers] == [(("fsdp",), 24 * 72 * 4)] * 2


def test_crossing_from_dense_layers_to_experts_gathers_nothing():
    """Data 2 x tensor 2 seen as expert 4 is a regrouping of devices: tokens stay where they are."""
    model = hybrid(pattern="E", mtp_depths=0, moe_shared_expert_intermediate_size=None)
    config = PlanConfig(data=2, tensor=2, expert=4, dispatch="alltoall")
    plan = make_plan(config, model)
    program = compiled(unit_of("E", model, plan, WORK), plan)
    assert {operation for operation, _ in program} == {"all-to-all", "all-reduce"}
    # 20 tokens of a device to each of 24 experts, 24 numbers wide; three quarters leave, forward and back, twice.
    assert program["all-to-all", ("data", "tensor")] == (4, 4 * 3 / 4 * 20 * 24 * 24 * 4)


def test_a_collective_that_the_table_lacks_is_found(monkeypatch):
    """An MLP that sums its output over all ranks, and then takes its piece, has one all-reduce too many."""
    from orogen.parallel.plan import Plan

    monkeypatch.setattr(Plan, "leave", lambda self, y: self.own(self.sum(y, "tensor")))
    config = PlanConfig(tensor=2)
    plan = make_plan(config, EVERY)
    expected = table_of(unit_collectives("-", EVERY, config, WORK), config, EVERY)
    with pytest.raises(AssertionError):
        same(traced(unit_of("-", EVERY, plan, WORK), plan), expected)
    with pytest.raises(AssertionError):
        same(compiled(unit_of("-", EVERY, plan, WORK), plan), expected)


@pytest.mark.parametrize(
    ("operation", "sent"),
    [("all-gather", 300), ("reduce-scatter", 75), ("all-reduce", 150), ("all-to-all", 75), ("collective-permute", 100)],
)
def test_bytes_sent_of_an_operand_of_a_hundred_over_four_ranks(operation, sent):
    assert sent_bytes(operation, 100, 4) == sent


def test_one_device_sends_nothing():
    facts = describe_collectives(EVERY, PlanConfig(), WORK)
    assert not any(facts["units"].values()) and not facts["step_bytes"]
    assert collective_lines(facts)[-1] == "nothing is sent: one device"


def test_facts_are_json_and_lines_name_every_unit():
    facts = describe_collectives(EVERY, PlanConfig(data=2, tensor=2), WORK)
    assert json.loads(json.dumps(facts))["units"]["-"][0]["axes"] == ["tensor"]
    lines = collective_lines(facts)
    assert {line.split()[0] for line in lines[2:-1]} == {*EVERY.layers.main, "ends", "load"}
    assert lines[2].split()[:4] == ["M", "sequence", "all-gather", "tensor"]


@pytest.mark.parametrize("shift", ["permute", "alltoall"])
def test_a_context_rank_gets_targets_from_its_neighbours(shift):
    config = PlanConfig(context=2, tensor=2, shift=shift)
    plan = make_plan(config, EVERY, abstract=True)
    expected = table_of(unit_collectives(OUTER, EVERY, config, WORK), config, EVERY)
    same(traced(unit_of(OUTER, EVERY, plan, WORK), plan), expected)
