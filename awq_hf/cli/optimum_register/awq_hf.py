"""`optimum-cli awq ...` and `optimum-cli export gguf ...`: the command line of awq-hf, under optimum's.

Installed as optimum/commands/register/awq_hf.py. optimum imports all files of that folder whatever command is run, and an error in one
breaks every command: what this one needs of awq_hf is imported when a command of ours runs, not before. What follows a command's name
goes to awq-hf as it is, so that there is one list of options.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

REGISTER_COMMANDS: list[tuple[Any, Any]] = []  # what optimum reads: a command, and the one that it is a part of

try:
    from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
    from optimum.commands.export.base import ExportCommand
except ImportError:  # an optimum that is built in another way: its own commands go on working
    pass
else:

    class _Forwarded(BaseOptimumCLICommand):
        """A command whose arguments are those of awq-hf."""

        PARENT: Any = None
        PROGRAM: str  # as usage lines say it
        PREFIX: tuple[str, ...] = ()  # arguments of awq-hf before the user's

        def __init__(self, subparsers: Any, *args: Any, from_defaults_factory: bool = False, **options: Any) -> None:
            if from_defaults_factory or _is_free(type(self), subparsers.choices):
                super().__init__(subparsers, *args, from_defaults_factory=from_defaults_factory, **options)
                self.parser.set_defaults(command=type(self))

        @staticmethod
        def parse_args(parser: argparse.ArgumentParser) -> None:
            parser.prefix_chars = ""  # nothing is an option of this parser's, not even --help
            parser.add_argument("arguments", nargs=argparse.REMAINDER)

        def run(self) -> None:
            try:
                from typer.main import get_command

                from awq_hf.cli import app
            except Exception as error:
                sys.exit(f"error: awq-hf does not start ({type(error).__name__}: {error}); install it again")
            command = get_command(app)
            # A shell completes optimum-cli, not this.
            command.params = [p for p in command.params if not str(p.name).endswith("_completion")]
            command.main([*self.PREFIX, *self.args.arguments], prog_name=self.PROGRAM)

    class AwqCommand(_Forwarded):
        COMMAND = CommandInfo("awq", "Quantize with AWQ; measure, export, inspect and publish the result (awq-hf).")
        PROGRAM = "optimum-cli awq"

    class GgufCommand(_Forwarded):
        COMMAND = CommandInfo("gguf", "Export a model, quantized by AWQ or not, to GGUF for llama.cpp (awq-hf).")
        PARENT = ExportCommand
        PROGRAM = "optimum-cli"
        PREFIX = ("export", "gguf")

    REGISTER_COMMANDS = [(command, command.PARENT) for command in (AwqCommand, GgufCommand)]


def _is_free(command: Any, taken: dict[str, argparse.ArgumentParser]) -> bool:
    """Whether no other package registers a command of this name, before ours or after it.

    If one does, ours gives way, and a line on stderr says so: argparse would take the second for an error, which breaks every command.
    """
    name = command.COMMAND.name
    if name in taken and taken[name].get_default("command") is command:  # this file is on the path twice
        return False
    rivals = [module for module, its_name, parent in _others() if (its_name, parent) == (name, command.PARENT)]
    if name not in taken and not rivals:
        return True
    who = [*rivals, "another package"][0]
    print(f"warning: {who} registers the command {name!r} as well, and keeps it; use awq-hf in place of optimum-cli", file=sys.stderr)
    return False


def _others() -> list[tuple[str, str, Any]]:
    """Module, name, parent: of the commands that other files beside this one register, all of which are imported by now."""
    found = []
    for module in [m for name, m in sys.modules.items() if name.startswith("optimum.commands.register.") and name != __name__]:
        for entry in getattr(module, "REGISTER_COMMANDS", []):
            command, parent = entry if isinstance(entry, tuple) else (entry, None)
            info: Any = getattr(command, "COMMAND", command)
            found.append((module.__name__, info.name, parent))
    return found
