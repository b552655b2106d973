"""What both sides of the comparison with AlphaFold's JAX code make from seeds.

Only numpy is imported: the environment of the JAX code has nothing else of ours.
"""

import zlib

import numpy as np

NUM_RESIDUES, NUM_CLUSTERS, NUM_EXTRA, NUM_TEMPLATES = 16, 8, 12, 2
SEQUENCE = "MGPCDFERYWCHKTNV"
NUM_SAMPLED = 300

_STACKS = ("/evoformer_iteration/", "/extra_msa_stack/", "/__layer_stack_no_state/")
# The last dim is what comes out; of all others but these the first is what goes in.
_ALL_BUT_LAST = ("output_w",)


def parameter(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One of AlphaFold's arrays, from its name alone.

    Layer norms are near the identity and products keep the scale of their input, so that a deep
    network neither fades nor explodes.
    """
    leaf = name.split("//")[-1]
    own = shape[1:] if any(stack in name for stack in _STACKS) else shape
    draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if leaf == "scale":
        return (1 + 0.1 * draw).astype(np.float32)
    if len(own) < 2 or leaf == "gating_b":
        return (0.1 * draw).astype(np.float32)
    fan_in = int(np.prod(own[:-1])) if leaf in _ALL_BUT_LAST else own[0]
    return (0.6 * draw / np.sqrt(fan_in)).astype(np.float32)


def values(name: str, *shape: int) -> np.ndarray:
    """Normal values, from a name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.standard_normal(shape).astype(np.float32)


def mask(name: str, *shape: int) -> np.ndarray:
    """Mostly ones; no row or column of it is all zeros."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    made = (rng.random(shape) > 0.2).astype(np.float32)
    made[..., 0] = 1
    made[..., 0, :] = 1
    return made


def sample(array: np.ndarray) -> np.ndarray:
    """At most NUM_SAMPLED entries, always the same ones: goldens stay small."""
    flat = np.asarray(array).reshape(-1)
    if flat.size <= NUM_SAMPLED:
        return flat
    return flat[np.random.default_rng(flat.size).choice(flat.size, NUM_SAMPLED, replace=False)]


def aatype() -> np.ndarray:
    """Numbers of the sequence's amino acids."""
    return np.array(["ARNDCQEGHILKMFPSTWYV".index(letter) for letter in SEQUENCE])


def msa_features(cycle: int) -> dict[str, np.ndarray]:
    """Sequence and alignment features of one iteration."""
    rng = np.random.default_rng(1000 + cycle)
    n, s, e = NUM_RESIDUES, NUM_CLUSTERS, NUM_EXTRA
    one_hot = np.eye(21, dtype=np.float32)[aatype()]
    index = np.arange(n)
    index[n // 2 :] += 3  # a gap in the chain
    return {
        "aatype": aatype(),
        "residue_index": index,
        "seq_length": np.array(n),
        "seq_mask": np.ones(n, np.float32),
        "target_feat": np.concatenate([np.zeros((n, 1), np.float32), one_hot], -1),
        "msa_feat": rng.random((s, n, 49)).astype(np.float32),
        "msa_mask": mask(f"msa{cycle}", s, n),
        "extra_msa": rng.integers(0, 23, (e, n)),
        "extra_has_deletion": rng.integers(0, 2, (e, n)).astype(np.float32),
        "extra_deletion_value": rng.random((e, n)).astype(np.float32),
        "extra_msa_mask": mask(f"extra{cycle}", e, n),
        "true_msa": rng.integers(0, 22, (s, n)),
        "bert_mask": rng.integers(0, 2, (s, n)).astype(np.float32),
        "resolution": np.array(2.0, np.float32),
        "use_clamped_fape": np.array(1.0, np.float32),
    }
