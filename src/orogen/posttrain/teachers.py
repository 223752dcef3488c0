"""Teachers of distillation on policy, one per domain: log-probabilities of what the policy itself wrote.

A teacher may be of another architecture than the policy, with the same tokenizer. It runs on the plan of the run's
evaluations and stays in memory in float32.

Letters: b batch, t time.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orogen.checkpoint.open import open_folder
from orogen.config.checks import ConfigError
from orogen.config.run import RunConfig
from orogen.cost.assemble import assemble
from orogen.data.packing import Batch
from orogen.data.tokenizer import Tokenizer
from orogen.model.lm import Built
from orogen.posttrain.likelihood import Likelihoods
from orogen.posttrain.samples import Sample
from orogen.posttrain.teacher import require_same_vocabulary


class _Opened(NamedTuple):
    """A teacher at work."""

    built: Built
    scorer: Likelihoods
    weights: tuple[Any, Any]


class Teachers:
    """Those that `EnvironmentConfig.teacher` names. tokenizer: the run's."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._folders = {one.name: one.teacher for one in config.rl.environments if one.teacher is not None}
        self._opened: dict[str, _Opened] = {}

    def __bool__(self) -> bool:
        return bool(self._folders)

    def fingerprints(self, fingerprint: Callable[..., str]) -> dict[str, str]:
        """By environment, what `fingerprint(built, parameters, buffers)` says of its teacher. Raises ConfigError for a
        teacher that does not suit the run."""
        opened = {name: self._open(folder) for name, folder in self._folders.items()}
        return {name: fingerprint(one.built, *one.weights) for name, one in opened.items()}

    def scores(self, samples: Sequence[Sample], batch: Batch) -> dict[str, np.ndarray]:
        """By environment of the samples, the log-probability (b, t) float32 of each next token of their packed batch
        under its teacher. Each teacher passes over the whole batch."""
        names = {sample.environment for sample in samples} & self._folders.keys()
        plain = batch._replace(extras={})
        by_folder = {folder: self._score(folder, plain) for folder in sorted({self._folders[name] for name in names})}
        return {name: by_folder[self._folders[name]] for name in names}

    def _score(self, folder: str, batch: Batch) -> np.ndarray:
        found = self._open(folder)
        return found.scorer.of(*found.weights, batch)

    def _open(self, folder: str) -> _Opened:
        if folder not in self._opened:
            self._opened[folder] = self._read(folder)
        return self._opened[folder]

    def _read(self, folder: str) -> _Opened:
        config = self._config
        with open_folder(Path(folder)) as found:
            require_same_vocabulary(found.config, config.model)
            words = found.tokenizer()
            if words is None or words.as_in_training().fingerprint != self._tokenizer.fingerprint:
                raise ConfigError(f"the teacher {folder!r} has another tokenizer than the run; expected the run's")
            own = dataclasses.replace(config, model=found.config, lora=None)  # adapters are the policy's
            built = assemble(own.model, own.plan, length=own.train.sequence_length).built
            scorer = Likelihoods(own, built)
            return _Opened(built, scorer, found.read(built, scorer.plan, "float32"))
