"""`migrate`: every entry embedded again, from the files, in the old order; nothing half-done at any moment."""

import hashlib
import signal
import sqlite3
import subprocess
import sys
import tracemalloc
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.index.test_sync import DIM, Encoded, FakeModel, backdate, vector_of, write
from vitembed.errors import ConfigError, DataError, ImageError, ModelMismatchError, SearchIndexError
from vitembed.index import Index, sync
from vitembed.index.aside import SetAside, set_aside
from vitembed.index.draft import Draft, Embedded, Entry
from vitembed.index.migrate import MigrationReport, UnreadableFilesError, migrate

FOLDER = "migration"
NEW_DIM = 24


def new_vector_of(content):
    seed = int.from_bytes(hashlib.sha256(b"new" + content).digest()[:4], "big")
    vector = np.random.default_rng(seed).standard_normal(NEW_DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


class NewModel:
    """Another model; `meddle` is called after a batch was read and before it is handed over."""

    dim = NEW_DIM

    def __init__(self, meddle=None, fingerprint="sha256:new"):
        self.embedded = []
        self.meddle = meddle
        self.fingerprint = fingerprint

    def stream(self, images, *, batch_size=64, workers=None):
        for start in range(0, len(images), batch_size):
            good, vectors, failures = [], [], []
            for position in range(start, min(start + batch_size, len(images))):
                try:
                    content = Path(images[position]).read_bytes()
                except OSError:
                    failures.append((position, ImageError(str(images[position]), "does not exist")))
                    continue
                self.embedded.append(Path(images[position]).name)
                good.append(position)
                vectors.append(new_vector_of(content))
            if self.meddle:
                self.meddle(len(self.embedded))
            yield Encoded(np.array(good, np.int64), np.array(vectors, np.float32).reshape(-1, NEW_DIM), failures)


@pytest.fixture(autouse=True)
def _old_files(monkeypatch):
    backdate(monkeypatch)


@pytest.fixture
def folder(tmp_path):
    for number in range(12):
        write(tmp_path / "photos" / f"ä {number:02}.png", b"image %d" % number)
    return tmp_path / "photos"


@pytest.fixture
def index(tmp_path, folder):
    """A synced folder, and two entries of one file from elsewhere."""
    write(tmp_path / "one.png", b"one")
    with Index.create(tmp_path / "x.index", DIM, location="old") as index:
        sync(index, FakeModel(), folder)
        metadata = [{"path": str(tmp_path / "one.png"), "tag": tag, "größe": 2.5} for tag in "ab"]
        index.add(["one a", "one b"], np.stack([vector_of(b"one")] * 2), metadata)
        yield index


def content(index):
    """Return everything that an index holds, in order."""
    return [(name, index.get(name).vector.tobytes(), index.get(name).metadata) for name in index.ids()]


def assert_migrated(index, before):
    """The index holds the old entries, in order, each with the new embedding of its file."""
    expected = [
        (name, new_vector_of(Path(metadata["path"]).read_bytes()).tobytes(), metadata) for name, _, metadata in before
    ]
    assert content(index) == expected
    assert (index.fingerprint, index.dim, index.check()) == ("sha256:new", NEW_DIM, [])
    assert not [path for path in index.path.iterdir() if FOLDER in path.name]


def test_all_entries_keep_id_order_and_metadata_and_get_new_vectors(index):
    before = content(index)
    model = NewModel()
    report = migrate(index, model, batch_size=5, location="runs/new")
    assert_migrated(index, before)
    assert index.location == "runs/new"
    assert (report.entries, report.embedded, report.failed) == (14, 13, {})  # two entries share a file
    assert sorted(model.embedded) == sorted({Path(metadata["path"]).name for _, _, metadata in before})
    assert report.seconds > 0
    assert report == replace(report, seconds=0)


def test_a_later_sync_goes_on_with_the_new_model_and_embeds_nothing(index, folder):
    migrate(index, NewModel())
    model = NewModel()
    assert sync(index, model, folder).unchanged == 12
    write(folder / "copy.png", b"image 3")
    assert sync(index, model, folder).added == 1
    assert model.embedded == []
    np.testing.assert_array_equal(index.get("copy.png").vector, new_vector_of(b"image 3"))
    with pytest.raises(ModelMismatchError):
        sync(index, FakeModel(), folder)


def test_an_empty_index_and_an_index_of_one_can_be_migrated(tmp_path):
    write(tmp_path / "one.png", b"one")
    with Index.create(tmp_path / "y.index", DIM, "sha256:old") as index:
        assert migrate(index, NewModel()) == MigrationReport()
        assert_migrated(index, [])
    with Index.create(tmp_path / "z.index", DIM) as index:
        index.add(["x"], vector_of(b"one")[None], [{"path": str(tmp_path / "one.png")}])
        before = content(index)
        assert migrate(index, NewModel()) == MigrationReport(entries=1, embedded=1)
        assert_migrated(index, before)


def test_vectors_of_half_precision_stay_so(tmp_path, folder):
    with Index.create(tmp_path / "half.index", DIM, dtype="float16") as index:
        sync(index, FakeModel(), folder)
        migrate(index, NewModel())
        assert (index.dtype, index.dim, index.check()) == ("float16", NEW_DIM, [])
        for name in index.ids():
            expected = new_vector_of((folder / name).read_bytes())
            np.testing.assert_allclose(index.get(name).vector, expected, atol=1e-3)


def test_the_overlap_is_the_share_of_the_ten_nearest_that_stay(index):
    def neighbours(entries):
        vectors = np.stack([np.frombuffer(vector, np.float32).astype(np.float64) for _, vector, _ in entries])
        scores = vectors @ vectors.T
        np.fill_diagonal(scores, -2)
        return [set(row[:10]) for row in np.argsort(-scores, axis=1, kind="stable")]

    index.remove(["one b"])  # a tie between copies of one file would make the ten ambiguous
    before = neighbours(content(index))
    report = migrate(index, NewModel())
    after = neighbours(content(index))
    expected = np.mean([len(old & new) / 10 for old, new in zip(before, after, strict=True)])
    assert 0 < expected < 1
    assert report.overlap == pytest.approx(expected)


def test_a_model_with_the_same_embeddings_has_an_overlap_of_one(index):
    class Renamed(FakeModel):
        fingerprint = "sha256:new"

    index.remove(["one b"])
    assert migrate(index, Renamed()).overlap == 1.0


def test_until_the_end_everybody_searches_the_old_embeddings(index):
    before = content(index)
    seen = []

    def look(_):
        with Index.open(index.path) as other:
            seen.append(content(other) == before and other.fingerprint == "sha256:fake")

    migrate(index, NewModel(look), batch_size=4)
    assert len(seen) >= 4
    assert all(seen)
    assert_migrated(index, before)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 6, 11, 13])
