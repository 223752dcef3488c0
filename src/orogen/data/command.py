"""`orogen tokenize`. Importing this does not import jax."""

import argparse
import contextlib
import os
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from orogen.command import EXIT_FAILURE, Command, add_config_arguments, answer, fail, load_config, positive

SHOWN = 5  # records that are named on the terminal


def _add_tokenize_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the store: a new folder, or one begun")
    parser.add_argument(
        "--workers", type=positive, default=os.cpu_count() or 1, metavar="N",
        help="processes; the store does not depend on their number (default: one per core)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def tokenize(options: argparse.Namespace) -> int:
    """`orogen tokenize`."""
    config, _ = load_config(options, "data")
    from orogen.data.make_store import make_store
    from orogen.data.store import broken_records
    from orogen.report.metrics import Progress

    began, tokens, bar = time.monotonic(), 0, None
    with contextlib.ExitStack() as held:

        def progress(counts: dict[str, int], done: int, units: int) -> None:
            nonlocal tokens, bar
            bar = bar or held.enter_context(Progress(units, first_step=done, unit="unit", label="tokenize"))
            if counts:
                tokens += counts["tokens"]
                bar.update(done, {"tokens_per_second": tokens / (time.monotonic() - began)})

        try:
            manifest = make_store(config.data, options.out, workers=options.workers, progress=progress)
        except BrokenProcessPool:
            return fail("a worker was killed, perhaps for its memory; the same command continues", EXIT_FAILURE)
    counts = manifest["counts"]
    facts = {**counts, "files": manifest["files"], "shards": len(manifest["shards"]), "sha256": manifest["sha256"]}
    lines = [f"{name:>10}  {format(value, ',') if isinstance(value, int) else value}" for name, value in facts.items()]
    lines += [f"left out: {one['reason']}" for one in broken_records(options.out, SHOWN)]
    if counts["broken"] > SHOWN:
        lines.append(f"and {counts['broken'] - SHOWN} others, in {options.out / 'broken.jsonl'}")
    answer(options, {"store": str(options.out), **facts}, [*lines, f"written: {options.out}"])
    return 0


TOKENIZE = Command(
    name="tokenize",
    help="tokenize a corpus into a store that training reads by memory map",
    examples=(
        "orogen tokenize --gin_file gin_configs/data/stdlib.gin --out stores/stdlib",
        "orogen train --gin_file gin_configs/recipes/quickstart.gin --fake_devices 8 --run runs/stored "
        "--gin_bindings \"DataConfig.corpus='stores/stdlib'\"",
    ),
    add_arguments=_add_tokenize_arguments,
    run=tokenize,
    bare=True,
)
