"""Writes requirements.lock: the exact version of every package that runner and its tests need, as installed here.

    python -m tools.make_lock           writes it from this environment
    python -m tools.make_lock --check   fails where it does not hold what pyproject.toml asks for

Versions only: a hash would bind the lock to one build of torch (CPU or CUDA).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import sys
from pathlib import Path

import tomli
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
BUILD = ("hatchling", "editables")
_HEADER = "# Written by `python -m tools.make_lock`; used by `make setup`.\n"


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def wanted() -> list[Requirement]:
    """What pyproject.toml asks for, with the tests' and the build's needs."""
    project = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [*project["dependencies"], *project["optional-dependencies"]["dev"], *BUILD]
    return [Requirement(text) for text in texts]


def closure() -> dict[str, str]:
    """Name → version of everything that is needed, from what is installed."""
    found: dict[str, str] = {}
    queue = [(requirement.name, frozenset(requirement.extras)) for requirement in wanted()]
    seen = set()
    while queue:
        name, extras = queue.pop()
        if (normal(name), extras) in seen:
            continue
        seen.add((normal(name), extras))
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            sys.exit(f"{name} is not installed; install it before the lock is made")
        found[normal(name)] = package.version.partition("+")[0]
        for text in package.requires or []:
            requirement = Requirement(text)
            applies = requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in (*extras, "")
            )
            if applies:
                queue.append((requirement.name, frozenset(requirement.extras)))
    return dict(sorted(found.items()))


def locked() -> dict[str, str]:
    """What the lock says."""
    lines = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def problems() -> list[str]:
    """What pyproject.toml asks for and the lock does not give."""
    versions = locked()
    found = []
    for requirement in wanted():
        version = versions.get(normal(requirement.name))
        if version is None:
            found.append(f"{requirement.name} is not in requirements.lock")
        elif not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement} is asked for, requirements.lock has {version}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        found = problems()
        sys.exit("\n".join(found) if found else 0)
    LOCK.write_text(_HEADER + "".join(f"{name}=={version}\n" for name, version in closure().items()), encoding="utf-8")
    print(f"{LOCK.name}: {len(locked())} packages")


if __name__ == "__main__":
    main()
