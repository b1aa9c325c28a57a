"""The loops that FAISS runs for exact search, over arrays that lie where they are; nothing is copied or kept."""

from typing import Any

import numpy as np
import numpy.typing as npt

from vitembed.index.mapped import Bytes
from vitembed.index.vectors import FloatArray

PositionArray = npt.NDArray[np.int64]


def load_faiss() -> Any:
    """Return FAISS, which loads when it is first needed; its own types do not know all that it has."""
    import faiss

    return faiss


def nearest_floats(rows: FloatArray, queries: FloatArray, k: int) -> tuple[FloatArray, PositionArray]:
    """Return scores (q, k) and positions (q, k) of the k rows of highest inner product with each query.

    Args:
        rows: (n, dim) float32, contiguous, at least k.
        queries: (q, dim) float32.
        k: how many.
    """
    faiss = load_faiss()
    scores, positions = faiss.knn(queries, rows, k, faiss.METRIC_INNER_PRODUCT)
    return scores, positions


def scan_codes(codes: Bytes, query: FloatArray, k: int) -> tuple[FloatArray, PositionArray]:
    """Return products (k,) and positions (k,) of the k codes of highest inner product with a query of whole numbers.

    Args:
        codes: (n, dim) uint8, offset by 128, contiguous; at least k.
        query: (dim,) float32 whole numbers in [-127, 127]. (FAISS may drop what comes after the point.)
        k: how many.
    """
    faiss = load_faiss()
    count, dim = codes.shape
    quantiser = faiss.ScalarQuantizer(dim, faiss.ScalarQuantizer.QT_8bit_direct_signed)
    # With `store_pairs` a result is the position in the list.
    scanner = quantiser.select_InvertedListScanner(faiss.METRIC_INNER_PRODUCT, None, True, None, False)
    products = np.full(k, -np.inf, np.float32)
    positions = np.full(k, -1, np.int64)
    scanner.set_query(faiss.swig_ptr(query))
    scanner.set_list(0, 0.0)
    scanner.scan_codes(count, faiss.swig_ptr(codes), None, faiss.swig_ptr(products), faiss.swig_ptr(positions), k)
    return products, positions
