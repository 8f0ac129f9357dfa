"""The two sides of the suite "functions": attnfast's function, and torch's or the formula in torch operations."""

from __future__ import annotations

from .cases_functions import FUNCTIONS, FunctionCase
from .registry import EAGER, OURS, TORCH, Inputs, Peer, Unsupported, Workload, register_peer


class AttnfastFunction(Peer):
    name = OURS
    suites = ("functions",)

    def build(self, case: FunctionCase, inputs: Inputs) -> Workload:
        import attnfast

        ours = FUNCTIONS[case.function].ours
        wanted = tuple(inputs[name] for name in inputs.wanted)
        return Workload(lambda: ours(attnfast, inputs.tensors), wanted, inputs.grad_out)


class TorchFunction(Peer):
    """`TORCH` where torch has a function for it, `EAGER` where the formula is written out."""

    suites = ("functions",)

    def __init__(self, name: str) -> None:
        self.name = name

    def build(self, case: FunctionCase, inputs: Inputs) -> Workload:
        function = FUNCTIONS[case.function]
        if function.peer != self.name:
            raise Unsupported("")  # the other one applies
        wanted = tuple(inputs[name] for name in inputs.wanted)
        return Workload(lambda: function.theirs(inputs.tensors), wanted, inputs.grad_out)


for _peer in (AttnfastFunction(), TorchFunction(TORCH), TorchFunction(EAGER)):
    register_peer(_peer)
