"""The content of an HTTP message from its body as it was sent: chunks joined, compression undone.

Some archives keep the headers of a body that they store decoded, so a body that is text, and evidently not in the
coding that its headers name, is taken as it is. Source: RFC 9112, section 7; RFC 9110, section 8.4.
"""

import gzip
import io
import re
import zlib
from typing import Any, NoReturn

from orogen.config.checks import ConfigError, shown
from orogen.data.zstd import ZstdFrames

_DAMAGE = (EOFError, ValueError, zlib.error, gzip.BadGzipFile)
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r?\n")  # the line in front of a chunk
_NEWLINE = re.compile(rb"\r?\n")
# What neither UTF-8 nor an older character set has in a text, and compressed data soon have.
_CONTROL = re.compile(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]")


class _Absent(Exception):
    """The body does not begin as one in the coding does."""


def content(body: bytes, headers: Any, *, max_bytes: int) -> bytes:
    """The content of a body, given the message's headers as a mapping that ignores case. Raises ConfigError."""
    named = f"{headers.get('Content-Encoding') or ''},{headers.get('Transfer-Encoding') or ''}"
    absent = ""  # the coding last undone that the body is not in
    for coding in reversed([name.strip().lower() for name in named.split(",")]):
        if coding in ("", "identity"):
            continue
        try:
            body, absent = _CODINGS.get(coding, _unknown)(body, max_bytes), ""
        except _Absent:
            absent = coding
        except _DAMAGE as error:
            # Of a coding without a signature, damage and absence look alike; only text that is readable was not coded.
            if isinstance(error, ConfigError) or not _is_text(body):
                raise ConfigError(f"{error}; expected a whole body in the coding {shown(coding)}") from None
        if len(body) > max_bytes:
            raise ConfigError(f"it has more than {max_bytes} bytes when it is decoded; expected fewer")
    if absent and not _is_text(body):
        expected = f"expected a whole body in the coding {shown(absent)}"
        raise ConfigError(f"it does not begin as one, and it is not text; {expected}")
    return body


def _joined(body: bytes, max_bytes: int) -> bytes:
    """The chunks' data. Raises _Absent if the body does not begin with the size of one, ConfigError."""
    del max_bytes  # no longer than the body
    pieces, place = [], 0
    while size := _SIZE.match(body, place):
        start, length = size.end(), int(size[1], 16)
        if not length:
            return b"".join(pieces)
        end = _NEWLINE.match(body, start + length)
        if end is None:
            break
        pieces.append(body[start : start + length])
        place = end.end()
    if not place and not size:
        raise _Absent
    raise ConfigError(f"chunk {len(pieces) + 1} is damaged or missing")


def _gunzipped(body: bytes, max_bytes: int) -> bytes:
    if not body.startswith(b"\x1f\x8b"):
        raise _Absent
    with gzip.GzipFile(fileobj=io.BytesIO(body)) as stream:
        return stream.read(max_bytes + 1)


def _inflated(body: bytes, max_bytes: int) -> bytes:
    """Of zlib's format, which the standard means, or of bare deflate, which some servers send."""
    headed = len(body) > 1 and body[0] & 15 == zlib.DEFLATED and int.from_bytes(body[:2]) % 31 == 0
    stream = zlib.decompressobj(zlib.MAX_WBITS if headed else -zlib.MAX_WBITS)
    text = stream.decompress(body, max_bytes + 1)
    if len(text) <= max_bytes and not stream.eof:
        raise EOFError("it ends too early")
    return text


def _unbrotlied(body: bytes, max_bytes: int) -> bytes:
    import brotli  # here, so that only readers of WARC need it

    stream, pieces, held = brotli.Decompressor(), [], 0
    try:
        piece = stream.process(body, output_buffer_limit=max_bytes + 1)
        while piece and held <= max_bytes:
            pieces.append(piece)
            held += len(piece)
            piece = stream.process(b"", output_buffer_limit=max_bytes + 1)
    except brotli.error as error:
        raise ValueError(str(error)) from None
    if held <= max_bytes and not stream.is_finished():
        raise EOFError("it ends too early")
    return b"".join(pieces)


def _unzstd(body: bytes, max_bytes: int) -> bytes:
    if not body.startswith(b"\x28\xb5\x2f\xfd"):
        raise _Absent
    return io.BufferedReader(ZstdFrames(io.BytesIO(body))).read(max_bytes + 1)


def _unknown(body: bytes, max_bytes: int) -> NoReturn:
    del body, max_bytes
    raise ValueError(f"none of {', '.join(_CODINGS)}")


def _is_text(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return _CONTROL.search(body) is None
    return True


_CODINGS = {
    "chunked": _joined,
    "gzip": _gunzipped,
    "x-gzip": _gunzipped,
    "deflate": _inflated,
    "br": _unbrotlied,
    "zstd": _unzstd,
}
