"""The benchmark: does it measure what it says? Nothing here depends on how long anything takes."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import attnfast
from attnfast.cli._benchmarks import load_benchmarks

registry = load_benchmarks("registry")
measure = load_benchmarks("measure")
results = load_benchmarks("results")
report = load_benchmarks("report")
compare = load_benchmarks("compare")
chart = load_benchmarks("chart")
runner = load_benchmarks("runner")
memory = load_benchmarks("memory")
model_digits = load_benchmarks("model_digits")
cases_additive = load_benchmarks("cases_additive")
cases_dot = load_benchmarks("cases_dot")
cases_masks = load_benchmarks("cases_masks")
masks = load_benchmarks("masks")
sweep = load_benchmarks("sweep")
cases_scaling = load_benchmarks("cases_scaling")
scaling = load_benchmarks("scaling")
yardsticks = load_benchmarks("yardsticks")
Row = results.Row

DOT_CASES = registry.cases("dot")
QUICKEST = measure.Settings(sample_s=0.0, budget_s=0.0, min_rounds=3, max_rounds=3)


# ---------------------------------------------------------------------- statistics and interleaving


def test_summary_is_median_and_quartiles() -> None:
    assert measure.Summary.of([4.0, 1.0, 3.0, 2.0, 100.0]) == measure.Summary(3.0, 2.0, 4.0)
    assert measure.Summary.of([1.0, 2.0]) == measure.Summary(1.5, 1.25, 1.75)
    assert measure.Summary.of([7.0]) == measure.Summary(7.0, 7.0, 7.0)


def test_rounds_alternate_their_order() -> None:
    assert [measure.round_order(["a", "b", "c"], i) for i in range(3)] == [list("abc"), list("cba"), list("abc")]


def test_interleave_runs_every_program_once_a_round_in_alternating_order() -> None:
    order: list[str] = []

    def program(name: str, cost: float) -> Any:
        def sample(calls: int) -> float:
            order.append(name)
            return calls * cost

        return sample

    settings = measure.Settings(sample_s=0.01, budget_s=1.0, min_rounds=4, max_rounds=4)
    timing = measure.interleave({"a": program("a", 0.001), "b": program("b", 0.004), "c": program("c", 0.5)}, settings)
    rounds = order[-12:]
    assert "".join(rounds) == "abccbaabccba"
    assert timing.calls == {"a": 10, "b": 3, "c": 1}
    assert timing.time("b").median == pytest.approx(0.004)
    assert timing.ratio("b", "a").median == pytest.approx(4.0)


def test_ratios_are_taken_within_rounds() -> None:
    # The machine slows down during the run; the ratio does not change, while the ratio of any two medians might.
    timing = measure.Timing({"ours": [1.0, 2.0, 4.0], "torch": [3.0, 6.0, 12.0]}, {"ours": 1, "torch": 1})
    assert timing.ratio("torch", "ours") == measure.Summary(3.0, 3.0, 3.0)
    uneven = measure.Timing({"ours": [1.0, 1.0, 10.0], "torch": [2.0, 2.0, 2.0]}, {"ours": 1, "torch": 1})
    assert uneven.ratio("torch", "ours").median == 2.0


@pytest.mark.parametrize(
    ("seconds", "rounds"), [(0.001, 60), (0.05, 30), (1.0, 7), (100.0, 3)], ids=["many", "budget", "least", "long"]
)
def test_rounds_fit_the_budget(seconds: float, rounds: int) -> None:
    assert measure.rounds_for(seconds, measure.Settings(budget_s=1.5, min_rounds=7, max_rounds=60)) == rounds


def test_thread_count_is_restored_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), measure.thread_count(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("which", ["forward", "backward", "forward+backward", "forward, recording"])
def test_passes_time_what_they_name(which: str) -> None:
    seen: list[tuple[str, bool]] = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            seen.append(("forward", x.requires_grad and ctx.needs_input_grad[0]))
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            seen.append(("backward", True))
            return 2 * grad

    x = torch.ones(3, requires_grad=True)
    workload = registry.Workload(lambda: Probe.apply(x), (x,), torch.ones(3))
    sample = measure.sampler(registry.Peer(), workload, which)
    seen.clear()
    sample(2)
    expected = {
        "forward": ["forward"] * 2,
        "backward": ["backward"] * 2,
        "forward+backward": ["forward", "backward"] * 2,
        "forward, recording": ["forward"] * 2,
    }
    assert [name for name, _ in seen] == expected[which]
    with torch.set_grad_enabled(which != "forward"):
        run, grad = measure.step(workload, which)
    assert grad is (which != "forward")
    if which in ("forward", "forward, recording"):
        with torch.set_grad_enabled(grad):
            assert run().requires_grad is grad


# ---------------------------------------------------------------------- errors against the oracle


def test_relative_error() -> None:
    want = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert measure.relative_error(torch.tensor([1.0, -4.0]), want) == 0
    assert measure.relative_error(torch.tensor([2.0, -4.0]), want) == 0.25
    assert measure.relative_error(torch.tensor([math.nan, -4.0]), want) == math.inf


_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("case", DOT_CASES, ids=lambda case: case.name)
def test_every_peer_computes_the_case(case: Any) -> None:
    small = case.small()
    inputs = small.inputs()
    oracle = small.oracle(inputs)
    ran = []
    for peer in registry.peers(small):
        if peer.compiled:
            continue
        try:
            workload = peer.build(small, inputs)
        except registry.Unsupported as error:
            assert (peer.name, str(error)) == ("sdpa loop", ""), "only the loop may decline, where nothing is ragged"
            continue
        ran.append(peer.name)
        if oracle is None:
            assert case.dropout_p > 0
            continue
        output, gradient = measure.errors(small, peer, workload, inputs, oracle)
        assert 0 <= output < _TOLERANCE[case.dtype]
        assert 0 <= gradient < _TOLERANCE[case.dtype]
    assert ran[:3] == ["attnfast", "sdpa", "sdpa math"]
    assert ("sdpa loop" in ran) == case.varlen


def test_a_wrong_peer_shows_its_error() -> None:
    case = cases_dot.AttentionCase("wrong", heads=2, query_tokens=8)
    inputs = case.inputs()
    good = registry.find_peer("dot", "sdpa").build(case, inputs)
    off = dataclasses.replace(good, call=lambda: good.call() * torch.linspace(1, 1.1, 2).view(1, 2, 1, 1))
    oracle = case.oracle(inputs)
    # The oracle holds the first head alone: a fault in the second one is out of its sight, by design.
    assert measure.errors(case, registry.Peer(), off, inputs, oracle)[0] < 1e-5
    off = dataclasses.replace(good, call=lambda: good.call() * 1.1)
    output, gradient = measure.errors(case, registry.Peer(), off, inputs, oracle)
    assert output == pytest.approx(0.1, rel=1e-3)
    assert gradient == pytest.approx(0.1, rel=1e-3)


def test_the_binary_peer_computes_attention() -> None:
    case = registry.find_case("overhead", "1,1,8,64")
    inputs = case.inputs()
    oracle = case.oracle(inputs)
    peer = registry.find_peer("overhead", "attnfast._C")
    output, gradient = measure.errors(case, peer, peer.build(case, inputs), inputs, oracle)
    assert output < 1e-6
    assert gradient is None


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_flops_count_visible_pairs(which: str) -> None:
    per_pair = {"forward": 2 * 2 * 16, "backward": 2 * 5 * 16}[which]
    make = cases_dot.AttentionCase
    sizes: dict[str, Any] = {"heads": 2, "head_size": 16, "query_tokens": 6, "key_tokens": 9}
    assert make("a", **sizes).flops(which) == per_pair * 2 * 54
    assert make("a", **sizes, causal=True).flops(which) == per_pair * 2 * (1 + 2 + 3 + 4 + 5 + 6)
    tall = {**sizes, "query_tokens": 9, "key_tokens": 6}
    assert make("a", **tall, causal=True).flops(which) == per_pair * 2 * (21 + 3 * 6)
    square = {**sizes, "batch": 4, "query_tokens": 8, "key_tokens": 8}
    assert make("a", **square).lengths() == [8, 6, 4, 2]
    assert make("a", **square, key_lengths=True).flops(which) == per_pair * 2 * 8 * 20
    assert make("a", **square, varlen=True).flops(which) == per_pair * 2 * (64 + 36 + 16 + 4)
    assert make("a", **square, varlen=True, causal=True).flops(which) == per_pair * 2 * (36 + 21 + 10 + 3)
    assert make("a", **{**square, "batch": 1}, mask="documents").flops(which) == per_pair * 2 * 4 * 4
    assert make("a", **sizes, value_size=32).flops("forward") == 2 * (16 + 32) * 2 * 54


# ---------------------------------------------------------------------- registry and runner


def test_required_cases_are_there() -> None:
    cases = {case.name: case for case in DOT_CASES}
    for size in ((1, 8, 512, 64), (1, 8, 2048, 64), (1, 4, 8192, 64)):
        plain = [c for c in DOT_CASES if (c.batch, c.heads, c.query_tokens, c.head_size) == size and not c.options]
        assert plain, size
    assert {case.dtype for case in DOT_CASES} == {torch.float64, torch.float32, torch.bfloat16, torch.float16}
    options = {word.split(":")[0] for case in DOT_CASES for word in case.options.split()}
    assert options == {"causal", "mask", "key_lengths", "bias", "dropout", "varlen"}
    assert any(case.kv_heads != case.heads for case in DOT_CASES)
    assert any(case.value_size != case.head_size for case in DOT_CASES)
    assert {case.key_tokens for case in DOT_CASES if case.query_tokens == 1} == {1024, 8192}
    assert cases["1,8,512,64"].quick
    assert not cases["1,4,8192,64"].quick
    assert registry.suites() == (
        "dot",
        "additive",
        "topk",
        "threads",
        "masks",
        "accuracy",
        "overhead",
        "functions",
        "sweep",
        "scaling",
        "gather",
        "pkm",
        "gpu",
        "store",
        "modules",
        "distributed",
        "model",
    )
    assert registry.default_suites() == ("dot", "additive", "topk", "threads", "masks", "overhead", "model")
    assert all(registry.cases(name) for name in registry.suites() if name != "model")
    cells = {(case.query_tokens, case.head_size) for case in registry.cases("sweep")}
    assert cells == {(2**i, size) for i in range(13) for size in range(16, 257, 8)}


@pytest.mark.parametrize("case", registry.cases("gather") + registry.cases("pkm"), ids=lambda case: case.name)
def test_gather_peers_agree_with_the_oracle(case: Any) -> None:
    small = case.small()
    inputs = small.inputs()
    oracle = small.oracle(inputs)
    agreed = []
    for peer in registry.peers(small):
        try:
            workload = peer.build(small, inputs)
        except registry.Unsupported as reason:
            assert re.match("(product_key_memory|fbgemm_gpu) is not installed", str(reason))
            continue
        found = measure.errors(small, peer, workload, inputs, oracle)
        assert found[0] < 1e-5, (peer.name, found)
        assert (found[1] is None) if peer.name == "fbgemm" else (found[1] is not None and found[1] < 1e-5)
        agreed.append(peer.name)
    assert agreed[0] == "attnfast" and (case.suite == "pkm" or agreed[1:3] == ["eager", "eager coalesced"])


@pytest.mark.filterwarnings("ignore:.*nested.*")
@pytest.mark.parametrize("case", registry.cases("modules"), ids=lambda case: case.name)
def test_modules_peers_agree_with_the_oracle(case: Any) -> None:
    small = case.small()
    inputs = small.inputs()
    oracle = small.oracle(inputs)
    agreed = []
    for peer in registry.peers(small):
        try:
            workload = peer.build(small, inputs)
        except registry.Unsupported:
            assert peer.name == "sdpa no fast path" and case.training
            continue
        with torch.set_grad_enabled(case.training):
            found = measure.errors(small, peer, workload, inputs, oracle)
        assert found[0] < 1e-5 and (found[1] is None) == (not case.training), (peer.name, found)
        assert found[1] is None or found[1] < 1e-5, (peer.name, found)
        agreed.append(peer.name)
    assert agreed == ["attnfast", "sdpa", "sdpa no fast path"][: 2 if case.training else 3]


def test_the_fast_path_is_the_peers_own_affair() -> None:
    assert torch.backends.mha.get_fastpath_enabled()
    with registry.find_peer("modules", "sdpa no fast path").context():
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_coalesced_peer_is_coalesced() -> None:
    case = registry.cases("gather")[0].small()
    inputs = case.inputs()
    for name, coalesced in (("attnfast", True), ("eager", False), ("eager coalesced", True)):
        workload = registry.find_peer("gather", name).build(case, inputs)
        (grad,) = torch.autograd.grad(workload.call(), workload.wanted, workload.grad_out)
        assert grad.is_sparse and grad.is_coalesced() is coalesced


@pytest.mark.parametrize("case", registry.cases("store"), ids=lambda case: case.name)
def test_store_peers_agree_at_every_step(case: Any) -> None:
    """The first step has an oracle; the others must stay together, around the pool and through slots used again."""
    small = case.small()
    inputs = small.inputs()
    oracle = small.oracle(inputs)
    workloads = {}
    for peer in registry.peers(small):
        try:
            workloads[peer.name] = peer.build(small, inputs)
        except registry.Unsupported as reason:
            assert peer.name == "faiss" and str(reason)
            continue
        found = measure.errors(small, peer, workloads[peer.name], inputs, oracle)
        assert found[0] < 1e-5 and found[1] is None, (peer.name, found)
    assert {"attnfast", "eager"} <= set(workloads)
    seen, around = [], inputs["keys"].shape[0] // small.rows
    for _ in range(2 * around + 3):
        ours, *others = (workload.call() for workload in workloads.values())
        for other in others:
            torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)
        seen.append(ours)
    torch.testing.assert_close(seen[0], seen[around])
    assert not torch.allclose(seen[0], seen[around // 2], atol=1e-2)


@pytest.mark.parametrize("case", registry.cases("topk"), ids=lambda case: case.name)
def test_topk_peers_agree_with_the_oracle(case: Any) -> None:
    small = case.small()
    inputs = small.inputs()
    oracle = small.oracle(inputs)
    agreed = []
    for peer in registry.peers(small):
        try:
            workload = peer.build(small, inputs)
        except registry.Unsupported as reason:
            assert peer.name.startswith("faiss") and str(reason)
            continue
        found = measure.errors(small, peer, workload, inputs, oracle)
        limit = 2e-2 if small.dtype == torch.bfloat16 else 1e-5
        assert all(error is None or error < limit for error in found), (peer.name, found)
        agreed.append(peer.name)
    assert agreed[:2] == ["attnfast", "eager"]


def test_names_are_unique() -> None:
    with pytest.raises(ValueError, match="already has a case '1,8,512,64'"):
        registry.register_cases([registry.find_case("dot", "1,8,512,64")])
    with pytest.raises(ValueError, match="'sdpa' is already registered"):
        registry.register_peer(registry.find_peer("dot", "sdpa"))
    with pytest.raises(ValueError, match="there is no suite 'none'"):
        registry.register_cases([cases_dot.AttentionCase("case", suite="none")])
    with pytest.raises(ValueError, match="suite 'masks' has no peer 'sdpa'"):
        registry.find_peer("masks", "sdpa")


class _Declines(registry.Peer):
    name = "declines"

    def build(self, case: Any, inputs: Any) -> Any:
        raise registry.Unsupported("no such luck")


class _Breaks(registry.Peer):
    name = "breaks"

    def build(self, case: Any, inputs: Any) -> Any:
        def call() -> torch.Tensor:
            raise RuntimeError("first line\nsecond line")

        return registry.Workload(call, (inputs["query"],), inputs.grad_out)


class _NoBackward(registry.Peer):
    name = "no backward"

    def build(self, case: Any, inputs: Any) -> Any:
        def call() -> torch.Tensor:
            if torch.is_grad_enabled():
                raise NotImplementedError("forward only")
            return F.scaled_dot_product_attention(inputs["query"], inputs["key"], inputs["value"])

        return registry.Workload(call, tuple(inputs[name] for name in inputs.wanted), inputs.grad_out)


@pytest.fixture
def small_run(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Rows of a run over one small case with peers that misbehave."""
    case = cases_dot.AttentionCase("small", heads=2, query_tokens=8, quick=True)
    monkeypatch.setattr(registry, "_CASES", {"dot": [case]})
    peers = [registry.find_peer("dot", name) for name in ("attnfast", "sdpa")]
    monkeypatch.setattr(registry, "_PEERS", [*peers, _Declines(), _Breaks(), _NoBackward()])
    steps: list[str] = []
    plan = runner.Plan(("dot",), threads=(1, 2), memory=False, settings=QUICKEST)
    rows = runner.Run(plan, steps.append).execute()
    assert len(steps) == plan.total() + 1 == 2 * 3 + 1
    assert steps[0] == "dot: small, forward, 1 threads"
    return list(rows)


