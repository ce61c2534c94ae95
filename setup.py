"""Package metadata; the version is read from the package, without importing it."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "implicit_layers/__init__.py").read_text(encoding="utf-8"), re.M
).group(1)

CVXPY = ["cvxpy>=1.5"]
EXAMPLES = ["scikit-learn>=1.3", "matplotlib>=3.7", "tqdm>=4.60"]
NOTEBOOKS = [*EXAMPLES, "nbclient>=0.8", "nbformat>=5.7", "ipykernel>=6.20"]
# The peers in the benchmarks are installed beside this, as benchmarks/contenders.py says; qpth asks for numpy<2 and
# runs with numpy 2, so `pip install --no-deps qpth`.
BENCH = [*EXAMPLES, *CVXPY, "scipy>=1.10"]
TEST = [
    *NOTEBOOKS,
    *BENCH,
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "ruff>=0.9",
    "mypy>=1.14",
    "import-linter>=2.1",
    "setuptools>=70.1",  # a test builds the wheel
]

# The compiled solver of small quadratic programs: without a C++ compiler the package installs without it, and works.
# Which instructions it uses is chosen when it runs, so a wheel made on one processor is right on another.
SOURCES = "implicit_layers/csrc"
HEADERS = (
    "adjoint",
    "bounded",
    "factor",
    "kernel",
    "lanes",
    "measures",
    "narrow",
    "programs",
    "single",
    "solve",
    "wide",
)
KERNEL = Extension(
    "implicit_layers._kernel",
    sources=[f"{SOURCES}/module.cpp"],
    depends=[f"{SOURCES}/{name}.h" for name in HEADERS],
    extra_compile_args=[
        "-O3",
        "-std=c++17",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=fast",
        "-Wno-psabi",
        "-pthread",
    ],
    extra_link_args=["-pthread"],
    language="c++",
    optional=True,
)

setup(
    name="implicit_layers",
    version=VERSION,
    description="PyTorch layers defined by a condition, differentiated by the implicit function theorem",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The implicit_layers authors",
    license="MIT",
    keywords="pytorch implicit-differentiation quadratic-programming differentiable-optimization",
    python_requires=">=3.10",
    packages=find_packages(include=["implicit_layers", "implicit_layers.*"]),
    package_data={"implicit_layers": ["py.typed", "csrc/*"]},
    ext_modules=[KERNEL],
    install_requires=["torch>=2.6", "numpy>=1.24"],
    extras_require={
        "cvxpy": CVXPY,
        "examples": EXAMPLES,
        "bench": BENCH,
        "notebooks": NOTEBOOKS,
        "test": TEST,
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Mathematics",
        "Typing :: Typed",
    ],
)
