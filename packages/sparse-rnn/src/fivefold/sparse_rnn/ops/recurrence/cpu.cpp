// The loop over time of a recurrent layer with a sparse recurrent matrix.
//
// The matrix is packed once and its nonzeros stay in the caches of the cores that use them: every
// thread has its own hidden units for all steps, with all their gates, and threads meet once in a
// step. Backwards it is the same loop with the transposed matrix.

#include "cells.h"
#include "gang.h"
#include "product.h"

namespace {

using namespace sparse_rnn;
using fivefold::each_pack;
using fivefold::float16;
using fivefold::bfloat16;

// What all entry points know of a call; tensors are contiguous and in the dtype computed in.
struct Shape {
  int64_t steps, batch, hidden, gates;
  const int64_t* lengths;  // (batch), or null
  bool reverse;

  bool active(int64_t b, int64_t t) const { return lengths == nullptr || t < lengths[b]; }
  int64_t rows() const { return gates * hidden; }
};

// The vectors that threads exchange, one set for reading while the other is written, and sums.
template <class C>
struct Exchange {
  Vectors vectors;
  int64_t z_stride;
  Aligned<C> sets[2], z;

  Exchange(Kind kind, int64_t batch, int64_t length, int64_t num_sums)
      : vectors(kind, batch, length),
        z_stride((num_sums + kBlock - 1) / kBlock * kBlock + kBlock) {
    for (auto& set : sets) set.resize(vectors.size());
    z.resize(batch * z_stride);
  }
};

// Runs step(part, number, last_round) for all parts in each of `rounds` rounds, all threads meeting
// after every round.
template <class F>
void march(const Packed& packed, int64_t rounds, F step) {
  Barrier barrier;
  // A round takes about this long; a thread that is late may cost a tenth of the whole.
  const double microseconds = packed.source.size() * 3e-4 / packed.parts.size() + 2;
  const auto patience = static_cast<int64_t>(100 + rounds * microseconds / 10);
  const auto num_parts = static_cast<int64_t>(packed.parts.size());
  Gang::run(num_parts, patience, [&](int64_t member, int64_t members) {
    for (int64_t round = 0; round < rounds; ++round) {
      for (int64_t part = member; part < num_parts; part += members)
        step(packed.parts[part], round);
      if (members > 1 && round + 1 < rounds) barrier.meet(round + 1, members);
    }
  });
}

template <class C, Cell kCell>
void run_forward(const Packed& packed, Multiply<C> multiply, const Shape& shape, const C* gates,
                 const C* bias, C* h, C* c, C* y, C* saved) {
  const int64_t hidden = shape.hidden;
  Exchange<C> exchange(packed.kind, shape.batch, hidden, shape.rows());
  const Vectors& vectors = exchange.vectors;
  for (int64_t b = 0; b < shape.batch; ++b)
    for (int64_t u = 0; u < hidden; ++u) exchange.sets[0][vectors.at(b, u)] = h[b * hidden + u];

  march(packed, shape.steps, [&](const Part& part, int64_t round) {
    const int64_t t = shape.reverse ? shape.steps - 1 - round : round;
    C* z = exchange.z.data();
    C* next = exchange.sets[(round + 1) % 2].data();
    multiply(packed, part, vectors, exchange.sets[round % 2].data(), z, exchange.z_stride,
             round % 2 == 1);
    for (int64_t b = 0; b < shape.batch; ++b) {
      const int64_t at = t * shape.batch + b;
      const bool active = shape.active(b, t);
      Forward<C> step{gates + at * shape.rows(),
                      z + b * exchange.z_stride,
                      bias,
                      h + b * hidden,
                      c == nullptr ? nullptr : c + b * hidden,
                      y + at * hidden,
                      saved == nullptr ? nullptr : saved + at * num_saved(kCell) * hidden,
                      hidden};
      each_pack<C>(part.last_unit - part.first_unit, [&](int64_t i, auto count) FIVEFOLD_INLINE {
        const int64_t u = part.first_unit + i;
        if (active)
          return vectors.store<C>(next, b, u, forward<C, kCell>(step, u, count), count);
        store(step.y + u, Pack<C>{}, count);
        for (int64_t s = 0; saved != nullptr && s < num_saved(kCell); ++s)
          store(step.saved + s * hidden + u, Pack<C>{}, count);
        vectors.store<C>(next, b, u, load(step.h + u, count), count);
      });
    }
  });
}

template <class C, Cell kCell>
void run_backward(const Packed& packed, Multiply<C> multiply, const Shape& shape, const C* dy,
                  const C* y, const C* saved, const C* h_before, const C* c0, C* dh, C* dc,
                  C* dgates, C* drows) {
  const int64_t hidden = shape.hidden;
  Exchange<C> exchange(packed.kind, shape.batch, shape.rows(), hidden);
  const Vectors& vectors = exchange.vectors;

  // One round more than there are steps: the last brings back the gradient of h0.
  march(packed, shape.steps + 1, [&](const Part& part, int64_t round) {
    C* z = exchange.z.data();
    C* next = exchange.sets[(round + 1) % 2].data();
    if (round > 0)
      multiply(packed, part, vectors, exchange.sets[round % 2].data(), z, exchange.z_stride,
               round % 2 == 1);
    const int64_t units = part.last_unit - part.first_unit;
    for (int64_t b = 0; b < shape.batch; ++b) {
      const C* sums = z + b * exchange.z_stride;
      C* dhs = dh + b * hidden;
      const auto pass_on = [&](int64_t i, auto count) FIVEFOLD_INLINE {
        const int64_t u = part.first_unit + i;
        store(dhs + u, load(dhs + u, count) + load(sums + u, count), count);
      };
      if (round == shape.steps) {
        each_pack<C>(units, pass_on);
        continue;
      }
      const int64_t t = shape.reverse ? round : shape.steps - 1 - round;
      const int64_t at = t * shape.batch + b;
      C* dgate = dgates + at * shape.rows();
      C* drow = drows == nullptr ? nullptr : drows + at * hidden;
      if (!shape.active(b, t)) {
        each_pack<C>(units, [&](int64_t i, auto count) FIVEFOLD_INLINE {
          pass_on(i, count);
          const int64_t u = part.first_unit + i;
          for (int64_t g = 0; g < shape.gates; ++g) {
            store(dgate + g * hidden + u, Pack<C>{}, count);
            vectors.store<C>(next, b, g * hidden + u, Pack<C>{}, count);
          }
          if (drow != nullptr) store(drow + u, Pack<C>{}, count);
        });
        continue;
      }
      const int64_t last = shape.lengths == nullptr ? shape.steps - 1 : shape.lengths[b] - 1;
      const bool first = t == (shape.reverse ? last : 0);
      const int64_t before = at + (shape.reverse ? shape.batch : -shape.batch);
      const C* c_before = c0 + b * hidden;
      if (kCell == Cell::lstm && !first)
        c_before = saved + (before * num_saved(kCell) + 4) * hidden;
      const Backward<C> step{dy + at * hidden,
                             y + at * hidden,
                             saved + at * num_saved(kCell) * hidden,
                             h_before + at * hidden,
                             c_before,
                             sums,
                             dhs,
                             dc + b * hidden,
                             dgate,
                             drow,
                             hidden};
      each_pack<C>(units, [&](int64_t i, auto count) FIVEFOLD_INLINE {
        const int64_t u = part.first_unit + i;
        backward<C, kCell>(step, u, count, [&](int64_t g, Pack<C> x) FIVEFOLD_INLINE {
          vectors.store<C>(next, b, g * hidden + u, x, count);
        });
      });
    }
  });
}

// to (columns, stride): some columns of from (rows, width), turned round.
template <class C>
void transpose(const C* from, int64_t rows, int64_t width, int64_t first, int64_t last, C* to,
               int64_t stride) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = first; i < last; ++i) to[(i - first) * stride + row] = from[row * width + i];
}

