"""The CUDA kernels. Built where nvcc is (docs/cuda.md), loaded by ``_ext.cuda_binary`` when a CUDA tensor arrives."""

from typing import Any

from torch import Tensor

def init(exchange_api_capsule: Any) -> None:
    """Take torch's DLPack table, as ``_C.init`` does."""

def build_info() -> dict[str, Any]:
    """Return ``architectures``, as CMake was given them, and ``runtime``, the version of the CUDA runtime inside."""

def device_count() -> int:
    """Return the number of GPUs; RuntimeError with CUDA's reason if there is no driver or no GPU."""

def dot_attention_workspace(query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor | None, /) -> int:
    """Return the elements of workspace that ``dot_attention_fwd`` needs, by shapes alone; 0 unless keys are split."""

def dot_attention_kernel(query: Tensor, key: Tensor, value: Tensor, tf32: bool, /) -> str:
    """Return the name of the kernel that ``dot_attention_fwd`` would queue for them with a new output."""

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
    workspace: Tensor | None,
    tf32: bool,
    /,
) -> None:
    """Queue ``_C.dot_attention_fwd`` on torch's current stream of the tensors' device.

    Every tensor is on that device but ``seed``, which is on the CPU. Lengths and offsets are not checked but cut to the
    tensors. ``workspace`` is of the accumulation dtype and has as many elements as ``dot_attention_workspace`` says;
    None for 0. With ``tf32`` operands in float32 are rounded to tf32 where that lets tensor cores multiply them
    (docs/cuda.md); other dtypes do not mind it.
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
    tf32: bool,
    /,
) -> None:
    """Queue ``_C.dot_attention_bwd`` on torch's current stream of the tensors' device.

    As there, but ``out``, ``lse`` and ``delta`` must be given, and ``delta`` is a workspace of three planes: Real,
    contiguous ``[3, B, H, T_q]``. ``threads`` is ignored, and ``tf32`` is the forward's.
    """

def additive_attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    score_bias: Tensor | None,
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
    softcap: float,
    dropout_p: float,
    prior_sigma: float,
    causal: int,
    window_left: int,
    window_right: int,
    workspace: Tensor | None,
    /,
) -> None:
    """Queue ``_C.additive_attention_fwd`` as ``dot_attention_fwd`` is, with a workspace.

    ``workspace`` is contiguous, in the accumulation dtype, and has the elements that ``additive_attention_workspace``
    asks for; what it holds is of no use to anybody.
    """

def additive_attention_bwd(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    score_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_weights: Tensor | None,
    weights_index: Tensor | None,
    weights_mode: int,
    delta_shift: Tensor | None,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    grad_weight: Tensor | None,
    grad_score_bias: Tensor | None,
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
    softcap: float,
    dropout_p: float,
    prior_sigma: float,
    causal: int,
    window_left: int,
    window_right: int,
    threads: int,
    workspace: Tensor | None,
    /,
) -> None:
    """Queue ``_C.additive_attention_bwd``, with a workspace as in the forward; ``threads`` is not used."""

def additive_attention_workspace(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor | None, weights_mode: int, /
) -> tuple[int, int]:
    """Return how many elements of workspace the forward, with its weights, and the backward of the additive core need.

    Only shapes and the mode are looked at.
    """

def topk_scores_workspace(keys: Tensor, queries: int, k: int, /) -> int:
    """Return how many int64 words ``topk_scores_fwd`` wants as workspace for ``keys [N, D]``; 0 if none."""

def topk_scores_fwd(
    query: Tensor,
    keys: Tensor,
    key_scales: Tensor | None,
    mask: Tensor | None,
    scores: Tensor,
    indices: Tensor,
    scale: float,
    workspace: Tensor,
    /,
) -> None:
    """Queue ``_C.topk_scores_fwd``; ``workspace`` is int64 of exactly ``topk_scores_workspace`` words.

    NotImplementedError names what the kernels do not have: keys in int8.
    """

def weighted_gather_fwd(
    indices: Tensor, weights: Tensor, values: Tensor, scales: Tensor | None, out: Tensor, /
) -> None:
    """Queue ``_C.weighted_gather_fwd``, but for an index that is neither a slot nor -1: it counts as -1."""

def weighted_gather_partial_rows(entries: int, /) -> int:
    """Return the rows of ``partial_sums`` for a gradient over ``entries`` picks."""

def weighted_gather_bwd(
    grad_out: Tensor,
    indices: Tensor,
    weights: Tensor,
    values: Tensor,
    scales: Tensor | None,
    grad_weights: Tensor | None,
    slots: Tensor | None,
    order: Tensor | None,
    ranks: Tensor | None,
    partial_sums: Tensor | None,
    grad_values: Tensor | None,
    /,
) -> None:
    """Queue the gradients that are tensors; ``grad_values`` is zero-filled.

    For ``grad_values [N, D_v]`` the picks come sorted by slot, stably: ``slots [B * K]`` with N for what is no slot,
    and ``order [B * K]``, their positions. With ``ranks [B * K]``, the number of each pick's slot among those that
    occur, the rows of ``grad_values`` are these. ``partial_sums`` is ``[weighted_gather_partial_rows(B * K), D_v]`` in
    the accumulation dtype, not initialised. None of this can be checked without waiting for the device.
    """

def product_keys(
    row_scores: Tensor,
    row_indices: Tensor,
    column_scores: Tensor,
    column_indices: Tensor,
    side: int,
    slots: Tensor,
    row_ranks: Tensor,
    column_ranks: Tensor,
    /,
) -> None:
    """Queue ``_C.product_keys``; up to 2048 candidates of a half."""
