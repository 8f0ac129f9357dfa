// Times the pieces that a tile of the dot core is made of, each alone on operands that stay in cache, beside the peak
// of multiply-adds: where the cycles of a kernel go. Compiled once per ISA; run by tools/profile_kernels.py.
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/dot_tile.h"
#include "cpu/yardstick.h"

namespace attnfast::ATTNFAST_ISA {
namespace {

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// Seconds of one call: the median of rounds that last about a millisecond.
template <class F>
double seconds(F f) {
  f();
  double start = now();
  int calls = 1;
  for (;; calls *= 2) {
    start = now();
    for (int i = 0; i < calls; i++) f();
    if (now() - start > 1e-3) break;
  }
  std::vector<double> samples;
  for (int round = 0; round < 31; round++) {
    start = now();
    for (int i = 0; i < calls; i++) f();
    samples.push_back((now() - start) / calls);
  }
  std::nth_element(samples.begin(), samples.begin() + 15, samples.end());
  return samples[15];
}

struct Buffer {
  std::vector<float> data;
  explicit Buffer(int64_t size) : data(size_t(size) + 16) {
    for (float& x : data) x = float(rand()) / float(RAND_MAX) - 0.5f;
  }
  float* get() { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(data.data()) + 63) & ~uintptr_t(63)); }
};

void run(int64_t depth) {
  constexpr int W = kPanel<float>, T = kKeyTile;
  Buffer query(W * depth), packed(W * depth), key(T * depth), value(T * depth), P(T * W), out(W * depth), lse(W),
      row(W);
  Buffer grad(T * depth);
  std::vector<float> score(size_t(ScoreScratch<float>::size()) + 16), keep_data(T * W + 16);
  DotAttentionParams p;
  p.batch = p.heads = p.kv_heads = 1;
  p.query_tokens = p.key_tokens = 64;
  p.head_size = p.value_size = depth;
  p.scale = 0.125;
  p.dropout_p = 0.1;
  std::vector<unsigned char> mask(T * W);
  for (auto& x : mask) x = (unsigned char)(rand() & 1);
  HeadContext c = head_context(p, 0, 0);
  ScoreScratch<float> scratch(
      reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(score.data()) + 63) & ~uintptr_t(63)));
  ScoreTile<float> tile;
  prepare_tile<float>(c, 0, W, 0, T, scratch, tile);
  QueryPanel<float> panel{0, W, packed.get(), lse.get(), nullptr};
  Rows<float> keys{key.get(), depth}, values{value.get(), depth};

  double peak_start = now();
  double flops = yardstick_fma(4'000'000);
  double rate = flops / (now() - peak_start);  // floating-point operations a second
  double product = 2.0 * W * T * double(depth);
  auto line = [&](const char* name, double s, double work) {
    // A slot is the time of one vector multiply-add at the peak.
    double slots = s * rate / (2.0 * kLanes<float>);
    if (work > 0)
      std::printf("%s\t%d\t%s\t%.0f\t%.0f\t%.3f\n", ATTNFAST_ISA_NAME, int(depth), name, 1e9 * s, slots,
                  work / (s * rate));
    else
      std::printf("%s\t%d\t%s\t%.0f\t%.0f\t\n", ATTNFAST_ISA_NAME, int(depth), name, 1e9 * s, slots);
  };
  line("S^T = K Q^T",
       seconds([&] { raw_scores<float>(keys, depth, packed.get(), P.get(), T, W / kLanes<float>, nullptr); }), product);
  line("S^T = K Q^T with exp2", seconds([&] { probability_tile<float>(c, tile, keys, panel, P.get(), nullptr); }),
       product);
  line("O += P V",
       seconds([&] { accumulate_by_query<float>(c, tile, P.get(), values, depth, out.get(), depth, false, nullptr); }),
       product);
  line("dK += dS^T Q", seconds([&] {
         accumulate_by_key<float>(tile, P.get(), {query.get(), depth}, depth, grad.get(), depth, nullptr);
         if (grad.get()[0] > 1e30f)
           for (int i = 0; i < T * depth; i++) grad.get()[i] = 0;
       }),
       product);
  line("pack Q^T", seconds([&] { pack_transposed<float>({query.get(), depth}, W, depth, packed.get(), 0.5f); }), 0);
  line("boolean mask of a tile", seconds([&] {
         p.mask.data = mask.data();
         p.mask.dtype = DType::kBool;
         p.mask.stride[2] = T;
         p.mask.stride[3] = 1;
         prepare_tile<float>(c, 0, W, 0, T, scratch, tile);
       }),
       0);
  line("S^T with exp2 and the boolean mask",
       seconds([&] { probability_tile<float>(c, tile, keys, panel, P.get(), nullptr); }), product);
  p.mask.data = nullptr;
  line("bias of a tile", seconds([&] {
         p.bias[0].data = P.get();
         p.bias[0].stride[2] = T;
         p.bias[0].stride[3] = 1;
         prepare_tile<float>(c, 0, W, 0, T, scratch, tile);
       }),
       0);
  p.bias[0].data = nullptr;
  prepare_tile<float>(c, 0, W, 0, T, scratch, tile);
  line("dropout of a tile", seconds([&] { dropout_tile<float>(c, tile, keep_data.data()); }), 0);
}

}  // namespace
}  // namespace attnfast::ATTNFAST_ISA

int main() {
  for (int depth : {64, 128}) attnfast::ATTNFAST_ISA::run(depth);
  return 0;
}
