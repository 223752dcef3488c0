"""How far a trainer's log-probabilities are from those of the rollout. See README.md.

python experiments/mismatch/run.py --checkpoint runs/mismatch_model --out results.jsonl [--arms 'A;B']
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from orogen.checkpoint.open import Opened, open_folder
from orogen.config.engine import UNSCALED, EngineConfig
from orogen.config.plan import PlanConfig
from orogen.config.rl import EnvironmentConfig, RLConfig
from orogen.config.run import RunConfig, TrainConfig
from orogen.cost.assemble import assemble
from orogen.data.packing import Batch, Start
from orogen.infer.engine import Engine
from orogen.infer.exact_scores import ExactScores
from orogen.infer.request import Request, Sampling
from orogen.layers.documents import documents
from orogen.model.by_letter import by_letter
from orogen.model.stages import MOE
from orogen.parallel import placement
from orogen.posttrain.advantages import corrected
from orogen.posttrain.likelihood import Likelihoods
from orogen.posttrain.samples import Sample, Track, batch_of
from orogen.precision.policy import working_copy
from orogen.train.loss import ROUTING, map_moe

PROMPTS, PROMPT, ANSWER, LENGTH = 64, 48, 80, 128
E4M3_MOST = 448.0
RL = RLConfig(
    environments=(EnvironmentConfig(name="text", kind="workplace"),), prompts=1, samples=2, max_tokens=ANSWER,
    template="plain", importance="none", sequence_error=None,
)  # fmt: skip
ICEPOP, TIS = (dataclasses.replace(RL, importance=name, sequence_error=2.0) for name in ("icepop", "tis"))
SPLIT = {"data": 2, "tensor": 2, "expert": 4}


class Arm(NamedTuple):
    """rollout, trainer: dtypes. engine: further settings of the engine. weights: how the engine's are changed. plan:
    the trainer's. biases: standard deviation of what is added to the trainer's correction biases, as updates between
    rollout and trainer do."""

    rollout: str = "bfloat16"
    trainer: str = "bfloat16"
    engine: dict[str, Any] = {}
    weights: str = "same"
    plan: dict[str, int] = {}
    biases: float = 0.0


ARMS = {
    "exact": Arm("float32", "float32", {"exact": True}),
    "float32": Arm("float32", "float32"),
    "bfloat16": Arm(),
    "bfloat16, other plan": Arm(plan=SPLIT),
    "float32, other plan": Arm("float32", "float32", plan=SPLIT),
    "bfloat16 rollout, float32 trainer": Arm(trainer="float32"),
    "FP8 keys and values": Arm(engine={"key_values": UNSCALED}),
    "FP8 weights": Arm(weights="fp8"),
    "bfloat16, biases moved": Arm(biases=0.02),
}


def fp8(params: Any) -> Any:
    """Matrices rounded to E4M3 with a scale per column, all but embedding, head and routers."""

    def rounded(path: tuple[Any, ...], leaf: Any) -> Any:
        value = np.asarray(leaf.get_value(), np.float32)
        if value.ndim < 2 or {"embedding", "head", "router"} & set(map(str, path)):
            return leaf
        scale = np.maximum(np.abs(value).max(-2, keepdims=True), 1e-12) / E4M3_MOST
        return leaf.replace(jnp.asarray((value / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale))

    flat = nnx.to_flat_state(params)
    return nnx.from_flat_state([(path, rounded(path, leaf)) for path, leaf in flat])


def written(opened: Opened, arm: Arm, prompts: Sequence[Sequence[int]]) -> tuple[list[Sample], Engine]:
    """The rollout: an answer to each prompt, with experts where the engine can tell them."""
    exact = bool(arm.engine.get("exact"))
    config = EngineConfig(
        slots=32, max_length=LENGTH, page=16, chunk=16 if exact else 64, prefill_tokens=2048, compute_dtype=arm.rollout,
        report_experts=not exact, prefix_cache=False, written_out=False, **arm.engine,
    )  # fmt: skip
    params = fp8(opened.params) if arm.weights == "fp8" else opened.params
    given = opened._replace(params=jax.jit(working_copy, static_argnums=1)(params, arm.rollout))
    engine = Engine(given, config)
    requests = [
        Request(prompt=tuple(prompt), max_tokens=ANSWER, sampling=Sampling(seed=number), logprobs=0, ignore_eos=True)
        for number, prompt in enumerate(prompts)
    ]
    samples = []
    for request, outputs in zip(requests, engine.run(requests), strict=True):
        track = Track.of_prompt(request.prompt)
        tokens = [token for output in outputs for token in output.tokens]
        track.add([token.id for token in tokens], [token.logprob or 0.0 for token in tokens])
        if config.report_experts:
            track.routed(np.concatenate([output.experts for output in outputs]))
        samples.append(Sample("text", 0, 0, "", "", [track], reward=1.0))
    return samples, engine


def chosen_anew(opened: Opened, params: Any, buffers: Any, batch: Batch, dtype: str) -> np.ndarray:
    """(b, t, l, k): the experts that the trainer's routers choose by themselves, sorted."""

    def run(params: Any, buffers: Any, tokens_bt: Any, segments_bt: Any) -> Any:
        model = nnx.merge(opened.built.graph, working_copy(params, dtype), buffers)
        _, kept = model.hidden(tokens_bt, documents(segments_bt), opened.plan)
        experts = map_moe(lambda stats: stats.choice.replay.experts, kept)
        return jnp.moveaxis(by_letter(experts, model.backbone.items)[MOE], 0, 2)

    return np.sort(jax.jit(run)(params, buffers, batch.tokens_bt, batch.segments_bt), -1)


