"""Strict reading, overrides and TOML files of configurations."""

import json
from dataclasses import FrozenInstanceError, dataclass, field
from typing import Any, Literal

import pytest

from fivefold.parallel_core.config import Config, load_toml, override, replace
from fivefold.parallel_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope(Config):
    theta: float = 1e4
    scaling: Literal["none", "yarn"] = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Model(Config):
    hidden_size: int
    num_layers: int = 2
    dropout: float = 0.0
    tied: bool = False
    name: str = "tiny"
    window: int | None = None
    rope: Rope = field(default_factory=Rope)
    long_rope: Rope | None = None
    ratios: tuple[float, ...] = ()
    grid: tuple[int, int] = (1, 1)
    seed: int | Literal["auto"] = 0
    extra: dict[str, int] = field(default_factory=dict)
    bits: Literal[8, 16] = 16

    def __post_init__(self) -> None:
        if self.hidden_size % 2:
            raise ConfigError(f"hidden_size {self.hidden_size}: must be even")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run(Config):
    model: Model
    steps: int = 10


FULL = {
    "model": {
        "hidden_size": 8,
        "num_layers": 3,
        "dropout": 0.5,
        "tied": True,
        "name": "x",
        "window": 4,
        "rope": {"theta": 5.0, "scaling": "yarn"},
        "long_rope": {"theta": 6.0, "scaling": "none"},
        "ratios": [0.5, 1.0],
        "grid": [2, 3],
        "seed": "auto",
        "extra": {"a": 1},
        "bits": 8,
    },
    "steps": 7,
}


def run(**model: Any) -> Run:
    return Run.from_dict({"model": {"hidden_size": 8} | model})


def test_round_trip_through_json() -> None:
    config = Run.from_dict(FULL)
    assert config.to_dict() == FULL
    assert Run.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.model.rope == Rope(theta=5.0, scaling="yarn")
    assert config.model.ratios == (0.5, 1.0)
    assert run() == Run(model=Model(hidden_size=8))
    assert run().to_dict()["model"]["window"] is None


def test_frozen_and_slotted() -> None:
    config = run()
    with pytest.raises(FrozenInstanceError):
        config.steps = 3  # type: ignore[misc]
    assert not hasattr(config, "__dict__")


def test_nested_instances_are_accepted() -> None:
    model = Model(hidden_size=4)
    assert Run.from_dict({"model": model}).model is model


def test_int_becomes_float_and_nothing_else_converts() -> None:
    dropout = run(dropout=1).model.dropout
    assert dropout == 1.0
    assert type(dropout) is float


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hidden_size": "8"}, r"^model\.hidden_size: found '8' \(str\), expected int$"),
        ({"hidden_size": 8.0}, r"^model\.hidden_size: found 8\.0 \(float\), expected int$"),
        ({"hidden_size": True}, r"^model\.hidden_size: found True \(bool\), expected int$"),
        ({"tied": 1}, r"^model\.tied: found 1 \(int\), expected true or false$"),
        ({"dropout": "0.1"}, r"^model\.dropout: found '0\.1' \(str\), expected float$"),
        ({"dropout": True}, r"^model\.dropout: found True \(bool\), expected float$"),
        ({"name": None}, r"^model\.name: found none, expected str$"),
        ({"window": "4"}, r"^model\.window: found '4' \(str\), expected int or none$"),
        ({"ratios": [0.5, "x"]}, r"^model\.ratios\[1\]: found 'x' \(str\), expected float$"),
        ({"ratios": 0.5}, r"^model\.ratios: found 0\.5 \(float\), expected a list of float$"),
        (
            {"grid": [1, 2, 3]},
            r"^model\.grid: found \[1, 2, 3\] \(list\), expected a list of 2: int, int$",
        ),
        (
            {"rope": {"scaling": "linear"}},
            r"^model\.rope\.scaling: found 'linear' \(str\), expected one of 'none', 'yarn'$",
        ),
        ({"rope": 3}, r"^model\.rope: found 3 \(int\), expected a table with keys theta, scaling$"),
        (
            {"long_rope": {"theta": "a"}},
            r"^model\.long_rope\.theta: found 'a' \(str\), expected float$",
        ),
        ({"bits": 4}, r"^model\.bits: found 4 \(int\), expected one of 8, 16$"),
        ({"bits": 8.0}, r"^model\.bits: found 8\.0"),
        ({"seed": "none"}, r"^model\.seed: found 'none' \(str\), expected int or one of 'auto'$"),
        ({"extra": {"a": 1.5}}, r"^model\.extra\.a: found 1\.5 \(float\), expected int$"),
        ({"extra": [1]}, r"^model\.extra: found \[1\] \(list\), expected a table of int$"),
        ({"hidden_size": 7}, r"^model: hidden_size 7: must be even$"),
        (
            {"rope": {"thetta": 1.0}},
            r"^unknown key 'model\.rope\.thetta'; did you mean 'theta'\? legal keys: theta, s",
        ),
        ({"zzz": 1}, r"^unknown key 'model\.zzz'; legal keys: hidden_size, num_layers, "),
    ],
)
def test_wrong_values_name_key_found_and_expected(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(**model)


def test_missing_keys_are_listed() -> None:
    with pytest.raises(ConfigError, match=r"^model: missing hidden_size; Model needs hidden_size$"):
        Run.from_dict({"model": {}})
    with pytest.raises(ConfigError, match=r"^Run: missing model"):
        Run.from_dict({"steps": 3})
    with pytest.raises(ConfigError, match=r"^run\.model: missing hidden_size"):
        Run.from_dict({"model": {}}, where="run")


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("model.hidden_size", "64", {"hidden_size": 64}),
        ("model.hidden_size", "1_024", {"hidden_size": 1024}),
        ("model.dropout", "1e-1", {"dropout": 0.1}),
        ("model.dropout", "1", {"dropout": 1.0}),
        ("model.tied", "true", {"tied": True}),
        ("model.tied", "False", {"tied": False}),
        ("model.name", "64", {"name": "64"}),
        ("model.name", "none", {"name": "none"}),
        ("model.window", "128", {"window": 128}),
        ("model.window", "none", {"window": None}),
        ("model.rope.theta", "5e5", {"rope": Rope(theta=5e5)}),
        ("model.rope.scaling", "yarn", {"rope": Rope(scaling="yarn")}),
        ("model.long_rope.theta", "2", {"long_rope": Rope(theta=2.0)}),
        ("model.ratios", "0.5, 1", {"ratios": (0.5, 1.0)}),
        ("model.ratios", "", {"ratios": ()}),
        ("model.grid", "4,5", {"grid": (4, 5)}),
        ("model.seed", "auto", {"seed": "auto"}),
        ("model.seed", "3", {"seed": 3}),
        ("model.extra.b", "2", {"extra": {"b": 2}}),
        ("model.bits", "8", {"bits": 8}),
    ],
)
def test_override_reads_text_by_type(key: str, text: str, expected: dict[str, Any]) -> None:
    start = run()
    changed = override(start, {key: text})
    assert changed.model == replace(start.model, **expected)
    assert start == run()


