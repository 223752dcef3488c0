"""Chat templates, rendered within bounds of time and memory. See `template_worker.py`."""

import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from orogen.config.checks import ConfigError
from orogen.config.json_file import parse_json
from orogen.infer.template_worker import LENGTH, MOST_TEXT, written

WORKER = Path(__file__).with_name("template_worker.py")
SECONDS = 10.0  # for one prompt; that of a long chat takes milliseconds
START_SECONDS = 60.0  # for Python and the import of jinja2, which take long on a crowded host
# A character takes 6 bytes at most, escaped as JSON has it, or 12 as a pair of surrogates.
MOST_ANSWER = 12 * MOST_TEXT + 2**16


class Renderer:
    """A process that renders templates, one at a time; started when first needed, and again after it was ended.

    May be used from several threads.
    """

    def __init__(self, *, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, template: str, variables: dict[str, Any]) -> str:
        """The text of a template. Raises ConfigError with what the template raised, or if it takes too long or too
        much memory."""
        with self._lock:
            try:
                answer = self._ask(written({"template": template, "variables": variables}))
            except TimeoutError:
                self._end()
                raise ConfigError(f"the chat template took more than {self._seconds:g} s; expected less") from None
            except (OSError, EOFError):
                self._end()
                raise ConfigError("the chat template ended its process, as for want of memory") from None
        if "error" in answer:
            raise ConfigError(f"the chat template refuses: {' '.join(answer['error'].split())[:1000]}")
        return answer["text"]

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._end()

    def _ask(self, data: bytes) -> dict[str, str]:
        if self._process is None or self._process.poll() is not None:
            # Its start is no part of a template's time.
            try:
                self._exchange(self._started(), written({"template": "", "variables": {}}), START_SECONDS)
            except TimeoutError:
                self._end()
                raise ConfigError(
                    f"the process that renders templates did not start within {START_SECONDS:g} s; expected a faster "
                    "or less busy host"
                ) from None
        return self._exchange(self._started(), data, self._seconds)

    def _exchange(self, process: "subprocess.Popen[bytes]", data: bytes, seconds: float) -> dict[str, str]:
        assert process.stdin is not None and process.stdout is not None
        deadline = time.monotonic() + seconds
        # The process reads a whole request before it renders, so that this waits for no template.
        process.stdin.write(data)
        process.stdin.flush()
        (length,) = LENGTH.unpack(self._read(process.stdout.fileno(), LENGTH.size, deadline))
        if length > MOST_ANSWER:
            raise EOFError
        return parse_json(self._read(process.stdout.fileno(), length, deadline), where="the template's process")

    def _read(self, descriptor: int, count: int, deadline: float) -> bytes:
        waiting = select.poll()  # unlike `select`, takes descriptors above 1024
        waiting.register(descriptor, select.POLLIN)
        parts: list[bytes] = []
        while count:
            if not waiting.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            part = os.read(descriptor, min(count, 2**16))
            if not part:
                raise EOFError
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            # -P: jinja2 must not find the modules beside the worker's file.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None
