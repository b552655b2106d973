// Mamba-2's scan, a chunk of tokens after the other. Within a chunk tokens meet in products of
// matrices, from chunk to chunk the state goes on, and nothing is kept that grows with the square
// of a chunk times the length. The heads of a group share the products of C and B.
//
// The logarithm of a decay from token j to token i is a sum of a few terms of one sign, made row by
// row: a difference of sums from the chunk's start would lose what is small.
//
// Legend: B batch, S tokens, Q tokens of a chunk, H heads, P values in a head, G groups, N values
// of state. Matrices in scratch are padded with zeros to whole packs.

#include "fivefold.h"
#include "tiles.h"

namespace {

using namespace fivefold;

// The gradient computes the states of so many chunks again at once, at least.
constexpr int64_t kSegment = 32;

struct Shape {
  int64_t batch, tokens, heads, head_dim, groups, state, chunk, block;

  int64_t heads_in_group() const { return heads / groups; }
  // Blocks of at most `block` heads of one group are what threads share.
  int64_t blocks() const { return (heads_in_group() + (block - 1)) / block; }
  int64_t tasks() const { return batch * groups * blocks(); }
  int64_t chunks() const { return (tokens + (chunk - 1)) / chunk; }
};

// Heads [first, first + count) of one group of one sequence.
struct Task {
  int64_t sequence, group, block, first, count;

  Task(const Shape& shape, int64_t index) {
    block = index % shape.blocks();
    group = index / shape.blocks() % shape.groups;
    sequence = index / shape.blocks() / shape.groups;
    const int64_t begin = block * shape.block;
    first = group * shape.heads_in_group() + begin;
    count = std::min(shape.block, shape.heads_in_group() - begin);
  }
};

// (B, S, values) in memory, the values side by side.
struct Tokens {
  const void* at;
  int64_t type, sequence, token;
};

template <class T, class C>
inline void widen_rows(const T* from, int64_t step, int64_t count, int64_t values, C* to,
                       int64_t row) {
  for (int64_t i = 0; i < count; ++i) {
    each_pack<C>(values, [&](int64_t j, auto lanes) FIVEFOLD_INLINE {
      store(&to[i * row + j], load(&from[i * step + j], lanes));
    });
  }
}

// `count` rows of values from `offset` on, then zeros up to whole packs of rows.
template <class C>
inline void load_rows(const Tokens& tokens, int64_t sequence, int64_t start, int64_t count,
                      int64_t offset, int64_t values, C* to) {
  const int64_t row = padded<C>(values);
  const int64_t first = sequence * tokens.sequence + start * tokens.token + offset;
  if constexpr (sizeof(C) == 8) {
    widen_rows(&static_cast<const C*>(tokens.at)[first], tokens.token, count, values, to, row);
  } else {
    dispatch(tokens.type, [&](auto element) {
      using T = decltype(element);
      if constexpr (sizeof(T) < 8)
        widen_rows(&static_cast<const T*>(tokens.at)[first], tokens.token, count, values, to, row);
    });
  }
  std::fill(to + count * row, to + padded<C>(count) * row, C(0));
}

// `count` rows without gaps between the tokens' values.
template <class C>
inline void store_rows(const C* from, int64_t count, int64_t values, void* to, int64_t type,
                       int64_t first, int64_t step) {
  const int64_t row = padded<C>(values);
  const auto write = [&](auto* at) {
    for (int64_t i = 0; i < count; ++i) {
      each_pack<C>(values, [&](int64_t j, auto lanes) FIVEFOLD_INLINE {
        store(&at[first + i * step + j], load(&from[i * row + j]), lanes);
      });
    }
  };
  if constexpr (sizeof(C) == 8) {
    write(static_cast<C*>(to));
  } else {
    dispatch(type, [&](auto element) {
      using T = decltype(element);
      if constexpr (sizeof(T) < 8) write(static_cast<T*>(to));
    });
  }
}

// Zeroed memory, given out piece by piece in whole packs.
template <class C>
class Scratch {
 public:
  explicit Scratch(int64_t values) : packs_(padded<C>(values) / kLanes<C>) {}
  C* take(int64_t values) {
    C* piece = reinterpret_cast<C*>(packs_.data()) + used_;
    used_ += padded<C>(values);
    return piece;
  }

