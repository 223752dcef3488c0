"""The time of a microbatch's forward and backward pass through each chunk of a pipeline, with what it sends."""

import collections
import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.remat import FUSED
from orogen.cost.collectives import embedded, enter
from orogen.cost.communication import unit_collectives
from orogen.cost.kept import FLOAT32, kept_bytes, local
from orogen.cost.ledger import ENDS, LOAD, MTP, PIPELINE, Collective, Ledger, Workload
from orogen.cost.weights import weights
from orogen.simulate.hardware import Hardware, Software
from orogen.simulate.links import KIND_NAMES, kind_of, links_of
from orogen.simulate.operations import (
    Operation,
    end_operations,
    layer_operations,
    logit_operations,
    memory,
    mtp_operations,
)
from orogen.simulate.prediction import Roofline
from orogen.simulate.roofline import Clock

FORWARD, BACKWARD = "forward", "backward"
PHASES = (FORWARD, BACKWARD)
# The units of the first and of the last segment beside their layers.
EMBEDDING, HEAD = "embedding", "head"
# In inference, in their place: the tokens' embedding, and logits of each sequence's last position.
TOKENS, LOGITS = "tokens", "logits"


class Sent(NamedTuple):
    """One record of the ledger and what it takes."""

    record: Collective
    kind: str
    link: str
    seconds: float


class Unit(NamedTuple):
    """A layer, or another part of a segment, by phase (recomputation is in the backward phase): its operations' times
    and what it sends; `update` is sent once per step."""

    work: dict[str, list[Roofline]]
    sent: dict[str, list[Sent]]
    update: list[Sent]

    def seconds(self, phase: str) -> float:
        """The time of its operations."""
        return sum(line.seconds for line in self.work[phase])


class Time(NamedTuple):
    """The time of a pass: compute, and by kind what it sends and what of that is exposed. hidden: the rest."""

    compute: float
    sent: dict[str, float]
    exposed: dict[str, float]
    contended: float

    @property
    def seconds(self) -> float:
        """All of it, one after another."""
        return self.compute + self.contended + sum(self.exposed.values())


