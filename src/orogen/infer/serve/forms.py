"""Bodies of requests: their forms, and what of them goes to the engine."""

import json
from typing import Any

from orogen.config.checks import ConfigError, shown
from orogen.config.json_file import ListOf, MapOf, Number, Record, Whole, fits, read_object
from orogen.infer.request import SEEDS, Budget, Grammar, Request, Sampling
from orogen.infer.serve.errors import bad

MOST_CHOICES = 128
_ID = Whole(0, 2**31 - 1)
_IDS = ListOf(_ID)
_FLAG, _NUMBER, _TEXT = (bool, None), (Number(), None), (str, None)
_FORMAT = Record({"type": str}, {"json_schema": (Record({"schema": dict}), None)})

SAMPLED = {
    "model": _TEXT,
    "max_tokens": (Whole(1, 2**31 - 1), None),
    "n": (Whole(1, MOST_CHOICES), None),
    "best_of": (Whole(1, MOST_CHOICES), None),
    "stream": _FLAG,
    "stream_options": (Record({}, {"include_usage": _FLAG}), None),
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
    "priority": (Whole(-(2**31), 2**31 - 1), None),
    "guided_json": (dict, str, None),
    "guided_regex": _TEXT,
    "structured_outputs": (Record({}, {"json": (dict, str, None), "regex": _TEXT}), None),
    "response_format": (_FORMAT, None),
}
COMPLETION = Record(
    {"prompt": (str, ListOf(str), _IDS, ListOf(_IDS))},
    {**SAMPLED, "echo": _FLAG, "logprobs": (Whole(0, 20), None)},
)
_CALL = Record({"function": Record({"name": str, "arguments": str})}, {"id": _TEXT})
_MESSAGE = Record(
    {"role": str},
    {
        "content": (str, ListOf(Record({"type": str}, {"text": str})), None),
        "reasoning_content": _TEXT,
        "reasoning": _TEXT,
        "tool_calls": (ListOf(_CALL), None),
    },
)
_TOOL = Record({"type": str, "function": Record({"name": str}, {"description": _TEXT, "parameters": (dict, None)})})
CONVERSATION = {
    "tools": (ListOf(_TOOL), None),
    "chat_template_kwargs": (dict, None),
    "add_generation_prompt": _FLAG,
}
CHAT = Record(
    {"messages": ListOf(_MESSAGE)},
    {
        **SAMPLED,
        **CONVERSATION,
        "max_completion_tokens": (Whole(1, 2**31 - 1), None),
        "logprobs": _FLAG,
        "top_logprobs": (Whole(0, 20), None),
        "tool_choice": (str, Record({"type": str, "function": Record({"name": str})}), None),
        "parallel_tool_calls": _FLAG,
        "reasoning_effort": _TEXT,
        "reasoning_budget": (Whole(0, 2**31 - 1), None),
        "reasoning_budget_form": _TEXT,
    },
)
MESSAGES = {"messages": (ListOf(_MESSAGE), None), **CONVERSATION}
TOKENIZE = Record({}, {"model": _TEXT, "prompt": _TEXT, "add_special_tokens": _FLAG, **MESSAGES})
DETOKENIZE = Record({"tokens": _IDS}, {"model": _TEXT})

# Told about the client or its bill, or a default of other servers: nothing about the answer depends on them.
TOLD = {
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity", "modalities",
    "request_id", "cache_salt",
}  # fmt: skip
# What other servers offer and this one does not, with the values that ask for nothing.
NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""), "use_beam_search": (None, False), "min_tokens": (None, 0), "prompt_logprobs": (None,),
    "bad_words": (None, []), "allowed_token_ids": (None,), "include_stop_str_in_output": (None, False),
    "truncate_prompt_tokens": (None,), "length_penalty": (None, 1, 1.0), "functions": (None,), "function_call": (None,),
    "guided_choice": (None,), "guided_grammar": (None,), "prompt_embeds": (None,),
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
    for name, neutral in NOT_OFFERED.items():
        if name in body and not any(type(body[name]) is type(n) and body[name] == n for n in neutral):
            raise bad(f"{name} is {shown(body[name])}; this server does not offer it")
    known = {*form.required, *form.optional, *TOLD, *NOT_OFFERED}
    return {k: v for k, v in body.items() if v is not None}, sorted(body.keys() - known)


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


