"""How a run is laid out over devices, and which implementation of each operation it uses."""

import dataclasses
import math

from orogen.config.checks import check_types, require, require_choice, require_positive
from orogen.config.remat import Remat, check_offload, check_remat, layer_remat

# Of each operation the implementation that needs an NVIDIA GPU; and the operations of which it takes no float32.
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
# Of each operation the plainest implementation, which `verify` holds a plan against.
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
    """Sizes of the parallel axes and the named choices that change where work happens, never what is computed.

    Dense layers run on stage x data x context x tensor devices; expert layers run on the same devices seen as
    stage x expert_data x expert x expert_tensor (MoE Parallel Folding, arXiv:2504.14960).

    fsdp: what is sharded over (data, context), experts over expert_data: nothing; master weights and optimizer state,
    whose gradients are scattered once a step (ZeRO-1); gradients as well, scattered after each microbatch (ZeRO-2); or
    the parameters too, gathered layer by layer (ZeRO-3). fsdp_size: over how many neighbours of (data, context), each
    such group holding a whole copy; None is all of them.
    dispatch: how tokens reach their experts. capacity_factor: rows an expert takes from one rank, relative to an even
    share; None drops nothing. drop_policy: which assignments stay where there are more, those first in the sequence
    (position) or with the largest weights (probs). buffer_factor: rows that a rank has room for in the ragged dispatch,
    relative to an even share; None is enough for any routing. A step that needs more is reported and changes nothing.
    context_attention: ring passes keys and values from rank to rank, allgather gathers them, alltoall exchanges the
    sequence for heads. context_ssm: state passes states from rank to rank, heads exchanges the sequence for heads.
    shift: how arrays go from one rank to the next. microbatches: how many parts a batch is taken in.
    schedule: the order in which stages take microbatches forward and backward: all forward first (gpipe), each backward
    as soon as it can be (1f1b), or that with several chunks of the model on each stage (interleaved). virtual: how many
    chunks; None is as many as the | of the pattern make, or without any two if interleaved, else one.
    remat: which activations are recomputed in the backward pass: none, all of a layer's (full), those that no matrix
    product or fused kernel makes (elementwise), those large and cheap (selective), those that the formulas of
    arXiv:2205.05198 do not count (paper); or entries that choose by name, 'name,name' or 'LETTERS:name,name', in which
    one of these words may stand as well: ('M:conv,gated_norm', '*:core', 'E:full'). Layers that no entry mentions
    recompute nothing. config/remat.py has the names, and which layers have them. offload: names of activations that
    wait in the host's memory for the backward pass; of a layer that has one, what no name stands for is recomputed.
    offload_optimizer: whether the optimizer's state lives there, and visits the device for each update.
    linear: dense layers' products in the dtype of computation (plain), or of operands rounded to 8 bits (fp8; not in
    the model's first and last layer, nor where the result is too narrow to gain). It alone changes results by more than
    rounding in the dtype of computation. quantize: what rounds the operands.
    unroll: repetitions of layers up to this many are written out, not looped over, which takes longer to compile and
    runs faster: a loop copies what it keeps for the backward pass, and gradients, into stacks. Two are a tenth faster
    on CPU and as quick to compile. logit_rows: how many tokens' logits the chunked loss makes at once on one device;
    each time it adds to the head's whole gradient.
    """

    data: int = 1
    context: int = 1
    tensor: int = 1
    stage: int = 1
    expert: int = 1
    expert_tensor: int = 1
    fsdp: str = "none"
    fsdp_size: int | None = None
    dispatch: str = "allgather"
    capacity_factor: float | None = None
    drop_policy: str = "position"
    buffer_factor: float | None = None
    context_attention: str = "ring"
    context_ssm: str = "state"
    shift: str = "permute"
    schedule: str = "1f1b"
    virtual: int | None = None
    microbatches: int = 1
    unroll: int = 2
    logit_rows: int = 1024
    remat: str | tuple[str, ...] = "none"
    offload: tuple[str, ...] = ()
    offload_optimizer: bool = False
    linear: str = "plain"
    attention: str = "full"
    ssd: str = "chunked"
    selective_scan: str = "chunked"
    causal_conv1d: str = "taps"
    rms_norm: str = "plain"
    grouped_matmul: str = "blocks"
    permutation: str = "gather"
    quantize: str = "plain"
    cross_entropy: str = "chunked"

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, "data", "context", "tensor", "stage", "expert", "expert_tensor", "microbatches")
        require_positive(self, "unroll", "logit_rows")
        require_positive(self, "fsdp_size", "capacity_factor", "buffer_factor")
        require_choice(self, "schedule", ("gpipe", "1f1b", "interleaved"))
        require_positive(self, "virtual")
        several = self.virtual is None or self.virtual == 1 or self.schedule == "interleaved"
        require(several, self, "virtual", f"1 or None where schedule is {self.schedule}")
        require(
            self.stage == 1 or not self.offload, self, "offload", "() where stage is above 1: the stash stays there"
        )
        waits = self.stage > 1 and self.context > 1 and self.shift == "permute"
        require(not waits, self, "shift", "alltoall where stage and context are above 1: stages do not shift together")
        require_choice(self, "fsdp", ("none", "optimizer", "gradients", "parameters"))
        require(self.fsdp_size is None or self.fsdp != "none", self, "fsdp_size", "None where fsdp is none")
        require_choice(self, "dispatch", ("allgather", "alltoall", "ragged"))
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
        whole = self.context == 1 or self.context_attention == "alltoall"
        expected = f"full or blocked where context is {self.context} and context_attention {self.context_attention}"
        require(whole or self.attention != "cudnn", self, "attention", expected)
        require_choice(self, "ssd", ("recurrence", "chunked", "triton"))
        require_choice(self, "causal_conv1d", ("taps", "triton"))
        require_choice(self, "rms_norm", ("plain", "triton"))
        require_choice(self, "permutation", ("gather", "triton"))
        require_choice(self, "quantize", ("plain", "triton"))
        require_choice(self, "selective_scan", ("reference", "chunked"))
        require_choice(self, "grouped_matmul", ("reference", "blocks", "ragged_dot", "mosaic"))
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
        """The plan with room for every token, as evaluation and inference have it."""
        return dataclasses.replace(self, capacity_factor=None, buffer_factor=None, dispatch="allgather")

    def plainest(self) -> "PlanConfig":
        """The plan with the plainest implementation of each operation, one batch, and nothing recomputed, written out
        or kept elsewhere. What it drops stays."""
        plain = {"linear": "plain", "quantize": "plain", "microbatches": 1, "unroll": 1, "remat": "none", "offload": ()}
        return dataclasses.replace(self, **PLAINEST, **plain, offload_optimizer=False, buffer_factor=None)

    @property
    def devices(self) -> int:
        """How many devices the plan runs on."""
        return self.stage * self.data * self.context * self.tensor

    def vocab_rows(self, vocab_size: int) -> int:
        """Rows of embedding and head: those of the vocabulary, filled up to a multiple of `tensor`."""
        return -(-vocab_size // self.tensor) * self.tensor

    @property
    def sequence_pieces(self) -> int:
        """What a context rank's share of the sequence must be a multiple of: one piece a tensor rank, and two equal
        parts if there are several context ranks."""
        return math.lcm(2, self.tensor) if self.context > 1 else self.tensor
