"""Files that a run appends to. A full or read-only disk does not end the run: what it refuses is written later."""

import errno
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from orogen.config.streams import say

# Errors of a disk that is full, over its quota, read-only or failing: somebody may mend it while the run goes on.
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


class Appended:
    """Appends bytes to a file. Those that the disk refuses stay in memory and are written before the next ones.

    log: gets one line when the disk first refuses some, and one when all are written. Other errors are raised.
    """

    def __init__(self, path: Path, *, log: Callable[[str], None] = say):
        self.path, self._log = path, log
        self._file = path.open("ab", buffering=0)
        self._left = b""
        self._refused: OSError | None = None

    def write(self, content: bytes) -> None:
        """Adds `content` to the file, or to what is left."""
        self._left += content
        before, self._refused = self._refused, self._drain()
        if self._refused is not None and before is None:
            self._log(
                f"{self.path} cannot be written ({self._refused.strerror}): what belongs there is kept until it can"
            )
        elif before is not None and self._refused is None:
            self._log(f"{self.path} is written again")

    def settle(self) -> None:
        """Writes what is left. Raises OSError if the disk still refuses some of it."""
        if (refused := self._drain()) is not None:
            raise OSError(refused.errno, refused.strerror, str(self.path))

    def close(self) -> None:
        """Closes the file. Raises OSError if the disk still refuses some bytes."""
        try:
            self.settle()
        finally:
            self._file.close()

    def _drain(self) -> OSError | None:
        try:
            while self._left:
                self._left = self._left[self._file.write(self._left) :]
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            return error
        return None


class Events:
    """TensorBoard events of numbers by step, in `folder`.

    Written by the caller's thread: that of tensorboardX's SummaryWriter ends at the first error of the disk, and its
    full queue then blocks the run forever (observed with tensorboardX 2.6). purge_step: from this step on, TensorBoard
    does not show what earlier files have.
    """

    def __init__(self, folder: Path, *, purge_step: int | None):
        from tensorboardX.proto.event_pb2 import SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        folder.mkdir(parents=True, exist_ok=True)
        # Unlike tensorboardX's own names, those of two starts within a second differ.
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{time.time_ns()}"
        self._file = Appended(folder / name, log=lambda line: None)  # the metrics on the same disk say it
        self._file.write(_record(file_version="brain.Event:2"))
        if purge_step is not None:
            self._file.write(_record(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the values of a step, by tag."""
        from tensorboardX.summary import scalar

        self._file.write(b"".join(_record(step=step, summary=scalar(tag, value)) for tag, value in values.items()))

    def close(self) -> None:
        """Closes the file. Raises OSError as `Appended.close` does."""
        self._file.close()


def _record(**event: object) -> bytes:
    """An event as a TFRecord: its length and its bytes, each with a checksum."""
    # Here, because protobuf is slow to import, and readers of metrics do not need it. Its classes are made at run time.
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboardX.record_writer import masked_crc32c

    data = Event(wall_time=time.time(), **event).SerializeToString()
    header = struct.pack("<Q", len(data))
    checked = lambda content: content + struct.pack("<I", masked_crc32c(content))  # noqa: E731
    return checked(header) + checked(data)
