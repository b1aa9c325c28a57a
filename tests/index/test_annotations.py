"""Metadata from a table, and the list of entries."""

import numpy as np
import pytest

from vitembed.errors import DataError
from vitembed.index import Index
from vitembed.index.annotations import annotate_from_table


@pytest.fixture
def index(tmp_path):
    with Index.create(tmp_path / "x.index", 4) as index:
        index.add(["a", "b", "ä,c"], np.eye(4, dtype=np.float32)[:3], [{"path": "/a", "old": 1}, {"old": 2}, None])
        yield index


def table(tmp_path, text):
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    return tmp_path / "t.csv"


def test_cells_become_values_of_their_kind_and_empty_ones_none(index, tmp_path):
    rows = 'id,year,rating,public,place,list\na,2020,4.5,true,Bern,"[1]"\n"ä,c",007,,null,"x, y",NaN\n'
    assert annotate_from_table(index, table(tmp_path, rows)) == 2
    assert index.entries() == {
        "b": {"old": 2},
        "a": {"path": "/a", "old": 1, "year": 2020, "rating": 4.5, "public": True, "place": "Bern", "list": "[1]"},
        "ä,c": {"year": "007", "public": None, "place": "x, y", "list": "NaN"},
    }
    assert list(index.entries({"year": {"$gte": 2000}})) == ["a"]


def test_replacing_keeps_the_path_alone(index, tmp_path):
    annotate_from_table(index, table(tmp_path, "id,new\na,1\nb,2\n"), replace=True)
    assert index.entries() == {"ä,c": {}, "a": {"path": "/a", "new": 1}, "b": {"new": 2}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,year\na,1\n", "header with a column 'id'"),
        ("", "header with a column 'id'; it has none"),
        ("id,year\na,1\na,2\n", "line 3 names 'a' again"),
        ("id,year\na,1\nz,2\n", "not in the index: 'z'"),
        ("id,year\na,1,2\n", "line 2 has another number of cells"),
        ("id,year\na\n", "line 2 has another number of cells"),
        ('id,year\na,"1\n', "no CSV table"),
    ],
)
def test_a_bad_table_changes_nothing(index, tmp_path, text, message):
    before = index.entries()
    with pytest.raises(DataError, match=message):
        annotate_from_table(index, table(tmp_path, text))
    assert index.entries() == before


def test_what_is_no_text_or_missing_is_refused(index, tmp_path):
    (tmp_path / "t.csv").write_bytes(b"id\n\xff\n")
    with pytest.raises(DataError, match="no CSV table in UTF-8"):
        annotate_from_table(index, tmp_path / "t.csv")
    with pytest.raises(DataError, match="cannot read it"):
        annotate_from_table(index, tmp_path / "missing.csv")
