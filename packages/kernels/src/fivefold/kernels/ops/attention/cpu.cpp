// Attention with a bias that rows share, a block of queries against all their keys at a time.
//
// Operands of one row and head are copied next to each other, padded to whole packs, and transposed
// where a product needs it; scores exist for one block only, so memory is linear in the length.

#include <limits>

#include "fivefold.h"

namespace {

using namespace fivefold;

// Queries whose scores exist at once.
constexpr int64_t kBlock = 64;

// A tile of a product in registers: rows, and packs of a row.
#ifdef __AVX512F__
constexpr int kTall = 8, kWide = 2;
#else
constexpr int kTall = 4, kWide = 1;
#endif

// Multiplications that a thread should at least have.
constexpr int64_t kGrain = 1 << 18;

// What may be multiplied by b (inner, packs): values at a[row * a_row + step * a_step].
template <class C>
struct Factor {
  const C* a;
  int64_t a_row, a_step;
};

template <int kRows, int kPacks, class C>
FIVEFOLD_INLINE inline void tile(Factor<C> left, const C* b, int64_t ldb, C* c, int64_t ldc,
                                 int64_t inner, bool add) {
  Pack<C> sums[kRows][kPacks] = {};
  for (int64_t step = 0; step < inner; ++step) {
    Pack<C> right[kPacks];
    for (int p = 0; p < kPacks; ++p) right[p] = load(b + step * ldb + p * kLanes<C>);
    for (int r = 0; r < kRows; ++r) {
      const Pack<C> value = splat(left.a[r * left.a_row + step * left.a_step]);
      for (int p = 0; p < kPacks; ++p) sums[r][p] += value * right[p];
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kPacks; ++p) {
      C* to = c + r * ldc + p * kLanes<C>;
      store(to, add ? load(to) + sums[r][p] : sums[r][p]);
    }
}

// Rows of some packs, as many of them together as are left.
template <int kRows, int kPacks, class C>
void rows_of_tile(int64_t rows, Factor<C> left, const C* b, int64_t ldb, C* c, int64_t ldc,
                  int64_t inner, bool add) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    const Factor<C> some{left.a + row * left.a_row, left.a_row, left.a_step};
    tile<kRows, kPacks>(some, b, ldb, c + row * ldc, ldc, inner, add);
  }
  if constexpr (kRows > 1) {
    const Factor<C> rest{left.a + row * left.a_row, left.a_row, left.a_step};
    if (row < rows)
      rows_of_tile<kRows / 2, kPacks>(rows - row, rest, b, ldb, c + row * ldc, ldc, inner, add);
  }
}

// c (rows, width) = left (rows, inner) @ b (inner, width), or added to it; width is whole packs.
template <class C>
void product(int64_t rows, int64_t width, int64_t inner, Factor<C> left, const C* b, int64_t ldb,
             C* c, int64_t ldc, bool add) {
  int64_t column = 0;
  for (; column + kWide * kLanes<C> <= width; column += kWide * kLanes<C>)
    rows_of_tile<kTall, kWide>(rows, left, b + column, ldb, c + column, ldc, inner, add);
  for (; column < width; column += kLanes<C>)
    rows_of_tile<kTall, 1>(rows, left, b + column, ldb, c + column, ldc, inner, add);
}

