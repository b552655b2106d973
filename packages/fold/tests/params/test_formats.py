"""Parameters of AlphaFold, OpenFold, MLPerf and ScaleFold, to ours and back."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fold_network import alphafold_arrays, tiny_config
from torch import Tensor

from fivefold.fold.config import AlphaFoldConfig
from fivefold.fold.errors import FoldParametersError
from fivefold.fold.params.convert import (
    from_alphafold,
    from_flat,
    merge_projections,
    split_merged,
    to_alphafold,
    to_flat,
)
from fivefold.fold.params.formats import flat_parameters, open_parameters, rename_version_1, unwrap
from fivefold.fold.params.names import parts_of, table
from fivefold.fold.presets import preset

MODELS = [f"model_{number}{suffix}" for suffix in ("", "_ptm") for number in range(1, 6)]
STACK = {"evoformer": 2, "extra_msa": 1}


def network(name: str) -> AlphaFoldConfig:
    """A preset with fewer blocks: names and shapes of blocks are all alike."""
    from dataclasses import replace

    model = preset(name).model
    return replace(
        model,
        **{key: replace(getattr(model, key), num_blocks=num) for key, num in STACK.items()},
    )


def openfold_version_1(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of version 2 as version 1 has them, which the public files do."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace("template_embedder.template_single_", "template_angle_")
        name = name.replace("template_embedder.", "")
        name = re.sub(r"\.(msa_transition|outer_product_mean)\.", r".core.\1.", name)
        name = name.replace(".pair_stack.", ".core.")
        name = re.sub(r"(q|kv)_points\.linear\.", r"\1_points.", name)
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("name", MODELS)
def test_alphafold_to_openfold_and_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    config = network(name)
    arrays = alphafold_arrays(config)
    np.savez(tmp_path / "params.npz", **arrays)
    read = open_parameters(tmp_path / "params.npz")
    assert read.config() == config
    ours = read.ours()
    torch.save(to_flat(ours, table(config), "openfold"), tmp_path / "openfold.pt")
    again = open_parameters(tmp_path / "openfold.pt")
    assert again.config() == config
    back = to_alphafold(again.ours(), table(config))
    assert back.keys() == arrays.keys()
    assert all(np.array_equal(back[key], arrays[key]) for key in arrays)
    assert all(back[key].dtype == np.float32 for key in arrays)


@pytest.mark.parametrize(("name", "count"), [
    ("model_1", 93_229_082), ("mlperf", 93_229_082), ("model_1_ptm", 93_237_338),
])  # fmt: skip
def test_the_whole_network_has_as_many_parameters_as_the_original(name: str, count: int) -> None:
    parts = parts_of(table(preset(name).model))
    assert sum(int(np.prod(part.shape)) for part in parts) == count


@pytest.mark.parametrize("style", ["openfold", "mlperf"])
def test_names_are_used_once(style: str) -> None:
    parts = list(parts_of(table(preset("model_1_ptm").model)))
    assert len({part.name(style) for part in parts}) == len(parts)  # type: ignore[arg-type]
    assert len({(part.alphafold, part.block) for part in parts}) == len(parts)


def test_known_names() -> None:
    by_alphafold = {part.alphafold: part for part in parts_of(table(preset("model_1_ptm").model))}
    root = "alphafold/alphafold_iteration/"
    pairs = {
        "evoformer/pair_activiations//weights": "input_embedder.linear_relpos.weight",
        "evoformer/evoformer_iteration/msa_column_attention/attention//gating_b": (
            "evoformer.blocks.47.msa_att_col._msa_att.mha.linear_g.bias"
        ),
        "structure_module/fold_iteration/rigid_sidechain/resblock2_1//bias": (
            "structure_module.angle_resnet.layers.1.linear_2.bias"
        ),
        "structure_module/fold_iteration/transition_2//weights": (
            "structure_module.transition.layers.0.linear_3.weight"
        ),
        "predicted_aligned_error_head/logits//weights": "aux_heads.tm.linear.weight",
    }
    assert {key: by_alphafold[root + key].openfold for key in pairs} == pairs


@pytest.mark.parametrize("kind", ["projection", "gate"])
def test_left_and_right_of_arriving_edges_are_exchanged(kind: str) -> None:
    parts = {part.openfold: part.alphafold for part in parts_of(table(preset("model_1").model))}
    letter = kind[0]
    for direction, side in (("out", "left"), ("in", "right")):
        name = f"evoformer.blocks.0.pair_stack.tri_mul_{direction}.linear_a_{letter}.weight"
        assert parts[name].endswith(f"/{side}_{kind}//weights")


def test_square_matrices_are_transposed() -> None:
    config = network("model_3")
    arrays = alphafold_arrays(config)
    name = "alphafold/alphafold_iteration/structure_module/initial_projection//weights"
    ours = from_alphafold(arrays, table(config))["structure_module.linear_in.weight"].numpy()
    assert ours.shape[0] == ours.shape[1]
    assert np.array_equal(ours, arrays[name].T)
    assert not np.array_equal(ours, arrays[name])


@pytest.fixture(scope="module")
def small() -> tuple[AlphaFoldConfig, dict[str, Tensor], dict[str, Tensor]]:
    """A network, our parameters, and OpenFold's of them."""
    config = network("model_1_ptm")
    ours = from_alphafold(alphafold_arrays(config), table(config))
    return config, ours, to_flat(ours, table(config), "openfold")


