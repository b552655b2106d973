"""Check one installed package: ``python -I tools/check_alone.py packages/moe``.

Run it isolated (``-I``) in an environment where the package was installed from its wheel. It fails
if another package of the brand is there than the ones declared, if a module does not import, or if
importing reaches for a library that belongs to an extra.
"""

import builtins
import importlib
import pkgutil
import re
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
BRAND = "fivefold"
OPTIONAL = (
    "cuda-core",
    "expecttest",
    "huggingface-hub",
    "matplotlib",
    "pytest",
    "tensorboard",
    "tokenizers",
    "tqdm",
    "torchao",
    "transformers",
    "triton",
)


def main(folder: Path) -> int:
    """Check the package of ``folder``; the exit status."""
    needed = closure(f"{BRAND}-{folder.name}")
    problems = wrong_siblings(needed)
    extra = {module_name(name) for name in OPTIONAL if name not in needed}
    with importers(extra) as found:
        imported = import_all(f"{BRAND}.{module_name(folder.name)}", needing_extras(folder))
    problems += [f"{module} imports {name}, which is of an extra" for module, name in found]
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{folder.name}: imported {imported} modules, found {len(problems)} problems")
    return 1 if problems else 0


def closure(requirement: str) -> set[str]:
    """Names of all distributions that a requirement declares, through our own pyprojects."""
    name, extras = re.match(r"([\w-]+)(?:\[([\w,-]+)\])?", requirement).groups()
    needed = {name}
    for parent in (ROOT / "packages", ROOT):
        pyproject = parent / name.removeprefix(f"{BRAND}-") / "pyproject.toml"
        if pyproject.is_file():
            project = tomllib.loads(pyproject.read_text())["project"]
            declared = list(project["dependencies"])
            for extra in filter(None, (extras or "").split(",")):
                declared += project["optional-dependencies"][extra]
            needed.update(*map(closure, declared))
    return needed


def wrong_siblings(needed: set[str]) -> list[str]:
    """Our distributions that are installed and not declared, or declared and not installed."""
    found = {dist.name for dist in distributions() if dist.name.startswith(BRAND)}
    wanted = {name for name in needed if name.startswith(BRAND)}
    if found == wanted:
        return []
    return [f"declared are {sorted(wanted)}, installed are {sorted(found)}"]


@contextmanager
def importers(names: set[str]) -> Iterator[list[tuple[str, str]]]:
    """Collect which modules of ours import one of ``names``; torch may import what it likes."""
    found: list[tuple[str, str]] = []
    real_import = builtins.__import__

    def watch(name: str, variables: dict | None = None, *rest: object) -> ModuleType:
        importer = (variables or {}).get("__name__") or ""
        if importer.startswith(BRAND) and name.split(".")[0] in names:
            found.append((importer, name))
        return real_import(name, variables, *rest)

    builtins.__import__ = watch
    try:
        yield found
    finally:
        builtins.__import__ = real_import


def needing_extras(folder: Path) -> list[str]:
    """Patterns of the modules that are for those who have an extra: a backend's, the test kit's."""
    pyproject = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())
    return pyproject.get("tool", {}).get(BRAND, {}).get("modules-of-extras", [])


def import_all(package: str, without: list[str]) -> int:
    """Import every module of a package but ``__main__`` and those of extras; how many."""
    count = 1
    # Not walk_packages: it imports packages before anyone can leave them out.
    for found in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        if found.name.endswith(".__main__") or any(fnmatch(found.name, each) for each in without):
            continue
        if found.ispkg:
            count += import_all(found.name, without)
        else:
            importlib.import_module(found.name)
            count += 1
    return count


def module_name(distribution: str) -> str:
    """The import name of a distribution, for those named here."""
    return distribution.replace("-", "_")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
