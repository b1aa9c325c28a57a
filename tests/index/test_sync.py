"""`sync`: an index that follows a folder, with a model that is a hash and counts what it embeds."""

import hashlib
import importlib
import os
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from vitembed.errors import ConfigError, DataError, ImageError, ModelMismatchError, SearchIndexError
from vitembed.index import Index, SyncReport, sync

DIM = 16


@dataclass(frozen=True)
class Encoded:
    positions: np.ndarray
    vectors: np.ndarray
    failures: list


def vector_of(content):
    seed = int.from_bytes(hashlib.sha256(content).digest()[:4], "big")
    vector = np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


class FakeModel:
    """Embeds a file by its bytes; a file that begins with "bad" cannot be read."""

    dim = DIM
    fingerprint = "sha256:fake"

    def __init__(self):
        self.embedded = []

    def stream(self, images, *, batch_size=64, workers=None):
        for start in range(0, len(images), batch_size):
            good, vectors, failures = [], [], []
            for position in range(start, min(start + batch_size, len(images))):
                content = Path(images[position]).read_bytes()
                self.embedded.append(Path(images[position]).name)
                if content.startswith(b"bad"):
                    failures.append((position, ImageError(str(images[position]), "is truncated")))
                else:
                    good.append(position)
                    vectors.append(vector_of(content))
            yield Encoded(np.array(good, np.int64), np.array(vectors, np.float32).reshape(-1, DIM), failures)


def write(path, content, age=100):
    """Write a file that last changed `age` seconds ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    stamp = path.stat().st_mtime - age
    os.utime(path, (stamp, stamp))


@pytest.fixture
def folder(tmp_path):
    for number in range(10):
        write(tmp_path / "photos" / "sub dir" / f"{number}.png", b"image %d" % number)
    write(tmp_path / "photos" / "ä 猫.jpg", b"cat")
    return tmp_path / "photos"


@pytest.fixture
def index(tmp_path):
    with Index.create(tmp_path / "x.index", DIM) as index:
        yield index


@pytest.fixture
def model():
    return FakeModel()


def assert_follows(index, folder, but=()):
    """Every image of the folder is in the index with its own vector and path, and nothing else is."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.*") if path.name not in but}
    assert set(index.ids()) == set(files)
    for name, path in files.items():
        record = index.get(name)
        np.testing.assert_array_equal(record.vector, vector_of(path.read_bytes()))
        assert record.metadata == {"path": str(path)}
    assert index.check() == []


def test_new_files_are_added_once_and_left_alone_afterwards(index, model, folder, monkeypatch):
    assert sync(index, model, folder, batch_size=3) == SyncReport(added=11)
    assert_follows(index, folder)
    assert index.fingerprint == "sha256:fake"
    monkeypatch.setattr(Path, "open", None)  # unchanged files are not even read
    assert sync(index, model, str(folder), batch_size=3) == SyncReport(unchanged=11)
    assert len(model.embedded) == 11


def test_changed_and_removed_files_are_followed(index, model, folder):
    sync(index, model, folder)
    write(folder / "sub dir" / "3.png", b"another image", age=50)
    (folder / "sub dir" / "4.png").unlink()
    write(folder / "new.png", b"new")
    assert sync(index, model, folder) == SyncReport(added=1, updated=1, removed=1, unchanged=9)
    assert model.embedded[11:] == ["new.png", "3.png"]
    assert_follows(index, folder)


def test_a_touched_file_is_read_but_not_embedded(index, model, folder):
    sync(index, model, folder)
    write(folder / "sub dir" / "3.png", b"image 3", age=10)
    assert sync(index, model, folder) == SyncReport(unchanged=11)
    assert len(model.embedded) == 11


def test_a_change_that_size_and_time_do_not_show_is_seen_when_the_file_is_fresh(index, model, folder):
    path = folder / "fresh.png"
    write(path, b"content 1", age=0)
    sync(index, model, folder)
    stamp = path.stat().st_mtime_ns
    path.write_bytes(b"content 2")
    os.utime(path, ns=(stamp, stamp))
    assert sync(index, model, folder).updated == 1
    assert_follows(index, folder)


def test_copies_and_renamed_files_are_embedded_once(index, model, folder):
    write(folder / "copy.png", b"image 3")
    assert sync(index, model, folder, batch_size=2) == SyncReport(added=12)
    assert len(model.embedded) == 11
    (folder / "sub dir" / "5.png").rename(folder / "renamed.png")
    assert sync(index, model, folder) == SyncReport(added=1, removed=1, unchanged=11)
    assert len(model.embedded) == 11
    assert_follows(index, folder)


