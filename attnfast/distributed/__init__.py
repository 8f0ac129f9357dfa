"""Attention and memory beyond one process, on ``torch.distributed``.

`context_parallel_attention` shards the tokens of a sequence over the ranks of a group; `shard_sequence` and
`gather_sequence` take a whole tensor apart and put it together again. `ShardedMemory` shards the slots of a memory.
`save_checkpoint` and `load_checkpoint` keep models that hold either, for any number of ranks. With this package
imported, attnfast's operators take DTensors (``torch.distributed.tensor``), sharded by heads, samples or rows.
"""

from attnfast.distributed import tensor_parallel as tensor_parallel
from attnfast.distributed._shards import gather_sequence, shard_sequence
from attnfast.distributed.checkpoint import load_checkpoint, save_checkpoint
from attnfast.distributed.context_parallel import context_parallel_attention
from attnfast.distributed.sharded_memory import ShardedMemory

__all__ = [
    "ShardedMemory",
    "context_parallel_attention",
    "gather_sequence",
    "load_checkpoint",
    "save_checkpoint",
    "shard_sequence",
]
