"""The task of `orogen sft`: what assistants say in conversations, scored on held-out ones."""

import json
from pathlib import Path

from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.config.files import write_atomically
from orogen.config.run import RunConfig
from orogen.data.loader import Corpus
from orogen.data.tokenizer import Tokenizer, check_vocab_size
from orogen.data.vocabulary import make_tokenizer
from orogen.infer.chat import find_template
from orogen.posttrain.chats import ChatCorpus, open_chats
from orogen.train.pretraining import PRETRAINING
from orogen.train.task import Task

OWN = "checkpoint"  # ChatConfig.template: that of the model


def make_sft(origin: Path | None) -> Task:
    """The task. origin: the folder in which the model's own chat template may be.

    Objective, batches and evaluation are those of pretraining, whose tokens have weights.
    """

    def open_(config: RunConfig, tokenizer: Tokenizer | None) -> Corpus:
        data, chat = config.need("chat").data, config.chat
        tokenizer, template = with_template(data, chat.template, origin, tokenizer)
        return open_chats(data, chat, template, tokenizer, length=config.train.sequence_length)

    return Task(
        objective=PRETRAINING.objective, open=open_, source=PRETRAINING.source, evaluation=PRETRAINING.evaluation,
        measures=PRETRAINING.measures, keep=_keep,
    )  # fmt: skip


def with_template(
    data: DataConfig, name: str, origin: Path | None, tokenizer: Tokenizer | None
) -> tuple[Tokenizer, str | dict[str, str]]:
    """The tokenizer of a corpus of messages, the known one if there is one, and the chat template of that name.

    origin: see `make_sft`. Raises ConfigError.
    """
    if data.sources:
        raise ConfigError("DataConfig.sources is set; expected DataConfig.corpus, with conversations")
    if tokenizer is None:
        if data.tokenizer == "bpe":
            raise ConfigError("DataConfig.tokenizer is 'bpe'; expected one that exists: the model's own")
        tokenizer = make_tokenizer(data, ())
    template = template_of(name, origin, tokenizer)
    if data.vocab_size is not None:
        check_vocab_size(tokenizer, data.vocab_size, name="DataConfig.vocab_size")
    return tokenizer, template


def template_of(name: str, origin: Path | None, tokenizer: Tokenizer) -> str | dict[str, str]:
    """The template of a name as `ChatConfig.template` takes it. origin: the folder that may have the model's own.
    Raises ConfigError."""
    if name != OWN:
        found = find_template(Path(), tokenizer, name)
    else:
        found = None if origin is None else find_template(origin, tokenizer)
    if found is None:
        raise ConfigError("the template is 'checkpoint'; expected the name of a template: the checkpoint has none")
    return found


def _keep(corpus: Corpus, run_dir: Path) -> None:
    assert isinstance(corpus, ChatCorpus)
    keep_template(corpus.template, run_dir)


def keep_template(template: str | dict[str, str], run_dir: Path) -> None:
    """Puts the template where `orogen generate --chat` and `orogen serve` find it."""
    if isinstance(template, str):
        write_atomically(run_dir / "chat_template.jinja", template.encode())
        return
    named = [{"name": name, "template": text} for name, text in template.items()]
    write_atomically(run_dir / "chat_template.json", json.dumps({"chat_template": named}, indent=2).encode())
