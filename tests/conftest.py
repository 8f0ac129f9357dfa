"""Fixtures shared by all tests: the ISA in use, the backend under contract, dtypes, threads."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import FLOATS, dtype_id, load_tool, patch_seed

try:
    from attnfast import _C

    ISAS = list(_C.available_isas())
except ImportError:
    # No binary: the kernel tests must fail with attnfast's own error, not silently vanish.
    ISAS = ["missing"]

# "simt": the CUDA kernels under the emulator. It is slow, so calls above EMULATED multiply-adds are left to the others,
# and of each test one of EMULATED_SHARE combinations of its parameters is run, which its name chooses, and the first.
BACKENDS = ["reference", *(f"cpu-{name}" for name in ISAS), "simt"]
EMULATED, EMULATED_SHARE = 3_000_000, 8
try:
    from attnfast.ops import has_cuda

    if torch.cuda.is_available() and has_cuda():
        BACKENDS.append("cuda")
except ImportError:
    pass


# The same code as avx512 but for bfloat16: other dtypes would be tested twice.
BF16_ISA = "avx512_bf16"


# The same source compiled for less: of a test's combinations of parameters one in LOWER_SHARE is run on one of these,
# chosen by its name; what is best here runs all of them.
LOWER_SHARE = 2
LOWER = [name for name in ISAS if name != BF16_ISA][:-1]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "not_emulated: makes too many calls for backend simt")
    config.addinivalue_line("markers", "bf16: has bfloat16 calls within, so is run on avx512_bf16 too")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // workers))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    emulated_tests: set[str] = set()

    def wanted(item: pytest.Item) -> bool:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if params.get("backend") == "simt":
            if item.get_closest_marker("not_emulated") is not None:
                return False
            first = item.nodeid.partition("[")[0] not in emulated_tests
            emulated_tests.add(item.nodeid.partition("[")[0])
            return first or zlib.crc32(item.name.encode()) % EMULATED_SHARE == 0
        isa = str(params.get("isa", params.get("backend"))).removeprefix("cpu-")
        if isa in LOWER:
            combination = item.nodeid.replace(isa, "", 1)
            return zlib.crc32(combination.encode()) % (LOWER_SHARE * len(LOWER)) == LOWER.index(isa)
        if isa != BF16_ISA:
            return True
        marked = item.get_closest_marker("bf16") is not None
        return marked or torch.bfloat16 in (params.get("dtype"), params.get("half"))

    dropped = [item for item in items if not wanted(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if wanted(item)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """On a backend of CUDA kernels, what there is none for yet is skipped, by the name that the refusal gives."""
    try:
        return (yield)
    except NotImplementedError as error:
        callspec = getattr(item, "callspec", None)
        backend = callspec.params.get("backend") if callspec is not None else None
        if backend not in ("simt", "cuda") or "attnfast has no" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Every test starts from one seed; thread count and determinism flags do not leak out of it."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)


def _use_isa(name: str) -> Iterator[str]:
    from attnfast import _C

    before = _C.get_isa()
    _C.set_isa(name)
    assert _C.get_isa() == name
    yield name
    _C.set_isa(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once per compiled instruction set that this machine has."""
    yield from _use_isa(request.param)


def on_device(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`function` on copies of its tensors there, its results brought back; gradients find their way through both.

    What there are no kernels for yet is skipped, by the name that the refusal gives.
    """

    def move(x: Any, to: str) -> Any:
        if isinstance(x, torch.Tensor):
            return x.to(to)
        if isinstance(x, tuple):
            moved = [move(each, to) for each in x]
            return type(x)(*moved) if hasattr(x, "_fields") else tuple(moved)
        return x

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return move(function(*move(args, device), **{name: move(x, device) for name, x in kwargs.items()}), "cpu")
        except NotImplementedError as error:
            pytest.skip(str(error))

    return call


def emulated(function: Callable[..., Any], simt: ModuleType) -> Callable[..., Any]:
    """`function`, whose kernels `simt` has: a call that is too large skips its test, one that launches none fails it.

    No kernel is launched for no output, and none for what torch computes: other normalizers, forward-mode AD.
    """

    @functools.wraps(function)
    def call(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        rows, keys = (x.shape[-2] if function.__name__ != "varlen_attention" else x.shape[0] for x in (query, key))
        work = query.numel() * keys + (query.numel() // max(query.shape[-1], 1)) * keys * value.shape[-1]
        if work > EMULATED:
            pytest.skip(f"{work / 1e6:.0f} million multiply-adds take long under the emulator")
        before = simt.launches()
        result = function(query, key, value, *args, **kwargs)
        prior = kwargs.get("prior")
        by_torch = kwargs.get("normalizer", "softmax") != "softmax" or isinstance(prior, torch.Tensor)
        forward_mode = torch.autograd.forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
        empty = 0 in query.shape[:-1] or rows == 0
        assert simt.launches() > before or by_torch or forward_mode or empty, "no kernel was launched"
        return result

    return call


def _make_backend(name: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    kind, _, name = name.partition("-")
    if kind == "reference":
        from attnfast import reference

        yield SimpleNamespace(
            kind=kind,
            isa=None,
            attention=reference.attention,
            scaled_dot_product_attention=reference.scaled_dot_product_attention,
            varlen_attention=reference.varlen_attention,
            seeded=lambda seed: functools.partial(reference.attention, dropout_seed=torch.tensor(seed)),
            seeded_varlen=lambda seed: functools.partial(reference.varlen_attention, dropout_seed=torch.tensor(seed)),
        )
        return
    import attnfast

    if kind == "simt":
        import test_simt_backward

        simt = request.getfixturevalue("simt")
        test_simt_backward.use(simt, request.getfixturevalue("monkeypatch"))
        simt.set_seed(zlib.crc32(request.node.name.encode()) % 1024)

    def place(function: Callable[..., Any]) -> Callable[..., Any]:
        if kind == "simt":
            return emulated(function, simt)
        return on_device(function, "cuda") if kind == "cuda" else function

    def seeded(function: Callable[..., Any], seed: Sequence[int]) -> Callable[..., Any]:
        """`function` with the seed that it would have drawn replaced."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch_seed(patch, seed)
                return function(*args, **kwargs)

        return call

    for _ in _use_isa(name) if name else (None,):
        yield SimpleNamespace(
            kind=kind,
            isa=attnfast.get_isa(),
            attention=place(attnfast.attention),
            scaled_dot_product_attention=place(attnfast.scaled_dot_product_attention),
            varlen_attention=place(attnfast.varlen_attention),
            seeded=functools.partial(seeded, place(attnfast.attention)),
            seeded_varlen=functools.partial(seeded, place(attnfast.varlen_attention)),
        )


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Any]:
    """What must keep the contract: attnfast.reference, and the public functions on every instruction set."""
    yield from _make_backend(request.param, request)


@pytest.fixture(params=["reference", "cpu"])
def route(request: pytest.FixtureRequest) -> Iterator[Any]:
    """As `backend`, on the instruction set in use only: for what the Python layers decide."""
    yield from _make_backend(request.param, request)


@pytest.fixture(params=FLOATS, ids=dtype_id)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="session")
def simt() -> ModuleType:
    """The CUDA kernels under the SIMT emulator, built if need be: `make setup` does not wait for them."""
    sys.path.insert(0, str(load_tool("simt_tests").build_module()))
    try:
        module = importlib.import_module("_simt")
    finally:
        sys.path.pop(0)
    module.init(torch.Tensor.__dlpack_c_exchange_api__)
    return module
