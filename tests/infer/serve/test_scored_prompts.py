"""`/v1/completions` with log-probabilities of the prompt: echoed, as vLLM tells them, and as lm-eval reads them."""

import pytest
from tests.infer.fake_engine import FakeEngine
from tests.infer.serve.harness import saying, worded
from tests.infer.serve.test_completions import complete


def logprob(token: int) -> float:
    return -token / 10


def test_an_echo_has_those_of_its_tokens():
    """Two prompts, whose answers have one token, as lm-eval asks for them: `ctxlen` tokens of each are the context."""
    engine = FakeEngine(logprob=logprob)
    body = {"prompt": [[5, 6, 7], [8, 9]], "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    choices = complete(engine, **body).json["choices"]
    assert [request.prompt_logprobs for request in engine.seen] == [1, 1]
    assert choices[0]["logprobs"] == {
        "tokens": ["token_id:5", "token_id:6", "token_id:7", "token_id:5"],
        "token_logprobs": [None, -0.6, -0.7, -0.5],
        "top_logprobs": [
            None, {"token_id:0": -1.0, "token_id:6": -0.6}, {"token_id:0": -1.0, "token_id:7": -0.7},
            {"token_id:0": -1.0, "token_id:5": -0.5},
        ],
        "text_offset": [0, 10, 20, 30],
    }  # fmt: skip
    # What lm-eval 0.4.9 does with it (lm_eval/models/openai_completions.py, LocalCompletionsAPI.parse_logprobs).
    read = []
    for choice, ctxlen in zip(choices, (1, 1), strict=True):
        logprobs = choice["logprobs"]["token_logprobs"][ctxlen:-1]
        tops = choice["logprobs"]["top_logprobs"][ctxlen:-1]
        greedy = all(value == max(top.values()) for value, top in zip(logprobs, tops, strict=True))
        read.append((sum(logprobs), greedy))
    assert read == [(pytest.approx(-1.3), True), (pytest.approx(-0.9), True)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_may_be_scored_alone(stream):
    reply = complete(
        worded(logprob=logprob), prompt="the user", max_tokens=0, echo=True, logprobs=0, stream=stream, _words=True
    )
    assert reply.status == 200
    (choice,) = (reply.events[0] if stream else reply.json)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("the user", "length")
    told = choice["logprobs"]
    assert "".join(told["tokens"][-2:]) == "the user" and told["token_logprobs"][0] is None
    assert [top and list(top.values()) for top in told["top_logprobs"]] == [
        None if value is None else [value] for value in told["token_logprobs"]
    ]
    if not stream:
        assert reply.json["usage"]["completion_tokens"] == 0


def test_a_stream_echoes_them_first_and_once():
    reply = complete(worded(script=saying("b"), logprob=logprob), prompt="a ", echo=True, logprobs=1, stream=True,
                     max_tokens=9, _words=True)  # fmt: skip
    told = [choice["logprobs"] for event in reply.events for choice in event["choices"]]
    tokens = [token for one in told for token in one["tokens"]]
    assert told[0]["token_logprobs"][0] is None and "".join(tokens).count("a") == 1
    offsets = [place for one in told for place in one["text_offset"]]
    assert offsets == sorted(offsets) and offsets[0] == 0


def test_prompt_logprobs_as_vllm_tells_them():
    """Also beside an echo with fewer of the likeliest tokens."""
    body = {"prompt": [5, 6, 1], "prompt_logprobs": 2, "max_tokens": 2, "echo": True, "logprobs": 1}
    (choice,) = complete(FakeEngine(logprob=logprob), **body).json["choices"]
    likeliest = {
        "0": {"logprob": -1.0, "rank": 1, "decoded_token": "token_id:0"},
        "1": {"logprob": -2.0, "rank": 2, "decoded_token": "token_id:1"},
    }
    six = {"logprob": -0.6, "rank": None, "decoded_token": "token_id:6"}
    assert choice["prompt_logprobs"] == [None, {"6": six, **likeliest}, likeliest]
    assert choice["logprobs"]["top_logprobs"][1] == {"token_id:0": -1.0, "token_id:6": -0.6}
    (plain,) = complete(prompt=[5, 6], max_tokens=1).json["choices"]
    assert "prompt_logprobs" not in plain


class Backwards(FakeEngine):
    """Tells the last choice first."""

    def step(self):
        return super().step()[::-1]


def test_choices_share_the_scores_of_their_prompt():
    """Which are computed once where choices have tokens, with the first choice."""
    body = {"prompt": [[5, 6, 7], [8, 9]], "echo": True, "logprobs": 0, "prompt_logprobs": 1, "max_tokens": 1}
    for more, scored in (
        ({"n": 2}, [1, None]), ({"best_of": 3}, [1, None, None]), ({"n": 2, "max_tokens": 0}, [1, 1]),
        ({"n": 2, "stream": True}, [1, None]), ({"n": 3, "stream": True, "max_tokens": 2}, [1, None, None]),
    ):  # fmt: skip
        engine = Backwards(logprob=logprob)
        reply = complete(engine, **body | more)
        assert [request.prompt_logprobs for request in engine.seen] == scored * 2
        told = reply.events if "stream" in more else [reply.json]
        firsts = [one for event in told for one in event["choices"] if "prompt_logprobs" in one]
        firsts.sort(key=lambda one: one["index"])
        n = more.get("n", 1)
        assert [len(one["prompt_logprobs"]) for one in firsts] == [3] * n + [2] * n
        assert [one["logprobs"]["token_logprobs"][:2] for one in firsts] == [[None, -0.6]] * n + [[None, -0.9]] * n
