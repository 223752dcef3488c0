"""Compiles whole gradient passes of a hybrid on four simulated stages, and draws the memory that each schedule needs.

`python compiled.py` writes compiled.jsonl (ten minutes on one CPU core) and draws memory.png from that file;
`python compiled.py --draw` only draws. Nothing runs: the numbers are XLA's plan for one device.
"""

import hashlib
import json
import pathlib
import sys
from typing import Any

from matplotlib.figure import Figure

from orogen.config.load import parse
from orogen.config.plan import PlanConfig
from orogen.parallel.runtime import configure
from orogen.report.pictures import LIGHT
from orogen.train.next_token import NEXT_TOKENS

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "compiled.jsonl"
STAGES, ROWS, LENGTH = 4, 1, 512
SCHEDULES = (("gpipe", 1), ("1f1b", 1), ("interleaved", 2))
MICROBATCHES = (8, 16, 32)
REMAT = ("none", "full")
# Sixteen layers with the sizes of the toy model, except its vocabulary, whose head would outweigh a stage.
BINDINGS = (
    "ModelConfig.pattern = 'M-*-M-*-M-*-M-*-'", "ModelConfig.mtp_depths = 0", "ModelConfig.vocab_size = 512",
    "ModelConfig.hidden_size = 256",
)  # fmt: skip

Run = dict[str, Any]


def measure(kind: str, virtual: int, microbatches: int, remat: str) -> Run:
    """Bytes of one device's temporaries, and the FLOPs of all devices against those of one."""
    import jax
    import jax.numpy as jnp

    from orogen.cost.assemble import assemble
    from orogen.data.packing import Batch
    from orogen.simulate.aot import flops_overhead
    from orogen.train.step import BATCH_AXES, gradients

    # Parsed without `load`, which would refuse the sizes of experts that these layers do not read.
    model = parse([HERE.parents[1] / "gin_configs/models/nemotron3_toy.gin"], BINDINGS)[0].model
    setting = {"schedule": kind, "virtual": virtual, "microbatches": microbatches, "remat": remat}
    config = PlanConfig(stage=STAGES, **setting)
    plan, built = assemble(model, config, length=LENGTH)
    sharding = plan.sharding(*BATCH_AXES)
    shape = ROWS * microbatches, LENGTH
    tokens_bt, weights_bt = (jax.ShapeDtypeStruct(shape, d, sharding=sharding) for d in (jnp.int32, jnp.float32))
    step = jax.jit(gradients(built, NEXT_TOKENS, model, plan, "float32"))
    lowered = step.lower(built.params, built.buffers, Batch(tokens_bt, tokens_bt, tokens_bt, weights_bt))
    schedule: Any = plan.schedule
    return {
        "config": hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:12],
        **setting, "stages": STAGES, "rows": ROWS, "sequence_length": LENGTH, "jax": jax.__version__,
        "segments": built.layout.segmented, "stash_slots": max(schedule.stash_slots),
        "temporary_bytes": lowered.compile().memory_analysis().temp_size_in_bytes,
        "flops_overhead": flops_overhead(model, config, ROWS * microbatches, LENGTH),
    }  # fmt: skip


def draw(runs: list[Run], path: pathlib.Path) -> None:
    """Memory against microbatches, one panel per choice of rematerialisation."""
    figure = Figure(figsize=(10, 3.8), dpi=150, layout="constrained")
    colours = {"gpipe": "#6b7280", "1f1b": LIGHT.strong, "interleaved": LIGHT.accent}
    for axes, remat in zip(figure.subplots(1, 2), REMAT, strict=True):
        for kind, virtual in SCHEDULES:
            mine = [run for run in runs if (run["schedule"], run["remat"]) == (kind, remat)]
            label = kind + (f", {virtual} chunks per stage" if virtual > 1 else "")
            sizes = [run["temporary_bytes"] / 2**20 for run in mine]
            axes.plot([run["microbatches"] for run in mine], sizes, marker="o", color=colours[kind], label=label)
        axes.set_title(f"Temporary MiB of one of {STAGES} stages, remat {remat}", loc="left", fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_xticks(MICROBATCHES, [str(count) for count in MICROBATCHES])
        axes.set(xlabel="microbatches", ylim=(0, None))
        axes.grid(color=LIGHT.grid, linewidth=0.8)
        axes.spines[:].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def print_table(runs: list[Run]) -> None:
    print("| remat | schedule | v | m | stash slots | temporary MiB | beside gpipe | FLOPs over one device's |")
    print("|---" * 8 + "|")
    for run in runs:
        same = {"remat": run["remat"], "microbatches": run["microbatches"], "schedule": "gpipe"}
        base = next(r for r in runs if all(r[key] == value for key, value in same.items()))
        cells = (run["remat"], run["schedule"], run["virtual"], run["microbatches"], run["stash_slots"])
        ratio = run["temporary_bytes"] / base["temporary_bytes"]
        sizes = f"{run['temporary_bytes'] / 2**20:.1f} | {ratio:.2f} | {100 * run['flops_overhead']:+.2f} %"
        print("| " + " | ".join(map(str, cells)) + f" | {sizes} |")


def main() -> None:
    if "--draw" not in sys.argv:
        configure(STAGES)
        settings = [(*schedule, m, remat) for remat in REMAT for schedule in SCHEDULES for m in MICROBATCHES]
        RESULTS.write_text("".join(json.dumps(measure(*setting)) + "\n" for setting in settings))
    runs = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    draw(runs, HERE / "memory.png")
    print_table(runs)


if __name__ == "__main__":
    main()
