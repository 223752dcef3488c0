"""Suites of text: a phone book, and the tasks of RULER (arXiv:2404.06654) with contexts that are made up here.

Each function draws one example with so many items, from random numbers: see `example.Fitted`.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from orogen.evaluate.suites.example import Draft, words

SHOTS = 2  # solved look-ups before the one that is asked for
HOPS = 4  # assignments after the first one of a chain
COMMON = 10  # words that are more common than all others
FREQUENT = 3  # words that are asked for where frequencies follow Zipf's law
ZIPF = 2.0
NOISE = (
    "The river is wide. The hills are far away. We set out at noon. The road goes on.",
    "Rain fell all night. The lamps were lit. Nobody came by. The clock struck nine.",
)
BUILDINGS = ("library", "harbour", "theatre", "mill", "bridge", "museum", "observatory", "market")


def phonebook(rng: np.random.Generator, items: int, *, reverse: bool = False) -> Draft:
    """A phone book of `items` entries and solved look-ups; the number of one more person is asked for. reverse: the
    question comes before the book too, so that a model can read the book for it.

    Source: arXiv:2406.07887 (An Empirical Study of Mamba-based Language Models), after arXiv:2402.01032.
    """
    drawn = words(rng)
    names = [f"{next(drawn).title()} {next(drawn).title()}" for _ in range(items)]
    numbers = [f"{a}-{b}-{c}" for a, b, c in rng.integers((200, 100, 1000), (1000, 1000, 10000), (items, 3))]
    chosen = rng.choice(items, min(items, 1 + SHOTS), replace=False)
    look_up = lambda i: f"What is the number of {names[i]}?\nAnswer:"  # noqa: E731
    book = "\n".join(f"{name}: {number}" for name, number in zip(names, numbers, strict=True))
    shots = "".join(f"{look_up(i)} {numbers[i]}\n" for i in chosen[1:])
    asked = look_up(chosen[0])
    first = f"{asked.splitlines()[0]}\n" if reverse else ""
    return Draft(f"{first}Phone book\n{book}\n\n{shots}{asked}", (numbers[chosen[0]],))


def needle(rng: np.random.Generator, items: int, *, haystack: Sequence[str] | None = None) -> Draft:
    """A number hidden at a random depth of a text of `items` sentences, or words of `haystack`, which is repeated.

    Source: arXiv:2404.06654, section 3.1 (single needle; keys are words, values numbers).
    """
    key, value = next(words(rng, syllables=3)), str(rng.integers(10**6, 10**7))
    hay = list(itertools.islice(itertools.cycle(haystack or NOISE[:1]), items))
    hay.insert(int(rng.integers(items + 1)), f"The secret number of {key} is {value}.")
    question = f"What is the secret number of {key} that this text mentions?"
    prompt = f"A secret number is hidden in this text. Remember it.\n\n{' '.join(hay)}\n\n{question}\nAnswer: it is"
    return Draft(prompt, (value,))


def variable_tracking(rng: np.random.Generator, items: int) -> Draft:
    """A chain of assignments, in order, at random places among `items` sentences. All variables that have the value are
    asked for.

    Source: arXiv:2404.06654, section 3.2 (one chain; HOPS hops).
    """
    drawn, value = words(rng, syllables=2), str(rng.integers(10**4, 10**5))
    names = [next(drawn).upper() for _ in range(HOPS + 1)]
    chain = [f"VAR {names[0]} = {value}"] + [f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(names)]
    indices = np.sort(rng.integers(0, items + 1, len(chain))).tolist()
    lines: list[str] = []
    for place in range(items + 1):
        lines += [line for line, at in zip(chain, indices, strict=True) if at == place]
        lines += [NOISE[place % 2]] * (place < items)
    question = f"Which variables have the value {value}, at first or by assignment? There are {len(names)}."
    prompt = f"Follow the assignments in this text.\n\n{chr(10).join(lines)}\n\n{question}\nAnswer:"
    return Draft(prompt, tuple(names))


def common_words(rng: np.random.Generator, items: int, *, often: int = 30, seldom: int = 3) -> Draft:
    """A numbered list of words in random order: COMMON of them `often` times, `items` others `seldom` times. The common
    ones are asked for.

    Source: arXiv:2404.06654, section 3.3 (30 and 3 times, 10 common words).
    """
    drawn = words(rng)
    common = list(itertools.islice(drawn, COMMON))
    listed = common * often + list(itertools.islice(drawn, items)) * seldom
    order = rng.permutation(len(listed))
    text = " ".join(f"{number}. {listed[i]}" for number, i in enumerate(order, 1))
    question = f"Which {COMMON} words are the most common in the list?"
    return Draft(
        f"Here is a list of words. Remember which ones come often.\n\n{text}\n\n{question}\nAnswer:", tuple(common)
    )


def frequent_words(rng: np.random.Generator, items: int) -> Draft:
    """`items` coded words whose frequencies follow Zipf's law; the most frequent one is noise, and the FREQUENT next
    ones are asked for.

    Source: arXiv:2404.06654, section 3.3 (exponent 2.0, three words). Frequencies are rounded expectations, so that the
    ranks are certain.
    """
    share_n = 1.0 / np.arange(1, items + 1) ** ZIPF
    count_n = np.floor(items * share_n / share_n.sum()).astype(int)
    count_n[: FREQUENT + 2] = np.maximum(count_n[: FREQUENT + 2], np.arange(FREQUENT + 2, 0, -1))
    drawn = words(rng, syllables=2)
    coded = ["...", *itertools.islice(drawn, int((count_n > 0).sum()) - 1)]
    listed = [word for word, count in zip(coded, count_n, strict=False) for _ in range(count)]
    text = " ".join(listed[i] for i in rng.permutation(len(listed)))
    question = f"The dots are noise. Which {FREQUENT} words are the most frequent?"
    return Draft(
        f"Here is a coded text. Count its words.\n\n{text}\n\n{question}\nAnswer:", tuple(coded[1 : FREQUENT + 1])
    )


def document_qa(rng: np.random.Generator, items: int) -> Draft:
    """`items` numbered documents, one of which answers the question; the others are alike, about other places.

    Source: arXiv:2307.03172 (Lost in the Middle); in RULER (arXiv:2404.06654, section 3.4) over SQuAD.
    """
    drawn = words(rng)
    documents, facts = [], []
    for number in range(1, items + 1):
        place, builder, town = (next(drawn).title() for _ in range(3))
        kind, year = BUILDINGS[int(rng.integers(len(BUILDINGS)))], int(rng.integers(1500, 2000))
        text = f"The {kind} of {place} was built by {builder} near {town}. It opened in {year}."
        documents.append(f"Document {number}: {text}")
        facts += [(f"Who built the {kind} of {place}?", builder)]
    question, answer = facts[int(rng.integers(items))]
    asked = f"Answer from the documents.\n\n{chr(10).join(documents)}\n\nQuestion: {question}\nAnswer:"
    return Draft(asked, (answer,))
