// One step of a cell for some units of one sequence, forwards and backwards.
//
// Gates are stacked as in torch: i, f, g, o; or r, z, n with the reset after the product.

#pragma once

#include "fivefold.h"

namespace sparse_rnn {

using fivefold::load;
using fivefold::Pack;
using fivefold::sigmoid;
using fivefold::splat;
using fivefold::store;

// As in cells.py.
enum class Cell : int64_t { rnn_tanh = 0, rnn_relu = 1, lstm = 2, gru = 3 };

constexpr int64_t num_gates(Cell cell) {
  return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1;
}
constexpr int64_t num_saved(Cell cell) {
  return cell == Cell::lstm ? 5 : cell == Cell::gru ? 4 : 0;
}

// Near 0 a polynomial of Cephes' tanhf, elsewhere by way of e to the 2x; 2 units in the last place.
inline Pack<float> tanh(Pack<float> x) {
  const Pack<float> size = fivefold::select<Pack<float>>(x < 0, -x, x), square = x * x;
  Pack<float> p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Pack<float> small = x + x * square * p;
  const Pack<float> rest = 1 - 2 / (fivefold::exp(2 * size) + 1);
  const Pack<float> large = fivefold::select<Pack<float>>(x < 0, -rest, rest);
  return fivefold::select<Pack<float>>(size < 0.625f, small, large);
}

inline Pack<double> tanh(Pack<double> x) {
  for (int64_t i = 0; i < fivefold::kLanes<double>; ++i) x[i] = std::tanh(x[i]);
  return x;
}

// What a step reads and writes of one sequence; pointers are at the sequence's first unit.
template <class C>
struct Forward {
  const C *gates, *sums, *bias;  // (G, H), (G, H), (H)
  C *h, *c;                      // (H), the state, which is replaced
  C *y, *saved;                  // (H), (S, H) or null
  int64_t hidden;
};

template <class C, Cell kCell, class Count>
FIVEFOLD_INLINE inline Pack<C> forward(const Forward<C>& s, int64_t u, Count count) {
  using P = Pack<C>;
  const auto gate = [&](int64_t g) FIVEFOLD_INLINE {
    return load(s.gates + g * s.hidden + u, count);
  };
  const auto sum = [&](int64_t g) FIVEFOLD_INLINE {
    return load(s.sums + g * s.hidden + u, count);
  };
  const auto keep = [&](int64_t i, P x) FIVEFOLD_INLINE {
    if (s.saved != nullptr) store(s.saved + i * s.hidden + u, x, count);
  };
  P h;
  if constexpr (kCell == Cell::lstm) {
    const P i = sigmoid(gate(0) + sum(0)), f = sigmoid(gate(1) + sum(1));
    const P g = tanh(gate(2) + sum(2)), o = sigmoid(gate(3) + sum(3));
    const P c = f * load(s.c + u, count) + i * g;
    keep(0, i), keep(1, f), keep(2, g), keep(3, o), keep(4, c);
    store(s.c + u, c, count);
    h = o * tanh(c);
  } else if constexpr (kCell == Cell::gru) {
    P inner = sum(2);
    if (s.bias != nullptr) inner += load(s.bias + u, count);
    const P r = sigmoid(gate(0) + sum(0)), z = sigmoid(gate(1) + sum(1));
    const P n = tanh(gate(2) + r * inner);
    keep(0, r), keep(1, z), keep(2, n), keep(3, inner);
    h = n + z * (load(s.h + u, count) - n);
  } else {
    const P x = gate(0) + sum(0);
    h = kCell == Cell::rnn_tanh ? tanh(x) : fivefold::select<P>(x < 0, P{}, x);
  }
  store(s.h + u, h, count);
  store(s.y + u, h, count);
  return h;
}

template <class C>
struct Backward {
  const C *dy, *y, *saved;   // (H), (H), (S, H)
  const C *h_before, *c_before;  // (H)
  const C* sums;             // (H), what came back through the product
  C *dh, *dc;                // (H), gradients of the state, which are replaced
  C *dgates, *drows;         // (G, H); drows (H) is that of the product's n of a GRU, else null
  int64_t hidden;
};

// put(g, x): x is the gradient of row g of the product.
template <class C, Cell kCell, class Count, class F>
FIVEFOLD_INLINE inline void backward(const Backward<C>& s, int64_t u, Count count, F put) {
  using P = Pack<C>;
  const auto saved = [&](int64_t i) FIVEFOLD_INLINE {
    return load(s.saved + i * s.hidden + u, count);
  };
  const auto give = [&](int64_t g, P x) FIVEFOLD_INLINE {
    store(s.dgates + g * s.hidden + u, x, count);
  };
  const P dh = load(s.dh + u, count) + load(s.sums + u, count) + load(s.dy + u, count);
  P through = {};
  if constexpr (kCell == Cell::lstm) {
    const P i = saved(0), f = saved(1), g = saved(2), o = saved(3), t = tanh(saved(4));
    const P dc = load(s.dc + u, count) + dh * o * (1 - t * t);
    const P di = dc * g * i * (1 - i), df = dc * load(s.c_before + u, count) * f * (1 - f);
    const P dg = dc * i * (1 - g * g), d_o = dh * t * o * (1 - o);
    give(0, di), give(1, df), give(2, dg), give(3, d_o);
    put(0, di), put(1, df), put(2, dg), put(3, d_o);
    store(s.dc + u, dc * f, count);
  } else if constexpr (kCell == Cell::gru) {
    const P r = saved(0), z = saved(1), n = saved(2);
    const P dn = dh * (1 - z) * (1 - n * n), dinner = dn * r;
    const P dz = dh * (load(s.h_before + u, count) - n) * z * (1 - z);
    const P dr = dn * saved(3) * r * (1 - r);
    give(0, dr), give(1, dz), give(2, dn);
    put(0, dr), put(1, dz), put(2, dinner);
    store(s.drows + u, dinner, count);
    through = dh * z;
  } else {
    const P y = load(s.y + u, count);
    const P dx = kCell == Cell::rnn_tanh ? dh * (1 - y * y)
                                         : fivefold::select<P>(y > 0, dh, P{});
    give(0, dx);
    put(0, dx);
  }
  store(s.dh + u, through, count);
}

}  // namespace sparse_rnn
