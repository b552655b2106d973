"""What the model is made of, what it is fed and what it is scored by, as plain data."""

from dataclasses import dataclass, fields

from fivefold.fold.errors import FoldConfigError
from fivefold.parallel_core.config import Config


def _check_counts(config: Config, but: tuple[str, ...] = ()) -> None:
    """Raise unless counts are positive (those in ``but`` may be 0) and fractions below 1."""
    for field in fields(config):
        value = getattr(config, field.name)
        least = 0 if field.name in but else 1
        if type(value) is int and value < least:
            raise FoldConfigError(f"{field.name} is at least {least}, found {value}")
        if field.name.endswith(("dropout", "fraction")) and not 0 <= value < 1:
            raise FoldConfigError(f"{field.name} is at least 0 and below 1, found {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StackConfig(Config):
    """A stack of blocks of the MSA and the pair representation, or of the pair alone.

    Attributes:
        num_blocks: of the stack.
        num_msa_heads: of attention over the MSA; a template stack has none of that.
        msa_head_width: channels of one such head.
        num_pair_heads: of triangle attention.
        pair_head_width: channels of one such head.
        c_outer: channels of each side of the outer product mean.
        c_triangle: channels of the triangle multiplications.
        transition_factor: by which transitions widen.
        msa_dropout: of attention over rows of the MSA.
        pair_dropout: of the triangle layers.
    """

    num_blocks: int = 48
    num_msa_heads: int = 8
    msa_head_width: int = 32
    num_pair_heads: int = 4
    pair_head_width: int = 32
    c_outer: int = 32
    c_triangle: int = 128
    transition_factor: int = 4
    msa_dropout: float = 0.15
    pair_dropout: float = 0.25

    def __post_init__(self) -> None:
        _check_counts(self)


_EXTRA_MSA = StackConfig(num_blocks=4, msa_head_width=8)
_TEMPLATE_PAIR = StackConfig(num_blocks=2, pair_head_width=16, c_triangle=64, transition_factor=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateConfig(Config):
    """How templates enter (supplement, section 1.7.1).

    Attributes:
        c_pair: channels of the pair representation of one template.
        stack: that each template's pair representation passes.
        num_heads: of the attention of a pair over the templates.
        head_width: channels of one such head.
        num_bins: of distances in a template.
        first_bin: lower end of the first bin, in angstrom.
        last_bin: lower end of the last bin, in angstrom.
    """

    c_pair: int = 64
    stack: StackConfig = _TEMPLATE_PAIR
    num_heads: int = 4
    head_width: int = 16
    num_bins: int = 39
    first_bin: float = 3.25
    last_bin: float = 50.75

    def __post_init__(self) -> None:
        _check_counts(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class StructureConfig(Config):
    """The structure module (supplement, section 1.8).

    Attributes:
        num_layers: iterations, which share their weights.
        num_heads: of invariant point attention.
        head_width: channels of one head's scalars.
        num_query_points: of one head.
        num_value_points: of one head.
        num_transition_layers: linear layers between attention and the update of the backbone.
        c_torsion: channels where torsions are predicted.
        num_torsion_blocks: residual blocks there.
        dropout: after attention and after the transition.
        position_scale: angstrom in one unit of the coordinates inside.
    """

    num_layers: int = 8
    num_heads: int = 12
    head_width: int = 16
    num_query_points: int = 4
    num_value_points: int = 8
    num_transition_layers: int = 3
    c_torsion: int = 128
    num_torsion_blocks: int = 2
    dropout: float = 0.1
    position_scale: float = 10.0

    def __post_init__(self) -> None:
        _check_counts(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadsConfig(Config):
    """What is predicted beside the structure (supplement, section 1.9).

    Attributes:
        num_lddt_bins: of the predicted lDDT.
        c_lddt: channels of its hidden layers.
        num_distance_bins: of the distogram.
        first_distance: upper end of its first bin, in angstrom.
        last_distance: lower end of its last bin, in angstrom.
        aligned_error: whether errors of aligned residues are predicted, from which pTM comes.
        num_error_bins: of these errors.
        last_error: lower end of their last bin, in angstrom.
    """

    num_lddt_bins: int = 50
    c_lddt: int = 128
    num_distance_bins: int = 64
    first_distance: float = 2.3125
    last_distance: float = 21.6875
    aligned_error: bool = False
    num_error_bins: int = 64
    last_error: float = 31.0

    def __post_init__(self) -> None:
        _check_counts(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class AlphaFoldConfig(Config):
    """The network.

    Attributes:
        c_m: channels of the MSA representation.
        c_z: of the pair representation.
        c_s: of the single representation.
        c_e: of the extra MSA representation.
        evoformer: the main stack.
        extra_msa: the stack of the sequences that are no cluster centres.
        template: None for a network without templates, such as models 3 to 5.
        structure: the structure module.
        heads: everything else that is predicted.
        max_relative_position: residues further apart than this look the same.
        num_recycle_bins: of the distances of the iteration before.
        first_recycle_bin: lower end of the first bin, in angstrom.
        last_recycle_bin: lower end of the last bin, in angstrom.
    """

    c_m: int = 256
    c_z: int = 128
    c_s: int = 384
    c_e: int = 64
    evoformer: StackConfig = StackConfig()
    extra_msa: StackConfig = _EXTRA_MSA
    template: TemplateConfig | None = TemplateConfig()
    structure: StructureConfig = StructureConfig()
    heads: HeadsConfig = HeadsConfig()
    max_relative_position: int = 32
    num_recycle_bins: int = 15
    first_recycle_bin: float = 3.25
    last_recycle_bin: float = 20.75

    def __post_init__(self) -> None:
        _check_counts(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureConfig(Config):
    """How much of an alignment the network sees.

    Attributes:
        crop_size: residues of a training sample.
        max_msa_clusters: rows of the clustered MSA, among them those that templates take.
        max_extra_msa: rows of the extra MSA.
        max_templates: of one chain; 0 for none.
        num_recycles: iterations before the one that counts; in training the most of them.
        masked_fraction: of the MSA that has to be guessed.
    """

    crop_size: int = 256
    max_msa_clusters: int = 512
    max_extra_msa: int = 1024
    max_templates: int = 4
    num_recycles: int = 3
    masked_fraction: float = 0.15

    def __post_init__(self) -> None:
        _check_counts(self, but=("max_templates", "num_recycles"))


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig(Config):
    """Weights and constants of the loss (supplement, section 1.9).

    Attributes:
        backbone: weight of FAPE of the backbone, averaged over the structure module's layers.
        side_chain: of FAPE of all atoms.
        chi: of side-chain torsions.
        torsion_norm: of the length of unnormalised torsions.
        distogram: of distances.
        masked_msa: of masked residues of the MSA.
        plddt: of the predicted lDDT.
        experimentally_resolved: of which atoms were seen; 0 in initial training.
        aligned_error: of predicted aligned errors; 0 without that head.
        violation: of bonds, angles and clashes; 0 in initial training.
        clamp: distance above which FAPE is constant, in angstrom.
        length_scale: distance that counts as 1, in angstrom.
        violation_deviations: by which bonds and angles may be off, in standard deviations.
        clash_tolerance: by which atoms may overlap, in angstrom.
        min_resolution: of structures that confidence is learned from, in angstrom.
        max_resolution: likewise.
    """

    backbone: float = 0.5
    side_chain: float = 0.5
    chi: float = 0.5
    torsion_norm: float = 0.01
    distogram: float = 0.3
    masked_msa: float = 2.0
    plddt: float = 0.01
    experimentally_resolved: float = 0.0
    aligned_error: float = 0.0
    violation: float = 0.0
    clamp: float = 10.0
    length_scale: float = 10.0
    violation_deviations: float = 12.0
    clash_tolerance: float = 1.5
    min_resolution: float = 0.1
    max_resolution: float = 3.0

    def __post_init__(self) -> None:
        negative = [f.name for f in fields(self) if getattr(self, f.name) < 0]
        if negative:
            raise FoldConfigError(
                f"a loss's {negative[0]} is at least 0, found {getattr(self, negative[0])}"
            )
