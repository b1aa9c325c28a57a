"""What two sides of a split share is found and named."""

import json
import os

import numpy as np
import pytest

from vitembed.errors import ConfigError, DataError, ImageError, VectorError
from vitembed.evaluate import Side, check_split


def sides(seed=0):
    rng = np.random.default_rng(seed)
    train, test = rng.normal(size=(60, 16)), rng.normal(size=(20, 16))
    known = [np.full((1, 1), i) for i in range(60)]
    unseen = [np.full((1, 1), i) for i in range(20)]
    return Side(known, [f"a{i % 6}" for i in range(60)], train), Side(unseen, [f"b{i % 4}" for i in range(20)], test)


def test_a_clean_split_has_no_warning():
    report = check_split(*sides())
    assert report.warnings == ()
    assert (report.identities, report.equal_files, report.near_duplicates) == ((), (), ())
    assert 0 < report.score < 1
    assert (report.train_images, report.test_images) == (60, 20)


def test_identities_on_both_sides_are_named():
    train, test = sides()
    report = check_split(train, Side(test.images, ["a3", "ä"] * 10, test.vectors))
    assert report.identities == ("a3",)
    assert report.warnings == ("1 identity is on both sides of the split: a3",)
    many = check_split(Side(train.images, [str(i) for i in range(60)]), Side(test.images, [str(i) for i in range(20)]))
    assert many.warnings[0] == "20 identities are on both sides of the split: 0, 1, 10, 11, 12 and 15 more"


def test_near_duplicates_are_found_whatever_the_scale_of_the_models_scores():
    train, test = sides()
    for squeeze in (0.0, 20.0):  # added to all rows, so that all cosines come close to one
        known, unseen = train.vectors + squeeze, test.vectors + squeeze
        unseen[7] = known[31] + 1e-3 * np.arange(16)
        report = check_split(Side(train.images, train.identities, known), Side(test.images, test.identities, unseen))
        [found] = report.near_duplicates
        assert (found.test, found.train) == ("image 7", "image 31")
        assert found.score > report.score
        assert (
            "1 pair of images that look alike to the model is on both sides of the split: image 7 ~ image 31 (1.000)"
            in report.warnings
        )


def test_a_given_score_is_kept_to():
    train, test = sides()
    unit = [np.asarray(side.vectors) / np.linalg.norm(side.vectors, axis=1, keepdims=True) for side in (train, test)]
    nearest = (unit[1] @ unit[0].T).max(axis=1)
    report = check_split(train, test, score=0.6)
    assert report.near_count == np.count_nonzero(nearest >= 0.6) > 0
    scores = [pair.score for pair in report.near_duplicates]
    assert scores == sorted(scores, reverse=True)


def test_equal_files_are_found_by_their_bytes_and_not_told_twice(tmp_path):
    train, test = sides()
    files = {}
    for name, content in {"x/a.png": b"same", "x/b.png": b"four", "y/c.png": b"same", "y/d.png": b"five!"}.items():
        files[name] = tmp_path / name
        files[name].parent.mkdir(exist_ok=True)
        files[name].write_bytes(content)
    known = Side([files["x/a.png"], files["x/b.png"]], ["p", "q"], train.vectors[:2])
    unseen = Side([files["y/c.png"], files["y/d.png"]], ["r", "s"], np.stack([train.vectors[0], test.vectors[0]]))
    report = check_split(known, unseen)
    assert [(pair.test, pair.train) for pair in report.equal_files] == [
        (os.fspath(files["y/c.png"]), os.fspath(files["x/a.png"]))
    ]
    assert report.near_duplicates == ()
    [warning] = report.warnings
    assert warning.startswith("1 file is on both sides of the split: ")
    document = json.loads(json.dumps(report.to_dict()))
    assert document["equal_files"] == [[os.fspath(files["y/c.png"]), os.fspath(files["x/a.png"])]]


def test_one_training_identity_gives_no_usual_score():
    train, test = sides()
    assert check_split(Side(train.images, ["a"] * 60, train.vectors), test).score is None


def test_bad_input_is_one_clear_error(tmp_path):
    train, test = sides()
    with pytest.raises(ConfigError, match="got 2"):
        check_split(train, test, score=2)
    with pytest.raises(DataError, match="one identity for each of the 2 images; got 1"):
        Side([np.zeros((1, 1))] * 2, ["a"])
    with pytest.raises(DataError, match="16 and 3 columns"):
        check_split(train, Side(test.images, test.identities, np.ones((20, 3))))
    with pytest.raises(DataError, match="a row for each of 20 images; got 2"):
        check_split(train, Side(test.images, test.identities, np.ones((2, 16))))
    with pytest.raises(VectorError, match="NaN"):
        check_split(train, Side(test.images, test.identities, np.full((20, 16), np.nan)))
    missing = Side([tmp_path / "missing.png"], ["z"])
    with pytest.raises(ImageError, match=r"missing\.png: No such file"):
        check_split(train, missing)
