"""Text from outside, made harmless for Markdown and HTML. Templates escape every value that is not Safe already."""

from __future__ import annotations

import re
import shlex
from urllib.parse import quote

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;"}  # the Hub renders $$ as formulas
_PLAIN = re.compile(r"[\w./:+@*,= -]+")  # what inline code holds without harm, in a table too


class Safe(str):
    """Markdown that is meant as such."""

    __slots__ = ()


def escape(value: object) -> Safe:
    """Any value as text on one line: nothing in it is Markdown, HTML, a table's border or a formula."""
    if isinstance(value, Safe):
        return value
    line = one_line(value)
    line = re.sub(r"([\\`*_\[\]#|~!{}])", r"\\\1", line)
    line = re.sub(r"[&<>$]", lambda found: _ENTITIES[found[0]], line)
    line = re.sub(r"(?i)\b(https?|ftp|mailto)(:)|\b(www)(\.)", lambda found: f"{found[1] or found[3]}&#{ord(found[2] or found[4])};", line)
    return Safe(re.sub(r"^(\d+)([.)])(?= |$)", r"\1\\\2", re.sub(r"^([-+=])", r"\\\1", line)))  # no links, lists, rules that nobody meant


def one_line(value: object) -> str:
    """Without line breaks, control and invisible direction characters; runs of spaces are one."""
    text = "".join(character if character.isprintable() else " " for character in str(value))
    return " ".join(text.split())


def code(value: object) -> Safe:
    """Inline code if that is safe, else plain text."""
    line = one_line(value)
    return Safe(f"`{line}`") if _PLAIN.fullmatch(line) else escape(line)


def shell(value: object) -> Safe:
    """One word of a command line."""
    return Safe(shlex.quote(one_line(value)))


def python(value: object) -> Safe:
    """A string in Python code."""
    text = one_line(value).replace("\\", "\\\\").replace('"', '\\"')
    return Safe(f'"{text}"')


def url_path(value: object) -> Safe:
    return Safe(quote(str(value), safe="/"))


def fenced(text: str, language: str) -> Safe:
    """A code block that its content cannot end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Safe(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def link(url: object, name: object) -> Safe:
    """url: begins with https:// ; its other characters are quoted."""
    return Safe(f"[{escape(name)}]({quote(str(url), safe='/:')})")


FILTERS = {"safe": Safe, "link": link, "code": code, "shell": shell, "python": python, "url_path": url_path, "fenced": fenced}
