"""What each kind of environment rewards, on tasks and answers by hand."""

import json
import sys

import pytest
from tests.posttrain.environments.tasks import lines, made, reward

from orogen.config.checks import ConfigError
from orogen.posttrain.environments import workplace
from orogen.posttrain.environments.interface import Said
from orogen.posttrain.environments.synthetic import FAMILIES


def solved(family, question):
    """The answer, worked out from the text of the question alone."""
    word = question.replace("=", "").replace(":", "").split()
    match family:
        case "addition":
            return str(sum(map(int, word[0].split("+"))))
        case "arithmetic":
            return str(eval(" ".join(word)))
        case "largest":
            return max(word[1:])
        case "parity":
            return str(word[1].count("1") % 2)
        case "copy":
            return word[1]
        case "reversal":
            return "".join(reversed(word[1]))
        case "sorting":
            return " ".join(map(str, sorted(map(int, word[1:]))))
    return str(sum(letter == word[1] for letter in word[3]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_synthetic_answer_is_what_its_question_asks_for(family):
    environment = made("synthetic", family=family, level=3, examples=40, partial_credit=0.25)
    questions = [environment.example(number).messages[0]["content"] for number in range(40)]
    assert len(set(questions)) > 5 and len(environment) == 40
    for number, question in enumerate(questions):
        answer = solved(family, question)
        assert reward(environment, f" {answer}\n", number) == 1
        assert reward(environment, f"3 or 4? Answer: {answer}", number) == 1
        assert reward(environment, f"{answer}?", number) == 0
    wrong = {"parity": "1" if solved(family, questions[0]) == "0" else "0"}.get(family, "77" * 9)
    wrong = "q" if family in ("copy", "reversal") else wrong
    assert reward(environment, wrong) == 0.25


def test_an_unknown_family_is_refused():
    with pytest.raises(ConfigError, match="EnvironmentConfig.family is 'chess'; expected one of addition"):
        made("synthetic", family="chess")


def test_json_must_be_of_its_schema(tmp_path):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    environment = made("json_schema", corpus=lines(tmp_path, {"prompt": "p", "schema": schema}))
    good = ['{"a": 1, "b": 2}', ' {"a": 1}\n', '```json\n{"a": 3}\n```']
    bad = ['{"a": 1.5}', "{}", '{"a": 1} {"a": 2}', "the answer", "", "[" * 10**5]
    bad += ['{"a": 1, "b": NaN}', '{"a": 1, "b": [-Infinity]}']
    assert [reward(environment, text) for text in good + bad] == [1] * 3 + [0] * 8
    generated = made("json_schema", level=2)
    assert "schema" in generated.example(1).messages[0]["content"] and reward(generated, "{}", 1) == 0
    with pytest.raises(ConfigError, match="the schema of task 1 is none"):
        made("json_schema", corpus=lines(tmp_path, {"prompt": "p", "schema": {"type": "int"}}))


FOLLOWED = [
    ({"name": "words", "most": 3}, "one two three", "one two three four"),
    ({"name": "sentences", "least": 2}, "A b. C d!", "A b, 3.5 c."),
    ({"name": "paragraphs", "least": 2, "most": 2}, "a\n\nb", "a\nb"),
    ({"name": "bullets", "least": 2}, "* a\n- b", "*a\n- b"),
    ({"name": "keyword", "word": "sea", "least": 2}, "Sea, sea.", "seas sea"),
    ({"name": "without", "word": "sea"}, "seas", "the Sea"),
    ({"name": "letter", "letter": "q", "most": 1}, "Quit", "q Q"),
    ({"name": "lowercase"}, "a b", "a B"),
    ({"name": "uppercase"}, "A 1", "A b"),
    ({"name": "no_commas"}, "a; b", "a, b"),
    ({"name": "starts", "phrase": "So"}, " So it is", "Thus"),
    ({"name": "ends", "phrase": "end."}, "the end.\n", "end. P.S."),
    ({"name": "title"}, "<<On rain>>\nx", "<<>>"),
    ({"name": "placeholders", "least": 2}, "[a] and [b c]", "[a] and []"),
    ({"name": "highlights"}, "an *important* word", "a **bold** word"),
    ({"name": "quoted"}, '"a"', '"'),
    ({"name": "json"}, '{"a": 1}', "{a: 1}"),
]


@pytest.mark.parametrize(
    ("check", "good", "bad"), FOLLOWED, ids=lambda one: one.get("name") if isinstance(one, dict) else ""
)
def test_an_instruction_is_followed_or_not(tmp_path, check, good, bad):
    environment = made("instructions", corpus=lines(tmp_path, {"prompt": "p", "checks": [check]}))
    assert (reward(environment, good), reward(environment, bad), reward(environment, " ")) == (1, 0, 0)


def test_an_unknown_check_is_refused(tmp_path):
    for check in ({"name": "rhymes"}, {"name": "words", "least": 1, "colour": 2}):
        with pytest.raises(ConfigError, match="checks of task 1"):
            made("instructions", corpus=lines(tmp_path, {"prompt": "p", "checks": [check]}))
    with pytest.raises(ConfigError, match=r"checks of task 1 is \[\]; expected at least one"):
        made("instructions", corpus=lines(tmp_path, {"prompt": "p", "checks": []}))


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "tasks.jsonl:1"), ('{"prompt": "a"}', "tasks.jsonl:1: expected one of tests, check"), ("", "has no task")],
)
def test_malformed_tasks_are_refused(tmp_path, line, message):
    (tmp_path / "tasks.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match=message):
        made("code", corpus=str(tmp_path / "tasks.jsonl"), unsandboxed=True)


def test_workplace_rewards_the_state_that_the_task_asks_for():
    environment = made("workplace", level=2, examples=30, turns=3)
    for number in range(30):
        example = environment.example(number)
        calls = tuple(map(tuple, example.secret["calls"]))
        state = json.loads(json.dumps(environment.start(example)))
        one = environment.step(example, state, Said("", calls=calls[:1]))
        assert one.rewards is None and [reply["role"] for reply in one.replies] == ["tool"]
        two = environment.step(example, one.state, Said("", calls=calls[1:]))
        assert environment.step(example, two.state, Said("done")).rewards == {"state": 1.0}
        assert environment.step(example, environment.start(example), Said("done")).rewards == {"state": 0.0}
        assert environment.step(example, one.state, Said("done")).rewards == {"state": 0.0}


def test_workplace_says_what_is_wrong_with_a_call_and_changes_nothing():
    environment = made("workplace", turns=2)
    example = environment.example(3)
    state = environment.start(example)
    bad = [
        ("fly", {}), ("set_ticket", {"ticket": "t0"}), ("set_ticket", {"ticket": "t9", "state": "done"}),
        ("create_meeting", {"title": "a", "person": "p0", "day": "monday", "hour": "9"}),
        ("cancel_meeting", {"meeting": "m0", "why": "rain"}),
        ("move_meeting", {"meeting": "m1", "day": "may", "hour": 9}),
    ]  # fmt: skip
    turn = environment.step(example, state, Said("", calls=bad))
    assert all("error" in json.loads(reply["content"]) for reply in turn.replies)
    assert turn.state["database"] == environment.start(example)["database"]
    assert environment.step(example, turn.state, Said("", calls=bad)).rewards == {"state": 0.0}  # the last turn


def test_a_meeting_needs_a_free_hour():
    db = {"people": {"p0": {}}, "meetings": {"m0": {"title": "a", "person": "p0", "day": "friday", "hour": 9}}}
    new = {"title": "b", "person": "p0", "day": "friday", "hour": 9}
    with pytest.raises(workplace.RefusedError, match="p0 has the meeting m0 then"):
        workplace.call(db, "create_meeting", new)
    workplace.call(db, "move_meeting", {"meeting": "m0", "day": "friday", "hour": 10})
    assert workplace.call(db, "create_meeting", new)["id"] == "m1"
    workplace.call(db, "cancel_meeting", {"meeting": "m0"})
    assert [row["id"] for row in workplace.call(db, "list_meetings", {})] == ["m1"]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"expected `pip install 'orogen\[rl\]'`"):
        made("reasoning_gym", family="chain_sum")


