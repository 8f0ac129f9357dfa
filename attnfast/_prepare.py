"""From a user's call to the one form the lower layers know: checked 4-D tensors and plain options.

Leading batch dimensions are folded into one by views, a float mask becomes a bias, and the scores ``cosine`` and ``l2``
become plain dot products of prepared queries and keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnfast import _local
from attnfast import _validate as check
from attnfast._normalized import is_normalized, prior_operand, sample_seed
from attnfast._scores import l2_operands
from attnfast.ops import DotAttentionOptions, draw_seed, ordinary_call
from attnfast.reference import AttentionOutput, SampledAttentionOutput, real_dtype, unit_vectors


class Call(NamedTuple):
    """Arguments of ``autograd.dot_attention``, positional, and what gives its results the caller's shape and dtype."""

    arguments: tuple[Any, ...]
    dtype: torch.dtype
    leading: tuple[int, ...] | None  # [..., H]; () for 2-D operands, None for packed ones
    extras: bool  # an AttentionOutput is wanted
    jagged: Any = None  # the query [B, j, H, D] of a call with nested tensors
    normalizer: str = "softmax"
    prior: Any = None


def default_scale(score: str, head_size: int) -> float:
    return head_size**-0.5 if score == "scaled_dot" and head_size else 1.0


def short_sdpa_call(
    query: Any, key: Any, value: Any, attn_mask: Any, is_causal: bool, scale: Any, head_size: int
) -> tuple[Any, ...] | None:
    """Arguments of ``autograd.dot_attention`` for ordinary operands with an ordinary mask or scale.

    `head_size` is what ``ops.ordinary_call`` said, without its sign; where it said 0, three dimensions are tried as
    ``[1, H, T, D]``. None sends the call the long way, :func:`sdpa_call`, which also finds the words for what is wrong.
    A mask that wants a gradient goes there as well: it must stay in its own shape.
    """
    try:
        if not head_size:
            if query.dim() != 3 or (attn_mask is not None and attn_mask.dim() > 3):
                return None
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            head_size = abs(ordinary_call(query, key, value))
            if not head_size:
                return None
        if scale is None:
            scale = default_scale("scaled_dot", head_size)
        elif type(scale) is not float or not -check.LARGEST <= scale <= check.LARGEST:
            return None
        mask = bias = None
        if attn_mask is not None:
            if attn_mask.layout is not torch.strided or not attn_mask.is_cpu:
                return None
            # One view that also checks the shape; a stride of 0 is what the kernels understand by broadcasting.
            expanded = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
            if attn_mask.dtype is torch.bool:
                mask = expanded
            elif attn_mask.dtype is query.dtype and not attn_mask.requires_grad and not attn_mask.is_neg():
                bias = expanded
            else:
                return None
    except (AttributeError, RuntimeError, TypeError):
        return None
    options = DotAttentionOptions(mask, scale=scale, causal=int(is_causal))
    return query, key, value, bias, None, None, options, False


def sdpa_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Call:
    """Prepare a call of ``functional.scaled_dot_product_attention``."""
    check.flag("is_causal", is_causal)
    check.flag("enable_gqa", enable_gqa)
    causal = "top_left" if is_causal else None
    if _is_jagged(query, key, value):
        check.absent("attn_mask", attn_mask, "jagged nested tensors")
        return _jagged_call(query, key, value, causal=causal, scale=scale, dropout_p=dropout_p)
    query, key, value = _operands(query, key, value)
    check.ranks(query, key, value)
    if query.dim() > 2:  # heads broadcast like batch dimensions
        if not enable_gqa:
            named = [("query", query.shape[:-2]), ("key", key.shape[:-2]), ("value", value.shape[:-2])]
            what = "leading dimensions [..., H] (enable_gqa=True allows H_kv that divides H)"
            heads = check.broadcast(named, what)[-1]
            if not query.shape[-3] == key.shape[-3] == value.shape[-3]:
                query, key, value = (x.expand(*x.shape[:-3], heads, -1, -1) for x in (query, key, value))
        elif key.shape[-3] != value.shape[-3]:
            # torch lets key and value differ in heads here; one of them has to be repeated then.
            check.shapes(query, key, value, equal_heads=False)
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    options: dict[str, Any] = {"mask": attn_mask, "causal": causal, "scale": scale, "dropout_p": dropout_p}
    return _call(query, key, value, mask_name="attn_mask", **options)


