// A barrier of the whole grid by atomics; the grid has to be started as a cooperative one.

__device__ inline void wait_for_all_blocks(unsigned* arrived) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1u);
    while (atomicAdd(arrived, 0u) < gridDim.x) {
    }
    __threadfence();
  }
  __syncthreads();
}
