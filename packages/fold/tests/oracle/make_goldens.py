"""Makes the goldens from AlphaFold's JAX code; ``nox -s "oracle(fold)"`` runs it.

Everything runs eagerly: compiled by XLA for a CPU, the same code is off by 1e-2.
"""

import sys
from pathlib import Path

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from alphafold.common import residue_constants as facts
from alphafold.model import all_atom, config, folding, modules, quat_affine, r3

sys.path.insert(0, str(Path(__file__).parent))
import fold_inputs as inputs

FOLDER = Path(__file__).parent
ROOT = "alphafold/alphafold_iteration/"


def settings():
    """AlphaFold's model_1_ptm with few blocks, exact and deterministic."""
    made = config.model_config("model_1_ptm").model
    made.embeddings_and_evoformer.evoformer_num_block = 2
    made.embeddings_and_evoformer.extra_msa_stack_num_block = 1
    made.global_config.update(
        {"bfloat16": False, "deterministic": True, "subbatch_size": None, "use_remat": False}
    )
    evoformer, template = (
        made.embeddings_and_evoformer.evoformer,
        made.embeddings_and_evoformer.template.template_pair_stack,
    )
    for stack in (evoformer, template):
        for kind in ("outgoing", "incoming"):
            stack[f"triangle_multiplication_{kind}"].fuse_projection_weights = False
    made.embeddings_and_evoformer.template.subbatch_size = None
    return made


def positions() -> tuple[np.ndarray, np.ndarray]:
    """Atoms (N, 37, 3) of a chain that folds at random, and a mask that misses some."""
    rng = np.random.default_rng(7)
    kinds = inputs.aatype()
    n = len(kinds)
    steps = rng.standard_normal((n, 3))
    steps = 3.8 * steps / np.linalg.norm(steps, axis=-1, keepdims=True)
    turns = jnp.asarray(rng.standard_normal((n, 4)), jnp.float32)
    affine = quat_affine.QuatAffine(turns, jnp.asarray(np.cumsum(steps, 0)).T, normalize=True)
    angles = rng.standard_normal((n, 7, 2)).astype(np.float32)
    angles /= np.linalg.norm(angles, axis=-1, keepdims=True)
    frames = all_atom.torsion_angles_to_frames(kinds, r3.rigids_from_quataffine(affine), angles)
    atom14 = all_atom.frames_and_literature_positions_to_atom14_pos(kinds, frames)
    atom14 = np.asarray(r3.vecs_to_tensor(atom14))
    atom37, mask = np.zeros((n, 37, 3), np.float32), np.zeros((n, 37), np.float32)
    for i, kind in enumerate(kinds):
        names = facts.restype_name_to_atom14_names[facts.restype_1to3[facts.restypes[kind]]]
        for place, name in enumerate(names):
            if name:
                atom37[i, facts.atom_order[name]] = atom14[i, place]
                mask[i, facts.atom_order[name]] = 1
        # At most one of a residue: where two in a row lack, torsions are made of noise.
        if rng.random() < 0.6:
            mask[i, rng.choice(np.flatnonzero(mask[i]))] = 0
    return atom37 * mask[..., None], mask


def atom_features(kinds: np.ndarray) -> dict[str, np.ndarray]:
    """Which atoms there are, in both lists."""
    to37, to14, exists = np.zeros((21, 14), int), np.zeros((21, 37), int), np.zeros((21, 14))
    for number, letter in enumerate(facts.restypes):
        for place, name in enumerate(
            facts.restype_name_to_atom14_names[facts.restype_1to3[letter]]
        ):
            if name:
                to37[number, place] = facts.atom_order[name]
                to14[number, facts.atom_order[name]] = place
                exists[number, place] = 1
    return {
        "residx_atom14_to_atom37": to37[kinds],
        "residx_atom37_to_atom14": to14[kinds],
        "atom14_atom_exists": exists[kinds].astype(np.float32),
        "atom37_atom_exists": facts.restype_atom37_mask[kinds].astype(np.float32),
    }


