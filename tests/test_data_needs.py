"""Which data sets a notebook asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from companion.data_needs import check_machine, data_needed, data_sets
from companion.presets import Job
from dsvlib._errors import RequestError
from dsvlib.data.downloads import archives, unpacked


def test_data_sets_are_found_inside_of_lists_too() -> None:
    more = [["imagenette-64", "imagenette-64-convnet", ""], ["cifar100", "", ""]]
    own = {"preset": "cifar10", "dataset": "digits", "steps": 4, "own": "folder:pets"}
    found = data_sets(own | {"more": more})
    assert sorted(found) == ["cifar100", "digits", "folder:pets", "imagenette-64"]


def job(name: str, root: Path) -> Job:
    parameters = {"preset": "quick", "device": "cpu", "data_root": str(root), "dataset": name}
    return Job("04_coresets", "quick", parameters, 60, None)


def put(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_present_as_folders_as_archive_and_unpacked(name: str, tmp_path: Path) -> None:
    files = {
        "folders": [f"{name}/train/cat/0.png"],
        "archive": [file.path for file in archives(name)],
        "unpacked": [file.path for file in unpacked(name)],
    }
    for form, paths in files.items():
        root = tmp_path / form
        root.mkdir()
        missing = f"missing: dsv data fetch {name} --root {root}"
        assert data_needed([job(name, root)], root) == {name: missing}
        for path in paths:
            put(root / path)
        assert data_needed([job(name, root)], root) == {name: "present"}, form
        check_machine([job(name, root)])


@pytest.mark.parametrize(
    ("name", "what", "folder"),
    [
        ("cifar10", "train/<class>/* and test/<class>/*", "/cifar10"),
        ("svhn", "its files", ""),
    ],
)
def test_what_is_neither_here_nor_to_be_had_is_refused(
    name: str, what: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def silent(name: str) -> bool:
        asked.append(name)
        return False

    monkeypatch.setattr("companion.data_needs.reachable", silent)
    with pytest.raises(RequestError) as told:
        check_machine([job("digits", tmp_path), job(name, tmp_path)])
    assert str(told.value) == (
        f"04_coresets needs the images of {name}; missing: dsv data fetch {name} --root "
        f"{tmp_path}, but its address does not answer; copy {what} to {tmp_path}{folder}, or name "
        f"where they are with --data-root"
    )
    monkeypatch.setattr("companion.data_needs.reachable", lambda name: not silent(name))
    check_machine([job(name, tmp_path), job(name, tmp_path)])
    assert asked == [name, name], "once each time, not once a job"


def test_an_empty_folder_of_cifar_is_not_downloaded_over(tmp_path: Path) -> None:
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(RequestError, match=f"copy train/<class>/.* to {tmp_path}/cifar10, or name"):
        check_machine([job("cifar10", tmp_path)])
