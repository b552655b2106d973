// Root-mean-square normalisation of rows in groups, with an optional weight and an optional gate
// before or after it.

#include "fivefold.h"

namespace {

using namespace fivefold;

// Values that a thread should at least have.
constexpr int64_t kGrain = 1 << 14;

// What rows look like: `groups` groups of `size` values each.
struct Shape {
  int64_t rows, groups, size, grain;

  Shape(int64_t rows, int64_t width, int64_t group_size)
      : rows(rows), groups(width / std::max<int64_t>(group_size, 1)), size(group_size),
        grain(kGrain / std::max<int64_t>(width, 1) + 1) {}
};

// The gate where the scale takes it: before normalising, after it, or nowhere.
enum class Gate { none, first, last };

template <class P>
inline P silu(P z) {
  return z * sigmoid(z);
}

// Groups that the forward pass takes together, so that their chains of sums, root and quotient run
// side by side. In float32 they wait for memory instead.
template <class T>
constexpr int64_t kTogether = sizeof(T) == 4 ? 1 : 4;

// A group of a row in the forward pass.
template <class T, Gate kGate>
struct Group {
  const T* x;
  const T* gate;
  const Compute<T>* weight;
  T* y;
  // x times the gate, where that comes first.
  Compute<T>* gated;
  Compute<T> scale;

  Compute<T> squares(int64_t size) const {
    using C = Compute<T>;
    return Sum<C>().add(size, [&](int64_t i, auto count) FIVEFOLD_INLINE {
      Pack<C> value = load(x + i, count);
      if constexpr (kGate == Gate::first) {
        value *= silu(load(gate + i, count));
        store(gated + i, value, count);
      }
      return value * value;
    }).total();
  }

  void finish(int64_t size) const {
    using C = Compute<T>;
    each_pack<C>(size, [&](int64_t i, auto count) FIVEFOLD_INLINE {
      Pack<C> value;
      if constexpr (kGate == Gate::first)
        value = load(gated + i, count) * scale;
      else
        value = load(x + i, count) * scale;
      if constexpr (kGate == Gate::last) value *= silu(load(gate + i, count));
      if (weight != nullptr) value *= load(weight + i, count);
      store(y + i, value, count);
    });
  }
};

template <class T, Gate kGate>
void forward(const T* x, const Compute<T>* weight, const T* gate, T* y, Compute<T>* rstd,
             Compute<T>* scratch, const Shape& shape, int64_t x_stride, int64_t gate_stride,
             Compute<T> eps, int64_t num_threads) {
  const auto rows = [=](int64_t from, int64_t to, int64_t thread) {
    const int64_t end = to * shape.groups;
    for (int64_t first = from * shape.groups; first < end; first += kTogether<T>) {
      const int64_t together = std::min(end - first, kTogether<T>);
      Group<T, kGate> groups[kTogether<T>];
      for (int64_t i = 0; i < together; ++i) {
        const int64_t row = (first + i) / shape.groups;
        const int64_t at = (first + i) % shape.groups * shape.size;
        groups[i] = {&x[row * x_stride + at],
                     kGate == Gate::none ? nullptr : &gate[row * gate_stride + at],
                     weight == nullptr ? nullptr : &weight[at],
                     &y[(first + i) * shape.size],
                     &scratch[(thread * kTogether<T> + i) * shape.size],
                     0};
        groups[i].scale = 1 / std::sqrt(groups[i].squares(shape.size) / shape.size + eps);
      }
      for (int64_t i = 0; i < together; ++i) {
        rstd[first + i] = groups[i].scale;
        groups[i].finish(shape.size);
      }
    }
  };
  parallel_for(0, shape.rows, shape.grain, num_threads, rows);
}

// The first pass over a group keeps the gate's logistic, which takes longest, for the second.
enum class Pass { first, second };

// What the gradient needs at some values of a row.
template <class T, Gate kGate, Pass kPass>
struct Values {
  Pack<Compute<T>> dy, x, z, logistic, silu, normed, dnormed;

