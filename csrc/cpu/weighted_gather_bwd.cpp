// Backward of the weighted gather, in sums of fixed order whatever the number of threads.
//
// (slot, position) pairs are sorted by slot, stably (a radix sort of words that hold both), so that all uses of a slot
// stand together in the order of their positions. The sorted list is cut into chunks of kGatherChunk entries, one task
// each, which bounds both the work of a task, however often one slot is used, and the length of a chain of additions. A
// slot whose uses lie within a chunk is written by its task; what the edge of a chunk cuts becomes a partial sum, and
// partial sums are added in order afterwards. The gradient of a weight is the dot product of the row and the gradient
// of the output, in a pass of its own. Without gradients of the values nothing is sorted.
//
// Sums are kept in registers and written once; where the result is larger than what caches hold, past them. The rows
// that they are made of are prefetched in sorted order.
#include "gather_rows.h"
#include "parallel.h"
#include "weighted_gather.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

// ---------------------------------------------------------------- sort

constexpr int kMaxDigitBits = 11, kSmallDigitBits = 8;
constexpr int64_t kSmallSort = 4096;     // up to here a large histogram costs more than another pass
constexpr int64_t kSortShare = 1 << 15;  // entries of one task
constexpr int kMaxShares = 16;
constexpr int64_t kSumAhead = 8;                // entries between a prefetch and its use
constexpr int64_t kPastCachesBytes = 16 << 20;  // of a result that is written past the caches

struct Sort {
  const WeightedGatherParams* p;
  int64_t count, share;
  int shares, position_bits, shift, digit_bits;
  uint64_t *from, *to;
  uint64_t* places;  // [share][digit]: how many, then where they go
};

// The places of a task's own share.
ATTNFAST_INLINE uint64_t* places_of(const Sort& s, int64_t task) { return s.places + (task << s.digit_bits); }
ATTNFAST_INLINE uint64_t digit_of(const Sort& s, uint64_t word) {
  return word >> s.shift & ((uint64_t(1) << s.digit_bits) - 1);
}
ATTNFAST_INLINE uint64_t* cleared_places(const Sort& s, int64_t task) {
  uint64_t* places = places_of(s, task);
  for (int64_t digit = 0; digit < int64_t(1) << s.digit_bits; digit++) places[digit] = 0;
  return places;
}

struct Range {
  int64_t begin, end;
};
ATTNFAST_INLINE Range share_of(const Sort& s, int64_t task) {
  const int64_t begin = task * s.share, end = begin + s.share;
  return {begin < s.count ? begin : s.count, end < s.count ? end : s.count};
}

// The words, and how many have each of the first digits. Entries without a slot get number N, past all others.
void fill_task(void* context, int64_t task) {
  const Sort& s = *static_cast<const Sort*>(context);
  const Range r = share_of(s, task);
  uint64_t* places = cleared_places(s, task);
  for (int64_t i = r.begin; i < r.end; i++) {
    const int64_t slot = read_index(s.p->indices + i);
    const uint64_t number = check_slot(*s.p, slot, i) ? uint64_t(slot) : uint64_t(s.p->slots);
    s.from[i] = number << s.position_bits | uint64_t(i);
    places[digit_of(s, s.from[i])]++;
  }
}

void count_task(void* context, int64_t task) {
  const Sort& s = *static_cast<const Sort*>(context);
  const Range r = share_of(s, task);
  uint64_t* places = cleared_places(s, task);
  for (int64_t i = r.begin; i < r.end; i++) places[digit_of(s, s.from[i])]++;
}

void move_task(void* context, int64_t task) {
  const Sort& s = *static_cast<const Sort*>(context);
  const Range r = share_of(s, task);
  uint64_t* places = places_of(s, task);
  for (int64_t i = r.begin; i < r.end; i++) s.to[places[digit_of(s, s.from[i])]++] = s.from[i];
}

// ---------------------------------------------------------------- sums

template <class R>
struct Sums {
  const WeightedGatherParams* p;
  const uint64_t* sorted;
  int64_t entries, chunks;  // entries with a slot, which come first
  int position_bits;

