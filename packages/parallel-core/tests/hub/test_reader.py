"""Reading slices of folders that the safetensors library wrote."""

import json
import random
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fivefold.parallel_core.errors import CheckpointError
from fivefold.parallel_core.hub import SafetensorsReader
from fivefold.parallel_core.hub.header import plan_header


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed": torch.randn(7, 5, generator=generator),
        "model.layers.0.w": torch.randn(3, 4, 5, generator=generator).to(torch.bfloat16),
        "model.layers.1.w": torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64),
        "scale": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "ids": torch.arange(11),
    }


@pytest.fixture(params=["single", "sharded"])
def folder(
    request: pytest.FixtureRequest, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> Path:
    if request.param == "single":
        save_file(tensors, tmp_path / "model.safetensors")
    else:
        save_shards(tmp_path, tensors)
    return tmp_path


def save_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Two tensors a shard, and an index."""
    weight_map = {}
    names = list(tensors)
    for i in range(0, len(names), 2):
        file = f"model-{i // 2 + 1:05d}-of-{len(names) // 2:05d}.safetensors"
        save_file({name: tensors[name] for name in names[i : i + 2]}, folder / file)
        weight_map |= dict.fromkeys(names[i : i + 2], file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_names_shapes_and_whole_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    with SafetensorsReader(folder) as reader:
        assert sorted(reader.names()) == sorted(tensors)
        assert "scale" in reader
        assert "other" not in reader
        for name, tensor in tensors.items():
            assert reader.shape(name) == tuple(tensor.shape)
            assert reader.dtype(name) == tensor.dtype
            read = reader.read(name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)


def test_random_slices_equal_numpy(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    draw = random.Random(0)
    with SafetensorsReader(folder) as reader:
        for name, tensor in list(tensors.items()) * 20:
            ends = [sorted(draw.choices(range(size + 1), k=2)) for size in tensor.shape]
            slices = tuple(slice(a, b) for a, b in ends)
            expected = tensor.to(torch.float64).numpy()[slices]
            read = reader.read(name, slices)
            assert read.shape == expected.shape
            assert np.array_equal(read.to(torch.float64).numpy(), expected)


def test_a_closed_reader_maps_its_files_again(
    folder: Path, tensors: dict[str, torch.Tensor]
) -> None:
    with SafetensorsReader(folder) as reader:
        reader.read("ids")
    assert torch.equal(reader.read("ids", [slice(None, 4)]), tensors["ids"][:4])


def test_results_are_copies(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    reader = SafetensorsReader(folder)
    reader.read("model.embed").fill_(7)
    reader.read("model.embed", (slice(0, 2), slice(0, 2))).fill_(8)
    assert torch.equal(reader.read("model.embed"), tensors["model.embed"])


@pytest.mark.parametrize(
    "slices",
    [
        (slice(0, 8), slice(0, 5)),
        (slice(-1, 2), slice(0, 5)),
        (slice(3, 2), slice(0, 5)),
        (slice(0, 7, 2), slice(0, 5)),
        (slice(0, 7),),
        (slice(0, 7), slice(0, 5), slice(0, 1)),
    ],
)
def test_slices_outside_are_errors(folder: Path, slices: tuple[slice, ...]) -> None:
    with pytest.raises(CheckpointError, match=r"'model\.embed' has shape \(7, 5\); asked for"):
        SafetensorsReader(folder).read("model.embed", slices)


def test_a_slice_reads_only_its_bytes(tmp_path: Path) -> None:
    """A file of 16 GiB of holes: reading it all would take as much memory."""
    rows, columns = 2**20, 2**12
    header, entries = plan_header({"big": ((rows, columns), torch.float32)}, {})
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(header)
        file.seek(len(header) + (rows - 1) * columns * 4)
        file.write(np.arange(columns, dtype=np.float32).tobytes())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with SafetensorsReader(tmp_path) as reader:
        last = reader.read("big", (slice(rows - 2, rows), slice(5, 9)))
        column = reader.read("big", (slice(0, 3), slice(0, columns)))
    assert last.tolist() == [[0.0] * 4, [5.0, 6.0, 7.0, 8.0]]
    assert column.untyped_storage().nbytes() == 3 * columns * 4
    assert entries["big"].stop == 2**34
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 * 1024, f"{grown} KiB of memory for two small slices"


def test_files_are_opened_when_needed(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_shards(tmp_path, tensors)
    (tmp_path / "model-00002-of-00003.safetensors").write_bytes(b"rubbish")
    with SafetensorsReader(tmp_path) as reader:
        assert torch.equal(reader.read("model.embed"), tensors["model.embed"])
        with pytest.raises(
            CheckpointError, match=r"model-00002-of-00003\.safetensors: not a whole"
        ):
            reader.shape("model.layers.1.w")


def test_truncated_shard_is_named_with_sizes(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    save_shards(tmp_path, tensors)
    shard = tmp_path / "model-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-17])
    expected = tensors["model.embed"].nbytes + tensors["model.layers.0.w"].nbytes
    message = rf"00001-of-00003\.safetensors: truncated.*{expected} bytes.*has {expected - 17}$"
    with pytest.raises(CheckpointError, match=message):
        SafetensorsReader(tmp_path).read("model.embed", (slice(0, 1), slice(0, 1)))


def test_missing_tensor_names_the_nearest(folder: Path) -> None:
    message = r"has no 'model\.layers\.2\.w'; nearest of 6: model\.layers\.\d\.w, model\.layers"
    with pytest.raises(CheckpointError, match=message):
        SafetensorsReader(folder).read("model.layers.2.w")
    with pytest.raises(CheckpointError, match="nearest of 6: none similar"):
        SafetensorsReader(folder).shape("QQQQQQ")


def test_tensor_that_its_shard_lacks(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_shards(tmp_path, tensors)
    save_file({"other": torch.ones(1)}, tmp_path / "model-00001-of-00003.safetensors")
    message = r"model-00001-of-00003\.safetensors has no 'model\.embed', which .*index\.json places"
    with pytest.raises(CheckpointError, match=message):
        SafetensorsReader(tmp_path).read("model.embed")


def test_missing_shards_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_shards(tmp_path, tensors)
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    message = r"lists 3 files, 1 of them missing: model-00003-of-00003\.safetensors$"
    with pytest.raises(CheckpointError, match=message):
        SafetensorsReader(tmp_path)


def test_missing_folder_and_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no folder .*nowhere"):
        SafetensorsReader(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor .*an empty folder"):
        SafetensorsReader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found pytorch_model\.bin$"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": [1]}'])
def test_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: damaged index"):
        SafetensorsReader(tmp_path)