// The gradient of each nonzero: the product of its row's and its column's values, summed over all
// steps and sequences. drows of a GRU's n are apart.
template <class C>
void sample_products(const C* dgates, const C* drows_n, const C* h, const int32_t* crow,
                     const int32_t* col, C* out, int64_t count, int64_t rows, int64_t hidden,
                     int64_t num_threads) {
  // As many steps and sequences at a time as leave all of h in a cache.
  constexpr int64_t kBytes = 1 << 19, kRowsTogether = 16;
  const int64_t fit = kBytes / (std::max<int64_t>(hidden, 1) * sizeof(C)) / 16 * 16;
  const int64_t chunk = std::max<int64_t>(16, std::min<int64_t>(fit, (count + 15) / 16 * 16));
  Aligned<C> turned;
  turned.resize(hidden * chunk);
  std::fill(out, out + crow[rows], C(0));
  const int64_t grain = std::max<int64_t>(16, rows / 64);
  for (int64_t first = 0; first < count; first += chunk) {
    const int64_t some = std::min(chunk, count - first);
    if (some < chunk) turned.resize(hidden * chunk);  // zeros after the last
    fivefold::parallel_for(0, hidden, 64, num_threads, [&](int64_t from, int64_t to, int64_t) {
      transpose(h + first * hidden, some, hidden, from, to, turned.data() + from * chunk, chunk);
    });
    fivefold::parallel_for(0, rows, grain, num_threads, [&](int64_t from, int64_t to, int64_t) {
      Aligned<C> mine;
      mine.resize(kRowsTogether * chunk);
      for (int64_t row = from; row < to; row += kRowsTogether) {
        const int64_t end = std::min(to, row + kRowsTogether);
        for (int64_t r = row; r < end; ++r) {
          const bool apart = drows_n != nullptr && r >= 2 * hidden;
          const C* source = apart ? drows_n + first * hidden : dgates + first * rows;
          const int64_t width = apart ? hidden : rows, at = apart ? r - 2 * hidden : r;
          transpose(source, some, width, at, at + 1, mine.data() + (r - row) * chunk, chunk);
        }
        for (int64_t r = row; r < end; ++r) {
          const C* a = mine.data() + (r - row) * chunk;
          for (int64_t i = crow[r]; i < crow[r + 1]; ++i) {
            const C* b = turned.data() + col[i] * chunk;
            Pack<C> sum = {};
            for (int64_t k = 0; k < chunk; k += kLanes<C>) sum += load(a + k) * load(b + k);
            out[i] += fivefold::add_lanes<C, kLanes<C>>(sum);
          }
        }
      }
    });
  }
}

