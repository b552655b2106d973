// Products of a packed matrix with vectors. Each kernel computes the rows of one part.

#pragma once

#include "packing.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define SPARSE_RNN_TILES 1
#elif defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sparse_rnn {

using fivefold::Compute;
using fivefold::kLanes;
using fivefold::Pack;

// How the vectors of a batch lie in memory: one after another, or `lanes` of them side by side.
struct Vectors {
  int64_t batch, length, stride, lanes;

  Vectors(Kind kind, int64_t batch, int64_t length)
      : batch(batch), length(length),
        // Windows may reach four registers past the last value.
        stride((length + kBlock - 1) / kBlock * kBlock + 4 * kBlock),
        lanes(kind == Kind::kRows ? (batch > 8 ? 16 : batch > 4 ? 8 : 4) : 1) {}

  int64_t size() const { return (batch + lanes - 1) / lanes * lanes * stride; }
  int64_t at(int64_t b, int64_t i) const {
    return lanes == 1 ? b * stride + i : (b / lanes * stride + i) * lanes + b % lanes;
  }

  template <class C, class Count>
  void store(C* to, int64_t b, int64_t i, Pack<C> x, Count count) const {
    if (lanes == 1) return fivefold::store(to + at(b, i), x, count);
    for (int64_t lane = 0; lane < count; ++lane) to[at(b, i + lane)] = x[lane];
  }
};

// One sum of every row of a group to the vector z of sums.
template <class C>
FIVEFOLD_INLINE inline void put_sums(const Group& group, Pack<C> sums, C* z) {
  if (group.contiguous) return fivefold::store(z + group.rows[0], sums);
  for (int64_t lane = 0; lane < kLanes<C>; ++lane)
    if (group.rows[lane] >= 0) z[group.rows[lane]] = sums[lane];
}

inline Pack<float> gather(const float* from, const int32_t* index) {
#if defined(SPARSE_RNN_TILES)
  return fivefold::bit_cast<Pack<float>>(
      _mm512_i32gather_ps(_mm512_loadu_si512(index), from, 4));
#elif defined(__AVX2__)
  __m256 halves[2];
  for (int i = 0; i < 2; ++i) {
    const auto* at = reinterpret_cast<const __m256i*>(index) + i;
    halves[i] = _mm256_i32gather_ps(from, _mm256_loadu_si256(at), 4);
  }
  Pack<float> x;
  std::memcpy(&x, halves, sizeof(x));
  return x;
#else
  Pack<float> x;
  for (int64_t i = 0; i < kLanes<float>; ++i) x[i] = from[index[i]];
  return x;
#endif
}

inline Pack<double> gather(const double* from, const int32_t* index) {
  Pack<double> x;
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = from[index[i]];
  return x;
}

// kBatch vectors from anywhere in memory.
template <class T, int kBatch>
void multiply_gather(const Packed& packed, const Group& group, const Compute<T>* v, int64_t stride,
                     Compute<T>* z, int64_t z_stride) {
  using C = Compute<T>;
  const T* values = reinterpret_cast<const T*>(packed.values.data());
  Pack<C> sums[kBatch] = {};
  const int64_t end = group.first_slot + group.num_slots;
  for (int64_t slot = group.first_slot; slot < end; ++slot) {
    const Pack<C> value = fivefold::load(values + slot * kLanes<C>);
    const int32_t* index = packed.index.data() + slot * kLanes<C>;
    for (int b = 0; b < kBatch; ++b) sums[b] += value * gather(v + b * stride, index);
  }
  for (int b = 0; b < kBatch; ++b) put_sums<C>(group, sums[b], z + b * z_stride);
}

#ifdef SPARSE_RNN_TILES

inline __m512 load_values(const float* from) { return _mm512_load_ps(from); }
inline __m512 load_values(const fivefold::bfloat16* from) {
  const __m256i half = _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline __m512 load_values(const fivefold::float16* from) {
  return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(from)));
}

// The indices of a run, a lane's in one word.
template <int kBytes>
FIVEFOLD_INLINE inline __m512i load_words(const uint8_t* from) {
  if constexpr (kBytes == 4) return _mm512_load_si512(from);
  return _mm512_cvtepu16_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(from)));
}

