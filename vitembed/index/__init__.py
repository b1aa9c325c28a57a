"""A searchable index of embeddings: string ids, metadata, filters, and a folder of images kept in step.

Numpy, SQLite and FAISS; nothing here imports torch, and FAISS itself loads with the first search.
"""

from vitembed.index.aside import SetAside, set_aside
from vitembed.index.index import Index
from vitembed.index.migrate import MigrationReport, migrate
from vitembed.index.optimization import Optimization
from vitembed.index.queries import combined, more_like
from vitembed.index.results import Hit, Record, Records
from vitembed.index.sync import SyncReport, sync

__all__ = [
    "Hit",
    "Index",
    "MigrationReport",
    "Optimization",
    "Record",
    "Records",
    "SetAside",
    "SyncReport",
    "combined",
    "migrate",
    "more_like",
    "set_aside",
    "sync",
]
