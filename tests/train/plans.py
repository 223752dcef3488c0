"""Random legal plans, each compared with one device.

`python -m tests.train.plans --count 200 --devices 16 --seed 1 --out plans.jsonl` checks that many and reports each;
`make test` runs eight chosen ones on 8 devices (`chosen.py`), and pipelines.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from orogen.parallel.runtime import configure

# Every layer kind, in patterns with and without repetition; each with the fields that its letters need.
MODELS: dict[str, dict] = {
    "each layer": {"pattern": "ME*-/*E", "mtp_depths": 1},
    "repeated": {},
    "both Mambas": {
        "pattern": "mM*mE", "mtp_depths": 0, "mamba_intermediate_size": 48, "time_step_rank": 3,
        "mamba_proj_bias": True, "mamba_norm_groups": 1, "moe_latent_size": None,
    },
    "windows and sinks": {
        "pattern": "*wE/w", "mtp_depths": 1, "sliding_window": 7, "attention_sinks": True, "qk_norm": True,
        "rope_theta": 100.0, "mlp_bias": True, "tie_word_embeddings": True,
    },
    "latent attention": {
        "pattern": "+EM+", "mtp_depths": 0, "kv_lora_rank": 24, "q_lora_rank": 48, "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 2, "v_head_dim": 3, "rope_theta": 100.0, "n_group": 4, "topk_group": 2,
        "router_balance": "global",
    },
}  # fmt: skip
# Shorter patterns of the same models, which together have every letter, for tests: nearly all the time of a check goes
# into compiling layers, and a repeated layer is compiled once.
SHORT = {
    "each layer": "ME/*", "repeated": "E-E-/*", "both Mambas": "mMmME", "windows and sinks": "wE/*",
    "latent attention": "+E",
}  # fmt: skip
AXES = ("data", "context", "tensor", "expert", "expert_tensor")
CHOICES: dict[str, tuple] = {
    "stream": ("time", "whole"),
    "fsdp": ("none", "optimizer", "gradients", "parameters"),
    "dispatch": ("allgather", "alltoall", "ragged"),
    "capacity_factor": (None, 1.0, 1.5),
    "drop_policy": ("position", "probs"),
    "context_attention": ("ring", "allgather", "alltoall"),
    "context_ssm": ("state", "heads"),
    "shift": ("permute", "alltoall"),
    "microbatches": (1, 1, 2, 3),
    "remat": ("none", "full"),
    "attention": ("full", "blocked"),
}
# No size of `tensor` above 1 divides 95, and only one divides 94.
VOCABULARIES = (96, 95, 94)
PIPELINE: dict[str, tuple] = {
    "stage": (2, 2, 4),
    "schedule": ("gpipe", "1f1b", "interleaved"),
    "virtual": (None, 1, 2),
    "microbatches": (1, 2, 3, 4, 8),
    "remat": ("none", "full", "elementwise", "selective", "paper"),
}


def random_run(rng: random.Random, devices: int, *, stages: bool = False, short: bool = False) -> tuple[str, Any]:
    """The name of a model in MODELS, or in SHORT, and a run of it on a legal plan of 2 to `devices` devices; with
    `stages`, on a pipeline of two or more stages."""
    from tests.helpers import hybrid, run_config

    from orogen.config.checks import ConfigError
    from orogen.parallel.plan import make_plan

    while True:
        name = rng.choice(list(MODELS))
        plan: dict[str, Any] = {axis: rng.choice((1, 2, 2, 3, 4, 8)) for axis in AXES}
        plan |= {field: rng.choice(values) for field, values in CHOICES.items()}
        if stages:
            plan |= {field: rng.choice(values) for field, values in PIPELINE.items()}
        ranks = plan["data"] * plan["context"]
        if plan["fsdp"] != "none" and rng.random() < 0.4:
            plan["fsdp_size"] = rng.choice([f for f in range(1, ranks + 1) if ranks % f == 0])
        if not 2 <= ranks * plan["tensor"] * plan.get("stage", 1) <= devices:
            continue
        rows = plan["data"] * plan["microbatches"] * rng.choice((1, 2))
        pieces = plan["context"] * (plan["tensor"] if plan["context"] == 1 else max(2, plan["tensor"]))
        length = pieces * rng.choice((3, 5, 6)) if pieces > 8 else pieces * rng.choice((9, 10, 13))
        try:
            seed = rng.randrange(1000)
            if not stages:
                plan["interleave"] = 1 + seed % 2 * (plan["microbatches"] % 2 == 0)
            pattern = {"pattern": SHORT[name]} if short else {}
            model = hybrid(**MODELS[name] | pattern, vocab_size=VOCABULARIES[seed % len(VOCABULARIES)])
            run = run_config(model, plan=plan, batch_size=rows, sequence_length=length, seed=seed).check()
            make_plan(run.plan, run.model, abstract=True)
        except ConfigError:
            continue
        return name, run


def random_runs(count: int, *, seed: int, devices: int, **kinds: bool) -> list[tuple[str, Any]]:
    """`count` random runs. kinds: `stages` and `short`, as `random_run` takes them."""
    rng = random.Random(seed)
    return [random_run(rng, devices, **kinds) for _ in range(count)]


def describe(plan: Any) -> dict[str, Any]:
    """The fields in which a plan differs from a plan of one device."""
    default = type(plan)()
    return {field: value for field, value in vars(plan).items() if value != getattr(default, field)}


def main() -> int:
    """Verifies random plans one after another; writes a JSON line for each. Exit status 1 if one fails."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--devices", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stages", action="store_true", help="plans of pipelines")
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="these of the count; all by default")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    configure(options.devices)
    from orogen.train.verify import verify

    failed = 0
    drawn = {"seed": options.seed, "devices": options.devices, "stages": options.stages}
    numbered = enumerate(random_runs(options.count, **drawn))
    chosen = [(n, named) for n, named in numbered if options.only is None or n in options.only]
    with options.out.open("a") as out:
        for number, (name, run) in chosen:
            start = time.monotonic()
            facts = {"number": number, "model": name, "plan": describe(run.plan)}
            facts |= {"rows": run.train.batch_size, "length": run.train.sequence_length}
            try:
                verdict = verify(run)
                facts |= {"passed": verdict.passed, **verdict._asdict()}
            except Exception as error:  # a plan that does not run is a finding too
                facts |= {"passed": False, "error": f"{type(error).__name__}: {str(error)[:500]}"}
            failed += not facts["passed"]
            facts["seconds"] = round(time.monotonic() - start, 1)
            print(json.dumps(facts), file=out, flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} plans equal one device")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