 private:
  std::vector<Pack<C>> packs_;
  int64_t used_ = 0;
};

template <class C>
struct Inputs {
  Tokens x, b, c;
  const C *dt, *a, *d, *initial;  // (B, S, H), (H), (H) or null, (B, H, P, N) or null
  const int32_t* documents;       // (B, S) or null
};

// Step sizes and decays of one head in one chunk.
template <class C>
struct Decays {
  C* dt;        // (Q), then zeros
  C* logs;      // of each token's own decay
  C* from;      // (Q): what is left at a token of the state before the chunk
  C* to;        // (Q): what is left after the chunk of what a token put in
  C* since;     // (Q): a row of logarithms, token j to token i
  C across;     // what is left after the chunk of the state before it

  void take(Scratch<C>& scratch, int64_t chunk) {
    for (C** each : {&dt, &logs, &from, &to, &since}) *each = scratch.take(chunk);
  }

  void load(const Inputs<C>& in, const Shape& shape, int64_t sequence, int64_t start,
            int64_t count, int64_t head) {
    const int64_t first = sequence * shape.tokens + start;
    std::fill(dt, dt + padded<C>(count), C(0));
    std::fill(logs, logs + padded<C>(count), C(0));
    for (int64_t i = 0; i < count; ++i) {
      dt[i] = in.dt[(first + i) * shape.heads + head];
      logs[i] = dt[i] * in.a[head];
      // No token of the sequence before it, or one of another document.
      if (in.documents != nullptr && start + i > 0 &&
          in.documents[first + i] != in.documents[first + i - 1])
        logs[i] = -std::numeric_limits<C>::infinity();
    }
    C sum = 0;
    for (int64_t i = 0; i < padded<C>(count); ++i) from[i] = sum += logs[i];
    for (int64_t i = 0; i < padded<C>(count); i += kLanes<C>)
      store(&from[i], exp(fivefold::load(&from[i])));
    across = from[count - 1];
  }

  // f(i, j, decay) for the packs of rows [0, rows) on and below the diagonal: `decay` is what is
  // left at token i of what tokens j and those that follow put in, 0 for tokens after i.
  template <class F>
  FIVEFOLD_INLINE inline void each(int64_t rows, F f) {
    std::fill(since, since + rows, -std::numeric_limits<C>::infinity());
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j <= i; j += kLanes<C>)
        store(&since[j], fivefold::load(&since[j]) + logs[i]);
      since[i] = 0;
      for (int64_t j = 0; j <= i; j += kLanes<C>) f(i, j, exp(fivefold::load(&since[j])));
    }
    for (int64_t j = 0; j < rows; j += kLanes<C>) store(&to[j], exp(fivefold::load(&since[j])));
  }

  // `to` alone.
  void find_to(int64_t rows) {
    C sum = 0;
    for (int64_t i = rows - 1; i >= 0; --i) {
      since[i] = sum;
      sum += logs[i];
    }
    for (int64_t j = 0; j < rows; j += kLanes<C>) store(&to[j], exp(fivefold::load(&since[j])));
  }
};

// to[i] = scale(i) * from[i] for rows of whole packs.
template <class C, class F>
FIVEFOLD_INLINE inline void scale_rows(const C* from, int64_t rows, int64_t row, C* to, F scale) {
  for (int64_t i = 0; i < rows; ++i) {
    const C factor = scale(i);
    for (int64_t j = 0; j < row; j += kLanes<C>)
      store(&to[i * row + j], load(&from[i * row + j]) * factor);
  }
}

