"""`orogen params`, `orogen convert` and `orogen average`. Importing this does not import jax."""

import argparse
from pathlib import Path

from orogen.command import CHECKPOINT, Command, add_config_arguments, answer, free_memory, load_config
from orogen.config.checks import ConfigError
from orogen.config.dtype import WEIGHTS
from orogen.config.lora import base_of
from orogen.config.streams import say


def _add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "direction",
        choices=("from-hf", "to-hf", "to-peft"),
        help="from or to Hugging Face's format; to-peft: a run's low-rank adapters alone",
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="to-hf: an Orogen checkpoint folder or a run folder")
    parser.add_argument("target", type=Path, metavar="DST", help="a new folder")
    parser.add_argument("--dtype", choices=WEIGHTS, help="with to-hf only; by default a run's weights become bfloat16")


def _add_average_arguments(parser: argparse.ArgumentParser) -> None:
    help_text = f"{CHECKPOINT}, or one checkpoint of a run, RUN/checkpoints/STEP"
    parser.add_argument("sources", type=Path, nargs="+", metavar="SRC", help=help_text)
    parser.add_argument("--out", type=Path, required=True, metavar="DST", help="a new Orogen checkpoint folder")
    parser.add_argument(
        "--weights", type=_numbers, metavar="A,B", help="relative weights of the sources; default: equal"
    )


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected numbers separated by commas") from None


def average(options: argparse.Namespace) -> int:
    """`orogen average`."""
    from orogen.checkpoint.average import average as write

    write(options.sources, options.out, weights=options.weights)
    answer(options, {"target": str(options.out)}, [f"written: {options.out}"])
    return 0


def params(options: argparse.Namespace) -> int:
    """`orogen params`."""
    config, _ = load_config(options, "model")
    from orogen.convert.count import count_exported

    facts = count_exported(base_of(config.model))
    answer(options, facts, [f"{key:>26}  {'-' if n is None else format(n, ','):>21}" for key, n in facts.items()])
    return 0


def convert(options: argparse.Namespace) -> int:
    """`orogen convert`."""
    from orogen.checkpoint.open import open_folder
    from orogen.checkpoint.transfer import export, from_hf
    from orogen.simulate.fit import require_conversion_fits, require_export_fits

    memory = free_memory()

    def fits(tensor: str, held: int) -> None:
        require_conversion_fits(memory, tensor=tensor, held=held)

    if options.direction != "to-hf" and options.dtype:
        raise ConfigError(f"--dtype {options.dtype}; expected it with to-hf only: {options.direction} keeps its dtypes")
    if options.direction == "to-peft":
        from orogen.checkpoint.adapters import write_peft

        with open_folder(options.source) as source:
            require_export_fits(source.config, memory)
        for name in write_peft(options.source, options.target):
            say(f"{options.target}: {name} is left out: transformers has no multi-token prediction")
    elif options.direction == "from-hf":
        from_hf(options.source, options.target, fits=fits)
    else:
        with open_folder(options.source) as source:
            if source.masters:  # a run's model is held in memory whole
                require_export_fits(source.config, memory)
        export(options.source, options.target, dtype=options.dtype, fits=fits)
    answer(options, {"target": str(options.target)}, [f"written: {options.target}"])
    return 0


PARAMS = Command(
    name="params",
    help="count parameters",
    examples=(
        "orogen params --gin_file gin_configs/models/nemotron3_nano_30b_a3b.gin",
        "orogen params --gin_file gin_configs/recipes/quickstart.gin --json",
    ),
    add_arguments=add_config_arguments,
    run=params,
)
CONVERT = Command(
    name="convert",
    help="exchange checkpoints with Hugging Face",
    examples=(
        "orogen convert from-hf HF_FOLDER OROGEN_FOLDER",
        "orogen convert to-hf runs/quickstart HF_FOLDER",
        "orogen convert to-peft runs/sft ADAPTER_FOLDER",
    ),
    add_arguments=_add_convert_arguments,
    run=convert,
)
AVERAGE = Command(
    name="average",
    help="average the parameters of checkpoints",
    examples=(
        "orogen average runs/a/checkpoints/1000 runs/a/checkpoints/1500 runs/a --out averaged",
        "orogen average runs/a/checkpoints/1000 runs/a --weights 1,3 --out averaged",
    ),
    add_arguments=_add_average_arguments,
    run=average,
)
