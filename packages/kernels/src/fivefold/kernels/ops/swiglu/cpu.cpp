// swiglu for the CPU: each value is read and written once.

#include "fivefold.h"

using namespace fivefold;

namespace {

// Enough values for a thread to be worth waking.
constexpr int64_t kGrain = 16384;

int64_t rows_of_a_grain(int64_t width) { return kGrain / std::max<int64_t>(width, 1); }

// The logistic function within 2 units in the last place; 0 where e to the -x is beyond float.
// Two thirds of sigmoid's time: where the result is 0 or 1, 2^n needs not be subnormal.
inline Pack<float> logistic(Pack<float> x) {
  const Pack<float> low = splat(-87.0f), high = splat(89.0f);
  Pack<float> y = -x;
  y = select<Pack<float>>(y < low, low, y);
  y = select<Pack<float>>(y > high, high, y);
  // y = n ln 2 + r; n ends up in the lowest bits of what it is rounded by.
  const float round = 0x1.8p23f;
  const Pack<float> shifted = y * 0x1.715476p+0f + round;
  const Pack<float> n = shifted - round;
  const Pack<float> r = (y - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  Pack<float> p = r * 0x1.a01a02p-13f + 0x1.6c16c2p-10f;
  p = p * r + 0x1.111112p-7f;
  p = p * r + 0x1.555556p-5f;
  p = p * r + 0x1.555556p-3f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const PackBits<float> exponent = bit_cast<PackBits<float>>(shifted) + 127u;
  return 1 / (1 + p * bit_cast<Pack<float>>(exponent << 23));
}

inline Pack<double> logistic(Pack<double> x) { return sigmoid(x); }

template <class T>
void forward(const T* gate, const T* up, const Compute<T>* scale, T* y, int64_t width) {
  using C = Compute<T>;
  const C factor = scale == nullptr ? 1 : *scale;
  each_pack<C>(width, [&](int64_t i, auto count) FIVEFOLD_INLINE {
    const Pack<C> z = load(gate + i, count);
    store(y + i, z * logistic(z) * load(up + i, count) * factor, count);
  });
}

// Returns the gradient of the scale.
template <class T>
Compute<T> backward(const T* dy, const T* gate, const T* up, const Compute<T>* scale, T* dgate,
                    T* dup, int64_t width) {
  using C = Compute<T>;
  const C factor = scale == nullptr ? 1 : *scale;
  return Sum<C>().add(width, [&](int64_t i, auto count) FIVEFOLD_INLINE {
    const Pack<C> d = load(dy + i, count), z = load(gate + i, count), u = load(up + i, count);
    const Pack<C> open = logistic(z);
    const Pack<C> silu = z * open;
    const Pack<C> scaled = d * factor;
    store(dgate + i, scaled * u * open * (1 + z * (1 - open)), count);
    store(dup + i, scaled * silu, count);
    return d * silu * u;
  }).total();
}

}  // namespace

// Rows of gate and up lie at any distance; scale, one value of the computing type a row, may be null.
FIVEFOLD_API void swiglu_forward(const void* gate, const void* up, const void* scale, void* y,
                                 int64_t num_rows, int64_t width, int64_t gate_stride,
                                 int64_t up_stride, int64_t type, int64_t num_threads) {
  dispatch(type, [&](auto element) {
    using T = decltype(element);
    const auto* scales = static_cast<const Compute<T>*>(scale);
    parallel_for(0, num_rows, rows_of_a_grain(width), num_threads, [&](int64_t from, int64_t to,
                                                                       int64_t) {
      for (int64_t row = from; row < to; ++row)
        forward(static_cast<const T*>(gate) + row * gate_stride,
                static_cast<const T*>(up) + row * up_stride,
                scales == nullptr ? nullptr : scales + row, static_cast<T*>(y) + row * width,
                width);
    });
  });
}

// As above; rows of dgate and dup lie at the same distance, and dscale is null where scale is.
FIVEFOLD_API void swiglu_backward(const void* dy, const void* gate, const void* up,
                                  const void* scale, void* dgate, void* dup, void* dscale,
                                  int64_t num_rows, int64_t width, int64_t dy_stride,
                                  int64_t gate_stride, int64_t up_stride, int64_t out_stride,
                                  int64_t type, int64_t num_threads) {
  dispatch(type, [&](auto element) {
    using T = decltype(element);
    const auto* scales = static_cast<const Compute<T>*>(scale);
    auto* sums = static_cast<Compute<T>*>(dscale);
    parallel_for(0, num_rows, rows_of_a_grain(width), num_threads, [&](int64_t from, int64_t to,
                                                                       int64_t) {
      for (int64_t row = from; row < to; ++row) {
        const Compute<T> sum = backward(
            static_cast<const T*>(dy) + row * dy_stride,
            static_cast<const T*>(gate) + row * gate_stride,
            static_cast<const T*>(up) + row * up_stride,
            scales == nullptr ? nullptr : scales + row, static_cast<T*>(dgate) + row * out_stride,
            static_cast<T*>(dup) + row * out_stride, width);
        if (sums != nullptr) sums[row] = sum;
      }
    });
  });
}
