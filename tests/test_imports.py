"""The direction of imports (docs/architecture.md)."""

import ast
import gc
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# folder or module -> the parts of fasttrain it may not import
FORBIDDEN = {
    "kernels": {"fasttrain"},
    "loaders": {"fasttrain"},
    "fasttrain/models": {"trainer", "compare", "cli", "show", "report", "build", "methods", "sources", "tasks"},
    "fasttrain/transfer": {"trainer", "compare", "cli", "show", "report", "build", "methods", "sources", "models"},
    "fasttrain/sources": {"trainer", "compare", "cli", "show", "report", "build", "methods", "models", "transfer"},
    "fasttrain/methods": {"trainer", "compare", "cli", "show", "report", "build"},
    "fasttrain/tasks": {"trainer", "compare", "cli", "show", "report", "build", "methods", "models", "sources"},
    "fasttrain/trainer.py": {"cli", "compare", "show", "report", "doctor", "describe"},
    "fasttrain/tables": {"cli", "trainer", "methods", "transfer", "doctor"},
    "fasttrain/pretext/labels.py": {"trainer", "compare", "cli", "show", "report"},
    "fasttrain/samples.py": {"trainer", "compare", "cli", "show", "report", "build", "methods", "models", "sources"},
    "fasttrain/fields.py": {"recipe", "ranges", "build", "models"},
    "fasttrain/recipe.py": {"trainer", "compare", "cli", "show", "report", "build", "methods", "models", "sources"},
}

BELOW_BUILD = {"trainer", "compare", "cli", "show", "report", "build"}
FORBIDDEN |= {f"fasttrain/pretext/{name}.py": BELOW_BUILD for name in ("data", "features", "files", "kmeans", "source")}


def parsed(path: Path) -> ast.AST:
    """Python 3.11's parser fails (gh-106905) where the garbage collector calls numba's finalizers in the middle of it."""
    gc.disable()
    try:
        return ast.parse(path.read_text())
    finally:
        gc.enable()


def imported(path: Path) -> set[str]:
    """Parts of fasttrain that a file imports: ``fasttrain.sources`` and ``from .sources`` are both ``sources``;
    any import of fasttrain from outside its folder also counts as ``fasttrain``."""
    out: set[str] = set()
    inside = path.relative_to(ROOT).parts[0] == "fasttrain"
    for node in ast.walk(parsed(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""] + [f"{node.module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.ImportFrom) and inside:
            package = ["fasttrain", *path.relative_to(ROOT / "fasttrain").parts[:-1]]
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            names = [".".join([*base, a.name]) for a in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "fasttrain":
                out |= {"fasttrain"} | set(parts[1:2])
    return out


def files(place: str) -> list[Path]:
    path = ROOT / place
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def violations() -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {sorted(imported(path) & bad)}"
        for place, bad in FORBIDDEN.items()
        for path in files(place)
        if imported(path) & bad
    ]


def test_imports_run_one_way():
    assert violations() == []


def test_the_check_sees_a_wrong_import(tmp_path, monkeypatch):
    for place in ("fasttrain", "loaders", "kernels"):
        shutil.copytree(ROOT / place, tmp_path / place)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert violations() == []
    (tmp_path / "fasttrain/models/wrong.py").write_text("from ..trainer import Trainer\n")
    (tmp_path / "loaders/wrong.py").write_text("from fasttrain.recipe import Recipe\n")
    (tmp_path / "kernels/wrong.py").write_text("def late():\n    import fasttrain.build\n")
    assert len(violations()) == 3


def test_loaders_and_kernels_import_alone():
    code = (
        "import fasttrain.loaders, fasttrain.kernels, sys; print([m for m in sys.modules if m.startswith('fasttrain')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    names = {m.split(".")[1] for m in ast.literal_eval(out) if "." in m}
    assert names == {"loaders", "kernels"}


def test_files_stay_readable():
    sizes = {
        str(p.relative_to(ROOT)): len(p.read_text().splitlines())
        for d in ("fasttrain", "loaders", "kernels")
        for p in files(d)
    }
    assert {name: lines for name, lines in sizes.items() if lines > 500} == {}
