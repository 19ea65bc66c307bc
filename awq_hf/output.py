"""Writing a directory or a file whole or not at all."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output(output: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """The path to write, refused when something is there or its parent cannot be written to: that is tried.

    An empty directory is nothing. overwrite: a file or a model's directory may be there, and will be replaced.
    """
    target = Path(output).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        if not overwrite:
            raise FileExistsError(f"{output} exists and is not an empty directory; choose another name or remove it")
        if target.is_dir() and not (target / "config.json").is_file():
            raise FileExistsError(f"{output} exists and is no model's directory; only such are overwritten: choose another name")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _beside(target).rmdir()
    except OSError as error:
        raise PermissionError(f"{target.parent} cannot be written to ({error.strerror}); choose another output directory") from error
    return target


def _beside(target: Path) -> Path:
    """A new directory beside `target`, under a temporary name."""
    return Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A path to write a file or a directory to, which becomes `target` when the block ends, and is gone when it fails."""
    room = _beside(target)
    try:
        partial = room / target.name
        yield partial
        follow_umask(path for path in (partial, *partial.rglob("*")) if path.is_file())
        if not target.exists():
            partial.rename(target)
            return
        old = room / f"{target.name}.old"
        target.rename(old)
        try:
            partial.rename(target)
        except BaseException:
            old.rename(target)
            raise
    finally:
        shutil.rmtree(room, ignore_errors=True)


def follow_umask(files: Iterable[Path]) -> None:
    """Give files the mode that this process's new files have there: safetensors writes for the owner alone, whatever the umask."""
    for path in files:
        new = path.with_name(f".{path.name}.mode")
        new.touch()
        try:
            path.chmod(stat.S_IMODE(new.stat().st_mode))
        finally:
            new.unlink()
