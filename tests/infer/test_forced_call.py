"""Calls that must be made: what llguidance lets follow their beginning is a call that is read back."""

import json

import pytest
from tests.infer.chats import WEATHER, tokenizer

from orogen.config.checks import ConfigError
from orogen.infer.chat import own_template
from orogen.infer.constrain import Constraints
from orogen.infer.forced_call import beginning
from orogen.infer.tool_calls import Call, read_calls, schemas_of

pytest.importorskip("llguidance")

ELEMENTS, JSON, HERMES = own_template("nemotron_3_nano"), own_template("nemotron_nano_2"), "a template of another kind"


def tool(name: str, parameters: dict | None = None) -> dict:
    return {"type": "function", "function": {"name": name, **({"parameters": parameters} if parameters else {})}}


def properties(**described) -> dict:
    return {"type": "object", "properties": described, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def constraints():
    made = Constraints(tokenizer(), tokenizer().vocab_size)
    yield made
    made.close()


def follows(constraints, rest, text: str) -> bool:
    """Whether all of a text may follow, and nothing after it."""
    matcher = constraints.matcher(rest)
    for token in tokenizer().encode_inside(text).tolist():
        if matcher.advance(token) is not None:
            return False
    return matcher.finished


def made(constraints, tools: list[dict], template: str, text: str) -> list[Call] | None:
    """The calls that a text is after the beginning, None if it may not follow."""
    begun = beginning(tools, template)
    if not follows(constraints, begun.rest, text):
        return None
    whole = begun.text + text
    block = whole.removeprefix("<TOOLCALL>" if "<TOOLCALL>" in template else "<tool_call>")
    return read_calls(block, schemas_of(tools))


CITY = "<parameter=city>\nRome é\n</parameter>\n"


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (f"{CITY}</function>", {"city": "Rome é"}),
        (f"{CITY}<parameter=unit>\né\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>",
         {"city": "Rome é", "unit": "é", "days": 3}),
        (f"{CITY}<parameter=days>\nnull\n</parameter>\n</function>", {"city": "Rome é", "days": None}),
        ("<parameter=city>\na</parameter> <b>\n</p\n</parameter>\n</function>", {"city": "a</parameter> <b>\n</p"}),
        ("<parameter=city>\n\n</parameter>\n</function>", {"city": ""}),
        ("</function>", None),
        (f"{CITY}<parameter=unit>\nF\n</parameter>\n</function>", None),
        (f"{CITY}<parameter=days>\nthree\n</parameter>\n</function>", None),
        (f"{CITY}<parameter=days>\n-3\n</parameter>\n</function>", None),
        (f"{CITY}<parameter=other>\n3\n</parameter>\n</function>", None),
        (f"{CITY}</function>\n", None),
    ],
)  # fmt: skip
def test_elements_follow_the_schema(constraints, text, arguments):
    expected = None if arguments is None else [Call("weather", arguments)]
    assert made(constraints, [WEATHER], ELEMENTS, text) == expected


@pytest.mark.parametrize(("template", "end"), [(JSON, "}]"), (HERMES, "}")])
def test_json_follows_the_schema(constraints, template, end):
    tools = [tool("add", properties(a={"type": "integer"}, b={"type": "boolean"}))]
    assert made(constraints, tools, template, '{"a": 3, "b": true}' + end) == [Call("add", {"a": 3, "b": True})]
    for wrong in ('{"b": true}', '{"a": "3"}', "[]"):
        assert made(constraints, tools, template, wrong + end) is None


@pytest.mark.parametrize("template", [ELEMENTS, JSON, HERMES])
def test_of_several_tools_one_is_called(constraints, template):
    tools = [tool("add", properties(a={"type": "integer"})), tool("stop"), tool("add.more", {"type": "object"})]
    if template == ELEMENTS:
        texts = ["add>\n<parameter=a>\n3\n</parameter>\n</function>", "stop>\n</function>",
                 "add.more>\n<parameter=x y>\n[1]\n</parameter>\n</function>"]  # fmt: skip
    else:
        end = "}]" if template == JSON else "}"
        calls = (("add", {"a": 3}), ("stop", {}), ("add.more", {"x y": "[1]"}))
        texts = [f'{name}", "arguments": {json.dumps(arguments)}{end}' for name, arguments in calls]
    found = [made(constraints, tools, template, text) for text in texts]
    assert found == [[Call("add", {"a": 3})], [Call("stop", {})], [Call("add.more", {"x y": "[1]"})]]
    assert made(constraints, tools, template, texts[0].replace("add", "sub")) is None
    assert made(constraints, tools, template, texts[1].replace("stop", "stop" + "s")) is None


