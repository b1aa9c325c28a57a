"""Columns of metadata: each comparison against a plain loop, and rows that come, die and are forgotten."""

import json
import math

import numpy as np
import pytest

from vitembed.errors import SearchIndexError
from vitembed.index import columns as module
from vitembed.index.columns import Columns

BIG = 2**53
VALUES = [
    *(
        0,
        1,
        -1,
        1.0,
        0.5,
        -0.0,
        1e300,
        -1e300,
        7,
        BIG,
        BIG + 1,
        BIG + 2,
        -BIG - 1,
        2**62,
        2**64 + 1,
        10**400,
        -(10**400),
    ),
    *("", "a", "ab", "abc", "b", "é", "e\u0301", "猫", "\U0001f600", "\uffff", "1", "A", "a\x00b"),
    *(None, True, False, [1], ["a"], {}, {"a": 1}),
]


class Table:
    """Rows of metadata with what was read of them, as the catalog would hand them out."""

    def __init__(self, entries):
        self.texts = {row: json.dumps(entry, ensure_ascii=False) for row, entry in enumerate(entries)}
        self.reads = []

    def read(self, start, stop):
        rows = [row for row in range(start, stop) if row in self.texts]
        self.reads += rows
        return ((row, self.texts[row]) for row in rows)


def column(values, key="k"):
    columns = Columns(Table([{key: value} for value in values]).read)
    columns.require([key], len(values))
    return columns.column(key)


def kind(value):
    """Return the JSON type of a value."""
    if value is None or isinstance(value, bool):
        return type(value).__name__
    return "number" if isinstance(value, int | float) else type(value).__name__


@pytest.fixture(params=[1, 3, 4_096], ids="chunks of {}".format)
def chunk(request, monkeypatch):
    """Set how many rows are read at a time."""
    monkeypatch.setattr(module, "CHUNK", request.param)


@pytest.mark.parametrize(
    "wanted", [value for value in VALUES if not isinstance(value, list | dict)], ids="{!r:.9}".format
)
def test_equality_is_that_of_json_types(wanted, chunk):
    expected = [kind(value) == kind(wanted) and value == wanted for value in VALUES]
    assert column(VALUES).one_of([wanted]).tolist() == expected
    assert sum(expected) >= 1


@pytest.mark.parametrize("count", [0, 1, 5, 200])
def test_one_of_many_is_the_union_of_each(count):
    stored = (
        [n % 300 / 4 for n in range(900)] + [f"t{n % 300}" for n in range(900)] + [BIG + n % 300 for n in range(900)]
    )
    wanted = [n / 4 for n in range(count)] + [f"t{n}" for n in range(count)] + [BIG + n for n in range(count)]
    expected = [any(kind(value) == kind(one) and value == one for one in wanted) for value in stored]
    assert column(stored).one_of(wanted).tolist() == expected


@pytest.mark.parametrize("bound", [value for value in VALUES if kind(value) in ("number", "str")], ids="{!r:.9}".format)
def test_ranges_are_exact_and_keep_to_one_type(bound, chunk):
    compare = {
        "$lt": lambda value: value < bound,
        "$lte": lambda value: value <= bound,
        "$gt": lambda value: value > bound,
        "$gte": lambda value: value >= bound,
    }
    found = column(VALUES)
    for order, holds in compare.items():
        expected = [kind(value) == kind(bound) and holds(value) for value in VALUES]
        assert found.compared(order, bound).tolist() == expected, order


@pytest.mark.parametrize("bound", [BIG + 1, -BIG - 1, 2**60 + 1, 2**60 - 1, 10**400], ids="{!r:.9}".format)
@pytest.mark.parametrize("order", ["$lt", "$lte", "$gt", "$gte"])
def test_a_bound_between_two_floats_leaves_each_on_its_side(bound, order):
    near = float(bound) if abs(bound) < 10**300 else 1e308
    stored = [math.nextafter(near, -math.inf), near, math.nextafter(near, math.inf), 0.0]
    holds = {"$lt": int.__lt__, "$lte": int.__le__, "$gt": int.__gt__, "$gte": int.__ge__}[order]
    stored = [value for value in stored if math.isfinite(value)]
    assert column(stored).compared(order, bound).tolist() == [holds(int(value), bound) for value in stored]


@pytest.mark.parametrize("prefix", ["", "a", "ab", "abcd", "é", "\U0001f600", "1", "\uffff"])
def test_prefixes_are_of_texts_alone(prefix, chunk):
    expected = [isinstance(value, str) and value.startswith(prefix) for value in VALUES]
    assert column(VALUES).prefixed(prefix).tolist() == expected


def test_a_key_is_present_with_any_value_and_null():
    columns = Columns(Table([{"k": value} for value in VALUES] + [{}, {"K": 1}, {"k ": 1}]).read)
    columns.require(["k"], len(VALUES) + 3)
    assert columns.column("k").present().tolist() == [True] * len(VALUES) + [False] * 3


@pytest.mark.parametrize("distinct", [255, 256, 257, 65_535, 65_536, 65_540])
def test_codes_grow_wider_with_the_number_of_distinct_texts(distinct):
    found = column([f"t{n}" for n in range(distinct)] + ["t0", "t254"])
    for number in (0, 254, distinct - 1):
        rows = np.flatnonzero(found.one_of([f"t{number}"])).tolist()
        assert rows == [number] + [distinct + n for n, other in enumerate((0, 254)) if other == number]
    assert np.flatnonzero(found.one_of(["t1", "t2", "u"])).tolist() == [1, 2]
    assert found.prefixed("t").all()


