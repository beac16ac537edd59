"""One dataplane of a name, and what a dead one left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dataplane.errors import DataplaneError
from dataplane.shm import layout as L
from dataplane.shm.segment import Segment, leftovers, segment_name
from workers.leavings import Live, claim, clean, found, held

UID = os.geteuid()
NAME = f"leavings-{os.getpid()}"


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "run"
    monkeypatch.setenv("DATAPLANE_RUNTIME_DIR", str(directory))
    return directory


def make(name: str, what: str) -> Segment:
    return Segment.create(segment_name(UID, name, what), 4096, L.SEG_TABLE)


def test_a_name_is_held_once_and_nothing_stays(directory: Path) -> None:
    with held(NAME, UID) as removed:
        assert removed == [] and (directory / f"{NAME}.lock").read_text() == f"{os.getpid()}\n"
        with pytest.raises(Live, match=f"running already .pid {os.getpid()}"), held(NAME, UID):
            pass
        with held(f"{NAME}.other", UID):
            pass
    assert not directory.exists()
    with held(NAME, UID):
        pass


def test_the_directory_is_open_to_all_whatever_the_umask(directory: Path) -> None:
    before = os.umask(0o077)
    try:
        with held(NAME, UID):
            assert directory.stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(before)


def test_leftovers_of_that_name_are_removed(directory: Path) -> None:
    make(NAME, "table").close()
    make(NAME, "home-1").close()
    other = make(f"{NAME}.b", "table")
    directory.mkdir()
    (directory / f"{NAME}.sock").touch()
    try:
        with held(NAME, UID) as removed:
            assert len(removed) == 3
            assert leftovers(UID, NAME) == [] and leftovers(UID, f"{NAME}.b")
    finally:
        other.unlink()
        other.close()


def test_a_live_ones_segments_are_left_alone() -> None:
    segment = make(NAME, "table")
    claim(segment.fd)
    try:
        with pytest.raises(Live), held(NAME, UID):
            pass
        assert clean(UID, NAME) == {NAME: None}
        assert leftovers(UID, NAME) == [segment.name]
    finally:
        segment.close()
    assert clean(UID, NAME) == {NAME: [segment.name]}


def test_clean_without_a_name(directory: Path) -> None:
    make(NAME, "table").close()
    directory.mkdir()
    (directory / f"{NAME}-2.sock").touch()
    (directory / "unrelated.txt").touch()
    assert {NAME, f"{NAME}-2"} <= set(found(UID)) and "unrelated" not in found(UID)
    with held(f"{NAME}-3", UID):
        assert clean(UID, NAME)[NAME] == [segment_name(UID, NAME, "table")]
        assert clean(UID, f"{NAME}-2") == {f"{NAME}-2": [str(directory / f"{NAME}-2.sock")]}
        assert clean(UID, f"{NAME}-3") == {f"{NAME}-3": None}
    assert leftovers(UID, NAME) == [] and not (directory / f"{NAME}-2.sock").exists()


@pytest.mark.skipif(UID == 0, reason="root may write everywhere")
def test_a_directory_of_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATAPLANE_RUNTIME_DIR", "/etc")
    with pytest.raises(DataplaneError, match="DATAPLANE_RUNTIME_DIR"), held(NAME, UID):
        pass


def test_a_symbolic_link_is_not_followed(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    directory.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataplaneError, match="not ours"), held(NAME, UID):
        pass
