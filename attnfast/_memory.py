"""The public memory functions: documentation, checks, and the way to their kernels. One section a function."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

from attnfast import _memory_autograd
from attnfast import _validate as check
from attnfast._memory_ops import MAX_COUNT

# --- topk_scores ----------------------------------------------------------------------------------------------------


def topk_scores(
    query: Tensor, keys: Tensor, k: int, *, scale: float = 1.0, mask: Tensor | None = None,
    key_scales: Tensor | None = None, sparse_grad: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    r"""The k slots of a memory that score highest for each query, in one fused call.

    .. math::
        s_n = (scale\; query) \cdot keys_n, \qquad
        (scores, indices) = \text{the } k \text{ largest } s_n, \text{ largest first, and their } n

    The scores ``[..., N]`` are never held: memory grows with the results, not with N.

    Parameters
    ----------
    query : Tensor
        ``[..., D]``: float64, float32, bfloat16 or float16. Any strides.
    keys : Tensor
        ``[N, D]``: float64 where `query` is, else any of float32, bfloat16 and float16, which need not be the query's
        dtype, or int8 with `key_scales`. Rows may lie apart; where the elements of a row do, the call makes a copy.
    k : int
        How many slots, from 0 to the smaller of N and 2048.
    scale : float
        Multiplies the query before the product.
    mask : Tensor, optional
        Boolean, ``[N]`` or broadcastable to ``[..., N]``; True = may be chosen. A slot with False is never chosen,
        whatever its key holds. A mask that is broadcast over some leading dimensions and not over others is expanded
        in memory.
    key_scales : Tensor, optional
        float32 ``[N]``, needed with int8 `keys` and only then: slot n has the key ``key_scales[n] * keys[n]``. Has no
        gradient, nor have the keys then.
    sparse_grad : bool
        If True, the gradient of `keys` is a sparse COO tensor with one row for each slot that was chosen, ascending
        (it is coalesced), in memory that does not depend on N. If False, a dense ``[N, D]``. Both hold the same bits.
        As in :func:`weighted_gather`.

    Returns
    -------
    scores : Tensor
        ``[..., k]``, largest first: float64 for float64, float32 for all others. Differentiable by `query` and `keys`,
        the choice held fixed; to any order with ``sparse_grad=False``.
    indices : Tensor
        ``[..., k]``, int64.

    Raises
    ------
    ValueError
        Shapes that do not fit, k out of range, tensors on unsupported devices.
    TypeError
        Arguments of the wrong kind or dtype.
    NotImplementedError
        A sparse gradient under torch.compile, ``torch.func`` transforms or ``create_graph=True``.

    Notes
    -----
    - Among equal scores the lowest slot comes first, and is chosen first. 0 and -0 are equal.
    - NaN counts as the largest score, as for :func:`torch.topk`.
    - Where fewer than k slots are visible, the places that remain hold the score ``-inf`` and the index ``-1``, after
      any true score of ``-inf``. A softmax over such scores gives them no weight as long as one slot is visible. They
      have no gradient.
    - Half types and int8 are widened as they are read; products and sums are float32, so ``autocast`` changes nothing.
    - The same call gives the same bits whatever the number of threads. One query among few (up to four) and the same
      query among many are summed in another order, so near ties may then differ.
    - A row of the gradient of the keys is a sum in the order of the queries, 256 at a time, and of these sums in order.

    References
    ----------
    Weston, Chopra and Bordes, "Memory Networks", ICLR 2015, section 3.1 (the k best supporting memories); Lample et
    al., "Large Memory Layers with Product Keys", NeurIPS 2019, equation 1.

    Examples
    --------
    >>> import torch, attnfast
    >>> keys, values = torch.randn(1000, 64), torch.randn(1000, 32)
    >>> scores, indices = attnfast.topk_scores(torch.randn(8, 64), keys, 16)
    >>> (scores.softmax(-1).unsqueeze(-1) * values[indices]).sum(-2).shape
    torch.Size([8, 32])
    """
    arguments = topk_call(query, keys, k, scale=scale, mask=mask, sparse_grad=sparse_grad, key_scales=key_scales)
    scores, indices = _memory_autograd.topk_scores(*arguments)
    leading = query.shape[:-1]
    return scores.reshape(*leading, indices.shape[-1]), indices.reshape(*leading, indices.shape[-1])


def topk_call(
    query: Tensor, keys: Tensor, k: int, *, scale: float = 1.0, mask: Tensor | None = None, sparse_grad: bool = False,
    key_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, int, float, bool, Tensor | None]:  # fmt: skip
    """Arguments of ``_memory_autograd.topk_scores`` for a call of :func:`topk_scores`, checked."""
    check.flag("sparse_grad", sparse_grad)
    check.floating("query", query)
    check.table("keys", keys, "D", "key_scales", key_scales)
    if query.dim() < 1 or query.shape[-1] != keys.shape[1]:
        shape = check.shape_text(query.shape)
        raise ValueError(f"query: expected [..., D] with D = {keys.shape[1]} (keys'), got {shape}")
    # int8 stands for numbers of float32.
    if (keys.dtype == torch.float64) != (query.dtype == torch.float64):
        raise TypeError(
            f"keys: expected float64 if query is and only then, got {_name(keys.dtype)} with a query of "
            f"{_name(query.dtype)}"
        )
    k = pick_count("k", k, keys.shape[0])
    scale = check.number("scale", scale)
    leading = query.shape[:-1]
    rows = math.prod(leading)
    if mask is not None:
        mask = _slot_mask(mask, (*leading, keys.shape[0]), rows)
    flat = query.resolve_neg().reshape(rows, query.shape[-1])
    return flat, keys.resolve_neg(), mask, k, scale, sparse_grad, key_scales


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pick_count(name: str, k: Any, slots: int, slots_name: str = "N") -> int:
    """How many slots to choose, checked; an integer of any kind, and a symbol while torch.compile traces."""
    expected = f"an integer from 0 to the number of slots and at most {MAX_COUNT}"
    if isinstance(k, bool | Tensor):
        raise TypeError(f"{name}: expected {expected}, got {type(k).__name__}")
    if not isinstance(k, int | torch.SymInt):
        if not hasattr(k, "__index__"):
            raise TypeError(f"{name}: expected {expected}, got {type(k).__name__}")
        k = operator.index(k)
    if k < 0 or k > MAX_COUNT or k > slots:
        raise ValueError(f"{name}: expected {expected}, got {k} with {slots_name} = {slots}")
    return k


def _slot_mask(mask: Any, shape: tuple[int, ...], rows: int) -> Tensor:
    """A boolean mask as ``[1, N]`` or ``[B, N]``; a view unless it is broadcast over some leading dimensions only."""
    check.tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected dtype bool (True = may be chosen), got {_name(mask.dtype)}")
    check.broadcastable("mask", mask, "[..., N]", shape)
    if all(size == 1 for size in mask.shape[:-1]):
        return mask.expand(*mask.shape[:-1], shape[-1]).reshape(1, shape[-1])
    return mask.expand(shape).reshape(rows, shape[-1])