  int64_t slot(int64_t entry) const { return int64_t(sorted[entry] >> position_bits); }
  int64_t position(int64_t entry) const { return int64_t(sorted[entry] & ((uint64_t(1) << position_bits) - 1)); }
  int64_t chunk_end(int64_t chunk) const {
    const int64_t end = (chunk + 1) * kGatherChunk;
    return end < entries ? end : entries;
  }
  bool continues(int64_t entry) const { return entry > 0 && entry < entries && slot(entry) == slot(entry - 1); }
  R* partial(int64_t chunk, int which) const {
    return static_cast<R*>(p->partial_sums) + (2 * chunk + which) * p->value_size;
  }
};

// One entry of the segment at hand: what its output's gradient is multiplied with.
template <class R>
struct Use {
  const R* grad;
  R weight;
};

template <class R, bool PAST, class O>
ATTNFAST_INLINE void write_lanes(O* dst, Vec<R> sum) {
  if constexpr (PAST && std::is_same_v<R, O>)
    store_past_caches(dst, sum);
  else
    store_lanes<R>(dst, sum);
}
template <class R, bool PAST, class O>
ATTNFAST_INLINE void write_row(O* dst, int64_t n, const auto& sum_at) {
  constexpr int L = kLanes<R>;
  int64_t i = 0;
  for (; i + L <= n; i += L) write_lanes<R, PAST>(dst + i, sum_at(i, L));
  if (i < n) {
    alignas(64) O part[L];
    store_lanes<R>(static_cast<O*>(part), sum_at(i, int(n - i)));
    for (int64_t j = i; j < n; j++) dst[j] = part[j - i];
  }
}

// dst[n] = sum of weight * grad over the uses, in order, a few vectors at a time.
template <class R, bool PAST, class O>
ATTNFAST_INLINE void sum_uses(const Use<R>* uses, int count, int64_t n, O* dst) {
  constexpr int L = kLanes<R>, kBlock = 8;
  if (count == 1) {
    const R* grad = uses[0].grad;
    const R weight = uses[0].weight;
    write_row<R, PAST>(dst, n, [&](int64_t i, int lanes) ATTNFAST_LAMBDA {
      return (lanes == L ? load(grad + i) : load_partial<R>(grad + i, lanes)) * weight;
    });
    return;
  }
  for (int64_t first = 0; first < n; first += kBlock * L) {
    Vec<R> sum[kBlock] = {};
    if (n - first >= kBlock * L) {
      for (int u = 0; u < count; u++)
        ATTNFAST_UNROLL for (int j = 0; j < kBlock; j++) sum[j] += load(uses[u].grad + first + j * L) * uses[u].weight;
      ATTNFAST_UNROLL for (int j = 0; j < kBlock; j++) { write_lanes<R, PAST>(dst + first + j * L, sum[j]); }
    } else {
      write_row<R, PAST>(dst + first, n - first, [&](int64_t i, int lanes) ATTNFAST_LAMBDA {
        Vec<R> total = zero<R>();
        for (int u = 0; u < count; u++) {
          const R* grad = uses[u].grad + first + i;
          total += (lanes == L ? load(grad) : load_partial<R>(grad, lanes)) * uses[u].weight;
        }
        return total;
      });
    }
  }
}

template <class R, class T, bool PAST>
void chunk_task(void* context, int64_t chunk) {
  const Sums<R>& s = *static_cast<const Sums<R>*>(context);
  const WeightedGatherParams& p = *s.p;
  const int64_t n = p.value_size, begin = chunk * kGatherChunk, end = s.chunk_end(chunk);
  Use<R> uses[kGatherChunk];
  int64_t row = p.chunk_starts[chunk] - (s.continues(begin) ? 1 : 0);  // number of the slot among those that occur
  for (int64_t first = begin, last; first < end; first = last, row++) {
    if (first + kSumAhead < s.entries) {
      const R* ahead = static_cast<const R*>(p.grad_out) + s.position(first + kSumAhead) / p.picks * n;
      for (int64_t i = 0; i < n; i += kLineBytes / int64_t(sizeof(R))) prefetch(ahead + i);
    }
    const int64_t slot = s.slot(first);
    for (last = first; last < end && s.slot(last) == slot; last++) {
      const int64_t position = s.position(last);
      uses[last - first] = {static_cast<const R*>(p.grad_out) + position / p.picks * n,
                            static_cast<const R*>(p.weights)[position]};
    }
    const int count = int(last - first);
    const bool begins = !s.continues(first), ends = !s.continues(last);
    if (begins && p.grad_rows) p.grad_rows[row] = slot;
    if (begins && ends)
      sum_uses<R, PAST>(uses, count, n, static_cast<T*>(p.grad_values) + (p.grad_rows ? row : slot) * n);
    else
      sum_uses<R, false>(uses, count, n, s.partial(chunk, begins));
  }
  if (PAST) fence_past_caches();
}

