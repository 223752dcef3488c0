"""How many drafts the trained models of the study accept: acceptance.jsonl, one line per run.

Prompts are the beginnings of held-out documents; answers are greedy.

    PYTHONPATH=src python experiments/mtp/acceptance.py --sweep runs/mtp_study
"""

import argparse
import json
from pathlib import Path
from typing import Any

from orogen.checkpoint.open import open_model
from orogen.config.engine import EngineConfig
from orogen.config.load import load_saved
from orogen.data.loader import open_corpus
from orogen.infer.engine import Engine
from orogen.infer.request import Request, Sampling
from orogen.parallel.runtime import configure

HERE = Path(__file__).parent
PROMPTS, PROMPT, ANSWER = 16, 64, 64  # tokens of each prompt and answer, a model's training length together
DRAFTS = {"one": 1, "two": 2}  # by arm: as many as it has depths


def accepted(run: Path, drafts: int) -> dict[str, Any]:
    """Of the steps that decoded, the share in which the first draft was accepted, the second one too, and so on."""
    opened = open_model(run)
    streams = open_corpus(load_saved(run / "config.gin").data, tokenizer=opened.tokenizer).splits["heldout"]
    prompts = [tuple(s.tokens_t[:PROMPT].tolist()) for s in streams if len(s.tokens_t) > PROMPT][:PROMPTS]
    config = EngineConfig(
        slots=8, max_length=PROMPT + ANSWER, page=64, steps=8, snapshots=0, prefix_cache=False,
        drafter="mtp", drafts=drafts,
    )  # fmt: skip
    engine = Engine(opened, config)
    for prompt in prompts:
        sampling = Sampling(temperature=0)
        engine.submit(Request(prompt=prompt, max_tokens=ANSWER, sampling=sampling, ignore_eos=True))
    while engine.busy:
        engine.step()
    steps, counts = engine.stats.steps, list(engine.stats.accepted)
    return {"prompts": len(prompts), "steps": steps, "accepted": counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", type=Path, required=True, metavar="DIR", help="the folder of orogen sweep")
    runs = parser.parse_args().sweep / "runs"
    configure(0)
    with (HERE / "acceptance.jsonl").open("w") as out:
        for arm, drafts in DRAFTS.items():
            for run in sorted(runs.glob(f"{arm}-seed*")):
                line = {"run": run.name, "drafts": drafts, **accepted(run, drafts)}
                print(json.dumps(line), flush=True)
                out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
