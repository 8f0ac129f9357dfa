"""``explain``: which kernel a call would take, and why not a faster one. The memory functions: `_explain_memory`.

The call is checked and prepared exactly as a real one; then the layers below are asked: ``autograd.plan`` for the route
and the binary for the kernel. One rule is written a second time, because where it counts there is no time for a call:
which plain calls go past the preparation (`_keeps_no_lse`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnfast import _additive, _cuda_ops, _explain_memory, _prepare, autograd, functional, ops, reference
from attnfast import _explain_text as text
from attnfast._ext import _C
from attnfast._normalized import is_normalized
from attnfast.ops import DotAttentionOptions

_WEIGHTS = {1: "the full weights", 2: "the weights' column sums", 3: "the weights' row maxima"}


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Name the kernel that ``fn(*args, **kwargs)`` would take, and why not the faster ones. Nothing is computed.

    Parameters
    ----------
    fn : callable
        A public attention or memory function of attnfast (or of ``attnfast.reference``).
    *args, **kwargs
        Its arguments, checked as in a real call and with the same errors.

    Returns
    -------
    str
        A few lines: function and shapes, route, kernel with ISA and arithmetic, and what keeps the call from a faster
        kernel. What a call is made of (:func:`attnfast.memory_read`, :func:`attnfast.product_key_read`) is indented.

    Raises
    ------
    TypeError
        `fn` is not one of those functions.
    ValueError, TypeError
        What the call itself would raise.

    Examples
    --------
    >>> import torch, attnfast
    >>> q = torch.zeros(1, 2, 16, 8)
    >>> print(attnfast.explain(attnfast.attention, q, q, q).splitlines()[0])
    attention: query [1, 2, 16, 8], key [1, 2, 16, 8], value [1, 2, 16, 8], float32
    """
    known: dict[Callable[..., Any], Callable[..., _prepare.Call]] = {
        functional.attention: _prepare.attention_call,
        functional.scaled_dot_product_attention: _prepare.sdpa_call,
        functional.varlen_attention: _prepare.varlen_call,
        reference.attention: _prepare.attention_call,
        reference.scaled_dot_product_attention: _prepare.sdpa_call,
        reference.varlen_attention: _prepare.varlen_call,
    }
    prepare = known.get(fn)
    additive = fn in (_additive.additive_attention, reference.additive_attention)
    memory = _explain_memory.FUNCTIONS.get(fn)
    if memory is not None:
        return "\n".join(memory(fn, explain, args, kwargs))
    if prepare is None and not additive:
        public = (*functional.__all__, "additive_attention", *_explain_memory.NAMES)
        names = ", ".join(name for name in public if not name.endswith("Output"))
        raise TypeError(f"fn: expected one of attnfast's functions {names}, got {getattr(fn, '__name__', fn)!r}")
    with torch.random.fork_rng(devices=[]):  # preparing a call draws its dropout seed
        vectors: list[Any] = []
        if prepare is not None:
            call = prepare(*args, **kwargs)
        else:
            call, *vectors, _ = _additive.additive_call(*args, **kwargs)
    *tensors, options, return_lse = call.arguments[:8]
    tensors += call.arguments[8:] or [None]
    lines = [_headline(fn, call)]
    if fn.__module__ == reference.__name__:
        return "\n".join([*lines, "kernel: none; attnfast.reference is plain PyTorch by definition"])
    if is_normalized(call.normalizer, call.prior):
        return "\n".join([*lines, *_normalized(call)])
    route = autograd.plan(*tensors, *(x for x in vectors if x is not None))
    lines.append(text.route_line(route, "O(T_q T_k) memory"))
    if route == "reference":
        return "\n".join([*lines, "kernel: none"])
    need_lse = return_lse or options.weights_mode != 0 or (route != "kernel" and not _keeps_no_lse(fn, args, kwargs))
    lines += _kernel(tensors, options, need_lse, additive)
    lines += _preparation(kwargs.get("score", "scaled_dot"))
    return "\n".join(lines)


def _headline(fn: Callable[..., Any], call: _prepare.Call) -> str:
    query, key, value, *_ = call.arguments
    options = call.arguments[6]
    shapes = text.shapes(query=query, key=key, value=value)
    packed = "" if options.cu_seqlens_q is None else f", {options.cu_seqlens_q.shape[0] - 1} packed sequences"
    return f"{fn.__name__}: {shapes}, {text.dtype_name(call.dtype)}{packed}"


def _normalized(call: _prepare.Call) -> list[str]:
    wanted = [] if call.normalizer == "softmax" else [f"normalizer {call.normalizer!r}"]
    wanted += [] if call.prior is None else ["a prior" if wanted else "a tensor as prior"]
    return [
        "route: torch, plain PyTorch operations in O(T_q T_k) memory; torch gives the derivatives, of every order",
        f"kernel: none; {' and '.join(wanted)} {'have' if len(wanted) > 1 else 'has'} no fused kernel",
    ]


