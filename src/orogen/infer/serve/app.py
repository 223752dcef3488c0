"""The routes."""

import contextlib
import hmac
from collections.abc import AsyncIterator, Callable
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orogen.config.checks import ConfigError
from orogen.data.tokenizer import Tokenizer
from orogen.infer.chat import Chat
from orogen.infer.constrain import Constraints
from orogen.infer.messages import check_messages
from orogen.infer.schedule import Scheduler
from orogen.infer.serve import forms
from orogen.infer.serve.body import discard, read_body
from orogen.infer.serve.chats import chats
from orogen.infer.serve.completions import completions
from orogen.infer.serve.errors import HttpError, answer_error, answer_fault, answer_http, bad, response_to
from orogen.infer.serve.exchange import Parts, Settings, token_text
from orogen.infer.serve.grammars import Grammars
from orogen.infer.serve.measures import Measures
from orogen.infer.serve.responses import responses
from orogen.infer.serve.weights import Weights, load_weights
from orogen.infer.service import Service
from orogen.infer.sight import Sees

OPEN = ("/", "/health", "/metrics")  # without the key
# Those that are counted by name; what others there are is the client's choice.
KNOWN = (
    "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/models", "/v1/weights", "/tokenize",
    "/detokenize", "/tokenizer_info", *OPEN,
)  # fmt: skip
# The page needs nothing from elsewhere, and nothing may be put into it from elsewhere.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def make_app(
    service: Service, settings: Settings, *, tokenizer: Tokenizer | None = None, chat: Chat | None = None,
    constraints: Constraints | None = None, scheduler: Callable[[], Scheduler] | None = None,
    weights: Weights | None = None, sees: Sees | None = None,
) -> Starlette:  # fmt: skip
    """The application around a service, which is started and closed with it.

    constraints: those that compile grammars, of the engine's tokenizer; None: the engine does, while its other requests
    wait. scheduler: gives the engine's, of which /metrics tells what is held; None: it does not. weights: what loads
    others; None: nothing does. sees: what answers chats with images (`infer/sight.py`), if anything does.
    """
    measures = Measures()
    if scheduler is not None:
        measures.watch(scheduler)
    grammars = None if constraints is None else Grammars(constraints)

    @contextlib.asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.close()
            app.state.parts.preparing.close()
            if chat is not None:
                chat.close()
            if grammars is not None:
                grammars.close()

    app = Starlette(
        routes=_routes(),
        lifespan=life,
        exception_handlers={HttpError: answer_error, HTTPException: answer_http, Exception: answer_fault},
    )
    app.state.parts = Parts(service, settings, tokenizer, chat, measures, grammars, weights, sees)
    app.add_middleware(_Gate, parts=app.state.parts)
    return app


def _routes() -> list[Route]:
    return [
        Route("/", _page),
        Route("/health", _health),
        Route("/metrics", _metrics),
        Route("/v1/models", _models),
        Route("/v1/models/{name:path}", _model),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chats, methods=["POST"]),
        Route("/v1/responses", responses, methods=["POST"]),
        Route("/v1/weights", load_weights, methods=["POST"]),
        Route("/tokenize", _tokenize, methods=["POST"]),
        Route("/detokenize", _detokenize, methods=["POST"]),
        Route("/tokenizer_info", _tokenizer_info),
    ]


class _Gate:
    """Counts responses, and lets in only who has the key."""

    def __init__(self, app: ASGIApp, parts: Parts) -> None:
        self._app, self._parts = app, parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"] if scope["path"] in KNOWN else "other"

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._parts.measures.responses.labels(path, str(message["status"])).inc()
            await send(message)

        request = HttpRequest(scope, receive)
        if path not in OPEN and not self._has_key(request):
            wrong = HttpError(401, "the API key is missing or wrong; expected `Authorization: Bearer KEY`",
                              code="invalid_api_key", headers={"www-authenticate": "Bearer"})  # fmt: skip
            return await response_to(wrong)(scope, receive, counting)
        length = request.headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > self._parts.settings.most_body:
            most = self._parts.settings.most_body
            large = HttpError(
                413, f"the body has {length[:20]} bytes; expected at most {most}", headers={"connection": "close"}
            )
            if "expect" not in request.headers:  # whoever sends that waits for the answer first
                await discard(request)
            return await response_to(large)(scope, receive, counting)
        await self._app(scope, receive, counting)

    def _has_key(self, request: HttpRequest) -> bool:
        key = self._parts.settings.key
        if key is None:
            return True
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # In constant time, so that the time of an answer does not tell how much of a guess is right.
        return hmac.compare_digest(given.strip().encode(), key.encode()) and scheme.lower() == "bearer"


