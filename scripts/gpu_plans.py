"""What `make gpu` runs: each plan's commands, the seconds that each should take on a GPU, and a small form for a rehearsal.

Seconds are guesses until a GPU has run them: start of a process, compilation with empty caches, then the measurement.
"""

import shlex
from dataclasses import dataclass

_ENV = "env FASTTRAIN_BENCH_TURN={turn}"  # seconds of a row's turn in the suites of steps
_SMALL_TWO = "--models test_resnet,test_resnet --source-size 32"
_SMALL_STEP = f"--size 24 {_SMALL_TWO} --batch 16 --images 32 --compile false"
_SMALL_VIDEO = (
    "video --sets ucf --videos 12 --frames 4 --size 24 --batch 4 --clips 8 --short-side 40 --repeats 2 --rows packed"
)
_R18 = "--target resnet18 --size 224 --batch 512"
_PLANT = "--error-exitcode 9 {python} -m tests.gpu.sanitize --plant"
_WATCHED = "env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool"


@dataclass(frozen=True)
class Step:
    """One command of a plan.

    Attributes:
        name: of its log and JSON.
        words: the command; ``{python}``, ``{out}``, ``{data}`` and ``{video}`` are replaced.
        seconds: that it should take; it is ended after twice as many.
        small: the command of a rehearsal; nothing where there is no sense in one.
        expects: its exit code, if all is well.
    """

    name: str
    words: str
    seconds: int
    small: str = ""
    expects: int = 0

    @property
    def needs(self) -> list[str]:
        """What has to be given for it: ``data``, ``video``."""
        return [name for name in ("data", "video") if "{" + name + "}" in self.words]


def _bench(name: str, options: str, seconds: int, small: str, turn: float = 0) -> Step:
    """A suite with its JSON beside its log."""

    def words(options: str, turn: float) -> str:
        before = _ENV.format(turn=turn) + " " if turn else ""
        return f"{before}{{python}} -m fasttrain bench {options} --json {{out}}/{name}.json"

    return Step(name, words(options, turn), seconds, words(small, 0.1 if turn else 0))


def _tests(name: str, options: str, seconds: int, before: str = "") -> Step:
    start = f"{before} {{python}} -m pytest -q -p no:cacheprovider".strip()
    whole = f"{start} {options} --junitxml={{out}}/{name}.xml"
    paths = " ".join(word for word in options.split() if word.startswith("tests"))
    return Step(name, whole, seconds, f"{start} {paths} --collect-only")


LOOKS = "sh -c " + shlex.quote(
    "nvidia-smi; nproc; free -g; which gcc nvcc compute-sanitizer ncu; ldconfig -p | grep -E 'nvcuvid|nvjpeg|nvidia-encode'; "
    '{python} -c "import os, sysconfig; '
    "print('Python.h:', os.path.exists(sysconfig.get_paths()['include'] + '/Python.h'))\"; true"
)

_MADE = "fasttrain.benchmarks.photographs --out {out}-data/photographs"
_PACKED = "{python} -m fasttrain pack folder --root {out}-data/photographs --out {out}-data/photographs.beton"

