// Weighted sums of table rows, out[b] = sum_j weights[b, j] * values[indices[b, j]], and their gradients.
//
// Rows lie anywhere, so the work is waiting for memory: a team of up to 32 lanes shares a row, each lane takes 16 bytes
// of it, and asks for the next kAhead rows before it adds one. With many picks several teams share an output, every
// so-manieth pick each, and their sums are added in the order of the teams. What decides over that are K and D_v alone.
//
// The gradient of the table is a sum for each slot, over the picks sorted by slot. The sorted list is cut into chunks
// of kSegmentChunk entries whatever they are, one team each, so that a slot in constant use is nobody's burden. A slot
// whose uses lie within a chunk is written once; what the edge of a chunk cuts becomes a partial sum, and a second pass
// adds these up. Every sum has one order, and there are no atomics.
#include "cuda/weighted_gather.h"

#include "cuda/device/table.cuh"
#include "cuda/launch.h"

namespace attnfast::cuda {
namespace {

constexpr int kThreads = 128, kAhead = 4;

// How a block is shared out. All are powers of two but `tiles`.
struct Teams {
  int lanes;    // of a team
  int members;  // teams that share an output
  int64_t tiles;

  Teams(int64_t columns, int elements, int64_t rows) {
    lanes = 1;
    while (lanes < 32 && lanes * elements < columns) lanes *= 2;
    members = 1;
    while (members * 2 * lanes <= kThreads && rows / (members * 2) >= 2 * kAhead) members *= 2;
    tiles = (columns + lanes * elements - 1) / (lanes * elements);
  }
  __host__ __device__ int64_t of_block() const { return kThreads / lanes / members; }
};

template <class Params>
unsigned grid_of(int64_t blocks, const char* kernel, const Params& p) {
  if (blocks > INT32_MAX) throw std::runtime_error(call_text(kernel, p) + ": more than 2^31 blocks");
  return static_cast<unsigned>(blocks);
}

ATTNFAST_DEVICE bool is_slot(const WeightedGatherParams& p, int64_t slot) {
  return static_cast<uint64_t>(slot) < static_cast<uint64_t>(p.slots);
}

// ---- Forward ---------------------------------------------------------------------------------------------------

template <class R, class T, bool kVector>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 1 ? 3 : 4)
    weighted_gather_kernel(WeightedGatherParams p, Teams teams) {
  ATTNFAST_SHARED(shared);
  constexpr int kElements = Columns<T, kVector>::kElements;
  const int team = static_cast<int>(threadIdx.x) / teams.lanes, member = team % teams.members;
  const int64_t block = blockIdx.x;
  const int64_t b = block / teams.tiles * teams.of_block() + team / teams.members;
  const Columns<T, kVector> columns = {block % teams.tiles * teams.lanes * kElements,
                                       static_cast<int>(threadIdx.x) % teams.lanes, teams.lanes};
  const T* values = static_cast<const T*>(p.values);
  R sum[kElements] = {};
  const int64_t picks = b < p.outputs ? p.picks : 0;
  for (int64_t j = member; j < picks; j += kAhead * teams.members) {
    Pack<T, kElements> row[kAhead];
    R weight[kAhead] = {};
    bool valid[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t pick = j + u * teams.members, at = b * p.picks + pick;
      const int64_t slot = pick < picks ? p.indices[at] : -1;
      valid[u] = is_slot(p, slot);
      if (!valid[u]) continue;
      weight[u] = static_cast<const R*>(p.weights)[at];
      if (p.scales) weight[u] *= static_cast<R>(p.scales[slot]);
      row[u] = load_columns<T, kVector>(values + slot * p.values_stride[0], p.values_stride[1], p.value_size, columns);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (!valid[u]) continue;
#pragma unroll
      for (int e = 0; e < kElements; ++e) sum[e] += weight[u] * widen<R>(row[u].x[e]);
    }
  }
  if (teams.members > 1) add_members(sum, teams.members, member, teams.lanes, reinterpret_cast<R*>(shared));
  if (member != 0 || b >= p.outputs) return;
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    const int64_t column = columns.column(e);
    if (column < p.value_size) store_element(p.out, p.out_dtype, b * p.value_size + column, sum[e]);
  }
}