def attention_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    normalizer: str = "softmax",
    prior: Any = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    return_lse: bool = False,
    return_weights: bool | str = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    **options: Any,
) -> Call:
    """Prepare a call of ``functional.attention``."""
    check.choice("normalizer", normalizer, check.NORMALIZERS)
    if _is_jagged(query, key, value):
        for name, x in (
            ("mask", mask),
            ("bias", bias),
            ("query_lengths", query_lengths),
            ("key_lengths", key_lengths),
            ("return_lse", return_lse or None),
            ("return_weights", return_weights or None),
            ("prior", prior),
            ("window_center", options.get("window_center")),
        ):
            check.absent(name, x, "jagged nested tensors (use varlen_attention)")
        return _jagged_call(query, key, value, normalizer=normalizer, **options)
    plain = not torch.compiler.is_compiling() and ordinary_call(query, key, value) != 0
    call = _call(
        *((query, key, value) if plain else _operands(query, key, value)),
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        return_lse=return_lse,
        return_weights=return_weights,
        mask=mask,
        bias=bias,
        plain=plain,
        **options,
    )
    return call if normalizer == "softmax" and prior is None else _normalized(call, normalizer, prior)


def _normalized(call: Call, normalizer: str, prior: Any) -> Call:
    """A call with a normaliser other than softmax, or with a prior; a Gaussian one after a softmax is the kernels'."""
    query, key, *modifiers, options, return_lse = call.arguments
    prior = prior_operand(prior, query, key.shape[2], call.leading)
    if not is_normalized(normalizer, prior):
        options, center = options._replace(prior_sigma=prior[2]), _local.gaussian_center(prior[1], query)
        return call._replace(arguments=(query, key, *modifiers, options, return_lse, center))
    arguments = (query, key, *modifiers, sample_seed(normalizer, options), return_lse)
    return call._replace(arguments=arguments, normalizer=normalizer, prior=prior)


def varlen_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    normalizer: str = "softmax",
    prior: Any = None,
    **options: Any,
) -> Call:
    """Prepare a call of ``functional.varlen_attention``."""
    check.choice("normalizer", normalizer, check.NORMALIZERS)
    query, key, value = _operands(query, key, value)
    check.shapes(query, key, value, packed=True)
    check.length_bound("max_seqlen_q", max_seqlen_q)
    check.length_bound("max_seqlen_k", max_seqlen_k)
    cu_seqlens = _cu_seqlens(cu_seqlens_q, cu_seqlens_k)
    query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    call = _call(query, key, value, cu_seqlens=cu_seqlens, **options)
    return call if normalizer == "softmax" and prior is None else _normalized(call, normalizer, prior)


def finish(call: Call, out: Tensor, lse: Tensor | None, weights: Tensor | None, log_prob: Tensor | None = None) -> Any:
    """Give the results of ``autograd.dot_attention`` the shape and dtype that the caller expects."""
    if call.leading is None:
        out = out.squeeze(0).transpose(0, 1)
    elif len(call.leading) != 2:  # [B, H, ...] came in and goes out as it is
        out = out.reshape(*call.leading, *out.shape[2:])
    if out.dtype is not call.dtype:
        out = out.to(call.dtype)
    if call.jagged is not None:
        query = call.jagged
        sizes = {"min_seqlen": query._get_min_seqlen(), "max_seqlen": query._get_max_seqlen()}
        return torch.nested.nested_tensor_from_jagged(out, query.offsets(), **sizes).transpose(1, 2)
    if not call.extras:
        return out
    if weights is not None and call.arguments[6].weights_mode == check.WEIGHTS_MODES["full"]:
        weights = weights.to(call.dtype)  # sums and maxima stay in the accumulation type
    lse, weights, log_prob = (_unfold(x, call.leading) for x in (lse, weights, log_prob))
    if log_prob is not None:
        return SampledAttentionOutput(out, lse, weights, log_prob)
    return AttentionOutput(out, lse, weights)


def _unfold(x: Tensor | None, leading: tuple[int, ...] | None) -> Tensor | None:
    if x is None or (leading is not None and len(leading) == 2):
        return x
    return x.squeeze(0) if leading is None else x.reshape(*leading, *x.shape[2:])


# --- tensors one by one ---------------------------------------------------------------------------------------------


