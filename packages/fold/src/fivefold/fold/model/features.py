"""What the network and its losses are given: names, shapes and types of features.

Names are AlphaFold 2's. Every tensor may have leading dims (a batch of crops of equal size), the
same for all; they are left out below. N residues, S clusters of the MSA, E extra sequences,
T templates.

One mapping of features serves one iteration. ``AlphaFold.forward`` takes one mapping for all
iterations, or a sequence of them, one per iteration, where the MSA is sampled anew for each; they
may share tensors. Floats are float32, counts int64, masks float32 with 1 for what is there.

Always:
    aatype             (N,) int     numbers of amino acids, 20 unknown
    residue_index      (N,) int     numbers along the chain, which may skip
    seq_mask           (N,)         1 for residues, 0 for padding
    target_feat        (N, 22)      0 or 1 where the chain breaks, then one-hot of aatype (21)
    msa_feat           (S, N, 49)   one-hot of the masked MSA (23), has deletion, deletion value,
                                    cluster profile (23), mean deletion value
    msa_mask           (S, N)
    extra_msa          (E, N) int   classes 0 to 22
    extra_has_deletion, extra_deletion_value, extra_msa_mask    (E, N)

With templates (T may be padded with rows whose mask is 0):
    template_mask                (T,)
    template_aatype              (T, N) int    0 to 21, 21 a gap
    template_all_atom_positions  (T, N, 37, 3)
    template_all_atom_masks      (T, N, 37)
    template_pseudo_beta         (T, N, 3)
    template_pseudo_beta_mask    (T, N)

For chains joined into one (no feature is no such thing):
    asym_id            (N,) int     residues of different chains are as far apart as can be

For the losses, all made by ``geometry.ground_truth.supervised_features`` from the first two:
    all_atom_positions (N, 37, 3)   angstrom
    all_atom_mask      (N, 37)
    pseudo_beta (N, 3), pseudo_beta_mask (N,)
    backbone_affine_tensor (N, 7), backbone_affine_mask (N,)
    atom14_gt_positions, atom14_alt_gt_positions (N, 14, 3)
    atom14_gt_exists, atom14_alt_gt_exists, atom14_atom_is_ambiguous (N, 14)
    rigidgroups_gt_frames, rigidgroups_alt_gt_frames (N, 8, 12), rigidgroups_gt_exists (N, 8)
    chi_angles, chi_mask (N, 4)     radians
and besides:
    true_msa           (S, N) int   classes before masking
    bert_mask          (S, N)       1 where the network has to guess
    resolution         ()           angstrom; 0 where there is none (NMR, predictions)
    use_clamped_fape   ()           1 or 0; without it FAPE of the backbone is clamped
"""

from collections.abc import Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fivefold.fold.errors import FoldInputError
from fivefold.fold.geometry.residues import NUM_MSA_CLASSES

Features: TypeAlias = Mapping[str, Tensor]

TARGET_CHANNELS = 22
MSA_CHANNELS = 49
EXTRA_MSA_CHANNELS = NUM_MSA_CLASSES + 2

# Dims of a feature that is not batched.
_ALWAYS = {
    "aatype": 1,
    "residue_index": 1,
    "seq_mask": 1,
    "target_feat": 2,
    "msa_feat": 3,
    "msa_mask": 2,
    "extra_msa": 2,
    "extra_has_deletion": 2,
    "extra_deletion_value": 2,
    "extra_msa_mask": 2,
}
_OF_TEMPLATES = {
    "template_mask": 1,
    "template_aatype": 2,
    "template_all_atom_positions": 4,
    "template_all_atom_masks": 3,
    "template_pseudo_beta": 3,
    "template_pseudo_beta_mask": 2,
}


def check(features: Features, with_templates: bool) -> None:
    """Raise unless the features of the network are there and agree on their leading dims.

    Raises:
        FoldInputError: with what is missing, or with both shapes.
    """
    needed = _ALWAYS | (_OF_TEMPLATES if with_templates else {})
    missing = [name for name in needed if name not in features]
    if missing:
        raise FoldInputError(
            f"features lack {', '.join(missing)}; this network needs {', '.join(needed)}"
        )
    lead = features["aatype"].shape[:-1]
    for name, num_dims in needed.items():
        shape = tuple(features[name].shape)
        if len(shape) != num_dims + len(lead) or shape[: len(lead)] != lead:
            raise FoldInputError(
                f"{name} has shape {shape}; of aatype {tuple(features['aatype'].shape)} follow "
                f"{len(lead)} leading dims {tuple(lead)} and {num_dims} of its own"
            )
    if with_templates and not features["template_mask"].shape[-1]:
        raise FoldInputError(
            "there are 0 templates; where a chain has none, give one whose template_mask is 0"
        )
    _check_residues(features)


def _check_residues(features: Features) -> None:
    num_residues = features["aatype"].shape[-1]
    for name, dim in (("target_feat", -2), ("msa_feat", -2), ("msa_mask", -1), ("extra_msa", -1)):
        if features[name].shape[dim] != num_residues:
            raise FoldInputError(
                f"{name} has shape {tuple(features[name].shape)}, aatype {num_residues} residues"
            )


def extra_msa_features(features: Features, dtype: torch.dtype) -> Tensor:
    """(..., E, N, 25): one-hot of the extra sequences and their deletions.

    As late as possible, because it is 25 times as large as what it is made of.
    """
    classes = F.one_hot(features["extra_msa"].long(), NUM_MSA_CLASSES)
    deletions = (features["extra_has_deletion"], features["extra_deletion_value"])
    return torch.cat((classes.to(dtype), *(x.unsqueeze(-1).to(dtype) for x in deletions)), -1)
