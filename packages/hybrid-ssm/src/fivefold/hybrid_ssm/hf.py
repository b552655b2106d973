"""The tensors of a hybrid's files: their names and shapes, and the parameters they are made of.

Files of the first releases' remote code and of transformers 5 have the same ones. All of it
follows from the configuration; no model is made.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from fivefold.hybrid_ssm.config import HybridConfig
from fivefold.hybrid_ssm.errors import HybridWeightsError
from fivefold.hybrid_ssm.pattern import ATTENTION, EXPERTS, MAMBA, MLP

KEPT = "mtp."
"""Start of the names of tensors that are kept through load and save but not run."""

SCALES = ("weight_scale", "input_scale", "output_scale", "k_scale", "v_scale")
"""Last parts of the names of what quantised files have beside a tensor."""

EMBEDDING, OLD_EMBEDDING = "backbone.embeddings.weight", "backbone.embedding.weight"
_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of the first dim of a tensor on disk, and where it is in our parameters.

    Attributes:
        name: of our parameter.
        index: the stretch is ``parameter[index]``.
        size: length of the stretch.
    """

    name: str
    index: tuple[int, ...]
    size: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor on disk: its parts, laid one after the other along dim 0.

    Attributes:
        name: on disk.
        shape: on disk; a convolution has a dim of 1 in the middle that ours has not.
        parts: what it is made of.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def is_convolution(self) -> bool:
        """Whether it has that dim."""
        return self.name.endswith("conv1d.weight")


def stored_tensors(config: HybridConfig) -> list[Stored]:
    """Every tensor of a model's files that our parameters are made from, in our order."""
    vocabulary = (config.vocab_size, config.hidden_size)
    tensors = [_whole(EMBEDDING, "embed_tokens.weight", vocabulary)]
    for index, letter in enumerate(config.pattern):
        ours, theirs = f"layers.{index}", f"backbone.layers.{index}"
        tensors.append(
            _whole(f"{theirs}.norm.weight", f"{ours}.norm.weight", (config.hidden_size,))
        )
        tensors += _mixer(config, letter, f"{ours}.mixer.", f"{theirs}.mixer.")
    tensors.append(_whole("backbone.norm_f.weight", "norm.weight", (config.hidden_size,)))
    if writes_head(config):
        name = "embed_tokens.weight" if config.tie_word_embeddings else _HEAD
        tensors.append(_whole(_HEAD, name, vocabulary))
    return tensors


def writes_head(config: HybridConfig) -> bool:
    """Whether files have the output layer; transformers ties only plain Mamba-2 models itself."""
    return not (config.tie_word_embeddings and config.model_type == "mamba2")


