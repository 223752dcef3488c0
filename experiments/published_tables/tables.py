"""The published rows: what each is as a config and a cluster, and which may be fitted.

`rows.jsonl` has one row per published number: `source`, `table`, `model` (a file of gin_configs/models), `hardware`,
`devices`, `plan` (fields of PlanConfig), `layout` (blocks per pipeline chunk: `2 3*30 2` is 2, then 30 times 3, then
2), `batch`, `sequence`, `precision`, `moments`, `routing` (none, balanced or real), `options` of the program that was
measured, `published` (values, with the unit in the name), `convention` of its FLOP/s, `assumed` (what the source does
not say) and `out` (why the row is not judged). kind: a whole `step`, one `layer`, `memory`, one `exchange`, or
`inference`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from orogen.config.cluster import ClusterConfig
from orogen.config.load import load
from orogen.config.model import ModelConfig
from orogen.config.plan import FOR_GPU, PlanConfig
from orogen.config.run import OptimizerConfig, RunConfig, TrainConfig
from orogen.simulate.prediction import Prediction

FOLDER = Path(__file__).parent
MODELS = FOLDER.parents[1] / "gin_configs" / "models"
ROWS, FITTED = FOLDER / "rows.jsonl", FOLDER / "fitted.json"
RULE = "of each table's judged rows, a third (rounded down): those whose ids have the smallest sha256"
# The programs measured on these cards have fused attention; in 2021 scores were written to memory.
UNFUSED = {"a100"}
# What `options` mean, as constants of the cluster. Dispatchers that send a token once per node: arXiv:2603.07685; the
# share of exchanges that one forward pass hides behind another's backward pass: the same, section 4.
ONCE_PER_NODE = ("deepep", "hybridep")
OVERLAPPED = "overlap_expert=0.93"
# Of gradients and sharded parameters, what is hidden where the source says that none or all of them are overlapped.
DATA = {"exposed": 0, "hidden": 1}
KINDS = ("step", "layer")  # what is judged
PASSES = 2000  # of a pipeline that are played one by one; the rest repeats with the period of its schedule

Row = Mapping[str, Any]


def read_rows() -> list[dict[str, Any]]:
    """All rows of `rows.jsonl`."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()]


def judged(rows: Iterable[Row]) -> list[Row]:
    """The rows that are compared with their predictions."""
    return [row for row in rows if row["kind"] in KINDS and "out" not in row]