def test_run_records_every_peer(small_run: list[Any]) -> None:
    assert len({row.key for row in small_run}) == len(small_run) == 2 * 3 * 5
    for row in small_run:
        measured = row.status == "ok"
        assert (row.time_ms is not None) == measured
        if measured:
            assert row.time_ms_q25 <= row.time_ms <= row.time_ms_q75
            assert row.rounds == 3
            assert row.error < 1e-5
            assert row.gflops > 0
            assert 0 < row.of_fma_peak < 1
            assert row.of_stream is None
        assert row.torch == torch.__version__
        assert row.attnfast == attnfast.__version__
        assert row.cpu
        assert row.date.endswith("UTC")
    ours = [row for row in small_run if row.peer == "attnfast"]
    assert {row.ratio for row in ours} == {1.0}
    assert all((row.over_one_thread is not None) == (row.threads == 2) for row in ours)


def test_run_keeps_why_a_peer_did_not_run(small_run: list[Any]) -> None:
    found = {(row.peer, row.pass_): (row.status, row.note) for row in small_run}
    assert found["declines", "forward"] == ("unsupported", "no such luck")
    assert found["breaks", "backward"] == ("failed", "RuntimeError: first line")
    assert found["no backward", "forward"] == ("ok", "")
    assert found["no backward", "backward"] == ("unsupported", "NotImplementedError: forward only")


