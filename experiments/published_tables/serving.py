"""Published ratios of inference throughput beside predicted ones: `python experiments/published_tables/serving.py`.

Writes `serving.jsonl`. None of the sources states its batch. Here every model serves as many requests as fit, at most
so many as each of MOST; all read their prompts and write their answers together, so the rate is the tokens of the
answers over the time of both.
"""

import bisect
import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from tables import FOLDER, MODELS, read_rows

from orogen.config.cluster import ClusterConfig
from orogen.config.engine import EngineConfig
from orogen.config.load import load
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.simulate.decode import Inference, predict_inference

RESULTS = FOLDER / "serving.jsonl"
MOST = (256, 2**16)  # requests at once: vLLM's default, and more than fit


class Serving(NamedTuple):
    """What is compared, by the row's id: two models, on how many devices of what, with what texts."""

    first: str
    second: str
    cluster: ClusterConfig
    devices: int = 1
    prompt: int = 8192
    new: int = 16384
    weights: str = "decoded"


# The card of Nano 2 is an A10G with 22 GiB, which is not in the table of hardware: an H100 with as much memory.
COMPARED = {
    "inference/nemotron-h-56b": Serving("nemotron_h_56b", "llama3_70b", ClusterConfig(), 8, 65536, 1024),
    "inference/nemotron-h-47b": Serving("nemotron_h_47b", "nemotron_h_56b", ClusterConfig(), 8, 65536, 1024),
    "inference/nano-2-9b": Serving("nemotron_nano_9b_v2", "qwen3_8b", ClusterConfig(memory_gib=22.0)),
    "inference/nano-30b-qwen": Serving(
        "nemotron3_nano_30b_a3b", "qwen3_30b_a3b", ClusterConfig(hardware="h200"), weights="fp8"
    ),
    "inference/nano-30b-oss": Serving("nemotron3_nano_30b_a3b", "gpt_oss_20b", ClusterConfig(hardware="h200")),
}
# Of replayed over stored states: Nano 4B at these batches, after 1,024 tokens.
REPLAYED, BATCHES = "inference/nano-4b-h100", (1, 8, 32, 128, 256, 512)


def of(name: str) -> ModelConfig:
    """A published model."""
    return load([MODELS / f"{name}.gin"])[0].model


def rate(model: ModelConfig, serving: Serving, most: int) -> tuple[float, int]:
    """Tokens per second with as many requests as fit, `most` at most, and how many these are."""
    plan = PlanConfig(tensor=serving.devices)

    def served(slots: int) -> Inference:
        engine = EngineConfig(
            compute_dtype="bfloat16", slots=slots, max_length=serving.prompt + serving.new, prefix_cache=False,
            weights=serving.weights,
        )  # fmt: skip
        texts = {"prompt": serving.prompt, "new": serving.new}
        return predict_inference(model, serving.cluster, plan=plan, engine=engine, **texts)

    def full(slots: int) -> bool:
        found = served(slots)
        return found.device_memory_bytes > found.memory_limit_bytes

    slots = bisect.bisect_left(range(1, most + 1), True, key=full)
    found = served(slots)
    seconds = slots * found.first_token_seconds + serving.new * found.step_seconds
    return slots * serving.new / seconds, slots


def replayed(batches: Sequence[int]) -> list[float]:
    """Nano 4B's rate with replayed over that with stored states."""
    model, found = of("nemotron3_nano_4b"), []
    for slots in batches:
        stored = EngineConfig(compute_dtype="bfloat16", slots=slots, prefix_cache=False)
        kinds = (dataclasses.replace(stored, replay=16), stored)
        rates = [predict_inference(model, engine=kind, prompt=1024, new=64).tokens_per_second for kind in kinds]
        found.append(rates[0] / rates[1])
    return found


def compare() -> list[dict[str, Any]]:
    """Published and predicted ratios, by what is compared and how many requests at most."""
    published = {row["id"]: row["published"]["ratio"] for row in read_rows() if row["kind"] == "inference"}
    results = []
    for name, serving in COMPARED.items():
        for most in MOST:
            (first, slots), (second, others) = (rate(of(model), serving, most) for model in serving[:2])
            facts = {"id": name, "first": serving.first, "second": serving.second, "most": most}
            results.append(
                {**facts, "published": published[name], "predicted": first / second, "slots": [slots, others]}
            )
    for slots, ratio, found in zip(BATCHES, published[REPLAYED], replayed(BATCHES), strict=True):
        facts = {"id": REPLAYED, "first": "nemotron3_nano_4b, replayed", "second": "stored states", "most": slots}
        results.append({**facts, "published": ratio, "predicted": found, "slots": [slots, slots]})
    return results


def main() -> None:
    results = compare()
    RESULTS.write_text("".join(json.dumps(result) + "\n" for result in results))
    print("| ratio | at most | published | predicted | requests at once |\n|---|---|---|---|---|")
    for one in results:
        requests = ", ".join(map(str, one["slots"]))
        named = f"{one['first']} over {one['second']} | {one['most']} | {one['published']}"
        print(f"| {named} | {one['predicted']:.2f} | {requests} |")


if __name__ == "__main__":
    main()
