"""What one run does one after the other, and what is left to do when it breaks off."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import typer


@dataclass(frozen=True)
class Step:
    """what: a line for a person; do: the work; again: the command line that does it by itself."""

    what: str
    do: Callable[[], Any]
    again: str


def command_line(*words: object, **options: object) -> str:
    """`awq-hf` with these words and options, as a shell reads them; options that are None or False are left out, True is a flag."""
    given = [str(word) for word in words]
    for name, value in options.items():
        if value is not None and value is not False:
            given += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(["awq-hf", *given])


def run_steps(steps: Sequence[Step], say: Callable[[str], None], done: str) -> list[Any]:
    """What each returns. done: a sentence on what is finished before the first.

    A step that fails ends the run; the message says why, that the rest is there, and which commands do what is left.
    """
    results = []
    for index, step in enumerate(steps):
        say(step.what)
        try:
            results.append(step.do())
        except (Exception, KeyboardInterrupt) as error:
            left = "\n".join(f"  {each.again}" for each in steps[index:])
            problem = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}" if not str(error) else str(error)
            before = f"{done} What came before this is complete; continue with:\n{left}"
            if isinstance(error, KeyboardInterrupt):
                typer.echo(f"{problem}. {before}", err=True)
                raise typer.Exit(130) from None
            raise RuntimeError(f"{step.what} failed: {problem}\n{before}") from error
    return results
