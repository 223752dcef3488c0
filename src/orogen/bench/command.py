"""`orogen bench`: its options, and a run of the benchmark that they name. Importing this does not import jax."""

import argparse
import functools
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from orogen.command import EXIT_FAILURE, Command, answer, positive
from orogen.config.checks import ConfigError
from orogen.parallel.runtime import asks_for_same_bits

# Benchmarks of operations, each with the implementations that it times by default; these run on any device.
DECODING = {
    "state_update": "reference", "replay": "parallel", "paged_attention": "reference", "few_rows": "blocks",
    "thin_matmul": "reference", "decode": "reference,parallel,blocks",
}  # fmt: skip
OPERATIONS = {"ssd": "chunked", "grouped_matmul": "blocks", "attention": "blocked", **DECODING}
NAMES = ("cpu_train", *OPERATIONS, "train", "precision")
LARGEST_SEED = 2**31 - 1
TURNS = 2  # default of --turns with a peer
# Options that only some benchmarks have, with their defaults, by benchmark.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu_train": {"models": "dense,moe"},
    **{
        name: {"implementations": default, "shape": (), "seed": None, "roofline": None, "profile": None}
        for name, default in OPERATIONS.items()
    },
    "train": {
        "model": "r1", "rows": None, "sequence_length": 8192, "whole_step": False, "weak_scaling": None, "turns": None,
        "gin_bindings": (), "profile": None,
    },
    "precision": {"recipes": "fp8_tensorwise,fp8_blockwise,mxfp8,nvfp4", "model": "bench_dense"},
}  # fmt: skip


def _add_arguments(task: argparse.ArgumentParser) -> None:
    task.add_argument(
        "name",
        choices=NAMES,
        help="cpu_train: whole training steps on this CPU; ssd, grouped_matmul, attention: one operation at "
        "sizes of large models; state_update, replay, paged_attention, few_rows, thin_matmul: one operation of "
        "decoding; decode: all five; train: forward and backward passes, or whole steps, of a model on the devices of "
        "a plan; precision: steps with emulated recipes beside steps in bfloat16",
    )
    task.add_argument(
        "--peer", choices=("torch",), help="also time torch, or transformers on it, in turn; needs the extra `peer`"
    )
    task.add_argument("--steps", type=positive, default=15, help="timed steps, or samples, of each program")
    task.add_argument(
        "--profile", type=Path, default=argparse.SUPPRESS, metavar="DIR", help="write a trace of the device to DIR"
    )
    group = functools.partial(task.add_argument_group, argument_default=argparse.SUPPRESS)  # DEFAULTS has them
    group("precision").add_argument("--recipes", metavar="A,B", help="names of PrecisionConfig.recipe; default: all")
    cpu = group("cpu_train")
    cpu.add_argument("--models", metavar="A,B", help="dense, moe, or both, which is the default")
    one = group("one operation")
    one.add_argument("--implementations", metavar="A,B", help="names from the operation's package in orogen/kernels")
    one.add_argument("--shape", action="append", metavar="S", help="a named shape, or sizes such as b=2,t=8192")
    one.add_argument("--seed", type=int, help="seed of the operands; random by default")
    one.add_argument("--roofline", type=Path, metavar="FILE.png", help="draw achieved rates under measured ceilings")
    whole = group("train")
    whole.add_argument("--model", metavar="NAME", help="name of a file in gin_configs/models")
    whole.add_argument(
        "--rows",
        type=positive,
        help="sequences per microbatch of the global batch; default: as many as hold 16,384 tokens",
    )
    whole.add_argument("--sequence_length", type=positive, metavar="T", help="tokens per sequence")
    whole.add_argument("--whole_step", action="store_true", help="time whole steps, with microbatches and optimizer")
    whole.add_argument(
        "--weak_scaling",
        choices=("rows", "length"),
        help="multiply --rows, or --sequence_length, by the plan's devices",
    )
    whole.add_argument("--turns", type=positive, help="with --peer: blocks of steps of each program")
    whole.add_argument("--gin_bindings", action="append", metavar="X.y=1", help="override the benchmark's bindings")


def bench(options: argparse.Namespace) -> int:
    """`orogen bench`."""
    facts, lines, correct = _measure(options)
    answer(options, facts, lines)
    return 0 if correct else EXIT_FAILURE


def _measure(options: argparse.Namespace) -> tuple[dict[str, Any], list[str], bool]:
    """The measurements, as one object and as lines, and whether all results were correct. Raises ConfigError."""
    options = _complete(options)
    if options.name in OPERATIONS:
        facts = _operation(options)
        records = facts["records"]
        correct = all(record.get("correct", True) for record in records)
        return facts, [json.dumps(facts["ceilings"]), *(json.dumps(record) for record in records)], correct
    if options.name == "train":
        facts, correct = _train(options)
        return facts, json.dumps(facts, indent=2).splitlines(), correct
    if options.name == "precision":
        if options.peer is not None:
            raise ConfigError(f"--peer {options.peer} with precision; expected none, since it has no peer")
        from orogen.bench.precision import bench as emulated

        facts = emulated(options.recipes.split(","), model=options.model, steps=options.steps)
        return facts, json.dumps(facts, indent=2).splitlines(), True
    from orogen.bench.cpu_train import bench as run

    facts = run(options.models.split(","), peer=options.peer, steps=options.steps)
    return facts, json.dumps(facts, indent=2).splitlines(), True


