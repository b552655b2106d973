// Layer normalisation of rows at two strides, with an optional weight and an optional bias.

#include "fivefold.h"

namespace {

using namespace fivefold;

// Values that a thread should at least have.
constexpr int64_t kGrain = 1 << 14;

// outer * inner rows of `width` values; in `strides` of a tensor, row by row.
struct Shape {
  int64_t outer, inner, width;

  int64_t rows() const { return outer * inner; }
  int64_t grain() const { return kGrain / std::max<int64_t>(width, 1) + 1; }
};

// Where the rows of a tensor begin.
template <class T>
struct Rows {
  const T* first;
  int64_t inner, outer_stride, inner_stride;

  const T* operator[](int64_t row) const {
    return first + row / inner * outer_stride + row % inner * inner_stride;
  }
};

// Rows that the forward pass takes together, so that their chains of sums, root and quotient run
// side by side. In float32 they wait for memory instead.
template <class T>
constexpr int64_t kTogether = sizeof(T) == 4 ? 1 : 4;

// Rows whose share of the gradients of weight and bias is added up before it goes to memory, where
// those take more of the cache than a few rows do.
constexpr int kSummed = 4;
constexpr int64_t kWide = 2048;

template <class T>
void forward(Rows<T> x, const Compute<T>* weight, const Compute<T>* bias, T* y, Compute<T>* mean,
             Compute<T>* rstd, Shape shape, Compute<T> eps, int64_t num_threads) {
  using C = Compute<T>;
  const int64_t width = shape.width;
  const C share = C(1) / width;
  parallel_for(0, shape.rows(), shape.grain(), num_threads, [=](int64_t from, int64_t to, int64_t) {
    for (int64_t first = from; first < to; first += kTogether<T>) {
      const int64_t last = std::min(to, first + kTogether<T>);
      for (int64_t row = first; row < last; ++row) {
        const T* xs = x[row];
        const auto value = [&](int64_t i, auto count) FIVEFOLD_INLINE {
          return load(xs + i, count);
        };
        mean[row] = Sum<C>().add(width, value).total() * share;
      }
      for (int64_t row = first; row < last; ++row) {
        const T* xs = x[row];
        const C centre = mean[row];
        const auto square = [&](int64_t i, auto count) FIVEFOLD_INLINE {
          // A tail's empty lanes are 0 and not the centre away from it.
          const Pack<C> centred = only(load(xs + i, count) - centre, count);
          return centred * centred;
        };
        rstd[row] = 1 / std::sqrt(Sum<C>().add(width, square).total() * share + eps);
      }
      for (int64_t row = first; row < last; ++row) {
        const T* xs = x[row];
        T* ys = &y[row * width];
        const C centre = mean[row], scale = rstd[row];
        each_pack<C>(width, [&](int64_t i, auto count) FIVEFOLD_INLINE {
          Pack<C> result = (load(xs + i, count) - centre) * scale;
          if (weight != nullptr) result *= load(weight + i, count);
          if (bias != nullptr) result += load(bias + i, count);
          store(ys + i, result, count);
        });
      }
    }
  });
}

// A row in the backward pass.
template <class T>
struct Row {
  const T* dy;
  const T* x;
  T* dx;
  Compute<T> centre, scale, shift, projection;

  template <class Count>
  FIVEFOLD_INLINE inline Pack<Compute<T>> normed(int64_t i, Count count) const {
    return (load(x + i, count) - centre) * scale;
  }

