"""Checksums of all files in a folder, stored beside them in the format of `sha256sum`.

The first line holds the checksum of the lines below it, so that a flipped bit in the list itself is found too.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically

NAME = "checksums.sha256"
HEAD = "# sha256 of the lines below: "
# hashlib releases the GIL: files are hashed in parallel until the disk is the limit.
THREADS = 8


def write(folder: Path) -> None:
    """Writes the checksums of all files now in `folder`, atomically; replaces an older list."""
    files = (path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    lines = "".join(f"{digest}  {name}\n" for name, digest in _digests(folder, names).items())
    write_atomically(folder / NAME, f"{HEAD}{hashlib.sha256(lines.encode()).hexdigest()}\n{lines}".encode())


def check(folder: Path, *, optional: str | None = None) -> None:
    """Raises ConfigError naming the first file that is missing, unreadable or damaged.

    optional: a file that may be missing. Files that the list does not name are not read.
    """
    wanted = _read(folder / NAME)
    present = [name for name in wanted if name != optional or (folder / name).exists()]
    for name, digest in _digests(folder, present).items():
        if digest != wanted[name]:
            expected = f"expected {wanted[name][:16]}…"
            raise ConfigError(f"{folder / name} is damaged: its sha256 is {digest[:16]}…; {expected}")


def _read(file: Path) -> dict[str, str]:
    """Digests by file name."""
    try:
        head, _, lines = file.read_bytes().decode().partition("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read ({type(error).__name__}); expected a list of checksums") from None
    if head != f"{HEAD}{hashlib.sha256(lines.encode()).hexdigest()}":
        raise ConfigError(f"{file} is damaged: its first line does not match the lines below; expected their checksum")
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines.splitlines())}


def _digests(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: digest(folder / name), names), strict=True))


def digest(file: Path) -> str:
    """The sha256 of a file. Raises ConfigError if it cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing; expected it in a complete checkpoint") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); expected it in a complete checkpoint") from None
