"""Answers split into reasoning, content and calls, in any pieces."""

import json
import random
import time

import pytest

from orogen.infer.answer import Answer, Part
from orogen.infer.tool_calls import BrokenError, Call, read_calls, schemas_of, typed

TOOLS = schemas_of(
    [
        {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {
            "text": {"type": "string"}, "most": {"type": "integer"}, "deep": {"type": "boolean"},
            "where": {"type": "array"}, "scale": {"anyOf": [{"type": "number"}, {"type": "null"}]}}}}},
        {"type": "function", "function": {"name": "stop"}},
    ]
)  # fmt: skip
CALL = """<tool_call>
<function=find>
<parameter=text>
7
</parameter>
<parameter=most>
7
</parameter>
</function>
</tool_call>"""
FOUND = Call("find", {"text": "7", "most": 7})


def split(text: str, sizes=(10**6,), **settings) -> tuple[str, str, list[Call]]:
    """Reasoning, content and calls of a text that comes in pieces of these sizes, again and again."""
    answer, parts, place, turn = Answer(**settings), [], 0, 0
    while place < len(text):
        size = sizes[turn % len(sizes)]
        parts += answer.push(text[place : place + size])
        place, turn = place + size, turn + 1
    parts += answer.finish()
    assert Part() not in parts
    return "".join(p.reasoning for p in parts), "".join(p.content for p in parts), [p.call for p in parts if p.call]


@pytest.mark.parametrize(
    ("text", "thinks", "expected"),
    [
        ("so\n</think>\nyes", True, ("so", "yes")),
        ("\nso</think>yes", True, ("so", "yes")),
        ("a\n\nb\n</think>\n\nyes\n", True, ("a\n\nb", "yes\n")),
        ("</think>yes", True, ("", "yes")),
        ("\n</think>\nyes", True, ("", "yes")),
        ("so and so", True, ("so and so", "")),
        ("so </thin", True, ("so </thin", "")),
        ("yes", False, ("", "yes")),
        ("\nyes </think> no", False, ("", "\nyes </think> no")),
        ("<think>so</think>yes", False, ("", "<think>so</think>yes")),
        ("<think>so</think>yes", None, ("so", "yes")),
        (" \n<think></think>yes", None, ("", "yes")),
        (" yes <think>", None, ("", " yes <think>")),
        ("<thin", None, ("", "<thin")),
        ("a</think>b</think>c", True, ("a", "b</think>c")),
        ("", True, ("", "")),
        ("", None, ("", "")),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_reasoning(text, thinks, expected, size):
    assert split(text, [size], thinks=thinks) == (*expected, [])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (CALL, "", [FOUND]),
        (f"Let me look.\n\n{CALL}\n", "Let me look.", [FOUND]),
        (f"{CALL}\n{CALL}\nDone", "Done", [FOUND, FOUND]),
        ("<tool_call>\n<function=stop>\n</function>\n</tool_call>", "", [Call("stop", {})]),
        ("<tool_call><function=stop></function></tool_call>", "", [Call("stop", {})]),
        (CALL.removesuffix("\n</tool_call>"), "", [FOUND]),  # ended by an end token
        ('<TOOLCALL>[{"name": "stop", "arguments": {}}, {"name": "find", "arguments": {"most": 1}}]</TOOLCALL>', "",
         [Call("stop", {}), Call("find", {"most": 1})]),
        ('<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>', "", [Call("stop", {})]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 4, 1000])
def test_calls(text, content, calls, size):
    assert split(text, [size], thinks=False, tools=TOOLS) == ("", content, calls)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n<function=unknown>\n</function>\n</tool_call>",
        "a <tool_call>\n<function=find>\n<parameter=most>\n7\n</function>\n</tool_call> b",
        "<tool_call>\n<function=find>\nwhat\n</function>\n</tool_call>",
        "<tool_call>\n<function=find>\n<parameter=text>\n7",
        "<tool_call></tool_call>",
        '<tool_call>{"name": "stop"',
        '<tool_call>[{"name": 3}]</tool_call>',
        "<tool_call>" + "[" * 10**5 + "</tool_call>",
        '<tool_call>{"name": "stop", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "stop", "arguments": {"a": [1e999]}}</tool_call>',
        '<tool_call>{"name": "stop", "arguments": {"a": -Infinity}}</tool_call>',
        "<tool_",
        "text \n",
    ],
)
@pytest.mark.parametrize("size", [1000, 10**6])
def test_broken_calls_are_text_as_it_stands(text, size):
    assert split(text, [size], thinks=False, tools=TOOLS) == ("", text, [])


