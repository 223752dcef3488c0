"""Makes a config's generated suites with a tokenizer, has a model answer them, and writes them to files."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from orogen.config.checks import ConfigError
from orogen.config.evaluate import SCORED, WRITTEN, EvaluateConfig
from orogen.config.files import write_atomically
from orogen.data.sources import read_text
from orogen.data.tokenizer import Tokenizer
from orogen.evaluate.likelihood import Row, Score
from orogen.evaluate.subject import Prompt, Subject
from orogen.evaluate.suites import recall, texts
from orogen.evaluate.suites.example import Draft, Fitted, answer_ids, generator, question_of, room, row_of

Draw = Callable[[np.random.Generator, int], Draft]
BARE = {"mqar": recall.mqar, "induction": recall.induction, "copying": recall.copying}
# Times that a common word and another one come, from RULER's to those of the shortest lists.
FREQUENCIES = ((30, 3), (10, 1), (4, 1))


class Part(NamedTuple):
    """One suite at one length."""

    task: str
    length: int


def run_suites(subject: Subject, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """The metrics of generated suites, by task; see `orogen.evaluate.suites`. Raises ConfigError for a length that is
    too short for a suite, or longer than the model's positions."""
    config, results = subject.config, {task: {} for task in tasks}
    parts = [Part(task, length) for task in tasks for length in config.lengths]
    scored = [part for part in parts if part.task in SCORED]
    # All examples first: a length that is too short is refused before anything is computed.
    rows = {part: rows_of(part, subject.tokenizer, config) for part in scored}
    written = {part: drafts_of(part, subject.tokenizer, config) for part in parts if part.task in WRITTEN}
    scores = iter(subject.score([row for part in scored for row in rows[part]]))  # together, in full batches
    for part in scored:
        found = accuracies([next(scores) for _ in rows[part]])
        results[part.task] |= {f"{name}@{part.length}": value for name, value in found.items()}
    for part, drafts in written.items():
        found = _recalls(subject, drafts)
        results[part.task] |= {f"{name}@{part.length}": value for name, value in found.items()}
    return results


def rows_of(part: Part, tokenizer: Tokenizer, config: EvaluateConfig) -> list[Row]:
    """The examples of a suite in SCORED."""
    if part.task not in BARE:
        return [row_of(tokenizer, draft) for draft in drafts_of(part, tokenizer, config)]
    ids_v, make = plain_ids(tokenizer), BARE[part.task]
    return [
        make(generator(config.seed, part.task, part.length, number), ids_v, start=tokenizer.bos_id, length=part.length)
        for number in range(config.samples)
    ]


def plain_ids(tokenizer: Tokenizer) -> np.ndarray:
    """The ids that stand for text."""
    return np.flatnonzero(tokenizer.is_token_v & (tokenizer.byte_length_v > 0))


def drafts_of(part: Part, tokenizer: Tokenizer, config: EvaluateConfig) -> list[Draft]:
    """The examples of a suite of text. Each has, with its answer or the continuation that holds it, at most `length`
    tokens, and as many items as fit."""
    written = part.task in WRITTEN

    def size(draft: Draft) -> int:
        answer = room(tokenizer, draft) if written else len(answer_ids(tokenizer, draft))
        return len(tokenizer.prompt_ids(draft.prompt)) + answer

    fitted = None
    for draw, least in _draws(part.task, config):
        fitted = Fitted(part.task, draw, size, length=part.length, least=least)
        if size(draw(generator(config.seed, part.task, part.length, 0), least)) <= part.length:
            break
    assert fitted is not None
    return [fitted.make(config.seed, number) for number in range(config.samples)]


def accuracies(scores: Sequence[Score]) -> dict[str, float]:
    """Metrics of examples that are scored in one pass."""
    asked = sum(score.asked for score in scores)
    return {
        "accuracy": sum(score.greedy for score in scores) / len(scores),
        "token_accuracy": sum(score.hits for score in scores) / asked,
        "nats": -sum(score.log_likelihood for score in scores) / asked,
    }