def labels(kinds: np.ndarray, atoms: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Everything that AlphaFold's losses ask of the true structure."""
    made = atom_features(kinds)
    places = made["residx_atom14_to_atom37"]
    dense_mask = np.take_along_axis(mask, places, 1) * made["atom14_atom_exists"]
    dense = np.take_along_axis(atoms, places[..., None], 1) * dense_mask[..., None]
    names = all_atom.RENAMING_MATRICES[kinds]
    other = np.einsum("nac,nab->nbc", dense, names)
    other_mask = np.einsum("na,nab->nb", dense_mask, names)
    ambiguous = np.zeros((21, 14), np.float32)
    for name, swap in facts.residue_atom_renaming_swaps.items():
        for pair in swap.items():
            for atom in pair:
                place = facts.restype_name_to_atom14_names[name].index(atom)
                ambiguous[facts.resname_to_idx[name], place] = 1
    torsions = all_atom.atom37_to_torsion_angles(kinds[None], atoms[None], mask[None])
    sin_cos = np.asarray(torsions["torsion_angles_sin_cos"])[0]
    torsion_mask = np.asarray(torsions["torsion_angles_mask"])[0]
    rotation, translation = quat_affine.make_transform_from_reference(*atoms[:, :3].swapaxes(0, 1))
    quaternion = quat_affine.rot_to_quat(rotation, unstack_inputs=True)
    beta, beta_mask = modules.pseudo_beta_fn(kinds, atoms, mask)
    return {
        **made,
        "all_atom_positions": atoms,
        "all_atom_mask": mask,
        "atom14_gt_positions": dense,
        "atom14_gt_exists": dense_mask,
        "atom14_alt_gt_positions": other,
        "atom14_alt_gt_exists": other_mask,
        "atom14_atom_is_ambiguous": ambiguous[kinds],
        "chi_angles": np.arctan2(sin_cos[:, 3:, 0], sin_cos[:, 3:, 1]) * torsion_mask[:, 3:],
        "chi_mask": torsion_mask[:, 3:],
        "backbone_affine_tensor": np.concatenate([quaternion, translation], -1),
        "backbone_affine_mask": mask[:, :3].prod(-1),
        "pseudo_beta": beta,
        "pseudo_beta_mask": beta_mask,
        **all_atom.atom37_to_frames(kinds, atoms, mask),
    }


def template_features(atoms: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Two templates: the structure itself shaken, and the same with residues exchanged."""
    kinds = np.stack([inputs.aatype(), inputs.aatype()[::-1]])
    moved = np.stack([atoms, atoms + inputs.values("templates", *atoms.shape)])
    known = np.stack([mask, facts.restype_atom37_mask[kinds[1]].astype(np.float32)])
    moved = moved * known[..., None]
    beta, beta_mask = modules.pseudo_beta_fn(kinds, moved, known)
    return {
        "template_aatype": kinds,
        "template_all_atom_positions": moved,
        "template_all_atom_masks": known,
        "template_mask": np.ones(2, np.float32),
        "template_pseudo_beta": beta,
        "template_pseudo_beta_mask": beta_mask,
    }


def filled(shapes) -> dict:
    """Parameters for a tree of shapes."""
    return {
        module: {
            leaf: jnp.asarray(inputs.parameter(f"{module}//{leaf}", value.shape))
            for leaf, value in leaves.items()
        }
        for module, leaves in shapes.items()
    }


def below(params: dict, prefix: str, block: int | None, new: str) -> dict:
    """Parameters of one module of the network (and of one block), as if it stood alone."""
    found = {}
    for module, leaves in params.items():
        if module == ROOT + prefix or module.startswith(ROOT + prefix + "/"):
            inner = {k: v if block is None else v[block] for k, v in leaves.items()}
            found[new + module.removeprefix(ROOT + prefix)] = inner
    return found


def layers(params: dict, made) -> dict[str, np.ndarray]:
    """Outputs of every layer on its own."""
    gc, c = made.global_config, made.embeddings_and_evoformer.evoformer
    n, s = inputs.NUM_RESIDUES, inputs.NUM_CLUSTERS
    m, z = inputs.values("m", s, n, 256), inputs.values("z", n, n, 128)
    e = inputs.values("e", inputs.NUM_EXTRA, n, 64)
    m_mask, z_mask = inputs.mask("m_mask", s, n), inputs.mask("z_mask", n, n)
    e_mask = inputs.mask("e_mask", inputs.NUM_EXTRA, n)
    main, extra = "evoformer/evoformer_iteration/", "evoformer/extra_msa_stack/"
    row, column = c.msa_row_attention_with_pair_bias, c.msa_column_attention
    jobs = {
        "msa_row_attention": (
            main + "msa_row_attention_with_pair_bias",
            lambda name: modules.MSARowAttentionWithPairBias(row, gc, name)(m, m_mask, z),
        ),
        "msa_column_attention": (
            main + "msa_column_attention",
            lambda name: modules.MSAColumnAttention(column, gc, name)(m, m_mask),
        ),
        "msa_column_global_attention": (
            extra + "msa_column_global_attention",
            lambda name: modules.MSAColumnGlobalAttention(column, gc, name)(e, e_mask),
        ),
        "msa_transition": (
            main + "msa_transition",
            lambda name: modules.Transition(c.msa_transition, gc, name)(m, m_mask),
        ),
        "outer_product_mean": (
            main + "outer_product_mean",
            lambda name: modules.OuterProductMean(c.outer_product_mean, gc, 128, name)(m, m_mask),
        ),
        "pair_transition": (
            main + "pair_transition",
            lambda name: modules.Transition(c.pair_transition, gc, name)(z, z_mask),
        ),
        "main_block": (
            main.rstrip("/"),
            lambda name: modules.EvoformerIteration(c, gc, False, name)(
                {"msa": m, "pair": z}, {"msa": m_mask, "pair": z_mask}, False
            ),
        ),
        "extra_block": (
            extra.rstrip("/"),
            lambda name: modules.EvoformerIteration(c, gc, True, name)(
                {"msa": e, "pair": z}, {"msa": e_mask, "pair": z_mask}, False
            ),
        ),
    }
    kinds = {
        "triangle_multiplication_outgoing": modules.TriangleMultiplication,
        "triangle_multiplication_incoming": modules.TriangleMultiplication,
        "triangle_attention_starting_node": modules.TriangleAttention,
        "triangle_attention_ending_node": modules.TriangleAttention,
    }
    for name, kind in kinds.items():
        jobs[name] = (main + name, lambda name, kind=kind: kind(c[name], gc, name)(z, z_mask))
    found = {}
    for name, (prefix, run) in jobs.items():
        own = below(params, prefix, 0, name)
        out = hk.transform(lambda run=run, name=name: run(name)).apply(own, jax.random.PRNGKey(0))
        for part, value in out.items() if isinstance(out, dict) else (("out", out),):
            found[f"{name}.{part}"] = inputs.sample(value)
    return found | attention_of_points(params, made)


def attention_of_points(params: dict, made) -> dict[str, np.ndarray]:
    """Invariant point attention with residues all over the place."""
    n = inputs.NUM_RESIDUES
    seven = inputs.values("affine", n, 7)
    seq_mask = inputs.mask("seq_mask", 1, n)[0][:, None]
    own = below(params, "structure_module/fold_iteration/invariant_point_attention", None, "ipa")

    def run():
        affine = quat_affine.QuatAffine(
            jnp.asarray(seven[:, :4]), [jnp.asarray(seven[:, i]) for i in (4, 5, 6)]
        )
        ipa = folding.InvariantPointAttention(
            made.heads.structure_module, made.global_config, name="ipa"
        )
        return ipa(inputs.values("s", n, 384), inputs.values("z", n, n, 128), seq_mask, affine)

    out = hk.transform(run).apply(own, jax.random.PRNGKey(0))
    return {"ipa.out": inputs.sample(out)}


def outputs_of(found: dict) -> dict[str, np.ndarray]:
    """What an iteration is compared by."""
    structure = found["structure_module"]
    kept = {f"representations.{k}": inputs.sample(v) for k, v in found["representations"].items()}
    kept |= {
        f"{head}.logits": inputs.sample(found[head]["logits"])
        for head in ("masked_msa", "distogram", "predicted_lddt", "experimentally_resolved",
                     "predicted_aligned_error")
    }  # fmt: skip
    kept["final_atom_positions"] = np.asarray(structure["final_atom_positions"])
    kept["final_affines"] = np.asarray(structure["final_affines"])
    kept["traj"] = inputs.sample(structure["traj"])
    kept["angles_sin_cos"] = inputs.sample(structure["sidechains"]["angles_sin_cos"])
    return {name: np.asarray(value, np.float32) for name, value in kept.items()}


def losses_of(found: dict, total) -> dict[str, np.ndarray]:
    """Every term of the loss."""
    structure = found["structure_module"]
    between = structure["violations"]["between_residues"]
    kept = {f"{name}.loss": found[name]["loss"] for name in found
            if name not in ("representations", "structure_module")}  # fmt: skip
    kept |= {f"structure_module.{name}": structure[name] for name in
             ("loss", "fape", "sidechain_fape", "chi_loss", "angle_norm_loss")}  # fmt: skip
    kept |= {f"violations.{name}": between[name] for name in
             ("bonds_c_n_loss_mean", "angles_ca_c_n_loss_mean", "angles_c_n_ca_loss_mean",
              "connections_per_residue_violation_mask", "clashes_per_atom_loss_sum",
              "clashes_per_atom_clash_mask")}  # fmt: skip
    within = structure["violations"]["within_residues"]
    kept |= {f"violations.within_{name}": value for name, value in within.items()}
    kept["violations.total_per_residue_violations_mask"] = structure["violations"][
        "total_per_residue_violations_mask"
    ]
    kept["total"] = total
    return {f"loss.{name}": np.asarray(value, np.float32) for name, value in kept.items()}


GRADIENTS = (
    "evoformer/preprocess_1d//weights",
    "evoformer/preprocess_msa//weights",
    "evoformer/left_single//bias",
    "evoformer/pair_activiations//weights",
    "evoformer/prev_pos_linear//weights",
    "evoformer/prev_pair_norm//scale",
    "evoformer/extra_msa_activations//weights",
    "evoformer/template_single_embedding//weights",
    "evoformer/template_embedding/attention//query_w",
    "evoformer/template_embedding/single_template_embedding/embedding2d//weights",
    "evoformer/template_embedding/single_template_embedding/template_pair_stack/"
    "__layer_stack_no_state/triangle_multiplication_incoming/left_projection//weights",
    "evoformer/extra_msa_stack/msa_column_global_attention/attention//key_w",
    "evoformer/extra_msa_stack/outer_product_mean//output_w",
    "evoformer/evoformer_iteration/msa_row_attention_with_pair_bias//feat_2d_weights",
    "evoformer/evoformer_iteration/msa_row_attention_with_pair_bias/attention//gating_b",
    "evoformer/evoformer_iteration/msa_column_attention/attention//value_w",
    "evoformer/evoformer_iteration/triangle_attention_starting_node/attention//query_w",
    "evoformer/evoformer_iteration/triangle_attention_ending_node//feat_2d_weights",
    "evoformer/evoformer_iteration/triangle_multiplication_outgoing/right_gate//weights",
    "evoformer/evoformer_iteration/pair_transition/transition1//weights",
    "evoformer/single_activations//weights",
    "structure_module/fold_iteration/invariant_point_attention//trainable_point_weights",
    "structure_module/fold_iteration/invariant_point_attention/kv_point_local//weights",
    "structure_module/fold_iteration/affine_update//weights",
    "structure_module/fold_iteration/rigid_sidechain/unnormalized_angles//weights",
    "predicted_lddt_head/act_0//weights",
    "predicted_aligned_error_head/logits//weights",
    "distogram_head/half_logits//weights",
    "masked_msa_head/logits//bias",
)


def main() -> None:
    """Write ``structure.npz`` (inputs) and ``goldens.npz`` beside this file."""
    made = settings()
    atoms, mask = positions()
    known = labels(inputs.aatype(), atoms, mask)
    fixed = known | template_features(atoms, mask)

    def iteration(ensembled, previous, compute_loss):
        module = modules.AlphaFoldIteration(made, made.global_config)
        return module(ensembled, previous, is_training=False, compute_loss=compute_loss)

    def named(ensembled, previous):
        with hk.experimental.name_scope("alphafold"):
            return iteration(ensembled, previous, True)

    network = hk.transform(named)
    n = inputs.NUM_RESIDUES
    previous = {
        "prev_msa_first_row": np.zeros((n, 256), np.float32),
        "prev_pair": np.zeros((n, n, 128), np.float32),
        "prev_pos": np.zeros((n, 37, 3), np.float32),
    }
    key = jax.random.PRNGKey(0)

    def batch(cycle):
        features = fixed | inputs.msa_features(cycle)
        return {name: jnp.asarray(value)[None] for name, value in features.items()}

    shapes = jax.eval_shape(network.init, key, batch(0), previous)
    params = filled(shapes)
    goldens = {}
    with jax.disable_jit():
        goldens |= {f"layers.{k}": v for k, v in layers(params, made).items()}
        for cycle in range(4):
            found, total = network.apply(params, key, batch(cycle), previous)
            goldens |= {f"cycle{cycle}.{k}": v for k, v in outputs_of(found).items()}
            goldens |= {f"cycle{cycle}.{k}": v for k, v in losses_of(found, total).items()}
            print(f"iteration {cycle}: loss {float(total):.5f}", flush=True)
            if cycle == 1:
                goldens |= gradients(network, params, key, batch(cycle), previous)
            previous = {
                "prev_msa_first_row": found["representations"]["msa_first_row"],
                "prev_pair": found["representations"]["pair"],
                "prev_pos": found["structure_module"]["final_atom_positions"],
            }
    np.savez_compressed(FOLDER / "structure.npz", **{
        name: np.asarray(value) for name, value in fixed.items() if not name.startswith("residx")
    })  # fmt: skip
    np.savez_compressed(FOLDER / "goldens.npz", **goldens)


def gradients(network, params, key, batch, previous) -> dict[str, np.ndarray]:
    """Of the loss by some parameters, for an iteration that follows another."""

    def loss(params):
        return network.apply(params, key, batch, previous)[1]

    found = jax.grad(loss)(params)
    kept = {}
    for name in GRADIENTS:
        module, leaf = (ROOT + name).split("//")
        kept[f"gradient.{ROOT}{name}"] = inputs.sample(found[module][leaf])
    return kept


if __name__ == "__main__":
    main()