// What both passes do with a chunk of a task; the state of a head is (N, P) in here.
template <class C>
struct Walker {
  const Inputs<C>& in;
  const Shape& shape;
  const int64_t Q, P, N;  // padded
  Decays<C> decays;
  C *b, *bt, *c, *cb, *w, *x, *xw;
  int64_t start = 0, count = 0, rows = 0;

  Walker(const Inputs<C>& in, const Shape& shape, Scratch<C>& scratch)
      : in(in), shape(shape), Q(padded<C>(shape.chunk)), P(padded<C>(shape.head_dim)),
        N(padded<C>(shape.state)) {
    decays.take(scratch, Q);
    for (C** each : {&b, &bt, &c}) *each = scratch.take(Q * N);
    for (C** each : {&cb, &w}) *each = scratch.take(Q * Q);
    for (C** each : {&x, &xw}) *each = scratch.take(Q * P);
  }
  static int64_t size(const Shape& shape) {
    const int64_t Q = padded<C>(shape.chunk), P = padded<C>(shape.head_dim);
    return Q * (5 + 3 * padded<C>(shape.state) + 2 * Q + 2 * P);
  }

  int64_t state_size() const { return N * P; }

  void enter(const Task& task, int64_t chunk) {
    start = chunk * shape.chunk;
    count = std::min(shape.chunk, shape.tokens - start);
    rows = padded<C>(count);
    load_rows(in.b, task.sequence, start, count, task.group * shape.state, shape.state, b);
    transpose(b, N, rows, N, bt, Q);
  }

  void load_c(const Task& task) {
    load_rows(in.c, task.sequence, start, count, task.group * shape.state, shape.state, c);
    each_lower_tile<C>(rows, [&](int64_t i, int64_t j, auto tile) FIVEFOLD_INLINE {
      tile.add({&c[i * N], N, 1}, {&bt[j], Q}, 0, shape.state);
      tile.each([&](int r, int64_t k, Pack<C> sum) FIVEFOLD_INLINE {
        store(&cb[(i + r) * Q + (j + k)], sum);
      });
    });
  }

  void load_head(const Task& task, int64_t head) {
    load_rows(in.x, task.sequence, start, count, head * shape.head_dim, shape.head_dim, x);
    decays.load(in, shape, task.sequence, start, count, head);
  }

  // The state goes on to the end of the chunk; needs decays.to.
  void advance(C* state) {
    scale_rows(x, count, P, xw, [&](int64_t i) { return decays.to[i] * decays.dt[i]; });
    each_tile_of<C>(N, P, [&](int64_t n, int64_t p, auto tile) FIVEFOLD_INLINE {
      tile.add({&bt[n * Q], Q, 1}, {&xw[p], P}, 0, count);
      tile.each([&](int r, int64_t k, Pack<C> sum) FIVEFOLD_INLINE {
        C* at = &state[(n + r) * P + (p + k)];
        store(at, load(at) * decays.across + sum);
      });
    });
  }

  // (P, N) without gaps, of any head of any sequence, from and to (N, P).
  void read_state(const C* from, C* state) const {
    std::fill(state, state + state_size(), C(0));
    if (from == nullptr) return;
    for (int64_t p = 0; p < shape.head_dim; ++p)
      for (int64_t n = 0; n < shape.state; ++n) state[n * P + p] = from[p * shape.state + n];
  }
  void write_state(const C* state, C* to) const {
    for (int64_t p = 0; p < shape.head_dim; ++p)
      for (int64_t n = 0; n < shape.state; ++n) to[p * shape.state + n] = state[n * P + p];
  }
  // Where the state of a head is among those of all, null among none.
  template <class D>
  D* state_of(D* all, const Task& task, int64_t head) const {
    const int64_t index = task.sequence * shape.heads + head;
    return all == nullptr ? nullptr : &all[index * shape.head_dim * shape.state];
  }
};

