"""Our chat templates, against texts written by hand from what the models were trained on."""

import pytest
from tests.infer.chats import WEATHER

from orogen.infer.chat import own_template
from orogen.infer.template_worker import render

INSTRUCTION = """

If you choose to call a function ONLY reply in the following format with NO suffix:

<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
<parameter=example_parameter_2>
This is the value for the second parameter
that can span
multiple lines
</parameter>
</function>
</tool_call>

<IMPORTANT>
Reminder:
- Function calls MUST follow the specified format: an inner <function=...></function> block must be nested within \
<tool_call></tool_call> XML tags
- Required parameters MUST be specified
- You may provide optional reasoning for your function call in natural language BEFORE the function call, but NOT after
- If there is no function call available, answer the question like normal with your current knowledge and do not tell \
the user about function calls
</IMPORTANT>"""
TOOLS = (
    """# Tools

You have access to the following functions:

<tools>
<function>
<name>weather</name>
<description>What the sky does.</description>
<parameters>
<parameter>
<name>city</name>
<type>string</type>
<description>Where</description>
</parameter>
<parameter>
<name>unit</name>
<type>string</type>
<enum>["C", "é"]</enum>
<default>C</default>
</parameter>
<parameter>
<name>days</name>
<type>['integer', 'null']</type>
<minimum>1</minimum>
<items>{"a": 1}</items>
</parameter>
<additionalProperties>False</additionalProperties>
<required>["city"]</required>
</parameters>
<strict>True</strict>
</function>
</tools>"""
    + INSTRUCTION
)
NANO, LIGHTNING, NANO_2 = "nemotron_3_nano", "nemotron_3_5_lightning", "nemotron_nano_2"


def say(name: str, messages: list, **variables) -> str:
    return render(own_template(name), {"messages": messages, "add_generation_prompt": True, **variables})


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def tool(text):
    return {"role": "tool", "content": text}


def assistant(text, reasoning=None, calls=()):
    calls = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    return {"role": "assistant", "content": text, "reasoning_content": reasoning, "tool_calls": calls or None}


@pytest.mark.parametrize("name", [NANO, LIGHTNING])
def test_a_system_turn_is_always_there(name):
    begin = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\nhi <b><|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert say(name, [user("hi <b>")]) == begin.format("")
    assert say(name, [system("Be kind."), user("hi <b>")]) == begin.format("Be kind.")


@pytest.mark.parametrize("name", [NANO, LIGHTNING])
def test_tools_follow_the_system_text(name):
    rest = "<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert say(name, [user("hi")], tools=[WEATHER]) == f"<|im_start|>system\n{TOOLS}{rest}"
    assert say(name, [system("S"), user("hi")], tools=[WEATHER]) == f"<|im_start|>system\nS\n\n{TOOLS}{rest}"
    assert say(name, [user("hi")], tools=[WEATHER["function"]]) == f"<|im_start|>system\n{TOOLS}{rest}"


@pytest.mark.parametrize("name", [NANO, LIGHTNING])
def test_without_thinking_the_answer_begins_at_once(name):
    assert say(name, [user("hi")], enable_thinking=False).endswith("<|im_start|>assistant\n<think></think>")
    assert say(name, [user("hi")], add_generation_prompt=False).endswith("hi<|im_end|>\n")


def test_the_options_of_nano_come_in_one_variable_too():
    text = say(NANO, [user("hi")], chat_template_kwargs={"enable_thinking": False, "reasoning_budget": 7})
    assert text.endswith("hi\n\n{thinking token budget: 7}<|im_end|>\n<|im_start|>assistant\n<think></think>")


def test_the_budget_is_said_after_the_last_users_text_only():
    text = say(NANO, [user("a"), assistant("b"), user("c"), tool("d")], reasoning_budget=0)
    assert text == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think></think>b<|im_end|>\n"
        "<|im_start|>user\nc\n\n{thinking token budget: 0}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nd\n</tool_response>\n<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert "budget" not in say(LIGHTNING, [user("a")], reasoning_budget=7)


