"""`python -m benchmarks.fresh MODULE:FUNCTION`: call it in a fresh process with the JSON on stdin, and print JSON.

For what one process cannot measure twice: its peak resident memory, and another number of threads.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Freed memory goes back to the system at once: else blocks of some ten kilobytes, which PyTorch aligns, leave holes
# that the allocator of glibc does not fill, and a long loop has several times its tensors in resident memory.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_MMAP_MAX_": "1000000"}
MARK = "result: "  # before the answer, since a library may print


def fresh(
    function: str,
    argument: dict[str, Any],
    threads: int | None = None,
    variables: dict[str, str] | None = None,
    timeout: float = 300.0,
) -> Any:
    """What `module:function` returns for the argument, in a process of its own.

    Raises:
        RuntimeError: it failed; with the end of what it wrote.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **(variables or {}), "PYTHONPATH": path}
    if threads is not None:
        environment.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.fresh", function],
        input=json.dumps(argument),
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=timeout,
    )
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line[len(MARK) :])
    raise RuntimeError(f"{function} failed in its own process: {done.stderr[-500:]}")


def resident(function: str, argument: dict[str, Any]) -> int | None:
    """The peak resident memory of the computation that `module:function` makes ready, in a process of its own."""
    return fresh("benchmarks.fresh:measured", {"function": function, "argument": argument}, variables=GIVE_BACK)


def measured(argument: dict[str, Any]) -> int | None:
    """Make the computation ready, run a small one so that libraries are loaded, and measure."""
    from benchmarks.peak import resident_bytes

    run = _named(argument["function"])(argument["argument"])
    return resident_bytes(run)


def _named(function: str) -> Any:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    print(MARK + json.dumps(_named(sys.argv[1])(json.load(sys.stdin))))
