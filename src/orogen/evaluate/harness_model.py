"""A model as lm-eval sees it. Imported only where lm-eval is installed.

What tokens a request becomes is what lm-eval's own Hugging Face backend makes of it, so that their numbers can be
compared: a text is encoded with what the tokenizer's folder puts around it, a continuation is what its encoding
together with the context has beyond the context's own, an empty context is the bos token, and texts that are too long
lose their beginning. What a model writes is decoded by itself, without specials, and then loses what comes after each
of the strings of `until`, in their order.
"""

from collections import Counter
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from orogen.config.checks import ConfigError
from orogen.evaluate.likelihood import Row
from orogen.evaluate.subject import Prompt, Subject
from orogen.infer.request import Sampling

MOST_NEW = 256  # tokens, where a task does not say
# Settings of a generation that have a counterpart here; a task that asks for another is refused.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
IGNORED = ("do_sample", "until", "max_gen_toks")


class HarnessModel(TemplateLM):
    """Answers lm-eval's requests by a subject. Every request is scored once, however many tasks repeat it."""

    def __init__(self, subject: Subject):
        super().__init__()
        self._subject, self._words = subject, subject.tokenizer
        self.shortened: Counter[str] = Counter()
        self._most = subject.request_length + 1  # tokens of a row: the last one is only predicted

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._words.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        return self._words.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Names lm-eval's cache of requests."""
        return self._words.fingerprint

    def facts(self, task: str) -> dict[str, float]:
        """What a result should say beside the metrics: how many requests lost their beginning."""
        return {"shortened": float(self.shortened[task])} if self.shortened[task] else {}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text, with what the tokenizer puts around it unless `add_special_tokens` is False. A text that
        begins with the name of bos has it already. The name of a special token is that token: tasks for models of chats
        write them."""
        ids = self._words.encode_marked(string).tolist()
        begun = add_special_tokens is None and string.startswith(self._words.special_names["bos_token"])
        if begun or add_special_tokens is False:
            return ids
        front, back = self._words.around
        return [*front, *ids, *back]

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        rows = {}
        keys = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        for context, continuation in dict.fromkeys(keys):
            rows[context, continuation] = self._row(context, continuation)
        scores = dict(zip(rows, self._subject.score(list(rows.values())), strict=True))
        return [(scores[key].log_likelihood, scores[key].greedy) for key in keys]

    def _row(self, context: tuple[int, ...], continuation: tuple[int, ...]) -> Row:
        """As many tokens as the model may read predict the continuation: one less than the row has."""
        most = self._most
        if len(continuation) >= most:
            raise ConfigError(
                f"a continuation of {len(continuation)} tokens; expected at most {self._subject.request_limit}"
            )
        tokens_t = np.array((context + continuation)[-most:], np.int32)
        return Row(tokens_t, np.arange(len(tokens_t)) >= len(tokens_t) - len(continuation))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether greedy decoding would write it."""
        for instance in requests:
            args: Any = instance.args
            context, continuation = args
            bare = 1 + len(self.tok_encode(continuation, False)) if not context else 0
            tokens = bare or len(self.tok_encode(context + continuation))
            self._count(instance, tokens > self._most)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, by disjoint windows of the model's length, as lm-eval defines them."""
        windows = [
            [
                make_disjoint_window(pair)
                for pair in get_rolling_token_windows(
                    token_list=self.tok_encode(instance.args[0]), prefix_token=self.prefix_token_id,
                    max_seq_len=self._most - 1, context_len=1,
                )
            ]
            for instance in requests
        ]  # fmt: skip
        scores = iter(self._loglikelihood_tokens([(None, *pair) for each in windows for pair in each]))
        return [sum(next(scores)[0] for _ in each) for each in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each context, up to a string of `until`, the end of the text, or `max_gen_toks` tokens."""
        prompts, asked = [], Counter[int]()
        for instance in requests:  # lm-eval queues one instance as often as its answer is to be drawn
            prompts.append(self._prompt(instance, draw=asked[id(instance)]))
            asked[id(instance)] += 1
        return self._subject.write(prompts)

    def _prompt(self, instance: Instance, *, draw: int) -> Prompt:
        args: Any = instance.args
        context, settings = args
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(settings, MOST_NEW))
        until, tokens = kwargs.get("until") or [], kwargs["max_gen_toks"]
        if unknown := sorted(kwargs.keys() - {*SAMPLING, *IGNORED}):
            raise ConfigError(f"a task's generation_kwargs have {unknown[0]!r}; expected {', '.join(SAMPLING)}")
        most = self._subject.request_length - tokens
        if most < 1:
            raise ConfigError(f"a task asks for {tokens} new tokens; expected fewer than {self._subject.request_limit}")
        ids = self.tok_encode(context) or [self.prefix_token_id]
        self._count(instance, len(ids) > most)
        # transformers samples at temperature 1 if a task says do_sample alone.
        fields: dict[str, Any] = {"temperature": float(bool(kwargs.get("do_sample")))}
        fields |= {name: kwargs[name] for name in SAMPLING if name in kwargs}
        sampling = Sampling(**fields, seed=instance.idx + draw * 2**32)
        return Prompt(tuple(ids[-most:]), tokens, tuple([until] if isinstance(until, str) else until), sampling)

    def _count(self, instance: Instance, shortened: bool) -> None:
        """Counts a request that loses its beginning, by task."""
        if shortened:
            self.shortened[instance.task_name or ""] += 1
