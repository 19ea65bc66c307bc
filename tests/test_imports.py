"""Who may import whom, read from the source; and what importing the package does to a process."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).parents[1] / "awq_hf"
BARE = {"kernels", "exporters", "model_cards"}  # the folders' names in the repository; `kernels` is another project's package

# Unit (a module or a folder of the package) -> what of the package it may import.
ALLOWED = {
    "kernels": "",
    "spec": "",
    "affine": "spec",
    "wording": "",
    "report": "base_model model_cards",
    "base_model": "",
    "machine": "",
    "representable": "spec",
    "matrices": "compat",
    "blocks": "experts matrices",
    "parallel": "",
    "products": "kernels.products",
    "freed": "",
    "unfinished": "",
    "beside": "",
    "classes": "",
    "calibration": "spec parallel products",
    "folding": "spec",
    "transforms": "spec affine parallel calibration folding",
    "rounding": "spec affine parallel calibration folding",
    "recipe": "spec representable transforms rounding",
    "preflight": "spec representable kernels.layout experts matrices blocks calibration recipe renaming report compat",
    "skip_list": "",
    "linear": "spec kernels",
    "serving": "spec linear skip_list",
    "experts": "spec kernels linear",
    "expert_checkpoint": "spec kernels.layout renaming headers stored experts",
    "prepare": "linear freed compat",
    "headers": "",
    "stored": "spec kernels.layout kernels.foreign headers",
    "checkpoint": "spec kernels.layout kernels.foreign linear experts expert_checkpoint matrices headers stored compat renaming",
    "layer": "spec affine representable calibration transforms rounding recipe",
    "expert_block": "spec affine layer linear experts calibration products transforms recipe report",
    "residual_errors": "calibration folding",
    "smoothing": "folding transforms",
    "block": "smoothing spec affine parallel products experts expert_block freed matrices layer linear blocks calibration folding "
    "transforms recipe report residual_errors",
    "pipeline": "unfinished machine spec affine parallel freed blocks calibration folding transforms rounding recipe preflight report "
    "block resume streaming untouched",
    "untouched": "matrices",
    "streaming": "blocks renaming compat",
    "gguf_blocks": "compat streaming",
    "resume": "affine block calibration linear parallel products report",
    "encoding": "unfinished spec experts expert_block matrices blocks calibration exporters pipeline preflight block recipe transforms "
    "encoded_layer encoded_experts encoded_ends streaming",
    "encoded_layer": "spec affine calibration exporters layer recipe report rounding transforms",
    "encoded_experts": "spec calibration encoded_layer expert_block experts parallel products report transforms",
    "encoded_ends": "spec blocks calibration encoded_layer exporters recipe report rounding streaming",
    "fisher": "blocks calibration experts matrices products streaming",
    "sensitivity": "blocks calibration experts exporters fisher matrices streaming",
    "compat": "lora",
    "lora": "linear experts",
    "renaming": "",
    "block_by_block": "blocks calibration products streaming",
    "figures": "calibration",
    "evaluate": "calibration classes block_by_block figures products",
    "evaluation_table": "",
    "config": "spec kernels.layout kernels.foreign calibration transforms rounding recipe linear experts compat",
    "hf_quantizer": "beside classes unfinished base_model spec kernels.layout calibration exporters recipe linear experts headers "
    "checkpoint preflight skip_list serving pipeline prepare compat renaming config output streaming",
    "to_gguf": "classes beside blocks calibration pipeline config sensitivity encoding encoded_layer encoded_experts experts exporters "
    "hf_quantizer compat renaming report streaming",
    "output": "",
    "recipe_file": "config",
    "api": "classes beside unfinished recipe_file config hf_quantizer compat exporters output to_gguf",
    "push": "api base_model exporters model_cards",
    "exporters": "base_model classes beside unfinished spec affine kernels.layout kernels.foreign linear experts matrices freed headers "
    "stored skip_list config compat renaming output",
    "model_cards": "base_model compat headers serving skip_list spec evaluation_table exporters.table",
    "inspection": "classes spec parallel compat kernels.dispatch experts matrices blocks headers checkpoint calibration folding recipe "
    "rounding preflight report pipeline linear config model_cards serving streaming products exporters.reading",
    "targets": "classes compat renaming config exporters matrices preflight spec",
    "measure": "classes base_model evaluation_table spec affine calibration linear compat evaluate machine output block_by_block "
    "gguf_blocks streaming",
    "demo": "measure api config evaluate evaluation_table output report to_gguf",
    "cli": "classes api push base_model block_by_block compat config demo evaluate evaluation_table exporters inspection linear matrices "
    "measure model_cards output preflight recipe_file rounding streaming targets to_gguf",
    "__init__": "api compat config evaluate hf_quantizer linear push spec",
}
TRANSFORMERS = {
    "renaming",
    "streaming",
    "gguf_blocks",
    "config",
    "hf_quantizer",
    "compat",
    "lora",
    "beside",
    "classes",
    "calibration",
    "exporters",
    "api",
    "cli",
    "demo",
    "to_gguf",
    "inspection",
    "measure",
    "targets",
}
LEAVES = {"cli", "demo"}  # nobody imports them, but for cli, which starts the demonstration

FOUND = {*PACKAGE.rglob("*.py"), *(path for folder in BARE for path in (PACKAGE / folder).rglob("*.py"))}  # links are not followed
MODULES = sorted(path for path in FOUND if path.relative_to(PACKAGE).parts[0] != "data")


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> set[str]:
    """Full dotted names: of modules, and of what is imported from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["awq_hf", *path.relative_to(PACKAGE).parts[:-1]]
            base = ".".join([*package[: len(package) - node.level + 1], node.module or ""]) if node.level else node.module or ""
            found |= {f"{base.rstrip('.')}.{alias.name}" for alias in node.names}
    return found