template <class C>
struct Forward : Walker<C> {
  using Walker<C>::in, Walker<C>::shape, Walker<C>::Q, Walker<C>::P, Walker<C>::N;
  using Walker<C>::decays, Walker<C>::c, Walker<C>::cb, Walker<C>::w, Walker<C>::x;
  using Walker<C>::start, Walker<C>::count, Walker<C>::rows;
  void* y;
  int64_t y_type;
  C* final_state;
  C *result, *states;

  Forward(const Inputs<C>& in, const Shape& shape, Scratch<C>& scratch, void* y, int64_t y_type,
          C* final_state)
      : Walker<C>(in, shape, scratch), y(y), y_type(y_type), final_state(final_state) {
    result = scratch.take(Q * P);
    states = scratch.take(shape.block * N * P);
  }
  static int64_t size(const Shape& shape) {
    const int64_t P = padded<C>(shape.head_dim), N = padded<C>(shape.state);
    return Walker<C>::size(shape) + padded<C>(shape.chunk) * P + shape.block * N * P;
  }

  void run(const Task& task) {
    for (int64_t i = 0; i < task.count; ++i)
      this->read_state(this->state_of(in.initial, task, task.first + i), &states[i * N * P]);
    for (int64_t chunk = 0; chunk < shape.chunks(); ++chunk) {
      this->enter(task, chunk);
      this->load_c(task);
      for (int64_t i = 0; i < task.count; ++i) head(task, task.first + i, &states[i * N * P]);
    }
    for (int64_t i = 0; i < task.count; ++i)
      this->write_state(&states[i * N * P], this->state_of(final_state, task, task.first + i));
  }

  void head(const Task& task, int64_t head, C* state) {
    this->load_head(task, head);
    decays.each(rows, [&](int64_t i, int64_t j, Pack<C> decay) FIVEFOLD_INLINE {
      store(&w[i * Q + j], load(&cb[i * Q + j]) * decay * load(&decays.dt[j]));
    });
    const C skip = in.d == nullptr ? C(0) : in.d[head];
    each_tile_of<C>(rows, P, [&](int64_t i, int64_t p, auto tile) FIVEFOLD_INLINE {
      tile.add({&c[i * N], N, 1}, {&state[p], P}, 0, shape.state);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r)
        for (auto& sum : tile.sums[r]) sum *= decays.from[i + r];
      tile.add({&w[i * Q], Q, 1}, {&x[p], P}, 0, i + kTileRows);
      tile.each([&](int r, int64_t k, Pack<C> sum) FIVEFOLD_INLINE {
        const int64_t at = (i + r) * P + (p + k);
        store(&result[at], sum + load(&x[at]) * skip);
      });
    });
    const int64_t first = ((task.sequence * shape.tokens + start) * shape.heads + head);
    store_rows(result, count, shape.head_dim, y, y_type, first * shape.head_dim,
               shape.heads * shape.head_dim);
    this->advance(state);
  }
};

// Where gradients go; those of sums over sequences or blocks of heads are left in parts.
template <class C>
struct Gradients {
  void* dx;  // (B, S, H, P)
  int64_t dx_type;
  C *ddt, *da, *db, *dc, *dd;  // (B, S, H), (B, H), twice (blocks, B, S, G, N), (B, H)
  C* dinitial;                 // (B, H, P, N)
};

template <class C>
struct Backward : Walker<C> {
  using Walker<C>::in, Walker<C>::shape, Walker<C>::Q, Walker<C>::P, Walker<C>::N;
  using Walker<C>::decays, Walker<C>::b, Walker<C>::bt, Walker<C>::c, Walker<C>::cb;
  using Walker<C>::w, Walker<C>::x, Walker<C>::start, Walker<C>::count, Walker<C>::rows;
  const Tokens dy_tokens;
  const C* dfinal;
  const Gradients<C>& out;
  C *ct, *dct, *dbt;                        // (N, Q)
  C *decay, *dcb;                           // (Q, Q)
  C *dy, *dye, *du, *xt, *dyt;              // (Q, P), and the last two (P, Q)
  C *from_before, *to_after, *below, *dlog; // (Q)
  C *dstates, *kept, *inside;               // (block, N, P), and so many for segments and chunks
  int64_t segment;