template <class C>
int64_t padded(int64_t n) {
  return (n + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
}

// An operand (batches of rows, heads, length, width), in strides of elements; widths lie together.
template <class T>
struct Operand {
  T* first;
  int64_t strides[3];

  T* at(int64_t row, int64_t head, int64_t position) const {
    return first + row * strides[0] + head * strides[1] + position * strides[2];
  }
};

struct Sizes {
  int64_t batch, rows, heads, shared, queries, keys, width, value_width;
  int64_t band_start, band_end;  // far beyond all keys where there is no bound
};

// Whole packs of keys, from first up to last, that hold all that some queries see.
struct Range {
  int64_t first, last;
};

template <class C>
Range seen(const Sizes& sizes, int64_t from, int64_t to) {
  const int64_t first = std::clamp<int64_t>(from + sizes.band_start, 0, sizes.keys);
  const int64_t last = std::clamp<int64_t>(to + sizes.band_end, 0, sizes.keys);
  const int64_t begin = first / kLanes<C> * kLanes<C>;
  return {begin, std::max(begin, padded<C>(last))};
}

// Memory of a thread, given out in whole packs; zero at first, so that what is padded is zero.
template <class C>
class Scratch {
 public:
  explicit Scratch(int64_t values) : values_(values + kLanes<C>) {}
  C* take(int64_t count) {
    C* found = values_.data() + used_;
    used_ += padded<C>(count);
    return found;
  }

 private:
  std::vector<C> values_;
  int64_t used_ = 0;
};

// Rows of an operand one after the other, `stride` values apart, each times `scale`.
template <class T>
void copy(const Operand<const T>& from, int64_t row, int64_t head, int64_t begin, int64_t end,
          int64_t width, Compute<T> scale, Compute<T>* to, int64_t stride) {
  using C = Compute<T>;
  for (int64_t t = begin; t < end; ++t) {
    const T* values = from.at(row, head, t);
    C* target = to + (t - begin) * stride;
    each_pack<C>(width, [&](int64_t i, auto count) FIVEFOLD_INLINE {
      store(target + i, load(values + i, count) * scale, count);
    });
  }
}

// The transpose (width, stride) of rows that were copied.
template <class C>
void transpose(const C* from, int64_t rows, int64_t width, int64_t from_stride, C* to,
               int64_t stride) {
  for (int64_t i = 0; i < width; ++i)
    for (int64_t t = 0; t < rows; ++t) to[i * stride + t] = from[t * from_stride + i];
}

// What is added to scores besides products: a bias, and minus infinity where a key is not seen.
template <class C>
struct Added {
  const C* bias;  // (batch, heads, queries, keys) in strides, or null
  int64_t strides[4];
  const uint8_t* key_mask;  // (batch * rows, keys) or null

  // 0 or minus infinity for the keys of a row, and minus infinity where there is only padding.
  void hide(int64_t row, int64_t keys, C* hidden) const {
    const C never = -std::numeric_limits<C>::infinity();
    for (int64_t k = 0; k < padded<C>(keys); ++k)
      hidden[k] = k < keys && (key_mask == nullptr || key_mask[row * keys + k]) ? C(0) : never;
  }

  // Adds all of it to a query's scores of the keys in a range, and returns the largest.
  C add(const Sizes& sizes, int64_t batch, int64_t head, int64_t query, Range range,
        const C* hidden, C* scores) const {
    const C never = -std::numeric_limits<C>::infinity();
    if (bias != nullptr) {
      const C* values = bias + batch * strides[0] + head * strides[1] + query * strides[2];
      const int64_t step = strides[3];
      const int64_t keys = std::min(range.last, sizes.keys) - range.first;
      each_pack<C>(keys, [&](int64_t i, auto count) FIVEFOLD_INLINE {
        const int64_t k = range.first + i;
        const Pack<C> more = step == 0 ? splat(values[0]) : load(values + k, count);
        store(scores + k, load(scores + k) + more);
      });
    }
    const int64_t from = query + sizes.band_start, to = query + sizes.band_end;
    for (int64_t k = range.first; k < std::min(from, range.last); ++k) scores[k] = never;
    for (int64_t k = std::max(to + 1, range.first); k < range.last; ++k) scores[k] = never;
    Pack<C> most = splat(never);
    for (int64_t k = range.first; k < range.last; k += kLanes<C>) {
      const Pack<C> x = load(scores + k) + load(hidden + k);
      store(scores + k, x);
      most = select<Pack<C>>(x > most, x, most);
    }
    C largest = never;
    for (int64_t i = 0; i < kLanes<C>; ++i) largest = std::max(largest, C(most[i]));
    return largest;
  }
};

// scores = exp(scores - shift) for a range of keys; returns their sum.
template <class C>
C exponentials(C* scores, Range range, C shift) {
  Pack<C> sum = {};
  for (int64_t k = range.first; k < range.last; k += kLanes<C>) {
    const Pack<C> p = exp(load(scores + k) - shift);
    store(scores + k, p);
    sum += p;
  }
  return add_lanes<C, kLanes<C>>(sum);
}

template <class T>
void forward(Operand<const T> query, Operand<const T> key, Operand<const T> value,
             Added<Compute<T>> added, Operand<T> out, Compute<T>* lse, Sizes sizes,
             Compute<T> scale, int64_t num_threads) {
  using C = Compute<T>;
  const int64_t wide = padded<C>(sizes.width), value_wide = padded<C>(sizes.value_width);
  const int64_t many = padded<C>(sizes.keys), step = sizes.heads / sizes.shared;
  const int64_t work = sizes.queries * sizes.keys * (sizes.width + sizes.value_width);
  const int64_t items = sizes.batch * sizes.rows * sizes.heads;
  const auto part = [=](int64_t from, int64_t to, int64_t) {
    Scratch<C> scratch(many * (2 * wide + value_wide + 1) +
                       kBlock * (wide + value_wide + many));
    C* keys = scratch.take(many * wide);
    C* keys_t = scratch.take(wide * many);
    C* values = scratch.take(many * value_wide);
    C* hidden = scratch.take(many);
    C* queries = scratch.take(kBlock * wide);
    C* outs = scratch.take(kBlock * value_wide);
    C* scores = scratch.take(kBlock * many);
    int64_t copied = -1;
    for (int64_t item = from; item < to; ++item) {
      const int64_t row = item / sizes.heads, head = item % sizes.heads;
      const int64_t group = row * sizes.shared + head / step;
      if (group != copied) {
        copied = group;
        copy<T>(key, row, head / step, 0, sizes.keys, sizes.width, C(1), keys, wide);
        transpose<C>(keys, sizes.keys, sizes.width, wide, keys_t, many);
        copy<T>(value, row, head / step, 0, sizes.keys, sizes.value_width, C(1), values,
                value_wide);
        added.hide(row, sizes.keys, hidden);
      }
      for (int64_t first = 0; first < sizes.queries; first += kBlock) {
        const int64_t last = std::min(first + kBlock, sizes.queries), block = last - first;
        const Range range = seen<C>(sizes, first, last);
        const int64_t span = range.last - range.first;
        copy<T>(query, row, head, first, last, sizes.width, scale, queries, wide);
        product<C>(block, span, sizes.width, {queries, wide, 1}, keys_t + range.first, many,
                   scores + range.first, many, false);
        C shares[kBlock];
        for (int64_t i = 0; i < block; ++i) {
          C* mine = scores + i * many;
          const C most = added.add(sizes, row / sizes.rows, head, first + i, range, hidden, mine);
          const bool any = most != -std::numeric_limits<C>::infinity();
          const C sum = exponentials(mine, range, any ? most : C(0));
          shares[i] = any ? 1 / sum : C(0);
          lse[item * sizes.queries + first + i] = any ? most + std::log(sum) : most;
        }
        product<C>(block, value_wide, span, {scores + range.first, many, 1},
                   values + range.first * value_wide, value_wide, outs, value_wide, false);
        for (int64_t i = 0; i < block; ++i) {
          T* to_out = out.at(row, head, first + i);
          each_pack<C>(sizes.value_width, [&](int64_t j, auto count) FIVEFOLD_INLINE {
            store(to_out + j, load(outs + i * value_wide + j) * shares[i], count);
          });
        }
      }
    }
  };
  parallel_for(0, items, kGrain / std::max<int64_t>(work, 1) + 1, num_threads, part);
}

template <class T>
struct Gradients {
  Operand<T> query, key, value;
  Compute<T>* bias;  // (chunks, batch, heads, queries, keys), zero at first, or null
};

template <class T>
void write(const Compute<T>* from, int64_t stride, int64_t rows, int64_t width, Operand<T> to,
           int64_t row, int64_t head, int64_t begin, Compute<T> scale) {
  using C = Compute<T>;
  for (int64_t t = 0; t < rows; ++t) {
    T* target = to.at(row, head, begin + t);
    each_pack<C>(width, [&](int64_t i, auto count) FIVEFOLD_INLINE {
      store(target + i, load(from + t * stride + i) * scale, count);
    });
  }
}

template <class T>
void backward(Operand<const T> dout, const Compute<T>* dlse, Operand<const T> query,
              Operand<const T> key, Operand<const T> value, Added<Compute<T>> added,
              Operand<const T> out, const Compute<T>* lse, Gradients<T> gradients, int64_t chunks,
              Sizes sizes, Compute<T> scale, int64_t num_threads) {
  using C = Compute<T>;
  const int64_t wide = padded<C>(sizes.width), value_wide = padded<C>(sizes.value_width);
  const int64_t many = padded<C>(sizes.keys), step = sizes.heads / sizes.shared;
  const int64_t work = sizes.queries * sizes.keys * (3 * sizes.width + 2 * sizes.value_width);
  const int64_t all = work * step * std::max<int64_t>(sizes.rows / std::max<int64_t>(chunks, 1), 1);
  const auto part = [=](int64_t from, int64_t to, int64_t) {
    Scratch<C> scratch(many * (3 * wide + 3 * value_wide + 1) +
                       kBlock * (2 * wide + value_wide + 2 * many));
    C* keys = scratch.take(many * wide);
    C* keys_t = scratch.take(wide * many);
    C* dkeys = scratch.take(many * wide);
    C* values = scratch.take(many * value_wide);
    C* values_t = scratch.take(value_wide * many);
    C* dvalues = scratch.take(many * value_wide);
    C* hidden = scratch.take(many);
    C* queries = scratch.take(kBlock * wide);
    C* dqueries = scratch.take(kBlock * wide);
    C* douts = scratch.take(kBlock * value_wide);
    C* scores = scratch.take(kBlock * many);
    C* dscores = scratch.take(kBlock * many);

    const auto head_of_row = [&](int64_t row, int64_t head, C* dbias) {
      for (int64_t first = 0; first < sizes.queries; first += kBlock) {
        const int64_t last = std::min(first + kBlock, sizes.queries), block = last - first;
        const Range range = seen<C>(sizes, first, last);
        const int64_t span = range.last - range.first;
        C* p = scores + range.first;
        C* ds = dscores + range.first;
        copy<T>(query, row, head, first, last, sizes.width, scale, queries, wide);
        copy<T>(dout, row, head, first, last, sizes.value_width, C(1), douts, value_wide);
        product<C>(block, span, sizes.width, {queries, wide, 1}, keys_t + range.first, many, p,
                   many, false);
        product<C>(block, span, sizes.value_width, {douts, value_wide, 1}, values_t + range.first,
                   many, ds, many, false);
        for (int64_t i = 0; i < block; ++i) {
          const int64_t at = (row * sizes.heads + head) * sizes.queries + first + i;
          const C infinity = std::numeric_limits<C>::infinity();
          const C shift = lse[at] == -infinity ? infinity : lse[at];
          C* mine = scores + i * many;
          C* theirs = dscores + i * many;
          added.add(sizes, row / sizes.rows, head, first + i, range, hidden, mine);
          exponentials(mine, range, shift);
          const T* result = out.at(row, head, first + i);
          const C* gradient = douts + i * value_wide;
          const auto weighed = [&](int64_t j, auto count) FIVEFOLD_INLINE {
            return load(gradient + j, count) * load(result + j, count);
          };
          C delta = Sum<C>().add(sizes.value_width, weighed).total();
          if (dlse != nullptr) delta -= dlse[at];
          C* to_bias = dbias == nullptr ? nullptr : dbias + (first + i) * sizes.keys + range.first;
          for (int64_t k = range.first; k < range.last; k += kLanes<C>)
            store(theirs + k, load(mine + k) * (load(theirs + k) - delta));
          if (to_bias == nullptr) continue;
          const int64_t seen_keys = std::min(range.last, sizes.keys) - range.first;
          each_pack<C>(seen_keys, [&](int64_t j, auto lanes) FIVEFOLD_INLINE {
            store(to_bias + j, load(to_bias + j, lanes) + load(theirs + range.first + j), lanes);
          });
        }
        product<C>(span, value_wide, block, {p, 1, many}, douts, value_wide,
                   dvalues + range.first * value_wide, value_wide, true);
        product<C>(span, wide, block, {ds, 1, many}, queries, wide, dkeys + range.first * wide,
                   wide, true);
        product<C>(block, wide, span, {ds, many, 1}, keys + range.first * wide, wide, dqueries,
                   wide, false);
        write<T>(dqueries, wide, block, sizes.width, gradients.query, row, head, first, scale);
      }
    };

    for (int64_t item = from; item < to; ++item) {
      const int64_t chunk = item % chunks, group = item / chunks;
      const int64_t batch = group / sizes.shared, shared = group % sizes.shared;
      const int64_t begin = sizes.rows * chunk / chunks, end = sizes.rows * (chunk + 1) / chunks;
      for (int64_t row = batch * sizes.rows + begin; row < batch * sizes.rows + end; ++row) {
        copy<T>(key, row, shared, 0, sizes.keys, sizes.width, C(1), keys, wide);
        transpose<C>(keys, sizes.keys, sizes.width, wide, keys_t, many);
        copy<T>(value, row, shared, 0, sizes.keys, sizes.value_width, C(1), values, value_wide);
        transpose<C>(values, sizes.keys, sizes.value_width, value_wide, values_t, many);
        added.hide(row, sizes.keys, hidden);
        std::fill_n(dkeys, many * wide, C(0));
        std::fill_n(dvalues, many * value_wide, C(0));
        for (int64_t head = shared * step; head < (shared + 1) * step; ++head) {
          C* dbias = gradients.bias;
          if (dbias != nullptr)
            dbias += ((chunk * sizes.batch + batch) * sizes.heads + head) * sizes.queries *
                     sizes.keys;
          head_of_row(row, head, dbias);
        }
        write<T>(dkeys, wide, sizes.keys, sizes.width, gradients.key, row, shared, 0, C(1));
        write<T>(dvalues, value_wide, sizes.keys, sizes.value_width, gradients.value, row, shared,
                 0, C(1));
      }
    }
  };
  parallel_for(0, sizes.batch * sizes.shared * chunks, kGrain / std::max<int64_t>(all, 1) + 1,
               num_threads, part);
}

// An operand from its address and strides of rows, heads and positions.
template <class T>
Operand<T> operand(T* first, const int64_t* strides) {
  return {first, {strides[0], strides[1], strides[2]}};
}

template <class C>
Added<C> added_from(const void* bias, const int64_t* strides, const void* key_mask) {
  return {static_cast<const C*>(bias),
          {strides[0], strides[1], strides[2], strides[3]},
          static_cast<const uint8_t*>(key_mask)};
}

Sizes sizes_from(const int64_t* sizes) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],
          sizes[5], sizes[6], sizes[7], sizes[8], sizes[9]};
}

}  // namespace

