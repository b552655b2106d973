"""Models by repository name, through huggingface_hub itself, from a Hub on the loopback."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from fivefold.integration.loopback_hub import LoopbackHub, Repository
from fivefold.moe import MoEForCausalLM


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def make(folder: Path, seed: int) -> dict[str, bytes]:
    """A tiny Mixtral of transformers in several files."""
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).save_pretrained(folder, max_shard_size="40KB")
    return files_of(folder)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """A Hub with one model in two revisions."""
    folder = tmp_path_factory.mktemp("models")
    with LoopbackHub() as server:
        repository = server.repositories["you/tiny"] = Repository()
        repository.commit(make(folder / "old", 0))
        repository.branches["v1"] = repository.branches["main"]
        extra = {"consolidated.safetensors": b"\0" * 9999, "pytorch_model.bin": b"\0" * 9999}
        repository.commit(make(folder / "new", 1) | extra)
        yield server


def run(code: str, hub: LoopbackHub, home: Path, **variables: str) -> dict[str, object]:
    """What a program prints as JSON that sees this Hub and no other."""
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(home),
        "HF_TOKEN": "of-the-test",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


LOAD = """
import json, sys, torch
from fivefold.moe import MoEForCausalLM
try:
    model = MoEForCausalLM.from_pretrained("you/tiny", revision={revision!r})
    print(json.dumps({{"first": model.lm_head.weight[0, 0].item()}}))
except Exception as error:
    print(json.dumps({{"error": type(error).__name__, "text": str(error)}}))
"""


def first_value(hub: LoopbackHub, revision: str, tmp_path: Path) -> float:
    """The value that ``LOAD`` prints, from the repository's own files."""
    repository = hub.repositories["you/tiny"]
    for name, data in repository.commits[str(repository.find(revision))].items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "consolidated.safetensors").unlink(missing_ok=True)
    return MoEForCausalLM.from_pretrained(tmp_path).lm_head.weight[0, 0].item()


@pytest.mark.parametrize("revision", ["main", "v1"])
def test_a_model_by_name_and_revision(hub: LoopbackHub, tmp_path: Path, revision: str) -> None:
    (tmp_path / "files").mkdir()
    hub.requests.clear()
    found = run(LOAD.format(revision=revision), hub, tmp_path / "home")
    assert found == {"first": first_value(hub, revision, tmp_path / "files")}
    asked = {path.rpartition("/")[2] for path in hub.requests if "/resolve/" in path}
    assert "model.safetensors.index.json" in asked
    assert sum(name.endswith(".safetensors") for name in asked) > 1
    assert not {"consolidated.safetensors", "pytorch_model.bin"} & asked
    # By a commit's own id, and again: from the cache, without the Hub.
    commit = str(hub.repositories["you/tiny"].find(revision))
    run(LOAD.format(revision=commit), hub, tmp_path / "home")
    hub.requests.clear()
    again = run(LOAD.format(revision=revision), hub, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert again == found and not hub.requests


def test_what_is_not_there_is_named(hub: LoopbackHub, tmp_path: Path) -> None:
    found = run(LOAD.format(revision="v9"), hub, tmp_path / "home")
    assert found["error"] == "CheckpointError"
    assert "'you/tiny': no such folder here, and the repository at 'v9'" in str(found["text"])
    other = LOAD.replace("you/tiny", "you/other").format(revision=None)
    found = run(other, hub, tmp_path / "home")
    assert found["error"] == "CheckpointError" and "'you/other'" in str(found["text"])
    offline = run(LOAD.format(revision="main"), hub, tmp_path / "none", HF_HUB_OFFLINE="1")
    assert offline["error"] == "CheckpointError"


def test_a_broken_download_goes_on_where_it_was(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    hub.interrupt_after, hub.ranges[:] = 10_000, []
    # What is not a whole piece of a download is asked for again; pieces have 10 MiB.
    pieces = "from huggingface_hub import constants\nconstants.DOWNLOAD_CHUNK_SIZE = 4096\n"
    found = run(pieces + LOAD.format(revision="main"), hub, tmp_path / "home")
    assert found == {"first": first_value(hub, "main", tmp_path / "files")}
    assert hub.interrupt_after is None and hub.ranges == ["bytes=8192-"]


PUSH = """
import json
import torch
from fivefold.moe import MoEConfig, MoEForCausalLM
torch.manual_seed({seed})
config = MoEConfig(vocab_size=48, hidden_size=32, num_layers=1, num_attention_heads=4,
                   expert_intermediate_size=24, num_experts=4, num_experts_per_token=2)
model = MoEForCausalLM(config)
url = model.push_to_hub("me/mine", private=True, commit_message="a model", max_shard_size="20KB")
again = MoEForCausalLM.from_pretrained("me/mine")
same = all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
print(json.dumps({{"url": url, "same": same}}))
"""


def test_push_and_load_again(hub: LoopbackHub, tmp_path: Path) -> None:
    for seed in (0, 1):
        found = run(PUSH.format(seed=seed), hub, tmp_path / "home")
        assert found == {"url": f"{hub.address}/me/mine", "same": True}
    repository = hub.repositories["me/mine"]
    assert repository.private and len(repository.commits) == 3
    files = repository.commits[repository.branches["main"]]
    assert {"README.md", "config.json", "model.safetensors.index.json"} <= files.keys()
    # transformers reads it by name too.
    theirs = """
import json
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/mine")
print(json.dumps({"type": type(model).__name__}))
"""
    assert run(theirs, hub, tmp_path / "other")["type"] == "MixtralForCausalLM"
