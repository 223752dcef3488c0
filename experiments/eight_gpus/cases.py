"""What is timed on eight GPUs, by part of the experiment, and what the simulator predicts of it."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from plans import DEVICES, MODEL, config, files

from orogen.bench.workload import Workload
from orogen.config.cluster import ClusterConfig
from orogen.config.plan import PlanConfig
from orogen.config.run import RunConfig
from orogen.simulate.predict import predict
from orogen.simulate.routing import BALANCED, Routing, read_routing

# The same cases for eight simulated devices: models of toy width, with kernels that a CPU has. By letter of the
# pattern, or for all.
TOY: dict[str, dict[str, Any]] = {
    "all": {"ModelConfig.vocab_size": 259, "ModelConfig.hidden_size": 32},
    "*": {"ModelConfig.num_attention_heads": 8, "ModelConfig.head_dim": 8},
    "-": {"ModelConfig.intermediate_size": 48},
    "M": {
        "ModelConfig.mamba_num_heads": 8, "ModelConfig.mamba_head_dim": 8, "ModelConfig.ssm_state_size": 16,
        "ModelConfig.chunk_size": 8,
    },
    "E": {
        "ModelConfig.n_routed_experts": 8, "ModelConfig.num_experts_per_tok": 2,
        "ModelConfig.moe_intermediate_size": 24, "ModelConfig.moe_shared_expert_intermediate_size": 40,
    },
}  # fmt: skip
KERNELS = {
    "all": ["rms_norm"],
    "*": ["attention"],
    "M": ["ssd", "causal_conv1d"],
    "E": ["grouped_matmul", "permutation"],
}
TOY_LENGTH, SHORTEST, PATTERN = 64, 8192, "ModelConfig.pattern="
# Routing after training is not known before: a guess that is uneven, by which predictions of real routing go.
UNEVEN = "zipf:0.5"


class Case(NamedTuple):
    """A workload. plan: the file with the plan of the full-size step, None for other models; against: the case with
    which its rate per device is compared."""

    work: Workload
    plan: Path | None = None
    against: str | None = None

    def config(self, *, small: bool = False) -> RunConfig:
        """Its configuration, of toy size if `small`. Raises ConfigError."""
        if not small:
            return config(self.plan) if self.plan else self.work.config()
        if self.plan:
            return config(self.plan, (f"TrainConfig.sequence_length={TOY_LENGTH}", *_toy("ME*E", ())))
        own = next((_pattern(b) for b in self.work.bindings if b.startswith(PATTERN)), None)
        pattern = own or ("M-M*-" if self.work.model.startswith("hybrid") else "MEM*EMEM")
        ranks = self.work.sequence_length // SHORTEST if self.work.sequence_length > SHORTEST else 1
        toy = {"sequence_length": TOY_LENGTH * ranks, "bindings": _toy(pattern, self.work.bindings)}
        return dataclasses.replace(self.work, **toy).config()


def _pattern(binding: str) -> str:
    return binding.removeprefix(PATTERN).strip("'")


def _toy(pattern: str, bindings: tuple[str, ...]) -> tuple[str, ...]:
    """Bindings of toy sizes, overridden by those of the case."""
    parts = ["all", *dict.fromkeys(pattern)]
    sizes = {name: value for part in parts for name, value in TOY[part].items()}
    kernels = [kernel for part in parts for kernel in KERNELS.get(part, ())]
    chosen = {f"PlanConfig.{kernel}": repr(getattr(PlanConfig(), kernel)) for kernel in kernels}
    own = dict(binding.split("=", 1) for binding in bindings)
    return tuple(f"{name}={value}" for name, value in {PATTERN[:-1]: repr(pattern), **sizes, **chosen, **own}.items())


def _bound(plan: dict[str, Any], **others: Any) -> tuple[str, ...]:
    model = tuple(f"ModelConfig.{name}={value!r}" for name, value in others.items())
    return (*model, *(f"PlanConfig.{name}={value!r}" for name, value in plan.items()))


def nano(hardware: str) -> dict[str, Case]:
    """The full-size step under each plan, with balanced routing."""
    return {f"{name}, balanced": case for name, case in full_size(hardware, routing="balanced").items()}


def full_size(hardware: str, *, routing: str = "real") -> dict[str, Case]:
    """The full-size step, by the name of its plan."""
    cases = {}
    for name, path in files(hardware).items():
        run = config(path)
        rows = run.train.batch_size // run.plan.microbatches
        work = Workload(model=MODEL.stem, rows=rows, part="whole_step", routing=routing)
        cases[name] = Case(work, plan=path)
    return cases


AXES: dict[str, Any] = {
    "data": lambda n: {"data": n, "fsdp": "optimizer"},
    "expert": lambda n: {"data": n, "expert": n, "fsdp": "optimizer"},
    "tensor": lambda n: {"tensor": n},
    "context": lambda n: {"context": n},
    "stage": lambda n: {"stage": n, "schedule": "eager_1f1b", "microbatches": 4 * n},
}


def scaling(hardware: str) -> dict[str, Case]:
    """Whole steps of R1 with as many tokens per GPU under every plan: more rows; under context longer rows; under
    stage more microbatches."""
    del hardware
    one = "one GPU"
    cases = {one: Case(Workload(rows=2, part="whole_step", weak_scaling="rows"))}
    kinds = {"context": "length", "stage": None}
    for axis, plan in AXES.items():
        for n in (2, 4, 8):
            scaled = kinds.get(axis, "rows")
            work = Workload(rows=2, part="whole_step", weak_scaling=scaled, bindings=_bound({"unroll": 2, **plan(n)}))
            cases[f"{axis} {n}"] = Case(work, against=one)
    return cases


UNREAD = dict.fromkeys(
    ("num_attention_heads", "num_key_value_heads", "head_dim", "mamba_num_heads", "mamba_head_dim", "n_groups",
     "ssm_state_size")
)  # fmt: skip
DENSE = {"data": 4, "tensor": 2}
MAPPINGS = {"folded": {"expert": 8}, "unfolded": {"expert": 4, "expert_tensor": 2}}
EXCHANGES = {
    "alltoall": {"dispatch": "alltoall", "capacity_factor": 1.25},
    "ragged": {"dispatch": "ragged", "buffer_factor": 1.5},
}


def folding(hardware: str) -> dict[str, Case]:
    """Nano's widths with dense tensor 2: both passes of two expert layers, and whole steps of seven layers. The
    vocabulary is so small that embedding and head take nothing."""
    del hardware
    cases: dict[str, Case] = {}
    for exchange, dispatch in EXCHANGES.items():
        for mapping, experts in MAPPINGS.items():
            against = None if mapping == "unfolded" else f"{exchange}, unfolded"
            for what, part, layers in (
                ("layers", "forward_backward", {"pattern": "EE", **UNREAD}),
                ("step", "whole_step", {"pattern": "MEMEM*E"}),
            ):
                bindings = _bound({**DENSE, **dispatch, **experts}, vocab_size=512, **layers)
                work = Workload(model=MODEL.stem, rows=8, part=part, routing="balanced", bindings=bindings)
                cases[f"{exchange}, {mapping}, {what}"] = Case(work, against=against and f"{against}, {what}")
    return cases


def context(hardware: str) -> dict[str, Case]:
    """Both passes of the dense hybrid of 1.04 B parameters over one row: of 524,288 tokens on eight GPUs, and of 65,536
    on one, which then has as many tokens."""
    del hardware
    work = Workload(model="hybrid_1b", rows=1, sequence_length=65536)
    cases = {"one GPU, 65,536 tokens": Case(work)}
    for name in ("ring", "allgather"):
        plan = _bound({"context": DEVICES, "context_attention": name})
        longer = dataclasses.replace(work, sequence_length=65536 * DEVICES, bindings=plan)
        cases[f"context 8, {name}, 524,288 tokens"] = Case(longer, against="one GPU, 65,536 tokens")
    return cases


PARTS = {"nano": nano, "scaling": scaling, "folding": folding, "context": context}


def prediction(case: Case, hardware: str, *, uneven: bool = False) -> dict[str, Any]:
    """What the simulator says of a case: milliseconds, tokens per second, MFU and GB on a device. uneven: routing by
    UNEVEN instead of balanced."""
    run, routing = case.config(), read_routing(UNEVEN) if uneven else BALANCED
    return {"hardware": hardware, **_predicted(run, hardware, routing, whole=case.work.part == "whole_step")}


def _predicted(run: RunConfig, hardware: str, routing: Routing, *, whole: bool) -> dict[str, Any]:
    found = predict(run, ClusterConfig(hardware=hardware), routing=routing)
    # Of both passes alone, without the optimizer and what the host does once per step.
    seconds = found.step_seconds - (0 if whole else found.seconds["optimizer"] + found.seconds["host"])
    tokens = run.train.batch_size * run.train.sequence_length
    return {
        "ms": round(1e3 * seconds, 1), "tokens_per_second": round(tokens / seconds),
        "mfu": round(found.mfu * found.step_seconds / seconds, 4), "gb": round(found.device_memory_bytes / 1e9, 1),
    }  # fmt: skip
