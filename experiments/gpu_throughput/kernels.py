"""The kernels of R1's forward and backward pass as XLA compiles it for a GPU, which need not exist: `python
experiments/gpu_throughput/kernels.py --name 0.9.0` (extra cuda; two minutes of a core).

For each kind of kernel, how many a pass starts and the bytes that they read and write if nothing stays in a cache. The
line goes to `kernels.jsonl`, in place of an earlier one of the same name. Products are not tuned without a GPU, so the
counts compare releases; they predict no time.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from orogen.config.cluster import ClusterConfig
from orogen.config.files import write_atomically

HERE = Path(__file__).parent
RESULTS = HERE / "kernels.jsonl"
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)")
SHAPE = re.compile(r"(pred|bf16|[a-z]\d+)\w*\[([\d,]*)\]")
BODY, TRIPS = re.compile(r"body=%?([\w.\-]+)"), re.compile(r'known_trip_count":\{"n":"(\d+)"')
CALLED = re.compile(r"(?:to_apply|calls|branch_computations)=\{?%?([\w.\-]+)")
TARGET, KIND = re.compile(r'custom_call_target="([^"]*)"'), re.compile(r'"kind":"([^"]*)"|kind=(\w+)')
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}  # which start nothing


def kernels(text: str) -> dict[str, list[int]]:
    """By kind, the kernels that a compiled program starts, and their bytes; each branch of a condition counts once.
    Raises ValueError for a loop of unknown length."""
    bodies: dict[str, list[re.Match[str]]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            name = head[2]
            bodies[name], entry = [], name if head[1] else entry
        elif name and (found := INSTRUCTION.match(line)):
            bodies[name].append(found)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    _count(bodies, entry, 1, counts)
    return dict(counts)


def _count(bodies: dict[str, list[re.Match[str]]], name: str, times: int, counts: dict[str, list[int]]) -> None:
    sizes = {found[1]: _bytes(found[2]) for found in bodies[name]}
    for found in bodies[name]:
        operation, operands, rest = found[3], found[4], found[5]
        if operation in FREE:
            continue
        if operation == "while":
            body, trips = BODY.search(rest), TRIPS.search(rest)
            if body is None or trips is None:
                raise ValueError(f"{found[1]} in {name}: expected a loop of known length")
            _count(bodies, body[1], times * int(trips[1]), counts)
        elif operation in ("call", "conditional"):
            for called in CALLED.findall(rest):
                _count(bodies, called, times, counts)
        else:
            read = sum(sizes.get(operand, 0) for operand in re.findall(r"%([\w.\-]+)", operands))
            counted = counts[_kind(operation, rest)]
            counted[0] += times
            counted[1] += times * (sizes[found[1]] + read)


def _kind(operation: str, rest: str) -> str:
    if operation == "custom-call" and (target := TARGET.search(rest)):
        return target[1]
    if operation == "fusion" and (kind := KIND.search(rest)):
        return f"fusion {kind[1] or kind[2]}"
    return operation


def _bytes(shapes: str) -> int:
    width = {"pred": 1, "bf16": 2}
    return sum(
        width.get(kind, int(re.sub(r"\D", "", kind) or 8) // 8) * int(np.prod([int(n) for n in sizes.split(",") if n]))
        for kind, sizes in SHAPE.findall(shapes)
    )


def line_of(name: str, hardware: str) -> dict[str, Any]:
    """The line of this tree."""
    import jax

    from orogen.bench.train import pass_to_compile
    from orogen.bench.workload import Workload
    from orogen.simulate.hardware import machine
    from orogen.simulate.target import OPTIONS, devices, traced_for

    jax.config.update("jax_platforms", "cpu")  # with the plugin, jax looks for a GPU otherwise
    found = devices(machine(ClusterConfig(hardware=hardware))[0], 1)
    with traced_for(found[0]):
        function, given = pass_to_compile(Workload(model="r1").config(), found)
        program = function.lower(*given).compile(compiler_options=OPTIONS)
    counts, memory = kernels(program.as_text()), program.memory_analysis()
    return {
        "name": name, "hardware": hardware, "jax": jax.__version__, "kernels": sum(n for n, _ in counts.values()),
        "bytes": sum(size for _, size in counts.values()), "temporary_bytes": memory.temp_size_in_bytes,
        "kinds": dict(sorted(counts.items(), key=lambda item: -item[1][1])),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Counts the kernels of R1's pass as compiled for a GPU.")
    parser.add_argument("--name", required=True, help="of this tree, such as its version")
    parser.add_argument("--hardware", default="h100")
    options = parser.parse_args()
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    line = line_of(options.name, options.hardware)
    lines = [other for other in lines if other["name"] != options.name] + [line]
    write_atomically(RESULTS, "".join(f"{json.dumps(each)}\n" for each in lines).encode())
    print(json.dumps(line, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
