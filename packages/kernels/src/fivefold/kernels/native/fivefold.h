// What C++ kernels share: element types, packs of values in vector registers, threads.
//
// Packs are the vector types of GCC and Clang: arithmetic and comparison work on all lanes, and the
// compiler cuts them to whatever registers the CPU has. Sums over packs are the only place where
// additions are made in another order than they are written.

#pragma once

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

// An entry point: int64_t, double and pointers in, nothing out.
#define FIVEFOLD_API extern "C" __attribute__((visibility("default")))

namespace fivefold {

// ---- Elements -----------------------------------------------------------------------------------

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

// As in fivefold.kernels.native.TYPES.
enum class Type : int64_t { f64 = 0, f32 = 1, bf16 = 2, f16 = 3 };

// In what a kernel computes with elements of a type.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

// f(T()) for the element type T of that number.
template <class F>
inline void dispatch(int64_t type, F f) {
  switch (static_cast<Type>(type)) {
    case Type::f64: return f(double());
    case Type::f32: return f(float());
    case Type::bf16: return f(bfloat16());
    case Type::f16: return f(float16());
  }
}

// ---- Packs --------------------------------------------------------------------------------------

// Bytes of a pack: one register of AVX-512, two of AVX2, four of NEON or SSE.
constexpr int kPackBytes = 64;

template <class C>
struct PackOf;
template <>
struct PackOf<float> {
  typedef float type __attribute__((vector_size(kPackBytes)));
  typedef uint32_t bits __attribute__((vector_size(kPackBytes)));
};
template <>
struct PackOf<double> {
  typedef double type __attribute__((vector_size(kPackBytes)));
  typedef uint64_t bits __attribute__((vector_size(kPackBytes)));
};
// kLanes<C> values of type C.
template <class C>
using Pack = typename PackOf<C>::type;
template <class C>
using PackBits = typename PackOf<C>::bits;
template <class C>
constexpr int64_t kLanes = kPackBytes / sizeof(C);

typedef uint16_t HalfBits __attribute__((vector_size(kPackBytes / 2)));

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class C>
inline Pack<C> splat(C value) {
  return value - Pack<C>{};
}

// Where the mask's lane is all ones, a; elsewhere b.
template <class V>
inline V select(decltype(V{} < V{}) mask, V a, V b) {
  return mask ? a : b;
}

// Lane by lane, which compilers turn into one instruction where there is one; GCC 12 does not do so
// for __builtin_convertvector.
inline PackBits<float> widen(HalfBits half) {
  PackBits<float> wide;
  for (int64_t i = 0; i < kLanes<float>; ++i) wide[i] = half[i];
  return wide;
}
inline HalfBits narrow(PackBits<float> wide) {
  HalfBits half;
  for (int64_t i = 0; i < kLanes<float>; ++i) half[i] = static_cast<uint16_t>(wide[i]);
  return half;
}

inline Pack<float> to_float(HalfBits half, bfloat16) {
  return bit_cast<Pack<float>>(widen(half) << 16);
}

// Half's exponent and fraction move to where float has them and the bias is mended by a product,
// which also makes subnormals normal.
inline Pack<float> to_float(HalfBits half, float16) {
  const PackBits<float> h = widen(half);
  const PackBits<float> sign = (h & 0x8000u) << 16;
  const PackBits<float> rest = (h & 0x7fffu) << 13;
  const Pack<float> scaled = bit_cast<Pack<float>>(rest) * 0x1p112f;
  const PackBits<float> special = rest | 0x7f800000u;  // infinity and NaN
  const PackBits<float> usual = bit_cast<PackBits<float>>(scaled);
  return bit_cast<Pack<float>>(
      sign | select<PackBits<float>>(rest >= 0x0f800000u, special, usual));
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline HalfBits from_float(Pack<float> x, bfloat16) {
  const PackBits<float> bits = bit_cast<PackBits<float>>(x);
  const PackBits<float> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const PackBits<float> nan = PackBits<float>{} + 0x7fc0u;
  return narrow(select<PackBits<float>>(x != x, nan, rounded));
}

// As above. Adding a power of two makes the adder round subnormal results where half ends.
inline HalfBits from_float(Pack<float> x, float16) {
  const PackBits<float> bits = bit_cast<PackBits<float>>(x);
  const PackBits<float> sign = (bits >> 16) & 0x8000u;
  const PackBits<float> magnitude = bits & 0x7fffffffu;
  const PackBits<float> normal =
      (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const PackBits<float> subnormal =
      bit_cast<PackBits<float>>(bit_cast<Pack<float>>(magnitude) + 0.5f) - 0x3f000000u;
  PackBits<float> half = select<PackBits<float>>(magnitude < 0x38800000u, subnormal, normal);
  const PackBits<float> infinity = PackBits<float>{} + 0x7c00u;
  half = select<PackBits<float>>(magnitude >= 0x477ff000u, infinity, half);
  half = select<PackBits<float>>(magnitude > 0x7f800000u, infinity | 0x200u, half);
  return narrow(sign | half);
}

// kLanes<Compute<T>> elements, widened.
template <class T>
inline Pack<Compute<T>> load(const T* from) {
  if constexpr (sizeof(T) == 2) {
    HalfBits half;
    std::memcpy(&half, from, sizeof(half));
    return to_float(half, T());
  } else {
    Pack<T> x;
    std::memcpy(&x, from, sizeof(x));
    return x;
  }
}

// The first `count` elements, then zeros.
template <class T>
inline Pack<Compute<T>> load(const T* from, int64_t count) {
  T padded[kLanes<Compute<T>>] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return load(padded);
}

template <class T>
inline void store(T* to, Pack<Compute<T>> x) {
  if constexpr (sizeof(T) == 2) {
    const HalfBits half = from_float(x, T());
    std::memcpy(to, &half, sizeof(half));
  } else {
    std::memcpy(to, &x, sizeof(x));
  }
}

// The first `count` elements; what follows stays as it is.
template <class T>
inline void store(T* to, Pack<Compute<T>> x, int64_t count) {
  T padded[kLanes<Compute<T>>];
  store(padded, x);
  std::memcpy(to, padded, count * sizeof(T));
}

// One element.
template <class T>
inline Compute<T> load_one(const T* from) {
  return load(from, 1)[0];
}
inline float load_one(const float* from) { return *from; }
inline double load_one(const double* from) { return *from; }

// ---- Loops over packs ---------------------------------------------------------------------------

// Every function and lambda that takes packs needs it in hot loops.
#define FIVEFOLD_INLINE __attribute__((always_inline))

// How many elements from an index on belong to a pack: all lanes, known to the compiler, or fewer.
template <class C>
using Whole = std::integral_constant<int64_t, kLanes<C>>;

template <class T>
inline Pack<Compute<T>> load(const T* from, Whole<Compute<T>>) {
  return load(from);
}
template <class T>
inline void store(T* to, Pack<Compute<T>> x, Whole<Compute<T>>) {
  store(to, x);
}

// x in the lanes that count, 0 in the others.
template <class V, int64_t kCount>
FIVEFOLD_INLINE inline V only(V x, std::integral_constant<int64_t, kCount>) {
  return x;
}
template <class V>
inline V only(V x, int64_t count) {
  V kept = {};
  std::memcpy(&kept, &x, count * sizeof(x[0]));
  return kept;
}

// f(i, count) for the packs of n values: i is a pack's first index, count its values (see Whole).
template <class C, class F>
FIVEFOLD_INLINE inline void each_pack(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes<C> <= n; i += kLanes<C>) f(i, Whole<C>());
  if (i < n) f(i, n - i);
}

// Sums that are kept apart, so that an addition need not wait for the one before.
constexpr int kParts = 4;

// f(i, count, part) as each_pack, with part = 0 to kParts - 1 in turns.
template <class C, class F>
FIVEFOLD_INLINE inline void each_part(int64_t n, F f) {
  constexpr int64_t step = kParts * kLanes<C>;
  int64_t i = 0;
  for (; i + step <= n; i += step)
    for (int part = 0; part < kParts; ++part) f(i + part * kLanes<C>, Whole<C>(), part);
  each_pack<C>(n - i, [&](int64_t rest, auto count) FIVEFOLD_INLINE { f(i + rest, count, 0); });
}

// The sum of the lanes: each half onto the other, in registers.
template <class C, int64_t kCount, class V>
FIVEFOLD_INLINE inline C add_lanes(V x) {
  if constexpr (kCount == 2) {
    return x[0] + x[1];
  } else {
    typedef C Half __attribute__((vector_size(kCount / 2 * sizeof(C))));
    Half low, high;
    std::memcpy(&low, &x, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof(low), sizeof(high));
    return add_lanes<C, kCount / 2>(low + high);
  }
}

// A sum over packs.
template <class C>
struct Sum {
  Pack<C> parts[kParts] = {};

  // Adds f(i, count) for the packs of n values; empty lanes count, so f gives 0 there.
  template <class F>
  FIVEFOLD_INLINE inline Sum& add(int64_t n, F f) {
    each_part<C>(n, [&](int64_t i, auto count, int part) FIVEFOLD_INLINE {
      parts[part] += f(i, count);
    });
    return *this;
  }

  C total() const { return add_lanes<C, kLanes<C>>((parts[0] + parts[1]) + (parts[2] + parts[3])); }
};

// ---- Functions ----------------------------------------------------------------------------------

// e to the x within 1 unit in the last place: x = n ln 2 + r, a polynomial in r, and 2^n in two
// factors so that results may be subnormal or infinite.
inline Pack<float> exp(Pack<float> x) {
  const Pack<float> low = splat(-104.0f), high = splat(89.0f);
  x = select<Pack<float>>(x < low, low, x);
  x = select<Pack<float>>(x > high, high, x);
  const float round = 0x1.8p23f;
  const Pack<float> shifted = x * 0x1.715476p+0f + round;
  const Pack<float> n = shifted - round;
  const Pack<float> r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  Pack<float> p = r * 0x1.a01a02p-13f + 0x1.6c16c2p-10f;
  p = p * r + 0x1.111112p-7f;
  p = p * r + 0x1.555556p-5f;
  p = p * r + 0x1.555556p-3f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  typedef int32_t Integers __attribute__((vector_size(kPackBytes)));
  const Integers whole = __builtin_convertvector(n, Integers);
  const Integers half = whole >> 1;
  const Pack<float> first = bit_cast<Pack<float>>((half + 127) << 23);
  const Pack<float> second = bit_cast<Pack<float>>((whole - half + 127) << 23);
  return p * first * second;
}

inline Pack<double> exp(Pack<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <class P>
inline P sigmoid(P x) {
  return 1 / (1 + exp(-x));
}

// ---- Threads ------------------------------------------------------------------------------------

// Workers of one library in one process, kept from call to call: a new thread costs up to 100
// microseconds. A forked child has none of its parent's threads and begins anew.
class Workers {
 public:
  using Run = void (*)(void* job, int64_t part);

  // run(job, part) for part = 0 to parts - 1, on this thread and on workers; ends when all did.
  // A caller that comes while the workers serve another one, or from within, does all by itself.
  static void run_all(Run run, void* job, int64_t parts) {
    Workers* workers = here();
    if (parts > 1 && workers != nullptr && !workers->busy_.exchange(true)) {
      workers->lead(run, job, parts);
      workers->busy_.store(false);
    } else {
      for (int64_t part = 0; part < parts; ++part) run(job, part);
    }
  }

 private:
  // Never freed: workers may be asleep in it when the process ends.
  static Workers* here() {
    static std::atomic<Workers*> current{nullptr};
    static std::once_flag once;
    // Nothing of the parent's is touched, not even freed: any of its locks may have been held.
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); }); });
    Workers* found = current.load();
    if (found == nullptr) {
      Workers* made = new (std::nothrow) Workers;
      if (current.compare_exchange_strong(found, made)) return made;
      delete made;  // of another thread's making
    }
    return found;
  }

  void lead(Run run, void* job, int64_t parts) {
    hire(parts - 1);
    keep_off_this_cpu();
    {
      std::lock_guard<std::mutex> guard(mutex_);
      run_ = run;
      job_ = job;
      next_ = 0;
      parts_ = parts;
      unfinished_.store(parts);
      calls_.fetch_add(1);
    }
    wake_.notify_all();
    // What no worker has taken yet is done here, so a late one costs nothing.
    while (take_part()) {
    }
    for (int64_t spins = 0; unfinished_.load() != 0; ++spins) {
      rest();
      if (spins % 64 == 63) std::this_thread::yield();  // to the worker that is waited for, perhaps
    }
  }

  void hire(int64_t count) {
    try {
      workers_.reserve(count);
      while (static_cast<int64_t>(workers_.size()) < count) {
        std::thread worker([this] { work(); });
        workers_.push_back(worker.native_handle());
        worker.detach();
      }
    } catch (const std::exception&) {  // no more threads to be had: the others do more
    }
  }

  // On a busy machine a scheduler leaves workers on the CPU of the thread that wakes them, where
  // they wait for it to end and do nothing for it.
  void keep_off_this_cpu() {
#ifdef __linux__
    const int cpu = sched_getcpu();
    if (cpu == callers_cpu_ && workers_.size() == num_placed_) return;
    cpu_set_t others;
    if (sched_getaffinity(0, sizeof(others), &others) != 0) return;
    CPU_CLR(cpu, &others);
    if (CPU_COUNT(&others) == 0) return;
    for (const auto worker : workers_) pthread_setaffinity_np(worker, sizeof(others), &others);
    callers_cpu_ = cpu;
    num_placed_ = workers_.size();
#endif
  }

  void work() {
    uint64_t seen = 0;
    for (;;) {
      using Clock = std::chrono::steady_clock;
      const Clock::time_point end = Clock::now() + kPatience;
      for (int64_t spins = 0; calls_.load() == seen; ++spins) {
        rest();
        if (spins % 64 == 63 && Clock::now() > end) break;
      }
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return calls_.load() != seen; });
        seen = calls_.load();
      }
      while (take_part()) {
      }
    }
  }

  // Whether there was a part to do.
  bool take_part() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (next_ == parts_) return false;
    const int64_t part = next_++;
    const Run run = run_;
    void* const job = job_;
    lock.unlock();
    run(job, part);
    unfinished_.fetch_sub(1);
    return true;
  }

  // Some nanoseconds.
  static void rest() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }

  // How long a worker looks out before it sleeps: from one kernel of a model to the next. To wake
  // one up may take as long.
  static constexpr std::chrono::microseconds kPatience{200};

  std::atomic<bool> busy_{false};  // serving a caller, who alone uses what comes next
  std::vector<std::thread::native_handle_type> workers_;
  [[maybe_unused]] int callers_cpu_ = -1;
  [[maybe_unused]] size_t num_placed_ = 0;

  std::condition_variable wake_;
  std::mutex mutex_;  // guards what follows
  Run run_ = nullptr;
  void* job_ = nullptr;
  int64_t next_ = 0, parts_ = 0;
  std::atomic<int64_t> unfinished_{0};
  std::atomic<uint64_t> calls_{0};
};

// f(from, to, part) on parts of [begin, end) that cover it, at most num_threads and of at least
// `grain` items each; returns the number of parts, which the arguments alone decide. Parts run on
// the calling thread and on workers; a single one stays where it is.
template <class F>
inline int64_t parallel_for(int64_t begin, int64_t end, int64_t grain, int64_t num_threads, F f) {
  struct Job {
    F& f;
    int64_t begin, items, parts;

    int64_t bound(int64_t part) const {
      return begin + items / parts * part + std::min(part, items % parts);
    }
  };
  const int64_t items = std::max<int64_t>(end - begin, 0);
  const int64_t most = items / std::max<int64_t>(grain, 1);
  Job job{f, begin, items, std::max<int64_t>(1, std::min(num_threads, most))};
  const auto run = [](void* pointer, int64_t part) {
    const Job& job = *static_cast<Job*>(pointer);
    job.f(job.bound(part), job.bound(part + 1), part);
  };
  Workers::run_all(run, &job, job.parts);
  return job.parts;
}

}  // namespace fivefold
