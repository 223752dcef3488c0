"""Output that matches a JSON schema or a regular expression, by llguidance (MIT): masks of the tokens that may follow.

Letters: w words of a mask.
"""

import importlib
import importlib.util
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np

from orogen.config.checks import ConfigError, shown
from orogen.data.tokenizer import Tokenizer
from orogen.infer.budget import Markers
from orogen.infer.grammar_check import GrammarCheck, compiled, one_line, trie
from orogen.infer.request import Grammar

MOST_TEXT = 2**16  # characters of a grammar
KEPT = 64  # compiled grammars that are kept for further requests


class DeadEnd(Exception):
    """A request cannot go on: no token can follow, its token was not allowed, or the grammar takes too much."""


class Grammars:
    """Compiles the grammars of requests for one tokenizer, whose trie is built once. For one thread.

    Raises ConfigError for a model without a tokenizer, and if llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        if tokenizer is None:
            raise ConfigError("the checkpoint has no tokenizer.json; expected one, for a grammar: it constrains text")
        if importlib.util.find_spec("llguidance") is None:
            raise ConfigError("llguidance is not installed; expected it for a grammar: pip install 'orogen[serve]'")
        self._library: Any = importlib.import_module("llguidance")
        ends, encode = tokenizer.end_ids, lambda text: tokenizer.encode_inside(text).tolist()
        self._trie = trie(self._library, tokenizer.bytes_of_token, ends, encode)
        self._kept: OrderedDict[Grammar, Any] = OrderedDict()
        self._check = GrammarCheck()

    def matcher(self, grammar: Grammar, *, prompt: Iterable[int] = (), markers: Markers | None = None) -> "Matcher":
        """The matcher of a new request.

        markers: of a model that thinks; where `prompt` ends inside a thought, the grammar begins after `</think>`.
        Raises ConfigError for a grammar that is malformed, unsupported, matches nothing or takes too much.
        """
        if grammar not in self._kept:
            if len(grammar.text) > MOST_TEXT:
                raise ConfigError(f"Grammar.text has {len(grammar.text)} characters; expected at most {MOST_TEXT}")
            self._check.check(grammar.kind, grammar.text)
            matcher, error = compiled(self._library, self._trie, grammar.kind, grammar.text)
            if error:
                raise ConfigError(f"Grammar.text {shown(grammar.text[:80])}: {error[:400]}; expected a simpler one")
            self._kept[grammar] = matcher
        self._kept.move_to_end(grammar)
        matcher = self._kept[grammar].deep_copy()
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return Matcher(matcher, self._trie.vocab_size, _Thoughts(prompt, markers) if markers is not None else None)

    def close(self) -> None:
        """Ends the process that compiles grammars first."""
        self._check.close()


class Matcher:
    """Where one request is in its grammar. `finished`: nothing but the end of the text can follow."""

    def __init__(self, matcher: Any, vocab_size: int, thoughts: "_Thoughts | None") -> None:
        self._matcher = matcher
        self._words = -(-vocab_size // 32)
        self._thoughts = thoughts

    @property
    def finished(self) -> bool:
        return not self._thinks and self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def _thinks(self) -> bool:
        return self._thoughts is not None and self._thoughts.thinks

    def mask_into(self, mask_w: np.ndarray) -> None:
        """Sets the bits of the tokens that may come next, in a contiguous uint32 row; see `knobs.words_of_mask`.

        The tokens that end a text are among them where it may end. Rows of a model beyond the tokenizer's get 0.
        Raises DeadEnd; a row of its own is left, and no other request is touched.
        """
        if self._thinks:
            mask_w[:] = np.uint32(0xFFFFFFFF)
            return
        mask_w[self._words :] = 0
        words_w = mask_w[: self._words]
        self._matcher.unsafe_compute_mask_ptr(words_w.ctypes.data, words_w.nbytes)
        self._fail_on_error()
        if not words_w.any():
            raise DeadEnd("no token can follow in the grammar")

    def advance(self, token: int) -> None:
        """Goes past a token that the request has emitted. Raises DeadEnd if it was not allowed."""
        if self._thoughts is not None and self._thoughts.thinks:
            self._thoughts.read(token)
            return
        self._matcher.consume_token(token)
        self._fail_on_error()

    def _fail_on_error(self) -> None:
        if self._matcher.is_error():
            raise DeadEnd(f"the grammar cannot go on: {one_line(self._matcher.get_error())[:400]}")


class _Thoughts:
    """Whether a request is between the markers of thinking, where a grammar waits."""

    def __init__(self, prompt: Iterable[int], markers: Markers) -> None:
        self._markers = markers
        self._state = 0
        for token in prompt:
            self.read(token)

    @property
    def thinks(self) -> bool:
        return self._state >= int(self._markers.thinking)

    def read(self, token: int) -> None:
        self._state = int(self._markers.next_sv[self._state, token])
