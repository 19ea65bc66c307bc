"""Packaging: what sdist and wheel hold, that they agree, and that what is installed from them works and hides nobody's `kernels`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from awq_hf.model_cards import is_generated
from tests.hub.fixtures import environment
from tests.hub.server import Hub

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "exporters", "model_cards")  # beside awq_hf, and linked into it
REGISTER = ("awq_hf/cli/optimum_register/", "optimum/commands/register/")  # in the repository, in the wheel
SOURCES = ("LICENSE", "README.md", "pyproject.toml", "awq_hf", *FOLDERS)


def python(*arguments: object, cwd: Path, path: Path | None = None) -> str:
    env = {**os.environ, "PYTHONPATH": str(path or ""), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300, cwd=cwd, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources as a fresh clone has them: links as links, no caches, and no empty folders, which git does not keep."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy(ROOT / name, copy)
    for folder in FOLDERS:
        if not any((copy / folder).iterdir()):
            (copy / folder).rmdir()
    return copy


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    out = tmp_path_factory.mktemp("dist")
    python("-m", "build", "--no-isolation", "--outdir", out, ".", cwd=checkout)
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel was installed into."""
    target = tmp_path_factory.mktemp("installed")
    python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    return target


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def source_files() -> set[str]:
    """Every source and data file of the package, by its name in the repository."""
    files: set[str] = {"awq_hf/py.typed"}
    for folder in (ROOT / "awq_hf", *(ROOT / "awq_hf" / name for name in FOLDERS)):
        files |= {path.relative_to(ROOT).as_posix() for path in folder.rglob("*") if path.suffix in (".py", ".cpp", ".jinja")}
    files |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "awq_hf" / "data").rglob("*") if path.is_file()}
    return {name for name in files if "__pycache__" not in name}


def expected_files() -> set[str]:
    """The same, by its name in the wheel."""
    return {name.replace(*REGISTER) for name in source_files()}


def test_the_lowest_versions_that_are_tested_are_those_that_are_asked_for() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    asked = dict(re.findall(r'^(?:    |data = \[)"([\w-]+)>=([\d.]+)', text, re.MULTILINE))
    tested = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8"), re.MULTILINE))
    asked.pop("tomli"), asked.pop("torch"), tested.pop("torch")  # for Python 3.10 only; not tried
    assert {name: Version(version) for name, version in tested.items()} == {name: Version(version) for name, version in asked.items()}


def test_every_linked_folder_holds_a_file() -> None:
    """Git keeps no empty folders: without a file in it, a link points nowhere in a fresh clone and nothing can be built."""
    for name in FOLDERS:
        link = ROOT / "awq_hf" / name
        assert link.is_symlink() and link.readlink() == Path("..", name)
        assert any(path.is_file() and "__pycache__" not in path.parts for path in (ROOT / name).rglob("*")), f"{name}/ is empty"
    for name in {*FOLDERS} - {"model_cards"}:  # no other project has a package of that name, and ours has functions
        assert not (ROOT / name / "__init__.py").exists(), "it would be importable as a package of that bare name from here"


