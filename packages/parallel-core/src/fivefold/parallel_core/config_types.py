"""Values of a configuration beside the types that its fields declare: what fits, and in words."""

import dataclasses
import difflib
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fivefold.parallel_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """What ``Config`` derives from, so that a type can be seen to be a table of its own."""


def fields_of(cls: type[Table]) -> dict[str, Any]:
    """Field names to resolved types, in the order of declaration."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def checked(value: Any, kind: Any, where: str) -> Any:
    """``value`` as the type ``kind``, or a ConfigError that says what ``kind`` would be."""
    if kind is Any:
        return value
    if is_table(kind) and isinstance(value, Mapping):
        return kind.from_dict(value, where)
    origin = get_origin(kind)
    if origin in _CONTAINERS:
        return _CONTAINERS[origin](value, kind, where)
    if kind is float and type(value) is int:
        return float(value)
    # type(...) and not isinstance: True is an int in Python, and no count in a config.
    if type(value) is kind or (is_table(kind) and isinstance(value, kind)):
        return value
    raise mismatch(value, kind, where)


def _check_union(value: Any, kind: Any, where: str) -> Any:
    options = [option for option in get_args(kind) if option is not types.NoneType]
    if value is None and len(options) < len(get_args(kind)):
        return None
    if len(options) == 1 and (is_table(options[0]) or get_origin(options[0])):
        return checked(value, options[0], where)  # its own message says where inside it is wrong
    for option in sorted(options, key=lambda option: type(value) is not option):
        try:
            return checked(value, option, where)
        except ConfigError:
            continue
    raise mismatch(value, kind, where)


def _check_literal(value: Any, kind: Any, where: str) -> Any:
    for choice in get_args(kind):
        if type(choice) is type(value) and choice == value:
            return choice
    raise mismatch(value, kind, where)


def _check_tuple(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, tuple | list):
        raise mismatch(value, kind, where)
    items = get_args(kind)
    if len(items) == 2 and items[1] is Ellipsis:
        items = items[:1] * len(value)
    if len(items) != len(value):
        raise mismatch(value, kind, where)
    pairs = zip(value, items, strict=True)
    return tuple(checked(item, of, f"{where}[{i}]") for i, (item, of) in enumerate(pairs))


def _check_dict(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise mismatch(value, kind, where)
    of = get_args(kind)[1]
    return {key: checked(item, of, joined(where, key)) for key, item in value.items()}


_CONTAINERS: dict[Any, Callable[[Any, Any, str], Any]] = {
    types.UnionType: _check_union,
    Union: _check_union,
    Literal: _check_literal,
    tuple: _check_tuple,
    dict: _check_dict,
}


def options_of(kind: Any) -> tuple[Any, ...]:
    """The types of a union; of any other type that one."""
    return get_args(kind) if get_origin(kind) in (types.UnionType, Union) else (kind,)


def is_table(kind: Any) -> bool:
    """Whether a type is a configuration."""
    return isinstance(kind, type) and issubclass(kind, Table)


def joined(where: str, key: str) -> str:
    """The dotted key of ``key`` in the table ``where``."""
    return f"{where}.{key}" if where else key


def listed(names: Iterable[str]) -> str:
    """Names in one line."""
    return ", ".join(names)


def unknown_key(key: Any, legal: Iterable[str], where: str) -> str:
    """What to say of a key that a table has not, with the nearest one that it has."""
    near = difflib.get_close_matches(str(key), list(legal), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"unknown key {joined(where, str(key))!r}{hint} legal keys: {listed(legal)}"


def mismatch(value: Any, kind: Any, where: str) -> ConfigError:
    """The error for a value that is not of the type ``kind``."""
    found = "none" if value is None else f"{value!r} ({type(value).__name__})"
    return ConfigError(f"{where}: found {found}, expected {described(kind)}")


def described(kind: Any) -> str:
    """A type in words that a writer of TOML knows."""
    origin, items = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + listed(repr(choice) for choice in items)
    if origin is tuple and items[-1] is Ellipsis:
        return f"a list of {described(items[0])}"
    if origin is tuple:
        return f"a list of {len(items)}: {listed(map(described, items))}"
    if origin is dict:
        return f"a table of {described(items[1])}"
    if origin in (types.UnionType, Union):
        return " or ".join(map(described, items))
    if is_table(kind):
        return f"a table with keys {listed(fields_of(kind))}"
    return {types.NoneType: "none", bool: "true or false"}.get(
        kind, getattr(kind, "__name__", str(kind))
    )
