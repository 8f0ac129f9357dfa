"""The CUDA kernels. Built where nvcc is (docs/cuda.md), loaded by ``_ext.cuda_binary`` when a CUDA tensor arrives."""

from typing import Any

from torch import Tensor

def init(exchange_api_capsule: Any) -> None:
    """Take torch's DLPack table, as ``_C.init`` does."""

def build_info() -> dict[str, Any]:
    """Return ``architectures``, as CMake was given them, and ``runtime``, the version of the CUDA runtime inside."""

def device_count() -> int:
    """Return the number of GPUs; RuntimeError with CUDA's reason if there is no driver or no GPU."""

def dot_attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor | None,
    weights: Tensor | None,
    weights_index: Tensor | None,
    weights_mode: int,
    mask: Tensor | None,
    bias: Tensor | None,
    bias2: Tensor | None,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    prior_center: Tensor | None,
    seed: Tensor | None,
    window_bounds: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    prior_sigma: float,
    causal: int,
    window_left: int,
    window_right: int,
    /,
) -> None:
    """Queue ``_C.dot_attention_fwd`` on torch's current stream of the tensors' device.

    Every tensor is on that device but ``seed``, which is on the CPU. Lengths are not checked but clamped to [0, T].
    NotImplementedError names what the kernels do not have: packed sequences, weights on request, window bounds, a
    prior, head sizes above 256.
    """

def dot_attention_bwd(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_weights: Tensor | None,
    weights_index: Tensor | None,
    weights_mode: int,
    delta_shift: Tensor | None,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    grad_bias: Tensor | None,
    grad_bias2: Tensor | None,
    grad_sink: Tensor | None,
    grad_center: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    bias2: Tensor | None,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    prior_center: Tensor | None,
    seed: Tensor | None,
    window_bounds: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    prior_sigma: float,
    causal: int,
    window_left: int,
    window_right: int,
    threads: int,
    /,
) -> None:
    """Queue ``_C.dot_attention_bwd`` on torch's current stream of the tensors' device.

    As there, but ``out``, ``lse`` and ``delta`` must be given, and ``delta`` is a workspace of three planes: Real,
    contiguous ``[3, B, H, T_q]``. ``threads`` is ignored. NotImplementedError names what the kernels do not have:
    packed sequences, gradients of weights, window bounds, a prior, head sizes above 256.
    """
