"""`sync`: an index that follows a folder, with a model that is a hash and counts what it embeds."""

import builtins
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vitembed.errors import ConfigError, DataError, ImageError, ModelMismatchError, SearchIndexError
from vitembed.index import Index, SyncReport, sync
from vitembed.index.aside import SetAside, set_aside
from vitembed.index.files import FileRecord
from vitembed.index.folder import Folder, Listing
from vitembed.index.progress import Progress
from vitembed.preprocess import Preprocess

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
        self.forgiving = False

    def stream(self, images, *, batch_size=64, workers=None):
        for start in range(0, len(images), batch_size):
            good, vectors, failures = [], [], []
            for position in range(start, min(start + batch_size, len(images))):
                try:
                    content = Path(images[position]).read_bytes()
                except FileNotFoundError:
                    failures.append((position, ImageError(str(images[position]), "does not exist")))
                    continue
                self.embedded.append(Path(images[position]).name)
                if content.startswith(b"bad") and not self.forgiving:
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


def backdate(patch):
    """Let the system say that the status of every file changed an hour before it did: only the other time can be set.

    So `write` decides how old a file looks, unless that is more than an hour.
    """
    module = sys.modules["vitembed.index.folder"]
    real, hour = module.changed_ns, 3600 * 10**9

    def earlier(status):
        return real(SimpleNamespace(st_mtime_ns=status.st_mtime_ns, st_ctime_ns=status.st_ctime_ns - hour))

    patch.setattr(module, "changed_ns", earlier)


@pytest.fixture(autouse=True)
def _old_files(monkeypatch):
    backdate(monkeypatch)


def deny(patch, *paths):
    """Make these files and folders unreadable, for the superuser too."""
    real = {"open": builtins.open, "scandir": os.scandir}

    def denied(name):
        def call(path, *arguments, **options):
            if Path(path) in paths:
                raise PermissionError(13, "Permission denied", str(path))
            return real[name](path, *arguments, **options)

        return call

    patch.setattr(builtins, "open", denied("open"))
    patch.setattr(os, "scandir", denied("scandir"))


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
    monkeypatch.setattr(hashlib, "file_digest", None)  # unchanged files are not even read
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


def test_files_of_one_size_and_time_that_swap_their_names_swap_their_vectors(index, model, folder):
    files = [folder / "a.png", folder / "b.png"]
    for number, path in enumerate(files):
        write(path, b"picture %d" % number)
        os.utime(path, (10**9, 10**9))  # as an archive may set it for all of its files
    sync(index, model, folder)
    time.sleep(0.02)  # longer than a tick of the file system's clock
    files[0].rename(folder / "c")
    files[1].rename(files[0])
    (folder / "c").rename(files[1])
    assert sync(index, model, folder) == SyncReport(updated=2, unchanged=11)
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
    with monkeypatch.context() as patch:
        deny(patch, locked)
        assert sync(index, model, folder).failed == {str(locked): "Permission denied"}
        assert "sub dir/3.png" not in index
    assert sync(index, model, folder) == SyncReport(added=1, unchanged=10)
    assert_follows(index, folder)


def test_a_file_that_vanishes_while_the_folder_is_looked_through_counts_as_removed(index, model, folder, monkeypatch):
    write(folder / "0.png", b"old")
    sync(index, model, folder)
    write(folder / "0.png", b"new and soon gone", age=50)
    write(folder / "1.png", b"never seen again")
    listed = Folder(folder).list()
    for name in ("0.png", "1.png"):
        (folder / name).unlink()
    monkeypatch.setattr(Folder, "list", lambda self: listed)
    assert sync(index, model, folder) == SyncReport(removed=1, unchanged=11)
    assert set_aside(index) == []
    assert_follows(index, folder)


class Meddling(FakeModel):
    """Calls something the first time that it meets a file of a certain name, before or after it reads it."""

    def __init__(self, name, before=None, after=None):
        super().__init__()
        self.name, self.before, self.after = name, before, after

    def stream(self, images, *, batch_size=64, workers=None):
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            met = any(image.name == self.name for image in part)
            if met and self.before:
                self.before = self.before()
            [batch] = super().stream(part, batch_size=batch_size)
            if met and self.after:
                self.after = self.after()
            failures = [(position + start, error) for position, error in batch.failures]
            yield Encoded(batch.positions + start, batch.vectors, failures)


