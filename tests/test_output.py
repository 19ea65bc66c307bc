"""Files and directories are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from awq_hf.output import check_output, whole


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


def test_what_was_there_comes_back_when_nothing_takes_its_place(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    with pytest.raises(FileNotFoundError), whole(tmp_path / "out"):
        pass  # nothing is written
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_a_directory_is_checked_by_trying(tmp_path: Path) -> None:
    assert check_output(tmp_path / "a" / "b") == (tmp_path / "a" / "b").resolve()
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="cannot be written to"):
        check_output(tmp_path / "file" / "b")
    with pytest.raises(FileExistsError):
        check_output(tmp_path / "file")
    assert check_output(tmp_path / "file", overwrite=True)