WRAPPERS = {
    "plain": lambda x: x,
    "average of training": lambda x: {"ema": {"params": x, "decay": torch.tensor(0.999)}},
    "lightning": lambda x: {"epoch": 3, "state_dict": {f"model.{k}": v for k, v in x.items()}},
    "deepspeed": lambda x: {"module": {f"module.model.{k}": v for k, v in x.items()}},
    "data parallel": lambda x: {f"module.{k}": v for k, v in x.items()},
}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_of_openfold(
    small: tuple[AlphaFoldConfig, dict[str, Tensor], dict[str, Tensor]],
    version: int,
    wrapper: str,
) -> None:
    config, ours, openfold = small
    named = openfold_version_1(openfold) if version == 1 else openfold
    assert version == 2 or not any("pair_stack." in k and "template" not in k for k in named)
    read = flat_parameters(unwrap(WRAPPERS[wrapper](named)))
    assert read.style == "openfold"
    assert read.config() == config
    found = read.ours()
    assert found.keys() == ours.keys()
    assert all(torch.equal(found[name], ours[name]) for name in ours)


def test_a_deepspeed_folder(
    tmp_path: Path, small: tuple[AlphaFoldConfig, dict[str, Tensor], dict[str, Tensor]]
) -> None:
    _, ours, openfold = small
    folder = tmp_path / "global_step7"
    folder.mkdir()
    (tmp_path / "latest").write_text("global_step7\n")
    torch.save(WRAPPERS["deepspeed"](openfold), folder / "mp_rank_00_model_states.pt")
    found = open_parameters(tmp_path).ours()
    assert all(torch.equal(found[name], ours[name]) for name in ours)


def test_mlperf_checkpoint_and_scalefolds_merged_form(
    small: tuple[AlphaFoldConfig, dict[str, Tensor], dict[str, Tensor]],
) -> None:
    config, ours, _ = small
    mlperf = to_flat(ours, table(config), "mlperf")
    checkpoint = {"iteration": 1, "alphafold_state_dict": mlperf, "optimizer_state_dict": {}}
    merged = merge_projections(mlperf)
    name = "evoformer_stack.blocks.1.msa_att_row.mha.linear_qkvg.weight"
    assert merged[name].shape == (4 * 256, 256)
    assert torch.equal(
        merged[name], ours["evoformer.blocks.1.msa_row_attention.attention.linear_qkvg.weight"]
    )
    assert name.replace("linear_qkvg.weight", "linear_g_bias") in merged
    assert "template_pointwise_attention.mha.linear_kv.weight" in merged
    assert not any(re.search(r"mha\.linear_[kv]\.", key) for key in merged)
    split = split_merged(merged)
    assert split.keys() == mlperf.keys()
    for tensors in (checkpoint, merged):
        read = flat_parameters(unwrap(tensors))
        assert read.style == "mlperf" and read.config() == config
        found = read.ours()
        assert all(torch.equal(found[key], ours[key]) for key in ours)


