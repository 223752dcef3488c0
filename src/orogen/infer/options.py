"""Options of a request and of a server on the command line. Importing this does not import jax."""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any, get_type_hints

from orogen.config.checks import ConfigError, is_unicode
from orogen.infer.lines import request_of
from orogen.infer.request import BUDGETS, Sampling

# Where the command line differs from Sampling: text reads better without the least likely tokens.
DEFAULTS = {"temperature": 0.8, "top_p": 0.95, "seed": 0}
TEXTS = ("prompt", "stop", "regex")


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a token id, =, and a number") from None


# Beside the numbers of Sampling: each option, and what argparse is told of it.
OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "--logit_bias",
        {"action": "append", "type": _bias, "metavar": "ID=X", "help": "adds X to a token's logit; may be repeated"},
    ),
    (
        "--stop",
        {"action": "append", "metavar": "TEXT", "help": "ends the text before this; may be repeated"},
    ),
    (
        "--stop_ids",
        {"action": "append", "type": int, "metavar": "ID", "help": "a token that ends the text; may be repeated"},
    ),
    ("--min_tokens", {"type": int, "metavar": "N", "help": "so many tokens come before the first that ends the text"}),
    ("--ignore_eos", {"action": "store_true", "default": None, "help": "tokens that end a text are as any other"}),
    ("--logprobs", {"type": int, "metavar": "N", "help": "log-probabilities of tokens and of the N likeliest ones"}),
    ("--budget", {"type": int, "metavar": "N", "help": "tokens between <think> and </think>, which is then forced"}),
    ("--budget_form", {"choices": BUDGETS, "help": "whether a thought may end its line (default: hard)"}),
    ("--regex", {"metavar": "R", "help": "the text must match this regular expression"}),
    (
        "--json_schema",
        {"type": Path, "metavar": "FILE", "help": "the text must be JSON of the schema in this file"},
    ),
)


def add_request_options(parser: argparse.ArgumentParser) -> None:
    """The options of Request and Sampling by their names, but for the number of tokens."""
    help_of = {k: v.__metadata__[0] for k, v in get_type_hints(Sampling, include_extras=True).items()}
    for field in dataclasses.fields(Sampling):
        kind = float if isinstance(field.default, float) else int
        default = DEFAULTS.get(field.name, field.default)
        if field.name != "logit_bias":
            text = f"{help_of[field.name].partition('; None')[0]} (default: %(default)s)"
            parser.add_argument(f"--{field.name}", type=kind, default=default, metavar="X", help=text)
    for name, settings in OPTIONS:
        parser.add_argument(name, **settings)


def fields_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the options say of a request, as JSON would, by the names of Request and Sampling; `max_tokens` is what
    `--tokens` says, or None. Raises ConfigError."""
    for name in TEXTS:
        given = getattr(options, name)
        for text in [given] if isinstance(given, str) else given or ():
            if not is_unicode(text):
                raise ConfigError(f"--{name} {text!r}; expected valid UTF-8")
    if options.regex is not None and options.json_schema is not None:
        raise ConfigError("--regex and --json_schema: expected one of them")
    if options.budget_form is not None and options.budget is None:
        raise ConfigError(f"--budget_form {options.budget_form} without --budget; expected both")
    names = [f.name for f in dataclasses.fields(Sampling)] + [
        "min_tokens",
        "stop",
        "stop_ids",
        "ignore_eos",
        "logprobs",
    ]
    fields = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    fields["max_tokens"] = options.tokens
    if options.budget is not None:
        fields["budget"] = {"tokens": options.budget, "form": options.budget_form or BUDGETS[0]}
    if options.regex is not None:
        fields["grammar"] = {"kind": "regex", "text": options.regex}
    if options.json_schema is not None:
        fields["grammar"] = {"kind": "json_schema", "text": _read(options.json_schema)}
    try:  # before a model is read
        most = options.tokens or max(1, options.min_tokens or 0)
        request_of([0], fields | {"max_tokens": most})
    except ConfigError as error:
        message = str(error).replace("Budget.tokens", "--budget")
        raise ConfigError(message.replace("Sampling.", "--").replace("Request.", "--")) from None
    return fields


def _read(file: Path) -> str:
    try:  # a pipe is as good as a file
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--json_schema {str(file)!r}: {error.strerror}; expected a file with a JSON schema"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: byte {error.start} is not UTF-8; expected a JSON schema") from None


def port(text: str) -> int:
    """A port, for argparse."""
    if not (text.isdigit() and text.isascii()) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a port, 0 to 65535")
    return int(text)


def seconds(text: str) -> float:
    """A time above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number above 0")
    return value
