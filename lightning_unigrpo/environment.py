"""What a run stands on: packages, devices, and what is missing."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import NamedTuple

import torch
from packaging.requirements import Requirement

NAME = "lightning-unigrpo"


class Package(NamedTuple):
    """A requirement of this project, and what is there."""

    name: str
    wanted: str
    """Version specifier, such as ``>=2.6``."""
    found: str | None
    """Version; None = not installed."""
    extra: str | None
    """What asks for it; None = this project cannot do without."""

    @property
    def fits(self) -> bool:
        """Whether it is installed in a version that will do."""
        return self.found is not None and Requirement(self.name + self.wanted).specifier.contains(
            self.found, prereleases=True
        )


def packages() -> Iterator[Package]:
    """Yield what this project requires, then what its extras do; development tools are left out."""
    requirements = [Requirement(line) for line in requires(NAME) or ()]
    extras = {extra: {"extra": extra} for extra in _extras(requirements)}
    for requirement in requirements:
        if requirement.name == NAME:
            continue
        if requirement.marker is None:
            yield _look(requirement, None)
        for extra, environment in extras.items():
            if requirement.marker is not None and requirement.marker.evaluate(environment):
                yield _look(requirement, extra)


def _extras(requirements: list[Requirement]) -> list[str]:
    """Return the extras for users, which need nothing of other extras of ours."""
    named = {
        str(clause[2].value)
        for requirement in requirements
        if requirement.marker is not None
        for clause in requirement.marker._markers
        if isinstance(clause, tuple) and str(clause[0]) == "extra"
    }
    return sorted(named - {"dev", "docs"})


def _look(requirement: Requirement, extra: str | None) -> Package:
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        found = None
    return Package(requirement.name, str(requirement.specifier), found, extra)


def devices() -> list[str]:
    """Return the name and memory of each GPU."""
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{each.name}, {each.total_memory / 2**30:.0f} GiB" for each in found]


def describe() -> dict[str, str]:
    """Return versions and devices in words, to be kept with a run.

    Example:
        >>> describe()["lightning-unigrpo"]
        '0.1.0'
    """
    found = {package.name: package.found for package in packages() if package.found}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        NAME: version(NAME),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": str(cores),
        "gpus": "; ".join(devices()) or "none",
        "cuda of torch": str(torch.version.cuda or "none, a CPU build"),
        **found,
    }
