"""Lanes of a step: made-up events whose shares are known, a made-up trace of two streams, and a real one of a small network."""

import json

import pytest
from fasttrain.benchmarks import trace
from fasttrain.benchmarks.lanes import Event, both, draw, length, merged, own_time, reduced

from fasttrain import device

from .test_step_bench import few_photographs

# two steps of 100 us: the target runs in 0-60 and 100-160, the sources in 40-90 and 140-190, with a gap inside
STREAMS = [
    Event("conv", "target, stream 7", at + start, us)
    for at in (0, 100)
    for start, us in ((0, 30), (20, 40))  # overlapping
] + [
    Event(name, "sources, stream 20", at + start, us)
    for at in (0, 100)
    for name, start, us in (("a", 40, 20), ("b", 70, 20))
]
HOST = [Event("aten::conv2d", "host", at, 10) for at in (0, 100)]


def test_shares_of_made_up_events():
    found = reduced([*STREAMS, *HOST], [0, 100, 200])
    assert found["step_ms"] == 0.1 and found["steps_ms"] == [0.1, 0.1]
    assert found["busy_percent"] == pytest.approx(80)  # 0-60 and 70-90
    assert found["both_percent"] == pytest.approx(20)  # 40-60
    assert found["idle_percent"] == pytest.approx(20)
    lanes = {lane["name"]: lane for lane in found["lanes"]}
    assert list(lanes) == ["target, stream 7", "sources, stream 20", "host"]
    assert [lane["percent"] for lane in lanes.values()] == pytest.approx([60, 40, 10])
    assert [lane["events_a_step"] for lane in lanes.values()] == [2, 2, 1]


def test_what_is_longest():
    first, second, third = reduced([*STREAMS, *HOST], [0, 100, 200])["longest"]
    assert (first["name"], first["lane"], first["count"], first["ms"]) == ("conv", "target, stream 7", 2, 0.07)
    assert {second["name"], third["name"]} == {"a", "b"} and second["ms"] == 0.02


def test_what_lies_outside_the_steps_does_not_count():
    outside = [Event("early", "target, stream 7", -50, 40), Event("late", "sources, stream 20", 205, 40)]
    inside = reduced(STREAMS, [0, 100, 200])
    assert reduced([*STREAMS, *outside], [0, 100, 200]) == inside


def test_without_a_device_the_host_works():
    events = [
        Event("outer", "host, target", 0, 50),
        Event("inner", "host, target", 10, 30),
        Event("x", "host, sources", 60, 20),
    ]
    found = reduced([*events, Event("wait", "host waits", 80, 20)], [0, 100])
    assert found["busy_percent"] == pytest.approx(70)
    assert {one["name"]: one["ms"] for one in found["longest"]} == {"outer": 0.02, "inner": 0.03, "x": 0.02}


def test_own_time_is_without_what_is_called():
    lane = "host"
    events = [Event("a", lane, 0, 100), Event("b", lane, 10, 40), Event("c", lane, 20, 10), Event("d", lane, 60, 20)]
    events += [Event("other lane", "host waits", 5, 90), Event("next", lane, 100, 5)]
    own = {e.name: e.us for e in own_time(events)}
    assert own == {"a": 40, "b": 30, "c": 10, "d": 20, "other lane": 90, "next": 5}


def test_intervals():
    events = [Event("", "", start, us) for start, us in ((0, 2), (1, 3), (6, 2), (8.5, 1))]
    assert merged(events, 0, 10) == [(0, 4), (6, 8), (8.5, 9.5)]
    assert merged(events, 1, 7, gap_us=2) == [(1, 7)]
    assert both([(0, 4), (6, 8)], [(3, 7), (7.5, 20)]) == [(3, 4), (6, 7), (7.5, 8)]
    assert length([(0, 4), (6, 8)]) == 6


def test_the_picture_is_small_and_always_the_same(tmp_path):
    many = [
        Event("k", f"{who}, stream {i}", 3.0 * j, 1.0)
        for i, who in enumerate(("target", "sources"))
        for j in range(20_000)
    ]
    content = reduced([*many, *HOST], [0, 60_000])
    assert len(json.dumps(content)) < 200_000
    assert content["lanes"][0]["percent"] == pytest.approx(100 / 3, abs=0.1)  # exact, however coarse the picture is
    every_other = [Event("k", "target, stream 7", 200.0 * j, 100.0) for j in range(300)]
    fine = reduced(every_other, [0, 60_000])["picture"]["lanes"][0]["intervals_us"]
    assert fine == [[200.0 * j, 200.0 * j + 100] for j in range(300)]
    for name in ("a.svg", "b.svg"):
        draw(content, tmp_path / name, "a step")
    first = (tmp_path / "a.svg").read_bytes()
    assert first == (tmp_path / "b.svg").read_bytes() and len(first) < 300_000
    assert b"sources, stream 1" in first and b"a step" in first


