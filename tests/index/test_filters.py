"""Filters: what they mean, against plain Python; what they refuse; what may be typed on a command line."""

import json
import operator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitembed.errors import ConfigError
from vitembed.index import columns as module
from vitembed.index.columns import Columns
from vitembed.index.filters import MAX_DEPTH, parse, parse_text

BIG = 2**53


def matching(where, entries):
    """Return the numbers of the entries that a filter holds for."""
    texts = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    columns, wanted = Columns(lambda start, stop: enumerate(texts[start:stop], start)), parse(where)
    columns.require(wanted.keys(), len(entries))
    mask = wanted.rows(columns)
    assert mask.shape == (len(entries),)
    assert mask.dtype == np.bool_
    return np.flatnonzero(mask).tolist()


SHOES = [
    {"category": "shoe", "price": 5, "tags": ["new"]},
    {"category": "shoe", "price": 9.5, "sold": True},
    {"category": "boot", "price": 10, "sold": None},
    {"category": "boots", "price": "10", "sold": False},
    {"price": True},
    {},
]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"category": "shoe"}, [0, 1]),
        ({"category": "shoe", "price": 5}, [0]),
        ({"category": {"$ne": "shoe"}}, [2, 3, 4, 5]),
        ({"category": {"$in": ["shoe", "boot"]}}, [0, 1, 2]),
        ({"category": {"$nin": ["shoe", "boot"]}}, [3, 4, 5]),
        ({"category": {"$in": []}}, []),
        ({"category": {"$nin": []}}, [0, 1, 2, 3, 4, 5]),
        ({"category": {"$prefix": "boot"}}, [2, 3]),
        ({"category": {"$gt": "boot", "$lt": "shoe"}}, [3]),
        ({"price": {"$gte": 5, "$lt": 10}}, [0, 1]),
        ({"price": {"$gt": "1"}}, [3]),
        ({"price": 1}, []),
        ({"price": True}, [4]),
        ({"sold": None}, [2]),
        ({"sold": {"$ne": None}}, [0, 1, 3, 4, 5]),
        ({"sold": {"$exists": True}}, [1, 2, 3]),
        ({"sold": {"$exists": False}}, [0, 4, 5]),
        ({"tags": "new"}, []),
        ({"tags": {"$exists": True}}, [0]),
        ({"tags": {"$ne": "new"}}, [0, 1, 2, 3, 4, 5]),
        ({"nowhere": {"$exists": False}}, [0, 1, 2, 3, 4, 5]),
        ({"$or": [{"category": "boot"}, {"price": {"$lt": 6}}]}, [0, 2]),
        ({"$and": [{"category": "shoe"}, {"$not": {"price": 5}}]}, [1]),
        ({"category": "shoe", "$or": [{"price": 5}, {"price": 10}]}, [0]),
        ({"$not": {}}, []),
        ({"$not": {"category": "shoe", "price": 5}}, [1, 2, 3, 4, 5]),
    ],
    ids=str,
)
def test_a_filter_means_what_the_table_says(where, expected):
    assert matching(where, SHOES) == expected


def test_an_empty_index_has_no_match():
    assert matching({}, []) == []
    assert matching({"$not": {"a": {"$gt": 1}}}, []) == []


def test_scalars_of_numpy_and_kinds_of_texts_are_taken_as_what_they_hold():
    class Name(str):
        def __str__(self):
            return "another"

    entries = [{"k": 1}, {"k": True}, {"k": 0.5}, {"k": "x"}]
    wanted = [np.int64(1), np.bool_(True), np.float32(0.5), Name("x")]
    assert [matching({"k": value}, entries) for value in wanted] == [[0], [1], [2], [3]]
    assert matching({"k": {"$in": np.array([0.5, 1.0])}}, entries) == [0, 2]


def test_filters_that_look_alike_are_not_equal():
    assert parse({"k": 1}) != parse({"k": True})


def test_the_mask_has_the_rows_that_were_last_required():
    columns = Columns(lambda start, stop: ((row, f'{{"k":{row}}}') for row in range(start, stop)))
    columns.require(["k"], 9)
    columns.require(["k"], 4)
    assert parse({"k": {"$gte": 2}}).rows(columns).tolist() == [False, False, True, True]


# Any filter on any metadata, against a predicate written out in Python


