"""What a layer keeps by formula is what its trace keeps, by name."""

from dataclasses import replace

import jax
import pytest
from tests.helpers import hybrid

from orogen.config.plan import FOR_GPU, PlanConfig
from orogen.cost.activations import WEIGHTS, bytes_by_name, kept_by_layer
from orogen.cost.dispatches import expert_rows
from orogen.cost.kept import kept_bytes
from orogen.cost.kind import costs_of
from orogen.cost.kinds import mamba2
from orogen.cost.kinds.attention import FEW, RUNS
from orogen.cost.ledger import Workload
from orogen.cost.local import local
from orogen.kernels.attention import cudnn
from orogen.kernels.grouped_matmul import mosaic
from orogen.kernels.ssd import triton
from orogen.parallel.plan import make_plan

MODEL = hybrid(
    pattern="ME*-m+", mtp_depths=0, mamba_num_heads=12, mamba_head_dim=10, ssm_state_size=7, num_attention_heads=6,
    head_dim=14, hidden_size=52, intermediate_size=74, moe_intermediate_size=22, moe_latent_size=18,
    moe_shared_expert_intermediate_size=34, mamba_intermediate_size=46, time_step_rank=3, q_lora_rank=11,
    kv_lora_rank=7, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=3, rope_theta=1e4,
)  # fmt: skip
WORK = Workload(2, 32, 2)
ROUTING = 0.03  # of an expert layer's bytes: groups of rows and counts, which the formula leaves out


def traced(letter: str, plan: PlanConfig, model=MODEL) -> dict[str, int]:
    """Bytes by name from the trace."""
    found = bytes_by_name(kept_by_layer(letter, model, make_plan(plan, model, abstract=True), WORK, dtype="bfloat16"))
    found.pop(WEIGHTS, None)
    return found


@pytest.mark.parametrize(
    "plan",
    [
        {"remat": "paper"},
        {"remat": "selective"},
        {"tensor": 2, "data": 2, "expert": 2, "dispatch": "alltoall", "capacity_factor": 1.5, "remat": "paper"},
        {"data": 2, "expert": 2, "dispatch": "ragged", "buffer_factor": 1.5, "remat": "paper"},
        {"tensor": 2, "stream": "whole", "remat": "paper"},
    ],
    ids=lambda plan: "-".join(map(str, plan.values())),
)
def test_named_arrays_are_exact(plan):
    sizes = PlanConfig(**plan)
    for letter in "ME*-":
        by_trace, (by_formula, host) = traced(letter, sizes), kept_bytes(letter, local(MODEL, sizes, WORK))
        for found in (by_trace, by_formula):
            found.pop("routing", None)
        assert by_formula == by_trace, letter
        assert host == 0


@pytest.mark.parametrize("letter", "m+")
def test_mamba1_and_latent_attention_keep_their_names(letter):
    sizes = PlanConfig(remat="paper")
    assert kept_bytes(letter, local(MODEL, sizes, WORK))[0] == traced(letter, sizes)


@pytest.mark.parametrize(("letter", "tolerance"), [("M", 0.01), ("E", 0.03), ("*", 0.12), ("-", 0.0), ("m", 0.05)])
@pytest.mark.parametrize("remat", ["none", "elementwise", "full"])
def test_the_sum_without_names_is_close(letter, tolerance, remat):
    """Without remat autodiff also keeps masks and positions of documents."""
    sizes = PlanConfig(remat=remat)
    by_trace = sum(traced(letter, sizes).values())
    by_formula = sum(kept_bytes(letter, local(MODEL, sizes, WORK))[0].values())
    assert by_formula == pytest.approx(by_trace, rel=tolerance)


def test_what_is_offloaded_is_on_the_host():
    sizes = PlanConfig(remat="paper", offload=("up",))
    held, host = kept_bytes("-", local(MODEL, sizes, WORK))
    assert host == 2 * 74 * 64 and "up" not in held and held["activation"] == 2 * 74 * 64


def test_rows_of_experts_by_hand():
    """64 tokens with 3 of 24 experts each, on four expert ranks: 192 assignments are an even share."""

    def of(*, dynamic: bool = False, **plan):
        sizes = PlanConfig(expert=4, data=4, **plan)
        return expert_rows(local(MODEL, sizes, WORK, dynamic=dynamic, imbalance=1.25))

    assert of(dispatch="ragged", dynamic=True) == (240, 240, 192)
    assert of(dispatch="ragged") == (240, 64 * 4 * 3, 192)
    assert of(dispatch="ragged", buffer_factor=1.5) == (240, 288, 192)
    assert of(dispatch="ragged", buffer_factor=1.0) == (192, 192, 192)
    assert of(dispatch="alltoall", capacity_factor=1.5) == (24 * 12,) * 3
    assert of(dispatch="alltoall") == (24 * 64,) * 3
    assert of(dispatch="allgather") == (240, 64 * 4 * 3, 64 * 4 * 3)


def test_dynamic_buffers_keep_the_rows_of_the_busiest_rank():
    """As above: 240 rows of 18 latent numbers and of 22 hidden ones, of 2 bytes each."""
    sizes = PlanConfig(expert=4, data=4, dispatch="ragged", remat="none")
    held, _ = kept_bytes("E", local(MODEL, sizes, WORK, dynamic=True, imbalance=1.25))
    assert (held["rows"], held["expert_activation"]) == (240 * 18 * 2, 240 * 22 * 2)