// ---- Gradient of the weights: a dot product for each pick ---------------------------------------------------------

template <class R, class T, bool kVector>
__global__ void __launch_bounds__(kThreads, 4) weighted_gather_dots_kernel(WeightedGatherParams p, Teams teams) {
  constexpr int kElements = Columns<T, kVector>::kElements;
  const int64_t at =
      static_cast<int64_t>(blockIdx.x) * (kThreads / teams.lanes) + static_cast<int>(threadIdx.x) / teams.lanes;
  const int64_t total = p.outputs * p.picks;
  const int64_t slot = at < total ? p.indices[at] : -1;
  Columns<T, kVector> columns = {0, static_cast<int>(threadIdx.x) % teams.lanes, teams.lanes};
  R sum = R(0);
  if (is_slot(p, slot)) {
    const T* row = static_cast<const T*>(p.values) + slot * p.values_stride[0];
    const R* grad = static_cast<const R*>(p.grad_out) + at / p.picks * p.value_size;
    for (int64_t tile = 0; tile < teams.tiles; ++tile, columns.first += teams.lanes * kElements) {
      const auto x = load_columns<T, kVector>(row, p.values_stride[1], p.value_size, columns);
      const auto g = load_columns<R, kVector, kElements>(grad, 1, p.value_size, columns);
#pragma unroll
      for (int e = 0; e < kElements; ++e) sum += widen<R>(x.x[e]) * g.x[e];
    }
    if (p.scales) sum *= static_cast<R>(p.scales[slot]);
  }
  for (int step = 1; step < teams.lanes; step *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
  if (columns.lane == 0 && at < total) static_cast<R*>(p.grad_weights)[at] = sum;
}

// ---- Gradient of the values: sums over segments of the sorted list ------------------------------------------------

template <class R, class C>
ATTNFAST_DEVICE void write_row(const WeightedGatherParams& p, const GatherSegments& s, int64_t entry, const C& columns,
                               const R* sum) {
  const int64_t row = s.ranks ? s.ranks[entry] : s.slots[entry];
#pragma unroll
  for (int e = 0; e < C::kElements; ++e) {
    const int64_t column = columns.column(e);
    if (column < p.value_size) store_element(p.grad_values, p.values_dtype, row * p.value_size + column, sum[e]);
  }
}

// Two rows for each chunk: 0 for a slot that goes on from the chunk before, 1 for one that begins here.
template <class R>
ATTNFAST_DEVICE R* partial_row(const WeightedGatherParams& p, int64_t chunk, int which) {
  return static_cast<R*>(p.partial_sums) + (2 * chunk + which) * p.value_size;
}

template <class R, bool kVector>
__global__ void __launch_bounds__(kThreads, 4)
    gather_segments_kernel(WeightedGatherParams p, GatherSegments s, Teams teams) {
  using C = Columns<R, kVector>;
  const int64_t block = blockIdx.x;
  const int64_t chunk = block / teams.tiles * teams.of_block() + static_cast<int>(threadIdx.x) / teams.lanes;
  const C columns = {block % teams.tiles * teams.lanes * C::kElements, static_cast<int>(threadIdx.x) % teams.lanes,
                     teams.lanes};
  const int64_t begin = chunk * kSegmentChunk;
  if (begin >= s.entries) return;
  const int64_t end = begin + kSegmentChunk < s.entries ? begin + kSegmentChunk : s.entries;
  R sum[C::kElements] = {};
  int64_t slot = s.slots[begin];
  bool begins = begin == 0 || s.slots[begin - 1] != slot;
  const auto close = [&](int64_t entry, bool ends) {
    if (slot >= p.slots) return;
    if (begins && ends) return write_row(p, s, entry, columns, sum);
    R* partial = partial_row<R>(p, chunk, begins ? 1 : 0);
#pragma unroll
    for (int e = 0; e < C::kElements; ++e) {
      if (columns.column(e) < p.value_size) partial[columns.column(e)] = sum[e];
    }
  };
  for (int64_t i = begin; i < end; i += kAhead) {
    Pack<R, C::kElements> grad[kAhead];
    R weight[kAhead] = {};
    int64_t next[kAhead] = {};
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (i + u >= end) continue;
      const int64_t position = s.order[i + u];
      next[u] = s.slots[i + u];
      weight[u] = static_cast<const R*>(p.weights)[position];
      grad[u] = load_columns<R, kVector>(static_cast<const R*>(p.grad_out) + position / p.picks * p.value_size, 1,
                                         p.value_size, columns);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (i + u >= end) continue;
      if (next[u] != slot) {
        close(i + u - 1, true);
        slot = next[u];
        begins = true;
#pragma unroll
        for (int e = 0; e < C::kElements; ++e) sum[e] = R(0);
      }
#pragma unroll
      for (int e = 0; e < C::kElements; ++e) sum[e] += weight[u] * grad[u].x[e];
    }
  }
  close(end - 1, end == s.entries || s.slots[end] != slot);
}

