// Times the pieces that tiles of the dot core and of the additive core are made of, each alone on operands that stay in
// cache, beside the peak of multiply-adds: where the cycles of a kernel go. Compiled once per ISA; run by
// tools/profile_kernels.py.
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/additive_tile.h"
#include "cpu/dot_tile.h"
#include "cpu/yardstick.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

#define ATTNFAST_TEXT(x) #x
#define ATTNFAST_NAME(x) ATTNFAST_TEXT(x)
const char* const kName = ATTNFAST_NAME(ATTNFAST_ISA);

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// The medians over rounds that take one sample of either in turn: seconds of a call of f, and f's time over g's.
struct Timing {
  double seconds, ratio;
};
template <class F, class G>
Timing interleave(F f, G g) {
  constexpr int kRounds = 41;
  std::vector<double> times, ratios;
  int calls = 1;
  for (double spent = 0; spent < 1e-3; calls *= 2) {
    double start = now();
    for (int i = 0; i < calls; i++) f();
    spent = now() - start;
  }
  g();
  for (int round = 0; round < kRounds; round++) {
    double start = now();
    for (int i = 0; i < calls; i++) f();
    double middle = now();
    g();
    times.push_back((middle - start) / calls);
    ratios.push_back(times.back() / (now() - middle));
  }
  std::nth_element(times.begin(), times.begin() + kRounds / 2, times.end());
  std::nth_element(ratios.begin(), ratios.begin() + kRounds / 2, ratios.end());
  return {times[kRounds / 2], ratios[kRounds / 2]};
}

struct Buffer {
  std::vector<float> data;
  explicit Buffer(int64_t size) : data(size_t(size) + 16) {
    for (float& x : data) x = float(rand()) / float(RAND_MAX) - 0.5f;
  }
  float* get() { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(data.data()) + 63) & ~uintptr_t(63)); }
};

// Name, depth, nanoseconds, slots (a slot is the time of one vector multiply-add at the peak), share of the peak.
template <class F>
void line(const char* name, int64_t depth, double work, F piece) {
  double flops = 0;
  Timing t = interleave(piece, [&] { flops = yardstick_fma(200'000); });
  std::printf("%s\t%d\t%s\t%.0f\t%.0f\t", kName, int(depth), name, 1e9 * t.seconds,
              t.ratio * flops / (2.0 * kLanes<float>));
  if (work > 0) std::printf("%.3f", work / (t.ratio * flops));
  std::printf("\n");
}

// Tokens and their exponentials in both layouts, the scores, and one query alone.
void run_additive(int64_t depth) {
  constexpr int W = kPanel<float>, T = kKeyTile;
  Buffer query(W * depth), key(T * depth), weight(depth), P(T * W), base(AdditivePanel<float>::floats(depth));
  AdditiveAttentionParams p;
  p.batch = p.heads = p.kv_heads = 1;
  p.query_tokens = p.key_tokens = T;
  p.head_size = p.value_size = depth;
  p.query = {query.get(), {0, 0, depth, 1}, DType::kFloat32};
  p.key = {key.get(), {0, 0, depth, 1}, DType::kFloat32};
  p.weight = weight.get();
  for (int64_t i = 0; i < T * depth; i++) key.get()[i] *= 4.0f;  // beyond the polynomial near zero
  HeadContext c = head_context(p, 0, 0);
  AdditivePanel<float> panel(base.get(), depth);
  panel.load_head(c);
  panel.load_queries(c, 0, W);
  panel.load_keys(c, 0, T);
  ScoreTile<float> tile{};
  tile.nq = W;
  tile.nk = T;
  panel.scores(tile, P.get());
  line("additive: read 64 keys", depth, 0, [&] { panel.load_keys(c, 0, T); });
  line("additive: e^2x, keys", depth, 0, [&] {
    panel.keys.form = -1;
    shape_rows<float>(panel.keys, depth, true, false, true);
  });
  line("additive: e^2x, queries", depth, 0, [&] {
    panel.queries.form = -1;
    shape_rows<float>(panel.queries, depth, true, true, false);
  });
  line("additive: scores", depth, 0, [&] { panel.scores(tile, P.get()); });
  line("additive: scores of one query", depth, 0, [&] {
    single_query_scores<false, 0, float>(static_cast<const float*>(key.get()), depth, T, static_cast<float*>(nullptr),
                                         query.get(), weight.get(), Extent<float>(depth), static_cast<float*>(nullptr),
                                         0, P.get(), Soon<0>{});
  });
}

void run(int64_t depth) {
  constexpr int W = kPanel<float>, T = kKeyTile;
  Buffer query(W * depth), packed(W * depth), key(T * depth), value(T * depth), P(T * W), S(T * W), out(W * depth);
  Buffer lse(W), grad(T * depth), score(ScoreScratch<float>::size()), keep(T * W);
  std::vector<unsigned char> mask(T * W);
  for (unsigned char& x : mask) x = (unsigned char)(rand() & 1);
  DotAttentionParams p;
  p.batch = p.heads = p.kv_heads = 1;
  p.query_tokens = p.key_tokens = T;
  p.head_size = p.value_size = depth;
  p.scale = 0.125;
  p.dropout_p = 0.1;
  HeadContext c = head_context(p, 0, 0);
  ScoreScratch<float> scratch(score.get());
  ScoreTile<float> tile;
  auto prepare = [&] { prepare_tile<float>(c, 0, W, 0, T, scratch, tile); };
  prepare();
  QueryPanel<float, float> panel{0, W, packed.get(), lse.get(), nullptr};
  Rows<float> keys{key.get(), depth}, values{value.get(), depth};

  const double product = 2.0 * W * T * double(depth);
  auto line = [&](const char* name, double work, auto piece) { ATTNFAST_ISA::line(name, depth, work, piece); };
  line("scores", product,
       [&] { raw_scores<float, float>(keys, depth, packed.get(), S.get(), T, W / kLanes<float>, nullptr); });
  line("scores, exp2", product, [&] { probability_tile<float, float>(c, tile, keys, panel, P.get(), nullptr); });
  // P and dS are small numbers here, so that sums over a million calls stay finite.
  for (int i = 0; i < T * W; i++) P.get()[i] *= 1e-9f;
  line("P V", product,
       [&] { accumulate_by_query<float>(c, tile, P.get(), values, depth, out.get(), depth, false, nullptr); });
  line("dS^T Q", product,
       [&] { accumulate_by_key<float>(tile, P.get(), {query.get(), depth}, depth, grad.get(), depth, nullptr); });
  line("pack a panel", 0, [&] { pack_transposed<float>({query.get(), depth}, W, depth, packed.get(), 0.5f); });
  line("dropout", 0, [&] { dropout_tile<float>(c, tile, keep.get()); });
  p.alibi_slopes = lse.get();
  line("ALiBi", 0, prepare);
  p.alibi_slopes = nullptr;
  p.bias[0] = {S.get(), {0, 0, T, 1}, DType::kFloat32};
  line("bias", 0, prepare);
  p.bias[0].data = nullptr;
  p.mask = {mask.data(), {0, 0, T, 1}, DType::kBool};
  line("boolean mask", 0, prepare);
  line("scores, exp2, boolean mask", product,
       [&] { probability_tile<float, float>(c, tile, keys, panel, P.get(), nullptr); });
}

}  // namespace
}  // namespace attnfast::ATTNFAST_ISA

int main() {
  for (int depth : {64, 128}) attnfast::ATTNFAST_ISA::run(depth);
  attnfast::ATTNFAST_ISA::run_additive(256);
  return 0;
}
