"""The value that passes between all stages: checks, indexing, files."""

from __future__ import annotations

import tempfile
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from dsvlib import SupportSet, save_classifier
from dsvlib.classifiers.architectures import build_model
from dsvlib.data.datasets import Split
from dsvlib.logits import is_feasible


def make(count: int = 6, *, soft: bool = False) -> SupportSet:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    if soft:
        labels = torch.rand(count, 3, generator=generator)
        labels = labels / labels.sum(dim=1, keepdim=True)
    return SupportSet(
        torch.randn(count, 1, 4, 4, generator=generator),
        labels,
        torch.rand(count, generator=generator),
        classes=("zéro", "one", "two"),
        mean=(0.25,),
        std=(0.5,),
    )


def assert_equal(first: SupportSet, second: SupportSet) -> None:
    for name in ("inputs", "labels", "multipliers"):
        one, other = getattr(first, name), getattr(second, name)
        assert one.dtype == other.dtype
        assert torch.equal(one, other), name
    assert (first.classes, first.mean, first.std) == (second.classes, second.mean, second.std)


# --- several labels at once ---


def test_rows_of_zeros_and_ones_are_several_labels():
    rows = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    samples = SupportSet(torch.zeros(2, 1, 4, 4), rows, torch.ones(2))
    assert torch.equal(samples.labels, rows)
    assert is_feasible(torch.tensor([[2.0, -1, 1], [-1, -1, -1]]), rows).tolist() == [True, True]
    assert is_feasible(torch.tensor([[2.0, 1, 1], [-1, -1, 1]]), rows).tolist() == [False, False]
    # rows that sum to 1 say which class is the most probable, as before
    soft = torch.tensor([[0.2, 0.8, 0.0], [0.0, 0.0, 1.0]])
    assert is_feasible(torch.tensor([[1.0, 2, 0], [5, 3, 1]]), soft).tolist() == [True, False]


# --- a value -------------------------------------------------------------------------------------


def test_set_is_frozen_and_has_a_length():
    samples = make(6)
    assert len(samples) == 6
    with pytest.raises(FrozenInstanceError):
        samples.inputs = samples.inputs + 1


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (slice(1, 4), [1, 2, 3]),
        (slice(None, None, 2), [0, 2, 4]),
        (torch.tensor([5, 0, 0]), [5, 0, 0]),
        (torch.tensor([True, False, False, False, False, True]), [0, 5]),
        (2, [2]),
        (-1, [5]),
    ],
)
def test_indexing_keeps_samples_together(index, rows, soft):
    samples = make(6, soft=soft)
    part = samples[index]
    assert len(part) == len(rows)
    assert torch.equal(part.inputs, samples.inputs[rows])
    assert torch.equal(part.labels, samples.labels[rows])
    assert torch.equal(part.multipliers, samples.multipliers[rows])
    assert (part.classes, part.mean, part.std) == (samples.classes, samples.mean, samples.std)


def test_a_set_can_be_walked_through():
    samples = make(3)
    parts = list(samples)
    assert [len(part) for part in parts] == [1, 1, 1]
    assert torch.equal(torch.cat([part.inputs for part in parts]), samples.inputs)
    with pytest.raises(IndexError):
        samples[3]


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_to_moves_every_tensor(device):
    moved = make().to(device)
    for name in ("inputs", "labels", "multipliers"):
        assert getattr(moved, name).device.type == device
    assert_equal(moved.to("cpu"), make())


@pytest.mark.parametrize("soft", [False, True])
def test_to_another_dtype_leaves_class_numbers_alone(soft):
    samples = make(soft=soft)
    double = samples.to(torch.float64)
    assert double.inputs.dtype == double.multipliers.dtype == torch.float64
    assert double.labels.dtype == (torch.float64 if soft else torch.int64)
    assert Split(samples.inputs, samples.labels).to(torch.float64).labels.dtype == (
        double.labels.dtype
    )
    assert_equal(double.to(samples.inputs.dtype), samples)


