"""Hugging Face diffusers with attnfast, by both of its ways to choose an attention.

    from attnfast.integrations import diffusers as attnfast_diffusers
    attnfast_diffusers.replace_attention(model)     # a UNet, a transformer, an autoencoder

Processors
    An ``Attention`` module of diffusers leaves its computation to a processor. :class:`AttnProcessor` and
    :class:`AttnAddedKVProcessor` stand for diffusers' four plain ones, two that form the matrix of weights and two that
    do not.
Backends
    Processors of newer models end in one function, which looks a backend up by name. :func:`register` adds the name
    "attnfast", for ``model.set_attention_backend`` and diffusers' ``attention_backend``.

:func:`replace_attention` takes whichever applies to each module of a model. What is not known here is an error.

Source of both interfaces: https://github.com/huggingface/diffusers, models/attention_processor.py and
models/attention_dispatch.py.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from attnfast import functional
from attnfast.integrations._replace import Replacement, check_module
from attnfast.nn._base import unpack

__all__ = [
    "AttnAddedKVProcessor",
    "AttnProcessor",
    "Replacement",
    "register",
    "replace_attention",
    "replacements",
    "restore_attention",
    "unregister",
]

NAME = "attnfast"
_Module = TypeVar("_Module", bound=nn.Module)


# ----------------------------------------------------------------------------------------------------------- processors


class AttnProcessor:
    """Attention processor for ``diffusers.models.attention_processor.Attention``: self- and cross-attention.

    It stands for diffusers' AttnProcessor and AttnProcessor2_0 and honours what a module may have: normalised queries
    and keys, group norm, spatial norm, norm of the encoder's states, masks, the scale, the residual and its factor,
    images ``[B, C, height, width]`` in place of tokens. Scores and softmax are in float32 at least, which is what
    ``upcast_attention`` and ``upcast_softmax`` ask for.

    Parameters
    ----------
    replaced : object, optional
        The processor that this one stands for; :func:`restore_attention` puts it back.

    Examples
    --------
    >>> from diffusers.models.attention_processor import Attention
    >>> from attnfast.integrations.diffusers import AttnProcessor
    >>> attention = Attention(32, cross_attention_dim=16, heads=4, dim_head=8)
    >>> attention.set_processor(AttnProcessor())
    >>> attention(torch.randn(2, 9, 32), torch.randn(2, 5, 16)).shape
    torch.Size([2, 9, 32])
    """

    def __init__(self, replaced: Any = None) -> None:
        self.replaced = replaced

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_hidden_states: Any = None,
        ip_adapter_masks: Any = None,
    ) -> Tensor:
        """Compute the attention of a module.

        Parameters
        ----------
        attn : diffusers.models.attention_processor.Attention
            The module.
        hidden_states : Tensor
            ``[B, T_q, C]`` or ``[B, C, height, width]``.
        encoder_hidden_states : Tensor, optional
            ``[B, T_k, C']``; default: `hidden_states`, after the group norm.
        attention_mask : Tensor, optional
            ``[B, T_q or 1, T_k]``, or with each sample repeated for each head; added to the scores, or boolean with
            True = may attend.
        temb : Tensor, optional
            What the spatial norm is conditioned on.
        ip_hidden_states, ip_adapter_masks : optional
            Of an IP-Adapter, which has processors of its own.

        Returns
        -------
        Tensor
            Shaped as `hidden_states`.

        Raises
        ------
        NotImplementedError
            Something of an IP-Adapter came.
        """
        _no_adapter(ip_hidden_states, ip_adapter_masks)
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        image = x.shape if x.dim() == 4 else None
        if image is not None:
            x = x.flatten(2).transpose(1, 2)
        mask = _mask(attn, attention_mask, x if encoder_hidden_states is None else encoder_hidden_states)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        memory = _memory(attn, x, encoder_hidden_states)
        query, key, value = (_heads(attn, y) for y in (attn.to_q(x), attn.to_k(memory), attn.to_v(memory)))
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        out = _attended(attn, query, key, value, mask)
        if image is not None:
            out = out.transpose(1, 2).reshape(image)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


class AttnAddedKVProcessor:
    """Attention processor for modules with keys and values of a second input, ``added_kv_proj_dim``.

    The keys of the encoder's states come before those of the image. It stands for diffusers' AttnAddedKVProcessor and
    AttnAddedKVProcessor2_0. Parameters and errors are those of :class:`AttnProcessor`; `hidden_states` is
    ``[B, C, height, width]`` or ``[B, C, T]``, and `attention_mask` counts the keys of both.
    """

    def __init__(self, replaced: Any = None) -> None:
        self.replaced = replaced

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        ip_hidden_states: Any = None,
        ip_adapter_masks: Any = None,
    ) -> Tensor:
        """Compute the attention of a module; see :meth:`AttnProcessor.__call__`."""
        _no_adapter(ip_hidden_states, ip_adapter_masks)
        x = hidden_states.flatten(2).transpose(1, 2)
        mask = _mask(attn, attention_mask, x)
        memory = _memory(attn, x, encoder_hidden_states)  # before the group norm, as diffusers has it
        x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        key, value = _heads(attn, attn.add_k_proj(memory)), _heads(attn, attn.add_v_proj(memory))
        if not attn.only_cross_attention:
            key = torch.cat([key, _heads(attn, attn.to_k(x))], 2)
            value = torch.cat([value, _heads(attn, attn.to_v(x))], 2)
        out = _attended(attn, _heads(attn, attn.to_q(x)), key, value, mask)
        return out.transpose(1, 2).reshape(hidden_states.shape) + hidden_states


def _no_adapter(*given: Any) -> None:
    if any(x is not None for x in given):
        raise NotImplementedError("attnfast.integrations.diffusers: IP-Adapters have processors of their own")


def _memory(attn: Any, x: Tensor, encoder_hidden_states: Tensor | None) -> Tensor:
    if encoder_hidden_states is None:
        return x
    return attn.norm_encoder_hidden_states(encoder_hidden_states) if attn.norm_cross else encoder_hidden_states


def _heads(attn: Any, x: Tensor) -> Tensor:
    """``[B, T, H D]`` as ``[B, H, T, D]``."""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _mask(attn: Any, mask: Tensor | None, keys: Tensor) -> Tensor | None:
    """``[B, H, T_q or 1, T_k]``, as the module prepares it (diffusers pads masks that are too short)."""
    if mask is None:
        return None
    batch, length = keys.shape[:2]
    prepared: Tensor = attn.prepare_attention_mask(mask, length, batch)
    return prepared.unflatten(0, (batch, attn.heads))


def _attended(attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention and the output projection, ``[B, T_q, C]``."""
    if mask is not None and mask.is_floating_point() and mask.dtype != query.dtype:
        mask = mask.to(query.dtype)
    out, _ = unpack(functional.attention(query, key, value, mask=mask, scale=attn.scale))
    projected: Tensor = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
    return projected


# ------------------------------------------------------------------------------------------------------------- backend


class _Everything(set[str]):
    """Names of arguments; diffusers drops what is not among a backend's, and this one wants to see it."""

    def __contains__(self, name: object) -> bool:
        return True


def attention_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **others: Any,
) -> Tensor:
    """The function that :func:`register` registers; diffusers calls it.

    Parameters
    ----------
    query, key, value : Tensor
        ``[B, T_q, H, D]``, ``[B, T_k, H, D]``, ``[B, T_k, H, D_v]``.
    attn_mask : Tensor, optional
        Broadcastable to ``[B, H, T_q, T_k]``, or ``[B, T_k]``; boolean (True = may attend) or added.
    dropout_p, is_causal, scale, enable_gqa
        As in :func:`attnfast.scaled_dot_product_attention`.
    **others
        None or False, or an error.

    Returns
    -------
    Tensor
        ``[B, T_q, H, D_v]``.

    Raises
    ------
    NotImplementedError
        `others` asks for something.
    """
    unknown = sorted(name for name, x in others.items() if x is not None and x is not False)
    if unknown:
        raise NotImplementedError(
            f"attnfast.integrations.diffusers: the model passes {', '.join(unknown)}, which attnfast's backend does "
            "not implement; use another backend for it"
        )
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    ).transpose(1, 2)


