"""The analytic memory and traffic of small and middle sizes beside the real step."""

import jax
import pytest
from tests.helpers import hybrid, run_config, several_devices

from orogen.config.cluster import ClusterConfig
from orogen.simulate.compiled import compare, compared_lines, on_cpu, whole
from orogen.simulate.memory import placed_state, state_bytes
from orogen.simulate.predict import predict

# The formulas are held to XLA:CPU as jax 0.10.1 has it. That of 0.11.2 packs temporary arrays otherwise: it takes 16 %
# more for -*-*-*, 20 % more for M-M-M-, 17 % less for ME*-.
OLD = jax.__version_info__ < (0, 11)
MEMORY = 0.10 if OLD else 0.25
# Widths at which activations outweigh what the formulas leave out.
MIDDLE = {
    "hidden_size": 192, "num_attention_heads": 8, "head_dim": 24, "intermediate_size": 768, "mamba_num_heads": 16,
    "mamba_head_dim": 24, "ssm_state_size": 16, "vocab_size": 1024, "moe_intermediate_size": 96, "mtp_depths": 0,
    "moe_shared_expert_intermediate_size": 192, "moe_latent_size": 96, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "chunk_size": 32,
}  # fmt: skip
STATES = [
    ("ME*-ME*-", {}),
    ("ME*-ME*-", {"data": 2, "fsdp": "optimizer", "remat": "selective", "microbatches": 2}),
    ("-*-*-*", {"data": 2, "tensor": 2, "fsdp": "parameters"}),
    ("ME*-ME*-", {"data": 4, "tensor": 2, "expert": 4, "fsdp": "gradients", "dispatch": "alltoall"}),
    ("M-E*M-ME", {"stage": 2, "microbatches": 4, "expert": 2, "data": 2, "fsdp": "optimizer"}),
    ("M-E*M-ME/*E", {"stage": 2, "microbatches": 4}),
]


@several_devices
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("pattern", "plan"), STATES, ids=lambda value: str(value)[:40])
def test_parameters_gradients_and_optimizer_are_exact(pattern, plan, dtype):
    depths = int("/" in pattern)
    model = hybrid(**{**MIDDLE, "pattern": pattern, "mtp_depths": depths})
    config = run_config(model, plan=plan, batch_size=16, compute_dtype=dtype)
    exact = state_bytes(config, placed_state(config))
    for stage in predict(config, ClusterConfig(hardware="cpu")).memory:
        assert stage.parts["parameters"] == exact["parameters"]
        assert stage.parts["working"] == exact["working"]
        assert stage.parts["optimizer"] == pytest.approx(exact["optimizer"], abs=8)  # two counts of steps
        if plan:  # alone, with one microbatch, gradients are in the dtype of the working copies
            assert stage.parts["gradients"] == exact["gradients"]


@several_devices
@pytest.mark.parametrize("pattern", ["-*-*-*", "ME*-"])
def test_a_compiled_step_holds_and_sends_what_is_predicted(pattern):
    """Of plans that recompute nothing: XLA:CPU does not keep to what a plan recomputes."""
    plan = {"data": 2, "tensor": 2, "fsdp": "parameters", "remat": "paper", "attention": "blocked"}
    if "E" in pattern:
        plan |= {"expert": 4, "dispatch": "alltoall", "capacity_factor": 1.5}
    model = hybrid(**{**MIDDLE, "pattern": pattern})
    facts = compare(run_config(model, plan=plan, batch_size=16, sequence_length=512))
    analytic, compiled = whole(facts["memory"])
    assert analytic == pytest.approx(compiled, rel=MEMORY)
    total = sum(entry["analytic"] for entry in facts["traffic"])
    sent = {(entry["operation"], *entry["mesh_axes"]): entry for entry in facts["traffic"]}
    for (operation, *axes), entry in sent.items():
        expected = entry["analytic"]
        if operation == "all-gather" and "E" in pattern and OLD:
            # This XLA:CPU merges the gather that a layer of a hybrid repeats for its gradient with the first, which
            # leaves as many bytes as the sums over the same axes have.
            expected = sent["reduce-scatter", *axes]["analytic"]
            assert expected < entry["analytic"]
        # The global norm of the gradients is summed outside the ledger.
        assert entry["compiled"] == pytest.approx(expected, abs=1e-3 * total), entry
    assert "compiled in float32" in compared_lines(facts)[0]


def test_what_a_cpu_lacks_is_replaced():
    plan = {"attention": "cudnn", "ssd": "triton", "linear": "fp8", "dispatch": "ragged", "buffer_factor": 1.5}
    found = on_cpu(run_config(hybrid(), plan=plan, compute_dtype="bfloat16"))
    assert (found.plan.attention, found.plan.ssd, found.plan.linear) == ("blocked", "chunked", "plain")
    assert (found.plan.dispatch, found.plan.capacity_factor, found.plan.buffer_factor) == ("alltoall", 1.5, None)
    assert found.train.compute_dtype == "float32"
