"""Failures and stragglers of a long run, on paper: every number here is a prediction.

Failures are taken as independent and evenly spread over time, so that the mean time between them
falls as 1/n with the number of devices n (Daly, 2006).
"""

from dataclasses import dataclass
from math import exp, sqrt
from statistics import NormalDist

from fivefold.parallel_core.config import Config
from fivefold.parallel_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Reliability(Config):
    """What interrupts a run.

    Attributes:
        device_hours: mean hours between failures of one device with its share of the machine;
            50,000 is near the rate that large runs on H100s report.
        save_seconds: that a checkpoint stops the run for.
        restart_seconds: from a failure to the first step after it, loading included.
        step_deviation: standard deviation of one device's step over its mean.
    """

    device_hours: float = 50_000.0
    save_seconds: float = 60.0
    restart_seconds: float = 600.0
    step_deviation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("device_hours", "save_seconds", "restart_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)}; it must be above 0")
        if self.step_deviation < 0:
            raise ConfigError(f"step_deviation={self.step_deviation}; it must not be below 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """What is left of a run's time.

    Attributes:
        between_failures: mean seconds from one to the next, anywhere.
        interval: seconds of work between checkpoints that lose the least.
        useful: share of the time whose work is kept.
        slowest: expected step of the slowest device over the mean device's.
    """

    between_failures: float
    interval: float
    useful: float
    slowest: float

    @property
    def share(self) -> float:
        """Of the undisturbed speed."""
        return self.useful / self.slowest


def best_interval(save: float, between_failures: float) -> float:
    """Daly's seconds of work between checkpoints; the first term alone is Young's (1974).

    A checkpoint that takes twice as long as a failure is away cannot pay: then the mean itself.
    """
    if save >= 2 * between_failures:
        return between_failures
    x = sqrt(save / (2 * between_failures))
    return sqrt(2 * save * between_failures) * (1 + x / 3 + x * x / 9) - save


def useful_share(interval: float, save: float, restart: float, between_failures: float) -> float:
    """Work over expected time, failures during checkpoints and restarts included (Daly, 2006)."""
    each = (interval + save) / between_failures
    if each + restart / between_failures > 700:
        return 0.0
    return interval / (between_failures * exp(restart / between_failures) * (exp(each) - 1))


def slowest_of(num_devices: int, deviation: float) -> float:
    """Expected largest of so many normal steps over their mean, where all wait for the slowest.

    Blom's approximation of the largest (1958).
    """
    if num_devices < 2:
        return 1.0
    return 1 + deviation * NormalDist().inv_cdf((num_devices - 0.375) / (num_devices + 0.25))


def goodput(num_devices: int, reliability: Reliability) -> Goodput:
    """Expectation for a run on so many devices."""
    between = 3600 * reliability.device_hours / num_devices
    interval = best_interval(reliability.save_seconds, between)
    return Goodput(
        between_failures=between,
        interval=interval,
        useful=useful_share(
            interval, reliability.save_seconds, reliability.restart_seconds, between
        ),
        slowest=slowest_of(num_devices, reliability.step_deviation),
    )
