"""Quantises one checkpoint per seed in several ways and records the loss of each. See README.md.

python experiments/ptq/run.py runs/ptq1 --seed 1     # then 2 and 3: each adds its lines to results.jsonl
python experiments/ptq/run.py --draw                 # the tables, and figure.png
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from orogen.compress.calibration_text import text_of_corpus
from orogen.compress.quantize import Quantiser, unquantised_folder
from orogen.config.data import DataConfig
from orogen.config.quantize import QuantizeConfig

HERE = Path(__file__).parent
ALL = QuantizeConfig(
    format="auto", keep=(), calibration_tokens=16384, score_tokens=16384, heldout_tokens=32768, batch_size=16,
    sequence_length=256, scales="mse",
)  # fmt: skip
BITS = (4.0, 4.25, 4.5, 4.75, 5.0, 5.5, 6.0, 7.0, 8.0)


# The published models keep attention and latent projections; Super's NVFP4 has FP8 in shared experts and Mamba too.
KEPT = ("attention:plain", "latent:plain")
SUPER = ("shared:fp8", "mamba:fp8", *KEPT)
EXAMPLE = "auto_4.75"  # the arm whose choice of formats is recorded layer by layer


def arms() -> dict[str, QuantizeConfig]:
    """By name: each format for all weights, the published mixes, and AutoQuantize under several budgets. Each but
    AutoQuantize's also rounds inputs; its loss with weights alone rounded is measured too."""
    found = {
        name: dataclasses.replace(ALL, **changes)
        for name, changes in {
            "fp8": {"format": "fp8"},
            "fp8_kept": {"format": "fp8", "keep": KEPT},
            "nvfp4_mse": {"format": "nvfp4", "scales": "mse"},
            "nvfp4_super": {"format": "nvfp4", "scales": "mse", "keep": SUPER},
            EXAMPLE: {"effective_bits": 4.75},
        }.items()
    }
    for bits in BITS:
        found[f"auto_{bits:g}_weights"] = dataclasses.replace(ALL, inputs="none", effective_bits=bits)
    for scales in ("max", "four_over_six"):
        found[f"nvfp4_{scales}"] = dataclasses.replace(ALL, format="nvfp4", scales=scales)
    found["fp8_channel"] = dataclasses.replace(ALL, format="fp8_channel")
    return found


def quantise(checkpoint: Path, seed: int, record: Path) -> None:
    """Adds a line per arm to the file as soon as it is measured, in place of the seed's earlier ones."""
    data = DataConfig(corpus="stdlib", tokenizer="byte")
    before = record.read_text().splitlines() if record.exists() else []
    record.write_text("".join(f"{line}\n" for line in before if json.loads(line)["seed"] != seed))
    with tempfile.TemporaryDirectory() as scratch, unquantised_folder(checkpoint, Path(scratch) / "model") as folder:
        quantiser = Quantiser(folder, ALL, lambda tokenizer: text_of_corpus(data, tokenizer, ALL), progress=print)
        calibrated = quantiser.calibrate()
        for name, config in arms().items():
            outcome = quantiser.write(calibrated, Path(scratch) / name, config)
            found = quantiser.described(calibrated, outcome)
            layers = found.pop("layers")
            found["error_of_first_projection"] = layers[0]["relative_error"] or 0.0
            found |= {"layers": layers} if name == EXAMPLE else {}
            with record.open("a") as file:
                file.write(json.dumps({"arm": name, "seed": seed, **found}) + "\n")
            print(name, f"{found['relative_loss']:+.4%}", f"{found['stored_bits']:.3f} bits", flush=True)


def of_seeds(records: list[dict[str, Any]], arm: str, number: str) -> np.ndarray:
    """The number of each seed."""
    return np.array([record[number] for record in records if record["arm"] == arm])


def show(records: list[dict[str, Any]]) -> None:
    """Prints a line per arm: stored bits, share of the bytes before, error of weights, and loss with weights alone and
    with inputs rounded; mean ± spread over seeds. Draws loss against stored bits."""
    for record in records:
        for after, name in (("loss_after", "whole"), ("loss_after_weights_alone", "alone")):
            record[name] = 100 * (record[after] / record["loss_before"] - 1)
        record["bytes"] = record["quantised_bytes_after"] / record["quantised_bytes_before"]
    for arm in dict.fromkeys(record["arm"] for record in records):
        numbers = {"stored_bits": ".2f", "bytes": ".3f", "error_of_first_projection": ".2%"}
        cells = [format(of_seeds(records, arm, number).mean(), form) for number, form in numbers.items()]
        for number in ("alone", "whole"):
            values = of_seeds(records, arm, number)
            cells.append(f"{values.mean():+.2f} ± {values.std(ddof=1) if len(values) > 1 else 0:.2f}")
        print(f"| {arm} | {' | '.join(cells)} |")
    draw(records)


def draw(records: list[dict[str, Any]]) -> None:
    """Loss against stored bits, means over seeds with bars of one spread."""
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    point = lambda arm, number: (of_seeds(records, arm, "stored_bits").mean(), of_seeds(records, arm, number))  # noqa: E731
    names = list(dict.fromkeys(record["arm"] for record in records))
    auto = [f"auto_{bits:g}_weights" for bits in BITS if f"auto_{bits:g}_weights" in names]
    for number, color, label in (("alone", "tab:gray", "weights alone"), ("whole", "tab:red", "inputs too")):
        for name in names:
            if name not in auto:
                bits, values = point(name, number)
                axes.errorbar(bits, values.mean(), np.std(values), fmt="o", color=color, markersize=4)
                if number == "whole":
                    axes.annotate(name, (bits, values.mean()), fontsize=7, xytext=(4, 2), textcoords="offset points")
        axes.plot([], [], "o", color=color, label=label)
    curve = [point(name, "alone") for name in auto]
    axes.errorbar([b for b, _ in curve], [v.mean() for _, v in curve], [np.std(v) for _, v in curve],
                  label="AutoQuantize, weights alone")  # fmt: skip
    axes.set_xlabel("stored bits per weight of the layers' products")
    axes.set_ylabel("loss, % above bfloat16's")
    axes.legend(frameon=False)
    figure.savefig(HERE / "figure.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--seed", type=int, default=1, help="under which the lines are recorded")
    parser.add_argument("--record", type=Path, default=HERE / "results.jsonl", help="the file of results")
    parser.add_argument("--draw", action="store_true", help="only print and draw what is recorded")
    options, began = parser.parse_args(), time.monotonic()
    if not options.draw:
        quantise(options.checkpoint, options.seed, options.record)
    show([json.loads(line) for line in options.record.read_text().splitlines()])
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
