"""A server in front of another, whose faults are real: it refuses, drops, hangs and loses answers on a socket."""

import contextlib
import http.client
import http.server
import json
import threading
from collections.abc import Iterator, Sequence

# By kind: what is sent at first, and then again and again.
DRIPS = {
    "header": (b"x: ", b"a"),
    "chunk": (b"transfer-encoding: chunked\r\n\r\n2;a=", b"a"),
    "interim": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


class Fault:
    """What comes of a request in place of an answer, by `kind`. status: an answer of its own, with these headers and
    this text; drop: the connection is closed at once; lost: once the request has been answered; half: within the
    answer; hang: nothing is sent until the server ends; slow: a byte of the body now and then; header, chunk, interim:
    for some seconds a byte of a header, one of a chunk's extension, or an interim response, now and then."""

    def __init__(
        self, kind: str = "status", *, status: int = 0, headers: dict[str, str] | None = None, text=""
    ) -> None:
        self.kind, self.status, self.headers, self.text = kind, status, headers or {}, text


class Front:
    """faults: by the number of the request, from 0; all others are passed on to the port `behind`. asked: paths and
    bodies of all requests so far."""

    def __init__(self, behind: int | None, faults: dict[int, Fault]) -> None:
        self.behind, self.faults = behind, faults
        self.asked: list[tuple[str, dict]] = []
        self.lock, self.over, self.port = threading.Lock(), threading.Event(), 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def take(self, path: str, body: bytes) -> Fault | None:
        with self.lock:
            self.asked.append((path, json.loads(body)))
            return self.faults.get(len(self.asked) - 1)

    def passed_on(self, path: str, body: bytes, headers) -> tuple[int, bytes]:
        assert self.behind is not None
        connection = http.client.HTTPConnection("127.0.0.1", self.behind, timeout=60)
        connection.request("POST", path, body, {"authorization": headers["authorization"] or ""})
        response = connection.getresponse()
        found = response.status, response.read()
        connection.close()
        return found


def _handler(front: Front) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            fault = front.take(self.path, body)
            if fault is None or fault.kind in ("lost", "half"):
                status, data = front.passed_on(self.path, body, self.headers)
                if fault is None:
                    self.send(status, {}, data)
                elif fault.kind == "half":
                    self.send(status, {"content-length": str(len(data))}, data[: len(data) // 2])
                return
            if fault.kind == "hang":
                front.over.wait(60)
            elif fault.kind == "slow":
                self.send(200, {"content-length": "1000"}, b"")
                while not front.over.wait(0.05):
                    self.wfile.write(b" ")
            elif fault.kind in DRIPS:
                start, drip = DRIPS[fault.kind]
                self.wfile.write(b"HTTP/1.1 200 OK\r\n" * (fault.kind != "interim") + start)
                for _ in range(80):
                    self.wfile.write(drip)
                    front.over.wait(0.05)
            elif fault.kind == "status":
                self.send(fault.status, fault.headers, fault.text.encode())

        def send(self, status: int, headers: dict[str, str], data: bytes) -> None:
            self.send_response(status)
            for name, value in ({"content-length": str(len(data))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
            self.wfile.flush()

        def log_message(self, *_: object) -> None:
            return None

    return Handler


@contextlib.contextmanager
def front(behind: int | None = None, faults: dict[int, Fault] | Sequence[Fault] = ()) -> Iterator[Front]:
    """The server, on a port of its own while the body runs. faults: a sequence is that of the first requests."""
    by_number = faults if isinstance(faults, dict) else dict(enumerate(faults))
    one = Front(behind, by_number)

    class Quiet(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            return None  # clients that leave are what is tested

    server = Quiet(("127.0.0.1", 0), _handler(one))
    one.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield one
    finally:
        one.over.set()
        server.shutdown()
        server.server_close()
        thread.join(20)