def test_sweep_is_shown_and_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cells = [case for case in registry.cases("sweep") if case.query_tokens <= 2 and case.head_size <= 24]
    cells = [dataclasses.replace(case, settings=QUICKEST) for case in cells]
    monkeypatch.setattr(registry, "_CASES", {"sweep": cells})
    rows = runner.Run(runner.Plan(("sweep",), threads=(1,), memory=False)).execute()
    assert {row.peer for row in rows} == {"attnfast", "sdpa"}
    for row in rows:  # one cell that torch wins
        if row.peer == "sdpa":
            slow = (row.query_tokens, row.head_size, row.pass_) == (2, 24, "forward")
            row.ratio = 0.5 if slow else 1.5
    console = report.make_console()
    with console.capture() as capture:
        report.print_report(rows, console)
    assert "1 of 4 cells more than 5% slower than torch: T=2 D=24 0.50x; least 0.50x" in capture.get()
    assert "0 of 4 cells more than 5% slower than torch; least 1.50x" in capture.get()
    sweep.write_heat_map(rows, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="nothing to draw"):
        chart.write_chart(rows, tmp_path / "bars.png")


def test_local_pairs_are_those_of_the_window() -> None:
    for tokens, window in ((1, 3), (2, 3), (7, 2), (30, 10)):
        place = torch.arange(tokens)
        pairs = ((place[:, None] - place).abs() <= window).sum().item()
        assert cases_scaling.local_pairs(tokens, window) == pairs
    case = cases_scaling.AdditiveScalingCase("a", query_tokens=30, head_size=4, window=10)
    assert case.triples() == 4 * cases_scaling.local_pairs(30, 10)
    case = cases_scaling.ScalingCase("a", heads=2, query_tokens=30, window=10)
    assert case.visible_pairs() == cases_scaling.local_pairs(30, 10)


