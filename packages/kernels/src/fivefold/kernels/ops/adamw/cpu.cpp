// AdamW on many tensors. Blocks of a tensor are widened to the type that is computed in, unless
// they are of it, and stay in the first cache from one thing that is done to them to the next.

#include "fivefold.h"

#include <vector>

namespace {

using namespace fivefold;

// Values that a thread takes at once, and how many of them are in the cache between two loops.
constexpr int64_t kPiece = 8192;
constexpr int64_t kBlock = 1024;

// Rows of the table of addresses: num_tensors addresses each.
enum Row { kParam, kGrad, kExpAvg, kExpAvgSq, kMaster, kAverage, kStep, kAverageCount };

struct Tensors {
  const int64_t* addresses;
  const int64_t* sizes;
  int64_t num;

  void* at(Row row, int64_t tensor) const {
    return reinterpret_cast<void*>(addresses[row * num + tensor]);
  }
};

// The pieces that tensors are cut into, numbered through.
class Pieces {
 public:
  explicit Pieces(const Tensors& tensors) : sizes_(tensors.sizes) {
    for (int64_t tensor = 0; tensor < tensors.num; ++tensor)
      ends_.push_back(size() + sizes_[tensor] / kPiece + (sizes_[tensor] % kPiece != 0));
  }

  int64_t size() const { return ends_.empty() ? 0 : ends_.back(); }

  // f(piece, tensor, start, stop) for some pieces in turn.
  template <class F>
  void each(int64_t from, int64_t to, F f) const {
    int64_t tensor = std::upper_bound(ends_.begin(), ends_.end(), from) - ends_.begin();
    for (int64_t piece = from; piece < to; ++piece) {
      while (ends_[tensor] <= piece) ++tensor;
      const int64_t first = tensor == 0 ? 0 : ends_[tensor - 1];
      const int64_t start = (piece - first) * kPiece;
      f(piece, tensor, start, std::min(start + kPiece, sizes_[tensor]));
    }
  }

 private:
  const int64_t* sizes_;
  std::vector<int64_t> ends_;  // the first piece that is not of the tensor or of those before it
};

// f(T()) for the types of elements that are computed with in C.
template <class C, class F>
inline void dispatch_as(int64_t type, F f) {
  dispatch(type, [&](auto element) {
    if constexpr (std::is_same_v<Compute<decltype(element)>, C>) f(element);
  });
}

// A block of a tensor as values of C: where it lies if it is of C, else a copy.
template <class C>
class Block {
 public:
  explicit Block(int64_t type) : type_(type) {}

  C* read(void* tensor, int64_t start, int64_t size) {
    dispatch_as<C>(type_, [&](auto element) {
      using T = decltype(element);
      T* const values = static_cast<T*>(tensor) + start;
      if constexpr (std::is_same_v<T, C>) {
        data_ = values;
      } else {
        data_ = copy_;
        each_pack<C>(size, [&](int64_t i, auto count) FIVEFOLD_INLINE {
          fivefold::store(copy_ + i, load(values + i, count), count);
        });
      }
    });
    return data_;
  }

  // Rounds what read() gave, or other values, into the tensor.
  void write(const C* from, void* tensor, int64_t start, int64_t size) {
    dispatch_as<C>(type_, [&](auto element) {
      using T = decltype(element);
      T* const values = static_cast<T*>(tensor) + start;
      if constexpr (std::is_same_v<T, C>) {
        if (from != values) std::copy_n(from, size, values);
      } else {
        each_pack<C>(size, [&](int64_t i, auto count) FIVEFOLD_INLINE {
          fivefold::store(values + i, load(from + i, count), count);
        });
      }
    });
  }

 private:
  int64_t type_;
  C* data_ = nullptr;
  alignas(kPackBytes) C copy_[kBlock];
};

// What all values of a tensor share.
template <class C>
struct Shared {
  C grad_factor, keep_param, new_first, keep_second, new_second, second_factor, eps, step_size;
  C keep_average, new_average;
};

struct Options {
  const double* settings;
  double scale;
  bool maximize, swa, has_average;
};

// Counts the step.
template <class C>
Shared<C> share(const Tensors& tensors, int64_t tensor, const Options& options) {
  const double lr = options.settings[0], beta1 = options.settings[1], beta2 = options.settings[2];
  const double eps = options.settings[3], weight_decay = options.settings[4];
  Shared<C> shared = {};
  float& step = *static_cast<float*>(tensors.at(kStep, tensor));
  step += 1;
  shared.grad_factor = options.maximize ? -options.scale : options.scale;
  shared.keep_param = 1 - lr * weight_decay;
  shared.new_first = 1 - beta1;
  shared.keep_second = beta2;
  shared.new_second = 1 - beta2;
  shared.second_factor = 1 / std::sqrt(1 - std::pow(beta2, step));
  shared.eps = eps;
  shared.step_size = lr / (1 - std::pow(beta1, step));
  if (options.has_average) {
    float& count = *static_cast<float*>(tensors.at(kAverageCount, tensor));
    count += 1;
    const double decay = count == 1 ? 0 : options.settings[5];
    const double keep = options.swa ? 1 - 1.0 / count : decay;
    shared.keep_average = keep;
    shared.new_average = 1 - keep;
  }
  return shared;
}

template <class C>
inline void update(const C* __restrict grads, C* __restrict firsts, C* __restrict seconds,
                   C* __restrict weights, int64_t size, const Shared<C>& shared) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const C g = grads[i] * shared.grad_factor;
    const C m = firsts[i] + (g - firsts[i]) * shared.new_first;
    const C v = seconds[i] * shared.keep_second + g * g * shared.new_second;
    const C step = m / (std::sqrt(v) * shared.second_factor + shared.eps);
    firsts[i] = m;
    seconds[i] = v;
    weights[i] = weights[i] * shared.keep_param - step * shared.step_size;
  }
}

