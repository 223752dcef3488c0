"""What `orogen simulate` answers: a prediction, a ranking of plans, an engine's speed, beside a compiled step."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from orogen.config.checks import ConfigError
from orogen.config.cluster import ClusterConfig
from orogen.config.engine import EngineConfig
from orogen.config.files import write_atomically
from orogen.config.load import load_cluster
from orogen.config.precision import PLAIN
from orogen.config.run import PARTS, RunConfig
from orogen.simulate.decode import predict_inference
from orogen.simulate.hardware import machine
from orogen.simulate.predict import predict
from orogen.simulate.prediction import Prediction
from orogen.simulate.routing import Routing, read_routing
from orogen.simulate.search import MOST_DEVICES, Ranking, describe, explain, nearest_feasible, plan_text, search
from orogen.simulate.shapes import without_blend
from orogen.simulate.shown import hardware_facts, hardware_lines, inference_lines, prediction_lines
from orogen.simulate.target import check_target

GIB = 2**30
SHOWN = 10  # plans of a ranking that JSON has
# What no prediction covers, by the part of the run; the first also of inference.
LEFT_OUT = (
    ("lora", "adapters"), ("distill", "a teacher's passes"), ("elastic", "submodels"), ("vision", "images"),
    ("preference", "a reference's passes"), ("rl", "rollouts"),
)  # fmt: skip

Answer = tuple[dict[str, Any], list[str]]


def hardware_report() -> Answer:
    """All hardware."""
    facts = hardware_facts()
    return facts, hardware_lines(facts)


def run(options: argparse.Namespace) -> Answer:
    """The facts and lines of a simulation. Raises ConfigError."""
    for switch, needed in (("devices", "search"), ("out", "search")):
        if getattr(options, switch) is not None and not getattr(options, needed):
            raise ConfigError(f"--{switch} is {getattr(options, switch)}; expected it with --{needed}")
    for switch in ("search", "inference"):
        if options.compile and getattr(options, switch):
            raise ConfigError(f"--compile is {options.compile!r}; expected it without --{switch}")
    config, cluster, engine = load_cluster(options.gin_file, options.gin_bindings)
    config.need("model")
    _check_predicted(config, inference=options.inference)
    if options.html and options.inference:
        raise ConfigError(f"--html is {options.html!r}; expected it without --inference")
    if options.inference:
        return _inference(config, cluster, engine, options)
    config.need("train")
    routing = read_routing(options.routing)
    if options.search:
        return _search(config, cluster, routing, options)
    if options.compile:
        config.need("optimizer")
    if options.compile == "gpu":
        check_target(machine(cluster)[0])
    found = _predicted(config, cluster, routing)
    facts, lines = found.facts(), prediction_lines(found)
    if options.html:
        _write_page(config, cluster, found, routing=routing, options=options)
    if options.compile:
        from orogen.parallel.runtime import configure
        from orogen.simulate.compiled import compare, compared_lines

        gpu = machine(cluster)[0] if options.compile == "gpu" else None
        configure(config.plan.devices if gpu is None else 1)
        facts["compiled"] = compare(config, gpu)
        lines += ["", *compared_lines(facts["compiled"])]
    return facts, lines


def _check_predicted(config: RunConfig, *, inference: bool) -> None:
    """Raises ConfigError for a run that would be predicted as pretraining, which it is not."""
    for part, what in LEFT_OUT[:1] if inference else LEFT_OUT:
        if getattr(config, part) is not None:
            raise ConfigError(f"{PARTS[part].__name__} has bindings; expected none: {what} are not predicted")
    if inference:
        return
    if config.precision.recipe != PLAIN:
        expected = f"expected {PLAIN!r}: emulated rounding is not predicted"
        raise ConfigError(f"PrecisionConfig.recipe is {config.precision.recipe!r}; {expected}")
    if config.optimizer is not None and config.optimizer.trained:
        expected = "expected (): steps that train a part of the model are not predicted"
        raise ConfigError(f"OptimizerConfig.trained is {config.optimizer.trained!r}; {expected}")


def _predicted(config: RunConfig, cluster: ClusterConfig, routing: Routing) -> Prediction:
    """The prediction. Raises ConfigError, with the nearest plan that runs, if the plan is not legal or does not fit."""
    machine(cluster)
    devices = cluster.devices or config.plan.devices
    try:
        found = predict(config.check(), cluster, routing=routing)
    except ConfigError as error:
        if not _runs_anywhere(config):
            raise
        raise ConfigError(f"{error}; {_nearest(config, cluster, routing, devices)}") from None
    if not found.fits:
        fullest = max(found.memory, key=lambda stage: stage.total)
        raise ConfigError(
            f"the plan needs {found.device_memory_bytes / GIB:.1f} GiB on a device of stage {fullest.stage}; expected "
            f"at most the {found.memory_limit_bytes / GIB:.1f} GiB of {found.hardware}; "
            f"{_nearest(config, cluster, routing, devices)}"
        )
    return found


def _runs_anywhere(config: RunConfig) -> bool:
    """Whether the model and its batches are legal on one device."""
    sizes = dict.fromkeys(("data", "context", "tensor", "stage", "expert", "expert_tensor", "microbatches"), 1)
    rest = {"fsdp": "none", "fsdp_size": None, "schedule": "1f1b", "virtual": None}
    try:
        without_blend(dataclasses.replace(config, plan=dataclasses.replace(config.plan, **sizes, **rest))).check()
    except ConfigError:
        return False
    return True


def _nearest(config: RunConfig, cluster: ClusterConfig, routing: Routing, devices: int) -> str:
    near = nearest_feasible(config, cluster, devices, routing=routing)
    if near is None:
        return f"no plan on up to {MOST_DEVICES:,} devices fits"
    size = near.prediction.device_memory_bytes / GIB
    return f"nearest that fits: {near.plan.devices} devices, {describe(near.plan)}, {size:.1f} GiB"


def _search(config: RunConfig, cluster: ClusterConfig, routing: Routing, options: argparse.Namespace) -> Answer:
    devices = options.devices or cluster.devices or config.plan.devices
    try:
        ranking = search(config, cluster, devices, routing=routing)
    except ConfigError as error:
        if not _runs_anywhere(config):
            raise
        raise ConfigError(f"{error}; {_nearest(config, cluster, routing, devices)}") from None
    best = ranking.plans[0]
    lines = explain(ranking)
    if options.out:
        rate = best.prediction.tokens_per_second
        text = plan_text(best.plan, f"{devices} x {best.prediction.hardware}: {rate:,.0f} tokens/s predicted")
        write_atomically(Path(options.out), text.encode())
        lines.append(f"the winner is in {options.out}")
    if options.html:
        chosen = dataclasses.replace(config, plan=best.plan)
        _write_page(chosen, cluster, best.prediction, routing=routing, options=options, ranking=ranking)
    facts = best.prediction.facts()
    facts["plans"] = [
        {
            "plan": dataclasses.asdict(ranked.plan),
            **{
                name: getattr(ranked.prediction, name)
                for name in ("step_seconds", "mfu", "tokens_per_second", "device_memory_bytes", "limit")
            },
        }
        for ranked in ranking.plans[:SHOWN]
    ]
    return facts | {"legal": ranking.legal, "fitting": ranking.fitting, "skipped": ranking.skipped}, [
        *lines,
        "",
        *prediction_lines(best.prediction),
    ]


def _write_page(
    config: RunConfig, cluster: ClusterConfig, found: Prediction, *, routing: Routing, options: argparse.Namespace,
    ranking: Ranking | None = None,
) -> None:  # fmt: skip
    """Writes --html."""
    from orogen.simulate.page import write_simulation  # draws: matplotlib takes half a second to import

    name = Path(options.gin_file[-1]).stem
    write_simulation(Path(options.html), name, config, cluster, found, routing=routing, ranking=ranking)


def _inference(config: RunConfig, cluster: ClusterConfig, engine: EngineConfig, options: argparse.Namespace) -> Answer:
    found = predict_inference(
        config.model, cluster, plan=config.plan, engine=engine, prompt=options.prompt_tokens, new=options.new_tokens
    )
    if found.device_memory_bytes > found.memory_limit_bytes:
        raise ConfigError(
            f"{found.slots} requests of {options.prompt_tokens + options.new_tokens} tokens need "
            f"{found.device_memory_bytes / GIB:.1f} GiB on a device; expected at most "
            f"{found.memory_limit_bytes / GIB:.1f} GiB; longest context that fits: {found.longest_context:,} tokens"
        )
    return found._asdict(), inference_lines(found)
