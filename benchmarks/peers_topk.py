"""Who is measured beside topk_scores: torch's product and topk, and FAISS's exhaustive index.

FAISS (``faiss-cpu``) multiplies by an OpenBLAS of its own, which takes some processors for ones without AVX-512, and
only takes it for more than 20 queries. ``faiss`` is its fastest setting: told the processor and to multiply always.
``faiss-stock`` has its own threshold.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch

from .cases_topk import TopkCase
from .registry import EAGER, OURS, Inputs, Peer, Unsupported, Workload, register_peer

_STOCK_THRESHOLD = 20  # queries from which FAISS multiplies by BLAS, as it comes


class AttnfastTopk(Peer):
    name = OURS
    suites = ("topk",)

    def build(self, case: TopkCase, inputs: Inputs) -> Workload:
        import attnfast

        tensors, mask = (inputs["query"], inputs["keys"]), inputs.tensors.get("mask")
        return Workload(lambda: attnfast.topk_scores(*tensors, case.count, mask=mask)[0], tensors, inputs.grad_out)


class EagerTopk(Peer):
    """``torch.topk`` of the matrix of scores."""

    name = EAGER
    suites = ("topk",)

    def build(self, case: TopkCase, inputs: Inputs) -> Workload:
        query, keys, mask = inputs["query"], inputs["keys"], inputs.tensors.get("mask")

        def call() -> torch.Tensor:
            scores = query @ keys.T
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            best: torch.Tensor = scores.topk(case.count).values
            return best.to(inputs.grad_out.dtype)

        return Workload(call, (query, keys), inputs.grad_out)


class Faiss(Peer):
    """``faiss.IndexFlatIP``; it has no gradient."""

    suites = ("topk",)

    def __init__(self, name: str, threshold: int) -> None:
        self.name = name
        self._threshold = threshold

    def build(self, case: TopkCase, inputs: Inputs) -> Workload:
        if case.dtype != torch.float32:
            raise Unsupported("IndexFlatIP holds float32")
        if case.masked:
            raise Unsupported("the peer covers searches without a mask")
        faiss = faiss_library()
        index = faiss.IndexFlatIP(case.size)
        index.add(inputs["keys"].detach().numpy())
        query = inputs["query"].detach().numpy()
        return Workload(lambda: torch.from_numpy(index.search(query, case.count)[0]), (), inputs.grad_out)

    @contextlib.contextmanager
    def _tuned(self) -> Iterator[None]:
        faiss = faiss_library()
        before = faiss.cvar.distance_compute_blas_threshold
        faiss.cvar.distance_compute_blas_threshold = self._threshold
        faiss.omp_set_num_threads(torch.get_num_threads())
        try:
            yield
        finally:
            faiss.cvar.distance_compute_blas_threshold = before

    def context(self) -> contextlib.AbstractContextManager[Any]:
        return self._tuned() if importlib.util.find_spec("faiss") else contextlib.nullcontext()


@functools.cache
def faiss_library() -> Any:
    if importlib.util.find_spec("faiss") is None:
        raise Unsupported("faiss is not installed; `pip install faiss-cpu`")
    import attnfast

    if any(isa.startswith("avx512") for isa in attnfast.available_isas()):
        os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")  # read when its library is loaded
    import faiss

    return faiss


for _peer in (AttnfastTopk(), EagerTopk(), Faiss("faiss", 0), Faiss("faiss-stock", _STOCK_THRESHOLD)):
    register_peer(_peer)
