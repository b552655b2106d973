"""A training step on a CPU, against the PyTorch reference of MLPerf HPC 3.0's OpenFold.

    python training_step.py --checkout PATH/openfold --threads 2 --output training_step_cpu.json

Both networks have the same parameters and see the same features: crop 64, 32 clusters, 128 extra
sequences, 4 templates, 4 Evoformer, 4 extra MSA and 2 template blocks, 8 layers of structure.
Steps (forward, loss, backward with recomputation of blocks) are interleaved in one process for the
time; the peak of memory is that of a process of its own for each. The checkout is not changed:
where the reference does not run on a current Python, what is missing is put in place here.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fivefold.fold import AlphaFold, alphafold_loss, preset
from fivefold.fold.config import AlphaFoldConfig
from fivefold.fold.geometry.atoms import atom14_to_atom37, frames_to_atom14, torsion_frames
from fivefold.fold.geometry.ground_truth import atom_features, supervised_features
from fivefold.fold.geometry.rigid import Rigid, quaternion_to_rotation
from fivefold.fold.geometry.tables import tables
from fivefold.fold.geometry.torsions import atom37_to_torsions
from fivefold.fold.params.convert import to_flat
from fivefold.fold.params.names import table
from fivefold.parallel_core.files import write_json
from fivefold.parallel_core.regions import recompute

CROP, CLUSTERS, EXTRA, TEMPLATES, BLOCKS = 64, 32, 128, 4, 4


def config() -> AlphaFoldConfig:
    """MLPerf's network with few blocks."""
    model = preset("mlperf").model
    evoformer = replace(model.evoformer, num_blocks=BLOCKS)
    return replace(
        model, evoformer=evoformer, extra_msa=replace(model.extra_msa, num_blocks=BLOCKS)
    )


def features() -> dict[str, Tensor]:
    """Features of a random chain, with one leading dim."""
    torch.manual_seed(0)
    aatype = torch.randint(20, (1, CROP))
    atoms, mask = _chain(aatype)
    shape = (1, TEMPLATES, CROP)
    template = aatype[:, None].expand(shape).contiguous()
    template_atoms = atoms[:, None] + torch.randn(1, TEMPLATES, CROP, 37, 3)
    return {
        "aatype": aatype,
        "residue_index": torch.arange(CROP)[None],
        "seq_length": torch.tensor([CROP]),
        "seq_mask": torch.ones(1, CROP),
        "target_feat": torch.randn(1, CROP, 22),
        "msa_feat": torch.randn(1, CLUSTERS, CROP, 49),
        "msa_mask": torch.ones(1, CLUSTERS, CROP),
        "extra_msa": torch.randint(23, (1, EXTRA, CROP)),
        "extra_has_deletion": torch.zeros(1, EXTRA, CROP),
        "extra_deletion_value": torch.zeros(1, EXTRA, CROP),
        "extra_msa_mask": torch.ones(1, EXTRA, CROP),
        "true_msa": torch.randint(22, (1, CLUSTERS, CROP)),
        "bert_mask": (torch.rand(1, CLUSTERS, CROP) < 0.15).float(),
        "resolution": torch.tensor([2.0]),
        "template_mask": torch.ones(1, TEMPLATES),
        "template_aatype": template,
        "template_all_atom_positions": template_atoms,
        "template_all_atom_masks": mask[:, None].expand(*shape, 37).contiguous(),
        "template_pseudo_beta": template_atoms[..., 3, :],
        "template_pseudo_beta_mask": torch.ones(shape),
        "all_atom_positions": atoms,
        "all_atom_mask": mask,
        **supervised_features(aatype, atoms, mask),
    }


def _chain(aatype: Tensor) -> tuple[Tensor, Tensor]:
    """Atoms of a chain that walks at random."""
    steps = torch.randn(1, CROP, 3)
    where = (3.8 * steps / steps.norm(dim=-1, keepdim=True)).cumsum(1)
    turn = torch.randn(1, CROP, 4)
    backbone = Rigid(quaternion_to_rotation(turn / turn.norm(dim=-1, keepdim=True)), where)
    angles = torch.randn(1, CROP, 7, 2)
    frames = torsion_frames(aatype, backbone, angles / angles.norm(dim=-1, keepdim=True))
    atoms = atom14_to_atom37(aatype, frames_to_atom14(aatype, frames))
    return atoms, tables(atoms.device).atom37_exists[aatype]


def our_step(parameters: dict[str, Tensor]) -> Callable[[], float]:
    """A step of ours, with every block recomputed."""
    model = AlphaFold(config())
    model.load_state_dict(parameters)
    recompute(model, "full")
    batch, loss_config = features(), preset("mlperf").loss

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = alphafold_loss(model(batch), batch, loss_config)[0].sum()
        loss.backward()
        return loss.item()

    return _with_model(step, model)


def reference_step(checkout: Path, parameters: dict[str, Tensor]) -> Callable[[], float]:
    """A step of the reference, which recomputes every block in training."""
    module = _import_reference(checkout)
    settings = module.config.AlphaFoldConfig()
    settings.evoformer_stack_config.num_blocks = BLOCKS
    settings.extra_msa_stack_config.num_blocks = BLOCKS
    model = module.alphafold.AlphaFold(settings)
    model.load_state_dict(to_flat(parameters, table(config()), "mlperf"))
    loss_function = module.loss.AlphaFoldLoss(settings.loss_config)
    batch = _reference_features(features())

    def step() -> float:
        model.zero_grad(set_to_none=True)
        # It scales the loss by the square root of the length, which ours leaves to the caller.
        loss = loss_function(model(batch), {name: value[..., -1] for name, value in batch.items()})[
            0
        ]
        loss.backward()
        return loss.item() / CROP**0.5

    return _with_model(step, model)


