"""The benchmark of whole models at sizes that compile in seconds, on CPU, with the kernels that run there."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from tests.helpers import hybrid

from orogen.bench import train, train_peer, worker
from orogen.bench.worker import Worker, seconds_a_run
from orogen.bench.workload import Workload
from orogen.cli import main
from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig
from orogen.config.plan import FOR_GPU, PlanConfig
from orogen.parallel.plan import make_plan
from orogen.precision.fp8 import fp8_matmul

SIZES = {
    "ModelConfig.pattern": "'MEM*E'", "ModelConfig.vocab_size": 64, "ModelConfig.hidden_size": 32,
    "ModelConfig.num_attention_heads": 4, "ModelConfig.head_dim": 8, "ModelConfig.mamba_num_heads": 8,
    "ModelConfig.mamba_head_dim": 8, "ModelConfig.ssm_state_size": 16, "ModelConfig.chunk_size": 8,
    "ModelConfig.n_routed_experts": 8, "ModelConfig.num_experts_per_tok": 2, "ModelConfig.moe_intermediate_size": 24,
    "ModelConfig.moe_shared_expert_intermediate_size": 40,
    **{f"PlanConfig.{field}": repr(getattr(PlanConfig, field)) for field in FOR_GPU},
}  # fmt: skip


def tiny(part: str = "forward_backward", /, **changes: object) -> Workload:
    bindings = tuple(f"{name}={value}" for name, value in {**SIZES, **changes}.items())
    return Workload(rows=2, sequence_length=24, part=part, bindings=bindings)


def test_a_recipe_of_formats_may_be_timed():
    """Of a model whose batch, while its size is not known yet, has more tokens than a recipe can number."""
    asked = ("PrecisionConfig.recipe='nvfp4'", "PrecisionConfig.last_layers=2")
    found = Workload(rows=1, sequence_length=256, bindings=asked).config()
    assert (found.precision.recipe, found.precision.last_layers, found.train.batch_size) == ("nvfp4", 2, 1)
    with pytest.raises(ConfigError, match=r"PrecisionConfig.recipe is 'nvfp5'; expected one of plain"):
        Workload(bindings=("PrecisionConfig.recipe='nvfp5'",)).config()


SMALL = {"ModelConfig.pattern": "'M*E'", "TrainConfig.compute_dtype": "'float32'"}


@functools.cache
def loss_alone(rows: int) -> float:
    """Of one device's forward and backward pass of SMALL."""
    work = dataclasses.replace(tiny(**SMALL), rows=rows)
    return train.prepare(work, work.config()).loss


@pytest.mark.parametrize("part", ["forward_backward", "whole_step"])
def test_facts(part, monkeypatch):
    honest, made = train.prepare, []
    monkeypatch.setattr(train, "prepare", lambda *work, **how: made.append(honest(*work, **how)) or made[-1])
    facts = json.loads(json.dumps(train.bench(tiny(part), steps=2, deterministic=part == "forward_backward")))
    found = facts[part]
    assert 3 < found["loss"] < 6 and found["best_ms"] <= found["ms"] <= found["worst_ms"]
    usual = {"remat": "elementwise", "unroll": 3, "logit_rows": 4096}
    names = ["M:norm,conv,gated_norm", "E:norm,rows,expert_activation,shared_activation"]
    whole = {"microbatches": 4, "remat": names}
    assert facts["plan"] == usual | (whole if part == "whole_step" else {})
    assert found.get("same_bits") is (True if part == "forward_backward" else None)
    assert facts.get("moment_dtype") == ("bfloat16" if part == "whole_step" else None)
    assert [one.tokens for one in made] == [4 * 48 if part == "whole_step" else 48]  # of all microbatches


def test_a_whole_step_starts_from_the_loss_of_the_passes():
    work = tiny("whole_step", **SMALL, **{"PlanConfig.microbatches": 1})
    step = train.prepare(work, work.config())
    assert loss_alone(2) == pytest.approx(step.loss, rel=1e-6)
    assert step.tokens == 48


@pytest.mark.parametrize(
    ("part", "plan"),
    [
        ("forward_backward", {"PlanConfig.data": 2, "PlanConfig.fsdp": "'optimizer'"}),
        ("forward_backward", {"PlanConfig.stage": 2, "PlanConfig.microbatches": 2, "ModelConfig.pattern": "'M|*E'"}),
        ("whole_step", {"PlanConfig.data": 2, "PlanConfig.expert": 2, "PlanConfig.fsdp": "'parameters'"}),
    ],
)
def test_several_devices_compute_the_loss_of_one(part, plan):
    """`rows` counts the global batch, so a plan changes neither the tokens nor the loss; only a pipeline's pass has all
    of its microbatches."""
    work = tiny(part, **{**SMALL, "PlanConfig.microbatches": 1, **plan})
    runs = 2 if "PlanConfig.stage" in plan else 1
    config = work.config()
    found = train.prepare(work, config)
    assert found.tokens == runs * 48
    assert found.loss == pytest.approx(loss_alone(runs * 2), rel=1e-5)
    assert all(len(a.sharding.device_set) == 2 for a in jax.tree.leaves(found.start()))
    facts = train.describe(work, config) | train.summarise(found, [0.5], config)
    assert (facts["devices"], facts["rows"], facts["sequence_length"]) == (2, 2, 24)
    assert (facts["tokens_per_second"], facts["tokens_per_second_per_device"]) == (runs * 96, runs * 48)
    assert "dropped" not in facts  # nothing was


