"""Traces made by hand, as jax.profiler would write them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from jax.profiler import ProfileData

# (line, kernel, start in microseconds, end in microseconds, stats) of an event.
Made = tuple[str, str, float, float, Mapping[str, str | int]]
# (name, opcode, op_name, numbers of computations that it runs, and possibly the places, from 1, of its operands in its
# own computation) of an instruction.
Written = tuple[str, str, str, Sequence[int]] | tuple[str, str, str, Sequence[int], Sequence[int]]


def write_trace(
    folder: Path, planes: Mapping[str, Sequence[Made]], programs: Mapping[str, bytes] | None = None
) -> Path:
    """A folder with one trace: events by plane, and HloProtos by name, such as `jit_step(3)`."""
    text = "".join(_plane(number, name, events) for number, (name, events) in enumerate(planes.items(), 1))
    file = folder / "plugins" / "profile" / "2026_01_02" / "host.xplane.pb"
    file.parent.mkdir(parents=True)
    file.write_bytes(ProfileData.text_proto_to_serialized_xspace(text + _metadata(programs or {})))
    return folder


def _plane(number: int, name: str, events: Sequence[Made]) -> str:
    kernels = {kernel: n for n, kernel in enumerate(dict.fromkeys(event[1] for event in events), 1)}
    keys = {key: n for n, key in enumerate(dict.fromkeys(key for event in events for key in event[4]), 1)}
    text = f'planes {{ id: {number} name: "{name}"\n'
    for line_number, line in enumerate(dict.fromkeys(event[0] for event in events), 1):
        text += f'lines {{ id: {line_number} name: "{line}" timestamp_ns: 7000\n'
        for _, kernel, start, end, stats in (event for event in events if event[0] == line):
            text += f"events {{ metadata_id: {kernels[kernel]} offset_ps: {start * 1e6:.0f} "
            text += f"duration_ps: {(end - start) * 1e6:.0f}\n"
            for key, value in stats.items():
                kind = f'str_value: "{value}"' if isinstance(value, str) else f"int64_value: {value}"
                text += f"stats {{ metadata_id: {keys[key]} {kind} }}\n"
            text += "}\n"
        text += "}\n"
    for field, names in (("event", kernels), ("stat", keys)):
        for value, n in names.items():
            text += f'{field}_metadata {{ key: {n} value {{ id: {n} name: "{value}" }} }}\n'
    return text + "}\n"


def _metadata(programs: Mapping[str, bytes]) -> str:
    text = 'planes { id: 99 name: "/host:metadata"\n'
    for n, (name, proto) in enumerate(programs.items(), 1):
        quoted = "".join(f"\\{byte:03o}" for byte in proto)
        stats = f'stats {{ metadata_id: 1 bytes_value: "{quoted}" }}'
        text += f'event_metadata {{ key: {n} value {{ id: {n} name: "{name}" {stats} }} }}\n'
    return text + "}\n"


def program(name: str, *computations: tuple[int, Sequence[Written]]) -> bytes:
    """An HloProto with a module of these computations, by number."""
    return _field(1, module(name, *computations))


def module(name: str, *computations: tuple[int, Sequence[Written]]) -> bytes:
    """An HloModuleProto of these computations, by number."""
    message = _field(1, name.encode())
    for number, instructions in computations:
        inside = _field(5, number)
        for id, (own, opcode, op_name, called, *operands) in enumerate(instructions, 100 * number + 1):
            named = _field(1, own.encode()) + _field(2, opcode.encode())
            metadata = _field(7, _field(1, b"type") + _field(2, op_name.encode()))
            read = [_varint(100 * number + operand) for numbers in operands for operand in numbers]
            lists = _field(36, b"".join(read)) + _field(38, b"".join(map(_varint, called)))
            inside += _field(2, named + metadata + _field(35, id) + lists)
        message += _field(3, inside)
    return message


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    groups = re.findall(".{1,7}", bin(value)[2:][::-1])  # seven bits each, the lowest first
    numbers = [int(group[::-1], 2) for group in groups]
    return bytes(n | 128 for n in numbers[:-1]) + bytes(numbers[-1:])