def _dispatch() -> tuple[Any, Any]:
    """diffusers' registry of backends, and the enumeration of their names."""
    try:
        from diffusers.models.attention_dispatch import (  # type: ignore[import-not-found,unused-ignore]
            AttentionBackendName,
            _AttentionBackendRegistry,
        )
    except ImportError as error:
        raise ImportError(
            f"attnfast.integrations.diffusers needs diffusers 0.35 or later ({error}): pip install 'diffusers>=0.35'"
        ) from error
    return _AttentionBackendRegistry, AttentionBackendName


def register() -> None:
    """Make attnfast known to diffusers: ``model.set_attention_backend("attnfast")``.

    Also for ``diffusers.attention_backend("attnfast")``, a block of code. diffusers has no way to add a backend; its
    enumeration of their names gets one more, until :func:`unregister`. A second call changes nothing.

    Raises
    ------
    ImportError
        diffusers is not there, or before 0.35.
    """
    registry, names = _dispatch()
    if NAME in names._value2member_map_:
        return
    member = str.__new__(names, NAME)
    member._name_, member._value_, member._sort_order_ = NAME.upper(), NAME, len(names)
    names._member_map_[NAME.upper()] = names._value2member_map_[NAME] = member
    names._member_names_.append(NAME.upper())
    registry.register(member)(attention_backend)
    registry._supported_arg_names[member] = _Everything(registry._supported_arg_names[member])


def unregister() -> None:
    """Undo :func:`register`. Models that still ask for "attnfast" fail from then on: restore them before.

    If "attnfast" is the active backend of the process, diffusers' own becomes it.
    """
    registry, names = _dispatch()
    member = names._value2member_map_.get(NAME)
    if member is None:
        return
    if registry._active_backend is member:
        registry.set_active_backend(names.NATIVE)
    for table in (registry._backends, registry._constraints, registry._supported_arg_names):
        table.pop(member)
    del names._member_map_[NAME.upper()], names._value2member_map_[NAME]
    names._member_names_.remove(NAME.upper())


