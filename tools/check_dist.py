"""Check what is inside built packages: ``python tools/check_dist.py dist``.

Every file of a wheel lies in the package's own folder of the namespace, with ``py.typed`` and the
licence; an sdist carries what it takes to build and test the package.
"""

import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

BRAND = "fivefold"


def main(folder: Path) -> int:
    """Check every file of ``folder``; the exit status."""
    wheels, sdists = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    problems = [problem for path in wheels for problem in check_wheel(path)]
    problems += [problem for path in sdists for problem in check_sdist(path)]
    if not wheels or len(wheels) != len(sdists):
        problems.append(f"{folder} has {len(wheels)} wheels and {len(sdists)} sdists")
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"checked {len(wheels)} wheels and {len(sdists)} sdists, found {len(problems)} problems")
    return 1 if problems else 0


def check_wheel(path: Path) -> Iterator[str]:
    """Problems of one wheel."""
    names = set(zipfile.ZipFile(path).namelist())
    distribution, version = path.name.split("-")[:2]
    package = f"{BRAND}/{distribution.removeprefix(BRAND + '_')}/"
    metadata = f"{distribution}-{version}.dist-info/"
    for name in sorted(names):
        if not name.startswith((package, metadata)):
            yield f"{path.name}: {name} is outside of {package}"
        if "__pycache__" in name or "/." in name:
            yield f"{path.name}: {name} is left over from a tool"
    for required in (f"{package}__init__.py", f"{package}py.typed", f"{metadata}licenses/LICENSE"):
        if required not in names:
            yield f"{path.name}: {required} is missing"


def check_sdist(path: Path) -> Iterator[str]:
    """Problems of one sdist."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for required in ("LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"):
        if required not in names:
            yield f"{path.name}: {required} is missing"
    if not any(name.startswith("tests/") for name in names):
        yield f"{path.name}: has no tests"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