def test_a_stopped_migration_loses_one_batch_and_goes_on(index, stop):
    before = content(index)

    def end(done):
        if done >= stop:
            raise Stopped

    with pytest.raises(Stopped):
        migrate(index, first := NewModel(end), batch_size=2)
    assert content(index) == before
    second = NewModel()
    report = migrate(index, second, batch_size=2)
    assert_migrated(index, before)
    kept = first.embedded[: (len(first.embedded) - 1) // 2 * 2]
    assert sorted(kept + second.embedded) == sorted({Path(metadata["path"]).name for _, _, metadata in before})
    assert report.embedded == len(second.embedded)


SLOW = """
import sys, time
from tests.index.test_migrate import Index, NewModel, migrate

def say(done):
    print(done, flush=True)
    time.sleep(0.02)

with Index.open(sys.argv[1]) as index:
    migrate(index, NewModel(say), batch_size=1)
print("done", flush=True)
"""


@pytest.mark.parametrize("batches", [2, 13])
def test_a_killed_migration_is_resumed_and_a_second_one_and_sync_are_refused_while_it_lives(index, folder, batches):
    before = content(index)
    command = [sys.executable, "-c", SLOW, str(index.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        for number in range(batches):
            assert process.stdout.readline() == f"{number + 1}\n"
        process.send_signal(signal.SIGSTOP)
        for job in (lambda: migrate(index, NewModel()), lambda: sync(index, FakeModel(), folder)):
            with pytest.raises(SearchIndexError, match="another process is synchronising or migrating"):
                job()
        process.kill()
    assert content(index) == before
    model = NewModel()
    migrate(index, model)
    assert len(model.embedded) <= 13 - batches + 1
    assert_migrated(index, before)


def test_what_others_add_remove_and_change_meanwhile_is_seen(index, tmp_path):
    write(tmp_path / "late.png", b"late")
    write(tmp_path / "other.png", b"other")

    def change(done):
        with Index.open(index.path) as other:
            if done == 4:
                other.remove(["ä 01.png", "ä 11.png"])  # one that is embedded already, one that is not
                other.add(["late"], vector_of(b"late")[None], [{"path": str(tmp_path / "late.png")}])
            if done == 8:  # other pictures under old ids, and other metadata alone
                where = [{"path": str(tmp_path / "other.png")}, {"path": str(tmp_path / "one.png"), "tag": "c"}]
                other.add(["ä 02.png", "one a"], np.stack([vector_of(b"other"), vector_of(b"one")]), where)

    model = NewModel(change)
    report = migrate(index, model, batch_size=4)
    assert_migrated(index, content_of(index))
    assert index.ids()[-3:] == ["late", "ä 02.png", "one a"]
    assert index.get("one a").metadata["tag"] == "c"
    assert not {"ä 01.png", "ä 11.png"} & set(index.ids())
    assert model.embedded.count("one.png") == 1  # its metadata changed, not its picture
    assert report.entries == 13


def content_of(index):
    """Return the entries with whatever vectors, as `assert_migrated` wants them."""
    return [(name, b"", index.get(name).metadata) for name in index.ids()]


def test_changes_between_two_calls_are_seen_too(index, folder):
    def end(done):
        if done >= 10:
            raise Stopped

    with pytest.raises(Stopped):
        migrate(index, NewModel(end), batch_size=5)
    write(folder / "ä 03.png", b"another picture", age=50)
    (folder / "ä 04.png").unlink()
    sync(index, FakeModel(), folder)
    migrate(index, NewModel(), batch_size=5)
    assert_migrated(index, content_of(index))
    assert sync(index, NewModel(), folder).unchanged == 11


def test_a_writer_that_never_rests_does_not_keep_the_migration_from_its_end(index, tmp_path):
    added = []

    def add(_):
        if is_locked(index.path / "catalog.sqlite"):
            return  # this is the swap
        names = [f"late {len(added) + number}.png" for number in range(5)]
        for name in names:
            write(tmp_path / name, name.encode())
        vectors = np.stack([vector_of(name.encode()) for name in names])
        with Index.open(index.path) as other:
            other.add(names, vectors, [{"path": str(tmp_path / name)} for name in names])
        added.extend(names)

    migrate(index, NewModel(add), batch_size=4)
    assert_migrated(index, content_of(index))
    assert len(added) > 40  # in the first round and in later ones
    assert index.ids()[14:] == added


def test_what_others_add_right_before_the_swap_is_not_lost(index, tmp_path, monkeypatch):
    module = sys.modules["vitembed.index.migrate"]
    write(tmp_path / "late.png", b"late")

    def overlap(*_):
        with Index.open(index.path) as other:
            other.add(["late"], vector_of(b"late")[None], [{"path": str(tmp_path / "late.png")}])
            other.remove(["ä 01.png"])

    monkeypatch.setattr(module, "_overlap", overlap)
    assert migrate(index, NewModel()).entries == 14
    assert_migrated(index, content_of(index))
    assert "late" in index
    assert "ä 01.png" not in index


def test_others_may_write_while_draft_and_index_are_compared(index, monkeypatch):
    locked = []
    real = Draft.missing

    def missing(self, entries):
        locked.append(is_locked(index.path / "catalog.sqlite"))
        return real(self, entries)

    monkeypatch.setattr(Draft, "missing", missing)
    migrate(index, NewModel())
    assert len(locked) >= 3
    assert not any(locked)


@pytest.mark.parametrize("moment", ["read", "embedded"])
def test_an_index_that_is_compacted_meanwhile_is_migrated_all_the_same(index, moment, monkeypatch):
    """Every time that the index is read from end to end for one purpose, it is compacted in the middle."""
    module = sys.modules["vitembed.index.migrate"]
    compacted = []

    def compact():
        if len(compacted) < 10 and not is_locked(index.path / "catalog.sqlite"):
            with Index.open(index.path) as other:
                last = other.get(other.ids()[-1])
                other.add([last.id], last.vector[None], [last.metadata])  # leaves a dead row
                compacted.append(other.compact())

    stream, entries_of = Index.stream, module.entries_of
    monkeypatch.setattr(Index, "stream", lambda self, size=4: stream(self, 4))
    if moment == "read":

        def reading(records):
            if len(compacted) < 10:
                compact()
            return entries_of(records)

        monkeypatch.setattr(module, "entries_of", reading)
    before = content(index)
    model = NewModel(lambda _: compact() if moment == "embedded" else None)
    migrate(index, model, batch_size=2)
    assert_migrated(index, before)
    assert len(compacted) >= 6
    assert len(model.embedded) == 13  # nothing twice


def is_locked(path):
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
        connection.execute("ROLLBACK")
    return False


def test_files_that_cannot_be_read_stop_the_migration_before_the_swap(index, folder):
    before = content(index)
    gone = [folder / f"ä {number:02}.png" for number in (1, 5, 6, 7)]
    kept = {path: path.read_bytes() for path in gone}
    for path in gone:
        path.unlink()
    with pytest.raises(UnreadableFilesError, match=r"4 of its files cannot be read \(.*ä 01.png: does not") as caught:
        migrate(index, NewModel())
    assert "\n" not in str(caught.value)
    assert "and 1 more" in str(caught.value)
    assert caught.value.failed == {str(path): "does not exist" for path in gone}
    assert content(index) == before
    for path, data in kept.items():
        write(path, data)
    model = NewModel()
    migrate(index, model)
    assert sorted(model.embedded) == [path.name for path in gone]  # the others were embedded by then
    assert {name for name, _, _ in before} == set(index.ids())
    assert index.check() == []


def test_a_lost_file_whose_entry_is_removed_or_replaced_meanwhile_is_no_matter(index, folder, tmp_path):
    for number in (1, 2, 3):
        (folder / f"ä {number:02}.png").unlink()

    def change(done):
        if done == 9:
            with Index.open(index.path) as other:
                other.remove(["ä 01.png"])
                other.add(["ä 02.png"], vector_of(b"one")[None], [{"path": str(tmp_path / "one.png")}])

    with pytest.raises(UnreadableFilesError) as caught:
        migrate(index, NewModel(change), batch_size=4)
    assert caught.value.failed == {str(folder / "ä 03.png"): "does not exist"}
    index.remove(["ä 03.png"])
    assert migrate(index, NewModel()).failed == {}
    assert_migrated(index, content_of(index))


def test_an_entry_that_was_replaced_and_whose_new_file_is_lost_does_not_come_back_as_it_was(index, tmp_path):
    def replace_first(done):
        if done == 4:
            with Index.open(index.path) as other:
                other.add(["ä 00.png"], vector_of(b"lost")[None], [{"path": str(tmp_path / "lost.png")}])

    report = migrate(index, NewModel(replace_first), batch_size=4, missing="drop")
    assert report.failed == {str(tmp_path / "lost.png"): "does not exist"}
    assert_migrated(index, content_of(index))
    assert (report.entries, "ä 00.png" in index) == (13, False)


def test_dropped_entries_are_set_aside_where_their_folder_really_is_until_they_are_back(index, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    index.add(["x", "y"], np.eye(DIM)[:2], [{"path": str(tmp_path / "link" / f"{name}.png")} for name in "xy"])
    migrate(index, NewModel(), missing="drop")
    lost = [str(tmp_path / "real" / f"{name}.png") for name in "xy"]
    assert [one.path for one in set_aside(index)] == lost
    write(tmp_path / "real" / "x.png", b"x")
    assert sync(index, NewModel(), tmp_path / "link").added == 1
    assert set_aside(index) == []  # the folder is synced now, and y.png is not in it


def test_a_dropped_entry_that_is_added_again_by_hand_is_not_listed_as_set_aside(index, tmp_path):
    (tmp_path / "one.png").unlink()
    migrate(index, NewModel(), missing="drop")
    assert [one.path for one in set_aside(index)] == [str(tmp_path / "one.png")]
    index.add(["by hand"], new_vector_of(b"one")[None], [{"path": str(tmp_path / "one.png")}])
    assert set_aside(index) == []


def test_entries_of_lost_files_are_dropped_and_set_aside_when_that_is_wanted(index, folder, tmp_path):
    (folder / "ä 01.png").unlink()
    (tmp_path / "one.png").unlink()
    before = [entry for entry in content(index) if entry[0] not in ("ä 01.png", "one a", "one b")]
    report = migrate(index, NewModel(), missing="drop")
    lost = [str(folder / "ä 01.png"), str(tmp_path / "one.png")]
    assert_migrated(index, before)
    assert report.failed == dict.fromkeys(lost, "does not exist")
    assert report.entries == 11
    assert set_aside(index) == sorted((SetAside(path, "does not exist") for path in lost), key=lambda one: one.path)
    write(folder / "ä 01.png", b"image 1")
    assert sync(index, NewModel(), folder).added == 1
    assert [one.path for one in set_aside(index)] == lost[1:]


def test_a_file_that_changed_since_it_was_synced_lends_its_vector_to_no_copy_of_its_old_content(index, folder):
    write(folder / "ä 03.png", b"changed", age=50)
    write(folder / "ä 04.png", b"image 4", age=50)  # touched only
    migrate(index, NewModel())
    np.testing.assert_array_equal(index.get("ä 03.png").vector, new_vector_of(b"changed"))
    write(folder / "copy.png", b"image 3")
    model = NewModel()
    sync(index, model, folder)
    assert sorted(model.embedded) == ["copy.png", "ä 03.png"]
    np.testing.assert_array_equal(index.get("copy.png").vector, new_vector_of(b"image 3"))
    np.testing.assert_array_equal(index.get("ä 03.png").vector, new_vector_of(b"changed"))


def test_entries_without_an_absolute_path_are_named_and_nothing_is_embedded(index):
    names = ["no 1", "no 2", "no 3", "no 4"]
    metadata = [None, {"path": "relative.png"}, {"path": 5}, {}]
    index.add(names, np.eye(DIM, dtype=np.float32)[:4], metadata)
    model = NewModel()
    with pytest.raises(DataError, match=r"4 entries have none \('no 1', 'no 2', 'no 3', \.\.\.\)"):
        migrate(index, model)
    assert model.embedded == []
    assert not (index.path / FOLDER).exists()


def test_the_model_that_the_index_has_already_is_refused(index, folder):
    with pytest.raises(ConfigError, match=r"of this model already \(sha256:fake\)"):
        migrate(index, FakeModel())


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"missing": "skip"}])
def test_settings_out_of_range_are_refused(index, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        migrate(index, NewModel(), **options)


def stop_half_way(index, fingerprint="sha256:other"):
    def end(done):
        if done >= 5:
            raise Stopped

    with pytest.raises(Stopped):
        migrate(index, NewModel(end, fingerprint), batch_size=3)


def test_an_unfinished_migration_to_another_model_is_refused_and_dropped_on_demand(index):
    before = content(index)
    stop_half_way(index)
    with pytest.raises(ModelMismatchError, match=r"unfinished migration to another model, sha256:other; .* restart"):
        migrate(index, NewModel())
    assert content(index) == before
    migrate(index, NewModel(), restart=True)
    assert_migrated(index, before)


def test_a_damaged_draft_is_an_error_and_never_becomes_the_index(index):
    before = content(index)
    stop_half_way(index, "sha256:new")
    for path in (index.path / FOLDER).glob("vectors*"):
        data = bytearray(path.read_bytes())
        data[:2] = b"??"
        path.write_bytes(data)
    with pytest.raises(SearchIndexError, match="damaged"):
        migrate(index, NewModel())
    assert content(index) == before
    (index.path / FOLDER / "catalog.sqlite").unlink()
    with pytest.raises(SearchIndexError, match="--restart"):
        migrate(index, NewModel())
    migrate(index, NewModel(), restart=True)
    assert_migrated(index, before)


def test_a_draft_keeps_nothing_of_its_entries_in_memory(tmp_path):
    rows, vector = 4_000, np.eye(NEW_DIM, dtype=np.float32)[0]
    with Index.create(tmp_path / "y.index", DIM) as index:
        entries = [Entry(f"id {number}", f"/photos/{number}.png", {}, f"{number:032x}") for number in range(rows)]
        with Draft.open(index, NEW_DIM, "sha256:new") as draft:
            draft.put([(entry, Embedded(vector, None)) for entry in entries])
        tracemalloc.start()
        try:
            with Draft.open(index, NEW_DIM, "sha256:new") as draft:
                assert draft.missing(entries[:10]) == []
                assert draft.known(entries[5:6], {}).keys() == {"/photos/5.png"}
                kept = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
    assert kept < 30 * rows  # bytes


def test_an_entry_lends_its_new_embedding_to_later_ones_of_its_file_unless_their_picture_is_another(tmp_path):
    vectors = np.eye(NEW_DIM, dtype=np.float32)
    first, second = Entry("a", "/x.png", {}, "1" * 32), Entry("b", "/x.png", {}, "2" * 32)
    with Index.create(tmp_path / "y.index", DIM) as index, Draft.open(index, NEW_DIM, "sha256:new") as draft:
        draft.put([(first, Embedded(vectors[0], "old content"))])
        assert draft.known([second], {"b": "new content"}) == {}
        np.testing.assert_array_equal(draft.known([second], {})["/x.png"].vector, vectors[0])
        draft.put([(second, Embedded(vectors[1], "new content"))])
        third = Entry("c", "/x.png", {}, "3" * 32)
        for contents in ({}, {"c": "new content"}):  # the latest embedding of a file counts
            np.testing.assert_array_equal(draft.known([third], contents)["/x.png"].vector, vectors[1])
        assert draft.known([replace(first, mark="9" * 32)], {}) == {}
        draft.remove(["b"])
        assert draft.known([third], {}) == {}


def test_what_a_kill_right_after_the_swap_leaves_is_no_unfinished_migration(index, monkeypatch):
    before = content(index)
    module = sys.modules["vitembed.index.migrate"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "discard", lambda path: None)
        migrate(index, NewModel())
    assert (index.path / FOLDER).exists()
    with pytest.raises(ConfigError, match="already"):
        migrate(index, NewModel())
    assert_migrated(index, before)


def test_progress_counts_entries_on_standard_error(index, capsys):
    migrate(index, NewModel(), progress=True)
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("migrate: 14 of 14 images, ")
