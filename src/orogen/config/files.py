"""Files that are written atomically, and folders that one process writes at a time."""

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from orogen.config.checks import ConfigError

_UNFINISHED = re.compile(r".+\.(\d+)\.[0-9a-f]{8}\.tmp")


def unfinished(path: Path) -> Path:
    """A unique name for a file that will be renamed to `path` once it is complete."""
    return path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def is_unfinished(name: str) -> bool:
    """Whether a file's name is one of `unfinished`."""
    return _UNFINISHED.fullmatch(name) is not None


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that a reader, even after a crash, finds either all of the old content or all of the new,
    whichever other processes write it too. A crash may leave a file of another name, which ends in `.tmp`."""
    temporary = unfinished(path)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_unfinished(folder: Path) -> None:
    """Removes the files that killed writers left in a folder and in its immediate subfolders. Links, and files of
    another process that is alive on this host, stay. Neither this process nor one on another host may be writing
    there."""
    for path in (*folder.glob("*.tmp"), *folder.glob("*/*.tmp")):
        writer = _UNFINISHED.fullmatch(path.name)
        linked = path.is_symlink() or (path.parent != folder and path.parent.is_symlink())
        if writer and not linked and not _other_lives(int(writer[1])):
            path.unlink(missing_ok=True)


def _other_lives(process: int) -> bool:
    """Whether this is the id of another process that is alive on this host."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return process != os.getpid()


@contextlib.contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Holds the lock `name` of a folder. It ends with the process that holds it; its file stays.

    Raises ConfigError if another process writes there.
    """
    with (folder / name).open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{str(folder)!r} is being written by another process; expected a free folder") from None
        yield
