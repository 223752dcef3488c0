"""Tokens per second with and without drafts by multi-token prediction, on a trained model, and how many are accepted.

Prompts are the beginnings of held-out documents of the run's corpus; answers are greedy.

    orogen train --gin_file gin_configs/data/stdlib.gin --gin_file experiments/mtp_speculation/model.gin --run runs/mtp
    python experiments/mtp_speculation/run.py --run runs/mtp --kernels triton
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax

from orogen.checkpoint.open import Opened, open_model
from orogen.config.engine import EngineConfig
from orogen.config.load import load_saved
from orogen.config.plan import PlanConfig
from orogen.data.loader import open_corpus
from orogen.infer.engine import Engine
from orogen.infer.request import Request, Sampling

HERE = Path(__file__).parent
GPU = {"rms_norm": "triton", "ssd": "triton", "attention": "blocked", "grouped_matmul": "mosaic"}


def prompts(run: Path, opened: Opened, count: int, length: int) -> list[tuple[int, ...]]:
    """The first tokens of held-out documents that have as many, again from the first one if they are too few."""
    streams = open_corpus(load_saved(run / "config.gin").data, tokenizer=opened.tokenizer).splits["heldout"]
    found = [tuple(stream.tokens_t[:length].tolist()) for stream in streams if len(stream.tokens_t) > length]
    return [found[number % len(found)] for number in range(count)]


def decode(engine: Engine, asked: list[tuple[int, ...]], tokens: int) -> dict[str, Any]:
    """Seconds and tokens of the calls before the first request ends, and each answer."""
    numbers = [
        engine.submit(Request(prompt=prompt, max_tokens=tokens, sampling=Sampling(temperature=0), ignore_eos=True))
        for prompt in asked
    ]
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    seconds, made, ended = 0.0, 0, False
    while engine.busy:
        decoding, started = all(answers.values()), time.perf_counter()
        outputs = engine.step()
        passed = time.perf_counter() - started
        for output in outputs:
            answers[output.number] += [token.id for token in output.tokens]
            ended |= output.finish is not None
        if decoding and not ended:
            seconds, made = seconds + passed, made + sum(len(output.tokens) for output in outputs)
    return {"seconds": seconds, "made": made, "answers": [answers[number] for number in numbers]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="a run folder of a model with multi-token prediction")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--drafts", default="0,1,2,3", help="tokens drafted at a time; 0: plain decoding")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--tokens", type=int, default=257, help="of each answer")
    parser.add_argument("--steps", type=int, default=16, help="of decoding in one call")
    parser.add_argument("--kernels", choices=("reference", "triton"), default="reference")
    parser.add_argument("--dtype", default=None, help="bfloat16 with triton, else float32, unless given")
    parser.add_argument("--turns", type=int, default=3, help="of each measurement; 0: only compiles, into jax's cache")
    parser.add_argument("--out", type=Path, default=HERE / "results.jsonl")
    options = parser.parse_args()
    dtype = options.dtype or ("bfloat16" if options.kernels == "triton" else "float32")
    plan = PlanConfig(**GPU) if options.kernels == "triton" else PlanConfig(attention="blocked")
    opened = open_model(options.run, plan, dtype)
    for batch in map(int, options.batches.split(",")):
        plain: dict[str, Any] = {}
        # Several prompts at batch 1 too, one after another: acceptance differs from text to text.
        asked = prompts(options.run, opened, max(batch, 8), options.prompt)
        for drafts in map(int, options.drafts.split(",")):
            config = EngineConfig(
                # A batch of one has four slots on a GPU: XLA makes sums of products of one row, at a third of the
                # bandwidth.
                slots=max(batch, 4) if options.kernels == "triton" else batch,
                max_length=options.prompt + options.tokens, page=64, chunk=256, prefill_tokens=4096,
                steps=options.steps, snapshots=0, prefix_cache=False, compute_dtype=dtype, kernels=options.kernels,
                drafter="mtp" if drafts else "none", drafts=max(drafts, 1),
            )  # fmt: skip
            engine = Engine(opened, config)
            decode(engine, asked[:batch], options.tokens)  # compiles
            if not options.turns:
                continue
            before = engine.stats.steps, list(engine.stats.accepted)
            rates, answers = [], []
            for _ in range(options.turns):
                turns = [decode(engine, asked[i : i + batch], options.tokens) for i in range(0, len(asked), batch)]
                rates.append(sum(turn["made"] for turn in turns) / sum(turn["seconds"] for turn in turns))
                answers = [answer for turn in turns for answer in turn["answers"]]
            steps = engine.stats.steps - before[0]
            accepted = [new - old for new, old in zip(engine.stats.accepted, before[1], strict=True)]
            record: dict[str, Any] = {
                "batch": batch, "drafts": drafts, "dtype": dtype, "kernels": options.kernels,
                "device": jax.devices()[0].device_kind, "jax": jax.__version__, "prompt": options.prompt,
                "tokens_per_s": sorted(rates)[len(rates) // 2], "turns_tokens_per_s": rates,
                "accepted_of_steps": [count / max(steps, 1) for count in accepted],
                "tokens_per_step": 1 + sum(accepted) / max(steps, 1),
            }  # fmt: skip
            if drafts == 0:
                plain = {"rate": record["tokens_per_s"], "answers": answers}
            elif plain:
                pairs = list(zip(answers, plain["answers"], strict=True))
                record["ratio"] = record["tokens_per_s"] / plain["rate"]
                record["equal_answers"] = sum(a == b for a, b in pairs)
                record["answers"] = len(pairs)
                record["equal_tokens"] = sum(_same(a, b) for a, b in pairs) / sum(len(b) for _, b in pairs)
            print(json.dumps(record), flush=True)
            with options.out.open("a") as file:
                file.write(json.dumps(record) + "\n")


def _same(a: list[int], b: list[int]) -> int:
    """How many tokens come before the first difference."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


if __name__ == "__main__":
    main()
