"""Compiles grammars of strangers in a process of its own, which may take too long, too much memory, or crash.

llguidance recurses over schemas: a chain of some thousand references overflows the stack, which ends the process. What
compiles here, with a quarter of the usual stack, compiles in the engine.
"""

import importlib
import json
import os
import re
import resource
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from orogen.config.checks import ConfigError, shown

SECONDS = 2.0
MEMORY = 2**30  # bytes of address space
STACK = 2**21
STARTING_SECONDS = 60.0
# A fifth to a twelfth of the library's defaults, which allow seconds and hundreds of megabytes in one step.
LIMITS = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 100_000,
    "max_lexer_states": 20_000,
    "verbose_errors": False,
}
# Between the parts of a JSON text: nothing, a space, or a line end with its indentation. The library's default is any
# space at all, of which models are known to write without an end.
SPACES = {"whitespace_pattern": r"( |\n[ \t]{0,32})?"}
# What tells a grammar in Lark's form from GBNF, whose rules are written with `::=`. The library itself overlooks
# `?start`, a rule whose only child takes its place.
_LARK = re.compile(r"^\s*(%llguidance\b|[?!]*start(\.-?\d+)?\s*:(?!:=))", re.MULTILINE)
# Steps that are tried: some expressions explode at the first token.
TRIED = 4


def compiled(library: Any, tokenizer: Any, kind: str, text: str) -> tuple[Any, str]:
    """llguidance's matcher of a grammar, and what is wrong with the grammar; empty if nothing is."""
    convert = importlib.import_module("llguidance.gbnf_to_lark")
    try:
        grammar = {
            "regex": library.LLMatcher.grammar_from_regex,
            "json_schema": lambda text: _schema_grammar(library, text),
            "grammar": lambda text: library.LLMatcher.grammar_from_lark(
                text if _LARK.search(text) else convert.gbnf_to_lark(text)
            ),
        }[kind](text)
    except (ValueError, RecursionError, convert.GbnfToLarkError) as error:
        return None, one_line(str(error))
    matcher = library.LLMatcher(tokenizer, grammar, log_level=0, limits=library.LLParserLimits(**LIMITS))
    if not matcher.is_error():
        matcher.compute_bitmask()  # a grammar that matches nothing, or is too large to begin with, fails here
    return matcher, one_line(matcher.get_error())


def _schema_grammar(library: Any, text: str) -> str:
    # The library takes options for objects alone; `true` and `false` are schemas too.
    options = {"defaults": SPACES} if text.lstrip().startswith("{") else {}
    return library.LLMatcher.grammar_from_json_schema(text, **options)


def tried(matcher: Any) -> str:
    """What goes wrong in a few steps of some text that a fresh matcher allows; empty if nothing does."""
    for _ in range(TRIED):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_stopped() or not mask:
            break
        matcher.consume_token((mask & -mask).bit_length() - 1)
    return one_line(matcher.get_error())


def trie(library: Any, tokens: Sequence[bytes], end_ids: Iterable[int], encode: Callable[[str], list[int]]) -> Any:
    """llguidance's tokenizer: the bytes of each token, none for specials; ids that end a text; tokens of a text that
    follows other text."""
    return library.LLTokenizer(
        library.TokenizerWrapper(_Tokens(tokens, sorted(end_ids), encode)), eos_token=sorted(end_ids)
    )


class _Tokens:
    """What the library asks of a tokenizer, by these names."""

    def __init__(self, tokens: Sequence[bytes], end_ids: list[int], encode: Callable[[str], list[int]]) -> None:
        self.tokens, self._encode = tokens, encode
        self.eos_token_id, self.bos_token_id = end_ids[0], None
        self.special_token_ids = [i for i, data in enumerate(tokens) if not data]

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):  # asked with bytes, to see whether they are taken
            raise TypeError(f"a text of type {type(text).__name__}; expected str")
        return self._encode(text)


def one_line(message: str) -> str:
    """The library's message without line ends and what it says of its own verbosity."""
    return " ".join(message.replace("<non-verbose/>", "").split())


class GrammarCheck:
    """The process, started at once, and again after each grammar that ended it. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = self._started()

    def check(self, kind: str, text: str) -> None:
        """Raises ConfigError for a grammar that is malformed, matches nothing, or takes too much."""
        with self._lock:
            # Back only after its answer: a late one would be another's.
            process, self._process = self._process or self._started(), None
            try:
                if self._fresh and _asked(process, '["regex", "a"]', STARTING_SECONDS) != "":
                    raise RuntimeError("the process that compiles grammars did not start")
                answer = _asked(process, json.dumps([kind, text]), SECONDS)
                self._process = None if answer is None else process
            finally:
                if self._process is None:
                    _end(process)
            self._fresh = answer is None
            self._process = self._process or self._started()
        shortened = shown(text[:80])
        if answer is None:
            limits = f"{SECONDS:g} s, {MEMORY >> 20} MiB, or {STACK >> 20} MiB of stack"
            raise ConfigError(f"Grammar.text {shortened} takes more than {limits} to compile; expected a simpler one")
        if answer:
            raise ConfigError(f"Grammar.text {shortened}: {answer[:400]}; expected a {kind} that can be matched")

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            if self._process is not None:
                _end(self._process)
                self._process = None

    def _started(self) -> "subprocess.Popen[str]":
        """Does not wait until it runs: `check` does."""
        self._fresh = True
        return subprocess.Popen(
            [sys.executable, "-m", "orogen.infer.grammar_check"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()


def _asked(process: "subprocess.Popen[str]", question: str, seconds: float) -> str | None:
    """The process's answer; None if it ended or took too long."""
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the process that compiles grammars has no pipes")
    try:
        process.stdin.write(question + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    waiting = select.poll()  # unlike `select`, takes descriptors above 1024
    waiting.register(process.stdout, select.POLLIN)
    line = process.stdout.readline() if waiting.poll(seconds * 1000) else ""
    return json.loads(line) if line else None


def main() -> None:
    """Answers each line of stdin, a JSON list of kind and text, with a line: what is wrong, as a JSON string."""
    llguidance: Any = importlib.import_module("llguidance")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK)
    tokenizer = trie(llguidance, [*(bytes([byte]) for byte in range(256)), b""], [256], lambda t: list(t.encode()))

    def answer(kind: str, text: str) -> None:
        matcher, error = compiled(llguidance, tokenizer, kind, text)
        print(json.dumps(error or tried(matcher)), flush=True)

    for line in sys.stdin:
        worker = threading.Thread(target=answer, args=json.loads(line))
        worker.start()
        worker.join()


if __name__ == "__main__":
    main()