def test_moments_go_the_same_way() -> None:
    config = tiny_config()
    known = table(config)
    openfold = to_flat(from_alphafold(alphafold_arrays(config), known), known, "openfold")
    parameters = {name: x.clone().requires_grad_() for name, x in openfold.items()}
    adam = torch.optim.Adam(parameters.values(), lr=0.1)
    torch.manual_seed(0)
    merged = {
        name: x.clone().requires_grad_()
        for name, x in from_flat(openfold, known, "openfold").items()
    }
    ours = torch.optim.Adam(merged.values(), lr=0.1)
    gradients = [{name: torch.randn_like(x) for name, x in parameters.items()} for _ in range(3)]
    for step, gradient in enumerate(gradients):
        for name, x in parameters.items():
            x.grad = gradient[name]
        adam.step()
        if step == 1:  # go on with the merged ones from here
            with torch.no_grad():
                for name, x in from_flat(dict(parameters), known, "openfold").items():
                    merged[name].copy_(x)
            moments = {
                key: from_flat(
                    {n: adam.state[x][key] for n, x in parameters.items()}, known, "openfold"
                )
                for key in ("exp_avg", "exp_avg_sq")
            }
            for name, x in merged.items():
                ours.state[x] = {
                    "step": torch.tensor(2.0),
                    **{k: v[name] for k, v in moments.items()},
                }
    for name, x in from_flat(gradients[2], known, "openfold").items():
        merged[name].grad = x
    ours.step()
    expected = from_flat({n: x.detach() for n, x in parameters.items()}, known, "openfold")
    assert all(torch.equal(merged[name].detach(), expected[name]) for name in expected)


@pytest.mark.parametrize("name", [
    "template_angle_embedder.linear_1.weight",
    "evoformer.blocks.3.core.tri_mul_out.linear_z.bias",
    "structure_module.ipa.linear_kv_points.bias",
])  # fmt: skip
def test_renaming_twice_is_renaming_once(name: str) -> None:
    once = rename_version_1(name)
    assert once != name and rename_version_1(once) == once


def test_what_does_not_fit_is_named(
    tmp_path: Path, small: tuple[AlphaFoldConfig, dict[str, Tensor], dict[str, Tensor]]
) -> None:
    config, _, openfold = small
    known = table(config)
    lost = dict(openfold)
    del lost["aux_heads.distogram.linear.bias"]
    with pytest.raises(FoldParametersError, match=r"1 missing \(aux_heads.distogram.linear.bias\)"):
        from_flat(lost, known, "openfold")
    with pytest.raises(FoldParametersError, match=r"1 unknown \(aux_heads.extra.bias\)"):
        from_flat(openfold | {"aux_heads.extra.bias": torch.ones(1)}, known, "openfold")
    without_head = table(network("model_1"))
    with pytest.raises(FoldParametersError, match=r"2 unknown \(aux_heads.tm"):
        from_flat(openfold, without_head, "openfold")
    without_templates = table(network("model_3_ptm"))
    with pytest.raises(FoldParametersError, match=r"unknown \(template_embedder"):
        from_flat(openfold, without_templates, "openfold")
    name = "evoformer.linear.weight"
    with pytest.raises(FoldParametersError, match=r"\(384, 256\)"):
        from_flat(openfold | {name: openfold[name].T}, known, "openfold")
    with pytest.raises(FoldParametersError, match="holds no parameters"):
        unwrap({"epoch": 1})
    with pytest.raises(FoldParametersError, match="there is no file"):
        open_parameters(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK")
    with pytest.raises(FoldParametersError, match=r"no \.npz"):
        open_parameters(tmp_path / "bad.npz")
    with pytest.raises(FoldParametersError, match="0 Evoformer"):
        flat_parameters({"a": torch.ones(1)}).config()
