"""A run from its config to its last checkpoint: folder, corpus, first state, loop.

Of several processes, each runs all of this; the first one alone locks and describes the folder and writes metrics.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from orogen.checkpoint.folders import Folder, read_tokenizer
from orogen.checkpoint.steps import Checkpoints
from orogen.config.checks import ConfigError
from orogen.config.run import RunConfig
from orogen.cost.assemble import assemble
from orogen.data.loader import Corpus
from orogen.data.tokenizer import check_rows, check_vocab_size
from orogen.model.count import count
from orogen.parallel import distributed
from orogen.parallel.plan import Plan
from orogen.report.loggers import require_loggers
from orogen.report.lost import END, add_lost
from orogen.report.metrics import MetricsWriter
from orogen.report.silent import SilentWriter
from orogen.train.goodput import Clock
from orogen.train.lock import RunLock, await_free
from orogen.train.loop import Loop
from orogen.train.profiled import StepProfile, Steps
from orogen.train.run_folder import check_folder, describe_run, environment, keep_orphaned_metrics
from orogen.train.state import TrainState
from orogen.train.stop import Stop, StoppedEarlyError
from orogen.train.task import Task
from orogen.train.trained import narrow_frozen
from orogen.train.watch import Watch

# The folder of the tokenizer, in that of the run.
TOKENIZER = "tokenizer"


class Trained(NamedTuple):
    """What a run leaves in memory for its report. finished: whether it took its last step; steps: the number taken in
    this call; stop: its signal handling."""

    state: TrainState
    corpus: Corpus
    finished: bool
    steps: int
    stop: Stop


def train(
    config: RunConfig,
    text: str,
    run_dir: Path,
    task: Task,
    *,
    resume: bool = False,
    origin: Folder | None = None,
    profile: Steps | None = None,
    log: Callable[[str], None] = print,
    until: contextlib.ExitStack | None = None,
) -> Trained:
    """Trains `config` on the task, in `run_dir`, until `TrainConfig.steps` or a SIGTERM, SIGINT or SIGHUP, and saves.

    origin: the folder whose weights and tokenizer a run without a checkpoint of its own starts from, with a fresh
    optimizer. profile: steps to trace; see `train.profiled`. until: a stack that releases the folder and the signals
    when it exits, for a caller that still writes there; None: they are released at the end of this call. Everything
    that can be refused is refused before the folder is touched. Raises ConfigError, StoppedEarlyError, NonFiniteError,
    FaultyHardwareError, NotSavedError.
    """
    with contextlib.ExitStack() as stack:
        profiled, held = StepProfile(profile, run_dir, log), until or stack
        return _train(config, text, run_dir, task, resume=resume, origin=origin, profile=profiled, log=log, held=held)


def _train(
    config: RunConfig,
    text: str,
    run_dir: Path,
    task: Task,
    *,
    resume: bool,
    origin: Folder | None,
    profile: StepProfile,
    log: Callable[[str], None],
    held: contextlib.ExitStack,
) -> Trained:
    """`train`; `held` releases the lock and the signals when it exits."""
    clock, stop = Clock(), held.enter_context(Stop())
    config.need("model", "data", "train", "optimizer")
    require_loggers(config.train.loggers)
    plan, wide = assemble(config.model, config.plan, length=config.train.sequence_length)
    built = narrow_frozen(wide, config)
    _check_devices(config)
    checked = functools.partial(check_folder, run_dir, config, resume=resume)
    distributed.from_first(lambda: (checked(), await_free(run_dir, log=log)))
    corpus = _open_corpus(task, config, run_dir, origin)
    _check_corpora(corpus)
    lock = _locked(run_dir, checked, stop, held, log)
    every = config.train.checkpoint_every if config.train.roll_back_after else None
    kept = {"keep": config.train.keep_checkpoints, "every": every}
    with Checkpoints(run_dir, **kept, model=config.model, together=True) as checkpoints:
        watch = Watch(run_dir, config.train.hang_minutes, process=distributed.index())
        run = Loop(
            task, config, plan=plan, built=built, corpus=corpus, checkpoints=checkpoints, stop=stop, lock=lock,
            profile=profile, log=log, clock=clock, watch=watch,
        )  # fmt: skip
        state = run.start(origin)
        distributed.from_first(functools.partial(_describe, run, task, text, run_dir, origin))
        with _writer(run_dir, run) as writer:
            with watch:
                if not stop.alone and any(distributed.from_all(stop.asked)):
                    raise StoppedEarlyError(stop.status)
                run.evaluate_last(state, writer)
                state = run.steps(state, writer)
                run.finish(state, writer)
            run.complete(state, writer)
    step, asked = int(state.step), any(distributed.from_all(stop.asked))
    stop.working, stop.alone = False, True  # everything is saved
    return Trained(state, corpus, step >= config.train.steps and not asked, step - run.first_step, stop)


def _locked(
    run_dir: Path, checked: Callable[[], Any], stop: Stop, held: contextlib.ExitStack, log: Callable[[str], None]
) -> RunLock:
    """The lock of the run folder, which the first process takes for all. checked: raises ConfigError if the folder is
    another run's."""
    lock = RunLock(run_dir, log=log)

    def take() -> None:
        held.enter_context(lock)
        stop.at_once = lock.release
        checked()  # again: another run may have been here meanwhile

    distributed.from_first(take)
    distributed.require_shared(lock.path)
    return lock


