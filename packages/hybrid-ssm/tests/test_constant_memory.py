"""Memory that does not grow: of decoding with its length, of prefill with the prompt's.

Measured in a process of their own, by the kernel's count of resident memory.
"""

import json
import subprocess
import sys
from typing import Any

MODEL = """
import json, pathlib, torch
from fivefold.hybrid_ssm import HybridCache, HybridConfig, HybridForCausalLM
torch.set_num_threads(1)
torch.set_grad_enabled(False)
config = HybridConfig(
    vocab_size=64, hidden_size=64, pattern="M", num_mamba_heads=4, mamba_head_dim=32,
    state_size=16, num_groups=1,
)
model = HybridForCausalLM(config).eval()
ids = torch.zeros(1, 1 << 15, dtype=torch.long)
own = pathlib.Path("/proc/self")
def mebibytes(what):
    line = next(line for line in (own / "status").open() if line.startswith(what))
    return int(line.split()[1]) / 1024
def start():
    (own / "clear_refs").write_text("5")  # the peak is counted anew
    return mebibytes("VmRSS")
def peak():
    return mebibytes("VmHWM")
"""

DECODE = """
cache = HybridCache(1)
for step in range(10_000):
    if step == 500:
        before = start()
    model(ids[:, :1], cache)
size = cache.num_bytes()
print(json.dumps([peak() - before, size.states, size.keys_values]))
"""

PREFILL = """
grown = []
for length, size in ((4096, 1024), (4096, 1024), (1 << 15, 1024), (1 << 15, None)):
    before = start()
    model.generate(ids[:, :length], 1, prefill_chunk_size=size)
    grown.append(peak() - before)
print(json.dumps(grown))
"""


def measure(code: str) -> Any:
    """What a program prints."""
    done = subprocess.run(
        [sys.executable, "-c", MODEL + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_ten_thousand_steps_take_no_more_than_five_hundred() -> None:
    grown, states, keys_values = measure(DECODE)
    assert grown < 1
    # 4 heads of 32 by 16, and 3 inputs of 128 + 2 * 16 channels, in 4 bytes.
    assert states == 4 * (4 * 32 * 16 + 3 * (128 + 2 * 16))
    assert keys_values == 0


def test_a_prompt_of_eight_times_the_length_takes_no_more() -> None:
    _, short, long, at_once = measure(PREFILL)
    assert long - short < 4
    # What reading all at once takes, 32,768 tokens in some hundreds of channels, shows.
    assert at_once - long > 25
