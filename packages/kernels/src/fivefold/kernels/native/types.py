"""How C++ kernels are told a dtype."""

import torch

# The numbers of ``fivefold::Type`` in fivefold.h.
TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
