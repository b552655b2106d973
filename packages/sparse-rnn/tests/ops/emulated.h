// The functions of gpu.h on a CPU, so that the very text of the kernel runs there.
//
// Every thread of a grid is a fiber; one runs at a time, until it waits or reads what others write,
// and then another, drawn at random, goes on. Relaxed stores are under way for a while and arrive in
// any order but that of one address; words of 16 bytes are read one by one while others arrive;
// asynchronous copies happen when they are asked for or when they are waited for. Shared memory
// begins as garbage. Wherever blocks wait for each other in vain, the run ends with an error.

#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define GPU_FUNCTION inline
#define GPU_KERNEL inline void
#define GPU_UNROLL
#define GPU_UNROLL_4
#define GPU_NO_UNROLL

namespace emulated {

constexpr size_t kStack = 1 << 16;
constexpr int kLanes = 32;
constexpr int64_t kMostSwitches = 200'000'000;

struct Copy {
  float* to;
  const float* from;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  int block = 0, thread = 0;
  bool waiting = false, done = false;
  std::vector<std::vector<Copy>> copies{1};  // of each commit; the last is open
};

struct Warp {
  float values[2][kLanes];
  int arrived = 0, turn = 0;
};

struct Block {
  std::vector<unsigned> shared;
  std::vector<Warp> warps;
  int arrived = 0;
};

struct Store {
  unsigned *to, value;
  int block;
};

struct Machine {
  uint64_t random = 0;
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;
  std::vector<Store> stores;
  ucontext_t scheduler;
  Fiber* now = nullptr;
  int num_threads = 0;
  void (*kernel)(void*) = nullptr;
  void* arguments = nullptr;

  // Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
  int draw(int below) {
    uint64_t x = random += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return static_cast<int>((x ^ (x >> 31)) % static_cast<uint64_t>(below));
  }
  Block& block() { return blocks[now->block]; }
  void yield() { swapcontext(&now->context, &scheduler); }
  void wait() {
    now->waiting = true;
    yield();
  }
  void wake(int block, int first, int count) {
    for (int i = 0; i < count; ++i) fibers[block * num_threads + first + i].waiting = false;
  }

  void arrive_one() {
    if (stores.empty()) return;
    size_t at = 0;
    unsigned* to = stores[draw(static_cast<int>(stores.size()))].to;
    while (stores[at].to != to) ++at;  // the earliest to this address
    *to = stores[at].value;
    stores.erase(stores.begin() + at);
  }

  void flush(int block) {
    std::vector<Store> rest;
    for (const Store& store : stores) {
      if (store.block == block) *store.to = store.value;
      else rest.push_back(store);
    }
    stores = rest;
  }

