"""Output that matches a JSON schema or a regular expression, by llguidance (MIT): masks of the tokens that may follow.

Letters: w words of a mask.
"""

import functools
import importlib
import importlib.util
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from orogen.config.checks import ConfigError, shown
from orogen.data.tokenizer import Tokenizer
from orogen.infer.budget import Markers, markers_of, read
from orogen.infer.grammar_check import GrammarCheck, compiled, one_line, trie
from orogen.infer.knobs import words_of_mask
from orogen.infer.request import Grammar

MOST_TEXT = 2**16  # characters of a grammar
KEPT = 64  # compiled grammars that are kept for further requests, beside those of requests that are on their way


class Constraints:
    """Matchers of the grammars of requests, for one tokenizer and a model of so many rows.

    Raises ConfigError for a model without a tokenizer, and if llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        if tokenizer is None:
            raise ConfigError("the checkpoint has no tokenizer.json; expected one, for a grammar: it constrains text")
        if importlib.util.find_spec("llguidance") is None:
            raise ConfigError("llguidance is not installed; expected it for a grammar: pip install 'orogen[serve]'")
        self._words = words_of_mask(vocab_size)
        self._compiler = _compiler(tokenizer)
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    @functools.cached_property
    def _markers(self) -> Markers:
        """Of thinking. Raises ConfigError if the tokenizer changes them."""
        return markers_of(self._tokenizer, self._vocab_size)

    def prepare(self, grammar: Grammar) -> "Compiled":
        """Compiles a grammar, in this thread, whichever it is. As long as somebody holds what this returns, `matcher`
        finds it, of this object or of another one for the same tokenizer: a server compiles, and its engine, which must
        not wait, uses what is there.

        Raises ConfigError as `matcher` does.
        """
        return self._compiler.compiled(grammar)

    def matcher(self, grammar: Grammar, *, prompt: Sequence[int] = ()) -> "Matcher":
        """The matcher of a new request. Where `prompt` ends inside `<think>`, the grammar begins after `</think>`.

        Raises ConfigError for a grammar that is malformed, unsupported, matches nothing or takes too much.
        """
        reader, _ = read(self._markers, prompt)
        return Matcher(self._compiler.compiled(grammar).matcher.deep_copy(), self._words, self._markers, reader)

    def close(self) -> None:
        """Ends the process that compiles grammars first; a further grammar starts another one."""
        self._compiler.check.close()


class Compiled:
    """A compiled grammar. matcher: llguidance's, to be copied."""

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher


class _Compiler:
    """Compiled grammars of one tokenizer: the last ones, and all that somebody holds. For any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._library: Any = importlib.import_module("llguidance")
        end_ids, encode = tokenizer.end_ids, lambda text: tokenizer.encode_inside(text).tolist()
        self._trie = trie(self._library, tokenizer.bytes_of_token, end_ids, encode)
        self._kept: OrderedDict[Grammar, Compiled] = OrderedDict()
        self._held: WeakValueDictionary[Grammar, Compiled] = WeakValueDictionary()
        self._lock = threading.Lock()  # of what is kept; nothing is compiled under it
        self.check = GrammarCheck()

    def compiled(self, grammar: Grammar) -> Compiled:
        """The grammar, compiled. Raises ConfigError."""
        with self._lock:
            if (found := self._held.get(grammar)) is not None:
                return self._keep(grammar, found)
        if len(grammar.text) > MOST_TEXT:
            raise ConfigError(f"Grammar.text has {len(grammar.text)} characters; expected at most {MOST_TEXT}")
        self.check.check(grammar.kind, grammar.text)
        matcher, error = compiled(self._library, self._trie, grammar.kind, grammar.text)
        if error:
            raise ConfigError(f"Grammar.text {shown(grammar.text[:80])}: {error[:400]}; expected a simpler one")
        with self._lock:
            return self._keep(grammar, Compiled(matcher))

    def _keep(self, grammar: Grammar, found: Compiled) -> Compiled:
        self._kept[grammar] = self._held[grammar] = found
        self._kept.move_to_end(grammar)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return found


# The trie of 131,072 tokens takes 0.6 s and tens of megabytes: a server and its engine share one.
_compiler = functools.lru_cache(maxsize=1)(_Compiler)


class Matcher:
    """Where one request is in its grammar.

    A mask is made when a token has come, so that whatever goes wrong is known before the next step, and ends this
    request alone.
    """

    def __init__(self, matcher: Any, words: int, markers: Markers, reader: int) -> None:
        self._matcher = matcher
        self._markers = markers
        self._reader = reader if reader >= markers.thinking else 0  # 0: the request does not think
        self._mask_w = np.full(words, 0xFFFFFFFF, np.uint32)  # all tokens while it thinks
        if not self._reader:
            self._make_mask()

    @property
    def finished(self) -> bool:
        """Whether the text is complete, and nothing but its end can follow."""
        return not self._reader and self._matcher.is_stopped() and not self._matcher.is_error()

    def mask_into(self, mask_w: np.ndarray) -> None:
        """Writes the tokens that may come next, uint32 (w,); see `knobs.words_of_mask`.

        The tokens that end a text are among them where it may end. Rows beyond the tokenizer's are not.
        """
        mask_w[:] = self._mask_w

    def advance(self, token: int) -> str | None:
        """Goes past a token that the request has emitted. Returns what is wrong if it cannot go on, else None.

        That is a token which was not allowed, or a step that takes too much.
        """
        if self._reader:
            reader = int(self._markers.next_sv[self._reader, token])
            self._reader = reader if reader >= self._markers.thinking else 0
            return None if self._reader else self._make_mask()
        self._matcher.consume_token(token)
        return self._make_mask()

    def _make_mask(self) -> str | None:
        error = self._matcher.get_error()
        if not error:
            data = self._matcher.compute_bitmask()
            self._mask_w[:] = 0
            self._mask_w.view(np.uint8)[: len(data)] = np.frombuffer(data, np.uint8)
            error = self._matcher.get_error()
        return f"the text cannot go on in its grammar: {one_line(error)[:400]}" if error else None
