"""`orogen upcycle`, `prune`, `quantize` and `search`. Importing this does not import jax."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orogen.command import CHECKPOINT, Command, add_config_arguments, answer, free_memory, told_progress
from orogen.config.checks import ConfigError
from orogen.config.dtype import WEIGHTS
from orogen.config.quantize import AUTO, FORMATS
from orogen.config.streams import say

if TYPE_CHECKING:
    from orogen.checkpoint.folders import Folder
    from orogen.compress.prune import Found
    from orogen.compress.retrain import Retraining
    from orogen.compress.search import Ranking
    from orogen.config.model import ModelConfig
    from orogen.config.prune import PruneConfig
    from orogen.config.run import RunConfig

SCORES = "the folder of an earlier pruning of this model (or its pruning.json), whose scores to use: no text is read"
# Beside a quantised model: what was chosen and measured.
RECORD, PICTURE = "quantization.json", "quantization.png"


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
    from orogen.compress.prune import check_target, decide, no_distance, replaced, require_new
    from orogen.compress.rewrite import Source, rewrite
    from orogen.compress.slices import Pruned
    from orogen.compress.stored_scores import ARRAYS, fingerprint
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
        narrowed = replaced(folder.config, settings, found)
        found = found._replace(distance=no_distance, narrowed=no_distance)  # lets go of the model
        fits = _conversion_fits(folder)
        source = Source(folder)
        found = pruning.of_weights(found, fingerprint(source), options.scores)
        sizes = count(folder.config)["total"], count(choice.config)["total"]
        shown = pruning.axes(folder.config, found, choice), pruning.layers_shown(folder.config, choice)
        facts = pruning.record(options.checkpoint, settings, found, choice, sizes)
        beside = {pruning.FILE: pruning.encoded(facts), pruning.PICTURE: png(draw_pruning(*shown, LIGHT)),
                  ARRAYS: pruning.arrays(found, choice)}  # fmt: skip
        made = {"fits": fits, "parameters": sizes[1], "beside": beside}
        if choice.depth.scores is not None and settings.depth_scores != "random":
            beside[pruning.REMOVAL] = pruning.removal_lines(choice, narrowed)
        rewrite(source, Pruned(source, choice.kept), choice.config, options.checkpoint, options.out, **made)
    lines = [*pruning.table(*shown, sizes), f"written: {options.out}"]
    told = {"target": str(options.out), "parameters": list(sizes), "pattern": choice.config.pattern}
    sized = {field: [axis.before, axis.after, round(axis.importance, 6)] for field, axis in shown[0].items()}
    answer(options, {**told, "sizes": sized, "removed": list(choice.depth.removed)}, lines)
    return 0


def _named(config: Any) -> dict[str, int]:
    """The sizes of the config's batches, by name."""
    return {f"{type(config).__name__}.{field}": getattr(config, field) for field in ("batch_size", "sequence_length")}


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
        shape = {"blocked": plan.attention != "full", "batch_tokens": tokens, "length": settings.sequence_length}
        named = _named(settings)
        require_evaluation_fits(model, free_memory(), dtype=settings.compute_dtype, **shape, settings=named)
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


def _add_quantize_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help=f"the model: {CHECKPOINT}")
    add("--format", choices=(*FORMATS, AUTO), help="of the weights, in place of the gin file's")
    add("--out", type=Path, required=True, metavar="DIR", help="a new folder, for the quantised model")
    add("--gin_file", action="append", default=[], metavar="F",
        help="QuantizeConfig, and DataConfig for the text; repeatable")  # fmt: skip
    add("--gin_bindings", action="append", default=[], metavar="X.y=1",
        help="of QuantizeConfig, DataConfig and PlanConfig; repeatable")  # fmt: skip
    add("--text", action="append", metavar="FILE",
        help="calibrate on this file, or a folder's documents, and measure on what follows; repeatable")  # fmt: skip
    add("--dtype", choices=WEIGHTS, default="float32", help="of the calibration's computation")


