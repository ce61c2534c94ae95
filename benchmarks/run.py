"""`python -m benchmarks.run [SUITE ...] [--quick] [--device D] [--dtype T] [--out FOLDER]`: measure; one JSON a suite.

Threads are pinned before torch is imported, by starting the interpreter again with the environment that OpenMP reads:
unpinned medians move tenfold on a small machine. Only the standard library is imported at the top for that reason.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PINNED = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
NAMES = ("memory", "qp", "kernel", "simplex", "scaling")
DTYPES = ("float64", "float32")


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    arguments.add_argument("suite", nargs="*", metavar="suite", help=f"of {', '.join(NAMES)}; all unless given")
    arguments.add_argument("--quick", action="store_true", help="few small cases, to see that it runs; not for figures")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--threads", type=int, default=cores(), help="default: %(default)s, the cores here")
    arguments.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    return arguments


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pin(threads: int) -> None:
    """Start again with pinned threads, unless they are."""
    wanted = {**PINNED, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.environ.update(wanted)
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.run", *sys.argv[1:]])


def environment(device: str, seed: int, dtype: str = DTYPES[0]) -> dict[str, Any]:
    """Everything that a reader needs to know about where the numbers come from."""
    import torch

    import implicit_layers

    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "implicit_layers": implicit_layers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else _processor(),
        "threads": torch.get_num_threads(),
        "pinned": {name: os.environ.get(name) for name in PINNED},
        "seed": seed,
        "dtype": dtype,
    }


def save(folder: Path, suite: str, quick: bool, rows: list[dict[str, Any]], seed: int = 0, **more: Any) -> Path:
    """Write the JSON file of a script that is a suite of its own: where the numbers come from, `more`, and the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{suite}{'-quick' if quick else ''}.json"
    head = {"suite": suite, "quick": quick, "environment": environment("cpu", seed), **more}
    path.write_text(dump({**head, "rows": rows}), encoding="utf-8")
    return path


def commit() -> str:
    """The commit that is measured, marked where the code differs from it; what suites write is no code."""
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    written = [f":!{path}" for path in ("README.md", "benchmarks/results", "benchmarks/figures")]
    head, changed = (
        subprocess.run([*git, *command], capture_output=True, text=True, check=False).stdout.strip()
        for command in (["rev-parse", "--short=10", "HEAD"], ["diff", "--name-only", "HEAD", "--", ".", *written])
    )
    return (head or "unknown") + ("-dirty" if changed else "")


def _processor() -> str:
    """The model of the processor, where the system tells, and the widest instructions that PyTorch sees in it."""
    import torch

    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return f"{model} with {torch.backends.cpu.get_cpu_capability()}"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser()
    options = arguments.parse_args(argv)
    unknown = [name for name in options.suite if name not in NAMES]
    if unknown:
        arguments.error(f"no suite {', '.join(unknown)}; there are {', '.join(NAMES)}")
    import torch

    from benchmarks.options import Options
    from benchmarks.suites import load

    options.out.mkdir(parents=True, exist_ok=True)
    settings = Options(
        options.device, options.seed, options.quick, getattr(torch, options.dtype), torch.get_num_threads()
    )
    for name in options.suite or NAMES:
        start = time.perf_counter()
        suite = load(name)
        rows = suite.suite(settings)
        about = environment(options.device, options.seed, options.dtype)
        result = {"suite": name, "quick": options.quick, "environment": about, **suite.summary(rows)}
        for group, exponent in result.get("slopes", {}).items():
            print(f"{name}: exponent {exponent:.2f}  {group}")
        for row in rows:
            if row.get("status", "ok") != "ok":
                print(f"{row['problem']} {row['contender']}: {row['status']}")
        path = options.out / f"{name}{_suffix(options)}.json"
        path.write_text(dump({**result, "rows": rows}), encoding="utf-8")
        print(f"{len(rows)} rows in {time.perf_counter() - start:.0f} s: {path}")
    return 0


def _suffix(options: argparse.Namespace) -> str:
    """What tells the files of other settings apart: only the plain name goes into the README."""
    device = "" if options.device == "cpu" else f"-{options.device.replace(':', '')}"
    dtype = "" if options.dtype == DTYPES[0] else f"-{options.dtype}"
    return f"{device}{dtype}{'-quick' if options.quick else ''}"


def dump(result: dict[str, Any]) -> str:
    """JSON with one line a row, so that two files can be compared by eye."""
    rows = ",\n".join("  " + json.dumps(_short(row), ensure_ascii=False) for row in result["rows"])
    head = json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1, ensure_ascii=False)
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Four significant digits: more would say nothing and make two files harder to compare."""
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}


if __name__ == "__main__":
    pin(parser().parse_args().threads)
    raise SystemExit(main())