// kBatch vectors, a window of each in registers; kTilings[kTiling] says how.
template <class T, int kBatch, int kTiling>
void multiply_tiles(const Packed& packed, const Group& group, const float* v, int64_t stride,
                    float* z, int64_t z_stride) {
  constexpr Tiling tiling = kTilings[kTiling];
  constexpr int kRun = tiling.run, kWindow = tiling.window;
  constexpr int kBytes = kRun * tiling.bits <= 16 ? 2 : 4;
  // Sums of neighbouring slots are kept apart, so that one addition need not wait for the last.
  constexpr int kApart = kBatch <= 2 ? 3 : 2;
  // How far ahead values are asked for, beyond what the CPU does by itself.
  constexpr int kAhead = 512 / sizeof(T);
  const T* values = reinterpret_cast<const T*>(packed.values.data());
  __m512 sums[kApart][kBatch];
  for (auto& row : sums)
    for (__m512& sum : row) sum = _mm512_setzero_ps();
  const int64_t first = group.first_slot / kRun, end = first + group.num_slots / kRun;
  for (int64_t run = first; run < end; ++run) {
    const float* from = v + int64_t(packed.block[run]) * kBlock;
    __m512 window[kBatch][kWindow];
    for (int b = 0; b < kBatch; ++b)
      for (int i = 0; i < kWindow; ++i)
        window[b][i] = _mm512_load_ps(from + b * stride + i * kBlock);
    for (int i = 0; i < kRun; ++i) __builtin_prefetch(values + (run * kRun + i) * kBlock + kAhead);
    const __m512i words = load_words<kBytes>(packed.local_index.data() + run * kBlock * kBytes);
    for (int i = 0; i < kRun; ++i) {
      // A permutation looks at the lowest five bits of an index only.
      const __m512i index = _mm512_srli_epi32(words, i * tiling.bits);
      __m512 value = load_values(values + (run * kRun + i) * kBlock);
      // Else compilers load it again for every vector, and loads are what there is least of.
      if constexpr (kBatch > 1) asm("" : "+v"(value));
      __mmask16 high = 0;
      if constexpr (kWindow == 4) high = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
      for (int b = 0; b < kBatch; ++b) {
        __m512 taken = _mm512_permutex2var_ps(window[b][0], index, window[b][1]);
        if constexpr (kWindow == 4)
          taken = _mm512_mask_mov_ps(
              taken, high, _mm512_permutex2var_ps(window[b][2], index, window[b][3]));
        sums[i % kApart][b] = _mm512_fmadd_ps(value, taken, sums[i % kApart][b]);
      }
    }
  }
  for (int b = 0; b < kBatch; ++b) {
    __m512 sum = _mm512_add_ps(sums[0][b], sums[1][b]);
    if constexpr (kApart == 3) sum = _mm512_add_ps(sum, sums[2][b]);
    put_sums<float>(group, fivefold::bit_cast<Pack<float>>(sum), z + b * z_stride);
  }
}

// The kernel of whatever tiling there is.
template <class T, int kBatch>
void multiply_any_tiles(const Packed& packed, const Group& group, const float* v, int64_t stride,
                        float* z, int64_t z_stride) {
  const auto run = packed.tiling.run;
  if (run == kTilings[0].run) multiply_tiles<T, kBatch, 0>(packed, group, v, stride, z, z_stride);
  if (run == kTilings[1].run) multiply_tiles<T, kBatch, 1>(packed, group, v, stride, z, z_stride);
  if (run == kTilings[2].run) multiply_tiles<T, kBatch, 2>(packed, group, v, stride, z, z_stride);
}

#endif

// Values of `kWide` vectors side by side.
template <class C, int kWide>
struct SideBySide {
  typedef C type __attribute__((vector_size(kWide * sizeof(C)), aligned(sizeof(C))));
};

