"""How an inference engine runs: slots, memory, pieces of prompts, speculation and exactness."""

import dataclasses
from typing import Annotated

from orogen.config.checks import check_types, require, require_choice, require_positive

DRAFTERS = ("none", "mtp", "lookup")
DECODED, IN_FP8 = "decoded", "fp8"
# How keys and values are stored: in compute_dtype; in FP8 with the checkpoint's scales; in FP8 with scales of 1.
KEPT, SCALED, UNSCALED = "compute", "fp8", "fp8_unscaled"
STATES = ("float32", "float16", "int8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The capacity of an inference engine, and how it computes. No field changes a model's answers beyond rounding.

    exact: each request is computed by itself in pieces of `chunk` tokens that begin at multiples of `chunk`, and its
    last piece is recomputed for each token. Then an answer is the same to the bit however its prompt is split and
    whatever runs beside it, and its log-probabilities are those of one pass over the whole text in such pieces. This
    needs one device and takes up to `chunk` times the arithmetic.
    drafter: mtp drafts with the model's multi-token-prediction block, lookup with what followed the last tokens earlier
    in the text (prompt lookup decoding). A draft is accepted if it is the token that would have been chosen without it.
    state_dtype: a float16 or int8 state is rounded at the end of each piece of a prompt. How a prompt is split depends
    on the other requests, so answers depend on them by that rounding. Rounded to the nearest, a float16 state can drift
    (experiments/ssm_cache).
    key_values: fp8 is E4M3 with the scales per layer that `orogen quantize` or ModelOpt calibrated (`k_scale`,
    `v_scale`); fp8_unscaled has scales of 1, vLLM's default without them. The layers of a multi-token-prediction block,
    which no checkpoint calibrates, have scales of 1: they draft, and change no answer. Scales are never measured while
    serving: answers would depend on the first request. With kernels='triton' they need a GPU of compute capability 8.9
    or more.
    weights: with kernels='triton', kernels of decoding read FP8 as it lies in memory on such a GPU, which saves memory
    and costs time (experiments/decode_throughput); elsewhere, and for products of many rows, it is decoded in memory.
    """

    slots: Annotated[int, "requests that run at once, over all data ranks"] = 8
    max_length: Annotated[int, "the most tokens of a prompt with its answer"] = 4096
    page: Annotated[int, "tokens per page of keys and values"] = 64
    pages: Annotated[int | None, "pages per data rank; None: enough for max_length tokens in every slot"] = None
    chunk: Annotated[int, "prompts are split, and states kept, at multiples of so many tokens"] = 256
    prefill_tokens: Annotated[int, "the most prompt tokens that a data rank reads before each round of decoding"] = 2048
    steps: Annotated[int, "the most decoding steps per call of a program"] = 16
    snapshots: Annotated[
        int, "copies of the states of layers without pages that the prefix cache holds, per data rank"
    ] = 16
    prefix_cache: Annotated[bool, "whether prefixes of earlier prompts are reused"] = True
    queue: Annotated[int, "requests that may wait; one more is refused"] = 1024
    drafter: Annotated[str, "what drafts the next tokens: none, mtp or lookup"] = "none"
    drafts: Annotated[int, "tokens drafted at a time, if there is a drafter"] = 3
    replay: Annotated[
        int | None, "tokens whose inputs Mamba layers keep beside an older state; None: with drafts at least 16, else 0"
    ] = None
    state_dtype: Annotated[str, "how Mamba's states are kept: float32, float16, or int8 with scales of blocks"] = (
        "float32"
    )
    state_rounding: Annotated[str, "of float16 and int8 states: stochastic, or nearest"] = "stochastic"
    key_values: Annotated[
        str, "how keys and values are kept: compute (in compute_dtype), fp8 (by the checkpoint's scales), fp8_unscaled"
    ] = KEPT
    compute_dtype: Annotated[str, "dtype of activations and weights: float32 or bfloat16"] = "float32"
    weights: Annotated[
        str, "how weights stored in FP8 are held: decoded to the compute dtype, or fp8, decoded where they are read"
    ] = DECODED
    kernels: Annotated[str, "implementation of what only decoding uses: reference, or triton on an NVIDIA GPU"] = (
        "reference"
    )
    written_out: Annotated[bool, "whether layers are unrolled, so that no loop copies weights"] = True
    exact: Annotated[bool, "whether answers are the same to the bit however requests are batched"] = False
    report_experts: Annotated[
        bool, "whether outputs tell the experts of every token; prompts are then read whole, without a prefix cache"
    ] = False
    warm: Annotated[bool | None, "whether a server compiles every program first; None: unless it runs on a CPU"] = None
    seed: Annotated[int, "draws the seeds of requests that give none"] = 0

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(
            self, "slots", "max_length", "page", "pages", "chunk", "prefill_tokens", "steps", "queue", "drafts"
        )
        require(self.snapshots >= 0, self, "snapshots", "0 or more")
        require(self.chunk % self.page == 0, self, "chunk", f"a multiple of page={self.page}")
        require(self.prefill_tokens >= self.chunk, self, "prefill_tokens", f"at least chunk={self.chunk}")
        require_choice(self, "drafter", DRAFTERS)
        require_choice(self, "state_dtype", STATES)
        require_choice(self, "state_rounding", ("stochastic", "nearest"))
        require_choice(self, "key_values", (KEPT, SCALED, UNSCALED))
        require_choice(self, "kernels", ("reference", "triton"))
        in_kernel = self.kernels != "triton" or self.state_dtype == "float32"
        in_kernel |= self.state_rounding == "stochastic"
        kept = f"{self.state_dtype} states and state_rounding {self.state_rounding}"
        expected = f"reference with {kept}: no kernel reads and writes those"
        require(in_kernel, self, "kernels", expected)
        require_choice(self, "weights", (DECODED, IN_FP8))
        require_choice(self, "compute_dtype", ("float32", "bfloat16"))
        short = self.drafter == "none" or self.drafts < self.chunk
        require(short, self, "drafts", f"fewer than chunk={self.chunk}")
        whole = not self.exact or self.prefill_tokens % self.chunk == 0
        require(whole, self, "prefill_tokens", f"a multiple of chunk={self.chunk} where exact is on")
        require(self.replay is None or self.replay >= 0, self, "replay", "None, or 0 or more")
        fed = 1 + (0 if self.drafter == "none" else self.drafts)
        enough = self.replayed >= 2 * fed or (self.replayed == 0 and fed == 1)
        require(enough, self, "replay", f"at least {2 * fed}, twice the tokens of a step")
        require(not self.exact or not self.replayed, self, "replay", "0 where exact is on")
        require(not self.exact or self.drafter == "none", self, "drafter", "none where exact is on")
        told = "False with exact or prefix_cache: a token that is not read, or read again, has no experts to report"
        require(not self.report_experts or not (self.exact or self.prefix_cache), self, "report_experts", told)
        require(0 <= self.seed < 2**63, self, "seed", "a whole number from 0 to 2**63 - 1")

    @property
    def replayed(self) -> int:
        """Tokens whose inputs are kept beside a state: `replay`, or its default."""
        if self.replay is not None:
            return self.replay
        return 0 if self.drafter == "none" else max(16, 2 * (self.drafts + 1))
