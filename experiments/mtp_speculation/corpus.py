"""Python code to train on: the files of the running interpreter's installed packages, one JSON line per file.

Files come in the order of the hash of their text, so that any first part of them has text of all packages, and a text
that several packages have comes once. Nothing is downloaded; another machine has other packages and other text.

    python experiments/mtp_speculation/corpus.py --out corpus.jsonl --megabytes 110
"""

import argparse
import hashlib
import json
import sys
import sysconfig
from pathlib import Path

SMALLEST = 1000  # bytes of a file: shorter ones are lists of imports


def files(root: Path) -> dict[str, tuple[str, str]]:
    """Name and text of each file, by the hash of its text."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if len(text) >= SMALLEST:
            found.setdefault(hashlib.sha256(text.encode()).hexdigest(), (path.relative_to(root).as_posix(), text))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=110, help="of text, at most")
    options = parser.parse_args()
    left, kept = options.megabytes * 1e6, 0
    with options.out.open("w") as out:
        for _, (name, text) in sorted(files(Path(sysconfig.get_path("purelib"))).items()):
            size = len(text.encode())
            if size <= left:
                left, kept = left - size, kept + 1
                out.write(json.dumps({"name": name, "text": text}) + "\n")
    print(f"{kept} files, {options.megabytes - left / 1e6:.1f} MB of text", file=sys.stderr)


if __name__ == "__main__":
    main()
