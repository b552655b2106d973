"""The Python examples of every README run, one after the other, as they stand.

An example that needs what is not here has a comment above it that says so,
``<!-- not run: ... -->``.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT, *sorted(ROOT.glob("packages/*")), ROOT / "integration"]
READMES = [folder / "README.md" for folder in FOLDERS]
EXAMPLE = re.compile(r"(<!-- not run: [^>]+ -->\n)?```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_examples_run(readme: Path, tmp_path: Path) -> None:
    examples = [code for skipped, code in EXAMPLE.findall(readme.read_text()) if not skipped]
    assert examples
    program = "\n".join(examples)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
