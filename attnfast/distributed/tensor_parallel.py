"""How every operator of attnfast computes on DTensors: rules for ``torch.distributed.tensor``, registered on import.

A rule says of one dimension of a mesh: if the inputs lie like this, each rank may run the operator on its own part, and
the outputs then lie like that. DTensor chooses among the rules of an operator the one that moves the least, and moves
what does not fit. So a rule that is missing costs traffic, a rule that is wrong costs the result: there is none that
cuts what a rank needs as a whole (keys of a query, rows of a table), and none under which a number that an operator is
given, such as a position or a slot, would mean something else.

Every dimension of every argument has the name of an axis (`_ATTENTION`, ...). A rule for an axis shards the dimensions
of this name that have the axis' full size, and replicates tensors without one, whose gradients are then sums over ranks
(``Partial``). The axes:

=== =====================================================================================================
B   samples of attention; not of packed sequences
H   heads; grouped heads only where every rank gets whole groups, a single key head stays on all ranks
Q   rows of queries: reads by index; attention where nothing depends on a row's position
V   columns of a table of values
=== =====================================================================================================
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

import attnfast._additive_autograd
import attnfast._gather_autograd
import attnfast._memory_autograd
import attnfast.autograd  # noqa: F401  (these four define the operators)
from attnfast.ops import WEIGHTS_COLUMN_SUM, WEIGHTS_FULL, WEIGHTS_NONE, WEIGHTS_ROW_MAX

Axes = tuple[str, ...]

_ROWS, _SCORES = ("B", "H", "Q"), ("B", "H", "Q", "K")
_ATTENTION: dict[str, Axes] = {
    "query": (*_ROWS, ""), "key": ("B", "G", "K", ""), "value": ("B", "G", "K", ""), "weight": ("H", ""),
    "score_bias": ("H", ""), "bias": _SCORES, "bias2": _SCORES, "mask": _SCORES, "sink": ("H",), "center": _ROWS,
    "query_lengths": ("B",), "key_lengths": ("B",), "cu_seqlens_q": ("",), "cu_seqlens_k": ("",),
    "alibi_slopes": ("B", "H"), "window_bounds": (*_ROWS, ""), "out": (*_ROWS, ""), "lse": _ROWS,
}  # fmt: skip
_WEIGHTS: dict[int, Axes] = {
    WEIGHTS_NONE: ("",),
    WEIGHTS_FULL: _SCORES,
    WEIGHTS_COLUMN_SUM: ("B", "H", "K"),
    WEIGHTS_ROW_MAX: _ROWS,
}
_PICKS = ("Q", "")
_GATHER: dict[str, Axes] = {
    "indices": _PICKS, "weights": _PICKS, "values": ("", "V"), "scales": ("",), "out": ("Q", "V")
}  # fmt: skip
_TOPK: dict[str, Axes] = {
    "query": _PICKS, "keys": ("", ""), "key_scales": ("",), "mask": _PICKS, "scores": _PICKS, "indices": _PICKS
}  # fmt: skip
_MERGED = ("row_scores", "row_indices", "column_scores", "column_indices", "slots", "row_ranks", "column_ranks")
_PRODUCT: dict[str, Axes] = dict.fromkeys(_MERGED, _PICKS)


class _Call(NamedTuple):
    """An operator's call as its rules see it."""

    args: Mapping[str, Any]  # by name; tensors as DTensorSpecs, which have shape and mesh
    axes: Mapping[str, Axes]  # of tensors, by name
    sizes: Mapping[str, int]  # of axes that may be sharded

    def dim(self, name: str, axis: str) -> int | None:
        """The dimension of a tensor that a rule for `axis` shards."""
        source = name.removeprefix("grad_")
        spec = self.args.get(name) or self.args.get(source)
        for dim, label in enumerate(self.axes[source]):
            # A result is not among the arguments; it has the axis' full size.
            if label == axis and (spec is None or spec.shape[dim] == self.sizes[axis]):
                return dim
            if label == "G" and axis == "H" and (spec is None or spec.shape[dim] > 1):
                return dim
        return None

    def input(self, name: str, axis: str) -> Placement:
        dim = self.dim(name, axis)
        return Replicate() if dim is None else Shard(dim)

    def output(self, name: str, axis: str) -> Placement:
        if not self._made(name):
            return Replicate()
        dim = self.dim(name, axis)
        return Partial() if dim is None else Shard(dim)

    def _made(self, name: str) -> bool:
        """Whether a result is more than the empty tensor that stands for what was not asked for."""
        if not name.startswith("grad_"):
            return name not in ("weights", "weights_index") or self.axes[name] != ("",)
        wanted = [each for each in self.args["wanted"] if each[0] == name.removeprefix("grad_")]
        return wanted[0][1] and self.args[wanted[0][0]] is not None


