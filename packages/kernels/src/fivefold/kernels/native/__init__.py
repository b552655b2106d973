"""C++ kernels for the CPU, compiled at first use and kept for the next.

A kernel is one C++17 file that knows nothing of torch and may include ``fivefold.h``, which lies
here. Its entry points are marked ``FIVEFOLD_API`` and take ``int64_t``, ``double`` and pointers:

.. code-block:: c++

    #include "fivefold.h"
    FIVEFOLD_API void twice(const float* x, float* y, int64_t n, int64_t num_threads) {
      fivefold::parallel_for(0, n, 4096, num_threads, [&](int64_t from, int64_t to, int64_t) {
        for (int64_t i = from; i < to; ++i) y[i] = 2 * x[i];
      });
    }

.. code-block:: python

    SOURCE = Path(__file__).with_suffix(".cpp")
    native.call(native.load(SOURCE).twice, x, y, x.numel(), torch.get_num_threads())

The first process that needs a file compiles it (a second or a few); others wait for it and later
ones find it in the cache: ``FIVEFOLD_CACHE_DIR``, else ``$XDG_CACHE_HOME/fivefold``, else
``~/.cache/fivefold``, and a folder of the user's for temporary files where that cannot be written.
Any change of source, headers, flags, compiler or CPU makes another file. No environment variable
but ``CXX`` changes what is compiled.
"""

from fivefold.kernels.native.library import call, load, missing, refusal
from fivefold.kernels.native.types import TYPES

__all__ = ["TYPES", "call", "load", "missing", "refusal"]