def _operands(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Checked for kind and dtype, after what autocast does to torch's own function; no negative bits remain."""
    if isinstance(query, Tensor) and _autocast_enabled(query):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = _autocast(query, dtype), _autocast(key, dtype), _autocast(value, dtype)
    check.operands(query, key, value)
    return query.resolve_neg(), key.resolve_neg(), value.resolve_neg()


def _autocast_enabled(x: Tensor) -> bool:
    kind = x.device.type
    # Dynamo of torch 2.10 cannot trace the question whether a kind of device has autocast, which these two have.
    known = kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)
    return known and torch.is_autocast_enabled(kind)


def _autocast(x: Any, dtype: torch.dtype) -> Any:
    eligible = isinstance(x, Tensor) and x.dtype in check.DTYPES and x.dtype is not torch.float64
    return x.to(dtype) if eligible else x


def _score_shaped(name: str, x: Any, query: Tensor, names: str, target: Sequence[int], batch: Sequence[int]) -> Tensor:
    """A mask or bias as a 4-D tensor broadcastable to ``[B, H, T_q, T_k]``."""
    if isinstance(x, Tensor) and x.dtype is torch.bool and name != "bias":
        check.tensor(name, x)
    else:
        if _autocast_enabled(query):
            x = x if isinstance(x, Tensor) and x.dtype is torch.float32 else _autocast(x, query.dtype)
        check.score_bias(name, x, query)
        x = x.resolve_neg()
    check.broadcastable(name, x, names, target)
    return check.fold_score_shaped(x, batch, 3)


def _lengths(name: str, x: Tensor, batch: Sequence[int]) -> Tensor:
    check.integers(name, x)
    check.broadcastable(name, x, "the batch dimensions [...]", batch)
    return x.to(torch.int64).expand(batch).reshape(-1).contiguous()


def _cu_seqlens(cu_q: Any, cu_k: Any) -> tuple[Tensor, Tensor]:
    wanted = frozenset({torch.int64, torch.int32})
    for name, x in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        check.integers(name, x, wanted)
        if x.dim() != 1 or x.shape[0] == 0:
            raise ValueError(f"{name}: expected 1 dimension [N + 1] for N sequences, got {check.shape_text(x.shape)}")
    if cu_q.shape != cu_k.shape:
        raise ValueError(f"cu_seqlens_k: expected [N + 1] = {check.shape_text(cu_q.shape)} (cu_seqlens_q's), "
                         f"got {check.shape_text(cu_k.shape)}")  # fmt: skip
    return cu_q.to(torch.int64).contiguous(), cu_k.to(torch.int64).contiguous()


def _alibi(x: Tensor, names: str, target: Sequence[int], real: torch.dtype) -> Tensor:
    check.floating("alibi_slopes", x)
    if x.requires_grad:
        raise ValueError("alibi_slopes: has no gradient, got a tensor with requires_grad=True; use .detach() or a bias")
    if x.dim() == 0:
        raise ValueError(f"alibi_slopes: expected [H] or {names}, got a 0-dimensional tensor")
    check.broadcastable("alibi_slopes", x, names, target)
    x = x.to(real).resolve_neg().expand(*x.shape[:-1], target[-1])
    return check.fold_score_shaped(x, target[:-1], 1)


def _sink(x: Tensor, heads: int, real: torch.dtype) -> Tensor:
    check.floating("sink", x)
    if x.dim() != 1 or x.shape[0] != heads:
        raise ValueError(f"sink: expected [H] = [{heads}], got {check.shape_text(x.shape)}")
    return x.to(real).resolve_neg().contiguous()


