"""attnfast inside other people's models: opt-in, exact, and undone on request. Nothing happens on import.

``replace_modules``
    the attention modules of a model, in place
``torch_sdpa``
    ``torch.nn.functional.scaled_dot_product_attention``, for a process or a block of code
``transformers``, ``diffusers``, ``timm``
    models of these packages, each imported on its own: ``from attnfast.integrations import transformers``
``keras``
    Keras's attention layers as torch modules, likewise
"""

from attnfast.integrations import torch_sdpa
from attnfast.integrations._replace import Replacement, replace_modules, replacements, restore_modules

__all__ = ["Replacement", "replace_modules", "replacements", "restore_modules", "torch_sdpa"]