def choose(rows: Iterable[Row]) -> list[str]:
    """The ids of the rows that constants may be fitted on, by RULE."""
    tables: dict[str, list[str]] = {}
    for row in judged(rows):
        tables.setdefault(row["table"], []).append(row["id"])
    digest = lambda name: hashlib.sha256(name.encode()).hexdigest()  # noqa: E731
    return [name for names in tables.values() for name in sorted(names, key=digest)[: len(names) // 3]]


def fitted() -> list[str]:
    """The ids in `fitted.json`. Raises ValueError if they are not those that RULE chooses."""
    chosen = json.loads(FITTED.read_text())["rows"]
    if chosen != choose(read_rows()):
        raise ValueError(f"{FITTED.name} has other rows than its rule chooses of {ROWS.name}")
    return chosen


def config(row: Row) -> RunConfig:
    """The run that a row describes. Raises ConfigError."""
    model = load([MODELS / f"{row['model']}.gin"])[0].model
    if "layout" in row:
        model = dataclasses.replace(model, pattern=segmented(model, row["layout"]))
    train = TrainConfig(
        steps=1, batch_size=row["batch"], sequence_length=row["sequence"], seed=0, compute_dtype="bfloat16"
    )
    optimizer = OptimizerConfig(learning_rate=1e-4, moment_dtype=row.get("moments", "float32"))
    kernels = {} if row["hardware"] in UNFUSED else _kernels(model)
    plan = PlanConfig(**{**kernels, **{name: _frozen(value) for name, value in row["plan"].items()}})
    return RunConfig(model=model, plan=plan, train=train, optimizer=optimizer).check()


def cluster(row: Row, constants: Mapping[str, float] = {}) -> ClusterConfig:
    """The cluster that a row was measured on, with the options of its program. constants: replace the hardware's."""
    options = row.get("options", {})
    entries = [f"{name}={value!r}" for name, value in constants.items()]
    if options.get("dispatcher") in ONCE_PER_NODE:
        entries.append("once_per_node=1")
    if options.get("overlap") == "expert":
        entries.append(OVERLAPPED)
    entries += [f"graph_{part}=1" for part in options.get("graphs", ())]
    entries += ["sorts=1"] * (options.get("dispatcher") == "alltoall")
    if "data" in options:
        entries.append(f"overlap_data={DATA[options['data']]}")
    software = "megatron2021" if row["hardware"] in UNFUSED else "megatron"
    return ClusterConfig(hardware=row["hardware"], devices=row["devices"], software=software, constants=tuple(entries))


def segmented(model: ModelConfig, layout: str) -> str:
    """The model's pattern split into pipeline chunks of as many blocks (an attention layer and the layer after it) as
    `layout` says. Raises ValueError if they do not add up."""
    main = model.layers.main
    sizes: list[int] = []
    for part in layout.split():
        blocks, _, times = part.partition("*")
        sizes += [int(blocks)] * int(times or 1)
    if 2 * sum(sizes) != len(main):
        raise ValueError(f"layout {layout!r} has {sum(sizes)} blocks; expected {len(main) / 2:g}")
    chunks, start = [], 0
    for size in sizes:
        chunks.append(main[start : start + 2 * size])
        start += 2 * size
    return "|".join(chunks) + (f"/{model.layers.mtp}" if model.layers.mtp else "")


def both_seconds(row: Row, model: ModelConfig, found: Prediction) -> tuple[float, float]:
    """The predicted and the published time: of a step, or of one layer's passes."""
    if row["kind"] == "layer":
        return layer_seconds(found, len(model.layers.main) // 2), row["published"]["layer_ms"] / 1e3
    return found.step_seconds, published_seconds(row, model, found.flops)


def layer_seconds(found: Prediction, layers: int) -> float:
    """Both passes of one Transformer layer: its attention and its MLP, and what they send over tensor ranks."""
    computed = sum(line.seconds * line.count for line in found.rooflines if line.unit in ("*", "-"))
    sent = sum(traffic.exposed_seconds for traffic in found.communication if traffic.axes == ("tensor",))
    return (computed + sent) / layers


def published_seconds(row: Row, model: ModelConfig, flops: Mapping[str, float]) -> float:
    """The time of a step that the row's numbers amount to. flops: of the step, by convention, for rows that give no
    time."""
    found = row["published"]
    if "step_seconds" in found:
        return found["step_seconds"]
    if "tokens_per_second_per_device" in found:
        return row["batch"] * row["sequence"] / row["devices"] / found["tokens_per_second_per_device"]
    if row["convention"] == "megatron2021_recomputed":
        counted = gpt_flops(model, row["batch"], row["sequence"], recomputed=True)
    else:
        counted = flops[row["convention"]]
    rate = found["mfu"] * found["peak_tflops"] if "mfu" in found else found["tflops_per_device"]
    return counted / row["devices"] / rate / 1e12


def gpt_flops(model: ModelConfig, batch: int, sequence: int, *, recomputed: bool) -> float:
    """FLOPs of a step of a GPT by section 3.4 of arXiv:2104.04473, which counts the recomputed forward pass, or by
    equation 7 of arXiv:2205.05198, which does not."""
    layers, width, vocabulary = len(model.layers.main) / 2, model.hidden_size, model.vocab_size
    head = vocabulary / ((16 if recomputed else 12) * layers * width)
    whole = 1 + sequence / (6 * width) + head
    return (96 if recomputed else 72) * batch * sequence * layers * width**2 * whole


def _kernels(model: ModelConfig) -> dict[str, str]:
    """Fused kernels; attention with windows or latents has none of cuDNN's."""
    special = model.attention_sinks or set(model.layers.main + model.layers.mtp) & set("w+")
    return {**FOR_GPU, "attention": "blocked" if special else FOR_GPU["attention"]}


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


if __name__ == "__main__":
    FITTED.write_text(json.dumps({"rule": RULE, "rows": choose(read_rows())}, indent=1) + "\n")
