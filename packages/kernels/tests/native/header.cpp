// Entry points that show what fivefold.h does.

#include "fivefold.h"

using namespace fivefold;

FIVEFOLD_API void convert(int64_t from, int64_t to, const void* x, void* y, int64_t n) {
  dispatch(from, [&](auto source) {
    dispatch(to, [&](auto target) {
      using S = decltype(source);
      using T = decltype(target);
      if constexpr (std::is_same_v<Compute<S>, Compute<T>>) {
        each_pack<Compute<S>>(n, [&](int64_t i, auto count) {
          store(static_cast<T*>(y) + i, load(static_cast<const S*>(x) + i, count), count);
        });
      }
    });
  });
}

// The sum of x, and of x + 1.
template <class C>
void sum(const C* x, int64_t n, C* total) {
  total[0] = Sum<C>().add(n, [&](int64_t i, auto count) { return load(x + i, count); }).total();
  const auto more = [&](int64_t i, auto count) { return only(load(x + i, count) + 1, count); };
  total[1] = Sum<C>().add(n, more).total();
}

FIVEFOLD_API void sums(int64_t type, const void* x, int64_t n, void* total) {
  if (static_cast<Type>(type) == Type::f64)
    sum(static_cast<const double*>(x), n, static_cast<double*>(total));
  else
    sum(static_cast<const float*>(x), n, static_cast<float*>(total));
}

template <class C>
void exp_and_sigmoid(const C* x, C* e, C* s, int64_t n) {
  each_pack<C>(n, [&](int64_t i, auto count) {
    store(e + i, exp(load(x + i, count)), count);
    store(s + i, sigmoid(load(x + i, count)), count);
  });
}

FIVEFOLD_API void functions(int64_t type, const void* x, void* e, void* s, int64_t n) {
  const auto run = [=](auto c) {
    using C = decltype(c);
    exp_and_sigmoid(static_cast<const C*>(x), static_cast<C*>(e), static_cast<C*>(s), n);
  };
  static_cast<Type>(type) == Type::f64 ? run(double()) : run(float());
}

// Which part does which item, and how many parts there are.
FIVEFOLD_API void parts(int64_t begin, int64_t end, int64_t grain, int64_t threads, int64_t* owner,
                        int64_t* made) {
  *made = parallel_for(begin, end, grain, threads, [=](int64_t from, int64_t to, int64_t part) {
    for (int64_t i = from; i < to; ++i) owner[i] = part;
  });
}

// Adds n * n, one by one, from parts of parts.
FIVEFOLD_API void nested(int64_t n, int64_t* count) {
  std::atomic<int64_t> sum{0};
  parallel_for(0, n, 1, n, [&](int64_t, int64_t, int64_t) {
    parallel_for(0, n, 1, n, [&](int64_t from, int64_t to, int64_t) { sum += to - from; });
  });
  *count += sum;
}

// Two parts that each wait until the other has begun.
FIVEFOLD_API void together(int64_t* seen) {
  std::atomic<int64_t> begun{0};
  parallel_for(0, 2, 1, 2, [&](int64_t, int64_t, int64_t) {
    ++begun;
    while (begun < 2) std::this_thread::yield();
  });
  *seen += begun;
}
