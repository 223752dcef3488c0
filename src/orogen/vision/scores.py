"""Scores of captions against references: BLEU, ROUGE-L and CIDEr, on words in lower case without punctuation.

pycocoevalcap's scores with its own tokenizer, which needs Java, differ where that splits words otherwise.
"""

import collections
import math
import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+(?:['’]\w+)*")
ROUGE_BETA = 1.2  # of the COCO captions' evaluation
CIDER_LENGTHS = 4
SIGMA = 6.0  # of CIDEr-D's penalty for a difference in length

Counts = collections.Counter


def words(text: str) -> list[str]:
    """The words of a caption."""
    return _WORD.findall(text.casefold())


def ngrams(tokens: Sequence[str], n: int) -> Counts:
    """How often each sequence of n words occurs."""
    return collections.Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]], n: int = 4) -> float:
    """BLEU-n of a corpus: the geometric mean of clipped precisions times the brevity penalty with the closest
    reference's length, the shorter of two equally close; 0 if a precision is. Source: Papineni et al., 2002."""
    matched, total, have, wanted = [0] * n, [0] * n, 0, 0
    for caption, known in zip(captions, references, strict=True):
        found, truths = words(caption), [words(one) for one in known]
        have += len(found)
        wanted += min((abs(len(one) - len(found)), len(one)) for one in truths)[1]
        for k in range(1, n + 1):
            counts, most = ngrams(found, k), collections.Counter()
            for one in truths:
                most |= ngrams(one, k)
            matched[k - 1] += sum((counts & most).values())
            total[k - 1] += max(0, len(found) - k + 1)
    if not all(matched):
        return 0.0
    mean = sum(math.log(m / t) for m, t in zip(matched, total, strict=True)) / n
    return math.exp(mean + min(0.0, 1 - wanted / have))


def rouge_l(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The mean over captions of ROUGE-L: F with β = 1.2 of the longest common subsequence's precision and recall, each
    the best of the references, as the COCO captions' evaluation has it. Source: Lin, 2004."""
    found = []
    for caption, known in zip(captions, references, strict=True):
        mine, truths = words(caption), [words(one) for one in known]
        common = [_common(mine, one) for one in truths]
        precision = max((c / len(mine) for c in common), default=0.0) if mine else 0.0
        recall = max((c / len(one) for c, one in zip(common, truths, strict=True) if one), default=0.0)
        both = precision * recall
        found.append((1 + ROUGE_BETA**2) * both / (recall + ROUGE_BETA**2 * precision) if both else 0.0)
    return sum(found) / max(len(found), 1)


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for place, second in enumerate(other, 1):
            before, row[place] = row[place], before + 1 if word == second else max(row[place], row[place - 1])
    return row[-1]


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D of a corpus, from 0 to 10: cosine of TF-IDF weighted n-grams, clipped to the reference's, with a Gaussian
    penalty for length, averaged over n = 1 to 4, references and captions. Document frequencies are those of the images'
    references. Source: arXiv:1411.5726, section 8, and pycocoevalcap's `cider_scorer.py` with sigma 6."""
    truths = [[_lengths(words(one)) for one in known] for known in references]
    frequency: Counts = collections.Counter()
    for known in truths:
        frequency.update({gram for one in known for counts in one for gram in counts})
    rare = math.log(max(len(truths), 1))
    total = 0.0
    for caption, known in zip(captions, truths, strict=True):
        mine = _lengths(words(caption))
        scores = [_similarity(mine, one, frequency, rare) for one in known]
        total += 10 * sum(scores) / max(len(scores), 1)
    return total / max(len(captions), 1)


def _lengths(tokens: Sequence[str]) -> list[Counts]:
    return [ngrams(tokens, n) for n in range(1, CIDER_LENGTHS + 1)]


def _similarity(mine: list[Counts], known: list[Counts], frequency: Counts, rare: float) -> float:
    difference = sum(mine[0].values()) - sum(known[0].values())
    penalty = math.exp(-(difference**2) / (2 * SIGMA**2))
    total = 0.0
    for counts, truth in zip(mine, known, strict=True):
        one, other = (
            {gram: n * (rare - math.log(max(1.0, frequency[gram]))) for gram, n in c.items()} for c in (counts, truth)
        )
        norm = math.hypot(*one.values()) * math.hypot(*other.values())
        shared = sum(min(weight, other[gram]) * other[gram] for gram, weight in one.items() if gram in other)
        total += penalty * shared / norm if norm else 0.0
    return total / CIDER_LENGTHS


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """All of them by name."""
    return {
        "cider": cider(captions, references), "rouge_l": rouge_l(captions, references),
        **{f"bleu_{n}": bleu(captions, references, n) for n in (1, 4)},
    }  # fmt: skip
