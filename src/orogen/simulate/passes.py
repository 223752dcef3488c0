"""The time of a microbatch's forward and backward pass through each chunk of a pipeline, with what it sends."""

import collections
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.remat import FUSED
from orogen.cost.collectives import embedded, enter
from orogen.cost.communication import unit_collectives
from orogen.cost.kept import kept_bytes
from orogen.cost.ledger import FLOAT32, LOAD, MTP, OUTER, PIPELINE, Collective, Ledger, Workload
from orogen.cost.local import local
from orogen.cost.operation import Operation, memory
from orogen.cost.weights import weights
from orogen.simulate.hardware import Hardware, Software
from orogen.simulate.links import KIND_NAMES, kind_of, links_of
from orogen.simulate.operations import end_operations, layer_operations, logit_operations, mtp_operations
from orogen.simulate.prediction import Roofline
from orogen.simulate.program import AROUND, SIZES, added, graph_launches, launches, sent_by
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
    and what it sends; `update` is sent once per step. host: seconds in which a host launches it."""

    work: dict[str, list[Roofline]]
    sent: dict[str, list[Sent]]
    update: list[Sent]
    host: dict[str, float]

    def seconds(self, phase: str) -> float:
        """The time of its operations."""
        return sum(line.seconds for line in self.work[phase])


class Time(NamedTuple):
    """The time of a pass: compute, and by kind what it sends and what of that is exposed. contended: how much longer
    the compute takes beside what is sent. waiting: what the device waits for its host, which is busy for longer."""

    compute: float
    sent: dict[str, float]
    exposed: dict[str, float]
    contended: float
    waiting: float = 0.0

    @property
    def seconds(self) -> float:
        """All of it, one after another."""
        return self.compute + self.contended + sum(self.exposed.values()) + self.waiting


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
        self.links = links_of(self.hardware, self.software, Ledger(OUTER, plan, model, work))
        self.unit = functools.cache(self._unit)
        self.of_counts = functools.cache(self._time)

    def _unit(self, name: str) -> Unit:
        here = self.here
        if name in (EMBEDDING, HEAD):
            first, last = end_operations(here, 1 + self.model.mtp_depths)
            # The ledger has the two together. The embedding sends its output, the head all the rest.
            records = unit_collectives(OUTER, self.model, self.plan, self.work)
            mine = [r for r in records if (r.part == "embedding") == (name == EMBEDDING)]
            return self._made(name, first if name == EMBEDDING else last, mine)
        if name in (TOKENS, LOGITS):
            return self._served(name)
        operations = mtp_operations(here) if name == MTP else layer_operations(name, here)
        operations += self._kept_between(name)
        return self._made(name, operations, unit_collectives(name, self.model, self.plan, self.work))

    def _served(self, name: str) -> Unit:
        """An end of the model in inference. The head sends the stream that it reads, and logits to every rank."""
        ledger, plan, model = Ledger(OUTER, self.plan, self.model, self.work), self.plan, self.model
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
        ledger = Ledger(OUTER, plan, self.model, self.work)
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
        shares = self.hardware.shares
        operations = [
            *operations,
            *added(name, operations, self.here, self.software, eight=self.clock.eight, cast_bytes=shares.cast_bytes),
        ]
        records = sent_by(records, self.software)
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
        return Unit(
            work, {phase: sent[phase] for phase in PHASES}, sent["update"], self._host(name, operations, records)
        )

    def _host(self, name: str, operations: Sequence[Operation], records: Sequence[Collective]) -> dict[str, float]:
        """Seconds in which the host launches each pass. The backward pass has twice the kernels of the forward pass,
        what it recomputes, and collectives of its own."""
        if not self.software.eager:
            return dict.fromkeys(PHASES, 0.0)
        each, layer = self.hardware.shares.host, name in self.model.layers.main + self.model.layers.mtp
        again = [op for op in operations if layer and self._recomputed(name, op)]
        sent = [[r for r in records if r.phase in phases] for phases in ((FORWARD,), (BACKWARD, "recompute"))]
        parts = (operations, []), (again, []), ([], sent[0]), ([], sent[1])
        kernels, repeated, ahead, behind = (launches(name, ops, found, self.software) for ops, found in parts)
        graph, sizes = graph_launches(name, self.software), SIZES if name == "E" and self.software.sorts else 0
        return {
            FORWARD: each * (graph + kernels + ahead + sizes),
            BACKWARD: each * (graph + 2 * kernels + repeated + behind),
        }

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
        found = self.hidden(compute, [(n, one) for name, n in counts for one in self.unit(name).sent[phase]])
        around = AROUND * self.hardware.shares.host * bool(self.software.eager and self.plan.stage > 1)
        host = around + sum(n * self.unit(name).host[phase] for name, n in counts)
        return found._replace(waiting=max(0.0, host - found.seconds))

    def hidden(self, compute: float, traffic: Iterable[tuple[float, Sent]]) -> Time:
        """What of the traffic (how often, what) is hidden behind so much compute: each kind by its share, until no
        compute is left. Parameters and gradients on the network hide behind exposed traffic within the node, too."""
        seconds: dict[tuple[str, str], float] = collections.defaultdict(float)
        for times, one in traffic:
            seconds[one.kind, one.link] += times * one.seconds
        left, beside, slowed = compute, 0.0, 0.0
        sent: dict[str, float] = dict.fromkeys(KIND_NAMES, 0.0)
        exposed = dict(sent)
        software, collectives = self.software, ("data", "network")
        for kind, link in itertools.product(KIND_NAMES, ("node", "network")):
            taken = seconds[kind, link]
            contention = software.contention_data if (kind, link) == collectives else software.contention
            elsewhere = beside if (kind, link) == collectives else 0.0
            behind = min(left + elsewhere, taken * getattr(software, f"overlap_{kind}"))
            computed = min(left, behind)
            left, slowed, beside = left - computed, slowed + contention * computed, beside - behind + computed
            sent[kind] += taken
            exposed[kind] += taken - behind
            beside += taken - behind if link == "node" else 0.0
        return Time(compute, sent, exposed, slowed)

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