KEYS = ["a", "b", 'odd."key', "猫", ""]
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([0.5, -0.0, 1.0, 2.5, BIG, BIG + 1, BIG + 2, -BIG - 1, float(BIG), 2**63, 10**400, 1e300, 5e-324]),
    st.floats(allow_nan=False, allow_infinity=False),
)
TEXTS = st.one_of(st.sampled_from(["", "a", "ab", "b", "1", "猫", "\U0001f600", "\uffff"]), st.text(max_size=3))
TEXTS = TEXTS.filter(lambda text: not any(0xD800 <= ord(character) < 0xE000 for character in text))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.one_of(SCALARS, SCALARS, SCALARS, st.lists(SCALARS, max_size=2), st.dictionaries(st.just("a"), SCALARS))
ENTRIES = st.lists(st.one_of(st.none(), st.dictionaries(st.sampled_from(KEYS), VALUES)), max_size=12)
CONDITIONS = st.one_of(
    SCALARS,
    st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(["$eq", "$ne"], SCALARS),
            **dict.fromkeys(["$gt", "$gte", "$lt", "$lte"], NUMBERS | TEXTS),
            **dict.fromkeys(["$in", "$nin"], st.lists(SCALARS, max_size=4)),
            "$prefix": TEXTS,
            "$exists": st.booleans(),
        },
    ).filter(bool),
)
FILTERS = st.recursive(
    st.dictionaries(st.sampled_from(KEYS), CONDITIONS, max_size=2),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "$and": st.lists(inner, min_size=1, max_size=3),
            "$or": st.lists(inner, min_size=1, max_size=3),
            "$not": inner,
            "a": CONDITIONS,
        },
    ),
    max_leaves=6,
)


def same(value, wanted):
    if any(isinstance(side, bool) or side is None for side in (value, wanted)):
        return value is wanted
    return type(value) not in (list, dict) and value == wanted


def ordered(order, value, wanted):
    if isinstance(wanted, str):
        return isinstance(value, str) and order([ord(c) for c in value], [ord(c) for c in wanted])
    return isinstance(value, int | float) and not isinstance(value, bool) and order(value, wanted)


HOLDS = {
    "$eq": same,
    "$ne": lambda value, wanted: not same(value, wanted),
    "$in": lambda value, wanted: any(same(value, one) for one in wanted),
    "$nin": lambda value, wanted: not any(same(value, one) for one in wanted),
    "$prefix": lambda value, wanted: isinstance(value, str) and value[: len(wanted)] == wanted,
    "$gt": lambda value, wanted: ordered(operator.gt, value, wanted),
    "$gte": lambda value, wanted: ordered(operator.ge, value, wanted),
    "$lt": lambda value, wanted: ordered(operator.lt, value, wanted),
    "$lte": lambda value, wanted: ordered(operator.le, value, wanted),
}


def holds(where, entry):
    """Tell whether a filter holds for an entry, in plain Python."""
    for key, condition in where.items():
        if key == "$and":
            passed = all(holds(part, entry) for part in condition)
        elif key == "$or":
            passed = any(holds(part, entry) for part in condition)
        elif key == "$not":
            passed = not holds(condition, entry)
        else:
            asked = condition if isinstance(condition, dict) else {"$eq": condition}
            passed = all(
                (key in entry) == wanted
                if name == "$exists"
                else (HOLDS[name](entry[key], wanted) if key in entry else name in ("$ne", "$nin"))
                for name, wanted in asked.items()
            )
        if not passed:
            return False
    return True


@settings(deadline=None, max_examples=250, derandomize=True)
@given(entries=ENTRIES, filters=st.lists(FILTERS, min_size=1, max_size=3), chunk=st.integers(1, 5), data=st.data())
def test_any_filter_on_any_metadata_agrees_with_plain_python(entries, filters, chunk, data):
    texts = {row: json.dumps(entry) for row, entry in enumerate(entries) if entry is not None}
    columns = Columns(lambda start, stop: [(row, texts[row]) for row in range(start, stop) if row in texts])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        for where in filters:  # each with more rows than the one before, by the same columns
            rows = data.draw(st.integers(columns.rows, len(entries)))
            wanted = parse(where)
            columns.require(wanted.keys(), rows)
            expected = [holds(where, entry or {}) for entry in entries[:rows]]
            assert wanted.rows(columns).tolist() == expected


@settings(deadline=None, max_examples=100, derandomize=True)
@given(where=FILTERS)
def test_a_filter_typed_as_json_is_the_same_filter(where):
    assert parse_text(json.dumps(where)) == where


# Bad input: one line that names what was wrong


