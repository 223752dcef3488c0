"""Errors of a state that is kept in fewer bits, by the length of the text. See README.md.

python experiments/ssm_cache/run.py
"""

import functools
import itertools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from orogen.kernels.state_blocks import opened
from orogen.kernels.state_update import ssm_update
from orogen.model.stored_state import empty, updated

HERE = Path(__file__).parent
DECAYS = (0.9, 0.99, 0.999, 0.9999)  # per token, of one head each
SIZE, STATE = 8, 128
LENGTHS = tuple(2**power for power in range(4, 14))
SEEDS = (1, 2, 3)
# By name: how a state is kept, and whether it is rounded at random.
CACHES = {
    "float32": ("float32", False),
    "float16 nearest": ("float16", False),
    "float16 stochastic": ("float16", True),
    "int8 nearest": ("int8", False),
    "int8 stochastic": ("int8", True),
}
INPUTS = {"one-sided": (1.0, 0.1), "zero mean": (0.0, 1.0)}  # mean and spread of x and of B


def inputs(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """x (t, h, p) and B (t, n), float32."""
    rng, (mean, spread) = np.random.default_rng(seed), INPUTS[kind]
    draw = lambda *shape: (mean + spread * rng.normal(size=shape)).astype(np.float32)  # noqa: E731
    return draw(LENGTHS[-1], len(DECAYS), SIZE), draw(LENGTHS[-1], STATE)


@functools.partial(jax.jit, static_argnums=(0, 1))
def kept(dtype: str, random: bool, x_thp: Any, b_tn: Any, seed: Any) -> Any:
    """The state (l, h, p, n) after each of LENGTHS, as an engine keeps it from token to token. dt is 1."""
    rate_h, one_h = jnp.log(jnp.array(DECAYS, jnp.float32)), jnp.ones(len(DECAYS))

    def token(state: Any, now: Any) -> tuple[Any, None]:
        place, x_hp, b_n = now
        seeds_b2 = jnp.stack([seed, place.astype(jnp.uint32)])[None]
        one = x_hp[None], one_h[None], rate_h, b_n[None, None], b_n[None, None]
        run = lambda state, seeds: ssm_update(*one, state_bhpn=state, seeds_b2=seeds, implementation="reference")  # noqa: E731
        _, state = updated(state, run, seeds_b2=seeds_b2 if random else None, rows_b=jnp.ones(1, bool))
        return state, None

    state, found, start = empty((1, len(DECAYS), SIZE, STATE), dtype), [], 0
    for length in LENGTHS:
        part = jnp.arange(start, length), x_thp[start:length], b_tn[start:length]
        state, start = jax.lax.scan(token, state, part)[0], length
        found.append(opened(state)[0].astype(jnp.float32))
    return jnp.stack(found)


def exact(x_thp: np.ndarray, b_tn: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The state after each of LENGTHS in float64; and by dtype the root mean square (l, h) of the error that random
    rounding leaves: each rounding adds step² / 6, which then decays with the state."""
    decay = np.exp(np.log(np.array(DECAYS, np.float32)).astype(np.float64))[:, None, None]
    state = np.zeros((len(DECAYS), SIZE, STATE))
    square = {"float16": np.zeros_like(state), "int8": np.zeros_like(state)}
    states, expected = [], {name: [] for name in square}
    for place, (x_hp, b_n) in enumerate(zip(x_thp, b_tn, strict=True), 1):
        state = decay * state + np.float64(x_hp)[..., None] * b_n
        ulp = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(np.abs(state), 1e-30))), -14) - 10)
        for name, step in (("float16", ulp), ("int8", np.abs(state).max(-1, keepdims=True) / 127)):
            square[name] = decay**2 * square[name] + step**2 / 6
        if place in LENGTHS:
            states.append(state)
            for name, of in square.items():
                expected[name].append(np.sqrt(of.mean((1, 2))))
    return np.stack(states), {name: np.stack(rows) for name, rows in expected.items()}


def main() -> None:
    records, began = [], time.monotonic()
    for kind in INPUTS:
        for seed in SEEDS:
            x_thp, b_tn = inputs(kind, seed)
            states, expected = exact(x_thp, b_tn)
            scale = np.sqrt((states**2).mean((2, 3)))
            for cache, (dtype, random) in CACHES.items():
                error = np.asarray(kept(dtype, random, x_thp, b_tn, np.uint32(seed)), np.float64) - states
                size, mean = np.sqrt((error**2).mean((2, 3))) / scale, error.mean((2, 3)) / scale
                formula = expected[dtype] / scale if dtype in expected else np.zeros_like(scale)
                for (at, length), (head, decay) in itertools.product(enumerate(LENGTHS), enumerate(DECAYS)):
                    records.append({
                        "inputs": kind, "seed": seed, "cache": cache, "decay": decay, "length": length,
                        "error": size[at, head], "mean_error": mean[at, head], "formula": formula[at, head],
                    })  # fmt: skip
    lines = [json.dumps(record) for record in records]
    (HERE / "results.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(records)
    print_table(records)
    print(f"{time.monotonic() - began:.0f} seconds")


def mean_of(records: list[dict[str, Any]], field: str, **where: Any) -> np.ndarray:
    """The values of the seeds."""
    return np.array([r[field] for r in records if all(r[name] == value for name, value in where.items())])


def print_table(records: list[dict[str, Any]]) -> None:
    """Errors at three lengths, mean and spread over seeds, of each head."""
    for kind in INPUTS:
        for decay in DECAYS:
            for cache in CACHES:
                cells = []
                for length in (LENGTHS[2], LENGTHS[6], LENGTHS[-1]):
                    here = {"inputs": kind, "cache": cache, "decay": decay, "length": length}
                    error, formula = mean_of(records, "error", **here), mean_of(records, "formula", **here)
                    cells.append(f"{error.mean():.2e} ± {error.std(ddof=1):.0e} ({formula.mean():.1e})")
                last = mean_of(records, "mean_error", **here)
                print(f"| {kind} | {decay} | {cache} | {' | '.join(cells)} | {last.mean():+.1e} |")


def draw(records: list[dict[str, Any]]) -> None:
    """Errors by length for the slowest head; broken lines: the formula."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, kind in zip(axes, INPUTS, strict=True):
        for number, cache in enumerate(CACHES):
            here = {"inputs": kind, "cache": cache, "decay": DECAYS[-1]}
            rows = np.array([mean_of(records, "error", **here, length=length).mean() for length in LENGTHS])
            axis.plot(LENGTHS, rows, color=f"C{number}", label=cache)
            if cache.endswith("stochastic"):
                rows = [mean_of(records, "formula", **here, length=length).mean() for length in LENGTHS]
                axis.plot(LENGTHS, rows, color=f"C{number}", linestyle=":")
        axis.set(xscale="log", yscale="log", title=f"{kind} inputs, decay {DECAYS[-1]}", xlabel="tokens")
    axes[0].set_ylabel("error of the state, relative")
    axes[1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(HERE / "figure.png", dpi=110)


if __name__ == "__main__":
    main()
