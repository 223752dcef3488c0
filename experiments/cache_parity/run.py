"""Answers a prompt in every way that an engine has, and compares each number with the training forward's.

`python experiments/cache_parity/run.py` adds to results.jsonl, beside itself, what is not there yet, and prints the
tables of the README.
"""

import argparse
import hashlib
import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Some hundred programs run a few times each: compiled with less optimisation, the whole takes half as long.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)

import jax
import numpy as np
from flax import nnx

from orogen.checkpoint.open import Opened
from orogen.config.engine import EngineConfig
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.cost.assemble import assemble
from orogen.infer.engine import Engine
from orogen.infer.request import Output, Request, Sampling
from orogen.layers.documents import documents
from orogen.model.lm import initial_state
from orogen.parallel.placement import shardings
from orogen.parallel.runtime import configure

RESULTS = Path(__file__).parent / "results.jsonl"
MODEL = ModelConfig(
    pattern="MmE*w-+/*", mtp_depths=1, vocab_size=20, hidden_size=24, num_attention_heads=4, num_key_value_heads=2,
    head_dim=6, rope_theta=100.0, sliding_window=9, q_lora_rank=6, kv_lora_rank=8, qk_nope_head_dim=3,
    qk_rope_head_dim=4, v_head_dim=5, intermediate_size=14, mamba_num_heads=6, mamba_head_dim=4, n_groups=2,
    mamba_intermediate_size=10, time_step_rank=3, ssm_state_size=7, chunk_size=8, n_routed_experts=6,
    num_experts_per_tok=2, moe_intermediate_size=16, moe_shared_expert_intermediate_size=12,
)  # fmt: skip
PLANS = {
    "one device": PlanConfig(),
    "tensor=2": PlanConfig(tensor=2),
    "data=2, expert=2": PlanConfig(data=2, expert=2, dispatch="alltoall"),
    "data=2, tensor=2, expert=2, fsdp": PlanConfig(data=2, tensor=2, expert=2, fsdp="parameters", dispatch="allgather"),
}
DEVICES = 4
CHUNK, LENGTH, TOKENS = 16, 64, 12
# How prompts are read: in one piece, in pieces of a chunk, or in such pieces after the first, which is cached.
WHOLE = {"chunk": CHUNK, "prefill_tokens": 3 * CHUNK, "prefix_cache": False}
PIECES = {"chunk": CHUNK, "prefill_tokens": CHUNK}
CACHES = {"off": WHOLE, "chunked": PIECES, "prefix hit": PIECES}
DRAFTS = {"off": {}, "on": {"drafter": "mtp", "drafts": 2}}
LENGTHS = {"aligned": 2 * CHUNK, "not aligned": 2 * CHUNK + 5}
BATCHES = "1", "mixed"


class Cell(NamedTuple):
    """One place of the matrix."""

    plan: str
    exact: bool
    cache: str
    mtp: str
    batch: str
    prompt: str


class Answer(NamedTuple):
    """Tokens; and of each, the log-probability of every token in its place, float32 (t, v)."""

    ids: list[int]
    logprobs_tv: np.ndarray


class Model:
    """The model of one plan."""

    def __init__(self, plan: PlanConfig) -> None:
        self.plan, built = assemble(MODEL, plan)
        states = (built.laid(state) for state in initial_state(MODEL, 0))
        params, buffers = (jax.device_put(state, shardings(state, self.plan)) for state in states)
        self.opened = Opened(MODEL, self.plan, built, params, buffers, None)
        self._forward = jax.jit(self._logits)

    def _logits(self, params: Any, buffers: Any, tokens_bt: Any) -> Any:
        model = nnx.merge(self.opened.built.graph, params, buffers)
        return model.logits(tokens_bt, documents(np.ones((1, LENGTH), np.int32)), self.plan)

    def logits_tv(self, text: Sequence[int]) -> np.ndarray:
        """Of a whole text, by the forward that trains."""
        padded_bt = np.array([[*text, *[0] * (LENGTH - len(text))]], np.int32)
        return np.asarray(self._forward(self.opened.params, self.opened.buffers, padded_bt), np.float64)[0]


def random_tokens(seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, MODEL.vocab_size, length).tolist())


def asked(prompt: Sequence[int], tokens: int = TOKENS) -> Request:
    """A greedy request that reports the log-probability of every token."""
    greedy = Sampling(temperature=0.0)
    return Request(prompt=tuple(prompt), max_tokens=tokens, logprobs=MODEL.vocab_size, sampling=greedy)


def others() -> list[Request]:
    """What is answered beside a request in a mixed batch: more than there are slots, of which some leave early."""
    sizes = (13, 8), (16, 3), (15, 8), (16, 5), (14, 8)  # tokens of prompts and answers
    return [asked(random_tokens(7 + n, length), tokens) for n, (length, tokens) in enumerate(sizes)]


def run(engine: Engine, requests: Sequence[Request], salt: str) -> list[list[Output]]:
    """The outputs of each request; only those of one salt share what is cached."""
    found: dict[int, list[Output]] = {engine.submit(request, salt=salt): [] for request in requests}
    while engine.busy:
        for output in engine.step():
            found[output.number].append(output)
    return list(found.values())


