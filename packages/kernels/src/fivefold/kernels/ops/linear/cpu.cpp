// A few rows times a large matrix: every weight is read once, in the order in which it lies, and
// memory sets the pace.
//
// Legend: M rows of the input, K its width, N width of the result.

#include "fivefold.h"

namespace {

using namespace fivefold;

// Rows of the input that share a reading of the weights; their sums fit into registers.
constexpr int kMostRows = 4;

// Products of one row of weights with kRows rows of the input, which lie `step` apart.
template <class T, int kRows>
FIVEFOLD_INLINE inline void products(const T* weight, const T* x, int64_t width, int64_t step,
                                     Compute<T>* sums) {
  using C = Compute<T>;
  Sum<C> parts[kRows];
  each_part<C>(width, [&](int64_t k, auto count, int part) FIVEFOLD_INLINE {
    const Pack<C> w = load(&weight[k], count);
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) parts[m].parts[part] += w * load(&x[m * step + k], count);
  });
  for (int m = 0; m < kRows; ++m) sums[m] = parts[m].total();
}

template <class T, int kRows>
void rows_of(const T* x, const T* weight, const T* bias, T* y, int64_t width, int64_t outputs,
             int64_t stride, int64_t num_threads) {
  using C = Compute<T>;
  const int64_t grain = (1 << 15) / std::max<int64_t>(width, 1) + 1;
  parallel_for(0, outputs, grain, num_threads, [&](int64_t from, int64_t to, int64_t) {
    for (int64_t n = from; n < to; ++n) {
      C sums[kRows];
      products<T, kRows>(&weight[n * stride], x, width, width, sums);
      for (int m = 0; m < kRows; ++m) {
        const C whole = bias == nullptr ? sums[m] : sums[m] + load_one(&bias[n]);
        store(&y[m * outputs + n], splat(whole), 1);
      }
    }
  });
}

}  // namespace

// x (M, K), bias (N) or null and y (M, N) without gaps, weight (N, K) with rows `stride` apart.
FIVEFOLD_API void linear_forward(const void* x, const void* weight, const void* bias, void* y,
                                 int64_t rows, int64_t width, int64_t outputs, int64_t stride,
                                 int64_t type, int64_t num_threads) {
  dispatch(type, [&](auto element) {
    using T = decltype(element);
    const T *xs = static_cast<const T*>(x), *ws = static_cast<const T*>(weight);
    const T* bs = static_cast<const T*>(bias);
    T* ys = static_cast<T*>(y);
    const auto run = [&](auto count, int64_t at) {
      rows_of<T, decltype(count)::value>(&xs[at * width], ws, bs, &ys[at * outputs], width, outputs,
                                         stride, num_threads);
    };
    int64_t at = 0;
    for (; at + kMostRows <= rows; at += kMostRows)
      run(std::integral_constant<int, kMostRows>(), at);
    switch (rows - at) {
      case 3: return run(std::integral_constant<int, 3>(), at);
      case 2: return run(std::integral_constant<int, 2>(), at);
      case 1: return run(std::integral_constant<int, 1>(), at);
    }
  });
}
