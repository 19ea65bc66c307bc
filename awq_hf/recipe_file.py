"""recipe.yaml: the options of a run as a file, to be read (YAML or TOML) and to be written beside the result.

Its keys are AwqConfig's options and the fields of Run; there is no other list of them.
"""

from __future__ import annotations

import difflib
import inspect
import os
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from awq_hf.config import AwqConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPE_NAME = "recipe.yaml"
IN_PYTHON = "(given in Python)"  # stands for what a file cannot hold; a run with it is refused
HERE = "./"  # before the name of a model that was a directory
NOT_CHOSEN = {"version", "backend"}  # of AwqConfig's: what a checkpoint says of itself
ONLY_NAMED = {"calibration": str | None, "tokenizer": str | None}  # in Python also objects
AS_COMMANDS_SAY = {"symmetric": "zero_point: false", "skip": "modules_to_not_convert", "override": "overrides"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """The options of `awq-hf quantize` beyond AwqConfig's.

    model: a directory or a Hub id, of which revision is a branch, tag or commit. dtype, device: to load it. export: targets, each
    TARGET or TARGET:TYPE. measure: None for "if there is a text, or something to push". text: a file. push: a repository, private if it
    is new and so asked. base_model: the Hub id that a card names, license: that of its licence. trust_remote_code: whether code that comes
    with the model was run; who repeats that has to say it again.
    """

    model: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    export: list[str] | None = None
    measure: bool | None = None
    text: str | None = None
    push: str | None = None
    private: bool = False
    base_model: str | None = None
    license: str | None = None
    trust_remote_code: bool = False


def _options() -> dict[str, tuple[Any, Any]]:
    """Name -> (type, default): Run's first, for that is the order in files."""
    hints = {**get_type_hints(Run), **get_type_hints(AwqConfig.__init__), **ONLY_NAMED}
    defaults = {field.name: field.default for field in fields(Run)}
    parameters = inspect.signature(AwqConfig).parameters
    defaults |= {name: parameter.default for name, parameter in parameters.items() if name not in NOT_CHOSEN}
    return {name: (hints[name], default) for name, default in defaults.items()}


OPTIONS = _options()
OF_RUN = tuple(field.name for field in fields(Run))


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Options by name, all of them known and of the right type. A path in it counts from the working directory, as on the command line.

    Raises ValueError naming the key, FileNotFoundError, and what else reading a file raises.
    """
    content = _parse(Path(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} is a {type(content).__name__}; a recipe is a table of options, e.g. a line `bits: 4`")
    for key, value in content.items():
        if key not in OPTIONS:
            raise ValueError(f"{path}: there is no option {key!r}; {_similar(str(key))}")
        if value == IN_PYTHON:
            raise ValueError(f"{path}: {key} was given in Python, and is in no file; put a name in its place, or give it another way")
        if not matches(value, OPTIONS[key][0]):
            raise ValueError(f"{path}: {key} is {value!r:.60}, which is not {_called(OPTIONS[key][0])}")
    return content


def _parse(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe {path}; give a YAML or TOML file")
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text) or {}
    except (yaml.YAMLError, tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        problem = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is not {'TOML' if path.suffix == '.toml' else 'YAML'}: {problem}") from None


def _similar(key: str) -> str:
    if key in AS_COMMANDS_SAY:
        return f"a recipe calls it {AS_COMMANDS_SAY[key]}"
    near = difflib.get_close_matches(key.replace("-", "_"), OPTIONS, 1)
    return f"did you mean {near[0]}?" if near else f"there are: {', '.join(OPTIONS)}"


def matches(value: Any, hint: Any) -> bool:
    """Whether a value read from a file has the type that an annotation says; true and false are no integers."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(matches(value, each) for each in arguments)
    if origin is list:
        return isinstance(value, list) and all(matches(item, arguments[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, dict) and all(matches(k, arguments[0]) and matches(v, arguments[1]) for k, v in value.items())
    if hint is type(None):
        return value is None
    return isinstance(value, (int, float) if hint is float else hint) and (hint is bool or not isinstance(value, bool))


def _called(hint: Any) -> str:
    """An annotation, for a person."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_called, get_args(hint)))
    if get_origin(hint) is Mapping:
        return "a table like {down_proj: {bits: 8}, o_proj: null}"
    return f"a list of {_called(get_args(hint)[0])}" if get_origin(hint) is list else names[hint]


def write_recipe(directory: Path, base_model: Mapping[str, Any], config: AwqConfig, run: Run, notes: tuple[str, ...] = ()) -> Path:
    """Write recipe.yaml into `directory`, whole or not at all, with the options that are not the default; return its path.

    base_model: report.json's, which names model and commit. Files and directories are written by their names, without the way to them;
    where a result was pushed to is left out, so that nobody who repeats a run pushes there. notes: sentences for the comment at the top.
    """
    chosen = {name: getattr(run if name in OF_RUN else config, name) for name in OPTIONS}
    chosen = {name: value for name, value in chosen.items() if _was_chosen(value, OPTIONS[name][1])}
    chosen |= {name: _portable(chosen[name]) for name in ("calibration", "text", "tokenizer") if name in chosen}
    chosen |= {"model": base_model["name"] or IN_PYTHON, "revision": base_model["revision"]}
    if base_model["local"] and base_model["name"]:
        chosen["model"] = f"{HERE}{base_model['name']}"  # no id of the Hub
        notes = (*notes, "The model was a directory; if it is not in the one you are in: awq-hf quantize --recipe recipe.yaml MODEL OUT")
    if _is_path(config.calibration):
        notes = (*notes, f"{chosen['calibration']} is needed for that; report.json has the digest of the tokens that were drawn from it.")
    if _is_path(run.text):
        notes = (*notes, f"{chosen['text']} is needed to measure again; evaluation.json has the digest of its tokens.")
    kept = {name: chosen[name] for name in OPTIONS if chosen.get(name) is not None and name not in ("push", "private")}
    again = "awq-hf quantize --recipe recipe.yaml OUT" + " --trust-remote-code" * run.trust_remote_code
    comment = "".join(f"# {line}\n" for line in (f"Repeat this run:  {again}", *notes))
    path = directory / RECIPE_NAME
    partial = path.with_name(f".{RECIPE_NAME}.partial")
    partial.write_text(comment + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")
    return partial.replace(path)


def _was_chosen(value: Any, default: Any) -> bool:
    """Data in memory may have a comparison of its own."""
    if isinstance(value, (bool, int, float, str, list, dict)) or value is None:
        return value != default and value not in ([], {})
    return True


def _portable(value: Any) -> str:
    """A name as a file may hold it: of a path on this machine its last part. Of a tokenizer, where it came from."""
    value = getattr(value, "name_or_path", None) or value
    if not isinstance(value, (str, os.PathLike)):
        return IN_PYTHON
    return Path(value).expanduser().resolve().name if _is_path(value) else os.fspath(value)


def _is_path(value: Any) -> bool:
    if not isinstance(value, (str, os.PathLike)):
        return False
    path = Path(value)
    try:
        return path.is_absolute() or path.expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # a name as no path has it
        return False
