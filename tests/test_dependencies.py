"""pyproject.toml, constraints.txt and constraints-oldest.txt agree on the libraries and their versions."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OF_THE_MACHINE = {"torch", "triton"}  # whoever installs chooses them
TOOLS = {"ruff", "mypy", "types-pyyaml"}  # nothing runs on them


def declared(*extras: str) -> dict[str, Requirement]:
    """What pyproject.toml asks for, and these extras of it, by canonical name."""
    lines = [*PROJECT["dependencies"], *(line for e in extras for line in PROJECT["optional-dependencies"][e])]
    asked = {canonicalize_name(r.name): r for r in map(Requirement, lines)}
    return {name: r for name, r in asked.items() if name not in OF_THE_MACHINE | {"pyralis"}}


def pins(file: str) -> dict[str, Version]:
    """name -> version of a constraints file, each line of which is `name==version`."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return dict(pin for line in lines if line and not line.startswith("#") for pin in pinned(Requirement(line)))


def pinned(requirement: Requirement) -> Iterator[tuple[str, Version]]:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", f"{requirement} is no pin"
    yield canonicalize_name(requirement.name), Version(specifier.version)


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-oldest.txt"])
def test_every_dependency_that_make_installs_is_pinned_within_its_range(file: str) -> None:
    asked, pinned_to = declared("gguf", "test", "dev"), pins(file)
    assert not OF_THE_MACHINE & set(pinned_to)
    missing = set(asked) - set(pinned_to) - (TOOLS if "oldest" in file else set())
    assert not missing, f"{file} lacks {', '.join(sorted(missing))}"
    outside = [f"{n} {v}: {asked[n]}" for n, v in pinned_to.items() if n in asked and v not in asked[n].specifier]
    assert not outside, f"{file} has versions that pyproject.toml excludes: {'; '.join(outside)}"


def test_the_oldest_are_the_lower_bounds() -> None:
    oldest = pins("constraints-oldest.txt")
    for name, requirement in declared("gguf", "test").items():
        bounds = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
        assert bounds == [oldest[name]], f"{requirement}, but the oldest that is tested is {oldest[name]}"