// The slot that begins in this chunk and goes on in later ones: its partial sums, every so-manieth for each team, and
// then those of the teams in order.
template <class R, bool kVector>
__global__ void __launch_bounds__(kThreads, 4)
    gather_join_kernel(WeightedGatherParams p, GatherSegments s, Teams teams) {
  ATTNFAST_SHARED(shared);
  using C = Columns<R, kVector>;
  const int64_t chunk = blockIdx.x / teams.tiles, begin = chunk * kSegmentChunk, end = begin + kSegmentChunk;
  if (end >= s.entries) return;
  const int64_t slot = s.slots[end - 1];
  if (slot >= p.slots || s.slots[end] != slot) return;
  if (begin > 0 && s.slots[begin - 1] == slot) return;  // it began in an earlier chunk
  int64_t last = chunk + 1, beyond = segment_chunks(s.entries);
  while (beyond - last > 1) {  // the last chunk that begins with the slot
    const int64_t middle = last + (beyond - last) / 2;
    if (s.slots[middle * kSegmentChunk] == slot)
      last = middle;
    else
      beyond = middle;
  }
  const C columns = {blockIdx.x % teams.tiles * teams.lanes * C::kElements, static_cast<int>(threadIdx.x) % teams.lanes,
                     teams.lanes};
  const int member = static_cast<int>(threadIdx.x) / teams.lanes, members = kThreads / teams.lanes;
  R sum[C::kElements] = {};
#pragma unroll 4
  for (int64_t c = chunk + member; c <= last; c += members) {
    const auto part = load_columns<R, kVector>(partial_row<R>(p, c, c == chunk ? 1 : 0), 1, p.value_size, columns);
#pragma unroll
    for (int e = 0; e < C::kElements; ++e) sum[e] += part.x[e];
  }
  add_members(sum, members, member, teams.lanes, reinterpret_cast<R*>(shared));
  if (member == 0) write_row(p, s, end - 1, columns, sum);
}

// ---- Launches --------------------------------------------------------------------------------------------------

bool aligned(const void* data, int64_t bytes_between_rows) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && bytes_between_rows % 16 == 0;
}

// visit(T{}, R{}) with the stored type of the table and what is computed in.
template <class Visit>
void visit_table(const WeightedGatherParams& p, Visit visit) {
  switch (p.values_dtype) {
    case DType::kFloat64:
      return visit(double{}, double{});
    case DType::kFloat32:
      return visit(float{}, float{});
    case DType::kBFloat16:
      return visit(BFloat16{}, float{});
    case DType::kFloat16:
      return visit(Float16{}, float{});
    default:
      return visit(int8_t{}, float{});
  }
}

template <class T>
bool rows_are_vectors(const WeightedGatherParams& p) {
  return p.values_stride[1] == 1 && aligned(p.values, p.values_stride[0] * static_cast<int64_t>(sizeof(T)));
}