def test_files_that_swap_their_contents_swap_their_vectors(index, model, folder):
    sync(index, model, folder)
    write(folder / "sub dir" / "1.png", b"image 2", age=50)
    write(folder / "sub dir" / "2.png", b"image 1", age=50)
    assert sync(index, model, folder) == SyncReport(updated=2, unchanged=9)
    assert len(model.embedded) == 11
    assert_follows(index, folder)


def test_bad_files_are_set_aside_and_tried_again_only_when_they_change(index, model, folder):
    bad = folder / "bad.png"
    write(bad, b"bad 1")
    write(folder / "bad copy.png", b"bad 1")
    failed = {str(folder / "bad copy.png"): "is truncated", str(bad): "is truncated"}
    assert sync(index, model, folder) == SyncReport(added=11, failed=failed)
    assert sync(index, model, folder) == SyncReport(unchanged=11, failed=failed)
    write(bad, b"bad 1", age=50)  # touched: read again, not embedded again
    assert sync(index, model, folder) == SyncReport(unchanged=11, failed=failed)
    assert len(model.embedded) == 12
    write(bad, b"good now", age=20)
    (folder / "bad copy.png").unlink()
    assert sync(index, model, folder) == SyncReport(added=1, unchanged=11)
    assert_follows(index, folder)


def test_an_entry_whose_file_became_bad_is_removed_and_set_aside(index, model, folder):
    sync(index, model, folder)
    write(folder / "sub dir" / "3.png", b"bad now", age=50)
    report = sync(index, model, folder)
    assert report == SyncReport(unchanged=10, failed={str(folder / "sub dir" / "3.png"): "is truncated"})
    assert_follows(index, folder, but=("3.png",))


def test_a_file_that_cannot_be_opened_is_set_aside_and_tried_every_time(index, model, folder, monkeypatch):
    sync(index, model, folder)
    locked = folder / "sub dir" / "3.png"
    write(locked, b"changed", age=50)
    real = Path.open

    def denied(path, *arguments):
        if path == locked:
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", denied)
        assert sync(index, model, folder).failed == {str(locked): "Permission denied"}
        assert "sub dir/3.png" not in index
    assert sync(index, model, folder) == SyncReport(added=1, unchanged=10)
    assert_follows(index, folder)


def test_a_file_that_vanishes_after_the_listing_is_set_aside(index, model, folder, monkeypatch):
    sync(index, model, folder)
    ghost = folder / "ghost.png"
    listed = [*folder.rglob("*.*"), ghost]
    module = importlib.import_module("vitembed.index.sync")
    monkeypatch.setattr(module, "list_images", lambda folder: listed)
    assert sync(index, model, folder) == SyncReport(unchanged=11, failed={str(ghost): "No such file or directory"})


def test_other_entries_are_left_alone_and_not_overwritten(index, model, folder, tmp_path):
    mine = np.eye(DIM, dtype=np.float32)[:2]
    index.add(["mine", "ä 猫.jpg"], mine)
    write(tmp_path / "other" / "sub dir" / "1.png", b"other 1")
    write(tmp_path / "other" / "2.png", b"other 2")
    report = sync(index, model, folder)
    assert (report.added, list(report.failed)) == (10, [str(folder / "ä 猫.jpg")])
    assert "was not added by sync" in report.failed[str(folder / "ä 猫.jpg")]
    report = sync(index, model, tmp_path / "other")
    assert (report.added, report.removed) == (1, 0)
    assert f"for a file in {folder}" in report.failed[str(tmp_path / "other" / "sub dir" / "1.png")]
    (folder / "sub dir" / "9.png").unlink()
    assert sync(index, model, folder).removed == 1
    assert {"mine", "ä 猫.jpg", "2.png"} <= set(index.ids())
    np.testing.assert_array_equal(index.get("ä 猫.jpg").vector, mine[1])
    assert index.check() == []


def test_an_entry_that_the_user_removed_comes_back_and_one_that_the_user_replaced_stays(index, model, folder):
    sync(index, model, folder)
    index.remove(["sub dir/1.png"])
    index.add(["sub dir/2.png"], np.eye(DIM, dtype=np.float32)[:1])
    report = sync(index, model, folder)
    assert (report.added, report.unchanged, list(report.failed)) == (1, 9, [str(folder / "sub dir" / "2.png")])
    assert index.get("sub dir/2.png").vector[0] == 1


