"""How an inference engine runs: slots, memory, pieces of prompts, speculation and exactness."""

import dataclasses
from typing import Annotated

from orogen.config.checks import check_types, require, require_choice, require_positive

DRAFTERS = ("none", "mtp", "lookup")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine has room for, and how it works. None of it changes what a model answers beyond rounding.

    exact: prompts and answers are computed row by row in pieces of `chunk` tokens that begin at its multiples, the last
    one anew for each token. Then an answer depends, to the bit, neither on how its prompt was cut nor on what runs
    beside it, and its log-probabilities are those of the whole text in one pass of such pieces. It takes one device,
    and up to `chunk` times the arithmetic.
    drafter: mtp drafts with the model's multi-token-prediction block, lookup with what followed the last tokens earlier
    in the text (prompt lookup decoding). A draft is kept where it is the token that would have been chosen without it.
    state_dtype: a float16 state is rounded where a piece of a prompt ends, and pieces depend on what else is read, so
    that answers depend on it by that rounding.
    """

    slots: Annotated[int, "requests that run at a time, over all data ranks"] = 8
    max_length: Annotated[int, "most tokens of a prompt and its answer"] = 4096
    page: Annotated[int, "tokens of a page of keys and values"] = 64
    pages: Annotated[int | None, "pages per data rank; None: enough for every slot at its longest"] = None
    chunk: Annotated[int, "tokens between the places where prompts may be cut and states are kept"] = 256
    prefill_tokens: Annotated[int, "most tokens of prompts that a data rank reads before each round of decoding"] = 2048
    steps: Annotated[int, "most steps of decoding in one program"] = 16
    snapshots: Annotated[int, "states of layers without pages that the prefix cache holds per data rank"] = 16
    prefix_cache: Annotated[bool, "whether beginnings of earlier prompts are used again"] = True
    queue: Annotated[int, "requests that may wait; one more is refused"] = 1024
    drafter: Annotated[str, "what drafts the next tokens: none, mtp or lookup"] = "none"
    drafts: Annotated[int, "tokens that are drafted at a time, where something drafts"] = 3
    replay: Annotated[
        int | None, "tokens whose inputs Mamba's layers keep beside an older state; None: 16 with drafts, else 0"
    ] = None
    state_dtype: Annotated[str, "dtype of Mamba's states: float32, or float16, rounded at random"] = "float32"
    compute_dtype: Annotated[str, "dtype of activations, weights and keys and values: float32 or bfloat16"] = "float32"
    kernels: Annotated[str, "those that only decoding uses: reference, or triton on an NVIDIA GPU"] = "reference"
    written_out: Annotated[bool, "whether each layer is compiled for itself, so that no loop copies weights"] = True
    exact: Annotated[bool, "whether answers are the same to the bit however they are computed"] = False
    seed: Annotated[int, "draws the seeds of requests that name none"] = 0

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(
            self, "slots", "max_length", "page", "pages", "chunk", "prefill_tokens", "steps", "queue", "drafts"
        )
        require(self.snapshots >= 0, self, "snapshots", "0 or more")
        require(self.chunk % self.page == 0, self, "chunk", f"a multiple of page={self.page}")
        require(self.prefill_tokens >= self.chunk, self, "prefill_tokens", f"at least chunk={self.chunk}")
        require_choice(self, "drafter", DRAFTERS)
        require_choice(self, "state_dtype", ("float32", "float16"))
        require_choice(self, "kernels", ("reference", "triton"))
        require_choice(self, "compute_dtype", ("float32", "bfloat16"))
        short = self.drafter == "none" or self.drafts < self.chunk
        require(short, self, "drafts", f"fewer than chunk={self.chunk}")
        whole = not self.exact or self.prefill_tokens % self.chunk == 0
        require(whole, self, "prefill_tokens", f"a multiple of chunk={self.chunk} where exact is on")
        require(self.replay is None or self.replay >= 0, self, "replay", "None, or 0 or more")
        fed = 1 + (0 if self.drafter == "none" else self.drafts)
        enough = self.replayed >= 2 * fed or (self.replayed == 0 and fed == 1)
        require(enough, self, "replay", f"at least {2 * fed}, twice what a step reads")
        require(not self.exact or not self.replayed, self, "replay", "0 where exact is on")
        require(not self.exact or self.drafter == "none", self, "drafter", "none where exact is on")
        require(0 <= self.seed < 2**63, self, "seed", "a whole number from 0 to 2**63 - 1")

    @property
    def replayed(self) -> int:
        """Tokens whose inputs are kept beside a state."""
        if self.replay is not None:
            return self.replay
        return 0 if self.drafter == "none" else max(16, 2 * (self.drafts + 1))