// sizes: batch, rows, heads, heads of keys, queries, keys, width, width of values, start and end of
// the band. strides: of row (of all batches), head and position of query, key, value and out, then
// of batch, head, query and key of the bias, which is in the dtype that is computed in and whose
// last stride is 0 or 1. key_mask: bytes (batch * rows, keys). lse: (batch * rows, heads, queries).
// bias and key_mask may be null.
FIVEFOLD_API void attention_forward(int64_t type, const void* query, const void* key,
                                    const void* value, const void* bias, const void* key_mask,
                                    void* out, void* lse, const void* sizes, const void* strides,
                                    double scale, int64_t num_threads) {
  dispatch(type, [&](auto element) {
    using T = decltype(element);
    using C = Compute<T>;
    const int64_t* steps = static_cast<const int64_t*>(strides);
    forward<T>(operand(static_cast<const T*>(query), steps),
               operand(static_cast<const T*>(key), steps + 3),
               operand(static_cast<const T*>(value), steps + 6),
               added_from<C>(bias, steps + 12, key_mask),
               operand(static_cast<T*>(out), steps + 9), static_cast<C*>(lse),
               sizes_from(static_cast<const int64_t*>(sizes)), static_cast<C>(scale), num_threads);
  });
}

// As above; strides go on with those of dout, dquery, dkey and dvalue. dbias: (chunks, batch, heads,
// queries, keys), zero, whose sum over chunks becomes the gradient; rows are cut into `chunks` that
// run side by side. dlse and dbias may be null.
FIVEFOLD_API void attention_backward(int64_t type, const void* dout, const void* dlse,
                                     const void* query, const void* key, const void* value,
                                     const void* bias, const void* key_mask, const void* out,
                                     const void* lse, void* dquery, void* dkey, void* dvalue,
                                     void* dbias, const void* sizes, const void* strides,
                                     int64_t chunks, double scale, int64_t num_threads) {
  dispatch(type, [&](auto element) {
    using T = decltype(element);
    using C = Compute<T>;
    const int64_t* steps = static_cast<const int64_t*>(strides);
    backward<T>(operand(static_cast<const T*>(dout), steps + 16), static_cast<const C*>(dlse),
                operand(static_cast<const T*>(query), steps),
                operand(static_cast<const T*>(key), steps + 3),
                operand(static_cast<const T*>(value), steps + 6),
                added_from<C>(bias, steps + 12, key_mask),
                operand(static_cast<const T*>(out), steps + 9), static_cast<const C*>(lse),
                {operand(static_cast<T*>(dquery), steps + 19),
                 operand(static_cast<T*>(dkey), steps + 22),
                 operand(static_cast<T*>(dvalue), steps + 25), static_cast<C*>(dbias)},
                chunks, sizes_from(static_cast<const int64_t*>(sizes)), static_cast<C>(scale),
                num_threads);
  });
}
