"""Additive attention for decoders: Bahdanau's, Chorowski's location-sensitive one, and hard attention after Xu et al.

All three run on ``attnfast.additive_attention``; keys are projected once by `project_memory`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnfast import functional
from attnfast.nn._base import MemoryAttention, ProjectedMemory, Weights, one_row, positive, unpack
from attnfast.reference import real_dtype


class BahdanauAttention(MemoryAttention):
    r"""Additive attention of Bahdanau, Cho and Bengio (ICLR 2015, section A.1.2).

    .. math::
        e_{ij} = v^\top \tanh(W s_i + U h_j + b), \quad
        \alpha_{ij} = \mathrm{softmax}_j(e_{ij}), \quad
        c_i = \sum_j \alpha_{ij} h_j

    with decoder states s (the query; the paper takes the state *before* the step) and annotations h (the memory).

    Parameters
    ----------
    query_size, memory_size : int
        Sizes of s and h.
    units : int
        Size of the hidden layer of the alignment model (n' in the paper).
    bias : bool
        Whether b is there.

    Notes
    -----
    Initialised as the paper states (appendix B.1): W and U from N(0, 0.001^2), v and every bias zero, so that attention
    begins uniform. The paper's formula has no b; its authors' program (GroundHog) has one in every layer.

    Examples
    --------
    >>> import torch
    >>> from attnfast.nn import BahdanauAttention
    >>> attention = BahdanauAttention(query_size=8, memory_size=6, units=16)
    >>> memory, lengths = torch.randn(2, 5, 6), torch.tensor([5, 3])
    >>> projected = attention.project_memory(memory)
    >>> context, weights = attention.step(torch.randn(2, 8), projected, lengths)
    >>> context.shape, weights.shape
    (torch.Size([2, 6]), torch.Size([2, 5]))
    """

    def __init__(self, query_size: int, memory_size: int, units: int, bias: bool = True) -> None:
        super().__init__(query_size, memory_size)
        positive(units=units)
        self.units = units
        self.query_weight = nn.Parameter(torch.empty(units, query_size))
        self.memory_weight = nn.Parameter(torch.empty(units, memory_size))
        self.score_weight = nn.Parameter(torch.empty(units))
        self.bias = nn.Parameter(torch.empty(units)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as published."""
        nn.init.normal_(self.query_weight, std=0.001)
        nn.init.normal_(self.memory_weight, std=0.001)
        nn.init.zeros_(self.score_weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def project_memory(self, memory: Tensor) -> ProjectedMemory:
        """``U h_j`` for all j, ``[B, T_k, units]``, beside the memory itself."""
        self._check_memory(memory)
        return ProjectedMemory(nn.functional.linear(memory, self.memory_weight), memory)

    def _attend(
        self, query: Tensor, memory: ProjectedMemory, lengths: Tensor | None, mask: Tensor | None, mode: bool | str
    ) -> tuple[Tensor, Weights]:
        return unpack(additive(self, query, memory, lengths, mask, mode))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, units={self.units}, bias={self.bias is not None}"


class LocationSensitiveAttention(MemoryAttention):
    r"""Location-sensitive attention of Chorowski et al. (NeurIPS 2015, eqs. 8 and 9).

    .. math::
        f_i = F * \alpha_{i-1}, \quad e_{ij} = w^\top \tanh(W s_{i-1} + V h_j + U f_{ij} + b), \quad
        \alpha_i = \mathrm{softmax}(e_i)

    One step at a time, because a step needs the weights of the one before. The convolution is centred and padded with
    zeros.

    Parameters
    ----------
    query_size, memory_size, units, bias
        As in :class:`BahdanauAttention`.
    filters : int
        Number of filters (rows of F); the paper has 10.
    kernel_size : int
        Their width, odd; the paper has 201.

    Notes
    -----
    All weights are drawn from N(0, 0.1^2) and the bias is zero, as in the authors' program (attention-lvcsr,
    ``lvsr/configs/prototype_speech.yaml``; there, too, only V h has a bias). Which weights the first step shall see as
    the ones before it the formula leaves open: here they are zero. That program begins with a 1 at the first position;
    pass it as `previous` to begin so.

    The key of a step is ``V h + U f``. The features f ``[B, T_k, filters]`` and that sum, of the size of the projected
    memory, are formed in every step but the first.

    Examples
    --------
    >>> import torch
    >>> from attnfast.nn import LocationSensitiveAttention
    >>> attention = LocationSensitiveAttention(query_size=8, memory_size=6, units=16, kernel_size=21)
    >>> projected = attention.project_memory(torch.randn(2, 50, 6))
    >>> weights = torch.zeros(2, 50)
    >>> for state in torch.randn(3, 2, 8):
    ...     context, weights = attention.step(state, projected, previous=weights)
    >>> context.shape, weights.shape
    (torch.Size([2, 6]), torch.Size([2, 50]))
    """

    def __init__(
        self, query_size: int, memory_size: int, units: int, filters: int = 10, kernel_size: int = 201,
        bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(query_size, memory_size)
        positive(units=units, filters=filters, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd integer > 0, got {kernel_size}")
        self.units, self.filters, self.kernel_size = units, filters, kernel_size
        self.query_weight = nn.Parameter(torch.empty(units, query_size))
        self.memory_weight = nn.Parameter(torch.empty(units, memory_size))
        self.location_kernel = nn.Parameter(torch.empty(filters, 1, kernel_size))
        self.location_weight = nn.Parameter(torch.empty(units, filters))
        self.score_weight = nn.Parameter(torch.empty(units))
        self.bias = nn.Parameter(torch.empty(units)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        for name, parameter in self.named_parameters():
            if name == "bias":
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.1)

    def project_memory(self, memory: Tensor) -> ProjectedMemory:
        """``V h_j`` for all j, ``[B, T_k, units]``, beside the memory itself."""
        self._check_memory(memory)
        return ProjectedMemory(nn.functional.linear(memory, self.memory_weight), memory)

    def forward(  # type: ignore[override]
        self, query: Tensor, memory: Tensor | ProjectedMemory, lengths: Tensor | None = None, *,
        previous: Tensor | None = None, mask: Tensor | None = None, return_weights: bool = True,
    ) -> tuple[Tensor, Weights]:  # fmt: skip
        """Attend for one step.

        Parameters
        ----------
        query : Tensor
            ``[B, query_size]``.
        memory, lengths
            As in :meth:`MemoryAttention.forward`.
        previous : Tensor, optional
            Weights of the step before, ``[B, T_k]`` (or their sum over all steps before). Default: zeros, the first
            step.
        mask : Tensor, optional
            Boolean ``[B, T_k]`` or ``[T_k]``, True = may attend.
        return_weights : bool
            The next step needs the weights: they are the default.

        Returns
        -------
        tuple
            context ``[B, memory_size]``, weights ``[B, T_k]`` or None.
        """
        if query.dim() != 2:
            raise ValueError(f"query: expected one step [B, {self.query_size}], got {list(query.shape)}")
        query, memory, _ = self._prepare(query, memory)
        if previous is not None:
            if previous.shape != memory.keys.shape[:2]:
                expected = f"[B, T_k] = {list(memory.keys.shape[:2])}"
                raise ValueError(f"previous: expected {expected}, got {list(previous.shape)}")
            memory = ProjectedMemory(self._with_location(memory.keys, previous), memory.values)
        if mask is not None and mask.dim() == 2:
            mask = mask.unsqueeze(1)
        result = additive(self, query, memory, lengths, mask, bool(return_weights))
        return one_row(True, *unpack(result), True)

    def step(  # type: ignore[override]
        self, query: Tensor, memory: ProjectedMemory, lengths: Tensor | None = None, *, previous: Tensor | None = None
    ) -> tuple[Tensor, Weights]:
        """:meth:`forward` for a memory that is projected already."""
        if not isinstance(memory, ProjectedMemory):
            raise TypeError(f"memory: step takes what project_memory returns, got {type(memory).__name__}")
        return self(query, memory, lengths, previous=previous)

    def _with_location(self, keys: Tensor, previous: Tensor) -> Tensor:
        features = nn.functional.conv1d(previous.unsqueeze(1), self.location_kernel, padding=self.kernel_size // 2)
        weight = self.location_weight.t().expand(keys.shape[0], self.filters, self.units)
        return torch.baddbmm(keys, features.transpose(1, 2), weight)

    def extra_repr(self) -> str:
        sizes = f"units={self.units}, filters={self.filters}, kernel_size={self.kernel_size}"
        return f"{super().extra_repr()}, {sizes}, bias={self.bias is not None}"


class HardAttentionOutput(NamedTuple):
    """What :class:`HardAttention` returns, without the T_q axis for one step.

    Attributes
    ----------
    context : Tensor
        The chosen annotation, ``[B, T_q, memory_size]``; 0 where nothing may be seen.
    weights : Tensor
        The probabilities that the choice was made by, ``[B, T_q, T_k]``.
    log_prob : Tensor
        Logarithm of the probability of the choice, ``[B, T_q]``; 0 where nothing may be seen.
    choice : Tensor
        int64 ``[B, T_q]``, the chosen position; -1 where nothing may be seen.
    """

    context: Tensor
    weights: Tensor
    log_prob: Tensor
    choice: Tensor


class HardAttention(BahdanauAttention):
    r"""Hard attention of Xu et al., "Show, Attend and Tell" (ICML 2015, section 4.1), with additive scores.

    .. math::
        \alpha_{ij} = \mathrm{softmax}_j(v^\top \tanh(W s_i + U h_j + b)), \quad
        l_i \sim \mathrm{Categorical}(\alpha_i), \quad c_i = h_{l_i}

    In training mode l is drawn (`torch.manual_seed` determines the draw); in evaluation mode it is the most probable
    position, the first of equal ones. The context has no gradient with respect to the scores. REINFORCE (Williams 1992)
    adds ``-(reward - baseline).detach() * log_prob`` to the loss, and Xu et al. the entropy of `weights`.

    Parameters are those of :class:`BahdanauAttention`.

    Notes
    -----
    The paper states no initial values. Weights are drawn from N(0, 0.01^2) and the bias is zero, as in its authors'
    program (arctic-captions, ``norm_weight`` in ``capgen.py``). That program makes W orthogonal where it is square;
    this module does not. It also adds a number to all scores, which no softmax can see.

    A draw finds a uniform number among the running sums of the weights. A step in training allocates those sums beside
    its outputs, in evaluation nothing of that size.

    Examples
    --------
    >>> import torch
    >>> from attnfast.nn import HardAttention
    >>> attention = HardAttention(query_size=8, memory_size=6, units=16)
    >>> context, weights, log_prob, choice = attention(torch.randn(2, 3, 8), torch.randn(2, 5, 6))
    >>> context.shape, weights.shape, log_prob.shape, choice.shape
    (torch.Size([2, 3, 6]), torch.Size([2, 3, 5]), torch.Size([2, 3]), torch.Size([2, 3]))
    """

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        for weight in (self.query_weight, self.memory_weight, self.score_weight):
            nn.init.normal_(weight, std=0.01)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(  # type: ignore[override]
        self, query: Tensor, memory: Tensor | ProjectedMemory, lengths: Tensor | None = None, *,
        mask: Tensor | None = None,
    ) -> HardAttentionOutput:  # fmt: skip
        """Choose one position for each query; arguments as in :meth:`MemoryAttention.forward`."""
        query, memory, single = self._prepare(query, memory)
        if mask is not None and single and mask.dim() == 2:
            mask = mask.unsqueeze(1)
        weights = additive(self, query, memory, lengths, mask, True).weights
        if weights.shape[-1] == 0:
            zeros = weights.new_zeros(weights.shape[:2])
            context = memory.values.new_zeros(*weights.shape[:2], self.memory_size)
            output = HardAttentionOutput(context, weights, zeros, zeros.long() - 1)
            return HardAttentionOutput(*(x.squeeze(1) for x in output)) if single else output
        top, choice = drawn(weights.detach()) if self.training else weights.detach().max(-1)  # max: the first of equals
        seen, place = top > 0, choice.clamp(min=0).unsqueeze(-1)
        otherwise = (0 * top).to(weights.dtype)  # NaN where a score is NaN
        context = memory.values.gather(1, place.expand(-1, -1, self.memory_size))
        context = context.to(weights.dtype).where(seen.unsqueeze(-1), otherwise.unsqueeze(-1))
        log_prob = weights.gather(-1, place).squeeze(-1).where(seen, 1 + otherwise).log()
        output = HardAttentionOutput(context, weights, log_prob, choice.where(seen, -1))
        return HardAttentionOutput(*(x.squeeze(1) for x in output)) if single else output

    def step(  # type: ignore[override]
        self, query: Tensor, memory: ProjectedMemory, lengths: Tensor | None = None
    ) -> HardAttentionOutput:
        """:meth:`forward` for one query ``[B, query_size]`` and a memory that is projected already."""
        if not isinstance(memory, ProjectedMemory):
            raise TypeError(f"memory: step takes what project_memory returns, got {type(memory).__name__}")
        return self(query, memory, lengths)


def additive(
    module: Any, query: Tensor, memory: ProjectedMemory, lengths: Tensor | None, mask: Tensor | None, mode: bool | str
) -> Any:
    """``attnfast.additive_attention`` with a module's `query_weight`, `score_weight` and `bias`."""
    return functional.additive_attention(
        nn.functional.linear(query, module.query_weight), memory.keys, memory.values, module.score_weight,
        score_bias=module.bias, key_lengths=lengths, mask=mask, return_weights=mode,
    )  # fmt: skip


def drawn(weights: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of the weights, a position drawn with their probabilities) of each row ``[..., T_k]``.

    The position is the first whose running sum exceeds a uniform share of the whole, so none of weight 0 is drawn: the
    share is at most 1 - 2^-24 and its product with the sum stays below the sum.
    """
    sums = weights.cumsum(-1, dtype=real_dtype(weights.dtype))
    total = sums[..., -1:]
    choice = torch.searchsorted(sums, torch.rand_like(total) * total, right=True).clamp(max=weights.shape[-1] - 1)
    return total.squeeze(-1), choice.squeeze(-1)
