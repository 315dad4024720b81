"""Real processes that run the command line, started in milliseconds: a server imports everything once and forks them."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.faults.preload"])


@dataclass
class Run:
    """One run's processes, one a rank."""

    processes: list[BaseProcess]
    outputs: list[Path]
    began: float = field(default_factory=time.monotonic)

    def wait(self, seconds: float = 120) -> list[int]:
        """Exit codes, negative for signals; whatever has not ended is killed, and that is an error."""
        latest = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(latest - time.monotonic(), 0.01))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join(10)
        assert not late, f"ranks {late} have not ended after {seconds} s: {self.said()}"
        return [process.exitcode for process in self.processes]  # type: ignore[misc]

    def send(self, number: int, ranks: list[int] | None = None) -> None:
        """A signal, to all ranks or some."""
        for rank, process in enumerate(self.processes):
            if ranks is None or rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)  # type: ignore[arg-type]

    def said(self) -> str:
        """What all of them have printed."""
        return "\n".join(path.read_text(errors="replace") for path in self.outputs)

    def left(self) -> list[int]:
        """Processes that outlived the run: each rank began a session of its own."""
        sessions = {process.pid for process in self.processes}
        return [pid for pid in _pids() if _session(pid) in sessions and _state(pid) != "Z"]


def start(
    folder: Path,
    *arguments: str,
    ranks: int = 1,
    elsewhere: Path | None = None,
    before: Callable[[], object] | None = None,
    **environment: str,
) -> Run:
    """Starts ``fasttrain`` with these arguments in ``folder``, as ``torchrun`` would with several ranks; all but the first rank
    in ``elsewhere``, if given. Each process calls ``before``, which can be pickled, before anything else."""
    processes, outputs = [], []
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks)}
    for rank in range(ranks):
        its = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks), **place} if ranks > 1 else {}
        out = folder / f"said-{os.getpid()}-{rank}-{time.monotonic_ns()}.txt"
        out.touch()
        process = _CONTEXT.Process(
            target=_run,
            args=(
                str(elsewhere if elsewhere and rank else folder),
                list(arguments),
                {**its, **environment},
                str(out),
                before,
            ),
        )
        process.start()
        processes.append(process)
        outputs.append(out)
    return Run(processes, outputs)


def run(folder: Path, *arguments: str, ranks: int = 1, seconds: float = 120, **environment: str) -> Run:
    """Starts and waits; all ranks have to end well."""
    out = start(folder, *arguments, ranks=ranks, **environment)
    codes = out.wait(seconds)
    assert codes == [0] * ranks, out.said()
    return out


def _run(
    folder: str,
    arguments: list[str],
    environment: dict[str, str],
    out: str,
    before: Callable[[], object] | None,
) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    file = os.open(out, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if before is not None:
        before()
    from fasttrain.cli import main

    code = main(arguments)
    sys.stdout.flush()
    sys.exit(code)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def _fields(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["X", "0", "0", "0"]


def _state(pid: int) -> str:
    return _fields(pid)[0]


def _session(pid: int) -> int:
    return int(_fields(pid)[3])
