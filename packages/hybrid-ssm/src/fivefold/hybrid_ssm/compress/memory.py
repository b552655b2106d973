"""How much memory a hybrid needs for inference, in bits a value, from its configuration alone.

arXiv 2504.03624, section 3: 56 billion parameters in FP4 and a million tokens of context on a GPU
of 32 GiB. The paper does not say in how many bits keys, values and states are; here that is asked.
"""

import re
from dataclasses import dataclass

from fivefold.hybrid_ssm.compress.config import MemoryConfig
from fivefold.hybrid_ssm.config import HybridConfig
from fivefold.hybrid_ssm.errors import HybridConfigError
from fivefold.hybrid_ssm.hf import count_parameters
from fivefold.hybrid_ssm.pattern import ATTENTION, MAMBA

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(%|[A-Za-z]+)\s*")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a model needs, by what they hold.

    Attributes:
        weights: all parameters but the next ones.
        embeddings: token embedding and output layer.
        keys_values: of all sequences, as long as the context.
        states: of the Mamba-2 layers, with the convolutions' last inputs.
        workspace: set aside.
    """

    weights: float
    embeddings: float
    keys_values: float
    states: float
    workspace: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.embeddings + self.keys_values + self.states + self.workspace


def memory_of(model: HybridConfig, config: MemoryConfig) -> Memory:
    """What a model needs for inference.

    >>> tiny = HybridConfig(vocab_size=10, hidden_size=4, pattern="-", intermediate_size=6)
    >>> memory_of(tiny, MemoryConfig(weight_bits=8, context_length=7)).total
    136.0
    """
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    written = model.vocab_size * model.hidden_size * 2
    others = count_parameters(model)[1] - written
    if model.tie_word_embeddings and model.model_type == "mamba2":
        others += written // 2  # such files have no output layer at all
    bits = config.weight_bits if config.embedding_bits is None else config.embedding_bits
    rows = config.batch_size
    return Memory(
        weights=others * config.weight_bits / 8,
        embeddings=embeddings * bits / 8,
        keys_values=rows * config.context_length * kv_elements(model) * config.kv_bits / 8,
        states=rows * state_elements(model) * config.state_bits / 8,
        workspace=float(config.workspace_bytes),
    )


def kv_elements(model: HybridConfig) -> int:
    """Keys and values that each token adds, in elements."""
    return model.pattern.count(ATTENTION) * 2 * model.num_key_value_heads * model.head_dim


def state_elements(model: HybridConfig) -> int:
    """What the Mamba-2 layers remember of one sequence, in elements."""
    channels = model.mamba_width + 2 * model.num_groups * model.state_size
    each = model.mamba_width * model.state_size + channels * (model.conv_width - 1)
    return model.pattern.count(MAMBA) * each


def parse_budget(text: str, parent: float) -> float:
    """Bytes of a budget such as "31.7GiB" or "80%" of the parent's memory.

    Raises:
        HybridConfigError: it is no such text, or no bytes.

    >>> parse_budget("1.5 KiB", 0), parse_budget("80%", 1000)
    (1536.0, 800.0)
    """
    match = _AMOUNT.fullmatch(text)
    unit = match[2].upper() if match else ""
    if not match or (unit != "%" and unit not in _UNITS) or float(match[1]) <= 0:
        raise HybridConfigError(
            f"budget is {text!r}; write a number above 0 and a unit: % of the parent's memory, "
            f"or {', '.join(('B', 'KB', 'MB', 'GB', 'TB', 'KiB', 'MiB', 'GiB', 'TiB'))}"
        )
    return float(match[1]) * (parent / 100 if unit == "%" else _UNITS[unit])


def shown(num_bytes: float) -> str:
    """Bytes for people: "29.51 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.2f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"
