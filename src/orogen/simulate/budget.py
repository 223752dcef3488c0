"""What failures, stragglers and prices make of a step: goodput, hours, kWh and dollars."""

import math

from orogen.config.cluster import ClusterConfig
from orogen.simulate.hardware import Hardware

HOUR = 3600.0


def goodput(cluster: ClusterConfig, devices: int) -> float:
    """The share of the time that makes progress, with the cluster's checkpoints and failures; 1 if nothing fails.

    In every interval a checkpoint stops the training; a failure, whose mean time is a device's over their number,
    loses half an interval on average, and a restart. Without an interval in the config it is the best one,
    sqrt(2 · checkpoint · mean time) (Young, 1974).
    """
    if cluster.mtbf_hours is None:
        return 1.0
    between = cluster.mtbf_hours * HOUR / devices
    interval = (cluster.checkpoint_minutes or 0) * 60 or best_interval(cluster.checkpoint_seconds, between)
    useful = interval / (interval + cluster.checkpoint_seconds)
    lost = (interval + cluster.checkpoint_seconds) / 2 + cluster.restart_minutes * 60
    return useful * between / (between + lost)


def best_interval(checkpoint: float, between: float) -> float:
    """Seconds between checkpoints that lose the least; at least as long as a checkpoint takes, and a second."""
    return max(1.0, checkpoint, math.sqrt(2 * checkpoint * between))


def budget(cluster: ClusterConfig, hardware: Hardware, devices: int, seconds: float) -> dict[str, float]:
    """Hours, device hours and kWh of a run of so many seconds; dollars too, if the cluster has a price."""
    hours = seconds / HOUR
    found = {"hours": hours, "device_hours": hours * devices, "kwh": hours * devices * hardware.watts / 1000}
    if cluster.dollars_per_hour is not None:
        found["dollars"] = hours * devices * cluster.dollars_per_hour
    return found