def test_scaling_cases_reach_from_128_to_8192_tokens() -> None:
    found: dict[str, list[int]] = {}
    for case in registry.cases("scaling"):
        found.setdefault(case.name.rsplit(" T=")[0], []).append(case.query_tokens)
    dense, local = [2**i for i in range(7, 14)], [2**i for i in range(10, 14)]
    assert found == {
        "dot": dense,
        "additive": dense,
        "dot, window": local,
        "additive, window": local,
        "dot, local-p": local,
        "additive, local-p": local,
    }
    assert registry.find_case("scaling", "additive T=4096 D=256").passes == registry.PASSES
    case = registry.find_case("scaling", "additive T=2048 D=256")
    eager = registry.find_peer("scaling", "eager")
    with pytest.raises(registry.Unsupported, match="2048 x 2048 x 256 need 12 GiB, more than 4"):
        eager.build(case, case.inputs())
    case = registry.find_case("scaling", "additive T=1024 D=256")
    assert eager.build(case, case.inputs()).wanted


SCALING_CASES = [
    cases_scaling.ScalingCase("dot T=40 D=8", heads=2, query_tokens=40, head_size=8),
    cases_scaling.AdditiveScalingCase("additive T=40 D=8", query_tokens=40, head_size=8),
    cases_scaling.ScalingCase("dot, window T=40 D=8", heads=2, query_tokens=40, head_size=8, window=4),
    cases_scaling.AdditiveScalingCase("additive, window T=40 D=8", query_tokens=40, head_size=8, window=4),
    cases_scaling.ScalingCase("dot, local-p T=40 D=8", heads=2, query_tokens=40, head_size=8, window=4, predicted=True),
    cases_scaling.AdditiveScalingCase(
        "additive, local-p T=40 D=8", query_tokens=40, head_size=8, window=4, predicted=True
    ),
]


