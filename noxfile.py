"""Every check of this repository, as a session; ``nox -l`` lists them.

One environment, ``.nox/dev``, holds all packages in editable form and serves ``demo``, ``tests``
and ``types``. ``alone`` and ``minimum`` make their own: what is absent there is what they test.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import nox
from nox.project import dependency_groups, load_toml
from packaging.requirements import Requirement

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"  # pip: it finds the build of torch that we pin
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "tests"]

CONSTRAINTS = ("-c", "constraints.txt")
PYPROJECTS = [
    *sorted(Path("packages").glob("*/pyproject.toml")),
    Path("integration/pyproject.toml"),
]
FOLDERS = {path.parent.name: path.parent for path in PYPROJECTS}
EVERY_PACKAGE = nox.parametrize("package", [nox.param(name, id=name) for name in FOLDERS])


@nox.session(default=False)
def dev(session: nox.Session) -> None:
    """Make or update .nox/dev: all packages, editable, with what their tests need."""
    tests = set(chain.from_iterable(test_requirements(folder) for folder in FOLDERS.values()))
    ours = {text: Requirement(text) for text in tests if text.startswith("fivefold-")}
    packages = []
    for folder in FOLDERS.values():
        project = load_project(folder)
        # What tests ask of a package of the workspace is asked of its folder: pip would look for
        # the name elsewhere.
        extras = {"train"} & project.get("optional-dependencies", {}).keys()
        extras |= {e for r in ours.values() if r.name == project["name"] for e in r.extras}
        packages += ["-e", f"{folder}[{','.join(sorted(extras))}]" if extras else str(folder)]
    session.install(*CONSTRAINTS, *packages, *sorted(tests - ours.keys()), "mypy>=1.18")


@nox.session(requires=["dev"], venv_backend="none", default=False)
def demo(session: nox.Session) -> None:
    """Train the small model of the README on this machine; ``nox -s demo -- --help``."""
    # Ctrl-C reaches the training too, which then saves: give it the time.
    module = ("python", "-m", "fivefold.integration.demo")
    run_in_dev(session, *module, *session.posargs, interrupt_timeout=120, terminate_timeout=120)


@nox.session(requires=["dev"], venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run the tests of every package and of integration, once; or "tests(moe)" for one package."""
    run_in_dev(session, "pytest", *session.posargs)


def add_tests_of(name: str, folder: Path) -> None:
    """Register ``tests(<name>)``; a parameter of ``tests`` would run them all in as many calls."""

    @nox.session(name=f"tests({name})", requires=["dev"], venv_backend="none", default=False)
    def tests_of(session: nox.Session) -> None:
        run_in_dev(session, "pytest", str(folder / "tests"), *session.posargs)

    tests_of.__doc__ = f"Run the tests of {folder} only."


for _name, _folder in FOLDERS.items():
    add_tests_of(_name, _folder)


@nox.session(reuse_venv=False, default=False)
@EVERY_PACKAGE
def alone(session: nox.Session, package: str) -> None:
    """Install one built wheel with what it declares; import all of it; run its tests."""
    install_and_test(session, package)