def quantize(options: argparse.Namespace) -> int:
    """`orogen quantize`."""
    from orogen.config.load import load_quantization

    chosen = [] if options.format is None else [f"QuantizeConfig.format = {options.format!r}"]
    plan, data, config = load_quantization(options.gin_file, [*chosen, *options.gin_bindings])
    if (data is None) == (options.text is None):
        raise ConfigError("calibration text: expected either --text, or a DataConfig in the gin file")
    if options.out.exists() and not (options.out.is_dir() and not any(options.out.iterdir())):
        raise ConfigError(f"--out {str(options.out)!r} exists; expected a new folder")
    from orogen.checkpoint import checksums
    from orogen.compress.calibration_text import CalibrationText, text_of_corpus, text_of_files
    from orogen.compress.quantize import Quantiser, lines_of, unquantised_folder
    from orogen.config.files import write_atomically
    from orogen.convert.tensor_files import new_folder
    from orogen.data.tokenizer import Tokenizer
    from orogen.report.pictures import LIGHT, png
    from orogen.report.quantised import draw_formats
    from orogen.simulate.fit import require_evaluation_fits

    def text(tokenizer: Tokenizer) -> CalibrationText:
        return (
            text_of_files(options.text, tokenizer, config) if data is None else text_of_corpus(data, tokenizer, config)
        )

    with unquantised_folder(options.checkpoint, options.out) as folder:
        if plan is None or plan.devices == 1:
            tokens = config.batch_size * config.sequence_length
            scored = {"blocked": False, "batch_tokens": tokens, "length": config.sequence_length}
            named = _named(config)
            require_evaluation_fits(folder.config, free_memory(), dtype=options.dtype, **scored, settings=named)
        quantiser = Quantiser(folder, config, text, plan=plan, dtype=options.dtype, progress=say)
        calibrated = quantiser.calibrate()
        with new_folder(options.out) as scratch:  # published when all of it is there
            outcome = quantiser.write(calibrated, scratch)
            record = quantiser.described(calibrated, outcome)
            write_atomically(scratch / RECORD, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())
            write_atomically(scratch / PICTURE, png(draw_formats(record["layers"], LIGHT)))
            checksums.write(scratch)
    answer(options, {"target": str(options.out), **record}, [f"written: {options.out}", *lines_of(record)])
    return 0


QUANTIZE = Command(
    name="quantize",
    help="quantise a model to FP8 or NVFP4 after training",
    examples=(
        "orogen quantize --checkpoint HF_FOLDER --format fp8 --text calibration.jsonl --out quantised",
        "orogen quantize --checkpoint runs/quickstart --gin_file gin_configs/quantize/nemotron3_super_auto.gin "
        "--gin_file gin_configs/data/stdlib.gin --out quantised --json",
    ),
    add_arguments=_add_quantize_arguments,
    run=quantize,
)


def _add_search_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--out", type=Path, metavar="F", help="write the best model as a gin file")
    add = parser.add_argument_group("prune and distil the best candidates, and rank them by that").add_argument
    add("--checkpoint", type=Path, metavar="DIR", help=f"the model to make smaller, the teacher too: {CHECKPOINT}")
    add("--scores", type=Path, metavar="DIR", help="the folder of a pruning of it, by whose scores all are pruned")
    add("--training", action="append", default=[], metavar="F",
        help="how each candidate is distilled: a gin file of `orogen distill`; repeatable")  # fmt: skip
    add("--winner", action="append", default=[], metavar="F", help="how the best one is distilled on; repeatable")
    add("--run", type=Path, metavar="DIR", help="a folder for all of it; a search that was stopped goes on there")


