"""The kernels of the op, and the functions that start them."""

import triton
import triton.language as tl

from fivefold.kernels.launch import launch

VALUES = 4096


def good(x, y):
    launch(copy_kernel, (1024,), x, y, 1, VALUES=VALUES)


def strided(x, y):
    # Only a step that the compiler knows to be 1 allows wide loads.
    launch(copy_kernel, (1024,), x, y, 3, VALUES=VALUES)


def offset(x, y):
    # One value further than a multiple of 16 bytes.
    launch(copy_kernel, (1024,), x, y[1:], 1, VALUES=VALUES)


def spilling(x, y):
    launch(scale_kernel, (1024,), x, y, VALUES=VALUES, num_warps=1, maxnreg=32)


def matrices(x, y):
    launch(dot_kernel, (1,), x, x, y, SIZE=64)


def exact_matrices(x, y):
    launch(dot_kernel, (1,), x, x, y, SIZE=32)


def float8(x, y):
    launch(copy_kernel, (1024,), x, y, 1, VALUES=VALUES)


def wrong(x, y):
    launch(wrong_kernel, (1,), x)


def nested(x, y):
    @triton.jit
    def kernel(x_ptr):
        tl.store(x_ptr, 0)

    launch(kernel, (1,), x)


def unfit(x, y):
    launch(copy_kernel, (1,), x, "y", 1, VALUES=VALUES)


def unfinished(x, y):
    launch(copy_kernel, (1024,), x, y, 16, VALUES=VALUES)
    raise RuntimeError("half written")


@triton.jit
def copy_kernel(x_ptr, y_ptr, step, VALUES: tl.constexpr):
    at = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    tl.store(y_ptr + at, tl.load(x_ptr + at * step).to(y_ptr.dtype.element_ty))


@triton.jit
def scale_kernel(x_ptr, y_ptr, VALUES: tl.constexpr):
    at = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x * tl.sum(x))


@triton.jit
def dot_kernel(a_ptr, b_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision="ieee")
    tl.store(y_ptr + at, product.to(y_ptr.dtype.element_ty))


@triton.jit
def wrong_kernel(x_ptr):
    tl.store(x_ptr + tl.arange(0, 3), 0)
