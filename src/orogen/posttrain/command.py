"""`orogen sft` and `orogen distill`. Importing this does not import jax."""

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from orogen.command import CHECKPOINT, Command
from orogen.config.run import RunConfig
from orogen.train.command import add_train_arguments, run_task

if TYPE_CHECKING:
    from orogen.train.task import Task


def sft(options: argparse.Namespace) -> int:
    """`orogen sft`."""

    def task(_: RunConfig) -> "Task":
        from orogen.posttrain.sft import make_sft

        # A run that is resumed has kept the template; before that its folder says nothing about one.
        kept = any(options.run.glob("chat_template.*"))
        return make_sft(options.run if kept else options.checkpoint)

    return run_task(options, task, "chat")


SFT = Command(
    name="sft",
    help="fine-tune a model on conversations",
    examples=(
        "orogen sft --checkpoint HF_FOLDER --gin_file my_chats_and_training.gin --run runs/sft",
        "orogen sft --checkpoint runs/base --gin_file my_chats_and_training.gin --run runs/sft --resume",
    ),
    add_arguments=add_train_arguments,
    run=sft,
    joins=True,
)


def _add_distill_arguments(parser: argparse.ArgumentParser) -> None:
    add_train_arguments(parser, checkpoint=f"the teacher: {CHECKPOINT}")
    student = f"start the student from the weights of {CHECKPOINT}; by default it is new, of the gin files' model"
    parser.add_argument("--student", type=Path, metavar="DIR", help=student)


def distill(options: argparse.Namespace) -> int:
    """`orogen distill`."""
    from orogen.checkpoint.open import open_folder

    # The run starts from the student; the teacher is the task's.
    of_student = argparse.Namespace(**{**vars(options), "checkpoint": options.student})
    with contextlib.ExitStack() as held:
        folder = held.enter_context(open_folder(options.checkpoint))

        def task(config: RunConfig) -> "Task":
            from orogen.posttrain.distill import Distillation

            return Distillation(folder, options.run, options.student, config.distill).task()

        return run_task(of_student, task, "distill", optional=("chat",))


DISTILL = Command(
    name="distill",
    help="train a student on what a teacher predicts; under a PrecisionConfig, quantisation-aware",
    examples=(
        "orogen distill --checkpoint runs/teacher --gin_file my_student.gin --run runs/student",
        "orogen distill --checkpoint HF_FOLDER --student pruned --gin_file my_training.gin --run runs/student --resume",
        "orogen distill --checkpoint HF_FOLDER --student HF_FOLDER --gin_file gin_configs/precision/qad_nvfp4.gin "
        "--gin_file my_training.gin --run runs/qad",
    ),
    add_arguments=_add_distill_arguments,
    run=distill,
    joins=True,
)
