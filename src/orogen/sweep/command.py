"""`orogen sweep`. Importing this does not import jax."""

import argparse
import contextlib
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orogen.command import EXIT_FAILURE, Command, add_common_arguments, add_config_arguments, answer, fail, positive
from orogen.config.checks import ConfigError
from orogen.config.streams import say

if TYPE_CHECKING:
    from orogen.config.sweep import SweepConfig
    from orogen.sweep.plan import Arms, Run
    from orogen.sweep.results import Results
    from orogen.sweep.runner import Runner
    from orogen.sweep.table import Row


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--run", type=Path, required=True, metavar="DIR",
                        help="the sweep's folder; a sweep that was stopped goes on there")  # fmt: skip
    parser.add_argument("--at_once", type=positive, default=1, metavar="N",
                        help="runs at a time, which share the GPUs of this host; 1 by default")  # fmt: skip
    parser.add_argument("--launch", default="", metavar="ARGUMENTS",
                        help="start each run by `orogen launch ARGUMENTS`")  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="print the runs, and start none")
    add_common_arguments(parser)


def sweep(options: argparse.Namespace) -> int:
    """`orogen sweep`."""
    from orogen.config.files import write_atomically
    from orogen.config.load import load_sweep
    from orogen.launch.local import visible_gpus
    from orogen.sweep.parameters import totals
    from orogen.sweep.plan import make_arms
    from orogen.sweep.results import Results
    from orogen.sweep.runner import Runner, environments
    from orogen.train.lock import RunLock

    config, text = load_sweep(options.gin_file, options.gin_bindings)
    arms = make_arms(config, options.gin_file, options.gin_bindings, totals)
    if options.dry_run:
        return _show(options, arms)
    with RunLock(options.run, log=say), _ending_on_sigterm():
        write_atomically(options.run / "sweep.gin", text.encode())
        results = Results(options.run, config.numbers)
        runner = Runner(
            options.run, results, numbers=config.numbers, at_once=options.at_once, launcher=options.launch,
            environments=environments(options.at_once, [] if options.fake_devices else visible_gpus(os.environ)),
            extra=_passed_on(options), log=say,
        )  # fmt: skip
        searches = arms.searches()
        runner.run(searches)
        if runner.failures or runner.submitted:
            return _unfinished(options, runner)
        rates, edges = best_rates(config, searches, results)
        runs = arms.runs(rates)
        runner.run(runs)
        return _report(options, config, runs=runs, results=results, runner=runner, edges=edges)


@contextlib.contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the sweep as Ctrl-C does: its runs save."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _passed_on(options: argparse.Namespace) -> list[str]:
    """Options of the sweep that are meant for each run."""
    devices = ["--fake_devices", str(options.fake_devices)] if options.fake_devices else []
    return [*devices, *(["--xla", ",".join(options.xla)] if options.xla else [])]


def _show(options: argparse.Namespace, arms: "Arms") -> int:
    """Prints the runs: those of the search with their rates, the others by seed."""
    runs = [*arms.searches(), *arms.runs({})]
    facts = [
        {"run": run.name, "steps": run.config.train.steps, "tokens": run.tokens, "flops": run.flops} for run in runs
    ]
    lines = [f"{f['run']}  {f['steps']:,} steps  {f['tokens']:,} tokens  {f['flops']:.3g} FLOPs" for f in facts]
    answer(options, {"runs": facts}, [*lines, f"{len(runs)} runs, {sum(f['flops'] for f in facts):.3g} FLOPs in all"])
    return 0


