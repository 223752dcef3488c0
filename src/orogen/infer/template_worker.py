"""Renders chat templates in a process of its own, which imports nothing but jinja2 and the standard library.

A template comes with a checkpoint, so it is data of strangers: jinja's sandbox keeps it from Python, and the limits of
this process keep it from the machine's memory. Whoever started the process ends it when it takes too long.

Reads one request after another from stdin and answers on stdout: 8 bytes of length, then JSON. A request has `template`
and `variables`; an answer has `text` or `error`.
"""

import datetime
import functools
import json
import resource
import signal
import struct
import sys
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

MOST_MEMORY = 2**30  # bytes of address space, of which Python with jinja2 takes about 50 MB
MOST_TEXT = 2**24  # characters of a rendered prompt
MOST_SECONDS = 60  # a backstop: whoever asks ends the process much sooner, unless it is gone itself
LENGTH = struct.Struct(">Q")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, with which templates mark what an assistant wrote; here it only holds its body."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Dict:
    """`dict` for templates, without the type's own attributes."""

    def __call__(self, *pairs: Any, **named: Any) -> dict[Any, Any]:
        return dict(*pairs, **named)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        """As dict.fromkeys."""
        return dict.fromkeys(*arguments)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` for templates, which takes no name that Python itself gives a meaning."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no name with a first underscore: {name!r}")
        super().__setitem__(name, value)


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment in which transformers 5.23 renders chat templates."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals.update(raise_exception=_raise, strftime_now=_now, dict=_Dict(), namespace=_Namespace)
    return made


@functools.lru_cache(maxsize=4)
def _compiled(template: str) -> jinja2.Template:
    """The template, which takes 50 ms to compile, and less than one to render. Nothing of one text stays for the next:
    the sandbox lets a template change no object, and each text has variables of its own."""
    return environment().from_string(template)


def render(template: str, variables: dict[str, Any]) -> str:
    """The text of a template. Raises jinja2's errors, and ValueError for more than MOST_TEXT characters."""
    parts, length = [], 0
    for part in _compiled(template).generate(**variables):
        parts.append(part)
        length += len(part)
        if length > MOST_TEXT:
            raise ValueError(f"it makes more than {MOST_TEXT} characters")
    return "".join(parts)


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def read(stream: BinaryIO) -> Any:
    """The next message, None at the end."""
    head = stream.read(LENGTH.size)
    return json.loads(stream.read(LENGTH.unpack(head)[0])) if len(head) == LENGTH.size else None


def written(message: Any) -> bytes:
    """A message as it goes through the pipe."""
    data = json.dumps(message).encode()
    return LENGTH.pack(len(data)) + data


def main() -> None:
    """Answers until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which closes stdin
    while (request := read(sys.stdin.buffer)) is not None:
        signal.alarm(MOST_SECONDS)
        try:
            answer = {"text": render(request["template"], request["variables"])}
        except Exception as error:  # a template may raise anything: it is told to whoever asked
            answer = {"error": str(error) or type(error).__name__}
        signal.alarm(0)
        sys.stdout.buffer.write(written(answer))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
