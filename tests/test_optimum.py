"""optimum-cli: its own program and its own `main`, with our file where a wheel puts it."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optimum.commands.optimum_cli import main
from transformers import AutoModelForCausalLM
from typer.main import get_command

from awq_hf import AwqLinear, cli

REGISTER = Path("optimum", "commands", "register")
THEIRS = """
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

class Theirs(BaseOptimumCLICommand):
    COMMAND = CommandInfo("gguf", "theirs")

    def run(self):
        print("theirs ran")

REGISTER_COMMANDS = [(Theirs, ExportCommand)]
"""
COMMANDS = sorted(getattr(get_command(cli.app), "commands"))  # noqa: B009
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for sys.path with the file that registers the commands."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(Path(cli.__file__).parent / "optimum_register", folder / REGISTER, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def program(*arguments: str, path: list[Path]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [str(Path(sysconfig.get_path("scripts"), "optimum-cli")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


@pytest.fixture
def optimum(site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """optimum("awq", "quantize", ...): status and stdout of optimum's main(), in this process."""
    monkeypatch.syspath_prepend(str(site))

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["optimum-cli", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), capsys.readouterr().out

    return call


def test_the_program_lists_the_commands_and_keeps_its_own(site: Path) -> None:
    shown = program("--help", path=[site])
    assert shown.returncode == 0 and shown.stderr == ""
    assert "{export,env,awq}" in shown.stdout
    assert "gguf" in program("export", "--help", path=[site]).stdout


def usage_and_rest(help_text: str) -> tuple[str, list[str]]:
    """The program as the usage line says it, and the words after that."""
    program, options, rest = help_text.partition("[OPTIONS]")
    return program.strip(), [options, *rest.split()]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, optimum: Run, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    status, shown = optimum("awq", command, "--help")
    assert status == 0
    assert usage_and_rest(shown) == (f"Usage: optimum-cli awq {command}", usage_and_rest(run(command, "--help").out)[1])


def test_help_of_gguf_and_of_all(optimum: Run, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    status, shown = optimum("export", "gguf", "--help")
    assert status == 0
    assert usage_and_rest(shown) == ("Usage: optimum-cli export", usage_and_rest(run("export", "--help").out)[1])
    everything = optimum("awq", "--help")[1]
    assert all(f" {command} " in everything for command in COMMANDS)
    assert "--install-completion" not in everything  # a shell completes optimum-cli, not this


def test_quantize_and_export(optimum: Run, two_blocks: Path, tmp_path: Path, run: Run) -> None:
    quantize = ("--samples", 2, "--seq-len", 32, "--rounding", "nearest", "--bits", 4)
    assert optimum("awq", "quantize", two_blocks, tmp_path / "awq", *quantize)[0] == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "awq")
    assert sum(isinstance(module, AwqLinear) for module in loaded.modules()) == 14
    for folder in ("ours", "theirs"):
        (tmp_path / folder).mkdir()
    status, shown = optimum("export", "gguf", tmp_path / "awq", tmp_path / "theirs" / "a.gguf", "--type", "Q4_K_M")
    assert status == 0 and "gguf written to" in shown
    assert run("export", "gguf", tmp_path / "awq", tmp_path / "ours" / "a.gguf", "--type", "Q4_K_M").status == 0
    assert (tmp_path / "theirs" / "a.gguf").read_bytes() == (tmp_path / "ours" / "a.gguf").read_bytes()


def test_statuses_and_what_looks_like_an_option(optimum: Run, tmp_path: Path) -> None:
    assert optimum("awq")[0] == optimum("export", "gguf", "model")[0] == optimum("awq", "quantize", "--no-such-option")[0] == 2
    assert optimum("awq", "--debug", "quantize", "--help")[0] == 0
    assert optimum("export", "gguf", tmp_path / "nothing", tmp_path / "out.gguf")[0] == 1


def test_a_broken_awq_hf_breaks_its_own_commands_only(site: Path, tmp_path: Path) -> None:
    (tmp_path / "awq_hf").mkdir()
    (tmp_path / "awq_hf/__init__.py").write_text("raise OSError('a library is missing')")
    assert "{export,env,awq}" in program("--help", path=[site, tmp_path]).stdout
    failed = program("awq", "--help", path=[site, tmp_path])
    assert failed.returncode == 1 and failed.stdout == ""
    assert failed.stderr == "error: awq-hf does not start (OSError: a library is missing); install it again\n"


def test_another_optimum_registers_nothing(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optimum.commands.export.base", None)
    assert runpy.run_path(str(site / REGISTER / "awq_hf.py"))["REGISTER_COMMANDS"] == []


@pytest.mark.parametrize("module", ["aaa", "zzz"])
def test_a_name_that_another_package_has_is_left_to_it(module: str, site: Path, tmp_path: Path) -> None:
    """Whichever is found first: of two with one name, argparse would refuse the second."""
    (tmp_path / REGISTER).mkdir(parents=True)
    (tmp_path / REGISTER / f"{module}.py").write_text(THEIRS)
    for path in ([site, tmp_path], [tmp_path, site]):
        done = program("export", "gguf", path=path)
        assert (done.returncode, done.stdout) == (0, "theirs ran\n")
        said = f"warning: optimum.commands.register.{module} registers the command 'gguf' as well, and keeps it; "
        assert {*done.stderr.splitlines()} == {said + "use awq-hf in place of optimum-cli"}  # once for each install of ours


def test_found_twice_it_is_registered_once(site: Path, tmp_path: Path) -> None:
    """As where a package is installed for the user and for all."""
    shutil.copytree(site / "optimum", tmp_path / "optimum")
    done = program("--help", path=[site, tmp_path])
    assert done.stderr == "" and "{export,env,awq}" in done.stdout
