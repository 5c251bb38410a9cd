"""Which data sets a notebook asks for, and what is refused before anything is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from companion import data_needs
from companion.data_needs import check_needs, data_sets
from dsvlib._errors import DsvError, RequestError
from dsvlib.data.downloads import archives


def test_data_sets_are_found_inside_of_lists_too() -> None:
    more = [["imagenette-64", "imagenette-64-convnet", ""], ["cifar100", "", ""]]
    own = {"preset": "cifar10", "dataset": "digits", "steps": 4, "own": "folder:pets"}
    found = data_sets(own | {"more": more})
    assert sorted(found) == ["cifar100", "digits", "folder:pets", "imagenette-64"]


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for device in (None, "auto", "cpu"):
        check_needs([{"dataset": "digits"}], device, tmp_path)
    for device in ("cuda:77", "mps:3", "gpu"):
        with pytest.raises(RequestError, match=rf"--device: .* got '{device}' .*pass cpu"):
            check_needs([], device, tmp_path)


def test_folders_of_images_are_looked_for_at_once(tmp_path: Path) -> None:
    parameters = [{"dataset": "digits"}, {"more": [["cifar10-jpeg", ""]]}]
    with pytest.raises(RequestError, match=r"--data-root: expected the images of cifar10-jpeg as "):
        check_needs(parameters, None, tmp_path)
    (tmp_path / "cifar10-jpeg" / "train").mkdir(parents=True)
    check_needs(parameters, None, tmp_path)
    with pytest.raises(RequestError, match="expected the images of folder:"):
        check_needs([{"dataset": f"folder:{tmp_path}/pets"}], None, tmp_path)


def test_what_can_be_downloaded_is_brought_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(data_needs, "fetch", lambda files, root: asked.append((files, root)))
    check_needs([{"dataset": "cifar10"}, {"dataset": "cifar10"}], None, tmp_path)
    assert asked == [(archives("cifar10"), tmp_path)]
    monkeypatch.setattr(data_needs, "_unpacked", lambda *_: True)
    check_needs([{"dataset": "cifar10"}], None, tmp_path)
    assert len(asked) == 1

    def offline(*_: object) -> None:
        raise DsvError("no download")

    monkeypatch.setattr(data_needs, "fetch", offline)
    monkeypatch.setattr(data_needs, "_unpacked", lambda *_: False)
    with pytest.raises(DsvError, match="no download"):
        check_needs([{"dataset": "svhn"}], None, tmp_path)
