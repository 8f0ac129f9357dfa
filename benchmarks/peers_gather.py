"""Who is measured beside reads by index: torch's EmbeddingBag, FBGEMM, and the package product-key-memory."""

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
    """``torch.nn.functional.embedding_bag`` with a sparse gradient, which holds a row for each pick.

    Coalesced it is what ours is, sums of rows in the order of slots, and what SparseAdam and Adagrad make of it first.
    """

    suites = ("gather",)

    def __init__(self, name: str, coalesced: bool) -> None:
        self.name = name
        self._coalesced = coalesced

    def build(self, case: GatherCase, inputs: Inputs) -> Workload:
        weights = inputs["weights"]
        values = inputs["values"].detach().requires_grad_()  # whose hook is nobody else's
        if self._coalesced:
            values.register_hook(lambda grad: grad.coalesce())
        workload = _turns(
            inputs,
            lambda indices: torch.nn.functional.embedding_bag(
                indices, values, mode="sum", per_sample_weights=weights, sparse=True
            ),
        )
        leaves = {"values": values, "weights": weights}
        return Workload(workload.call, tuple(leaves[name] for name in inputs.wanted), inputs.grad_out)


class Fbgemm(Peer):
    """``fbgemm-gpu-cpu``, whose backward is a step of its optimizer and gives no gradient: forward only."""

    name = "fbgemm"
    suites = ("gather",)

    def build(self, case: GatherCase, inputs: Inputs) -> Workload:
        if importlib.util.find_spec("fbgemm_gpu") is None:
            raise Unsupported("fbgemm_gpu is not installed; `pip install fbgemm-gpu-cpu==1.8.0`")
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        bags = SplitTableBatchedEmbeddingBagsCodegen(
            [(case.slots, case.size, EmbeddingLocation.HOST, ComputeDevice.CPU)],
            optimizer=EmbOptimType.EXACT_SGD,
            pooling_mode=PoolingMode.SUM,
        )
        bags.weights_host = torch.nn.Parameter(inputs["values"].detach().view(-1), requires_grad=False)
        offsets = torch.arange(0, case.outputs * case.picks + 1, case.picks)
        weights = inputs["weights"].detach().flatten()
        workload = _turns(inputs, lambda indices: bags(indices.flatten(), offsets, weights))
        return Workload(workload.call, (), inputs.grad_out)


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
    EmbeddingBag(EAGER, False),
    EmbeddingBag("eager coalesced", True),
    Fbgemm(),
    AttnfastProductKeys(),
    ProductKeyMemory("pkm", False),
    ProductKeyMemory("pkm-sparse", True),
):
    register_peer(_peer)
