"""Texts beside the sources: those that the classifier learns from, and the evaluation sets."""

import heapq
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from orogen.config.checks import ConfigError
from orogen.config.curate import ClassifyConfig, DecontaminateConfig
from orogen.data.curate import classifier
from orogen.data.curate.inputs import listed
from orogen.data.curate.read import SEPARATOR, Broken, read_input

HELD_OUT = 10  # one document in so many


def train_classifier(config: ClassifyConfig, text_field: str) -> tuple[classifier.Weights, dict[str, Any]]:
    """The weights, and what the report says: documents of each kind, and the quality on the held-out ones.

    Raises ConfigError if a kind has fewer than 2 documents.
    """
    broken: list[Broken] = []
    good = chosen_texts(config.good, "good", config, text_field, broken.append)
    bad = chosen_texts(config.bad, "bad", config, text_field, broken.append)
    texts, good_n = good + bad, np.arange(len(good) + len(bad)) < len(good)
    # Each kind is in the order of its hashes, so every tenth is a random tenth.
    position_n = np.r_[np.arange(len(good)), np.arange(len(bad))]
    held_n = position_n % HELD_OUT == HELD_OUT - 1
    weights = classifier.train([t for t, held in zip(texts, held_n, strict=True) if not held], good_n[~held_n], config)
    facts: dict[str, Any] = {"good": len(good), "bad": len(bad), "broken": broken, "threshold": config.threshold}
    if held_n.any():
        held = [classifier.probability(text, weights, config) for text, out in zip(texts, held_n, strict=True) if out]
        accuracy, area = classifier.quality(np.array(held), good_n[held_n], config.threshold)
        facts |= {"held_out": int(held_n.sum()), "accuracy": accuracy, "area": None if np.isnan(area) else area}
    return weights, facts


def chosen_texts(
    paths: Sequence[str], kind: str, config: ClassifyConfig, text_field: str, report: Callable[[Broken], None]
) -> list[str]:
    """The texts of at most `max_documents` documents, those whose ids have the smallest hashes, in that order."""
    best: list[tuple[int, str, str]] = []
    for file in listed(paths, kind):
        for document in read_input(file, text_field=text_field, report=report):
            digest = int.from_bytes(blake2b(document.id.encode(), digest_size=8).digest(), "little")
            entry = (-digest, document.id, document.text)
            if len(best) < config.max_documents:
                heapq.heappush(best, entry)
            else:
                heapq.heappushpop(best, entry)
    if len(best) < 2:
        raise ConfigError(f"ClassifyConfig.{kind} is {paths!r}, with {len(best)} documents; expected at least 2")
    return [text for _, _, text in sorted(best, reverse=True)]


def evaluation_texts(config: DecontaminateConfig, report: Callable[[Broken], None]) -> Iterator[str]:
    """Every text of the evaluation sets: of a record, each string in any field."""
    for file in listed(config.evaluation, "evaluation"):
        for document in read_input(file, text_field=None, report=report):
            yield from document.text.split(SEPARATOR)
