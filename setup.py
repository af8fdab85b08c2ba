"""What harken is made of and what it needs. Exact versions that are tested together stand in constraints.txt."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """Read `__version__` without importing the package, which is not installed yet."""
    text = (ROOT / "framework/harken/__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if found is None:
        raise RuntimeError("framework/harken/__init__.py must define __version__")
    return found.group(1)


def readme() -> str:
    """Return README.md, or nothing where a build context leaves it out."""
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


INSTALL_REQUIRES = [
    "torch>=2.11",
    "numpy",
    "soundfile",
    "soxr",
    "lhotse>=1.33",
    "urllib3",  # lhotse 1.33 imports it and does not declare it
    "deepspeed",
    "omegaconf>=2.4",
    "safetensors",
    "tensorboard",
    "tqdm",
    "kaldialign",
    "kaldi-native-fbank",
    "sentencepiece",
    "jinja2",
    "matplotlib",
    "psutil",
    "webdataset",
    "pyyaml",
    "setuptools",
    "packaging",
]

EXTRAS = {
    "dev": [
        "pytest",
        "pytest-xdist",
        "ruff",
        "mypy",
        "types-PyYAML",
        "scikit-learn",  # the reference for k-means inertia
        "transformers",  # the reference for encoders and checkpoints
        "hypothesis",
        # the extras below that tests run with
        "kaldifst",
        "kaldi-decoder",
        "kaldilm",
        "pyroomacoustics",
    ],
    # A k2 wheel fits one torch, one CUDA (or CPU) and one Python. Its authors publish the matching ones in a wheel
    # index of their own, linked from k2's installation page: pass that page as `--pip-args "--find-links PAGE"`.
    # `harken doctor` prints the wheel that fits this environment.
    "k2": ["k2"],
    "graph": ["kaldifst", "kaldi-decoder", "kaldilm"],  # CTC decoding by a lexicon and a word n-gram
    "rooms": ["pyroomacoustics"],  # simulated impulse responses, `harken data rooms`
    "export": ["onnx", "onnxruntime"],
    "bench": ["transformers"],
}
# k2 stays out of `all`: where no wheel fits, it would make everything else fail to install.
EXTRAS["all"] = sorted({name for extra in ("dev", "export", "graph", "rooms", "bench") for name in EXTRAS[extra]})

setup(
    name="harken",
    version=version(),
    description="Distributed pretraining and fine-tuning of speech and audio encoders",
    long_description=readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir={"": "framework"},
    packages=find_packages("framework"),
    package_data={"harken": ["py.typed", "**/*.yaml", "**/*.html", "**/*.css"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["harken = harken.apps.main:main"]},
    zip_safe=False,
)
