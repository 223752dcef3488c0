"""Calls of an HTTP server that may be busy, slow or away for a while: sent again, so many times and within a deadline.

A call must be one that may be sent twice: a server that answers it again answers the same.
"""

import dataclasses
import email.utils
import http.client
import itertools
import json
import random
import threading
import time
import urllib.parse
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple

from orogen.config.checks import ConfigError
from orogen.config.streams import say
from orogen.posttrain.exchange import ConnectTimeoutError, Exchange, Response

# A server that answers so may answer otherwise later; 409, while it has requests that nobody waits for any more. Not
# 500: a request that fails in the model, as for logits that are no numbers, fails again.
RETRIED = frozenset({408, 409, 425, 429, 502, 503, 504})
# Of these, what a server answers that is busy or starts, which takes as long as it takes: no retry is counted.
NOT_READY = frozenset({429, 503})
FIRST_WAIT, MOST_WAIT = 0.5, 30.0  # seconds before the second attempt, doubled for each further one up to the most
JITTER = 0.25  # share of a wait by which it may be longer, so that many callers do not come back at once
SLICE = 0.1  # seconds of waiting between two calls of `progress`
REPORT_EVERY = 30.0  # seconds between two lines about calls that are sent again


class Attempt(NamedTuple):
    """began: when it was sent. until: when its call ends, with all further attempts. Both by `time.monotonic`."""

    began: float
    until: float


# Why an answer cannot be used, so that the call is sent again; None: it can.
AnswerCheck = Callable[[dict[str, Any], Attempt], str | None]
Progress = Callable[[], None]


class ServerError(OSError):
    """The server cannot be reached, or fails."""


@dataclasses.dataclass(frozen=True)
class Patience:
    """timeout: seconds for one attempt. deadline: for a call with all its attempts and the waits between them. retries:
    how many failures a call survives; refused connections and servers that are not ready are none."""

    timeout: float
    deadline: float
    retries: int


class _AttemptError(Exception):
    """An attempt failed, and another may not. retry_after: seconds that the server asks to wait. counts: whether it is
    one of the failures that `Patience.retries` bounds."""

    def __init__(self, reason: str, *, retry_after: float = 0.0, counts: bool = True) -> None:
        super().__init__(reason)
        self.retry_after, self.counts = retry_after, counts


