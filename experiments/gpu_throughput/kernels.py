"""The kernels of R1's forward and backward pass as XLA compiles it for a GPU, which need not exist: `python
experiments/gpu_throughput/kernels.py --name 0.9.0` (extra cuda; two minutes of a core).

For each kind of kernel, how many a pass starts and the sizes of their operands and results: an upper bound of what they
read and write, since a kernel that reads or writes a slice counts the whole array. The line goes to `kernels.jsonl`, in
place of an earlier one of the same name. Products are not tuned without a GPU, so the counts compare releases; they
predict no time.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from orogen.config.cluster import ClusterConfig
from orogen.config.files import write_atomically

HERE = Path(__file__).parent
RESULTS = HERE / "kernels.jsonl"
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)")
SHAPE = re.compile(r"(pred|bf16|[a-z]\d+)\w*\[([\d,]*)\]")
BODY, TRIPS = re.compile(r"body=%?([\w.\-]+)"), re.compile(r'known_trip_count":\{"n":"(\d+)"')
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%[\w.\-]+)")
OPERAND = re.compile(r"%([\w.\-]+)")
CALLED = re.compile(r"(?:to_apply|calls)=%?([\w.\-]+)")
TARGET, KINDS = re.compile(r'custom_call_target="([^"]*)"'), (r'"kind":"([^"]*)"', r"kind=(\w+)")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}  # which start nothing


Counts = dict[str, list[int]]


def kernels(text: str) -> Counts:
    """By kind, the kernels that a compiled program starts, and their bytes. Of each condition the branch with the
    fewest bytes counts, as sequences of one document take it. Raises ValueError for a loop of unknown length, and for a
    call of nothing known."""
    bodies: dict[str, list[re.Match[str]]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            name = head[2]
            bodies[name], entry = [], name if head[1] else entry
        elif name and (found := INSTRUCTION.match(line)):
            bodies[name].append(found)
    return _counted(bodies, entry)


def _counted(bodies: dict[str, list[re.Match[str]]], name: str) -> Counts:
    """The counts of one computation."""
    sizes = {found[1]: _bytes(found[2]) for found in bodies[name]}
    counts: Counts = {}

    def add(kind: str, number: int, size: int) -> None:
        before = counts.get(kind, [0, 0])
        counts[kind] = [before[0] + number, before[1] + size]

    for found in bodies[name]:
        operation, operands, rest = found[3], found[4], found[5]
        if operation in FREE or operation.endswith("-done"):  # of an asynchronous kernel, counted where it starts
            continue
        if operation in ("while", "call", "conditional"):
            times, called = _called(operation, rest)
            if not called or times is None:
                raise ValueError(f"{found[1]} in {name}: expected a loop of known length, or a known computation")
            least = min((_counted(bodies, each) for each in called), key=_all_bytes)
            for kind, (number, size) in least.items():
                add(kind, times * number, times * size)
            continue
        started = operation.removesuffix("-start")  # its result holds its operands too
        read = 0 if started != operation else sum(sizes.get(each, 0) for each in OPERAND.findall(operands))
        add(_kind(started, rest), 1, sizes[found[1]] + read)
    return counts


def _called(operation: str, rest: str) -> tuple[int | None, list[str]]:
    """How often which computations run, or one of which."""
    if operation == "while":
        trips = TRIPS.search(rest)
        return int(trips[1]) if trips else None, BODY.findall(rest)
    if operation == "call":
        return 1, CALLED.findall(rest)
    return 1, [name for found in BRANCHES.findall(rest) for name in OPERAND.findall(" ".join(found))]


def _all_bytes(counts: Counts) -> int:
    return sum(size for _, size in counts.values())


def _kind(operation: str, rest: str) -> str:
    if operation == "custom-call" and (target := TARGET.search(rest)):
        return target[1]
    if operation == "fusion":
        return f"fusion {next(kind[1] for pattern in KINDS if (kind := re.search(pattern, rest)))}"
    return operation


def _bytes(shapes: str) -> int:
    return sum(_width(kind) * math.prod(int(n) for n in sizes.split(",") if n) for kind, sizes in SHAPE.findall(shapes))


def _width(kind: str) -> int:
    """Bytes of a number; those of less than a byte count as one."""
    return {"pred": 1, "bf16": 2}.get(kind) or max(8, int(re.sub(r"\D", "", kind))) // 8


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