GYM = """
from reasoning_gym import families
def create_dataset(name, size, seed):
    return getattr(families, name)()
"""
FAMILY = """
class Base:
    def __len__(self): return 3
    def __getitem__(self, number): return {"question": "q", "answer": "4"}
class n_queens(Base):
    def score_answer(self, answer, entry): return float(SCORE)
"""


@pytest.mark.parametrize("score", ["eval(answer) == 4", "sympy.parse_expr(answer) == 4", "int(answer) == 4"])
def test_a_scorer_that_runs_the_answer_is_refused(tmp_path, monkeypatch, score):
    package = tmp_path / "reasoning_gym"
    package.mkdir()
    (package / "__init__.py").write_text(GYM)
    (package / "families.py").write_text(
        "import types\nsympy = types.SimpleNamespace(parse_expr=int)\n" + FAMILY.replace("SCORE", score)
    )
    for name in ("reasoning_gym", "reasoning_gym.families"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    if "(answer)" in score and not score.startswith("int"):
        with pytest.raises(
            ConfigError, match="EnvironmentConfig.family is 'n_queens', whose module calls .*unsandboxed"
        ):
            made("reasoning_gym", family="n_queens")
    trusted = not score.startswith("int")
    assert reward(made("reasoning_gym", family="n_queens", unsandboxed=trusted), "<answer>4</answer>") == 1
    for name in ("reasoning_gym", "reasoning_gym.families"):
        del sys.modules[name]
