"""A searchable index of embeddings: string ids, metadata, exact search, and a folder of images kept in step.

Numpy, SQLite and FAISS; nothing here imports torch, and FAISS itself loads with the first search.
"""

from vitembed.index.index import Index
from vitembed.index.results import Hit, Record, Records
from vitembed.index.sync import SyncReport, sync

__all__ = ["Hit", "Index", "Record", "Records", "SyncReport", "sync"]
