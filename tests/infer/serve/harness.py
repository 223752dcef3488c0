"""The application on an event loop of its own, called without a network."""

import asyncio
import atexit
import json
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from tests.infer.chats import backend, tokenizer
from tests.infer.fake_engine import FakeEngine

from orogen.infer.chat import Chat, own_template
from orogen.infer.render import Renderer
from orogen.infer.request import Request
from orogen.infer.serve.app import make_app
from orogen.infer.serve.exchange import Settings
from orogen.infer.service import Service

# Of the routes that ask the engine.
BODIES = {
    "/v1/completions": {"prompt": [5]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {"input": "hi"},
}


class Kept(Renderer):
    """One process for all tests: it takes longer to start than a test."""

    def close(self) -> None:
        return None


RENDERER = Kept()
atexit.register(lambda: Renderer.close(RENDERER))


class Reply(NamedTuple):
    """A response, its body read."""

    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def events(self) -> list[Any]:
        """The objects of a stream, which must end with `[DONE]`."""
        lines = [part.removeprefix("data: ") for part in self.text.split("\n\n")]
        assert lines[-2:] == ["[DONE]", ""], lines[-3:]
        return [json.loads(line) for line in lines[:-2]]

    @property
    def error(self) -> str:
        return self.json["error"]["message"]


class Client:
    """Calls an ASGI application."""

    def __init__(self, app) -> None:
        self.app = app

    async def send(
        self, method: str, path: str, body: bytes = b"", headers: dict | None = None, gone=None, stalled=None
    ) -> Reply:
        """The response. gone: an event that tells when the client vanishes. stalled: awaited with what is sent."""
        parts, begun, sent = [], {}, False
        gone = gone or asyncio.Event()

        async def receive():
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.start":
                begun.update(message)
            else:
                parts.append(message.get("body", b""))
            await (stalled(message) if stalled else asyncio.sleep(0))

        listed = [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()]
        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
                 "raw_path": path.encode(), "query_string": b"", "headers": listed, "scheme": "http", "root_path": "",
                 "server": ("test", 80), "client": ("test", 1)}  # fmt: skip
        await self.app(scope, receive, send)
        told = {k.decode(): v.decode() for k, v in begun.get("headers", [])}
        return Reply(begun.get("status", 0), told, b"".join(parts).decode())

    async def post(self, path: str, body: Any, **settings) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.send("POST", path, data, **settings)

    async def get(self, path: str, **settings) -> Reply:
        return await self.send("GET", path, **settings)

    async def complete(self, **body) -> Reply:
        return await self.post("/v1/completions", {"max_tokens": 3, **body})

    async def chat(self, text: str = "hi", **body) -> Reply:
        return await self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **body})


def decode(request: Request, ids) -> str:
    """Text of ids, with the names of the specials that a request shows."""
    pieces, text = [], []
    for i in ids:
        if i in tokenizer().specials:
            pieces.append(tokenizer().decode(text))
            text = []
            pieces.append(str(tokenizer().specials[i]) if i in request.shown else "")
        else:
            text.append(i)
    return "".join([*pieces, tokenizer().decode(text)])


def saying(*texts: str) -> Callable[[Request], list[int]]:
    """A script: the first request answers the first text, then ends; specials in it are specials."""
    left = list(texts)

    def script(_: Request) -> list[int]:
        text = left.pop(0) if len(left) > 1 else left[0]
        return [*backend_ids(text), tokenizer().eos_id]

    return script


def backend_ids(text: str) -> list[int]:
    """Ids of a text whose specials are specials."""
    return backend().encode(text, add_special_tokens=False).ids


def worded(**settings) -> FakeEngine:
    """An engine whose answers are text."""
    return FakeEngine(
        **{"most": 4000, "end": tokenizer().eos_id, "decode": decode, "slots": 8, "queue": 100, **settings}
    )


def with_client(
    engine: FakeEngine, use: Callable[[Client], Awaitable[Any]], *, words=False, template="nemotron_3_nano",
     limit=100, **settings
) -> Any:  # fmt: skip
    """What `use(client)` returns. words: with a tokenizer and a chat template."""

    async def run() -> Any:
        service = Service(engine, limit=limit)
        chat = Chat(tokenizer(), own_template(template), RENDERER) if words and template else None
        beside = {name: settings.pop(name, None) for name in ("constraints", "sees")}
        given = Settings(**{"name": "tiny", "most": engine.most, **settings})
        app = make_app(service, given, tokenizer=tokenizer() if words else None, chat=chat, **beside)
        async with lifespan(app):
            result = await use(Client(app))
            assert service.open == 0, "a request was left behind"
            return result

    return asyncio.run(run())


class lifespan:
    """Starts and stops an application."""

    def __init__(self, app) -> None:
        self._context = app.router.lifespan_context(app)

    async def __aenter__(self):
        return await self._context.__aenter__()

    async def __aexit__(self, *error):
        return await self._context.__aexit__(*error)
