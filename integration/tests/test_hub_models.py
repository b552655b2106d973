"""Models of transformers under one rank and under eight: the same logits, each rank its slices."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral import modeling_mixtral

from fivefold.integration.compare import largest_logit_difference
from fivefold.moe import MoEForCausalLM
from fivefold.moe.errors import MoEConfigError
from fivefold.parallel_core.hub import SafetensorsReader
from fivefold.parallel_core.inference import whole_logits
from fivefold.parallel_core.launcher import launch
from fivefold.parallel_core.layout import Layout
from fivefold.parallel_core.topology import Topology

V, H = 52, 32
IDS = torch.arange(48).view(3, 16) * 7 % V
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-10}
LAYOUTS = [
    {"tp": 2, "pp": 2, "ep": 4},
    {"tp": 2, "cp": 2, "pp": 2, "etp": 2, "ep": 2},
    {"tp": 2, "cp": 2, "ep": 8},
    {"cp": 4, "etp": 4, "ep": 2, "order": "ep-tp-cp-dp-pp"},
]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral as transformers writes it, in several files."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mixtral")
    config = MixtralConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        initializer_range=0.2,
    )
    MixtralForCausalLM(config).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="module")
def expected(mixtral: Path) -> dict[torch.dtype, Tensor]:
    """Transformers' logits; in float64 its norms and routing too, which it does in float32."""

    def norm(self: Any, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    def route(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x.reshape(-1, self.hidden_dim), self.weight)
        weights, experts = logits.softmax(-1).topk(self.top_k)
        return logits, weights / weights.sum(-1, keepdim=True), experts

    found = {torch.float32: logits_of_transformers(mixtral, torch.float32)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_mixtral.MixtralRMSNorm, "forward", norm)
        patch.setattr(modeling_mixtral.MixtralTopKRouter, "forward", route)
        found[torch.float64] = logits_of_transformers(mixtral, torch.float64)
    assert 0.5 < found[torch.float64].std() < 2
    return found


@torch.no_grad()
def logits_of_transformers(folder: Path, dtype: torch.dtype) -> Tensor:
    # Its grouped kernel has no float64; "eager" is the loop over experts.
    model = MixtralForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager"
    ).eval()
    logits: Tensor = model(IDS).logits
    return logits


class CountingReader(SafetensorsReader):
    """Counts the elements that are read."""

    read_elements = 0

    def view(self, name: str, slices: Any = None) -> Tensor:
        tensor = super().view(name, slices)
        CountingReader.read_elements += tensor.numel()
        return tensor


def load_and_run(
    folder: Path, degrees: dict[str, Any]
) -> tuple[dict[torch.dtype, Tensor], int, int]:
    """On one rank: the whole batch's logits by dtype, elements read, and elements held."""
    topology, logits = Topology(Layout(8, **degrees)), {}
    for dtype in TOLERANCES:
        CountingReader.read_elements = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fivefold.parallel_core.hub.pretrained.SafetensorsReader", CountingReader)
            model = MoEForCausalLM.from_pretrained(folder, topology, dtype=dtype)
        logits[dtype] = whole_logits(model, topology, IDS, vocab_size=V, hidden_size=H)
    return logits, CountingReader.read_elements, sum(p.numel() for p in model.parameters())


@cache
def results(folder: Path, number: int) -> list[tuple[dict[torch.dtype, Tensor], int, int]]:
    return launch(load_and_run, 8, folder, LAYOUTS[number], timeout=120)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_one_rank_gives_their_logits(
    mixtral: Path, expected: dict[torch.dtype, Tensor], dtype: torch.dtype
) -> None:
    model = MoEForCausalLM.from_pretrained(mixtral, dtype=dtype)
    with torch.no_grad():
        assert (model(IDS) - expected[dtype]).abs().max() <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=lambda number: str(LAYOUTS[number]))
def test_eight_ranks_give_their_logits(
    mixtral: Path, expected: dict[torch.dtype, Tensor], number: int, dtype: torch.dtype
) -> None:
    for logits, _, _ in results(mixtral, number):
        assert logits[dtype].dtype == dtype
        assert (logits[dtype] - expected[dtype]).abs().max() <= TOLERANCES[dtype]


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=lambda number: str(LAYOUTS[number]))
def test_each_rank_reads_what_it_holds(mixtral: Path, number: int) -> None:
    layout = Layout(8, **LAYOUTS[number])  # type: ignore[arg-type]
    parameters = dict(MoEForCausalLM.from_pretrained(mixtral).named_parameters())
    experts = sum(p.numel() for name, p in parameters.items() if ".experts." in name)
    held = [held for _, _, held in results(mixtral, number)]
    assert [read for _, read, _ in results(mixtral, number)] == held
    # Experts are on as many ranks as there are replicas of them, and on no more.
    dense = sum(p.numel() for p in parameters.values()) - experts
    assert sum(held) <= experts * layout.edp + dense * layout.world_size / layout.pp
    assert max(held) < 0.4 * (experts + dense)


def test_a_topology_that_does_not_fit_reads_nothing(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = Topology.local()
    topology.layout = Layout(16, ep=16)
    monkeypatch.setattr(MoEForCausalLM, "_fill", None)
    with pytest.raises(MoEConfigError, match=r"num_experts=8 .* ep=16; ep may be 1, 2, 4, 8$"):
        MoEForCausalLM.from_pretrained(mixtral, topology)


def test_there_and_back_is_bitwise(mixtral: Path, tmp_path: Path) -> None:
    ours = MoEForCausalLM.from_pretrained(mixtral)
    ours.save_pretrained(tmp_path / "ours", max_shard_size="90KB")
    theirs = MixtralForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again = MoEForCausalLM.from_pretrained(tmp_path / "theirs")
    assert again.config == ours.config
    for (name, a), (other, b) in zip(
        ours.named_parameters(), again.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)


def test_a_difference_is_seen(mixtral: Path) -> None:
    model = MoEForCausalLM.from_pretrained(mixtral)
    assert largest_logit_difference(model, mixtral, IDS) <= 2e-5
    with torch.no_grad():
        model.layers["1"].mlp.experts.down[3] += 0.1
    assert largest_logit_difference(model, mixtral, IDS) > 1e-2
