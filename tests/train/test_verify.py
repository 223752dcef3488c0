"""What `verify` compares, and that it notices faults: in whole steps, in evaluation and in bfloat16."""

import dataclasses
import json
import os

import numpy as np
import pytest
from tests.helpers import hybrid, run_config

from orogen.cli import main
from orogen.config.checks import ConfigError
from orogen.config.plan import PlanConfig
from orogen.config.precision import RECIPE_NAMES, PrecisionConfig
from orogen.model.layout import Whole
from orogen.moe.layer import Choice, Replay
from orogen.parallel.runtime import XLA_FLAGS
from orogen.train import step, verdict, verify_step, whole
from orogen.train.sides import Side, reference_plan, replayed
from orogen.train.verify import verify

# One layer of each kind, on a plan with all that the single device lacks: ranks, microbatches, loops, drops.
MODEL = {"pattern": "E", "mtp_depths": 0, "moe_latent_size": None, "moe_shared_expert_intermediate_size": None}
PLAN = {"data": 2, "microbatches": 2, "capacity_factor": 1.0, "expert": 2, "dispatch": "alltoall"}


def small(model: dict | None = None, **plan):
    return run_config(hybrid(**(MODEL | (model or {}))), plan=PLAN | plan, batch_size=8, sequence_length=12)


def test_the_reference_takes_the_whole_batch_by_the_plainest_kernels():
    config = PlanConfig(
        data=2, context=2, tensor=2, microbatches=4, remat="full", linear="fp8", ssd="chunked", attention="blocked",
        dispatch="ragged", buffer_factor=2.0, capacity_factor=1.5, drop_policy="probs", unroll=5, fsdp="gradients",
    )  # fmt: skip
    plan = reference_plan(config, hybrid(pattern="E*", mtp_depths=0))
    assert plan.mesh.size == 1 and plan.sources == (8, 2, 2)
    assert plan.config == PlanConfig(
        capacity_factor=1.5, drop_policy="probs", unroll=1, ssd="recurrence", selective_scan="reference",
        grouped_matmul="reference", cross_entropy="full",
    )  # fmt: skip


def test_what_both_sides_compute_alike_is_named():
    plan = PlanConfig(dispatch="ragged")
    found = verdict.shared(plan, plan.plainest(), hybrid(pattern="E*", mtp_depths=0))
    assert found == ["attention=full", "rms_norm=plain", "permutation=gather"]
    blocked = dataclasses.replace(plan, attention="blocked")
    assert "attention=blocked" not in verdict.shared(blocked, blocked.plainest(), hybrid(pattern="*", mtp_depths=0))


def test_what_the_model_has_not_is_not_named():
    plan = PlanConfig()
    layer_norms = hybrid(pattern="*", mtp_depths=0, norm="layer")
    assert verdict.shared(plan, plan.plainest(), layer_norms) == ["attention=full"]
    gated = hybrid(pattern="M", mtp_depths=0, norm="layer")
    assert verdict.shared(plan, plan.plainest(), gated) == ["causal_conv1d=taps", "rms_norm=plain"]


def test_choices_of_a_batch_are_replayed_where_its_rows_go():
    """Rows 0 to 11: each of two data ranks takes six, in three microbatches of two."""
    config = small(microbatches=3)
    plan = type("Plan", (), {"config": config.plan, "size": lambda self, axis: 1})()
    rows_btk = np.broadcast_to(np.arange(12)[:, None, None], (12, 5, 3))
    choice = Choice(Replay(rows_btk[None, None], rows_btk[None, None] > 3), None, None)
    replay = replayed(choice, Side(config, plan, type("Built", (), {"layout": Whole("E", "")})()))
    assert replay.experts.shape == (3, 1, 4, 5, 3)
    assert replay.experts[:, 0, :, 0, 0].tolist() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]


def test_drops_of_microbatches_and_ranks_are_those_of_one_batch():
    found = verify(small())
    assert found.passed and found.dropped_tokens > 0, found
    assert found.what == "gradients" and found.dtype == "float32" and "dispatch=allgather" not in found.shared