def kept_tensors(config: HybridConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of the tensors of the prediction depths, which released files have."""
    shapes: dict[str, tuple[int, ...]] = {}
    hidden, depth = (config.hidden_size,), len(config.mtp_pattern)
    for index in range(config.num_nextn_predict_layers * depth):
        prefix, place = f"{KEPT}layers.{index}.", index % depth
        if place == 0:
            shapes |= {f"{prefix}eh_proj.weight": (config.hidden_size, 2 * config.hidden_size)}
            shapes |= {f"{prefix}{name}.weight": hidden for name in ("enorm", "hnorm")}
        shapes[f"{prefix}norm.weight"] = hidden
        mixer = _mixer(config, config.mtp_pattern[place], "", f"{prefix}mixer.")
        shapes |= {tensor.name: tensor.shape for tensor in mixer}
        if place == depth - 1:
            shapes[f"{prefix}final_layernorm.weight"] = hidden
    return shapes


def count_parameters(config: HybridConfig) -> tuple[int, int]:
    """Tensors in a released model's files and their elements, prediction depths included.

    >>> config = HybridConfig(vocab_size=10, hidden_size=4, pattern="-", intermediate_size=6)
    >>> count_parameters(config)
    (6, 136)
    """
    shapes = [tensor.shape for tensor in stored_tensors(config)]
    shapes += kept_tensors(config).values()
    return len(shapes), sum(map(prod, shapes))


def check_names(config: HybridConfig, names: Iterable[str]) -> None:
    """Check that tensors of these names are the weights of a model, no more and no less.

    Raises:
        HybridWeightsError: lists what is missing and what does not belong to the model.
    """
    found = {EMBEDDING if name == OLD_EMBEDDING else name for name in names}
    needed = {tensor.name for tensor in stored_tensors(config)}
    if config.tie_word_embeddings:
        found.discard(_HEAD)
        needed.discard(_HEAD)
    extra = sorted(name for name in found - needed if not _beside(name, needed))
    missing = sorted(needed - found)
    if missing or extra:
        raise HybridWeightsError(
            f"not the weights of this model, which has {len(needed)} tensors; missing: "
            f"{_listed(missing)}; not of this model: {_listed(extra)}"
        )


def _beside(name: str, needed: set[str]) -> bool:
    """Whether a tensor may lie beside the model's own: a kept one, or a scale of one."""
    stem, _, last = name.rpartition(".")
    return name.startswith(KEPT) or (last in SCALES and f"{stem}.weight" in needed)


def _listed(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def _whole(name: str, ours: str, shape: tuple[int, ...]) -> Stored:
    return Stored(name, shape, (Part(ours, (), shape[0]),))


def _mixer(config: HybridConfig, letter: str, ours: str, theirs: str) -> Iterator[Stored]:
    make = {MAMBA: _mamba, ATTENTION: _attention, MLP: _mlp, EXPERTS: _experts}
    return make[letter](config, ours, theirs)


def _joined(
    name: str, ours: str, sizes: dict[str, int], what: str, rest: tuple[int, ...]
) -> Stored:
    """A tensor whose parts are parameters of several modules."""
    parts = tuple(Part(f"{ours}{key}.{what}", (), size) for key, size in sizes.items())
    return Stored(name, (sum(sizes.values()), *rest), parts)


def _mamba(config: HybridConfig, ours: str, theirs: str) -> Iterator[Stored]:
    width, shared = config.mamba_width, config.num_groups * config.state_size
    convolved = {"conv_x": width, "conv_b": shared, "conv_c": shared}
    projected = {"z": width, "x": width, "b": shared, "c": shared, "dt": config.num_mamba_heads}
    rest: dict[str, tuple[int, ...]] = {"weight": (config.hidden_size,)}
    rest |= {"bias": ()} if config.use_bias else {}
    for what in rest:
        yield _joined(f"{theirs}in_proj.{what}", f"{ours}in_proj.", projected, what, rest[what])
    taps: dict[str, tuple[int, ...]] = {"weight": (1, config.conv_width)}
    taps |= {"bias": ()} if config.use_conv_bias else {}
    for what in taps:
        yield _joined(f"{theirs}conv1d.{what}", f"{ours}heads.", convolved, what, taps[what])
    for name in ("A_log", "D", "dt_bias"):
        yield _whole(f"{theirs}{name}", f"{ours}heads.{name}", (config.num_mamba_heads,))
    yield _whole(f"{theirs}norm.weight", f"{ours}norm.weight", (width,))
    yield from _linear(
        f"{theirs}out_proj", f"{ours}out_proj", (config.hidden_size, width), config.use_bias
    )


def _attention(config: HybridConfig, ours: str, theirs: str) -> Iterator[Stored]:
    hidden, query = config.hidden_size, config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
        yield _whole(f"{theirs}{name}.weight", f"{ours}qkv.{name}.weight", (rows, hidden))
    yield _whole(f"{theirs}o_proj.weight", f"{ours}o_proj.weight", (hidden, query))


def _mlp(config: HybridConfig, ours: str, theirs: str, intermediate: int = 0) -> Iterator[Stored]:
    hidden, inner = config.hidden_size, intermediate or config.intermediate_size
    for name, shape in (("up_proj", (inner, hidden)), ("down_proj", (hidden, inner))):
        yield from _linear(f"{theirs}{name}", f"{ours}{name}", shape, config.mlp_bias)


def _linear(theirs: str, ours: str, shape: tuple[int, int], bias: bool) -> Iterator[Stored]:
    yield _whole(f"{theirs}.weight", f"{ours}.weight", shape)
    if bias:
        yield _whole(f"{theirs}.bias", f"{ours}.bias", shape[:1])


def _experts(config: HybridConfig, ours: str, theirs: str) -> Iterator[Stored]:
    num, hidden, inner = config.num_experts, config.hidden_size, config.expert_intermediate_size
    yield _whole(f"{theirs}gate.weight", f"{ours}router.weight", (num, hidden))
    name = f"{theirs}gate.e_score_correction_bias"
    yield _whole(name, f"{ours}router.bias", (num,))
    width = hidden if config.latent_size is None else config.latent_size
    for name, mine, shape in (
        ("up_proj", "up", (inner, width)),
        ("down_proj", "down", (width, inner)),
    ):
        for expert in range(num):
            part = Part(f"{ours}experts.{mine}", (expert,), shape[0])
            yield Stored(f"{theirs}experts.{expert}.{name}.weight", shape, (part,))
    yield from _mlp(
        config, f"{ours}shared.", f"{theirs}shared_experts.", config.shared_intermediate_size
    )
    if config.latent_size is not None:
        bias = config.mlp_bias
        pair = ("fc1_latent_proj", "latent_in", (width, hidden))
        back = ("fc2_latent_proj", "latent_out", (hidden, width))
        for name, mine, shape in (pair, back):
            yield from _linear(f"{theirs}{name}", f"{ours}{mine}", shape, bias)