// The slot that begins in this chunk and goes on in the next: its partial sums, in order.
template <class R, class T>
void join_task(void* context, int64_t chunk) {
  const Sums<R>& s = *static_cast<const Sums<R>*>(context);
  const WeightedGatherParams& p = *s.p;
  const int64_t n = p.value_size, begin = chunk * kGatherChunk, end = s.chunk_end(chunk);
  if (!s.continues(end)) return;
  int64_t first = end - 1;
  while (first > begin && s.continues(first)) first--;
  if (s.continues(first)) return;  // it began before this chunk
  int64_t last = chunk + 1;
  while (s.continues(s.chunk_end(last)) && s.slot(s.chunk_end(last)) == s.slot(first)) last++;
  const int64_t slot = s.slot(first), row = p.grad_rows ? p.chunk_starts[chunk + 1] - 1 : slot;
  const auto sum_at = [&](int64_t i, int lanes) ATTNFAST_LAMBDA {
    const auto part = [&](const R* from) ATTNFAST_LAMBDA {
      return lanes == kLanes<R> ? load(from + i) : load_partial<R>(from + i, lanes);
    };
    Vec<R> total = part(s.partial(chunk, 1));
    for (int64_t c = chunk + 1; c <= last; c++) total += part(s.partial(c, 0));
    return total;
  };
  write_row<R, false>(static_cast<T*>(p.grad_values) + row * n, n, sum_at);
}

// ---------------------------------------------------------------- gradients of the weights

struct Dots {
  const WeightedGatherParams* p;
  int64_t share;  // outputs of one task
};

template <class R, class T>
void dots_task(void* context, int64_t task) {
  const Dots& d = *static_cast<const Dots*>(context);
  const WeightedGatherParams& p = *d.p;
  const int64_t n = p.value_size, total = p.outputs * p.picks, begin = task * d.share;
  const int64_t end = begin + d.share < p.outputs ? begin + d.share : p.outputs;
  T* packed = p.values_stride[1] == 1 ? nullptr : static_cast<T*>(scratch(0, size_t(n) * sizeof(T)));
  for (int64_t b = begin; b < end; b++) {
    for (int64_t i = b * p.picks; i < (b + 1) * p.picks; i++) {
      if (i + kGatherAhead < total) prefetch_row<T>(p, read_index(p.indices + i + kGatherAhead), 0, n);
      const int64_t slot = read_index(p.indices + i);
      R dot = R(0);
      if (check_slot(p, slot, i)) {
        dot = dot_row<R>(table_row<T>(p, slot, 0, n, packed), static_cast<const R*>(p.grad_out) + b * n, n);
        if constexpr (std::is_same_v<T, int8_t>) dot = R(p.scales[slot]) * dot;
      }
      static_cast<R*>(p.grad_weights)[i] = dot;
    }
  }
}

template <class R, class T>
void sum_slots(const WeightedGatherParams& p, bool serial) {
  Sums<R> s{&p, p.sorted, p.outputs * p.picks, 0, gather_position_bits(p)};
  while (s.entries > 0 && s.slot(s.entries - 1) >= p.slots) s.entries--;
  s.chunks = (s.entries + kGatherChunk - 1) / kGatherChunk;
  const int64_t row_bytes = p.value_size * int64_t(sizeof(T));
  const int64_t rows = p.grad_rows ? p.chunk_starts[(p.outputs * p.picks + kGatherChunk - 1) / kGatherChunk] : p.slots;
  const bool aligned = (uint64_t(p.grad_values) | uint64_t(row_bytes)) % kVectorBytes == 0;
  const bool past = std::is_same_v<R, T> && aligned && double(rows) * double(row_bytes) >= kPastCachesBytes;
  parallel_tasks(s.chunks, serial, past ? chunk_task<R, T, true> : chunk_task<R, T, false>, &s);
  parallel_tasks(s.chunks - 1, serial, join_task<R, T>, &s);
}

