"""Inference on a plan: memory, time to the first token, tokens per second, and the longest context; no jax.

Letters: s slots (requests at once).
"""

import dataclasses
import math
from typing import NamedTuple

from orogen.config.checks import require
from orogen.config.cluster import ClusterConfig
from orogen.config.dtype import BYTES, state_bytes
from orogen.config.engine import IN_FP8, KEPT, EngineConfig
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.cost.kind import costs_of
from orogen.cost.ledger import FLOAT32, OUTER, Ledger, Workload
from orogen.cost.local import local
from orogen.cost.weight import Weight
from orogen.cost.weights import weights
from orogen.parallel.legal import fold_plan
from orogen.simulate.hardware import Hardware, Software, machine
from orogen.simulate.passes import FORWARD, LOGITS, TOKENS, Passes

INT32, IN_8_BITS = 4, 1  # bytes of a number
# More tokens than any text has: the longest context of models in which nothing grows with it.
LONGEST = 2**24
# Kernels of a decoding layer that one program launches one after another: R1's step has 327 in 24 layers and the head
# (experiments/decode_throughput).
KERNELS = 13


class Cache(NamedTuple):
    """Bytes of one request on one device. per_token: keys and values per token of its text; windowed: those of layers
    with a window, per token of their ring; states, ring (of replay): however long the text is. decoded: of the float32
    copies through which a step goes with states that no kernel reads as they are kept; they do not stay."""

    per_token: float
    windowed: float
    states: float
    ring: float
    decoded: float = 0.0


class Inference(NamedTuple):
    """An engine's predicted memory and speed on one device group.

    slots: requests at once on all data ranks. device_memory_bytes by part: weights, key/values, states, ring, logits.
    first_token_seconds: reading one prompt alone. tokens_per_second: of all requests while decoding, in the middle of
    their answers. longest_context: tokens of a text that fit with these slots.
    """

    slots: int
    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    step_seconds: float
    tokens_per_second: float
    memory: dict[str, float]
    device_memory_bytes: float
    memory_limit_bytes: float
    longest_context: int
    limit: str


def cache_of(model: ModelConfig, plan: PlanConfig, engine: EngineConfig) -> Cache:
    """What a request keeps on one device of `plan`: keys and values, and Mamba's states, windows and replay ring."""
    here, size = local(model, plan, Workload(1, 1, BYTES[engine.compute_dtype])), BYTES[engine.compute_dtype]
    kept = size if engine.key_values == KEPT else IN_8_BITS
    state = state_bytes(engine.state_dtype, model.ssm_state_size or 0)
    whole = 0 if _in_kernel(engine) else (model.ssm_state_size or 0) * FLOAT32
    token = windowed = states = ring = decoded = 0.0
    letters = model.layers.main + (model.layers.mtp if engine.drafter == "mtp" else "")
    for letter in letters:
        cached = costs_of(letter).cache(here)
        if cached.token:
            more = cached.token * kept + INT32
            token, windowed = (token + more, windowed) if cached.window is None else (token, windowed + more)
        states += cached.channels * state + cached.taps * size
        decoded += cached.channels * whole
        ring += engine.replayed * (cached.replayed * size + cached.replayed_float32 * FLOAT32)
    return Cache(token, windowed, states, ring, decoded)


def _in_kernel(engine: EngineConfig) -> bool:
    """Whether states are read and written as they are kept (model/stored_state.py)."""
    if engine.state_dtype == "float32":
        return True
    # Replays read float32 and float16 states only.
    read = engine.state_dtype == "float16" or not engine.replayed
    return engine.state_rounding == "stochastic" and read


