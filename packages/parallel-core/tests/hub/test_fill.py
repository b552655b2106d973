"""Filling boxes from per-expert files, against slices of the whole tensor."""

import itertools
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fivefold.parallel_core.box import Box
from fivefold.parallel_core.errors import CheckpointError
from fivefold.parallel_core.hub import SafetensorsReader, fill

SHAPE = (4, 2, 6, 5)  # experts, (gate, up), rows, columns


def whole() -> torch.Tensor:
    return torch.arange(240, dtype=torch.float32).reshape(SHAPE)


def split(folder: Path, depth: int) -> list[tuple[str, tuple[int, ...]]]:
    """Write ``whole()`` as one file entry for each index of its first ``depth`` dims."""
    indices = list(itertools.product(*map(range, SHAPE[:depth])))
    named = {f"part.{'.'.join(map(str, index)) or 'all'}": index for index in indices}
    tensors = {name: whole()[index].contiguous() for name, index in named.items()}
    save_file(tensors, folder / "model.safetensors")
    return list(named.items())


def random_box(draw: random.Random) -> Box:
    ends = [sorted(draw.choices(range(size + 1), k=2)) for size in SHAPE]
    return Box(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 4])
def test_random_boxes_equal_slices_of_the_whole(tmp_path: Path, depth: int) -> None:
    sources = split(tmp_path, depth)
    draw = random.Random(depth)
    draw.shuffle(sources)
    with SafetensorsReader(tmp_path) as reader:
        for box in [Box.whole(SHAPE), *(random_box(draw) for _ in range(40))]:
            tensor = torch.full(box.size, torch.nan)
            fill(tensor, box, SHAPE, sources, reader)
            assert torch.equal(tensor, whole()[box.slices])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int32])
def test_casts_to_the_dtype_of_the_target(tmp_path: Path, dtype: torch.dtype) -> None:
    sources = split(tmp_path, 1)
    box = Box((1, 0, 2, 0), (2, 2, 3, 5))
    tensor = torch.zeros(box.size, dtype=dtype)
    fill(tensor, box, SHAPE, sources, SafetensorsReader(tmp_path))
    assert torch.equal(tensor, whole()[box.slices].to(dtype))


def test_fills_views_and_parameters_in_place(tmp_path: Path) -> None:
    sources = split(tmp_path, 2)
    storage = torch.zeros(5, 6, 2, 4)
    view = storage.permute(3, 2, 1, 0)
    fill(view, Box.whole(SHAPE), SHAPE, sources, SafetensorsReader(tmp_path))
    assert torch.equal(storage, whole().permute(3, 2, 1, 0))
    parameter = torch.nn.Parameter(torch.zeros(1, 2, 6, 5))
    fill(parameter, Box((2, 0, 0, 0), (1, 2, 6, 5)), SHAPE, sources, SafetensorsReader(tmp_path))
    assert torch.equal(parameter.detach(), whole()[2:3])
    assert parameter.grad_fn is None
    assert parameter.requires_grad


def test_scalars_and_empty_boxes(tmp_path: Path) -> None:
    save_file({"scale": torch.tensor(2.5)}, tmp_path / "model.safetensors")
    reader = SafetensorsReader(tmp_path)
    tensor = torch.zeros(())
    fill(tensor, Box.whole(()), (), [("scale", ())], reader)
    assert tensor.item() == 2.5
    fill(torch.empty(0, 3), Box((2, 0), (0, 3)), (4, 3), [("not there", ())], reader)


def test_only_sources_in_the_box_are_read(tmp_path: Path) -> None:
    sources = [*split(tmp_path, 1)[2:3], ("missing.0", (0,)), ("missing.3", (3,))]
    box = Box((2, 0, 0, 0), (1, 2, 6, 5))
    tensor = torch.zeros(box.size)
    fill(tensor, box, SHAPE, sources, SafetensorsReader(tmp_path))
    assert torch.equal(tensor, whole()[2:3])
    with pytest.raises(CheckpointError, match=r"has no 'missing\.3'"):
        fill(
            torch.zeros(2, 2, 6, 5),
            Box((2, 0, 0, 0), (2, 2, 6, 5)),
            SHAPE,
            sources,
            SafetensorsReader(tmp_path),
        )


def test_wrong_shapes_on_disk_are_errors(tmp_path: Path) -> None:
    """Also where the slices themselves would fit, as in a vocabulary of another size."""
    save_file({"embed": torch.zeros(8, 3)}, tmp_path / "model.safetensors")
    reader = SafetensorsReader(tmp_path)
    message = r"'embed' on disk has shape \(8, 3\), the model needs \(6, 3\)"
    with pytest.raises(CheckpointError, match=message):
        fill(torch.zeros(2, 3), Box((0, 0), (2, 3)), (6, 3), [("embed", ())], reader)
    with pytest.raises(CheckpointError, match=r"the model needs \(8,\)"):
        fill(torch.zeros(2, 8), Box((0, 0), (2, 8)), (2, 8), [("embed", (0,))], reader)


def test_gaps_and_overlaps_of_sources_are_errors(tmp_path: Path) -> None:
    sources = split(tmp_path, 1)
    reader = SafetensorsReader(tmp_path)
    tensor = torch.zeros(SHAPE)
    with pytest.raises(
        CheckpointError, match=r"has 240 elements, its sources hold 180 of them: part\.0"
    ):
        fill(tensor, Box.whole(SHAPE), SHAPE, sources[:3], reader)
    with pytest.raises(CheckpointError, match=r"hold 300 of them"):
        fill(tensor, Box.whole(SHAPE), SHAPE, sources + sources[:1], reader)
    with pytest.raises(CheckpointError, match=r"hold 0 of them: no sources"):
        fill(tensor, Box.whole(SHAPE), SHAPE, [], reader)


def test_target_of_another_shape_is_an_error(tmp_path: Path) -> None:
    sources = split(tmp_path, 0)
    with pytest.raises(
        CheckpointError, match=r"cannot fill a tensor of \(2, 2\) with box \(4, 2, 6"
    ):
        fill(torch.zeros(2, 2), Box.whole(SHAPE), SHAPE, sources, SafetensorsReader(tmp_path))
