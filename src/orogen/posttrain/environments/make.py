"""Environments by kind."""

from collections.abc import Callable

from orogen.config.rl import EnvironmentConfig
from orogen.posttrain.environments.code import Code
from orogen.posttrain.environments.gym import NemoGym
from orogen.posttrain.environments.instructions import Instructions
from orogen.posttrain.environments.interface import Environment
from orogen.posttrain.environments.reasoning import Reasoning
from orogen.posttrain.environments.schema import Schema
from orogen.posttrain.environments.synthetic import Synthetic
from orogen.posttrain.environments.workplace import Workplace

MAKERS: dict[str, Callable[[EnvironmentConfig], Environment]] = {
    "synthetic": Synthetic,
    "reasoning_gym": Reasoning,
    "code": Code,
    "json_schema": Schema,
    "instructions": Instructions,
    "workplace": Workplace,
    "nemo_gym": NemoGym,
}


def make_environment(config: EnvironmentConfig) -> Environment:
    """The environment of a config. Raises ConfigError for one that cannot be used here."""
    return MAKERS[config.kind](config)