template <class R>
void backward(const WeightedGatherParams& p) {
  const bool serial = double(p.outputs) * double(p.picks) * double(p.value_size + 16) < kSerialElements;
  visit_table<R>(p.values_dtype, [&](auto tag) {
    using T = decltype(tag);
    if (p.grad_weights) {
      Dots d{&p, p.picks > 0 && p.picks < kPicksPerTask ? kPicksPerTask / p.picks : 1};
      parallel_tasks((p.outputs + d.share - 1) / d.share, serial, dots_task<R, T>, &d);
    }
    if constexpr (!std::is_same_v<T, int8_t>) {
      if (p.grad_values) sum_slots<R, T>(p, serial);
    }
  });
}

}  // namespace

int64_t weighted_gather_sort(const WeightedGatherParams& p) {
  Sort s{};
  s.p = &p;
  s.count = p.outputs * p.picks;
  const int64_t wanted = (s.count + kSortShare - 1) / kSortShare;
  s.shares = int(wanted < 1 ? 1 : wanted < kMaxShares ? wanted : kMaxShares);
  s.share = (s.count + s.shares - 1) / s.shares;
  s.position_bits = gather_position_bits(p);
  const int bits = gather_bits(p.slots), widest = s.count < kSmallSort ? kSmallDigitBits : kMaxDigitBits;
  const int passes = bits > 0 ? (bits + widest - 1) / widest : 1;  // the first one also fills the workspace
  const bool serial = s.shares == 1;
  // Every pass goes to the other half of the workspace; the last one ends in the first.
  uint64_t* halves[2] = {p.sorted, p.sorted + s.count};
  s.from = halves[passes % 2];
  s.to = halves[(passes + 1) % 2];
  for (int pass = 0; pass < passes; pass++) {
    const int low = bits * pass / passes, high = bits * (pass + 1) / passes;
    s.shift = s.position_bits + low;
    s.digit_bits = high - low;
    const int64_t digits = int64_t(1) << s.digit_bits;
    s.places = static_cast<uint64_t*>(scratch(1, size_t(digits * s.shares) * sizeof(uint64_t)));
    parallel_tasks(s.shares, serial, pass == 0 ? fill_task : count_task, &s);
    uint64_t before = 0;
    for (int64_t digit = 0; digit < digits; digit++)
      for (int share = 0; share < s.shares; share++) {
        uint64_t* place = places_of(s, share) + digit;
        const uint64_t here = *place;
        *place = before;
        before += here;
      }
    parallel_tasks(s.shares, serial, move_task, &s);
    uint64_t* moved = s.to;
    s.to = s.from;
    s.from = moved;
  }
  const auto slot_at = [&](int64_t i) { return p.sorted[i] >> s.position_bits; };
  int64_t entries = s.count, different = 0;
  while (entries > 0 && slot_at(entries - 1) >= uint64_t(p.slots)) entries--;
  const int64_t chunks = (s.count + kGatherChunk - 1) / kGatherChunk;
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    p.chunk_starts[chunk] = different;
    const int64_t begin = chunk * kGatherChunk, end = begin + kGatherChunk < entries ? begin + kGatherChunk : entries;
    if (begin == 0 && entries > 0) different = 1;
    for (int64_t i = begin == 0 ? 1 : begin; i < end; i++) different += slot_at(i) != slot_at(i - 1);
  }
  p.chunk_starts[chunks] = different;
  return different;
}

void weighted_gather_bwd(const WeightedGatherParams& p) {
  if (p.values_dtype == DType::kFloat64)
    backward<double>(p);
  else
    backward<float>(p);
}

}  // namespace attnfast::ATTNFAST_ISA
