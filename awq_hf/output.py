"""Writing a directory or a file whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


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
    except OSError as error:
        raise _not_writable(target.parent, error) from error
    check_writable(target.parent)
    return target


def check_writable(folder: Path) -> None:
    """Raises PermissionError where nothing can be written into a folder: that is tried."""
    try:
        _beside(folder / "a").rmdir()
    except OSError as error:
        raise _not_writable(folder, error) from error


def _not_writable(folder: Path, error: OSError) -> PermissionError:
    return PermissionError(f"{folder} cannot be written to ({error.strerror}); choose another output directory")


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all, over one that is there. Raises OSError naming it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} was not written ({error.strerror})") from error


def _beside(target: Path) -> Path:
    """A new directory beside `target`, under a temporary name."""
    return Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A path to write a file or a directory to, which becomes `target` when the block ends, and is gone when it fails.

    Where the disk is full, that is said of `target`: safetensors does not say of what.
    """
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
    except (OSError, SafetensorError) as error:
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise OSError(f"{target} was not written, nothing of it is left: no space on its disk; make room or write elsewhere") from error
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