class Passes:
    """Times of everything that one device of a plan does for one microbatch."""

    def __init__(
        self, model: ModelConfig, plan: PlanConfig, work: Workload, machine: tuple[Hardware, Software], *, dtype: str,
        imbalance: float = 1.0, straggler: float = 0.0,
    ):  # fmt: skip
        self.model, self.plan, self.work, self.imbalance = model, plan, work, imbalance
        self.hardware, self.software = machine
        self.slower = 1 + straggler
        self.here = local(model, plan, work, dynamic=bool(self.software.dynamic), imbalance=imbalance)
        self.clock = Clock(self.hardware, self.software, plan, dtype)
        self.links = links_of(self.hardware, self.software, Ledger(ENDS, plan, model, work))
        self.unit = functools.cache(self._unit)
        self.of_counts = functools.cache(self._time)

    def _unit(self, name: str) -> Unit:
        here = self.here
        if name in (EMBEDDING, HEAD):
            first, last = end_operations(here, 1 + self.model.mtp_depths)
            # The ledger has the two together. The embedding sends its output, the head all the rest.
            records = unit_collectives(ENDS, self.model, self.plan, self.work)
            mine = [r for r in records if (r.part == "embedding") == (name == EMBEDDING)]
            return self._made(name, first if name == EMBEDDING else last, mine)
        if name in (TOKENS, LOGITS):
            return self._served(name)
        operations = mtp_operations(here) if name == MTP else layer_operations(name, here)
        operations += self._kept_between(name)
        return self._made(name, operations, unit_collectives(name, self.model, self.plan, self.work))

    def _served(self, name: str) -> Unit:
        """An end of the model in inference. The head sends the stream that it reads, and logits to every rank."""
        ledger, plan, model = Ledger(ENDS, self.plan, self.model, self.work), self.plan, self.model
        if name == TOKENS:
            embedded(ledger, 0)
            return self._made(name, end_operations(self.here, 1)[0], ledger.records)
        enter(ledger, "head")
        columns = plan.vocab_rows(model.vocab_size) // plan.tensor
        ledger.add("logits", "forward", "all-gather", ("tensor",), self.work.rows * columns * FLOAT32)
        return self._made(name, logit_operations(self.here), ledger.records)

    def _kept_between(self, name: str) -> list[Operation]:
        """What it takes to add up gradients over microbatches, and to keep a pipeline's chunks and residuals in arrays
        from which every pass takes its own (parallel/pipeline.py)."""
        plan, found = self.plan, weights(self.model)
        ledger = Ledger(ENDS, plan, self.model, self.work)
        numbers = sum(ledger.held(w) for w in (found.mtp if name == MTP else found.layers[name]))
        forward = backward = 0.0
        if plan.microbatches > 1:
            backward += numbers * (2 * FLOAT32 + self.work.itemsize)
        if plan.stage > 1 and self.software.one_program:
            kept = 0.0 if name == MTP else sum(kept_bytes(name, self.here)[0].values())
            copied = 2 * numbers * self.work.itemsize + 2 * kept
            forward, backward = forward + copied, backward + copied
        return [memory("accumulate", forward, backward)] if forward + backward else []

    def _made(self, name: str, operations: Sequence[Operation], records: Iterable[Collective]) -> Unit:
        work: dict[str, list[Roofline]] = {FORWARD: [], BACKWARD: []}
        for operation in operations:
            work[FORWARD].append(self.clock.forward(name, operation))
            work[BACKWARD].append(self.clock.backward(name, operation))
            if name not in (EMBEDDING, HEAD, TOKENS, LOGITS, MTP) and self._recomputed(name, operation):
                work[BACKWARD].append(self.clock.forward(name, operation, "recompute"))
        sent: dict[str, list[Sent]] = collections.defaultdict(list)
        for record in records:
            seconds, link = self.links.seconds(record)
            if kind_of(record) == "expert":
                seconds *= self.imbalance
            phase = BACKWARD if record.phase == "recompute" else record.phase
            sent[phase].append(Sent(record, kind_of(record), link, seconds))
        return Unit(work, {phase: sent[phase] for phase in PHASES}, sent["update"])

    def _recomputed(self, letter: str, operation: Operation) -> bool:
        remat = self.plan.layer_remat(letter)
        if remat.kind == "full":
            return bool(self.software.recompute_all) or not operation.last
        if remat.kind == "elementwise":
            return operation.kind in ("memory", "ssd") and operation.makes not in FUSED and operation.name != "residual"
        # Without a name: cheap elementwise work between two named arrays.
        return remat.kind == "names" and operation.makes in remat.again

    def time(self, units: Sequence[str], phase: str) -> Time:
        """A pass of one microbatch through `units`, one after another."""
        return self.of_counts(tuple(sorted(collections.Counter(units).items())), phase)

    def _time(self, counts: tuple[tuple[str, int], ...], phase: str) -> Time:
        compute = self.slower * sum(n * self.unit(name).seconds(phase) for name, n in counts)
        sent: dict[str, float] = dict.fromkeys(KIND_NAMES, 0.0)
        for name, n in counts:
            for one in self.unit(name).sent[phase]:
                sent[one.kind] += n * one.seconds
        return self.hidden(compute, sent)

    def hidden(self, compute: float, sent: dict[str, float]) -> Time:
        """What of the traffic is hidden behind so much compute: each kind by its share, until no compute is left."""
        left, exposed = compute, {}
        for kind, seconds in sent.items():
            behind = min(left, seconds * getattr(self.software, f"overlap_{kind}"))
            exposed[kind] = seconds - behind
            left -= behind
        return Time(compute, sent, exposed, self.software.contention * (compute - left))

    def update(self, units: Iterable[str]) -> list[Sent]:
        """What a device sends once per step for these units."""
        return [one for name in units for one in self.unit(name).update] + self._load

    @functools.cached_property
    def _load(self) -> list[Sent]:
        records = unit_collectives(LOAD, self.model, self.plan, self.work)
        timed = [(record, *self.links.seconds(record)) for record in records]
        return [Sent(record, "tensor", link, seconds) for record, seconds, link in timed]

    def hop(self) -> Sent | None:
        """What a stage sends to the next after a pass; None without stages."""
        if self.plan.stage == 1:
            return None
        ledger = Ledger(PIPELINE, self.plan, self.model, self.work)
        ledger.add("stream", "forward", "collective-permute", ("stage",), ledger.own_stream)
        seconds, link = self.links.seconds(ledger.records[0])
        return Sent(ledger.records[0], "stage", link, seconds)


def chunk_units(model: ModelConfig, patterns: Sequence[str]) -> list[list[str]]:
    """The units of each segment: the first embeds, the last has the head, and the MTP block once per depth."""
    units = [list(pattern) for pattern in patterns]
    units[0].insert(0, EMBEDDING)
    units[-1] += ([MTP, *model.layers.mtp] * model.mtp_depths) + [HEAD]
    return units
