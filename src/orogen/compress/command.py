"""`orogen upcycle`. Importing this does not import jax."""

import argparse
from pathlib import Path

from orogen.command import CHECKPOINT, Command, add_config_arguments, answer, free_memory


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help=f"the model: {CHECKPOINT}")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, for the new model")


def upcycle(options: argparse.Namespace) -> int:
    """`orogen upcycle`."""
    from orogen.checkpoint.open import open_folder
    from orogen.compress.rewrite import Source, rewrite
    from orogen.compress.upcycle import Upcycled, upcycled_config
    from orogen.config.load import load_part
    from orogen.config.upcycle import UpcycleConfig
    from orogen.model.count import count
    from orogen.simulate.fit import require_conversion_fits, require_export_fits

    settings, memory = load_part(UpcycleConfig, options.gin_file, options.gin_bindings), free_memory()

    def fits(tensor: str, held: int) -> None:
        require_conversion_fits(memory, tensor=tensor, held=held)

    with open_folder(options.checkpoint) as folder:
        config = upcycled_config(folder.config, settings)
        if folder.masters:  # a run's model is held in memory whole
            require_export_fits(folder.config, memory)
        source = Source(folder)
        rewrite(source, Upcycled(source, settings), config, options.checkpoint, options.out, fits=fits)
    facts = count(config)
    lines = [f"written: {options.out}", f"{facts['total']:,} parameters, {facts['active']:,} active"]
    answer(options, {"target": str(options.out), **facts}, lines)
    return 0


UPCYCLE = Command(
    name="upcycle",
    help="make a mixture of experts from a dense model",
    examples=(
        "orogen upcycle --checkpoint HF_FOLDER --gin_file gin_configs/upcycle/e8g8t8.gin --out upcycled",
        "orogen upcycle --checkpoint runs/dense --gin_file gin_configs/upcycle/e8g1t2.gin --out upcycled --json",
    ),
    add_arguments=_add_arguments,
    run=upcycle,
)
