"""JSON from outside: what is read, and each kind of refusal, in one line that names the place."""

import json
import re
import time

import pytest

from orogen.config.checks import ConfigError
from orogen.config.json_file import ListOf, MapOf, Record, Whole, check_form, parse_json, read_json


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True, "é\u0000🙂"], "b": {}},
        {"model_max_length": int(1e30), "low": float("-inf")},
        {"text": '[[{"' * 1000 + "\\"},  # brackets in strings add no depth
    ],
)
def test_all_of_json_is_read(tmp_path, value):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(value))
    assert read_json(file) == value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "Expecting value at line 1, column 1; expected JSON"),
        (b'{"a": 1', "at line 1, column 8; expected JSON"),
        (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
        ('{"a": 1}'.encode("utf-16"), "begins with a byte order mark"),
        ('{"a": 1}'.encode("utf-16-le"), "expected JSON"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        (b'{"a\x00": 1}', "Invalid control character"),
        (b'{"a": ' + b"[" * 10**5, "nests more than 64 deep"),
        (b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}", "nests more than 64 deep"),
        (b'{"a": ' * 10**5, "nests more than 64 deep"),
        (b'{"a": ' + b"7" * 5000 + b"}", "an integer has 5000 digits"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"a": "\\udc80"}', "lone surrogate"),
        (b'{"\\uD83D": 1}', "lone surrogate"),
        (b"[1]", "holds list; expected a JSON object"),
    ],
)
def test_malformed_json_is_refused_in_one_line(tmp_path, data, message):
    file = tmp_path / "a.json"
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read_json(file)
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)


def test_an_unterminated_string_does_not_take_quadratic_time():
    data = b'["", {}' + b"{}" * 64 + b'"' + b'\\"' * 200_000
    before = time.process_time()
    with pytest.raises(ConfigError, match="expected JSON"):
        parse_json(data, where="x")
    assert time.process_time() - before < 5  # quadratic time would be 10 minutes


def test_a_name_may_repeat_with_equal_values(tmp_path):
    assert parse_json(b'{"a": [1], "a": [1]}', where="x") == {"a": [1]}


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("orogen.config.json_file.MAX_BYTES", 10)
    (tmp_path / "a.json").write_text('{"abcdefgh": 1}')
    with pytest.raises(ConfigError, match="has 15 bytes; expected at most 10"):
        read_json(tmp_path / "a.json")


FORM = Record({"shape": ListOf(Whole(0, 9)), "kind": (str, None)}, {"ends": ListOf(float, 2), "map": MapOf(str)})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"kind": "a"}, "shape is missing; expected a list of a whole number from 0 to 9"),
        ({"shape": {}, "kind": "a"}, "shape is {}; expected a list"),
        ({"shape": [1, 2.0], "kind": "a"}, "shape[1] is 2.0; expected a whole number"),
        ({"shape": [True], "kind": "a"}, "shape[0] is True; expected a whole number"),
        ({"shape": [10], "kind": "a"}, "shape[0] is 10; expected a whole number from 0 to 9"),
        ({"shape": [-1], "kind": "a"}, "shape[0] is -1; expected"),
        ({"shape": [], "kind": ["a"]}, "kind is ['a']; expected a string or null"),
        ({"shape": [], "kind": "a", "ends": [1]}, "ends is [1]; expected a list of 2, each a number"),
        ({"shape": [], "kind": "a", "map": {"x": None}}, "map.x is None; expected a string"),
        ({"shape": [], "kind": "x" * 10**6, "map": {"x": "y" * 10**6 and 1}}, "map.x is 1"),
        ([], "it is []; expected an object with shape, kind"),
    ],
)
def test_types_are_checked(value, message):
    with pytest.raises(ConfigError, match=re.escape(f"here: {message}")):
        check_form(value, FORM, where="here")


def test_a_nullable_list_or_object_keeps_the_place_in_the_message():
    form = Record({}, {"a": (ListOf(Record({"b": int})), None), "c": (str, ListOf(int))})
    messages = {
        "a[0].b is missing": {"a": [{}]},
        "a[0].b is 'x'; expected a whole": {"a": [{"b": "x"}]},
        "a is {}; expected a list": {"a": {}},
        "c is ['x']; expected a string or a list": {"c": ["x"]},
    }
    for message, value in messages.items():
        with pytest.raises(ConfigError, match=re.escape(message)):
            check_form(value, form, where="here")
    check_form({"a": None}, form, where="here")


def test_what_fits_is_accepted():
    check_form({"shape": [0, 9], "kind": None, "ends": [1, 2.5], "map": {"a": "b"}, "more": object()}, FORM, where="")
    check_form([1], (str, ListOf(int)), where="")
    with pytest.raises(ConfigError, match=r"it is \['a'\]; expected a string or a list of a whole number"):
        check_form(["a"], (str, ListOf(int)), where="here")


def test_a_message_stays_short():
    with pytest.raises(ConfigError) as caught:
        check_form({"a": [["x" * 10**6] * 10**3] * 10**3}, Record({"a": str}), where="here")
    assert len(str(caught.value)) < 1100
