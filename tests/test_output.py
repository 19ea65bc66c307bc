"""Files and directories are written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from awq_hf.output import check_output, check_writable, whole, write_whole


@pytest.mark.parametrize("there", [False, True])
def test_a_file(there: bool, tmp_path: Path) -> None:
    target = tmp_path / "model.bin"
    if there:
        target.write_text("old")
    with whole(target) as partial:
        partial.write_text("new")
        assert target.exists() == there
    assert target.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_get_the_mode_of_the_umask(umask: int, tmp_path: Path) -> None:
    """safetensors writes for the owner alone, and another user's server could not read it."""
    before = os.umask(umask)
    try:
        with whole(tmp_path / "out") as partial:
            partial.mkdir()
            save_file({"a": torch.zeros(1)}, partial / "a.safetensors")
        with whole(tmp_path / "b.safetensors") as partial:
            save_file({"b": torch.zeros(1)}, partial)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"out": 0o777 & ~umask, "a.safetensors": 0o666 & ~umask, "b.safetensors": 0o666 & ~umask}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")])
def test_a_full_disk_is_said_of_what_was_to_be_written(error: Exception, tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="out was not written, nothing of it is left: no space on its disk"),
        whole(tmp_path / "out") as partial,
    ):
        partial.write_text("half")
        raise error
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="^other$"), whole(tmp_path / "out"):
        raise OSError("other")


def test_what_was_there_comes_back_when_nothing_takes_its_place(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    with pytest.raises(FileNotFoundError), whole(tmp_path / "out"):
        pass  # nothing is written
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_a_small_file_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "README.md"
    write_whole(path, b"old")
    write_whole(path, b"new")

    def full(self: Path, content: bytes) -> None:
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"README.md was not written \(No space left on device\)"):
        write_whole(path, b"newer")
    assert path.read_text() == "new" and [each.name for each in tmp_path.iterdir()] == ["README.md"]


def test_a_directory_is_checked_by_trying(tmp_path: Path) -> None:
    assert check_output(tmp_path / "a" / "b") == (tmp_path / "a" / "b").resolve()
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="file cannot be written to"):
        check_writable(tmp_path / "file")
    with pytest.raises(PermissionError, match="cannot be written to"):
        check_output(tmp_path / "file" / "b")
    with pytest.raises(FileExistsError):
        check_output(tmp_path / "file")
    assert check_output(tmp_path / "file", overwrite=True)
