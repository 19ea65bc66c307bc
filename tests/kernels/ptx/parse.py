"""PTX text -> instructions. What is not understood is an error, never skipped."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class Address:
    base: str  # a register or a symbol
    offset: int


Operand = str | Address | tuple[str, ...]  # a register, number or label; [base + offset]; {a, b, ..}


class Instruction(NamedTuple):
    text: str
    line: int
    name: str  # with all its suffixes
    operands: tuple[Operand, ...]
    predicate: str | None = None
    negated: bool = False


@dataclass
class Function:
    """The one kernel of a module. Registers of a scope in braces are renamed, so that every name is one register."""

    name: str
    threads: int
    parameters: dict[str, str]  # name -> type
    registers: dict[str, str] = field(default_factory=dict)  # name -> type
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # -> index of the instruction that follows


class UnknownPtx(Exception):
    """Something of the language that the executor has no meaning for."""


HEADER = re.compile(r"\.visible \.entry (\w+)\((.*?)\)\s*((?:\.\w+[\d, ]*\s*)*)\{", re.DOTALL)
PARAMETER = re.compile(r"\.param \.(\w+)(?: \.ptr \.global \.align \d+)? (\w+)")
REGISTERS = re.compile(r"\.reg \.(\w+) ([%\w]+)(?:<(\d+)>)?$")
LABEL = re.compile(r"\$\w+:")
INSTRUCTION = re.compile(r"(?:@(?P<not>!?)(?P<predicate>%p\d+)\s+)?(?P<name>[a-z][\w.:]*)\s*(?P<operands>.*)", re.DOTALL)
OPERAND = re.compile(r"\s*(\{[^}]*\}|\[[^\]]*\]|[^,\[{]+)\s*(?:,|$)")


def _statements(text: str, start: int) -> Iterator[tuple[int, str]]:
    """(line, statement) of a body in braces from its first character on, without the brace that ends it; scopes as "{" and "}"."""
    depth, at, line, counted = 0, start, 1, 0
    while True:
        while text[at].isspace():
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        if text[at] in "{}":
            depth += 1 if text[at] == "{" else -1
            if depth < 0:
                return
            end = at
        elif label := LABEL.match(text, at):
            end = label.end() - 1
        else:
            end = text.index(";", at)
        yield line, text[at : end + 1].rstrip(";")
        at = end + 1


def _operand(text: str) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        return Address(base.strip(), int(offset or 0))
    return text


def _operands(text: str) -> tuple[Operand, ...]:
    found, at = [], 0
    while at < len(text):
        match = OPERAND.match(text, at)
        if match is None:
            raise UnknownPtx(f"operands: {text}")
        found.append(_operand(match[1]))
        at = match.end()
    return tuple(found)


def _renamed(operand: Operand, names: dict[str, str]) -> Operand:
    if isinstance(operand, Address):
        return Address(names.get(operand.base, operand.base), operand.offset)
    if isinstance(operand, str):
        return names.get(operand, operand)
    return tuple(names.get(part, part) for part in operand)


def _declare(function: Function, declaration: str, scopes: list[dict[str, str]], line: int) -> None:
    match = REGISTERS.match(declaration)
    if match is None:
        raise UnknownPtx(f"line {line}: {declaration}")
    kind, name, count = match.groups()
    if len(scopes) > 1:
        scopes[-1][name] = f"{name}@{line}.{len(function.registers)}"
        name = scopes[-1][name]
    for register in [f"{name}{index}" for index in range(int(count))] if count else [name]:
        function.registers[register] = kind


def parse(text: str) -> Function:
    """The kernel of a module with one."""
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^\s*\.loc\b[^\n]*", "", text, flags=re.MULTILINE)
    text = re.sub(r'^\s*\.pragma "used_bytes_mask \w+";', "", text, flags=re.MULTILINE)  # says which bytes of a load are looked at
    (header,) = HEADER.finditer(text)
    if (threads := re.search(r"\.reqntid (\d+)\s", header[3])) is None:
        raise UnknownPtx(f"the kernel's number of threads, in {header[3]}")
    function = Function(header[1], int(threads[1]), {name: kind for kind, name in PARAMETER.findall(header[2])})
    scopes: list[dict[str, str]] = [{}]
    for line, statement in _statements(text, header.end()):
        if statement == "{":
            scopes.append({})
        elif statement == "}":
            scopes.pop()
        elif statement.endswith(":"):
            function.labels[statement[:-1]] = len(function.instructions)
        elif statement.startswith(".reg"):
            _declare(function, " ".join(statement.split()), scopes, line)
        elif (match := INSTRUCTION.fullmatch(statement)) is None:
            raise UnknownPtx(f"line {line}: {statement}")
        else:
            operands = _operands(match["operands"])
            if len(scopes) > 1:
                names = {name: new for scope in scopes for name, new in scope.items()}
                operands = tuple(_renamed(operand, names) for operand in operands)
            text_of = " ".join(statement.split())
            function.instructions.append(Instruction(text_of, line, match["name"], operands, match["predicate"], bool(match["not"])))
    return function