  Backward(const Inputs<C>& in, const Shape& shape, Scratch<C>& scratch, const Tokens& dy_tokens,
           const C* dfinal, const Gradients<C>& out)
      : Walker<C>(in, shape, scratch), dy_tokens(dy_tokens), dfinal(dfinal), out(out),
        segment(segment_of(shape)) {
    for (C** each : {&ct, &dct, &dbt}) *each = scratch.take(N * Q);
    for (C** each : {&decay, &dcb}) *each = scratch.take(Q * Q);
    for (C** each : {&dy, &dye, &du, &xt, &dyt}) *each = scratch.take(Q * P);
    for (C** each : {&from_before, &to_after, &below, &dlog}) *each = scratch.take(Q);
    const int64_t states = shape.block * N * P;
    dstates = scratch.take(states);
    kept = scratch.take(segments(shape) * states);
    inside = scratch.take(segment * states);
  }
  static int64_t size(const Shape& shape) {
    const int64_t Q = padded<C>(shape.chunk), P = padded<C>(shape.head_dim);
    const int64_t N = padded<C>(shape.state);
    const int64_t states = shape.block * N * P * (1 + segments(shape) + segment_of(shape));
    return Walker<C>::size(shape) + Q * (3 * N + 2 * Q + 5 * P + 4) + states;
  }
  // Chunks of a segment: the states at the segments' starts and those of one segment's chunks are
  // what is kept at once.
  static int64_t segment_of(const Shape& shape) {
    const int64_t root = static_cast<int64_t>(std::sqrt(static_cast<double>(shape.chunks())));
    return std::max<int64_t>(1, std::min(shape.chunks(), std::max(kSegment, root)));
  }
  static int64_t segments(const Shape& shape) {
    const int64_t each = segment_of(shape);
    return (shape.chunks() + (each - 1)) / each;
  }
  int64_t states_size() const { return shape.block * N * P; }

  void run(const Task& task) {
    for (int64_t i = 0; i < task.count; ++i) {
      const int64_t head = task.first + i, sum = task.sequence * shape.heads + head;
      this->read_state(this->state_of(in.initial, task, head), &kept[i * N * P]);
      this->read_state(this->state_of(dfinal, task, head), &dstates[i * N * P]);
      out.da[sum] = out.dd[sum] = 0;
    }
    const int64_t num_segments = segments(shape);
    for (int64_t i = 1; i < num_segments; ++i) {
      C* states = &kept[i * states_size()];
      std::copy_n(states - states_size(), states_size(), states);
      for (int64_t chunk = (i - 1) * segment; chunk < i * segment; ++chunk)
        go_on(task, chunk, states);
    }
    for (int64_t i = num_segments - 1; i >= 0; --i) {
      const int64_t first = i * segment, end = std::min(shape.chunks(), first + segment);
      std::copy_n(&kept[i * states_size()], states_size(), inside);
      for (int64_t chunk = first + 1; chunk < end; ++chunk) {
        C* states = &inside[(chunk - first) * states_size()];
        std::copy_n(states - states_size(), states_size(), states);
        go_on(task, chunk - 1, states);
      }
      for (int64_t chunk = end - 1; chunk >= first; --chunk)
        go_back(task, chunk, &inside[(chunk - first) * states_size()]);
    }
    for (int64_t i = 0; i < task.count; ++i) {
      C* to = this->state_of(out.dinitial, task, task.first + i);
      if (to != nullptr) this->write_state(&dstates[i * N * P], to);
    }
  }

  // All heads' states from a chunk's start to its end.
  void go_on(const Task& task, int64_t chunk, C* states) {
    this->enter(task, chunk);
    for (int64_t i = 0; i < task.count; ++i) {
      this->load_head(task, task.first + i);
      decays.find_to(rows);
      this->advance(&states[i * N * P]);
    }
  }