def test_every_package_is_listed() -> None:
    (table,) = re.findall(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    listed = re.findall(r'"(.*?)"', table)
    folders = {path.rsplit("/", 1)[0].replace("/", ".") for path in expected_files() if path.endswith(".py") and "/data/" not in path}
    assert folders <= set(listed), "a folder with modules is missing from [tool.setuptools] packages"


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = names_in(wheel)
    assert {name for name in names if ".dist-info/" not in name} == expected_files()
    assert {name.split("/")[0] for name in names} == {"awq_hf", "optimum", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    assert [name for name in names if name.startswith("optimum/")] == [f"{REGISTER[1]}awq_hf.py"]  # optimum's folders are its own
    for name in ("kernels/layout.py", "kernels/ops.py", "kernels/reference.py", "py.typed", "data/calibration/prose_en.txt"):
        assert f"awq_hf/{name}" in names
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert f"awq_hf/data/demo/model/{name}" in names


def test_the_wheel_from_the_sdist_is_the_wheel_from_the_checkout(wheel: Path, checkout: Path, tmp_path: Path) -> None:
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ".", cwd=checkout)
    (direct,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(direct) as one, zipfile.ZipFile(wheel) as other:
        assert names_in(direct) == names_in(wheel)
        assert all(one.read(name) == other.read(name) for name in names_in(wheel) if ".dist-info/" not in name)


def test_the_sdist_holds_files_in_place_of_links(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = {member.name.split("/", 1)[1]: member for member in archive.getmembers() if "/" in member.name}
    assert all(member.isfile() or member.isdir() for member in members.values())
    assert source_files() | {"LICENSE", "README.md", "pyproject.toml"} <= members.keys()


def test_the_wheel_says_what_it_needs_and_starts(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (archive.read(n).decode() for n in names_in(wheel) if n.endswith("METADATA"))
        (scripts,) = (archive.read(n).decode() for n in names_in(wheel) if n.endswith("entry_points.txt"))
    assert "Requires-Dist: transformers<6,>=5.16.1" in metadata and "License-Expression: Apache-2.0" in metadata
    assert "awq-hf = awq_hf.cli:main" in scripts


IMPORTED = f"""
import importlib.util, json, pathlib, sys
import awq_hf
from awq_hf import cli, demo
from awq_hf.calibration.data import embedded_texts
from awq_hf.kernels import layout
from jinja2 import PackageLoader

here = pathlib.Path(sys.argv[1])
files = [awq_hf.__file__, layout.__file__, demo.MODEL / "model.safetensors", demo.EVALUATION]
found = {{"elsewhere": [str(file) for file in files if not (pathlib.Path(file).is_relative_to(here) and pathlib.Path(file).is_file())]}}
found |= {{"version": awq_hf.__version__, "texts": len(embedded_texts())}}
found["templates"] = PackageLoader("awq_hf.model_cards").list_templates()
found["bare"] = [name for name in {FOLDERS} if (spec := importlib.util.find_spec(name)) and not spec.origin]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imported(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process finds that imports it from where it was installed."""
    found: dict[str, Any] = json.loads(python("-c", IMPORTED, installed, cwd=tmp_path_factory.mktemp("empty"), path=installed))
    return found


def test_installed_it_finds_its_modules_and_data(imported: dict[str, Any]) -> None:
    assert imported["elsewhere"] == [] and imported["texts"] > 20 and imported["version"] == metadata.version("awq-hf")


def test_templates_of_model_cards_are_found_where_it_is_installed(imported: dict[str, Any]) -> None:
    assert imported["templates"] == sorted(path.name for path in (ROOT / "model_cards" / "templates").iterdir())


def test_its_programs_run_in_an_environment_of_their_own(wheel: Path, tmp_path: Path, hub: Hub) -> None:
    """From a model's directory to a repository with card, AWQ and GGUF by one command.

    The environment has what awq-hf needs from that of the tests, but not the repository: a link to that does not count there.
    """
    python("-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    scripts = tmp_path / "venv" / Path(sysconfig.get_path("scripts")).name
    interpreter = scripts / Path(sys.executable).name
    paths = {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}
    Path(sysconfig.get_path("purelib", vars=paths), "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python("-m", "pip", "--python", interpreter, "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=tmp_path)

    def run(*command: object) -> str:
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment(hub, tmp_path / "home")
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "{export,env,awq}" in run(interpreter, "-m", "optimum.commands.optimum_cli", "--help")
    model = Path(sysconfig.get_path("purelib", vars=paths), "awq_hf/data/demo/model")
    options = ("--samples", 2, "--seq-len", 32, "--rounding", "nearest", "--export", "gguf", "--no-measure")
    run(scripts / "awq-hf", "quantize", model, "out", *options, "--push", "me/model-AWQ")
    there = hub.repos["me/model-AWQ"].files()
    assert there["model.safetensors"] == (tmp_path / "out/model.safetensors").read_bytes()
    assert {
        "config.json",
        "tokenizer.json",
        "report.json",
        "recipe.yaml",
        "model-AWQ-Q4_K_S.gguf",
        "images/loss-per-layer.png",
    } <= there.keys()
    assert is_generated(there["README.md"].decode()) and b"llama-completion -hf me/model-AWQ:Q4_K_S" in there["README.md"]


def test_an_editable_install_registers_the_commands_of_optimum(checkout: Path, tmp_path: Path) -> None:
    """In a process that sees no other install: what setuptools writes for one is named alike for all."""
    python("-c", "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])", tmp_path, cwd=checkout)
    (editable,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(editable) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import site, sys\n"
        "_, own, others, *sys.argv[1:] = sys.argv\n"
        "site.addsitedir(own)\n"
        "sys.path.append(others)\n"
        "from optimum.commands.optimum_cli import main\n"
        "main()\n"
    )
    arguments = ("-S", "-c", code, tmp_path / "site", sysconfig.get_path("purelib"))
    assert "{export,env,awq}" in python(*arguments, "--help", cwd=tmp_path)
    assert "gguf" in python(*arguments, "export", "--help", cwd=tmp_path)


def test_no_bare_names_are_importable(imported: dict[str, Any], tmp_path: Path) -> None:
    """`kernels` is the import name of a Hugging Face package that transformers looks for."""
    assert imported["bare"] == []
    code = f"import importlib.util, awq_hf; print(*(n for n in {FOLDERS} if (s := importlib.util.find_spec(n)) and not s.origin))"
    assert python("-c", code, cwd=tmp_path) == ""  # of the environment that runs these tests


def test_transformers_works_from_the_repository_root_and_does_not_import_the_package() -> None:
    """There the folder `kernels` is on sys.path; without an __init__.py it does not pass for the package of that name."""
    code = (
        "import sys\n"
        "from transformers import LlamaForCausalLM\n"
        "from transformers.utils import is_kernels_available\n"
        "print(is_kernels_available(), 'awq_hf' in sys.modules)\n"
    )
    installed = any(distribution.name == "kernels" for distribution in metadata.distributions())
    available, imported = python("-c", code, cwd=ROOT).split()
    assert (available == "False" or installed) and imported == "False"
