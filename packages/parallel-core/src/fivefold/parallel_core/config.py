"""Configuration as frozen dataclasses of plain data: strict reading, TOML files, overrides."""

import dataclasses
import tomllib
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args, get_origin

from fivefold.parallel_core.config_types import (
    Table,
    checked,
    described,
    fields_of,
    is_table,
    joined,
    listed,
    options_of,
    unknown_key,
)
from fivefold.parallel_core.errors import ConfigError

_C = TypeVar("_C", bound="Config")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(Table):
    """Base of every configuration: plain data that goes to a dict and comes back checked.

    A subclass repeats the decorator and declares fields of ``str``, ``int``, ``float``,
    ``bool``, ``None``, ``Literal``, other configs, and ``tuple``, ``dict[str, ...]`` and unions
    of these. It checks its values in ``__post_init__`` and raises ``ConfigError`` there (without
    a bare ``super()``, which does not work in slotted dataclasses before Python 3.14).

    >>> @dataclass(frozen=True, kw_only=True, slots=True)
    ... class Tiny(Config):
    ...     width: int
    ...     rates: tuple[float, ...] = (0.1,)
    >>> Tiny.from_dict({"width": 8}).to_dict()
    {'width': 8, 'rates': [0.1]}
    """

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold: nested configs as dicts, tuples as lists."""
        return {name: _plain(getattr(self, name)) for name in fields_of(type(self))}

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], where: str = "") -> Self:
        """Build the config from plain data such as a parsed TOML or JSON file.

        Nothing is converted silently, except ``int`` to ``float`` and lists to tuples.

        Args:
            mapping: field names to values; fields with defaults may be left out.
            where: dotted path of this table in its file, for messages.

        Raises:
            ConfigError: an unknown or missing key, a value of the wrong type, or a value that
                the config itself refuses; the message names the dotted key.
        """
        kinds = fields_of(cls)
        for key in mapping:
            if key not in kinds:
                raise ConfigError(unknown_key(key, kinds, where))
        missing = [name for name in _required(cls) if name not in mapping]
        if missing:
            raise ConfigError(
                f"{where or cls.__name__}: missing {listed(missing)}; "
                f"{cls.__name__} needs {listed(_required(cls))}"
            )
        values = {key: checked(mapping[key], kinds[key], joined(where, key)) for key in mapping}
        try:
            return cls(**values)
        except ConfigError as error:
            if not where:
                raise
            raise ConfigError(f"{where}: {error}") from None


def replace(config: _C, **changes: object) -> _C:
    """A copy of ``config`` with some fields changed, checked as strictly as ``from_dict``.

    Raises:
        ConfigError: as ``Config.from_dict``.
    """
    kept = {name: getattr(config, name) for name in fields_of(type(config))}
    return type(config).from_dict(kept | changes)


def override(config: _C, changes: Mapping[str, str]) -> _C:
    """Apply command line overrides such as ``{"model.hidden_size": "64"}``.

    The text is read by the field's type: numbers as Python writes them, ``true``/``false``,
    ``none`` where the field is optional, tuples with commas (``"1,2"``; ``""`` is empty),
    literals as they are. The result is checked once, after all changes, so that values that
    depend on each other can change together.

    Args:
        config: what to start from; it is not changed.
        changes: dotted field names to text.

    Raises:
        ConfigError: an unknown key, or text that is no value of the field's type.
    """
    data = config.to_dict()
    for key, text in changes.items():
        _set(data, type(config), key.split("."), text, "")
    return type(config).from_dict(data)


def load_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file into plain data for ``Config.from_dict``.

    Raises:
        ConfigError: the file is missing, is no text, or is not TOML (with line and column).
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: byte {error.start}") from None
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror}") from None


def _required(cls: type[Config]) -> list[str]:
    """Names of the fields that have no default."""
    missing = dataclasses.MISSING
    return [
        field.name
        for field in dataclasses.fields(cls)
        if field.init and field.default is missing and field.default_factory is missing
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _set(data: dict[str, Any], kind: Any, keys: list[str], text: str, where: str) -> None:
    """Put ``text``, read by its field's type, at the path ``keys`` of the plain ``data``."""
    table = next((k for k in options_of(kind) if is_table(k) or get_origin(k) is dict), None)
    if table is None:
        raise ConfigError(
            f"{where}: is {described(kind)} and has no key {'.'.join(keys)!r} inside it"
        )
    key, rest = keys[0], keys[1:]
    kinds = fields_of(table) if is_table(table) else {key: get_args(table)[1]}
    if key not in kinds:
        raise ConfigError(unknown_key(key, kinds, where))
    if not rest:
        data[key] = _read(text, kinds[key])
        return
    if not isinstance(data.get(key), dict):
        data[key] = {}
    _set(data[key], kinds[key], rest, text, joined(where, key))


def _read(text: str, kind: Any) -> Any:
    """``text`` as plain data of ``kind``; unreadable text stays text, which ``checked`` refuses."""
    options = options_of(kind)
    if types.NoneType in options and text.lower() in ("none", "null"):
        return None
    # Text is also a legal str, so every other reading goes first.
    for option in sorted(options, key=lambda option: option is str):
        value = _read_one(text, option)
        try:
            checked(value, option, "")
        except ConfigError:
            continue
        return value
    return text


def _read_one(text: str, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if str(choice) == text), text)
    if get_origin(kind) is tuple:
        items = get_args(kind)
        parts = [part.strip() for part in text.split(",")] if text.strip() else []
        return [
            _read(part, items[0 if items[-1] is Ellipsis else i % len(items)])
            for i, part in enumerate(parts)
        ]
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return text
    return text
