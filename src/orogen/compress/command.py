"""`orogen upcycle` and `orogen prune`. Importing this does not import jax."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from orogen.command import CHECKPOINT, Command, add_config_arguments, answer, free_memory, told_progress
from orogen.config.checks import ConfigError

if TYPE_CHECKING:
    from orogen.checkpoint.folders import Folder
    from orogen.compress.prune import Found
    from orogen.config.model import ModelConfig
    from orogen.config.prune import PruneConfig
    from orogen.config.run import RunConfig

SCORES = "the folder or pruning.json of an earlier pruning of this model, whose scores to use: no text is read"


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

    settings = load_part(UpcycleConfig, options.gin_file, options.gin_bindings)
    with open_folder(options.checkpoint) as folder:
        config = upcycled_config(folder.config, settings)
        fits = _conversion_fits(folder)
        source = Source(folder)
        rewrite(source, Upcycled(source, settings), config, options.checkpoint, options.out, fits=fits)
    facts = count(config)
    lines = [f"written: {options.out}", f"{facts['total']:,} parameters, {facts['active']:,} active"]
    answer(options, {"target": str(options.out), **facts}, lines)
    return 0


def _conversion_fits(folder: "Folder") -> Callable[[str, int], None]:
    """Raises ConfigError if memory cannot hold a tensor of this name and so many bytes, or the folder's parameters, if
    reading one means reading all."""
    from orogen.simulate.fit import require_conversion_fits, require_export_fits

    memory = free_memory()
    if folder.masters:  # a run's model is held in memory whole
        require_export_fits(folder.config, memory)
    return lambda tensor, held: require_conversion_fits(memory, tensor=tensor, held=held)


def _add_prune_arguments(parser: argparse.ArgumentParser) -> None:
    _add_arguments(parser)
    parser.add_argument("--scores", type=Path, metavar="DIR", help=SCORES)


def prune(options: argparse.Namespace) -> int:
    """`orogen prune`."""
    from orogen.checkpoint.open import open_folder
    from orogen.compress import pruning
    from orogen.compress.prune import check_target, decide, no_distance, require_new
    from orogen.compress.rewrite import Source, rewrite
    from orogen.compress.slices import Pruned
    from orogen.config.load import load_prune
    from orogen.model.count import count
    from orogen.report.pictures import LIGHT, png
    from orogen.report.pruning import draw_pruning

    settings, run = load_prune(options.gin_file, options.gin_bindings)
    require_new(options.out)
    with open_folder(options.checkpoint) as folder:
        check_target(folder.config, settings, run.plan)
        found = _found(options, settings, run, folder.config)
        choice = decide(folder.config, settings, found, run.plan)
        found = found._replace(distance=no_distance)  # lets go of the model
        sizes = count(folder.config)["total"], count(choice.config)["total"]
        shown = pruning.axes(folder.config, found, choice), pruning.layers_shown(folder.config, choice)
        facts = pruning.record(options.checkpoint, settings, found, choice, sizes)
        beside = {pruning.FILE: pruning.encoded(facts), pruning.PICTURE: png(draw_pruning(*shown, LIGHT))}
        fits = _conversion_fits(folder)
        source = Source(folder)
        made = {"fits": fits, "parameters": sizes[1], "beside": beside}
        rewrite(source, Pruned(source, choice.kept), choice.config, options.checkpoint, options.out, **made)
    lines = [*pruning.table(*shown, sizes), f"written: {options.out}"]
    told = {"target": str(options.out), "parameters": list(sizes), "pattern": choice.config.pattern}
    sized = {field: [axis.before, axis.after, round(axis.importance, 6)] for field, axis in shown[0].items()}
    answer(options, {**told, "sizes": sized, "removed": list(choice.depth.removed)}, lines)
    return 0


def _found(options: argparse.Namespace, settings: "PruneConfig", run: "RunConfig", model: "ModelConfig") -> "Found":
    """The scores: of an earlier pruning, drawn, or measured."""
    from orogen.checkpoint.open import open_model
    from orogen.compress.prune import check_shape, measured, measures, random_found
    from orogen.compress.pruning import read_scores
    from orogen.simulate.fit import require_evaluation_fits

    if options.scores is not None:
        return read_scores(options.scores, model, settings)
    if not measures(settings):
        return random_found(model, settings)
    plan = run.plan.evaluating()
    if run.data is None:
        expected = "expected DataConfig, the text to measure on, or --scores of an earlier pruning"
        raise ConfigError(f"the gin files have no bindings of DataConfig; {expected}")
    check_shape(settings, model, plan)
    if plan.devices == 1:
        tokens = settings.batch_size * settings.sequence_length
        blocked = {"blocked": plan.attention != "full", "batch_tokens": tokens, "length": settings.sequence_length}
        require_evaluation_fits(model, free_memory(), **blocked)
    return measured(open_model(options.checkpoint, plan, settings.compute_dtype), settings, run.data, told_progress())


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

PRUNE = Command(
    name="prune",
    help="cut channels, heads, experts and layers out of a model, the least important first",
    examples=(
        "orogen prune --checkpoint HF_FOLDER --gin_file gin_configs/prune/nano2_12b_to_9b.gin --gin_file my_text.gin "
        "--out pruned",
        "orogen prune --checkpoint runs/base --gin_file my_text.gin --gin_bindings 'PruneConfig.mamba_num_heads=48' "
        "--out pruned",
        "orogen prune --checkpoint runs/base --scores pruned --gin_file narrower.gin --out narrower",
    ),
    add_arguments=_add_prune_arguments,
    run=prune,
)
