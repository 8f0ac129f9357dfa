"""Memories that are written and read: a store of slots, its file, and indexes that name the slots worth scoring."""

from attnfast.memory.clusters import kmeans
from attnfast.memory.files import MemoryFileError
from attnfast.memory.indexes import ClusterIndex, WordIndex
from attnfast.memory.store import MemoryStore

__all__ = ["ClusterIndex", "MemoryFileError", "MemoryStore", "WordIndex", "kmeans"]