class Serving(NamedTuple):
    """A model that an engine serves on a plan: `slots` requests per data rank, and what one device holds for each.

    weights: bytes of the `routed` experts and of the `others`.
    """

    model: ModelConfig
    plan: PlanConfig
    engine: EngineConfig
    slots: int
    cache: Cache
    weights: dict[str, float]

    @property
    def columns(self) -> int:
        """The device's columns of the head."""
        return self.plan.vocab_rows(self.model.vocab_size) // self.plan.tensor

    @property
    def window_bytes(self) -> float:
        """A request's keys and values of layers with a window: those tokens, and the piece of a prompt that is read
        beside them (model/slots.py, `Ringed`)."""
        engine = self.engine
        piece = engine.chunk if engine.exact else engine.prefill_tokens
        return self.cache.windowed * (self.model.sliding_window + piece) if self.cache.windowed else 0.0

    @property
    def itemsize(self) -> int:
        """Bytes of a weight or an activation."""
        return BYTES[self.engine.compute_dtype]


def predict_inference(
    model: ModelConfig, cluster: ClusterConfig | None = None, *, plan: PlanConfig | None = None,
    engine: EngineConfig | None = None, prompt: int = 1024, new: int = 1024,
) -> Inference:  # fmt: skip
    """The memory and speed of `engine` serving `model`, with prompts and answers of so many tokens in every slot.

    plan: None for one device; only data, tensor and expert ranks are read, and engines over ranks of context are not
    predicted. Decoding is bound by bytes: every step reads the weights that its tokens use, their keys and values (of a
    window, those within it), and reads and writes states, or replays them; those rounded to the nearest, and replayed
    ones in int8, through a float32 copy. Keys and values are read once, as they are kept, as by EngineConfig.kernels =
    'triton'; the reference copies all pages in float32, and takes longer than this says. Raises ConfigError for plans
    and hardware that do not exist.
    """
    engine = engine or EngineConfig(compute_dtype="bfloat16", slots=1, max_length=prompt + new)
    plan = dataclasses.replace(plan or PlanConfig(), attention="blocked", ssd="triton", remat="none", microbatches=1)
    require(plan.stage == 1, plan, "stage", "1: an engine has no pipeline")
    require(plan.context == 1, plan, "context", "1: the simulator does not predict engines over ranks of context")
    cluster = cluster or ClusterConfig()
    hardware, software = machine(cluster)
    fold_plan(plan, model)
    slots, length = -(-engine.slots // plan.data), prompt + new
    cache = cache_of(model, plan, engine)
    serving = Serving(model, plan, engine, slots, cache, _weights(model, plan, engine))
    memory = _memory(serving, length)
    total = sum(memory.values())
    step, limit = _step(serving, (hardware, software), prompt + new / 2)
    reading = Workload(1, prompt, serving.itemsize)
    passes = Passes(model, plan, reading, (hardware, software), dtype=engine.compute_dtype)
    first = passes.time([TOKENS, *model.layers.main, LOGITS], FORWARD).seconds
    left = hardware.memory_bytes - total + cache.per_token * slots * length
    longest = math.floor(left / (cache.per_token * slots)) if cache.per_token else LONGEST
    return Inference(
        slots=slots * plan.data, prompt_tokens=prompt, new_tokens=new, first_token_seconds=first, step_seconds=step,
        tokens_per_second=slots * plan.data / step, memory=memory, device_memory_bytes=total,
        memory_limit_bytes=hardware.memory_bytes, longest_context=max(0, longest), limit=limit,
    )  # fmt: skip


def largest_context(
    model: ModelConfig, cluster: ClusterConfig, *, plan: PlanConfig | None = None, engine: EngineConfig | None = None
) -> int:
    """The longest text, prompt and answer, that fits with the engine's slots; 0 if none does."""
    return predict_inference(model, cluster, plan=plan, engine=engine, prompt=1, new=1).longest_context


def _weights(model: ModelConfig, plan: PlanConfig, engine: EngineConfig) -> dict[str, float]:
    """Bytes of the weights of one device: `routed` experts, and `others`. If they are held in 8 bits, those are the
    matrices of all layers."""
    ledger, size = Ledger(OUTER, dataclasses.replace(plan, fsdp="none"), model, Workload(1, 1)), BYTES
    found = weights(model, plan.vocab_rows(model.vocab_size))

    def of(weight: Weight, matrix: int) -> float:
        wide = FLOAT32 if weight.float32 else matrix if len(weight.shape) > 1 else size[engine.compute_dtype]
        return ledger.held(weight) * wide

    letters = model.layers.main + (model.layers.mtp if engine.drafter == "mtp" else "")
    of_layers = IN_8_BITS if engine.weights == IN_FP8 else size[engine.compute_dtype]
    sizes = [(w, of(w, of_layers)) for letter in letters for w in found.layers[letter]]
    others = [w for part in found.parts.values() for w in part] + (list(found.mtp) if engine.drafter == "mtp" else [])
    sizes += [(w, of(w, size[engine.compute_dtype])) for w in others]
    routed = sum(held for w, held in sizes if "expert" in w.axes)
    return {"routed": routed, "others": sum(held for _, held in sizes) - routed}


def _memory(serving: Serving, length: int) -> dict[str, float]:
    """Bytes on one device by part, with texts of `length` tokens in all slots."""
    engine, cache, slots = serving.engine, serving.cache, serving.slots
    drafts = 0 if engine.drafter == "none" else engine.drafts
    snapshots = engine.snapshots if engine.prefix_cache else 0
    return {
        "weights": sum(serving.weights.values()),
        "key_values": (cache.per_token * length + serving.window_bytes) * slots,
        "states": cache.states * slots,
        "ring": cache.ring * slots,
        "snapshots": (cache.states + serving.window_bytes) * snapshots,
        "logits": slots * (1 + drafts) * serving.columns * FLOAT32,
    }


def _step(serving: Serving, machine: tuple[Hardware, Software], length: float) -> tuple[float, str]:
    """Seconds of one decoding step for every slot, and what takes most of them."""
    model, plan, engine, slots, cache, held = serving
    shares, hardware = machine[0].shares, machine[0]
    tokens = slots * plan.data if plan.expert > 1 else slots
    used = 1.0
    if model.n_routed_experts:  # distinct experts of so many tokens, evenly chosen
        used = 1 - (1 - model.num_experts_per_tok / model.n_routed_experts) ** tokens
    embedding = 0 if model.tie_word_embeddings else serving.columns * model.hidden_size * serving.itemsize
    # Replayed states are written once per ring, and the ring is read with every token (ReplaySSM).
    passes_over = 2 if not engine.replayed else 1 + 1 / engine.replayed
    states = (cache.states + cache.decoded) * passes_over + cache.ring
    # A window's keys and values are at most as many as the text has.
    seen = min(length, model.sliding_window) if cache.windowed else 0
    read = {
        "other weights": held["others"] - embedding,
        "keys and values": (cache.per_token * length + cache.windowed * seen) * slots,
        "states": states * slots,
    }
    parts = {name: size / (hardware.bandwidth * shares.memory) for name, size in read.items()}
    parts["routed experts"] = held["routed"] * used / (hardware.bandwidth * shares.decode_experts)
    if engine.weights == IN_FP8:  # what converts them makes up for the bytes (experiments/decode_throughput)
        parts["other weights"] *= shares.memory / shares.decode_8_bits
        parts["routed experts"] *= shares.decode_experts / shares.decode_8_bits
    passes = Passes(model, plan, Workload(slots, 1, serving.itemsize), machine, dtype=engine.compute_dtype)
    units = [*model.layers.main, LOGITS]
    # Kernels for few rows are bound by bytes; their products run at the usual share once there are enough rows.
    flops = sum(line.flops for unit in units for line in passes.unit(unit).work[FORWARD])
    compute = flops / (hardware.peak_flops[engine.compute_dtype] * shares.matmul)
    if compute > sum(parts.values()):
        parts = {"products": compute}
    parts["kernels"] = len(units) * KERNELS * shares.decode_launch
    parts["communication"] = sum(one.seconds for unit in units for one in passes.unit(unit).sent[FORWARD])
    seconds, most = sum(parts.values()), max(parts, key=lambda name: parts[name])
    return seconds, f"{most} {100 * parts[most] / seconds:.0f} %"