  // All gradients of a chunk, given the states at its start and the states' gradients at its end.
  void go_back(const Task& task, int64_t chunk, const C* states) {
    this->enter(task, chunk);
    this->load_c(task);
    transpose(c, N, rows, N, ct, Q);
    for (C* each : {dct, dbt}) std::fill(each, each + N * Q, C(0));
    std::fill(dcb, dcb + Q * Q, C(0));
    for (int64_t i = 0; i < task.count; ++i)
      head(task, task.first + i, &states[i * N * P], &dstates[i * N * P]);

    // Of C and B, together what comes through the state and what comes through their products.
    const int64_t group = task.group, sequence = task.block * shape.batch + task.sequence;
    const int64_t first = (sequence * shape.tokens + start) * shape.groups + group;
    add_products({dcb, Q, 1}, b, dct, out.dc + first * shape.state,
                 [](int64_t i) { return std::make_pair(int64_t(0), i + kTileRows); });
    add_products({dcb, 1, Q}, c, dbt, out.db + first * shape.state,
                 [&](int64_t i) { return std::make_pair(i, count); });
  }

  // to = left right + through^T, where left has values in the columns of `span`.
  template <class F>
  void add_products(Left<C> left, const C* right, const C* through, C* to, F span) {
    each_tile_of<C>(rows, N, [&](int64_t i, int64_t n, auto tile) FIVEFOLD_INLINE {
      const auto [from, end] = span(i);
      tile.add({&left.at[i * left.row], left.row, left.col}, {&right[n], N}, from, end);
      tile.each([&](int r, int64_t k, Pack<C> sum) FIVEFOLD_INLINE {
        const int64_t token = i + r, value = n + k;
        for (int64_t lane = 0; lane < kLanes<C>; ++lane) sum[lane] += through[(value + lane) * Q + token];
        const int64_t left_over = std::min(kLanes<C>, shape.state - value);
        if (token < count && left_over > 0)
          store(&to[token * shape.groups * shape.state + value], sum, left_over);
      });
    });
  }

  void head(const Task& task, int64_t head, const C* state, C* dstate) {
    this->load_head(task, head);
    load_rows(dy_tokens, task.sequence, start, count, head * shape.head_dim, shape.head_dim, dy);
    transpose(x, P, rows, P, xt, Q);
    transpose(dy, P, rows, P, dyt, Q);
    decays.each(rows, [&](int64_t i, int64_t j, Pack<C> value) FIVEFOLD_INLINE {
      store(&decay[i * Q + j], value);
      store(&w[i * Q + j], load(&cb[i * Q + j]) * value);
    });
    scale_rows(dy, rows, P, dye, [&](int64_t i) { return decays.from[i]; });
    between_tokens();
    through_state(state, dct, dyt, ct, from_before, [&](int64_t i) FIVEFOLD_INLINE {
      return load(&decays.from[i]);
    });
    through_state(dstate, dbt, xt, bt, to_after, [&](int64_t i) FIVEFOLD_INLINE {
      return load(&decays.to[i]) * load(&decays.dt[i]);
    });
    of_inputs(dstate);
    const C past = products(state, dstate) * decays.across;
    of_logs(past);
    finish(task, head);
    each_tile_of<C>(N, P, [&](int64_t n, int64_t p, auto tile) FIVEFOLD_INLINE {
      tile.add({&ct[n * Q], Q, 1}, {&dye[p], P}, 0, count);
      tile.each([&](int r, int64_t k, Pack<C> sum) FIVEFOLD_INLINE {
        C* at = &dstate[(n + r) * P + (p + k)];
        store(at, load(at) * decays.across + sum);
      });
    });
  }

