"""Which software a benchmark ran with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "liger-kernel", "unsloth", "bitsandbytes", "pyralis")


def bench_versions() -> dict[str, str]:
    """Installed versions, absent packages left out."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
