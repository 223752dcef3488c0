"""`orogen sft` and `orogen distill`. Importing this does not import jax."""

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from orogen.command import CHECKPOINT, Command, answer, free_memory
from orogen.config.checks import ConfigError
from orogen.config.run import RunConfig
from orogen.config.streams import say
from orogen.train.command import add_train_arguments, run_task

if TYPE_CHECKING:
    from orogen.checkpoint.folders import Folder
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
    add_train_arguments(parser, checkpoint=f"the teacher: {CHECKPOINT}", needs_run=False)
    student = f"start the student from the weights of {CHECKPOINT}; by default it is new, of the gin files' model"
    parser.add_argument("--student", type=Path, metavar="DIR", help=student)
    written = "train nothing, but write the teacher's DistillConfig.top_k most likely tokens for DistillConfig.logits"
    parser.add_argument("--write_logits", type=Path, metavar="OUT", help=written)


def distill(options: argparse.Namespace) -> int:
    """`orogen distill`."""
    from orogen.checkpoint.open import open_folder

    if (options.run is None) == (options.write_logits is None):
        raise ConfigError("orogen distill has both or neither of --run and --write_logits; expected one of them")
    with contextlib.ExitStack() as held:
        folder = held.enter_context(open_folder(options.checkpoint)) if options.checkpoint is not None else None
        if options.write_logits is not None:
            return _write_logits(options, folder)

        def task(config: RunConfig) -> "Task":
            from orogen.posttrain.distill import Distillation
            from orogen.posttrain.teacher import teacher_plan
            from orogen.simulate.fit import require_distillation_fits

            if folder is None and config.distill.logits is None:
                raise ConfigError("--checkpoint is missing; expected the teacher's, since DistillConfig.logits is None")
            if folder is not None and config.distill.logits is None:
                plan = teacher_plan(config, config.distill)
                require_distillation_fits(config.largest(), folder.config, plan, free_memory())
            return Distillation(folder, config.distill, run_dir=options.run, student=options.student).task()

        # The run starts from the student; the teacher is the task's.
        of_student = argparse.Namespace(**{**vars(options), "checkpoint": options.student})
        return run_task(of_student, task, "distill", optional=("chat",))


def _write_logits(options: argparse.Namespace, folder: "Folder | None") -> int:
    from orogen.config.load import load, model_bindings
    from orogen.cost.assemble import assemble
    from orogen.parallel import distributed
    from orogen.posttrain.distill import Distillation
    from orogen.posttrain.stored_logits import write_logits
    from orogen.posttrain.teacher import Teacher

    if folder is None:
        raise ConfigError("--checkpoint is missing; expected the teacher's")
    # Of the gin files' model, only the vocabulary would matter: it is the teacher's.
    config, _ = load(options.gin_file, [*options.gin_bindings, *model_bindings(folder.config)])
    config.need("data", "train", "distill")
    if config.distill.top_k is None or config.distill.logits is not None or config.plan.stage > 1:
        raise ConfigError(
            "--write_logits: expected DistillConfig.top_k, no DistillConfig.logits and a plan of one stage"
        )
    if distributed.count() > 1:
        raise ConfigError(f"--write_logits runs on {distributed.count()} processes; expected one")
    made = Distillation(folder, config.distill, run_dir=options.checkpoint, student=options.student)
    corpus = made.open(config, None)
    plan, _ = assemble(config.model, config.plan, length=config.train.sequence_length)
    teacher = Teacher(folder, config, plan, top_k=config.distill.top_k)
    facts = write_logits(teacher, config, corpus, options.write_logits, log=say)
    answer(options, facts, [f"written: {options.write_logits}, {facts['rows']:,} tokens"])
    return 0


DISTILL = Command(
    name="distill",
    help="train a student on what a teacher predicts; under a PrecisionConfig, quantisation-aware",
    examples=(
        "orogen distill --checkpoint runs/teacher --gin_file my_student.gin --run runs/student",
        "orogen distill --checkpoint HF_FOLDER --student pruned --gin_file my_training.gin --run runs/student --resume",
        "orogen distill --checkpoint HF_FOLDER --student HF_FOLDER --gin_file gin_configs/posttrain/qad_nvfp4.gin "
        "--gin_file my_data_and_training.gin --run runs/qad",
        "orogen distill --checkpoint runs/teacher --gin_file my_student.gin --gin_bindings 'DistillConfig.top_k = 64' "
        "--write_logits logits",
    ),
    add_arguments=_add_distill_arguments,
    run=distill,
    joins=True,
)
