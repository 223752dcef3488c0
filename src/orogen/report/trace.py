"""Reads what jax.profiler wrote: when each device ran which HLO instruction, and the named scope that it came from.

The file is an XSpace (tsl/profiler/protobuf/xplane.proto). jax.profiler.ProfileData reads its events. It does not show
the programs, which the plane `/host:metadata` has as HloProto; `messages` reads those.
"""

import collections
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from orogen.config.checks import ConfigError

COLLECTIVES = (
    "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "ragged-all-to-all",
    "recv", "reduce-scatter", "send",
)  # fmt: skip
# Instructions that only run others. A CPU reports both; a GPU reports kernels, which belong to the inner ones.
CONTAINERS = ("call", "conditional", "while")
# What an instruction's name may end in: the number that makes it unique, and the half of an asynchronous pair.
ENDING = re.compile(r"([._]\d+|[.-](start|done|update|clone|remat\d*))*$")
# A program's number, at the end of its name in `/host:metadata`.
NUMBERED = re.compile(r"\((\d+)\)$")
# Kernels of NCCL that belong to no instruction of a known program, by a word in their name.
NCCL = re.compile(r"nccl\w*?_(AllGather|AllReduce|AllToAll|Broadcast|ReduceScatter|SendRecv)", re.IGNORECASE)
NCCL_OPERATIONS = {
    "allgather": "all-gather", "allreduce": "all-reduce", "alltoall": "all-to-all",
    "broadcast": "collective-broadcast", "reducescatter": "reduce-scatter", "sendrecv": "send",
}  # fmt: skip


class Event(NamedTuple):
    """A kernel or copy on a GPU, or an instruction on a CPU.

    start, end: nanoseconds. operation: the HLO instruction's name, empty if unknown. module: its program's name.
    collective: the operation, such as all-reduce, of communication between devices; None for anything else. op_name:
    the path of scopes and primitive, as HLO metadata has it; empty if unknown.
    """

    start: float
    end: float
    kernel: str
    operation: str
    module: str
    collective: str | None
    op_name: str


class Instruction(NamedTuple):
    """An instruction of a program. collective: as in Event."""

    opcode: str
    op_name: str
    collective: str | None


Program = Mapping[str, Instruction]


def read_trace(folder: Path) -> dict[str, list[Event]]:
    """The events of each device by the device's name, in order of start; several processes' devices are put together.

    folder: that of jax.profiler.trace, or an xplane.pb file. Of several traces there, the last is read. Raises
    ConfigError if there is none, or none with events of devices.
    """
    devices: dict[str, list[Event]] = {}
    files = _files(folder)
    for file in files:
        host = f"{file.name.removesuffix('.xplane.pb')}:" if len(files) > 1 else ""
        for name, events in _read(file).items():
            devices[host + name] = sorted(events)
    if not devices:
        raise ConfigError(f"{files[0]}; expected a trace with events of devices")
    return devices


def _files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    found = sorted(folder.glob("**/*.xplane.pb"))
    if not found:
        raise ConfigError(f"{folder}; expected a folder with a trace (*.xplane.pb)")
    return [file for file in found if file.parent == found[-1].parent]


def _read(file: Path) -> dict[str, list[Event]]:
    from jax.profiler import ProfileData

    content = file.read_bytes()
    by_id, by_name = _programs(content)
    devices: dict[str, list[Event]] = collections.defaultdict(list)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of jax's own types, on Python 3.12
        for plane in ProfileData.from_serialized_xspace(content).planes:
            gpu = plane.name.startswith("/device:")
            if not gpu and plane.name != "/host:CPU":
                continue
            for line in plane.lines:
                if gpu and not line.name.startswith("Stream"):
                    continue  # the same kernels again, grouped by module or by scope
                for event in line.events:
                    stats = dict(event.stats)
                    if not gpu and ("hlo_op" not in stats or event.name.startswith("end: ")):
                        continue
                    named = by_name.get(str(stats.get("hlo_module")), {})
                    program = by_id.get(int(stats.get("program_id", -1)), named)
                    device = plane.name.removeprefix("/device:") if gpu else f"CPU:{stats.get('device_ordinal', 0)}"
                    if (found := _event(event, stats, program, kernels=gpu)) is not None:
                        devices[device].append(found)
    return dict(devices)


def _event(event: Any, stats: Mapping[str, Any], program: Program, *, kernels: bool) -> Event | None:
    """The event, or None for an instruction that only runs others. kernels: whether events are a GPU's."""
    name, module = str(stats.get("hlo_op", "")), str(stats.get("hlo_module", ""))
    known = program.get(name) or program.get(_plain(event.name))
    if known is None:
        # Without the program, GPU events have the path themselves, less what all paths of the module begin with.
        path = f"{stats.get('prefix', '')}{stats.get('name', '')}"
        known = Instruction(ENDING.sub("", name), path, _collective(name))
    if not kernels and known.opcode in CONTAINERS:
        return None
    collective = known.collective
    if kernels and (match := NCCL.search(event.name)):
        collective = collective or NCCL_OPERATIONS[match[1].lower()]
    start = float(event.start_ns)
    return Event(start, start + float(event.duration_ns), event.name, name, module, collective, known.op_name)


