"""How a run is laid out over devices, and which implementation of each operation it uses."""

import dataclasses

from orogen.config.checks import check_types, require, require_choice, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Sizes of the parallel axes and the named choices that change where work happens, never what is computed.

    Dense layers run on stage x data x context x tensor devices; expert layers on the same devices seen as
    stage x expert_data x expert x expert_tensor (MoE Parallel Folding, arXiv:2504.14960).

    fsdp: what is sharded over (data, context): nothing, master weights and optimizer state (ZeRO-1), or the
    parameters as well, gathered layer by layer (ZeRO-3). microbatches: how many parts a batch is taken in.
    capacity_factor: rows an expert takes from one rank, relative to an even share; None drops nothing.
    remat: which activations are recomputed in the backward pass: none, or all of a layer's.
    """

    data: int = 1
    context: int = 1
    tensor: int = 1
    stage: int = 1
    expert: int = 1
    expert_tensor: int = 1
    fsdp: str = "none"
    dispatch: str = "allgather"
    capacity_factor: float | None = None
    microbatches: int = 1
    remat: str = "none"
    attention: str = "full"
    ssd: str = "chunked"
    selective_scan: str = "chunked"
    grouped_matmul: str = "blocks"
    cross_entropy: str = "chunked"

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(
            self, "data", "context", "tensor", "stage", "expert", "expert_tensor", "microbatches", "capacity_factor"
        )
        for field in ("context", "stage", "expert_tensor"):
            require(getattr(self, field) == 1, self, field, "1: parallelism over this axis is not available yet")
        require_choice(self, "fsdp", ("none", "optimizer", "parameters"))
        require_choice(self, "dispatch", ("allgather", "alltoall"))
        require_choice(self, "remat", ("none", "full"))
        require_choice(self, "attention", ("full", "blocked"))
        require_choice(self, "ssd", ("recurrence", "chunked", "triton"))
        require_choice(self, "selective_scan", ("reference", "chunked"))
        require_choice(self, "grouped_matmul", ("reference", "blocks", "ragged_dot"))
        require_choice(self, "cross_entropy", ("full", "chunked"))

    @property
    def devices(self) -> int:
        """How many devices the plan runs on."""
        return self.stage * self.data * self.context * self.tensor
