"""The bytes of a body, within bounds."""

import asyncio
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request

from orogen.config.json_file import Record
from orogen.infer.serve import forms
from orogen.infer.serve.errors import HttpError


async def read_body(request: Request, form: Record) -> tuple[dict[str, Any], list[str]]:
    """The fields of a request's body, and the names of those that are unknown. See `forms.read`.

    Raises HttpError with status 400, 408 or 413.
    """
    settings = request.app.state.parts.settings
    most, data = settings.most_body, bytearray()
    try:
        async with asyncio.timeout(settings.timeout):
            async for piece in request.stream():
                data += piece
                if len(data) > most:
                    raise HttpError(413, f"the body has more than {most} bytes; expected at most that")
    except TimeoutError:
        raise HttpError(408, f"the body took more than {settings.timeout:g} s", kind="timeout_error") from None
    except ClientDisconnect:
        raise HttpError(400, "the client left within the body") from None
    # A thread: what a large body takes to parse, and its prompts to encode, must not hold up the other streams.
    return await asyncio.to_thread(forms.read, bytes(data), form)


def ignored(names: list[str]) -> dict[str, str]:
    """The header that names what a body has and nothing reads."""
    return {"x-ignored-fields": json.dumps(names)[1:-1][:1000]} if names else {}