  // 0: all came to an end; 1: all wait for each other; 2: they wait without end.
  int64_t run();
};

inline Machine* machine = nullptr;

inline void enter() {
  machine->kernel(machine->arguments);
  machine->now->done = true;
  machine->yield();
}

inline int64_t Machine::run() {
  for (Fiber& fiber : fibers) {
    fiber.stack.resize(kStack);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  std::vector<Fiber*> ready;
  for (int64_t switches = 0;;) {
    ready.clear();
    bool ended = true;
    for (Fiber& fiber : fibers) {
      if (!fiber.done) ended = false;
      if (!fiber.done && !fiber.waiting) ready.push_back(&fiber);
    }
    if (ended) break;
    if (ready.empty()) return 1;
    for (size_t i = ready.size(); i > 1; --i) std::swap(ready[i - 1], ready[draw(static_cast<int>(i))]);
    // Some of them, so that others stay behind.
    ready.resize((ready.size() + 1) / 2);
    for (Fiber* fiber : ready) {
      if (++switches > kMostSwitches) return 2;
      for (int i = draw(4); i > 0; --i) arrive_one();
      now = fiber;
      swapcontext(&scheduler, &fiber->context);
    }
  }
  while (!stores.empty()) arrive_one();
  return 0;
}

// Run a grid; 3 if it wrote beyond its shared memory.
template <class Kernel>
int64_t launch(int64_t blocks, int64_t threads, int64_t shared_bytes, int64_t seed, Kernel kernel) {
  constexpr unsigned kGarbage = 0x7fc0dead;
  constexpr size_t kGuard = 64;
  Machine whole;
  machine = &whole;
  whole.random = static_cast<uint64_t>(seed);
  whole.kernel = [](void* it) { (*static_cast<Kernel*>(it))(); };
  whole.arguments = &kernel;
  whole.num_threads = static_cast<int>(threads);
  whole.blocks.resize(blocks);
  whole.fibers.resize(blocks * threads);
  for (Block& block : whole.blocks) {
    block.shared.assign(shared_bytes / 4 + kGuard, kGarbage);
    block.warps.resize(threads / kLanes);
  }
  for (int64_t i = 0; i < blocks * threads; ++i) {
    whole.fibers[i].block = static_cast<int>(i / threads);
    whole.fibers[i].thread = static_cast<int>(i % threads);
  }
  int64_t status = whole.run();
  for (Block& block : whole.blocks) {
    for (size_t i = 0; i < kGuard; ++i) {
      if (block.shared[shared_bytes / 4 + i] != kGarbage) status = 3;
    }
  }
  machine = nullptr;
  return status;
}

}  // namespace emulated

namespace gpu {

using emulated::machine;

inline int thread() { return machine->now->thread; }
inline int block() { return machine->now->block; }
inline int num_blocks() { return static_cast<int>(machine->blocks.size()); }
inline char* shared() { return reinterpret_cast<char*>(machine->block().shared.data()); }

inline void sync() {
  emulated::Block& block = machine->block();
  if (++block.arrived < machine->num_threads) return machine->wait();
  block.arrived = 0;
  machine->wake(machine->now->block, 0, machine->num_threads);
}

inline float shuffle_xor(float x, int mask) {
  int lane = thread() % emulated::kLanes;
  emulated::Warp& warp = machine->block().warps[thread() / emulated::kLanes];
  float* values = warp.values[warp.turn % 2];
  values[lane] = x;
  if (++warp.arrived < emulated::kLanes) {
    machine->wait();
  } else {
    warp.arrived = 0;
    ++warp.turn;
    machine->wake(machine->now->block, thread() - lane, emulated::kLanes);
  }
  return values[lane ^ mask];
}

template <class To, class From>
To copied(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(x));
  return y;
}
inline unsigned bits(float x) { return copied<unsigned>(x); }
inline float number(unsigned x) { return copied<float>(x); }
inline float from_half(unsigned short x) { return copied<_Float16>(x); }
inline unsigned short to_half(float x) {
  return copied<unsigned short>(static_cast<_Float16>(x));
}
inline unsigned short to_bfloat16(float x) {
  unsigned word = bits(x);
  if (x != x) return 0x7fff;
  return static_cast<unsigned short>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}
inline void opaque(unsigned&) {}

struct alignas(16) Quad {
  unsigned at[4];
};

inline unsigned load_relaxed(const unsigned* from) {
  machine->yield();
  return *from;
}

inline Quad load_relaxed(const Quad* from) {
  Quad x;
  machine->yield();
  for (int i = 0; i < 4; ++i) {
    if (machine->draw(8) == 0) machine->yield();
    x.at[i] = from->at[i];
  }
  return x;
}

inline void store_relaxed(unsigned* to, unsigned x) {
  machine->stores.push_back({to, x, machine->now->block});
}

inline void store_system(unsigned* to, unsigned x) { *to = x; }

inline void arrive(unsigned* counter) {
  machine->flush(machine->now->block);
  ++*counter;
}

inline unsigned load_acquire(const unsigned* from) {
  machine->yield();
  return *from;
}

inline void copy_async(float* to, const float* from) {
  if (machine->draw(2)) *to = *from;
  else machine->now->copies.back().push_back({to, from});
}
inline void commit_async() { machine->now->copies.emplace_back(); }
inline void wait_async() {
  auto& copies = machine->now->copies;
  while (copies.size() > 2) {
    for (const emulated::Copy& copy : copies.front()) *copy.to = *copy.from;
    copies.erase(copies.begin());
  }
}

}  // namespace gpu
