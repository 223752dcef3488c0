"""`orogen tokenize` and `orogen curate`. Importing this imports neither jax nor datatrove."""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from orogen.command import EXIT_FAILURE, Command, add_config_arguments, answer, fail, load_config, positive
from orogen.config.checks import ConfigError
from orogen.config.curate import CurateConfig, ExtractConfig, LanguageConfig
from orogen.config.streams import FULL, say

SHOWN = 5  # records that are named on the terminal


@contextlib.contextmanager
def _full_disk_named(out: Path) -> Iterator[None]:
    """Names the folder whose disk is full. The error of a write does not name it."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL or error.filename is not None:
            raise
        text = f"{os.strerror(error.errno)}; expected room: the same command then continues"
        raise OSError(error.errno, text, str(out)) from error


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
            with _full_disk_named(options.out):
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
        "orogen tokenize --gin_file gin_configs/data/stdlib.gin --out stores/stdlib --workers 2 --json",
    ),
    add_arguments=_add_tokenize_arguments,
    run=tokenize,
    bare=True,
)


EXECUTORS = ("local", "slurm", "ray")
NEEDS = ("datatrove", "fastwarc", "resiliparse", "scipy")


def _add_curate_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR",
                        help="a new folder, or one of a curation that was stopped, which goes on")  # fmt: skip
    parser.add_argument("--workers", type=positive, metavar="N", help="tasks at a time; by default one per core")
    parser.add_argument("--executor", choices=EXECUTORS, default="local", help="where tasks run; local by default")
    parser.add_argument("--partition", metavar="NAME", help="SLURM: the partition")
    parser.add_argument("--time", metavar="LIMIT", help="SLURM: time limit of a task; 24:00:00 by default")
    parser.add_argument("--memory_gb", type=positive, metavar="N", help="SLURM and Ray: memory of a task; 4 by default")
    parser.add_argument("--setup", metavar="LINE", help="SLURM: a line of shell to run before a task")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object on stdout")


def curate(options: argparse.Namespace) -> int:
    """`orogen curate`."""
    from orogen.config.load import load_curation

    config, text = load_curation(options.gin_file, options.gin_bindings)
    _require_packages(config)
    _check_place(options)
    from orogen.data.curate.execute import Resources, cores
    from orogen.data.curate.run import curate, is_whole, prepare, tidy
    from orogen.data.curate.work import REPORT
    from orogen.train.lock import RunLock

    fields = {name: getattr(options, name) for name in Resources._fields if getattr(options, name) is not None}
    resources = Resources(**{"workers": cores(), **fields})
    work = prepare(config, text, options.out)
    if not is_whole(options.out):
        with RunLock(options.out, log=say), _full_disk_named(options.out):
            job = curate(config, work, resources, show)
        if job is not None:
            answer(options, {"job": job}, [f"submitted; the last job is {job}"])
            return 0
    tidy(options.out)
    facts = json.loads((options.out / REPORT).read_bytes())
    answer(options, facts, _curated_lines(facts, options.out))
    return 0


def show(out: Path, facts: dict[str, Any]) -> None:
    """Makes the report's page; called by the last pass, wherever that runs."""
    from orogen.report.curation import write_page

    write_page(out, facts, config_text=(out / "config.gin").read_text())


def _require_packages(config: CurateConfig) -> None:
    """Raises ConfigError if what the stages need is not installed."""
    extract, language = config.stage(ExtractConfig), config.stage(LanguageConfig)
    extractor = [extract.extractor] if extract else []
    names = [*NEEDS, *extractor, *(["py3langid"] if language else [])]
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"orogen curate needs {', '.join(missing)}; expected pip install 'orogen[curate]'")


def _check_place(options: argparse.Namespace) -> None:
    """Raises ConfigError if the options do not fit the executor."""
    readers = {"partition": ("slurm",), "time": ("slurm",), "setup": ("slurm",), "memory_gb": ("slurm", "ray")}
    for name, executors in readers.items():
        if getattr(options, name) is not None and options.executor not in executors:
            expected = " or ".join(f"--executor {executor}" for executor in executors)
            raise ConfigError(
                f"--{name} is {getattr(options, name)!r}, which nothing reads; expected {expected} with it"
            )
    if options.executor == "slurm" and (options.partition is None or shutil.which("sbatch") is None):
        raise ConfigError("--executor slurm submits with sbatch; expected --partition NAME, on a host of the cluster")
    if options.executor == "ray" and importlib.util.find_spec("ray") is None:
        raise ConfigError("--executor ray needs Ray; expected pip install 'datatrove[ray]'")


def _curated_lines(facts: dict[str, Any], out: Path) -> list[str]:
    """One line per stage, and where the rest is."""
    lines = []
    for name, stage in facts["stages"].items():
        left, removed = stage["left"], stage["removed"]
        reasons = ", ".join(f"{reason} {found['documents']:,}" for reason, found in removed.items())
        lines.append(f"{name:14}{left['documents']:>12,} documents {left['bytes']:>16,} bytes  {reasons}".rstrip())
    broken = facts["broken"]
    if broken["records"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in broken["reasons"].items())
        lines.append(f"broken: {broken['records']:,} ({reasons}); named in {out / 'broken.jsonl'}")
    return [*lines, f"{out / 'documents'}, {out / 'report.html'}"]


CURATE = Command(
    name="curate",
    help="documents to documents: text from HTML, language, quality, duplicates, evaluation text; with a report",
    examples=(
        "orogen curate --gin_file gin_configs/curation/web.gin --out runs/curated "
        "--gin_bindings \"CurateConfig.sources=[('crawl', '/path/to/warc')]\"",
        "orogen curate --gin_file gin_configs/curation/web.gin --out runs/curated --executor slurm --partition cpu",
    ),
    add_arguments=_add_curate_arguments,
    run=curate,
    bare=True,
)
