"""What the layers of attnfast.integrations.keras share: Keras's weights, its initial values, dropout with a seed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy


def glorot_uniform_(x: Tensor, fan_in: int, fan_out: int) -> Tensor:
    """Keras's default for kernels; a vector of D has both fans D, the kernel of a projection those of its matrix."""
    bound = (6.0 / (fan_in + fan_out)) ** 0.5
    return nn.init.uniform_(x, -bound, bound)


def unsized(device: Any, dtype: torch.dtype | None) -> Any:
    """A parameter whose shape the first call decides."""
    make: Any = UninitializedParameter
    return make(device=device, dtype=dtype)


class KerasLayer(nn.Module):
    """What the layers share: weights from Keras, dropout with a seed of its own.

    Attributes
    ----------
    patterns : dict
        Shapes of the parameters of the module itself, None where the first call decides.
    """

    patterns: dict[str, tuple[int | None, ...]]

    def __init__(self, dropout: float, seed: int | None) -> None:
        super().__init__()
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1], got {dropout}")
        self.dropout, self.seed = dropout, seed
        self._state = None if seed is None else torch.Generator().manual_seed(seed).get_state()
        self.patterns = {}

    def load_keras_weights(self, weights: Any) -> None:
        """Take the weights of a Keras layer.

        Parameters
        ----------
        weights : keras.layers.Layer or sequence of arrays
            The layer (its ``get_weights()`` is called), or what ``get_weights()`` gives, in its order.

        Raises
        ------
        ValueError
            Another number of weights than this layer has, or other shapes.

        Examples
        --------
        >>> import numpy
        >>> from attnfast.integrations.keras import AdditiveAttention
        >>> attention = AdditiveAttention()
        >>> attention.load_keras_weights([numpy.ones(16)])
        >>> attention.scale.shape
        torch.Size([16])
        """
        arrays = weights.get_weights() if hasattr(weights, "get_weights") else weights
        values = [torch.as_tensor(array) for array in arrays]
        places = [(f"{path}.{name}".lstrip("."), module.patterns[name], parameter)
                  for path, module in self.named_modules() if hasattr(module, "patterns")
                  for name, parameter in module.named_parameters(recurse=False)]  # fmt: skip
        if len(values) != len(places):
            names = ", ".join(name for name, *_ in places) or "none"
            raise ValueError(f"weights: expected {len(places)} ({names}), got {len(values)}")
        for value, (name, pattern, parameter) in zip(values, places, strict=True):
            shape = pattern if is_lazy(parameter) else tuple(parameter.shape)
            fits = len(shape) == value.dim() and all(n in (None, m) for n, m in zip(shape, value.shape, strict=True))
            if not fits:
                expected = ", ".join("any" if n is None else str(n) for n in shape)
                raise ValueError(f"weights: expected {name} of shape [{expected}], got {list(value.shape)}")
        with torch.no_grad():
            for value, (_, _, parameter) in zip(values, places, strict=True):
                if isinstance(parameter, UninitializedParameter):
                    parameter.materialize(value.shape)
                parameter.copy_(value)

    def _rate(self, training: bool | None) -> float:
        return self.dropout if (self.training if training is None else training) else 0.0

    @contextlib.contextmanager
    def _seeded(self, rate: float) -> Iterator[None]:
        """torch's generator with the state of the layer's own: other numbers in each call, the same in each program."""
        if self._state is None or rate == 0.0:
            yield
            return
        generator = torch.default_generator
        before = generator.get_state()
        generator.set_state(self._state)
        try:
            yield
        finally:
            self._state = generator.get_state()
            generator.set_state(before)
