"""Maps the folders ``loaders/``, ``kernels/`` and ``benchmarks/`` into the package ``fasttrain``.

Installed under their own names they would take very general ones in everybody's site-packages.
"""

from setuptools import find_packages, setup

PARTS = {"loaders": "fasttrain.loaders", "kernels": "fasttrain.kernels", "benchmarks": "fasttrain.benchmarks"}

packages = [f"fasttrain.{p}" for p in find_packages("fasttrain")]
for folder, name in PARTS.items():
    packages += [name, *(f"{name}.{p}" for p in find_packages(folder))]

setup(
    packages=["fasttrain", *packages],
    package_dir={"fasttrain": "fasttrain", **{name: folder for folder, name in PARTS.items()}},
    package_data={"fasttrain": ["recipes/*.yaml"]},
)
