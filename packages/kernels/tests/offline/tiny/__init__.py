"""An op whose kernels have one fault each, to see that the report notices."""

from importlib import import_module
from typing import Any


def tiny(*, start: str, backend: str, **inputs: Any) -> None:
    starts = getattr(import_module(f"tiny.{backend}"), start, None)
    if starts is not None:
        starts(**inputs)
