"""Memory of small steps by the formulas and as XLA lays it out for an H100, which need not exist: `python
experiments/predicted_and_measured/compile_small.py` (extra cuda).

A case ends when XLA has laid out the memory, before it generates code, which takes several times as long. Its line is
then appended to `compiled_small.jsonl`; cases that are there are left out. `--table` prints all beside the formulas.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from orogen.config.cluster import ClusterConfig
from orogen.config.model import ModelConfig
from orogen.config.plan import FOR_GPU, PlanConfig
from orogen.config.run import OptimizerConfig, RunConfig, TrainConfig
from orogen.simulate import layout
from orogen.simulate.compiled import apart
from orogen.simulate.hardware import machine
from orogen.simulate.predict import predict

RESULTS = Path(__file__).parent / "compiled_small.jsonl"
CLUSTER = ClusterConfig(hardware="h100")
# Activations outweigh the 32 MiB that XLA gives cuBLAS to work in, and no kernel pads a width.
MODEL = {
    "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 2048,
    "mamba_num_heads": 16, "mamba_head_dim": 64, "n_groups": 2, "ssm_state_size": 64, "chunk_size": 128,
    "vocab_size": 4096, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512,
    "moe_shared_expert_intermediate_size": 1024,
}  # fmt: skip
KERNELS = {field: kernel for field, kernel in FOR_GPU.items() if field != "quantize"} | {"logit_rows": 4096}
ROWS, LENGTH = 16, 1024  # of a microbatch on one device
ZERO_3, ALLTOALL = {"data": 2, "fsdp": "parameters"}, {"dispatch": "alltoall", "capacity_factor": 1.25}
# By name: pattern and plan.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("ME*-ME*-", {"remat": "full"}),
    "two stages": ("ME*-ME*-", {"stage": 2, "microbatches": 4}),
    "elementwise": ("ME*-ME*-", {"remat": "elementwise"}),
    "selective": ("ME*-ME*-", {"remat": "selective"}),
    "nothing recomputed": ("ME*-ME*-", {}),
    "ZeRO-3, M": ("M-M-M-", ZERO_3),
    "ZeRO-3, *": ("-*-*-*", ZERO_3),
    "ZeRO-3, E": ("E-E-E-", ZERO_3),
    "four expert ranks": ("ME*-", {"data": 4, "expert": 4, "fsdp": "optimizer", **ALLTOALL}),
    "tensor 2": ("ME*-", {"tensor": 2}),
    "two microbatches": ("ME*-", {"microbatches": 2}),
    "two stages, *": ("-*-*-*-*", {"stage": 2, "microbatches": 4}),
    "ragged": ("ME*-", {"data": 2, "expert": 2, "fsdp": "optimizer", "dispatch": "ragged", "buffer_factor": 1.5}),
    "context 2": ("M*-", {"context": 2, "context_attention": "allgather"}),
}


def config(case: str) -> RunConfig:
    """The run of a case."""
    pattern, plan = CASES[case]
    chosen = PlanConfig(**KERNELS, **plan)
    train = TrainConfig(
        steps=1, batch_size=ROWS * chosen.data * chosen.microbatches, sequence_length=LENGTH * chosen.context, seed=0,
        compute_dtype="bfloat16",
    )  # fmt: skip
    return RunConfig(
        model=ModelConfig(pattern=pattern, **MODEL), plan=chosen, train=train,
        optimizer=OptimizerConfig(learning_rate=1e-3),
    )  # fmt: skip


def compile_case(case: str) -> None:
    """Compiles the step."""
    from orogen.parallel.runtime import configure
    from orogen.simulate.compiled import compare

    configure(1)
    compare(config(case), machine(CLUSTER)[0])


def laid_out(case: str) -> dict[str, Any]:
    """The bytes that XLA lays out for a case, cuDNN's workspaces apart."""
    found = layout.laid_out([sys.executable, __file__, "--one", case])
    pattern, plan = CASES[case]
    return {
        "case": case, "pattern": pattern, "plan": plan, "hardware": CLUSTER.hardware, "compiled_bytes": found.bytes,
        "seconds": round(found.seconds, 1),
    }  # fmt: skip


def print_table(lines: list[dict[str, Any]]) -> None:
    print("| step | formulas MB | compiled MB | difference |\n|---|---|---|---|")
    for line in lines:
        parts, _ = apart(predict(config(line["case"]), CLUSTER).memory)
        analytic, compiled = sum(parts.values()), line["compiled_bytes"]
        name = f"`{line['pattern']}`, {line['case']}"
        print(f"| {name} | {analytic / 1e6:,.0f} | {compiled / 1e6:,.0f} | {analytic / compiled - 1:+.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", choices=CASES)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    options = parser.parse_args()
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    if options.one:
        compile_case(options.one)
    elif options.table:
        print_table(lines)
    else:
        known = {line["case"] for line in lines}
        for case in (case for case in options.cases if case not in known):
            line = laid_out(case)
            with RESULTS.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print_table([line])


if __name__ == "__main__":
    main()
