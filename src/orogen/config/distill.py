"""How a student learns from a teacher."""

import dataclasses
import re
from typing import Annotated

from orogen.config.checks import ABSENT, check_types, require, require_choice, require_not_negative, require_positive
from orogen.config.plan import PlanConfig

RESTS = ("renormalize", "bucket")
STATE_LOSSES = ("cosine", "mse")
_PAIR = re.compile(r"(\d+):(\d+)", re.ASCII)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation (arXiv:1503.02531): divergence x KL(teacher || student) + cross_entropy x the nats of each target.

    Quantisation-aware distillation (arXiv:2601.20088) is divergence = 1 under a PrecisionConfig, which the teacher does
    not follow; quantisation-aware training is cross_entropy = 1 and divergence = 0. Both measure both.
    temperature: divides the logits of both models; the divergence is not multiplied by its square. rest: renormalize
    compares the models on the k tokens alone, as Megatron and Model-Optimizer do; bucket takes all others for one more
    token, so that the student also learns how much is left. logits: written by `orogen distill --write_logits`, with
    these data, tokenizer and sequence length; the teacher then does not run beside the student.
    states: after these layers, the residual streams of both models are compared, token by token, weighted as targets
    are: state_weight x the mean over the pairs of 1 - cos, or of the squared difference averaged over channels, as in
    Model-Optimizer. The weight is a number, where Model-Optimizer scales each batch's term to its divergence: such a
    scale would depend on how a batch is split into microbatches. A student of another width has no projection, which
    would be trained beside it; one that was pruned is compared on the teacher's channels that it has, which the
    folder `state_channels` of the pruning names.
    teacher_plan: such as @teacher/PlanConfig(), to which bindings of PlanConfig apply too. By default that of the run
    without its recomputation and rounding, with stages as data ranks that share the parameters.
    """

    divergence: Annotated[float, "weight of the divergence from the teacher"]
    cross_entropy: Annotated[float, "weight of the cross-entropy with the text itself"] = 0.0
    temperature: Annotated[float, "divides the logits of both models in the divergence"] = 1.0
    top_k: Annotated[int, "the divergence is over so many of the teacher's most likely tokens; None: over all"] = ABSENT
    rest: Annotated[str, "what becomes of the other tokens with top_k: renormalize or bucket"] = "renormalize"
    logits: Annotated[str, "folder of the teacher's stored log-probabilities; None: the teacher runs"] = ABSENT
    states: Annotated[
        tuple[str, ...],
        "pairs STUDENT:TEACHER of layers, numbered along the patterns from 0, after which hidden states are compared",
    ] = ()
    state_loss: Annotated[str, "how hidden states are compared: cosine or mse"] = "cosine"
    state_weight: Annotated[float, "weight of the comparison of hidden states"] = 1.0
    state_channels: Annotated[
        str, "folder of the pruning that the student is from, whose channels are compared; None: all, as many in both"
    ] = ABSENT
    teacher_plan: Annotated[PlanConfig, "the teacher's plan on the run's devices; None: like the run's"] = ABSENT

    def __post_init__(self) -> None:
        check_types(self)
        object.__setattr__(self, "states", tuple(self.states))  # gin may give a list
        require_not_negative(self, "divergence", "cross_entropy")
        expected = "above 0, since cross_entropy is 0: there is nothing to learn"
        require(self.divergence + self.cross_entropy > 0, self, "divergence", expected)
        require_positive(self, "temperature", "top_k")
        require_choice(self, "rest", RESTS)
        expected = "renormalize at this temperature: the mass of the rest is known only at temperature 1"
        require(self.rest != "bucket" or self.temperature == 1, self, "rest", expected)
        require(self.logits != "", self, "logits", "a folder")
        self._check_states()

    @property
    def state_pairs(self) -> tuple[tuple[int, int], ...]:
        """The numbers of the student's and the teacher's layer, for each of `states`."""
        student_teacher = (_PAIR.fullmatch(pair) for pair in self.states)
        return tuple((int(found[1]), int(found[2])) for found in student_teacher if found is not None)

    def _check_states(self) -> None:
        require_choice(self, "state_loss", STATE_LOSSES)
        require_positive(self, "state_weight")
        require(self.state_channels != "", self, "state_channels", "a folder")
        pairs = self.state_pairs
        known = len(pairs) == len(self.states) == len(set(pairs))
        require(known, self, "states", "different pairs STUDENT:TEACHER of layers' numbers, such as '3:5'")
        expected = "(): stored logits have no hidden states, and the teacher does not run"
        require(not self.states or self.logits is None, self, "states", expected)
