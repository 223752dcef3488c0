"""What is learned of a conversation, spelled out: the text whose tokens have weight 1."""

import dataclasses

import numpy as np
import pytest
from tests.infer.chats import WEATHER, tokenizer

from orogen.config.checks import ConfigError
from orogen.infer.chat import Chat, own_template
from orogen.infer.messages import check_messages
from orogen.posttrain.conversations import Conversation, cut_short, sequences, without_reasoning

# Every turn is rendered alike whatever follows, as in ChatML.
PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" \
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"  # fmt: skip


@pytest.fixture(scope="module")
def nano():
    chat = Chat(tokenizer(), own_template("nemotron_3_nano"))
    yield chat
    chat.close()


def say(role, content="", **more):
    return {"role": role, "content": content, **more}


def conversation(*messages, tools=()):
    return Conversation(check_messages(list(messages)), list(tools))


def spelled(ids):
    names = tokenizer().specials
    return "".join(str(names[i]) if i in names else tokenizer().decode([i]) for i in np.asarray(ids).tolist())


def learned(stream):
    """The text of each run of learned tokens."""
    edges = np.flatnonzero(np.diff(np.pad(stream.weights_t, 1)))
    return [spelled(stream.tokens_t[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def test_an_answer_is_learned_up_to_the_end_of_its_turn(nano):
    (stream,) = sequences(conversation(say("user", "Hi"), say("assistant", "Hello", reasoning_content="a guest")), nano)
    assert learned(stream) == ["a guest\n</think>\nHello<|im_end|>"]
    assert spelled(stream.tokens_t) == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n<think>\na guest\n</think>\nHello<|im_end|>\n"
    )


def test_without_a_thought_the_end_of_thinking_is_learned(nano):
    (stream,) = sequences(conversation(say("user", "Hi"), say("assistant", "Hello")), nano)
    assert learned(stream) == ["</think>Hello<|im_end|>"]


def test_a_turn_whose_thinking_is_dropped_later_is_a_sequence_of_its_own(nano):
    streams = sequences(
        conversation(
            say("user", "a"), say("assistant", "b", reasoning_content="first"),
            say("user", "c"), say("assistant", "d", reasoning_content="second"),
        ), nano,
    )  # fmt: skip
    assert [learned(stream) for stream in streams] == [
        ["first\n</think>\nb<|im_end|>"], ["second\n</think>\nd<|im_end|>"],
    ]  # fmt: skip
    assert "first" not in spelled(streams[1].tokens_t) and "b" in spelled(streams[1].tokens_t)


def test_turns_that_stay_as_they_were_are_one_sequence(nano):
    (stream,) = sequences(
        conversation(say("user", "a"), say("assistant", "b"), say("user", "c"), say("assistant", "d")), nano
    )
    assert learned(stream) == ["</think>b<|im_end|>", "</think>d<|im_end|>"]


def test_calls_and_what_follows_them_are_learned_and_results_are_not(nano):
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    streams = sequences(
        conversation(
            say("system", "Be brief."), say("user", "Rain?"),
            say("assistant", None, reasoning_content="ask", tool_calls=[call]), say("tool", "dry"),
            say("assistant", "No.", reasoning_content="so"), tools=[WEATHER],
        ), nano,
    )  # fmt: skip
    assert len(streams) == 1 and learned(streams[0]) == [
        "ask\n</think>\n<tool_call>\n<function=weather>\n<parameter=city>\nBern\n</parameter>\n</function>\n</tool_call>"
        "\n<|im_end|>",
        "so\n</think>\nNo.<|im_end|>",
    ]
    assert "<name>weather</name>" in spelled(streams[0].tokens_t)


def test_a_plain_template_makes_one_sequence_of_all_turns():
    chat = Chat(tokenizer(), PLAIN)
    (stream,) = sequences(
        conversation(say("user", "a"), say("assistant", "b  "), say("user", "c"), say("assistant", "")), chat
    )
    assert learned(stream) == ["b  <|im_end|>", "<|im_end|>"]
    chat.close()


def test_nothing_after_the_last_answer_is_kept(nano):
    whole = conversation(say("user", "a"), say("assistant", "b"), say("user", "c"))
    (stream,) = sequences(whole, nano)
    assert "c" not in spelled(stream.tokens_t).removeprefix("<|im_start|>system") and learned(stream) == [
        "</think>b<|im_end|>"
    ]


def test_a_template_that_rewrites_a_message_of_the_turn_is_refused():
    rewriting = "{{ messages | length }}" + PLAIN
    chat = Chat(tokenizer(), rewriting)
    with pytest.raises(ConfigError, match=r"renders messages\[:2\] otherwise once others follow"):
        sequences(conversation(say("user", "a"), say("assistant", "b")), chat)
    chat.close()


def test_a_thought_that_was_cut_short_is_not_learned_to_end(nano):
    whole = conversation(say("user", "a"), say("assistant", "b", reasoning_content="one two three four"))
    half = cut_short(whole, 0.5, nano)
    count = len(tokenizer().encode("one two three four"))
    kept = tokenizer().decode(tokenizer().encode("one two three four")[: count // 2].tolist())
    assert half.messages[1]["reasoning_content"] == kept and half.cut_thoughts == {1}
    (stream,) = sequences(half, nano)
    assert "</think>" not in "".join(learned(stream)) and "</think>" in spelled(stream.tokens_t)
    assert "".join(learned(stream)).replace("\n", "") == kept + "b<|im_end|>"
    assert whole.messages[1]["reasoning_content"] == "one two three four"


def test_without_reasoning_a_message_is_as_if_it_never_had_any(nano):
    whole = conversation(say("user", "a"), say("assistant", "b", reasoning_content="long"))
    plain = conversation(say("user", "a"), say("assistant", "b"))
    (one,), (other,) = sequences(without_reasoning(whole), nano), sequences(plain, nano)
    np.testing.assert_array_equal(one.tokens_t, other.tokens_t)


def test_the_text_tells_conversations_apart():
    one = conversation(say("user", "a"), say("assistant", "b"))
    assert one.text != dataclasses.replace(one, tools=[WEATHER]).text


def test_a_call_whose_result_ends_the_conversation_is_learned(nano):
    call = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
    (stream,) = sequences(
        conversation(say("user", "Rain?"), say("assistant", None, tool_calls=[call]), say("tool", "dry")), nano
    )
    assert learned(stream) == ["</think>\n<tool_call>\n<function=weather>\n</function>\n</tool_call>\n<|im_end|>"]
    assert "dry" not in spelled(stream.tokens_t)
