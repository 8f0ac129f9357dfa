"""timm's vision models on attnfast's kernels.

    from attnfast.integrations import timm as attnfast_timm
    model = timm.create_model("vit_base_patch16_224")
    attnfast_timm.replace_attention(model)

timm's attention modules have a flag, ``fused_attn``: with it they call torch's ``scaled_dot_product_attention``,
without it they compute the matrix of weights. The flag is set, also where timm leaves it off (swin, visformer, xcit),
and the ``forward`` of each such module runs within :class:`attnfast.integrations.torch_sdpa.override`. What a module
does around the call is timm's own code. timm itself is not imported here: the flag says which modules are meant.

Source of the flag: https://github.com/huggingface/pytorch-image-models, timm/layers/config.py.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from attnfast.integrations import torch_sdpa
from attnfast.integrations._replace import Replacement, check_module

__all__ = ["Replacement", "replace_attention", "replacements", "restore_attention"]

_Module = TypeVar("_Module", bound=nn.Module)


class _Before(NamedTuple):
    """What a module was before its attention was replaced."""

    fused: bool


def _forward(module: nn.Module, before: _Before, *args: Any, **kwargs: Any) -> Any:
    """The class's own forward, in which torch's function is attnfast's."""
    with torch_sdpa.override():
        return type(module).forward(module, *args, **kwargs)


def _before(module: nn.Module) -> _Before | None:
    """What a replaced module was, None for any other; it travels with copies and pickles of the module."""
    forward = vars(module).get("forward")
    return forward.args[1] if isinstance(forward, functools.partial) and forward.func is _forward else None


def _refusal(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted: its code is fixed"
    if "forward" in vars(module):
        return "its forward was replaced already"
    return ""


def replacements(model: nn.Module) -> list[Replacement]:
    """What :func:`replace_attention` has done, or would do, with each module that has a flag ``fused_attn``.

    Examples
    --------
    >>> from attnfast.integrations import timm as attnfast_timm
    >>> attnfast_timm.replacements(torch.nn.Linear(2, 2))
    []
    """
    found = []
    for name, module in model.named_modules():
        if hasattr(module, "fused_attn"):
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            replaced = _before(module) is not None
            found.append(Replacement(name, kind, replaced, "" if replaced else _refusal(module) or "not replaced yet"))
    return found


def replace_attention(model: _Module) -> _Module:
    """Give the attention of a timm model to attnfast, in place.

    Every module with timm's flag ``fused_attn`` takes timm's fused path from then on, and in it
    :func:`attnfast.scaled_dot_product_attention`. Parameters, hooks and training state stay, because the modules do; a
    second call changes nothing. Attention that has no fused path in timm (levit, swin v2) is not concerned.
    :func:`replacements` lists what was done; :func:`restore_attention` undoes it.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place. It may be an attention module itself.

    Returns
    -------
    torch.nn.Module
        The same object.

    Raises
    ------
    TypeError
        `model` is no module.
    ValueError
        No module of it has a fused path.
    """
    check_module(model)
    meant = [module for module in model.modules() if hasattr(module, "fused_attn")]
    if not meant:
        raise ValueError("model: no module of it has timm's flag fused_attn; attnfast.integrations.replace_modules and "
                         "torch_sdpa.override reach other models")  # fmt: skip
    for module in meant:
        if not _refusal(module):  # nor what is replaced already
            before = _Before(bool(module.fused_attn))
            module.fused_attn = True  # type: ignore[assignment]
            module.forward = functools.partial(_forward, module, before)
    return model


def restore_attention(model: _Module) -> _Module:
    """Undo :func:`replace_attention`: each module's own ``forward``, and its flag as it was.

    Returns
    -------
    torch.nn.Module
        The same object.
    """
    check_module(model)
    for module in model.modules():
        before = _before(module)
        if before is not None:
            del module.forward
            module.fused_attn = before.fused  # type: ignore[assignment]
    return model
