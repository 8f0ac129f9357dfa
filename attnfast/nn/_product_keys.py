"""A feed-forward layer that is a memory: product keys choose a few of n x n rows for each token.

The layer holds the query network, the half keys and the table of values; the read itself, exact choice and gradients
included, is ``attnfast.product_key_read``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnfast import _validate as check
from attnfast._gather import product_key_read
from attnfast._memory import pick_count
from attnfast.nn._base import positive
from attnfast.reference import ProductKeyReadOutput

NORMS = (None, "batch", "layer")


class ProductKeyMemory(nn.Module):
    r"""Product-key memory layer (Lample et al. 2019), in the place of a transformer's feed-forward layer.

    .. math::
        q_h &= \mathrm{norm}(W_h x + b_h), \qquad
        s_{h,\,i n + j} = q_{h,0} \cdot keys_{h,0,i} + q_{h,1} \cdot keys_{h,1,j} \\
        y &= \sum_h \sum_{m \in \mathrm{top}\,k(s_h)} \mathrm{softmax}(s_h)_m\; values_m

    with heads h and the halves :math:`q_{h,0}, q_{h,1}` of a query. A token reads `heads` x `k` rows of the n x n.

    Parameters
    ----------
    d_model : int
        Size of x, and of y.
    n_keys : int
        n, the half keys of each half: the table of values has n x n rows.
    heads : int
        H; each has half keys of its own, the values are shared.
    d_key : int
        Size of a query of one head, both halves together: an even number.
    k : int
        How many rows a head reads: at most n x n and 2048.
    d_value : int, optional
        Size of a row of values, if not `d_model`; then a linear layer without bias takes the read to `d_model`.
    query_norm : {"layer", "batch", None}
        What normalises queries. ``"layer"``: layer normalisation of each half query, with one gain and bias for all, as
        in the package product-key-memory. ``"batch"``: batch normalisation of each of the H x `d_key` features, as in
        the paper; in training a token then depends on the others of its batch, later ones included.
    bias : bool
        Whether the query network has b.
    input_dropout, query_dropout, value_dropout : float
        Dropout in training, of x as the query network sees it, of the queries, and of what was read.
    sparse_grad : bool
        If True, the gradient of `values` is a sparse tensor in memory that does not depend on n, for SparseAdam,
        Adagrad and SGD; in eager mode only. See :func:`attnfast.weighted_gather`.

    Attributes
    ----------
    keys : Parameter
        Half keys ``[H, 2, n, d_key / 2]``: ``keys[:, 0]`` are the row keys, ``keys[:, 1]`` the column keys.
    values : Parameter
        ``[n * n, d_value]``; row i n + j belongs to row key i and column key j.

    Notes
    -----
    Keys are drawn uniformly from +-(d_key / 2)^-1/2, values from a normal distribution of variance 1 / d_value, as in
    the code that the authors published (XLM); there, 4 heads read k = 32 of 512 x 512 slots, queries are of size 256,
    and the values have a learning rate of their own. Linear layers begin as torch's do.

    References
    ----------
    Lample et al., "Large Memory Layers with Product Keys", NeurIPS 2019; Berges et al., "Memory Layers at Scale", 2024.

    Examples
    --------
    >>> import torch
    >>> from attnfast.nn import ProductKeyMemory
    >>> layer = ProductKeyMemory(64, n_keys=32, heads=2, d_key=32, k=8)
    >>> layer(torch.randn(3, 10, 64)).shape
    torch.Size([3, 10, 64])
    """

    def __init__(
        self, d_model: int, *, n_keys: int = 512, heads: int = 4, d_key: int = 256, k: int = 32,
        d_value: int | None = None, query_norm: str | None = "layer", bias: bool = True, input_dropout: float = 0.0,
        query_dropout: float = 0.0, value_dropout: float = 0.0, sparse_grad: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        d_value = d_model if d_value is None else d_value
        positive(d_model=d_model, n_keys=n_keys, heads=heads, d_key=d_key, k=k, d_value=d_value)
        if d_key % 2:
            raise ValueError(f"d_key: expected an even number (a query has two halves), got {d_key}")
        if query_norm not in NORMS:
            raise ValueError(f"query_norm: expected one of {', '.join(map(repr, NORMS))}, got {query_norm!r}")
        dropouts = {"input_dropout": input_dropout, "query_dropout": query_dropout, "value_dropout": value_dropout}
        for name, p in dropouts.items():
            if not 0.0 <= p <= 1.0:
                raise ValueError(f"{name}: expected a probability in [0, 1], got {p}")
        self.d_model, self.n_keys, self.heads, self.d_key, self.d_value = d_model, n_keys, heads, d_key, d_value
        self.k = pick_count("k", k, n_keys * n_keys, "n_keys * n_keys")
        self.query_norm, self.sparse_grad = query_norm, check.flag("sparse_grad", sparse_grad)
        self.input_dropout, self.query_dropout, self.value_dropout = input_dropout, query_dropout, value_dropout
        self.query = nn.Linear(d_model, heads * d_key, bias)
        self.norm: nn.Module | None = None
        if query_norm is not None:
            self.norm = nn.LayerNorm(d_key // 2) if query_norm == "layer" else nn.BatchNorm1d(heads * d_key)
        self.keys = nn.Parameter(torch.empty(heads, 2, n_keys, d_key // 2))
        self.values = nn.Parameter(torch.empty(n_keys * n_keys, d_value))
        self.output = None if d_value == d_model else nn.Linear(d_value, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew; batch statistics begin again."""
        for layer in (self.query, self.norm, self.output):
            if layer is not None:
                layer.reset_parameters()  # type: ignore[operator]
        bound = (self.d_key // 2) ** -0.5
        nn.init.uniform_(self.keys, -bound, bound)
        nn.init.normal_(self.values, std=self.d_value**-0.5)

    def forward(self, x: Tensor, *, return_aux: bool = False) -> Tensor | ProductKeyReadOutput:
        """Read the memory for every token.

        Parameters
        ----------
        x : Tensor
            ``[..., d_model]``.
        return_aux : bool
            Whether slots and weights are wanted too, for statistics of how the memory is used.

        Returns
        -------
        Tensor or ProductKeyReadOutput
            ``[..., d_model]`` in the dtype of x; with `return_aux` also ``indices [..., H, k]``, best first, and
            ``weights [..., H, k]``.

        Raises
        ------
        ValueError, TypeError
            An x of another size or kind.
        """
        check.floating("x", x)
        if x.dim() < 1 or x.shape[-1] != self.d_model:
            expected, got = f"[..., d_model] with d_model = {self.d_model}", check.shape_text(x.shape)
            raise ValueError(f"x: expected {expected}, got {got}")
        row_keys, column_keys = self.keys.unbind(1)
        read = product_key_read(
            self.queries(x), row_keys, column_keys, self.values, self.k, sparse_grad=self.sparse_grad,
            return_aux=return_aux,
        )  # fmt: skip
        output = (read if isinstance(read, Tensor) else read.output).to(x.dtype)
        output = nn.functional.dropout(output, self.value_dropout, self.training)
        if self.output is not None:
            output = self.output(output).to(x.dtype)  # autocast has a dtype of its own
        return output if isinstance(read, Tensor) else ProductKeyReadOutput(output, read.indices, read.weights)

    def queries(self, x: Tensor) -> Tensor:
        """The normalised queries ``[..., H, 2, d_key / 2]`` of tokens ``[..., d_model]``."""
        query = self.query(nn.functional.dropout(x, self.input_dropout, self.training))
        if isinstance(self.norm, nn.BatchNorm1d):
            query = self.norm(query.reshape(-1, query.shape[-1])).reshape(query.shape)
        query = query.unflatten(-1, (self.heads, 2, self.d_key // 2))
        if isinstance(self.norm, nn.LayerNorm):
            query = self.norm(query)
        return nn.functional.dropout(query, self.query_dropout, self.training)

    def extra_repr(self) -> str:
        sizes = f"d_model={self.d_model}, n_keys={self.n_keys}, heads={self.heads}, d_key={self.d_key}, k={self.k}"
        rest = f"d_value={self.d_value}, query_norm={self.query_norm!r}, sparse_grad={self.sparse_grad}"
        dropout = ", ".join(
            f"{name}={getattr(self, name)}" for name in ("input_dropout", "query_dropout", "value_dropout")
        )
        return f"{sizes}, {rest}, {dropout}"