template <class C>
inline void average(const C* __restrict values, C* __restrict averages, int64_t size,
                    const Shared<C>& shared) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i)
    averages[i] = averages[i] * shared.keep_average + values[i] * shared.new_average;
}

template <class C>
constexpr int64_t kTypeOf = static_cast<int64_t>(std::is_same_v<C, double> ? Type::f64 : Type::f32);

template <class C>
void step(const Tensors& tensors, int64_t param_type, int64_t grad_type, int64_t moment_type,
          bool has_master, const Options& options, int64_t num_threads) {
  std::vector<Shared<C>> shared;
  for (int64_t tensor = 0; tensor < tensors.num; ++tensor)
    shared.push_back(share<C>(tensors, tensor, options));
  const Pieces pieces(tensors);
  parallel_for(0, pieces.size(), 1, num_threads, [&](int64_t from, int64_t to, int64_t) {
    Block<C> params(param_type), grads(grad_type), firsts(moment_type), seconds(moment_type);
    Block<C> wide(kTypeOf<C>);
    pieces.each(from, to, [&](int64_t, int64_t tensor, int64_t start, int64_t stop) {
      for (int64_t at = start; at < stop; at += kBlock) {
        const int64_t size = std::min(kBlock, stop - at);
        const auto of = [&](Row row) { return tensors.at(row, tensor); };
        C* const m = firsts.read(of(kExpAvg), at, size);
        C* const v = seconds.read(of(kExpAvgSq), at, size);
        C* w = has_master ? wide.read(of(kMaster), at, size) : params.read(of(kParam), at, size);
        update(grads.read(of(kGrad), at, size), m, v, w, size, shared[tensor]);
        firsts.write(m, of(kExpAvg), at, size);
        seconds.write(v, of(kExpAvgSq), at, size);
        params.write(w, of(kParam), at, size);
        if (options.has_average) {
          if (!has_master) w = params.read(of(kParam), at, size);  // rounded
          average(w, wide.read(of(kAverage), at, size), size, shared[tensor]);
        }
      }
    });
  });
}

template <class T>
double norm(const Tensors& tensors, int64_t num_threads) {
  using C = Compute<T>;
  const Pieces pieces(tensors);
  std::vector<double> squares(pieces.size());
  parallel_for(0, pieces.size(), 1, num_threads, [&](int64_t from, int64_t to, int64_t) {
    pieces.each(from, to, [&](int64_t piece, int64_t tensor, int64_t start, int64_t stop) {
      const T* const values = static_cast<const T*>(tensors.at(Row(0), tensor)) + start;
      squares[piece] = Sum<C>().add(stop - start, [&](int64_t i, auto count) FIVEFOLD_INLINE {
        const Pack<C> value = load(values + i, count);
        return value * value;
      }).total();
    });
  });
  double total = 0;
  for (const double each : squares) total += each;
  return std::sqrt(total);
}

}  // namespace

// addresses: (8, num_tensors) in the order of Row, sizes: (num_tensors). Parameters are in
// param_type, both moments in moment_type, masters and averages in the type that is computed in.
// settings: lr, beta1, beta2, eps, weight_decay, average_decay. scale may be null.
FIVEFOLD_API void adamw_step(const int64_t* addresses, const int64_t* sizes, int64_t num_tensors,
                             int64_t param_type, int64_t grad_type, int64_t moment_type,
                             int64_t has_master, int64_t has_average, const double* settings,
                             const double* scale, int64_t maximize, int64_t swa,
                             int64_t skip_nonfinite, int64_t num_threads) {
  const Options options = {settings, scale == nullptr ? 1.0 : *scale, maximize != 0, swa != 0,
                     has_average != 0};
  if (skip_nonfinite && !std::isfinite(options.scale)) return;
  const Tensors tensors = {addresses, sizes, num_tensors};
  dispatch(param_type, [&](auto element) {
    step<Compute<decltype(element)>>(tensors, param_type, grad_type, moment_type, has_master,
                                     options, num_threads);
  });
}

// addresses and sizes: (num_tensors); norm: one value.
FIVEFOLD_API void gradient_norm(const int64_t* addresses, const int64_t* sizes,
                                int64_t num_tensors, int64_t type, double* result,
                                int64_t num_threads) {
  const Tensors tensors = {addresses, sizes, num_tensors};
  dispatch(type, [&](auto element) { *result = norm<decltype(element)>(tensors, num_threads); });
}