def measured(gap_n: np.ndarray, tracks: Sequence[np.ndarray]) -> dict[str, float]:
    """What is told of log π_trainer - log π_rollout (n,) of all tokens, and of each sequence's."""
    size_n, of_each = np.abs(gap_n), [np.exp(np.abs(one)).mean() for one in tracks]
    icepop, tis = ([corrected(one, np.zeros_like(one), rl) for one in tracks] for rl in (ICEPOP, TIS))
    weight_n = np.concatenate([one.weight_t for one in tis])
    return {
        "mean": float(size_n.mean()), "p99": float(np.quantile(size_n, 0.99)), "max": float(size_n.max()),
        "masked_tokens": float(np.mean(np.concatenate([one.weight_t for one in icepop]) == 0)),
        "left_out_sequences": float(np.mean([not one.kept for one in icepop])),
        "sequence_error": float(np.mean(of_each)), "largest_sequence_error": float(np.max(of_each)),
        "mean_weight": float(np.exp(gap_n).mean()), "mean_truncated_weight": float(weight_n.mean()),
    }  # fmt: skip


def run_arm(name: str, opened: Opened, prompts: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """The lines of an arm: the trainer by its own routing and, where experts are known, by the rollout's."""
    began, arm = time.perf_counter(), ARMS[name]
    samples, engine = written(opened, arm, prompts)
    train = TrainConfig(steps=1, batch_size=len(samples), sequence_length=LENGTH, seed=0, compute_dtype=arm.trainer)
    config = RunConfig(model=opened.config, plan=PlanConfig(**arm.plan), data=None, train=train, optimizer=None)
    laid, built = assemble(config.model, config.plan, length=LENGTH)
    moved = jax.tree.map(lambda b: b + arm.biases * np.random.default_rng(0).normal(size=b.shape), opened.buffers)
    states = [jax.device_put(s, placement.shardings(s, laid)) for s in map(built.laid, (opened.params, moved))]
    scorer, lines = Likelihoods(config, built), []

    def scored(replayed: bool) -> Callable[[Batch, Sequence[Track], Sequence[Start]], np.ndarray]:
        def score(batch: Batch, tracks: Sequence[Track], at: Sequence[Start]) -> np.ndarray:
            kept["batch"], kept["at"] = batch, at
            if engine.config.exact:
                found_bt = np.zeros(batch.tokens_bt.shape, np.float32)
                of_each = ExactScores(engine).of([t.ids for t in tracks], [PROMPT] * len(tracks))
                for place, one in zip(at, of_each, strict=True):
                    found_bt[place.row, place.start + PROMPT - 1 :][: len(one)] = one
            else:
                found_bt = scorer.of(*states, batch if replayed else batch._replace(extras={}))
            kept["found"] = found_bt
            return found_bt

        return score

    for replayed in (False,) if engine.config.exact else (False, True):
        kept: dict[str, Any] = {}
        rl = dataclasses.replace(RL, router_replay=not engine.config.exact)
        batch_of(samples, rl, scored(replayed), reference=None, shape=(len(samples), LENGTH), pad_id=0)
        gaps = []
        for sample, place in zip(samples, kept["at"], strict=True):
            (track,) = sample.tracks
            chosen_t = np.flatnonzero(track.chosen)
            trainer_t = kept["found"][place.row, place.start + chosen_t - 1].astype(np.float64)
            gaps.append(trainer_t - np.array(track.rollout, np.float32)[chosen_t])
        line = {"arm": name, "replay": replayed, "tokens": sum(map(len, gaps)), **measured(np.concatenate(gaps), gaps)}
        if not engine.config.exact and not arm.plan:  # routers of another plan round otherwise
            told = np.sort(kept["batch"].extras[ROUTING], -1)
            anew = chosen_anew(opened, opened.params, moved, kept["batch"], arm.trainer)
            there = told[..., 0] >= 0
            differs = (told != anew).any(-1) & there
            line |= {"flipped_choices": float(differs.sum() / there.sum())}
            line |= {"flipped_tokens": float(differs.any(-1).sum() / there.any(-1).sum())}
        lines.append({**line, "seconds": time.perf_counter() - began, "device": jax.devices()[0].device_kind})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", default=";".join(ARMS), help="by `;`")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    options = parser.parse_args()
    with open_folder(options.checkpoint) as folder:
        plan, built = assemble(folder.config, PlanConfig())
        params, buffers = folder.read(built, plan, "float32")
        tokenizer = folder.tokenizer()
    assert tokenizer is not None
    text = Path(json.__file__).with_name("decoder.py").read_text() + Path(argparse.__file__).read_text()
    ids = tokenizer.encode(text).tolist()
    starts = np.linspace(0, len(ids) - PROMPT, options.prompts).astype(int)
    opened = Opened(folder.config, plan, built, params, buffers, None)
    for name in options.arms.split(";"):
        for line in run_arm(name, opened, [ids[start : start + PROMPT] for start in starts]):
            print(json.dumps(line), flush=True)
            with options.out.open("a") as out:
                out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
