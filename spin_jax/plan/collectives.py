"""What a compiled program sends between devices, read from its optimized HLO."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from spin_jax.forecast.times import BETWEEN_SLICES, COLLECTIVES

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Collective(NamedTuple):
    """A collective operation that a program runs."""

    kind: str  # one of COLLECTIVES, or BETWEEN_SLICES
    bytes: int  # of the whole array on a device: after it is gathered, or before it is reduced
    times: int  # how often it runs at most; a loop without a known bound counts once


def find_collectives(hlo: str, node: int = 0) -> list[Collective]:
    """All collectives of a program, from its `as_text()`. All branches of a conditional count.

    The compiler for TPUs writes a reduce-scatter as a fusion called all-reduce-scatter around an all-reduce. It starts
    an asynchronous collective in one fusion and ends it in another one with the same channel, and the two count once.

    `node` is the number of devices in a node of GPUs, if there are several nodes. The program for TPUs says what goes
    between slices, but the program for GPUs only says which devices take part.
    """
    computations, entry = _computations(hlo)
    found: dict[tuple[str, str], Collective] = {}

    def visit(name: str, times: int, outer: str) -> None:
        for line in computations.get(name, ()):
            # all-gather, for `%x = bf16[8,4] all-gather-start(%y), …`
            match = re.search(r"[\]})] ([a-z][a-z\-]*)\(", line.split(" = ", 1)[1])
            operation = match[1].removesuffix("-start") if match else ""
            if operation in COLLECTIVES:
                kind = "reduce-scatter" if "all-reduce-scatter" in name else operation
                channel = re.search(r"channel_id=(\d+)", line)
                size, members = _size(line, operation), _group(line)
                if operation == "reduce-scatter":
                    size *= len(members)
                key = (outer, f"{operation} {channel[1]}" if channel else line)
                nodes = len({member // node for member in members}) if node else 1
                if nodes > 1:  # each device of a node fetches its share of what the other nodes hold
                    share = (nodes - 1) / len(members) * (2 if operation == "all-reduce" else 1)
                    found[key[0], f"{key[1]} of nodes"] = Collective(BETWEEN_SLICES, int(size * share), times)
                if nodes < len(members) or not node:
                    before = found.get(key, Collective(kind, 0, 0))
                    found[key] = Collective(kind, max(before.bytes, size), times)
            elif operation == "send" and "megascale" in line:
                found[name, line] = Collective(BETWEEN_SLICES, _size(line, "send"), times)
            elif operation == "while":
                loop = dict(re.findall(r", (body|condition)=%?([\w.\-]+)", line))
                known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                turns = int(known[1]) if known else _trips(computations, loop["condition"])
                visit(loop["body"], times * turns, loop["body"])
            else:
                for called in _called(line):
                    visit(called, times, outer)

    visit(entry, 1, entry)
    return list(found.values())


def bytes_by_kind(found: list[Collective]) -> dict[str, int]:
    """{kind: bytes} of all runs of all collectives."""
    sums: Counter[str] = Counter()
    for one in found:
        sums[one.kind] += one.bytes * one.times
    return dict(sums)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    lines: dict[str, list[str]] = {}
    entry, inside = "", []
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            inside = lines[header[2]] = []
            entry = header[2] if header[1] else entry
        elif " = " in line:
            inside.append(line.strip())
    return lines, entry


def _called(line: str) -> Iterator[str]:
    if branches := _BRANCHES.search(line):
        yield from (name.strip().lstrip("%") for name in branches[1].split(","))
    yield from _CALLED.findall(line)


def _trips(computations: Mapping[str, list[str]], condition: str) -> int:
    """How often a loop runs at most: the n of its condition `i < n`, and 1 for another condition."""
    lines = list(computations.get(condition, ()))
    lines += [inner for line in tuple(lines) for name in _called(line) for inner in computations.get(name, ())]
    constants = [int(n) for line in lines for n in re.findall(r"s32\[\][^=]* constant\((\d+)\)", line)]
    known = len(constants) == 1 and any("direction=LT" in line for line in lines)
    return constants[0] if known else 1


def _size(line: str, operation: str) -> int:
    """Bytes of the result of an operation. A combined operation has several arrays, and all of them count."""
    shapes = line.split(" = ", 1)[1].split(f" {operation}", 1)[0]
    nested = shapes.startswith("((")  # ((operands), (results)) of an operation that ends in another line
    shapes = shapes.partition("), ")[2] if nested else shapes
    arrays = [
        math.prod(map(int, filter(None, dims.split(",")))) * _BYTES.get(dtype, 4)
        for dtype, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes)
    ]
    starts = f" {operation}-start(" in line and operation in ("all-gather", "collective-permute")
    if starts and not nested:
        arrays = arrays[len(arrays) // 2 :]  # the operands stand before the results
    return sum(arrays)


def _group(line: str) -> list[int]:
    """The devices of the first group.

    HLO writes groups in three ways: as a list {{0,1},{2,3}}; as the reshaped count [2,2]<=[4]; and as axes of a mesh,
    mesh['x'=2,'y'=2] {'y'}.
    """
    written = line.partition("replica_groups=")[2]
    if listed := re.match(r"\{\{([\d,]*)\}", written):
        return [int(n) for n in listed[1].split(",")]
    if iota := re.match(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", written):
        sizes = [int(n) for n in iota[3].split(",")]
        order = [int(n) for n in iota[4].split(",")] if iota[4] else None
        devices = np.arange(math.prod(sizes)).reshape(sizes).transpose(order)
        return devices.reshape(int(iota[1]), int(iota[2]))[0].tolist()
    if mesh := re.match(r"mesh\[([^\]]*)\] \{([^}]*)\}", written):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        along = re.findall(r"'([^']+)'", mesh[2])
        devices = np.arange(math.prod(axes.values())).reshape(list(axes.values()))
        return devices[tuple(slice(None) if axis in along else 0 for axis in axes)].reshape(-1).tolist()
    return [0]