# --------------------------------------------------------------------------------------------------------------- models

_BEFORE = "_attnfast_before"  # on a processor with a backend: its own attribute _attention_backend, if it had one


def _plan(module: Any) -> tuple[str, Any]:
    """What becomes of a module's processor: ("", what to do it with), or why nothing can."""
    from diffusers.models import attention_processor as theirs  # type: ignore[import-not-found,unused-ignore]

    processor = module.get_processor()
    if hasattr(processor, "_attention_backend"):
        if getattr(processor, "_parallel_config", None) is not None:
            return "its context is shared by several devices", None
        return "", None
    if type(processor) in (theirs.AttnAddedKVProcessor, theirs.AttnAddedKVProcessor2_0):
        ours: Any = AttnAddedKVProcessor
    elif type(processor) in (theirs.AttnProcessor, theirs.AttnProcessor2_0):
        ours = AttnProcessor
    else:
        return "a processor that computes something else", None
    whole = type(processor) in (theirs.AttnProcessor, theirs.AttnAddedKVProcessor)
    if not whole and module.scale != (module.inner_dim // module.heads) ** -0.5:
        return "its processor does not look at the module's scale", None
    if type(processor) is theirs.AttnProcessor and (module.norm_q is not None or module.norm_k is not None):
        return "its processor does not look at the module's norm_q", None
    return "", ours


def _is_ours(processor: Any) -> bool:
    return type(processor) in (AttnProcessor, AttnAddedKVProcessor) or _BEFORE in vars(processor)


def _attending(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "get_processor")]


def replacements(model: nn.Module) -> list[Replacement]:
    """What :func:`replace_attention` has done, or would do, with each module that has a processor.

    `kind` names the processor, which is what is replaced, by its class before.
    """
    found = []
    for name, module in _attending(model):
        processor = module.get_processor()
        if not _is_ours(processor):
            found.append(Replacement(name, type(processor).__name__, False, _plan(module)[0] or "not replaced yet"))
            continue
        before = processor if _BEFORE in vars(processor) else processor.replaced
        found.append(Replacement(name, type(processor if before is None else before).__name__, True, ""))
    return found


def replace_attention(model: _Module, *, partial: bool = False) -> _Module:
    """Give the attention of a diffusers model to attnfast, in place.

    Modules keep everything but their processor, or, where that chooses a backend, the processor keeps everything but
    its choice. A second call changes nothing. :func:`replacements` lists what was done; :func:`restore_attention`
    undoes it.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place: a model, or a module with a processor.
    partial : bool
        Whether modules that cannot be replaced are left as they are, in place of an error.

    Returns
    -------
    torch.nn.Module
        The same object.

    Raises
    ------
    TypeError
        `model` is no module.
    ValueError
        No module of it has a processor.
    NotImplementedError
        A processor is not known here; the message names it. Nothing is changed then.
        :class:`attnfast.integrations.torch_sdpa.override` reaches most of them.
    ImportError
        diffusers is not there, or before 0.35.

    Examples
    --------
    >>> from diffusers import UNet2DModel
    >>> from attnfast.integrations import diffusers as attnfast_diffusers
    >>> blocks = {"down_block_types": ["AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D"]}
    >>> model = UNet2DModel(8, block_out_channels=[32], layers_per_block=1, **blocks)
    >>> model = attnfast_diffusers.replace_attention(model)
    >>> all(r.replaced for r in attnfast_diffusers.replacements(model))
    True
    """
    check_module(model)
    attending = [(name, module) for name, module in _attending(model) if not _is_ours(module.get_processor())]
    if not _attending(model):
        raise ValueError("model: no module of it has an attention processor of diffusers")
    _, names = _dispatch()
    plans = [(name, module, *_plan(module)) for name, module in attending]
    refused = [f"{name or 'model'} ({type(module.get_processor()).__name__}: {why})"
               for name, module, why, _ in plans if why]  # fmt: skip
    if refused and not partial:
        raise NotImplementedError(
            f"model: attnfast has nothing for {', '.join(refused)}; with partial=True they are left as they are"
        )
    for _, module, why, ours in plans:
        processor = module.get_processor()
        if why or _is_ours(processor):  # refused, or shared with a module that came before
            continue
        if ours is not None:
            module.set_processor(ours(processor))
            continue
        register()
        own = {name: x for name, x in vars(processor).items() if name == "_attention_backend"}
        setattr(processor, _BEFORE, own)
        processor._attention_backend = names(NAME)
    return model


def restore_attention(model: _Module) -> _Module:
    """Undo :func:`replace_attention`: the processors that were there, with the backends that they had.

    Processors of attnfast that somebody has set by hand stay.

    Returns
    -------
    torch.nn.Module
        The same object.
    """
    check_module(model)
    for _, module in _attending(model):
        processor = module.get_processor()
        if _BEFORE in vars(processor):
            del processor._attention_backend  # the class has one
            vars(processor).update(vars(processor).pop(_BEFORE))
        elif _is_ours(processor) and processor.replaced is not None:
            module.set_processor(processor.replaced)
    return model
