"""A head of a neural Turing machine: addressing by content and by place, reading and writing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnfast import functional
from attnfast.nn._base import positive
from attnfast.reference import real_dtype, unit_vectors


class NTMHead(nn.Module):
    r"""Reading or writing head of a neural Turing machine (Graves, Wayne and Danihelka 2014, section 3).

    .. math::
        w^c_i &= \mathrm{softmax}_i(\beta \cos(k, M_i)) & w^g &= g\,w^c + (1 - g)\,w_{t-1} \\
        \tilde w_i &= \sum_{\delta=-S}^{S} s_\delta\, w^g_{(i - \delta) \bmod N} &
        w_i &= \tilde w_i^\gamma / \sum_j \tilde w_j^\gamma \\
        r &= \sum_i w_i M_i \; (\text{reads}) & M'_i &= M_i \circ (1 - w_i e) + w_i a \; (\text{writes})

    with a key k, a strength :math:`\beta = \mathrm{softplus}(\cdot)`, a gate :math:`g = \sigma(\cdot)`, shifts
    :math:`s = \mathrm{softmax}(\cdot)`, a sharpness :math:`\gamma = 1 + \mathrm{softplus}(\cdot)`, an erase vector
    :math:`e = \sigma(\cdot)` and an add vector a, each emitted by a linear layer from the controller's state x
    (eqs. 2 to 9). Norms of the cosine are at least 1e-8.

    Parameters
    ----------
    query_size : int
        Size of x.
    memory_size : int
        Size of a slot of the memory.
    shift : int
        S: the head moves by up to S slots, round the ends.
    writes : bool
        Whether the head writes; else it reads.

    Notes
    -----
    The paper states no initial values and not how beta, g and gamma come into their ranges; softplus and the logistic
    function are the common choice. Layers are initialised after Glorot and Bengio (AISTATS 2010, eq. 16: uniform),
    biases with zero. The memory and the weights of the step before belong to the caller; a common first focus is a 1 at
    slot 0. The power is taken of :math:`\tilde w / \max \tilde w`, so a large gamma cannot turn all weights into zeros.

    Examples
    --------
    >>> import torch
    >>> from attnfast.nn import NTMHead
    >>> reading, writing = NTMHead(8, 6), NTMHead(8, 6, writes=True)
    >>> memory, focus = torch.zeros(2, 20, 6), torch.nn.functional.one_hot(torch.zeros(2, dtype=torch.long), 20).float()
    >>> memory, written = writing(torch.randn(2, 8), memory, focus)
    >>> read, seen = reading(torch.randn(2, 8), memory, focus)
    >>> memory.shape, read.shape, seen.shape
    (torch.Size([2, 20, 6]), torch.Size([2, 6]), torch.Size([2, 20]))
    """

    def __init__(self, query_size: int, memory_size: int, *, shift: int = 1, writes: bool = False) -> None:
        super().__init__()
        positive(query_size=query_size, memory_size=memory_size)
        if isinstance(shift, bool) or not isinstance(shift, int) or shift < 0:
            raise ValueError(f"shift: expected an integer >= 0, got {shift!r}")
        self.query_size, self.memory_size, self.shift, self.writes = query_size, memory_size, shift, writes
        self.key = nn.Linear(query_size, memory_size)
        self.control = nn.Linear(query_size, 3 + 2 * shift + 1)  # strength, gate, sharpness, shifts
        self.erase = nn.Linear(query_size, memory_size) if writes else None
        self.add = nn.Linear(query_size, memory_size) if writes else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        for layer in self.children():
            nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, query: Tensor, memory: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """Move the head, then read or write.

        Parameters
        ----------
        query : Tensor
            The controller's state x, ``[B, query_size]``.
        memory : Tensor
            ``[B, N, memory_size]``; it is not changed.
        previous : Tensor
            The head's weights of the step before, ``[B, N]``.

        Returns
        -------
        tuple
            What was read ``[B, memory_size]``, or the new memory ``[B, N, memory_size]``; and the weights ``[B, N]``.
        """
        if query.dim() != 2 or query.shape[-1] != self.query_size:
            raise ValueError(f"query: expected [B, {self.query_size}], got {list(query.shape)}")
        if memory.dim() != 3 or memory.shape[0] != query.shape[0] or memory.shape[-1] != self.memory_size:
            expected = f"[B, N, {self.memory_size}] of B = {query.shape[0]}"
            raise ValueError(f"memory: expected {expected}, got {list(memory.shape)}")
        if previous.shape != memory.shape[:2]:
            raise ValueError(f"previous: expected [B, N] = {list(memory.shape[:2])}, got {list(previous.shape)}")
        weights = self.address(query, memory, previous)
        if self.erase is None or self.add is None:
            return (weights.unsqueeze(1) @ memory).squeeze(1), weights
        erase, add = torch.sigmoid(self.erase(query)), self.add(query)
        where = weights.unsqueeze(-1)
        return memory * (1 - where * erase.unsqueeze(1)) + where * add.unsqueeze(1), weights

    def address(self, query: Tensor, memory: Tensor, previous: Tensor) -> Tensor:
        """The weights alone, ``[B, N]``."""
        strength, gate, sharpness, shifts = self.control(query).split([1, 1, 1, 2 * self.shift + 1], -1)
        key = unit_vectors(self.key(query)) * nn.functional.softplus(strength)
        result: Any = functional.attention(
            key.to(memory.dtype)[:, None, None], unit_vectors(memory).to(memory.dtype).unsqueeze(1),
            memory[..., :0].unsqueeze(1), score="dot", return_weights=True,
        )  # fmt: skip
        gate = torch.sigmoid(gate)
        focus = gate * result.weights[:, 0, 0] + (1 - gate) * previous
        moved = circular_shift(focus, shifts.softmax(-1))
        return sharpen(moved, 1 + nn.functional.softplus(sharpness))

    def extra_repr(self) -> str:
        return f"query_size={self.query_size}, memory_size={self.memory_size}, shift={self.shift}, writes={self.writes}"


def circular_shift(weights: Tensor, shifts: Tensor) -> Tensor:
    """Eq. 8 for every sample at once: ``[B, N]`` moved by -S ... S slots in the shares ``[B, 2 S + 1]``."""
    slots, reach = weights.shape[-1], shifts.shape[-1] // 2
    place = torch.arange(slots, device=weights.device).unsqueeze(-1)
    offset = torch.arange(-reach, reach + 1, device=weights.device)
    return (weights[:, (place - offset) % max(slots, 1)] * shifts.unsqueeze(1)).sum(-1)


def sharpen(weights: Tensor, sharpness: Tensor) -> Tensor:
    """Eq. 9, ``w^gamma / sum w^gamma`` over the last dimension, in at least float32; weights of zero stay zero."""
    wide = weights.to(real_dtype(weights.dtype))
    largest = wide.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny)
    power = (wide / largest) ** sharpness.to(wide.dtype)  # the largest is 1, so a smaller sum is that of zeros
    return (power / power.sum(-1, keepdim=True).clamp(min=1)).to(weights.dtype)
