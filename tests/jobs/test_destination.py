"""Where files go that commands write: links stay, and what is no file is not replaced."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.jobs.data import array_file, save_answers
from nnfuze_tvm.jobs.destination import destination, whole


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_file_stays(tmp_path: Path, force: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    os.symlink("/dev/null", tmp_path / "null")
    for name, kind in {"pipe": "a pipe", "null": "a device", ".": "a directory"}.items():
        with pytest.raises(InputError, match=f"{kind}, not a file"):
            destination(tmp_path / name, force=force)
    with pytest.raises(InputError, match="no directory that can be written"):
        destination(tmp_path / "none" / "file", force=force)


def test_links_are_kept_and_what_they_point_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    for link, name in {"link": "file", "dangling": "new"}.items():
        os.symlink(name, tmp_path / link)
        if link == "link":
            with pytest.raises(InputError, match="exists already"):
                destination(tmp_path / link, force=False)
        with whole(destination(tmp_path / link, force=True), link) as file:
            file.write_text(link)
        assert os.readlink(tmp_path / link) == name and (tmp_path / name).read_text() == link


def test_nothing_is_left_where_writing_ends_early(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), whole(tmp_path / "file", "file") as file:
        file.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_answers_are_not_written_into_pipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "net.npy")
    with pytest.raises(InputError, match="a pipe, not a file"):
        save_answers({"net": 1}, tmp_path)
    with pytest.raises(InputError, match="a pipe, not a file"), array_file(tmp_path / "net.npy"):
        pass
