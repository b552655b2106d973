"""Models as files: folders of safetensors in Hugging Face form, and repositories of them."""

from fivefold.parallel_core.files import atomic_write_bytes, atomic_write_text, write_json
from fivefold.parallel_core.hub.fill import fill
from fivefold.parallel_core.hub.reader import SafetensorsReader
from fivefold.parallel_core.hub.repository import push, resolve
from fivefold.parallel_core.hub.shared_writer import write_together
from fivefold.parallel_core.hub.writer import write_sharded

__all__ = [
    "SafetensorsReader",
    "atomic_write_bytes",
    "atomic_write_text",
    "fill",
    "push",
    "resolve",
    "write_json",
    "write_sharded",
    "write_together",
]
