"""The text of a saved model's README."""

from importlib.metadata import PackageNotFoundError, version

from fivefold.hybrid_ssm.config import HybridConfig
from fivefold.hybrid_ssm.hf import count_parameters
from fivefold.hybrid_ssm.pattern import LETTERS

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- mamba-2
- {model_type}
- fivefold
---

# {model_type}, {num_layers} layers

A language model of the {model_type} family, written by fivefold-hybrid-ssm {version}.

| | |
|---|---|
| layers | `{pattern}`: {kinds} |
| hidden size | {hidden_size} |
| Mamba-2 heads, width of one, state | {num_mamba_heads}, {mamba_head_dim}, {state_size} |
| vocabulary | {vocab_size} |
| parameters | {total:,} |

```python
from fivefold.hybrid_ssm import HybridForCausalLM
model = HybridForCausalLM.from_pretrained("this repository or folder")
```

The files are those of `transformers`, whose `AutoModelForCausalLM` reads them too.
"""

_SHOWN = (
    "model_type",
    "num_layers",
    "pattern",
    "hidden_size",
    "num_mamba_heads",
    "mamba_head_dim",
    "state_size",
    "vocab_size",
)


def model_card(config: HybridConfig) -> str:
    """A README with what the configuration says, for people and for the Hub."""
    try:
        release = version("fivefold-hybrid-ssm")
    except PackageNotFoundError:  # run from a source tree
        release = "(not installed)"
    shown = {key: getattr(config, key) for key in _SHOWN}
    counts = [(config.pattern.count(letter), word) for letter, word in LETTERS.items()]
    kinds = ", ".join(f"{count} {word}" for count, word in counts if count)
    total = count_parameters(config)[1]
    return _CARD.format(version=release, kinds=kinds, total=total, **shown)
