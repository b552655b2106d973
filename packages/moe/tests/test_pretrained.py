import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from fivefold.moe import MoEConfig, MoEError, MoEForCausalLM
from fivefold.moe.errors import MoEConfigError, MoEInputError, MoEWeightsError
from fivefold.moe.hf import parameter_shapes
from fivefold.moe.pretrained import load_parameters, read_config
from fivefold.parallel_core import hub
from fivefold.parallel_core.box import Box
from fivefold.parallel_core.errors import CheckpointError
from fivefold.parallel_core.hub import pretrained
from fivefold.parallel_core.inference import whole_logits
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.topology import Topology

Make = Callable[..., MoEConfig]


def folder_tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def same(first: Path, second: Path) -> bool:
    a, b = folder_tensors(first), folder_tensors(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def saved(tiny: Make, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    MoEForCausalLM(tiny()).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("shard", ["1GB", "10KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_there_and_back(
    tiny: Make, tmp_path: Path, shard: str, tied: bool, dtype: torch.dtype
) -> None:
    """Transformers' files to ours to theirs to ours, with the same bits all the way."""
    config = tiny(tie_word_embeddings=tied)
    theirs = MixtralForCausalLM(MixtralConfig(**config.to_hf())).to(dtype).eval()
    theirs.save_pretrained(tmp_path / "a", max_shard_size=shard)
    ours = MoEForCausalLM.from_pretrained(tmp_path / "a")
    assert ours.config == config and not ours.training
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    ours.save_pretrained(tmp_path / "b", max_shard_size=shard)
    assert same(tmp_path / "a", tmp_path / "b")
    files = [len(list((tmp_path / d).glob("*.safetensors"))) for d in "ab"]
    assert (files == [1, 1]) if shard == "1GB" else min(files) > 3
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(info.values())
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
    again.save_pretrained(tmp_path / "c", max_shard_size=shard)
    last = MoEForCausalLM.from_pretrained(tmp_path / "c")
    assert all(map(torch.equal, ours.parameters(), last.parameters()))
    x = torch.randint(48, (2, 7))
    with torch.no_grad():
        found, wanted = last(x).double(), theirs(x).logits.double()
        exact = last.double()(x)
    # Rounding is as large as theirs; the median, since a token or two may be routed elsewhere.
    errors = [(logits - exact).abs().median() for logits in (found, wanted)]
    assert errors[0] <= 1.5 * errors[1] < 0.05
    if dtype is torch.float32:
        assert (found - wanted).abs().max() <= 2e-5


def test_files_of_a_save(saved: Path) -> None:
    names = {path.name for path in saved.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    config = json.loads((saved / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("mixtral", "float32")
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    card = (saved / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "{" not in card
    total = sum(t.numel() for t in folder_tensors(saved).values())
    assert f"| {total:,}; {total - 2 * 3 * 3 * 24 * 32:,} |" in card


def test_a_card_of_ones_own_is_kept(tiny: Make, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    MoEForCausalLM(tiny()).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_generation_config_for_transformers(tiny: Make, tmp_path: Path) -> None:
    MoEForCausalLM(tiny(eos_token_id=(3, 4), bos_token_id=1)).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.generation_config.eos_token_id == [3, 4]
    assert theirs.generation_config.bos_token_id == 1


def test_another_dtype(saved: Path) -> None:
    wide = MoEForCausalLM.from_pretrained(saved, dtype=torch.float64)
    narrow = MoEForCausalLM.from_pretrained(str(saved), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float64}
    for a, b in zip(wide.parameters(), narrow.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)


def test_weights_are_not_drawn_before_they_are_read(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = torch.get_rng_state()
    MoEForCausalLM.from_pretrained(saved)
    assert torch.equal(torch.get_rng_state(), state)


@dataclass(frozen=True)
class Part:
    name: str
    tensor: Tensor
    box: Box
    shape: tuple[int, ...]


def test_only_the_slices_that_are_held(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dict(MoEForCausalLM.from_pretrained(saved).named_parameters())
    asked: list[int] = []
    view = hub.SafetensorsReader.view

    def count(self: Any, name: str, slices: Any = None) -> Tensor:
        tensor = view(self, name, slices)
        asked.append(tensor.numel())
        return tensor

    monkeypatch.setattr(hub.SafetensorsReader, "view", count)
    boxes = {
        "layers.1.mlp.experts.gate_up": Box((1, 0, 4, 0), (3, 2, 5, 32)),
        "layers.1.mlp.experts.down": Box((1, 0, 4), (3, 32, 5)),
        "layers.0.attention.o_proj.weight": Box((0, 8), (32, 8)),
        "embed_tokens.weight": Box((40, 0), (8, 32)),
        "norm.weight": Box((0,), (0,)),
    }
    shapes = parameter_shapes(read_config(saved))
    parts = [
        Part(name, torch.full(box.size, torch.nan), box, shapes[name])
        for name, box in boxes.items()
    ]
    with hub.SafetensorsReader(saved) as reader:
        load_parameters(parts, read_config(saved), reader)  # type: ignore[arg-type]
    for part in parts:
        assert torch.equal(part.tensor, whole[part.name][part.box.slices]), part.name
    assert sum(asked) == sum(box.numel for box in boxes.values())


@pytest.mark.parametrize(
    ("degrees", "changes"),
    [
        ({"tp": 2, "pp": 2, "ep": 2}, {}),
        ({"cp": 2, "ep": 2, "etp": 2}, {}),
        # The embedding on both stages, and one key head on two ranks.
        ({"tp": 2, "pp": 2, "ep": 2}, {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    ],
    ids=str,
)
def test_each_rank_reads_its_own(
    tiny: Make, tmp_path: Path, degrees: dict[str, int], changes: dict[str, Any]
) -> None:
    MoEForCausalLM(tiny(num_experts=4, **changes)).save_pretrained(tmp_path)
    x = torch.randint(48, (2, 8))

    def logits() -> tuple[Tensor, int]:
        topology = Topology(Layout(4, **degrees))
        model = MoEForCausalLM.from_pretrained(tmp_path, topology, dtype=torch.float64)
        out = whole_logits(model, topology, x, vocab_size=48, hidden_size=32)
        return out, sum(parameter.numel() for parameter in model.parameters())

    whole = MoEForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    total = sum(parameter.numel() for parameter in whole.parameters())
    for found, held in launch(logits, 4, timeout=120):
        torch.testing.assert_close(found, whole(x).detach(), rtol=1e-11, atol=1e-12)
        assert held < 0.55 * total


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


GATE = "model.layers.0.block_sparse_moe.gate.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(GATE), f"missing: {GATE}; not of this model: none"),
        (lambda t: t.update(extra=torch.ones(1)), "missing: none; not of this model: extra"),
        (
            lambda t: t.update({GATE: torch.zeros(4, 32)}),
            rf"'{GATE}' on disk has shape \(4, 32\), the model needs \(5, 32\)",
        ),
    ],
)
def test_weights_of_another_model(saved: Path, change: Any, message: str) -> None:
    rewrite(saved, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        MoEForCausalLM.from_pretrained(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_truncated_file_is_named(saved: Path, keep: float) -> None:
    path = saved / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        MoEForCausalLM.from_pretrained(saved)


def test_missing_shard_is_named(tiny: Make, tmp_path: Path) -> None:
    MoEForCausalLM(tiny()).save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / sorted(tmp_path.glob("*.safetensors"))[1].name).unlink()
    with pytest.raises(CheckpointError, match=r"missing: model-00002-of-\d+\.safetensors"):
        MoEForCausalLM.from_pretrained(tmp_path)


def test_configurations_that_cannot_be_read(saved: Path) -> None:
    path = saved / "config.json"
    path.write_text("[1]")
    with pytest.raises(MoEConfigError, match=r"config\.json is not a JSON object"):
        MoEForCausalLM.from_pretrained(saved)
    path.write_text("{")
    with pytest.raises(MoEConfigError, match=r"config\.json is not a JSON object"):
        MoEForCausalLM.from_pretrained(saved)
    path.unlink()
    with pytest.raises(MoEError, match=r"cannot read .*config\.json: No such file"):
        MoEForCausalLM.from_pretrained(saved)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a folder or a repository"):
        MoEForCausalLM.from_pretrained(tmp_path / "nowhere")


def test_a_part_of_a_model_is_not_saved(tiny: Make, tmp_path: Path) -> None:
    model = MoEForCausalLM(tiny())
    model.norm = None
    with pytest.raises(MoEWeightsError, match=r"'norm\.weight' of shape \(32,\).* nothing of it"):
        model.save_pretrained(tmp_path / "x")
    model = MoEForCausalLM(tiny())
    model.layers["0"].mlp.experts.down = torch.nn.Parameter(torch.zeros(2, 32, 24))
    with pytest.raises(MoEWeightsError, match=r"this process holds \(2, 32, 24\)"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_push_uploads_what_save_writes(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: dict[str, Any] = {}

    def push(folder: str, repo_id: str, **options: Any) -> str:
        pushed.update(options, names={path.name for path in Path(folder).iterdir()}, repo=repo_id)
        return "https://hub/" + repo_id

    monkeypatch.setattr(pretrained, "push", push)
    assert MoEForCausalLM(tiny()).push_to_hub("me/tiny", private=True) == "https://hub/me/tiny"
    assert pushed["repo"] == "me/tiny" and pushed["private"] is True
    assert {"config.json", "model.safetensors", "README.md"} <= pushed["names"]


def describe(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def loaded_dtype(folder: Path, **options: Any) -> torch.dtype:
    model = MoEForCausalLM.from_pretrained(folder, **options)
    (dtype,) = {parameter.dtype for parameter in model.parameters()}
    return dtype


def narrow_but_routers(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        # Also the first tensor of the file, whose type must not decide.
        if "gate" not in name and name != min(tensors):
            tensors[name] = tensors[name].bfloat16()


def test_the_type_of_most_elements(saved: Path) -> None:
    rewrite(saved, narrow_but_routers)
    describe(saved, dtype=None)
    with hub.SafetensorsReader(saved) as reader:
        assert reader.dtype(GATE) is torch.float32
    assert loaded_dtype(saved) is torch.bfloat16
    rewrite(saved, lambda t: t.update({"model.layers.1.x.rotary_emb.inv_freq": torch.ones(9999)}))
    assert loaded_dtype(saved) is torch.bfloat16


@pytest.mark.parametrize(
    ("described", "wanted"),
    [
        ({"dtype": "float16"}, torch.float16),
        ({"dtype": None, "torch_dtype": "torch.float64"}, torch.float64),
        ({"dtype": "float32", "torch_dtype": "float16"}, torch.float32),
    ],
)
def test_the_type_of_the_configuration(
    saved: Path, described: dict[str, Any], wanted: torch.dtype
) -> None:
    rewrite(saved, narrow_but_routers)
    describe(saved, **described)
    assert loaded_dtype(saved) is wanted
    assert loaded_dtype(saved, dtype="bfloat16") is torch.bfloat16


def test_types_that_a_model_cannot_have(saved: Path) -> None:
    for wrong in ("bf16", torch.int64, 16):
        with pytest.raises(MoEInputError, match=rf"dtype is {wrong!r}; legal: float64, float32, b"):
            MoEForCausalLM.from_pretrained(saved, dtype=wrong)  # type: ignore[arg-type]
    describe(saved, dtype="int8")
    with pytest.raises(MoEConfigError, match=r"dtype is 'int8' in config\.json; legal: float64"):
        MoEForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_integer_weights_are_named(saved: Path, dtype: torch.dtype | None) -> None:
    rewrite(saved, lambda t: t.update({GATE: t[GATE].to(torch.int8)}))
    with pytest.raises(MoEWeightsError, match=rf"'{GATE}' on disk is of torch\.int8; legal: floa"):
        MoEForCausalLM.from_pretrained(saved, dtype=dtype)


def test_a_save_names_the_type_of_most_elements(tiny: Make, tmp_path: Path) -> None:
    model = MoEForCausalLM(tiny()).bfloat16()
    assert model.norm is not None and model.embed_tokens is not None
    for module in (model.norm, model.embed_tokens):
        module.float()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