def test_a_moved_folder_is_followed_without_embedding(index, model, folder):
    sync(index, model, folder)
    moved = folder.rename(folder.parent / "moved")
    report = sync(index, model, moved)
    assert (report.added + report.updated, report.failed) == (11, {})
    assert len(model.embedded) == 11
    assert_follows(index, moved)
    assert sync(index, model, moved) == SyncReport(unchanged=11)


def test_names_that_cannot_be_ids_are_reported(index, model, folder):
    write(folder / "line\nbreak.png", b"x")
    strange = os.fsencode(folder) + b"/\xff.png"
    try:
        Path(os.fsdecode(strange)).write_bytes(b"y")
    except OSError:  # some file systems take Unicode names only
        strange = None
    report = sync(index, model, folder)
    assert report.added == 11
    assert any("control characters" in reason for reason in report.failed.values())
    assert strange is None or any("not valid Unicode" in reason for reason in report.failed.values())
    "".join(report.failed).encode()


class Stopped(Exception):
    pass


def test_a_stopped_run_loses_one_batch_and_embeds_nothing_twice(index, folder):
    class Stopping(FakeModel):
        def stream(self, images, *, batch_size=64, workers=None):
            for number, batch in enumerate(super().stream(images, batch_size=batch_size)):
                if number == 2:
                    raise Stopped
                yield batch

    first, second = Stopping(), FakeModel()
    with pytest.raises(Stopped):
        sync(index, first, folder, batch_size=3)
    assert len(index) == 6
    assert sync(index, second, folder, batch_size=3) == SyncReport(added=5, unchanged=6)
    assert not set(first.embedded[:6]) & set(second.embedded)
    assert_follows(index, folder)


SLOW_SYNC = """
import sys, time
sys.path.insert(0, sys.argv[3])
from test_sync import FakeModel
from vitembed.index import Index, sync

class Slow(FakeModel):
    def stream(self, images, *, batch_size=64, workers=None):
        for batch in super().stream(images, batch_size=batch_size):
            yield batch
            print("committed", flush=True)
            time.sleep(0.02)

with Index.open(sys.argv[1]) as index:
    sync(index, Slow(), sys.argv[2], batch_size=1)
"""


def test_a_killed_run_is_resumed_and_a_second_run_is_refused_while_it_lives(index, model, folder):
    command = [sys.executable, "-c", SLOW_SYNC, str(index.path), str(folder), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(3):
            assert process.stdout.readline() == "committed\n"
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(SearchIndexError, match="another process is synchronising"):
            sync(index, model, folder)
        process.kill()
    done = len(index)
    assert 3 <= done <= 11
    assert index.check() == []
    assert sync(index, model, folder) == SyncReport(added=11 - done, unchanged=done)
    assert len(model.embedded) == 11 - done
    assert_follows(index, folder)


def test_another_model_is_refused_before_anything_is_read(index, model, folder):
    sync(index, model, folder)
    model.fingerprint = "sha256:other"
    with pytest.raises(ModelMismatchError, match="sha256:fake"):
        sync(index, model, folder)


def test_a_model_of_another_width_is_refused(index, model, folder):
    model.dim = 5
    with pytest.raises(ModelMismatchError, match="vectors of 16 numbers and this model makes 5"):
        sync(index, model, folder)
    assert index.fingerprint is None


def test_an_emptied_or_missing_folder_is_an_error_and_removes_nothing(index, model, folder, tmp_path):
    sync(index, model, folder)
    (tmp_path / "empty").mkdir()
    for missing in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(DataError):
            sync(index, model, missing)
    with pytest.raises(ConfigError, match="batch_size"):
        sync(index, model, folder, batch_size=0)
    assert len(index) == 11


def test_a_folder_whose_name_is_no_text_and_an_index_that_cannot_be_written_are_refused(index, model, folder, tmp_path):
    with pytest.raises(DataError, match="not valid Unicode"):
        sync(index, model, tmp_path / "\udcff")
    (index.path / "sync.lock").mkdir()
    with pytest.raises(SearchIndexError, match="cannot write"):
        sync(index, model, folder)


def test_progress_goes_to_standard_error(index, model, folder, capsys):
    sync(index, model, folder, progress=True)
    output = capsys.readouterr()
    assert output.out == ""
    assert "11/11" in output.err


def test_files_are_hashed_in_slices_and_all_of_them_arrive(index, model, tmp_path):
    for number in range(100):
        write(tmp_path / "many" / f"{number:03}.png", b"image %d" % (number // 2))
    with closing(index):
        assert sync(index, model, tmp_path / "many", batch_size=1) == SyncReport(added=100)
        assert len(model.embedded) == 50
        assert_follows(index, tmp_path / "many")
