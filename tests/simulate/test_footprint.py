"""What a device holds beside its state, counted by hand."""

import pytest
from tests.helpers import hybrid, run_config

from orogen.config.cluster import ClusterConfig
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


def parts(pattern: str, *, batch: int = 2, dtype: str = "float32", vocab: int = 96, **plan) -> dict[str, float]:
    """Of the fullest stage."""
    model = hybrid(pattern=pattern, mtp_depths=0, vocab_size=vocab)
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


def test_rows_wait_where_a_stage_has_experts():
    """One program of all stages has them everywhere; other programs beside their own layers alone."""
    plan = {"data": 2, "expert": 2, "dispatch": "alltoall", "capacity_factor": 1.0, "stage": 2, "microbatches": 2}
    plan |= {"remat": "full", "ssd": "triton", "grouped_matmul": "mosaic"}
    model, here = hybrid(pattern="M|E", mtp_depths=0), Workload(2, 24, 2)
    config = run_config(model, plan=plan, batch_size=8, compute_dtype="bfloat16")
    ours, other = (predict(config, ClusterConfig(software=s)).memory[0].parts for s in ("orogen", "megatron"))
    rows = named_bytes("E", local(model, PlanConfig(**plan), here))["rows"]
    assert ours["temporary"] - other["temporary"] == 2 * rows


@pytest.mark.parametrize("letter", "M-")
def test_a_layer_whose_work_no_kernel_does_has_twice_its_arrays(letter):
    """XLA's own products do an MLP's, which has no further arrays under a plan for a GPU, whichever kernel it names."""
    named = sum(named_bytes(letter, local(hybrid(), PlanConfig(remat="full"), Workload(2, 24, 4))).values())
    loss = 3 * 4 * TOKENS * 96
    assert parts(letter, remat="full")["temporary"] == max(2 * named, loss)
    gpu = parts(letter, remat="full", permutation="triton")["temporary"]
    assert gpu == (max(2 * named, loss) if letter == "M" else KEPT - 4 * TOKENS * D + KEPT / 2 + WEIGHTS)


def test_a_pipeline_copies_residuals_beside_its_slots():
    """Two stages alike: two slots, and half a pass."""
    plan = {"stage": 2, "microbatches": 4, "remat": "paper"}
    here = local(hybrid(), PlanConfig(**plan), Workload(2, 24, 4))
    chunk = sum(sum(kept_bytes(letter, here)[0].values()) for letter in "-*")
    assert parts("-*|-*", batch=8, **plan)["activations"] == 2.5 * chunk


def test_what_cudnn_works_in_is_counted_where_it_is_the_most():
    """Its gradient is the largest part of an attention layer's backward pass; the loss over a wide vocabulary, larger
    than the rest of it, hides a part."""
    plan = {"attention": "cudnn", "remat": "full"}
    narrow, wide = (parts("*", dtype="bfloat16", vocab=vocab, **plan)["workspace"] for vocab in (96, 512))
    here = local(hybrid(), PlanConfig(**plan), Workload(2, 24, 2))
    workspace = costs_of("*").workspace(here)
    assert workspace == 8 * 24 * 4 * max(FEW * 2 * 24, 32 * 12)
    arrays = sum(named_bytes("*", here).values())
    weights = 4 * (2 * D * 24 * 4 + 2 * D * 2 * 4 + D)  # 24 heads of 4 channels, 2 key heads, and the norm
    layer, loss = arrays - 2 * TOKENS * D + arrays / 2 + weights, 3 * 4 * TOKENS * 512
    assert (narrow, wide) == (workspace, workspace + layer - loss)
    assert 0 < wide < narrow
    assert parts("*", dtype="bfloat16", remat="full", attention="blocked")["workspace"] == 0


@pytest.mark.parametrize("remat", ["full", "paper"])
def test_nothing_is_hidden_without_a_pipeline(remat):
    """Its input alone, or all."""
    assert parts("-", remat=remat)["activations"] == (4 * TOKENS * D if remat == "full" else KEPT)