@pytest.mark.parametrize("case", SCALING_CASES, ids=lambda case: case.name)
def test_scaling_peers_compute_the_case(case: Any) -> None:
    """Those of the case itself agree with float64; the dense ones have the window's number of pairs."""
    inputs = case.inputs()
    reference = attnfast.reference
    function = reference.additive_attention if "additive" in case.name else reference.attention
    tensors = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.tensors.items()}
    leaves, options = list(tensors.values()), {"window": (4, 4)} if case.window else {}
    if case.predicted:
        leaves.append(cases_scaling.centers(case).double().requires_grad_())
        options |= {"window_center": leaves[-1].detach(), "prior": ("gaussian", leaves[-1], 2.0)}
    truth = function(*tensors.values(), **options)
    truth_grads = torch.autograd.grad(truth, leaves, inputs.grad_out.double())
    ran = []
    for peer in registry.peers(case):
        try:
            workload = peer.build(case, inputs)
        except registry.Unsupported as error:
            assert str(error) == ""
            continue
        ran.append(peer.name)
        out = workload.call()
        grads = torch.autograd.grad(out, workload.wanted, workload.grad_out)
        if peer.name.startswith("dense"):
            queries, keys = (workload.wanted[i].shape[-2] for i in (0, 1))
            pairs = cases_scaling.local_pairs(40, 4)
            assert (queries, keys) == ((40, 9) if peer.name == "dense T x 21" else (round(pairs**0.5),) * 2)
            assert abs(queries * keys - pairs) <= max(4 * 5, pairs**0.5)
            assert out.shape[-2] == queries
            continue
        for got, want in zip((out, *grads), (truth, *truth_grads)):
            assert measure.relative_error(got, want) < 1e-5
    others = ["dense T x 21", "dense square"] if case.window else ["eager"] if "additive" in case.name else []
    assert ran == ["attnfast", *(others or ["sdpa", "eager"])]


def test_scaling_is_shown_and_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cases = [dataclasses.replace(case, settings=QUICKEST, passes=registry.PASSES) for case in SCALING_CASES]
    monkeypatch.setattr(registry, "_CASES", {"scaling": cases})
    monkeypatch.setattr(cases_scaling, "MOST_BYTES", 40 * 40 * 8 * 4 * 3 - 1)  # a byte short of what eager needs
    rows = runner.Run(runner.Plan(("scaling",), threads=(1,), memory=False)).execute()
    by_peer = {(row.case.split()[0], row.peer): row for row in rows if row.pass_ == "forward"}
    assert by_peer["additive", "eager"].status == "unsupported"
    assert by_peer["dot", "eager"].status == "ok"
    row = by_peer["dot,", "dense square"]
    row.ratio = 0.5  # the dense call of 18 x 18 pairs takes half the time of the window's 340
    assert cases_scaling.local_pairs(40, 4) == 340
    assert scaling.window_cost(row) == pytest.approx(2 * 324 / 340)
    for row in rows:
        row.ratio = 0.5 if row.peer != "attnfast" else 1.0
        row.peak_extra_mib = 3.0 if row.peer == "attnfast" else 5.0
    console = report.make_console()
    with console.capture() as capture:
        report.print_report(rows, console)
    shown = capture.get()
    assert "1.91" in shown  # 2 * 324 / 340
    assert "need 0 GiB" in shown
    assert "additive, window, forward+backward, 1 threads: ms, MiB" in shown
    assert "slower than" not in shown  # its ratios are no contest
    scaling.write_scaling(rows, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="nothing to draw"):
        scaling.write_scaling([], tmp_path / "empty.png")