def test_without_tools_a_call_is_text():
    assert split(CALL, [2], thinks=False) == ("", CALL, [])


def test_a_call_that_the_prompt_began():
    text = "<parameter=most>\n7\n</parameter>\n</function>\n</tool_call>"
    assert split(text, [3], thinks=False, tools=TOOLS, called="<tool_call>\n<function=find>\n") == (
        "",
        "",
        [Call("find", {"most": 7})],
    )


def test_thinking_then_a_call():
    assert split(f"hm\n</think>\n{CALL}\n", [5], thinks=True, tools=TOOLS) == ("hm", "", [FOUND])


@pytest.mark.parametrize(("begun", "thinks", "space"), [("", None, " \n"), ("a", True, "\n"), ("a", False, "\t\n")])
def test_space_that_waits_is_not_looked_at_again(begun, thinks, space):
    """Else a text of n spaces takes n**2 steps."""
    answer = Answer(thinks=thinks, tools=TOOLS)
    parts = answer.push(begun)
    for _ in range(500):
        parts += answer.push(space)
        assert len(answer._text) < len(space) + 12
    parts += [*answer.push("<"), *answer.push("b"), *answer.finish()]
    text = f"{begun}{space * 500}<b"
    assert "".join(part.reasoning if thinks else part.content for part in parts) == text


def test_text_comes_as_soon_as_it_is_certain():
    answer = Answer(thinks=True, tools=TOOLS)
    assert answer.push("a b") == [Part(reasoning="a b")]
    assert answer.push("</th") == []
    assert answer.push("ere") == [Part(reasoning="</there")]
    assert answer.push("</think>c") == [Part(content="c")]
    assert answer.push(" <tool") == []
    assert answer.push("ing") == [Part(content=" <tooling")]


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("7", {"type": "integer"}, 7), ("7", {"type": "string"}, "7"), ("7", None, "7"), ("7", {}, "7"),
        ("7.5", {"type": "number"}, 7.5), ("7.5", {"type": "integer"}, "7.5"), ("True", {"type": "boolean"}, True),
        ("yes", {"type": "boolean"}, "yes"), ("null", {"type": ["string", "null"]}, None),
        ("7", {"type": ["string", "null"]}, "7"), ('{"a": [1]}', {"type": "object"}, {"a": [1]}),
        ("[1, 2", {"type": "array"}, "[1, 2"), ("NaN", {"type": "number"}, "NaN"), ("1", {"type": "boolean"}, "1"),
        ("1e999", {"type": "number"}, "1e999"), ("[-1e999]", {"type": "array"}, "[-1e999]"),
        ("None", {"anyOf": [{"type": "number"}, {"type": "null"}]}, None), (" a\n b ", {"type": "string"}, " a\n b "),
    ],
)  # fmt: skip
def test_values_are_typed_by_the_schema(text, schema, value):
    found = typed(text, schema)
    assert found == value and type(found) is type(value)


def test_a_value_may_spell_the_end_of_a_value():
    text = "<function=find>\n<parameter=text>\na</parameter> b\n\nc\n</parameter>\n</function>"
    assert read_calls(text, TOOLS) == [Call("find", {"text": "a</parameter> b\n\nc"})]


def test_hostile_values_take_linear_time():
    begin = time.perf_counter()
    with pytest.raises(BrokenError):
        read_calls("<function=find>\n<parameter=text>" + "</parameter>a " * 50_000 + "</function>", TOOLS)
    split("<tool_call>" * 3000 + "</tool_call>" * 3000, [7], thinks=False, tools=TOOLS)
    assert time.perf_counter() - begin < 5


def test_random_texts_lose_nothing_and_do_not_depend_on_their_pieces():
    draw = random.Random(5)
    pieces = ["<think>", "</think>", "\n", " ", "a", "é🙂", "<", "</", "<tool_call>", "</tool_call>", "<TOOLCALL>",
              "</TOOLCALL>", "<function=find>", "<function=x>", "</function>", "<parameter=most>", "<parameter=q>",
              "</parameter>", "7", "{", "}", "[", '{"name": "stop", "arguments": {}}', CALL]  # fmt: skip
    for _ in range(1500):
        text = "".join(draw.choices(pieces, k=draw.randrange(14)))
        settings = {"thinks": draw.choice([True, False, None]), "tools": draw.choice([None, TOOLS])}
        whole = split(text, **settings)
        assert split(text, [draw.randrange(1, 5) for _ in range(4)], **settings) == whole, text
        json.dumps([call.arguments for call in whole[2]])
        if settings["tools"] is None and settings["thinks"] is False:
            assert whole == ("", text, [])