def test_override_checks_only_the_end_result() -> None:
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Span(Config):
        start: int = 0
        stop: int = 1

        def __post_init__(self) -> None:
            if self.start >= self.stop:
                raise ConfigError(f"start {self.start} must be below stop {self.stop}")

    assert override(Span(), {"start": "5", "stop": "6"}) == Span(start=5, stop=6)
    with pytest.raises(ConfigError, match=r"^start 5 must be below stop 1$"):
        override(Span(), {"start": "5"})


def test_override_can_remove_an_optional_table() -> None:
    config = run(long_rope={})
    assert config.model.long_rope == Rope()
    assert override(config, {"model.long_rope": "none"}).model.long_rope is None


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("model.hidden_size", "abc", r"^model\.hidden_size: found 'abc' \(str\), expected int$"),
        ("model.hidden_size", "1e3", r"^model\.hidden_size: found '1e3' \(str\), expected int$"),
        ("model.tied", "maybe", r"^model\.tied: found 'maybe' \(str\), expected true or false$"),
        ("model.rope", "yarn", r"^model\.rope: found 'yarn' \(str\), expected a table"),
        ("model.grid", "1,2,3", r"^model\.grid: found .* expected a list of 2"),
        (
            "model.hiden_size",
            "4",
            r"^unknown key 'model\.hiden_size'; did you mean 'hidden_size'\?",
        ),
        (
            "modle.hidden_size",
            "4",
            r"^unknown key 'modle'; did you mean 'model'\? legal keys: model, steps$",
        ),
        ("steps.x.y", "4", r"^steps: is int and has no key 'x\.y' inside it$"),
        ("model.hidden_size", "7", r"^model: hidden_size 7: must be even$"),
    ],
)
def test_override_errors(key: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(run(), {key: text})


def test_replace_is_strict() -> None:
    model = Model(hidden_size=4)
    assert replace(model, num_layers=9).num_layers == 9
    assert replace(model, rope=Rope(theta=3.0)).rope.theta == 3.0
    with pytest.raises(ConfigError, match="did you mean 'num_layers'"):
        replace(model, num_layer=9)
    with pytest.raises(ConfigError, match="num_layers: found '9'"):
        replace(model, num_layers="9")


def test_load_toml(tmp_path: Any) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        "steps = 3\n[model]\nhidden_size = 16\nratios = [1, 2.5]\n[model.rope]\ntheta = 10\n"
    )
    config = Run.from_dict(load_toml(path))
    assert config == Run(
        steps=3, model=Model(hidden_size=16, ratios=(1.0, 2.5), rope=Rope(theta=10.0))
    )


def test_load_toml_errors_are_one_line(tmp_path: Any) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("steps = 3\nmodel = = 4\n")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"a = '\xff'")
    for path, message in [
        (broken, "not valid TOML: .*line 2"),
        (binary, "not UTF-8"),
        (tmp_path / "none.toml", "cannot read config file .*none.toml: No such file"),
        (tmp_path, "cannot read config file .*: Is a directory"),
    ]:
        with pytest.raises(ConfigError, match=message) as info:
            load_toml(path)
        assert "\n" not in str(info.value)


def test_reading_configs_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, fivefold.parallel_core.config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
