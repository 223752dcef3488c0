"""The one entry point: `orogen TASK --gin_file F [--gin_bindings 'X.y=1'] …`."""

import argparse
import contextlib
import errno
import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orogen.bench.command import add_arguments as add_bench_arguments
from orogen.bench.command import run as run_bench
from orogen.config.checks import ConfigError, is_unicode
from orogen.config.load import load, model_bindings
from orogen.config.model import ModelConfig
from orogen.config.run import RunConfig
from orogen.parallel.runtime import XLA_FLAGS, configure
from orogen.train.stop import INTERRUPTED
from orogen.train.streams import lasting_streams, say

CHECKPOINT = "a run folder, an Orogen checkpoint folder or a Hugging Face folder"
PROMPT = (
    "text to continue. The checkpoint's tokenizer decides what is put around it: bos before it after a run of Orogen's "
    "own; in other folders what the post-processor of tokenizer.json says or, without one, add_bos_token and "
    "add_eos_token of tokenizer_config.json; bos alone if there would be no token at all"
)
EXIT_FAILURE, EXIT_BAD_INPUT = 1, 2
# None: raised by our own code, with the name of a file that is missing.
PATH_ERRORS = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one task. Returns 0 when done, 2 on bad input (one line on stderr), 1 if the task found a fault, 130 after
    Ctrl-C."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # so that it takes the name of a file that is not UTF-8
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        configure(options.fake_devices, options.xla)
        return options.task(options)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends the process at once, without a traceback
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except ConfigError as error:
        return _fail(error, EXIT_BAD_INPUT)
    except OSError as error:  # a path that cannot be is bad input; a full disk is not
        return _fail(error, EXIT_BAD_INPUT if error.errno in PATH_ERRORS else EXIT_FAILURE)


def _fail(error: object, status: int) -> int:
    say(f"orogen: {' '.join(str(error).split())}")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="orogen", description=__doc__)
    tasks = parser.add_subparsers(required=True, metavar="TASK")
    task = _task(tasks, "train", train, "train a model in a run folder")
    task.add_argument("--run", type=Path, required=True, metavar="DIR", help="the run folder")
    task.add_argument("--resume", action="store_true", help="go on with the run in DIR, if there is one")
    task.add_argument("--checkpoint", type=Path, metavar="DIR", help=f"start from the weights of {CHECKPOINT}")
    _task(tasks, "params", params, "count parameters")
    task = _task(tasks, "plan", plan, "show the mesh, where each parameter lives and what is sent; needs no devices")
    task.add_argument(
        "--compile", action="store_true", help="what one layer of each type sends, as XLA compiles it, too"
    )
    task.add_argument(
        "--memory", action="store_true", help="what a device holds: state, activations by name, the compiled step's"
    )
    task = _task(tasks, "verify", verify, "check a plan against one device: gradients, whole steps or evaluation")
    task.add_argument(
        "--what", choices=("gradients", "step", "evaluation"), default="gradients",
        help="loss, every gradient and one update (the default); several whole training steps, one of them not finite; "
        "or held-out losses",
    )  # fmt: skip
    task.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="in which the plan computes; the one device computes in float32 always, by the plainest kernels",
    )  # fmt: skip
    task = tasks.add_parser("generate", help="sample text from a trained model")
    task.set_defaults(task=generate, gin_file=None)
    task.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help=CHECKPOINT)
    task.add_argument("--prompt", default="", metavar="TEXT", help=PROMPT)
    task.add_argument("--tokens", type=_positive, default=128)
    task.add_argument("--temperature", type=float, default=0.8)
    task.add_argument("--top_p", type=float, default=0.95)
    task.add_argument("--seed", type=int, default=0)
    _common(task)
    task = tasks.add_parser("score", help="logits and log-probabilities of given tokens")
    task.set_defaults(task=score, gin_file=None)
    task.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help=CHECKPOINT)
    task.add_argument("--tokens", type=Path, required=True, metavar="IN.npy", help="integers (batch, time)")
    task.add_argument("--segments", type=Path, metavar="SEG.npy", help="documents of each row, 0 for padding")
    task.add_argument("--out", type=Path, required=True, metavar="OUT.npz", help="gets `logits` and `logprobs`")
    _common(task)
    task = tasks.add_parser("convert", help="exchange checkpoints with Hugging Face")
    task.set_defaults(task=convert, gin_file=None)
    task.add_argument("direction", choices=("from-hf", "to-hf"), help="from-hf reads a Hugging Face folder")
    task.add_argument("source", type=Path, metavar="SRC", help="to-hf: an Orogen checkpoint folder or a run folder")
    task.add_argument("target", type=Path, metavar="DST", help="a new folder")
    dtypes = ("float32", "bfloat16", "float16")
    task.add_argument("--dtype", choices=dtypes, help="of to-hf; a run's weights become bfloat16 without it")
    _common(task)
    task = tasks.add_parser("bench", help="time Orogen, with a peer beside it in the same run")
    task.set_defaults(task=bench)
    add_bench_arguments(task, _positive)
    _common(task)
    return parser


