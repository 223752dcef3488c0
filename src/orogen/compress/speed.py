"""How fast candidates decode, and whether they fit, as `simulate.decode` predicts it; no jax."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from orogen.config.cluster import ClusterConfig
from orogen.config.engine import EngineConfig
from orogen.config.model import ModelConfig
from orogen.config.search import SearchConfig
from orogen.simulate.decode import Inference, predict_inference


class Speed:
    """Predictions for one engine on one device."""

    def __init__(self, search: SearchConfig, cluster: ClusterConfig, engine: EngineConfig):
        self._search, self._cluster, self._engine = search, cluster, engine

    def predict(self, model: ModelConfig) -> Inference:
        """The prediction for one model. Raises ConfigError."""
        prompt, new = self._search.prompt_tokens, self._search.new_tokens
        return predict_inference(model, self._cluster, engine=self._engine, prompt=prompt, new=new)

    def estimates(self, model: ModelConfig, counts_nk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,): tokens per second and bytes on the device of the model with such numbers of layers.

        Time and memory are linear in them as long as the same resource limits a step: from one prediction for the
        parent's depth, and one with a layer less of each kind. To rank many models; `predict` is exact.
        """
        main = model.layers.main
        _, slash, mtp = model.pattern.partition("/")
        kinds = list(dict.fromkeys(main))
        whole, held = self._parts(model), np.array([main.count(letter) for letter in kinds])
        differences = []
        for letter in kinds:
            place = main.rindex(letter)
            fewer = main[:place] + main[place + 1 :]
            differences.append(whole - self._parts(with_pattern(model, fewer + slash + mtp)) if fewer else whole)
        found = whole + (counts_nk - held) @ np.array(differences)
        return whole[2] / found[:, 0], found[:, 1]

    def _parts(self, model: ModelConfig) -> np.ndarray:
        found = self.predict(model)
        return np.array([found.step_seconds, found.device_memory_bytes, found.slots])


def with_pattern(model: ModelConfig, pattern: str) -> ModelConfig:
    """The model with another pattern, which has the part after / if the model has one."""
    return dataclasses.replace(model, pattern=pattern)


def speed_facts(found: Inference) -> Mapping[str, float]:
    """What a search reports of a prediction."""
    return {
        "tokens_per_second": found.tokens_per_second,
        "first_token_seconds": found.first_token_seconds,
        "device_memory_bytes": found.device_memory_bytes,
    }