  // dcb, and in `decay` how much each pair of tokens adds to the loss: from it come the gradients
  // of the decays.
  void between_tokens() {
    each_lower_tile<C>(rows, [&](int64_t i, int64_t j, auto tile) FIVEFOLD_INLINE {
      tile.add({&dy[i * P], P, 1}, {&xt[j], Q}, 0, shape.head_dim);
      tile.each([&](int r, int64_t k, Pack<C> sum) FIVEFOLD_INLINE {
        const int64_t at = (i + r) * Q + (j + k);
        const Pack<C> weighed = sum * load(&decay[at]) * load(&decays.dt[j + k]);
        store(&dcb[at], load(&dcb[at]) + weighed);
        store(&decay[at], weighed * load(&cb[at]));
      });
    });
  }

  // sums[n, i] += scale(i) * state[n, :] rows[:, i], and `added`: how much of the loss each token
  // has through the state.
  template <class F>
  FIVEFOLD_INLINE inline void through_state(const C* state, C* sums, const C* right,
                                            const C* factor, C* added, F scale) {
    std::fill(added, added + rows, C(0));
    each_tile_of<C>(N, rows, [&](int64_t n, int64_t i, auto tile) FIVEFOLD_INLINE {
      tile.add({&state[n * P], P, 1}, {&right[i], Q}, 0, shape.head_dim);
      tile.each([&](int r, int64_t k, Pack<C> sum) FIVEFOLD_INLINE {
        const int64_t at = (n + r) * Q + (i + k);
        const Pack<C> scaled = sum * scale(i + k);
        store(&sums[at], load(&sums[at]) + scaled);
        store(&added[i + k], load(&added[i + k]) + scaled * load(&factor[at]));
      });
    });
  }

  // du, of what tokens put in: dt x.
  void of_inputs(const C* dstate) {
    each_tile_of<C>(rows, P, [&](int64_t j, int64_t p, auto tile) FIVEFOLD_INLINE {
      tile.add({&bt[j], 1, Q}, {&dstate[p], P}, 0, shape.state);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r)
        for (auto& sum : tile.sums[r]) sum *= decays.to[j + r];
      tile.add({&w[j], 1, Q}, {&dy[p], P}, j, count);
      tile.each([&](int r, int64_t k, Pack<C> sum) FIVEFOLD_INLINE {
        store(&du[(j + r) * P + (p + k)], sum);
      });
    });
  }

  C products(const C* state, const C* dstate) const {
    return Sum<C>().add(this->state_size(), [&](int64_t i, auto lanes) FIVEFOLD_INLINE {
      return load(&state[i], lanes) * load(&dstate[i], lanes);
    }).total();
  }

  // dlog: a token's decay is in all that goes from before it to it or after it.
  void of_logs(C past) {
    C later = 0, earlier = 0;
    for (int64_t t = 0; t < count; ++t) {
      dlog[t] = past + earlier;
      earlier += to_after[t];
    }
    std::fill(below, below + rows, C(0));
    for (int64_t t = count - 1; t >= 0; --t) {
      later += from_before[t];
      Pack<C> across = {};
      for (int64_t j = 0; j <= t; j += kLanes<C>) {
        const Pack<C> sum = load(&below[j]) + load(&decay[t * Q + j]);
        store(&below[j], sum);
        across += only(sum, std::min(kLanes<C>, t - j));
      }
      dlog[t] += later + add_lanes<C, kLanes<C>>(across);
    }
  }

  // Sums over a head's values, and what goes out for each token.
  void finish(const Task& task, int64_t head) {
    const int64_t sum = task.sequence * shape.heads + head;
    const C skip = in.d == nullptr ? C(0) : in.d[head];
    for (int64_t i = 0; i < count; ++i) {
      Pack<C> along = {}, skipped = {};
      for (int64_t j = i * P; j < (i + 1) * P; j += kLanes<C>) {
        along += load(&du[j]) * load(&x[j]);
        skipped += load(&dy[j]) * load(&x[j]);
        store(&du[j], load(&du[j]) * decays.dt[i] + load(&dy[j]) * skip);
      }
      const int64_t token = task.sequence * shape.tokens + start + i;
      out.ddt[token * shape.heads + head] = add_lanes<C, kLanes<C>>(along) + in.a[head] * dlog[i];
      out.da[sum] += dlog[i] * decays.dt[i];
      out.dd[sum] += add_lanes<C, kLanes<C>>(skipped);
    }
    const int64_t first = (task.sequence * shape.tokens + start) * shape.heads + head;
    store_rows(du, count, shape.head_dim, out.dx, out.dx_type, first * shape.head_dim,
               shape.heads * shape.head_dim);
  }
};