def _complete(options: argparse.Namespace) -> argparse.Namespace:
    """The options, with the benchmark's own defaults. Raises ConfigError on options of other benchmarks and on files
    that cannot be written."""
    own = DEFAULTS[options.name]
    for option in vars(options):
        names = [name for name, defaults in DEFAULTS.items() if option in defaults]
        if names and options.name not in names:
            raise ConfigError(f"--{option} with {options.name}; expected it with {', '.join(names)} only")
    options = argparse.Namespace(**{**own, **vars(options)})
    if "profile" in own and options.profile is not None:
        _check_folder(options.profile)
    if "roofline" in own and options.roofline is not None:
        _check_picture(options.roofline)
    return options


def _check_folder(profile: Path) -> None:
    if not next(path for path in (profile, *profile.parents) if path.exists()).is_dir():
        raise ConfigError(f"--profile {str(profile)!r}; expected a folder, existing or new")


def _check_picture(file: Path) -> None:
    from matplotlib.backend_bases import FigureCanvasBase

    suffixes = FigureCanvasBase.get_supported_filetypes()
    if file.suffix[1:].lower() not in suffixes or file.is_dir() or not file.parent.is_dir():
        raise ConfigError(
            f"--roofline {str(file)!r}; expected a file in an existing folder, with a suffix from {', '.join(suffixes)}"
        )


def _operation(options: argparse.Namespace) -> dict[str, Any]:
    if options.peer is not None:  # torch allocates on the same GPU
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    seed = int.from_bytes(os.urandom(3)) if options.seed is None else options.seed
    if not 0 <= seed <= LARGEST_SEED:
        raise ConfigError(f"--seed {seed}; expected a whole number from 0 to 2**31 - 1")
    from orogen.bench.operation import bench as run
    from orogen.bench.roofline import draw_roofline

    module = importlib.import_module(f"orogen.bench.{options.name}")
    if options.name == "decode":
        if options.peer is not None:
            raise ConfigError(f"--peer {options.peer} with decode; expected none, since it has no peer")
        run = module.bench
    else:
        run = functools.partial(run, module.OPERATION, peer=options.peer)
    facts = run(
        shapes=options.shape, implementations=options.implementations.split(","), samples=options.steps, seed=seed,
        profile=options.profile,
    )  # fmt: skip
    for missing in dict.fromkeys(record["missing"] for record in facts["records"] if "missing" in record):
        print(f"not timed: {missing}", file=sys.stderr)
    if options.roofline is not None:
        draw_roofline(facts, options.roofline)
    return facts


def _train(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    # A whole step of R1 takes 65.7 GB of an H100's 85; jax's default limit is three quarters.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    from orogen.bench.train import bench as run
    from orogen.bench.train_peer import UnequalError, compare
    from orogen.bench.workload import Workload

    work = Workload(
        model=options.model, rows=options.rows, sequence_length=options.sequence_length,
        part="whole_step" if options.whole_step else "forward_backward", weak_scaling=options.weak_scaling,
        bindings=tuple(options.gin_bindings),
    )  # fmt: skip
    deterministic = asks_for_same_bits()
    if options.peer is None:
        if options.turns is not None:
            raise ConfigError(f"--turns {options.turns} without --peer; expected both")
        facts = run(work, steps=options.steps, deterministic=deterministic, profile=options.profile)
        if options.profile is not None:
            from orogen.report.profile_page import lines

            print("\n".join(lines(facts["profile"])), file=sys.stderr)
        return facts, True
    if options.profile is not None:
        raise ConfigError("--profile with --peer; expected one of them: a trace slows both programs")
    try:
        return compare(
            work, peer=options.peer, steps=options.steps, turns=options.turns or TURNS, deterministic=deterministic
        ), True
    except UnequalError as error:
        print(f"orogen: {error}", file=sys.stderr)
        return {"bench": "train", "equal": False, "losses": str(error)}, False


BENCH = Command(
    name="bench",
    help="time Orogen, alone or beside a peer",
    examples=(
        "orogen bench cpu_train --peer torch",
        "orogen bench ssd --implementations triton --shape nano --peer torch",
        "orogen bench attention --shape b=2,t=8192",
        "orogen bench decode --implementations triton,triton_small --json",
        "orogen bench precision --recipes mxfp8,nvfp4",
        "orogen bench train --whole_step",
        "orogen bench train --whole_step --weak_scaling rows --gin_bindings PlanConfig.data=2",
    ),
    add_arguments=_add_arguments,
    run=bench,
)
