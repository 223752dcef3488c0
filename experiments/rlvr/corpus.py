"""Writes the tasks of a recipe's environments as text with random answers in the right form: the policy then begins at
chance. `python experiments/rlvr/corpus.py FILE.jsonl [RECIPE.gin]`"""

import json
import random
import sys
from pathlib import Path

from orogen.config.load import load
from orogen.posttrain.environments.make import make_environment

RECIPE = Path("gin_configs/posttrain/rl_toy.gin")
COPIES = 4  # answers to each task


def main(file: str, recipe: str = str(RECIPE)) -> None:
    rng, lines = random.Random(0), []
    for config in load([Path(recipe)])[0].need("rl").rl.environments:
        environment = make_environment(config)
        examples = [environment.example(number) for number in range(len(environment))]
        answers = sorted({example.secret for example in examples})
        lines += [
            json.dumps({"text": example.messages[0]["content"] + rng.choice(answers)})
            for example in examples for _ in range(COPIES)
        ]  # fmt: skip
    Path(file).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
