"""`python -m implicit_layers`: train two models with layers inside on real data, and compare their gradients."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from implicit_layers import __version__
from implicit_layers.demonstration import Settings, figure, run, table
from implicit_layers.errors import MissingDependencyError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m implicit_layers",
        description="Train a softmax linear program and a quadratic program layer on handwritten digits, each "
        "differentiated implicitly and through its unrolled iterations; print a table and save a figure.",
    )
    arguments.add_argument("--device", default="cpu", help="a torch device, such as cpu or cuda (default: %(default)s)")
    arguments.add_argument(
        "--seed", type=int, default=0, help="of the split, weights and batches (default: %(default)s)"
    )
    arguments.add_argument(
        "--dtype", choices=("float32", "float64"), default="float64", help="of weights and data (default: %(default)s)"
    )
    arguments.add_argument(
        "--threads", type=int, default=1, help="CPU threads; more do not help tensors this small (default: %(default)s)"
    )
    arguments.add_argument("--quick", action="store_true", help="two epochs only")
    arguments.add_argument(
        "--out",
        type=Path,
        default=Path("implicit_layers_demo.png"),
        metavar="PATH.png",
        help="where the figure goes (default: %(default)s)",
    )
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration; 0 only if all of it ran."""
    arguments = parser()
    options = arguments.parse_args(argv)
    try:
        torch.zeros(1, dtype=getattr(torch, options.dtype), device=options.device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        arguments.error(f"argument --device: {options.device!r} with --dtype {options.dtype} does not work: {reason}")
    if not options.out.absolute().parent.is_dir() or options.out.is_dir():
        arguments.error(f"argument --out: {str(options.out)!r} must be a file in a folder that exists")
    if options.threads < 1:
        arguments.error(f"argument --threads: must be at least 1, got {options.threads}")
    torch.set_num_threads(options.threads)
    settings = Settings(device=options.device, seed=options.seed, dtype=options.dtype, quick=options.quick)
    start = time.perf_counter()
    try:
        results = run(settings)
        figure(results, options.out)
    except MissingDependencyError as error:
        print(f"MissingDependencyError: {error}", file=sys.stderr)
        return 1
    print(f"\nimplicit_layers {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print(table(results, settings))
    print(f"\n{time.perf_counter() - start:.0f} s. Figure: {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
