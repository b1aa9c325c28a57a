"""Networks of other libraries, loaded as ours, compute the same; the rows of `benchmarks/parity.py`."""

from pathlib import Path

import pytest

from benchmarks.parity import CASES, LIMIT, Case, difference


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.family)
def test_a_network_of_another_library_computes_the_same_here(case: Case, tmp_path: Path) -> None:
    for size in case.sizes:
        folder = tmp_path / str(size)
        folder.mkdir()
        found = difference(case, size, folder)
        assert "cls" in found
        assert max(found.values()) < LIMIT
