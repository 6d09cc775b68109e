"""Checks the code that Triton has compiled: the addresses in the TTIR of a kernel, and the access widths in its PTX."""

import re
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["lint", "wide_share"]

NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")
LOCATION = re.compile(r"\s*loc\((?:[^()]|\([^()]*\))*\)")


class Span(NamedTuple):
    """The range of an integer, and the 32-bit product that may have overflowed on its way."""

    low: int = -(2**63)
    high: int = 2**63 - 1
    wrapped: str = ""


class Region(NamedTuple):
    """The inside of a loop or a branch: its line, the names of its results, and what it has yielded so far."""

    line: int
    results: list[str]
    yielded: list[list[Span]]
    loop: bool


def lint(ttir: str) -> list[str]:
    """Returns the faults in the addresses of a kernel's TTIR.

    It follows the range of every integer from its origin to the pointers. An offset of 32 bits must lie between
    constants, and a 32-bit product that may exceed 2^31 must not reach an offset. Atomics are faults too, and so are
    loads with a mask but no value for masked elements.
    """
    lines = [LOCATION.sub("", line).strip() for line in ttir.splitlines() if not line.startswith("#")]
    carried: dict[tuple[int, int], str] = {}
    while True:  # until a pass finds no further product that a loop carries
        known = len(carried)
        findings = _walk(lines, carried)
        if len(carried) == known:
            return findings


def _walk(lines: list[str], carried: dict[tuple[int, int], str]) -> list[str]:
    spans: dict[str, Span] = {}
    regions: list[Region] = []
    findings = []
    for number, line in enumerate(lines):
        target, _, text = line.partition(" = ") if line.startswith("%") else ("", "", line)
        name, _, count = target.partition(":")
        results = [f"{name}#{i}" for i in range(int(count))] if count else [name] if name else []
        operation = re.match(r'"?([\w.]+)', text)
        op = operation[1] if operation else ""
        operands = [spans.get(x, Span()) for x in NAME.findall(text)]
        if line.startswith("}") and regions:
            region = regions.pop()
            for result, values in zip(region.results, zip(*region.yielded, strict=True), strict=False):
                spans[result] = _union(values)
            if line.startswith("} else"):
                regions.append(region)
        elif op == "scf.for":
            names = NAME.findall(text)
            low, high = spans.get(names[1], Span()), spans.get(names[2], Span())
            spans[names[0]] = Span(low.low, max(high.high - 1, low.low), low.wrapped)
            first = [spans.get(x, Span()) for x in names[5::2]]
            for i, inside in enumerate(names[4::2]):
                spans[inside] = Span(wrapped=first[i].wrapped or carried.get((number, i), ""))
            regions.append(Region(number, results, [first], True))
        elif op == "scf.yield" and regions:
            regions[-1].yielded.append(operands)
            if regions[-1].loop:
                carried |= {(regions[-1].line, i): x.wrapped for i, x in enumerate(operands) if x.wrapped}
        else:
            findings += _faults(op, text, operands)
            for result in results:
                spans[result] = _span(op, text, operands)
            if text.endswith(("{", "({")):
                regions.append(Region(number, results if op == "scf.if" else [], [], False))
    return findings


def _faults(op: str, text: str, operands: list[Span]) -> list[str]:
    if op.startswith("tt.atomic"):
        return [f"atomic: {text}"]
    if op in ("scf.while", "tt.call"):
        return [f"not followed here: {text}"]
    if op == "tt.load" and len(operands) == 2:
        return [f"masked load without other: {text}"]
    if op == "tt.addptr":
        offset = operands[1]
        if offset.wrapped:
            return [f"32-bit product in an address: {offset.wrapped}"]
        if text.endswith(("i32", "i32>")) and not -(2**31) < offset.low <= offset.high < 2**31 - 1:
            return [f"32-bit offset: {text}"]
    return []


def _span(op: str, text: str, operands: list[Span]) -> Span:
    """Returns the range of the result of an operation; that of an unknown operation has no bounds."""
    wrapped = next((x.wrapped for x in operands if x.wrapped), "")
    width = re.search(r"i(\d+)>?(?: to .*)?$", text)
    bits = int(width[1]) if width else 64
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    a, b = ([Span(max(x.low, least), min(x.high, most)) for x in operands] + [Span(), Span()])[:2]
    match op:
        case "arith.constant":
            found = re.match(r"arith\.constant (?:dense<\[?)?(-?\d[-\d, ]*)(?:\]?>)? : .*i\d+>?$", text)
            values = [int(x) for x in found[1].split(",")] if found else []
            return Span(min(values), max(values)) if values else Span()
        case "tt.make_range":
            start, end = (int(re.search(rf"{key} = (\d+)", text)[1]) for key in ("start", "end"))
            return Span(start, end - 1)
        case "tt.get_program_id" | "tt.get_num_programs":
            return Span(0, 2**31 - 1)
        case "tt.load" | "arith.cmpi" | "arith.cmpf":
            return Span()
        case "arith.select":
            return _union(operands[1:])
        case "tt.splat" | "tt.broadcast" | "tt.expand_dims" | "tt.reshape" | "tt.trans" | "arith.extsi":
            return Span(a.low, a.high, wrapped)
        case "arith.minsi":
            return Span(min(a.low, b.low), min(a.high, b.high), wrapped)
        case "arith.maxsi":
            return Span(max(a.low, b.low), max(a.high, b.high), wrapped)
        case "arith.divsi" if b.low > 0:
            ends = [abs(x) // y * (1 if x >= 0 else -1) for x in (a.low, a.high) for y in (b.low, b.high)]
            return Span(min(ends), max(ends), wrapped)
        case "arith.remsi" if b.low > 0:
            return Span(max(a.low, 1 - b.high) if a.low < 0 else 0, max(0, min(a.high, b.high - 1)), wrapped)
        case "arith.addi":
            ends = [a.low + b.low, a.high + b.high]
        case "arith.subi":
            ends = [a.low - b.high, a.high - b.low]
        case "arith.muli":
            ends = [x * y for x in (a.low, a.high) for y in (b.low, b.high)]
        case "arith.shli" if b.low >= 0 and b.high < 64:
            ends = [x << y for x in (a.low, a.high) for y in (b.low, b.high)]
        case "arith.trunci":
            ends = [a.low, a.high]
            bits, least, most = 32, -(2**31), 2**31 - 1
        case _:
            return Span(wrapped=wrapped)
    if least <= min(ends) and max(ends) <= most:
        return Span(min(ends), max(ends), wrapped)
    product = op in ("arith.muli", "arith.shli", "arith.trunci") and bits == 32
    return Span(least, most, wrapped or (text if product else ""))


def _union(spans: Iterable[Span]) -> Span:
    spans = list(spans)
    wrapped = next((x.wrapped for x in spans if x.wrapped), "")
    return Span(min(x.low for x in spans), max(x.high for x in spans), wrapped) if spans else Span()


def wide_share(ptx: str, access: str, least: int) -> float:
    """Returns the share of the bytes of global loads ("ld") or stores ("st") in accesses of `least` bytes or more."""
    sizes = []
    for modifiers in re.findall(rf"\b{access}\.global([\w.:]*)", ptx):
        vector = re.search(r"\.v(\d)", modifiers)
        sizes.append(int(vector[1] if vector else 1) * int(re.search(r"\.[bfsu](\d+)$", modifiers)[1]) // 8)
    if access == "ld":
        sizes += [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\S+ \[[^]]*\], \[[^]]*\], (\w+)", ptx)]
    return sum(size for size in sizes if size >= least) / max(sum(sizes), 1)
