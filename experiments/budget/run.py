"""A small hybrid learns to think step by step, with and without thoughts that are cut short, and answers under budgets
of reasoning in both forms of the engine.

PYTHONPATH=src:. python experiments/budget/run.py --out runs/budget            # three seeds, three arms
PYTHONPATH=src:. python experiments/budget/run.py --out runs/budget --quick    # one seed, short: do the commands work?
PYTHONPATH=src:. python experiments/budget/run.py --table                      # the tables of results.jsonl
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from experiments.sft.run import NEW, Answerer, Questions, Size, questions, record, right, tuned, write_chats

from orogen.infer.request import Budget
from orogen.posttrain.environments.interface import Example

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
SHARES = {"none": 0.0, "report": 0.03, "many": 0.3}  # of thoughts that are cut short in training
ITEMS = 12  # of a question, each of which has a line of three bytes in the thought
LEVELS = {"counting": ITEMS // 4, "largest": ITEMS - 1, "parity": ITEMS - 1}
# Of a line of three bytes, the last one does not fit, where both forms differ; 36 bytes are the whole thought.
BUDGETS = [("free", None), *(("hard", n) for n in (17, 0, 26, 8)), *(("grace", n) for n in (17, 26, 8))]
WHOLE, QUICK = Size(0, 700, 3000, 100), Size(0, 4, 40, 4)
TOKENS = 96  # the most of an answer, more than two thoughts


def thought(family: str, example: Example) -> str:
    """A line per item: the item, and the result so far."""
    question = example.messages[0]["content"]
    words = question[:-1].split()
    if family == "counting":
        items, step = words[3], lambda before, item: before + (item == words[1])
    elif family == "largest":
        items, step = "".join(words[1:]), lambda before, item: max(before, int(item))
    else:
        items, step = words[1], lambda before, item: before ^ int(item)
    return "".join(f"{item}{result}\n" for item, result in zip(items, results(items, step), strict=True))


def results(items: Iterable[str], step: Callable[[int, str], int]) -> Iterator[int]:
    """The result after each item."""
    result = 0
    for item in items:
        result = step(result, item)
        yield result


def measured(answerer: Answerer, asked: dict[str, Questions]) -> Iterator[dict[str, Any]]:
    """For every budget and family: the share of right answers, of answers that are more than a number, and the mean
    bytes of thoughts and of answers."""
    for form, tokens in BUDGETS:
        budget = None if tokens is None else Budget(tokens=tokens, form=form)
        for family, one in asked.items():
            said = answerer.said(one.heldout, budget)
            yield {
                "form": form, "budget": tokens, "family": family,
                "accuracy": statistics.mean(
                    right(one.environment, *pair) for pair in zip(one.heldout, said, strict=True)
                ),
                "leaked": statistics.mean(not answer.content.strip().isdigit() for answer in said),
                "thought": statistics.mean(len(answer.reasoning) for answer in said),
                "answer": statistics.mean(len(answer.content) for answer in said),
            }  # fmt: skip


def trial(folder: Path, seed: int, arms: Iterable[str], size: Size) -> Iterator[dict[str, Any]]:
    """The lines of each arm, when it is done."""
    asked = {family: questions(family, level, size, seed) for family, level in LEVELS.items()}
    owner = {id(example): family for family, one in asked.items() for example in one.train}
    examples = [example for one in asked.values() for example in one.train]
    corpus = write_chats(folder / "chats", examples, lambda example: thought(owner[id(example)], example))
    settings = {"ChatConfig__template": str(HERE / "chat.jinja"), "TrainConfig__sequence_length": 256,
                "TrainConfig__batch_size": 8}  # fmt: skip
    for arm in arms:
        began = time.monotonic()
        cut = {"ChatConfig__truncated": SHARES[arm]}
        run = tuned(folder / arm, corpus, size.tuned, seed, *NEW, **settings, **cut)
        answerer = Answerer(run, HERE / "chat.jinja", rows=size.heldout, tokens=TOKENS)
        for line in measured(answerer, asked):
            yield {"seed": seed, "arm": arm, "steps": size.tuned, **line}
        answerer.close()
        print(f"seed {seed}, {arm}: {time.monotonic() - began:.0f} s", flush=True)


def table(lines: list[dict[str, Any]], family: str, field: str) -> str:
    """Mean and standard deviation over seeds of each arm and budget, in percent."""
    names = [form if tokens is None else f"{form} {tokens}" for form, tokens in BUDGETS]
    rows = [f"| {family}, {field} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for arm in SHARES:
        cells = []
        for form, tokens in BUDGETS:
            own = [
                100 * line[field] for line in lines
                if (line["arm"], line["form"], line["budget"], line["family"]) == (arm, form, tokens, family)
            ]  # fmt: skip
            spread = f" ± {statistics.stdev(own):.1f}" if len(own) > 1 else ""
            cells.append(f"{statistics.mean(own):.1f}{spread}" if own else "–")
        rows.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/budget"), help="a new folder")
    parser.add_argument("--record", type=Path, default=HERE / "results.jsonl", help="gets a line per measurement")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps; nothing is recorded")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS, help="which seeds run")
    parser.add_argument("--arms", nargs="*", choices=SHARES, default=list(SHARES), help="which arms run")
    parser.add_argument("--table", action="store_true", help="only prints the tables of the record")
    options = parser.parse_args()
    if options.table:
        lines = [json.loads(line) for line in options.record.read_text().splitlines()]
        print("\n".join(table(lines, family, field) for field in ("accuracy", "leaked") for family in LEVELS))
        return
    record(trial, options, QUICK if options.quick else WHOLE)


if __name__ == "__main__":
    main()
