"""Messages of a chat as the ids that a model continues.

**What a user writes never becomes a special token**, whatever it spells and whatever the template does with it. The
first characters of the specials' names (of `<|im_end|>`: `<`) are replaced in every text of a client, each by a
character that Unicode reserves for such use and that is in none of them; then the template is rendered. What spells a
special in the result is the template's own and becomes its id, and the replaced characters come back in the text
between. Only in what an assistant said, the tags that models write themselves (TAGS) stay, since templates look for
them there.
"""

import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from orogen.config.checks import ConfigError, shown
from orogen.config.json_file import read_json
from orogen.data.specials import SETTINGS
from orogen.data.tokenizer import Tokenizer
from orogen.infer.render import Renderer

THINK, THOUGHT = "<think>", "</think>"
TAGS = (THINK, THOUGHT, "<tool_call>", "</tool_call>", "<TOOLCALL>", "</TOOLCALL>")
# Our own templates: the files of each, in order.
TEMPLATES = {
    "nemotron_nano_2": ("nemotron_nano_2.jinja",),
    "nemotron_3_nano": ("nemotron_3_nano.jinja", "nemotron_3_common.jinja"),
    "nemotron_3_5_lightning": ("nemotron_3_5_lightning.jinja", "nemotron_3_common.jinja"),
}
RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
# Unicode's noncharacters of the basic plane: "intended for process-internal uses" (Unicode 16, section 23.7).
_STAND_INS = [*map(chr, range(0xFDD0, 0xFDF0)), "\ufffe", "\uffff"]


class Prompt(NamedTuple):
    """A rendered chat. text: as the template made it. ids: what the model continues. thinks: whether that is within
    `<think>`, None where the model itself may open it."""

    text: str
    ids: list[int]
    thinks: bool | None


class Chat:
    """A tokenizer with a chat template. May be used from several threads."""

    def __init__(self, tokenizer: Tokenizer, template: str | dict[str, str], renderer: Renderer | None = None) -> None:
        """template: its text, or several by name: `tool_use` for chats with tools, `default` for others."""
        self.tokenizer = tokenizer
        self._templates = {"default": template} if isinstance(template, str) else template
        if "default" not in self._templates:
            raise ConfigError(f"chat templates {', '.join(self._templates)}; expected one called default")
        self._renderer = renderer or Renderer()
        # A name that begins with a letter stays text: replacing letters would change what templates compare.
        names = {str(token): i for i, token in tokenizer.specials.items()}
        self._specials = {name: i for name, i in names.items() if name and not name[0].isalnum()}
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._firsts = sorted({name[0] for name in self._specials})

    @property
    def template(self) -> str:
        """The text of the one for chats without tools."""
        return self._templates["default"]

    @property
    def calls(self) -> str:
        """The text of the template that is for tools, which tells how the model writes calls."""
        return self._templates.get("tool_use", self._templates["default"])

    def shown_ids(self) -> tuple[int, ...]:
        """The specials whose names an answer must show, for its parsers to find them."""
        return tuple(self._specials[tag] for tag in TAGS if tag in self._specials)

    def prompt(
        self, messages: list[dict[str, Any]], *, tools: list[dict[str, Any]] | None = None, add: str = "",
        options: dict[str, Any] | None = None, generate: bool = True,
    ) -> Prompt:  # fmt: skip
        """The prompt of a chat, as `checked` gives its messages.

        options: further variables of the template. add: what follows it, specials and all. generate: whether the
        assistant's turn is opened. Raises ConfigError with what the template refuses.
        """
        options = options or {}
        if reserved := [name for name in options if name in RESERVED]:
            raise ConfigError(f"chat_template_kwargs.{reserved[0]}; expected it as a field of the request")
        marked, back = self._marked({"messages": messages, "tools": tools or None, **options})
        # Ours and NVIDIA's template for training read the options as one variable, released ones as several.
        marked["chat_template_kwargs"] = {name: marked[name] for name in options}
        template = self.calls if tools else self._templates["default"]
        text = (
            self._renderer.render(
                template, {**self.tokenizer.special_names, **marked, "add_generation_prompt": generate}
            )
            + add
        )
        parts: list[str | int] = [p if isinstance(p, int) else p.translate(back) for p in self._parts(text)]
        return Prompt(text.translate(back), list(self._ids(parts)), _thinks(text))

    def close(self) -> None:
        """Ends the process that renders."""
        self._renderer.close()

    def _parts(self, text: str) -> Iterator[str | int]:
        end = 0
        for match in self._special.finditer(text):
            if match.start() > end:
                yield text[end : match.start()]
            yield self._specials[match[0]]
            end = match.end()
        if end < len(text):
            yield text[end:]

    def _ids(self, parts: list[str | int]) -> Iterator[int]:
        """Ids of specials and the text between. Some specials take the spaces beside them, as in transformers."""
        words = self.tokenizer
        for place, part in enumerate(parts):
            if isinstance(part, int):
                yield part
                continue
            before, after = parts[place - 1] if place else None, parts[place + 1] if place + 1 < len(parts) else None
            text = part.lstrip() if isinstance(before, int) and words.specials[before].rstrip else part
            text = text.rstrip() if isinstance(after, int) and words.specials[after].lstrip else text
            yield from (words.encode_inside(text, special=True) if place else words.encode(text)).tolist()

    def _marked(self, value: Any) -> tuple[Any, dict[int, str]]:
        """`value` without first characters of specials in any text, and the table that brings them back."""
        used = set(json.dumps(value, ensure_ascii=False))
        free = [c for c in _STAND_INS if c not in used][: len(self._firsts)]
        if len(free) < len(self._firsts):
            raise ConfigError("the messages hold every noncharacter of Unicode; expected text")
        away = {ord(first): stand_in for first, stand_in in zip(self._firsts, free, strict=True)}
        return _replaced(value, away), {ord(stand_in): chr(first) for first, stand_in in away.items()}