async def _page(_: HttpRequest) -> Response:
    page = (resources.files("orogen.infer") / "serve" / "page.html").read_text(encoding="utf-8")
    return HTMLResponse(page, headers={"content-security-policy": POLICY, "x-content-type-options": "nosniff"})


async def _health(request: HttpRequest) -> Response:
    service: Service = request.app.state.parts.service
    if service.failure is not None:
        return JSONResponse({"status": "failed", "error": str(service.failure)}, status_code=503)
    if service.draining:
        return JSONResponse({"status": "draining"}, status_code=503)
    return JSONResponse({"status": "ok"})


async def _metrics(request: HttpRequest) -> Response:
    return PlainTextResponse(request.app.state.parts.measures.text(), media_type="text/plain; version=0.0.4")


def _described(parts: Parts) -> dict[str, Any]:
    """The model as OpenAI's interface lists it. chat: whether it has a chat template."""
    told = {"max_model_len": parts.settings.most, "chat": parts.chat is not None}
    return {"id": parts.settings.name, "object": "model", "created": parts.started, "owned_by": "orogen", **told}


async def _models(request: HttpRequest) -> Response:
    return JSONResponse({"object": "list", "data": [_described(request.app.state.parts)]})


async def _model(request: HttpRequest) -> Response:
    request.app.state.parts.check_model({"model": request.path_params["name"]})
    return JSONResponse(_described(request.app.state.parts))


async def _tokenize(request: HttpRequest) -> Response:
    parts: Parts = request.app.state.parts
    body, _ = await read_body(request, forms.TOKENIZE)
    parts.check_model(body)
    if ("prompt" in body) == ("messages" in body):
        raise bad("prompt and messages; expected one of them")
    run = parts.preparing.run_chat if "messages" in body else parts.preparing.run
    return await run(_tokenized, body, parts)


def _tokenized(body: dict[str, Any], parts: Parts) -> Response:
    try:
        ids = _ids_of(body, parts)
    except ConfigError as error:
        raise bad(error) from None
    found = {"count": len(ids), "max_model_len": parts.settings.most, "tokens": ids}
    if body.get("return_token_strs", False):
        found["token_strs"] = [token_text(parts.tokenizer, i)[0] for i in ids]
    return JSONResponse(found)


def _ids_of(body: dict[str, Any], parts: Parts) -> list[int]:
    if "messages" in body:
        generate, options = body.get("add_generation_prompt", True), body.get("chat_template_kwargs")
        chat = parts.need_chat()
        return chat.prompt(
            check_messages(body["messages"]), tools=body.get("tools"), options=options, generate=generate
        ).ids
    tokenizer = parts.need_tokenizer("prompt is a string")
    if body.get("add_special_tokens", True):
        return tokenizer.prompt_ids(body["prompt"])
    # Text never becomes a special token, but clients find the ids of those that /tokenizer_info names in this way.
    named = body["prompt"] in tokenizer.special_names.values()
    return tokenizer.marker_ids(body["prompt"]) if named else tokenizer.encode(body["prompt"]).tolist()


async def _tokenizer_info(request: HttpRequest) -> Response:
    """As vLLM has it, and as lm-eval asks for it to send token ids: the names of special tokens, and the template."""
    parts: Parts = request.app.state.parts
    names = parts.need_tokenizer("tokenizer_info").special_names
    return JSONResponse({**names, "chat_template": None if parts.chat is None else parts.chat.template})


async def _detokenize(request: HttpRequest) -> Response:
    parts: Parts = request.app.state.parts
    body, _ = await read_body(request, forms.DETOKENIZE)
    parts.check_model(body)
    return await parts.preparing.run(_detokenized, body["tokens"], parts.need_tokenizer("detokenize"))


def _detokenized(ids: list[int], tokenizer: Tokenizer) -> Response:
    try:
        return JSONResponse({"prompt": tokenizer.decode(ids)})
    except ConfigError as error:
        raise bad(error) from None
