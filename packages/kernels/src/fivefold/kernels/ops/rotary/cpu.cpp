// rotary for the CPU: each value of x is read and written once.

#include <vector>

#include "fivefold.h"

using namespace fivefold;

namespace {

// Enough values for a thread to be worth waking.
constexpr int64_t kGrain = 32768;

// Lanes 2i and 2i + 1 change places.
inline Pack<float> swapped(Pack<float> x) {
  const PackBits<double> pairs = bit_cast<PackBits<double>>(x);
  return bit_cast<Pack<float>>((pairs << 32) | (pairs >> 32));
}

inline Pack<double> swapped(Pack<double> x) {
  Pack<double> y;
  for (int64_t i = 0; i < kLanes<double>; ++i) y[i] = x[i ^ 1];
  return y;
}

// A head whose pairs are values i and num_pairs + i.
template <class T>
void rotate_halves(const T* x, const Compute<T>* cos, const Compute<T>* sin, Compute<T> direction,
                   T* y, int64_t num_pairs) {
  using C = Compute<T>;
  each_pack<C>(num_pairs, [&](int64_t i, auto count) FIVEFOLD_INLINE {
    const Pack<C> a = load(x + i, count), b = load(x + num_pairs + i, count);
    const Pack<C> c = load(cos + i, count), s = load(sin + i, count) * direction;
    store(y + i, a * c - b * s, count);
    store(y + num_pairs + i, b * c + a * s, count);
  });
}

// A head whose pairs are neighbours. The angles are as spread_out leaves them.
template <class T>
void rotate_neighbours(const T* x, const Compute<T>* cos, const Compute<T>* sin, T* y,
                       int64_t num_pairs) {
  using C = Compute<T>;
  each_pack<C>(2 * num_pairs, [&](int64_t i, auto count) FIVEFOLD_INLINE {
    const Pack<C> both = load(x + i, count);
    store(y + i, both * load(cos + i, count) + swapped(both) * load(sin + i, count), count);
  });
}

// Each angle twice, and the sine that the first of a pair is given with the opposite sign.
template <class C>
void spread_out(const C* cos, const C* sin, C direction, C* cos_of_values, C* sin_of_values,
                int64_t num_pairs) {
  for (int64_t i = 0; i < num_pairs; ++i) {
    cos_of_values[2 * i] = cos_of_values[2 * i + 1] = cos[i];
    sin_of_values[2 * i] = -direction * sin[i];
    sin_of_values[2 * i + 1] = direction * sin[i];
  }
}

}  // namespace

// Strides are of sequences, tokens and, for x and y, heads; the last dim of each tensor is dense.
// cos and sin are of the computing type. direction is 1, or -1 to rotate back.
FIVEFOLD_API void rotary(const void* x, const void* cos, const void* sin, void* y,
                         int64_t num_sequences, int64_t num_tokens, int64_t num_heads,
                         int64_t head_dim, int64_t num_pairs, int64_t x_sequence, int64_t x_token,
                         int64_t x_head, int64_t cos_sequence, int64_t cos_token,
                         int64_t sin_sequence, int64_t sin_token, int64_t y_sequence,
                         int64_t y_token, int64_t y_head, int64_t interleaved, double direction,
                         int64_t type, int64_t num_threads) {
  dispatch(type, [&](auto element) {
    using T = decltype(element);
    using C = Compute<T>;
    const C sign = static_cast<C>(direction);
    const int64_t grain = kGrain / std::max<int64_t>(num_heads * head_dim, 1);
    const auto some_tokens = [&](int64_t from, int64_t to, int64_t) {
      std::vector<C> spread(interleaved ? 4 * num_pairs : 0);
      C* const cos_of_values = spread.data();
      C* const sin_of_values = cos_of_values + 2 * num_pairs;
      for (int64_t each = from; each < to; ++each) {
        const int64_t sequence = each / num_tokens, token = each % num_tokens;
        const C* c = static_cast<const C*>(cos) + sequence * cos_sequence + token * cos_token;
        const C* s = static_cast<const C*>(sin) + sequence * sin_sequence + token * sin_token;
        const T* in = static_cast<const T*>(x) + sequence * x_sequence + token * x_token;
        T* out = static_cast<T*>(y) + sequence * y_sequence + token * y_token;
        if (interleaved) spread_out(c, s, sign, cos_of_values, sin_of_values, num_pairs);
        for (int64_t head = 0; head < num_heads; ++head, in += x_head, out += y_head) {
          if (interleaved)
            rotate_neighbours(in, cos_of_values, sin_of_values, out, num_pairs);
          else
            rotate_halves(in, c, s, sign, out, num_pairs);
          std::copy(in + 2 * num_pairs, in + head_dim, out + 2 * num_pairs);
        }
      }
    };
    parallel_for(0, num_sequences * num_tokens, grain, num_threads, some_tokens);
  });
}
