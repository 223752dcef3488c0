"""`orogen train` and `orogen verify`. Importing this does not import jax."""

import argparse
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orogen.command import (
    CHECKPOINT,
    EXIT_FAILURE,
    Command,
    add_config_arguments,
    answer,
    fail,
    free_memory,
    load_config,
    warn,
)
from orogen.config.checks import ConfigError
from orogen.config.dtype import COMPUTE
from orogen.config.run import PARTS, RunConfig
from orogen.config.streams import lasting_streams, say
from orogen.parallel import cluster, distributed
from orogen.parallel.runtime import add_xla_flags, configure

if TYPE_CHECKING:
    from orogen.checkpoint.folders import Folder
    from orogen.train.task import Task

    Adapt = Callable[[RunConfig, Folder], Folder]

# Parts of a config that only some tasks read, and why another task refuses them.
ONLY_SOME = {
    "chat": "reads no conversations",
    "preference": "reads no pairs of answers",
    "distill": "has no teacher",
    "elastic": "trains no submodels",
    "rl": "has no environments",
    "vision": "sees no images",
}
QUICKSTART = "--gin_file gin_configs/recipes/quickstart.gin"


def add_train_arguments(
    parser: argparse.ArgumentParser,
    *,
    checkpoint: str = f"start from the weights of {CHECKPOINT}",
    needs_run: bool = True,
) -> None:
    """Adds the options of a command that trains in a run folder. checkpoint: what its --checkpoint is; needs_run:
    whether it always needs the folder."""
    add_config_arguments(parser)
    parser.add_argument("--run", type=Path, required=needs_run, metavar="DIR", help="the run folder")
    parser.add_argument("--resume", action="store_true", help="continue the run in DIR, if there is one")
    parser.add_argument(
        "--profile", metavar="STEPS", help="trace these steps, such as 10:13, and report where their time goes"
    )
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help=checkpoint)
    parser.add_argument(
        "--cluster", metavar="HOW",
        help=f"run as one of several processes: {cluster.FORMS}; by default, what {cluster.VARIABLE} says in the "
        "environment, where `orogen launch` puts it",
    )  # fmt: skip


def _add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--what", choices=("gradients", "step", "evaluation"), default="gradients",
        help="gradients: loss, every gradient and one update (the default); step: several whole training steps, one of "
        "them not finite; evaluation: held-out losses; programs are compiled with little optimisation",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=COMPUTE, default="float32",
        help="the dtype of the plan; the one device always computes in float32, with the plainest kernels",
    )  # fmt: skip


def _load_with_checkpoint(
    options: argparse.Namespace, held: contextlib.ExitStack, adapt: "Adapt | None"
) -> tuple[RunConfig, str, "Folder | None"]:
    """The config of the gin files, its operative text, and the folder that the run starts from, open until `held`
    exits. If the files bind no model, it is that of --checkpoint. adapt: see `run_task`."""
    config, text = load_config(options)
    if options.checkpoint is None:
        if config.lora is not None and not (options.resume and any(options.run.glob("checkpoints/*"))):
            expected = "expected --checkpoint, or --student, the model that gets adapters"
            raise ConfigError(f"LoraConfig has bindings; {expected}")
        return config, text, None
    from orogen.checkpoint.open import open_folder
    from orogen.config.load import load
    from orogen.config.text import model_bindings
    from orogen.convert.config import difference

    origin: Folder = held.enter_context(open_folder(options.checkpoint))
    if adapt is not None:
        origin = adapt(config, origin)
    if config.lora is not None:
        from orogen.checkpoint.adapters import with_adapters

        origin = with_adapters(origin, config.lora, seed=config.need("train").train.seed)
    if config.model is None:
        config, text = load(options.gin_file, [*options.gin_bindings, *model_bindings(origin.config)])
    elif (field := difference(config.model, origin.config)) is not None:
        here, there = getattr(config.model, field), getattr(origin.config, field)
        raise ConfigError(f"ModelConfig.{field} is {here!r}; expected {there!r}, as {str(options.checkpoint)!r} has it")
    return config, text, origin


def train(options: argparse.Namespace) -> int:
    """`orogen train`."""

    def task(config: RunConfig) -> "Task":
        if config.vision is not None:
            from orogen.vision.captioning import make_captioning

            return make_captioning()
        from orogen.train.pretraining import PRETRAINING

        return PRETRAINING

    return run_task(options, task, optional=("vision",))


def require_read(config: RunConfig, read: Sequence[str]) -> None:
    """Raises ConfigError if the config has a part that only other tasks read. read: the parts that this task reads."""
    for part, why in ONLY_SOME.items():
        if getattr(config, part) is not None and part not in read:
            raise ConfigError(f"{PARTS[part].__name__} has bindings; expected none: this task {why}")


