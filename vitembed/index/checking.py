"""What `Index.check` looks at: everything compared with its checksum, and the files with each other."""

from collections.abc import Iterator

import numpy as np

from vitembed.errors import SearchIndexError
from vitembed.index.catalog import Catalog
from vitembed.index.rows import Rows


def lasting_problems(catalog: Catalog, rows: Rows) -> Iterator[str]:
    """Yield what is wrong with the truth: the catalog and the vectors; one line each.

    Args:
        catalog: within a `reading` block.
        rows: up to date, with nothing taken as verified.
    """
    yield from catalog.check()
    for block in rows.blocks:
        try:
            rows.verified(np.flatnonzero(rows.mask[block.start : block.stop]) + block.start)
            rows.all_items(block.start, block.stop)
        except SearchIndexError as error:
            yield str(error)


def cache_problems(rows: Rows) -> Iterator[str]:
    """Yield what is wrong with what can be made again: the codes and the structure; one line each."""
    for number in rows.uncoded():
        yield f"{rows.codes.path}: block {number} is missing or damaged; searches read the vectors instead"
    if rows.optimization and rows.optimization.file and rows.structure() is None:
        file = rows.vectors.path.with_name(rows.optimization.file)
        yield f"{file}: the structure is missing or damaged; searches are exact until it is built again"
