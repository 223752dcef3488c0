"""`orogen sft`. Importing this does not import jax."""

import argparse
from typing import TYPE_CHECKING

from orogen.command import Command
from orogen.config.checks import ConfigError
from orogen.config.run import RunConfig
from orogen.train.command import add_train_arguments, run_task

if TYPE_CHECKING:
    from orogen.train.task import Task


def sft(options: argparse.Namespace) -> int:
    """`orogen sft`."""

    def task(config: RunConfig) -> "Task":
        from orogen.posttrain.sft import make_sft

        if config.vision is not None:
            raise ConfigError("VisionConfig has bindings; expected none: this task sees no images")

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