@pytest.mark.parametrize("age", [0, 50])  # fresh files are compared by content, others by size and time
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_file_that_changes_between_hash_and_embedding_is_not_recorded_wrongly(index, folder, moment, age):
    target = folder / "x.png"
    write(target, b"content 1", age=age)
    write(folder / "y.png", b"content 1", age=60)  # waits for the vector of x.png

    def change():
        write(target, b"content 2", age=age and age - 10)

    report = sync(index, Meddling("x.png", **{moment: change}), folder, batch_size=3)
    assert report.failed == {str(target): "changed while it was read; the next sync takes it"}
    assert report.added == 12
    np.testing.assert_array_equal(index.get("y.png").vector, vector_of(b"content 1"))
    # The first content comes back: nothing may have been recorded of it under the second one's vector.
    write(target, b"content 1", age=5)
    model = FakeModel()
    assert sync(index, model, folder) == SyncReport(added=1, unchanged=12)
    assert_follows(index, folder)


def test_a_file_that_vanishes_before_it_is_embedded_is_removed_and_its_copy_still_embedded(index, model, folder):
    target = folder / "x.png"
    write(target, b"old")
    sync(index, model, folder)
    write(target, b"content 1", age=50)
    write(folder / "y.png", b"content 1", age=60)
    report = sync(index, Meddling("x.png", before=target.unlink), folder)
    assert report == SyncReport(added=1, removed=1, unchanged=11)
    assert_follows(index, folder)


def test_a_file_that_was_away_when_it_was_to_be_embedded_is_taken_when_it_is_back(index, folder, tmp_path):
    target = folder / "x.png"
    write(target, b"content 1")
    write(folder / "a.png", b"")
    model = Meddling("x.png", before=lambda: target.rename(tmp_path / "away") and None)
    assert sync(index, model, folder).added == 12
    (tmp_path / "away").rename(target)  # with its old time
    assert sync(index, FakeModel(), folder) == SyncReport(added=1, unchanged=12)
    assert_follows(index, folder)


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


def test_a_picture_whose_disk_is_away_is_not_replaced_by_another_of_its_name(index, model, folder, tmp_path):
    write(tmp_path / "usb" / "x.png", b"of the disk")
    write(tmp_path / "usb" / "same.png", b"the same")
    sync(index, model, tmp_path / "usb")
    away = (tmp_path / "usb").rename(tmp_path / "away")
    write(folder / "x.png", b"another picture")
    write(folder / "same.png", b"the same")
    for _ in range(2):
        [(path, reason)] = sync(index, model, folder).failed.items()
        assert path == str(folder / "x.png")
        assert f"for {tmp_path / 'usb' / 'x.png'}, which is not there" in reason
        assert "remove 'x.png' from the index and sync again" in reason
        assert index.get("x.png").metadata == {"path": str(tmp_path / "usb" / "x.png")}
        assert index.get("same.png").metadata == {"path": str(folder / "same.png")}
    assert "x.png" not in model.embedded[2:]
    away.rename(tmp_path / "usb")
    assert list(sync(index, model, tmp_path / "usb").failed) == [str(tmp_path / "usb" / "same.png")]
    np.testing.assert_array_equal(index.get("x.png").vector, vector_of(b"of the disk"))


def test_a_file_that_was_moved_and_edited_is_taken_once_its_entry_is_removed(index, model, folder):
    sync(index, model, folder)
    moved = folder.rename(folder.parent / "moved")
    write(moved / "sub dir" / "3.png", b"edited", age=50)
    report = sync(index, model, moved)
    assert (report.added, list(report.failed)) == (10, [str(moved / "sub dir" / "3.png")])
    index.remove(["sub dir/3.png"])
    assert sync(index, model, moved) == SyncReport(added=1, unchanged=10)
    assert_follows(index, moved)


def test_an_owner_that_cannot_be_looked_at_keeps_its_entry(index, model, folder, tmp_path, monkeypatch):
    write(tmp_path / "locked" / "x.png", b"picture")
    sync(index, model, tmp_path / "locked")
    write(folder / "x.png", b"picture")
    real = os.stat

    def status(path, *arguments, **options):
        if Path(path) == tmp_path / "locked" / "x.png":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", status)
    assert list(sync(index, model, folder).failed) == [str(folder / "x.png")]
    assert index.get("x.png").metadata == {"path": str(tmp_path / "locked" / "x.png")}