def _attention(args: dict[str, Any]) -> _Call:
    mode, query, key = args["weights_mode"], args["query"], args["key"]
    packed = args["cu_seqlens_q"] is not None
    axes = {**_ATTENTION, "weights": _WEIGHTS[mode], "weights_index": _WEIGHTS[mode if mode == WEIGHTS_ROW_MAX else 0]}
    sizes = {}
    if packed:
        axes["alibi_slopes"] = ("", "H")
    else:
        sizes["B"] = query.shape[0]
    if _whole_groups(query.shape[1], key.shape[1], query.mesh.shape):
        sizes["H"] = query.shape[1]
    positional = args["alibi_slopes"] is not None or args["query_lengths"] is not None or packed
    if not (positional or args["causal"]) and args["window_left"] == args["window_right"] == -1:
        sizes["Q"] = query.shape[2]
    return _Call(args, axes, sizes)


def _whole_groups(heads: int, key_heads: int, mesh: tuple[int, ...]) -> bool:
    """Whether H and H_kv are cut at the same groups, whichever dimensions of the mesh cut them.

    Cuts into more parts than there are key heads do not count: DTensor does not try them.
    """
    if heads == key_heads or key_heads == 1:
        return True
    several = (part for count in range(1, len(mesh) + 1) for part in itertools.combinations(mesh, count))
    return all(key_heads % math.prod(part) == 0 for part in several if math.prod(part) <= key_heads)


def _by_index(axes: dict[str, Axes], rows: str, table: str | None) -> Callable[[dict[str, Any]], _Call]:
    def call(args: dict[str, Any]) -> _Call:
        sizes = {"Q": args[rows].shape[0]}
        if table is not None:
            sizes["V"] = args[table].shape[1]
        return _Call(args, axes, sizes)

    return call


_gather, _topk = _by_index(_GATHER, "indices", "values"), _by_index(_TOPK, "query", None)
_product = _by_index(_PRODUCT, "row_scores", None)

# Results by name, or inputs whose gradients they are; what makes a call of its arguments.
_DOT_INPUTS = ("query", "key", "value", "bias", "bias2", "sink", "center")
_ADDITIVE_INPUTS = (*_DOT_INPUTS[:3], "weight", "score_bias", *_DOT_INPUTS[3:])
_FORWARD = ("out", "lse", "weights", "weights_index")
_OPERATORS: dict[str, tuple[Callable[[dict[str, Any]], _Call], tuple[str, ...]]] = {
    "dot_attention_fwd": (_attention, _FORWARD),
    "dot_attention_bwd": (_attention, _DOT_INPUTS),
    "additive_attention_fwd": (_attention, _FORWARD),
    "additive_attention_bwd": (_attention, _ADDITIVE_INPUTS),
    "weighted_gather_fwd": (_gather, ("out",)),
    "weighted_gather_bwd": (_gather, ("weights", "values")),
    "product_keys": (_product, ("slots", "row_ranks", "column_ranks")),
    "topk_scores_fwd": (_topk, ("scores", "indices")),
    "topk_scores_bwd": (_topk, ("query", "keys")),
}

Rule = tuple[list[Placement], list[Placement | None]]


def rules(name: str, *values: Any) -> list[Rule]:
    """The acceptable placements of ``attnfast::name`` on one dimension of a mesh, as `register_sharding` takes them.

    Parameters
    ----------
    name : str
        Of the operator.
    *values
        Its arguments, tensors as anything with ``shape`` and ``mesh``.

    Returns
    -------
    list of (list of Placement, list of Placement or None)
        Of the outputs, and of the arguments (None for what is no tensor); the first replicates everything.
    """
    make, results = _OPERATORS[name]
    schema = getattr(torch.ops.attnfast, name).default._schema
    names = [argument.name for argument in schema.arguments]
    args = dict(zip(names, values, strict=True))
    if name.endswith("_bwd"):
        args["wanted"] = list(zip(results, args["needs"], strict=True))
        results = tuple(f"grad_{each}" for each in results)
    call = make(args)
    tensors = [hasattr(value, "mesh") for value in values]

    def placed(input_of: Callable[[str], Placement], output_of: Callable[[str], Placement]) -> Rule:
        inputs = [input_of(each) if tensor else None for each, tensor in zip(names, tensors, strict=True)]
        return [output_of(each) for each in results], inputs

    def of_axis(axis: str) -> Rule:
        return placed(lambda each: call.input(each, axis), lambda each: call.output(each, axis))

    return [placed(lambda _: Replicate(), lambda _: Replicate()), *(of_axis(axis) for axis in call.sizes)]


def _registered() -> Iterator[str]:
    """Register all rules; yields the names of the operators."""
    propagator: Any = DTensor._op_dispatcher.sharding_propagator
    for name in _OPERATORS:
        operator = getattr(torch.ops.attnfast, name).default
        register_sharding(operator)(lambda *values, name=name: rules(name, *values))
        # DTensor remembers what it chose, by tensors and, as register_sharding has it, by the arguments from the first
        # integer on. Here None counts (query_lengths or key_lengths?), and which gradients are wanted.
        propagator.op_to_schema_info[operator] = RuntimeSchemaInfo(0, needs_pytree=True)
        yield name


OPERATORS = tuple(_registered())
