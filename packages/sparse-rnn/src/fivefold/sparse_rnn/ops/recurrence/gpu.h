// What the persistent kernel asks of a GPU beside arithmetic, each in one function.
//
// The kernel itself names no intrinsic, so that another file with these functions runs it on a CPU.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define GPU_FUNCTION __device__ __forceinline__
#define GPU_KERNEL extern "C" __global__ void __launch_bounds__(kThreads, 1)
#define GPU_CONSTANT constexpr
#define GPU_UNROLL _Pragma("unroll")
#define GPU_UNROLL_4 _Pragma("unroll 4")
#define GPU_NO_UNROLL _Pragma("unroll 1")

namespace gpu {

GPU_FUNCTION int thread() { return threadIdx.x; }
GPU_FUNCTION int block() { return blockIdx.x; }
GPU_FUNCTION int num_blocks() { return gridDim.x; }
GPU_FUNCTION void sync() { __syncthreads(); }

GPU_FUNCTION char* shared() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

GPU_FUNCTION float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

GPU_FUNCTION unsigned bits(float x) { return __float_as_uint(x); }
GPU_FUNCTION float number(unsigned x) { return __uint_as_float(x); }
GPU_FUNCTION float from_half(unsigned short x) { return __half2float(__ushort_as_half(x)); }
GPU_FUNCTION unsigned short to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
GPU_FUNCTION unsigned short to_bfloat16(float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// The value of a word cannot be known from here on: what is computed from words in a loop is not
// computed once before it, which would take a register for each result.
GPU_FUNCTION void opaque(unsigned& word) { asm volatile("" : "+r"(word)); }

struct alignas(16) Quad {
  unsigned at[4];
};

// Words that other blocks write meanwhile; each of the four by itself, not all at once. "memory",
// so that no such load is moved before a barrier of the block.
GPU_FUNCTION Quad load_relaxed(const Quad* from) {
  Quad x;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.at[0]), "=r"(x.at[1]), "=r"(x.at[2]), "=r"(x.at[3])
               : "l"(from)
               : "memory");
  return x;
}

GPU_FUNCTION unsigned load_relaxed(const unsigned* from) {
  unsigned x;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}

GPU_FUNCTION void store_relaxed(unsigned* to, unsigned x) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" : : "l"(to), "r"(x) : "memory");
}

// To memory of the host.
GPU_FUNCTION void store_system(unsigned* to, unsigned x) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" : : "l"(to), "r"(x) : "memory");
}

// One more has arrived; what its block wrote before is seen by whoever sees that.
GPU_FUNCTION void arrive(unsigned* counter) {
  __threadfence();
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" : : "l"(counter) : "memory");
}

GPU_FUNCTION unsigned load_acquire(const unsigned* from) {
  unsigned x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}

// Four bytes on their way to shared memory while the thread goes on.
GPU_FUNCTION void copy_async(float* to, const float* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
               :
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(to))), "l"(from)
               : "memory");
}
GPU_FUNCTION void commit_async() { asm volatile("cp.async.commit_group;" : : : "memory"); }
// Until all copies of this thread are there but those of the last commit.
GPU_FUNCTION void wait_async() { asm volatile("cp.async.wait_group 1;" : : : "memory"); }

}  // namespace gpu