@pytest.mark.parametrize(("mebibytes", "color"), [(30.0, "32"), (200.0, "31")])
def test_scaling_prints_the_memory_of_additive_attention(mebibytes: float, color: str) -> None:
    sizes = {"batch": 1, "heads": 1, "query_tokens": 4096, "key_tokens": 4096, "head_size": 256, "value_size": 256}
    name = "additive T=4096 D=256"
    row = _row(suite="scaling", case=name, pass_="forward+backward", dtype="fp32", peak_extra_mib=mebibytes, **sizes)
    results_mib = (4 * 4096 * 256 + 256) * 4 / 2**20  # output, three gradients of the same size, one of the weight
    assert scaling.result_bytes(row) == results_mib * 2**20
    assert scaling.result_bytes(dataclasses.replace(row, pass_="forward")) == 4 * 4096 * 256
    beyond = (mebibytes - results_mib) * 2**20 / 1e6
    assert scaling.beyond_mb(row) == pytest.approx(beyond)
    console = Console(width=200, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        scaling.print_scaling([row, dataclasses.replace(row, peer="eager", peak_extra_mib=1e5)], console)
    (line,) = [line for line in capture.get().splitlines() if "beyond inputs and results" in line]
    assert f"T = 4096, D = 256, forward+backward: {beyond:.1f} MB at the peak" in line
    assert f"{color}m" in line
    assert "T x T x D has 17.2 GB" in line


def test_a_suite_may_ask_for_the_memory_of_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Meter:
        def measure(self, *task: Any) -> tuple[int, str]:
            return 2**20, ""

    for suite, peak in (("scaling", 1.0), ("dot", None)):
        case = registry.cases(suite)[0]
        run = runner.Run(runner.Plan((suite,), threads=(1,)))
        run._meter, run._start = Meter(), 0.0
        rows = [_row(suite=suite, case=case.name, pass_=which) for which in ("backward", "forward+backward")]
        run._add_memory(case, rows, {})
        assert [row.peak_extra_mib for row in rows] == [1.0, peak]


@pytest.mark.slow
def test_keops_computes_additive_attention() -> None:
    case = cases_additive.AdditiveCase("small", batch=2, query_tokens=5, key_tokens=7, head_size=8, value_size=4)
    peer = registry.find_peer("additive", "keops")
    assert peer in registry.peers(case)
    inputs = case.inputs()
    workload = peer.build(case, inputs)
    output, gradient = measure.errors(case, peer, workload, inputs, case.oracle(inputs))
    assert 0 <= output < 1e-5
    assert 0 <= gradient < 1e-5
    from threadpoolctl import threadpool_info

    with measure.thread_count(1), peer.context():
        pools = [pool for pool in threadpool_info() if pool["user_api"] == "openmp"]
        assert pools
        assert {pool["num_threads"] for pool in pools} == {1}


def test_keops_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    case = registry.find_case("additive", "8,64x64,256")
    with pytest.raises(registry.Unsupported, match="pykeops is not installed"):
        registry.find_peer("additive", "keops").build(case, None)


def test_masks_are_set_beside_the_tiles_they_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases_masks.MaskCase("small", batch=3, heads=2, query_tokens=256, settings=QUICKEST)
    inputs = case.inputs()
    assert case.lengths() == [256, 192, 128]
    tiles = {peer.name: peer.tiles(case) for peer in registry.peers(case)}
    assert tiles["attnfast"] == tiles["dropout"] == tiles["boolean [T,T]"] == 1
    assert tiles["causal"] == 10 / 16
    assert tiles["key lengths"] == 9 / 12
    assert tiles["causal, key lengths"] == pytest.approx((10 + 9 + 7) / 48)
    for peer in registry.peers(case):  # a mask's output is that of the formula with the mask it says it is
        out = peer.build(case, inputs).call()
        keywords = peer.keywords(case)
        if "dropout_p" not in keywords:
            tensors = [inputs[name].double() for name in inputs.wanted]
            assert torch.allclose(out.double(), attnfast.reference.attention(*tensors, **keywords), atol=1e-5)
        seen = peer.visible(case)
        if seen is not None:
            mask = seen[:, None]
            assert torch.allclose(out, attnfast.attention(*(inputs[n] for n in inputs.wanted), mask=mask), atol=1e-5)
    monkeypatch.setattr(registry, "_CASES", {"masks": [case]})
    rows = runner.Run(runner.Plan(("masks",), threads=(1,), memory=False)).execute()
    for row in rows:
        row.ratio = {"causal": 0.75, "dropout": 1.5}.get(row.peer, 1.0)
    assert {row.peer: masks.cost(row) for row in rows if row.pass_ == "forward"}["causal"] == pytest.approx(1.2)
    console = report.make_console()
    with console.capture() as capture:
        report.print_report(rows, console)
    shown = capture.get()
    assert "0.62" in shown  # the tiles that a causal mask leaves
    assert "1.20" in shown
    assert "slower than" not in shown


def test_yardsticks_bound_what_they_measure() -> None:
    peak = yardsticks.fma_peak()
    tensors = (torch.randn(1, 1, 1000, 64, dtype=torch.bfloat16), torch.randn(3, 5))
    stream = yardsticks.stream(tensors)
    assert stream.amount == 1000 * 64 * 2 + 15 * 4
    assert stream.sample(2) > 0
    assert peak.sample(1) > 0
    with measure.thread_count(1):
        single = yardsticks.fma_peak()
    assert single.amount == peak.amount > 1e8


def test_on_threads_limits_one_sampler() -> None:
    seen = []
    before = torch.get_num_threads()

    def sample(calls: int) -> float:
        seen.append(torch.get_num_threads())
        return 0.5 * calls

    assert measure.on_threads(3, sample)(2) == 1.0
    assert seen == [3]
    assert torch.get_num_threads() == before


def test_ragged_case_with_one_long_sequence() -> None:
    case = registry.find_case("threads", "65,1,4096,64 varlen, one long")
    assert case.lengths() == [512] * 64 + [4096]
    half = 4096.0**2
    assert case.visible_pairs() == half + 64 * 512.0**2 == 2 * half


def test_a_failing_attnfast_is_a_row_and_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = _Breaks()
    broken.name = "attnfast"
    case = cases_dot.AttentionCase("small", heads=1, query_tokens=4, passes=("forward",))
    monkeypatch.setattr(registry, "_CASES", {"dot": [case]})
    monkeypatch.setattr(registry, "_PEERS", [broken, registry.find_peer("dot", "sdpa")])
    rows = runner.Run(runner.Plan(("dot",), threads=(1,), memory=False, settings=QUICKEST)).execute()
    assert [(row.peer, row.status, row.ratio) for row in rows] == [("attnfast", "failed", None), ("sdpa", "ok", None)]
    console = report.make_console()
    with console.capture() as capture:
        report.print_report(rows, console)
    assert "attnfast failed: dot, small, forward, 1 threads: RuntimeError: first line" in capture.get()


def test_a_quick_run_short_of_time_says_what_it_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_QUICK_STOP", -1.0)
    run = runner.Run(runner.Plan(("dot",), threads=(1,), quick=True, memory=False, settings=QUICKEST))
    assert run.execute() == []
    assert run.left_out == [f"dot: {case.name}" for case in registry.cases("dot", quick=True)]


def test_quick_plan_is_smaller() -> None:
    full, quick = runner.Plan(("dot",)), runner.Plan(("dot",), quick=True)
    assert quick.total() < full.total() / 2
    case = registry.find_case("dot", "1,8,512,64")
    assert quick.passes(case) == ("forward", "backward")
    assert full.passes(case) == registry.PASSES
    assert runner.Plan(("model",), threads=(1, 2)).total() == 2
    assert runner.Plan(("dot", "model"), case="no such").total() == 0


# ---------------------------------------------------------------------- memory


@pytest.mark.slow
def test_memory_sees_the_score_matrix_of_the_math_path() -> None:
    meter = memory.MemoryMeter()
    if meter.reason:
        pytest.skip(meter.reason)
    name, scores = "1,8,512,64", 8 * 512 * 512 * 4
    math_path, reason = meter.measure("dot", name, "sdpa math", "forward", 1)
    assert reason == ""
    ours, reason = meter.measure("dot", name, "attnfast", "forward", 1)
    assert reason == ""
    output = 8 * 512 * 64 * 4
    assert math_path >= scores
    # Linux counts resident pages by processor, 32 at a time.
    slack = 32 * 4096 * (os.cpu_count() or 1)
    assert output - slack <= ours < scores / 2
    size, reason = meter.measure("dot", name, "no such peer", "forward", 1)
    assert (size, reason) == (None, "ValueError: suite 'dot' has no peer 'no such peer'")


# ---------------------------------------------------------------------- results


def _row(peer: str = "attnfast", **changes: Any) -> Any:
    base: dict[str, Any] = {"suite": "dot", "case": "c", "pass_": "forward", "threads": 1, "peer": peer, "time_ms": 2.0}
    return Row(**{**base, "ratio": 1.0, "torch": "2", "attnfast": "0", **changes})


def test_csv_round_trip(tmp_path: Path) -> None:
    rows = [
        _row(note='a "quoted", note', error=1.25e-7, batch=3, quick=True, peak_extra_mib=0.0),
        _row("sdpa", status="failed", time_ms=None, ratio=None),
    ]
    path = tmp_path / "bench.csv"
    results.write_csv(rows, path)
    assert results.read_csv(path) == rows
    with path.open() as file:
        header = next(csv.reader(file))
    needed = {
        "machine",
        "cpu",
        "isa",
        "torch",
        "commit",
        "date",
        "threads",
        "time_ms",
        "ratio",
        "peak_extra_mib",
        "error",
    }
    assert needed | {"suite", "case", "pass", "peer", "status", "note"} <= set(header)


def test_a_foreign_csv_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("suite,threads\ndot,1\n")
    with pytest.raises(ValueError, match=r"other\.csv is not a benchmark result: it has no column case, pass, peer"):
        results.read_csv(path)


def test_compare_matches_rows_and_divides_out_the_machine() -> None:
    old = [_row(time_ms=6.0), _row("sdpa", time_ms=9.0, ratio=1.5), _row(case="gone")]
    new = [_row(time_ms=2.0), _row("sdpa", time_ms=4.0, ratio=2.0), _row(case="added")]
    (pair,) = compare.compare(new, old)
    assert pair.speedup == 3.0
    assert pair.relative == pytest.approx(2.0 / 1.5)
    console = report.make_console()
    with console.capture() as capture:
        compare.print_comparison(new, old, console)
    text = capture.get()
    assert "3.00x" in text
    assert "1.33x" in text
    assert "1 rows" in text
    assert compare.compare(new, [_row(threads=2)]) == []


def test_compare_names_what_differs() -> None:
    console = report.make_console()
    with console.capture() as capture:
        compare.print_comparison([_row(isa="avx2")], [_row(isa="avx512")], console)
    assert "isa differs: avx512 before, avx2 now" in capture.get()


def test_losses_are_shown_plainly() -> None:
    rows = [
        _row(),
        _row("sdpa", ratio=0.8, ratio_q25=0.7, ratio_q75=0.9),
        _row("flex", ratio=1.2),
        _row("attnfast._C", ratio=0.1),
    ]
    assert [row.peer for row in report.losses(rows)] == ["sdpa"]
    console = report.make_console()
    with console.capture() as capture:
        report.print_report(rows, console)
    assert "slower than sdpa: dot, c, forward, 1 threads: 0.80x (quartiles 0.70 to 0.90)" in capture.get()
    assert "**0.80x (slower)**" in report.markdown_table(rows)
    assert report.ratio_text(0.99).style == "bold red"
    assert report.ratio_text(1.0).style == "green"
    with console.capture() as capture:
        report.print_report([_row(), _row("sdpa", ratio=1.1)], console)
    assert "not slower than any peer" in capture.get()


def test_geometric_mean() -> None:
    assert report.geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)
    assert math.isnan(report.geometric_mean([]))