def test_texts_that_come_after_a_range_are_sorted_in():
    table = Table([{"k": text} for text in ["m", "c", "x"]])
    columns = Columns(table.read)
    for row, text in enumerate(["a", "z", "m", "d", "n"], start=3):
        columns.require(["k"], row)
        stored = [json.loads(table.texts[n])["k"] for n in range(row)]
        assert columns.column("k").compared("$gte", "m").tolist() == [value >= "m" for value in stored]
        assert columns.column("k").prefixed("d").tolist() == [value == "d" for value in stored]
        table.texts[row] = json.dumps({"k": text})


def test_each_row_is_read_once_however_often_a_key_is_required(chunk):
    table = Table([{"a": n, "b": str(n)} for n in range(10)])
    columns = Columns(table.read)
    columns.require(["a"], 4)
    columns.require(["a"], 4)
    columns.require(["a"], 10)
    assert table.reads == list(range(10))


def test_keys_that_are_behind_catch_up_together_and_others_are_left_alone(chunk):
    table = Table([{"a": n, "b": -n, "c": n % 2} for n in range(12)])
    columns = Columns(table.read)
    columns.require(["a"], 5)
    table.reads.clear()
    columns.require(["a", "b", "c"], 12)
    assert table.reads == list(range(12))
    for key, sign in (("a", 1), ("b", -1)):
        assert columns.column(key).one_of([sign * 7]).tolist() == [n == 7 for n in range(12)]
    table.reads.clear()
    columns.require(["c"], 12)
    assert table.reads == []


def test_a_kind_that_comes_late_leaves_earlier_rows_as_they_were():
    values = [1, 2.5, "x", "y", None, BIG + 1, True, 3, "x"]
    table = Table([{"k": value} for value in values])
    columns = Columns(table.read)
    for rows in range(1, len(values) + 1):
        columns.require(["k"], rows)
        for wanted in (1, "x", None, BIG + 1, True):
            expected = [kind(value) == kind(wanted) and value == wanted for value in values[:rows]]
            assert columns.column("k").one_of([wanted]).tolist() == expected
        assert columns.column("k").compared("$gt", 2).tolist() == [
            kind(value) == "number" and value > 2 for value in values[:rows]
        ]


def test_dead_rows_count_as_missing(chunk):
    table = Table([{"k": n % 2} for n in range(9)])
    for row in (0, 3, 4, 5, 8):
        del table.texts[row]
    columns = Columns(table.read)
    columns.require(["k"], 9)
    assert columns.column("k").present().tolist() == [n in table.texts for n in range(9)]
    assert columns.column("k").one_of([1]).tolist() == [n in table.texts and n % 2 == 1 for n in range(9)]


def test_after_forget_rows_are_read_anew():
    table = Table([{"k": 1}, {"k": 1}])
    columns = Columns(table.read)
    columns.require(["k"], 2)
    table.texts = {0: '{"k":2}'}
    assert columns.column("k").one_of([1]).tolist() == [True, True]
    columns.forget()
    assert columns.rows == 0
    columns.require(["k"], 1)
    assert columns.column("k").one_of([1]).tolist() == [False]


def test_no_rows_give_empty_masks():
    columns = Columns(Table([]).read)
    columns.require(["k"], 0)
    found = columns.column("k")
    masks = [found.present(), found.one_of([1, "a", None]), found.compared("$lt", "a"), found.compared("$gt", 1)]
    assert [(mask.shape, mask.dtype) for mask in [*masks, found.prefixed("")]] == [((0,), np.bool_)] * 5


def test_masks_may_be_changed_without_changing_the_column():
    found = column(["a", "b", 1, None])
    ask = [
        found.present,
        lambda: found.one_of(["a"]),
        lambda: found.one_of([]),
        lambda: found.compared("$gte", "a"),
        lambda: found.compared("$gte", 0),
        lambda: found.prefixed("b"),
    ]
    before = [mask().tolist() for mask in ask]
    for mask in ask:
        changed = mask()
        changed[:] = ~changed
    assert [mask().tolist() for mask in ask] == before


def test_nan_of_another_writer_equals_nothing_and_is_there():
    columns = Columns(lambda start, stop: [(0, '{"k":NaN}'), (1, '{"k":1e999}'), (2, '{"k":1}')])
    columns.require(["k"], 3)
    found = columns.column("k")
    assert found.present().all()
    assert found.one_of([1, 0]).tolist() == [False, False, True]
    assert found.compared("$lte", 1).tolist() == [False, False, True]
    assert found.one_of(list(range(500))).tolist() == [False, False, True]


@pytest.mark.parametrize("text", ["{", '{"k":2},{"k":3}', "[]", "3", "[" * 100_000], ids="{:.9}".format)
def test_metadata_that_is_no_mapping_is_named_and_what_was_read_stays(text, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2)
    table = Table([{"k": n} for n in range(6)])
    table.texts[3] = text
    columns = Columns(table.read)
    for _ in range(2):
        with pytest.raises(SearchIndexError, match="metadata of row 3 must be JSON") as caught:
            columns.require(["k"], 6)
        assert "\n" not in str(caught.value)
    table.texts[3], table.reads = '{"k":3}', []
    columns.require(["k"], 6)
    assert table.reads == [2, 3, 4, 5]
    assert columns.column("k").compared("$gte", 2).tolist() == [False, False, True, True, True, True]


def test_a_failed_read_leaves_the_columns_as_they_were(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2)
    table, broken = Table([{"k": n} for n in range(6)]), [True]

    def read(start, stop):
        if start >= 2 and broken[0]:
            raise SearchIndexError("damaged")
        return table.read(start, stop)

    columns = Columns(read)
    with pytest.raises(SearchIndexError, match="damaged"):
        columns.require(["k"], 6)
    broken[0] = False
    columns.require(["k"], 6)
    assert columns.column("k").one_of([0, 5]).tolist() == [True, False, False, False, False, True]
    assert table.reads == list(range(6))
