"""Writes the tasks of a recipe's environments as text with random answers in the right form: the policy then begins at
chance. Of another recipe than the toy's, only tasks that are trained on; with RIGHT, so many of each environment with
their right answers: one number, or one per environment, joined by commas.
`python experiments/rlvr/corpus.py FILE.jsonl [RECIPE.gin [RIGHT]]`"""

import json
import random
import sys
from pathlib import Path

from orogen.config.load import load
from orogen.posttrain.environments.make import make_environment
from orogen.posttrain.task_split import split_tasks

RECIPE = Path("gin_configs/posttrain/rl_toy.gin")
COPIES = 4  # answers to each task


def main(file: str, recipe: str | None = None, right: str | None = None) -> None:
    rng, lines = random.Random(0), []
    config = load([Path(recipe) if recipe else RECIPE])[0].need("rl", "data")
    environments = {one.name: make_environment(one) for one in config.rl.environments}
    trained = split_tasks(environments, config.data).numbers["train"] if recipe else None
    counts = [int(count) for count in (right or "0").split(",")]
    counts = counts * len(environments) if len(counts) == 1 else counts
    for (name, environment), count in zip(environments.items(), counts, strict=True):
        numbers = range(len(environment)) if trained is None else trained[name]
        examples = [environment.example(number) for number in numbers]
        if right is not None:
            lines += [json.dumps({"text": one.messages[0]["content"] + one.secret}) for one in examples[:count]]
            continue
        answers = sorted({example.secret for example in examples})
        lines += [
            json.dumps({"text": example.messages[0]["content"] + rng.choice(answers)})
            for example in examples for _ in range(COPIES)
        ]  # fmt: skip
    Path(file).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
