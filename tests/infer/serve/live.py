"""The server on a socket: in a thread, or as a program of its own that signals reach.

As a program: python -m tests.infer.serve.live WAIT DRAIN_SECONDS prints its port.
"""

import asyncio
import contextlib
import http.client
import json
import sys
import threading
import time
from collections.abc import Iterator

from tests.infer.chats import tokenizer
from tests.infer.fake_engine import FakeEngine
from tests.infer.serve.harness import RENDERER

from orogen.infer.chat import Chat, own_template
from orogen.infer.serve.app import make_app
from orogen.infer.serve.exchange import Settings
from orogen.infer.serve.run import listen, make_server, run
from orogen.infer.service import Service


@contextlib.contextmanager
def serving(
    engine, *, words: bool = False, limit: int = 1000, weights=None, **settings
) -> Iterator[tuple[int, Service]]:
    """The port of a server that runs while the body does, and its service."""
    service = Service(engine, limit=limit)
    chat = Chat(tokenizer(), own_template("nemotron_3_nano"), RENDERER) if words else None
    given = Settings(name="tiny", most=settings.pop("most", None) or engine.most, **settings)
    watched = (lambda: engine.scheduler) if hasattr(engine, "scheduler") else None
    beside = {"chat": chat, "scheduler": watched, "weights": weights}
    app = make_app(service, given, tokenizer=tokenizer() if words else None, **beside)
    with listen("127.0.0.1", 0) as bound:
        up, port = threading.Event(), bound.getsockname()[1]
        server = make_server(app, service, drain_seconds=0.1, ready=lambda *_: up.set())
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        assert up.wait(20)
        try:
            yield port, service
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def post(port: int, path: str, body: dict, *, headers: dict | None = None) -> http.client.HTTPResponse:
    """The response to a body, its own yet to be read."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", path, json.dumps(body), headers or {})
    return connection.getresponse()


async def stream(port: int, body: dict, *, leave_after: int | None = None) -> list[tuple[float, dict]]:
    """The events of a stream with the times at which they came; the client leaves after so many."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data, found = json.dumps({**body, "stream": True}).encode(), []
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n%s" % (len(data), data))
    try:
        while line := await reader.readline():
            if line.startswith(b"HTTP/1.1") and b" 200 " not in line:
                raise AssertionError(line)
            if line.startswith(b"data: [DONE]") or leave_after is not None and len(found) >= leave_after:
                return found
            if line.startswith(b"data: "):
                found.append((time.monotonic(), json.loads(line[6:])))
        raise AssertionError("the stream ended without [DONE]")
    finally:
        writer.close()


def ids_in(events: list[tuple[float, dict]]) -> list[int]:
    """The tokens of a stream that has one choice and no error."""
    assert all("error" not in event for _, event in events), events
    return [i for _, event in events for choice in event["choices"] for i in choice["token_ids"]]


def main() -> None:
    """Serves until a signal comes."""
    engine = FakeEngine(slots=4, queue=100, most=10_000, wait=float(sys.argv[1]))
    service = Service(engine, limit=100)
    app = make_app(service, Settings(name="tiny", most=engine.most))
    with listen("127.0.0.1", 0) as bound:
        server = make_server(
            app, service, drain_seconds=float(sys.argv[2]), ready=lambda _, port: print(port, flush=True)
        )
        sys.exit(run(server, bound))


if __name__ == "__main__":
    main()
