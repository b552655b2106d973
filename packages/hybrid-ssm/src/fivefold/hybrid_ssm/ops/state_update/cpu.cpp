// One token of Mamba-2's scan: each value of the state is read and written once.
//
// Legend: B batch, H heads, P values in a head, G groups, N values of state.

#include "fivefold.h"

namespace {

using namespace fivefold;

struct Shape {
  int64_t batch, heads, head_dim, groups, state;
};

// With bias, softplus, which is the identity above 20 as in torch, and limits.
template <class C>
C step_size(C dt, bool softplus, double least, double most) {
  if (softplus && dt <= 20) dt = std::log1p(std::exp(dt));
  // NaN passes through both, as in torch.
  if (dt < static_cast<C>(least)) dt = static_cast<C>(least);
  if (dt > static_cast<C>(most)) dt = static_cast<C>(most);
  return dt;
}

// A head: state (P, N); returns nothing in y but sums over N.
template <class T>
void head(T* state, const Compute<T>* x, const Compute<T>* b, const Compute<T>* c,
          Compute<T>* y, const Shape& shape, Compute<T> dt, Compute<T> decay) {
  using C = Compute<T>;
  for (int64_t p = 0; p < shape.head_dim; ++p) {
    T* row = state + p * shape.state;
    const C input = dt * x[p];
    y[p] = Sum<C>().add(shape.state, [&](int64_t i, auto count) FIVEFOLD_INLINE {
      const Pack<C> next = load(row + i, count) * decay + load(b + i, count) * input;
      store(row + i, next, count);
      return next * load(c + i, count);
    }).total();
  }
}

}  // namespace

// state: (B, H, P, N) of the type; all else is of the dtype that is computed in and without gaps:
// x, z, y: (B, H, P), dt: (B, H), A, D, bias: (H), B, C: (B, G, N); D, z and bias may be null.
FIVEFOLD_API void state_update_step(int64_t type, int64_t batch, int64_t heads, int64_t head_dim,
                                    int64_t groups, int64_t state_size, void* state, const void* x,
                                    const void* dt, const void* a, const void* b, const void* c,
                                    const void* d, const void* z, const void* bias,
                                    int64_t softplus, double least, double most, void* y,
                                    int64_t num_threads) {
  const Shape shape = {batch, heads, head_dim, groups, state_size};
  dispatch(type, [&](auto element) {
    using T = decltype(element);
    using C = Compute<T>;
    const auto values = [](const void* at) { return static_cast<const C*>(at); };
    const auto run = [&](int64_t from, int64_t to, int64_t) {
      for (int64_t i = from; i < to; ++i) {
        const int64_t h = i % heads, group = i / heads * groups + h / (heads / groups);
        const C raw = bias == nullptr ? values(dt)[i] : values(dt)[i] + values(bias)[h];
        const C size = step_size(raw, softplus, least, most);
        C* ys = static_cast<C*>(y) + i * head_dim;
        const C* xs = values(x) + i * head_dim;
        head(static_cast<T*>(state) + i * head_dim * state_size, xs,
             values(b) + group * state_size, values(c) + group * state_size, ys, shape, size,
             std::exp(size * values(a)[h]));
        each_pack<C>(head_dim, [&](int64_t p, auto count) FIVEFOLD_INLINE {
          Pack<C> result = load(ys + p, count);
          if (d != nullptr) result += load(xs + p, count) * values(d)[h];
          if (z != nullptr) {
            const Pack<C> gate = load(values(z) + (i * head_dim + p), count);
            result *= gate * sigmoid(gate);
          }
          store(ys + p, result, count);
        });
      }
    };
    const int64_t grain = (1 << 15) / std::max<int64_t>(head_dim * state_size, 1) + 1;
    parallel_for(0, batch * heads, grain, num_threads, run);
  });
}