def _kernel(tensors: list[Any], options: DotAttentionOptions, need_lse: bool, additive: bool) -> list[str]:
    query, key, value, bias, bias2, sink, center = tensors
    arithmetic = text.arithmetic(query.dtype)
    if not all(text.is_readable(x) for x in (*tensors, *options[: ops.N_OPTION_TENSORS])):
        return [f"kernel: chosen when real tensors arrive (these carry none); ISA {text.isa()}, {arithmetic}"]
    if query.is_cuda and not additive:
        return _cuda_kernel(query, key, value)
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    mask, bias, bias2 = (None if x is None else x.expand(shape) for x in (options.mask, bias, bias2))
    alibi = options.alibi_slopes
    if alibi is not None:
        rows = shape[0] if options.cu_seqlens_q is None else options.cu_seqlens_q.shape[0] - 1
        alibi = alibi.expand(rows, shape[1])
    bounds = None if options.window_bounds is None else options.window_bounds.expand(*shape[:3], 2)
    rest = (_detached(sink), _detached(center), options.seed, bounds)
    scalars = options[ops.N_OPTION_TENSORS + additive : -1]  # the additive core has no scale
    modifiers: list[Any] = [mask, _detached(bias), _detached(bias2), *options[1:5], alibi, *rest, *scalars]
    ask = _C.additive_attention_decode_obstacle if additive else _C.dot_attention_decode_obstacle
    obstacle = ask(query.detach(), key.detach(), value.detach(), *modifiers)
    if obstacle is None and need_lse and not additive:
        obstacle = "lse is wanted (returned, for weights or for a gradient), and must match the scores of tiles"
    name = "decode kernel (streams keys and values once)" if obstacle is None else "tile kernel"
    if options.cu_seqlens_q is not None:
        name = "tile kernel over packed sequences"
    if obstacle is not None and not additive and query.dtype == torch.bfloat16 and text.isa() == "avx512_bf16":
        arithmetic = "products of bfloat16, sums in float32"
    lines = [f"kernel: {name}, ISA {text.isa()}, {arithmetic}"]
    if obstacle is not None:
        lines.append(f"not the decode kernel: {obstacle}")
    if options.weights_mode:
        lines.append(f"second pass: writes {_WEIGHTS[options.weights_mode]}, recomputing the scores")
    return lines + text.isa_lines()


def _cuda_kernel(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    name = _cuda_ops.dot_attention_kernel(query.detach(), key.detach(), value.detach())
    if "_mma" in name:
        products = "float32 rounded to tf32" if query.dtype == torch.float32 else text.dtype_name(query.dtype)
        return [f"kernel: {name}, on CUDA, products of {products} on tensor cores, sums in float32"]
    lines = [f"kernel: {name}, on CUDA, {text.arithmetic(query.dtype)}"]
    if query.dtype == torch.float32 and not _cuda_ops.allows_tf32():
        lines.append("not tensor cores: torch.backends.cuda.matmul.fp32_precision does not allow tf32")
    elif query.dtype != torch.float64:
        of = 16 // query.element_size()
        lines.append(
            f"not tensor cores: they take D and D_v that are multiples of {of} up to 256, and rows without gaps that "
            "start at multiples of 16 bytes"
        )
    return lines


def _keeps_no_lse(fn: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether a call that records a gradient is one of ``autograd.WholeRowFunction``, whose forward wants no lse.

    That is a plain call of few keys: what the heads of the two functions in `functional` let through.
    """
    if fn not in (functional.attention, functional.scaled_dot_product_attention):
        return False
    signature = inspect.signature(fn)
    given = signature.bind(*args, **kwargs).arguments
    free = {"query", "key", "value", "causal"}
    if fn is functional.scaled_dot_product_attention:
        free = {"query", "key", "value", "is_causal", "scale", "enable_gqa"}
    for name, x in given.items():
        default = signature.parameters[name].default
        if name not in free and x is not default and not (type(x) in (int, float, str) and x == default):
            return False
    if torch.compiler.is_compiling() or type(given.get("scale", 1.0)) not in (float, type(None)):
        return False
    query, key, value = (given[name] for name in ("query", "key", "value"))
    return bool(ops.ordinary_call(query, key, value) < 0 and key.shape[2] <= ops.WHOLE_ROW_KEYS)


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _preparation(score: str) -> list[str]:
    """What happens in torch before the kernel runs."""
    if score == "cosine":
        return ["preparation: query and key are normalised by torch operations first"]
    if score == "l2":
        return ["preparation: query and key get two more columns by torch operations first (|q|^2 and |k|^2)"]
    return []
