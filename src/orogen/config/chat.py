"""How conversations become training data."""

import dataclasses
from typing import Annotated

from orogen.config.checks import check_types, require, require_choice

TOO_LONG = ("drop", "cut", "refuse")
ASSISTANT, EVERY = LEARNED = ("assistant", "every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Conversations of DataConfig.corpus, one per line of its .jsonl files: {"messages": […], "tools": […]}, as OpenAI
    writes them.

    too_long: a sequence above TrainConfig.sequence_length is dropped, cut at its end, or refused. without_reasoning,
    truncated: drawn by a hash of the conversation's key, so the same ones in every run. A truncated thought keeps a
    uniformly drawn part of its tokens and its answer; the model does not learn to end it, as `</think>` has weight 0
    (Nemotron 3 Nano report, section 3.1: 10 % and 3 %). learned: with every, prompts and the ends of truncated thoughts
    are learned too, as text is in pretraining.
    """

    template: Annotated[str, "the chat template: a file, the name of one of ours, or checkpoint for the model's own"]
    too_long: Annotated[str, "what becomes of sequences that are too long: drop, cut or refuse"] = "drop"
    without_reasoning: Annotated[float, "share of conversations whose reasoning is taken out"] = 0.0
    truncated: Annotated[float, "share of conversations whose reasoning is cut short"] = 0.0

    learned: Annotated[str, "which tokens the loss is on: the assistant's, or every one"] = ASSISTANT

    def __post_init__(self) -> None:
        check_types(self)
        require_choice(self, "learned", LEARNED)
        require(self.template != "", self, "template", "a non-empty string")
        require_choice(self, "too_long", TOO_LONG)
        for field in ("without_reasoning", "truncated"):
            require(0 <= getattr(self, field) <= 1, self, field, "a number from 0 to 1")
        expected = f"at most 1 - without_reasoning = {1 - self.without_reasoning:g}"
        require(self.without_reasoning + self.truncated <= 1, self, "truncated", expected)
