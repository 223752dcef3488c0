"""`orogen sft` and `orogen dpo`. Importing this does not import jax."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from orogen.command import Command
from orogen.config.preference import BRADLEY_TERRY
from orogen.config.run import RunConfig
from orogen.train.command import add_train_arguments, run_task

if TYPE_CHECKING:
    from orogen.checkpoint.folders import Folder
    from orogen.train.task import Task


def sft(options: argparse.Namespace) -> int:
    """`orogen sft`."""

    def task(config: RunConfig) -> "Task":
        from orogen.posttrain.sft import make_sft

        return make_sft(_of_template(options))

    return run_task(options, task, "chat")


def dpo(options: argparse.Namespace) -> int:
    """`orogen dpo`."""

    def task(config: RunConfig) -> "Task":
        from orogen.posttrain.dpo import make_dpo

        return make_dpo(config, _of_template(options), options.run)

    def adapt(config: RunConfig, origin: "Folder") -> "Folder":
        from orogen.posttrain.reward import with_score

        scores = config.need("preference", "train").preference.loss == BRADLEY_TERRY
        return with_score(origin, seed=config.train.seed) if scores else origin

    return run_task(options, task, "preference", adapt=adapt)


def _of_template(options: argparse.Namespace) -> Path | None:
    """The folder of the model's own chat template. A run that is resumed has kept it; before that its folder says
    nothing about one."""
    return options.run if any(options.run.glob("chat_template.*")) else options.checkpoint


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
DPO = Command(
    name="dpo",
    help="train a model on pairs of answers: direct preference optimisation, or a reward model",
    examples=(
        "orogen dpo --checkpoint runs/sft --gin_file gin_configs/posttrain/dpo.gin --run runs/dpo "
        "--gin_bindings \"DataConfig.corpus='pairs'\"",
        "orogen dpo --checkpoint runs/sft --gin_file gin_configs/posttrain/reward.gin --run runs/reward "
        "--gin_bindings \"DataConfig.corpus='pairs'\"",
    ),
    add_arguments=add_train_arguments,
    run=dpo,
    joins=True,
)