def test_a_fault_of_adding_up_microbatches_is_seen(monkeypatch):
    """Only one side has microbatches, recomputation and kernels, so their faults show as differences."""
    honest = whole._accumulated

    def shrinks(*arguments, **named):
        (loss, sums, grads), kept = honest(*arguments, **named)
        return (loss, sums, whole.jax.tree.map(lambda g: g * 0.99, grads)), kept

    monkeypatch.setattr(whole, "_accumulated", shrinks)
    found = verify(run_config(hybrid(pattern="-", mtp_depths=0), plan={"microbatches": 2}, sequence_length=12))
    assert not found.passed and found.max_gradient_error == pytest.approx(0.01, rel=1e-3)
    assert found.max_parameter_error <= verdict.PARAMETER


@pytest.mark.parametrize(
    ("name", "plan"), [("adamw", {"fsdp": "gradients"}), ("muon", {"fsdp": "parameters", "tensor": 2})], ids=str
)
def test_whole_steps_equal_one_device(name, plan):
    config = small(**plan)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name=name))
    found = verify(config, what="step")
    assert found.passed and found.dropped_tokens > 0 and found.what == "step", found


def broken_step(name: str):
    """`apply_gradients` with a fault that only several devices show."""
    honest = step.apply_gradients

    def apply(state, grads, load, optimizer, plan, **settings):
        if plan.config.data > 1 and name == "clip":
            settings["grad_norm"] = settings["grad_norm"] / 2
        if plan.config.data > 1 and name == "bias":
            settings["bias_rate"] = settings["bias_rate"] * 2
        if plan.config.data > 1 and name == "skip":
            settings["finite"] = settings["finite"] | True
        new = honest(state, grads, load, optimizer, plan, **settings)
        if plan.config.data > 1 and name == "counter":
            return new._replace(skipped_in_row=new.skipped)
        return new

    return apply


@pytest.mark.parametrize("fault", ["clip", "bias", "skip", "counter"])
def test_a_fault_of_a_step_is_seen(fault, monkeypatch):
    monkeypatch.setattr(step, "apply_gradients", broken_step(fault))
    config = small(microbatches=1, capacity_factor=None)
    assert not verify(config, what="step").passed


def test_evaluation_equals_one_device_and_drops_nothing(monkeypatch):
    found = verify(small(tensor=2), what="evaluation")
    assert found.passed and found.max_gradient_error is None and found.max_parameter_error is None, found
    honest = verify_step.heldout_plan
    keep = lambda config: dataclasses.replace(honest(config), config=config.plan)  # noqa: E731
    monkeypatch.setattr(verify_step, "heldout_plan", keep)
    assert not verify(small(microbatches=1), what="evaluation").passed


@pytest.mark.parametrize("what", ["gradients", "step", "evaluation"])
def test_bfloat16_has_tolerances_of_its_own(what):
    found = verify(small({"pattern": "E-"}, microbatches=1), what=what, dtype="bfloat16")
    assert found.passed and found.dtype == "bfloat16", found
    assert 1e-5 < found.loss_error <= found.tolerances["loss_error"] < 0.05


# Every letter on tensor ranks that hold the whole stream, with everything else that splits or sums it.
WHOLE = [
    ({"pattern": "wE/*", "mtp_depths": 1, "sliding_window": 7, "mlp_bias": True, "tie_word_embeddings": True,
      "learned_positions": 24, "moe_shared_expert_gate": True, "attention_bias": "all", "rope_theta": 100.0},
     {"data": 2, "expert": 4, "dispatch": "alltoall", "capacity_factor": 1.0, "microbatches": 2}),
    ({"pattern": "Mm-", "mtp_depths": 0, "mamba_intermediate_size": 48, "time_step_rank": 3, "mamba_proj_bias": True},
     {"context": 2, "fsdp": "parameters", "remat": "full"}),
    ({"pattern": "+E", "mtp_depths": 0, "kv_lora_rank": 24, "q_lora_rank": 48, "qk_nope_head_dim": 4,
      "qk_rope_head_dim": 2, "v_head_dim": 3, "rope_theta": 100.0, "router_balance": "global", "attention_bias": "all"},
     {"stage": 2, "microbatches": 2, "expert": 2}),
    ({"pattern": "E*", "mtp_depths": 0},
     {"context": 2, "expert": 2, "expert_tensor": 2, "dispatch": "ragged", "fsdp": "optimizer"}),
]  # fmt: skip


