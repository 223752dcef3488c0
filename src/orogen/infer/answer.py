"""A model's text, as it comes, split into reasoning, content and calls of tools."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from orogen.infer.chat import THINK, THOUGHT
from orogen.infer.tool_calls import CLOSED_BY, BrokenError, Call, read_calls


class Part(NamedTuple):
    """A piece of an answer: what it adds to the reasoning, to the content, or a whole call."""

    reasoning: str = ""
    content: str = ""
    call: Call | None = None


class Answer:
    """Splits one answer. What may yet turn out to be a tag waits for what follows.

    thinks: whether the prompt ends within `<think>`; None: the answer may begin with it. tools: as
    `tool_calls.schemas_of` gives them; None: calls are text. called: the beginning of a call, with its tag,
    in which the prompt ends.

    The line ends around `</think>` belong to neither side. A call comes when it is complete; one that is broken, or
    calls what there is not, is content as it stands.
    """

    def __init__(
        self, *, thinks: bool | None, tools: Mapping[str, Mapping[str, Any]] | None = None, called: str | None = None
    ) -> None:
        self._tools = tools
        self._space: list[str] = []  # not given out yet, whether it is space before a tag or not
        self._text = ""  # nor this, which follows it
        self._opened = ""  # the tag of the call that is being read
        self._gap = ""  # the space before it
        self._searched = 0  # of the text, for the end of the call
        # None: the answer has not begun; True: reasoning, False: content.
        self._thinking = thinks
        self._fresh = thinks is True  # nothing of this side has been given out: its first line ends go
        if called is not None:
            self._thinking, self._opened = False, next(tag for tag in CLOSED_BY if called.startswith(tag))
            self._text = called.removeprefix(self._opened)

    def push(self, text: str) -> list[Part]:
        """What a further piece of the text makes certain."""
        self._text += text
        return list(self._parts(last=False))

    def finish(self) -> list[Part]:
        """What is left at the end."""
        return list(self._parts(last=True))

    def _parts(self, *, last: bool) -> Iterator[Part]:
        if self._thinking is None and not self._begin(last):
            return
        if self._thinking:
            yield from self._reasoning(last)
        if self._thinking is False:
            yield from self._content(last)

    def _begin(self, last: bool) -> bool:
        """Whether it is known by now if the answer begins with `<think>`."""
        start = self._text.lstrip()
        self._hold(len(self._text) - len(start))
        if not last and THINK.startswith(start):
            return False
        self._thinking = self._fresh = start.startswith(THINK)
        if self._thinking:
            self._text = start.removeprefix(THINK)
            self._space.clear()
        return True

    def _hold(self, count: int) -> None:
        """Lets the first characters of the text, which are space, wait where they are not looked at again."""
        if count:
            self._space.append(self._text[:count])
            self._text = self._text[count:]

    def _held(self) -> str:
        """The space that waits, which then waits no more."""
        space = "".join(self._space)
        self._space.clear()
        return space

    def _reasoning(self, last: bool) -> Iterator[Part]:
        place = self._text.find(THOUGHT)
        closed = place >= 0
        if not closed:
            # What may begin the tag waits, with the line ends before it.
            place = len(self._text) if last else len(self._text) - _begun(self._text, (THOUGHT,))
        ends_here = last and not closed
        said = self._text[:place] if ends_here else self._text[:place].rstrip("\n")
        self._text = self._text[len(said) :]
        lines = place - len(said)
        if said or ends_here:
            said = self._held() + said
        self._hold(lines)
        if closed:
            self._space.clear()
            self._text = self._text.removeprefix(THOUGHT)
        said = said.lstrip("\n") if self._fresh else said
        if said:
            self._fresh = False
            yield Part(reasoning=said)
        if closed:
            self._thinking, self._fresh = False, True

    def _content(self, last: bool) -> Iterator[Part]:
        while True:
            if self._opened:
                place = self._text.find(CLOSED_BY[self._opened], self._searched)
                if place < 0 and not last:
                    self._searched = max(0, len(self._text) - len(CLOSED_BY[self._opened]))
                    return
                yield from self._call(place)
                continue
            place, tag = _first(self._text, CLOSED_BY if self._tools is not None else ())
            if tag is None:
                break
            said = self._given(place)
            self._opened, self._gap, self._searched = tag, self._held(), 0
            self._text = self._text[len(tag) :]
            yield from self._said(said)
        if last or self._tools is None:
            said, self._text = self._held() + self._text, ""
        else:  # what may belong to a tag waits, with the space before it
            said = self._given(len(self._text) - _begun(self._text, tuple(CLOSED_BY)))
        yield from self._said(said)

    def _given(self, place: int) -> str:
        """What is before this place of the text, but for the space at its end, which waits."""
        before = self._text[:place]
        said = before.rstrip()
        whole = self._held() + said if said else ""
        self._text = self._text[len(said) :]
        self._hold(place - len(said))
        return whole

    def _said(self, text: str) -> Iterator[Part]:
        text = text.lstrip("\n") if self._fresh else text
        if text:
            self._fresh = False
            yield Part(content=text)

    def _call(self, place: int) -> Iterator[Part]:
        """The call that ends at `place`, or, below 0, with the answer."""
        closing = CLOSED_BY[self._opened] if place >= 0 else ""
        block = self._text[:place] if closing else self._text
        whole = f"{self._gap}{self._opened}{block}{closing}"
        self._text = self._text[len(block) + len(closing) :]
        self._opened = self._gap = ""
        try:
            calls = read_calls(block, self._tools or {})
        except BrokenError:
            calls = None
        if calls is None:
            yield from self._said(whole)
        else:
            self._fresh = True  # the line ends after a call are no content
            yield from (Part(call=call) for call in calls)


def _first(text: str, tags: Mapping[str, str] | tuple[str, ...]) -> tuple[int, str | None]:
    """Where the first of the tags is, and which."""
    found = [(place, tag) for tag in tags if (place := text.find(tag)) >= 0]
    return min(found, default=(-1, None))


def _begun(text: str, tags: tuple[str, ...]) -> int:
    """The length of the longest end of `text` that begins one of `tags`."""
    longest = max(map(len, tags)) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(t.startswith(text[-n:]) for t in tags)), 0)
