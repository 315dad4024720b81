"""The recipe: one experiment, typed. Dataclasses <-> YAML <-> command line; a field's docstring is its help text."""

import difflib
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from .fields import Data, Method, Optim, Pretext, Run, Source, Target, Transfer
from .ranges import check

set_parsing_settings(docstring_parse_attribute_docstrings=True)

_WITHOUT_SOURCES = ("scratch", "dml", "maxl")  # methods that no source teaches
__all__ = ["Data", "Method", "Optim", "Pretext", "Recipe", "Run", "Source", "Target", "Transfer"]
_MAX_YAML, _MAX_NODES, _MAX_DEPTH = 1 << 18, 20_000, 30  # bytes, values and levels; packaged recipes: 3 KB, 400, 5
_PACKAGED = resources.files("fasttrain") / "recipes"


@dataclass
class Recipe:
    """One experiment."""

    name: str = "run"
    """What to call it; a YAML file's own name if it does not say."""
    data: Data = field(default_factory=Data)
    target: Target = field(default_factory=Target)
    sources: list[Source] = field(default_factory=list)
    """The frozen networks at hand."""
    transfer: Transfer = field(default_factory=Transfer)
    method: Method = field(default_factory=Method)
    pretext: Pretext = field(default_factory=Pretext)
    optim: Optim = field(default_factory=Optim)
    run: Run = field(default_factory=Run)
    rows: dict[str, dict] = field(default_factory=dict)
    """Rows of a comparison: name -> fields that differ from this recipe. Each is trained with every seed."""

    def unit(self) -> str:
        """What is learned from: ``images`` or ``clips``."""
        return "clips" if self.data.frames else "images"

    def chosen_sources(self) -> list[Source]:
        """The sources in use, in the order that ``transfer.sources`` names them; none for methods that take none."""
        by_name = {s.name: s for s in self.sources}
        names = self.transfer.sources if self.transfer.sources is not None else list(by_name)
        for name in names:
            if name not in by_name:
                raise ValueError(f"transfer.sources: no source is called {name!r}; the recipe has {sorted(by_name)}")
        return [] if self.method.name in _WITHOUT_SOURCES else [by_name[n] for n in names]


def parser(prog: str) -> ArgumentParser:
    """A command-line parser with an option for every field of the recipe."""
    out = ArgumentParser(prog=prog, exit_on_error=False, description=None)
    out.add_argument("--config", action="config", help="a YAML file with fields to set, before those that follow")
    out.add_class_arguments(Recipe)
    return out


def recipe_path(name: str) -> Path:
    """The YAML file of a packaged recipe's name, or of a path.

    Raises:
        ValueError: neither.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        if not Path(name).is_file():
            raise ValueError(f"there is no recipe file {name}")
        return Path(name)
    path = Path(str(_PACKAGED / f"{name}.yaml"))
    if not path.is_file():
        known = sorted(p.name.removesuffix(".yaml") for p in _PACKAGED.iterdir() if p.name.endswith(".yaml"))
        raise ValueError(f"no packaged recipe is called {name!r}; there are {', '.join(known)}, or give a .yaml file")
    return path


def load(name: str | None = None, overrides: list[str] | tuple[str, ...] = (), prog: str = "fasttrain") -> Recipe:
    """Reads a recipe.

    Args:
        name: a packaged recipe's name, a YAML file, or None for the defaults.
        overrides: further fields as on the command line, such as ``["--optim.lr", "0.05"]``.
        prog: the command's name, for its help.

    Raises:
        ValueError: no such recipe, a field that does not exist, a value of the wrong type.
    """
    content: dict[str, Any] = {}
    if name is not None:
        path = recipe_path(name)
        content = read_yaml(path) or {}
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds no fields")
        content.setdefault("name", path.stem)
    return from_dict(content, overrides, prog)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds: plain values only. What it says is weighed before it is made, aliases at their full length.

    Raises:
        ValueError: it cannot be read, is no YAML, too large, or nested too deeply.
    """
    try:
        if path.stat().st_size > _MAX_YAML:
            raise ValueError(f"it has {path.stat().st_size} bytes, and a recipe has at most {_MAX_YAML}")
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _nodes(node, {}, 0) > _MAX_NODES:
                raise ValueError(f"with its aliases it has more than {_MAX_NODES} values")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())[:400]}") from None
    except RecursionError:
        raise ValueError(f"cannot read {path}: it is nested too deeply") from None
    except (OSError, ValueError, TypeError, OverflowError) as error:  # dates and numbers that there are not
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:400]
        raise ValueError(f"cannot read {path}: {reason}") from None