Packed& packed_of(int64_t handle) { return *reinterpret_cast<Packed*>(handle); }

// f(kCell) with the cell known to the compiler.
template <class F>
void with_cell(int64_t cell, F f) {
  switch (static_cast<Cell>(cell)) {
    case Cell::rnn_tanh: return f(std::integral_constant<Cell, Cell::rnn_tanh>());
    case Cell::rnn_relu: return f(std::integral_constant<Cell, Cell::rnn_relu>());
    case Cell::lstm: return f(std::integral_constant<Cell, Cell::lstm>());
    case Cell::gru: return f(std::integral_constant<Cell, Cell::gru>());
  }
}

// f(C()) for what values of a type are computed in.
template <class F>
void with_compute(int64_t type, F f) {
  if (static_cast<fivefold::Type>(type) == fivefold::Type::f64) return f(double());
  f(float());
}

}  // namespace

// Whether tiles are compiled in: tiles (1).
FIVEFOLD_API void recurrence_features(void* tiles) {
#ifdef SPARSE_RNN_TILES
  *static_cast<int64_t*>(tiles) = 1;
#else
  *static_cast<int64_t*>(tiles) = 0;
#endif
}

// Packs a matrix (rows, cols) or its transpose; described (4): its handle, bytes, slots and lanes,
// or nothing where there is no memory. A transpose has one row for a unit, else there are `gates`;
// batch: sequences that it is for.
FIVEFOLD_API void recurrence_pack(const void* crow, const void* col, int64_t rows, int64_t cols,
                                  int64_t gates, int64_t transposed, int64_t type, int64_t kind,
                                  int64_t batch, int64_t num_parts, void* described) {
  int64_t* out = static_cast<int64_t*>(described);
  try {
    Rows matrix(static_cast<const int32_t*>(crow), static_cast<const int32_t*>(col), rows, cols);
    if (transposed) matrix = matrix.transposed();
    fivefold::dispatch(type, [&](auto element) {
      using T = decltype(element);
      auto* packed = new Packed(matrix, transposed ? 1 : gates, static_cast<Kind>(kind), batch,
                                kLanes<Compute<T>>, num_parts, sizeof(T));
      out[0] = reinterpret_cast<int64_t>(packed);
      out[1] = packed->bytes();
      out[2] = packed->num_slots;
      out[3] = packed->lanes;
    });
  } catch (const std::bad_alloc&) {
    out[0] = 0;
  }
}

