"""`orogen plan` and `orogen simulate`. Importing this does not import jax."""

import argparse
from typing import Any

from orogen.command import Command, add_config_arguments, answer, load_config, positive
from orogen.config.checks import ConfigError
from orogen.config.dtype import BYTES
from orogen.config.fields import describe_fields, field_lines
from orogen.config.run import RunConfig
from orogen.parallel.runtime import configure


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    fields = ("--fields", "list every field that a gin file may bind: type, default, meaning")
    add_config_arguments(parser, instead=[fields])
    parser.add_argument(
        "--compile", action="store_true", help="also show what one layer of each kind sends, as XLA compiles it"
    )
    parser.add_argument(
        "--memory", action="store_true", help="also show what a device holds: state, activations, the compiled step"
    )


def plan(options: argparse.Namespace) -> int:
    """`orogen plan`."""
    if options.fields:
        if options.gin_bindings:
            raise ConfigError("--fields lists every field; expected it without --gin_bindings")
        fields = describe_fields()
        answer(options, fields, field_lines(fields))
        return 0
    config, _ = load_config(options, "model")
    from orogen.cost.assemble import TYPICAL_LENGTH, assemble
    from orogen.parallel.describe import describe_plan, plan_lines

    length = config.train.sequence_length if config.train else TYPICAL_LENGTH
    laid, built = assemble(config.model, config.plan, length=length, abstract=True)
    facts = describe_plan(laid, built.params, built.layout.segmented, built.layout.filled)
    lines = plan_lines(facts)
    if options.compile:
        config.need("train")
    if options.memory:
        config.need("train", "optimizer")
    if config.train is not None:
        more, more_lines = _collectives(options, config)
        facts, lines = {**facts, **more}, [*lines, "", *more_lines]
    answer(options, facts, lines)
    return 0


def _collectives(options: argparse.Namespace, config: RunConfig) -> tuple[dict[str, Any], list[str]]:
    """What the plan's devices send, by formula and, with --compile, in XLA's programs for simulated devices; with
    --memory, also what they hold."""
    from orogen.cost.communication import collective_lines, describe_collectives

    sizes, train, model, work = config.plan, config.train, config.model, _microbatch(config)
    facts: dict[str, Any] = {"collectives": describe_collectives(model, sizes, work)}
    lines = collective_lines(facts["collectives"])
    if (options.compile or options.memory) and not options.fake_devices:
        configure(sizes.devices)
    if options.memory:
        from orogen.simulate.memory import describe_memory, memory_lines
        from orogen.simulate.predict import fullest

        largest = fullest(config)
        facts["memory"] = describe_memory(config, _microbatch(largest), largest=largest)
        facts["memory"]["sequence_length"] = largest.train.sequence_length
        lines += ["", *memory_lines(facts["memory"])]
    if options.compile:
        from orogen.simulate.aot import compare, compared_lines, flops_overhead

        letters = dict.fromkeys(model.layers.main + model.layers.mtp)
        facts["compiled"] = compare(model, sizes, work, letters)
        facts["flops_overhead"] = flops_overhead(model, sizes, train.batch_size, train.sequence_length)
        overhead = f"matrix products of all devices over those of one: {100 * facts['flops_overhead']:+.2f} %"
        lines += ["", *compared_lines(facts["compiled"]), "", overhead]
    return facts, lines


def _microbatch(config: RunConfig) -> Any:
    """What one device has of a microbatch."""
    from orogen.cost.ledger import Workload

    sizes, train = config.plan, config.train
    sequences, tokens = train.batch_size // (sizes.data * sizes.microbatches), train.sequence_length // sizes.context
    return Workload(sequences, tokens, BYTES[train.compute_dtype], train.carry_states)


PLAN = Command(
    name="plan",
    help="show the mesh, where each parameter lives, and what each layer sends; needs no devices",
    examples=(
        "orogen plan --gin_file gin_configs/recipes/quickstart.gin",
        "orogen plan --gin_file gin_configs/recipes/quickstart.gin --compile --memory",
        "orogen plan --fields",
    ),
    add_arguments=_add_arguments,
    run=plan,
)


def _add_simulate_arguments(parser: argparse.ArgumentParser) -> None:
    listed = ("--hardware", "list every kind of hardware and its constants, with sources")
    add_config_arguments(parser, instead=[listed])
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    routing = "how tokens choose experts: balanced, zipf:1.0, or a run folder with its loads"
    parser.add_argument("--routing", default="balanced", metavar="R", help=routing)
    parser.add_argument("--search", action="store_true", help="rank the legal plans on --devices, explain the best two")
    parser.add_argument("--devices", type=positive, metavar="N", help="devices of --search; default: the plan's")
    parser.add_argument("--out", metavar="F", help="write the best plan of --search as a gin file")
    parser.add_argument("--html", metavar="F", help="write one page with pictures, which needs no network")
    compiled = (
        "also compile the real step, and compare memory and traffic: for simulated CPU devices (the default), or for "
        "ClusterConfig's GPU (extra cuda; needs no GPU)"
    )
    parser.add_argument("--compile", nargs="?", const="cpu", choices=("cpu", "gpu"), help=compiled)
    parser.add_argument("--inference", action="store_true", help="serve instead of train: EngineConfig's slots")
    parser.add_argument("--prompt_tokens", type=positive, default=1024, metavar="N", help="of --inference")
    parser.add_argument("--new_tokens", type=positive, default=1024, metavar="N", help="of --inference")


def simulate(options: argparse.Namespace) -> int:
    """`orogen simulate`."""
    from orogen.simulate.report import hardware_report, run

    if options.hardware:
        if options.gin_bindings:
            raise ConfigError("--hardware lists all hardware; expected it without --gin_bindings")
        facts, lines = hardware_report()
    else:
        facts, lines = run(options)
    answer(options, facts, lines)
    return 0


SIMULATE = Command(
    name="simulate",
    help="predict step time, memory and cost of a plan on a cluster, or of serving a model; needs no devices",
    examples=(
        "orogen simulate --gin_file gin_configs/recipes/quickstart.gin --gin_bindings \"ClusterConfig.hardware='cpu'\"",
        "orogen simulate --gin_file gin_configs/recipes/quickstart.gin --search --devices 16 --out plan.gin",
        "orogen simulate --gin_file gin_configs/models/nemotron_nano_9b_v2.gin --inference --prompt_tokens 8192",
        "orogen simulate --gin_file gin_configs/recipes/quickstart.gin --html plan.html",
        "orogen simulate --hardware",
    ),
    add_arguments=_add_simulate_arguments,
    run=simulate,
    bare=True,
)
