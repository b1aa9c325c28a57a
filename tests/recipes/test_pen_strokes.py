"""Plans change by as much as is said and in no other way, and curves pass through the points of their strokes."""

from dataclasses import replace

import numpy as np
import pytest
from pen_strokes import MARGIN, Disturbance, Stroke, curve, disturbed, drawing


def test_a_curve_passes_through_its_points_and_a_line_stays_one() -> None:
    points = np.array([[0.0, 0.0], [1.0, 2.0], [3.0, 1.0], [4.0, 4.0]])
    samples = 6
    drawn = curve(points, samples)
    np.testing.assert_allclose(drawn[::samples], points)
    np.testing.assert_array_equal(curve(points[:2], samples), points[:2])
    even = np.stack([np.arange(5.0), 2 * np.arange(5.0)], axis=1)
    np.testing.assert_allclose(curve(even, samples)[:, 1], 2 * curve(even, samples)[:, 0], atol=1e-12)
    assert (np.diff(curve(even, samples)[:, 0]) > 0).all()


STILL = Disturbance(point=0, reach=0, warp=0, turn=0, stretch=0, slant=0, place=0)
SQUARE = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])


def moved(plan: list[Stroke], **deviations: float) -> list[Stroke]:
    """Return by how much one disturbance alone moves each point."""
    changed = disturbed(plan, replace(STILL, **deviations), np.random.default_rng(0))
    return [after - before for before, after in zip(plan, changed, strict=True)]


def test_without_a_disturbance_nothing_moves() -> None:
    assert all(np.abs(stroke).max() == pytest.approx(0) for stroke in moved([SQUARE, 3 * SQUARE[:2]]))


def test_turning_and_slanting_keep_what_they_must() -> None:
    turned = SQUARE + moved([SQUARE], turn=0.5)[0]
    np.testing.assert_allclose(np.linalg.norm(np.diff(turned, axis=0), axis=1), 1)
    assert abs(turned[1, 0]) > 1e-3
    slanted = moved([SQUARE], slant=0.5)[0]
    np.testing.assert_allclose(slanted[:, 1], 0)
    np.testing.assert_allclose(slanted[1], slanted[2])
    assert abs(slanted[1, 0]) > 1e-3


def test_stretching_scales_width_and_height_each_by_itself() -> None:
    width, height = (SQUARE + moved([SQUARE], stretch=0.5)[0])[2]
    assert min(width, height) > 0
    assert len({1.0, round(width, 3), round(height, 3)}) == 3


def test_each_stroke_moves_as_a_whole_to_its_place_and_each_point_by_itself() -> None:
    one, other = moved([SQUARE, SQUARE], place=0.5)
    assert np.ptp(one, axis=0).max() == pytest.approx(0)
    assert np.ptp(other, axis=0).max() == pytest.approx(0)
    assert np.abs(one[0] - other[0]).min() > 1e-3
    many = np.zeros((4000, 2))
    assert moved([np.concatenate([many, SQUARE])], point=0.3)[0].std() == pytest.approx(0.3, rel=0.05)


def test_far_points_reach_farther_and_near_ones_stay() -> None:
    np.testing.assert_allclose(moved([SQUARE], reach=0.5)[0], 0)
    spread = moved([np.resize([[0.0, 0.0], [5.0, 0.0]], (4000, 2))], reach=0.5)[0].std()
    assert spread == pytest.approx(0.5 * (5 - 1), rel=0.05)


def test_a_warp_moves_near_points_alike_and_far_ones_not() -> None:
    line = np.stack([np.linspace(0, 10, 1001), np.zeros(1001)], axis=1)
    displaced = moved([line], warp=0.3)[0]
    assert np.ptp(displaced, axis=0).max() > 0.05
    assert np.abs(np.diff(displaced, axis=0)).max() < 0.01


def test_a_drawing_stands_upright_and_fills_its_page_to_the_margin() -> None:
    letter = [np.array([[0.0, 2.0], [0.0, 0.0]]), np.array([[0.0, 0.0], [1.0, 0.0]])]  # an L
    page = np.asarray(drawing(letter, 2, np.random.default_rng(0), side=60)) < 128
    assert page.shape == (60, pytest.approx(30 + MARGIN, abs=1))
    assert page[MARGIN + 2 : -MARGIN - 2, MARGIN].all()
    assert page[-MARGIN - 1 : -MARGIN + 1, MARGIN + 2 : -MARGIN - 2].any(axis=0).all()
    assert not page[:30, 15:].any()
    assert not page[: MARGIN - 2].any()
    flat = drawing([letter[1]], 2, np.random.default_rng(0), side=60)
    assert flat.size == (60, 2 * MARGIN)


def test_a_wider_pen_leaves_more_ink_and_a_tremor_another_line() -> None:
    plan = [np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]])]
    thin, wide, again, shaken = (
        np.asarray(drawing(plan, pen, np.random.default_rng(0), side=60, tremor=tremor))
        for pen, tremor in ((2, 0), (4, 0), (2, 0), (2, 0.05))
    )
    assert (wide < 128).sum() > 1.5 * (thin < 128).sum()
    np.testing.assert_array_equal(thin, again)
    assert thin.shape != shaken.shape or (thin != shaken).any()


def test_a_disturbance_is_scaled_in_all() -> None:
    assert Disturbance(1, 2, 3, 4, 5, 6, 7) * 0.5 == Disturbance(0.5, 1, 1.5, 2, 2.5, 3, 3.5)
