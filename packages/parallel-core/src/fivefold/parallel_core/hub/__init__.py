"""Models as files: folders of safetensors in Hugging Face form, and repositories of them."""

from ..files import atomic_write_bytes, atomic_write_text, write_json
from .fill import fill
from .reader import SafetensorsReader
from .repository import push, resolve
from .writer import write_sharded

__all__ = [
    "SafetensorsReader",
    "atomic_write_bytes",
    "atomic_write_text",
    "fill",
    "push",
    "resolve",
    "write_json",
    "write_sharded",
]
