"""The text of a saved layer's README."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_CARD = """---
library_name: fivefold-sparse-rnn
tags:
- sparsity
- {tag}
- fivefold
---

# Sparse {mode}, {hidden_size} units, {share} of the recurrent weights

A recurrent layer whose recurrent matrices are sparse, written by fivefold-sparse-rnn {version}.

| | |
|---|---|
| input size | {input_size} |
| units | {hidden_size} |
| layers | {num_layers} |
| directions | {directions} |
| recurrent weights kept | {share} |

```python
from fivefold.sparse_rnn import {name}
layer = {name}.from_pretrained("this repository or folder")
```

Call, outputs and state dict are those of `torch.nn.{dense}`. A sparse matrix is four tensors in the
file: its nonzeros, a bitmask, where rows begin, and its shape.
"""

_SHOWN = ("mode", "input_size", "hidden_size", "num_layers")


def layer_card(config: Mapping[str, Any]) -> str:
    """A README with what a layer's ``config.json`` says, for people and for the Hub."""
    try:
        release = version("fivefold-sparse-rnn")
    except PackageNotFoundError:  # run from a source tree
        release = "(not installed)"
    dense = str(config["mode"]).partition("_")[0]
    return _CARD.format(
        version=release,
        dense=dense,
        name=f"Sparse{dense}",
        tag=dense.lower(),
        share=f"{config['density']:.1%}",
        directions=2 if config["bidirectional"] else 1,
        **{key: config[key] for key in _SHOWN},
    )
