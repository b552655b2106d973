"""The most that a pipeline rank holds at once, in closed form: no schedule is built.

``fivefold.parallel_core.in_flight`` reads the same off torch's schedules; tests hold both equal.
"""

from collections.abc import Iterator, Sequence

from fivefold.parallel_core.pipeline_config import PipelineConfig

CLOSED = ("GPipe", "1F1B", "Interleaved1F1B")
"""Schedules known here; others are read off torch's."""


def peak_held(
    config: PipelineConfig,
    rank: int,
    num_ranks: int,
    num_microbatches: int,
    sizes: Sequence[int],
) -> int:
    """Bytes of activations that a rank holds at once.

    Args:
        config: the schedule.
        rank: of the pipeline.
        num_ranks: of the pipeline.
        num_microbatches: in a step.
        sizes: bytes of one microbatch of each of the rank's stages, in order of stages.

    Raises:
        ConfigError: the schedule cannot deal the microbatches out.
    """
    config.check(num_ranks, num_microbatches)
    if num_ranks == 1:
        return sizes[0]
    if config.schedule == "GPipe":
        return num_microbatches * sizes[0]
    if config.schedule == "1F1B":
        return min(num_microbatches, num_ranks - rank) * sizes[0]
    if config.schedule == "Interleaved1F1B":
        return _interleaved(rank, num_ranks, num_microbatches, sizes)
    return _from_schedule(config, rank, num_ranks, num_microbatches, sizes)


def _interleaved(rank: int, num_ranks: int, num_microbatches: int, sizes: Sequence[int]) -> int:
    """Forwards to warm up, then a backward and a forward in turn (arXiv 2104.04473)."""
    parts = len(sizes)
    total = num_microbatches * parts
    ahead = min(total, 2 * (num_ranks - 1 - rank) + (parts - 1) * num_ranks + 1)
    forwards = _parts(num_ranks, parts, total)
    live = sum(sizes[next(forwards)] for _ in range(ahead))
    peak = live
    # What is held repeats itself once every stage had all pipeline ranks' worth of microbatches.
    rounds = min(total - ahead, num_ranks * parts)
    for backward, forward in zip(_parts(num_ranks, parts, rounds), forwards, strict=False):
        live += sizes[forward] - sizes[parts - 1 - backward]
        peak = max(peak, live)
    return peak


def _parts(num_ranks: int, parts: int, count: int) -> Iterator[int]:
    return (index // num_ranks % parts for index in range(count))


def _from_schedule(
    config: PipelineConfig,
    rank: int,
    num_ranks: int,
    num_microbatches: int,
    sizes: Sequence[int],
) -> int:
    # Torch is needed for these schedules alone.
    from fivefold.parallel_core.in_flight import ChunkBytes, peak_bytes, schedule_orders

    order = schedule_orders(config, num_ranks, num_microbatches)[rank]
    chunks = {
        config.stage_index(rank, part, num_ranks): ChunkBytes(forward=size, after_input=size)
        for part, size in enumerate(sizes)
    }
    return peak_bytes(order, chunks)
