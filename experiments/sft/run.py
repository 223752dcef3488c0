"""A small hybrid, pretrained on text, fine-tuned on answers of five synthetic families: with the loss on what the
assistant says, with the loss on every token, and without pretraining.

PYTHONPATH=src:. python experiments/sft/run.py --out runs/sft            # three seeds
PYTHONPATH=src:. python experiments/sft/run.py --out runs/sft --quick    # one, short: do the commands work?
PYTHONPATH=src:. python experiments/sft/run.py --table                   # the table of results.jsonl
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.minitron.run import bound, copy_corpus, orogen

from orogen.checkpoint.open import open_model
from orogen.config.rl import EnvironmentConfig
from orogen.infer.chat import Chat
from orogen.infer.engine import Engine
from orogen.infer.generate import engine_for
from orogen.infer.request import ERROR, Budget, Request, Sampling
from orogen.posttrain.dialogue import Opened, said_of
from orogen.posttrain.environments.interface import Environment, Example, Said
from orogen.posttrain.environments.make import make_environment

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
# Levels at which a family has enough different questions: digits, letters, numbers or words in fours.
LEVELS = {"addition": 2, "largest": 5, "reversal": 3, "sorting": 1, "counting": 2}
ARMS = ("before", "assistant", "every", "scratch")
SCRATCH, NEW = "scratch", ("--gin_file", HERE / "model.gin")
RATE, TUNING_RATE = 4e-3, 4e-3


class Size(NamedTuple):
    """Steps of pretraining and of fine-tuning; questions of each family to train on, and held out."""

    base: int
    tuned: int
    train: int
    heldout: int


WHOLE, QUICK = Size(400, 800, 3000, 200), Size(4, 4, 40, 8)


class Questions(NamedTuple):
    """The tasks of a family; held-out ones ask no question that is trained on."""

    environment: Environment
    train: list[Example]
    heldout: list[Example]


def questions(family: str, level: int, size: Size, seed: int) -> Questions:
    """Different questions of a family, drawn by the seed."""
    many = 4 * (size.train + size.heldout)
    config = EnvironmentConfig(
        name=family, kind="synthetic", family=family, level=level, seed=seed, examples=many
    )  # fmt: skip
    environment = make_environment(config)
    found = {environment.example(n).messages[0]["content"]: environment.example(n) for n in range(many)}
    examples = list(found.values())[: size.train + size.heldout]
    if len(examples) < size.train + size.heldout:
        raise ValueError(f"{family} has {len(examples)} different questions; expected {size.train + size.heldout}")
    return Questions(environment, examples[size.heldout :], examples[: size.heldout])


def write_chats(folder: Path, examples: Sequence[Example], thought: Callable[[Example], str] | None = None) -> Path:
    """Conversations of one question and its right answer each, with what is thought before it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "chats.jsonl").open("w") as file:
        for example in examples:
            said = {"role": "assistant", "content": example.secret}
            if thought is not None:
                said["reasoning_content"] = thought(example)
            print(json.dumps({"messages": [*example.messages, said]}), file=file)
    return folder


class Answerer:
    """A checkpoint that answers questions, the most likely token each time. tokens: the most of an answer."""

    def __init__(self, checkpoint: Path, template: Path, *, rows: int, tokens: int, length: int = 256) -> None:
        opened = open_model(checkpoint)
        assert opened.tokenizer is not None
        self._chat = Chat(opened.tokenizer, template.read_text())
        self._engine, self._tokens = Engine(opened, engine_for(rows=rows, length=length)), tokens

    def said(self, examples: Sequence[Example], budget: Budget | None = None) -> list[Said]:
        """What it says to each."""
        prompts = [self._chat.prompt(list(example.messages)) for example in examples]
        sampling = Sampling(temperature=0.0)
        requests = [
            Request(prompt=tuple(one.ids), max_tokens=self._tokens, sampling=sampling, budget=budget)
            for one in prompts
        ]  # fmt: skip
        found = []
        for prompt, outputs in zip(prompts, self._engine.run(requests), strict=True):
            if outputs[-1].finish == ERROR:
                raise FloatingPointError(outputs[-1].error)
            text = "".join(output.text for output in outputs)
            found.append(said_of(text, Opened(prompt.ids, bool(prompt.thinks)), ()))
        return found

    def close(self) -> None:
        self._chat.close()
        self._engine.close()


def right(environment: Environment, example: Example, said: Said) -> float:
    """The reward of an answer."""
    rewards = environment.step(example, environment.start(example), said).rewards
    assert rewards is not None
    return sum(rewards.values())


