"""Folding networks by repository name, from a Hub on the loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

from fivefold.integration.loopback_hub import LoopbackHub

PUSH_AND_LOAD = """
import json, torch
from dataclasses import replace
from fivefold.fold import AlphaFold, preset
small = preset("small").model
stack = replace(small.evoformer, num_blocks=1)
torch.manual_seed(0)
model = AlphaFold(replace(small, evoformer=stack, extra_msa=stack, template=None))
url = model.push_to_hub("me/fold", private=True, commit_message="a network")
again = AlphaFold.from_pretrained("me/fold")
same = all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
try:
    AlphaFold.from_pretrained("me/nothing")
except Exception as error:
    missing = f"{type(error).__name__}: {error}"
print(json.dumps({"url": url, "same": same, "config": again.config == model.config,
                  "missing": missing}))
"""


def test_a_network_is_pushed_and_loaded_by_name(tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        env = os.environ | {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path),
            "HF_TOKEN": "of-the-test",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", PUSH_AND_LOAD],
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["url"] == f"{hub.address}/me/fold"
        assert found["same"] and found["config"]
        assert found["missing"].startswith("CheckpointError") and "'me/nothing'" in found["missing"]
        repository = hub.repositories["me/fold"]
        assert repository.private
        files = repository.commits[repository.branches["main"]]
        assert {"README.md", "config.json", "model.safetensors"} <= files.keys()
        assert json.loads(files["config.json"])["model_type"] == "fivefold_fold"
