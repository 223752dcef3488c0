"""Bodies of requests: their forms, and what of them goes to the engine."""

from collections.abc import Callable
from typing import Any

from orogen.config.checks import ConfigError, shown
from orogen.config.json_file import ListOf, MapOf, Number, Record, Whole, fits, read_object
from orogen.infer.messages import MESSAGE, TOOL
from orogen.infer.request import SEEDS, Budget, Output, Request, Sampling, held_back
from orogen.infer.serve.errors import bad
from orogen.infer.serve.structured import FIELDS

MOST_CHOICES = 128
_ID = Whole(0, 2**31 - 1)
_IDS = ListOf(_ID)
_FLAG, _NUMBER, _TEXT = (bool, None), (Number(), None), (str, None)

SAMPLED = {
    "model": _TEXT,
    "max_tokens": (Whole(1, 2**31 - 1), None),
    "min_tokens": (Whole(0, 2**31 - 1), None),
    "n": (Whole(1, MOST_CHOICES), None),
    "stream": _FLAG,
    "stream_options": (Record({}, {"include_usage": _FLAG, "continuous_usage_stats": _FLAG}), None),
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "top_k": (Whole(-1, 2**31 - 1), None),
    "min_p": _NUMBER,
    "presence_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
    "repetition_penalty": _NUMBER,
    "logit_bias": (MapOf(Number()), None),
    "seed": (Whole(-(2**63), 2**63 - 1), None),
    "stop": (str, ListOf(str), None),
    "stop_token_ids": (_IDS, None),
    "ignore_eos": _FLAG,
    "return_token_ids": _FLAG,
    "cache_salt": _TEXT,
    "priority": (Whole(-(2**31), 2**31 - 1), None),
    "include_stop_str_in_output": _FLAG,
    **FIELDS,
}
COMPLETION = Record(
    {"prompt": (str, ListOf(str), _IDS, ListOf(_IDS))},
    {
        **SAMPLED,
        "max_tokens": (Whole(0, 2**31 - 1), None),  # 0: the prompt alone is scored
        "best_of": (Whole(1, MOST_CHOICES), None),
        "echo": _FLAG,
        "logprobs": (Whole(0, 20), None),
        "prompt_logprobs": (Whole(0, 20), None),
        "return_routed_experts": _FLAG,
    },
)
_NAMED = Record({"name": str})
_ALLOWED = Record({"mode": str, "tools": ListOf(Record({"type": str}, {"function": _NAMED}))})
_CHOICE = Record({"type": str}, {"function": _NAMED, "allowed_tools": _ALLOWED})
CONVERSATION = {
    "tools": (ListOf(TOOL), None),
    "chat_template_kwargs": (dict, None),
    "add_generation_prompt": _FLAG,
}
CHAT = Record(
    {"messages": ListOf(MESSAGE)},
    {
        **SAMPLED,
        **CONVERSATION,
        "max_completion_tokens": (Whole(1, 2**31 - 1), None),
        "logprobs": _FLAG,
        "top_logprobs": (Whole(0, 20), None),
        "tool_choice": (str, _CHOICE, None),
        "parallel_tool_calls": _FLAG,
        "reasoning_effort": _TEXT,
        "reasoning_budget": (Whole(0, 2**31 - 1), None),
        "reasoning_budget_form": _TEXT,
    },
)
MESSAGES = {"messages": (ListOf(MESSAGE), None), **CONVERSATION}
TOKENIZE = Record(
    {}, {"model": _TEXT, "prompt": _TEXT, "add_special_tokens": _FLAG, "return_token_strs": _FLAG, **MESSAGES}
)
DETOKENIZE = Record({"tokens": _IDS}, {"model": _TEXT})

# Told about the client or its bill, or a default of other servers: nothing about the answer depends on them.
TOLD = {
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity", "modalities",
    "request_id",
}  # fmt: skip
# What other servers offer and this one does not, with the values that ask for nothing.
NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""), "use_beam_search": (None, False), "prompt_logprobs": (None,),
    "bad_words": (None, []), "allowed_token_ids": (None,),
    "truncate_prompt_tokens": (None,), "length_penalty": (None, 1, 1.0), "functions": (None,), "function_call": (None,),
    "prompt_embeds": (None,),
    "continue_final_message": (None, False), "chat_template": (None,), "documents": (None,), "audio": (None,),
    "web_search_options": (None,),
    "logits_processors": (None, []),
}  # fmt: skip


