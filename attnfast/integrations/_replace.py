"""Attention modules of a model changed into attnfast's and back, in place.

A module changes its class and nothing else: parameters (tied ones too), buffers, dtype, device, hooks, training state,
and every reference that an optimizer, a wrapper or the user holds to it stay what they were. Transformer layers need no
replacement of their own: they call their attention modules, and the replaced ones see to it that they do in evaluation
too (``keep_off_fast_path``).
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

from torch import nn

from attnfast.nn import MultiheadAttention
from attnfast.nn._multihead import keep_off_fast_path

_Module = TypeVar("_Module", bound=nn.Module)


class Replacement(NamedTuple):
    """One module of a model, and what became of it.

    Attributes
    ----------
    name : str
        Its path in the model, "" for the model itself. A module with several paths is named by the first.
    kind : str
        Its class before.
    replaced : bool
        Whether it is attnfast's now.
    reason : str
        Why not, if not.
    """

    name: str
    kind: str
    replaced: bool
    reason: str


def replacements(model: nn.Module) -> list[Replacement]:
    """What :func:`replace_modules` has done, or would do, with each attention module of a model.

    Examples
    --------
    >>> import torch
    >>> from attnfast.integrations import replace_modules, replacements
    >>> model = replace_modules(torch.nn.TransformerEncoderLayer(32, 4))
    >>> replacements(model)
    [Replacement(name='self_attn', kind='torch.nn.MultiheadAttention', replaced=True, reason='')]
    """
    return [
        Replacement(name, *_state(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    ]


def _state(module: nn.Module) -> tuple[str, bool, str]:
    kind = type(module)
    if kind is MultiheadAttention:
        return "torch.nn.MultiheadAttention", True, ""
    name = f"{kind.__module__}.{kind.__qualname__}".replace("torch.nn.modules.activation.", "torch.nn.")
    if kind is not nn.MultiheadAttention:
        return name, False, "a subclass may compute something else"
    if "forward" in vars(module):
        return name, False, "its forward was replaced already"
    return name, False, "not replaced yet"


def replace_modules(model: _Module) -> _Module:
    """Make every ``torch.nn.MultiheadAttention`` of a model attnfast's, in place.

    That covers ``torch.nn.TransformerEncoderLayer``, ``TransformerDecoderLayer`` and ``Transformer``, whose attention
    is such modules. Subclasses are left alone: what they compute is not known. :func:`replacements` lists what was
    done; :func:`restore_modules` undoes it.

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
        `model` is no module, or a scripted one.

    Examples
    --------
    >>> import torch
    >>> from attnfast.integrations import replace_modules
    >>> model = torch.nn.Transformer(32, 4, 1, 1, 64, dropout=0.0, batch_first=True)
    >>> source, target = torch.randn(2, 5, 32), torch.randn(2, 3, 32)
    >>> before = model(source, target)
    >>> torch.testing.assert_close(replace_modules(model)(source, target), before)
    """
    check_module(model)
    for module in model.modules():
        if type(module) is nn.MultiheadAttention and "forward" not in vars(module):
            module.__class__ = MultiheadAttention
            module.register_forward_pre_hook(keep_off_fast_path)
    return model


def restore_modules(model: _Module) -> _Module:
    """Undo :func:`replace_modules`: the same modules, of torch's class again.

    Modules that were made as attnfast's become torch's too: they have the same parameters.

    Returns
    -------
    torch.nn.Module
        The same object.
    """
    check_module(model)
    for module in model.modules():
        if type(module) is not MultiheadAttention:
            continue
        module.__class__ = nn.MultiheadAttention  # type: ignore[assignment]
        hooks = module._forward_pre_hooks
        for identity in [key for key, hook in hooks.items() if hook is keep_off_fast_path]:
            del hooks[identity]  # not by its handle: a copy of a module has none
    return model


def check_module(model: Any) -> None:
    """Raise unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
