"""Reward models: their first parameters, from a language model's, and the scores that they give to conversations."""

import dataclasses
from pathlib import Path
from typing import Self

import jax
from flax import nnx

from orogen.checkpoint.folders import Folder
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.data.tokenizer import Tokenizer
from orogen.layers.embedding import ScoreHead
from orogen.model.by_letter import plain
from orogen.model.lm import Built, build
from orogen.parallel import placement
from orogen.parallel.plan import Plan

SCORE = "score"  # the part of the model that only a reward model has


def with_score(folder: Folder, *, seed: int) -> Folder:
    """The folder, if its model has a head for scores; else as that of such a model, with a new head."""
    return folder if folder.config.score_head else _WithScore(folder, seed)


class _WithScore:
    """The folder of a language model as that of a reward model, whose head is drawn."""

    def __init__(self, folder: Folder, seed: int):
        self._folder, self._seed = folder, seed
        self.config: ModelConfig = dataclasses.replace(folder.config, score_head=True)
        self.plan: PlanConfig | None = folder.plan
        self.masters = folder.masters

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._folder.__exit__(*exception)

    def tokenizer(self) -> Tokenizer | None:
        """See `Folder.tokenizer`."""
        return self._folder.tokenizer()

    def read(self, built: Built, plan: Plan, dtype: str) -> tuple[nnx.State, nnx.State]:
        """See `Folder.read`."""
        without = build(self._folder.config, built.layout, built.vocab_rows)
        params, buffers = self._folder.read(without, plan, dtype)
        there = placement.shardings(plain(built.params)[SCORE], plan)

        def draw() -> dict[str, nnx.Param]:
            return {"weight": ScoreHead(self.config, nnx.Rngs(jax.random.key(self._seed))).weight}

        return nnx.State({**plain(params), SCORE: jax.jit(draw, out_shardings=there)()}), buffers

    def keep(self, run_dir: Path) -> None:
        """See `Folder.keep`."""
        self._folder.keep(run_dir)
