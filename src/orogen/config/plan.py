"""How a run is laid out over devices, and which implementation of each operation it uses."""

import dataclasses
import math
from typing import Annotated

from orogen.config.checks import check_types, require, require_choice, require_positive
from orogen.config.remat import Remat, check_offload, check_remat, layer_remat

# By operation, the implementation that needs an NVIDIA GPU; and the operations whose GPU kernel lacks float32.
FOR_GPU = {
    "attention": "cudnn",
    "ssd": "triton",
    "causal_conv1d": "triton",
    "rms_norm": "triton",
    "grouped_matmul": "mosaic",
    "permutation": "triton",
    "quantize": "triton",
}
IN_HALF_PRECISION = ("attention", "grouped_matmul")
# How tokens reach their experts, by name: `moe.dispatch` implements these and `cost.dispatches` counts their bytes.
DISPATCHES = ["allgather", "alltoall", "ragged"]
# The plainest implementation of each operation, with which `verify` compares a plan.
PLAINEST = {
    "attention": "full",
    "ssd": "recurrence",
    "selective_scan": "reference",
    "causal_conv1d": "taps",
    "rms_norm": "plain",
    "grouped_matmul": "reference",
    "permutation": "gather",
    "dispatch": "allgather",
    "cross_entropy": "full",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Sizes of the parallel axes, and choices by name that change where and how work is done, not what is computed.

    Dense layers run on stage x data x context x tensor devices; expert layers run on the same devices seen as
    stage x expert_data x expert x expert_tensor (MoE Parallel Folding, arXiv:2504.14960).

    fsdp: dense parameters are sharded over (data, context), experts over expert_data. `optimizer` shards master weights
    and the optimizer's state, and reduce-scatters gradients once per step; `gradients` does so after each microbatch;
    `parameters` also shards the parameters, which are all-gathered layer by layer.
    buffer_factor: a step that overflows the buffers is reported and leaves the state as it was.
    schedule: all microbatches forward first (gpipe), each backward as soon as possible (1f1b), 1f1b with twice as many
    forward passes to warm up (eager_1f1b), which holds up to twice as many microbatches and never runs a forward pass
    beside a longer backward pass, or 1f1b with several chunks of the model on each stage (interleaved). Stages are
    split at the `|` of the pattern, or balanced by FLOPs if it has none; the first stage has the embedding, the last
    one the heads and the MTP block.
    stream: with `whole`, norms and biases are computed on every tensor rank, and outputs of layers are summed over the
    ranks by all-reduce instead of reduce-scatter and all-gather: as many bytes, more activations. Each rank still sends
    its own share of the tokens to routed experts.
    remat: the backward pass recomputes all activations of a layer (full), all except outputs of matrix products and
    fused kernels (elementwise), the large and cheap ones (selective), or those that the formulas of arXiv:2205.05198 do
    not count (paper). Entries choose by name instead, 'name,name' or 'LETTERS:name,name', and take these words too:
    ('M:conv,gated_norm', '*:core', 'E:full'). Layers that no entry mentions recompute nothing. config/remat.py lists
    the names, Megatron's modules among them, and the layers that have them.
    offload, offload_optimizer: refused if the backend has no separate host memory; offload is refused with stages,
    too. A layer with an offloaded activation recomputes all arrays that have no name.
    interleave: one iteration of the loop over microbatches has the passes of so many. They do not depend on each other,
    so XLA can put the exchanges of one beside the computation of another. The model is compiled as often, and the
    activations of as many are held. Several CPU devices run them in turn all the same (train/whole.py).
    linear: fp8 is not used in the first layer, the last layer and the MTP block, nor where the output is too narrow to
    gain. It is the only choice that changes results by more than rounding in the compute dtype.
    unroll: unrolled layers take longer to compile and run faster: a loop copies residuals and gradients into stacks.
    Two repetitions are a tenth faster on CPU and as quick to compile.
    logit_rows: each block of so many tokens adds to the head's whole gradient.
    Implementations: the defaults run on any backend; `orogen.kernels` says which are fast on a GPU.
    """

    # sizes of the parallel axes
    data: Annotated[int, "data-parallel ranks: each takes its share of the batch's sequences"] = 1
    context: Annotated[int, "context-parallel ranks: if there are several, each holds two parts of every sequence"] = 1
    tensor: Annotated[int, "tensor-parallel ranks: they split heads, hidden units, groups and the vocabulary"] = 1
    stream: Annotated[
        str, "what a tensor rank holds between layers: time (its share of the tokens: sequence parallelism) or whole"
    ] = "time"
    stage: Annotated[int, "pipeline stages: each holds segments of the pattern"] = 1
    expert: Annotated[int, "expert-parallel ranks: each holds its share of the routed experts"] = 1
    expert_tensor: Annotated[int, "ranks that split the hidden units of each routed expert"] = 1
    # what is sharded
    fsdp: Annotated[str, "what is sharded: none, optimizer (ZeRO-1), gradients (ZeRO-2) or parameters (ZeRO-3)"] = (
        "none"
    )
    fsdp_size: Annotated[
        int | None, "number of neighbouring ranks of (data, context) that share one copy; None: all"
    ] = None
    # experts
    dispatch: Annotated[
        str, "how tokens reach their experts: allgather, alltoall (padded to capacity) or ragged (no padding)"
    ] = "allgather"
    capacity_factor: Annotated[
        float | None, "most assignments an expert takes per source rank, relative to an even share; None drops nothing"
    ] = None
    drop_policy: Annotated[
        str, "which assignments are kept: the first ones (position), or those of largest weight (probs)"
    ] = "position"
    buffer_factor: Annotated[
        float | None, "most assignments a rank can receive in the ragged dispatch, relative to an even share; None: all"
    ] = None
    # context
    context_attention: Annotated[
        str, "ring, allgather (of keys and values) or alltoall (splits heads instead of the sequence)"
    ] = "ring"
    context_ssm: Annotated[str, "state (passed from rank to rank) or heads (split instead of the sequence)"] = "state"
    shift: Annotated[str, "how arrays are sent from one rank to the next: permute or alltoall"] = "permute"
    # pipeline and microbatches
    schedule: Annotated[str, "the order of a pipeline's passes: gpipe, 1f1b, eager_1f1b or interleaved"] = "1f1b"
    virtual: Annotated[
        int | None, "chunks of the model per stage; None: by the pattern's `|`, else two if interleaved, else one"
    ] = None
    microbatches: Annotated[int, "parts of a batch that are processed one after another"] = 1
    interleave: Annotated[
        int, "so many microbatches may overlap: one computes while another communicates; a divisor of them all"
    ] = 1
    # memory and compilation
    unroll: Annotated[int, "up to this many repetitions of layers are unrolled, not looped over"] = 2
    logit_rows: Annotated[int, "tokens whose logits the chunked loss computes at once on one device"] = 1024
    remat: Annotated[
        str | tuple[str, ...],
        "what the backward pass recomputes: none, full, elementwise, selective, paper, or names by letter",
    ] = "none"
    offload: Annotated[
        tuple[str, ...], "names of activations that are kept in the host's memory until the backward pass"
    ] = ()
    offload_optimizer: Annotated[bool, "whether the optimizer's state lives in the host's memory between updates"] = (
        False
    )
    # implementations
    linear: Annotated[str, "dense products in the compute dtype (plain), or with operands rounded to 8 bits (fp8)"] = (
        "plain"
    )
    attention: Annotated[str, "full (all scores at once), blocked or cudnn"] = "full"
    ssd: Annotated[str, "recurrence (token by token), chunked or triton"] = "chunked"
    selective_scan: Annotated[str, "reference (token by token) or chunked"] = "chunked"
    causal_conv1d: Annotated[str, "taps (a sum of shifted products) or triton"] = "taps"
    rms_norm: Annotated[str, "plain or triton, for the gated norm too"] = "plain"
    grouped_matmul: Annotated[
        str, "reference, blocks, ragged_dot, mosaic; for few tokens small_blocks, triton_small"
    ] = "blocks"
    permutation: Annotated[str, "how tokens are permuted to their experts and back: gather or triton"] = "gather"
    quantize: Annotated[str, "what rounds the operands of fp8: plain or triton"] = "plain"
    cross_entropy: Annotated[str, "full (all logits at once) or chunked"] = "chunked"

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, "data", "context", "tensor", "stage", "expert", "expert_tensor", "microbatches")
        require_positive(self, "unroll", "logit_rows", "interleave")
        require_positive(self, "fsdp_size", "capacity_factor", "buffer_factor")
        require_choice(self, "stream", ("time", "whole"))
        require_choice(self, "schedule", ("gpipe", "1f1b", "eager_1f1b", "interleaved"))
        require_positive(self, "virtual")
        several = self.virtual is None or self.virtual == 1 or self.schedule == "interleaved"
        require(several, self, "virtual", f"1 or None where schedule is {self.schedule}")
        require(
            self.stage == 1 or not self.offload,
            self,
            "offload",
            "() where stage is above 1: the stash stays on the device",
        )
        waits = self.stage > 1 and self.context > 1 and self.shift == "permute"
        require(not waits, self, "shift", "alltoall where stage and context are above 1: stages do not shift together")
        require_choice(self, "fsdp", ("none", "optimizer", "gradients", "parameters"))
        require(self.fsdp_size is None or self.fsdp != "none", self, "fsdp_size", "None where fsdp is none")
        require_choice(self, "dispatch", DISPATCHES)
        ragged = self.buffer_factor is None or self.dispatch == "ragged"
        require(ragged, self, "buffer_factor", "None where dispatch is not ragged")
        require_choice(self, "drop_policy", ("position", "probs"))
        require_choice(self, "context_attention", ("ring", "allgather", "alltoall"))
        require_choice(self, "context_ssm", ("state", "heads"))
        require_choice(self, "shift", ("permute", "alltoall"))
        check_remat(self.remat)
        check_offload(self.offload)
        object.__setattr__(self, "offload", tuple(self.offload))
        require_choice(self, "linear", ("plain", "fp8"))
        require_choice(self, "attention", ("full", "blocked", "cudnn"))
        require_choice(self, "ssd", ("recurrence", "chunked", "triton"))
        require_choice(self, "causal_conv1d", ("taps", "triton"))
        require_choice(self, "rms_norm", ("plain", "triton"))
        require_choice(self, "permutation", ("gather", "triton"))
        require_choice(self, "quantize", ("plain", "triton"))
        require_choice(self, "selective_scan", ("reference", "chunked"))
        require_choice(
            self, "grouped_matmul", ("reference", "blocks", "small_blocks", "ragged_dot", "mosaic", "triton_small")
        )
        require_choice(self, "cross_entropy", ("full", "chunked"))
        if not isinstance(self.remat, str):
            object.__setattr__(self, "remat", tuple(self.remat))  # gin may give a list

    def require_half_precision(self, dtype: str) -> None:
        """Raises ConfigError if `dtype` is float32 and a kernel was chosen that lacks it."""
        for field in IN_HALF_PRECISION:
            fits = dtype != "float32" or getattr(self, field) != FOR_GPU[field]
            require(fits, self, field, "another kernel for computation in float32")

    def layer_remat(self, letter: str) -> Remat:
        """What layers of `letter` recompute."""
        return layer_remat(self.remat, self.offload, letter)

    def dropping_none(self) -> "PlanConfig":
        """The plan with room for every token, for evaluation and inference."""
        return dataclasses.replace(self, capacity_factor=None, buffer_factor=None, dispatch="allgather")

    def evaluating(self) -> "PlanConfig":
        """The plan for forward passes alone: nothing is dropped, and one microbatch unless stages need several."""
        return dataclasses.replace(self.dropping_none(), microbatches=self.microbatches if self.stage > 1 else 1)

    def plainest(self) -> "PlanConfig":
        """The plan with the plainest implementation of each operation, one microbatch, and nothing recomputed, unrolled
        or offloaded. Its capacity stays."""
        plain = {
            "linear": "plain",
            "quantize": "plain",
            "microbatches": 1,
            "unroll": 1,
            "interleave": 1,
            "remat": "none",
        }
        return dataclasses.replace(self, **PLAINEST, **plain, offload=(), offload_optimizer=False, buffer_factor=None)

    @property
    def devices(self) -> int:
        """How many devices the plan runs on."""
        return self.stage * self.data * self.context * self.tensor

    @property
    def overlapping(self) -> int:
        """How many microbatches one iteration of the loop over them has."""
        return min(self.interleave, self.microbatches)

    def vocab_rows(self, vocab_size: int) -> int:
        """Rows of embedding and head: those of the vocabulary, padded to a multiple of `tensor`."""
        return -(-vocab_size // self.tensor) * self.tensor

    def sequence_pieces(self, *, routed: bool) -> int:
        """A context rank's share of the sequence must be a multiple of this: one piece per tensor rank (unless each
        holds the whole stream and no tokens are `routed` to experts), and two equal parts if there are several context
        ranks."""
        shared = 1 if self.stream == "whole" and not routed else self.tensor
        return math.lcm(2, shared) if self.context > 1 else shared
