"""Writes two corpora of the running Python: code, every fifth module of its standard library, and prose, its language
reference (`pydoc_data.topics`), without the paragraphs that are examples.

PYTHONPATH=src python experiments/blends/make.py --out runs/blends
"""

import argparse
import json
from pathlib import Path
from pydoc_data.topics import topics

from orogen.data.corpora import stdlib_documents

EVERY = 5


def prose(text: str) -> str:
    """The paragraphs that are not indented: what is indented is code, grammar or a table."""
    return "\n\n".join(part for part in text.split("\n\n") if part and not part.startswith(" ")) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    modules = [document.text for document in stdlib_documents()][::EVERY]
    # Some topics are whole parts of others.
    unique = sorted(prose(text) for text in topics.values())
    pages = [text for text in unique if not any(text != other and text in other for other in unique)]
    for name, texts in (("code", modules), ("prose", pages)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        print(f"{name}: {len(texts)} documents, {sum(len(text.encode()) for text in texts):,} bytes")


if __name__ == "__main__":
    main()
