"""What a model is evaluated on, after training or while it trains."""

import dataclasses
from typing import Annotated

from orogen.config.checks import check_types, require, require_choice, require_positive

# Suites that Orogen generates with the model's own tokenizer; every other task is one of lm-eval.
SCORED = ("mqar", "induction", "copying", "phonebook", "phonebook_reversed")
WRITTEN = ("needle", "variable_tracking", "common_words", "frequent_words", "document_qa")
SUITES = (*SCORED, *WRITTEN)
METHODS = ("windows", "carried")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Tasks and texts that a model is evaluated on.

    tasks: names of generated suites (mqar, induction, copying, phonebook, phonebook_reversed, needle,
    variable_tracking, common_words, frequent_words, document_qa), or names and patterns of tasks of lm-eval.
    task_path: a task's YAML may name Python functions, which lm-eval runs; a name that is found here is no other task.
    method: windows predicts each token from those before it in its own window; carried, from the whole document, whose
    states, keys and values are carried from piece to piece.
    max_length: longer requests of lm-eval lose their beginning, as with its own models, and are counted. None: as many
    tokens as the model has learned positions, at most 2048; 512 for a piece; for a request, what the checkpoint's
    config.json or tokenizer says, as in lm-eval's own models. A run that trains has no such file: its requests are as
    long as windows, so bind max_length where `orogen evaluate` is to read the same.
    """

    tasks: Annotated[tuple[str, ...], "generated suites, and tasks of lm-eval"]
    every: Annotated[
        int | None, "training steps between evaluations, a multiple of TrainConfig.evaluate_every; None: the same"
    ] = None
    lengths: Annotated[tuple[int, ...], "tokens of each example of a generated suite, its answer included"] = (256,)
    samples: Annotated[int, "examples of a generated suite per length"] = 100
    seed: Annotated[int, "decides the examples of generated suites"] = 0
    haystack: Annotated[str | None, "text file that hides the needles; None: sentences that repeat"] = None
    task_path: Annotated[tuple[str, ...], "folders with tasks of lm-eval, in place of those that it comes with"] = ()
    limit: Annotated[int | None, "documents per task of lm-eval; None: all"] = None
    shots: Annotated[int | None, "examples before each document; None: as the task says"] = None
    texts: Annotated[tuple[str, ...], "files or folders whose bits per byte are measured; see orogen.data"] = ()
    text_field: Annotated[str, "the key (jsonl) or column (Parquet) that holds the text"] = "text"
    method: Annotated[str, "how texts longer than max_length are read: windows or carried"] = "windows"
    stride: Annotated[int | None, "tokens that each further window predicts; None: half of max_length"] = None
    score_ends: Annotated[bool, "whether the token that ends a document is predicted too, as in training"] = False
    max_length: Annotated[int | None, "tokens of a window or piece, and the most of a request; None: see the class"] = (
        None
    )
    batch_tokens: Annotated[int, "tokens that are scored together"] = 8192

    def __post_init__(self) -> None:
        check_types(self)
        for field in ("tasks", "lengths", "task_path", "texts"):
            object.__setattr__(self, field, tuple(getattr(self, field)))  # gin may give lists
        require(bool(self.tasks or self.texts), self, "tasks", "at least one, or EvaluateConfig.texts")
        for field in ("tasks", "lengths", "texts"):
            values = getattr(self, field)
            require(len(set(values)) == len(values), self, field, "each once")
            require("" not in values, self, field, "names that are not empty")
        require(
            bool(self.lengths) and min(self.lengths) > 1, self, "lengths", "at least one length of 2 tokens or more"
        )
        require_positive(self, "every", "samples", "limit", "stride", "batch_tokens")
        require(self.shots is None or self.shots >= 0, self, "shots", "0 or more")
        require(0 <= self.seed < 2**32, self, "seed", "an integer from 0 to 2**32 - 1")
        require(
            self.max_length is None or self.max_length > 1, self, "max_length", "at least 2: a token and its target"
        )
        require_choice(self, "method", METHODS)
        within = self.max_length is None or self.stride is None or self.stride < self.max_length
        require(
            within, self, "stride", f"less than max_length = {self.max_length}: a window's first token has no target"
        )

    @property
    def generated(self) -> tuple[str, ...]:
        """The tasks that are suites of Orogen, unless a folder has a task of that name."""
        return tuple(task for task in self.tasks if task in SUITES)