def test_weak_scaling_gives_each_device_as_much_under_every_plan():
    """Six devices: 2 sequences of 24 tokens become 12, or 144 tokens long."""
    six = {"PlanConfig.data": 3, "PlanConfig.context": 2, "PlanConfig.microbatches": 4}
    work = tiny("whole_step", **six)
    expected = {"rows": (4 * 12, 24), "length": (4 * 2, 144)}
    for name, (rows, length) in expected.items():
        scaled = dataclasses.replace(work, weak_scaling=name, rows=2 if name == "rows" else 3).config().train
        assert (scaled.batch_size, scaled.sequence_length) == (rows if name == "rows" else 4 * 3, length)
    assert dataclasses.replace(tiny(), weak_scaling="rows").config().train.batch_size == 2


def test_assignments_that_are_lost_are_reported():
    """Each expert has room for at most half of an even share, so at least half of all assignments are dropped."""
    half = {
        "ModelConfig.pattern": "'M*E'", "PlanConfig.dispatch": "'alltoall'", "PlanConfig.capacity_factor": 0.5,
    }  # fmt: skip
    found = train.bench(tiny(**half), steps=1)["forward_backward"]
    assert 0.5 <= found["dropped"] < 1 and found["overflow"] == 0


def test_rates_by_hand(monkeypatch):
    """A token takes 160 FLOPs forward in an MLP 5 x 8 x 5 and 110 in a head 5 x 11, and three times that in all."""
    model = ModelConfig(pattern="-", vocab_size=11, hidden_size=5, intermediate_size=8)
    monkeypatch.setattr(train, "peak_flops", lambda kind: 6480e12)
    found = train.rates([0.5, 0.25, 1.5], 10**12, model, 7)
    assert found == {
        "ms": 500.0, "best_ms": 250.0, "worst_ms": 1500.0, "tokens_per_second": 2 * 10**12, "tflops": 1620.0,
        "mfu": 0.25,
    }  # fmt: skip
    both = train.rates([0.5, 0.25, 1.5], 10**12, model, 7, devices=2)
    each = {"tokens_per_second_per_device": 10**12, "tflops": 810.0, "mfu": 0.125}
    assert both == found | each


def test_memory_counts_results_that_alias_arguments_once():
    sizes = {"argument": 5e9, "output": 3e9, "alias": 2e9, "temp": 7e9}
    analysed = SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})
    program = SimpleNamespace(memory_analysis=lambda: analysed)
    assert train._memory(program) == {"gb": 13.0, "temporary_gb": 7.0}


def test_bindings_override_the_defaults():
    assert tiny(**{"PlanConfig.remat": "'full'"}).config().plan.remat == "full"
    assert tiny(**{"PlanConfig.linear": "'fp8'"}).config().plan.linear == "fp8"


def test_attention_is_blocked_where_xla_is_asked_for_the_same_bits(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    assert Workload().config().plan.attention == "blocked"
    asked = Workload(bindings=("PlanConfig.attention='cudnn'",)).config().plan
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ConfigError, match="PlanConfig.attention is 'cudnn'; expected blocked where XLA is asked for"):
        make_plan(asked, hybrid())


def test_rows_and_recomputation_follow_from_the_length():
    short, long = (Workload(model="hybrid_1b", sequence_length=length) for length in (8192, 65536))
    assert (short.config().train.batch_size, long.config().train.batch_size) == (2, 1)
    assert short.config().plan.remat == "elementwise"
    assert long.config().plan.remat == ("M:norm,conv,gated_norm", "-:norm,activation")
    assert dataclasses.replace(long, bindings=("PlanConfig.remat='full'",)).config().plan.remat == "full"
    assert dataclasses.replace(short, rows=8).config().plan.remat == long.config().plan.remat
    assert "-" not in "".join(Workload(sequence_length=65536).config().plan.remat)  # R1 has no MLP layers


