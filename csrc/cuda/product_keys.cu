// The k largest sums of a row score and a column score, from the sorted best candidates of each half; the algorithm is
// that of cpu/product_keys.cpp. One warp merges one row of the result (a query and a head).
//
// A pair (i, j) of ranks, from 1, has at least i j - 1 pairs before it, so only pairs with i j <= k count, and not even
// all of them are looked at: the pairs of each row key come in the order of their columns, one of them stands at the
// front, and row key i + 1 need not be there before row key i has given one. Lane l keeps the fronts of row keys l,
// l + 32, ... and the best of them; k times the best of all lanes is taken, and only the lane that gave it, and the one
// that has a row key more, look again.
//
// Pairs are compared by their exact sums (the rounded sum, then its rounding error), equal ones by their slot.
#include "cuda/product_keys.h"

#include "cuda/device/elements.cuh"
#include "cuda/launch.h"

namespace attnfast::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int64_t kMaxCandidates = 2048;  // 32 KiB of shared memory, less than what a kernel gets without asking

template <class R>
struct Front {
  R sum, error;
  int64_t slot;
  int row;  // -1: none

  ATTNFAST_DEVICE bool before(const Front& other) const {
    if (row < 0 || other.row < 0) return other.row < 0 && row >= 0;
    if (sum != other.sum) return sum > other.sum;
    if (error != other.error) return error > other.error;
    return slot < other.slot;
  }
};

template <class R>
ATTNFAST_DEVICE Front<R> front_of(const ProductKeysParams& p, int64_t row, int i, int j) {
  const int64_t at = row * p.candidates;
  const R a = static_cast<const R*>(p.scores[0])[at + i], b = static_cast<const R*>(p.scores[1])[at + j];
  const R sum = a + b, rest = sum - a;
  Front<R> front;
  // What rounding took from the sum, exactly (Knuth's two-sum).
  front.error = sum - sum == R(0) ? (a - (sum - rest)) + (b - rest) : R(0);
  front.sum = sum == sum ? sum : static_cast<R>(__builtin_inf());
  front.slot = static_cast<int64_t>(static_cast<uint64_t>(p.indices[0][at + i]) * static_cast<uint64_t>(p.side) +
                                    static_cast<uint64_t>(p.indices[1][at + j]));
  front.row = i;
  return front;
}

template <class R>
__global__ void __launch_bounds__(kWarps * 32) product_keys_kernel(ProductKeysParams p) {
  ATTNFAST_SHARED(shared);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (row >= p.rows) return;
  const int candidates = static_cast<int>(p.candidates);
  // The column at the front of each row key; `candidates`: it has no more. Each is its lane's alone.
  int* columns = reinterpret_cast<int*>(shared) + warp * candidates;
  int rows = 1;  // row keys in play
  if (lane == 0) columns[0] = 0;
  Front<R> own;  // the lane's best
  const auto look = [&] {
    own.row = -1;
    for (int i = lane; i < rows; i += 32) {
      if (columns[i] == candidates) continue;
      const Front<R> front = front_of<R>(p, row, i, columns[i]);
      if (front.before(own)) own = front;
    }
  };
  own = {};
  look();
  for (int64_t pick = 0; pick < p.picks; ++pick) {
    Front<R> best = own;
    for (int step = 1; step < 32; step *= 2) {
      Front<R> other;
      other.sum = __shfl_xor_sync(0xFFFFFFFFu, best.sum, step);
      other.error = __shfl_xor_sync(0xFFFFFFFFu, best.error, step);
      other.slot = __shfl_xor_sync(0xFFFFFFFFu, best.slot, step);
      other.row = __shfl_xor_sync(0xFFFFFFFFu, best.row, step);
      if (other.before(best)) best = other;
    }
    const bool mine = best.row % 32 == lane, joins = best.row == rows - 1 && rows < candidates;
    if (mine) {
      const int64_t at = row * p.picks + pick;
      p.slots[at] = best.slot;
      p.ranks[0][at] = best.row;
      p.ranks[1][at] = columns[best.row];
      ++columns[best.row];
    }
    if (joins) {
      if (rows % 32 == lane) columns[rows] = 0;
      ++rows;
    }
    if (mine || (joins && (rows - 1) % 32 == lane)) look();
  }
}

template <class R>
void launch(const ProductKeysParams& p, Stream stream) {
  constexpr const char* kName = "product_keys";
  const int64_t blocks = (p.rows + kWarps - 1) / kWarps;
  if (blocks > INT32_MAX) throw std::runtime_error(call_text(kName, p) + ": more than 2^31 blocks");
  const size_t bytes = static_cast<size_t>(kWarps * p.candidates) * sizeof(int);
  ATTNFAST_LAUNCH((product_keys_kernel<R>), static_cast<unsigned>(blocks), kWarps * 32, bytes, stream, p);
  check_launched(kName, p);
}

}  // namespace

const char* product_keys_missing(const ProductKeysParams& p) {
  return p.candidates > kMaxCandidates ? "more than 2048 candidates of a half" : nullptr;
}

void product_keys(const ProductKeysParams& p, void* stream) {
  if (const char* missing = product_keys_missing(p)) {
    throw std::runtime_error(call_text("product_keys", p) + ": no kernel has " + missing);
  }
  if (p.rows == 0 || p.picks == 0) return;
  if (p.dtype == DType::kFloat64)
    launch<double>(p, static_cast<Stream>(stream));
  else
    launch<float>(p, static_cast<Stream>(stream));
}

}  // namespace attnfast::cuda
