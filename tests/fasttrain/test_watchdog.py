"""The watchdog in real processes: who is late is named, what hangs is ended, and what goes well is left alone."""

import ctypes
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from fasttrain import watchdog
from fasttrain.stragglers import WAITS, Seen, sentence
from fasttrain.watchdog import EXIT_CODE, Stalled, Watchdog

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def fork():
    """``fork(function, *arguments)`` runs it in a process of its own, which does not outlive the test."""
    processes = []

    def start(function: Callable, *arguments: object) -> multiprocessing.Process:
        processes.append(FORK.Process(target=function, args=arguments))
        processes[-1].start()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture
def store():
    """The server of a store in this process."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _client(port: int) -> dist.Store:
    return dist.PrefixStore("run", dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20)))


def _hang() -> None:
    """Never comes back from compiled code, whatever signal comes: locks a mutex twice."""
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


def _watch(seconds: float = 0.5, **options: object) -> Watchdog:
    return Watchdog(seconds=seconds, **{"report": lambda text: None, **options})


def test_what_goes_on_is_left_alone(store):
    said = []
    with _watch(0.5, report=said.append, ranks=2, store=store) as dog:
        assert store.check(["beat/0"])
        end, step = time.monotonic() + 1.2, 0
        while time.monotonic() < end:
            dog.doing("computes", step := step + 1)
            time.sleep(0.01)
        dog.idle()
        time.sleep(0.7)
        dog.doing("computes", step, slack=10.0)
        time.sleep(0.7)
    assert said == [] and not store.check(["beat/0"])
    assert "fasttrain-watchdog" not in {thread.name for thread in threading.enumerate()}
    assert all(signal.getsignal(n) == signal.SIG_DFL for n in range(signal.SIGRTMIN, signal.SIGRTMAX))
    dog.close()


def test_a_wait_in_python_ends_with_the_reason(tmp_path):
    said, begin = [], time.monotonic()
    with _watch(0.5, report=said.append, folder=tmp_path) as dog, pytest.raises(Stalled) as caught:
        dog.doing("waits for data", 1203)
        time.sleep(30)
    assert time.monotonic() - begin < 5
    assert re.fullmatch(r"the loader has given no batch for \d s \(step 1203\)", said[0])
    assert said == [str(caught.value)]
    stacks = (tmp_path / "stalled-rank0.txt").read_text()
    assert stacks.startswith(said[0]) and "test_a_wait_in_python_ends_with_the_reason" in stacks


def test_a_run_may_go_on_after_it(tmp_path):
    with _watch(0.3, folder=tmp_path / "not there") as dog:
        for what in ("waits for sources", "a coffee break"):
            with pytest.raises(
                Stalled, match="soft labels" if "sources" in what else 'step 2: nothing but "a coffee break"'
            ):
                dog.doing(what, 2)
                time.sleep(30)
        dog.doing("computes", 2)


def _hangs(pipe, folder: Path, how: str) -> None:
    code = "import os, time; pid = os.fork(); pid and print(pid, flush=True); time.sleep(60)"
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    pipe.send([worker.pid, int(worker.stdout.readline())])
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
    with _watch(0.5, patience=0.6) as dog:
        dog.doing("computes", 5)
        try:
            if how == "at work":
                _hang()
            time.sleep(30)
        except Stalled:
            if how == "says what it does":
                dog.doing("writes a checkpoint", 5, slack=10.0)
                time.sleep(1.5)
                os._exit(3)
            _hang()


@pytest.mark.parametrize(("how", "code"), [("at work", 75), ("in what follows", 75), ("says what it does", 3)])
def test_what_hangs_in_compiled_code_is_ended_with_its_children(how, code, fork, tmp_path):
    ours, theirs = FORK.Pipe()
    process = fork(_hangs, theirs, tmp_path, how)
    workers = ours.recv()
    process.join(15)
    assert process.exitcode == code and EXIT_CODE == 75
    said = (tmp_path / "stderr").read_text()
    if code == 75:
        assert re.fullmatch(r"fasttrain: step 5 has been computing for \d s; it cannot be stopped, so it ends\n", said)
        end = time.monotonic() + 5
        while any(_runs(pid) for pid in workers) and time.monotonic() < end:
            time.sleep(0.02)
        assert not any(_runs(pid) for pid in workers)
    else:
        assert said == ""
        for pid in workers:
            os.kill(pid, signal.SIGKILL)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def _goes_on(pipe) -> None:
    with _watch(0.8) as dog:
        dog.doing("computes", 1)
        pipe.send("begun")
        time.sleep(0.4)
        pipe.send("well")


def test_a_process_that_was_stopped_for_a_while_is_not_late(fork):
    ours, theirs = FORK.Pipe()
    process = fork(_goes_on, theirs)
    assert ours.recv() == "begun"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.2)
    os.kill(process.pid, signal.SIGCONT)
    assert ours.recv() == "well"
    process.join(5)
    assert process.exitcode == 0


def test_outside_of_the_main_thread_it_only_reports():
    said = []

    def work():
        with _watch(0.3, report=said.append, patience=0.1) as dog:
            dog.doing("evaluates", 4)
            time.sleep(0.9)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(said) == 1 and said[0].startswith("an evaluation has not come further for ")


def _rank(rank: int, port: int, queue, what: str, step: int) -> None:
    with _watch(1.0, rank=rank, ranks=3, store=_client(port)) as dog:
        try:
            dog.doing(what, step)
            time.sleep(30)
        except Stalled as error:
            begin, said = time.monotonic(), [str(error), dog.late()]
            queue.put((rank, *said, time.monotonic() - begin))
            time.sleep(1.0)  # all three beats are there until the last has spoken


def test_who_waits_for_data_is_named_by_all(fork, store):
    queue = FORK.Queue()
    ranks = [fork(_rank, rank, store.port, queue, "waits for data" if rank == 1 else WAITS, 7) for rank in range(3)]
    said = {}
    for _ in range(3):
        rank, said[rank], again, took = queue.get(timeout=20)
        assert again == said[rank] and took < 0.1  # it is not looked for again
    late = re.escape(f"rank 1 ({os.uname().nodename}, pid {ranks[1].pid}) waits for data, for ")
    assert set(said) == {0, 1, 2}
    assert all(re.fullmatch(late + r"\d s now, at step 7; ranks 0, 2 wait for it", text) for text in said.values())
    for process in ranks:
        process.join()
    assert not any(store.check([f"run/beat/{rank}"]) for rank in range(3))


def _reduce(rank: int, port: int, queue, folder: Path) -> None:
    store = _client(port)
    if folder is not None:
        watchdog._process_space = lambda: f"machine {rank}"  # dead processes are then known by their silence alone
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=timedelta(seconds=20))
    dog = _watch(10.0 if folder is None else 2.0, rank=rank, ranks=3, store=store)
    total = dist.new_group([0, 1, 2])
    dist.barrier(total)
    dog.doing("computes", 4)
    time.sleep(0.5 if folder is None else 0.3)  # a beat each second, or each fifth of one
    if rank == 2:
        queue.put((2, os.getpid()))
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    dog.doing(WAITS, 4)
    try:
        dist.barrier(total)
    except RuntimeError:
        begin = time.monotonic()
        queue.put((rank, dog.late(), time.monotonic() - begin))
        time.sleep(1.0)
    os._exit(0)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_who_was_killed_is_named_when_a_collective_fails(elsewhere, fork, store):
    queue = FORK.Queue()
    for rank in range(3):
        fork(_reduce, rank, store.port, queue, Path() if elsewhere else None)
    (_, pid), *said = sorted((queue.get(timeout=20) for _ in range(3)), key=lambda one: len(one))
    assert sorted(rank for rank, *_ in said) == [0, 1]
    for _, text, took in said:
        who = f"rank 2 ({os.uname().nodename}, pid {pid}) has "
        assert text.startswith(who + ("not been heard of for " if elsewhere else 'ended (last: "')), text
        assert took < (1.5 if elsewhere else 1.0)


def _keeps(pipe) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(server.port)
    time.sleep(60)


def test_a_store_that_is_gone_is_told(fork):
    ours, theirs = FORK.Pipe()
    process = fork(_keeps, theirs)
    with _watch(0.5, ranks=2, store=_client(ours.recv())) as dog:
        process.kill()
        process.join()
        assert dog.late() == (
            "the processes' store does not answer: who keeps it, the first process or torchrun, has ended or cannot be reached"
        )


def test_alone_nobody_is_late():
    with _watch() as dog:
        assert dog.late() == "no other process takes part"


def test_saying_what_is_done_costs_nothing():
    with _watch() as dog:
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            for step in range(500):
                dog.doing("computes", step)
            times.append((time.perf_counter() - begin) / 500)
    assert min(times) < 2e-6


def test_seconds_have_to_be_above_0():
    with pytest.raises(ValueError, match=r"run\.timeout: 0 is not above 0 seconds"):
        _watch(0)


def _beat(what: str, step: int, rank: int = 0) -> Seen:
    beat = {"host": f"n{rank}", "pid": 10 + rank, "place": "", "what": what, "step": step, "s": 5.0, "beat": 1}
    return Seen(beat, 100.0)


SAID = {
    "who waits at an earlier step": (
        [_beat(WAITS, 8, 0), _beat(WAITS, 7, 1)],
        f"rank 1 (n1, pid 11) {WAITS}, for 6 s now, at step 7; rank 0 waits for it",
    ),
    "nobody": ([_beat(WAITS, 8)] * 2, "all 2 processes wait for one another at step 8: what one has sent has not come "),
    "two": (
        [_beat(WAITS, 8), _beat("computes", 8, 1), _beat("evaluates", 8, 2), _beat(WAITS, 8), _beat(WAITS, 8)],
        "rank 1 (n1, pid 11) computes, for 6 s now, at step 8; "
        "rank 2 (n2, pid 12) evaluates, for 6 s now, at step 8; ranks 0, 3 to 4 wait for them",
    ),
    "many": (
        [_beat("computes", 8, rank) for rank in range(7)] + [_beat(WAITS, 8)],
        "rank 3 (n3, pid 13) computes, for 6 s now, at step 8; 3 more are late; rank 7 waits for them",
    ),
    "one that never came": ([_beat("computes", 8), Seen(None, 100.0), _beat(WAITS, 8)],
                            "rank 1 has not been heard of; rank 2 waits for it"),
    "one that is silent": ([_beat(WAITS, 8), Seen(_beat("computes", 7, 1).beat, 60.0)],
                           'rank 1 (n1, pid 11) has not been heard of for 41 s (last: "computes" at step 7); rank 0 w'),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_sentences(case):
    seen, said = SAID[case]
    assert said in sentence(dict(enumerate(seen)), 101.0, silent=15.0)