def test_kernels_of_a_gpu_are_refused_elsewhere(refused):
    def message(fields) -> str:
        names = ", ".join(f"PlanConfig.{field}" for field in fields)
        return (
            "train runs on a GPU of compute capability 9.0 (Hopper), found cpu; expected other choices of "
            f"{names} there"
        )

    assert refused("bench", "train", "--gin_bindings", "PlanConfig.linear='fp8'").startswith(message(FOR_GPU))
    used = [field for field in FOR_GPU if field != "quantize"]  # which only FP8 uses
    assert refused("bench", "train").startswith(message(used))
    assert refused("bench", "train", "--model", "r2").startswith("--model 'r2'; expected the name of a file in ")


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("PlanConfig.data=16", "--rows 2; expected a multiple of PlanConfig.data = 16"),
        ("TrainConfig.sequence_length=12", "--gin_bindings TrainConfig.sequence_length; expected --sequence_length"),
        ("TrainConfig.batch_size=2", "--gin_bindings TrainConfig.batch_size; expected --rows, and PlanConfig.micro"),
    ],
)
def test_bindings_that_would_be_miscounted_are_refused(refused, binding, message):
    assert refused("bench", "train", "--gin_bindings", binding).startswith(message)


def test_a_peer_with_whole_steps_is_refused(monkeypatch):
    monkeypatch.setattr(train_peer, "require_peer", lambda name: None)
    with pytest.raises(ConfigError, match="--peer torch with --whole_step; expected one of them"):
        train_peer.compare(tiny("whole_step"), peer="torch", steps=1, turns=1)


def test_a_peer_with_several_devices_is_refused(monkeypatch):
    monkeypatch.setattr(train_peer, "require_peer", lambda name: None)
    with pytest.raises(ConfigError, match="PlanConfig.devices is 2; expected 1 with --peer torch"):
        train_peer.compare(tiny(**{"PlanConfig.data": 2}), peer="torch", steps=1, turns=1)


def test_a_process_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="the process of orogen.bench.train ended with status 1"):
        Worker("orogen.bench.train", {})
    with pytest.raises(ConfigError, match="--model 'r2'; expected the name of a file in "):
        Worker("orogen.bench.train", {"work": {"model": "r2", "bindings": []}, "tokens": None})


@pytest.mark.peer
def test_transformers_has_the_same_loss_on_the_same_weights(capsys):
    facts = train_peer.compare(tiny(**{"ModelConfig.vocab_size": 128}), peer="torch", steps=2, turns=2)
    json.dumps(facts)
    assert facts["loss"] == pytest.approx(facts["torch"]["loss"], abs=1e-2)
    assert len(facts["forward_backward"]) == len(facts["torch"]["blocks"]) == 2
    assert [block["loss"] for block in facts["forward_backward"]] == [facts["loss"]] * 2
    assert facts["ratio"] > 0 and set(facts["torch"]["kernels"]) == {"causal_conv1d_fn", "mamba_chunk_scan_combined"}


def test_each_run_starts_before_the_host_waits_for_the_previous_one(monkeypatch):
    """Run n takes the device 5 + n seconds and the host 3: only the device's time is measured."""
    calls, host, device = [], 0.0, 0.0
    monkeypatch.setattr(worker.time, "perf_counter", lambda: host)

    def start():
        nonlocal host, device
        number = sum(call == "start" for call, _ in calls)
        calls.append(("start", number))
        host += 3
        device = max(host, device) + 5 + number
        return number, device

    def wait(run):
        nonlocal host
        number, end = run
        calls.append(("wait", number))
        host = max(host, end)

    assert seconds_a_run(start, wait, 3) == [6, 7, 8]
    started = [("start", 0)]
    for number in range(4):
        started += [("start", number + 1), ("wait", number)]
    assert calls == [*started, ("wait", 4)]


@pytest.mark.peer
def test_unequal_losses_are_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(train_peer, "MOST_APART", -1.0)
    bindings = [part for name, value in SIZES.items() for part in ("--gin_bindings", f"{name}={value}")]
    command = ["bench", "train", "--peer", "torch", "--rows", "2", "--sequence_length", "24", *bindings]
    assert main([*command, "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["equal"] is False and "expected them within" in err


def test_a_program_that_lacks_fp8_products_is_refused(monkeypatch):
    plan = make_plan(PlanConfig(linear="fp8"), hybrid())
    multiply = jax.jit(lambda x, weights: fp8_matmul(x, weights, quantize="plain"))
    weights = jnp.ones((4, 3)), jnp.ones((4, 2))
    # The text has one function with two products, and calls it twice.
    text = jax.jit(lambda x: (multiply(x, weights), multiply(2 * x, weights))).lower(jnp.ones((8, 4))).as_text()

    def lowered(found):
        program = SimpleNamespace(as_text=lambda: 'custom_call_target="__cublas$lt$matmul$f8"\n' * found)
        return SimpleNamespace(as_text=lambda: text, compile=lambda: program)

    train._compiled(lowered(0), plan)  # not checked on a CPU
    monkeypatch.setattr(train.jax, "default_backend", lambda: "gpu")
    train._compiled(lowered(4), plan)
    with pytest.raises(ConfigError, match="PlanConfig.linear is 'fp8'; expected plain: .* 3 of 4 products in FP8"):
        train._compiled(lowered(3), plan)
