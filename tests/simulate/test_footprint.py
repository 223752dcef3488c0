"""What a device holds beside its state, counted by hand."""

import pytest
from tests.helpers import hybrid, run_config

from orogen.config.plan import PlanConfig
from orogen.cost.kept import kept_bytes, named_bytes
from orogen.cost.kind import costs_of
from orogen.cost.kinds.attention import FEW
from orogen.cost.ledger import Workload
from orogen.cost.local import local
from orogen.simulate.predict import predict

D, F, TOKENS = 48, 72, 2 * 24
KEPT = 4 * TOKENS * (2 * D + 2 * F)  # input, norm, hidden units before and after their activation
WEIGHTS = 4 * (2 * D * F + D)


def parts(pattern: str, *, batch: int = 2, dtype: str = "float32", **plan) -> dict[str, float]:
    """Of the fullest stage."""
    model = hybrid(pattern=pattern, mtp_depths=0)
    config = run_config(model, plan=plan, batch_size=batch, compute_dtype=dtype)
    return dict(max(predict(config).memory, key=lambda stage: stage.total).parts)


def test_a_backward_pass_holds_what_it_recomputes_and_gradients():
    """Half of the arrays' gradients, and those of the layer's weights in float32."""
    recomputed, loss = KEPT - 4 * TOKENS * D, 3 * 4 * TOKENS * 96
    assert parts("-", remat="full", rms_norm="triton")["temporary"] == recomputed + KEPT / 2 + WEIGHTS
    assert parts("-", remat="paper", rms_norm="triton")["temporary"] == max(KEPT / 2 + WEIGHTS, loss)


def test_rows_of_experts_wait_at_both_ends_of_an_exchange():
    plan = {"data": 2, "expert": 2, "dispatch": "alltoall", "capacity_factor": 1.0, "remat": "full"}
    plan |= {"grouped_matmul": "mosaic"}
    rows = named_bytes("E", local(hybrid(), PlanConfig(**plan), Workload(1, 24, 2)))["rows"]
    sent, alone = (parts("E", dtype="bfloat16", **plan | {"expert": ranks}) for ranks in (2, 1))
    experts = 24 // 2 * 2 * 24 * 20 * 4  # the other half of the experts, whose gradients lie here too
    assert sent["temporary"] - alone["temporary"] == 2 * rows - experts


def test_without_a_kernel_a_layer_has_twice_its_arrays():
    named = sum(named_bytes("M", local(hybrid(), PlanConfig(remat="full"), Workload(2, 24, 4))).values())
    assert parts("M", remat="full")["temporary"] == 2 * named


def test_a_pipeline_copies_residuals_beside_its_slots():
    """Two stages alike: two slots, and half a pass."""
    plan = {"stage": 2, "microbatches": 4, "remat": "paper"}
    here = local(hybrid(), PlanConfig(**plan), Workload(2, 24, 4))
    chunk = sum(sum(kept_bytes(letter, here)[0].values()) for letter in "-*")
    assert parts("-*|-*", batch=8, **plan)["activations"] == 2.5 * chunk


def test_what_cudnn_works_in_is_counted_where_it_is_the_most():
    """Its gradient is the largest part of an attention layer's backward pass; with a wide vocabulary the loss hides a
    part of it."""
    plan = {"attention": "cudnn", "remat": "full"}
    found = parts("*", dtype="bfloat16", **plan)
    here = local(hybrid(), PlanConfig(**plan), Workload(2, 24, 2))
    workspace = costs_of("*").workspace(here)
    assert workspace == 8 * 24 * 4 * max(FEW * 2 * 24, 32 * 12)
    assert 0 < found["workspace"] <= workspace
    assert parts("*", dtype="bfloat16", remat="full", attention="blocked")["workspace"] == 0


@pytest.mark.parametrize("remat", ["full", "paper"])
def test_nothing_is_hidden_without_a_pipeline(remat):
    kept = sum(kept_bytes("-", local(hybrid(), PlanConfig(remat=remat), Workload(2, 24, 4)))[0].values())
    assert parts("-", remat=remat)["activations"] == kept