def run_task(
    options: argparse.Namespace, make_task: Callable[[RunConfig], "Task"], *parts: str, optional: Sequence[str] = (),
    adapt: "Adapt | None" = None,
) -> int:  # fmt: skip
    """Trains on a task in a run folder; returns the exit status. parts: the parts that its config needs in addition to
    a model, data, a length and an optimizer; optional: those that it may have as well. adapt: maps the config and the
    folder of --checkpoint to the folder whose parameters training starts from."""
    # Until the report is written, the folder stays locked and signals are handled.
    with contextlib.ExitStack() as held:
        config, text, origin = _load_with_checkpoint(options, held, adapt)
        config.need("model", "data", "train", "optimizer", *parts)
        require_read(config, (*parts, *optional))
        from orogen.checkpoint.steps import NotSavedError
        from orogen.simulate.fit import require_training_fits
        from orogen.train.back import FaultyHardwareError
        from orogen.train.health import NonFiniteError
        from orogen.train.profiled import Steps
        from orogen.train.run import train as run
        from orogen.train.stop import StoppedEarlyError

        profile = None if options.profile is None else Steps.of(options.profile)
        require_training_fits(config.largest(), free_memory())
        if distributed.first():
            warn(config.model)
        held.enter_context(lasting_streams())
        log = say if distributed.first() else lambda line: None
        task = make_task(config)
        if config.evaluate is not None:
            from orogen.evaluate.during import with_tasks

            task = with_tasks(task)
        try:
            trained = run(
                config, text, options.run, task, resume=options.resume, origin=origin, profile=profile, log=log,
                until=held,
            )  # fmt: skip
            status = _finish_together(options, config, text, trained)
        except (NonFiniteError, FaultyHardwareError, NotSavedError) as error:
            status = fail(error, EXIT_FAILURE)
        except StoppedEarlyError as stopped:
            if distributed.first():
                answer(options, {"finished": False}, ["stopped with nothing new to save; --resume continues"])
            status = stopped.status
    return status


def _finish_together(options: argparse.Namespace, config: RunConfig, text: str, trained: Any) -> int:
    """The first process reports; the others wait, since they keep the runtime alive that it needs."""
    done = distributed.fresh_name("report")
    if not distributed.first():
        distributed.wait_until_settled(done)
        return 0 if trained.finished else trained.stop.status
    try:
        return _finish_run(options, config, text, trained)
    finally:
        distributed.propose(done, 1)


def _finish_run(options: argparse.Namespace, config: RunConfig, text: str, trained: Any) -> int:
    """Reports on a finished run, or prints that it stopped early."""
    from orogen.evaluate.summary import summarise

    step, report = int(trained.state.step), options.run / "report.html"
    if not trained.finished:
        answer(options, {"step": step, "finished": False}, [f"stopped after step {step}; --resume continues"])
        return trained.stop.status
    if trained.steps == 0 and report.is_file():
        answer(options, {"step": step, "finished": True, "report": str(report)}, [f"already done: see {report}"])
        return 0
    facts = summarise(trained, config, text, options.run)
    answer(options, facts, [f"{key}: {value}" for key, value in facts.items()])
    return 0


def verify(options: argparse.Namespace) -> int:
    """`orogen verify`: simulates the devices of the plan unless --fake_devices gives a number."""
    config, _ = load_config(options, "model")
    from orogen.parallel.capacity import host_bytes
    from orogen.simulate.fit import require_verification_fits
    from orogen.train.verify import default_train
    from orogen.train.verify import verify as check

    require_verification_fits(config, config.train or default_train(config), host=host_bytes())
    # Nearly all of its time is compilation.
    add_xla_flags(["unoptimised"])
    if not options.fake_devices:
        configure(config.plan.devices)
    warn(config.model)
    verdict = check(config, what=options.what, dtype=options.dtype)
    facts = {**verdict._asdict(), "passed": verdict.passed}
    answer(options, facts, [f"{key:>20}  {value}" for key, value in facts.items()])
    return 0 if verdict.passed else EXIT_FAILURE


TRAIN = Command(
    name="train",
    help="train a model in a run folder",
    examples=(
        f"orogen train {QUICKSTART} --fake_devices 8 --run runs/quickstart --resume",
        f"orogen train {QUICKSTART} --fake_devices 8 --run runs/mine --gin_bindings \"DataConfig.corpus='my_texts'\"",
        "orogen train --checkpoint HF_FOLDER --gin_file my_data_and_training.gin --run runs/tuned",
    ),
    add_arguments=add_train_arguments,
    run=train,
    joins=True,
)
VERIFY = Command(
    name="verify",
    help="check a plan against one device: gradients, whole steps or evaluation",
    examples=(
        f"orogen verify {QUICKSTART}",
        f"orogen verify {QUICKSTART} --gin_bindings 'PlanConfig.tensor=4' --gin_bindings 'PlanConfig.data=2'",
        f"orogen verify {QUICKSTART} --what step --dtype bfloat16",
    ),
    add_arguments=_add_verify_arguments,
    run=verify,
)
