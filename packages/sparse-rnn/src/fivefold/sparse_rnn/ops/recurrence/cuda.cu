// The persistent recurrence: one launch for all steps, with the nonzeros in registers.
//
// A block has some hidden units with all their rows for the whole sequence; its warps keep the rows'
// nonzeros in registers, and what has no room there in shared memory. A step: take the vector (the
// states h, or backwards the gradients of all gates) from the slot of the step before, as it comes;
// multiply; compute the units' gates; publish what comes out in this step's slot.
//
// Exchange (Lamport): a slot begins filled with a bit pattern that no published value has. Who reads
// looks at each word until it is another: no flag, no fence, no barrier of the grid. A slot is
// written once a launch. kBarrier publishes the same words and waits at a barrier instead.
//
// Order within a block, for shared memory: [fetch] sync [multiply] sync [units] and again. Between
// two syncs the vector is only written (fetch) or only read (multiply), sums likewise.
//
// Legend: T steps, B sequences, H units, G gates, R = G*H rows, C numbers of the vector (H, backwards
// R), W sequences side by side (a group), S saved values.

#ifdef __CUDACC__
#include "gpu.h"
#endif

constexpr int kCell = CELL;
constexpr bool kBackward = BACKWARD, kBarrier = BARRIER, kWide = WIDE;
constexpr int kKind = KIND, kSource = SOURCE;
constexpr int kWidth = WIDTH, kHidden = HIDDEN, kUnits = UNITS, kWarps = WARPS;
constexpr int kPositions = POSITIONS, kPairs = PAIRS, kRegisterPairs = REGISTER_PAIRS;
constexpr int kThreads = 32 * kWarps;
constexpr int kRegisterWords = kRegisterPairs * (kWide ? 2 : 1);
constexpr int kMaxWords = kRegisterWords > 0 ? kRegisterWords : 1;

