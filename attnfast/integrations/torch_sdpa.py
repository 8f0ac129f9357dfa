"""torch.nn.functional.scaled_dot_product_attention on attnfast's kernels, for models whose code is not to be touched.

Two ways, neither of which is on by itself:

``enable()``, ``disable()``
    torch's own registry of attention implementations (``torch.nn.attention.register_flash_attention_impl``): attnfast
    replaces the CPU's flash kernels below autograd, for the whole process, ``torch.compile`` included. torch decides
    which calls come there: 4-D, no dropout, D_v == D, last stride 1, a mask without a gradient.
``override()``
    A block of code in which every call goes to :func:`attnfast.scaled_dot_product_attention`, whatever its arguments:
    dropout, other dimensions, strides and sizes, gradients of the mask.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.overrides import TorchFunctionMode

from attnfast import functional, ops
from attnfast._prepare import default_scale
from attnfast.ops import LN2, DotAttentionOptions

__all__ = ["disable", "enable", "is_enabled", "override"]

NAME = "attnfast"
_lock = threading.Lock()


def _options(
    query: Tensor, dropout_p: float, is_causal: bool, attn_mask: Tensor | None, scale: float | None
) -> tuple[Tensor | None, DotAttentionOptions]:
    """The bias and the options of a call that torch has checked and prepared."""
    if dropout_p != 0.0:
        raise ValueError(f"dropout_p: torch's CPU flash operator has no dropout, got {dropout_p}")
    mask = bias = None
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        mask, bias = (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)
    scale = default_scale("scaled_dot", query.shape[3]) if scale is None else scale
    return bias, DotAttentionOptions(mask=mask, scale=scale, causal=int(is_causal))


def _tokens_first(x: Tensor) -> Tensor:
    """The layout that torch promises of these operators' results to torch.compile: [B, T, H, D] in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False, *,
    attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    bias, options = _options(query, dropout_p, is_causal, attn_mask, scale)
    out, lse, _, _ = ops.dot_attention_fwd(query, key, value, bias, None, None, None, options, True)
    assert lse is not None
    return out, _tokens_first(lse * LN2)


def _backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, dropout_p: float,
    is_causal: bool, *, attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    bias, options = _options(query, dropout_p, is_causal, attn_mask, scale)
    lse = (logsumexp * (1.0 / LN2)).contiguous()
    needs = (True, True, True, False, False, False, False)
    grads = ops.dot_attention_bwd(
        grad_out, None, None, query, key, value, out, lse, None, None, bias, None, None, None, options, needs
    )
    query_grad, key_grad, value_grad = (_tokens_first(grad) for grad in grads[:3] if grad is not None)
    return query_grad, key_grad, value_grad


class _Registration:
    """The handle that torch keeps while the implementation is active; ``remove`` gives the operators back."""

    def __init__(self) -> None:
        operator = "_scaled_dot_product_flash_attention_for_cpu"
        self._library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            # torch warns that a kernel of its own is overridden, which is what was asked for.
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            self._library.impl(operator, _forward, "CPU", allow_override=True)
            self._library.impl(f"{operator}_backward", _backward, "CPU", allow_override=True)

    def remove(self) -> None:
        self._library._destroy()


def enable() -> None:
    """Give torch's CPU flash attention to attnfast, for the whole process, until :func:`disable`.

    Calls of ``torch.nn.functional.scaled_dot_product_attention`` that torch would have taken to its own flash kernel on
    CPUs take attnfast's; :func:`override` reaches the others. A query that sees no key has output 0. A second call
    changes nothing. An implementation that somebody else has activated is deactivated, as torch does it.

    Raises
    ------
    RuntimeError
        This torch has no ``torch.nn.attention.register_flash_attention_impl``.

    Examples
    --------
    >>> import torch
    >>> from attnfast.integrations import torch_sdpa
    >>> q = torch.randn(1, 2, 5, 8)
    >>> expected = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    >>> torch_sdpa.enable()
    >>> torch.testing.assert_close(torch.nn.functional.scaled_dot_product_attention(q, q, q), expected)
    >>> torch_sdpa.disable()
    """
    register = getattr(torch_attention, "register_flash_attention_impl", None)
    if register is None:
        raise RuntimeError(
            f"torch {torch.__version__} has no torch.nn.attention.register_flash_attention_impl; "
            "attnfast.integrations.torch_sdpa.override() needs none"
        )
    with _lock:
        if not is_enabled():
            register(NAME, register_fn=_Registration)
            torch_attention.activate_flash_attention_impl(NAME)


def disable() -> None:
    """Give torch's operators back to torch. Nothing happens if they are not attnfast's."""
    with _lock:
        if is_enabled():
            torch_attention.restore_flash_attention_impl()


def is_enabled() -> bool:
    """Whether torch's CPU flash attention is attnfast's now."""
    current = getattr(torch_attention, "current_flash_attention_impl", None)
    return current is not None and current() == NAME


class override(TorchFunctionMode):
    """Context manager: every ``scaled_dot_product_attention`` within is attnfast's, whatever its arguments.

    It holds for the thread that entered it, also for code that took the function before. Within, each torch function
    costs about a microsecond more: torch asks the mode about it.

    Examples
    --------
    >>> import torch
    >>> from attnfast.integrations import torch_sdpa
    >>> q = torch.randn(2, 5, 8)
    >>> with torch_sdpa.override():
    ...     out = torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.1)
    >>> out.shape
    torch.Size([2, 5, 8])
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        if func is torch.nn.functional.scaled_dot_product_attention:
            func = functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))
