"""Differentiable exchanges of rows between ranks: each row to the rank that owns it, and back.

All sums that cross ranks are made of rows that arrive in the order of their ranks, so results do not depend on timing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function

from attnfast.distributed._group import Group, contact


def gather(x: Tensor, group: Group, doing: str) -> Tensor:
    """``[B, ...]`` of each rank to ``[P, B, ...]`` on all; a gradient comes back as the sum over ranks."""
    return _Gather.apply(x, group, doing)


def swap(x: Tensor, group: Group, doing: str) -> Tensor:
    """Part p of ``[P, B, ...]`` goes to rank p; part p of the result came from rank p. Its own inverse and
    derivative."""
    return _Swap.apply(x, group, doing)


class Routing:
    """Where M rows of this rank belong: ``owner [M]`` holds ranks, or -1 for rows that go nowhere.

    `there` takes rows to their owners, where they lie by rank of origin and then in the order they had; `back` returns
    what owners made of them, and 0 for rows that went nowhere. Each is the other's derivative.
    """

    def __init__(self, owner: Tensor, group: Group, doing: str) -> None:
        self.group, self.doing = group, doing
        ranks = dist.get_world_size(group)
        self.rows = owner.numel()
        order = owner.argsort(stable=True)
        self.order = order[(owner < 0).sum() :]  # -1 sorts first
        counts = torch.bincount(owner[self.order], minlength=ranks)
        incoming = torch.empty_like(counts)
        with contact(group, doing):
            dist.all_to_all_single(incoming, counts, group=group)
        self.sent, self.received = counts.tolist(), incoming.tolist()

    def there(self, x: Tensor) -> Tensor:
        return _There.apply(x, self)

    def back(self, x: Tensor) -> Tensor:
        return _Back.apply(x, self)

    def exchange(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        out = x.new_empty(sum(received), *x.shape[1:])
        with contact(self.group, self.doing):
            dist.all_to_all_single(out, x.contiguous(), received, sent, group=self.group)
        return out


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, doing: str) -> Tensor:
        ctx.group, ctx.doing = group, doing
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        with contact(group, doing):
            dist.all_gather(parts, x, group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return swap(grad, ctx.group, ctx.doing).sum(0), None, None


class _Swap(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, doing: str) -> Tensor:
        ctx.group, ctx.doing = group, doing
        x = x.contiguous()
        out = torch.empty_like(x)
        with contact(group, doing):
            dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return swap(grad, ctx.group, ctx.doing), None, None


class _There(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return routing.exchange(x[routing.order], routing.sent, routing.received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.routing.back(grad), None


class _Back(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        out = x.new_zeros(routing.rows, *x.shape[1:])
        out[routing.order] = routing.exchange(x, routing.received, routing.sent)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.routing.there(grad), None