namespace recurrence {

enum { kTanh = 0, kRelu = 1, kLstm = 2, kGru = 3 };  // cells, as in cells.py
enum { kHalf = 0, kBfloat16 = 1, kFloat = 2 };       // dtypes of values

constexpr int kGates = kCell == kLstm ? 4 : kCell == kGru ? 3 : 1;
constexpr int kSaved = kCell == kLstm ? 5 : kCell == kGru ? 4 : 0;
constexpr int kColumns = kBackward ? kGates * kHidden : kHidden;
// Numbers that a step reads of each unit and sequence; see input().
constexpr int kInputs = !kBackward ? kGates : kSaved ? kSaved + 2 : 2;

constexpr int kVectorWords = (kColumns * kWidth + 3) / 4 * 4;
constexpr int kItems = kUnits * kWidth;
constexpr int kWordsPerPair = kWide ? 2 : 1;

// Shared memory, in words from its start; what depends on the batch comes last.
constexpr int kSums = kVectorWords;
constexpr int kStage = kSums + kPositions * kWarps * kWidth;
constexpr int kUnitTable = kStage + 2 * kItems * kInputs;
constexpr int kPositionTable = kUnitTable + kUnits;
constexpr int kRowTable = kPositionTable + kUnits;
constexpr int kBiasTable = kRowTable + kUnits * kGates;
constexpr int kBaseTable = kBiasTable + kUnits;
constexpr int kFailed = kBaseTable + kPositions * kWarps;
constexpr int kOverflow = (kFailed + 1 + 3) / 4 * 4;
constexpr int kState = kOverflow + (kPairs - kRegisterPairs) * kWordsPerPair * kThreads;

constexpr unsigned kEmpty = 0xffffffffu;  // a NaN that no arithmetic makes
constexpr unsigned kNan = 0x7fc00000u;
// Loads of 16 bytes that a thread has under way, as many as there are registers for.
constexpr int kInFlight = kRegisterWords > 160 ? 4 : 8;

struct Problem {
  // The matrix: the words of each block, pair and thread; for each block its units (-1: none), their
  // places in the vector, where the sums of their rows are (first | count << 16), and for each run
  // of pairs the bytes that come on top of its offsets.
  const unsigned* words;
  const int *units, *positions, *rows, *bases;
  unsigned* slots;    // (T + 1, groups, kVectorWords)
  unsigned* control;  // whether to give up; how many blocks have arrived
  unsigned* told;     // the same for the host
  const float *gates, *bias, *dy, *y_in, *saved_in, *before;
  const long long* lengths;
  float *state, *memory;  // (B, H): h and c, or their gradients; replaced
  float *y, *saved, *dgates, *drows;
  int num_steps, batch;
  bool descending;  // from the last step to the first
  int patience;     // looks at a word before giving up
};

GPU_FUNCTION float* floats(int word) { return reinterpret_cast<float*>(gpu::shared()) + word; }
GPU_FUNCTION int* ints(int word) { return reinterpret_cast<int*>(gpu::shared()) + word; }

GPU_FUNCTION float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// ------------------------------------------------------------------------------------ the matrix

GPU_FUNCTION float value_at(const void* values, int at) {
  if (kSource == kFloat) return static_cast<const float*>(values)[at];
  unsigned short half = static_cast<const unsigned short*>(values)[at];
  return kSource == kHalf ? gpu::from_half(half) : gpu::number(static_cast<unsigned>(half) << 16);
}

// As pack.py has it: the offset in the low half and the value in the high one, or a word for each.
GPU_FUNCTION void make_word(const void* values, int source, unsigned offset, unsigned* to) {
  float value = source < 0 ? 0.0f : value_at(values, source);
  if (kWide) {
    to[0] = offset;
    to[kThreads] = gpu::bits(value);
  } else {
    unsigned half = kKind == kHalf ? gpu::to_half(value) : gpu::to_bfloat16(value);
    to[0] = half << 16 | offset;
  }
}

// A word of this thread.
GPU_FUNCTION unsigned word_of(const Problem& p, int number) {
  long long first = static_cast<long long>(gpu::block()) * kPairs * kWordsPerPair;
  return p.words[(first + number) * kThreads + gpu::thread()];
}

struct Sums {
  float at[4];
};

GPU_FUNCTION void multiply(const unsigned* words, int base, Sums& sums) {
  unsigned offset = kWide ? words[0] : words[0] & 0xffffu;
  float value = kWide                ? gpu::number(words[1])
                : kKind == kBfloat16 ? gpu::number(words[0] & 0xffff0000u)
                                     : gpu::from_half(static_cast<unsigned short>(words[0] >> 16));
  const char* from = gpu::shared() + offset + (kBackward ? base : 0);
  if (kWidth == 4) {
    struct alignas(16) Four { float at[4]; };
    Four x = *reinterpret_cast<const Four*>(from);
    GPU_UNROLL
    for (int j = 0; j < 4; ++j) sums.at[j] = fmaf(value, x.at[j], sums.at[j]);
  } else if (kWidth == 2) {
    struct alignas(8) Two { float at[2]; };
    Two x = *reinterpret_cast<const Two*>(from);
    GPU_UNROLL
    for (int j = 0; j < 2; ++j) sums.at[j] = fmaf(value, x.at[j], sums.at[j]);
  } else {
    sums.at[0] = fmaf(value, *reinterpret_cast<const float*>(from), sums.at[0]);
  }
}

// Sums of the lanes: halves of the warp share the sequences out, then each adds its own.
GPU_FUNCTION void store_sums(Sums& sums, float* to) {
  int lane = gpu::thread() % 32, mask = 16;
  GPU_UNROLL
  for (int count = kWidth; count > 1; count /= 2, mask /= 2) {
    bool upper = lane & mask;
    GPU_UNROLL
    for (int j = 0; j < count / 2; ++j) {
      float keep = upper ? sums.at[j + count / 2] : sums.at[j];
      float send = upper ? sums.at[j] : sums.at[j + count / 2];
      sums.at[j] = keep + gpu::shuffle_xor(send, mask);
    }
  }
  GPU_UNROLL
  for (; mask > 0; mask /= 2) sums.at[0] += gpu::shuffle_xor(sums.at[0], mask);
  constexpr int kLanes = 32;
  if (lane % (kLanes / kWidth) == 0) to[lane / (kLanes / kWidth)] = sums.at[0];
}

// One run of pairs of each warp: a row or a part of one.
GPU_FUNCTION void run(unsigned* words, int position, int first, int count) {
  int warp = gpu::thread() / 32;
  int base = kBackward ? ints(kBaseTable)[position * kWarps + warp] : 0;
  Sums sums = {};
  GPU_UNROLL
  for (int i = 0; i < count; ++i) {
    if (first + i < kRegisterPairs) {
      unsigned* word = words + (first + i) * kWordsPerPair;
      gpu::opaque(word[0]);
      if (kWide) gpu::opaque(word[1]);
      multiply(word, base, sums);
    }
  }
  int begin = first > kRegisterPairs ? first : kRegisterPairs;
  GPU_UNROLL_4
  for (int i = begin; i < first + count; ++i) {
    const unsigned* kept = reinterpret_cast<const unsigned*>(floats(kOverflow));
    unsigned word[2];
    GPU_UNROLL
    for (int part = 0; part < kWordsPerPair; ++part) {
      word[part] = kept[((i - kRegisterPairs) * kWordsPerPair + part) * kThreads + gpu::thread()];
    }
    multiply(word, base, sums);
  }
  store_sums(sums, floats(kSums) + (position * kWarps + warp) * kWidth);
}

// ---------------------------------------------------------------------------------- the exchange

// Where a step's vector is published.
GPU_FUNCTION unsigned* slot(const Problem& p, int step, int group) {
  long long groups = (p.batch + kWidth - 1) / kWidth;
  return p.slots + (step * groups + group) * kVectorWords;
}

GPU_FUNCTION void give_up(const Problem& p) {
  *ints(kFailed) = 1;
  gpu::store_relaxed(p.control, 1);
  gpu::store_system(p.told, 1);
}

GPU_FUNCTION bool is_whole(const gpu::Quad& x) {
  return x.at[0] != kEmpty && x.at[1] != kEmpty && x.at[2] != kEmpty && x.at[3] != kEmpty;
}

// Take a vector into shared memory, each 16 bytes as soon as all of them are there.
GPU_FUNCTION void fetch(const Problem& p, const unsigned* from) {
  constexpr int kQuadWords = 4;
  const gpu::Quad* quads = reinterpret_cast<const gpu::Quad*>(from);
  gpu::Quad* to = reinterpret_cast<gpu::Quad*>(gpu::shared());
  GPU_NO_UNROLL
  for (int first = gpu::thread(); first < kVectorWords / kQuadWords; first += kInFlight * kThreads) {
    unsigned missing = 0;
    GPU_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * kThreads < kVectorWords / kQuadWords) missing |= 1u << i;
    }
    int looks = 0;
    GPU_NO_UNROLL
    while (missing) {
      gpu::Quad x[kInFlight];
      GPU_UNROLL
      for (int i = 0; i < kInFlight; ++i) {
        if (missing >> i & 1) x[i] = gpu::load_relaxed(quads + first + i * kThreads);
      }
      GPU_UNROLL
      for (int i = 0; i < kInFlight; ++i) {
        if ((missing >> i & 1) && (kBarrier || is_whole(x[i]))) {
          to[first + i * kThreads] = x[i];
          missing &= ~(1u << i);
        }
      }
      // Others that gave up will never publish.
      bool hopeless = ++looks % 256 == 0 && gpu::load_relaxed(p.control) != 0;
      if (missing && (hopeless || looks > p.patience)) return give_up(p);
    }
  }
}