def best_rates(config: "SweepConfig", searches: "list[Run]", results: "Results") -> tuple[dict[str, float], list[str]]:
    """Each arm's best learning rate, and the arms whose best rate is at an end of the grid, so that a better one may
    lie outside. A rate whose run diverged, or whose metric is not finite, is not chosen. Raises ConfigError for an arm
    of which no rate can be chosen."""
    found: dict[str, dict[float, float]] = {}
    for run in searches:
        if (result := results.of(run)) is not None:
            value, known = result["value"], found.setdefault(run.arm.name, {})
            if value is not None and math.isfinite(value):
                known[run.config.optimizer.learning_rate] = value
    if lost := [arm for arm, values in found.items() if not values]:
        rates = ", ".join(f"{rate:g}" for rate in config.learning_rates)
        raise ConfigError(f"arm {lost[0]} diverges with SweepConfig.learning_rates {rates}; expected one that does not")
    choose = min if config.lower_is_better else max
    best = {arm: choose(values, key=values.__getitem__) for arm, values in found.items()}
    extremes = (min(config.learning_rates, default=None), max(config.learning_rates, default=None))
    return best, [arm for arm, rate in best.items() if rate in extremes]


def _unfinished(options: argparse.Namespace, runner: "Runner") -> int:
    """Reports why the sweep has no result yet; returns the exit status."""
    if runner.failures:
        more = f", and {len(runner.failures) - 1} more" if len(runner.failures) > 1 else ""
        name, reason = runner.failures[0]
        return fail(f"{name} did not end well{more}: {reason}; log in {options.run / 'logs' / name}.log", EXIT_FAILURE)
    line = f"{len(runner.submitted)} runs are submitted; call again when they have ended"
    answer(options, {"finished": False, "submitted": runner.submitted}, [line])
    return 0


def _report(
    options: argparse.Namespace, config: "SweepConfig", *, runs: "list[Run]", results: "Results", runner: "Runner",
    edges: list[str],
) -> int:  # fmt: skip
    """Writes table and picture of what is done, and prints the table."""
    from orogen.config.files import write_atomically
    from orogen.sweep import table

    done: dict[tuple[str, ...], dict[int, Any]] = {run.arm.values: {} for run in runs}
    for run in runs:
        if (result := results.of(run)) is not None:
            done[run.arm.values][run.config.train.seed] = result
    compared = table.compared(config, done)
    if compared:
        text = table.markdown(config, compared)
        write_atomically(options.run / "table.md", text.encode())
        table.draw(options.run / "figure.png", config, compared)
    if runner.failures or runner.submitted:
        return _unfinished(options, runner)
    notes = [f"the best learning rate of {arm} is an end of SweepConfig.learning_rates" for arm in edges]
    facts = [_facts(row, config) for row in compared]
    for number in config.further:
        for fact, row in zip(facts, table.compared(config, done, number), strict=True):
            fact.setdefault("further", {})[number] = _effect_facts(row)
    answer(options, {"finished": True, "metric": config.metric, "arms": facts, "notes": notes},
           [text.rstrip(), *notes, f"picture: {options.run / 'figure.png'}"])  # fmt: skip
    return 0


def _facts(row: "Row", config: "SweepConfig") -> dict[str, Any]:
    """The facts about an arm in the output of `--json`."""
    verdict = None if row.effect is None else row.effect.verdict(lower_is_better=config.lower_is_better)
    return {"arm": row.name, "seeds": len(row.metric_n), **_effect_facts(row), "verdict": verdict}


def _effect_facts(row: "Row") -> dict[str, Any]:
    """The arm's mean and effect. Numbers that are not finite are null, since JSON has none."""
    effect = {} if row.effect is None else row.effect._asdict()
    finite = {name: value if math.isfinite(value) else None for name, value in effect.items()}
    return {"mean": mean if math.isfinite(mean := float(row.metric_n.mean())) else None, **finite}


SWEEP = Command(
    name="sweep",
    help="run a matrix of bindings and seeds with equal budgets, and compare them",
    examples=(
        "orogen sweep --gin_file experiments/mtp/study.gin --run runs/mtp",
        "orogen sweep --gin_file experiments/mtp/study.gin --run runs/mtp --dry_run",
        "orogen sweep --gin_file experiments/mtp/study.gin --run runs/mtp --launch 'slurm --processes 1 --gpus 1'",
    ),
    add_arguments=_add_arguments,
    run=sweep,
    bare=True,  # it forks, which a process with jax in it should not; its runs take the options
)
