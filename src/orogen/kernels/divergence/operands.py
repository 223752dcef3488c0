"""The arguments of every implementation of the divergence from a teacher.

Axes: n tokens, d model, e teacher's model, v vocabulary of this rank, k tokens that the teacher finds most likely.
"""

from typing import NamedTuple

from jax import Array


class Hidden(NamedTuple):
    """A teacher that is there: its final hidden states and its head, with the columns that the student's head has."""

    x_ne: Array
    head_ev: Array


class Likely(NamedTuple):
    """A teacher of which only its k most likely tokens are known: their ids, int32, in any order and all different, and
    their log-probabilities at temperature 1."""

    ids_nk: Array
    log_nk: Array


class Mix(NamedTuple):
    """What is minimised: divergence x KL(teacher || student) + cross_entropy x the nats of the target.

    temperature: divides the logits of both in the divergence, which is not multiplied by its square. rest: what becomes
    of the tokens that `Likely` lacks: `renormalize` compares both models on the k tokens alone, `bucket` takes all
    others for one more token (at temperature 1, where the teacher's mass of them is known).
    """

    divergence: float = 1.0
    cross_entropy: float = 0.0
    temperature: float = 1.0
    rest: str = "renormalize"


class Distilled(NamedTuple):
    """Weighted sums over tokens, in nats, float32 scalars. total: the mix; the others have no gradient."""

    total: Array
    divergence: Array
    cross_entropy: Array
