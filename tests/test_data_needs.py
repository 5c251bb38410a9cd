"""Which data sets a notebook asks for."""

from __future__ import annotations

from companion.data_needs import data_sets


def test_data_sets_are_found_inside_of_lists_too() -> None:
    more = [["imagenette-64", "imagenette-64-convnet", ""], ["cifar100", "", ""]]
    own = {"preset": "cifar10", "dataset": "digits", "steps": 4, "own": "folder:pets"}
    found = data_sets(own | {"more": more})
    assert sorted(found) == ["cifar100", "digits", "folder:pets", "imagenette-64"]