@pytest.mark.parametrize("moment", ["planned", "hashed", "embedded"])
def test_entries_that_another_process_adds_meanwhile_are_neither_removed_nor_replaced(
    index, folder, tmp_path, moment, monkeypatch
):
    names = ["gone.png", "changed.png", "spoilt.png", "touched.png", "copy.png", "new.png"]
    for name in names[:-2]:
        write(folder / name, name.encode())
    sync(index, FakeModel(), folder)
    (folder / "gone.png").unlink()
    write(folder / "changed.png", b"another", age=50)
    write(folder / "spoilt.png", b"bad now", age=50)
    write(folder / "touched.png", b"touched.png", age=50)
    write(folder / "copy.png", b"image 3")
    write(folder / "new.png", b"new")
    mine = np.eye(DIM, dtype=np.float32)[: len(names)]

    def add():
        with Index.open(index.path) as other:
            other.add(names, mine, [{"mine": name} for name in names])

    def calling(function):
        def call(self, *arguments):
            if call.first:
                call.first = False
                add()
            return function(self, *arguments)

        call.first = True
        return call

    if moment == "planned":  # after the records were read
        monkeypatch.setattr(Folder, "look", calling(Folder.look))
    elif moment == "hashed":
        monkeypatch.setattr(Folder, "read", calling(Folder.read))
    report = sync(index, Meddling("new.png", before=add if moment == "embedded" else None), folder)
    assert (report.removed, report.updated) == (0, 0)
    assert report.added == (moment == "embedded")  # copy.png, before the others came
    for name, vector in zip(names, mine, strict=True):
        np.testing.assert_array_equal(index.get(name).vector, vector)
        assert index.get(name).metadata == {"mine": name}
    assert {str(folder / name) for name in ("changed.png", "new.png", "spoilt.png")} <= report.failed.keys()
    assert index.check() == []
    again = sync(index, FakeModel(), folder)
    assert again == SyncReport(
        unchanged=11, failed={str(folder / name): again.failed[str(folder / name)] for name in names[1:]}
    )
    assert all("was not added by sync" in reason for reason in again.failed.values())
    assert set(names) <= set(index.ids())


def test_an_entry_that_another_process_removes_meanwhile_comes_back_with_the_next_sync(index, folder):
    sync(index, FakeModel(), folder)
    write(folder / "sub dir" / "3.png", b"changed", age=50)

    def remove():
        with Index.open(index.path) as other:
            other.remove(["sub dir/3.png", "sub dir/4.png"])

    report = sync(index, Meddling("3.png", before=remove), folder)
    assert (report.added, report.updated) == (1, 0)
    assert sync(index, FakeModel(), folder) == SyncReport(added=1, unchanged=10)
    assert_follows(index, folder)


def test_names_that_cannot_be_ids_are_set_aside_in_printable_words_until_they_are_renamed(index, model, folder):
    write(folder / "line\nbreak.png", b"x")
    expected = {f"{folder}/line\\nbreak.png": "control characters"}
    strange = Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png"))
    try:
        write(strange, b"y")
        write(folder / r"\xff.png", b"a good name that looks the same")
        expected[f"{folder}/\\xff.png"] = "not valid Unicode"
    except OSError:  # some file systems take Unicode names only
        strange = None
    for _ in range(2):
        report = sync(index, model, folder)
        assert report.failed.keys() == expected.keys()
        assert all(words in report.failed[path] for path, words in expected.items())
        assert [one.path for one in set_aside(index)] == sorted(expected)
        assert (r"\xff.png" in index) == (strange is not None)
    (folder / "line\nbreak.png").rename(folder / "line break.png")
    if strange:
        strange.rename(folder / "renamed.png")
    assert sync(index, model, folder).failed == {}
    assert set_aside(index) == []
    assert_follows(index, folder)


def test_what_is_set_aside_is_listed_for_all_folders_with_path_and_reason(index, model, folder, tmp_path):
    assert set_aside(index) == []
    write(folder / "bad.png", b"bad")
    write(tmp_path / "other" / "ä\u200b.png", b"bad too")
    write(tmp_path / "other" / "3.png", b"three")
    sync(index, model, folder)
    sync(index, model, tmp_path / "other")
    bad = [
        SetAside(str(tmp_path / "other" / "ä\u200b.png"), "is truncated"),
        SetAside(str(folder / "bad.png"), "is truncated"),
    ]
    assert set_aside(index) == sorted(bad, key=lambda one: one.path)
    write(folder / "bad.png", b"good now", age=5)
    sync(index, model, folder)
    assert set_aside(index) == bad[:1]