  // The means of the normed values' gradient, and of its product with them.
  void project(const Compute<T>* weight, int64_t width) {
    using C = Compute<T>;
    Sum<C> shifts, projections;
    each_part<C>(width, [&](int64_t i, auto count, int part) FIVEFOLD_INLINE {
      // 0 in the empty lanes of a tail, whatever normed is there.
      Pack<C> dnormed = load(dy + i, count);
      if (weight != nullptr) dnormed *= load(weight + i, count);
      shifts.parts[part] += dnormed;
      projections.parts[part] += dnormed * normed(i, count);
    });
    shift = shifts.total() / width;
    projection = projections.total() / width;
  }
};

template <class C>
inline void add_to(C* sums, Pack<C> x, int64_t count) {
  store(sums, load(sums, count) + x, count);
}
template <class C>
FIVEFOLD_INLINE inline void add_to(C* sums, Pack<C> x, Whole<C>) {
  store(sums, load(sums) + x);
}

// dx of some rows, and what they add to the sums, which may be null.
template <int kRows, class T>
void finish(const Row<T>* given, const Compute<T>* weight, Compute<T>* dweight, Compute<T>* dbias,
            int64_t width) {
  using C = Compute<T>;
  Row<T> rows[kRows];
  std::copy(given, given + kRows, rows);
  each_pack<C>(width, [&](int64_t i, auto count) FIVEFOLD_INLINE {
    Pack<C> weights = splat(C(1)), to_weight = {}, to_bias = {};
    if (weight != nullptr) weights = load(weight + i, count);
    for (const Row<T>& row : rows) {
      const Pack<C> dy = load(row.dy + i, count), normed = row.normed(i, count);
      store(row.dx + i, (dy * weights - row.shift - normed * row.projection) * row.scale, count);
      to_weight += dy * normed;
      to_bias += dy;
    }
    if (dweight != nullptr) add_to(dweight + i, to_weight, count);
    if (dbias != nullptr) add_to(dbias + i, to_bias, count);
  });
}

template <class T>
void backward(Rows<T> dy, Rows<T> x, const Compute<T>* weight, const Compute<T>* mean,
              const Compute<T>* rstd, T* dx, Compute<T>* dweights, Compute<T>* dbiases, Shape shape,
              int64_t num_threads) {
  using C = Compute<T>;
  const int64_t width = shape.width;
  const auto part = [=](int64_t from, int64_t to, int64_t thread) {
    C* dweight = dweights == nullptr ? nullptr : &dweights[thread * width];
    C* dbias = dbiases == nullptr ? nullptr : &dbiases[thread * width];
    if (dweight != nullptr) std::fill_n(dweight, width, C(0));
    if (dbias != nullptr) std::fill_n(dbias, width, C(0));
    Row<T> rows[kSummed];
    int ready = 0;
    for (int64_t row = from; row < to; ++row) {
      rows[ready] = {dy[row], x[row], &dx[row * width], mean[row], rstd[row], 0, 0};
      rows[ready++].project(weight, width);
      if (width >= kWide && ready < kSummed && row != to - 1) continue;
      if (ready == kSummed)
        finish<kSummed>(rows, weight, dweight, dbias, width);
      else
        for (int i = 0; i < ready; ++i) finish<1>(&rows[i], weight, dweight, dbias, width);
      ready = 0;
    }
  };
  const int64_t parts = parallel_for(0, shape.rows(), shape.grain(), num_threads, part);
  for (C* sums : {dweights, dbiases}) {
    if (sums == nullptr) continue;
    for (int64_t other = 1; other < parts; ++other)
      for (int64_t i = 0; i < width; ++i) sums[i] += sums[other * width + i];
  }
}

}  // namespace

// x: (outer, inner, width) with strides of rows; weight, bias: (width), mean, rstd: (outer, inner),
// all in the dtype that is computed in; y: like x, without gaps. weight and bias may be null.
FIVEFOLD_API void layer_norm_forward(int64_t type, const void* x, const void* weight,
                                     const void* bias, void* y, void* mean, void* rstd,
                                     int64_t outer, int64_t inner, int64_t width,
                                     int64_t x_outer_stride, int64_t x_inner_stride, double eps,
                                     int64_t num_threads) {
  dispatch(type, [&](auto element) {
    using T = decltype(element);
    using C = Compute<T>;
    forward<T>({static_cast<const T*>(x), inner, x_outer_stride, x_inner_stride},
               static_cast<const C*>(weight), static_cast<const C*>(bias), static_cast<T*>(y),
               static_cast<C*>(mean), static_cast<C*>(rstd), {outer, inner, width},
               static_cast<C>(eps), num_threads);
  });
}

// As above; dweight, dbias: (num_threads, width) or null, whose first rows become the gradients; dx
// without gaps.
FIVEFOLD_API void layer_norm_backward(int64_t type, const void* dy, const void* x,
                                      const void* weight, const void* mean, const void* rstd,
                                      void* dx, void* dweight, void* dbias, int64_t outer,
                                      int64_t inner, int64_t width, int64_t dy_outer_stride,
                                      int64_t dy_inner_stride, int64_t x_outer_stride,
                                      int64_t x_inner_stride, int64_t num_threads) {
  dispatch(type, [&](auto element) {
    using T = decltype(element);
    using C = Compute<T>;
    backward<T>({static_cast<const T*>(dy), inner, dy_outer_stride, dy_inner_stride},
                {static_cast<const T*>(x), inner, x_outer_stride, x_inner_stride},
                static_cast<const C*>(weight), static_cast<const C*>(mean),
                static_cast<const C*>(rstd), static_cast<T*>(dx), static_cast<C*>(dweight),
                static_cast<C*>(dbias), {outer, inner, width}, num_threads);
  });
}