@pytest.mark.parametrize(("model", "plan"), WHOLE, ids=["wE/*", "Mm-", "+E", "E*"])
def test_a_stream_that_every_rank_holds_whole_equals_one_device(model, plan):
    config = run_config(hybrid(**model), plan=plan | {"tensor": 2, "stream": "whole"}, batch_size=8)
    found = verify(config, optimizers=("adamw",))
    assert found.passed and not found.zero_leaves, found


def test_fp8_is_held_against_products_that_are_not_rounded():
    config = run_config(hybrid(pattern="---", mtp_depths=0), plan={"linear": "fp8", "data": 2}, sequence_length=12)
    found = verify(config)
    assert found.passed and found.max_gradient_error > 1e-3, found
    exact = verify(dataclasses.replace(config, plan=dataclasses.replace(config.plan, linear="plain")))
    assert exact.tolerances["max_gradient_error"] == verdict.GRADIENT < found.tolerances["max_gradient_error"]


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_a_gradient_that_is_zero_never_passes(recipe):
    config = dataclasses.replace(small({"pattern": "E*-" * 30}), precision=PrecisionConfig(recipe=recipe))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, compute_dtype="bfloat16"))
    (error,), _ = verdict.leaf_errors([np.full(3, 2.0)], [np.zeros(3)])
    alike = {"worst_leaf": None, "flips": 0, "zero_leaves": [], "dropped_tokens": 0, "overflow_rows": 0}
    alike |= dict.fromkeys(("loss_error", "max_parameter_error", "load_error", "flip_margin"), 0.0)
    of = lambda e: verdict.Verdict(  # noqa: E731
        max_gradient_error=e, **alike, **verdict.conditions("gradients", config, config.plan)
    )
    assert not of(error).passed and of(1e-5).passed


def test_the_command_compiles_with_little_optimisation(tmp_path, monkeypatch):
    """Tests have the flags in their environment already, so they are taken out first."""
    file, seen = tmp_path / "model.gin", []
    file.write_text("ModelConfig.pattern = '-'\nModelConfig.vocab_size = 24\nModelConfig.hidden_size = 8\n"
                    "ModelConfig.intermediate_size = 12\n")  # fmt: skip
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")

    def check(*_, **__):
        seen.append(os.environ["XLA_FLAGS"].split())
        raise ConfigError("seen")

    monkeypatch.setattr("orogen.train.verify.verify", check)
    assert main(["verify", "--gin_file", str(file), "--fake_devices", "8"]) == 2
    assert {*XLA_FLAGS["unoptimised"], "--xla_cpu_enable_fast_math=false"} <= set(*seen)


def test_the_command_says_what_was_compared(tmp_path, capsys):
    file = tmp_path / "model.gin"
    sizes = {"pattern": "'-'", "vocab_size": 24, "hidden_size": 8, "intermediate_size": 12}
    file.write_text("".join(f"ModelConfig.{name} = {value}\n" for name, value in sizes.items()))
    command = ["verify", "--gin_file", str(file), "--gin_bindings", "PlanConfig.data=2", "--json"]
    assert main([*command, "--fake_devices", "8", "--what", "evaluation", "--dtype", "bfloat16"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["what"] == "evaluation" and facts["dtype"] == "bfloat16" and facts["passed"]
    assert {"loss_error", "max_gradient_error", "worst_leaf", "max_parameter_error", "shared"} <= set(facts)
