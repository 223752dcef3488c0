"""Errors as OpenAI's interface tells them."""

import re
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from orogen.infer.request import Full

# The place of a body that a message of `config/json_file.py` begins with.
_PARAMETER = re.compile(r"(?:the body: )?([\w.\[\]]+) is ")


class HttpError(Exception):
    """An answer with this status. message: one line. headers: further ones."""

    def __init__(self, status: int, message: str, *, kind: str = "invalid_request_error", code: str | None = None,
                 headers: dict[str, str] | None = None) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.kind, self.code, self.headers = status, kind, code, headers

    def body(self) -> dict[str, Any]:
        """The JSON object that tells it."""
        message = " ".join(str(self).split())
        found = _PARAMETER.match(message) if self.status == 400 else None
        described = {"message": message, "type": self.kind, "param": found[1] if found else None, "code": self.code}
        return {"error": described}


def bad(message: object) -> HttpError:
    """What is wrong with a body."""
    # Configs name a field as `Sampling.top_p`; who sent the body knows it as `top_p`.
    named = str(message).replace("Grammar.text", "the grammar")
    return HttpError(400, re.sub(r"^(Sampling|Request|Budget)\.", "", named))


def full(error: Full) -> HttpError:
    """What is told where there is no room for a request now."""
    message = f"the queue is full: {error}"
    return HttpError(429, message, kind="rate_limit_error", code="queue_full", headers={"retry-after": "1"})


def closed(message: str) -> HttpError:
    """What is told where no request is taken any more."""
    return HttpError(503, message, kind="server_error", headers={"retry-after": "5"})


def response_to(error: HttpError) -> Response:
    """The response that tells an error."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


# Coroutines, for starlette would run plain functions in a thread each.


async def answer_error(_: Request, error: Exception) -> Response:
    """The response to an HttpError."""
    assert isinstance(error, HttpError)
    return response_to(error)


async def answer_http(request: Request, error: Any) -> Response:
    """The response where no route fits."""
    message = f"{request.method} {request.url.path}: {error.detail}"
    return response_to(HttpError(error.status_code, message, headers=dict(error.headers or {})))


async def answer_fault(_: Request, error: Exception) -> Response:
    """The response to an error of our own."""
    return response_to(HttpError(500, f"{type(error).__name__}: {error}", kind="server_error"))
