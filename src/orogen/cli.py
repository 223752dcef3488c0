# PYTHON_ARGCOMPLETE_OK
"""The entry point: `orogen TASK …`. Each package declares its tasks in its `command.py`."""

import argparse
import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from orogen.bench.command import BENCH
from orogen.command import EXIT_BAD_INPUT, EXIT_FAILURE, add_common_arguments, fail
from orogen.compress.command import PRUNE, QUANTIZE, SEARCH, UPCYCLE
from orogen.config.checks import ConfigError
from orogen.convert.command import AVERAGE, CONVERT, PARAMS
from orogen.data.command import CURATE, TOKENIZE
from orogen.evaluate.command import EVALUATE
from orogen.infer.command import SCORE
from orogen.launch.command import LAUNCH
from orogen.launch.verdict import tell
from orogen.parallel import distributed
from orogen.parallel.cluster import VARIABLE, read_cluster
from orogen.parallel.roll_call import AbsentError
from orogen.parallel.runtime import configure
from orogen.posttrain.command import BEST_OF, DISTILL, DPO, ENVIRONMENTS, REWARD, RL, SFT
from orogen.simulate.command import PLAN, SIMULATE
from orogen.sweep.command import SWEEP
from orogen.train.command import TRAIN, VERIFY
from orogen.train.stop import INTERRUPTED
from orogen.vision.command import CAPTION, DATABASE, GENERATE, GRAFT, SERVE

COMMANDS = (
    TRAIN, SFT, DPO, RL, ENVIRONMENTS, DISTILL, REWARD, BEST_OF, SWEEP, LAUNCH, GENERATE, SERVE, SCORE, EVALUATE,
    CAPTION, DATABASE, CURATE, TOKENIZE, CONVERT, AVERAGE, UPCYCLE, PRUNE, QUANTIZE, SEARCH, GRAFT, PARAMS, PLAN,
    SIMULATE, VERIFY, BENCH,
)  # fmt: skip
FIRST = TRAIN.examples[0], GENERATE.examples[0]  # of the commands, for whoever knows none
# None: an error that our own code raises, which names a missing file.
PATH_ERRORS = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one task. Returns 0 on success, 2 on bad input (one line on stderr), 1 on any other failure, 130 after
    Ctrl-C."""
    parser = make_parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks for completions; this ends the process
        import argcomplete

        argcomplete.autocomplete(parser)
    try:
        options = parser.parse_args(arguments)
    except SystemExit as ended:
        tell(ended.code)
        raise
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names need not be UTF-8
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        return distributed.leave(tell(_run(options)))
    except Exception as error:
        tell(EXIT_FAILURE)
        if distributed.count() == 1:
            raise
        traceback.print_exception(error)
        return distributed.leave(EXIT_FAILURE)


def _run(options: argparse.Namespace) -> int:
    """Runs the task, as one of several processes if the options or the environment say so. Returns the exit status."""
    try:
        if not options.bare:
            configure(options.fake_devices, options.xla)
        if options.joins:
            distributed.start(read_cluster(options.cluster or os.environ.get(VARIABLE), os.environ))
        return options.run_task(options)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends the process at once, without a traceback
        return fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except AbsentError as error:
        return fail(error, EXIT_FAILURE)
    except ConfigError as error:
        return fail(error, EXIT_BAD_INPUT)
    except OSError as error:  # a wrong path is bad input; a full disk is not
        return fail(error, EXIT_BAD_INPUT if error.errno in PATH_ERRORS else EXIT_FAILURE)


class _Version(argparse.Action):
    """Prints the installed version; looks it up only on demand."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"orogen {version('orogen')}")
        except PackageNotFoundError:
            parser.error("orogen has no version; expected an installed package, not its source alone")
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line. `run_task` of the parsed options is the function to call with them."""
    parser = argparse.ArgumentParser(
        prog="orogen",
        description="Hybrid Mamba-Transformer mixture-of-experts language models, on one device or a mesh of them.",
        epilog="\n  ".join(("examples:", *FIRST)) + "\n\n`orogen TASK --help` shows a task's options, with examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    tasks = parser.add_subparsers(required=True, metavar="TASK")
    for command in COMMANDS:
        task = tasks.add_parser(
            command.name, help=command.help, description=f"{command.help[0].upper()}{command.help[1:]}.",
            epilog="\n  ".join(("examples:", *command.examples)), formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        task.set_defaults(run_task=command.run, joins=command.joins, bare=command.bare)
        command.add_arguments(task)
        if not command.bare:
            add_common_arguments(task)
    return parser


if __name__ == "__main__":
    sys.exit(main())