GPU_FUNCTION void publish(unsigned* slot, int column, int j, float x) {
  unsigned word = gpu::bits(x);
  gpu::store_relaxed(slot + column * kWidth + j, word == kEmpty ? kNan : word);
}

// Wait at the grid's barrier until so many have arrived.
GPU_FUNCTION void await(const Problem& p, unsigned arrivals) {
  if (gpu::thread() == 0) {
    int looks = 0;
    GPU_NO_UNROLL
    while (gpu::load_acquire(p.control + 1) < arrivals) {
      bool hopeless = ++looks % 256 == 0 && gpu::load_relaxed(p.control) != 0;
      if (hopeless || looks > p.patience) {
        give_up(p);
        break;
      }
    }
  }
  gpu::sync();
}

// ------------------------------------------------------------------------------------- the units

struct Item {
  int number, local, j, unit, b;  // j within the group, b of all sequences
  long long at;                   // t * B + b
};

GPU_FUNCTION Item item_of(const Problem& p, int number, int t, int group) {
  Item item;
  item.number = number;
  item.local = number / kWidth;
  item.j = number % kWidth;
  item.unit = ints(kUnitTable)[item.local];
  item.b = group * kWidth + item.j;
  item.at = static_cast<long long>(t) * p.batch + item.b;
  return item;
}

