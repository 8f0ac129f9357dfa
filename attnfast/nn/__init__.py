"""Modules: the attention mechanisms of the literature with their parameters, on attnfast's fused functions.

Every module for decoders has ``forward(query, memory, lengths) -> (context, weights)``, ``project_memory(memory)`` for
what depends on the memory alone, and ``step(query, projected, lengths)``.
"""

from attnfast.nn._additive import BahdanauAttention, HardAttention, HardAttentionOutput, LocationSensitiveAttention
from attnfast.nn._attention import Attention, ContentAttention
from attnfast.nn._base import MemoryAttention, ProjectedMemory
from attnfast.nn._end_to_end_memory import EndToEndMemory, EndToEndMemoryOutput
from attnfast.nn._luong import LocationAttention, LuongAttention

__all__ = [
    "Attention",
    "BahdanauAttention",
    "ContentAttention",
    "EndToEndMemory",
    "EndToEndMemoryOutput",
    "HardAttention",
    "HardAttentionOutput",
    "LocationAttention",
    "LocationSensitiveAttention",
    "LuongAttention",
    "MemoryAttention",
    "ProjectedMemory",
]