def _collective(name: str) -> str | None:
    """The operation that an instruction or opcode is named after, if it is a collective one."""
    plain = ENDING.sub("", name).replace("_", "-")
    return plain if plain in COLLECTIVES else None


def _plain(name: str) -> str:
    """An instruction's name as XLA names its kernel."""
    return re.sub(r"[^0-9A-Za-z_]", "_", name)


# Programs.


def _programs(content: bytes) -> tuple[dict[int, Program], dict[str, Program]]:
    """The programs that ran, by number and by name."""
    by_id, by_name = {}, {}
    for plane in _all(content, 1):  # XSpace.planes
        if _text(plane, 2) != "/host:metadata":  # XPlane.name
            continue
        for entry in _all(plane, 4):  # XPlane.event_metadata, a map
            for metadata in _all(entry, 2):
                number = NUMBERED.search(_text(metadata, 2))  # XEventMetadata.name
                # XEventMetadata.stats, XStat.bytes_value, HloProto.hlo_module
                protos = [proto for stat in _all(metadata, 5) for proto in _all(stat, 6)]
                for module in (module for proto in protos for module in _all(proto, 1)):
                    program = by_name[_text(module, 1)] = read_program(module)
                    if number:
                        by_id[int(number[1])] = program
    return by_id, by_name


class _Written(NamedTuple):
    """An HloInstructionProto. called: numbers of the computations that it runs; operands: ids of instructions."""

    name: str
    opcode: str
    op_name: str
    id: int
    operands: list[int]
    called: list[int]


def read_program(module: bytes | memoryview) -> dict[str, Instruction]:
    """The instructions of an HloModuleProto, by name and by the name of their kernel on a GPU.

    A fusion, or another instruction that runs a computation, has that one's collective, if any. One without an op_name
    of its own (XLA adds copies and rewrites products) has the one that most instructions of its computation begin with,
    or else that of its nearest operand that has one.
    """
    computations: dict[int, list[_Written]] = {}
    for computation in _all(module, 3):  # HloModuleProto.computations
        number, found = 0, []
        for field, value in messages(computation):
            if field == 5:  # HloComputationProto.id
                number = value
            elif field == 2:  # HloComputationProto.instructions
                found.append(_instruction(value))
        computations[number] = found
    program: dict[str, Instruction] = {}
    for found in computations.values():
        names: dict[int, str] = {}
        for written in found:  # operands come first
            inner = [entry for number in written.called for entry in computations.get(number, ())]
            own, collective = written.op_name, _collective(written.opcode)
            if written.opcode not in CONTAINERS:
                collective = collective or next(filter(None, (_collective(entry.opcode) for entry in inner)), None)
                own = own or _commonest([entry.op_name for entry in inner])
            names[written.id] = own or next((names[id] for id in written.operands if names.get(id)), "")
            instruction = Instruction(written.opcode, names[written.id], collective)
            program[written.name] = program[_plain(written.name)] = instruction
    return program


def _instruction(message: memoryview) -> _Written:
    texts, numbers = {1: "", 2: "", 7: ""}, {36: [], 38: []}  # operand_ids, called_computation_ids: packed or not
    id = 0
    for field, value in messages(message):
        if field in (1, 2):
            texts[field] = bytes(value).decode()
        elif field == 7:  # OpMetadata.op_name
            texts[field] = _text(value, 2)
        elif field == 35:
            id = value
        elif field in numbers:
            numbers[field] += [value] if isinstance(value, int) else _varints(value)
    return _Written(texts[1], texts[2], texts[7], id, numbers[36], numbers[38])


def _commonest(op_names: list[str]) -> str:
    """One of the op_names that most have up to their last part; empty if none has one."""
    named = {name.rpartition("/")[0]: name for name in op_names if name}
    counts = collections.Counter(name.rpartition("/")[0] for name in op_names if name)
    return named[counts.most_common(1)[0][0]] if counts else ""


# Protocol buffers' wire format (https://protobuf.dev/programming-guides/encoding).


def messages(message: bytes | memoryview) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field: an int for a varint, a memoryview of bytes for anything else.

    Raises ValueError on a message that ends too early or has groups, which these messages never have.
    """
    view, at = memoryview(message), 0
    while at < len(view):
        key, at = _varint(view, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(view, at)
        else:
            size, at = _varint(view, at) if kind == 2 else ({1: 8, 5: 4}.get(kind), at)
            if size is None or at + size > len(view):
                raise ValueError(f"field {key >> 3} of kind {kind} at byte {at} of {len(view)}: not a protocol buffer")
            value, at = view[at : at + size], at + size
        yield key >> 3, value


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(view):
            raise ValueError(f"a number goes on beyond byte {at}: not a protocol buffer")
        byte, at = view[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _varints(view: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(view):
        value, at = _varint(view, at)
        values.append(value)
    return values


def _all(message: bytes | memoryview, number: int) -> Iterator[memoryview]:
    """The values of a field, which are messages or bytes."""
    return (value for field, value in messages(message) if field == number)


def _text(message: bytes | memoryview, number: int) -> str:
    return next((bytes(value).decode() for value in _all(message, number)), "")