GPU_FUNCTION const float* input(const Problem& p, const Item& item, int i) {
  if (!kBackward) return p.gates + (item.at * kGates + i) * kHidden + item.unit;
  long long one = item.at * kHidden + item.unit;
  if (i == 0) return p.dy + one;
  if (!kSaved) return p.y_in + one;
  if (i == kSaved + 1) return p.before + one;
  return p.saved_in + (item.at * kSaved + i - 1) * kHidden + item.unit;
}

// Ask for what a step's units read; the same thread uses it, so no barrier is needed.
GPU_FUNCTION void prefetch(const Problem& p, int t, int group, int parity) {
  GPU_NO_UNROLL
  for (int number = gpu::thread(); number < kItems; number += kThreads) {
    Item item = item_of(p, number, t, group);
    if (item.unit < 0 || item.b >= p.batch) continue;
    GPU_UNROLL
    for (int i = 0; i < kInputs; ++i) {
      float* to = floats(kStage) + (parity * kInputs + i) * kItems + number;
      gpu::copy_async(to, input(p, item, i));
    }
  }
}

GPU_FUNCTION float staged(int parity, const Item& item, int i) {
  return floats(kStage)[(parity * kInputs + i) * kItems + item.number];
}

GPU_FUNCTION float sum_of(const Item& item, int gate) {
  int entry = ints(kRowTable)[item.local * kGates + gate];
  const float* from = floats(kSums) + (entry & 0xffff) * kWidth + item.j;
  float sum = 0;
  GPU_NO_UNROLL
  for (int i = 0; i < entry >> 16; ++i) sum += from[i * kWidth];
  return sum;
}

GPU_FUNCTION bool is_active(const Problem& p, const Item& item, int t) {
  return p.lengths == nullptr ||
         t < reinterpret_cast<const int*>(floats(kState) + 2 * kUnits * p.batch)[item.b];
}

GPU_FUNCTION void forward(const Problem& p, const Item& item, int t, int parity,
                          unsigned* next) {
  float* h_at = floats(kState) + item.local * p.batch + item.b;
  float* c_at = h_at + kUnits * p.batch;
  bool active = is_active(p, item, t);
  float h_before = *h_at, h, c = 0, kept[5];
  float x0 = staged(parity, item, 0), s0 = sum_of(item, 0);
  if (kCell == kLstm) {
    kept[0] = sigmoid(x0 + s0);
    kept[1] = sigmoid(staged(parity, item, 1) + sum_of(item, 1));
    kept[2] = tanhf(staged(parity, item, 2) + sum_of(item, 2));
    kept[3] = sigmoid(staged(parity, item, 3) + sum_of(item, 3));
    c = kept[1] * *c_at + kept[0] * kept[2];
    kept[4] = c;
    h = kept[3] * tanhf(c);
  } else if (kCell == kGru) {
    kept[3] = sum_of(item, 2) + floats(kBiasTable)[item.local];
    kept[0] = sigmoid(x0 + s0);
    kept[1] = sigmoid(staged(parity, item, 1) + sum_of(item, 1));
    kept[2] = tanhf(staged(parity, item, 2) + kept[0] * kept[3]);
    h = kept[2] + kept[1] * (h_before - kept[2]);
  } else {
    float x = x0 + s0;
    h = kCell == kTanh ? tanhf(x) : x < 0 ? 0.0f : x;
  }
  // First of all: others wait for it.
  publish(next, ints(kPositionTable)[item.local], item.j, active ? h : h_before);
  if (active) *h_at = h;
  if (active && kCell == kLstm) *c_at = c;
  p.y[item.at * kHidden + item.unit] = active ? h : 0.0f;
  if (kSaved && p.saved != nullptr) {
    GPU_UNROLL
    for (int i = 0; i < kSaved; ++i) {
      p.saved[(item.at * kSaved + i) * kHidden + item.unit] = kept[i];
    }
  }
}

