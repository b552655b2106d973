// The gradient of each nonzero: the product of two rows of numbers side by side, one of its row's
// gradients in all steps and one of its column's states. A warp has a row of the matrix.

#include "gpu.h"

constexpr int kThreads = 256;

struct alignas(16) Four {
  float at[4];
};

GPU_KERNEL products(const float* left, const float* right, const int* crow, const int* col,
                    float* out, long long rows, long long count) {
  int lane = gpu::thread() % 32;
  long long row = static_cast<long long>(gpu::block()) * (kThreads / 32) + gpu::thread() / 32;
  if (row >= rows) return;
  const Four* x = reinterpret_cast<const Four*>(left + row * count);
  for (int n = crow[row]; n < crow[row + 1]; ++n) {
    const Four* y = reinterpret_cast<const Four*>(right + col[n] * count);
    float sum = 0;
    GPU_UNROLL_4
    for (int i = lane; i < count / 4; i += 32) {
      Four a = x[i], b = y[i];
      GPU_UNROLL
      for (int j = 0; j < 4; ++j) sum = fmaf(a.at[j], b.at[j], sum);
    }
    GPU_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) sum += gpu::shuffle_xor(sum, mask);
    if (lane == 0) out[n] = sum;
  }
}