PLANS: dict[str, tuple[Step, ...]] = {
    "data": (
        Step(
            "photographs",
            f"{{python}} -m {_MADE} --count 1500 --cache {{data}}",
            40,
            f"{{python}} -m {_MADE} --count 40",
        ),
        Step("packed", _PACKED, 60, _PACKED),
    ),
    "check": (
        Step("machine", LOOKS, 10, LOOKS),
        Step("doctor", "{python} -m fasttrain doctor --json", 20, "{python} -m fasttrain doctor --json"),
        _tests("kernel-tests", "tests/kernels --ignore=tests/kernels/test_resources.py -n 12", 90),
        _tests("gpu-tests", "tests -m gpu -n 8", 240),
        Step("sanitize", "{python} -m tests.gpu.sanitize", 20, "{python} -m tests.gpu.sanitize --help"),
        Step("memcheck", f"{_WATCHED} memcheck --error-exitcode 9 {{python}} -m tests.gpu.sanitize", 40),
        Step("racecheck", f"{_WATCHED} racecheck --error-exitcode 9 {{python}} -m tests.gpu.sanitize", 40),
        Step("memcheck-planted", f"{_WATCHED} memcheck {_PLANT} out-of-bounds", 20, expects=9),
        Step("racecheck-planted", f"{_WATCHED} racecheck {_PLANT} race", 20, expects=9),
    ),
    "kernels": (
        _bench("tiles", "tiles --classes 1365,4096", 80, "tiles --classes 20 --batch 8 --tries 1 --jobs 1"),
        _bench(
            "kernels", "kernels --batch 512,8192 --classes 1365,4096", 100, "kernels --classes 20 --batch 8 --rounds 1"
        ),
        _bench(
            "sources",
            "sources --batch 512 --pixels 224",
            80,
            "sources --models test_resnet,test_resnet --size 32 --pixels 20 --batch 8 --repeats 3 --rows plain,folded,stacked",
        ),
        _bench(
            "floors",
            f"floors {_R18} --measure",
            30,
            "floors --size 24 --models test_resnet --source-size 32 --batch 8 --flops 1e12 --bytes 1e11",
        ),
        _bench(
            "transfer",
            f"transfer {_R18} --rounds 3 --no-compile",
            60,
            "transfer --size 16 --batch 4 --classes 5,3 --rounds 3 --no-compile",
        ),
        _bench(
            "cifar",
            "cifar --rows 'plain eager loop;ours, true;ours, step;ours, step, not compiled;step alone;all but the step'",
            180,
            "cifar --models test_resnet,test_resnet --batch 8 --images 32 --repeats 1 --rows 'plain eager loop;ours, off'",
            turn=5,
        ),
    ),
    "step": (
        _bench(
            "step",
            f"step {_R18} --no-module --images 1024 --data {{data}} "
            "--rows 'live;recalled;heads alone;synthetic;paper-style;timm-style'",
            340,
            f"step {_SMALL_STEP} --repeats 1 --rows scratch",
            turn=4,
        ),
        _bench(
            "trace",
            f"trace {_R18} --no-module --images 1024 --data {{data}} --picture {{out}}/trace-live.svg",
            90,
            f"trace {_SMALL_STEP} --steps 2 --picture {{out}}/trace-live.svg",
        ),
        _bench(
            "trace-small",
            "trace --target resnet20 --size 32 --batch 128 --images 1024 --data {data} --no-module --row recalled --compile step "
            "--picture {out}/trace-recalled.svg",
            70,
            f"trace {_SMALL_STEP} --steps 2 --row recalled --picture {{out}}/trace-recalled.svg",
        ),
    ),
    "module": (
        _bench(
            "step-module",
            f"step {_R18} --images 1024 --data {{data}} --rows 'live;recalled;synthetic'",
            260,
            f"step {_SMALL_STEP} --repeats 1 --rows scratch",
            turn=4,
        ),
        _bench(
            "tuning-together",
            "tuning --sweep together,layout,optimiser --seconds 3 --budget 240 --data {data}",
            260,
            f"tuning --list --sweep together,layout,optimiser --target resnet20 {_SMALL_STEP.replace('--compile false', '')}",
        ),
    ),
    "tune": (
        _bench(
            "tuning",
            "tuning --sweep compile-small,bank --seconds 3 --budget 480 --data {data}",
            510,
            f"tuning --sweep layout --repeats 1 --seconds 0.2 --target resnet20 {_SMALL_STEP.replace('--compile false', '')}",
        ),
    ),
    "tune-more": (
        _bench(
            "tuning-more",
            "tuning --sweep precision,batch,compile --seconds 3 --budget 480 --data {data}",
            510,
            "tuning --list --sweep precision,batch,compile",
        ),
    ),
    "loaders": (
        _tests(
            "loader-tests",
            "tests/gpu/test_loaders.py tests/gpu/test_faults.py -m gpu -n 6",
            120,
            "env FASTTRAIN_REQUIRE=dali,ffcv",
        ),
        _bench("codec", "codec --data {data}", 60, "codec --images 32 --size 32 --batch 8"),
        _bench(
            "loaders",
            "loaders --data {data} --size 224 --batch 256 --repeats 3 --budget 140",
            160,
            "loaders --size 32 --batch 8 --repeats 1 --rows synthetic",
        ),
        _bench(
            "end-to-end-progressive",
            "end-to-end --sets progressive --data {data} --turn 3 --budget 180",
            190,
            f"end-to-end --sets progressive --grow 24,32 --loader torch --target resnet20 {_SMALL_TWO} --batch 8 --images 16 "
            "--compile false --repeats 1 --turn 0.05",
        ),
    ),
    "files": (
        _bench(
            "end-to-end",
            "end-to-end --sets images --no-module --loader ffcv,dali,auto --data {data} --turn 3 --budget 320",
            340,
            f"end-to-end --sets images --size 24 --loader torch --target resnet20 {_SMALL_TWO} --batch 8 --images 16 "
            "--compile false --repeats 1 --turn 0.05",
        ),
        _bench(
            "end-to-end-clips",
            "end-to-end --sets clips --video {video} --turn 3 --budget 160",
            180,
            f"end-to-end --sets images --size 24 --loader torch --target resnet20 {_SMALL_TWO} --batch 8 --images 16 "
            "--compile false --repeats 1 --turn 0.05",
        ),
    ),
    "video": (
        _tests("video-tests", "tests/gpu/test_video_loaders.py -m gpu -n 4", 100, "env FASTTRAIN_REQUIRE=dali"),
        _bench(
            "video",
            "video --budget 100 --rows 'pyav,decord,torchcodec,packed,bare decode,packed nvjpeg,dali nvdec,torchcodec nvdec'",
            180,
            _SMALL_VIDEO,
        ),
        _bench(
            "video-pynvvideocodec",
            "video --budget 40 --rows 'packed,pynvvideocodec,pynvvideocodec nv12'",
            90,
            _SMALL_VIDEO,
        ),
    ),
    "long": (
        _bench(
            "long-run",
            "long-run --data {data} --minutes 8 --data.labelled=0 --picture {out}/long-run.svg",
            530,
            f"long-run --data toy --target resnet20 {_SMALL_TWO} --size 24 --batch 32 --minutes 1 --data.crop pad "
            "--run.compile false --data.labelled=128 --picture {out}/long-run.svg",
        ),
    ),
}
