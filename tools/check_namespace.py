"""Check what keeps independent packages in one namespace: ``python tools/check_namespace.py``.

Exits with 1 and one line for each problem, or with 0.
"""

import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BRAND = "fivefold"


def main() -> int:
    """Check every package; the exit status."""
    folders = [path.parent for path in sorted(ROOT.glob("packages/*/pyproject.toml"))]
    folders.append(ROOT / "integration")
    projects = {folder: load_project(folder) for folder in folders}
    problems = [problem for folder in folders for problem in check(folder, projects[folder])]
    problems += different_floors(projects)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"checked {len(folders)} packages, found {len(problems)} problems")
    return 1 if problems else 0


def load_project(folder: Path) -> dict:
    """The ``[project]`` table of a package."""
    return tomllib.loads((folder / "pyproject.toml").read_text())["project"]


def check(folder: Path, project: dict) -> Iterator[str]:
    """Problems of one package."""
    yield from namespace(folder, project["name"])
    yield from files(folder, project["version"])
    for requirement in requirements(project):
        if requirement.startswith(BRAND) and not is_range_or_extra(requirement, project):
            yield f"{folder.name}: {requirement!r} must be a range such as '>=0.1,<0.2'"


def namespace(folder: Path, name: str) -> Iterator[str]:
    """The namespace has no files of its own, and the package is named as its folder."""
    if name != f"{BRAND}-{folder.name}":
        yield f"{folder.name}: the distribution is {name!r}, it must be '{BRAND}-{folder.name}'"
    root, leaf = folder / "src" / BRAND, folder.name.replace("-", "_")
    for entry in sorted(root.iterdir()):
        if entry.name not in (leaf, "__pycache__"):
            # One __init__.py here hides every other package of the namespace.
            yield f"{folder.name}: {entry.relative_to(ROOT)} is not inside {BRAND}/{leaf}"
    for required in ("__init__.py", "py.typed"):
        if not (root / leaf / required).is_file():
            yield f"{folder.name}: {BRAND}/{leaf}/{required} is missing"


def files(folder: Path, version: str) -> Iterator[str]:
    """Each package is complete, and its changelog starts with its version."""
    for required in ("README.md", "CHANGELOG.md", "LICENSE"):
        if not (folder / required).is_file():
            yield f"{folder.name}: {required} is missing"
            return
    headings = re.findall(r"^## \[?([^\]\s]+)", (folder / "CHANGELOG.md").read_text(), re.MULTILINE)
    if headings[:1] != [version]:
        yield f"{folder.name}: version is {version}, CHANGELOG.md starts with {headings[:1]}"
    if (folder / "LICENSE").read_bytes() != (ROOT / "LICENSE").read_bytes():
        yield f"{folder.name}: LICENSE differs from the one at the root"


def requirements(project: dict) -> list[str]:
    """All requirements of a project, with those of its extras."""
    extras = project.get("optional-dependencies", {}).values()
    return [*project["dependencies"], *(text for extra in extras for text in extra)]


def is_range_or_extra(requirement: str, project: dict) -> bool:
    """A range of versions, or more extras of a package whose range the project has given."""
    name, version = re.fullmatch(r"([\w-]+)(?:\[[\w,-]+\])?(.*)", requirement).groups()
    if version:
        return re.fullmatch(r">=[\d.]+,<[\d.]+", version.replace(" ", "")) is not None
    given = [project["name"], *(re.split(r"[\[>]", text)[0] for text in project["dependencies"])]
    return name in given


def different_floors(projects: dict[Path, dict]) -> Iterator[str]:
    """One lowest version of a dependency in all packages, for one test of it to be enough."""
    floors = defaultdict(set)
    for project in projects.values():
        for requirement in requirements(project):
            found = re.match(r"([\w-]+).*>=\s*([\d.]+)", requirement)
            if found:
                floors[found.group(1)].add(found.group(2))
    for name, versions in sorted(floors.items()):
        if len(versions) > 1:
            yield f"{name}: packages declare different lowest versions {sorted(versions)}"


if __name__ == "__main__":
    sys.exit(main())