def answered(engine: Engine, prompt: tuple[int, ...], cell: Cell) -> tuple[Answer, int]:
    """The answer to a prompt in this cell, and how many of the prompt's tokens were cached."""
    salt = str(cell)
    if cell.cache == "prefix hit":
        run(engine, [asked(prompt[: CHUNK + 1], 1)], salt)
    before, beside = engine.stats.cached_tokens, others() if cell.batch == "mixed" else []
    outputs = run(engine, [*beside[:2], asked(prompt), *beside[2:]], salt)[len(beside[:2])]
    chosen = [token for output in outputs for token in output.tokens]
    logprobs_tv = np.array([[value for _, value in sorted(token.top)] for token in chosen], np.float32)
    return Answer([token.id for token in chosen], logprobs_tv), engine.stats.cached_tokens - before


def compared(reference: Model, prompt: tuple[int, ...], answer: Answer) -> dict[str, Any]:
    """An answer beside the training forward of prompt and answer, on one device: the largest difference of any
    log-probability, and whether each token is the most likely one there."""
    logits_tv = reference.logits_tv((*prompt, *answer.ids))[len(prompt) - 1 :][: len(answer.ids)]
    expected_tv = logits_tv - np.log(np.exp(logits_tv).sum(-1, keepdims=True))
    difference = float(np.abs(answer.logprobs_tv - expected_tv).max())
    return {
        "tokens": len(answer.ids),
        "tokens_equal": answer.ids == logits_tv.argmax(-1).tolist(),
        "largest_difference": difference,
        "of_range": difference / float(np.ptp(logits_tv)),
    }


def measure_engine(model: Model, reference: Model, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One row per cell; all cells have one engine, so that they share its programs. Exact answers have one more field,
    a hash of all log-probabilities' bits."""
    _, exact, cache, drafts, *_ = cells[0]
    config = EngineConfig(
        slots=4, max_length=LENGTH, page=CHUNK, steps=4, exact=exact, snapshots=32, **CACHES[cache], **DRAFTS[drafts]
    )  # fmt: skip
    engine, rows = Engine(model.opened, config), []
    for cell in cells:
        began, prompt = time.perf_counter(), random_tokens(100, LENGTHS[cell.prompt])
        answer, cached = answered(engine, prompt, cell)
        row = cell._asdict() | compared(reference, prompt, answer) | {"cached": cached}
        row |= {"bits": hashlib.sha256(answer.logprobs_tv.tobytes()).hexdigest()} if exact else {}
        rows.append(row | {"seconds": round(time.perf_counter() - began, 2)})
    return rows


def measure(wanted: Sequence[str]) -> None:
    """Writes every row of these plans that is not there yet."""
    models = {name: Model(PLANS[name]) for name in dict.fromkeys(("one device", *wanted))}
    done = {Cell(*(row[field] for field in Cell._fields)) for row in read()}
    # Exact answers have neither drafts nor several devices.
    kinds = [*itertools.product(wanted, (False,), DRAFTS), *[("one device", True, "off")] * ("one device" in wanted)]
    for (plan, exact, drafts), caches in itertools.product(kinds, (("off",), ("chunked", "prefix hit"))):
        cells = [Cell(plan, exact, *rest) for rest in itertools.product(caches, (drafts,), BATCHES, LENGTHS)]
        if done.isdisjoint(cells):
            rows = measure_engine(models[plan], models["one device"], cells)
            with RESULTS.open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))


def read() -> list[dict[str, Any]]:
    """The rows of results.jsonl."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table(rows: Sequence[dict[str, Any]], *, exact: bool) -> str:
    """The largest difference of each cell in units of 1e-6; marked where a token differs or, if exact, the bits do from
    those of the same prompt in the table's first row."""
    kinds = [kind for kind in DRAFTS if not (exact and kind == "on")]
    columns = list(itertools.product(kinds, BATCHES, LENGTHS))
    head = "| plan | cache | " + " | ".join(f"MTP {d}, batch {b}, {p}" for d, b, p in columns) + " |"
    lines, bits = [head, "|---" * (len(columns) + 2) + "|"], {}
    for plan, cache in itertools.product(PLANS, CACHES):
        cells = []
        for drafts, batch, prompt in columns:
            wanted = Cell(plan, exact, cache, drafts, batch, prompt)._asdict()
            for row in (row for row in rows if wanted.items() <= row.items()):
                equal = row["tokens_equal"] and bits.setdefault(prompt, row.get("bits")) == row.get("bits")
                cells.append(f"{1e6 * row['largest_difference']:.2f}" + ("" if equal else " differs"))
        if cells:
            lines.append(f"| {plan} | {cache} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", nargs="*", choices=PLANS, default=list(PLANS), help="names; all unless given")
    options = parser.parse_args()
    configure(DEVICES)
    measure(options.plans)
    print(table(read(), exact=False), table(read(), exact=True), sep="\n\n")


if __name__ == "__main__":
    main()
