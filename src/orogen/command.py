"""What all commands share: how each is described, the options that all of them take, and how they report.

A package's own commands are in its `command.py`, which imports jax only when a command runs.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from orogen.config.model import ModelConfig
from orogen.config.run import RunConfig
from orogen.config.streams import say
from orogen.parallel.runtime import XLA_FLAGS

CHECKPOINT = "a run folder, an Orogen checkpoint folder or a Hugging Face folder"
EXIT_FAILURE, EXIT_BAD_INPUT = 1, 2
EVERY_SECONDS = 10.0  # between lines that say how far a task is


class Command(NamedTuple):
    """One command of `orogen`.

    help: one line. examples: whole command lines, shown below the options. run: takes the parsed options and returns
    the exit status; it may raise the errors that `cli.main` reports. joins: whether it can be one of several processes;
    then its options have `cluster`. bare: whether it runs without jax, and takes none of the options for it.
    """

    name: str
    help: str
    examples: tuple[str, ...]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    joins: bool = False
    bare: bool = False


def add_config_arguments(parser: argparse.ArgumentParser, *, instead: Sequence[tuple[str, str]] = ()) -> None:
    """Adds the options for gin files and for bindings that override them. instead: switches with their help; one of
    them may replace the files."""
    choice = parser.add_mutually_exclusive_group(required=True) if instead else parser
    choice.add_argument(
        "--gin_file",
        action="append",
        required=not instead,
        metavar="F",
        help="a gin file; repeatable; a gin_configs/... path that does not exist means the file shipped with Orogen",
    )
    for switch, text in instead:
        choice.add_argument(switch, action="store_true", help=text)
    parser.add_argument("--gin_bindings", action="append", default=[], metavar="X.y=1",
                        help="a binding that overrides the files; repeatable")  # fmt: skip


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that every command takes."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--fake_devices", type=positive, metavar="N", help="simulate N devices on this CPU")
    parser.add_argument("--xla", type=lambda text: text.split(","), default=[], metavar="A,B",
                        help=f"sets of XLA flags, separated by commas: {', '.join(XLA_FLAGS)}")  # fmt: skip


def positive(text: str) -> int:
    """Reads a whole number above 0. Raises argparse.ArgumentTypeError."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number above 0")
    return int(text)


def load_config(options: argparse.Namespace, *parts: str) -> tuple[RunConfig, str]:
    """The config of the gin files and bindings, and its operative text. Raises ConfigError if a part is missing."""
    from orogen.config.load import load

    config, text = load(options.gin_file, options.gin_bindings)
    return config.need(*parts), text


def answer(options: argparse.Namespace, facts: dict[str, Any], lines: Sequence[str]) -> None:
    """Prints `facts` as one JSON object with --json, `lines` without."""
    print(json.dumps(facts) if options.json else "\n".join(lines))


def fail(error: object, status: int) -> int:
    """Prints the error in one line on stderr. Returns the status."""
    say(f"orogen: {' '.join(str(error).split())}")
    return status


def warn(model: ModelConfig) -> None:
    """Prints one line on stderr for each setting that is legal but probably a mistake."""
    for line in model.warnings():
        say(f"orogen: warning: {line}")


def free_memory() -> Any:
    """The memory that the host and each device have left."""
    from orogen.parallel.capacity import device_bytes, host_bytes
    from orogen.simulate.fit import Memory

    return Memory(host_bytes(), device_bytes())


def told_progress() -> Callable[[], None]:
    """A function to call after each batch, which says on stderr from time to time how many there were."""
    began = said = time.monotonic()
    batches = 0

    def progress() -> None:
        nonlocal said, batches
        batches += 1
        now = time.monotonic()
        if now - said >= EVERY_SECONDS:
            said = now
            say(f"{batches} batches in {now - began:.0f} s")

    return progress