GPU_FUNCTION void backward(const Problem& p, const Item& item, int t, int parity,
                           unsigned* next) {
  float* dh_at = floats(kState) + item.local * p.batch + item.b;
  float* dc_at = dh_at + kUnits * p.batch;
  float dh = *dh_at, d[4] = {}, dn = 0, through = 0;
  GPU_UNROLL
  for (int g = 0; g < kGates; ++g) dh += sum_of(item, g);
  if (t < 0) {  // behind the last step
    *dh_at = dh;
    return;
  }
  bool active = is_active(p, item, t);
  if (active) {
    float total = dh + staged(parity, item, 0);
    float s0 = staged(parity, item, 1);
    if (kCell == kLstm) {
      float s1 = staged(parity, item, 2), s2 = staged(parity, item, 3);
      float s3 = staged(parity, item, 4), after = tanhf(staged(parity, item, 5));
      float dc = *dc_at + total * s3 * (1 - after * after);
      d[0] = dc * s2 * s0 * (1 - s0);
      d[1] = dc * staged(parity, item, 6) * s1 * (1 - s1);
      d[2] = dc * s0 * (1 - s2 * s2);
      d[3] = total * after * s3 * (1 - s3);
      *dc_at = dc * s1;
    } else if (kCell == kGru) {
      float s1 = staged(parity, item, 2), s2 = staged(parity, item, 3);
      d[2] = total * (1 - s1) * (1 - s2 * s2);
      d[1] = total * (staged(parity, item, 5) - s2) * s1 * (1 - s1);
      d[0] = d[2] * staged(parity, item, 4) * s0 * (1 - s0);
      dn = d[2] * s0;
      through = total * s1;
    } else {
      d[0] = kCell == kTanh ? total * (1 - s0 * s0) : s0 > 0 ? total : 0.0f;
    }
  } else {
    through = dh;
  }
  GPU_UNROLL
  for (int g = 0; g < kGates; ++g) {
    int column = g * kHidden + ints(kPositionTable)[item.local];
    publish(next, column, item.j, kCell == kGru && g == 2 ? dn : d[g]);
  }
  *dh_at = through;
  GPU_UNROLL
  for (int g = 0; g < kGates; ++g) {
    p.dgates[(item.at * kGates + g) * kHidden + item.unit] = d[g];
  }
  if (kCell == kGru) p.drows[item.at * kHidden + item.unit] = dn;
}

GPU_FUNCTION void units(const Problem& p, int t, int group, int parity, unsigned* next) {
  GPU_NO_UNROLL
  for (int number = gpu::thread(); number < kItems; number += kThreads) {
    Item item = item_of(p, number, t, group);
    if (item.unit < 0) continue;
    if (item.b >= p.batch) {
      // Nobody's sequence; but who reads waits for all words.
      int columns = kBackward ? kGates : 1, at = ints(kPositionTable)[item.local];
      if (t >= 0) {
        for (int g = 0; g < columns; ++g) publish(next, g * kHidden + at, item.j, 0.0f);
      }
    } else if (kBackward) {
      backward(p, item, t, parity, next);
    } else {
      forward(p, item, t, parity, next);
    }
  }
}