def test_markdown_table_holds_ratios_by_pass_and_thread() -> None:
    rows = []
    for threads in (1, 2):
        for index, which in enumerate(registry.PASSES):
            common = {"pass_": which, "threads": threads, "dtype": "fp32"}
            rows += [
                _row(**common, peak_extra_mib=1.0),
                _row("sdpa", **common, ratio=threads + index / 4, peak_extra_mib=2.5),
            ]
    rows += [_row(suite="overhead", time_ms=0.004), _row("sdpa", suite="overhead", time_ms=0.005, ratio=1.25)]
    text = report.markdown_table(rows)
    assert "| c | fp32 | 1 | 1.00x | 1.25x | 1.50x | 1.0 / 2.5 |" in text
    assert "| c | fp32 | 2 | 2.00x | 2.25x | 2.50x | 1.0 / 2.5 |" in text
    assert "| overhead: c, forward | 1 | 4.00 us | 5.00 us | 1.25x |" in text
    additive = {"suite": "additive", "case": "8,64x64,256"}
    rows += [_row(**additive, peak_extra_mib=1.0), _row("eager", **additive, ratio=30.0, peak_extra_mib=64.0)]
    rows += [_row("compile", **additive, ratio=0.5)]
    text = report.markdown_table(rows)
    assert "| B,T_q x T_k,D | pass | threads | attnfast | eager | compile | extra MiB: ours / eager |" in text
    assert "| 8,64x64,256 | forward | 1 | 2 ms | 30.00x | **0.50x (slower)** | 1.0 / 64.0 |" in text
    assert "| additive: 8,64x64,256" not in text
    rows += [_row(suite="topk", case="32x1M,128"), _row("faiss", suite="topk", case="32x1M,128", ratio=1.5)]
    text = report.markdown_table(rows)
    assert "| B x N,D | pass | threads | attnfast | faiss | extra MiB: ours / eager |" in text
    assert "| 32x1M,128 | forward | 1 | 2 ms | 1.50x |" in text


