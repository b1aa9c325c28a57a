"""Plans change by as much as is said and in no other way, and curves pass through the points of their strokes."""

import numpy as np
import pytest
from pen_strokes import Disturbance, curve, disturbed


def test_a_curve_passes_through_its_points_and_a_line_stays_one() -> None:
    points = np.array([[0.0, 0.0], [1.0, 2.0], [3.0, 1.0], [4.0, 4.0]])
    samples = 6
    drawn = curve(points, samples)
    np.testing.assert_allclose(drawn[::samples], points)
    np.testing.assert_array_equal(curve(points[:2], samples), points[:2])
    even = np.stack([np.arange(5.0), 2 * np.arange(5.0)], axis=1)
    np.testing.assert_allclose(curve(even, samples)[:, 1], 2 * curve(even, samples)[:, 0], atol=1e-12)
    assert (np.diff(curve(even, samples)[:, 0]) > 0).all()


def test_each_disturbance_does_what_it_says_and_no_disturbance_nothing() -> None:
    rng = np.random.default_rng(0)
    plan = [rng.uniform(-2, 9, (count, 2)) for count in (2, 5, 3)]
    still = Disturbance(0, 0, 0, 0, 0, 0, 0)
    for before, after in zip(plan, disturbed(plan, still, rng), strict=True):
        np.testing.assert_allclose(after, before)
    square = [np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])]
    turned = disturbed(square, Disturbance(0, 0, 0, 0.5, 0, 0, 0), rng)[0]
    np.testing.assert_allclose(np.linalg.norm(np.diff(turned, axis=0), axis=1), 1)
    assert abs(turned[1, 0]) > 1e-3
    slanted = disturbed(square, Disturbance(0, 0, 0, 0, 0, 0.5, 0), rng)[0]
    np.testing.assert_allclose(slanted[:, 1], square[0][:, 1])
    assert abs(slanted[1, 0]) > 1e-3
    stretched = disturbed(square, Disturbance(0, 0, 0, 0, 0.5, 0, 0), rng)[0]
    assert stretched[2, 0] != pytest.approx(stretched[2, 1])
    placed = disturbed(square, Disturbance(0, 0, 0, 0, 0, 0, 0.5), rng)[0]
    np.testing.assert_allclose(np.diff(placed, axis=0), np.diff(square[0], axis=0))
    reaching = disturbed(square, Disturbance(0, 0.5, 0, 0, 0, 0, 0), rng)[0]
    np.testing.assert_allclose(reaching, square[0])  # no stroke is longer than a small letter
    longer = disturbed([10 * square[0]], Disturbance(0, 0.5, 0, 0, 0, 0, 0), rng)[0]
    assert np.abs(longer - 10 * square[0]).max() > 0.5


def test_a_disturbance_is_scaled_in_all() -> None:
    assert Disturbance(1, 2, 3, 4, 5, 6, 7) * 0.5 == Disturbance(0.5, 1, 1.5, 2, 2.5, 3, 3.5)
