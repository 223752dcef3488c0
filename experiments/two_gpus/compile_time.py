"""How long R1's forward and backward pass takes to compile: `python experiments/two_gpus/compile_time.py`.

One process compiles it with an empty cache, the next one with what the first has left there; then the same two, with
the lowered program kept in a file. Each prints a line with the seconds that tracing, lowering and compiling take;
loading modules and allocating parameters are not part of them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time


def compiled(*, keep: bool) -> dict[str, float]:
    """Seconds by phase, in this process. keep: the lowered program is read from a file, or else written there."""
    import jax

    from orogen.bench.train import pass_to_compile
    from orogen.bench.workload import Workload
    from orogen.parallel.kept import kept_program
    from orogen.parallel.runtime import configure

    configure()
    work = Workload(model="r1")
    function, given = pass_to_compile(work.config())
    jax.devices()
    leaves, tree = jax.tree.flatten(given)
    marks = [time.perf_counter()]
    if keep:
        flat = lambda *leaves: jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves)))  # noqa: E731
        traced = jax.jit(kept_program(flat, leaves, name=repr(work)).call).trace(*leaves)
    else:
        traced = function.trace(*given)
    marks.append(time.perf_counter())
    lowered = traced.lower()
    marks.append(time.perf_counter())
    lowered.compile()
    marks.append(time.perf_counter())
    names = ("trace_s", "lower_s", "xla_s")
    phases = {name: round(end - start, 2) for name, start, end in zip(names, marks, marks[1:], strict=False)}
    return {**phases, "all_s": round(marks[-1] - marks[0], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", choices=("usual", "kept"), help=argparse.SUPPRESS)
    one = parser.parse_args().one
    if one:
        print(json.dumps(compiled(keep=one == "kept")))
        return
    for kind in ("kept", "usual"):
        with tempfile.TemporaryDirectory() as cache:
            for name in ("from nothing", "from the cache"):
                command = [sys.executable, __file__, "--one", kind]
                environment = {**os.environ, "XDG_CACHE_HOME": cache}
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                row = {"case": f"compiling R1, {kind}, {name}", **json.loads(done.stdout.splitlines()[-1])}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
