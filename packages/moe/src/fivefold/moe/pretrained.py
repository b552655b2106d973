"""Model folders as transformers has them: reading, writing and publishing."""

import json
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from torch import Tensor, nn

from fivefold.moe.config import MoEConfig
from fivefold.moe.errors import MoEConfigError
from fivefold.moe.hf import check_names, hf_sources
from fivefold.parallel_core import hub
from fivefold.parallel_core.parallelize import parallelize
from fivefold.parallel_core.parameters import ParameterTable, Piece
from fivefold.parallel_core.topology import Topology
