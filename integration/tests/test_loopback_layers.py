"""Sparse recurrent layers by repository name, from a Hub on the loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

from fivefold.integration.loopback_hub import LoopbackHub

PUSH_AND_LOAD = """
import json, torch
from fivefold.sparse_rnn import SparseGRU, SparseLSTM, SparseRNNFileError
torch.manual_seed(0)
layer = SparseLSTM(5, 24, 2, bidirectional=True, density=0.2).eval()
with torch.no_grad():
    layer.weight_hh_l1[3] = 0.0  # kept and zero
url = layer.push_to_hub("me/layer", private=True, commit_message="a layer")
again = SparseLSTM.from_pretrained("me/layer")
half = SparseLSTM.from_pretrained("me/layer", revision="main", dtype=torch.float64)
x = torch.randn(4, 2, 5)
same = all(torch.equal(a, b) for a, b in zip(layer.parameters(), again.parameters(), strict=True))
masks = all(torch.equal(layer.mask(n), again.mask(n)) for n in layer.recurrent_names())
try:
    SparseGRU.from_pretrained("me/layer")
except SparseRNNFileError as error:
    told = str(error)
try:
    SparseLSTM.from_pretrained("me/nothing")
except SparseRNNFileError as error:
    missing = str(error)
print(json.dumps({
    "url": url, "same": same, "masks": masks, "told": told, "missing": missing,
    "output": torch.equal(layer(x)[0], again(x)[0]), "dtype": str(half.weight_hh_l0.dtype),
}))
"""


def test_a_sparse_layer_is_pushed_and_loaded_by_name(tmp_path: Path) -> None:
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
        assert found["url"] == f"{hub.address}/me/layer"
        assert found["same"] and found["masks"] and found["output"]
        assert found["dtype"] == "torch.float64"
        assert found["told"] == "me/layer holds a LSTM, not a SparseGRU"
        assert "'me/nothing'" in found["missing"]
        repository = hub.repositories["me/layer"]
        assert repository.private
        files = repository.commits[repository.branches["main"]]
        assert {"README.md", "config.json", "model.safetensors"} <= files.keys()
        # The nonzeros and a bit for every place, nowhere near the dense matrices.
        assert b"weight_hh_l0.bitmask" in files["model.safetensors"]
        assert json.loads(files["config.json"])["mode"] == "LSTM"