# On a GPU: sizes that its kernels take as they are (of experts' columns, multiples of 128), but for a chunk of the SSD,
# which is rounded up to a power of two.
FUSED = hybrid(
    pattern="ME*-", mtp_depths=0, mamba_num_heads=12, mamba_head_dim=16, ssm_state_size=32, chunk_size=24,
    num_attention_heads=6, head_dim=16, hidden_size=64, intermediate_size=80, moe_intermediate_size=128,
    moe_latent_size=128, moe_shared_expert_intermediate_size=48,
)  # fmt: skip
KERNELS = {field: kernel for field, kernel in FOR_GPU.items() if field != "quantize"}
if jax.__version_info__ < (0, 11):
    KERNELS["grouped_matmul"] = "blocks"  # the Mosaic kernels need jax 0.11


@pytest.fixture
def gpu(monkeypatch):
    """What is traced is for a GPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(mosaic, "_require_hopper", lambda: None)
    monkeypatch.setattr(cudnn.cudnn, "check_cudnn_version", lambda *_: 91400)
    monkeypatch.setattr(cudnn.cudnn, "check_compute_capability", lambda *_: True)


@pytest.mark.parametrize("remat", ["elementwise", "paper", "selective"])
def test_what_kernels_of_a_gpu_keep(remat, gpu):
    """As traced for one: an output of a kernel is kept by name, or with all that `elementwise` keeps."""
    sizes = PlanConfig(remat=remat, **KERNELS)
    for letter in "ME*-":
        found = traced(letter, sizes, FUSED)
        if jax.__version_info__ < (0, 11):
            # Kept there for the kernel that permutes rows, whose gradient does not read it.
            found.pop("latent", None)
        by_trace = sum(found.values())
        by_formula = sum(kept_bytes(letter, local(FUSED, sizes, WORK))[0].values())
        assert by_formula == pytest.approx(by_trace, rel=ROUTING), letter


@pytest.mark.parametrize("norm", ["rms", "rms_cast_first", "layer"])
@pytest.mark.parametrize("letter", "M*+")
def test_norms_that_a_kernel_computes_are_kept(letter, norm, gpu):
    """Of the residual stream, of queries and keys, and of latent vectors, if it is the model's kind of norm; Mamba-2's
    gated one always."""
    latent = {"q_lora_rank": 16, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32}
    changed = {"qk_norm": True} if letter == "*" else {"rope_theta": 1e4, **latent} if letter == "+" else {}
    model = replace(FUSED, pattern=letter, norm=norm, moe_latent_size=None, **changed)
    sizes = PlanConfig(remat="elementwise", **KERNELS)
    by_trace = sum(traced(letter, sizes, model).values())
    assert sum(kept_bytes(letter, local(model, sizes, WORK))[0].values()) == by_trace


@pytest.mark.parametrize("context_attention", ["ring", "allgather", "alltoall"])
@pytest.mark.parametrize("attention", ["cudnn", "blocked", "full"])
def test_attention_over_context_ranks_keeps_its_names(attention, context_attention, gpu):
    sizes = PlanConfig(remat="paper", attention=attention, context=2, context_attention=context_attention)
    assert kept_bytes("*", local(FUSED, sizes, WORK))[0] == traced("*", sizes, FUSED)


def test_chunks_of_the_fused_ssd_are_the_kernels():
    names = ("SMALLEST_TILE", "LONGEST_CHUNK", "LARGEST_CHUNK")
    assert [getattr(mamba2, name) for name in names] == [getattr(triton, name) for name in names]


def test_states_of_the_fused_ssd_by_hand():
    """Two rows of 32 tokens in one chunk of 32 each, 12 heads of 16 channels with 32 states, in bfloat16."""
    held, _ = kept_bytes("M", local(FUSED, PlanConfig(ssd="triton", remat="paper"), WORK))
    assert held["ssd_states"] == 2 * 12 * 16 * 32 * 2
    plain, _ = kept_bytes("M", local(FUSED, PlanConfig(remat="paper"), WORK))
    assert plain["ssd_states"] == 2 * 2 * 12 * 16 * 32 * 4


def test_workspaces_of_attention_by_hand():
    """Six heads of 16 channels with two key heads: 8 bytes per number and document."""
    assert (FEW, RUNS) == (cudnn.FEW, cudnn.RUNS)
    of = lambda rows, **plan: costs_of("*").workspace(local(FUSED, PlanConfig(**plan), Workload(rows, 32, 2)))  # noqa: E731
    assert of(1, attention="cudnn") == 8 * 32 * 16 * RUNS * 3  # one row and key head at a time
    assert of(4, attention="cudnn") == 8 * 32 * 16 * FEW * 4 * 6  # a whole batch
    assert of(4, attention="cudnn", tensor=2) == 8 * 32 * 16 * FEW * 4 * 3
    assert of(4, attention="cudnn", context=2) == 8 * 32 * 16 * 4 * 6  # no packed form
    # Rows of 64 tokens, of which each rank has three heads with one key head.
    by_heads = {"attention": "cudnn", "context": 2, "context_attention": "alltoall"}
    assert of(1, **by_heads) == 8 * 64 * 16 * RUNS * 3
    assert of(4, **by_heads) == 8 * 64 * 16 * FEW * 4 * 3
    assert of(4, attention="blocked") == 0


def test_programs_that_see_the_documents_have_no_room_for_more():
    """They choose a form of cuDNN's attention by the documents: one log-sum-exp per token and head."""
    here = local(FUSED, PlanConfig(attention="cudnn"), WORK, dynamic=True)
    assert costs_of("*").workspace(here) == 0
    assert costs_of("*").kept(here)["attention"] == 64 * (6 * 16 * 2 + 6 * 4)