def test_a_file_that_has_an_entry_by_way_of_another_folder_is_not_listed_as_set_aside(index, model, folder):
    bad = folder / "sub dir" / "bad.png"
    write(bad, b"bad")
    sync(index, model, folder)
    assert [one.path for one in set_aside(index)] == [str(bad)]
    write(bad, b"good now", age=50)
    sync(index, model, folder / "sub dir")
    assert set_aside(index) == []


def test_bad_files_are_tried_again_on_demand(index, model, folder):
    write(folder / "bad.png", b"bad")
    sync(index, model, folder)
    assert sync(index, model, folder, retry=True).failed == {str(folder / "bad.png"): "is truncated"}
    assert model.embedded.count("bad.png") == 2
    model.forgiving = True  # a decoder was installed
    assert sync(index, model, folder) == SyncReport(unchanged=11, failed={str(folder / "bad.png"): "is truncated"})
    assert sync(index, model, folder, retry=True) == SyncReport(added=1, unchanged=11)
    assert len(model.embedded) == 14
    assert_follows(index, folder)


def test_a_folder_that_cannot_be_read_keeps_its_entries_and_does_not_stop_the_others(index, model, folder, monkeypatch):
    sync(index, model, folder)
    write(folder / "new.png", b"new")
    with monkeypatch.context() as patch:
        deny(patch, folder / "sub dir")
        for added, unchanged in ((1, 11), (0, 12)):
            report = sync(index, model, folder)
            assert (report.added, report.removed, report.unchanged) == (added, 0, unchanged)
            [(path, reason)] = report.failed.items()
            assert path == str(folder / "sub dir")
            assert reason == "cannot be read: Permission denied; what the index holds of it stays"
            assert set_aside(index) == [SetAside(path, reason)]
        assert index.check() == []
        deny(patch, folder)
        with pytest.raises(DataError, match="cannot be read: Permission denied"):
            sync(index, model, folder)
    assert sync(index, model, folder) == SyncReport(unchanged=12)
    assert set_aside(index) == []
    assert_follows(index, folder)


def test_below_a_folder_that_cannot_be_read_are_its_own_files_alone(index, model, folder, monkeypatch):
    for name in ("sub dir/deep/1.png", "sub dir 2/1.png", "sub dir.png"):
        write(folder / name, name.encode())
    sync(index, model, folder)
    for name in ("sub dir 2/1.png", "sub dir.png"):
        (folder / name).unlink()
    deny(monkeypatch, folder / "sub dir")
    report = sync(index, model, folder)
    assert (report.removed, report.unchanged) == (2, 12)
    assert "sub dir/deep/1.png" in index


def recorded(index, folder, names):
    """Record files as synced, as `Folder.look` below finds them."""
    with index.transaction():
        index.catalog.file_records.put(FileRecord(str(folder), name, 5, 7, "digest") for name in names)


def test_many_folders_that_cannot_be_read_take_no_longer_than_one(index, model, folder, monkeypatch):
    names = [f"top/{number % 1000:03}/{number}.png" for number in range(10_000)]

    def seconds(closed):
        recorded(index, folder, names)
        listing = Listing(["ä 猫.jpg"], dict.fromkeys(closed, "cannot be read"))
        monkeypatch.setattr(Folder, "list", lambda self: listing)
        started = time.perf_counter()
        assert sync(index, model, folder).unchanged >= len(names)
        return time.perf_counter() - started

    one = min(seconds(["top"]) for _ in range(3))
    assert min(seconds([f"top/{number:03}" for number in range(1000)]) for _ in range(3)) < 4 * one + 0.1


def test_files_are_compared_in_parts_and_none_is_missed(index, model, folder, monkeypatch):
    monkeypatch.setattr(sys.modules["vitembed.index.sync"], "_LOOKED_UP", 3)
    monkeypatch.setattr(sys.modules["vitembed.index.files"], "_PAGE", 2)
    write(folder / "bad.png", b"bad")
    assert sync(index, model, folder).added == 11
    write(folder / "sub dir" / "3.png", b"another image", age=50)
    for number in (0, 4, 9):
        (folder / "sub dir" / f"{number}.png").unlink()
    write(folder / "new.png", b"new")
    failed = {str(folder / "bad.png"): "is truncated"}
    assert sync(index, model, folder) == SyncReport(added=1, updated=1, removed=3, unchanged=7, failed=failed)
    assert_follows(index, folder, but=("bad.png",))


