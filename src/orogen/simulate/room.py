"""Whether the memory of one device suffices for what an evaluation is about to compute."""

import dataclasses
from collections.abc import Iterable

from orogen.config.engine import EngineConfig
from orogen.config.evaluate import EvaluateConfig
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.evaluate.carried import Held
from orogen.simulate.fit import Memory, require_carrying_fits, require_evaluation_fits, require_inference_fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationRoom:
    """The memory that there is for a model, its parameters included: a `Room` of `evaluate.subject`. Its methods raise
    ConfigError for what exceeds it, with the field that it grows with. plan: None for the checkpoint's own, on one
    device. attention: how scores are computed. dtype: of the computation."""

    model: ModelConfig
    memory: Memory
    plan: PlanConfig | None
    attention: str
    dtype: str
    config: EvaluateConfig

    @property
    def alone(self) -> bool:
        """Whether one device computes everything; what several need for texts is not known."""
        return self.plan is None or self.plan.devices == 1

    def loading(self) -> None:
        """The parameters alone."""
        if self.alone:
            self._scoring(1, 1, {"EvaluateConfig.max_length": 1}, loaded=False)

    def scoring(self, longest: int, shapes: Iterable[tuple[int, int]], *, field: str = "max_length") -> None:
        """Batches of these shapes (rows, length). longest: tokens of the longest text, by `field`."""
        if not self.alone:
            return
        for rows, length in sorted(shapes, key=lambda shape: -shape[1]):
            self._scoring(1, length, {f"EvaluateConfig.{field}": longest})
            self._scoring(rows, length, {"EvaluateConfig.batch_tokens": self.config.batch_tokens})

    def _scoring(self, rows: int, length: int, settings: dict[str, int], *, loaded: bool = True) -> None:
        require_evaluation_fits(
            self.model, self.memory, dtype=self.dtype, blocked=self.attention != "full", batch_tokens=rows * length,
            length=length, settings=settings, loaded=loaded,
        )  # fmt: skip

    def carrying(self, longest: int, held: Held) -> None:
        """What is carried while texts are read piece by piece. longest: tokens of the longest one."""
        if self.alone:
            require_carrying_fits(
                self.model, self.memory, dtype=self.dtype, blocked=self.attention != "full", longest=longest,
                **held._asdict(),
            )  # fmt: skip

    def writing(self, engine: EngineConfig) -> None:
        """An engine for prompts that are longer than its config said."""
        settings = {"EvaluateConfig.max_length": engine.max_length}
        require_inference_fits(self.model, self.plan, engine, self.memory, settings=settings)
