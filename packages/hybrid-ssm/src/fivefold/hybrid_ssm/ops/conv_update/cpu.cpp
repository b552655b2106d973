// One token of the causal convolution; the state moves on by one row.
//
// Legend: B batch, K channels, W taps.

#include "fivefold.h"

namespace {

using namespace fivefold;

template <class T>
void step(T* state, const T* x, const Compute<T>* weight, const Compute<T>* bias, bool silu, T* y,
          int64_t channels, int64_t kept) {
  using C = Compute<T>;
  each_pack<C>(channels, [&](int64_t i, auto count) FIVEFOLD_INLINE {
    const Pack<C> newest = load(x + i, count);
    Pack<C> sum = newest * load(weight + (kept * channels + i), count);
    if (bias != nullptr) sum += load(bias + i, count);
    for (int64_t tap = 0; tap < kept; ++tap)
      sum += load(state + (tap * channels + i), count) * load(weight + (tap * channels + i), count);
    for (int64_t tap = 0; tap < kept; ++tap) {
      const bool last = tap + 1 == kept;
      const T* next = last ? x + i : state + ((tap + 1) * channels + i);
      store(state + (tap * channels + i), load(next, count), count);
    }
    store(y + i, silu ? sum * sigmoid(sum) : sum, count);
  });
}

}  // namespace

// state: (B, W - 1, K), x: (B, K) with a stride of sequences, y: (B, K), weight: (W, K) and bias:
// (K) or null in the dtype that is computed in.
FIVEFOLD_API void conv_update_step(int64_t type, int64_t batch, int64_t channels, int64_t taps,
                                   void* state, const void* x, int64_t x_sequence,
                                   const void* weight, const void* bias, int64_t silu, void* y,
                                   int64_t num_threads) {
  dispatch(type, [&](auto element) {
    using T = decltype(element);
    const int64_t kept = taps - 1;
    const auto sequences = [&](int64_t from, int64_t to, int64_t) {
      for (int64_t i = from; i < to; ++i)
        step(static_cast<T*>(state) + i * kept * channels,
             static_cast<const T*>(x) + i * x_sequence, static_cast<const Compute<T>*>(weight),
             static_cast<const Compute<T>*>(bias), silu, static_cast<T*>(y) + i * channels,
             channels, kept);
    };
    const int64_t grain = (1 << 14) / std::max<int64_t>(channels * taps, 1) + 1;
    parallel_for(0, batch, grain, num_threads, sequences);
  });
}