// As fivefold::load_one, without a detour through registers where there is none needed.
inline float widen_one(const float* from) { return *from; }
inline double widen_one(const double* from) { return *from; }
inline float widen_one(const fivefold::float16* from) { return fivefold::load_one(from); }
inline float widen_one(const fivefold::bfloat16* from) {
  return fivefold::bit_cast<float>(uint32_t(from->bits) << 16);
}

// Rows as they come, for vectors side by side.
template <class T, int kWide>
void multiply_rows(const Packed& packed, int64_t row, const Compute<T>* v, Compute<T>* z,
                   int64_t z_stride, int64_t count) {
  using C = Compute<T>;
  using Wide = typename SideBySide<C, kWide>::type;
  constexpr int kApart = 4;
  const T* values = reinterpret_cast<const T*>(packed.values.data());
  const int32_t* index = packed.index.data();
  Wide sums[kApart] = {};
  const auto add = [&](int64_t i, Wide& sum) FIVEFOLD_INLINE {
    sum += static_cast<C>(widen_one(values + i)) *
           *reinterpret_cast<const Wide*>(v + int64_t(index[i]) * kWide);
  };
  int64_t i = packed.begin[row];
  const int64_t end = packed.begin[row + 1];
  for (; i + kApart <= end; i += kApart)
    for (int j = 0; j < kApart; ++j) add(i + j, sums[j]);
  for (; i < end; ++i) add(i, sums[0]);
  const Wide sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int64_t b = 0; b < count; ++b) z[b * z_stride] = sum[b];
}

// z = M v for the rows of a part: z (batch, z_stride), v as `vectors` says.
template <class T>
[[gnu::noinline]] void multiply(const Packed& packed, const Part& part, const Vectors& vectors,
                                const Compute<T>* v, Compute<T>* z, int64_t z_stride,
                                bool from_the_end) {
  if (packed.kind == Kind::kRows) {
    for (int64_t b = 0; b < vectors.batch; b += vectors.lanes) {
      const int64_t count = std::min(vectors.lanes, vectors.batch - b);
      const auto* first = v + vectors.at(b, 0);
      for (const int32_t row : part.rows) {
        auto* to = z + b * z_stride + row;
        if (vectors.lanes == 16) multiply_rows<T, 16>(packed, row, first, to, z_stride, count);
        if (vectors.lanes == 8) multiply_rows<T, 8>(packed, row, first, to, z_stride, count);
        if (vectors.lanes == 4) multiply_rows<T, 4>(packed, row, first, to, z_stride, count);
      }
    }
    return;
  }
  const auto some = [&](int64_t b, auto count) {
    constexpr int kBatch = decltype(count)::value;
    const auto* from = v + b * vectors.stride;
    auto* to = z + b * z_stride;
    const int64_t num_groups = static_cast<int64_t>(part.groups.size());
    // Every other step goes backwards: what was read last is still in the cache.
    for (int64_t i = 0; i < num_groups; ++i) {
      const Group& group = part.groups[from_the_end ? num_groups - 1 - i : i];
#ifdef SPARSE_RNN_TILES
      if constexpr (!std::is_same_v<T, double>) {
        if (packed.kind == Kind::kTiles) {
          multiply_any_tiles<T, kBatch>(packed, group, from, vectors.stride, to, z_stride);
          continue;
        }
      }
#endif
      multiply_gather<T, kBatch>(packed, group, from, vectors.stride, to, z_stride);
    }
  };
  int64_t b = 0;
  for (; b + 4 <= vectors.batch; b += 4) some(b, std::integral_constant<int, 4>());
  if (vectors.batch - b == 3) some(b, std::integral_constant<int, 3>());
  if (vectors.batch - b == 2) some(b, std::integral_constant<int, 2>());
  if (vectors.batch - b == 1) some(b, std::integral_constant<int, 1>());
}

// The product for values of a type that is known at run time; C is what is computed in.
template <class C>
using Multiply = void (*)(const Packed&, const Part&, const Vectors&, const C*, C*, int64_t, bool);

template <class C>
Multiply<C> multiply_of(int64_t type) {
  Multiply<C> found = nullptr;
  fivefold::dispatch(type, [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<Compute<T>, C>) found = multiply<T>;
  });
  return found;
}

}  // namespace sparse_rnn
