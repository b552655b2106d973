"""CUDA C++ kernels, compiled by NVRTC at first use and kept for the next. Needs ``[cuda]``.

A kernel is an ``extern "C" __global__`` function of a file ``cuda.cu`` beside ``cuda.py``. It takes
pointers, ``long long`` and ``double``, which is what tensors, ints and floats become:

.. code-block:: c++

    extern "C" __global__ void twice(const float* x, float* y, long long n) {
      long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
      if (i < n) y[i] = 2 * x[i];
    }

.. code-block:: python

    PROGRAM = cuda_route.load(Path(__file__).with_suffix(".cu"))
    cuda_route.launch(PROGRAM, "twice", (triton.cdiv(n, 256),), (256,), x, y, n)

CUDA's headers (``<cuda_fp16.h>``, ``<cuda_bf16.h>``, ``<cuda_fp8.h>``, ``<cooperative_groups.h>``,
``<cuda/std/cstdint>``) come with NVRTC 13.3 and newer; for an older one they are looked for in the
wheels ``nvidia-cuda-runtime`` and ``nvidia-cuda-cccl`` and in a CUDA toolkit.
"""

from fivefold.kernels.cuda_route.program import Program, load
from fivefold.kernels.cuda_route.start import launch

__all__ = ["Program", "launch", "load"]
