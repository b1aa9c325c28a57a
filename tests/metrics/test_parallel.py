import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from vitembed.metrics import query_ranks, ranks
from vitembed.metrics.parallel import in_parallel


def blas_threads():
    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]


@pytest.fixture
def two_threads():
    with threadpool_limits(2, "blas"):
        if 2 not in blas_threads():
            pytest.skip("the library of matrix products takes no number of threads")
        yield


def test_parts_are_worked_on_at_the_same_time_and_come_back_in_order(two_threads):
    meeting = threading.Barrier(2, timeout=20)  # passes only where two are in it

    def work(part):
        meeting.wait()
        return part * part

    assert in_parallel(work, range(6)) == [0, 1, 4, 9, 16, 25]


def test_each_part_has_one_thread_and_afterwards_all_is_as_before(two_threads):
    before = blas_threads()
    assert {max(threads) for threads in in_parallel(lambda _: blas_threads(), range(4))} == {1}
    assert blas_threads() == before


def test_an_error_comes_out_and_afterwards_all_is_as_before(two_threads):
    before = blas_threads()

    def fail(part):
        raise OSError(f"part {part}")

    with pytest.raises(OSError, match="part 0"):
        in_parallel(fail, range(3))
    assert blas_threads() == before
    assert in_parallel(abs, [-1]) == [1]


def test_figures_do_not_depend_on_the_threads(monkeypatch, two_threads):
    monkeypatch.setattr(ranks, "TILE_ROWS", 64)
    rng = np.random.default_rng(0)
    z, labels = rng.normal(size=(700, 24)).astype(np.float32), rng.integers(100, size=700)
    found = query_ranks(z, labels, full=True, voters=3)
    with threadpool_limits(1, "blas"):
        alone = query_ranks(z, labels, full=True, voters=3)
    for name in ("first_rank", "precision_at_r", "average_precision", "voted_right"):
        np.testing.assert_array_equal(getattr(found, name), getattr(alone, name))
