"""Rows are scaled to unit length whatever their size, and what has no direction is refused for the right reason."""

import numpy as np
import pytest

from vitembed import metrics
from vitembed.errors import VectorError


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", ["huge", "tiny", "subnormal"])
def test_rows_near_the_ends_of_the_type_keep_their_direction(dtype, size):
    limits = np.finfo(dtype)
    scale = {"huge": 0.8 * limits.max, "tiny": limits.tiny, "subnormal": limits.smallest_subnormal * 2**10}[size]
    direction = np.array([[1, -1, 0.5, 0], [0.25, 1, 0, -1]])
    rows = (direction * scale).astype(dtype)
    mixed = np.concatenate([rows, direction.astype(dtype)])
    before = mixed.copy()
    unit = metrics.unit_rows(mixed)
    assert unit.dtype == dtype
    expected = direction / np.linalg.norm(direction, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, np.concatenate([expected, expected]), rtol=4 * limits.eps)
    np.testing.assert_array_equal(mixed, before)


@pytest.mark.parametrize("value", [1e200, 1e-200])
def test_large_and_small_numbers_are_neither_infinite_nor_zero(value):
    assert metrics.unit_rows([[value, 0.0], [1.0, 0.0]]).tolist() == [[1.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ordinary_rows_are_divided_by_their_norm_alone(dtype):
    rows = np.random.default_rng(0).normal(size=(50, 33)).astype(dtype)
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    expected = rows / norms[:, None].astype(dtype)
    assert metrics.unit_rows(rows).tobytes() == expected.tobytes()
    beside = metrics.unit_rows(np.concatenate([rows, np.full((1, 33), np.finfo(dtype).max)]))
    assert beside[:50].tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("value", "kind"), [(np.nan, "NaN or infinity"), (-np.inf, "NaN"), (0, "is all zeros")])
def test_a_row_without_direction_is_named_beside_rows_that_have_one(dtype, value, kind):
    rows = np.full((3, 2), np.finfo(dtype).max)
    rows[1] = value
    with pytest.raises(VectorError, match=rf"row 1 .*{kind}.*\(1 such rows of 3\)"):
        metrics.unit_rows(rows)
