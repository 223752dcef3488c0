"""Writes a corpus of Python code and documentation: the files of installed packages and of the standard library.

Nothing is downloaded. The text depends on the versions of the packages. `packages.jsonl`, beside the folder, names
them, with the number of files, the bytes and the SHA-256 of each package's part: equal ones have equal text.

python experiments/packages.py --out runs/packages
"""

import argparse
import hashlib
import importlib.metadata
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    "botorch", "cupy-cuda13x", "diffrax", "flax", "gpytorch", "jax", "jaxlib", "matplotlib", "networkx", "numba",
    "numpy", "numpyro", "optax", "pandas", "pip", "scikit-image", "scikit-learn", "scipy", "seaborn", "setuptools",
    "statsmodels", "sympy", "timm", "torch", "torch-geometric", "transformers", "triton",
)  # fmt: skip
STDLIB = "python"
SUFFIXES = (".py", ".rst", ".md")
LEFT_OUT = frozenset(("test", "tests", "_vendor", "__pycache__", "site-packages", "dist-packages", "encodings", "bin"))
SMALLEST, LARGEST = 200, 200_000  # bytes of a file: larger ones are mostly tables


def files_of(package: str) -> Iterator[tuple[str, Path]]:
    """Names and paths of a package's files, in the order of their names. Raises PackageNotFoundError."""
    if package == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        names = [(file.relative_to(root).as_posix(), file) for file in root.rglob("*.py")]
    else:
        listed = importlib.metadata.files(package)
        if listed is None:
            raise importlib.metadata.PackageNotFoundError(package)
        names = [(file.as_posix(), Path(str(file.locate()))) for file in listed]
    yield from sorted(names)


def texts(package: str, seen: set[bytes]) -> Iterator[tuple[str, str]]:
    """Names and texts of the files that are taken: of equal ones the first alone. seen: the hashes of those before."""
    for name, file in files_of(package):
        parts = Path(name).parts
        if file.suffix not in SUFFIXES or not LEFT_OUT.isdisjoint(parts) or ".." in parts or not file.is_file():
            continue
        content = file.read_bytes()
        digest = hashlib.sha256(content).digest()
        if SMALLEST <= len(content) <= LARGEST and digest not in seen:
            seen.add(digest)
            try:
                yield name, content.decode()
            except UnicodeDecodeError:
                continue


def write(package: str, out: Path, seen: set[bytes]) -> dict[str, str | int]:
    """Writes the package's documents to `out`; what packages.jsonl says of it."""
    number, size, digest = 0, 0, hashlib.sha256()
    version = sys.version.split()[0] if package == STDLIB else importlib.metadata.version(package)
    with (out / f"{package}.jsonl").open("w", encoding="utf-8") as file:
        for name, text in texts(package, seen):
            number, size = number + 1, size + len(text.encode())
            digest.update(f"{name}\0{text}\0".encode())
            file.write(json.dumps({"file": name, "text": text}) + "\n")
    return {"package": package, "version": version, "files": number, "bytes": size, "sha256": digest.hexdigest()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder of the corpus")
    parser.add_argument("--facts", type=Path, metavar="FILE", help="packages.jsonl; beside the folder by default")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    facts = []
    for package in (STDLIB, *PACKAGES):
        try:
            facts.append(write(package, options.out, seen))
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} is not installed: its part is missing", file=sys.stderr)
            (options.out / f"{package}.jsonl").unlink(missing_ok=True)
    target = options.facts or options.out.with_suffix(".jsonl")
    target.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    print(f"{sum(f['files'] for f in facts):,} files, {sum(f['bytes'] for f in facts):,} bytes, facts in {target}")


if __name__ == "__main__":
    main()
