"""Budgets of reasoning, to the token: against a loop over the definition that reads text, in mixed batches."""

import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest
import tokenizers
from jax import lax

from orogen.config.checks import ConfigError
from orogen.data.tokenizer import Tokenizer
from orogen.data.vocabulary import byte_tokenizer
from orogen.infer.budget import Markers, markers_of, settle, thought_of
from orogen.infer.knobs import features_of, knobs_of
from orogen.infer.request import GRACE, Budget, Grammar, Request, Sampling
from orogen.infer.sampling import choose, history_of

ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
# Parts of markers, whole markers with what is beside them, and what looks like one.
PIECES = [
    "</",
    "think",
    ">Ċ",
    "<th",
    "ink",
    "Ċ",
    "a.ĊĊ",
    ".</think>Ċ",
    "<think>x",
    "<",
    "</thin",
    "</think",
    "k><think>",
]


def byte_level(*added: tokenizers.AddedToken, pieces=PIECES) -> Tokenizer:
    """All bytes and these pieces; a text is tokenized byte by byte."""
    words = dict.fromkeys(["<pad>", "<bos>", "<eos>", *ALPHABET, *pieces])
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({w: i for i, w in enumerate(words)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    for token in added:
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    return Tokenizer(backend, pad="<pad>", bos="<bos>", eos="<eos>")


MARKS = [tokenizers.AddedToken(text, special=special) for special in (True, False) for text in ("<think>", "</think>")]
TOKENIZERS = {"special": byte_level(*MARKS[:2]), "added": byte_level(*MARKS[2:]), "text": byte_level()}


def pieces_of(tokenizer: Tokenizer) -> list[str]:
    """The text of each id, markers included where they are special tokens."""
    texts = [b.decode("latin-1") for b in tokenizer.bytes_of_token]
    for marker in ("<think>", "</think>"):
        ids = tokenizer.marker_ids(marker)
        if len(ids) == 1 and not texts[ids[0]]:
            texts[ids[0]] = f"\0{marker}\0"
    return texts


def emitted(tokenizer: Tokenizer, prompt, wanted, budget: Budget | None) -> list[int]:
    """The definition: reads the text anew at each token, which is as slow as it is plain."""
    texts = pieces_of(tokenizer)
    special = "\0<think>\0" in texts
    opening, closing = ("\0<think>\0", "\0</think>\0") if special else ("<think>", "</think>")
    text, used, pending, out = "", 0, [], []

    def read(token: int) -> tuple[bool, bool]:
        """Whether the row thought before this token, and thinks after it."""
        nonlocal text
        before = text.rfind(opening) > text.rfind(closing) if opening in text else False
        text += texts[token]
        return before, (text.rfind(opening) > text.rfind(closing) if opening in text else False)

    def due(line: bool) -> bool:
        if budget is None or used < budget.tokens:
            return False
        if budget.form == "hard" or not budget.tokens:
            return True
        return line and used > budget.tokens or used == budget.tokens + GRACE

    thinks = False
    for token in prompt:
        thinks = read(token)[1]
    if thinks and due(False):
        pending = tokenizer.marker_ids("</think>")
    for token in wanted:
        forced = bool(pending)
        token, *pending = pending or [token]
        before, thinks = read(token)
        out.append(token)
        used = used + 1 if before and thinks else 0
        if not forced and thinks and due("\n" in texts[token]):
            pending = tokenizer.marker_ids("</think>")
    return out


@partial(jax.jit, static_argnums=0)
def _run(count, wanted_tb, budget_b, grace_b, once_b, thought, markers):
    def step(thought, sampled_b):
        token_b, thought = settle(sampled_b, budget_b, grace_b, thought, markers, once_b=once_b)
        return thought, (token_b, thought)

    return lax.scan(step, thought, wanted_tb, length=count)


def run(tokenizer, prompts, wanted_tb, budgets, grammar=None):
    """Tokens (t, b) of rows that would choose `wanted_tb`; the state is also what the tokens so far say."""
    markers = jax.tree.map(np.asarray, markers_of(tokenizer, tokenizer.vocab_size + 5))
    requests = [
        Request(prompt=tuple(p), max_tokens=9, budget=b, sampling=Sampling(seed=0), grammar=grammar)
        for p, b in zip(prompts, budgets, strict=True)
    ]
    knobs = knobs_of(requests, features_of(requests))
    thought = thought_of(requests, [()] * len(requests), markers)
    budget = knobs.budget_b, knobs.grace_b, knobs.once_b
    _, (tokens_tb, states) = _run(len(wanted_tb), wanted_tb, *budget, thought, markers)
    for count in range(1, len(wanted_tb) + 1, 7 if len(wanted_tb) < 100 else 97):
        again = thought_of(requests, np.asarray(tokens_tb[:count]).T.tolist(), markers)
        np.testing.assert_array_equal(again, [state_tb[count - 1] for state_tb in states])
    return np.asarray(tokens_tb)


BUDGETS = [
    None,
    *(Budget(tokens=n, form=form) for n in (0, 1, 2, 5, 40) for form in ("hard", "grace")),
    Budget(tokens=2**40, form="grace"),
]


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_any_mix_of_rows_emits_what_the_definition_does(name):
    tokenizer, random = TOKENIZERS[name], np.random.default_rng(len(name))
    marks = [i for m in ("<think>", "</think>") for i in tokenizer.marker_ids(m)]
    likely = [*range(tokenizer.vocab_size - len(PIECES) - 2, tokenizer.vocab_size), *marks]
    rows, steps = 3 * len(BUDGETS), 60
    prompts = [
        [*random.choice(likely, 6), *(tokenizer.marker_ids("<think>") if row % 2 else [])] for row in range(rows)
    ]
    prompts = [[int(i) for i in prompt] for prompt in prompts]
    wanted_tb = random.choice(likely, (steps, rows)).astype(np.int32)
    budgets = [BUDGETS[row % len(BUDGETS)] for row in range(rows)]
    tokens_tb = run(tokenizer, prompts, wanted_tb, budgets)
    expected = [emitted(tokenizer, *row) for row in zip(prompts, wanted_tb.T.tolist(), budgets, strict=True)]
    assert tokens_tb.T.tolist() == expected
    assert (tokens_tb != wanted_tb).sum() > steps


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_a_hard_budget_forces_the_marker_after_exactly_its_tokens(name, tokens):
    tokenizer = TOKENIZERS[name]
    letter, closing = tokenizer.marker_ids("x"), tokenizer.marker_ids("</think>")
    wanted_tb = np.full((30, 1), letter[0], np.int32)
    budget = Budget(tokens=tokens)
    prompt = [5, *tokenizer.marker_ids("<think>")]
    rest = 30 - tokens - len(closing)
    assert run(tokenizer, [prompt], wanted_tb, [budget])[:, 0].tolist() == letter * tokens + closing + letter * rest
    # The template's newline after <think> is no token that the model spent.
    line = [*prompt, *tokenizer.marker_ids("\n")]
    assert run(tokenizer, [line], wanted_tb, [budget])[:, 0].tolist() == letter * tokens + closing + letter * rest


@pytest.mark.parametrize(("line", "last"), [(4, 504), (5, 5), (9, 9), (503, 503), (504, 504), (505, 504)])
def test_grace_ends_with_the_first_line_after_the_budget_or_at_500(line, last):
    """A budget of 4: the newline is token number `line` of the thought, `last` the one before the marker."""
    tokenizer = TOKENIZERS["special"]
    closing = tokenizer.marker_ids("</think>")
    wanted_tb = np.full((600, 1), tokenizer.marker_ids("x")[0], np.int32)
    wanted_tb[line - 1] = tokenizer.marker_ids("\n")
    tokens_tb = run(tokenizer, [tokenizer.marker_ids("<think>")], wanted_tb, [Budget(tokens=4, form="grace")])
    assert np.flatnonzero(tokens_tb[:, 0] == closing[0]).tolist() == [last]


def test_a_thought_that_ends_by_itself_is_left_alone_and_a_new_one_has_the_whole_budget():
    tokenizer = TOKENIZERS["special"]
    (opening,), (closing,), (x,) = (tokenizer.marker_ids(t) for t in ("<think>", "</think>", "x"))
    wanted = [x, opening, x, x, closing, x, x, x, x, opening, x, x, x, x, x]
    tokens_tb = run(tokenizer, [[x]], np.array(wanted, np.int32)[:, None], [Budget(tokens=3)])
    assert tokens_tb[:, 0].tolist() == [*wanted[:13], closing, x]


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_nothing_is_forced_into_a_grammars_text(name):
    """It begins after the prompt's thought, whose budget is as ever; `<think>` in a JSON string begins none."""
    tokenizer = TOKENIZERS[name]
    opening, closing, x = (tokenizer.marker_ids(t) for t in ("<think>", "</think>", "x"))
    text = [*x, *opening, *x * 6]
    begun = [5, *opening]
    longer = [*x * 3, *closing, *text]
    for tokens, prompt, wanted, expected in (
        (2, x, text, text),
        (2, [5, *opening[:-1]], [*opening[-1:], *x * 6], [*opening[-1:], *x * 6]),
        (3 + len(closing), begun, longer, longer),
        (2, begun, longer, [*x * 2, *closing, *longer[2 + len(closing) :]]),
    ):
        wanted_tb = np.array(wanted, np.int32)[:, None]
        grammar = Grammar(kind="regex", text=".*")
        assert run(tokenizer, [prompt], wanted_tb, [Budget(tokens=tokens)], grammar)[:, 0].tolist() == expected


def test_the_chosen_token_is_the_forced_one():
    """It is counted, and its log-probability is the model's."""
    tokenizer = TOKENIZERS["special"]
    (closing,) = tokenizer.marker_ids("</think>")
    request = Request(
        prompt=tuple(tokenizer.marker_ids("<think>")),
        max_tokens=9,
        budget=Budget(tokens=0),
        sampling=Sampling(presence_penalty=1, seed=3, top_p=0.5),
        logprobs=0,
    )
    features = features_of([request])
    size = tokenizer.vocab_size + 3
    markers = markers_of(tokenizer, size)
    rows = history_of([request], features, vocab_size=size, markers=markers)
    logits_bv = np.random.default_rng(0).normal(size=(1, size)).astype(np.float32)
    logits_bv[0, closing] = -20
    is_token_v = np.ones(size, bool)

    @jax.jit
    def budgeted(rows):
        return choose(logits_bv, knobs_of([request], features), rows, features, is_token_v=is_token_v, markers=markers)

    choice, rows = budgeted(rows)
    assert choice.token_b.tolist() == [closing]
    assert np.flatnonzero(rows.counts_bv[0]).tolist() == [closing]
    exact = logits_bv[0, closing] - np.log(np.exp(np.float64(logits_bv)).sum())
    np.testing.assert_allclose(choice.logprob_b, [exact], rtol=1e-5)
    after, _ = budgeted(rows)
    free = dataclasses.replace(request, budget=None)
    free_rows = history_of([free], features_of([free]), vocab_size=size, generated=[[closing]])
    knobs = knobs_of([free], features_of([free]))
    plain, _ = jax.jit(lambda rows: choose(logits_bv, knobs, rows, features_of([free]), is_token_v=is_token_v))(
        free_rows
    )
    assert after.token_b.tolist() == plain.token_b.tolist()


def test_markers_of_our_byte_tokenizer_are_their_bytes():
    markers = markers_of(byte_tokenizer(), 300)
    assert markers.closing_n.tolist() == [b + 3 for b in b"</think>"]
    assert np.flatnonzero(markers.ends_line_v).tolist() == [ord("\n") + 3]
    assert markers.next_sv.shape == (15, 300)
    assert markers.thinking == 7


def test_markers_of_a_vocabulary_with_byte_fallback_have_no_space_before_them():
    words = ["<pad>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁thinka", "</"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {w: i for i, w in enumerate(dict.fromkeys(words))}, [("<", "/")][:0], byte_fallback=True, unk_token="<pad>"
        )
    )
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    backend.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer = Tokenizer(backend, pad="<pad>", bos="<s>", eos="</s>")
    markers = markers_of(tokenizer, tokenizer.vocab_size)
    assert tokenizer.decode_bytes(markers.closing_n) == b"</think>"


def test_a_model_without_markers_is_refused():
    with pytest.raises(ConfigError, match=r"has no tokenizer.json; expected one, for a budget"):
        markers_of(None, 300)
    request = Request(prompt=(1,), max_tokens=2, budget=Budget(tokens=1))
    with pytest.raises(ConfigError, match="the model no markers"):
        thought_of([request], [()], None)
    backend = json.loads(TOKENIZERS["text"]._backend.to_str())
    backend["normalizer"] = {"type": "Replace", "pattern": {"String": "<"}, "content": "("}
    changed = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(backend)), pad="<pad>", bos="<bos>", eos="<eos>")
    with pytest.raises(ConfigError, match=r"turns <think> into b'\(think>'; expected no change"):
        markers_of(changed, 400)


def test_markers_are_arrays_that_a_program_takes():
    leaves = jax.tree.leaves(markers_of(byte_tokenizer(), 259))
    assert len(leaves) == len(Markers._fields)
