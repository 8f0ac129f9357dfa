"""The compiled module: one function per op, called by :mod:`attnfast.ops` alone.

Tensors are read through DLPack without a copy. ``query`` is ``[B, H, T_q, D]``, ``key`` ``[B, H_kv, T_k, D]``,
``value`` ``[B, H_kv, T_k, D_v]``, of one floating dtype and any strides; "Real" is float64 for float64 inputs, else
float32. For packed (varlen) input B is 1, T_q and T_k are totals, and both ``cu_seqlens`` are given. Results go
to tensors that the caller made. ``None`` means absent. Arguments are positional. Every wrong argument is a TypeError or
ValueError that names it; no call reads or writes out of bounds.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

def init(exchange_api_capsule: Any, parallel_for_address: int, probes: tuple[Any, ...]) -> None:
    """Connect to torch and choose the ISA; ``attnfast._ext`` calls this once.

    ``exchange_api_capsule`` is ``torch.Tensor.__dlpack_c_exchange_api__``, ``parallel_for_address`` the address of
    libtorch_cpu's ``torch_parallel_for``; ``probes`` are Tensor, Parameter, Tensor.is_neg, the functions that tell of
    dispatch modes, functorch transforms, autocast and grad mode, and the module torch.autograd.forward_ad. RuntimeError
    if ATTNFAST_ISA names no available variant.
    """

def ordinary_call(query: Any, key: Any, value: Any, /) -> int:
    """Whether three operands can go to the kernels exactly as they came, with nothing in between.

    That is: plain dense CPU tensors ``[B, H, T_q, D]``, ``[B, H, T_k, D]``, ``[B, H, T_k, D_v]`` of one floating dtype
    without a negative bit, no dispatch mode, functorch transform, forward-mode level or autocast. Returns D, or -D if a
    gradient is wanted, or 0 if the call is not ordinary (then nothing is said about why).
    """

def ordinary_gradient(grad_out: Any, /) -> bool:
    """Whether the backward kernel can take a gradient ``[B, H, T_q, D_v]`` exactly as it came and nothing intercepts or
    records what the backward does (no dispatch mode, functorch transform, or grad mode).
    """

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
    """Write softmax attention of the dot score to ``out``, and ``lse``, ``weights``, ``weights_index`` if given.

    - ``out`` ``[B, H, T_q, D_v]``, dtype of query; ``lse`` Real, contiguous ``[B, H, T_q]``, base-2, None = not wanted.
    - ``weights_mode`` 0 none; 1 full ``[B, H, T_q, T_k]`` in query's dtype; 2 column sums ``[B, H, T_k]`` Real;
      3 row maximum ``[B, H, T_q]`` Real with ``weights_index`` int64, contiguous ``[B, H, T_q]``.
    - ``mask`` bool (True = may attend), ``bias``, ``bias2`` floating: views expanded to ``[B, H, T_q, T_k]``.
    - ``query_lengths``, ``key_lengths`` int64 ``[B]``, not with packed input; ``cu_seqlens_q``, ``cu_seqlens_k`` int64
      ``[N + 1]``.
    - ``alibi_slopes`` Real ``[B, H]`` (``[N, H]`` if packed), any strides; ``sink`` Real, contiguous ``[H]``;
      ``seed`` int64 ``[2]``: (seed, offset), needed if ``dropout_p`` > 0.
    - ``softcap`` 0 = off; ``causal`` 0 none, 1 top left, 2 bottom right; windows -1 = unbounded.
    - ``window_bounds`` int64 ``[B, H, T_q, 2]``, last stride 1: no row sees a key outside its [begin, end), which is
      cut to the keys of its sequence, whatever it holds.
    - ``prior_sigma`` 0 = off, else ``prior_center`` Real, contiguous ``[B, H, T_q]``: weights are multiplied by
      exp(-(key - center)^2 / (2 sigma^2)) after the softmax.
    """

def dot_attention_bwd(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    delta: Tensor | None,
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
    """Write the gradients that are not None; the modifiers are those of the forward call.

    ``out`` and ``lse`` may both be None if T_k is at most ``whole_row_keys()`` and only gradients of ``out`` by query,
    key and value are asked for, without soft cap, dropout, prior, sink or packing.

    - ``delta`` Real, contiguous ``[B, H, T_q]``: workspace, None = the binary's own; ``delta_shift`` likewise, added to
      rowsum(grad_out * out).
    - ``grad_weights`` has the forward's ``weights`` layout and must be given exactly when ``weights_mode`` > 0.
    - ``grad_query``, ``grad_key``, ``grad_value``: inputs' dtype and shape, any strides, written in full.
    - ``grad_bias``, ``grad_bias2``: zero-filled Real buffers of the bias's own shape, expanded to
      ``[B, H, T_q, T_k]``; dimensions of stride 0 are summed. ``grad_sink`` Real, contiguous ``[H]``;
      ``grad_center`` Real, contiguous ``[B, H, T_q]``.
    - ``threads``: ``torch.get_num_threads()``; chooses the schedule, never the result.
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
    /,
) -> None:
    """Write softmax attention of the additive score to ``out``, and ``lse``, ``weights``, ``weights_index`` if given.

    The score is sum_d weight_d tanh(query_d + key_d + score_bias_d); ``weight`` and ``score_bias`` are Real,
    contiguous, ``[H, D]`` or ``[1, D]``. The rest is as for ``dot_attention_fwd``.
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
    /,
) -> None:
    """Write the gradients that are not None; the modifiers are those of the forward call.

    ``grad_weight`` and ``grad_score_bias`` are Real, contiguous, of their inputs' shapes, written in full. The rest is
    as for ``dot_attention_bwd``, but ``out`` and ``lse`` are always needed.
    """

def whole_row_keys() -> int:
    """Up to so many keys ``dot_attention_bwd`` can do without ``out`` and ``lse``."""

def dot_attention_decode_obstacle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
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
) -> str | None:
    """Say why ``dot_attention_fwd`` would not take the decode kernel; None if it would. Nothing is computed."""

def additive_attention_decode_obstacle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
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
    /,
) -> str | None:
    """Say why ``additive_attention_fwd`` would not take the decode kernel; None if it would. Nothing is computed."""

def topk_scores_fwd(
    query: Tensor,
    keys: Tensor,
    key_scales: Tensor | None,
    mask: Tensor | None,
    scores: Tensor,
    indices: Tensor,
    scale: float,
    threads: int,
    /,
) -> None:
    """Write the k best of ``(scale * query) . keys`` for each query: ``scores`` largest first, and ``indices``.

    - ``query`` ``[B, D]``, any strides, and ``keys`` ``[N, D]``, rows of neighbouring elements: both float64, or each
      float32, bfloat16 or float16, or ``keys`` int8; ``key_scales`` float32, contiguous ``[N]``, exactly with int8.
    - ``mask`` bool ``[B, N]``, True = may be chosen.
    - ``scores`` Real and ``indices`` int64, contiguous ``[B, k]``, k <= N; -inf and -1 where no slot is visible.
    """

def weighted_gather_fwd(
    indices: Tensor, weights: Tensor, values: Tensor, scales: Tensor | None, out: Tensor, /
) -> None:
    """Write ``out[b] = sum_j weights[b, j] * values[indices[b, j]]``.

    - ``indices`` int64 ``[B, K]``, slots or -1 for none; ``weights`` Real (float64 for float64 values, else float32)
      ``[B, K]``; both contiguous.
    - ``values`` ``[N, D_v]`` floating or int8, any strides; ``scales`` float32, contiguous ``[N]``, exactly with int8.
    - ``out`` Real or a half type, contiguous ``[B, D_v]``.
    """

def weighted_gather_bwd(
    grad_out: Tensor,
    indices: Tensor,
    weights: Tensor,
    values: Tensor,
    scales: Tensor | None,
    grad_weights: Tensor | None,
    grad_values: Tensor | None,
    allocate: Callable[[int], tuple[Tensor, Tensor]] | None,
    /,
) -> None:
    """Write the gradients that are wanted; the first arguments are those of the forward call.

    - ``grad_out`` Real, contiguous ``[B, D_v]``; ``grad_weights`` Real, contiguous ``[B, K]``.
    - ``grad_values``: the dense gradient in the dtype of ``values``, contiguous and zero-filled ``[N, D_v]``.
    - ``allocate`` asks for the sparse one instead: it is called once, with the number U of slots that occur, and
      returns int64 ``[U]``, which gets these slots ascending, and ``[U, D_v]`` in the dtype of ``values``, both
      contiguous.
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
    """Write the k largest sums of a row score and a column score of each query, by their slots and ranks.

    - Scores float32 or float64 ``[B, candidates]``, descending; indices int64 of the same shape; ``side`` n: a slot is
      row index times n plus column index.
    - ``slots``, ``row_ranks``, ``column_ranks`` int64 ``[B, k]``, k at most the square of ``candidates``, written by
      falling exact sum, equal sums by rising slot.
    - Everything contiguous.
    """

def set_isa(name: str) -> str:
    """Use the kernels of this variant ("auto" = the best available); return the name of the one in use before.

    ValueError, naming the choices, if the variant is unknown, not built, or not supported by this machine.
    """

def get_isa() -> str:
    """Name of the variant in use: "baseline", "avx2", "avx512" or "avx512_bf16"."""

def available_isas() -> list[str]:
    """Variants that are built and that this machine can run, the best last."""

def compiled_isas() -> list[str]:
    """Variants that are part of this build, the best last."""

def cpu_features() -> dict[str, bool]:
    """CPU features that some variant needs, and whether this machine (and its operating system) has them."""

def build_info() -> dict[str, Any]:
    """What this binary is: version, compiler, cplusplus, python, pybind11, isas, sanitizer, debug."""

def yardstick_fma(steps: int) -> float:
    """Multiply and add on registers, ``steps`` rounds shared by torch's threads; return the floating-point operations.

    What the benchmark calls the FMA peak is this over its time: float32, with the vectors of the variant in use.
    """

def yardstick_read(memory: Any) -> int:
    """Read a contiguous buffer once, with torch's threads; return a checksum.

    Its size over the time is what the benchmark calls the stream rate.

    ValueError if the buffer is not contiguous.
    """
