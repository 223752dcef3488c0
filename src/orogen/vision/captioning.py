"""The task of `orogen train` with VisionConfig: captions of images, scored on held-out ones."""

import json
from pathlib import Path

from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.config.run import RunConfig
from orogen.config.streams import say
from orogen.config.vision import ENCODED
from orogen.data.loader import Corpus
from orogen.data.tokenizer import Tokenizer
from orogen.data.vocabulary import make_tokenizer
from orogen.parallel import distributed
from orogen.train.pretraining import PRETRAINING
from orogen.train.task import Task
from orogen.vision.corpus import ImageCorpus, open_images
from orogen.vision.encoder import Encoder, open_encoder
from orogen.vision.features import encode_corpus

SEEN = "vision.json"  # in a run folder: what captions of its model need beside its weights


def make_captioning() -> Task:
    """The task. Objective, batches and evaluation are those of pretraining; images come in the batches' extras."""

    def open_(config: RunConfig, tokenizer: Tokenizer | None) -> Corpus:
        data, vision = config.data, config.need("vision").vision
        if config.varies or config.train.carry_states:
            raise ConfigError(
                "VisionConfig has bindings; expected none beside DataConfig.sources, TrainConfig.phases, batch_ramp "
                "and carry_states: a corpus of images is one source of one shape"
            )
        if data.tokenizer == "bpe" and tokenizer is None:
            raise ConfigError("DataConfig.tokenizer is 'bpe'; expected one that exists: the language model's own")
        encoder = open_encoder(vision.encoder)
        check_model(config, encoder)
        tokenizer = tokenizer or make_tokenizer(data, ())
        encode = lambda: encode_corpus(data.corpus, encoder, Path(vision.features), log=say)  # noqa: E731
        distributed.from_first(lambda: encode() and None)  # the others then find what the first has written
        sizes = {"length": config.train.sequence_length, "caption_tokens": config.model.caption_tokens}
        return open_images(data, vision, encode(), encoder, tokenizer, **sizes)

    return Task(
        objective=PRETRAINING.objective, open=open_, source=PRETRAINING.source, evaluation=PRETRAINING.evaluation,
        measures=PRETRAINING.measures, keep=_keep,
    )  # fmt: skip


def check_model(config: RunConfig, encoder: Encoder) -> None:
    """Raises ConfigError unless the model takes the encoder's features, and captions as they are retrieved."""
    model = config.model
    if "x" not in model.layers.main:
        raise ConfigError(f"ModelConfig.pattern is {model.pattern!r}; expected layers of gated cross-attention (x)")
    (vectors, width), vision = encoder.shape, config.need("vision").vision
    has = f"as encoder {encoder.name!r} has"
    encoded = vision.retrieved if vision.retrieval == ENCODED else None
    for field, expected, why in (
        ("image_features", vectors, has),
        ("image_feature_size", width, has),
        ("retrieved_captions", encoded, f"as VisionConfig.retrieval = {vision.retrieval!r} gives"),
    ):
        if getattr(model, field) != expected:
            raise ConfigError(f"ModelConfig.{field} is {getattr(model, field)}; expected {expected}, {why}")


def _keep(corpus: Corpus, run_dir: Path) -> None:
    """Writes what a caption needs: the encoder, and how prompts are made."""
    assert isinstance(corpus, ImageCorpus)
    write_atomically(run_dir / SEEN, json.dumps(corpus.seen, indent=2).encode())
