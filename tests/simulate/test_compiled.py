"""The analytic memory and traffic of small and middle sizes beside the real compiled step."""

import pytest
from tests.helpers import hybrid, run_config, several_devices

from orogen.simulate.compiled import compare, compared_lines, on_cpu, whole

# Widths at which activations and parameters outweigh what the formulas leave out.
MIDDLE = {
    "hidden_size": 192, "num_attention_heads": 8, "head_dim": 24, "intermediate_size": 768, "mamba_num_heads": 16,
    "mamba_head_dim": 24, "ssm_state_size": 16, "vocab_size": 1024, "moe_intermediate_size": 96, "mtp_depths": 0,
    "moe_shared_expert_intermediate_size": 192, "moe_latent_size": 96, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "chunk_size": 32,
}  # fmt: skip
CASES = [
    ("ME*-ME*-", {"remat": "paper", "attention": "blocked"}, 8, 256),
    ("ME*-ME*-", {"data": 2, "fsdp": "optimizer", "remat": "selective", "microbatches": 2}, 16, 256),
    ("-*-*-*", {"data": 2, "tensor": 2, "fsdp": "parameters", "remat": "paper", "attention": "blocked"}, 16, 512),
    ("M-M-M-M-", {"stage": 2, "microbatches": 4, "remat": "paper"}, 16, 512),
]


@several_devices
@pytest.mark.parametrize(("pattern", "plan", "batch", "length"), CASES, ids=lambda value: str(value)[:40])
def test_parameters_and_optimizer_are_exact_and_the_whole_is_close(pattern, plan, batch, length):
    config = run_config(hybrid(**{**MIDDLE, "pattern": pattern}), plan=plan, batch_size=batch, sequence_length=length)
    facts = compare(config)
    memory = facts["memory"]
    assert memory["analytic"]["parameters"] == memory["state"]["parameters"]
    assert memory["analytic"]["optimizer"] == pytest.approx(memory["state"]["optimizer"], abs=8)  # two counts of steps
    assert memory["analytic"]["gradients"] == memory["state"]["gradients"]
    analytic, compiled = whole(memory)
    print("\n".join(compared_lines(facts)))
    print({k: round(v / 1e6, 2) for k, v in memory["analytic"].items()}, memory["compiled"])
    assert analytic == pytest.approx(compiled, rel=0.10)
    for entry in facts["traffic"]:
        assert entry["compiled"] <= 1.001 * entry["analytic"] + 4096, entry


def test_what_a_cpu_lacks_is_replaced():
    config = run_config(
        hybrid(), plan={"attention": "cudnn", "ssd": "triton", "linear": "fp8"}, compute_dtype="bfloat16"
    )
    found = on_cpu(config)
    assert (found.plan.attention, found.plan.ssd, found.plan.linear) == ("blocked", "chunked", "plain")
    assert found.train.compute_dtype == "float32"
