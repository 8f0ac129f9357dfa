"""What the attention modules for decoders share: shapes, projected memories, one step at a time.

Each module turns a query (a decoder state) and a memory (the annotations of a source) into a context and the weights
that made it. What depends on the memory alone is computed once by `project_memory`; a decoder then calls `step` with
the result. The projected memory belongs to the caller; modules hold parameters only.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from attnfast.functional import AttentionOutput, SampledAttentionOutput


class ProjectedMemory(NamedTuple):
    """What `project_memory` returns and `forward` and `step` take in place of a memory.

    Attributes
    ----------
    keys : Tensor
        What scores are computed from, ``[B, T_k, ...]`` (in `Attention` ``[B, H_kv, T_k, D]``).
    values : Tensor
        What is summed, ``[B, T_k, memory_size]`` (in `Attention` ``[B, H_kv, T_k, D_v]``).
    """

    keys: Tensor
    values: Tensor


Weights = Tensor | None
Results = Tensor | AttentionOutput | SampledAttentionOutput


class MemoryAttention(nn.Module):
    """Base of the modules below: ``forward(query, memory, lengths) -> (context, weights)``.

    A subclass gives `project_memory` and `_attend` on queries ``[B, T_q, query_size]``.
    """

    def __init__(self, query_size: int, memory_size: int) -> None:
        super().__init__()
        positive(query_size=query_size, memory_size=memory_size)
        self.query_size, self.memory_size = query_size, memory_size

    def project_memory(self, memory: Tensor) -> ProjectedMemory:
        """Compute once what every step needs of a memory ``[B, T_k, memory_size]``."""
        self._check_memory(memory)
        return ProjectedMemory(memory, memory)

    def forward(
        self,
        query: Tensor,
        memory: Tensor | ProjectedMemory,
        lengths: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        return_weights: bool | str = True,
    ) -> tuple[Tensor, Weights]:
        """Attend to a memory.

        Parameters
        ----------
        query : Tensor
            ``[B, T_q, query_size]``, or ``[B, query_size]`` for one step.
        memory : Tensor or ProjectedMemory
            ``[B, T_k, memory_size]``, or what :meth:`project_memory` made of it.
        lengths : Tensor, optional
            Integer ``[B]``: how many positions of each memory are valid. Default: all.
        mask : Tensor, optional
            Boolean, True = may attend, broadcastable to ``[B, T_q, T_k]``; ``[B, T_k]`` or ``[T_k]`` for one step.
        return_weights : {True, False, "column_sum", "row_max"}
            Weights, nothing, their sums over queries, or the largest of each row.

        Returns
        -------
        tuple
            context ``[B, T_q, memory_size]`` and weights ``[B, T_q, T_k]`` (sums ``[B, T_k]``, maxima ``[B, T_q]``, or
            None); for one step without the T_q axis. A row that may see nothing has context and weights 0.
        """
        query, memory, single = self._prepare(query, memory)
        if mask is not None and single and mask.dim() == 2:
            mask = mask.unsqueeze(1)
        context, weights = self._attend(query, memory, lengths, mask, return_weights)
        return one_row(single, context, weights, return_weights)

    def step(
        self, query: Tensor, memory: ProjectedMemory, lengths: Tensor | None = None, *, return_weights: bool = True
    ) -> tuple[Tensor, Weights]:
        """One step of a decoder: `forward` for a query ``[B, query_size]`` and a memory that is projected already.

        Nothing that grows with the memory is allocated beside the weights ``[B, T_k]`` that are returned; what else a
        step allocates is the context and the projected query. Modules that need more say so in their notes.
        """
        if not isinstance(memory, ProjectedMemory):
            raise TypeError(f"memory: step takes what project_memory returns, got {type(memory).__name__}")
        if query.dim() != 2:
            raise ValueError(f"query: step expects [B, query_size], got {list(query.shape)}")
        return self(query, memory, lengths, return_weights=return_weights)

    def _attend(
        self, query: Tensor, memory: ProjectedMemory, lengths: Tensor | None, mask: Tensor | None, mode: bool | str
    ) -> tuple[Tensor, Weights]:
        raise NotImplementedError

    def _prepare(self, query: Tensor, memory: Tensor | ProjectedMemory) -> tuple[Tensor, ProjectedMemory, bool]:
        if query.dim() not in (2, 3) or query.shape[-1] != self.query_size:
            expected = f"[B, T_q, {self.query_size}] or [B, {self.query_size}]"
            raise ValueError(f"query: expected {expected}, got {list(query.shape)}")
        if not isinstance(memory, ProjectedMemory):
            memory = self.project_memory(memory)
        if memory.values.shape[0] != query.shape[0]:
            raise ValueError(f"memory: expected B = {query.shape[0]} (query's), got {memory.values.shape[0]}")
        return (query.unsqueeze(1) if query.dim() == 2 else query), memory, query.dim() == 2

    def _check_memory(self, memory: Tensor) -> None:
        if memory.dim() != 3 or memory.shape[-1] != self.memory_size:
            raise ValueError(f"memory: expected [B, T_k, {self.memory_size}], got {list(memory.shape)}")

    def extra_repr(self) -> str:
        return f"query_size={self.query_size}, memory_size={self.memory_size}"


def positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name}: expected an integer > 0, got {size!r}")
        if size <= 0:
            raise ValueError(f"{name}: expected an integer > 0, got {size}")


def one_row(single: bool, context: Tensor, weights: Weights, mode: bool | str) -> tuple[Tensor, Weights]:
    """Without the T_q axis, where the query came without it; column sums have none."""
    if not single:
        return context, weights
    return context.squeeze(1), weights if weights is None or mode == "column_sum" else weights.squeeze(1)


def unpack(result: Tensor | Results) -> tuple[Tensor, Weights]:
    """(output, weights) of an attention function's result."""
    if isinstance(result, Tensor):
        return result, None
    return result.output, result.weights


def drop_head(result: Tensor | Results) -> tuple[Tensor, Weights]:
    """Output and weights of a call with one head, without the head axis."""
    output, weights = unpack(result)
    return output.squeeze(1), None if weights is None else weights.squeeze(1)


def uniform(*tensors: Tensor | None, bound: float) -> None:
    for tensor in tensors:
        if tensor is not None:
            nn.init.uniform_(tensor, -bound, bound)
