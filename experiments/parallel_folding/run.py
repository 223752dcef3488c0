"""Counts what folding saves in a mixture-of-experts layer, compiles some of the cases, and draws the figure.

`python experiments/parallel_folding/run.py` writes results.jsonl and figure.png beside itself.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from figure import draw
from mapping import (
    Layout,
    expert_groups,
    layer_traffic,
    link_seconds,
    obstacle,
    rows_to_each,
    share_in_node,
    total,
)

from orogen.config.load import load
from orogen.config.model import ModelConfig
from orogen.config.text import model_text
from orogen.parallel.runtime import configure

FOLDER = Path(__file__).parent
MODELS = {
    "Mixtral-8x22B": "mixtral_8x22b",
    "Qwen2-57B-A14B": "qwen2_57b_a14b",
    "Nemotron-3 Super": "nemotron3_super_120b_a12b",
}
WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)
DENSE = ((2, 1), (2, 2), (4, 1), (8, 1), (2, 4), (4, 4))  # tensor x context
LENGTH = 4096
PEAK = 989.5e12  # H100, dense bfloat16

# Outside the grid: the configurations of arXiv:2504.14960, tables 3 and 5, and the MFU (%) that it measured. devices,
# stages, length, then (context, tensor, expert, expert_tensor, MFU) without and with folding.
PUBLISHED = (
    (128, 8, 4096, (1, 2, 4, 2, 46.3), (1, 2, 8, 1, 49.3)),
    (128, 8, 16384, (4, 2, 4, 2, 45.3), (4, 2, 8, 1, 47.6)),
    (512, 8, 65536, (16, 2, 4, 2, 42.6), (8, 4, 8, 1, 44.5)),
)
MIXTRAL_ACTIVE = 39_161_468_928  # active parameters, from the model's gin file

# Compiled cases. Folded: model, devices, tensor, context, expert. Unfolded: model, devices, tensor, expert, with
# expert_tensor equal to tensor.
COMPILED = (
    *(("Mixtral-8x22B", devices, 2, 2, 8) for devices in (8, 16, 32, 64)),
    ("Mixtral-8x22B", 64, 4, 4, 8),
    *(("Qwen2-57B-A14B", devices, 2, 1, 16) for devices in (16, 32, 64)),
    ("Qwen2-57B-A14B", 64, 8, 1, 64),
    *(("Nemotron-3 Super", devices, 2, 4, 8) for devices in (8, 64)),
    ("Nemotron-3 Super", 64, 4, 4, 64),
)
UNFOLDED = (
    *(("Mixtral-8x22B", devices, tensor, expert) for devices, tensor, expert in ((16, 2, 8), (32, 4, 8), (64, 8, 8))),
    ("Mixtral-8x22B", 64, 2, 4),
    ("Qwen2-57B-A14B", 64, 2, 16),
    ("Qwen2-57B-A14B", 64, 4, 16),
    ("Nemotron-3 Super", 64, 2, 8),
)


def main() -> None:
    configure(max(case[1] for case in COMPILED))
    models = {name: _model(file) for name, file in MODELS.items()}
    records = [*counted(models), *published(models["Mixtral-8x22B"]), *compiled_layers(models)]
    lines = [json.dumps(record | {"config": _digest(models[record["model"]])}) for record in records]
    (FOLDER / "results.jsonl").write_text("\n".join(lines) + "\n")
    (FOLDER / "figure.png").write_bytes(draw([json.loads(line) for line in lines]))


def counted(models: dict[str, ModelConfig]) -> Iterator[dict[str, Any]]:
    """Every number of devices, dense layout, model and split of its experts, under three mappings.

    If folded, `split` devices share one replica of the experts. Unfolded, either `expert` is equal to `split` (and the
    experts are split further over tensor: a device holds 1/tensor of the weights), or expert x expert_tensor is.
    """
    for devices, (tensor, context), (name, model) in itertools.product(WORLDS, DENSE, models.items()):
        for split in (8,) if model.n_routed_experts == 8 else (8, 16, 64):
            layouts = {
                "folded": Layout(devices, context, tensor, True, split, 1),
                "unfolded": Layout(devices, context, tensor, False, split, tensor),
                "unfolded, same memory": Layout(devices, context, tensor, False, split // tensor, tensor),
            }
            found = {mapping: _count(model, layout) for mapping, layout in layouts.items()}
            best = found["folded"].get("seconds")
            for mapping, layout in layouts.items():
                case = {"kind": "counted", "model": name, "mapping": mapping, "split": split, **layout._asdict()}
                seconds = found[mapping].get("seconds")
                over = {"over_folded": seconds / best} if seconds and best else {}
                yield case | found[mapping] | over


def _count(model: ModelConfig, layout: Layout, length: int = LENGTH) -> dict[str, Any]:
    """Bytes and seconds of one layer, forward and backward, for one sequence per data rank."""
    if reason := obstacle(layout):
        return {"refused": reason}
    tokens = length // (layout.context * layout.tensor)
    traffic = layer_traffic(model, layout, tokens, capacity=1.0)
    dropless = layer_traffic(model, layout, tokens, capacity=None)
    assigned = tokens * model.num_experts_per_tok  # assignments per device, as if it held whole experts
    assert assigned == layout.expert * rows_to_each(model, layout, tokens, capacity=None)
    matrices = 3 if model.mlp_gated else 2
    flops = 6 * assigned * matrices * model.expert_width * model.moe_intermediate_size
    groups = expert_groups(layout)["expert"]
    return {
        "groups": len(groups),
        "share_in_node": share_in_node(groups),
        "tokens": tokens,
        "capacity_1": total(traffic)._asdict(),
        "dropless": total(dropless)._asdict(),
        "collectives": {part: each._asdict() for part, each in traffic.items()},
        "seconds": link_seconds(traffic),
        "products_seconds_at_peak": flops / PEAK,
    }


def published(model: ModelConfig) -> Iterator[dict[str, Any]]:
    """The paper's own pairs of configurations: the gain of a step if only these bytes changed and none overlapped.

    Without folding, `copied` assumes experts replicated over context, `spread` experts spread over data x context at
    stride tensor; both split experts over tensor.
    """
    for devices, stages, length, plain, folding in PUBLISHED:
        after, _ = _side(model, devices // stages, length, folding, True)
        gains, shares = {}, {}
        for reading, folded in (("copied", False), ("spread", True)):
            before, step = _side(model, devices // stages, length, plain, folded)
            saved = before["seconds"] - after["seconds"] if "seconds" in before else None
            gains[reading] = saved / (step - saved) if saved is not None else before["refused"]
            shares[reading] = before.get("share_in_node")
        yield {
            "kind": "published", "model": "Mixtral-8x22B", "devices": devices, "length": length,
            "gain_measured": folding[-1] / plain[-1] - 1, "gain_counted": gains, "share_in_node": shares,
        }  # fmt: skip


def _side(
    model: ModelConfig, devices: int, length: int, sizes: tuple[int, int, int, int, float], folded: bool
) -> tuple[dict[str, Any], float]:
    """The count for one published configuration, and the seconds of one pair of layers at its MFU: attention, whose
    products with keys and values count half because it is causal, and experts."""
    context, tensor, expert, expert_tensor, mfu = sizes
    scores = 6 * length * model.num_attention_heads * model.head_dim
    flops = length / (context * tensor) * (6 * MIXTRAL_ACTIVE / (len(model.layers.main) / 2) + scores)
    layout = Layout(devices, context, tensor, folded, expert, expert_tensor)
    return _count(model, layout, length), flops / (PEAK * mfu / 100)


def compiled_layers(models: dict[str, ModelConfig]) -> Iterator[dict[str, Any]]:
    """The compiled program of one toy layer on simulated devices, beside the count."""
    from compiled import compare  # imports jax, which `configure` has to precede

    cases = [
        *(
            (name, Layout(devices, context, tensor, True, expert, 1))
            for name, devices, tensor, context, expert in COMPILED
        ),
        *((name, Layout(devices, 1, tensor, False, expert, tensor)) for name, devices, tensor, expert in UNFOLDED),
    ]
    for name, layout in cases:
        yield {"kind": "compiled", "model": name, **layout._asdict(), **compare(models[name], layout)}


def _model(file: str) -> ModelConfig:
    return load([FOLDER.parents[1] / "gin_configs" / "models" / f"{file}.gin"])[0].model


def _digest(model: ModelConfig) -> str:
    return hashlib.sha256(model_text(model).encode()).hexdigest()[:12]


if __name__ == "__main__":
    main()
