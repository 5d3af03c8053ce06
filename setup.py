"""Maps the folders of the checkout to import packages; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

kernel_packages = [
    "fp8sync_kernels",
    *(f"fp8sync_kernels.{name}" for name in find_packages("kernels")),
]

setup(
    packages=[*find_packages(include=["fp8sync", "fp8sync.*"]), *kernel_packages],
    package_dir={"fp8sync_kernels": "kernels"},
)