def test_the_records_of_unchanged_files_are_not_all_in_memory_at_once(index, model, folder, monkeypatch):
    monkeypatch.setattr(sys.modules["vitembed.index.sync"], "_LOOKED_UP", 256)
    monkeypatch.setattr(sys.modules["vitembed.index.files"], "_PAGE", 256)
    names = [f"{number:05}.png" for number in range(10_000)]
    recorded(index, folder, names)
    monkeypatch.setattr(Folder, "list", lambda self: Listing(names))
    monkeypatch.setattr(Folder, "look", lambda self, name: FileRecord(self.root, name, 5, 7, None))
    index.ids()  # what the index itself keeps
    tracemalloc.start()
    try:
        assert sync(index, model, folder).unchanged == len(names)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60 * len(names)  # bytes


def test_a_folder_that_vanishes_while_it_is_listed_is_gone(index, model, folder, monkeypatch):
    write(folder / "other" / "1.png", b"one")
    sync(index, model, folder)
    real = os.stat

    def status(path, **options):
        found = real(path, **options)
        if str(path) == str(folder / "sub dir"):
            (folder / "sub dir").rename(folder.parent / "moved away")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", status)
        listing = Folder(folder).list()
    assert listing.closed == {}
    assert listing.names == ["other/1.png", "ä 猫.jpg"]
    assert sync(index, model, folder).removed == 10


def test_links_are_followed_once_loops_end_and_a_new_link_renames_nothing(index, model, folder, tmp_path):
    write(tmp_path / "elsewhere" / "far.png", b"far")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (folder / "sub dir" / "up").symlink_to(folder)
    (folder / "zlink").symlink_to(tmp_path / "elsewhere")
    (folder / "file link.png").symlink_to(folder / "sub dir" / "3.png")
    (folder / "self.png").symlink_to(folder / "self.png")
    (folder / "broken.png").symlink_to(folder / "nowhere.png")
    report = sync(index, model, folder)
    assert report.added == 13
    assert report.embedded == 12  # the linked file is a copy of another
    assert report.failed[str(folder / "broken.png")] == "is a link to a file that does not exist"
    assert "symbolic link" in report.failed[str(folder / "self.png")]
    names = set(index.ids())
    assert {"zlink/far.png", "file link.png", "sub dir/3.png"} <= names
    (folder / "a link that sorts first").symlink_to(folder / "sub dir")
    assert sync(index, model, folder).unchanged == 13
    assert set(index.ids()) == names


def test_what_only_looks_like_an_image_file_is_set_aside_without_opening_it(index, model, folder):
    os.mkfifo(folder / "pipe.png")  # opening it would wait for ever
    (folder / "folder.png").mkdir()
    (folder / ".hidden.png").write_bytes(b"hidden")
    report = sync(index, model, folder)
    assert report == SyncReport(added=11, failed={str(folder / "pipe.png"): "is not a regular file"})


def test_case_and_spelling_of_names_tell_files_apart(index, model, folder):
    names = ["A.PNG", "a.png", "a.Png", "\u00e9.png", "e\u0301.png"]
    for number, name in enumerate(names):
        write(folder / name, b"case %d" % number)
    kept = {name for name in (path.name for path in folder.iterdir()) if name in names}
    if len(kept) < len(names):
        pytest.skip("this file system takes some of these names for the same")
    assert sync(index, model, folder) == SyncReport(added=16)
    assert_follows(index, folder)
    (folder / "a.png").rename(folder / "b.png")
    assert sync(index, model, folder) == SyncReport(added=1, removed=1, unchanged=15)
    assert_follows(index, folder)


def test_a_folder_within_a_synced_folder_has_entries_of_its_own(index, model, folder):
    sync(index, model, folder)
    assert sync(index, model, folder / "sub dir") == SyncReport(added=10)
    assert len(model.embedded) == 11
    assert {"3.png", "sub dir/3.png"} <= set(index.ids())
    (folder / "sub dir" / "3.png").unlink()
    assert sync(index, model, folder).removed == 1
    assert "3.png" in index
    assert sync(index, model, folder / "sub dir").removed == 1
    assert index.check() == []


