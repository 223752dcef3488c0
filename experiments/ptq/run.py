"""Quantises one checkpoint in several ways and records the loss of each. See README.md.

python experiments/ptq/run.py runs/ptq
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import matplotlib

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


def arms() -> dict[str, QuantizeConfig]:
    """By name: each format with and without rounded inputs, and AutoQuantize under several budgets."""
    found = {}
    for name, changes in {
        "fp8": {"format": "fp8"},
        "fp8_channel": {"format": "fp8_channel"},
        "nvfp4_max": {"format": "nvfp4", "scales": "max"},
        "nvfp4_four_over_six": {"format": "nvfp4", "scales": "four_over_six"},
        "nvfp4_mse": {"format": "nvfp4", "scales": "mse"},
    }.items():
        found[f"{name}_weights"] = dataclasses.replace(ALL, inputs="none", **changes)
        found[name] = dataclasses.replace(ALL, **changes)
    for bits in BITS:
        found[f"auto_{bits:g}_weights"] = dataclasses.replace(ALL, inputs="none", effective_bits=bits)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    checkpoint, began = parser.parse_args().checkpoint, time.monotonic()
    data = DataConfig(corpus="stdlib", tokenizer="byte")
    records = []
    with tempfile.TemporaryDirectory() as scratch, unquantised_folder(checkpoint, Path(scratch) / "model") as folder:
        quantiser = Quantiser(folder, ALL, lambda tokenizer: text_of_corpus(data, tokenizer, ALL), progress=print)
        calibrated = quantiser.calibrate()
        for name, config in arms().items():
            outcome = quantiser.write(calibrated, Path(scratch) / name, config)
            record = {"arm": name, **quantiser.described(calibrated, outcome)}
            records.append(record)
            print(name, f"{record['relative_loss']:+.4%}", f"{record['stored_bits']:.3f} bits", flush=True)
    (HERE / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    draw(records)
    print(f"{time.monotonic() - began:.0f} s")


def draw(records: list[dict]) -> None:
    """Relative loss against stored bits."""
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    auto = [r for r in records if r["arm"].startswith("auto")]
    axes.plot(
        [r["stored_bits"] for r in auto], [100 * r["relative_loss"] for r in auto], "o-", label="AutoQuantize, weights"
    )
    for record in records:
        if not record["arm"].startswith("auto"):
            whole = not record["arm"].endswith("_weights")
            x, y = record["stored_bits"], 100 * record["relative_loss"]
            axes.plot(x, y, "^" if whole else "s", color="tab:red" if whole else "tab:gray")
            axes.annotate(record["arm"], (x, y), fontsize=7, xytext=(4, 2), textcoords="offset points")
    axes.set_xlabel("stored bits per weight of the layers' products")
    axes.set_ylabel("loss, % above bfloat16's")
    axes.legend(frameon=False)
    figure.savefig(HERE / "figure.png", dpi=130)


if __name__ == "__main__":
    main()