template <class C, class F>
void each_task(const Shape& shape, int64_t num_threads, int64_t scratch_size, F f) {
  parallel_for(0, shape.tasks(), 1, num_threads, [&](int64_t from, int64_t to, int64_t) {
    if (from == to) return;
    Scratch<C> scratch(scratch_size);
    f(from, to, scratch);
  });
}

template <class C>
Inputs<C> inputs_of(const void* x, const void* dt, const void* a, const void* b, const void* c,
                    const void* d, const void* initial, const void* documents,
                    const int64_t* types, const int64_t* strides) {
  const auto values = [](const void* at) { return static_cast<const C*>(at); };
  return {{x, types[0], strides[0], strides[1]},
          {b, types[1], strides[2], strides[3]},
          {c, types[2], strides[4], strides[5]},
          values(dt), values(a), values(d), values(initial),
          static_cast<const int32_t*>(documents)};
}

Shape shape_of(const int64_t* sizes) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7]};
}

template <class F>
void choose(int64_t is_double, F f) {
  if (is_double) return f(double());
  f(float());
}

}  // namespace

// sizes: as Shape; types and strides (sequence, token) of x, B, C and dy in turn; their values are
// side by side. dt, A, D, the states and the gradients but dx are of the dtype that is computed in,
// without gaps; D, initial, documents, dfinal and dinitial may be null.
FIVEFOLD_API void ssd_scan_forward(int64_t is_double, const int64_t* sizes, const int64_t* types,
                                   const int64_t* strides, const void* x, const void* dt,
                                   const void* a, const void* b, const void* c, const void* d,
                                   const void* initial, const void* documents, void* y,
                                   void* final_state, int64_t num_threads) {
  const Shape shape = shape_of(sizes);
  choose(is_double, [&](auto compute) {
    using C = decltype(compute);
    const Inputs<C> in = inputs_of<C>(x, dt, a, b, c, d, initial, documents, types, strides);
    each_task<C>(shape, num_threads, Forward<C>::size(shape), [&](int64_t from, int64_t to, auto& scratch) {
      Forward<C> forward(in, shape, scratch, y, types[0], static_cast<C*>(final_state));
      for (int64_t task = from; task < to; ++task) forward.run(Task(shape, task));
    });
  });
}

FIVEFOLD_API void ssd_scan_backward(int64_t is_double, const int64_t* sizes, const int64_t* types,
                                    const int64_t* strides, const void* dy, const void* dfinal,
                                    const void* x, const void* dt, const void* a, const void* b,
                                    const void* c, const void* d, const void* initial,
                                    const void* documents, void* dx, void* ddt, void* da, void* db,
                                    void* dc, void* dd, void* dinitial, int64_t num_threads) {
  const Shape shape = shape_of(sizes);
  choose(is_double, [&](auto compute) {
    using C = decltype(compute);
    const auto values = [](void* at) { return static_cast<C*>(at); };
    const Inputs<C> in = inputs_of<C>(x, dt, a, b, c, d, initial, documents, types, strides);
    const Gradients<C> out = {dx, types[0], values(ddt), values(da), values(db), values(dc),
                              values(dd), values(dinitial)};
    const Tokens dy_tokens = {dy, types[3], strides[6], strides[7]};
    each_task<C>(shape, num_threads, Backward<C>::size(shape), [&](int64_t from, int64_t to, auto& scratch) {
      Backward<C> backward(in, shape, scratch, dy_tokens, static_cast<const C*>(dfinal), out);
      for (int64_t task = from; task < to; ++task) backward.run(Task(shape, task));
    });
  });
}
