"""Who is measured beside reads by index: torch's EmbeddingBag, and the package product-key-memory."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable

import torch

from .cases_gather import GatherCase, ProductKeysCase
from .registry import EAGER, OURS, Inputs, Peer, Unsupported, Workload, register_peer


def _turns(inputs: Inputs, read: Callable[[torch.Tensor], torch.Tensor]) -> Workload:
    """Each call takes the next set of indices, from the first on."""
    sets = itertools.cycle(inputs["indices"].unbind())
    return Workload(lambda: read(next(sets)), tuple(inputs[name] for name in inputs.wanted), inputs.grad_out)


class AttnfastGather(Peer):
    name = OURS
    suites = ("gather",)

    def build(self, case: GatherCase, inputs: Inputs) -> Workload:
        import attnfast

        weights, values = inputs["weights"], inputs["values"]
        return _turns(inputs, lambda indices: attnfast.weighted_gather(indices, weights, values, sparse_grad=True))


class EmbeddingBag(Peer):
    """``torch.nn.functional.embedding_bag`` with a sparse gradient, which holds a row for each pick."""

    name = EAGER
    suites = ("gather",)

    def build(self, case: GatherCase, inputs: Inputs) -> Workload:
        weights, values = inputs["weights"], inputs["values"]
        return _turns(
            inputs,
            lambda indices: torch.nn.functional.embedding_bag(
                indices, values, mode="sum", per_sample_weights=weights, sparse=True
            ),
        )


class AttnfastProductKeys(Peer):
    name = OURS
    suites = ("pkm",)

    def build(self, case: ProductKeysCase, inputs: Inputs) -> Workload:
        import attnfast

        query, keys, values = tensors = inputs["query"], inputs["keys"], inputs["values"]

        def read() -> torch.Tensor:
            out = attnfast.product_key_read(query, keys[:, :, 0], keys[:, :, 1], values, case.picks, sparse_grad=True)
            assert isinstance(out, torch.Tensor)
            return out

        return Workload(read, tensors, inputs.grad_out)


class ProductKeyMemory(Peer):
    """The module of product-key-memory without its projection and norm, so that the memory itself is timed.

    As it comes, the gradient of its values is dense; the peer ``-sparse`` sets ``EmbeddingBag.sparse``.
    """

    suites = ("pkm",)

    def __init__(self, name: str, sparse: bool) -> None:
        self.name = name
        self._sparse = sparse

    def build(self, case: ProductKeysCase, inputs: Inputs) -> Workload:
        if importlib.util.find_spec("product_key_memory") is None:
            raise Unsupported("product_key_memory is not installed; `pip install product-key-memory`")
        from product_key_memory import PKM

        module = PKM(1, heads=case.heads, num_keys=2, topk=case.picks, dim_head=case.size)
        module.to_queries, module.norm = torch.nn.Identity(), torch.nn.Identity()
        module.num_keys, module.num_memories = case.side, case.side**2
        # Parameters of the module's own sizes would be another table.
        module.keys = torch.nn.Parameter(inputs["keys"].detach())
        module.values.weight = torch.nn.Parameter(inputs["values"].detach())
        module.values.sparse = self._sparse
        query = inputs["query"]

        def read() -> torch.Tensor:
            out: torch.Tensor = module(query.transpose(1, 2).reshape(1, case.queries, -1))[0]
            return out

        return Workload(read, (query, module.keys, module.values.weight), inputs.grad_out)


for _peer in (
    AttnfastGather(),
    EmbeddingBag(),
    AttnfastProductKeys(),
    ProductKeyMemory("pkm", False),
    ProductKeyMemory("pkm-sparse", True),
):
    register_peer(_peer)