// -------------------------------------------------------------------------------------- the whole

GPU_FUNCTION void prepare(const Problem& p) {
  long long block = gpu::block();
  GPU_NO_UNROLL
  for (int i = gpu::thread(); i < kUnits; i += kThreads) {
    int unit = p.units[block * kUnits + i];
    ints(kUnitTable)[i] = unit;
    ints(kPositionTable)[i] = p.positions[block * kUnits + i];
    floats(kBiasTable)[i] = p.bias == nullptr || unit < 0 ? 0.0f : p.bias[unit];
  }
  GPU_NO_UNROLL
  for (int i = gpu::thread(); i < kUnits * kGates; i += kThreads) {
    ints(kRowTable)[i] = p.rows[block * kUnits * kGates + i];
  }
  GPU_NO_UNROLL
  for (int i = gpu::thread(); i < kPositions * kWarps; i += kThreads) {
    ints(kBaseTable)[i] = kBackward ? p.bases[block * kPositions * kWarps + i] : 0;
  }
  GPU_NO_UNROLL
  for (int i = gpu::thread(); i < p.batch && p.lengths != nullptr; i += kThreads) {
    ints(kState + 2 * kUnits * p.batch)[i] = static_cast<int>(p.lengths[i]);
  }
  if (gpu::thread() == 0) *ints(kFailed) = 0;
  gpu::sync();
  GPU_NO_UNROLL
  for (int i = gpu::thread(); i < kUnits * p.batch; i += kThreads) {
    int unit = ints(kUnitTable)[i / p.batch];
    long long from = static_cast<long long>(i % p.batch) * kHidden + unit;
    floats(kState)[i] = unit < 0 ? 0.0f : p.state[from];
    floats(kState)[kUnits * p.batch + i] =
        unit < 0 || p.memory == nullptr ? 0.0f : p.memory[from];
  }
  GPU_NO_UNROLL
  for (int i = kRegisterWords; i < kPairs * kWordsPerPair; ++i) {
    unsigned* to = reinterpret_cast<unsigned*>(floats(kOverflow));
    to[(i - kRegisterWords) * kThreads + gpu::thread()] = word_of(p, i);
  }
  gpu::sync();
}

// NaN in all steps of this block's units.
GPU_FUNCTION void spoil(const Problem& p) {
  constexpr int kOutputs = kBackward ? kGates : 1;
  float* out = kBackward ? p.dgates : p.y;
  GPU_NO_UNROLL
  for (int row = 0; row < p.num_steps * p.batch; ++row) {
    GPU_NO_UNROLL
    for (int i = gpu::thread(); i < kUnits * kOutputs; i += kThreads) {
      int unit = ints(kUnitTable)[i / kOutputs];
      long long to = (static_cast<long long>(row) * kOutputs + i % kOutputs) * kHidden + unit;
      if (unit >= 0) out[to] = gpu::number(kNan);
    }
  }
}

// The last states; NaN where a block has waited in vain, so that nobody takes them for results.
GPU_FUNCTION void finish(const Problem& p, bool failed) {
  gpu::sync();
  if (failed) spoil(p);
  GPU_NO_UNROLL
  for (int i = gpu::thread(); i < kUnits * p.batch; i += kThreads) {
    int unit = ints(kUnitTable)[i / p.batch];
    if (unit < 0) continue;
    long long to = static_cast<long long>(i % p.batch) * kHidden + unit;
    p.state[to] = failed ? gpu::number(kNan) : floats(kState)[i];
    if (p.memory != nullptr) {
      p.memory[to] = failed ? gpu::number(kNan) : floats(kState)[kUnits * p.batch + i];
    }
  }
}

GPU_FUNCTION int time_of(const Problem& p, int step) {
  return p.descending ? p.num_steps - 1 - step : step;
}

