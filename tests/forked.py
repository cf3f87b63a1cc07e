"""The command line in a process of its own that has the libraries already: forked from a server that imported them.

PyTorch and what builds on it take five seconds to import, ten where two do it at once; a fork takes none. Only modules
are shared: no thread has run, no model, no configuration was read. `Place.run(fresh=True)` starts Python anew instead.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def forked(
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    files: tuple[Path, Path, Path],
    seconds: float = 600,
) -> int:
    """Its exit code, −n where signal n ended it; stdin, stdout and stderr are files. Raises TimeoutError."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    child = context.Process(target=_command, args=(list(arguments), str(folder), dict(environment), [*map(str, files)]))
    child.start()
    child.join(seconds)
    if child.exitcode is None:
        child.kill()
        child.join()
        raise TimeoutError(f"runner {' '.join(arguments)} did not end within {seconds:.0f} s")
    return child.exitcode


def _command(arguments: list[str], folder: str, environment: dict[str, str], files: list[str]) -> None:
    """In the child: what a shell gives a program, then the program."""
    for descriptor, (file, flags) in enumerate(zip(files, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True)):
        os.dup2(os.open(file, flags), descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["runner", *arguments]
    if "RUNNER_TEST_KILL" in environment:
        runpy.run_path(str(Path(__file__).parent / "faults" / "sitecustomize.py"))
    from runner.cli.main import run

    code = run()
    sys.stdout.flush()
    sys.exit(code)
