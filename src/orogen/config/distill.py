"""How a student learns from a teacher."""

import dataclasses
from typing import Annotated

from orogen.config.checks import ABSENT, check_types, require, require_choice, require_not_negative, require_positive
from orogen.config.plan import PlanConfig

RESTS = ("renormalize", "bucket")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation (arXiv:1503.02531): divergence x KL(teacher || student) + cross_entropy x the nats of each target.

    Quantisation-aware distillation (arXiv:2601.20088) is divergence = 1 under a PrecisionConfig, which the teacher does
    not follow; quantisation-aware training is cross_entropy = 1 and divergence = 0. Both measure both.
    temperature: divides the logits of both models; the divergence is not multiplied by its square. rest: renormalize
    compares the models on the k tokens alone, as Megatron and Model-Optimizer do; bucket takes all others for one more
    token, so that the student also learns how much is left. logits: written by `orogen distill --write_logits`, with
    these data, tokenizer and sequence length; the teacher then does not run beside the student.
    teacher_plan: such as @teacher/PlanConfig(), to which bindings of PlanConfig apply too. By default that of the run
    without its recomputation and rounding, with stages as data ranks that share the parameters.
    """

    divergence: Annotated[float, "weight of the divergence from the teacher"]
    cross_entropy: Annotated[float, "weight of the cross-entropy with the text itself"] = 0.0
    temperature: Annotated[float, "divides the logits of both models in the divergence"] = 1.0
    top_k: Annotated[int, "the divergence is over so many of the teacher's most likely tokens; None: over all"] = ABSENT
    rest: Annotated[str, "what becomes of the other tokens with top_k: renormalize or bucket"] = "renormalize"
    logits: Annotated[str, "folder of the teacher's stored log-probabilities; None: the teacher runs"] = ABSENT
    teacher_plan: Annotated[PlanConfig, "the teacher's plan on the run's devices; None: like the run's"] = ABSENT

    def __post_init__(self) -> None:
        check_types(self)
        require_not_negative(self, "divergence", "cross_entropy")
        expected = "above 0, since cross_entropy is 0: there is nothing to learn"
        require(self.divergence + self.cross_entropy > 0, self, "divergence", expected)
        require_positive(self, "temperature", "top_k")
        require_choice(self, "rest", RESTS)
        expected = "renormalize at this temperature: the mass of the rest is known only at temperature 1"
        require(self.rest != "bucket" or self.temperature == 1, self, "rest", expected)
        require(self.logits != "", self, "logits", "a folder")
