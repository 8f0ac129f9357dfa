"""torch's attention on a GPU, held to each of its fused backends in turn."""

from __future__ import annotations

import contextlib
from typing import Any

from .peers import TorchSdpa
from .registry import register_peer


class TorchBackend(TorchSdpa):
    """``F.scaled_dot_product_attention`` with one backend; a case that it does not take ends in torch's own error."""

    suites = ("gpu",)

    def __init__(self, name: str, backend: str) -> None:
        self.name, self._backend = name, backend

    def context(self) -> contextlib.AbstractContextManager[Any]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(getattr(SDPBackend, self._backend))


for _name, _backend in (
    ("sdpa flash", "FLASH_ATTENTION"),
    ("sdpa cudnn", "CUDNN_ATTENTION"),
    ("sdpa efficient", "EFFICIENT_ATTENTION"),
):
    register_peer(TorchBackend(_name, _backend))