def _task(tasks: Any, name: str, run: Callable[[argparse.Namespace], int], help_text: str) -> argparse.ArgumentParser:
    task = tasks.add_parser(name, help=help_text)
    task.set_defaults(task=run)
    task.add_argument("--gin_file", action="append", required=True, metavar="F", help="may be given more than once")
    task.add_argument("--gin_bindings", action="append", default=[], metavar="X.y=1", help="on top of the files")
    _common(task)
    return task


def _common(task: argparse.ArgumentParser) -> None:
    task.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    task.add_argument("--fake_devices", type=_positive, metavar="N", help="simulate N devices on this CPU")
    task.add_argument("--xla", type=lambda text: text.split(","), default=[], metavar="A,B",
                      help=f"sets of XLA's flags: {', '.join(XLA_FLAGS)}")  # fmt: skip


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number above 0")
    return int(text)


def _load(options: argparse.Namespace, *parts: str) -> tuple[RunConfig, str]:
    config, text = load(options.gin_file, options.gin_bindings)
    return config.need(*parts), text


def _load_with_checkpoint(options: argparse.Namespace) -> tuple[RunConfig, str, Any]:
    """The gin files' config, its model that of --checkpoint if they have none, and where the run starts from."""
    config, text = _load(options)
    if options.checkpoint is None:
        return config, text, None
    from orogen.convert.checkpoint import origin, read_model_config
    from orogen.convert.config import difference

    model = read_model_config(options.checkpoint)
    if config.model is None:
        config, text = load(options.gin_file, [*options.gin_bindings, *model_bindings(model)])
    elif (field := difference(config.model, model)) is not None:
        here, there = getattr(config.model, field), getattr(model, field)
        raise ConfigError(f"ModelConfig.{field} is {here!r}; expected {there!r}, as {str(options.checkpoint)!r} has it")
    return config, text, origin(options.checkpoint)


def _answer(options: argparse.Namespace, facts: dict[str, Any], lines: Sequence[str]) -> None:
    print(json.dumps(facts) if options.json else "\n".join(lines))


def _memory() -> Any:
    """What the host and each device have left."""
    from orogen.parallel.capacity import device_bytes, host_bytes
    from orogen.simulate.fit import Memory

    return Memory(host_bytes(), device_bytes())


def _warn(model: ModelConfig) -> None:
    for line in model.warnings():
        say(f"orogen: warning: {line}")


def train(options: argparse.Namespace) -> int:
    """`orogen train`."""
    config, text, origin = _load_with_checkpoint(options)
    config.need("model", "data", "train", "optimizer")
    from orogen.simulate.fit import require_training_fits
    from orogen.train.loop import NonFiniteError
    from orogen.train.loop import train as run
    from orogen.train.stop import StoppedEarlyError

    require_training_fits(config, _memory())
    _warn(config.model)
    # The folder is this run's, and signals are minded, until the report is written.
    with lasting_streams(), contextlib.ExitStack() as held:
        try:
            trained = run(config, text, options.run, resume=options.resume, origin=origin, log=say, until=held)
            return _finish_run(options, config, text, trained)
        except NonFiniteError as error:
            return _fail(error, EXIT_FAILURE)
        except StoppedEarlyError as stopped:
            _answer(options, {"finished": False}, ["stopped with nothing new to save; --resume continues"])
            return stopped.status
    raise AssertionError("unreachable")


