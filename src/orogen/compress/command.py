"""`orogen upcycle` and `orogen search`. Importing this does not import jax."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from orogen.command import CHECKPOINT, Command, add_config_arguments, answer, free_memory
from orogen.config.checks import ConfigError

if TYPE_CHECKING:
    from orogen.compress.search import Ranking


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


def _add_search_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--out", type=Path, metavar="F", help="write the best model as a gin file")


def search(options: argparse.Namespace) -> int:
    """`orogen search`."""
    from orogen.compress.puzzle import read_scores, solve
    from orogen.compress.search import search_models
    from orogen.compress.speed import Speed
    from orogen.config.files import write_atomically
    from orogen.config.load import load_search, model_text

    began = time.monotonic()
    model, settings, cluster, engine = load_search(options.gin_file, options.gin_bindings)
    if model is None:
        raise ConfigError("the gin files have no bindings of ModelConfig; expected the model to make smaller")
    if settings.scores is None:
        found = search_models(model, settings, Speed(settings, cluster, engine))
    else:
        found = solve(model, settings, read_scores(Path(settings.scores), model))
    if options.out is not None:
        write_atomically(options.out, model_text(found.best[0].model).encode())
    facts = {
        "candidates": found.candidates, "feasible": found.feasible, "seconds": time.monotonic() - began,
        "hardware": cluster.hardware if settings.simulates else None, "best": [one.facts() for one in found.best],
    }  # fmt: skip
    answer(options, facts, _search_lines(found))
    return 0


def _search_lines(found: "Ranking") -> list[str]:
    lines = [f"{found.candidates:,} candidates, {found.feasible:,} within the budgets"]
    for place, one in enumerate(found.best, 1):
        layers = " ".join(f"{count}{letter}" for letter, count in one.layers.items())
        parts = [f"{sum(one.layers.values())} layers ({layers})"]
        parts += [f"{name} {value:,}" for name, value in one.widths.items()]
        parts += [f"{one.costs['parameters'] / 1e9:.3f} B parameters", f"{one.costs['gib']:.2f} GiB"]
        parts += [f"score {one.score:.6g}"] if one.score is not None else []
        parts += [f"{one.speed['tokens_per_second']:,.1f} tokens/s"] if one.speed else []
        lines.append(f"{place:>3}  {', '.join(parts)}")
    return [*lines, f"best pattern: {found.best[0].model.pattern}"]


SEARCH = Command(
    name="search",
    help="find smaller models under a budget of parameters, bytes or speed; needs no devices",
    examples=(
        "orogen search --gin_file gin_configs/search/nemotron_nano2.gin",
        "orogen search --gin_file gin_configs/search/nemotron_h_47b.gin --json --out smaller.gin",
        "orogen search --gin_file gin_configs/search/nemotron_nano2.gin --gin_bindings 'SearchConfig.most_gib = 18.0'",
    ),
    add_arguments=_add_search_arguments,
    run=search,
    bare=True,
)
