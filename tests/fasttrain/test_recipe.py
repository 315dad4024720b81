"""Recipes: YAML, command line and dataclasses say the same; mistakes are named."""

import re
from dataclasses import asdict

import pytest
import yaml

from fasttrain import recipe
from fasttrain.compare import jobs_of
from fasttrain.recipe import Recipe, all_fields, load, to_yaml

PACKAGED = sorted(p.stem for p in recipe.recipe_path("smoke").parent.glob("*.yaml"))


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_recipes_load_and_come_back_from_their_own_yaml(name, tmp_path):
    first = load(name)
    assert first.name == name
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(first))
    assert load(str(path)) == first
    once = sum(changes.get("run", {}).get("once", False) for changes in first.rows.values())
    assert len(jobs_of(first)) == (max(1, len(first.rows)) - once) * first.run.seeds + once


def test_the_command_line_comes_after_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {lr: 0.2, epochs: 7}\ndata: {name: cifar10}\n")
    made = load(
        str(path), ["--optim.lr", "0.3", "--data.root", "/data", "--seeds", "3", "--optim.milestones", "[3, 5]"]
    )
    assert (made.name, made.optim.lr, made.optim.epochs) == ("mine", 0.3, 7)
    assert (made.data.name, made.data.root, made.run.seeds, made.optim.milestones) == ("cifar10", "/data", 3, [3, 5])
    assert made.optim.momentum == Recipe().optim.momentum


def test_defaults_are_the_papers():
    """T = 1, alpha = 1, batch 128, lr 0.1, momentum 0.9, steps at 60, 120, 160, 200 by 0.2, 200 epochs."""
    made = load()
    assert (made.transfer.temperature, made.transfer.alpha, made.transfer.loss) == (1.0, 1.0, "ce")
    assert made.transfer.kd_reduction == "batchmean"
    assert (made.data.batch, made.optim.lr, made.optim.momentum, made.optim.gamma) == (128, 0.1, 0.9, 0.2)
    assert (made.optim.epochs, made.optim.milestones, made.optim.weight_decay) == (200, [60, 120, 160, 200], 5e-4)


def test_a_list_on_the_command_line_stands_alone():
    (source,) = load("smoke", ["--sources", "[{name: a, model: test_vit}]"]).sources
    assert source == recipe.Source(name="a", model="test_vit")


def test_rows_change_fields():
    demo = load("demo")
    rows = {job.row: job.recipe for job in jobs_of(demo)}
    assert list(rows) == ["scratch", "SSKT from lite0", "SSKT from lite0 + lite1"]
    assert [s.name for s in rows["SSKT from lite0"].chosen_sources()] == ["lite0"]
    assert rows["scratch"].chosen_sources() == []
    assert len(rows["SSKT from lite0 + lite1"].chosen_sources()) == 2
    assert all(r.rows == {} and r.optim == demo.optim and r.data == demo.data for r in rows.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.lrr", "1"], "there is no field optim.lrr; did you mean optim.lr?"),
        (["--learning_rate", "1"], "there is no field learning_rate"),
        (["stray"], "what is 'stray'? Fields are set as --field value"),
        (["--optim.lr", "fast"], "optim.lr: expected float, got fast"),
        (["--data.batch", "1.5"], "data.batch: expected int, got 1.5"),
        (
            ["--data.crop", "middle"],
            "data.crop: expected one of ['pad', 'random_resized', 'corner', 'centre'], got middle",
        ),
        (["--data.batch", "0"], "data.batch: 0 is not above 0"),
        (["--transfer.temperature", "-1"], "transfer.temperature: -1.0 is not above 0"),
        (["--data.views", "-2"], "data.views: -2 is below 0"),
        (["--optim.ema", "1"], "optim.ema: 1.0 is not in [0, 1)"),
        (["--data.min_area", "0"], "data.min_area: 0.0 is not in (0, 1]"),
        (["--name", "a/b"], "name: 'a/b' cannot be a folder's name"),
        (["--sources", "[{name: a, model: b, siz: 3}]"], "siz"),
        (["--sources", "[{name: a}]"], "model"),
        (["--sources", "[{name: a b, model: c}]"], "sources: names must differ"),
        (["--sources", "[{name: a, model: c, std: [1, 1]}]"], "sources: a needs three values"),
        (["--optim.milestones", "soon"], "optim.milestones: expected list, got soon"),
    ],
)
def test_wrong_fields_and_values(arguments, message):
    with pytest.raises(ValueError) as error:
        load("smoke", arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 1}", "there is no field optim.lrr; did you mean optim.lr?"),
        ("optimizer: {lr: 1}", "there is no field optimizer; did you mean optim?"),
        ("optim: {lr: fast}", "optim.lr: expected float, got fast"),
        ("optim: [", "is no YAML"),
        ("- 1", "holds no fields"),
        ("rows: {a: {optim: {lrr: 1}}}", "there is no field rows.optim.lrr; did you mean rows.optim.lr?"),
        ("rows: {a/b: {}}", "rows: 'a/b' cannot be a folder's name"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        jobs_of(load(str(tmp_path / "r.yaml")))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unknown_recipes_and_sources():
    with pytest.raises(ValueError, match=r"no packaged recipe is called 'demmo'; there are demo, .*smoke"):
        load("demmo")
    with pytest.raises(ValueError, match=r"there is no recipe file nowhere\.yaml"):
        load("nowhere.yaml")
    with pytest.raises(ValueError, match=r"no source is called 'lite9'; the recipe has \['lite0', 'lite1'\]"):
        load("demo", ["--transfer.sources", "[lite9]"]).chosen_sources()


def test_every_field_has_a_help_text():
    text = " ".join(recipe.parser("fasttrain train").format_help().split())
    for name in all_fields():
        # the help text stands between the option and its type
        found = re.search(rf"--{re.escape(name)} [^-].{{8,}}?\(type: ", text)
        assert found, name


def test_yaml_holds_every_field():
    content = yaml.safe_load(to_yaml(load("demo")))
    assert content == asdict(load("demo"))
