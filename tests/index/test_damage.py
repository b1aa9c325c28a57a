"""A short run of the torture by damage, and that its judgement knows right from wrong."""

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.torture import breaking, damage
from benchmarks.torture.entries import vector_of
from vitembed.errors import DataError, SearchIndexError
from vitembed.index import Hit, Index, Record

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="damaged indexes are used by forked processes")


def test_damaged_files_give_an_error_or_the_right_answer_and_never_a_wrong_hit_a_crash_or_a_hang():
    options = ["--times", "30", "--seed", "5", "--kinds", "hnsw", "--json"]
    command = [sys.executable, "-m", "benchmarks.torture", "damage", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stderr
    figures = json.loads(done.stdout)
    assert figures["problems"] == []
    assert sum(figures["outcomes"].values()) == 30
    assert {outcome.split(": ")[1] for outcome in figures["outcomes"]} <= set(damage.GOOD)
    assert any("clear error" in outcome for outcome in figures["outcomes"])


# What the torture has found once


@pytest.mark.parametrize("call", ["ids", "stream", "search", "filtered"])
def test_an_id_or_an_entry_that_is_damaged_in_the_catalog_is_an_error_of_every_call(sample, tmp_path, call):
    for sql in ("UPDATE items SET id = 'another' WHERE id = ?", "DELETE FROM items WHERE id = ?"):
        shutil.copytree(sample.path, tmp_path / "copy")
        with closing(sqlite3.connect(tmp_path / "copy" / "catalog.sqlite")) as connection, connection:
            assert connection.execute(sql, (NAME,)).rowcount == 1
        with Index.open(tmp_path / "copy") as index:
            use = {
                "ids": index.ids,
                "stream": index.stream,
                "search": lambda: index.search(vector_of("q"), 10**6),
                "filtered": lambda: index.search(vector_of("q"), 10**6, where={"name": NAME}),
            }
            with pytest.raises(SearchIndexError, match="damaged"):
                list(use[call]())
        shutil.rmtree(tmp_path / "copy")


def test_the_catalog_of_another_index_is_an_error_of_every_call(sample, tmp_path):
    stranger = damage.fill(tmp_path, "large", rows=400)
    shutil.copytree(sample.path, tmp_path / "copy")
    shutil.copyfile(stranger.path / "catalog.sqlite", tmp_path / "copy" / "catalog.sqlite")
    answers = damage.ask(tmp_path / "copy", NAME, sample.photos)
    assert judged(answers, sample)[0] == "clear error", judged(answers, sample)[1]


# The judgement


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return damage.fill(tmp_path_factory.mktemp("damage"), "small", rows=400)


@pytest.fixture
def answers(sample, tmp_path):
    """What the undamaged index answers."""
    shutil.copytree(sample.path, tmp_path / "copy")
    return damage.ask(tmp_path / "copy", NAME, sample.photos)


NAME = "small/ä 3"


def judged(answers, sample, log=False, **changed):
    return damage.judge({**answers, **changed}, sample, NAME, log)


def test_an_undamaged_index_is_unharmed(answers, sample):
    assert judged(answers, sample) == ("unharmed", [])
    assert not any(isinstance(answer, Exception) for answer in answers.values())


def test_errors_are_allowed_but_not_from_an_index_that_check_calls_sound(answers, sample):
    error = SearchIndexError("is damaged")
    assert judged({"open": error}, sample) == ("clear error", [])
    assert judged(answers, sample, search=error, check=["bad"], repair=["bad"])[0] == "clear error"
    assert judged(answers, sample, search=error, check=["bad"], repair=[])[0] == "repaired"
    outcome, problems = judged(answers, sample, search=error)
    assert outcome == "WRONG"
    assert "check found nothing, but search said: is damaged" in problems
    problems = judged(answers, sample, check=["bad"], repair=[], **{"get after repair": error})[1]
    assert problems == ["check(repair=True) found nothing, but then get after repair said: is damaged"]
    assert judged({"open": SearchIndexError("two\nlines")}, sample)[0] == "WRONG"


def test_every_kind_of_wrong_answer_is_noticed(answers, sample):
    [hits] = answers["search"]
    record, (ids, count) = answers["get"], answers["ids"]
    batch = answers["stream"][0]
    wrong = {
        "search": [hits[::-1]],
        "batch": [hits[:-1], *answers["batch"][1:]],
        "default": [[Hit(hits[0].id, hits[0].score + 1e-6, hits[0].metadata), *hits[1:]]],
        "filtered": [hits],
        "within": [answers["within"][0][:-1]],
        "get": Record(record.id, np.negative(record.vector), record.metadata),
        "ids": (ids[1:] + ids[:1], count),
        "stream": [replace(batch, ids=batch.ids[:-1]), *answers["stream"][1:]],
    }
    for title, answer in wrong.items():
        outcome, problems = judged(answers, sample, **{title: answer})
        assert outcome == "WRONG", title
        assert problems[0].startswith(title)


def test_an_earlier_commit_is_an_answer_only_when_the_log_was_damaged(answers, sample):
    earlier = replace(sample, truths=[damage.Truth({}), *sample.truths])
    assert judged(answers, earlier, log=True) == ("earlier commit", [])
    assert judged(answers, earlier)[0] == "WRONG"


def test_an_entry_that_an_earlier_commit_did_not_hold_is_rightly_missing(sample, tmp_path):
    shutil.copytree(sample.path, tmp_path / "copy")
    with Index.open(tmp_path / "copy") as index:
        index.remove([NAME])
    state = {name: one for name, one in sample.truths[0].state.items() if name != NAME}
    answers = damage.ask(tmp_path / "copy", NAME, sample.photos)
    assert isinstance(answers["get"], DataError)
    earlier = replace(sample, truths=[sample.truths[0], damage.Truth(state)])
    assert judged(answers, earlier, log=True) == ("earlier commit", [])


# The ways to break a file


@pytest.mark.parametrize("way", [breaking.flip, breaking.cut, breaking.zero, breaking.grow, breaking.move])
def test_every_way_to_break_a_file_changes_it(tmp_path, way):
    path = tmp_path / "file"
    content = random.Random(0).randbytes(50_000)
    changed = 0
    for seed in range(20):
        path.write_bytes(content)
        assert way(path, random.Random(seed))
        changed += path.read_bytes() != content
    assert changed >= 15  # a page may be written over itself


def test_a_broken_index_has_one_file_that_is_not_as_it_was(sample, tmp_path):
    before = {path.name: path.read_bytes() for path in sample.path.iterdir()}
    for seed in range(30):
        shutil.copytree(sample.path, tmp_path / "copy")
        breaking.break_one(tmp_path / "copy", lambda: tmp_path / "nowhere", random.Random(seed))
        after = {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()}
        touched = {name for name in before if before[name] != after.get(name)}
        assert len(touched) <= 2
        assert set(after) <= set(before)
        shutil.rmtree(tmp_path / "copy")


def test_the_table_has_a_row_for_every_file_and_the_sums():
    report = damage.Report()
    report.outcomes.update({("a", "unharmed"): 2, ("b", "hung"): 1, ("a", "repaired"): 3})
    assert breaking.table(report) == [
        "| damaged file | unharmed | clear error | repaired | earlier commit | hung |",
        "|---|---|---|---|---|---|",
        "| a | 2 | 0 | 3 | 0 | 0 |",
        "| b | 0 | 0 | 0 | 0 | 1 |",
        "| all | 2 | 0 | 3 | 0 | 1 |",
    ]


def test_a_child_that_returns_raises_dies_or_hangs_is_told_apart():
    script = (
        "import os, signal, time\n"
        "from benchmarks.torture import processes\n"
        "die = lambda: os.kill(os.getpid(), signal.SIGBUS)\n"
        "works = [lambda: {'a': 1}, lambda: 1 / 0, die, lambda: time.sleep(60)]\n"
        "for ended in processes.run_all(works, 1.0): print(ended.how, ended.value if ended.how == 'returned' else '')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.strip() for line in done.stdout.splitlines()] == ["returned {'a': 1}", "raised", "SIGBUS", "hung"]


def test_the_sample_holds_dead_rows_files_and_rows_that_came_last(sample):
    truth = sample.truths[0].state
    assert {one.content for one in truth.values()} > {None}
    assert not any(f"small/ä {n}" in truth for n in range(50, 100))
    assert np.array_equal(vector_of(truth[NAME].key), vector_of(f"{NAME}@0"))
    assert len(sample.truths) == 10