def search(options: argparse.Namespace) -> int:
    """`orogen search`."""
    from orogen.compress.puzzle import read_scores, solve
    from orogen.compress.retrain import call_orogen, removal_of, retrain
    from orogen.compress.search import search_models
    from orogen.compress.speed import Speed
    from orogen.config.files import write_atomically
    from orogen.config.load import load_search
    from orogen.config.text import model_text

    began, asked = time.monotonic(), _retraining(options)
    model, settings, cluster, engine = load_search(options.gin_file, options.gin_bindings)
    if asked:
        model = _parent(model, asked.checkpoint)
    if model is None:
        raise ConfigError("the gin files have no bindings of ModelConfig; expected the model to make smaller")
    if settings.scores is None:
        removal = removal_of(settings, model, asked)
        found = search_models(model, settings, Speed(settings, cluster, engine), removal=removal)
    else:
        found = solve(model, settings, read_scores(Path(settings.scores), model))
    ranked = retrain(found.best, model, asked, call_orogen) if asked else []
    best = found.best[ranked[0]["place"] - 1 if ranked else 0]
    if options.out is not None:
        write_atomically(options.out, model_text(best.model).encode())
    facts = {
        "candidates": found.candidates, "feasible": found.feasible, "predicted": found.predicted,
        "seconds": time.monotonic() - began,
        "hardware": cluster.hardware if settings.simulates else None, "best": [one.facts() for one in found.best],
    }  # fmt: skip
    lines = [*_search_lines(found), *_ranking_lines(ranked), f"best pattern: {best.model.pattern}"]
    answer(options, facts | ({"retrained": ranked} if ranked else {}), lines)
    return 0


def _retraining(options: argparse.Namespace) -> "Retraining | None":
    """What is asked of the candidates beside a list of them. Raises ConfigError if a part of it is missing."""
    from orogen.compress.retrain import Retraining

    given = {name: getattr(options, name) for name in ("checkpoint", "scores", "training", "run")}
    if not any([*given.values(), options.winner]):
        return None
    if missing := [f"--{name}" for name, value in given.items() if not value]:
        raise ConfigError(f"{' and '.join(missing)} missing; expected --checkpoint, --scores, --training and --run")
    return Retraining(**given, winner=options.winner)


def _parent(model: "ModelConfig | None", checkpoint: Path) -> "ModelConfig":
    """The checkpoint's model. Raises ConfigError if the gin files have another one."""
    from orogen.checkpoint.open import open_folder
    from orogen.convert.config import difference

    with open_folder(checkpoint) as folder:
        found = folder.config
    if model is not None and (field := difference(model, found)) is not None:
        here, there = getattr(model, field), getattr(found, field)
        raise ConfigError(f"ModelConfig.{field} is {here!r}; expected {there!r}, as {str(checkpoint)!r} has it")
    return found


def _ranking_lines(ranked: "list[dict[str, Any]]") -> list[str]:
    found = [
        f"{one['place']:>3}  held-out nats per token after distillation {one['heldout_loss']:.4f}" for one in ranked
    ]
    more = [
        f"the first of them, distilled on: {one['winner']['heldout_loss']:.4f}" for one in ranked if "winner" in one
    ]
    return [*found, *more]


def _search_lines(found: "Ranking") -> list[str]:
    predicted = f", {found.predicted:,} of them predicted" if found.predicted else ""
    lines = [f"{found.candidates:,} candidates, {found.feasible:,} within the budgets{predicted}"]
    for place, one in enumerate(found.best, 1):
        layers = " ".join(f"{count}{letter}" for letter, count in one.layers.items())
        parts = [f"{sum(one.layers.values())} layers ({layers})"]
        parts += [f"{name} {value:,}" for name, value in one.widths.items()]
        parts += [f"{one.costs['parameters'] / 1e9:.3f} B parameters", f"{one.costs['gib']:.2f} GiB"]
        parts += [f"score {one.score:.6g}"] if one.score is not None else []
        parts += [f"{one.speed['tokens_per_second']:,.1f} tokens/s"] if one.speed else []
        lines.append(f"{place:>3}  {', '.join(parts)}")
    return lines


SEARCH = Command(
    name="search",
    help="find smaller models under a budget of parameters, bytes or speed; needs no devices",
    examples=(
        "orogen search --gin_file gin_configs/search/nemotron_nano2.gin",
        "orogen search --gin_file gin_configs/search/nemotron_h_47b.gin --json --out smaller.gin",
        "orogen search --gin_file gin_configs/search/nemotron_nano2.gin --gin_bindings 'SearchConfig.most_gib = 18.0'",
        "orogen search --gin_file my_budgets.gin --checkpoint runs/base --scores pruned --training my_distillation.gin "
        "--run runs/carved",
    ),
    add_arguments=_add_search_arguments,
    run=search,
    bare=True,
)
