"""Second and higher derivatives of the cores.

The kernels give the first derivative. Its own derivative is rarely on a hot path (gradient penalties, Hessian-vector
products), so it is taken from the specification: ``reference.dot_attention`` (``reference.additive_core``) is
differentiated twice in blocks of query rows. Query rows meet each other only in sums (the gradients of key, value,
sink, broadcast biases and score parameters), hence the blocks are independent and the extra memory is
``O(B H block T_k)``, for the additive core times D, and not the same with T_q for the block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnfast import ops, reference

# Elements of one [B, H, block, T_k] intermediate; about twenty of them live at a time.
_BLOCK_ELEMENTS = 2**19
_QUERY = 3  # slots: gradients of out, lse, weights; then the inputs, of which bias, bias2, sink, center come last


def second_order(
    grad_grads: Sequence[Tensor | None],
    first_grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    options: ops.DotAttentionOptions,
    wanted: Sequence[bool],
    core: Callable[..., Any] = reference.dot_attention,
) -> list[Tensor | None]:
    """Differentiate the backward pass.

    Parameters
    ----------
    grad_grads : sequence
        Gradients of what the backward returned: those of the inputs; None = zero.
    first_grads : sequence
        What the backward was given: gradients of out, base-2 lse and weights; None = zero.
    inputs : sequence
        query, key, value, (weight, score_bias,) bias, bias2, sink, center.
    options : DotAttentionOptions
        The call's options.
    wanted : sequence of bool
        Which of first_grads, then inputs, need a gradient.
    core : callable
        The core's specification: ``core(*inputs, options, return_lse, rows=, center=)``.

    Returns
    -------
    list
        Their gradients, None where not wanted or zero. In grad mode they are differentiable themselves.
    """
    query, key = inputs[0], inputs[1]
    assert query is not None and key is not None
    results: list[Tensor | None] = [None] * (3 + len(inputs))
    if all(g is None for g in grad_grads) or all(g is None for g in first_grads) or not any(wanted):
        return results
    rows = query.shape[2]
    width = query.shape[0] * query.shape[1] * key.shape[2]
    if core is not reference.dot_attention:
        width *= query.shape[3]  # it forms every term of every score
    block = max(1, min(rows, _BLOCK_ELEMENTS // max(width, 1)))
    tensors = [*first_grads, *inputs]
    if not torch.is_grad_enabled():  # nothing of a block may stay alive in a graph
        tensors = [None if tensor is None else tensor.detach() for tensor in tensors]
    biases = (len(tensors) - 4, len(tensors) - 3)
    has_rows = [_has_rows(slot, tensor, rows, options, biases) for slot, tensor in enumerate(tensors)]
    has_rows[-1] = tensors[-1] is not None  # the centre of a prior
    pieces: list[list[Tensor]] = [[] for _ in tensors]
    # torch.func and not torch.autograd.grad, because this may itself run inside of a vmap.
    with torch.autocast(query.device.type, enabled=False):
        for first in range(0, rows, block):
            place = (first, min(block, rows - first), rows)
            for slot, piece in _block(grad_grads, tensors, has_rows, options, wanted, core, place).items():
                if pieces[slot] and not has_rows[slot]:
                    pieces[slot][0] = pieces[slot][0] + piece
                else:
                    pieces[slot].append(piece)
        for slot, parts in enumerate(pieces):
            if parts:
                results[slot] = torch.cat(parts, 2) if has_rows[slot] else parts[0]
    return results


def _has_rows(
    slot: int, tensor: Tensor | None, rows: int, options: ops.DotAttentionOptions, biases: Sequence[int]
) -> bool:
    """Whether dimension 2 of this operand runs over the query rows."""
    if tensor is None:
        return False
    if slot < 2:
        return True  # gradients of out and lse
    if slot == 2:
        return options.weights_mode != ops.WEIGHTS_COLUMN_SUM
    if slot in biases:
        return tensor.shape[2] == rows and rows != 1
    return slot == _QUERY


def _block(
    grad_grads: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    has_rows: Sequence[bool],
    options: ops.DotAttentionOptions,
    wanted: Sequence[bool],
    core: Callable[..., Any],
    place: tuple[int, int, int],
) -> dict[int, Tensor]:
    """The wanted gradients of one block of query rows, by slot."""
    first, size, rows = place

    def cut(tensor: Tensor, along_rows: bool) -> Tensor:
        return tensor.narrow(2, first, size) if along_rows else tensor

    parts = {at: cut(tensor, has_rows[at]) for at, tensor in enumerate(tensors) if tensor is not None}
    targets = {at: cut(grad, has_rows[at]) for at, grad in enumerate(grad_grads, start=3) if grad is not None}
    if options.mask is not None and options.mask.shape[2] != 1:
        options = options._replace(mask=options.mask.narrow(2, first, size))
    if options.window_bounds is not None and options.window_bounds.shape[2] != 1:
        options = options._replace(window_bounds=options.window_bounds.narrow(2, first, size))

    def backward(*values: Tensor) -> tuple[Tensor, ...]:
        given = {**parts, **dict(zip(sources, values, strict=True))}

        def forward(*values: Tensor) -> tuple[Tensor, ...]:
            operands = [{**given, **dict(zip(targets, values, strict=True))}.get(at) for at in range(3, len(tensors))]
            out, lse, weights = core(*operands[:-1], options, 1 in given, rows=(first, rows), center=operands[-1])
            results = (out, None if lse is None else lse / ops.LN2, weights)
            return tuple(result for at, result in enumerate(results) if at in given and result is not None)

        pull = torch.func.vjp(forward, *(given[at] for at in targets))[1]
        return pull(tuple(given[at] for at in range(3) if at in given))

    sources = [at for at in parts if wanted[at]]
    pull = torch.func.vjp(backward, *(parts[at] for at in sources))[1]
    return dict(zip(sources, pull(tuple(targets.values())), strict=True))