GPU_FUNCTION void recurrence(const Problem& p) {
  unsigned words[kMaxWords];
  GPU_UNROLL
  for (int i = 0; i < kRegisterWords; ++i) words[i] = word_of(p, i);
  prepare(p);
  int groups = (p.batch + kWidth - 1) / kWidth;
  // Backwards one step more, which only multiplies.
  int last = p.num_steps + (kBackward ? 1 : 0), step = 0, next_step = 0;
  int group = 0, next_group = 0, parity = 0;
  unsigned arrivals = 0;
  prefetch(p, time_of(p, 0), 0, 0);
  gpu::commit_async();
  GPU_NO_UNROLL
  for (; step < last; step = next_step, group = next_group, parity ^= 1) {
    next_group = group + 1 < groups ? group + 1 : 0;
    next_step = step + (next_group == 0 ? 1 : 0);
    if (next_step < p.num_steps) prefetch(p, time_of(p, next_step), next_group, parity ^ 1);
    gpu::commit_async();
    if (kBarrier && step > 0) await(p, arrivals);
    fetch(p, slot(p, step, group));
    gpu::sync();
    if (*ints(kFailed)) return finish(p, true);
#define RUN(position, first, count) run(words, position, first, count);
    RUNS
#undef RUN
    gpu::sync();
    gpu::wait_async();
    bool behind = step == p.num_steps;
    units(p, behind ? -1 : time_of(p, step), group, parity, slot(p, step + 1, group));
    if (kBarrier) {
      gpu::sync();
      if (gpu::thread() == 0) gpu::arrive(p.control + 1);
      // All blocks, for each group of the steps so far.
      if (next_group == 0) arrivals += static_cast<unsigned>(gpu::num_blocks() * groups);
    }
  }
  finish(p, false);
}

}  // namespace recurrence

GPU_KERNEL recurrence_pack(const void* values, const int* source, const int* offsets,
                           unsigned* words, long long count) {
  long long i = static_cast<long long>(gpu::block()) * kThreads + gpu::thread();
  if (i >= count) return;
  unsigned* to = words + i / kThreads * recurrence::kWordsPerPair * kThreads + gpu::thread();
  recurrence::make_word(values, source[i], offsets[i], to);
}

#if BACKWARD

GPU_KERNEL recurrence_backward(const unsigned* words, const int* units, const int* positions, const int* rows,
                               const int* bases, unsigned* slots, unsigned* control,
                               unsigned* told, const float* dy, const float* y, const float* saved,
                               const float* before, const long long* lengths, float* dh, float* dc,
                               float* dgates, float* drows, long long num_steps, long long batch,
                               long long descending, long long patience) {
  recurrence::Problem p = {};
  p.words = words, p.units = units, p.positions = positions, p.rows = rows, p.bases = bases;
  p.slots = slots, p.control = control, p.told = told;
  p.dy = dy, p.y_in = y, p.saved_in = saved, p.before = before, p.lengths = lengths;
  p.state = dh, p.memory = dc, p.dgates = dgates, p.drows = drows;
  p.num_steps = static_cast<int>(num_steps), p.batch = static_cast<int>(batch);
  p.descending = descending != 0, p.patience = static_cast<int>(patience);
  recurrence::recurrence(p);
}

#else

GPU_KERNEL recurrence_forward(const unsigned* words, const int* units, const int* positions, const int* rows,
                              unsigned* slots, unsigned* control, unsigned* told,
                              const float* gates, const float* bias, const long long* lengths,
                              float* h, float* c, float* y, float* saved, long long num_steps,
                              long long batch, long long descending, long long patience) {
  recurrence::Problem p = {};
  p.words = words, p.units = units, p.positions = positions, p.rows = rows;
  p.slots = slots, p.control = control, p.told = told;
  p.gates = gates, p.bias = bias, p.lengths = lengths;
  p.state = h, p.memory = c, p.y = y, p.saved = saved;
  p.num_steps = static_cast<int>(num_steps), p.batch = static_cast<int>(batch);
  p.descending = descending != 0, p.patience = static_cast<int>(patience);
  recurrence::recurrence(p);
}

#endif
