"""The public reads by index, :func:`weighted_gather` and :func:`product_key_read`: documentation and checks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnfast import _gather_autograd, _memory_autograd
from attnfast import _validate as check
from attnfast._memory import pick_count
from attnfast.reference import ProductKeyReadOutput, real_dtype

# --- weighted_gather ------------------------------------------------------------------------------------------------


def weighted_gather(
    indices: Tensor, weights: Tensor, values: Tensor, *, scales: Tensor | None = None, sparse_grad: bool = False
) -> Tensor:
    r"""Weighted sums of rows of a table, with a gradient that touches only the rows in use.

    .. math::
        out = \sum_j weights_j\; values_{indices_j}

    What ``torch.nn.functional.embedding_bag(mode="sum", per_sample_weights=...)`` computes, for any leading dimensions.

    Parameters
    ----------
    indices : Tensor
        Integer ``[..., K]``: slots from 0 to N - 1, or -1 for none. A pick of -1 takes no part, whatever its weight,
        and its weight has the gradient 0.
    weights : Tensor
        ``[..., K]``, of the shape of `indices`: the dtype of `values` or float32; with int8 `values` float32, bfloat16
        or float16. Differentiable.
    values : Tensor
        ``[N, D_v]``, any strides: float64, float32, bfloat16, float16, or int8 with `scales`. Differentiable, but for
        int8.
    scales : Tensor, optional
        float32 ``[N]``, needed with int8 `values` and only then: slot n holds ``scales[n] * values[n]``. Has no
        gradient.
    sparse_grad : bool
        If True, the gradient of `values` is a sparse COO tensor with one row for each slot that occurs, ascending
        (it is coalesced), in memory that does not depend on N: O(B K + rows D_v). What SparseAdam, Adagrad and SGD
        take. If False, a dense ``[N, D_v]``. Both hold the same bits.

    Returns
    -------
    Tensor
        ``[..., D_v]`` in the dtype of `weights`.

    Raises
    ------
    ValueError
        Shapes that do not fit, an index that is neither a slot nor -1 (on a GPU it counts as -1: looking would wait for
        the device), tensors on unsupported devices.
    TypeError
        Arguments of the wrong kind or dtype.
    NotImplementedError
        A sparse gradient under torch.compile, ``torch.func`` transforms or ``create_graph=True``.

    Notes
    -----
    - Sums and products are float32 (float64 in float64), ``autocast`` changes nothing.
    - Results and gradients do not depend on the number of threads: uses of a slot are added in the order of their
      positions, 256 at a time, and these sums in order.
    - A gradient that nobody asked for is not computed; with none for the weights, `values` is not even kept.
    - Derivatives of every order exist with ``sparse_grad=False``.

    Examples
    --------
    >>> import torch, attnfast
    >>> table = torch.randn(1000, 64, requires_grad=True)
    >>> indices, weights = torch.randint(0, 1000, (8, 32)), torch.rand(8, 32)
    >>> out = attnfast.weighted_gather(indices, weights, table, sparse_grad=True)
    >>> out.shape
    torch.Size([8, 64])
    >>> out.sum().backward()
    >>> table.grad.is_sparse and table.grad.is_coalesced()
    True
    """
    arguments = gather_call(indices, weights, values, scales=scales, sparse_grad=sparse_grad)
    out = _gather_autograd.weighted_gather(*arguments)
    return out.reshape(*indices.shape[:-1], values.shape[1])


def gather_call(
    indices: Tensor, weights: Tensor, values: Tensor, *, scales: Tensor | None = None, sparse_grad: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool]:
    """Arguments of ``_gather_autograd.weighted_gather`` for a call of :func:`weighted_gather`, checked."""
    check.flag("sparse_grad", sparse_grad)
    check.integers("indices", indices)
    check.floating("weights", weights)
    check.table("values", values, "D_v", "scales", scales)
    if indices.dim() < 1:
        raise ValueError("indices: expected at least 1 dimension [..., K], got []")
    if weights.shape != indices.shape:
        expected, got = check.shape_text(indices.shape), check.shape_text(weights.shape)
        raise ValueError(f"weights: expected [..., K] = {expected} (indices'), got {got}")
    _check_weights_dtype(weights, values)
    rows, picks = math.prod(indices.shape[:-1]), indices.shape[-1]
    flat = indices.to(torch.int64).reshape(rows, picks), weights.resolve_neg().reshape(rows, picks)
    return *flat, values.resolve_neg(), scales, sparse_grad


def _check_weights_dtype(weights: Tensor, values: Tensor) -> None:
    if values.dtype == torch.int8:
        allowed = {torch.float32, torch.bfloat16, torch.float16}
    else:
        allowed = {values.dtype} if values.dtype == torch.float64 else {values.dtype, torch.float32}
    if weights.dtype not in allowed:
        names = ", ".join(sorted(_name(dtype) for dtype in allowed))
        got = f"{_name(weights.dtype)} with values in {_name(values.dtype)}"
        raise TypeError(f"weights: expected dtype {names}, got {got}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- product_key_read -----------------------------------------------------------------------------------------------


def product_key_read(
    query: Tensor, row_keys: Tensor, column_keys: Tensor, values: Tensor, topk: int, *, scales: Tensor | None = None,
    sparse_grad: bool = False, return_aux: bool = False,
) -> Tensor | ProductKeyReadOutput:  # fmt: skip
    r"""Read a memory of n x n slots whose keys are all pairs of two sets of n half keys.

    .. math::
        s_{h,\,i n + j} &= query_{h,0} \cdot row\_keys_{h,i} + query_{h,1} \cdot column\_keys_{h,j} \\
        out &= \sum_h \sum_{m \in \mathrm{top}\,k(s_h)} \mathrm{softmax}(s_h)_m\; values_m

    The choice is exact. The k best of each half are found first; with both in order, the pair of the i-th and the j-th
    can be among the k best only if :math:`i j \le k`, and only such pairs are looked at (at most 119 for k = 32).

    Parameters
    ----------
    query : Tensor
        ``[..., H, 2, D/2]``: for each head its two halves. float64, float32, bfloat16 or float16.
    row_keys, column_keys : Tensor
        ``[H, n, D/2]``: the half keys of each head; float64 where `query` is, else any of the other dtypes.
    values : Tensor
        ``[n * n, D_v]``, shared by the heads; slot i n + j belongs to row key i and column key j. float64 where `query`
        is, else float32, bfloat16, float16, or int8 with `scales`.
    topk : int
        Slots a head reads, from 0 to the smaller of n * n and 2048.
    scales, sparse_grad
        See :func:`weighted_gather`.
    return_aux : bool
        Whether slots and weights are wanted too.

    Returns
    -------
    Tensor or ProductKeyReadOutput
        ``[..., D_v]`` in the dtype of `values` (of `query` for int8); with `return_aux` also ``indices [..., H, k]``,
        best first, and ``weights [..., H, k]``.

    Raises
    ------
    ValueError
        Shapes that do not fit, `topk` out of range, tensors on unsupported devices.
    TypeError
        Arguments of the wrong kind or dtype.

    Notes
    -----
    - Equal scores are taken in the order of their slots. Pairs are compared by the exact sums of the scores of their
      halves, which are float32 (float64 in float64): where rounding makes two sums equal, the larger comes first.
    - Gradients hold the choice fixed, as for :func:`topk_scores`. All are differentiable again but for a sparse one.
    - Beside the tables a call takes memory for the picks and the results; a step with ``sparse_grad=True`` too.

    References
    ----------
    Lample et al., "Large Memory Layers with Product Keys", NeurIPS 2019; Berges et al., "Memory Layers at Scale", 2024.

    Examples
    --------
    >>> import torch, attnfast
    >>> row_keys, column_keys = torch.randn(4, 100, 16), torch.randn(4, 100, 16)
    >>> values = torch.randn(100 * 100, 64)
    >>> attnfast.product_key_read(torch.randn(8, 4, 2, 16), row_keys, column_keys, values, 32).shape
    torch.Size([8, 64])
    """
    k = product_key_call(
        query, row_keys, column_keys, values, topk, scales=scales, sparse_grad=sparse_grad, return_aux=return_aux
    )
    real, n = real_dtype(query.dtype), row_keys.shape[1]
    leading, (heads, _, half) = query.shape[:-3], query.shape[-3:]
    rows = math.prod(leading)
    flat = query.resolve_neg().reshape(rows, heads, 2, half)
    candidates = min(k, n)
    best: list[Tensor] = []
    for at, keys in enumerate((row_keys.resolve_neg(), column_keys.resolve_neg())):
        found = [_memory_autograd.topk_scores(flat[:, h, at], keys[h], None, candidates, 1.0) for h in range(heads)]
        scores, indices = (
            torch.stack(parts, 1).flatten(0, 1) if heads else flat.new_empty((0, candidates), dtype=dtype)
            for parts, dtype in zip(zip(*found, strict=True) if heads else ((), ()), (real, torch.int64), strict=True)
        )
        best += [scores, indices]
    row_scores, row_indices, column_scores, column_indices = best
    slots, row_ranks, column_ranks = _gather_autograd.product_keys(
        row_scores, row_indices, column_scores, column_indices, n, k
    )
    weights = _softmax(row_scores.gather(-1, row_ranks) + column_scores.gather(-1, column_ranks))
    slots, weights = slots.reshape(rows, heads * k), weights.reshape(rows, heads * k)
    output = _gather_autograd.weighted_gather(slots, weights, values.resolve_neg(), scales, sparse_grad)
    output = output.reshape(*leading, values.shape[1]).to(query.dtype if values.dtype == torch.int8 else values.dtype)
    if not return_aux:
        return output
    shape = (*leading, heads, k)
    return ProductKeyReadOutput(output, slots.reshape(shape), weights.reshape(shape))


def product_key_call(
    query: Tensor, row_keys: Tensor, column_keys: Tensor, values: Tensor, topk: int, *, scales: Tensor | None = None,
    sparse_grad: bool = False, return_aux: bool = False,
) -> int:  # fmt: skip
    """Check a call of :func:`product_key_read`; returns k."""
    check.flag("sparse_grad", sparse_grad)
    check.flag("return_aux", return_aux)
    for name, x in (("query", query), ("row_keys", row_keys), ("column_keys", column_keys)):
        check.floating(name, x)
    check.table("values", values, "D_v", "scales", scales)
    _check_product_shapes(query, row_keys, column_keys, values)
    real = real_dtype(query.dtype)
    for name, x in (("row_keys", row_keys), ("column_keys", column_keys), ("values", values)):
        if real_dtype(x.dtype) != real:
            got = f"{_name(x.dtype)} with a query of {_name(query.dtype)}"
            raise TypeError(f"{name}: expected float64 if query is and only then, got {got}")
    n = row_keys.shape[1]
    return pick_count("topk", topk, n * n, "n * n")


def _softmax(scores: Tensor) -> Tensor:
    """Over the last dimension, which is in descending order.

    The derivatives of these operations do not depend on the number of threads; the last bits of the backward of
    ``torch.softmax`` do.
    """
    powers = (scores - scores[..., :1].detach()).exp()
    return powers / powers.sum(-1, keepdim=True)


def _check_product_shapes(query: Tensor, row_keys: Tensor, column_keys: Tensor, values: Tensor) -> None:
    if query.dim() < 3 or query.shape[-2] != 2:
        raise ValueError(f"query: expected [..., H, 2, D/2], got {check.shape_text(query.shape)}")
    heads, _, half = query.shape[-3:]
    if row_keys.dim() != 3 or row_keys.shape[0] != heads or row_keys.shape[2] != half:
        expected = f"[H, n, D/2] with H = {heads} and D/2 = {half} (query's)"
        raise ValueError(f"row_keys: expected {expected}, got {check.shape_text(row_keys.shape)}")
    if column_keys.shape != row_keys.shape:
        expected, got = check.shape_text(row_keys.shape), check.shape_text(column_keys.shape)
        raise ValueError(f"column_keys: expected [H, n, D/2] = {expected} (row_keys'), got {got}")
    n = row_keys.shape[1]
    if values.shape[0] != n * n:
        got = check.shape_text(values.shape)
        raise ValueError(f"values: expected [n * n, D_v] with n * n = {n * n} (n = {n} row keys), got {got}")
