"""The loss of each upcycled model before its first step, on the whole held-out text: start.jsonl.

python experiments/upcycling/start.py runs/upcycling/*/
"""

import argparse
import json
from pathlib import Path

import numpy as np

from orogen.checkpoint.open import open_model
from orogen.config.load import load
from orogen.data.loader import open_corpus
from orogen.data.vocabulary import byte_tokenizer
from orogen.infer.score import score
from orogen.parallel.runtime import configure

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="runs and Orogen checkpoint folders")
    folders = [folder for folder in parser.parse_args().folders if (folder / "config.gin").is_file()]
    configure(0)
    config, _ = load([HERE / "dense.gin"])
    corpus = open_corpus(config.data, tokenizer=byte_tokenizer())
    shape = {"batch_size": config.train.batch_size, "sequence_length": config.train.sequence_length}
    batches = list(corpus.heldout_batches("heldout", **shape))
    tokens_bt, segments_bt = (
        np.concatenate([getattr(batch, name) for batch in batches]) for name in ("tokens_bt", "segments_bt")
    )
    follows_bt = (segments_bt[:, 1:] == segments_bt[:, :-1]) & (segments_bt[:, 1:] != 0)
    lines = []
    for folder in folders:
        logprobs_bt = score(open_model(folder), tokens_bt, segments_bt)["logprobs"]
        loss = -float(logprobs_bt.sum(dtype=np.float64) / follows_bt.sum())
        lines.append({"model": folder.name, "heldout_loss": round(loss, 6)})
        print(json.dumps(lines[-1]), flush=True)
    (HERE / "start.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
