"""A tokenizer with the specials of Nemotron 3 and of Nano 2, and chats, that several tests share."""

import functools

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from orogen.data.tokenizer import Tokenizer

SPECIALS = (
    "<unk>", "<s>", "</s>", "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>", "<|im_start|>", "<|im_end|>", "<think>",
    "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
)  # fmt: skip


@functools.cache
def backend() -> tokenizers.Tokenizer:
    """Byte-level BPE with a few merges."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=list(SPECIALS))
    made.train_from_iterator(["the user asks the assistant about the weather in the city"] * 3, trainer)
    return made


@functools.cache
def tokenizer() -> Tokenizer:
    """The backend as a Tokenizer, which ends texts with `</s>` and `<|im_end|>`."""
    end_ids = [backend().token_to_id("<|im_end|>")]
    own = tokenizers.Tokenizer.from_str(backend().to_str())  # which it changes to keep specials out of texts
    return Tokenizer(own, pad="<unk>", bos="<s>", eos="</s>", end_ids=end_ids)


def ids_of(*parts: str) -> list[int]:
    """Ids of specials and of text between them, each part one or the other."""
    ids = []
    for part in parts:
        special = backend().token_to_id(part) if part in SPECIALS else None
        ids += [special] if special is not None else backend().encode(part, add_special_tokens=False).ids
    return ids


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": " What the sky does. ",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where "},
                "unit": {"type": "string", "enum": ["C", "é"], "default": "C"},
                "days": {"type": ["integer", "null"], "minimum": 1, "items": {"a": 1}},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