  template <class Count>
  FIVEFOLD_INLINE inline Values(const T* dys, const T* xs, const Compute<T>* weights, const T* zs,
                                Compute<T>* logistics, Compute<T> scale, int64_t i, Count count) {
    dy = load(dys + i, count);
    x = load(xs + i, count);
    normed = x * scale;
    dnormed = dy;
    if constexpr (kGate != Gate::none) {
      z = load(zs + i, count);
      if constexpr (kPass == Pass::first) {
        logistic = sigmoid(z);
        store(logistics + i, logistic, count);
      } else {
        logistic = load(logistics + i, count);
      }
      silu = z * logistic;
      if constexpr (kGate == Gate::first) normed *= silu;
      if constexpr (kGate == Gate::last) dnormed *= silu;
    }
    if (weights != nullptr) dnormed *= load(weights + i, count);
  }
};

template <class T, Gate kGate>
void backward(const T* dy, const T* x, const Compute<T>* weight, const T* gate,
              const Compute<T>* rstd, T* dx, Compute<T>* partial, T* dgate, Compute<T>* scratch,
              const Shape& shape, int64_t dy_stride, int64_t x_stride, int64_t gate_stride,
              int64_t num_threads) {
  using C = Compute<T>;
  const int64_t width = shape.groups * shape.size;
  const auto rows = [=](int64_t from, int64_t to, int64_t thread) {
    C* logistics = &scratch[thread * shape.size];
    C* dweight = weight == nullptr ? nullptr : &partial[thread * width];
    if (weight != nullptr) std::fill(dweight, dweight + width, C(0));
    for (int64_t row = from; row < to; ++row) {
      for (int64_t group = 0; group < shape.groups; ++group) {
        const int64_t at = group * shape.size;
        const T* dys = dy + row * dy_stride + at;
        const T* xs = x + row * x_stride + at;
        const T* zs = kGate == Gate::none ? nullptr : gate + row * gate_stride + at;
        const C* weights = weight == nullptr ? nullptr : weight + at;
        const C scale = rstd[row * shape.groups + group];
        T* dxs = dx + row * width + at;
        T* dzs = kGate == Gate::none ? nullptr : dgate + row * width + at;

        const C products = Sum<C>().add(shape.size, [&](int64_t i, auto count) FIVEFOLD_INLINE {
          const Values<T, kGate, Pass::first> v(dys, xs, weights, zs, logistics, scale, i, count);
          return v.dnormed * v.normed;
        }).total();
        const C projection = products / shape.size;

        each_pack<C>(shape.size, [&](int64_t i, auto count) FIVEFOLD_INLINE {
          const Values<T, kGate, Pass::second> v(dys, xs, weights, zs, logistics, scale, i, count);
          Pack<C> dinner = (v.dnormed - v.normed * projection) * scale;
          if constexpr (kGate != Gate::none) {
            const Pack<C> slope = v.logistic * (1 + v.z * (1 - v.logistic));
            Pack<C> dsilu = kGate == Gate::first ? dinner * v.x : v.dy * v.normed;
            if (kGate == Gate::last && weights != nullptr) dsilu *= load(weights + i, count);
            store(dzs + i, dsilu * slope, count);
            if constexpr (kGate == Gate::first) dinner *= v.silu;
          }
          store(dxs + i, dinner, count);
          if (weights != nullptr) {
            Pack<C> product = v.dy * v.normed;
            if constexpr (kGate == Gate::last) product *= v.silu;
            C* sums = dweight + at + i;
            store(sums, load(sums, count) + product, count);
          }
        });
      }
    }
  };
  const int64_t parts = parallel_for(0, shape.rows, shape.grain, num_threads, rows);
  if (weight != nullptr) {
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = 0; i < width; ++i) partial[i] += partial[part * width + i];
  }
}

// f(T(), gate) with what is known at run time made known to the compiler.
template <class F>
void choose(int64_t type, bool has_gate, bool gate_first, F f) {
  dispatch(type, [&](auto element) {
    if (!has_gate) return f(element, std::integral_constant<Gate, Gate::none>());
    if (gate_first) return f(element, std::integral_constant<Gate, Gate::first>());
    return f(element, std::integral_constant<Gate, Gate::last>());
  });
}

}  // namespace

// x, gate: (rows, width) with strides of rows; weight: (width), rstd: (rows, width / group_size),
// scratch: (num_threads, 4, group_size), in the dtype that is computed in; y: (rows, width) without
// gaps. weight and gate may be null, and without a gate scratch is not used.
FIVEFOLD_API void rms_norm_forward(int64_t type, const void* x, const void* weight,
                                   const void* gate, void* y, void* rstd, void* scratch,
                                   int64_t rows, int64_t width, int64_t group_size,
                                   int64_t x_stride, int64_t gate_stride, double eps,
                                   int64_t gate_first, int64_t num_threads) {
  choose(type, gate, gate_first, [&](auto element, auto where) {
    using T = decltype(element);
    forward<T, decltype(where)::value>(
        static_cast<const T*>(x), static_cast<const Compute<T>*>(weight),
        static_cast<const T*>(gate), static_cast<T*>(y), static_cast<Compute<T>*>(rstd),
        static_cast<Compute<T>*>(scratch), Shape(rows, width, group_size), x_stride,
        gate_stride, static_cast<Compute<T>>(eps), num_threads);
  });
}

// As above; partial: (num_threads, width), whose first row becomes the gradient of weight; dx,
// dgate: (rows, width) without gaps.
FIVEFOLD_API void rms_norm_backward(int64_t type, const void* dy, const void* x,
                                    const void* weight, const void* gate, const void* rstd,
                                    void* dx, void* partial, void* dgate, void* scratch,
                                    int64_t rows, int64_t width, int64_t group_size,
                                    int64_t dy_stride, int64_t x_stride, int64_t gate_stride,
                                    int64_t gate_first, int64_t num_threads) {
  choose(type, gate, gate_first, [&](auto element, auto where) {
    using T = decltype(element);
    backward<T, decltype(where)::value>(
        static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<const Compute<T>*>(weight),
        static_cast<const T*>(gate), static_cast<const Compute<T>*>(rstd), static_cast<T*>(dx),
        static_cast<Compute<T>*>(partial), static_cast<T*>(dgate),
        static_cast<Compute<T>*>(scratch), Shape(rows, width, group_size), dy_stride,
        x_stride, gate_stride, num_threads);
  });
}