def _nodes(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """How many values a node has with all below it, every alias counted where it stands."""
    if id(node) not in known:
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is nested more than {_MAX_DEPTH} times, or in itself")
        below: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            below = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            below = node.value
        known[id(node)] = 1 + sum(_nodes(part, known, depth + 1) for part in below)
    return known[id(node)]


def row(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """A recipe with some fields changed (nested, as in ``rows``), and no rows of its own."""
    _no_unknown(changes, Recipe, "rows.")
    content = asdict(recipe)
    _merge(content, changes)
    content["rows"] = {}
    return from_dict(content)


def from_dict(content: dict[str, Any], overrides: list[str] | tuple[str, ...] = (), prog: str = "fasttrain") -> Recipe:
    """A recipe from nested fields, and further ones as on the command line.

    Raises:
        ValueError: a field that does not exist, a value of the wrong type or out of range.
    """
    _no_unknown(content, Recipe, "")
    given = _aliases(overrides)
    for at, option in enumerate(given):  # read by the parser, which would not weigh it
        if option.startswith("--config=") or (option == "--config" and at + 1 < len(given)):
            read_yaml(Path(option.partition("=")[2] or given[at + 1]))
    # the parser would merge a list given twice item by item; here the later one stands alone
    lists = [name for name in ("sources", "rows") if any(re.match(rf"--{name}(=|$)", g) for g in given)]
    content = {k: v for k, v in content.items() if k not in lists}
    reader = parser(prog)
    try:
        made = reader.instantiate(reader.parse_args(["--config", yaml.safe_dump(content, sort_keys=False), *given]))
    except ArgumentError as error:
        raise ValueError(_sentence(str(error))) from None
    out = Recipe(**{f.name: getattr(made, f.name) for f in fields(Recipe)})
    check(out)
    return out


def to_yaml(recipe: Recipe) -> str:
    """Every field, re-runnable."""
    return yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True)


# what types alone do not say: (test, what is said where it fails, fields)
def _aliases(overrides) -> list[str]:
    """``--seeds`` is short for ``--run.seeds``."""
    return [re.sub(r"^--seeds(?==|$)", "--run.seeds", o) for o in overrides]


def _no_unknown(content: dict, spec: type, prefix: str) -> None:
    known = {f.name: f for f in fields(spec)}
    for key, value in content.items():
        if key not in known:
            raise ValueError(_unknown(f"{prefix}{key}", [f"{prefix}{k}" for k in known]))
        default = known[key].default_factory
        if is_dataclass(default) and isinstance(default, type) and isinstance(value, dict):
            _no_unknown(value, default, f"{prefix}{key}.")


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"there is no field {name}" + (f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}")


def all_fields() -> list[str]:
    """Every field as the command line names it, such as ``optim.lr``."""
    out = []
    for f in fields(Recipe):
        spec = f.default_factory
        if is_dataclass(spec) and isinstance(spec, type):
            out += [f"{f.name}.{g.name}" for g in fields(spec)]
        else:
            out.append(f.name)
    return out


def _sentence(message: str) -> str:
    """The parser's message in one line that names field, value and what would be right."""
    text = " ".join(message.split())
    found = re.match(r"unrecognized arguments: --([\w.-]+)", text)
    if found:
        return _unknown(found[1], all_fields())
    found = re.match(r"unrecognized arguments: (.*)", text)
    if found:
        return f"what is {found[1]!r}? Fields are set as --field value"
    text = re.sub(r'Parser key "([^"]+)": ', r"\1: ", text)
    text = re.sub(r"Problem with given class_path '[^']*': ", "", text)
    text = re.sub(r"<class '(\w+)'>", r"\1", text)
    text = text.replace("Expected a typing.Literal", "Expected one of ")
    return re.sub(r"Expected (a )?(.*?)\. Got value: (.*)", r"expected \2, got \3", text)


def _merge(content: dict, changes: dict) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict):
            _merge(content[key], value)
        else:
            content[key] = value
