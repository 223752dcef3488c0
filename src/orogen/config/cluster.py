"""The machines that a simulated run has: hardware by name, how many, what runs on them, how often they fail."""

import dataclasses
import math
from typing import Annotated

from orogen.config.checks import ABSENT, check_types, require, require_choice, require_not_negative, require_positive

HARDWARE = ("a100", "h100", "h200", "gb200", "gb300", "tpu_v5p", "trillium", "cpu")
SOFTWARE = ("orogen", "megatron", "megatron2021")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """A cluster for `orogen simulate`. `orogen simulate --hardware` lists what is known of each kind, with sources.

    software: orogen is this code, whose pipeline stages run one program; megatron and megatron2021 stand for the
    programs behind published tables, now and before they hid the traffic of tensor parallelism.
    constants: entries `name=value` replace a constant of the hardware or the software, for example
    ('matmul=0.7', 'overlap_expert=0.93'); `orogen simulate --hardware` lists the names.
    straggler: every step waits for the slowest device, so its compute takes as much longer.
    mtbf_hours: of one device; a failure costs half of a checkpoint interval, and restart_minutes.
    """

    hardware: Annotated[str, "name of the hardware: a100, h100, h200, gb200, gb300, tpu_v5p, trillium or cpu"] = "h100"
    devices: Annotated[int, "number of devices; None: as many as the plan has"] = ABSENT
    node_size: Annotated[int, "devices that share the fast links; None: the hardware's own"] = ABSENT
    memory_gib: Annotated[float, "memory of one device in GiB; None: the hardware's own"] = ABSENT
    software: Annotated[str, "what trains: orogen, megatron or megatron2021"] = "orogen"
    constants: Annotated[tuple[str, ...], "entries name=value that replace constants of the hardware or software"] = ()
    straggler: Annotated[float, "slowdown of the slowest device's compute; 0: none"] = 0.0
    mtbf_hours: Annotated[float, "mean time between failures of one device in hours; None: nothing fails"] = ABSENT
    checkpoint_minutes: Annotated[float, "minutes between checkpoints; None: the best for the failures"] = ABSENT
    checkpoint_seconds: Annotated[float, "seconds for which a checkpoint stops the training"] = 10.0
    restart_minutes: Annotated[float, "minutes from a failure to the next step"] = 10.0
    dollars_per_hour: Annotated[float, "price of one device and hour; None: the budget has no dollars"] = ABSENT
    watts: Annotated[float, "power of one device, its share of host and cooling included; None: the hardware's"] = (
        ABSENT
    )

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, "devices", "node_size", "memory_gib", "mtbf_hours", "checkpoint_minutes", "watts")
        require_not_negative(self, "straggler", "checkpoint_seconds", "restart_minutes", "dollars_per_hour")
        require_choice(self, "hardware", HARDWARE)
        require_choice(self, "software", SOFTWARE)
        object.__setattr__(self, "constants", tuple(self.constants))
        for entry in self.constants:
            _, equals, value = entry.partition("=")
            require(
                bool(equals) and _is_number(value), self, "constants", "entries name=value with a number of 0 or more"
            )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and float(text) >= 0
    except ValueError:
        return False
