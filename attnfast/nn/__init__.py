"""Modules: the attention mechanisms of the literature with their parameters, on attnfast's fused functions.

Every module for decoders has ``forward(query, memory, lengths) -> (context, weights)``, ``project_memory(memory)`` for
what depends on the memory alone, and ``step(query, projected, lengths)``. Beside them are networks around a memory: a
head of a neural Turing machine, end-to-end, key-value, and the first memory networks, of parts that can be replaced.
`ProductKeyMemory` is a layer for transformers.
"""

from attnfast.nn._additive import BahdanauAttention, HardAttention, HardAttentionOutput, LocationSensitiveAttention
from attnfast.nn._attention import Attention, ContentAttention
from attnfast.nn._base import MemoryAttention, ProjectedMemory
from attnfast.nn._end_to_end_memory import EndToEndMemory, EndToEndMemoryOutput
from attnfast.nn._glimpse import GlimpseSensor
from attnfast.nn._key_value_memory import KeyValueMemory, KeyValueMemoryOutput
from attnfast.nn._luong import LocationAttention, LuongAttention
from attnfast.nn._memory_networks import (
    MemoryNetwork,
    MemoryNetworkOutput,
    OutputMap,
    Response,
    RNNResponse,
)
from attnfast.nn._memory_text import ContextBags, Generalization, InputMap, Memory, Text, TextScore, WordSegmenter
from attnfast.nn._multihead import MultiheadAttention
from attnfast.nn._ntm import NTMHead
from attnfast.nn._product_keys import ProductKeyMemory

__all__ = [
    "Attention",
    "BahdanauAttention",
    "ContentAttention",
    "ContextBags",
    "EndToEndMemory",
    "EndToEndMemoryOutput",
    "Generalization",
    "GlimpseSensor",
    "HardAttention",
    "HardAttentionOutput",
    "InputMap",
    "KeyValueMemory",
    "KeyValueMemoryOutput",
    "LocationAttention",
    "LocationSensitiveAttention",
    "LuongAttention",
    "Memory",
    "MemoryAttention",
    "MemoryNetwork",
    "MemoryNetworkOutput",
    "MultiheadAttention",
    "NTMHead",
    "OutputMap",
    "ProductKeyMemory",
    "ProjectedMemory",
    "RNNResponse",
    "Response",
    "Text",
    "TextScore",
    "WordSegmenter",
]