def ours_in(path: Path) -> set[str]:
    """What of the package a module imports, without the package's name and its own unit."""
    names = {name.removeprefix("awq_hf.") for name in imports_of(path) if name.startswith("awq_hf.")}
    return {name for name in names if name.split(".")[0] != unit_of(path)}


def test_every_module_is_seen_and_has_a_place_in_the_table() -> None:
    units = {unit_of(path) for path in MODULES}
    assert units >= {"kernels", "folding", "config", "pipeline", "__init__"}
    assert units <= ALLOWED.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_keeps_the_rules(path: Path) -> None:
    unit = unit_of(path)
    allowed = ALLOWED[unit].split() + ["wording"] * (unit != "kernels")  # messages are everywhere
    for name in ours_in(path):
        assert any(name == rule or name.startswith(f"{rule}.") for rule in allowed), f"{unit} must not import {name}"
        assert name.split(".")[0] not in LEAVES or unit == "cli", f"{unit} imports {name}"
    packages = {name.split(".")[0] for name in imports_of(path)}
    assert not packages & BARE, f"{sorted(packages & BARE)} under their bare names"
    assert "transformers" not in packages or unit in TRANSFORMERS, f"{unit} must not import transformers"
    if unit in ("spec", "affine", "representable", "transforms", "rounding", "folding", "kernels"):
        assert packages - sys.stdlib_module_names <= {"awq_hf", "torch", "triton"}
    if unit == "model_cards":
        assert "torch" not in packages


def test_rules_of_the_parser() -> None:
    assert imports_of(PACKAGE / "kernels" / "ops.py") >= {"torch.Tensor", "awq_hf.kernels.dispatch"}
    assert "awq_hf.config.AwqConfig" in imports_of(PACKAGE / "api.py")
    assert ours_in(PACKAGE / "kernels" / "reference.py") == set()


def test_the_package_does_not_import_itself_in_a_circle() -> None:
    edges = {unit: {name.split(".")[0] for path in MODULES if unit_of(path) == unit for name in ours_in(path)} for unit in ALLOWED}
    placed: set[str] = set()
    while free := {unit for unit in edges.keys() - placed if edges[unit] <= placed}:
        placed |= free
    assert placed == edges.keys()


# In a process of its own

IMPORTING = """
import json, logging, os, sys, warnings, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.quantizers import auto

def environment():
    return {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR")}  # torch's own doing

def state():
    settings = torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(), logging.root.level
    table = {name: kind for name, kind in auto.AUTO_QUANTIZER_MAPPING.items() if name != "awq"}
    return environment(), settings, warnings.filters[:], transformers.logging.get_verbosity(), list(auto.AUTO_QUANTIZER_MAPPING), table

before, modules = state(), set(sys.modules)
import awq_hf
found = {"state kept": state() == before, "quantizer": auto.AUTO_QUANTIZER_MAPPING["awq"].__module__}
found["new modules"] = sorted(set(sys.modules) - modules)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    """What it is like to import awq_hf where a user has imported what they use of transformers."""
    command = [sys.executable, "-c", IMPORTING]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=PACKAGE.parent)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_import_adds_little_to_what_every_user_imports(imported: dict[str, Any]) -> None:
    """Measured in modules, since those of others are what takes seconds: no triton, no terminal, no model code."""
    new = set(imported["new modules"])
    assert "awq_hf.config" in new
    assert not new & {"awq_hf.cli", "awq_hf.demo", "triton", "rich", "typer", "datasets", "torch._dynamo", "torch._inductor"}
    assert [name for name in new if name.startswith("transformers.models.")] == []


def test_import_touches_nothing_but_the_registration(imported: dict[str, Any]) -> None:
    assert imported["state kept"] and imported["quantizer"] == "awq_hf.hf_quantizer"