def read(data: bytes, form: Record) -> tuple[dict[str, Any], list[str]]:
    """The fields of a body that are not null, and the names of those that nothing here knows.

    Raises HttpError with status 400.
    """
    try:
        body = read_object(data, form, where="the body")
    except ConfigError as error:
        raise bad(error) from None
    missing = {name: neutral for name, neutral in NOT_OFFERED.items() if name not in form.optional}
    for name, neutral in missing.items():
        if name in body and not any(type(body[name]) is type(n) and body[name] == n for n in neutral):
            raise bad(f"{name} is {shown(body[name])}; this server does not offer it")
    fields = {*form.required, *form.optional}
    # What no form has checked goes no further.
    found = {name: value for name, value in body.items() if name in fields and value is not None}
    return found, sorted(body.keys() - fields - TOLD - NOT_OFFERED.keys())


def sampling(body: dict[str, Any], number: int) -> Sampling:
    """How choice `number` of a body is sampled. Choices of one seed differ: each adds its number. Raises HttpError."""
    names = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    fields = {name: float(body[name]) for name in names if name in body}
    bias = body.get("logit_bias", {})
    if odd := [key for key in bias if not (key.isascii() and key.isdigit() and len(key) < 10)]:
        raise bad(f"logit_bias is given for {shown(odd[0])}; expected the ids of tokens")
    seed = body.get("seed")
    try:
        return Sampling(
            **fields,
            top_k=max(0, body.get("top_k", 0)),  # -1 says "all" too, as vLLM has it
            logit_bias=tuple((int(key), float(value)) for key, value in bias.items()),
            seed=None if seed is None else (seed + number) % SEEDS,
        )
    except ConfigError as error:
        raise bad(error) from None


def request(
    body: dict[str, Any], prompt: tuple[int, ...], number: int, end_ids: frozenset[int], **fields: Any
) -> Request:
    """Choice `number` of a body. end_ids: the tokenizer's. fields: further ones of Request. Raises HttpError."""
    try:
        asked = Request(
            prompt=prompt,
            min_tokens=body.get("min_tokens", 0),
            sampling=sampling(body, number),
            stop=stops(body),
            stop_ids=tuple(body.get("stop_token_ids", ())),
            ignore_eos=body.get("ignore_eos", False),
            priority=body.get("priority", 0),
            **fields,
        )
        return held_back(asked, end_ids)
    except ConfigError as error:
        raise bad(str(error).replace("Request.stop_ids", "stop_token_ids")) from None


def streams(body: dict[str, Any]) -> bool:
    """Whether the answer is a stream. Raises HttpError for options of a stream that there is not."""
    if not (stream := body.get("stream", False)) and "stream_options" in body:
        raise bad("stream_options is given without stream; expected stream true")
    return stream


def salt(body: dict[str, Any]) -> str:
    """What keeps the body's cached prefixes apart from those of other salts, so that the time of an answer tells nobody
    else what was asked."""
    return body.get("cache_salt", "")


def most_new(body: dict[str, Any], default: int) -> int:
    """How many tokens an answer may have."""
    return body.get("max_completion_tokens", body.get("max_tokens", default))


def stops(body: dict[str, Any]) -> tuple[str, ...]:
    """The strings that end an answer."""
    stop = body.get("stop", [])
    return (stop,) if isinstance(stop, str) else tuple(stop)


class Counts:
    """What the chunks of a stream tell of counted tokens. wanted: whether a last chunk tells them. usage: as counted by
    then."""

    def __init__(self, body: dict[str, Any], usage: Callable[[], dict[str, Any]]) -> None:
        options = body.get("stream_options", {})
        self.wanted = bool(options.get("include_usage"))
        self._always, self._usage = self.wanted and bool(options.get("continuous_usage_stats")), usage

    def of_chunk(self) -> dict[str, Any]:
        """The field of a chunk before the last, which has one only where counts are wanted."""
        return {"usage": self._usage() if self._always else None} if self.wanted else {}


def said(body: dict[str, Any], output: Output) -> str:
    """The text that an output adds, with the stop string that ended it if the body asks for that."""
    stop = output.stop if body.get("include_stop_str_in_output") and isinstance(output.stop, str) else ""
    return output.text + stop


def budget(body: dict[str, Any]) -> Budget | None:
    """How long an answer may think: `reasoning_budget`, also within `chat_template_kwargs`. Raises HttpError."""
    tokens = body.get("reasoning_budget", body.get("chat_template_kwargs", {}).get("reasoning_budget"))
    if tokens is None:
        if "reasoning_budget_form" in body:
            raise bad(
                f"reasoning_budget_form is {shown(body['reasoning_budget_form'])}; expected reasoning_budget beside it"
            )
        return None
    if not fits(tokens, Whole(0, 2**31 - 1)):
        raise bad(f"chat_template_kwargs.reasoning_budget is {shown(tokens)}; expected a whole number, 0 or more")
    try:
        return Budget(tokens=tokens, form=body.get("reasoning_budget_form", "hard"))
    except ConfigError as error:
        raise bad(str(error).replace("Budget.form", "reasoning_budget_form")) from None
