"""Writing a pruned model as a plain folder, with a card that says where it comes from."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fivefold.hybrid_ssm.card import model_card
from fivefold.hybrid_ssm.compress.importance import Scores
from fivefold.hybrid_ssm.compress.prune import Candidate, counts_of, pruned_config, pruned_layers
from fivefold.hybrid_ssm.compress.stream import Stream
from fivefold.hybrid_ssm.config import HybridConfig
from fivefold.hybrid_ssm.files import saved_tensors
from fivefold.hybrid_ssm.model import HybridForCausalLM
from fivefold.hybrid_ssm.pattern import EXPERTS, LETTERS, MAMBA, MLP
from fivefold.hybrid_ssm.pretrained import CARD, CONFIG, GENERATION, QUANTISATION, write_folder
from fivefold.parallel_core.files import atomic_write_text

# What belongs to the parent's weights; all else (tokenizer, chat template) is the student's too.
_OF_WEIGHTS = (CONFIG, GENERATION, CARD, QUANTISATION)
_ENDS = (".safetensors", ".index.json", ".bin", ".py", ".pt")


def write_student(parent: Path, candidate: Candidate, scores: Scores, folder: Path) -> None:
    """Write the candidate's weights and the parent's tokenizer as a model folder.

    Layers are read, cut and written one at a time, in the type that the parent's files have.

    Args:
        parent: folder.
        candidate: what stays of it.
        scores: which neurons, heads and experts do.
        folder: made if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy_companions(parent, folder)
    with Stream(parent) as stream:
        stream.dtype = stream.file_dtype
        config = pruned_config(stream.config, candidate)
        with torch.device("meta"):
            model = HybridForCausalLM(config).to(stream.dtype)
        dtypes = {name: tensor.dtype for name, tensor in saved_tensors(model).items()}
        write_folder(folder, config, dtypes, _parameters(stream, candidate, scores))


def _parameters(
    stream: Stream, candidate: Candidate, scores: Scores
) -> Iterator[tuple[str, Tensor]]:
    ends = stream.ends()
    yield next(ends)
    for place, layer in enumerate(pruned_layers(stream, candidate, scores)):
        for name, tensor in saved_tensors(layer).items():
            yield f"layers.{place}.{name}", tensor
    yield from ends


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what a model folder has beside its weights: tokenizer, chat template, licence."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in _OF_WEIGHTS and not path.name.endswith(_ENDS):
            shutil.copyfile(path, folder / path.name)


def write_card(
    folder: Path, parent: HybridConfig, name: str, candidate: Candidate, facts: dict[str, str]
) -> None:
    """Write the model card: what the model is, and how it came from its parent.

    Args:
        folder: of the model.
        parent: configuration of the model it was made of.
        name: of that model.
        candidate: what stayed.
        facts: rows of the table of lineage.
    """
    config = pruned_config(parent, candidate)
    text = model_card(config)
    if name.count("/") == 1 and not name.startswith(("/", ".")):
        text = text.replace("tags:\n", f"base_model: {name}\ntags:\n", 1)
    rows = {
        "parent": f"{name}, {parent.num_layers} layers `{parent.pattern}`",
        "layers of the parent that stayed": ", ".join(map(str, candidate.layers)),
        "kinds": _kinds(parent, candidate),
        **facts,
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    atomic_write_text(
        folder / CARD,
        f"{text}\n## Lineage\n\nMade from a larger model by MiniPuzzle (arXiv 2504.03624, section "
        "3): its most important layers and neurons were kept, by forward passes alone, and the "
        "result learnt from the parent's logits.\n\n| | |\n|---|---|\n" + table + "\n",
    )


def _kinds(parent: HybridConfig, candidate: Candidate) -> str:
    counts = counts_of(parent, candidate)
    parts = [
        f"{counts[letter]} of {parent.pattern.count(letter)} {word}"
        for letter, word in LETTERS.items()
        if letter in parent.pattern
    ]
    sizes = (
        (MLP, "inner width", candidate.width, parent.intermediate_size),
        (EXPERTS, "experts", candidate.experts, parent.num_experts),
        (MAMBA, "Mamba-2 heads", candidate.mamba_heads, parent.num_mamba_heads),
    )
    parts += [f"{what} {now} of {was}" for kind, what, now, was in sizes if kind in parent.pattern]
    return "; ".join(parts)
