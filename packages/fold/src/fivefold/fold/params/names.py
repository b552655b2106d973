"""One table: which parameters of AlphaFold, OpenFold and MLPerf each of ours is made of.

Ours are concatenations of theirs along the first dim, so that merging and splitting lose nothing,
neither of weights nor of an optimizer's moments.
"""

from collections.abc import Iterator

import torch

from fivefold.fold.config import AlphaFoldConfig, StackConfig
from fivefold.fold.params.parts import STYLES, At, Maker, Part, Style, Table

__all__ = ["STYLES", "Part", "Style", "Table", "parts_of", "table"]


def table(config: AlphaFoldConfig) -> Table:
    """The table of a network: each of our parameters in order, with its parts."""
    from fivefold.fold.model.alphafold import AlphaFold  # which reads and writes by this table

    with torch.device("meta"):
        model = AlphaFold(config)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    maker = Maker(shapes)
    _embedders(maker)
    if config.template is not None:
        _templates(maker, config)
    evoformer = At("", "evoformer", "", "")
    extra = evoformer.sub("extra_msa_stack", "extra_msa_stack", "extra_msa_stack")
    _stack(maker, extra, config.extra_msa, is_extra=True)
    main = evoformer.sub("evoformer", "evoformer_iteration", "evoformer", "evoformer_stack")
    _stack(maker, main, config.evoformer, is_extra=False)
    maker.linear(
        evoformer.sub(
            "linear_single", "single_activations", "evoformer.linear", "evoformer_stack.linear"
        )
    )
    _structure(maker, At("", "", "", "").sub(*["structure_module"] * 3), config)
    _heads(maker, config)
    return {name: maker.table[name] for name in shapes}


def _embedders(maker: Maker) -> None:
    root = At("", "evoformer", "", "")
    embedder = root.sub("input_embedder", "", "input_embedder")
    for ours, theirs, openfold in (
        ("linear_z_i", "left_single", "linear_tf_z_i"),
        ("linear_z_j", "right_single", "linear_tf_z_j"),
        ("linear_target_m", "preprocess_1d", "linear_tf_m"),
        ("linear_msa_m", "preprocess_msa", "linear_msa_m"),
        ("linear_relative", "pair_activiations", "linear_relpos"),
    ):
        maker.linear(embedder.sub(ours, theirs, openfold))
    recycling = root.sub("recycling_embedder", "", "recycling_embedder")
    maker.linear(recycling.sub("linear", "prev_pos_linear", "linear"))
    maker.norm(recycling.sub("layer_norm_m", "prev_msa_first_row_norm", "layer_norm_m"))
    maker.norm(recycling.sub("layer_norm_z", "prev_pair_norm", "layer_norm_z"))
    maker.linear(
        root.sub("extra_msa_embedder.linear", "extra_msa_activations", "extra_msa_embedder.linear")
    )


def _templates(maker: Maker, config: AlphaFoldConfig) -> None:
    if config.template is None:
        return
    root = At("", "evoformer", "template_embedder", "")
    single = root.sub(
        "template_embedder.single_embedder",
        "",
        "template_single_embedder",
        "template_angle_embedder",
    )
    maker.linear(single.sub("linear_1", "template_single_embedding", "linear_1"))
    maker.linear(single.sub("linear_2", "template_projection", "linear_2"))
    pair = root.sub("", "template_embedding/single_template_embedding", "")
    maker.linear(
        pair.sub(
            "template_embedder.pair_embedder.linear", "embedding2d", "template_pair_embedder.linear"
        )
    )
    maker.norm(
        pair.sub(
            "template_embedder.layer_norm", "output_layer_norm", "template_pair_stack.layer_norm"
        )
    )
    stack = pair.sub("", "template_pair_stack/__layer_stack_no_state", "template_pair_stack")
    for number in range(config.template.stack.num_blocks):
        block = stack.in_block(f"template_pair_stack.blocks.{number}", number)
        _pair_layers(maker, block, block.ours, config.template.stack)
    attention = root.sub(
        "template_embedder.pointwise_attention",
        "template_embedding/attention",
        "template_pointwise_att.mha",
        "template_pointwise_attention.mha",
    )
    heads = config.template.num_heads
    query = f"{attention.ours}.linear_q.weight"
    rows = maker.shapes[query][0]
    maker.joined(query, maker.heads(attention, query, "query", heads, rows))
    both = f"{attention.ours}.linear_kv.weight"
    maker.joined(
        both, *(maker.heads(attention, both, leaf, heads, rows) for leaf in ("key", "value"))
    )
    maker.output(attention, heads)


def _stack(maker: Maker, stack: At, config: StackConfig, *, is_extra: bool) -> None:
    for number in range(config.num_blocks):
        block = stack.in_block(f"{stack.ours}.blocks.{number}", number)
        _msa_layers(maker, block, config, is_extra)
        # OpenFold's version 2 and MLPerf's reference keep what the two MSA stacks share apart.
        core = block.sub("", "", "", "core")
        transition = core.sub("msa_transition", "msa_transition", "msa_transition")
        _transition(maker, transition)
        outer = core.sub("outer_product_mean", "outer_product_mean", "outer_product_mean")
        _outer_product(maker, outer)
        pair = block.sub("", "", "pair_stack", "core")
        _pair_layers(maker, pair, f"{block.ours}.pair", config)


