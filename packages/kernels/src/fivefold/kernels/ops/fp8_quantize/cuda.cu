// Largest magnitude of the whole grid, scale, cast: one cooperative launch.
//
// X is the dtype of the input, KIND and LARGEST those of the output. Magnitudes are compared as
// integers, whose order is that of floats with NaN above infinity.

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

constexpr int kThreads = 512;
constexpr int kChunk = 16;  // values of one thread at a time: it stores 16 bytes

struct alignas(16) Values {
  X at[kChunk];
};

struct alignas(16) Bytes {
  unsigned short pairs[kChunk / 2];
};

__device__ unsigned magnitude(X x) { return __float_as_uint(fabsf(static_cast<float>(x))); }

__device__ unsigned largest_of_block(unsigned value) {
  __shared__ unsigned of_warp[kThreads / 32];
  __syncthreads();  // the last call's values are read
  value = __reduce_max_sync(0xffffffffu, value);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  for (unsigned other : of_warp) value = max(value, other);
  return value;
}

__device__ float scale_of(float amax, bool power_of_2) {
  double wide = amax;
  // A comparison that keeps NaN.
  float scale = static_cast<float>(LARGEST / (wide < 1e-12 ? 1e-12 : wide));
  if (!power_of_2) return scale;
  // The logarithm is rounded to float before the floor, as torch's is.
  float exponent = floorf(static_cast<float>(log2(static_cast<double>(scale))));
  return static_cast<float>(exp2(static_cast<double>(exponent)));
}

__device__ unsigned short cast_pair(X first, X second, float scale) {
  float2 scaled = make_float2(static_cast<float>(first) * scale, static_cast<float>(second) * scale);
  return __nv_cvt_float2_to_fp8x2(scaled, __NV_SATFINITE, KIND);
}

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    quantize(const X* x, unsigned char* out, float* scale_out, unsigned* of_block, long long count,
             long long power_of_2) {
  const Values* x_chunks = reinterpret_cast<const Values*>(x);
  long long chunks = count / kChunk;
  long long step = static_cast<long long>(gridDim.x) * kThreads;
  long long first = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
  long long rest = chunks * kChunk + first;  // one of the last values, fewer than a chunk

  unsigned largest = 0;
  for (long long chunk = first; chunk < chunks; chunk += step) {
    Values values = x_chunks[chunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) largest = max(largest, magnitude(values.at[i]));
  }
  if (rest < count) largest = max(largest, magnitude(x[rest]));
  largest = largest_of_block(largest);
  if (threadIdx.x == 0) of_block[blockIdx.x] = largest;
  cooperative_groups::this_grid().sync();

  largest = 0;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += kThreads) {
    largest = max(largest, of_block[block]);
  }
  float scale = scale_of(__uint_as_float(largest_of_block(largest)), power_of_2 != 0);
  if (first == 0) *scale_out = scale;

  // From the end: what was read last is still in the cache.
  long long turns = first < chunks ? (chunks - 1 - first) / step : -1;
  for (long long turn = turns; turn >= 0; --turn) {
    Values values = x_chunks[first + turn * step];
    Bytes bytes;
#pragma unroll
    for (int i = 0; i < kChunk; i += 2) {
      bytes.pairs[i / 2] = cast_pair(values.at[i], values.at[i + 1], scale);
    }
    reinterpret_cast<Bytes*>(out)[first + turn * step] = bytes;
  }
  if (rest < count) out[rest] = static_cast<unsigned char>(cast_pair(x[rest], x[rest], scale));
}