class Calls:
    """Calls of the server at a URL, by any number of threads. name: of the setting that names it, for messages.
    retries: of all calls so far."""

    def __init__(self, name: str, url: str, key: str, patience: Patience) -> None:
        self._name, self._url, self._patience = name, urllib.parse.urlsplit(url), patience
        self._headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
        self._lock = threading.Lock()
        self._given_up = threading.Event()
        self._reported_at = -REPORT_EVERY
        self.retries = 0

    def __str__(self) -> str:
        return f"{self._name} {self._url.geturl()}"

    def post(
        self,
        path: str,
        body: dict[str, Any],
        *,
        check: AnswerCheck = lambda answer, attempt: None,
        progress: Progress = lambda: None,
        seconds: float | None = None,
    ) -> dict[str, Any]:
        """The object with which the server answers a body. progress: called again and again while this waits; what it
        raises ends the call. seconds: for the whole call, None for the deadline's.

        Raises ServerError when the server stays away or fails, and ConfigError for what it refuses.
        """
        began, data = time.monotonic(), json.dumps(body)
        allowed = self._patience.deadline if seconds is None else seconds
        until, failures = began + allowed, 0
        for number in itertools.count(1):
            attempt = Attempt(time.monotonic(), until)
            try:
                answer = self._answer(path, data, attempt, progress)
                if (reason := check(answer, attempt)) is None:
                    return answer
                last = _AttemptError(reason)
            except _AttemptError as error:
                last = error
            failures += last.counts
            wait = max(last.retry_after, min(MOST_WAIT, FIRST_WAIT * 2 ** min(number - 1, 20)))
            wait *= 1 + JITTER * random.random()
            spent = failures > self._patience.retries
            over = spent or wait >= until - time.monotonic()
            if not over and not self._given_up.is_set():
                self._count_retry(f"{self}{path}: {last}; attempt {number + 1} in {wait:.1f} s")
                self._sleep(wait, progress)
            if over or self._given_up.is_set():
                expected = f"expected an answer within {allowed:.4g} s"
                if spent:
                    expected += f" and {self._patience.retries} {'retry' if self._patience.retries == 1 else 'retries'}"
                raise ServerError(self._failure(path, number, time.monotonic() - began, last, expected))
        raise AssertionError("unreachable")

    def give_up(self) -> None:
        """Ends calls that are under way and the waits between their attempts. Later calls end too, until `go_on`."""
        self._given_up.set()

    def go_on(self) -> None:
        """Allows calls again after `give_up`."""
        self._given_up.clear()

    def _failure(self, path: str, attempts: int, seconds: float, last: _AttemptError, expected: str) -> str:
        """What is said of a call that was in vain."""
        place, times = f"{self}{path}", "1 attempt" if attempts == 1 else f"{attempts} attempts"
        if self._given_up.is_set():
            return f"{place}: ended by us after {times}; the last: {last}"
        asks = f", and asks to wait {last.retry_after:g} s" if last.retry_after else ""
        return f"{place}: given up after {times} in {seconds:.3g} s; the last: {last}{asks}; {expected}"

    def _count_retry(self, line: str) -> None:
        with self._lock:
            self.retries += 1
            now = time.monotonic()
            due = now - self._reported_at >= REPORT_EVERY
            if due:
                self._reported_at = now
        if due:
            say(line)

    def _sleep(self, seconds: float, progress: Progress) -> None:
        """Waits so long, or until calls are given up."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._given_up.wait(min(SLICE, left)):
            progress()

    def _answer(self, path: str, data: str, attempt: Attempt, progress: Progress) -> dict[str, Any]:
        """The answer to one attempt. Raises as `post`, and _AttemptError."""
        seconds = max(min(self._patience.timeout, attempt.until - attempt.began), 1e-3)  # a socket's may not be 0
        end = attempt.began + seconds
        exchange = Exchange(self._url, path, data, headers=self._headers, seconds=seconds)
        try:
            while not exchange.ends_within(min(SLICE, end - time.monotonic())):
                if self._given_up.is_set() or time.monotonic() >= end:
                    missing = "answer" if exchange.connected else "connection"
                    raise _AttemptError(f"no {missing} within {min(seconds, time.monotonic() - attempt.began):.3g} s")
                progress()
            return self._understood(path, _response(exchange, seconds))
        finally:
            exchange.abandon()

    def _understood(self, path: str, response: Response) -> dict[str, Any]:
        try:
            found = json.loads(response.body)
        except ValueError:  # a proxy's page, say
            found = None
        status = response.status
        if status == http.HTTPStatus.OK:
            if not isinstance(found, dict):
                raise _AttemptError(f"an answer of {len(response.body)} bytes that is no JSON object")
            return found
        reason = _reason(found, response.body)
        if status in RETRIED:
            asked, counts = _retry_after(response.retry_after), status not in NOT_READY
            raise _AttemptError(f"status {status}: {reason}", retry_after=asked, counts=counts)
        kind = ConfigError if status < http.HTTPStatus.INTERNAL_SERVER_ERROR else ServerError
        raise kind(f"{self} answers {path} with {status}: {reason}")


def _response(exchange: Exchange, seconds: float) -> Response:
    """What has come of an exchange. Raises _AttemptError."""
    try:
        return exchange.response()
    except ConnectionRefusedError as error:
        raise _AttemptError(f"{type(error).__name__}: {error}", counts=False) from None
    except ConnectTimeoutError as error:
        raise _AttemptError(str(error)) from None
    except TimeoutError:
        raise _AttemptError(f"no answer within {seconds:.3g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise _AttemptError(f"{type(error).__name__}: {error}") from None


def _reason(found: Any, text: bytes) -> str:
    """What an answer says is wrong, in one line."""
    error = found.get("error") if isinstance(found, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return " ".join(str(message or text[:200].decode(errors="replace")).split())


def _retry_after(header: str | None) -> float:
    """Seconds that a `Retry-After` asks for: a number, or a date. 0 for one that is neither, or in the past."""
    text = (header or "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        date = email.utils.parsedate_to_datetime(text)
        return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):  # a year of 20 digits overflows
        return 0.0
