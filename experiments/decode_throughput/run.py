"""Tokens per second of decoding by the engine, beside transformers' cached greedy decoding where it is installed.

One process, one model with random weights. Every request has a prompt of random tokens and ends at `max_tokens` alone;
what is timed are whole calls of the engine in which every request decodes, or transformers' steps after its prefill.

    python experiments/decode_throughput/run.py --model bench_dense --batches 1,8 --peer       # CPU
    python experiments/decode_throughput/run.py --model r1 --batches 1,64 --kernels triton     # one NVIDIA GPU
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from orogen.bench.weights import export_weights
from orogen.checkpoint.open import Opened
from orogen.config.engine import EngineConfig
from orogen.config.load import parse
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.infer.engine import Engine
from orogen.infer.request import Request, Sampling
from orogen.model.lm import build, initial_state
from orogen.parallel.plan import make_plan
from orogen.precision.policy import working_copy

HERE = Path(__file__).parent
GPU = {"rms_norm": "triton", "ssd": "triton", "attention": "blocked", "grouped_matmul": "mosaic"}


def opened(model: ModelConfig, plan: PlanConfig, dtype: str) -> Opened:
    def make() -> Any:
        params, buffers = initial_state(model, 0)
        return working_copy(params, dtype), buffers

    params, buffers = jax.jit(make)()
    return Opened(model, make_plan(plan, model), build(model), params, buffers, None)


def prompts(model: ModelConfig, batch: int, length: int) -> list[tuple[int, ...]]:
    draw = np.random.default_rng(0)
    return [tuple(draw.integers(0, model.vocab_size, length).tolist()) for _ in range(batch)]


def decode(engine: Engine, batch: int, length: int, tokens: int) -> dict[str, Any]:
    """Seconds per token of calls in which all requests decode; the first answer of each; time to the first token."""
    for prompt in prompts(engine.opened.config, batch, length):
        engine.submit(Request(prompt=prompt, max_tokens=tokens, sampling=Sampling(temperature=0), ignore_eos=True))
    began, first, seconds, found = time.perf_counter(), None, [], {}
    while engine.busy:
        before, started = engine.stats.generated_tokens, time.perf_counter()
        outputs = engine.step()
        passed, made = time.perf_counter() - started, engine.stats.generated_tokens - before
        for output in outputs:
            found.setdefault(output.number, []).extend(token.id for token in output.tokens)
        if first is None and outputs:
            first = time.perf_counter() - began
        if made == engine.config.steps * batch:
            seconds.append(passed / engine.config.steps)
    return {"seconds": seconds, "first_s": first, "ids": [ids for _, ids in sorted(found.items())]}


def peer_decode(folder: Path, model: ModelConfig, batch: int, length: int, tokens: int) -> dict[str, Any]:
    """The same by transformers, in the dtype of the folder."""
    import torch
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    net = net.to("cuda" if torch.cuda.is_available() else "cpu")
    ids = torch.tensor(prompts(model, batch, length), device=net.device)
    seconds, found = [], []
    with torch.inference_mode():
        out = net(input_ids=ids, use_cache=True)
        for step in range(tokens):
            chosen = out.logits[:, -1].argmax(-1, keepdim=True)
            found.append(chosen[:, 0].tolist())
            started = time.perf_counter()
            out = net(
                input_ids=chosen, past_key_values=out.past_key_values, use_cache=True,
                cache_position=torch.tensor([length + step], device=net.device),
            )  # fmt: skip
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    return {"seconds": seconds[2:], "ids": [list(row) for row in zip(*found, strict=True)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bench_dense", help="of gin_configs/models")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens")
    parser.add_argument("--tokens", type=int, default=257, help="of each answer")
    parser.add_argument("--steps", type=int, default=32, help="of decoding in one call")
    parser.add_argument("--kernels", choices=("reference", "triton"), default="reference")
    parser.add_argument("--dtype", default=None, help="bfloat16 with triton, else float32, unless given")
    parser.add_argument("--replay", type=int, default=0)
    parser.add_argument("--peer", action="store_true", help="transformers, in turn")
    parser.add_argument("--out", type=Path, default=HERE / "results.jsonl")
    options = parser.parse_args()
    model = parse([f"gin_configs/models/{options.model}.gin"], [])[0].model
    assert model is not None
    dtype = options.dtype or ("bfloat16" if options.kernels == "triton" else "float32")
    plan = PlanConfig(**GPU) if options.kernels == "triton" else PlanConfig(attention="blocked")
    model_opened = opened(model, plan, dtype)
    for batch in map(int, options.batches.split(",")):
        config = EngineConfig(
            # Fewer rows than 8 are slower on a GPU: XLA makes sums of their products, at a third of the bandwidth.
            slots=max(batch, 8) if options.kernels == "triton" else batch,
            max_length=options.prompt + options.tokens, page=64, chunk=256, prefill_tokens=max(options.prompt, 4096),
            steps=options.steps, snapshots=0, prefix_cache=False, compute_dtype=dtype, kernels=options.kernels,
            replay=options.replay,
        )  # fmt: skip
        engine = Engine(model_opened, config)
        decode(engine, batch, options.prompt, options.steps + 1)  # compiles
        record: dict[str, Any] = {
            "model": options.model, "batch": batch, "prompt": options.prompt, "dtype": dtype,
            "kernels": options.kernels, "replay": options.replay, "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        }  # fmt: skip
        turns = [decode(engine, batch, options.prompt, options.tokens)]
        if options.peer:
            with tempfile.TemporaryDirectory() as folder:
                weights = Path(folder) / "weights"
                export_weights(model, model_opened.params, model_opened.buffers, weights)
                theirs = peer_decode(weights, model, batch, options.prompt, options.tokens)
            same = [a[:16] == b[:16] for a, b in zip(turns[0]["ids"], theirs["ids"], strict=True)]
            record |= {"peer_tokens_per_s": batch / statistics.median(theirs["seconds"]), "peer_same_16": sum(same)}
            turns.append(decode(engine, batch, options.prompt, options.tokens))  # once more after the peer
        seconds = [second for turn in turns for second in turn["seconds"]]
        record |= {
            "step_ms": 1e3 * statistics.median(seconds),
            "tokens_per_s": batch / statistics.median(seconds),
            "first_token_ms": 1e3 * turns[0]["first_s"],
        }
        if options.peer:
            record["ratio"] = record["tokens_per_s"] / record["peer_tokens_per_s"]
        print(json.dumps(record), flush=True)
        with options.out.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
