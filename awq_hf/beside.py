"""Where a model was loaded from, for what lies beside its weights: tokenizer, processor, code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers.utils.hub import extract_commit_hash

SUBFOLDER, TRUSTED = "_awq_hf_subfolder", "_awq_hf_trusted"


def remember_place(model: Any, files: Sequence[str], trusted: bool = False) -> None:
    """Note where the model's files are: in model.config the Hub's commit, as older transformers do, and on the model the subfolder; and
    whether code in them may run.

    Nothing of this is saved.
    """
    setattr(model, TRUSTED, trusted)
    if not files:
        return
    if (commit := extract_commit_hash(files[0], None)) is not None:
        model.config._commit_hash = commit
    folder, name = Path(files[0]).parent, Path(model.config.name_or_path)
    root = name if name.is_dir() else next((above for above in folder.parents if above.name == commit), folder)
    setattr(model, SUBFOLDER, folder.relative_to(root).as_posix() if folder.is_relative_to(root) and folder != root else "")


def subfolder_of(model: Any) -> str:
    return getattr(model, SUBFOLDER, "")


def places_beside(model: Any, source: Any) -> list[dict[str, Any]]:
    """Where in `source` to look for what belongs to the model, as options of from_pretrained, the best first.

    Of what the model was loaded from: the same commit, and the model's subfolder, then the root, for both are in use.
    """
    if str(source) != model.config.name_or_path:
        return [{}]
    where = {"revision": getattr(model.config, "_commit_hash", None)}
    return [{**where, "subfolder": subfolder} for subfolder in dict.fromkeys((subfolder_of(model), ""))]


def load_beside(load: Callable[..., Any], model: Any, source: Any) -> Any:
    """load(source, **where) of the first place that has it; load: some class's from_pretrained. Raises the OSError or ValueError of the
    last one.

    Code in `source` runs only where the model is from there, and its own may run.
    """
    trusted = getattr(model, TRUSTED, False) or model.is_remote_code()
    options = {"trust_remote_code": trusted and str(source) == model.config.name_or_path}
    *others, last = places_beside(model, source)
    for where in others:
        try:
            return load(source, **where, **options)
        except (OSError, ValueError):
            continue
    return load(source, **last, **options)
