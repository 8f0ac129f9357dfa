"""What a rank sends and holds, by formula: docs/distributed.md explains them, the benchmark and tests hold them to it.

Bytes sent are payload, from one rank to others: all_gather sends a tensor to P - 1 ranks, an exchange (all_to_all) all
parts but a rank's own. Bytes held are the peak of a call beyond what the caller has before it, results included.
"""

from __future__ import annotations

from typing import NamedTuple

from attnfast.distributed._columns import BLOCK_BYTES
from attnfast.distributed._group import FACT_BYTES

_SLOT = 8  # int64


def agreement(ranks: int, facts: int) -> int:
    """Bytes of `agree` with that many names."""
    return (ranks - 1) * (1 + facts) * FACT_BYTES


class Ring(NamedTuple):
    """`context_parallel_attention` of one rank: sizes of its shards, bytes of an element and of an accumulator."""

    ranks: int
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_size: int
    value_size: int
    width: int
    real: int

    def key_value_elements(self) -> int:
        return self.batch * self.kv_heads * self.keys * (self.head_size + self.value_size)

    def sent_forward(self) -> int:
        return (self.ranks - 1) * self.key_value_elements() * self.width

    def sent_backward(self) -> int:
        """Keys and values again, and the sums of their gradients, which after P - 1 steps go home."""
        sums = self.ranks * self.key_value_elements() * self.real if self.ranks > 1 else 0
        return self.sent_forward() + sums

    def peak_forward(self) -> int:
        """Two sets of keys and values, the sum of outputs, a block's output (in a shorter dtype its product with the
        shares too), and seven numbers a row."""
        rows = self.batch * self.heads * self.queries
        sets = min(self.ranks, 2) * self.key_value_elements() * self.width
        block = self.width + (self.real if self.width < self.real else 0)
        return sets + rows * self.value_size * (self.real + block) + 7 * rows * self.real

    def peak_backward(self) -> int:
        """Two sets of keys and values and of their sums, the query's sum, and a block's three gradients.

        Of two ranks' only the sums are ever there twice at a time, and alone a rank has one set of each.
        """
        query = self.batch * self.heads * self.queries * self.head_size
        sets = (2 if self.ranks > 2 else 1) * self.width + min(self.ranks, 2) * self.real
        return self.key_value_elements() * (sets + self.width) + query * (self.real + self.width)


class Read(NamedTuple):
    """`ShardedMemory.read` of one rank: sizes, of which `slots` counts valid ones, bytes of an element and of a score.

    Of its picks `elsewhere` belong to other ranks, and `served` of its rows were picked by others: what a rank sends by
    rows depends on who has what was picked.
    """

    ranks: int
    slots: int
    queries: int
    picks: int
    key_size: int
    value_size: int
    width: int
    real: int
    elsewhere: int = 0
    served: int = 0

    @property
    def others(self) -> int:
        return self.ranks - 1

    def agreement(self) -> int:
        return agreement(self.ranks, 5)

    def rows_best(self, recorded: bool = False) -> int:
        """Queries to all, each rank's pairs, the slots that were picked, and rows back; a gradient wants keys too."""
        queries = self.queries * self.key_size * self.width
        pairs = self.queries * self.picks * (self.real + _SLOT)
        routes = self.others * _SLOT + self.elsewhere * _SLOT
        rows = self.served * (self.value_size + (self.key_size if recorded else 0)) * self.width
        return self.agreement() + self.others * (queries + pairs) + routes + rows

    def rows_best_backward(self) -> int:
        """The gradients of the rows that this rank picked, to their owners."""
        return self.elsewhere * (self.value_size + self.key_size) * self.width

    def rows_soft(self) -> int:
        """Queries to all; an output and a log-sum-exp back."""
        each = (self.key_size + self.value_size) * self.width + self.real
        return self.agreement() + self.others * self.queries * each

    def columns_best(self, recorded: bool = False) -> int:
        """Slices of queries, parts of the score of every valid slot, the picks to all, and slices of results back."""
        keys, values = -(-self.key_size // self.ranks), -(-self.value_size // self.ranks)
        scores = self.queries * self.slots * self.real
        picks = self.queries * self.picks * (self.real + _SLOT + (self.real if recorded else 0))
        slices = self.queries * (keys + values) * self.width
        return self.agreement() + self.others * (scores + picks + slices)

    def columns_peak(self, block_bytes: int = BLOCK_BYTES) -> int:
        """Parts of a block's scores, those that arrive, and their sum before and after a part is added to it."""
        parts = self.ranks * self.queries * self.real
        block = min(self.slots, max(1, block_bytes // parts)) if self.picks else self.slots
        return 2 * (parts + self.queries * self.real) * block

    def columns_best_backward(self) -> int:
        """Gradients of the slices, and parts of those of the weights and of the scores that were picked."""
        keys, values = -(-self.key_size // self.ranks), -(-self.value_size // self.ranks)
        return self.others * self.queries * ((keys + values) * self.width + 2 * self.picks * self.real)

    def columns_soft(self) -> int:
        """Slices of queries, parts of scores to those who asked, their weights to all, and slices of results back."""
        keys, values = -(-self.key_size // self.ranks), -(-self.value_size // self.ranks)
        each = 2 * self.slots * self.real + (keys + values) * self.width
        return self.agreement() + self.others * self.queries * each

    def soft_backward(self, placement: str) -> int:
        """As much as the forward, but for the agreement: every exchange is turned round."""
        return (self.rows_soft() if placement == "rows" else self.columns_soft()) - self.agreement()
