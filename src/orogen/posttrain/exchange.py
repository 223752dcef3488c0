"""One HTTP request in a thread of its own, so that its caller can leave it at any time.

A timeout of a socket bounds one read; a server that sends a byte now and then, or one interim response after another,
passes it forever, and the look-up of a host's name has none. The caller waits for the thread instead, in slices between
which it does what it likes, and abandons the exchange when its own time is over.
"""

import http.client
import socket
import threading
import urllib.parse
from collections.abc import Mapping
from concurrent.futures import Future, wait
from typing import NamedTuple

CONNECT_SECONDS = 30.0


class Response(NamedTuple):
    """What a server answers. retry_after: the header, None if there is none."""

    status: int
    retry_after: str | None
    body: bytes


class ConnectTimeoutError(OSError):
    """The server's host does not answer."""


class Exchange:
    """Begins to POST a body to a path below a URL. seconds: after which a single read or write ends in any case."""

    def __init__(
        self, url: urllib.parse.SplitResult, path: str, body: str, *, headers: Mapping[str, str], seconds: float
    ) -> None:
        self._seconds, self._connect_seconds = seconds, min(CONNECT_SECONDS, seconds)
        self._connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=self._connect_seconds)
        self._request = url.path.rstrip("/") + path, body, dict(headers)
        self._lock = threading.Lock()
        self._stream: socket.socket | None = None
        self._abandoned = False
        self._response: Future[Response] = Future()
        # A daemon: an abandoned one ends with its socket, but not before the look-up of a name does.
        threading.Thread(target=self._run, name="exchange", daemon=True).start()

    @property
    def connected(self) -> bool:
        """Whether the server has accepted the connection."""
        return self._stream is not None

    def ends_within(self, seconds: float) -> bool:
        """Waits up to `seconds` for the response, or for the failure."""
        return bool(wait((self._response,), max(0.0, seconds)).done)

    def response(self) -> Response:
        """The response, once there is one. Raises OSError and HTTPException, ConnectTimeoutError among them."""
        return self._response.result()

    def abandon(self) -> None:
        """Closes the connection if there still is one, and waits for nothing."""
        with self._lock:
            self._abandoned = True
            if self._stream is not None:
                _shut(self._stream)

    def _run(self) -> None:
        try:
            self._response.set_result(self._exchanged())
        except BaseException as error:  # raised where the response is asked for
            self._response.set_exception(error)
        finally:
            self._connection.close()

    def _exchanged(self) -> Response:
        try:
            self._connection.connect()
        except TimeoutError:
            raise ConnectTimeoutError(f"no connection within {self._connect_seconds:.3g} s") from None
        stream: socket.socket = self._connection.sock  # which the connection may forget once it has the response
        with self._lock:
            self._stream = stream
            if self._abandoned:
                _shut(stream)
        stream.settimeout(self._seconds)
        self._connection.request("POST", *self._request)
        response = self._connection.getresponse()
        return Response(response.status, response.headers.get("retry-after"), response.read())


def _shut(stream: socket.socket) -> None:
    try:
        stream.shutdown(socket.SHUT_RDWR)  # whoever reads from it is woken, as `close` would not do
    except OSError:
        return  # closed already