def test_medium_effort_is_lightnings():
    text = say(LIGHTNING, [user("a"), assistant("b"), user("c")], medium_effort=True)
    assert text.endswith(
        "<|im_start|>user\nc\n\n{reasoning effort: efficient}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert text.count("efficient") == 1
    assert "efficient" not in say(NANO, [user("a")], medium_effort=True)


@pytest.mark.parametrize(
    ("name", "message", "past", "kept"),
    [
        (NANO, assistant("A", "R"), "<think></think>\nA", "<think>\nR\n</think>\nA"),
        (LIGHTNING, assistant("A", "R"), "<think></think>A", "<think>\nR</think>A"),
        (NANO, assistant("A"), "<think></think>A", "<think></think>A"),
        (NANO, assistant("A", "  "), "<think></think>A", "<think></think>A"),
        (NANO, assistant("<think>R</think>A</think>B"), "<think></think>B", "<think>R</think>A</think>B"),
        (NANO, assistant(""), "<think></think>", "<think></think>"),
        (NANO, assistant(None, "R"), "<think></think>", "<think>\nR\n</think>"),
    ],
)
def test_thinking_before_the_last_user_turn_is_dropped(name, message, past, kept):
    turn = "<|im_start|>assistant\n{}<|im_end|>\n"
    chat = [user("a"), message, user("b")]
    assert turn.format(past) in say(name, chat)
    assert turn.format(kept) in say(name, chat, truncate_history_thinking=False)
    assert turn.format(kept) in say(name, [user("a"), message])


CALLED = (
    '<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n[1, "é"]\n</parameter>\n'
)
CALLED += "<parameter=far>\nTrue\n</parameter>\n<parameter=n>\nNone\n</parameter>\n</function>\n</tool_call>\n"
ARGUMENTS = {"city": "Rome", "days": [1, "é"], "far": True, "n": None}


def test_calls_keep_their_thinking_in_several_steps_and_results_share_a_turn():
    steps = [assistant("Look.", "R", [("weather", ARGUMENTS), ("stop", {})]), tool("x"), tool("y"), assistant("Sun.")]
    stop = "<tool_call>\n<function=stop>\n</function>\n</tool_call>\n"
    results = (
        "<|im_start|>user\n<tool_response>\nx\n</tool_response>\n<tool_response>\ny\n</tool_response>\n<|im_end|>\n"
        "<|im_start|>assistant\n<think></think>Sun.<|im_end|>\n"
    )
    kept = f"<|im_start|>assistant\n<think>\nR\n</think>\nLook.\n{CALLED}{stop}<|im_end|>\n{results}"
    assert kept in say(NANO, [user("a"), *steps])
    past = f"<|im_start|>assistant\n<think></think>Look.\n{CALLED}{stop}<|im_end|>\n{results}"
    assert past in say(NANO, [user("a"), *steps, user("b")])


@pytest.mark.parametrize("before", [[], [system("S")]])
def test_a_result_that_nothing_precedes_opens_no_turn(before):
    """Nor does it in the models' own templates."""
    text = say(NANO, [*before, tool("x"), tool("y"), user("a")])
    opened = (
        "<tool_response>\nx\n</tool_response>\n<tool_response>\ny\n</tool_response>\n<|im_end|>\n<|im_start|>user\na"
    )
    assert f"{'S' if before else ''}<|im_end|>\n{opened}" in text


@pytest.mark.parametrize(
    ("name", "content", "past"),
    [
        (NANO, "A<think>R", "<think></think>A"),
        (NANO, "<think>R</think>\n A ", "<think></think>A"),
        (LIGHTNING, "<think>R</think>\n A", "<think></think>\n A"),
        (NANO, "", "<think></think>"),
    ],
)
def test_thinking_of_past_calls(name, content, past):
    text = say(name, [user("a"), assistant(content, None, [("stop", {})]), user("b")])
    assert f"<|im_start|>assistant\n{past}\n<tool_call>\n<function=stop>\n" in text


def test_nano_2():
    assert say(NANO_2, [user(" hi ")]) == "<SPECIAL_10>System\n\n<SPECIAL_11>User\nhi\n<SPECIAL_11>Assistant\n<think>\n"
    chat = [system("Be kind. /no_think"), user("a"), assistant("<think>R</think> A "), user("b")]
    expected = (
        "<SPECIAL_10>System\nBe kind.\n<SPECIAL_11>User\na\n<SPECIAL_11>Assistant\nA\n<SPECIAL_12>\n"
        "<SPECIAL_11>User\nb\n"
    )
    assert say(NANO_2, chat) == f"{expected}<SPECIAL_11>Assistant\n<think></think>"
    assert say(NANO_2, chat, enable_thinking=True) == f"{expected}<SPECIAL_11>Assistant\n<think>\n"
    assert say(NANO_2, [*chat[:-1], user("b /think")]) == f"{expected}<SPECIAL_11>Assistant\n<think>\n"
    assert say(NANO_2, chat, add_generation_prompt=False) == expected
    begun = [*chat, assistant("Well")]
    assert say(NANO_2, begun) == f"{expected}<SPECIAL_11>Assistant\n<think></think>Well"
    assert say(NANO_2, begun, add_generation_prompt=False) == (
        f"{expected}<SPECIAL_11>Assistant\n<think></think>Well\n<SPECIAL_12>\n"
    )


def test_nano_2_with_tools():
    calls = [("weather", {"city": "é"}), ("stop", {})]
    chat = [
        system("S"),
        user("a"),
        assistant("Look.", None, calls),
        tool("x"),
        tool("y"),
        assistant(None, None, calls[1:]),
    ]
    assert say(NANO_2, chat, tools=[{"type": "function", "function": {"name": "stop"}}, {"name": "b"}]) == (
        "<SPECIAL_10>System\nS\n\nYou can use the following tools to assist the user if required:\n"
        '<AVAILABLE_TOOLS>[{"name": "stop"}, {"name": "b"}]</AVAILABLE_TOOLS>\n\n'
        "If you decide to call any tool(s), use the following format:\n"
        '<TOOLCALL>[{{"name": "tool_name1", "arguments": "tool_args1"}}, '
        '{{"name": "tool_name2", "arguments": "tool_args2"}}]</TOOLCALL>\n\n'
        "The user will execute tool-calls and return responses from tool(s) in this format:\n"
        '<TOOL_RESPONSE>[{{"tool_response1"}}, {{"tool_response2"}}]</TOOL_RESPONSE>\n\n'
        "Based on the tool responses, you can call additional tools if needed, correct tool calls if any errors are "
        "found, or just respond to the user.\n<SPECIAL_11>User\na\n<SPECIAL_11>Assistant\nLook.\n\n"
        '<TOOLCALL>[{"name": "weather", "arguments": {"city": "é"}}, {"name": "stop", "arguments": {}}]</TOOLCALL>\n'
        "<SPECIAL_12>\n<SPECIAL_11>User\n<TOOL_RESPONSE>[x, y]</TOOL_RESPONSE>\n"
        '<SPECIAL_11>Assistant\n<TOOLCALL>[{"name": "stop", "arguments": {}}]</TOOLCALL>\n<SPECIAL_12>\n'
        "<SPECIAL_11>Assistant\n<think>\n"
    )
