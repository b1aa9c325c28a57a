"""Writes to a disk that is full, and an index on a disk that cannot be written at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.torture import changes, full_disk
from benchmarks.torture.entries import DIM, State, Truth, add, vector_of
from vitembed.errors import VitembedError
from vitembed.index import Index, sync

ROOT = Path(__file__).parents[2]


def can_mount_here(tmp_path):
    """Tell whether a small disk can be mounted; a container's root may be forbidden to."""
    if not full_disk.can_mount():
        return False
    try:
        with full_disk.small_disk(tmp_path / "try"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@pytest.fixture
def disk(tmp_path):
    if not can_mount_here(tmp_path):
        pytest.skip("mounting a small disk needs root")
    with full_disk.small_disk(tmp_path / "disk") as disk:
        yield disk


def test_every_write_to_a_full_disk_is_refused_in_one_line_or_done_and_nothing_is_half_changed(tmp_path):
    if not can_mount_here(tmp_path):
        pytest.skip("mounting a small disk needs root")
    options = ["--sizes", "0", "64", "300", "--kinds", "hnsw", "--json"]
    command = [sys.executable, "-m", "benchmarks.torture", "disk", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stderr
    figures = json.loads(done.stdout)
    assert figures["problems"] == []
    assert {"add: refused", "remove: refused", "transaction: refused", "sync: refused"} <= figures["outcomes"].keys()


def test_an_index_on_a_read_only_disk_can_be_searched_and_checked_and_refuses_every_write_in_one_line(disk, tmp_path):
    state: State = {}
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("a")
    with Index.create(disk / "x.index", DIM) as index:
        add(index, state, [f"猫 {n}" for n in range(1_200)], 1)
        index.remove(["猫 7"])
        del state["猫 7"]
    full_disk.set_writable(disk, False)
    writes = {
        "add": lambda: index.add(["new"], [vector_of("new")]),
        "remove": lambda: index.remove(["猫 1"]),
        "sync": lambda: sync(index, changes.FileModel(lambda content: None), tmp_path / "photos"),
        "create": lambda: Index.create(disk / "y.index", DIM),
        "compact": lambda: index.compact(),
        "optimize": lambda: index.optimize(recall=0.9, kind="hnsw"),
    }
    try:
        with Index.open(disk / "x.index") as index:
            assert index.check() == []
            assert index.ids() == list(state)
            query = vector_of("query")
            assert Truth(state).wrong_answer(query, index.search(query, 10)[0], 10) == []
            for name, write in writes.items():
                with pytest.raises(VitembedError) as caught:
                    write()
                assert "\n" not in str(caught.value), name
                assert "damaged" not in str(caught.value), name
            assert index.ids() == list(state)
    finally:
        full_disk.set_writable(disk, True)
    with Index.open(disk / "x.index") as index:
        index.add(["new"], [vector_of("new")])
        assert index.check() == []


def test_the_ballast_leaves_as_much_as_it_should(disk):
    for free in (0, 40_960, 1 << 20):
        ballast = full_disk.fill_up(disk, free)
        status = os.statvfs(disk)
        assert status.f_bavail * status.f_frsize == free
        ballast.unlink()
