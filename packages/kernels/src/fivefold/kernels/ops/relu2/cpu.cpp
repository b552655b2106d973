// relu2 for the CPU: each value is read and written once.

#include "fivefold.h"

using namespace fivefold;

namespace {

// What is done at once, and how many of these make a thread worth waking.
constexpr int64_t kBlock = 2048, kGrain = 16;

// NaN stays NaN.
template <class P>
P relu(P x) {
  return select<P>(x <= 0, P{}, x);
}

// f(first, count) for the blocks of n values, on threads.
template <class F>
void each_block(int64_t n, int64_t num_threads, F f) {
  const int64_t num_blocks = n / kBlock + (n % kBlock != 0);
  parallel_for(0, num_blocks, kGrain, num_threads, [&](int64_t from, int64_t to, int64_t) {
    for (int64_t first = from * kBlock; first < std::min(to * kBlock, n); first += kBlock)
      f(first, std::min(kBlock, n - first));
  });
}

}  // namespace

FIVEFOLD_API void relu2_forward(const void* x, void* y, int64_t num_values, int64_t type,
                                int64_t num_threads) {
  dispatch(type, [&](auto element) {
    using T = decltype(element);
    using C = Compute<T>;
    each_block(num_values, num_threads, [&](int64_t first, int64_t count) {
      const T* in = static_cast<const T*>(x) + first;
      T* out = static_cast<T*>(y) + first;
      each_pack<C>(count, [&](int64_t i, auto lanes) FIVEFOLD_INLINE {
        const Pack<C> positive = relu(load(in + i, lanes));
        store(out + i, positive * positive, lanes);
      });
    });
  });
}

FIVEFOLD_API void relu2_backward(const void* dy, const void* x, void* dx, int64_t num_values,
                                 int64_t type, int64_t num_threads) {
  dispatch(type, [&](auto element) {
    using T = decltype(element);
    using C = Compute<T>;
    each_block(num_values, num_threads, [&](int64_t first, int64_t count) {
      const T* weights = static_cast<const T*>(dy) + first;
      const T* in = static_cast<const T*>(x) + first;
      T* out = static_cast<T*>(dx) + first;
      each_pack<C>(count, [&](int64_t i, auto lanes) FIVEFOLD_INLINE {
        store(out + i, 2 * relu(load(in + i, lanes)) * load(weights + i, lanes), lanes);
      });
    });
  });
}