def request(body: dict[str, Any], prompt: tuple[int, ...], number: int, *, max_tokens: int, **fields: Any) -> Request:
    """Choice `number` of a body. fields: further ones of Request. Raises HttpError."""
    try:
        return Request(
            prompt=prompt,
            max_tokens=max_tokens,
            sampling=sampling(body, number),
            stop=stops(body),
            stop_ids=tuple(body.get("stop_token_ids", ())),
            ignore_eos=body.get("ignore_eos", False),
            priority=body.get("priority", 0),
            **fields,
        )
    except ConfigError as error:
        raise bad(error) from None


def most_new(body: dict[str, Any], default: int) -> int:
    """How many tokens an answer may have."""
    return body.get("max_completion_tokens", body.get("max_tokens", default))


def stops(body: dict[str, Any]) -> tuple[str, ...]:
    """The strings that end an answer."""
    stop = body.get("stop", [])
    return (stop,) if isinstance(stop, str) else tuple(stop)


def choices(body: dict[str, Any]) -> int:
    """How many answers are asked for. Raises HttpError for `best_of`: none is thrown away here."""
    n = body.get("n", 1)
    if body.get("best_of", n) != n:
        raise bad(f"best_of is {body['best_of']}; expected n, {n}: this server throws no answer away")
    return n


def grammar(body: dict[str, Any]) -> Grammar | None:
    """What an answer must match. Raises HttpError for more than one, and for kinds that are not offered."""
    outputs = body.get("structured_outputs", {})
    if other := [name for name, value in outputs.items() if name not in ("json", "regex") and value is not None]:
        raise bad(f"structured_outputs is of {', '.join(other)}; expected json or regex")
    form = body.get("response_format", {"type": "text"})
    found: list[tuple[str, str, Any]] = [
        ("guided_json", "json_schema", body.get("guided_json")),
        ("guided_regex", "regex", body.get("guided_regex")),
        ("structured_outputs.json", "json_schema", outputs.get("json")),
        ("structured_outputs.regex", "regex", outputs.get("regex")),
        ("response_format", "json_schema", _schema(form)),
    ]
    given = [(kind, value) for _, kind, value in found if value is not None]
    if len(given) > 1:
        raise bad(f"{' and '.join(name for name, _, value in found if value is not None)}; expected one of them")
    if not given:
        return None
    kind, value = given[0]
    try:
        return Grammar(kind=kind, text=value if isinstance(value, str) else json.dumps(value))
    except ConfigError as error:
        raise bad(error) from None


def _schema(form: dict[str, Any]) -> dict[str, Any] | None:
    if form["type"] == "json_schema":
        if not form.get("json_schema"):
            raise bad("response_format.json_schema is missing; expected an object with a schema")
        return form["json_schema"]["schema"]
    if form["type"] not in ("text", "json_object"):
        raise bad(f"response_format.type is {shown(form['type'])}; expected text, json_object or json_schema")
    return {"type": "object"} if form["type"] == "json_object" else None


def budget(body: dict[str, Any]) -> Budget | None:
    """How long an answer may think: `reasoning_budget`, also within `chat_template_kwargs`. Raises HttpError."""
    tokens = body.get("reasoning_budget", body.get("chat_template_kwargs", {}).get("reasoning_budget"))
    if tokens is None:
        return None
    if not fits(tokens, Whole(0, 2**31 - 1)):
        raise bad(f"chat_template_kwargs.reasoning_budget is {shown(tokens)}; expected a whole number, 0 or more")
    try:
        return Budget(tokens=tokens, form=body.get("reasoning_budget_form", "hard"))
    except ConfigError as error:
        raise bad(str(error).replace("Budget.form", "reasoning_budget_form")) from None