FIVEFOLD_API void recurrence_free(int64_t handle) { delete &packed_of(handle); }

// Takes over values (num_values) where they changed since the last call.
FIVEFOLD_API void recurrence_refresh(int64_t handle, int64_t type, const void* values,
                                     int64_t num_threads) {
  fivefold::dispatch(type, [&](auto element) {
    using T = decltype(element);
    refresh(packed_of(handle), static_cast<const T*>(values), num_threads);
  });
}

// gates: (steps, batch, G*hidden), bias: (hidden) or null, h, c: (batch, hidden), replaced by the
// last state, y: (steps, batch, hidden), saved: (steps, batch, S*hidden) or null, all in what is
// computed in; type is that of the packed values.
FIVEFOLD_API void recurrence_forward(int64_t handle, int64_t type, int64_t cell, const void* gates,
                                     const void* bias, const void* lengths, void* h, void* c,
                                     void* y, void* saved, int64_t steps, int64_t batch,
                                     int64_t hidden, int64_t reverse) {
  with_cell(cell, [&](auto known) {
    constexpr Cell kCell = decltype(known)::value;
    with_compute(type, [&](auto computed) {
      using C = decltype(computed);
      const Shape shape{steps, batch, hidden, num_gates(kCell),
                        static_cast<const int64_t*>(lengths), reverse != 0};
      run_forward<C, kCell>(packed_of(handle), multiply_of<C>(type), shape,
                            static_cast<const C*>(gates),
                            static_cast<const C*>(bias), static_cast<C*>(h), static_cast<C*>(c),
                            static_cast<C*>(y), static_cast<C*>(saved));
    });
  });
}

// As above, with the transposed matrix. h_before: (steps, batch, hidden), c0: (batch, hidden) or
// null; dh, dc: gradients of the last state, replaced by those of the first; dgates: (steps, batch,
// G*hidden); drows: (steps, batch, hidden) for a GRU, else null.
FIVEFOLD_API void recurrence_backward(int64_t handle, int64_t type, int64_t cell, const void* dy,
                                      const void* y, const void* saved, const void* h_before,
                                      const void* c0, const void* lengths, void* dh, void* dc,
                                      void* dgates, void* drows, int64_t steps, int64_t batch,
                                      int64_t hidden, int64_t reverse) {
  with_cell(cell, [&](auto known) {
    constexpr Cell kCell = decltype(known)::value;
    with_compute(type, [&](auto computed) {
      using C = decltype(computed);
      const Shape shape{steps, batch, hidden, num_gates(kCell),
                        static_cast<const int64_t*>(lengths), reverse != 0};
      run_backward<C, kCell>(packed_of(handle), multiply_of<C>(type), shape,
                             static_cast<const C*>(dy),
                             static_cast<const C*>(y), static_cast<const C*>(saved),
                             static_cast<const C*>(h_before), static_cast<const C*>(c0),
                             static_cast<C*>(dh), static_cast<C*>(dc), static_cast<C*>(dgates),
                             static_cast<C*>(drows));
    });
  });
}

// out (num_values): gradients of the nonzeros, see sample_products.
FIVEFOLD_API void recurrence_values(int64_t type, const void* dgates, const void* drows_n,
                                    const void* h, const void* crow, const void* col, void* out,
                                    int64_t count, int64_t rows, int64_t hidden,
                                    int64_t num_threads) {
  with_compute(type, [&](auto computed) {
    using C = decltype(computed);
    sample_products<C>(static_cast<const C*>(dgates), static_cast<const C*>(drows_n),
                       static_cast<const C*>(h), static_cast<const int32_t*>(crow),
                       static_cast<const int32_t*>(col), static_cast<C*>(out), count, rows, hidden,
                       num_threads);
  });
}