@pytest.mark.parametrize(("template", "end"), [(JSON, "}]"), (HERMES, "}")])
def test_space_within_json_ends(constraints, template, end):
    tools = [tool("add", properties(a={"type": "integer"}))]
    for space in ("", " ", "\n  "):
        assert made(constraints, tools, template, f'{{"a":{space}3}}{end}') == [Call("add", {"a": 3})]
    for space in ("  ", "\n\n", "\n" + " " * 33):
        assert made(constraints, tools, template, f'{{"a":{space}3}}{end}') is None


POINT = {
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/size"}},
    "required": ["x"],
    "additionalProperties": False,
}
DEFINED = {"size": {"type": "number", "minimum": 0}, "point": POINT, "kind": {"enum": ["a", 3]}}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "array", "items": {"type": "integer"}}, "[1, 2]", [1, 2]),
        ({"type": "array", "items": {"type": "integer"}}, '["a"]', None),
        ({"$ref": "#/$defs/point"}, '{"x": 1.5}', {"x": 1.5}),
        ({"$ref": "#/$defs/point"}, '{"x": -1.5}', None),
        ({"$ref": "#/$defs/point"}, "a text", None),
        ({"type": "array", "items": {"$ref": "#/$defs/point"}}, '[{"x": 1}]', [{"x": 1}]),
        ({"$ref": "#/$defs/kind"}, "a", "a"), ({"$ref": "#/$defs/kind"}, "3", 3), ({"$ref": "#/$defs/kind"}, "b", None),
        ({"enum": ["a", 3, True]}, "true", True), ({"enum": ["a", 3, True]}, "4", None),
        ({"const": "a b"}, "a b", "a b"), ({"const": 7}, "7", 7), ({"const": 7}, "8", None),
        ({"type": "number", "maximum": 5}, "2.5", 2.5), ({"type": "number", "maximum": 5}, "7", None),
        ({"type": "number"}, "NaN", None), ({"type": "boolean"}, "true", True), ({"type": "boolean"}, "True", None),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "null", "none"),
        ({"type": ["string", "object"]}, "any text", "any text"), ({"$ref": "#/$defs/other"}, "any text", "any text"),
    ],
)  # fmt: skip
def test_arguments_that_are_no_text_are_json_of_their_schema(constraints, schema, text, value):
    parameters = {**properties(a=schema), "$defs": DEFINED}
    found = made(constraints, [tool("f", parameters)], ELEMENTS, f"<parameter=a>\n{text}\n</parameter>\n</function>")
    assert found == (None if value is None else [Call("f", {"a": None if value == "none" else value})])


def test_definitions_in_circles_end():
    parameters = {**properties(a={"$ref": "#/$defs/b"}), "$defs": {"b": {"anyOf": [{"$ref": "#/$defs/b"}] * 2}}}
    assert schemas_of([tool("f", parameters)])["f"]["a"]["$defs"] == parameters["$defs"]
    assert "text" in beginning([tool("f", parameters)], ELEMENTS).rest.text


@pytest.mark.parametrize("name", ["a<b", "a>", "a\nb", "a\x7f", " a"])
def test_names_that_a_tag_cannot_hold_are_refused(name):
    tools = [tool("f", {"type": "object", "properties": {name: {"type": "string"}}})]
    with pytest.raises(ConfigError, match="parameters.properties has .*; expected a name without <, >") as raised:
        beginning(tools, ELEMENTS)
    assert "\n" not in str(raised.value)
    assert beginning(tools, JSON).rest.text