def test_labels_may_be_a_list_or_smaller_integers():
    inputs, ones = torch.zeros(3, 1, 2, 2), torch.ones(3)
    for labels in ([0, 1, 2], torch.tensor([0, 1, 2], dtype=torch.uint8)):
        samples = SupportSet(inputs, labels, ones)
        assert samples.labels.dtype == torch.int64
        assert samples.labels.tolist() == [0, 1, 2]


def test_gradients_flow_through_a_set():
    inputs = torch.zeros(2, 1, 2, 2, requires_grad=True)
    samples = SupportSet(inputs, [0, 1], torch.ones(2, requires_grad=True))
    assert samples.inputs is inputs
    assert samples[0:1].inputs.requires_grad
    assert samples[0:1].multipliers.requires_grad


def test_hard_labels_are_the_most_probable_class():
    soft = make(4, soft=True)
    assert torch.equal(soft.hard_labels, soft.labels.argmax(dim=1))
    assert torch.equal(make(4).hard_labels, make(4).labels)


def test_describe_and_images(digits):
    plain = SupportSet(digits.test.inputs[:5], digits.test.labels[:5], torch.ones(5))
    with pytest.raises(ValueError, match=r"expected a set that knows its normalisation, got none"):
        plain.images()
    with pytest.raises(ValueError, match=r"bounds: expected a set that knows its normalisation"):
        _ = plain.bounds
    known = plain.describe(digits)
    assert (known.classes, known.mean, known.std) == (digits.classes, digits.mean, digits.std)
    assert torch.equal(known.images(), digits.denormalize(plain.inputs))
    assert plain.classes == ()


def test_images_stay_in_range():
    wild = replace(make(), inputs=100 * make().inputs)
    assert float(wild.images().min()) == 0
    assert float(wild.images().max()) == 1


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
def test_save_and_load_round_trip(tmp_path, soft):
    samples = make(5, soft=soft)
    samples.save(tmp_path / "deep" / "set.safetensors")
    assert_equal(SupportSet.load(tmp_path / "deep" / "set.safetensors"), samples)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["set.safetensors"]


@given(
    count=st.integers(1, 4),
    shape=st.sampled_from([(1, 2, 3), (3, 4, 4), (7,)]),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
    classes=st.lists(st.text(max_size=5), max_size=3),
    mean=st.lists(st.floats(-1e6, 1e6), max_size=3),
)
def test_round_trip_of_any_set(count, shape, dtype, classes, mean):
    inputs = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    samples = SupportSet(
        inputs, torch.arange(count), inputs.flatten(1)[:, 0].clone(), tuple(classes), tuple(mean)
    )
    with tempfile.TemporaryDirectory() as folder:
        samples.save(Path(folder) / "set.safetensors")
        assert_equal(SupportSet.load(Path(folder) / "set.safetensors"), samples)


def test_saving_a_view_or_a_graph_writes_the_values(tmp_path):
    inputs = torch.randn(4, 2, 3, 3, requires_grad=True)
    samples = SupportSet(inputs.transpose(2, 3)[::2], [0, 1], torch.ones(2))
    samples.save(tmp_path / "set")
    assert torch.equal(SupportSet.load(tmp_path / "set").inputs, samples.inputs.detach())


def test_metadata_names_normalisation_classes_and_range(tmp_path):
    from safetensors import safe_open

    make().save(tmp_path / "set")
    with safe_open(str(tmp_path / "set"), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["mean"] == "[0.25]"
    assert metadata["std"] == "[0.5]"
    assert metadata["range"] == "[0.0, 1.0]"
    assert "one" in metadata["classes"]


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    import safetensors.torch

    path = tmp_path / "set.safetensors"
    make(3).save(path)
    before = path.read_bytes()

    def half(tensors: object, filename: str, metadata: object = None) -> None:
        Path(filename).write_bytes(b"half of a file")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        make(4).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_not_written_to(tmp_path):
    with pytest.raises(IsADirectoryError, match="expected a file, got a folder; name a file in it"):
        make().save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_missing_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "set.safetensors"
    with pytest.raises(FileNotFoundError, match=r"SupportSet\.save wrote, found none"):
        SupportSet.load(path)
    make().save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"not tensors", whole[:20], whole[:-5]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="got a damaged or foreign one"):
            SupportSet.load(path)
    save_file({"inputs": torch.zeros(1)}, str(path))
    with pytest.raises(ValueError, match=r"expected format .*, got None"):
        SupportSet.load(path)
    model = build_model("convnet", num_classes=2, shape=(1, 4, 4), width=2, depth=1)
    save_classifier(path, model)
    with pytest.raises(ValueError, match=r"got 'dsvlib\.classifier"):
        SupportSet.load(path)