def _open_corpus(task: Task, config: RunConfig, run_dir: Path, origin: Folder | None) -> Corpus:
    """The task's corpus, with the tokenizer that the run has, or that of `origin`, or a new one. Raises ConfigError if
    the model has no rows for some of its tokens."""
    known = read_tokenizer(run_dir / TOKENIZER)
    if known is None and origin is not None and (given := origin.tokenizer()) is not None:
        known = given.as_in_training()
    corpus = task.open(config, known)
    if task.more_rows or (known is not None and origin is not None):
        check_rows(corpus.tokenizer, config.model.vocab_size)
    else:
        check_vocab_size(corpus.tokenizer, config.model.vocab_size)
    return corpus


def _check_devices(config: RunConfig) -> None:
    """Raises ConfigError if a process would take no part in the plan."""
    if distributed.count() > 1 and config.plan.devices != jax.device_count():
        raise ConfigError(
            f"PlanConfig asks for {config.plan.devices} devices; expected the {jax.device_count()} that the "
            f"{distributed.count()} processes have"
        )


def _check_corpora(corpus: Corpus) -> None:
    """Raises ConfigError if another process has read other documents, or has another tokenizer."""
    have = distributed.from_all([corpus.content_hash, corpus.tokenizer.fingerprint])
    for number, one in enumerate(have):
        if one != have[0]:
            part = "documents" if one[0] != have[0][0] else "tokenizer"
            raise ConfigError(f"process {number} has another corpus or {part} than process 0; expected the same")


def _describe(run: Loop, task: Task, text: str, run_dir: Path, origin: Folder | None) -> None:
    """Writes what the folder says about the run before its first step."""
    config, log = run.config, run.log
    facts, saved = _facts(config, run.plan, run.corpus), run_dir / TOKENIZER
    describe_run(run_dir, text, facts)  # first, because it makes the folder this run's
    if linked := facts["data"].get("linked_folders"):
        log(f"corpus {config.data.corpus!r}: {linked} linked folders are skipped")
    if not (saved / "tokenizer.json").is_file():  # checkpoints hold its checksum, so it is never rewritten
        run.corpus.tokenizer.save(saved)
    if origin is not None:
        origin.keep(run_dir)
    task.keep(run.corpus, run_dir)
    add_lost(run_dir, run.first_step, END)  # before the lines of lost steps are removed
    if run.first_step:
        log(f"continuing {run_dir} after step {run.first_step}")
    elif orphans := keep_orphaned_metrics(run_dir):
        log(f"{run_dir} has no checkpoint: starting over; the metrics there are kept as {orphans.name}")
    if run.first_step < config.train.steps:
        (run_dir / "report.html").unlink(missing_ok=True)  # it describes an earlier step


@contextlib.contextmanager
def _writer(run_dir: Path, run: Loop) -> Iterator[MetricsWriter | SilentWriter]:
    """What writes the run's metrics: on the first process, for all."""
    watched = {"loggers": run.config.train.loggers, "config": dataclasses.asdict(run.config), "log": run.log}
    with contextlib.ExitStack() as stack:
        writer = None
        if distributed.first():
            writer = stack.enter_context(MetricsWriter(run_dir, resume_step=run.first_step, **watched))
        last = distributed.from_first(lambda: writer and writer.last)
        yield writer or SilentWriter(last)


def _facts(config: RunConfig, plan: Plan, corpus: Corpus) -> dict[str, Any]:
    """What `env.json` says about this run."""
    mesh = {name: int(size) for name, size in plan.mesh.shape.items()}
    return environment(
        seed=config.train.seed, data=corpus.describe(), parameters=count(config.model), mesh=mesh,
        processes=distributed.count(),
    )  # fmt: skip
