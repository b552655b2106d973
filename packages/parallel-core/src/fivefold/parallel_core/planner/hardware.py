"""What a machine can do, read from TOML: the ones that come with the package, or the user's own."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from fivefold.parallel_core.config import Config, load_toml
from fivefold.parallel_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware(Config):
    """A cluster of like machines.

    Attributes:
        name: for reports.
        memory: bytes of one device.
        reserved: bytes of it that the driver, libraries and the allocator take.
        flops: peak FLOP/s of one device in the precision of training.
        bandwidth: bytes/s of its memory.
        node_size: devices joined by the fast link.
        node_bandwidth: bytes/s that a device sends inside a node.
        network_bandwidth: bytes/s that a device sends between nodes.
        node_latency, network_latency: seconds of one message.
        num_cores: multiprocessors, among which a product's tiles are dealt out.
        efficiency: share of the peak FLOP/s that a large product reaches.
        half_size: length of the sums at which a product reaches half of that.
        attention_efficiency: share of the peak that a fused attention reaches.
        bandwidth_efficiency: share of the memory's bandwidth that kernels reach.
        link_efficiency, network_efficiency: shares of the links' bandwidth that collectives reach.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    reserved: int = 4 << 30
    node_size: int = 8
    node_latency: float = 3e-6
    network_latency: float = 10e-6
    num_cores: int = 132
    efficiency: float = 0.8
    half_size: float = 64.0
    attention_efficiency: float = 0.5
    bandwidth_efficiency: float = 0.8
    link_efficiency: float = 0.8
    network_efficiency: float = 0.8

    def __post_init__(self) -> None:
        for name in ("memory", "flops", "bandwidth", "node_bandwidth", "network_bandwidth"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)}; it must be above 0")
        for name in (n for n in self.__dataclass_fields__ if n.endswith("efficiency")):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}; legal: above 0, at most 1")
        if self.node_size < 1:
            raise ConfigError(f"node_size={self.node_size}; it must be at least 1")

    @property
    def usable(self) -> int:
        """Bytes that a plan may take."""
        return self.memory - self.reserved


def hardware_names() -> list[str]:
    """Machines that come with the package."""
    folder = files(__package__) / "machines"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name[-5:] == ".toml")


def hardware(name: str) -> Hardware:
    """A machine by name, or of the user's TOML file.

    Raises:
        ConfigError: no such machine, or a key in the file that is not one of a machine's.
    """
    if name.endswith(".toml"):
        return Hardware.from_dict(load_toml(Path(name)))
    names = hardware_names()
    if name.lower() not in names:
        raise ConfigError(f"no machine {name!r}; legal: {', '.join(names)}, or a TOML file")
    return Hardware.from_dict(
        load_toml(Path(str(files(__package__) / f"machines/{name.lower()}.toml")))
    )