def _made_up_trace() -> list[dict]:
    """Three steps of 100 us on the host, whose kernels run 200 us later; the sources' are of the step after."""
    out = []

    def add(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args) -> None:
        out.append({"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args})

    for step in range(3):
        at = 100.0 * step
        add("user_annotation", "fasttrain step", at, 95)
        add("user_annotation", "fasttrain sources", at + 5, 20)
        calls = [
            ("cudaGraphLaunch", 10, 1),
            ("cudaLaunchKernel", 40, 1),
            ("cuLaunchKernelEx", 60, 2),
            ("cudaMemcpyAsync", 80, 1),
        ]
        for k, (call, ts, tid) in enumerate(calls):
            add(
                "cuda_runtime" if call[:4] == "cuda" else "cuda_driver",
                call,
                at + ts,
                4,
                tid,
                correlation=10 * step + k,
            )
        add("cuda_runtime", "cudaStreamSynchronize", at + 85, 10)
        add("cpu_op", "aten::conv2d", at + 38, 8)
        add("kernel", "winograd", at + 210, 30, 20, stream=20, correlation=10 * step)
        add("kernel", "wgmma", at + 211, 30, 20, stream=20, correlation=10 * step)
        add("kernel", "forward", at + 225, 20, 7, stream=7, correlation=10 * step + 1)
        add("kernel", "backward", at + 260, 40, 7, stream=7, correlation=10 * step + 2)
        add("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", at + 290, 5, 24, stream=24, correlation=10 * step + 3)
    return out


def test_a_trace_of_two_streams():
    events, starts, launches = trace.events_of(_made_up_trace(), 2)
    assert starts == [225, 325, 425]  # the target's first kernels
    assert launches == 4
    found = reduced(events, starts)
    lanes = [lane["name"] for lane in found["lanes"]]
    assert lanes == ["target, stream 7", "sources, stream 20", "copies, stream 24", "host", "host waits"]
    # of 225 to 325: the target in 225-245 and 260-300, the sources until 241 and from 310 on
    assert found["busy_percent"] == pytest.approx(75)
    assert found["both_percent"] == pytest.approx(16)


def test_kernels_without_a_call_are_whose_most_of_their_stream_are():
    made = _made_up_trace()
    for e in made:
        if e["name"] in ("wgmma", "backward"):
            del e["args"]["correlation"]
    assert trace.events_of(made, 2) == trace.events_of(_made_up_trace(), 2)


def test_without_any_call_steps_are_the_hosts():
    made = [e for e in _made_up_trace() if not e["cat"].startswith("cuda_")]
    events, starts, launches = trace.events_of(made, 2)
    assert starts == [0, 100, 200] and launches == 0
    assert {e.lane for e in events} >= {"target, stream 7", "target, stream 20"}


def test_suite_without_a_gpu(tmp_path, monkeypatch):
    """Live sources: lanes, figures, a picture and JSON from the real profiler."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(device, "keep_memory", lambda: True)  # other tests look at this process's memory
    few_photographs(tmp_path / "photographs")
    picture = tmp_path / "step.svg"
    content = trace.run(["--size", "24", "--models", "test_resnet,test_resnet", "--source-size", "32", "--batch", "16",
                         "--images", "32", "--compile", "false", "--data", str(tmp_path / "photographs"), "--steps", "2",
                         "--change", "transfer.bank=plain", "--picture", str(picture)])  # fmt: skip
    lanes = {lane["name"]: lane for lane in content["lanes"]}
    assert set(lanes) == {"host, target", "host, sources"}
    assert all(lane["percent"] > 1 for lane in lanes.values())
    assert content["busy_percent"] == pytest.approx(sum(lane["percent"] for lane in lanes.values()), rel=0.05)
    assert len(content["steps_ms"]) == 2 and content["unwatched_ms"] > 0 and content["launches_a_step"] == 0
    assert any("convolution" in one["name"] for one in content["longest"])
    assert content["changes"] == {"transfer.bank": "plain"}
    assert picture.stat().st_size < 300_000 and len(json.dumps(content)) < 200_000


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--row", "paper-style"], "invalid choice"),
        (["--steps", "0"], "--steps is 0"),
        (["--picture", "step.png"], "is no .svg file"),
        (["--repeats", "3"], "what is --repeats 3"),
    ],
)
def test_mistakes(given, said):
    with pytest.raises(ValueError, match=said):
        trace.run(given)
