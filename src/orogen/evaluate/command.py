"""`orogen evaluate`. Importing this does not import jax."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orogen.command import CHECKPOINT, Command, answer, free_memory, positive, told_progress
from orogen.config.checks import ConfigError, require
from orogen.config.engine import DECODED
from orogen.config.evaluate import METHODS, SUITES, EvaluateConfig
from orogen.config.streams import say

if TYPE_CHECKING:
    from collections.abc import Iterator

    from orogen.evaluate.run import Results

TASKS = (
    f"tasks, separated by commas: generated ones ({', '.join(SUITES)}), and those of lm-eval, which needs "
    "`pip install 'orogen[eval]'`"
)
TEXT = (
    "measure bits per byte and perplexity on a file, or on the documents below a folder: .txt, .jsonl, .jsonl.gz, "
    ".jsonl.zst or .parquet; any other file is one text; repeatable"
)
TASK_PATH = (
    "a folder of lm-eval tasks, in place of those that lm-eval comes with; repeatable. Python that they name is run"
)
OUT = (
    "writes results.json, results.txt and results.png there; if the evaluation ends early, of what has ended: the "
    "generated tasks, those of lm-eval, each text"
)
BINDINGS = "of PlanConfig, EngineConfig and EvaluateConfig, such as PlanConfig.tensor=2; repeatable"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help=CHECKPOINT)
    add("--tasks", type=_names, metavar="A,B", help=TASKS)
    add("--text", action="append", metavar="FILE", help=TEXT)
    add("--text_field", metavar="NAME", help="the key (jsonl) or column (Parquet) that holds the text")
    add("--task_path", action="append", metavar="DIR", help=TASK_PATH)
    add("--lengths", type=_numbers, metavar="N,N", help="tokens of the examples of generated tasks")
    add("--samples", type=positive, metavar="N", help="examples of a generated task per length")
    add("--seed", type=int, metavar="N", help="decides the generated examples")
    add("--haystack", metavar="FILE", help="text that hides the needles, in place of sentences that repeat")
    add("--limit", type=positive, metavar="N", help="documents per task of lm-eval")
    add("--shots", type=int, metavar="N", help="examples before each document of a task of lm-eval")
    add("--max_length", type=positive, metavar="N", help="tokens of a window, and the most of a request of lm-eval")
    add("--method", choices=METHODS, help="how texts longer than that are read")
    add("--stride", type=positive, metavar="N", help="tokens that each further window predicts")
    add("--score_ends", action="store_true", default=None,
        help="also predict the token that ends a document, as training does")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help=OUT)
    add("--export", type=Path, metavar="DIR", help="writes the generated examples there instead of evaluating")
    add("--gin_bindings", action="append", default=[], metavar="X.y=1", help=BINDINGS)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(positive(part.strip()) for part in text.split(","))


OPTIONS = {"text": "texts"}  # options whose field has another name


def _bindings(options: argparse.Namespace) -> list[str]:
    """What the options say of EvaluateConfig, then the bindings, which are refused where both say something."""
    fields = (*EvaluateConfig.__dataclass_fields__, *OPTIONS)
    given = {OPTIONS.get(name, name): getattr(options, name, None) for name in fields}
    found = [f"EvaluateConfig.{name} = {value!r}" for name, value in given.items() if value is not None]
    names = [binding.split("=")[0].strip() for binding in options.gin_bindings]
    if given["tasks"] is None and "EvaluateConfig.tasks" not in names:
        found.append("EvaluateConfig.tasks = ()")
    return [*found, *options.gin_bindings]


def evaluate(options: argparse.Namespace) -> int:
    """`orogen evaluate`."""
    from orogen.config.load import load_evaluation

    plan, engine, config = load_evaluation(_bindings(options))
    require(config.every is None, config, "every", "None: only a run that trains has steps")
    if options.export is not None:
        return _export(options, config)
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        raise ConfigError(f"--out {str(options.out)!r} is a file; expected a folder or a new name")
    from orogen.checkpoint.open import open_folder, read_model
    from orogen.evaluate.results import plain, table, write_results
    from orogen.evaluate.run import Evaluator
    from orogen.evaluate.subject import Subject, stated_length
    from orogen.simulate.fit import require_inference_fits
    from orogen.simulate.room import EvaluationRoom

    evaluator, began = Evaluator(config), time.monotonic()
    with open_folder(options.checkpoint) as folder:
        attention, memory = getattr(plan or folder.plan, "attention", "full"), free_memory()
        room = EvaluationRoom(
            model=folder.config, memory=memory, plan=plan, attention=attention, dtype=engine.compute_dtype,
            config=config,
        )  # fmt: skip
        if evaluator.writes:
            require(engine.weights == DECODED, engine, "weights", f"{DECODED!r} here: texts are scored in memory whole")
            require_inference_fits(folder.config, plan, engine, memory, settings={})
        room.loading()
        if evaluator.suites:  # texts and requests are not known yet
            longest = max(config.lengths)
            room.scoring(longest, {(max(1, config.batch_tokens // longest), longest)}, field="lengths")
        opened = read_model(folder, plan and plan.evaluating(), engine.compute_dtype)
        stated = stated_length(folder)
    subject = Subject(opened, config, engine, told_progress(), stated=stated, room=room)
    facts: dict[str, Any] = {"checkpoint": str(options.checkpoint)}
    results = _results(evaluator.parts(subject), options.out, facts)
    facts |= {"complete": True, "seconds": round(time.monotonic() - began, 3)}
    written = write_results(options.out, results, facts) if options.out is not None else []
    lines = [*table(results), *(f"wrote {file}" for file in written)]
    answer(options, {**facts, "results": plain(results)}, lines)
    return 0


def _results(parts: "Iterator[Results]", out: Path | None, facts: dict[str, Any]) -> "Results":
    """All results. If a part raises, or at Ctrl-C, those of the parts before it are written: they were expensive."""
    from orogen.evaluate.results import write_results

    results: Results = {}
    try:
        for part in parts:
            results |= part
    except BaseException:
        if results and out is not None:
            write_results(out, results, {**facts, "complete": False})
            say(f"orogen: {out} holds the results of what had ended")
        raise
    return results


def _export(options: argparse.Namespace, config: EvaluateConfig) -> int:
    """`orogen evaluate --export DIR`."""
    from orogen.checkpoint.open import open_folder
    from orogen.evaluate.suites.run import export_suites

    if config.generated != config.tasks or not config.tasks or config.texts:
        raise ConfigError(
            f"--export with tasks {config.tasks} and texts {config.texts}; expected generated tasks alone"
        )
    with open_folder(options.checkpoint) as folder:
        tokenizer = folder.tokenizer()
    if tokenizer is None:
        raise ConfigError("the checkpoint has no tokenizer.json; expected one, to make examples with")
    files = [str(file) for file in export_suites(options.export, tokenizer, config, config.tasks)]
    answer(options, {"files": files}, [f"wrote {file}" for file in files])
    return 0


EVALUATE = Command(
    name="evaluate",
    help="score a model on texts and tasks",
    examples=(
        "orogen evaluate --checkpoint runs/quickstart --text README.md --json",
        "orogen evaluate --checkpoint runs/quickstart --tasks mqar,phonebook --lengths 256,512 --out results",
        "orogen evaluate --checkpoint HF_FOLDER --task_path my_tasks --tasks my_task --limit 100",
        "orogen evaluate --checkpoint HF_FOLDER --text book.txt --method carried --gin_bindings 'PlanConfig.tensor=2' "
        "--gin_bindings \"EngineConfig.compute_dtype='bfloat16'\"",
        "orogen evaluate --checkpoint HF_FOLDER --tasks needle --lengths 4096 --export needles",
    ),
    add_arguments=_add_arguments,
    run=evaluate,
)
