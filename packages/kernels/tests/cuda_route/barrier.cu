// Divides values by their sum, which all blocks make together before any goes on.

#include "barrier.cuh"

#ifndef SCALE
#define SCALE 1
#endif

extern "C" __global__ void normalize(const float4* x, float4* y, float* sum, unsigned* arrived,
                                     long long fours, double least) {
  __shared__ float part;
  if (threadIdx.x == 0) part = 0;
  __syncthreads();
  long long step = (long long)gridDim.x * blockDim.x;
  long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  for (long long i = first; i < fours; i += step) {
    float4 v = x[i];
    atomicAdd(&part, v.x + v.y + v.z + v.w);
  }
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(sum, part);
  wait_for_all_blocks(arrived);
  float by = SCALE / fmaxf(*(volatile float*)sum, (float)least);
  for (long long i = first; i < fours; i += step) {
    float4 v = x[i];
    y[i] = make_float4(v.x * by, v.y * by, v.z * by, v.w * by);
  }
}
