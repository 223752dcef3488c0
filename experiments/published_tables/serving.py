"""Published ratios of inference throughput beside predicted ones: `python experiments/published_tables/serving.py`.

None of the sources states its batch. Here every model serves as many requests as fit,
MOST at most, and all read their prompts and
write their answers together: the rate is answers' tokens over the time of both.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tables import read_rows

from orogen.config.cluster import ClusterConfig
from orogen.config.engine import EngineConfig
from orogen.config.load import load
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.simulate.decode import Inference, predict_inference

MOST = 256  # requests at once, vLLM's default


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
    return load([Path(f"gin_configs/models/{name}.gin")])[0].model


def rate(model: ModelConfig, serving: Serving) -> tuple[float, int]:
    """Tokens per second with as many requests as fit, and how many these are."""
    plan = PlanConfig(tensor=serving.devices)

    def served(slots: int) -> Inference:
        engine = EngineConfig(
            compute_dtype="bfloat16", slots=slots, max_length=serving.prompt + serving.new, prefix_cache=False,
            weights=serving.weights,
        )  # fmt: skip
        texts = {"prompt": serving.prompt, "new": serving.new}
        return predict_inference(model, serving.cluster, plan=plan, engine=engine, **texts)

    fits = [n for n in range(1, MOST + 1) if (one := served(n)).device_memory_bytes <= one.memory_limit_bytes]
    slots = fits[-1]
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


def main() -> None:
    published = {row["id"]: row["published"]["ratio"] for row in read_rows() if row["kind"] == "inference"}
    print("| ratio | published | predicted | requests at once |\n|---|---|---|---|")
    for name, serving in COMPARED.items():
        (first, slots), (second, others) = (rate(of(model), serving) for model in (serving.first, serving.second))
        print(
            f"| {serving.first} over {serving.second} | {published[name]} | {first / second:.2f} | {slots}, {others} |"
        )
    for batch, ratio, found in zip(BATCHES, published[REPLAYED], replayed(BATCHES), strict=True):
        print(f"| nemotron3_nano_4b, replayed over stored states | {ratio} | {found:.2f} | {batch} |")


if __name__ == "__main__":
    main()
