"""Answers one prompt in every way that an engine has, and compares each number with the training forward's.

`python experiments/cache_parity/run.py` writes results.jsonl and table.md beside itself.
"""

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Some 200 programs run a few times each: less optimisation makes the whole much faster.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

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

FOLDER = Path(__file__).parent
SEEDS = (0, 1, 2)
MODEL = ModelConfig(
    pattern="M*wE/*", mtp_depths=1, vocab_size=20, hidden_size=24, num_attention_heads=4, num_key_value_heads=2,
    head_dim=6, sliding_window=9, mamba_num_heads=6, mamba_head_dim=4, n_groups=2, ssm_state_size=7, chunk_size=8,
    n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, moe_shared_expert_intermediate_size=12,
)  # fmt: skip
PLANS = {
    "one device": PlanConfig(),
    "tensor=2": PlanConfig(tensor=2),
    "data=2; expert=2": PlanConfig(data=2, expert=2),
}
CHUNK, LENGTH, TOKENS, TOP = 16, 64, 24, 20
# How prompts are read: in one piece, in pieces of a chunk, or from the first chunk border on.
CACHES = {
    "one piece": {"chunk": 48, "prefill_tokens": 48, "prefix_cache": False},
    "chunked": {"chunk": CHUNK, "prefill_tokens": CHUNK, "prefix_cache": False},
    "prefix hit": {"chunk": CHUNK, "prefill_tokens": 2 * CHUNK, "prefix_cache": True},
}
DRAFTS = {"off": {}, "on": {"drafter": "mtp", "drafts": 2}}
PROMPTS = {"aligned": 2 * CHUNK, "not aligned": 2 * CHUNK + 5}


class Parts(NamedTuple):
    """A model on a plan, and its training forward over one text of LENGTH tokens."""

    opened: Opened
    forward: Any


def parts(plan: PlanConfig) -> Parts:
    """Without weights, which `seeded` adds."""
    laid, built = assemble(MODEL, plan)

    @jax.jit
    def forward(params, buffers, tokens_bt):
        model = nnx.merge(built.graph, params, buffers)
        return model.logits(tokens_bt, documents(np.ones((1, LENGTH), np.int32)), laid)

    return Parts(Opened(MODEL, laid, built, nnx.State({}), nnx.State({}), None), forward)


def seeded(model: Parts, seed: int) -> Opened:
    """With the weights of a seed, the same on every plan."""
    opened = model.opened
    states = (opened.built.laid(state) for state in initial_state(MODEL, seed))
    params, buffers = (jax.device_put(state, shardings(state, opened.plan)) for state in states)
    return opened._replace(params=params, buffers=buffers)


def prompt_of(seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, MODEL.vocab_size, length).tolist())


def run_cell(engine: Engine, prompt: tuple[int, ...], batch: str, *, hit: bool) -> tuple[list[Output], int]:
    """The answer to the prompt, alone or beside five others, two of which draw; and how much of it was cached."""
    ask = lambda ids, n=TOKENS, **more: Request(  # noqa: E731
        prompt=ids, max_tokens=n, logprobs=TOP, sampling=Sampling(**({"temperature": 0.0} | more))
    )
    if hit:
        engine.run([ask(prompt[: CHUNK + 1], 1)])
    others = [
        ask(prompt_of(7, 5)), ask(prompt_of(8, 20), temperature=1.2, seed=1, presence_penalty=1.0),
        ask(prompt_of(9, 33), 9), ask(prompt_of(10, 1), 30, temperature=0.7, seed=2, top_k=5), ask(prompt_of(11, 16)),
    ]  # fmt: skip
    before = engine.stats.cached_tokens
    if batch == "1":
        return engine.run([ask(prompt)])[0], engine.stats.cached_tokens - before
    found = engine.run([*others[:2], ask(prompt), *others[2:]])
    return found[2], engine.stats.cached_tokens - before


def compared(reference: tuple[Parts, Opened], prompt: tuple[int, ...], outputs: Sequence[Output]) -> dict[str, Any]:
    """The answer beside the training forward over prompt and answer, on one device: the largest difference of a
    log-probability, over the whole vocabulary of every token."""
    chosen = [token for output in outputs for token in output.tokens]
    text = (*prompt, *(token.id for token in chosen))
    padded_bt = np.array([[*text, *[0] * (LENGTH - len(text))]], np.int32)
    (forward, opened) = reference[0].forward, reference[1]
    logits_tv = np.asarray(forward(opened.params, opened.buffers, padded_bt), np.float64)[0]
    logits_tv = logits_tv[len(prompt) - 1 :][: len(chosen)]
    expected_tv = logits_tv - np.log(np.exp(logits_tv).sum(-1, keepdims=True))
    found_tv = np.array([[value for _, value in sorted(token.top)] for token in chosen])
    difference = float(np.abs(found_tv - expected_tv).max())
    return {
        "tokens": len(chosen),
        "tokens_equal": [token.id for token in chosen] == logits_tv.argmax(-1).tolist(),
        "largest_difference": difference,
        "of_range": difference / float(np.ptp(logits_tv)),
    }


def measure() -> list[dict[str, Any]]:
    """One line per cell and seed."""
    rows: list[dict[str, Any]] = []
    models = {name: parts(plan) for name, plan in PLANS.items()}
    for seed in SEEDS:
        alone = models["one device"], seeded(models["one device"], seed)
        for plan, cache, drafts in itertools.product(PLANS, CACHES, DRAFTS):
            config = EngineConfig(
                slots=4, max_length=LENGTH, page=CHUNK, steps=4, **CACHES[cache], **DRAFTS[drafts]
            )  # fmt: skip
            engine = Engine(seeded(models[plan], seed), config)
            for batch, place in itertools.product(("1", "mixed"), PROMPTS):
                # Each cell has a prompt of its own, so that none finds what another has cached.
                prompt = prompt_of(100 * seed + 10 * len(batch) + len(place), PROMPTS[place])
                outputs, cached = run_cell(engine, prompt, batch, hit=cache == "prefix hit")
                cell = {"cache": cache, "mtp": drafts, "batch": batch, "prompt": place, "plan": plan, "seed": seed}
                rows.append(cell | compared(alone, prompt, outputs) | {"cached": cached})
                print(json.dumps(rows[-1]), flush=True)
            (FOLDER / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The largest difference of all seeds in each cell, in units of 1e-6; marked where a token differs."""
    columns = list(itertools.product(DRAFTS, ("1", "mixed"), PROMPTS))
    head = "| plan | prompt is read | " + " | ".join(f"MTP {d}, batch {b}, {p}" for d, b, p in columns) + " |"
    lines = [head, "|---" * (len(columns) + 2) + "|"]
    for plan, cache in itertools.product(PLANS, CACHES):
        cells = []
        for drafts, batch, place in columns:
            wanted = {"plan": plan, "cache": cache, "mtp": drafts, "batch": batch, "prompt": place}
            here = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
            equal = all(row["tokens_equal"] for row in here)
            cells.append(
                f"{1e6 * max(row['largest_difference'] for row in here):.1f}" + ("" if equal else " (differs)")
            )
        lines.append(f"| {plan} | {cache} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    configure(2)
    (FOLDER / "table.md").write_text(table(measure()))