def export_suites(folder: Path, tokenizer: Tokenizer, config: EvaluateConfig, tasks: Sequence[str]) -> list[Path]:
    """Writes `TASK_LENGTH.jsonl` for every suite and length, one example per line: `ids` and `asked`, the places of the
    tokens that are asked for; and, of suites of text, `prompt` and `answers`. For these also `TASK_LENGTH.yaml`, a task
    of lm-eval that asks for the answers' log-likelihood, and so whether greedy decoding writes them in this order.
    Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for part in (Part(task, length) for task in tasks for length in config.lengths):
        name, drafts = f"{part.task}_{part.length}", None
        if part.task in BARE:
            rows = rows_of(part, tokenizer, config)
        else:
            drafts = drafts_of(part, tokenizer, config)
            rows = [row_of(tokenizer, draft) for draft in drafts]
        lines = [{"ids": row.tokens_t.tolist(), "asked": np.flatnonzero(row.asked_t).tolist()} for row in rows]
        for line, draft in zip(lines, drafts or (), strict=False):
            line |= {"prompt": draft.prompt, "answers": list(draft.answers), "target": " " + ", ".join(draft.answers)}
        file = folder / f"{name}.jsonl"
        write_atomically(file, "".join(json.dumps(line) + "\n" for line in lines).encode())
        written.append(file)
        if drafts is not None:
            written.append(folder / f"{name}.yaml")
            write_atomically(written[-1], _task_text(name, file).encode())
    return written


def _task_text(name: str, file: Path) -> str:
    """A task of lm-eval."""
    metrics = "".join(f"  - metric: {metric}\n" for metric in ("acc", "perplexity"))
    data = json.dumps(str(file.resolve()))
    return (
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
        f"test_split: test\noutput_type: loglikelihood\ndoc_to_text: prompt\ndoc_to_target: target\n"
        f'target_delimiter: ""\nmetric_list:\n{metrics}'
    )


def _recalls(subject: Subject, drafts: Sequence[Draft]) -> dict[str, float]:
    """Metrics of examples that are continued."""
    tokenizer = subject.tokenizer
    questions = [question_of(tokenizer, draft) for draft in drafts]
    found = subject.write([Prompt(tuple(tokenizer.prompt_ids(q.prompt)), q.tokens) for q in questions])
    shares = [share(q.answers, text) for q, text in zip(questions, found, strict=True)]
    return {"recall": sum(shares) / len(shares), "accuracy": sum(s == 1 for s in shares) / len(shares)}


def share(answers: Sequence[str], text: str) -> float:
    """The share of the answers that occur in the text, whatever their case."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)


def _draws(task: str, config: EvaluateConfig) -> list[tuple[Draw, int]]:
    """How a suite draws an example of so many items, and the fewest: the first way whose fewest fit is taken."""
    if task == "common_words":
        return [(partial(texts.common_words, often=a, seldom=b), texts.COMMON) for a, b in FREQUENCIES]
    if task == "needle":
        return [(partial(texts.needle, haystack=_hay(config.haystack)), 1)]
    return {
        "phonebook": [(texts.phonebook, 1 + texts.SHOTS)],
        "phonebook_reversed": [(partial(texts.phonebook, reverse=True), 1 + texts.SHOTS)],
        "variable_tracking": [(texts.variable_tracking, 1)],
        "frequent_words": [(texts.frequent_words, 20)],
        "document_qa": [(texts.document_qa, 2)],
    }[task]


def _hay(file: str | None) -> list[str] | None:
    """The words of a text file; None: the suite's own sentences."""
    if file is None:
        return None
    if not (hay := read_text(Path(file)).split()):
        raise ConfigError(f"EvaluateConfig.haystack {file!r} has no words; expected a text")
    return hay
