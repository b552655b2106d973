"""Triton kernels run in the interpreter where there is no GPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports triton: it looks once.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