# --- the whole call -------------------------------------------------------------------------------------------------


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: str = "scaled_dot",
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: str | None = None,
    window: tuple[int, int] | None = None,
    window_center: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    return_weights: bool | str = False,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
    mask_name: str = "mask",
    plain: bool = False,
) -> Call:
    """Check the rest of a call whose operands passed :func:`_operands`; packed operands come as ``[H, total, D]``.

    `plain`: they passed ``ops.ordinary_call``, so their shapes need no second look.
    """
    # What is left out costs one comparison: the checks of a small problem must not take longer than the problem.
    check.choice("score", score, check.SCORES)
    left, right = (-1, -1) if window is None else check.window_sizes(window)
    code = 0 if causal is None else check.causal_code(causal)
    mode = 0 if return_weights is False else check.weights_mode(return_weights)
    softcap, dropout_p = check.softcap(softcap), check.dropout(dropout_p)
    return_lse = check.flag("return_lse", return_lse)
    packed, matrix = cu_seqlens is not None, query.dim() == 2
    if not (packed or plain):
        check.shapes(query, key, value)
    scale = default_scale(score, query.shape[-1]) if scale is None else check.number("scale", scale)

    if matrix:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    if plain:
        batch: tuple[int, ...] = (query.shape[0],)
    else:
        named = [("query", query.shape[:-3]), ("key", key.shape[:-3]), ("value", value.shape[:-3])]
        batch = check.broadcast(named, "batch dimensions [...]")
    heads, pairs = query.shape[-3], (query.shape[-2], key.shape[-2])
    dtype, real = query.dtype, real_dtype(query.dtype)
    pattern = "[T_q, T_k]" if matrix else "[H, total_q, total_k]" if packed else "[..., H, T_q, T_k]"
    target = pairs if matrix else (*batch, heads, *pairs)

    boolean, biases = None, []
    if bias is not None:
        biases.append(_score_shaped("bias", bias, query, pattern, target, batch))
    if mask is not None:
        folded = _score_shaped(mask_name, mask, query, pattern, target, batch)
        if folded.dtype is torch.bool:
            boolean = folded
        else:
            biases.append(folded)  # the first free slot: the kernels look at the second only if the first is taken
    bias1, bias2 = (*biases, None, None)[:2]
    cu_q, cu_k = (None, None) if cu_seqlens is None else cu_seqlens
    alibi = None
    if alibi_slopes is not None:
        samples = batch if cu_q is None else (cu_q.shape[0] - 1,)
        alibi = _alibi(alibi_slopes, "[N, H]" if packed else "[..., H]", (*samples, heads), real)
    bounds = None
    if window_center is not None:
        rows = f"{pattern.rpartition(',')[0]}]"
        _local.window_center(window_center, window, rows, target[:-1])
        bounds = _local.window_bounds(window_center, left, right, key.shape[-2])
        bounds, left, right = check.fold_score_shaped(bounds, batch, 3), -1, -1
    options = DotAttentionOptions(
        boolean,
        None if query_lengths is None else _lengths("query_lengths", query_lengths, batch),
        None if key_lengths is None else _lengths("key_lengths", key_lengths, batch),
        cu_q,
        cu_k,
        alibi,
        draw_seed() if dropout_p > 0 else None,
        bounds,
        scale,
        softcap,
        dropout_p,
        0.0,
        code,
        left,
        right,
        mode,
    )
    logit = None if sink is None else _sink(sink, heads, real)
    if not plain:
        query, key, value = check.fold(query, batch), check.fold(key, batch), check.fold(value, batch)
    if score == "cosine":
        query, key = unit_vectors(query).to(dtype), unit_vectors(key).to(dtype)
    elif score == "l2":
        query, key = l2_operands(query.to(real), key.to(real))
        value = value.to(real)
    arguments = (query, key, value, bias1, bias2, logit, options, return_lse)
    leading = None if packed else () if matrix else (*batch, heads)
    return Call(arguments, dtype, leading, return_lse or mode != 0)


# --- jagged nested tensors ------------------------------------------------------------------------------------------


def _is_jagged(*tensors: Any) -> bool:
    return all(isinstance(x, Tensor) and x.is_nested and x.layout is torch.jagged for x in tensors)


def _jagged_call(query: Any, key: Any, value: Any, **options: Any) -> Call:
    """``[B, H, j, D]`` nested tensors (``[B, j, H, D]`` transposed, as torch asks for) through the packed path."""
    packed = []
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4 or x._ragged_idx != 2 or x._lengths is not None:
            raise ValueError(
                f"{name}: expected a jagged nested tensor [B, H, j, D] without holes, made by transposing [B, j, H, D]"
            )
        packed.append(x.transpose(1, 2))
    q, k, v = packed
    for name, x in (("key", k), ("value", v)):
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: expected B = {q.shape[0]} (query's) sequences, got {x.shape[0]}")
    if k.offsets() is not v.offsets() and not torch.equal(k.offsets(), v.offsets()):
        raise ValueError("value: expected the sequence lengths j of key, got different ones")
    longest = q._get_max_seqlen(), k._get_max_seqlen()
    call = varlen_call(q.values(), k.values(), v.values(), q.offsets(), k.offsets(), *longest, **options)
    return call._replace(jagged=q)
