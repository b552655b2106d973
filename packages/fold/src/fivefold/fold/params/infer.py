"""Which network a file of parameters belongs to."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from fivefold.fold.config import AlphaFoldConfig, HeadsConfig, TemplateConfig
from fivefold.fold.errors import FoldParametersError
from fivefold.fold.params.names import Style

_ROOT = "alphafold/alphafold_iteration/"
# Of each style: the name of a stack's blocks, and of what only some networks have.
_BLOCKS: Mapping[Style, Mapping[str, str]] = {
    "openfold": {
        "evoformer": r"evoformer\.blocks\.(\d+)\.",
        "extra_msa": r"extra_msa_stack\.blocks\.(\d+)\.",
        "template": r"template_embedder\.template_pair_stack\.blocks\.(\d+)\.",
    },
    "mlperf": {
        "evoformer": r"evoformer_stack\.blocks\.(\d+)\.",
        "extra_msa": r"extra_msa_stack\.blocks\.(\d+)\.",
        "template": r"template_pair_stack\.blocks\.(\d+)\.",
    },
}
_STACKS = {
    "evoformer": "evoformer/evoformer_iteration/msa_transition/transition1//bias",
    "extra_msa": "evoformer/extra_msa_stack/msa_transition/transition1//bias",
    "template": (
        "evoformer/template_embedding/single_template_embedding/template_pair_stack/"
        "__layer_stack_no_state/pair_transition/transition1//bias"
    ),
}
_ALIGNED_ERROR: Mapping[Style, str] = {
    "alphafold": f"{_ROOT}predicted_aligned_error_head/logits//bias",
    "openfold": "aux_heads.tm.linear.bias",
    "mlperf": "auxiliary_heads.tm.linear.bias",
}


def infer_config(shapes: Mapping[str, tuple[int, ...]], style: Style) -> AlphaFoldConfig:
    """The network of AlphaFold's widths that parameters belong to.

    Args:
        shapes: of the parameters, by name.
        style: of the names.

    Returns:
        AlphaFold 2 with as many blocks as there are, with templates and with the head of aligned
        errors if their parameters are there: models 1 and 2 have templates, 3 to 5 none.

    Raises:
        FoldParametersError: there is no main stack under the style's names.
    """
    counts = _counts(shapes, style)
    if not counts["evoformer"] or not counts["extra_msa"]:
        raise FoldParametersError(
            f"these {len(shapes)} parameters have {counts['evoformer']} Evoformer and "
            f"{counts['extra_msa']} extra MSA blocks under the names of {style}; an AlphaFold 2 "
            "monomer has at least one of each"
        )
    usual = AlphaFoldConfig()
    template = TemplateConfig()
    return replace(
        usual,
        evoformer=replace(usual.evoformer, num_blocks=counts["evoformer"]),
        extra_msa=replace(usual.extra_msa, num_blocks=counts["extra_msa"]),
        template=replace(template, stack=replace(template.stack, num_blocks=counts["template"]))
        if counts["template"]
        else None,
        heads=HeadsConfig(aligned_error=_ALIGNED_ERROR[style] in shapes),
    )


def _counts(shapes: Mapping[str, tuple[int, ...]], style: Style) -> dict[str, int]:
    if style == "alphafold":
        return {
            stack: shapes[_ROOT + name][0] if _ROOT + name in shapes else 0
            for stack, name in _STACKS.items()
        }
    return {stack: _highest(shapes, pattern) for stack, pattern in _BLOCKS[style].items()}


def _highest(names: Iterable[str], pattern: str) -> int:
    """One more than the highest number that the pattern finds at the start of names."""
    found = (re.match(pattern, name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)
