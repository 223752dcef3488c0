"""Which of a run's processes this one is, and where they meet. Importing this module does not import jax."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from orogen.config.checks import ConfigError

VARIABLE = "OROGEN_CLUSTER"  # of the environment; the option --cluster takes precedence
SLURM, KUBERNETES = "slurm", "kubernetes"
FORMS = f"HOST:PORT,COUNT,ID, or {SLURM} or {KUBERNETES}"
# Variables that `orogen launch` sets for Kubernetes, in addition to those of Kubernetes. The first is JAX's own.
COORDINATOR, COUNT = "JAX_COORDINATOR_ADDRESS", "OROGEN_PROCESSES"
LOWEST_PORT, PORTS = 61440, 4096  # of coordinators under SLURM, one for each job


class Cluster(NamedTuple):
    """One of `count` processes, which process 0's `coordinator` ("host:port") brings together.

    index: of this process. accelerator: the number of the one local accelerator that this process uses, if several
    processes share a host; None: it uses all of them.
    """

    coordinator: str
    count: int
    index: int
    accelerator: int | None = None


def read_cluster(text: str | None, environment: Mapping[str, str]) -> Cluster | None:
    """The cluster that `text` describes: HOST:PORT,COUNT,ID, or the name of the system whose environment variables do.
    None without a text. Raises ConfigError."""
    if not text:
        return None
    if text == SLURM:
        found = _slurm(_Variables(SLURM, environment))
    elif text == KUBERNETES:
        has = _Variables(KUBERNETES, environment)
        found = Cluster(has.text(COORDINATOR), has.number(COUNT), has.number("JOB_COMPLETION_INDEX"))
    elif (parts := re.fullmatch(r"([^,]+),(\d+),(\d+)", text)) is not None:
        found = Cluster(parts[1], int(parts[2]), int(parts[3]))
    else:
        raise ConfigError(f"cluster {text!r}; expected {FORMS}")
    host, _, port = found.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"the coordinator of cluster {text!r} is {found.coordinator!r}; expected HOST:PORT")
    if not 0 <= found.index < found.count:
        raise ConfigError(
            f"cluster {text!r} has process {found.index} of {found.count}; expected a number from 0 to the count less 1"
        )
    return found


class _Variables(NamedTuple):
    """Environment variables that a system is known to set."""

    system: str
    environment: Mapping[str, str]

    def text(self, name: str) -> str:
        value = self.environment.get(name)
        if not value:
            raise ConfigError(
                f"cluster {self.system!r}: {name} is not set; expected a process that {self.system} started"
            )
        return value

    def number(self, name: str) -> int:
        value = self.text(name)
        if not value.isdecimal():
            raise ConfigError(f"cluster {self.system!r}: {name} is {value!r}; expected a whole number")
        return int(value)


def _slurm(has: _Variables) -> Cluster:
    """A task of srun. As in JAX's own detection, the coordinator is on the step's first node, at a port that follows
    from the job's number; tasks that share a node take one accelerator each."""
    port = LOWEST_PORT + has.number("SLURM_JOB_ID") % PORTS
    coordinator = has.environment.get(COORDINATOR) or f"{first_host(has.text('SLURM_STEP_NODELIST'))}:{port}"
    alone = re.fullmatch(r"1(\(x\d+\))?", has.text("SLURM_STEP_TASKS_PER_NODE"))
    accelerator = None if alone else has.number("SLURM_LOCALID")
    return Cluster(coordinator, has.number("SLURM_STEP_NUM_TASKS"), has.number("SLURM_PROCID"), accelerator)


def first_host(hosts: str) -> str:
    """The first name of a list of hosts as SLURM writes it: `a` of `a,b`, `n01` of `n[01-16,20]`."""
    parts = re.match(r"([^,\[]+)(?:\[(\w+))?", hosts)
    if parts is None:
        raise ConfigError(f"{hosts!r} is no list of hosts; expected one such as n[01-16]")
    return parts[1] + (parts[2] or "")