def _finish_run(options: argparse.Namespace, config: RunConfig, text: str, trained: Any) -> int:
    """Reports on a run that is at its end, or says that it goes on later."""
    from orogen.evaluate.summary import summarise

    step, report = int(trained.state.step), options.run / "report.html"
    if not trained.finished:
        _answer(options, {"step": step, "finished": False}, [f"stopped after step {step}; --resume continues"])
        return trained.stop.status
    if trained.steps == 0 and report.is_file():
        _answer(options, {"step": step, "finished": True, "report": str(report)}, [f"done already: see {report}"])
        return 0
    facts = summarise(trained, config, text, options.run)
    _answer(options, facts, [f"{key}: {value}" for key, value in facts.items()])
    return 0


def params(options: argparse.Namespace) -> int:
    """`orogen params`."""
    config, _ = _load(options, "model")
    from orogen.convert.count import count_exported

    facts = count_exported(config.model)
    _answer(options, facts, [f"{key:>26}  {'-' if n is None else format(n, ','):>21}" for key, n in facts.items()])
    return 0


def plan(options: argparse.Namespace) -> int:
    """`orogen plan`."""
    config, _ = _load(options, "model")
    from orogen.model.lm import build
    from orogen.parallel.describe import describe_plan, plan_lines
    from orogen.parallel.plan import make_plan
    from orogen.train.pipelined import cut

    laid = make_plan(config.plan, config.model, abstract=True)
    stages = cut(config.model, laid, *([config.train.sequence_length] if config.train else []))
    patterns, filled = (stages.patterns, stages.filled) if stages else ((), {})
    built = build(config.model, stages, config.plan.vocab_rows(config.model.vocab_size))
    facts = describe_plan(laid, built.params, patterns, filled)
    lines = plan_lines(facts)
    if options.compile:
        config.need("train")
    if options.memory:
        config.need("train", "optimizer")
    if config.train is not None:
        more, more_lines = _collectives(options, config)
        facts, lines = {**facts, **more}, [*lines, "", *more_lines]
    _answer(options, facts, lines)
    return 0


def _collectives(options: argparse.Namespace, config: RunConfig) -> tuple[dict[str, Any], list[str]]:
    """What the plan's devices send by paper and, with --compile, in XLA's programs for simulated devices; and, with
    --memory, what they hold."""
    from orogen.simulate.communication import Workload, collective_lines, describe_collectives

    sizes, train, model = config.plan, config.train, config.model
    rows, tokens = train.batch_size // (sizes.data * sizes.microbatches), train.sequence_length // sizes.context
    work = Workload(rows, tokens, 2 if train.compute_dtype == "bfloat16" else 4)
    facts: dict[str, Any] = {"collectives": describe_collectives(model, sizes, work)}
    lines = collective_lines(facts["collectives"])
    if (options.compile or options.memory) and not options.fake_devices:
        configure(sizes.devices)
    if options.memory:
        from orogen.simulate.memory import describe_memory, memory_lines

        facts["memory"] = describe_memory(config, work)
        lines += ["", *memory_lines(facts["memory"])]
    if options.compile:
        from orogen.simulate.aot import compare, compared_lines, flops_overhead

        letters = dict.fromkeys(model.layers.main + model.layers.mtp)
        facts["compiled"] = compare(model, sizes, work, letters)
        facts["flops_overhead"] = flops_overhead(model, sizes, train.batch_size, train.sequence_length)
        overhead = f"matrix products of all devices against those of one: {100 * facts['flops_overhead']:+.2f} %"
        lines += ["", *compared_lines(facts["compiled"]), "", overhead]
    return facts, lines