def _with_model(step: Callable[[], float], model: nn.Module) -> Callable[[], float]:
    step.model = model  # type: ignore[attr-defined]
    return step


def _reference_features(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same features under its names, with a last dim for iterations."""
    aatype = batch["aatype"]
    torsions = atom37_to_torsions(
        batch["template_aatype"],
        batch["template_all_atom_positions"],
        batch["template_all_atom_masks"],
    )
    chi = batch["chi_angles"]
    frames = Rigid.from_affine(batch["backbone_affine_tensor"])
    made = {
        **batch,
        **atom_features(aatype),
        "template_all_atom_mask": batch["template_all_atom_masks"],
        "template_torsion_angles_sin_cos": torsions.sin_cos,
        "template_alt_torsion_angles_sin_cos": torsions.alternative,
        "template_torsion_angles_mask": torsions.mask,
        "chi_angles_sin_cos": torch.stack((chi.sin(), chi.cos()), -1),
        "backbone_rigid_tensor": _matrix(frames),
        "backbone_rigid_mask": batch["backbone_affine_mask"],
    }
    for name in ("rigidgroups_gt_frames", "rigidgroups_alt_gt_frames"):
        made[name] = _matrix(Rigid.from_flat12(batch[name]))
    return {name: value.unsqueeze(-1) for name, value in made.items()}


def _matrix(frames: Rigid) -> Tensor:
    matrix = torch.eye(4).repeat(*frames.translation.shape[:-1], 1, 1)
    matrix[..., :3, :3], matrix[..., :3, 3] = frames.rotation, frames.translation
    return matrix


def _import_reference(checkout: Path) -> types.SimpleNamespace:
    """Its modules, on a current Python: configurations as defaults, names that others dropped."""
    import dataclasses

    import numpy as np

    sys.path.insert(0, str(checkout))
    field, reshape = dataclasses.field, np.reshape

    def old_field(*args: object, default: object = dataclasses.MISSING, **kwargs: object) -> object:
        if dataclasses.is_dataclass(default):
            return field(default_factory=type(default), **kwargs)
        return field(*args, default=default, **kwargs)

    def old_reshape(a: object, shape: object = None, newshape: object = None) -> object:
        return reshape(a, newshape if shape is None else shape)

    dataclasses.field, np.reshape = old_field, old_reshape
    try:
        from openfold import config, loss
        from openfold.model import alphafold
    finally:
        dataclasses.field = field
    return types.SimpleNamespace(config=config, loss=loss, alphafold=alphafold)


def random_parameters() -> dict[str, Tensor]:
    """Parameters that are not what a network begins with: nothing is multiplied by zero."""
    torch.manual_seed(1)
    model = AlphaFold(config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.state_dict()


def peak_memory(make: Callable[..., Callable[[], float]], threads: int, *args: object) -> int:
    """Bytes that a process which makes three steps holds at most, beyond what it begins with."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (make, threads, *args))


def _peak(make: Callable[..., Callable[[], float]], threads: int, *args: object) -> int:
    torch.set_num_threads(threads)
    step = make(*args, random_parameters())
    before = _resident()
    for _ in range(3):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def memory_report(threads: int, checkout: Path) -> dict[str, object]:
    """The peaks of memory of both, and their ratio."""
    peaks = {
        "ours": peak_memory(our_step, threads),
        "reference": peak_memory(reference_step, threads, checkout),
    }
    return {"peak_bytes": peaks, "memory_ratio": peaks["ours"] / peaks["reference"]}


def time_report(threads: int, checkout: Path, rounds: int) -> dict[str, object]:
    """Seconds of interleaved steps of both, and the ratio of their medians."""
    torch.set_num_threads(threads)
    parameters = random_parameters()
    steps = {"ours": our_step(parameters), "reference": reference_step(checkout, parameters)}
    losses = {}
    for name, step in steps.items():
        step.model.eval()  # type: ignore[attr-defined]
        losses[name] = step()
        step.model.train()  # type: ignore[attr-defined]
        step()
    if abs(losses["ours"] - losses["reference"]) > 1e-3 * abs(losses["reference"]):
        raise SystemExit(f"the networks differ: {losses}")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "loss": losses,
        "seconds": seconds,
        "median_seconds": median,
        "time_ratio": median["ours"] / median["reference"],
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", type=Path, required=True, help="folder with its setup.py")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("time", "memory"), help="the default is both")
    parser.add_argument("--output", type=Path, help="a file whose other half stays as it is")
    options = parser.parse_args()
    report: dict[str, object] = {}
    if options.output and options.output.exists():
        report = json.loads(options.output.read_text())
    report |= {"threads": options.threads, "torch": torch.__version__}
    if options.only != "memory":
        report |= time_report(options.threads, options.checkout, options.rounds)
    if options.only != "time":
        report |= memory_report(options.threads, options.checkout)
    text = json.dumps(report, indent=2)
    print(text)
    if options.output:
        write_json(options.output, report)


if __name__ == "__main__":
    main()