def _msa_layers(maker: Maker, block: At, config: StackConfig, is_extra: bool) -> None:
    row = block.sub("msa_row_attention", "msa_row_attention_with_pair_bias", "msa_att_row")
    maker.norm(row.sub("layer_norm_m", "query_norm", "layer_norm_m"))
    maker.norm(row.sub("layer_norm_z", "feat_2d_norm", "layer_norm_z"))
    maker.bias_of_pairs(row, f"{row.ours}.linear_z.weight", "linear_z")
    maker.attention(row.sub("attention", "attention", "mha"), config.num_msa_heads)
    if is_extra:
        column = block.sub("msa_column_attention", "msa_column_global_attention", "msa_att_col")
        maker.norm(column.sub("layer_norm_m", "query_norm", "layer_norm_m"))
        attention = column.sub("attention", "attention", "global_attention")
        _global_attention(maker, attention, config.num_msa_heads)
    else:
        column = block.sub(
            "msa_column_attention", "msa_column_attention", "msa_att_col._msa_att", "msa_att_col"
        )
        maker.norm(column.sub("layer_norm_m", "query_norm", "layer_norm_m"))
        maker.attention(column.sub("attention", "attention", "mha"), config.num_msa_heads)


def _global_attention(maker: Maker, at: At, num_heads: int) -> None:
    for leaf, ours in (("query", "linear_q"), ("gating", "linear_g")):
        name = f"{at.ours}.{ours}.weight"
        maker.joined(name, maker.heads(at, name, leaf, num_heads, maker.shapes[name][0]))
    for leaf, ours in (("key_w", "linear_k"), ("value_w", "linear_v")):
        num_out, num_in = maker.shapes[f"{at.ours}.{ours}.weight"]
        part = maker.part(at, leaf, f"{ours}.weight", num_out, (num_in, num_out))
        maker.joined(f"{at.ours}.{ours}.weight", part)
    (size,) = maker.shapes[f"{at.ours}.linear_g.bias"]
    bias = maker.part(at, "gating_b", "linear_g.bias", size, (num_heads, size // num_heads))
    maker.joined(f"{at.ours}.linear_g.bias", bias)
    maker.output(at, num_heads)


def _transition(maker: Maker, at: At) -> None:
    maker.norm(at.sub("layer_norm", "input_layer_norm", "layer_norm"))
    maker.linear(at.sub("linear_1", "transition1", "linear_1"))
    maker.linear(at.sub("linear_2", "transition2", "linear_2"))


def _outer_product(maker: Maker, at: At) -> None:
    maker.norm(at.sub("layer_norm", "layer_norm_input", "layer_norm"))
    num_rows, num_in = maker.shapes[f"{at.ours}.linear_ab.weight"]
    half = num_rows // 2
    sides = (
        at.sub("", "left_projection", "linear_1"),
        at.sub("", "right_projection", "linear_2"),
    )
    for ours, leaf, shape in (
        ("weight", "weights", (num_in, half)),
        ("bias", "bias", (half,)),
    ):
        parts = (maker.part(side, leaf, ours, half, shape) for side in sides)
        maker.joined(f"{at.ours}.linear_ab.{ours}", *parts)
    name = f"{at.ours}.linear_out.weight"
    num_out = maker.shapes[name][0]
    weight = maker.part(at, "output_w", "linear_out.weight", num_out, (half, half, num_out))
    maker.joined(name, weight)
    bias = maker.part(at, "output_b", "linear_out.bias", num_out, (num_out,))
    maker.joined(f"{at.ours}.linear_out.bias", bias)


def _pair_layers(maker: Maker, at: At, ours: str, config: StackConfig) -> None:
    at = At(ours, at.alphafold, at.openfold, at.mlperf, at.block)
    for kind, openfold in (("outgoing", "tri_mul_out"), ("incoming", "tri_mul_in")):
        name = f"triangle_multiplication_{kind}"
        _triangle_multiplication(maker, at.sub(name, name, openfold), kind == "outgoing")
    for kind, openfold in (("starting", "tri_att_start"), ("ending", "tri_att_end")):
        layer = at.sub(f"triangle_attention_{kind}", f"triangle_attention_{kind}_node", openfold)
        maker.norm(layer.sub("layer_norm", "query_norm", "layer_norm"))
        maker.bias_of_pairs(layer, f"{layer.ours}.linear_bias.weight", "linear")
        maker.attention(layer.sub("attention", "attention", "mha"), config.num_pair_heads)
    _transition(maker, at.sub("pair_transition", "pair_transition", "pair_transition"))


def _triangle_multiplication(maker: Maker, at: At, outgoing: bool) -> None:
    maker.norm(at.sub("layer_norm_in", "layer_norm_input", "layer_norm_in"))
    maker.norm(at.sub("layer_norm_out", "center_layer_norm", "layer_norm_out"))
    maker.linear(at.sub("linear_z", "output_projection", "linear_z"))
    maker.linear(at.sub("linear_g", "gating_linear", "linear_g"))
    # What arrives is called the other way round by AlphaFold's code than by the supplement.
    a, b = ("left", "right") if outgoing else ("right", "left")
    sides = (
        at.sub("", f"{a}_projection", "linear_a_p"),
        at.sub("", f"{b}_projection", "linear_b_p"),
        at.sub("", f"{a}_gate", "linear_a_g"),
        at.sub("", f"{b}_gate", "linear_b_g"),
    )
    num_rows, num_in = maker.shapes[f"{at.ours}.linear_abg.weight"]
    rows = num_rows // 4
    for ours, leaf, shape in (("weight", "weights", (num_in, rows)), ("bias", "bias", (rows,))):
        parts = (maker.part(side, leaf, ours, rows, shape) for side in sides)
        maker.joined(f"{at.ours}.linear_abg.{ours}", *parts)


def _structure(maker: Maker, at: At, config: AlphaFoldConfig) -> None:
    maker.norm(at.sub("layer_norm_s", "single_layer_norm", "layer_norm_s"))
    maker.norm(at.sub("layer_norm_z", "pair_layer_norm", "layer_norm_z"))
    maker.linear(at.sub("linear_in", "initial_projection", "linear_in"))
    fold = at.sub("", "fold_iteration", "")
    ipa = fold.sub("ipa", "invariant_point_attention", "ipa")
    for ours, theirs, openfold, mlperf in (
        ("linear_q", "q_scalar", "linear_q", "linear_q"),
        ("linear_kv", "kv_scalar", "linear_kv", "linear_kv"),
        ("linear_q_points", "q_point_local", "linear_q_points.linear", "linear_q_points"),
        ("linear_kv_points", "kv_point_local", "linear_kv_points.linear", "linear_kv_points"),
        ("linear_b", "attention_2d", "linear_b", "linear_b"),
        ("linear_out", "output_projection", "linear_out", "linear_out"),
    ):
        maker.linear(ipa.sub(ours, theirs, openfold, mlperf))
    heads = config.structure.num_heads
    weights = maker.part(ipa, "trainable_point_weights", "head_weights", heads, (heads,))
    maker.joined(f"{ipa.ours}.head_weights", weights)
    maker.norm(fold.sub("layer_norm_ipa", "attention_layer_norm", "layer_norm_ipa"))
    for number in range(config.structure.num_transition_layers):
        maker.linear(fold.sub(f"transition.layers.{number}", _numbered("transition", number),
                              f"transition.layers.0.linear_{number + 1}",
                              f"transition.linear_{number + 1}"))  # fmt: skip
    maker.norm(fold.sub("transition.layer_norm", "transition_layer_norm", "transition.layer_norm"))
    maker.linear(fold.sub("backbone_update.linear", "affine_update", "bb_update.linear"))
    _torsions(maker, fold.sub("torsions", "rigid_sidechain", "angle_resnet"), config)


def _torsions(maker: Maker, at: At, config: AlphaFoldConfig) -> None:
    maker.linear(at.sub("linear_in", "input_projection", "linear_in"))
    maker.linear(at.sub("linear_initial", "input_projection_1", "linear_initial"))
    for number in range(config.structure.num_torsion_blocks):
        for layer in (1, 2):
            name = f"linear_{layer}"
            theirs = _numbered(f"resblock{layer}", number)
            maker.linear(at.sub(f"blocks.{number}.{name}", theirs, f"layers.{number}.{name}"))
    maker.linear(at.sub("linear_out", "unnormalized_angles", "linear_out"))


def _numbered(name: str, number: int) -> str:
    """Haiku's name of the module that is the ``number``-th of a name."""
    return f"{name}_{number}" if number else name


def _heads(maker: Maker, config: AlphaFoldConfig) -> None:
    def head(ours: str, theirs: str, openfold: str) -> At:
        names = (f"aux_heads.{openfold}", f"auxiliary_heads.{openfold}")
        return At(f"heads.{ours}", theirs, *names)

    lddt = head("predicted_lddt", "predicted_lddt_head", "plddt")
    maker.norm(lddt.sub("layer_norm", "input_layer_norm", "layer_norm"))
    for number, theirs in enumerate(("act_0", "act_1", "logits"), start=1):
        maker.linear(lddt.sub(f"linear_{number}", theirs, f"linear_{number}"))
    plain = [
        ("distogram", "distogram_head/half_logits", "distogram.linear"),
        ("masked_msa", "masked_msa_head/logits", "masked_msa.linear"),
        (
            "experimentally_resolved",
            "experimentally_resolved_head/logits",
            "experimentally_resolved.linear",
        ),
    ]
    if config.heads.aligned_error:
        plain += [("predicted_aligned_error", "predicted_aligned_error_head/logits", "tm.linear")]
    for names in plain:
        maker.linear(head(*names))


def parts_of(known: Table) -> Iterator[Part]:
    """All parts, in the order of our parameters."""
    for parts in known.values():
        yield from parts