CYCLE: dict[str, object] = {}
CYCLE["$not"] = CYCLE


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (["v"], r"where must map keys .* got \['v'\]"),
        ({1: "v"}, "texts as keys; got 1"),
        ({"v": [1]}, r"'v' \$eq; got \[1\]"),
        ({"v": b"x"}, r"'v' \$eq; got b'x'"),
        ({"v": np.zeros(2)}, r"'v' \$eq; got array"),
        ({"v": float("nan")}, r"a finite number for 'v' \$eq; got nan"),
        ({"v": {"$lt": float("-inf")}}, r"a finite number for 'v' \$lt; got -inf"),
        ({"v": {"$in": [1, float("nan")]}}, r"a finite number for 'v' \$in; got nan"),
        ({"v": {"$gtt": 1}}, r"unknown operator below 'v': '\$gtt'; did you mean '\$gt'\?"),
        ({"v": {3: 1}}, "unknown operator below 'v': '3'"),
        ({"v": {}}, "an operator below 'v'"),
        ({"v": {"$not": {"$gt": 1}}}, r"\$not around whole filters, not below the key 'v'"),
        ({"v": {"$gt": None}}, r"a number or a text for 'v' \$gt; got None"),
        ({"v": {"$lte": True}}, r"a number or a text for 'v' \$lte; got True"),
        ({"v": {"$in": "abc"}}, r"a list of values for 'v' \$in; got 'abc'"),
        ({"v": {"$nin": {"a": 1}}}, r"a list of values for 'v' \$nin"),
        ({"v": {"$nin": 7}}, r"a list of values for 'v' \$nin; got 7"),
        ({"v": {"$in": [[1]]}}, r"'v' \$in; got \[1\]"),
        ({"v": {"$prefix": 3}}, r"a text for 'v' \$prefix; got 3"),
        ({"v": {"$prefix": 10**5_000}}, r"a text for 'v' \$prefix; got a value of type int"),
        ({"v": {"$exists": 1}}, r"true or false for 'v' \$exists; got 1"),
        ({"v\n{}": {"$gt": {"\n{}": 1}}}, r"for 'v\\n\{\}' \$gt"),
        ({"v" * 10_000: [1]}, r"for 'vvvv.*\.\.\. \$eq"),
        ({"$nor": [{}]}, r"unknown operator '\$nor'; did you mean '\$or'\?"),
        ({"$gt": 5}, r"\$gt below a key"),
        ({"$or": []}, r"at least one filter below '\$or'; got \[\]"),
        ({"$and": {"a": 1}}, r"at least one filter below '\$and'; got \{'a': 1\}"),
        ({"$and": [{}, 1]}, r"list of filters below '\$and'.* got 1"),
        ({"$not": [{}]}, r"below '\$not'.* got \[\{\}\]"),
        (CYCLE, "more than 32 deep"),
    ],
)
def test_a_bad_filter_is_refused_by_one_line_that_names_the_key(where, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse(where)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_filters_nest_to_the_limit_and_no_deeper():
    where = {"k": 1}
    for _ in range(MAX_DEPTH):
        where = {"$not": where}
    assert matching(where, [{"k": 1}, {}]) == ([0] if MAX_DEPTH % 2 == 0 else [1])
    with pytest.raises(ConfigError, match="deep"):
        parse({"$and": [where]})


# On the command line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("category=shoe", {"category": "shoe"}),
        ("category!=shoe", {"category": {"$ne": "shoe"}}),
        (" price >= 5 ", {"price": {"$gte": 5}}),
        ("price<=5.5", {"price": {"$lte": 5.5}}),
        ("price<-5", {"price": {"$lt": -5}}),
        ("price>1e3", {"price": {"$gt": 1000.0}}),
        ("path^=photos/2024", {"path": {"$prefix": "photos/2024"}}),
        ("year^=20", {"year": {"$prefix": "20"}}),
        ('year^="20"', {"year": {"$prefix": "20"}}),
        ("id=9007199254740993", {"id": 9007199254740993}),
        ("sold=true", {"sold": True}),
        ("sold=True", {"sold": "True"}),
        ("sold=null", {"sold": None}),
        ("name=", {"name": ""}),
        ('name="5"', {"name": "5"}),
        ('name="=5"', {"name": "=5"}),
        ("name=a=b<c", {"name": "a=b<c"}),
        ("name=[1]", {"name": "[1]"}),
        ("name={}", {"name": "{}"}),
        ("name=NaN", {"name": "NaN"}),
        ("name=007", {"name": "007"}),
        ("wow!=1", {"wow": {"$ne": 1}}),
        ("a!b^c=1", {"a!b^c": 1}),
        ("größe=né", {"größe": "né"}),
        ("name=two\nlines", {"name": "two\nlines"}),
        ("name=" + "9" * 5_000, {"name": "9" * 5_000}),
        ('{"a": {"$in": [1, "x"]}, "$not": {"b": null}}', {"a": {"$in": [1, "x"]}, "$not": {"b": None}}),
        ("{}", {}),
    ],
    ids="{!r:.30}".format,
)
def test_what_is_typed_is_read_as_said(text, expected):
    found = parse_text(text)
    assert found == expected
    assert json.dumps(found) == json.dumps(expected)  # 1 is not true, 5 is not 5.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a filter must be key=value"),
        ("shoe", "a filter must be key=value.* got 'shoe'"),
        ("=5", "a filter must be key=value"),
        ("$or=5", "a filter must be key=value"),
        ("[1]", "a filter must be key=value"),
        ("a==1", "'a==1' has two signs"),
        ("a=>1", "'a=>1' has two signs"),
        ("a<>1", "'a<>1' has two signs"),
        ("a=1e999", r"a finite number for 'a' \$eq"),
        ("a>true", r"a number or a text for 'a' \$gt"),
        ('{"a":', "one mapping in JSON"),
        ('{"a": 1} x', "one mapping in JSON"),
        ('{"a":' + "[" * 100_000, "one mapping in JSON"),
        ('{"a": 1, "a": 2}', "'a' comes twice"),
        ('{"a": {"$gt": 1, "$gt": 2}}', r"'\$gt' comes twice"),
        ('{"a": NaN}', r"a finite number for 'a' \$eq; got nan"),
        ('{"a": {"$gr": 1}}', r"did you mean '\$g"),
    ],
    ids="{!r:.30}".format,
)
def test_what_cannot_be_read_is_refused_by_one_line(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_text(text)
    assert "\n" not in str(caught.value)
