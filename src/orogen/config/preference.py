"""How pairs of answers, of which one is preferred, become training data and a loss."""

import dataclasses
from typing import Annotated

from orogen.config.checks import check_types, require, require_choice, require_not_negative, require_positive

DPO, IPO, BRADLEY_TERRY = "dpo", "ipo", "bradley_terry"
LOSSES = (DPO, IPO, BRADLEY_TERRY)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Pairs of DataConfig.corpus, one per line of its .jsonl files (posttrain/pairs.py), and their loss.

    Both answers of a pair are in one row, so TrainConfig.sequence_length bounds the tokens of the two together and
    TrainConfig.batch_size counts rows, each with as many pairs as fit.
    loss: dpo and ipo compare the policy with the model that the run started from (posttrain/preference.py);
    bradley_terry trains a reward model, with ModelConfig.score_head. Names in NeMo RL: beta is
    reference_policy_kl_penalty, average_log_probs preference_average_log_probs.
    """

    template: Annotated[str, "the chat template: a file, the name of one of ours, or checkpoint for the model's own"]
    too_long: Annotated[str, "what becomes of pairs that are too long: drop or refuse"] = "drop"
    loss: Annotated[str, "dpo, ipo, or bradley_terry for a reward model"] = DPO
    beta: Annotated[float, "strength of the pull towards the reference model"] = 0.1
    label_smoothing: Annotated[float, "probability that a pair's label is wrong (conservative DPO)"] = 0.0
    average_log_probs: Annotated[bool, "whether log-probabilities are averaged over an answer's tokens"] = False
    preference_weight: Annotated[float, "share of the preference loss"] = 1.0
    sft_weight: Annotated[float, "share of the chosen answers' negative log-likelihood; 0: none"] = 0.0
    sft_average_log_probs: Annotated[bool, "whether that is averaged over an answer's tokens, else summed"] = False
    center_weight: Annotated[float, "share of the squared sum of a pair's two rewards, which centres rewards"] = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        require(self.template != "", self, "template", "a non-empty string")
        require_choice(self, "too_long", ("drop", "refuse"))
        require_choice(self, "loss", LOSSES)
        require_positive(self, "beta")
        require_not_negative(self, "preference_weight", "sft_weight", "center_weight")
        require(0 <= self.label_smoothing < 0.5, self, "label_smoothing", "a number from 0 to below 0.5")
        some = self.preference_weight > 0 or self.sft_weight > 0
        require(some, self, "preference_weight", "a number above 0, since sft_weight is 0: there is no loss")