def test_write_readme_replaces_only_what_is_between_the_markers(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{report.README_BEGIN}\nold\n{report.README_END}\nafter\n")
    rows = [_row(), _row("sdpa", ratio=1.75)]
    report.write_readme(path, rows)
    once = path.read_text()
    assert once.startswith("before\n")
    assert once.endswith("\nafter\n")
    assert "old" not in once
    assert "1.75x" in once
    report.write_readme(path, rows)
    assert path.read_text() == once
    path.write_text("no markers")
    with pytest.raises(ValueError, match="needs one line <!-- bench:begin -->"):
        report.write_readme(path, rows)
    with pytest.raises(ValueError, match="no rows"):
        report.write_readme(path, [])


def test_chart_is_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "chart.png"
    rows = [_row(), _row("sdpa", ratio=0.5), _row("compile", ratio=3.0), _row("sdpa", threads=2, ratio=2.0)]
    chart.write_chart(rows, path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20], "big") > 500
    with pytest.raises(ValueError, match="nothing to draw"):
        chart.write_chart([_row()], tmp_path / "empty.png")


# ---------------------------------------------------------------------- the model


def test_digits_model_swaps_attention_and_losses_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    ours = attnfast.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(args[0].shape)
        return ours(*args, **kwargs)

    monkeypatch.setattr(attnfast, "scaled_dot_product_attention", counted)
    original = F.scaled_dot_product_attention
    trainings = model_digits.train(steps=6)
    assert F.scaled_dot_product_attention is original
    batch, layers = model_digits._BATCH, model_digits._LAYERS
    assert calls.count((batch, 4, 16, 16)) == 6 * layers, "training must run attnfast's attention in every layer"
    assert len(calls) == 7 * layers, "and so must the evaluation"
    assert model_digits.largest_difference(trainings) < 1e-4
    assert trainings["sdpa"].losses[0] > trainings["sdpa"].losses[-1]
    assert set(trainings) == {"attnfast", "sdpa", "sdpa math"}
    assert {len(training.seconds) for training in trainings.values()} == {6}


def test_digits_patches_are_the_images() -> None:
    patches, labels = model_digits.load_digits()
    assert patches.shape == (1797, 16, 4)
    assert labels.shape == (1797,)
    from sklearn.datasets import load_digits

    image = torch.from_numpy(load_digits().images[7]).float() / 16
    assert torch.equal(patches[7, 5].view(2, 2), image[2:4, 2:4])
    assert patches.min() >= 0
    assert patches.max() == 1


def test_a_wrong_attention_shows_in_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attnfast, "scaled_dot_product_attention", lambda q, k, v, *_, **__: v)
    assert model_digits.largest_difference(model_digits.train(steps=4)) > 1e-3