def tuned(run: Path, corpus: Path, steps: int, seed: int, *words: object, **values: Any) -> Path:
    """A fine-tuning run."""
    binds = bound(
        DataConfig__corpus=str(corpus), TrainConfig__steps=steps, TrainConfig__seed=seed,
        TrainConfig__evaluate_every=steps, TrainConfig__checkpoint_every=steps,
        OptimizerConfig__learning_rate=TUNING_RATE, OptimizerConfig__warmup_steps=max(1, steps // 20), **values,
    )  # fmt: skip
    orogen("sft", "--gin_file", HERE / "train.gin", "--run", run, *binds, *words)
    return run


def pretrained(folder: Path, steps: int, seed: int) -> Path:
    """The small model after text, the standard library's files."""
    text, _ = copy_corpus(folder, 10_000)
    binds = bound(
        DataConfig__corpus=str(text), DataConfig__heldout_fraction=0.1,
        TrainConfig__steps=steps, TrainConfig__seed=seed,
        TrainConfig__evaluate_every=steps, TrainConfig__checkpoint_every=steps,
        OptimizerConfig__learning_rate=RATE, OptimizerConfig__warmup_steps=max(1, steps // 20),
    )  # fmt: skip
    files = "--gin_file", HERE / "model.gin", "--gin_file", HERE / "train.gin"
    orogen("train", *files, "--run", folder / "base", *binds)
    return folder / "base"


def accuracies(checkpoint: Path, asked: dict[str, Questions], size: Size) -> dict[str, float]:
    """The share of right answers to the held-out questions of each family."""
    answerer = Answerer(checkpoint, HERE / "chat.jinja", rows=size.heldout, tokens=24)
    found = {}
    for family, one in asked.items():
        said = answerer.said(one.heldout)
        scores = [right(one.environment, *pair) for pair in zip(one.heldout, said, strict=True)]
        found[family] = statistics.mean(scores)
    answerer.close()
    return found


def trial(folder: Path, seed: int, arms: Sequence[str], size: Size) -> Iterator[dict[str, Any]]:
    """One line per arm, when it is done."""
    asked = {family: questions(family, level, size, seed) for family, level in LEVELS.items()}
    corpus = write_chats(folder / "chats", [example for one in asked.values() for example in one.train])
    base = folder if set(arms) == {SCRATCH} else pretrained(folder, size.base, seed)
    for arm in arms:
        began = time.monotonic()
        run = base
        if arm != "before":
            start = NEW if arm == SCRATCH else ("--checkpoint", base)
            chat = {"ChatConfig__template": str(HERE / "chat.jinja")}
            chat |= {"ChatConfig__learned": "every"} if arm == "every" else {}
            run = tuned(folder / arm, corpus, size.tuned, seed, *start, **chat)
        found = accuracies(run, asked, size)
        seconds = round(time.monotonic() - began)
        yield {"seed": seed, "arm": arm, "accuracy": found, "mean": statistics.mean(found.values()), "seconds": seconds}


def table(lines: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds of every arm, in percent."""
    rows = ["| arm | " + " | ".join(LEVELS) + " | mean |", "|---" * (len(LEVELS) + 2) + "|"]
    for arm in ARMS:
        own = [line for line in lines if line["arm"] == arm]
        columns = [[line["accuracy"][family] for line in own] for family in LEVELS] + [[line["mean"] for line in own]]
        cells = [f"{100 * statistics.mean(c):.1f} ± {100 * statistics.stdev(c):.1f}" if c[1:] else "–" for c in columns]
        rows.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def record(trial: Callable[..., Iterator[dict[str, Any]]], options: argparse.Namespace, size: Size) -> None:
    """Runs the trial of each seed and prints its lines, which the record gets too unless the run is a quick one."""
    for seed in (0,) if options.quick else options.seeds:
        for line in trial(options.out / f"seed{seed}", seed, options.arms, size):
            print(json.dumps(line), flush=True)
            if not options.quick:
                with options.record.open("a") as file:
                    print(json.dumps(line), file=file)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/sft"), help="a new folder")
    parser.add_argument("--record", type=Path, default=HERE / "results.jsonl", help="gets a line per seed and arm")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps; nothing is recorded")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS, help="which seeds run")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=ARMS, help="which arms run")
    parser.add_argument("--table", action="store_true", help="only prints the table of the record")
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(line) for line in options.record.read_text().splitlines()]))
        return
    record(trial, options, QUICK if options.quick else WHOLE)


if __name__ == "__main__":
    main()
