"""The task of `orogen sft`: what assistants say in conversations, scored on held-out ones."""

import json
from collections.abc import Sequence
from pathlib import Path

from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.config.run import RunConfig
from orogen.data.loader import Corpus
from orogen.data.tokenizer import Tokenizer
from orogen.data.vocabulary import make_tokenizer
from orogen.infer.chat import find_template
from orogen.posttrain.chats import ChatCorpus, open_chats
from orogen.train.pretraining import PRETRAINING
from orogen.train.task import Task

OWN = "checkpoint"  # ChatConfig.template: that of the model


def make_sft(places: Sequence[Path]) -> Task:
    """The task. places: folders in which the model's own chat template may be, the first one first.

    Objective, batches and evaluation are those of pretraining, whose tokens have weights.
    """

    def open_(config: RunConfig, tokenizer: Tokenizer | None) -> Corpus:
        data, chat = config.need("chat").data, config.chat
        if data.sources:
            raise ConfigError("DataConfig.sources is set; expected DataConfig.corpus, with conversations")
        if tokenizer is None:
            if data.tokenizer == "bpe":
                raise ConfigError("DataConfig.tokenizer is 'bpe'; expected one that exists: the model's own")
            tokenizer = make_tokenizer(data, ())
        template = _template(chat.template, places, tokenizer)
        return open_chats(data, chat, template, tokenizer, length=config.train.sequence_length)

    return Task(
        objective=PRETRAINING.objective, open=open_, source=PRETRAINING.source, evaluation=PRETRAINING.evaluation,
        measures=PRETRAINING.measures, keep=_keep,
    )  # fmt: skip


def _template(name: str, places: Sequence[Path], tokenizer: Tokenizer) -> str | dict[str, str]:
    if name != OWN:
        found = find_template(Path(), tokenizer, name)
    else:
        found = next((t for place in places if (t := find_template(place, tokenizer)) is not None), None)
    if found is None:
        raise ConfigError(
            "ChatConfig.template is 'checkpoint'; expected the name of a template: the checkpoint has none"
        )
    return found


def _keep(corpus: Corpus, run_dir: Path) -> None:
    """Puts the template where `orogen generate --chat` and `orogen serve` find it."""
    assert isinstance(corpus, ChatCorpus)
    if isinstance(corpus.template, str):
        write_atomically(run_dir / "chat_template.jinja", corpus.template.encode())
        return
    named = [{"name": name, "template": text} for name, text in corpus.template.items()]
    write_atomically(run_dir / "chat_template.json", json.dumps({"chat_template": named}, indent=2).encode())
