"""The text of a saved model's README."""

from importlib.metadata import PackageNotFoundError, version
from math import prod

from fivefold.moe.config import MoEConfig
from fivefold.moe.hf import parameter_shapes

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- mixture-of-experts
- {model_type}
- fivefold
---

# {model_type}, {num_experts} experts

A mixture-of-experts language model of the {model_type} family, written by fivefold-moe {version}.

| | |
|---|---|
| layers | {num_layers} |
| hidden size | {hidden_size} |
| attention heads (key/value) | {num_attention_heads} ({num_key_value_heads}) |
| experts, of which each token uses | {num_experts}; {num_experts_per_token} |
| expert width | {expert_intermediate_size} |
| vocabulary | {vocab_size} |
| parameters, of which each token uses | {total:,}; {active:,} |

```python
from fivefold.moe import MoEForCausalLM
model = MoEForCausalLM.from_pretrained("this repository or folder")
```

The files are those of `transformers`, whose `AutoModelForCausalLM` reads them too.
"""

_SHOWN = (
    "model_type",
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts",
    "num_experts_per_token",
    "expert_intermediate_size",
    "vocab_size",
)


def model_card(config: MoEConfig) -> str:
    """A README with what the configuration says, for people and for the Hub."""
    try:
        release = version("fivefold-moe")
    except PackageNotFoundError:  # run from a source tree
        release = "(not installed)"
    sizes = {key: getattr(config, key) for key in _SHOWN}
    total, active = _num_parameters(config)
    return _CARD.format(version=release, total=total, active=active, **sizes)


def _num_parameters(config: MoEConfig) -> tuple[int, int]:
    """Parameters of the model, and those that one token meets."""
    sizes = {name: prod(shape) for name, shape in parameter_shapes(config).items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    total = sum(sizes.values())
    idle = config.num_experts - config.num_experts_per_token
    return total, total - experts * idle // config.num_experts