def test_file_without_a_tensor_or_its_metadata(tmp_path):
    path, header = tmp_path / "set", {"format": "dsvlib.support-set.v1"}
    save_file({"inputs": torch.zeros(1, 2)}, str(path), metadata=header)
    with pytest.raises(ValueError, match="got no labels, multipliers"):
        SupportSet.load(path)
    tensors = {"inputs": torch.zeros(1, 2), "labels": torch.tensor([0])}
    save_file(tensors | {"multipliers": torch.ones(1)}, str(path), metadata=header)
    with pytest.raises(ValueError, match="expected"):
        SupportSet.load(path)


# --- bad input -----------------------------------------------------------------------------------

INPUTS, LABELS, ONES = torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]), torch.ones(2)
NAN = torch.full((2, 1, 2, 2), float("nan"))


@pytest.mark.parametrize(
    ("inputs", "labels", "multipliers", "error", "message"),
    [
        ([[0.0]], LABELS, ONES, TypeError, r"inputs: expected a torch\.Tensor.*got list"),
        (INPUTS.to(torch.uint8), LABELS, ONES, TypeError, "inputs: expected a floating.*uint8"),
        (torch.zeros(2), LABELS, ONES, ValueError, r"inputs: expected .* got shape \[2\]"),
        (INPUTS[:0], LABELS[:0], ONES[:0], ValueError, "inputs: expected at least one sample"),
        (NAN, LABELS, ONES, ValueError, "inputs: expected finite numbers, got 8 NaN"),
        (INPUTS / 0 + torch.inf, LABELS, ONES, ValueError, "inputs: expected finite"),
        (INPUTS, LABELS[:1], ONES, ValueError, "got inputs 2, labels 1, multipliers 2"),
        (INPUTS, LABELS, torch.ones(3), ValueError, "got inputs 2, labels 2, multipliers 3"),
        (INPUTS, LABELS, [1.0, 1.0], TypeError, "multipliers: expected a float tensor.*list"),
        (INPUTS, LABELS, LABELS, TypeError, r"multipliers: expected a float .*int64"),
        (INPUTS, LABELS, torch.ones(2, 1), ValueError, r"expected shape \[n\], got \[2, 1\]"),
        (INPUTS, LABELS, ONES * torch.nan, ValueError, "multipliers: expected finite"),
        (INPUTS, [], ONES, ValueError, "labels: expected at least one label, got none"),
        (INPUTS, torch.tensor([0.0, 1.0]), ONES, ValueError, r"soft labels of shape \[n, K\]"),
        (INPUTS, LABELS[:, None], ONES, ValueError, r"expected int64 \[n\].*\[2, 1\]"),
        (INPUTS, LABELS.bool(), ONES, ValueError, "expected int64.*got torch.bool"),
        (INPUTS, torch.ones(2, 3), ONES, ValueError, "got a row that sums to 3"),
        (INPUTS, torch.tensor([[2.0, -1.0]] * 2), ONES, ValueError, "smallest entry -1"),
        (INPUTS, torch.full((2, 2), torch.nan), ONES, ValueError, "labels: expected finite"),
    ],
)
def test_bad_input_says_expected_and_got(inputs, labels, multipliers, error, message):
    with pytest.raises(error, match=message) as caught:
        SupportSet(inputs, labels, multipliers)
    assert "expected" in str(caught.value)
    assert "got" in str(caught.value)


def test_negative_multipliers_are_kept_for_the_dual_residual():
    assert SupportSet(INPUTS, LABELS, -ONES).multipliers.tolist() == [-1, -1]


def test_an_empty_selection_is_refused():
    nothing: Tensor = torch.zeros(6, dtype=torch.bool)
    with pytest.raises(ValueError, match="at least one sample"):
        make(6)[nothing]
