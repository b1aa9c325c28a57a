"""Short runs of the tortures' kills and readers, and that these notice what they are there to notice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.torture import changes, kills
from benchmarks.torture.entries import DIM, State, Truth, add, entry, vector_of, vectors_of
from benchmarks.torture.readers import GROUPS, MEMBERS, Reader, put_group
from vitembed.errors import ConfigError, DataError, VectorError
from vitembed.index import Hit, Index

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the tortures fork their writers and readers")


def torture(*arguments):
    """Run a torture in a process of its own, which may fork; return its figures."""
    command = [sys.executable, "-m", "benchmarks.torture", *map(str, arguments), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


def test_a_writer_killed_at_random_moments_loses_nothing_acknowledged_and_leaves_no_half_change():
    figures = torture("kills", "--times", 28, "--kinds", "hnsw", "ivf")
    assert figures["problems"] == []
    assert figures["kills"] == sum(figures["under_way"].values()) == 28
    assert figures["acknowledged"] > 0


def test_readers_beside_a_writer_see_whole_changes_that_never_go_back():
    figures = torture("readers", "--seconds", 3, "--kinds", "hnsw", "ivf")
    assert figures["problems"] == []
    assert {"search", "batch", "group", "within", "get", "ids", "stream"} <= figures["reads"].keys()
    assert {"put", "remove", "both", "compact", "optimize"} <= figures["writes"].keys()


# The kills notice what is lost, and what is half done


@pytest.fixture
def written(tmp_path):
    """An index with some entries, its path, its state, and an empty folder of pictures."""
    state: State = {}
    (tmp_path / "photos").mkdir()
    with Index.create(tmp_path / "x.index", DIM) as index:
        add(index, state, ["a", "b", "猫"], 1)
    return tmp_path, state


def life_of(folder, state, *lines, cut=""):
    log = "".join(json.dumps({word: value}) + "\n" for word, value in lines) + cut
    return kills.replay(log, state, folder / "photos")


def found_wrong(folder, life):
    return kills.compare(folder / "x.index", life, np.random.default_rng(0))[0]


ADDITION = {"kind": "add", "names": ["new", "a"], "step": 2}


def test_the_log_tells_what_was_acknowledged_and_what_was_under_way(written):
    folder, state = written
    life = life_of(folder, state, ("open", True), ("begin", ADDITION), ("done", 0.5), cut='{"begin": {"ki')
    assert (life.done, life.pending, life.seconds) == (1, None, {"add": 0.5})
    assert list(life.states[0]) == ["b", "猫", "new", "a"]
    removal = {"kind": "remove", "names": ["b"]}
    life = life_of(folder, state, ("open", True), ("begin", removal))
    assert (life.done, life.pending) == (0, removal)
    assert [list(one) for one in life.states] == [["a", "b", "猫"], ["a", "猫"]]
    assert life_of(folder, state).pending == {"kind": "opening"}


def test_the_state_before_or_after_the_change_under_way_is_right_and_no_other(written):
    folder, state = written
    under_way = life_of(folder, state, ("open", True), ("begin", ADDITION))
    acknowledged = life_of(folder, state, ("open", True), ("begin", ADDITION), ("done", 0.5))
    assert found_wrong(folder, under_way) == []
    assert "are of no state" in found_wrong(folder, acknowledged)[0]
    with Index.open(folder / "x.index") as index:
        add(index, {}, ["new"], 2)
    assert "are of no state" in found_wrong(folder, under_way)[0]  # the half of it
    with Index.open(folder / "x.index") as index:
        add(index, {}, ["new", "a"], 2)
    assert found_wrong(folder, under_way) == found_wrong(folder, acknowledged) == []
    with Index.open(folder / "x.index") as index:
        one = entry("b", 1)
        index.add(["b"], [vector_of("another")], [one.metadata])
    assert "are of no state" in found_wrong(folder, under_way)[0]


def test_of_a_sync_under_way_each_file_may_be_old_or_new_and_nothing_else(written):
    folder, state = written
    for name in ("1.png", "2.png"):
        (folder / "photos" / name).write_text(name)
    life = life_of(folder, state, ("open", True), ("begin", {"kind": "sync"}), ("embedded", "1.png"))
    assert life.embedded == ["1.png"]
    assert found_wrong(folder, life) == []
    metadata = {"path": str(folder / "photos" / "1.png")}
    with Index.open(folder / "x.index") as index:
        index.add(["1.png"], [vector_of("photo 1.png")], [metadata])
    assert found_wrong(folder, life) == []
    with Index.open(folder / "x.index") as index:
        index.add(["1.png"], [vector_of("photo 2.png")], [metadata])
    assert "neither old nor new" in found_wrong(folder, life)[0]


def test_every_kind_of_change_is_drawn_and_does_what_is_expected_of_it(tmp_path):
    random, state = np.random.default_rng(0), State()
    changes.change_photos(random, tmp_path / "photos", 0)
    with Index.create(tmp_path / "x.index", DIM) as index:
        for step, kind in enumerate(["add", "sync", *changes.KINDS, "remove"]):
            operation = json.loads(json.dumps(changes.draw(random, state, step, kind)))
            assert operation["kind"] == kind
            changes.do(index, operation, changes.FileModel(lambda content: None), tmp_path / "photos")
            state = changes.applied(state, operation, tmp_path / "photos")
            assert set(index.ids()) == set(state)
        assert found_wrong(tmp_path, kills.Life([state])) == []


# The readers notice a torn, an old and a wrong answer


def hits_of(query, *entries):
    """Hits (group, member, step) as an index would give them."""
    found = []
    for group, member, step in entries:
        name = f"{group}/{member}"
        score = float(vector_of(f"{name}@{step}").astype(np.float64) @ query.astype(np.float64))
        found.append(Hit(name, score, {"group": group, "step": step}))
    return sorted(found, key=lambda hit: -hit.score)


class Answers:
    """Stands for an index that gives one answer to all."""

    def __init__(self, answer):
        self.answer = answer

    def search(self, queries, k, where=None, **options):
        return [self.answer(query) for query in np.atleast_2d(queries)]


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ([(7, member, 5) for member in range(MEMBERS)], None),
        ([], None),
        ([(7, member, 5) for member in range(MEMBERS - 1)], "members of group"),
        ([(7, member, 5 + (member == 3)) for member in range(MEMBERS)], "of two changes"),
        ([(7, member, 3) for member in range(MEMBERS)], "was of change 4 and is of 3 now"),
        ([(7, min(member, 10), 5) for member in range(MEMBERS)], "a hit is repeated"),
    ],
)
def test_a_reader_notices_a_torn_or_an_older_group(tmp_path, entries, problem):
    reader = Reader(tmp_path, seed=1)
    reader.seen = dict.fromkeys(range(GROUPS), 4)
    reader.group(Answers(lambda query: hits_of(query, *entries)))
    assert reader.problems == [] if problem is None else problem in reader.problems[0]


def test_a_reader_notices_a_score_of_another_vector_and_a_wrong_order(tmp_path):
    reader = Reader(tmp_path, seed=1)
    reader.search(Answers(lambda query: hits_of(query, *[(1, member, 2) for member in range(10)])))
    assert reader.problems == []
    reader.search(Answers(lambda query: hits_of(query, *[(1, member, 2) for member in range(10)])[::-1]))
    assert reader.problems == ["hits are out of order"]
    reader.search(Answers(lambda query: hits_of(-query, *[(1, member, 2) for member in range(10)])))
    assert "scores" in reader.problems[1]


def test_a_reader_finds_nothing_wrong_with_a_sound_index_and_the_vector_that_is(tmp_path):
    with Index.create(tmp_path / "x.index", DIM) as index:
        for group in range(GROUPS):
            put_group(index, group, 1)
        reader = Reader(index.path, seed=0)
        for call in (*reader.calls, reader.check):
            call(index)
        assert reader.problems == []
        index.add(["5/0"], [vector_of("5/0@2")], [{"group": 5, "step": 1}])
        reader.stream(index)
        assert reader.problems == ["stream: 5/0 has another vector"]


def test_the_truth_is_a_plain_sort_by_cosine_and_knows_a_wrong_answer():
    state = {name: entry(name, step) for step, name in enumerate("abcdefgh")}
    truth, query = Truth(state), vector_of("query")
    scores = {name: float(np.sum(vector_of(one.key).astype(float) * query)) for name, one in state.items()}
    expected = sorted(scores, key=lambda name: -scores[name])
    assert [name for name, _ in truth.ranking(query)] == expected
    assert [name for name, _ in truth.ranking(query, {"step": 3})] == ["d"]
    hits = [Hit(name, scores[name], state[name].metadata) for name in expected]
    assert truth.wrong_answer(query, hits[:3], 3) == []
    assert truth.wrong_answer(query, hits[1:4], 3)
    assert truth.wrong_hits(query, [hits[0], hits[0]])
    assert truth.wrong_hits(query, [Hit("x", 0.0, {})]) == ["a hit that is no entry: 'x'"]
    assert truth.wrong_hits(query, [Hit("a", scores["a"], {})])
    assert truth.wrong_hits(query, [Hit("a", float("nan"), state["a"].metadata)])


# Bad input that the tests of the index do not hold already: an error that names the item, nothing changed


BAD = {
    "remove an empty id": (lambda index: index.remove(["a", ""]), DataError, "'' is empty"),
    "remove an id of 10 kB": (lambda index: index.remove(["a", "b" * 10_000]), DataError, "longer than 1,024 bytes"),
    "remove one string": (lambda index: index.remove("a"), DataError, "list of strings"),
    "get a number": (lambda index: index.get(7), DataError, "got int"),
    "get what is not there": (lambda index: index.get("猫"), DataError, "not in the index: '猫'"),
    "metadata with bytes": (
        lambda index: index.add(["x", "y"], vectors_of("xy"), [{}, {"a": b"1"}]),
        DataError,
        "metadata of 'y' cannot be written as JSON",
    ),
    "metadata that is a set": (lambda index: index.add(["x"], vectors_of("x"), [{1}]), DataError, "of 'x' must be"),
    "metadata that holds itself": (
        lambda index: index.add(["x"], vectors_of("x"), [endless()]),
        DataError,
        "metadata of 'x' cannot be written as JSON",
    ),
    "three-dimensional vectors": (
        lambda index: index.add(["x"], vectors_of("x")[None]),
        VectorError,
        r"shape \(n, 16\) .* got \(1, 1, 16\)",
    ),
    "complex vectors": (lambda index: index.add(["x"], vectors_of("x") * 1j), VectorError, "numbers"),
    "minus infinity": (
        lambda index: index.add(["x", "y"], [vector_of("x"), [-np.inf] * DIM]),
        VectorError,
        "'y' holds NaN or infinite",
    ),
    "another model's query": (
        lambda index: index.search_within(np.ones((2, 8)) / 8**0.5, 0.5),
        VectorError,
        r"got \(2, 8\)",
    ),
    "a zero query": (lambda index: index.search(np.zeros(DIM)), VectorError, "row 0 has length 0"),
    "a score that is NaN": (lambda index: index.search_within(vector_of("a"), float("nan")), ConfigError, "score"),
    "a score above 1": (lambda index: index.search_within(vector_of("a"), 1.5), ConfigError, "score"),
    "a score that is text": (lambda index: index.search_within(vector_of("a"), "0.5"), ConfigError, "score"),
}


def endless():
    value = {}
    value["again"] = value
    return value


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_in_one_line_and_changes_nothing(tmp_path, case):
    call, kind, message = BAD[case]
    state: State = {}
    with Index.create(tmp_path / "x.index", DIM) as index:
        add(index, state, ["a", "b"], 1)
        with pytest.raises(kind, match=message) as caught:
            call(index)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
        assert index.ids() == ["a", "b"]
        assert index.check() == []
    assert found_wrong(tmp_path, kills.Life([state])) == []