@nox.session(reuse_venv=False, default=False)
@EVERY_PACKAGE
def minimum(session: nox.Session, package: str) -> None:
    """The same as alone, at the lowest version that we declare of every dependency."""
    floors = Path(session.create_tmp(), "floors.txt").resolve()
    floors.write_text("\n".join(lowest_versions()))
    install_and_test(session, package, "-c", str(floors))


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, formatting, the direction of imports, and what keeps the namespace whole."""
    session.install("ruff>=0.14", "import-linter>=2.5")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")
    sources = os.pathsep.join(str(folder / "src") for folder in FOLDERS.values())
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": sources})
    session.run("python", "tools/check_namespace.py")


@nox.session(requires=["dev"], venv_backend="none")
def types(session: nox.Session) -> None:
    """Check the types of all sources, strictly."""
    run_in_dev(session, "mypy", *session.posargs)


@nox.session(default=False)
def wheels(session: nox.Session) -> None:
    """Build the sdist and wheel of every package into dist/ and check what is inside them."""
    session.install("build", "hatchling>=1.27", "twine")
    shutil.rmtree("dist", ignore_errors=True)
    for folder in FOLDERS.values():
        session.run("python", "-m", "build", "--no-isolation", "--outdir", "dist", str(folder))
    session.run("python", "tools/check_dist.py", "dist")
    session.run("twine", "check", "--strict", *map(str, sorted(Path("dist").iterdir())))


# What the goldens of a package are made with: the peer's own code, in an environment of its own.
ORACLES = {
    "fold": (
        ("make_goldens.py", "make_data_goldens.py"),
        (
            "alphafold-colabfold==2.3.7",
            "biopython<1.86",
            "dm-haiku==0.0.13",
            "jax==0.4.38",
            "jaxlib==0.4.38",
        ),
    ),
}


@nox.session(default=False)
@nox.parametrize("package", [nox.param(name, id=name) for name in ORACLES])
def oracle(session: nox.Session, package: str) -> None:
    """Make the goldens of a package anew from the code that it has to equal."""
    scripts, requirements = ORACLES[package]
    session.install(*requirements)
    for script in scripts:
        session.run("python", str(FOLDERS[package] / "tests" / "oracle" / script))


def load_project(folder: Path) -> dict:
    """The ``[project]`` table of a package."""
    return load_toml(folder / "pyproject.toml")["project"]


def test_requirements(folder: Path) -> tuple[str, ...]:
    """What the tests of a package need beyond the package."""
    return dependency_groups(load_toml(folder / "pyproject.toml"), "test")


def run_in_dev(session: nox.Session, *command: str, **options: float) -> None:
    """Run a command of ``.nox/dev``, as if that environment was activated."""
    bin_dir = session.cache_dir.parent / "dev" / "bin"
    program, env = f"{bin_dir}/{command[0]}", {"PATH": f"{bin_dir}:{os.environ['PATH']}"}
    session.run(program, *command[1:], env=env, external=True, **options)


def install_and_test(session: nox.Session, package: str, *constraints: str) -> None:
    """Install a wheel and nothing of the checkout, check the imports, then run the tests."""
    folder = FOLDERS[package]
    wheelhouse = Path(session.create_tmp(), "wheelhouse").resolve()
    shutil.rmtree(wheelhouse, ignore_errors=True)
    sources = [f"./{source}" for source in FOLDERS.values()]
    session.run("pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheelhouse), *sources)
    options = (*CONSTRAINTS, *constraints, "--find-links", str(wheelhouse))
    session.install(*options, load_project(folder)["name"])
    # Before the test dependencies: importing may need nothing that is not declared. And after:
    # importing may not reach for an extra that happens to be there.
    check = ("python", "-I", "tools/check_alone.py", str(folder))
    session.run(*check)
    session.install(*options, *test_requirements(folder))
    session.run(*check)
    with tempfile.TemporaryDirectory() as scratch:
        copy_tests(folder, Path(scratch))
        with session.chdir(scratch):
            session.run("python", "-I", "-m", "pytest", str(folder / "tests"), *session.posargs)


def copy_tests(folder: Path, scratch: Path) -> None:
    """Copy what the tests of a package read of the checkout: no source of it is among that."""
    readmes = [each / "README.md" for each in FOLDERS.values()]
    for path in (Path("pyproject.toml"), Path("README.md"), *readmes):
        (scratch / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, scratch / path)
    for name in ("tests", "benchmarks"):
        if (folder / name).is_dir():
            shutil.copytree(folder / name, scratch / folder / name)


def lowest_versions() -> Iterator[str]:
    """``name==floor`` for everything that a package of the workspace needs to run.

    Not torch: old builds of it need an old Python and their own numpy, so its floor is tested
    where such a build exists, by editing constraints.txt; here it stays as that file pins it.
    """
    for project in map(load_project, FOLDERS.values()):
        extras = project.get("optional-dependencies", {}).values()
        for requirement in map(Requirement, chain(project["dependencies"], *extras)):
            floors = [spec.version for spec in requirement.specifier if spec.operator == ">="]
            ours = requirement.name.startswith("fivefold-")
            if floors and not ours and requirement.name != "torch":
                yield f"{requirement.name}=={floors[0]}"
