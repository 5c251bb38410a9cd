"""Recipes of the shipped classifiers: where one starts, and what data/README.md says of them."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import pytest
import torch

from companion import recipes
from dsvlib import load_dataset
from dsvlib._files import checkpoint_path, repository_root
from dsvlib.classifiers import files
from dsvlib.classifiers.files import load_classifier
from dsvlib.classifiers.training import TrainConfig

SHIPPED = sorted(name for name in recipes.RECIPES if checkpoint_path(name).is_file())


@pytest.mark.parametrize("name", [name for name, recipe in recipes.RECIPES.items() if recipe.start])
def test_a_start_has_the_same_network_and_images(name):
    recipe = recipes.RECIPES[name]
    first = recipes.RECIPES[recipe.start]
    for field in ("dataset", "architecture", "options", "image_size", "seed"):
        assert getattr(recipe, field) == getattr(first, field), field


def test_training_goes_on_from_the_start(monkeypatch):
    data = load_dataset("digits", limit=40)
    short = replace(recipes.RECIPES["digits-convnet"], training=TrainConfig(epochs=2))
    still = replace(short, training=TrainConfig(epochs=0), start="first")
    monkeypatch.setattr(recipes, "RECIPES", {"first": short, "second": still})
    first, _ = recipes.classifier("first", data, seed=3)
    second, _ = recipes.classifier("second", data, seed=3)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    another, _ = recipes.classifier("second", data, seed=4)
    assert not torch.equal(next(another.parameters()), next(first.parameters()))


def readme_rows(pattern):
    text = (repository_root() / "data" / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^\| `([\w-]+)` \| {pattern} \|$", text, re.MULTILINE)


def test_the_readme_beside_the_classifiers_tells_their_numbers():
    text = (repository_root() / "data" / "README.md").read_text(encoding="utf-8")
    rows = readme_rows(r"[^|]+ \| [^|]+ \| ([\d.]+ %) \| (-?[\d.]+)")
    facts = {name: load_classifier(name)[1] for name in SHIPPED}
    assert sorted(rows) == [
        (name, f"{100 * of['test_accuracy']:.1f} %", f"{of['cosine']:.2f}")
        for name, of in facts.items()
    ]
    only = re.findall(r"^\| `([\w-]+)` \(recipe only\) \|", text, re.MULTILINE)
    assert sorted([*SHIPPED, *only]) == sorted(recipes.RECIPES)


def test_the_readme_beside_the_classifiers_tells_how_robust_they_are():
    rows = readme_rows(r"([\d.]+) \| ([\d.]+ %) \| (-?[\d.]+)")
    facts = {name: load_classifier(name)[1] for name in SHIPPED}
    assert sorted(rows) == [
        (
            name,
            f"{of['attack']['radius']:g}",
            f"{100 * of['robust_accuracy']:.1f} %",
            f"{of['cosine_attacked']:.2f}",
        )
        for name, of in facts.items()
        if "robust_accuracy" in of
    ]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_classifier_was_trained_by_its_recipe(name):
    """What its header says must be what the recipe says now, or `dsv train` makes another one."""
    assert recipes.is_shipped(name)


def test_a_changed_recipe_is_not_taken_for_the_shipped_one(monkeypatch):
    recipe = recipes.RECIPES["digits-convnet"]
    longer = replace(recipe, training=replace(recipe.training, epochs=201))
    for other in (replace(recipe, seed=7), replace(recipe, options={"width": 33}), longer):
        monkeypatch.setitem(recipes.RECIPES, "digits-convnet", other)
        assert not recipes.is_shipped("digits-convnet")


def test_a_classifier_of_another_data_set_is_refused(monkeypatch, digits):
    name = "digits-convnet"
    other = replace(digits, name="pets", classes=("cat", "dog"))
    with pytest.raises(ValueError, match=r"data: expected 'digits' for the recipe .*, got 'pets'"):
        recipes.classifier(name, other)
    recipes.classifier(name, replace(digits, name="my digits"))  # images of the same classes
    moved = replace(recipes.RECIPES[name], dataset="pets")
    monkeypatch.setitem(recipes.RECIPES, name, moved)
    with pytest.raises(ValueError, match=r"expected a classifier of 'pets'.* got one of 'digits'"):
        recipes.classifier(name, other)


def test_a_classifier_trained_anew_is_known_by_its_digest(monkeypatch, tmp_path):
    short = replace(recipes.RECIPES["digits-convnet"], training=TrainConfig(epochs=0))
    monkeypatch.setitem(recipes.RECIPES, "digits-convnet", short)
    shutil.copy(files.DIGESTS, tmp_path / "SHA256SUMS")
    for module in (recipes, files):
        monkeypatch.setattr(module, "DIGESTS", tmp_path / "SHA256SUMS")
        monkeypatch.setattr(module, "checkpoints_folder", lambda: tmp_path)
    monkeypatch.setattr("dsvlib._files.checkpoints_folder", lambda: tmp_path)
    before = files.shipped_digests()
    recipes.train_shipped("digits-convnet")
    after = files.shipped_digests()
    assert {name for name in after if after[name] != before[name]} == {"digits-convnet.safetensors"}
    load_classifier("digits-convnet")
