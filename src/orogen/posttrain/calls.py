"""Calls of an HTTP server that may be busy, slow or away for a while: sent again, so many times and within a deadline.

A call must be one that may be sent twice: a server that answers it again answers the same.
"""

import dataclasses
import email.utils
import http.client
import itertools
import json
import random
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from orogen.config.checks import ConfigError
from orogen.config.streams import say

# A server that answers so may answer otherwise later; 409, while it has requests that nobody waits for any more. Not
# 500: a request that fails in the model, as for logits that are no numbers, fails again.
RETRIED = frozenset({408, 409, 425, 429, 502, 503, 504})
FIRST_WAIT, MOST_WAIT = 0.5, 30.0  # seconds before the second attempt, doubled for each further one up to the most
JITTER = 0.25  # share of a wait by which it may be longer, so that many callers do not come back at once
CONNECT_SECONDS = 30.0
SAID_EVERY = 30.0  # seconds between two lines about calls that are sent again
# (an answer, when it was requested by `time.monotonic`) -> why it is no good, and the call is sent again; None: it is.
Refused = Callable[[dict[str, Any], float], str | None]


class ServerError(OSError):
    """The server cannot be reached, or fails."""


@dataclasses.dataclass(frozen=True)
class Patience:
    """timeout: seconds for one attempt. deadline: for a call with all its attempts and the waits between them. retries:
    how many times a call is sent again."""

    timeout: float
    deadline: float
    retries: int


class _AgainError(Exception):
    """What this call may be sent again for. after: seconds that the server asks to wait."""

    def __init__(self, why: str, after: float = 0.0) -> None:
        super().__init__(why)
        self.after = after


class Calls:
    """Calls of the server at a URL, by any number of threads. name: of the setting that names it, for messages.
    retries: of all calls so far."""

    def __init__(self, name: str, url: str, key: str, patience: Patience) -> None:
        self._name, self._url, self._key, self._patience = name, urllib.parse.urlsplit(url), key, patience
        self._lock = threading.Lock()
        self._streams: set[socket.socket] = set()
        self._given_up = threading.Event()
        self._said = -SAID_EVERY
        self.retries = 0

    def __str__(self) -> str:
        return f"{self._name} {self._url.geturl()}"

    def post(self, path: str, body: dict[str, Any], refused: Refused = lambda found, began: None) -> dict[str, Any]:
        """The object with which the server answers a body. Raises ServerError when the server stays away or fails, and
        ConfigError for what it refuses."""
        began, data = time.monotonic(), json.dumps(body)
        for attempt in itertools.count(1):
            asked = time.monotonic()
            left = began + self._patience.deadline - asked
            try:
                found = self._once(path, data, min(self._patience.timeout, left))
                if (why := refused(found, asked)) is None:
                    return found
                again = _AgainError(why)
            except _AgainError as error:
                again = error
            wait = max(again.after, min(MOST_WAIT, FIRST_WAIT * 2 ** min(attempt - 1, 20)))
            wait *= 1 + JITTER * random.random()
            left = began + self._patience.deadline - time.monotonic()
            if attempt > self._patience.retries or wait >= left or self._given_up.is_set():
                raise ServerError(self._told(path, attempt, time.monotonic() - began, again))
            self._count(path, attempt, wait, again)
            self._given_up.wait(wait)
        raise AssertionError("unreachable")

    def give_up(self) -> None:
        """Ends the calls that are under way, and the waits between their attempts, until `go_on`."""
        self._given_up.set()
        with self._lock:
            for stream in self._streams:
                _shut(stream)

    def go_on(self) -> None:
        """Calls are made again."""
        self._given_up.clear()

    def _told(self, path: str, attempts: int, seconds: float, last: _AgainError) -> str:
        times = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        place = f"{self}{path}"
        if self._given_up.is_set():
            return f"{place}: ended by us after {times}; the last: {last}"
        asks = f", and asks to wait {last.after:g} s" if last.after else ""
        return (
            f"{place}: given up after {times} in {seconds:.3g} s; the last: {last}{asks}; expected an answer within "
            f"{self._patience.deadline:g} s and {self._patience.retries} retries"
        )

    def _count(self, path: str, attempt: int, wait: float, again: _AgainError) -> None:
        with self._lock:
            self.retries += 1
            now = time.monotonic()
            quiet = now - self._said < SAID_EVERY
            self._said = self._said if quiet else now
        if not quiet:
            place = f"{self}{path}"
            say(f"{place}: {again}; attempt {attempt + 1} in {wait:.1f} s")

    def _once(self, path: str, data: str, seconds: float) -> dict[str, Any]:
        """The answer to one attempt. Raises as `post`, and _AgainError."""
        seconds = max(seconds, 1e-3)  # 0 would mean not to wait, and less is refused
        until = time.monotonic() + seconds
        connection = http.client.HTTPConnection(
            self._url.hostname or "", self._url.port, timeout=min(CONNECT_SECONDS, seconds)
        )
        stream = None
        try:
            connection.connect()
            stream = connection.sock  # which the connection forgets if it is closed after the answer
            self._hold(stream)
            stream.settimeout(_left(until))
            headers = {"content-type": "application/json", "authorization": f"Bearer {self._key}"}
            connection.request("POST", self._url.path.rstrip("/") + path, data, headers)
            response = connection.getresponse()
            text = _read(response, stream, until)
        except TimeoutError:
            raise _AgainError(f"no answer within {seconds:.3g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise _AgainError(f"{type(error).__name__}: {error}") from None
        finally:
            with self._lock:
                self._streams.discard(stream)
            connection.close()
        return self._understood(path, response, text)

    def _hold(self, stream: socket.socket) -> None:
        """Lets `give_up` end what waits for this stream."""
        with self._lock:
            self._streams.add(stream)
            if self._given_up.is_set():
                _shut(stream)

    def _understood(self, path: str, response: http.client.HTTPResponse, text: bytes) -> dict[str, Any]:
        try:
            found = json.loads(text)
        except ValueError:  # a proxy's page, say
            found = None
        status = response.status
        if status == http.HTTPStatus.OK:
            if not isinstance(found, dict):
                raise _AgainError(f"an answer of {len(text)} bytes that is no JSON object")
            return found
        reason = _reason(found, text)
        if status in RETRIED:
            raise _AgainError(f"status {status}: {reason}", _wanted(response.headers.get("retry-after")))
        kind = ConfigError if status < http.HTTPStatus.INTERNAL_SERVER_ERROR else ServerError
        raise kind(f"{self} answers {path} with {status}: {reason}")


def _left(until: float) -> float:
    if (left := until - time.monotonic()) <= 0:
        raise TimeoutError
    return left


def _read(response: http.client.HTTPResponse, stream: socket.socket, until: float) -> bytes:
    """The body, however slowly it comes."""
    parts = []
    while part := response.read1(2**16):
        parts.append(part)
        stream.settimeout(_left(until))
    if response.length:
        raise http.client.IncompleteRead(b"".join(parts), response.length)
    return b"".join(parts)


def _reason(found: Any, text: bytes) -> str:
    """What an answer says is wrong, in one line."""
    error = found.get("error") if isinstance(found, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return " ".join(str(message or text[:200].decode(errors="replace")).split())


def _wanted(header: str | None) -> float:
    """Seconds that a `Retry-After` asks for: a number, or a date. 0 for one that is neither, or in the past."""
    text = (header or "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        date = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _shut(stream: socket.socket) -> None:
    try:
        stream.shutdown(socket.SHUT_RDWR)  # who reads in it is woken, as `close` would not do
    except OSError:
        return  # closed already
