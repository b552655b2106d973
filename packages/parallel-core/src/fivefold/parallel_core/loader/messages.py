"""Samples through a pipe: tensors and arrays as raw bytes, the rest pickled.

No shared memory: what a worker has sent is whole in the pipe or it is not, and a worker that is
killed leaves nothing behind.
"""

import io
import pickle
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        """CPU tensors as a buffer beside the pickle."""
        plain = type(obj) is Tensor and obj.device.type == "cpu" and obj.layout == torch.strided
        if not plain or obj.requires_grad or not obj.numel():
            return NotImplemented
        flat = obj.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        return _tensor, (pickle.PickleBuffer(flat.numpy()), obj.dtype, tuple(obj.shape))


def _tensor(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def send(pipe: Connection, value: Any) -> None:
    """Write a value into a pipe.

    Raises:
        Exception: it cannot be pickled; nothing was written then.
        OSError: nobody reads any more.
    """
    buffers: list[pickle.PickleBuffer] = []
    body = io.BytesIO()
    _Pickler(body, protocol=5, buffer_callback=buffers.append).dump(value)
    views = [buffer.raw() for buffer in buffers]
    pipe.send((body.getvalue(), [view.nbytes for view in views]))
    for view in views:
        if view.nbytes:
            pipe.send_bytes(view)


def receive(pipe: Connection) -> Any:
    """The next value of a pipe; its tensors own their memory.

    Raises:
        EOFError, OSError: the other end is gone, before or within it.
    """
    body, sizes = pipe.recv()
    buffers = [bytearray(size) for size in sizes]
    for buffer in buffers:
        if buffer:
            pipe.recv_bytes_into(buffer)
    return pickle.loads(body, buffers=buffers)
