"""Writes held-out text of Python's standard library as documents of 1,024 bytes, and again as documents of 128.

PYTHONPATH=src python experiments/long_context/make.py --out runs/long_context
"""

import argparse
import json
from pathlib import Path

from orogen.config.load import load
from orogen.data.corpora import corpus_documents, split_documents

HERE = Path(__file__).parent
LONG, SHORT, MOST = 1024, 128, 64 * 1024  # bytes of a document, and in all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    out = parser.parse_args().out
    config, _ = load([HERE / "transformer.gin"])
    documents = split_documents(corpus_documents(config.data), config=config.data)["heldout"]
    whole = [
        document.text[start : start + LONG]
        for document in documents
        if document.text.isascii()
        for start in range(0, len(document.text) - LONG + 1, LONG)
    ][: MOST // LONG]
    out.mkdir(parents=True, exist_ok=True)
    for name, size in (("long", LONG), ("short", SHORT)):
        pieces = [text[start : start + size] for text in whole for start in range(0, LONG, size)]
        (out / f"{name}.jsonl").write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))


if __name__ == "__main__":
    main()