def verify(options: argparse.Namespace) -> int:
    """`orogen verify`: simulates the devices of the plan if none are asked for."""
    config, _ = _load(options, "model")
    from orogen.parallel.capacity import host_bytes
    from orogen.simulate.fit import require_verification_fits
    from orogen.train.verify import default_train
    from orogen.train.verify import verify as check

    require_verification_fits(config, config.train or default_train(config), host=host_bytes())
    if not options.fake_devices:
        configure(config.plan.devices)
    _warn(config.model)
    verdict = check(config, what=options.what, dtype=options.dtype)
    facts = {**verdict._asdict(), "passed": verdict.passed}
    _answer(options, facts, [f"{key:>20}  {value}" for key, value in facts.items()])
    return 0 if verdict.passed else EXIT_FAILURE


def bench(options: argparse.Namespace) -> int:
    """`orogen bench`."""
    facts, lines, right = run_bench(options)
    _answer(options, facts, lines)
    return 0 if right else EXIT_FAILURE


def generate(options: argparse.Namespace) -> int:
    """`orogen generate`."""
    if not 0 <= options.temperature < math.inf or not 0 < options.top_p <= 1:
        raise ConfigError(
            f"--temperature {options.temperature} --top_p {options.top_p}; expected 0 or more, and above 0 up to 1"
        )
    if not 0 <= options.seed < 2**63:
        raise ConfigError(f"--seed {options.seed}; expected a whole number from 0 to 2**63 - 1")
    if not is_unicode(options.prompt):
        raise ConfigError(f"--prompt {options.prompt!r}; expected valid UTF-8")
    from orogen.convert.checkpoint import goes_by_blocks, load_checkpoint, read_model_config
    from orogen.infer.generate import generate as run
    from orogen.simulate.fit import require_inference_fits

    require_inference_fits(
        read_model_config(options.checkpoint),
        _memory(),
        blocked=goes_by_blocks(options.checkpoint),
        rows=1,
        tokens=options.tokens,
        settings={"--tokens": options.tokens},
    )
    (text,) = run(
        load_checkpoint(options.checkpoint),
        [options.prompt],
        tokens=options.tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    _answer(options, {"prompt": options.prompt, "text": text}, [options.prompt + text])
    return 0


def score(options: argparse.Namespace) -> int:
    """`orogen score`."""
    from orogen.convert.checkpoint import goes_by_blocks, load_weights, read_model_config
    from orogen.infer.score import read_array, write_arrays
    from orogen.infer.score import score as run
    from orogen.simulate.fit import require_scoring_fits

    if not options.out.parent.is_dir():
        raise ConfigError(f"--out {str(options.out)!r}; expected a file in a folder that exists")
    tokens_bt = read_array(options.tokens)
    segments_bt = read_array(options.segments) if options.segments else None
    if tokens_bt.ndim == 2 and tokens_bt.size:  # anything else is refused by its shape
        model, blocked = read_model_config(options.checkpoint), goes_by_blocks(options.checkpoint)
        rows, length = tokens_bt.shape
        require_scoring_fits(model, _memory(), blocked=blocked, rows=rows, tokens=length)
    scores = run(load_weights(options.checkpoint), tokens_bt, segments_bt)
    write_arrays(options.out, scores)
    shape = list(scores["logits"].shape)
    _answer(options, {"out": str(options.out), "logits": shape}, [f"logits {shape} in {options.out}"])
    return 0


def convert(options: argparse.Namespace) -> int:
    """`orogen convert`."""
    from orogen.convert.checkpoint import export
    from orogen.convert.huggingface import from_hf

    if options.direction == "from-hf":
        if options.dtype:
            raise ConfigError(
                f"--dtype {options.dtype}; expected it with to-hf only: from-hf keeps what the files have"
            )
        from_hf(options.source, options.target)
    else:
        export(options.source, options.target, dtype=options.dtype)
    _answer(options, {"target": str(options.target)}, [f"written: {options.target}"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