template <class R, class T, bool kVector>
void launch_forward(const WeightedGatherParams& p, Stream stream) {
  constexpr int kElements = Columns<T, kVector>::kElements;
  constexpr const char* kName = "weighted_gather";
  const Teams teams(p.value_size, kElements, p.picks);
  const unsigned grid = grid_of((p.outputs + teams.of_block() - 1) / teams.of_block() * teams.tiles, kName, p);
  const size_t bytes = teams.members > 1 ? kThreads * kElements * sizeof(R) : 0;
  ATTNFAST_LAUNCH((weighted_gather_kernel<R, T, kVector>), grid, kThreads, bytes, stream, p, teams);
  check_launched(kName, p);
}

template <class R, class T, bool kVector>
void launch_dots(const WeightedGatherParams& p, Stream stream) {
  constexpr const char* kName = "weighted_gather_dots";
  const Teams teams(p.value_size, Columns<T, kVector>::kElements, 1);
  const int64_t teams_of_block = kThreads / teams.lanes;
  const unsigned grid = grid_of((p.outputs * p.picks + teams_of_block - 1) / teams_of_block, kName, p);
  ATTNFAST_LAUNCH((weighted_gather_dots_kernel<R, T, kVector>), grid, kThreads, 0, stream, p, teams);
  check_launched(kName, p);
}

template <class R, bool kVector>
void launch_sums(const WeightedGatherParams& p, const GatherSegments& s, Stream stream) {
  constexpr int kElements = Columns<R, kVector>::kElements;
  const Teams teams(p.value_size, kElements, 1);
  const int64_t chunks = segment_chunks(s.entries);
  const unsigned grid = grid_of((chunks + teams.of_block() - 1) / teams.of_block() * teams.tiles, "gather_segments", p);
  ATTNFAST_LAUNCH((gather_segments_kernel<R, kVector>), grid, kThreads, 0, stream, p, s, teams);
  check_launched("gather_segments", p);
  if (chunks < 2) return;
  const unsigned joins = grid_of((chunks - 1) * teams.tiles, "gather_join", p);
  ATTNFAST_LAUNCH((gather_join_kernel<R, kVector>), joins, kThreads, kThreads * kElements * sizeof(R), stream, p, s,
                  teams);
  check_launched("gather_join", p);
}

}  // namespace

void weighted_gather_fwd(const WeightedGatherParams& p, void* stream) {
  if (p.outputs == 0 || p.value_size == 0) return;
  visit_table(p, [&](auto stored, auto real) {
    using T = decltype(stored);
    using R = decltype(real);
    if (rows_are_vectors<T>(p))
      launch_forward<R, T, true>(p, static_cast<Stream>(stream));
    else
      launch_forward<R, T, false>(p, static_cast<Stream>(stream));
  });
}

void weighted_gather_dots(const WeightedGatherParams& p, void* stream) {
  if (p.outputs == 0 || p.picks == 0) return;
  visit_table(p, [&](auto stored, auto real) {
    using T = decltype(stored);
    using R = decltype(real);
    if (rows_are_vectors<T>(p) && aligned(p.grad_out, p.value_size * static_cast<int64_t>(sizeof(R))))
      launch_dots<R, T, true>(p, static_cast<Stream>(stream));
    else
      launch_dots<R, T, false>(p, static_cast<Stream>(stream));
  });
}

void weighted_gather_sums(const WeightedGatherParams& p, const GatherSegments& s, void* stream) {
  if (s.entries == 0 || p.value_size == 0) return;
  visit_table(p, [&](auto, auto real) {
    using R = decltype(real);
    const int64_t bytes = p.value_size * static_cast<int64_t>(sizeof(R));
    if (aligned(p.grad_out, bytes) && aligned(p.partial_sums, bytes))
      launch_sums<R, true>(p, s, static_cast<Stream>(stream));
    else
      launch_sums<R, false>(p, s, static_cast<Stream>(stream));
  });
}

}  // namespace attnfast::cuda