def test_a_photo_is_embedded_the_way_its_exif_data_turn_it(index, tmp_path):
    class Pixels(FakeModel):
        """Embeds an image by its pixels, pre-processed as for any model."""

        def stream(self, images, *, batch_size=64, workers=None):
            pixels = np.stack([Preprocess.grey((4, 4))(image) for image in images])
            rows = pixels.reshape(len(images), -1) / 127.5 - 1.0
            yield Encoded(np.arange(len(images)), rows / np.linalg.norm(rows, axis=1, keepdims=True), [])

    pixels = np.zeros((64, 64), np.uint8)
    pixels[:, :16], pixels[:16] = 120, 255  # bright above, grey at the left: unlike each of its turns
    upright = Image.fromarray(pixels)
    photos = tmp_path / "turned"
    photos.mkdir()
    tag = Image.Exif()
    tag[0x0112] = 6  # the camera lay on its side: turn by 90 degrees clockwise to see it upright
    upright.transpose(Image.Transpose.ROTATE_90).save(photos / "tagged.jpg", exif=tag, quality=95)
    upright.transpose(Image.Transpose.ROTATE_90).save(photos / "untagged.jpg", quality=95)
    upright.save(photos / "upright.jpg", quality=95)
    assert sync(index, Pixels(), photos).added == 3
    first, second, third = index.search(index.get("upright.jpg").vector, k=3)[0]
    assert {first.id, second.id} == {"upright.jpg", "tagged.jpg"}
    assert third.id == "untagged.jpg"
    assert second.score > 0.99
    assert third.score < 0.9


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
    assert re.fullmatch(r"sync: 11 of 11 images, [0-9,.]+ a second, 0:0\d taken\n", output.err)
    sync(index, model, folder, progress=True)  # nothing to do, nothing to say
    assert capsys.readouterr().err == ""


def test_files_are_hashed_in_slices_and_all_of_them_arrive(index, model, tmp_path):
    for number in range(100):
        write(tmp_path / "many" / f"{number:03}.png", b"image %d" % (number // 2))
    with closing(index):
        assert sync(index, model, tmp_path / "many", batch_size=1) == SyncReport(added=100)
        assert len(model.embedded) == 50
        assert_follows(index, tmp_path / "many")


def test_large_files_end_a_slice_early(index, model, folder, monkeypatch):
    module = sys.modules["vitembed.index.sync"]
    monkeypatch.setattr(module, "_SLICE_BYTES", 10)
    assert sync(index, model, folder) == SyncReport(added=11)
    assert_follows(index, folder)


def test_a_report_says_what_was_read_and_how_long_it_took(index, model, folder):
    write(folder / "copy.png", b"image 3")
    report = sync(index, model, folder)
    assert (report.added, report.embedded) == (12, 11)
    assert report.read == sum(path.stat().st_size for path in folder.rglob("*.*"))
    assert report.seconds > 0
    assert sync(index, model, folder).read == 0


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with Progress("sync", 4_000, True) as progress:
        for seconds, images, note in ((5, 400, ""), (15, 600, "comparing 1 of 2"), (1, 0, ""), (15, 0, "")):
            now += seconds
            progress.advance(images, note)
        assert capsys.readouterr().err.splitlines() == [
            "sync: 1,000 of 4,000 images, 50.0 a second, 1:00 left, comparing 1 of 2",
            "sync: 1,000 of 4,000 images, 27.8 a second, 1:48 left",
        ]
        now += 3600
    assert capsys.readouterr().err == "sync: 1,000 of 4,000 images, 0.3 a second, 1:00:36 taken\n"


def test_progress_on_a_terminal_is_a_bar_with_rate_and_remaining_time(index, model, folder, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    sync(index, model, folder, progress=True)
    bar = capsys.readouterr().err.split("\r")[-1]
    assert "11/11 [00:00<00:00" in bar
    assert "images/s" in bar


def test_annotations_stay_when_a_file_changes(index, model, folder):
    sync(index, model, folder)
    index.annotate(["sub dir/3.png"], [{"year": 2020, **index.get("sub dir/3.png").metadata}])
    assert sync(index, model, folder) == SyncReport(unchanged=11)
    write(folder / "sub dir" / "3.png", b"another image", age=50)
    assert sync(index, model, folder) == SyncReport(updated=1, unchanged=10)
    assert index.get("sub dir/3.png").metadata == {"year": 2020, "path": str(folder / "sub dir" / "3.png")}


def test_imported_entries_are_taken_over_when_they_name_these_files(index, model, folder, tmp_path):
    sync(index, model, folder)
    with Index.create(tmp_path / "imported.index", index.dim) as imported:
        for batch in index.stream():
            imported.add(batch.ids, batch.vectors, batch.metadata)
        other = {"path": str(tmp_path / "elsewhere.png")}
        imported.annotate(["sub dir/4.png"], [other])
        report = sync(imported, model, folder)
        assert (report.added, list(report.failed)) == (10, [str(folder / "sub dir" / "4.png")])
        assert imported.get("sub dir/4.png").metadata == other
        assert sync(imported, model, folder).unchanged == 10
