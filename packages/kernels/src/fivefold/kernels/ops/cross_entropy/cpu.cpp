// cross_entropy on a CPU: a row is read once for its log-sum-exp and once for its gradient.
//
// Legend: N tokens, V classes.

#include <limits>

#include "fivefold.h"

using namespace fivefold;

namespace {

// Values that stay in the first cache while their maximum and then their exponentials are taken.
constexpr int64_t kBlock = 2048;
// Values for which another thread is worth waking.
constexpr int64_t kGrain = 1 << 15;

template <class C>
constexpr C kInfinity = std::numeric_limits<C>::infinity();

// A pack whose lanes past `count` are -infinity: of no likelihood.
template <class T, class Count>
FIVEFOLD_INLINE inline Pack<Compute<T>> load_logits(const T* from, Count count) {
  using C = Compute<T>;
  Pack<C> x = load(from, count);
  for (int64_t lane = count; lane < kLanes<C>; ++lane) x[lane] = -kInfinity<C>;
  return x;
}

template <class T>
Compute<T> highest(const T* x, int64_t n) {
  using C = Compute<T>;
  Pack<C> found = splat(-kInfinity<C>);
  each_pack<C>(n, [&](int64_t i, auto count) FIVEFOLD_INLINE {
    const Pack<C> values = load_logits(x + i, count);
    found = select<Pack<C>>(values > found, values, found);
  });
  C most = found[0];
  for (int64_t lane = 1; lane < kLanes<C>; ++lane) most = std::max(most, found[lane]);
  return most;
}

template <class T>
Compute<T> log_sum_exp(const T* x, int64_t num_classes) {
  using C = Compute<T>;
  C top = -kInfinity<C>, sum = 0;
  for (int64_t start = 0; start < num_classes; start += kBlock) {
    const T* block = x + start;
    const int64_t n = std::min(kBlock, num_classes - start);
    const C raised = std::max(top, highest(block, n));
    // Where there is nothing but -infinity yet, exp(-inf) and not exp(-inf + inf).
    const C base = raised == -kInfinity<C> ? 0 : raised;
    Sum<C> exps;
    exps.add(n, [&](int64_t i, auto count) FIVEFOLD_INLINE {
      return exp(load_logits(block + i, count) - base);
    });
    sum = sum * std::exp(top - base) + exps.total();
    top = raised;
  }
  return top + std::log(sum);
}

// The sum of w[c] (x[c] - shift).
template <class T>
Compute<T> weighted_sum(
    const T* x, const Compute<T>* weight, Compute<T> shift, int64_t num_classes) {
  using C = Compute<T>;
  Sum<C> sum;
  sum.add(num_classes, [&](int64_t i, auto count) FIVEFOLD_INLINE {
    Pack<C> terms = load(x + i, count) - shift;
    for (int64_t lane = count; lane < kLanes<C>; ++lane) terms[lane] = 0;
    return weight == nullptr ? terms : terms * load(weight + i, count);
  });
  return sum.total();
}

template <class T>
struct Loss {
  using C = Compute<T>;
  int64_t num_classes;
  const C* weight;  // of the classes, null for ones
  C total_weight, smoothing, z_loss;

  C share() const { return smoothing / num_classes; }
  C hit(int64_t y) const { return (1 - smoothing) * (weight == nullptr ? C(1) : weight[y]); }

  void forward(const T* x, int64_t y, C* loss, C* lse) const {
    *lse = log_sum_exp(x, num_classes);
    const C picked = load_one(x + y);
    *loss = hit(y) * (*lse - picked);
    if (smoothing != 0) {
      // A shift that keeps the sum of logits small beside what it is subtracted from.
      const C shift = picked > -kInfinity<C> ? picked : C(0);
      const C sum = weighted_sum(x, weight, shift, num_classes);
      *loss += share() * (total_weight * (*lse - shift) - sum);
    }
    *loss += z_loss * *lse * *lse;
  }

  void backward(const T* x, int64_t y, C dloss, C lse, T* dx) const {
    const C slope = dloss * (hit(y) + share() * total_weight + 2 * z_loss * lse);
    const C shared = dloss * share();
    const auto gradient = [&](int64_t i, auto count) FIVEFOLD_INLINE {
      Pack<C> d = exp(load(x + i, count) - lse) * slope;
      if (smoothing != 0) d -= weight == nullptr ? splat(shared) : shared * load(weight + i, count);
      return d;
    };
    Pack<C> target = gradient(y, int64_t(1));
    target[0] -= dloss * hit(y);
    each_pack<C>(num_classes, [&](int64_t i, auto count) FIVEFOLD_INLINE {
      store(dx + i, gradient(i, count), count);
    });
    store(dx + y, target, int64_t(1));
  }
};

int64_t rows_of(int64_t num_classes) { return std::max<int64_t>(1, kGrain / num_classes); }

}  // namespace

FIVEFOLD_API void cross_entropy_forward(
    int64_t type, const void* logits, const int64_t* target, const void* weight, void* loss,
    void* lse, int64_t num_tokens, int64_t num_classes, int64_t row_stride, int64_t ignore_index,
    double total_weight, double smoothing, double z_loss, int64_t num_threads) {
  dispatch(type, [&](auto element) {
    using T = decltype(element);
    using C = Compute<T>;
    const Loss<T> loss_of{num_classes, static_cast<const C*>(weight), C(total_weight), C(smoothing),
                          C(z_loss)};
    const int64_t grain = rows_of(num_classes);
    parallel_for(0, num_tokens, grain, num_threads, [&](int64_t from, int64_t to, int64_t) {
      for (int64_t n = from; n < to; ++n) {
        C& row_loss = static_cast<C*>(loss)[n];
        C& row_lse = static_cast<C*>(lse)[n];
        row_loss = row_lse = 0;
        const T* x = static_cast<const T*>(logits) + n * row_stride;
        if (target[n] != ignore_index) loss_of.forward(x, target[n], &row_loss, &row_lse);
      }
    });
  });
}

FIVEFOLD_API void cross_entropy_backward(
    int64_t type, const void* dloss, const void* logits, const int64_t* target, const void* weight,
    const void* lse, void* dlogits, int64_t num_tokens, int64_t num_classes, int64_t row_stride,
    int64_t ignore_index, double total_weight, double smoothing, double z_loss,
    int64_t num_threads) {
  dispatch(type, [&](auto element) {
    using T = decltype(element);
    using C = Compute<T>;
    const Loss<T> loss_of{num_classes, static_cast<const C*>(weight), C(total_weight), C(smoothing),
                          C(z_loss)};
    const int64_t grain = rows_of(num_classes);
    parallel_for(0, num_tokens, grain, num_threads, [&](int64_t from, int64_t to, int64_t) {
      for (int64_t n = from; n < to; ++n) {
        const T* x = static_cast<const T*>(logits) + n * row_stride;
        T* dx = static_cast<T*>(dlogits) + n * num_classes;
        if (target[n] == ignore_index) {
          std::memset(dx, 0, num_classes * sizeof(T));
        } else {
          loss_of.backward(x, target[n], static_cast<const C*>(dloss)[n],
                           static_cast<const C*>(lse)[n], dx);
        }
      }
    });
  });
}
