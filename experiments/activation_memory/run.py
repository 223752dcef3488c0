"""Counts what layers keep for their backward pass under each recomputation policy, and draws the figure.

`python experiments/activation_memory/run.py` writes results.jsonl and figure.png beside itself.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from figure import draw

from orogen.config.load import load
from orogen.config.model import ModelConfig
from orogen.config.text import model_text
from orogen.cost.ledger import Workload
from orogen.parallel.runtime import configure

FOLDER = Path(__file__).parent
LENGTH, RANKS = 2048, 8
# The paper's models (table 3) and the sequences per microbatch.
PAPER = {"GPT 22B": ("gpt_22b", 4), "GPT 175B": ("gpt_175b", 1), "GPT 530B": ("gpt_530b", 1), "GPT 1T": ("gpt_1t", 1)}
# Table 2's rows: remat, tensor ranks, and how they hold the residual stream (by time: sequence parallelism).
TECHNIQUES = {
    "none": ("paper", 1, "time"),
    "tensor": ("paper", RANKS, "whole"),
    "tensor, sequence": ("paper", RANKS, "time"),
    "tensor, selective": ("selective", RANKS, "whole"),
    "tensor, sequence, selective": ("selective", RANKS, "time"),
    "full": ("full", RANKS, "time"),
}
POLICIES = ("none", "paper", "selective", "elementwise", "full")
# Layers of other kinds at their true width: file, letters, length. CHEAP: policies that recompute no matrix product.
HYBRID = {
    "Nemotron-H 8B": ("nemotron_h_8b", "M*-", 8192),
    "Nemotron-3 Nano": ("nemotron3_nano_30b_a3b", "M*E", 8192),
    "Nemotron-3 Super": ("nemotron3_super_120b_a12b", "ME", 8192),
    "Mamba-1 8B": ("mamba1_8b", "m", 4096),
}
CHEAP = {"M": "M:conv,gated_norm", "E": "E:expert_activation,shared_activation,norm"}
SHRINK = 32  # of width and heads, in the layers that run: as/h stays


def main() -> None:
    configure(None)
    models = {name: _model(file) for name, (file, *_) in (PAPER | HYBRID).items()}
    records = [*traced(models), *hybrid(models), *compiled_layers(models)]
    lines = [json.dumps(record | {"config": _digest(models[record["model"]])}) for record in records]
    (FOLDER / "results.jsonl").write_text("\n".join(lines) + "\n")
    (FOLDER / "figure.png").write_bytes(draw([json.loads(line) for line in lines]))


def traced(models: dict[str, ModelConfig]) -> Iterator[dict[str, Any]]:
    """The paper's table for its own models at their true width, from traces."""
    from layers import kept_bytes, multiplied

    for name, (_, rows) in PAPER.items():
        model, work = models[name], Workload(rows, LENGTH, 2)
        plain = multiplied("*-", model, work, remat="none")
        for technique, (remat, ranks, stream) in TECHNIQUES.items():
            kept = kept_bytes("*-", model, work, remat=remat, tensor=ranks, stream=stream)
            yield {
                "kind": "paper", "model": name, "technique": technique, "remat": remat, "tensor": ranks,
                "rows": rows, "length": LENGTH,
                "names": kept, "bytes": sum(sum(names.values()) for names in kept.values()),
                "formula": formula(technique, model, rows, dropout=False),
                "formula_with_dropout": formula(technique, model, rows, dropout=True),
                "flops_added": multiplied("*-", model, work, remat=remat) / plain - 1,
            }  # fmt: skip


def formula(technique: str, model: ModelConfig, rows: int, *, dropout: bool) -> float:
    """Bytes of a layer on one rank by arXiv:2205.05198, table 2. Without dropout's masks, its 5as/h, 34 and 10 are
    2as/h, 32 and 8. `full` keeps the layers' inputs, split over the ranks: here two, of attention and of the MLP."""
    sbh = LENGTH * rows * model.hidden_size
    scores = (5 if dropout else 2) * model.num_attention_heads * LENGTH / model.hidden_size
    shared, t = 10 if dropout else 8, RANKS
    multiples = {
        "none": shared + 24 + scores,
        "tensor": shared + (24 + scores) / t,
        "tensor, sequence": (shared + 24 + scores) / t,
        "tensor, selective": shared + 24 / t,
        "tensor, sequence, selective": (shared + 24) / t,
        "full": 4 / t,
    }
    return sbh * multiples[technique]


def hybrid(models: dict[str, ModelConfig]) -> Iterator[dict[str, Any]]:
    """Layers of other kinds, one sequence, on one rank."""
    from layers import kept_bytes, multiplied

    for name, (_, letters, length) in HYBRID.items():
        for letter in letters:
            work = Workload(1, length, 2)
            plain = multiplied(letter, models[name], work, remat="none")
            for remat in (*POLICIES, *([CHEAP[letter]] if letter in CHEAP else [])):
                kept = kept_bytes(letter, models[name], work, remat=remat)[letter]
                yield {
                    "kind": "hybrid", "model": name, "letter": letter, "remat": remat, "rows": 1, "length": length,
                    "names": kept, "bytes": sum(kept.values()),
                    "flops_added": multiplied(letter, models[name], work, remat=remat) / plain - 1,
                }  # fmt: skip


def compiled_layers(models: dict[str, ModelConfig]) -> Iterator[dict[str, Any]]:
    """Stacks as XLA compiles them: at the true width, and at a thirty-second of it, where one of them runs."""
    from layers import compiled, kept_bytes

    for name in ("GPT 22B", "GPT 175B"):
        for width, model in (("true", models[name]), ("reduced", reduced(models[name]))):
            for remat in POLICIES:
                facts = compiled(
                    "*-", model, Workload(1, LENGTH), remat=remat, run=(name, width) == ("GPT 22B", "reduced")
                )
                kept = kept_bytes("*-", model, Workload(1, LENGTH, 2), remat=remat)
                yield {
                    "kind": "compiled", "model": name, "width": width, "remat": remat, **facts,
                    "traced": sum(sum(names.values()) for names in kept.values()), "sbh": LENGTH * model.hidden_size,
                }  # fmt: skip


def reduced(model: ModelConfig) -> ModelConfig:
    """The model at a thirty-second of its width and heads."""
    shrink = lambda field: getattr(model, field) // SHRINK  # noqa: E731
    fields = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return dataclasses.replace(model, **{field: shrink(field) for field in fields})


def _model(file: str) -> ModelConfig:
    return load([FOLDER.parents[1] / "gin_configs" / "models" / f"{file}.gin"])[0].model


def _digest(model: ModelConfig) -> str:
    return hashlib.sha256(model_text(model).encode()).hexdigest()[:12]


if __name__ == "__main__":
    main()
