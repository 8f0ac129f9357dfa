"""Hugging Face transformers with attnfast as one of its attention implementations.

    from attnfast.integrations import transformers as attnfast_transformers
    attnfast_transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="attnfast")

What a model passes is honoured: dropout, scaling, soft cap, attention sinks (`s_aux`), a position bias, sliding
windows, grouped heads, caches. Masks come from transformers' own boolean ones, which hold padding, causality, windows
and packed sequences; where it leaves one out, causality is the kernels'. What a model passes and is not known here is
an error and not left out.

Source of the interface: https://huggingface.co/docs/transformers/attention_interface.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnfast import functional
from attnfast.nn._base import unpack

__all__ = ["attention_forward", "register", "unregister"]

# What transformers hands through to every attention function and no attention depends on.
IRRELEVANT = frozenset({
    "cache_position", "labels", "layer_idx", "num_items_in_batch", "output_hidden_states", "output_router_logits",
    "past_key_values", "position_embeddings", "position_ids", "return_dict", "use_cache",
})  # fmt: skip


def _interfaces() -> tuple[Any, Any, Any]:
    """transformers' registries of attention and mask functions, and the mask function that attnfast's calls want."""
    try:
        from transformers import AttentionInterface  # type: ignore[import-not-found,unused-ignore]
        from transformers.masking_utils import (  # type: ignore[import-not-found,unused-ignore]
            AttentionMaskInterface,
            sdpa_mask,
        )
    except ImportError as error:
        raise ImportError(
            f"attnfast.integrations.transformers needs transformers 4.53 or later ({error}): "
            "pip install 'transformers>=4.53'"
        ) from error
    return AttentionInterface, AttentionMaskInterface, sdpa_mask


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that :func:`register` registers; transformers calls it.

    Parameters
    ----------
    module : torch.nn.Module
        The layer that asks; `is_causal` is its attribute where the call leaves it open.
    query, key, value : Tensor
        ``[B, H, T_q, D]``, ``[B, H_kv, T_k, D]``, ``[B, H_kv, T_k, D_v]``.
    attention_mask : Tensor, optional
        ``[B, 1 or H, T_q, T_k]``, boolean (True = may attend) or added. If it is there it says everything about who
        sees whom, windows and causality included.
    dropout : float
        Probability of dropping a weight.
    scaling : float, optional
        Default ``1 / sqrt(D)``.
    is_causal : bool, optional
        Without a mask: query q sees keys k <= q, unless there is one query, which sees all.
    sliding_window : int, optional
        Without a mask, of a causal call: query q sees no key before q - sliding_window + 1.
    softcap : float, optional
        Scores are capped smoothly at +-softcap.
    s_aux : Tensor, optional
        ``[H]``, attention sinks.
    position_bias : Tensor, optional
        ``[B or 1, H, T_q, T_k]``, added to the scores.
    output_attentions : bool, optional
        Whether the weights are wanted.
    **others
        What attention does not depend on is ignored.

    Returns
    -------
    tuple
        ``[B, T_q, H, D_v]``, and weights ``[B, H, T_q, T_k]`` or None.

    Raises
    ------
    NotImplementedError
        `others` has something that attention may depend on.
    """
    unknown = sorted(name for name, x in others.items() if x is not None and x is not False and name not in IRRELEVANT)
    if unknown:
        raise NotImplementedError(
            f"attnfast.integrations.transformers: {type(module).__name__} passes {', '.join(unknown)}, of which "
            "attnfast does not know what it does to attention; use another attn_implementation for this model"
        )
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal, window = None, None
    if is_causal and attention_mask is None and query.shape[2] > 1:
        causal = "top_left"
        window = None if sliding_window is None else (sliding_window - 1, -1)
    if position_bias is not None and position_bias.dtype not in (torch.float32, query.dtype):
        position_bias = position_bias.to(query.dtype)
    result = functional.attention(
        query, key, value, mask=attention_mask, bias=position_bias, causal=causal, window=window, sink=s_aux,
        softcap=softcap or 0.0, scale=scaling, dropout_p=dropout, return_weights=bool(output_attentions),
    )  # fmt: skip
    output, weights = unpack(result)
    return output.transpose(1, 2).contiguous(), weights


def register(name: str = "attnfast") -> None:
    """Make attnfast known to transformers: ``attn_implementation=name`` for any model that can choose.

    For a model that exists, ``model.set_attn_implementation(name)``. Models that do not choose are not concerned.

    Parameters
    ----------
    name : str
        Under which name. "sdpa" makes it the default of most models, until :func:`unregister`.

    Raises
    ------
    ImportError
        transformers is not there, or before 4.53.
    ValueError
        A name that transformers gives a meaning ("eager", one with "flash" or "|" within).
    """
    if name == "eager" or "flash" in name or "|" in name or "/" in name:
        raise ValueError(f"name: expected one that transformers gives no meaning to, got {name!r}")
    attention, masks, mask_function = _interfaces()
    _BEFORE.setdefault(name, (attention._global_mapping.get(name), masks._global_mapping.get(name)))
    attention.register(name, attention_forward)
    masks.register(name, mask_function)


_BEFORE: dict[str, tuple[Any, Any]] = {}  # what a name meant before it was registered


def unregister(name: str = "attnfast") -> None:
    """Undo :func:`register`. Models that were made with `name` fail from then on, unless it meant something before."""
    if name not in _BEFORE:
        return
    attention, masks, _ = _interfaces()
    for interface, before in zip((attention, masks), _BEFORE.pop(name), strict=True):
        if before is None:
            interface._global_mapping.pop(name, None)
        else:
            interface._global_mapping[name] = before
