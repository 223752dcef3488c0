"""The bytes of a body, within bounds."""

import asyncio
import json
import time
from typing import Any

from starlette.requests import ClientDisconnect, Request

from orogen.config.json_file import Record
from orogen.infer.serve import forms
from orogen.infer.serve.errors import HttpError

# Of a body that is refused, so many bytes are read: who still sends when a connection is closed hears no answer.
MOST_DISCARDED, DISCARD_SECONDS = 2**27, 10.0


async def read_body(request: Request, form: Record) -> tuple[dict[str, Any], list[str]]:
    """The fields of a request's body, and the names of those that are unknown. See `forms.read`. Notes in the request's
    state when it arrived.

    Raises HttpError with status 400, 408, 413, 429 or 504.
    """
    settings = request.app.state.parts.settings
    request.state.arrived = time.perf_counter()
    most, count, data = settings.most_body, 0, bytearray()
    try:
        async with asyncio.timeout(settings.timeout):
            async for piece in request.stream():
                count += len(piece)
                if count > most + MOST_DISCARDED:
                    break
                if count <= most:
                    data += piece
    except TimeoutError:
        raise HttpError(408, f"the body took more than {settings.timeout:g} s", kind="timeout_error") from None
    except ClientDisconnect:
        raise HttpError(400, "the client left within the body") from None
    if count > most:
        raise HttpError(413, f"the body has more than {most} bytes; expected at most that")
    return await request.app.state.parts.preparing.run(forms.read, bytes(data), form)


async def discard(request: Request) -> None:
    """Reads a body that is refused, within bounds."""
    count = 0
    try:
        async with asyncio.timeout(DISCARD_SECONDS):
            async for piece in request.stream():
                count += len(piece)
                if count > MOST_DISCARDED:
                    return
    except (ClientDisconnect, TimeoutError):
        return  # it is refused all the same


def ignored(names: list[str]) -> dict[str, str]:
    """The header that names what a body has and nothing reads."""
    return {"x-ignored-fields": json.dumps(names)[1:-1][:1000]} if names else {}