def _replaced(value: Any, away: dict[int, str], *, said: bool = False) -> Any:
    """`value` with the characters `away` replaced in its texts; `said`: the TAGS of an assistant's own text stay."""
    if isinstance(value, str):
        pieces = re.split(f"({'|'.join(map(re.escape, TAGS))})", value) if said else [value]
        return "".join(piece if said and piece in TAGS else piece.translate(away) for piece in pieces)
    if isinstance(value, list):
        return [_replaced(item, away) for item in value]
    if isinstance(value, dict):
        own = value.get("role") == "assistant"
        return {k.translate(away): _replaced(v, away, said=own and k == "content") for k, v in value.items()}
    return value


def _thinks(text: str) -> bool | None:
    tail = text.rstrip()
    return True if tail.endswith(THINK) else False if tail.endswith(THOUGHT) else None


def find_template(folder: Path, tokenizer: Tokenizer, name: str | None = None) -> str | dict[str, str] | None:
    """The chat template of a checkpoint, None if it has none.

    name: one of our own, or a file, instead of the checkpoint's. Without, chat_template.jinja counts before the
    `chat_template` of tokenizer_config.json, as in transformers; then one of our own if the tokenizer has all its
    specials. Raises ConfigError.
    """
    if name is not None:
        return own_template(name) if name in TEMPLATES else _read(Path(name))
    for place in (folder, folder / "tokenizer"):
        if (place / "chat_template.jinja").is_file():
            return _read(place / "chat_template.jinja")
        for file in (place / SETTINGS, place / "chat_template.json"):
            if file.is_file() and (found := read_json(file).get("chat_template")) is not None:
                return _named(found, file)
    names = set(map(str, tokenizer.specials.values()))
    if names.issuperset(("<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>")):
        return own_template("nemotron_nano_2")
    if names.issuperset(("<|im_start|>", "<|im_end|>", THINK, THOUGHT)):
        return own_template("nemotron_3_nano")
    return None


def own_template(name: str) -> str:
    """The text of one of TEMPLATES."""
    folder = resources.files("orogen.infer") / "templates"
    return "".join((folder / file).read_text(encoding="utf-8") for file in TEMPLATES[name])


def _read(file: Path) -> str:
    if not file.is_file():
        raise ConfigError(f"chat template {str(file)!r} is no file; expected one, or one of {', '.join(TEMPLATES)}")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: byte {error.start} is not UTF-8; expected a chat template") from None


def _named(found: Any, file: Path) -> str | dict[str, str]:
    """A template, or several as [{name, template}, ...]."""
    listed = found if isinstance(found, list) else [{"name": "default", "template": found}]
    fits = all(isinstance(one, dict) and {"name", "template"} <= one.keys() for one in listed)
    if not fits or not all(isinstance(one[key], str) for one in listed for key in ("name", "template")):
        raise ConfigError(
            f"{file}: chat_template is {shown(found)}; expected a string, or a list of names and templates"
        )
    return {one["name"]: one["template"] for one in listed}
