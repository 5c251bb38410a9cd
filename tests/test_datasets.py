"""Data sets: the bundled digits, folders of images, settings and failures."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from dsvlib import load_dataset
from dsvlib.data.datasets import CIFAR10_CLASSES, KNOWN_CIFAR, STATISTICS, Split
from dsvlib.data.downloads import verify


def test_digits_have_their_documented_sizes(digits):
    assert digits.name == "digits"
    assert (len(digits.train), len(digits.test)) == (1347, 450)
    assert digits.shape == (1, 16, 16)
    assert digits.classes == tuple("0123456789")
    for split in (digits.train, digits.test):
        assert split.inputs.dtype == torch.float32
        assert split.labels.dtype == torch.int64
        assert tuple(split.inputs.shape) == (len(split), 1, 16, 16)
        assert set(split.labels.tolist()) == set(range(10))


def test_digits_split_is_stratified(digits):
    train, test = (split.labels.bincount(minlength=10) for split in (digits.train, digits.test))
    share = test / (train + test)
    assert_close(share, torch.full((10,), 450 / 1797), rtol=0, atol=0.004)


def test_digits_parts_do_not_overlap(digits):
    train = {image.numpy().tobytes() for image in digits.train.inputs}
    assert not any(image.numpy().tobytes() in train for image in digits.test.inputs)


def test_digits_are_the_same_every_time(digits):
    assert load_dataset("digits").digest == digits.digest


def test_digits_are_normalised_by_the_training_images(digits):
    inputs = digits.train.inputs
    assert_close(inputs.mean(), torch.tensor(0.0), rtol=0, atol=1e-5)
    assert_close(inputs.std(), torch.tensor(1.0), rtol=0, atol=1e-4)
    pixels = digits.denormalize(inputs)
    assert_close(pixels.mean(), torch.tensor(digits.mean[0]))


def test_digits_are_scikit_learns_images_up_sampled(digits):
    from sklearn.datasets import load_digits

    raw = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    halved = torch.nn.functional.avg_pool2d(digits.denormalize(digits.test.inputs[:20]), 2)
    # averaging 2×2 of a bilinear up-sampling blurs little: the nearest raw image is its origin
    distances = torch.cdist(halved.flatten(1), raw.flatten(1))
    assert float(distances.min(dim=1).values.max()) < 1.5
    target = torch.tensor(load_digits().target)
    assert torch.equal(target[distances.argmin(dim=1)], digits.test.labels[:20])


def test_bounds_and_denormalize_are_inverse(digits):
    low, high = digits.bounds
    assert low.shape == high.shape == (1,)
    assert_close(
        digits.denormalize(low.view(1, 1, 1, 1)), torch.zeros(1, 1, 1, 1), atol=1e-6, rtol=0
    )
    assert_close(digits.denormalize(high.view(1, 1, 1, 1)), torch.ones(1, 1, 1, 1))
    for split in (digits.train, digits.test):
        assert float(split.inputs.min()) >= float(low) - 1e-5
        assert float(split.inputs.max()) <= float(high) + 1e-5
    again = (digits.denormalize(digits.test.inputs) - digits.mean[0]) / digits.std[0]
    assert_close(again, digits.test.inputs, rtol=1e-4, atol=1e-5)


def test_image_size_resizes_both_parts():
    data = load_dataset("digits", image_size=32, limit=30)
    assert data.shape == (1, 32, 32)
    assert tuple(data.test.inputs.shape) == (30, 1, 32, 32)


def test_limit_is_balanced_and_keeps_the_first_of_each_class(digits):
    data = load_dataset("digits", limit=25)
    assert (len(data.train), len(data.test)) == (25, 25)
    counts = data.train.labels.bincount(minlength=10)
    assert set(counts.tolist()) == {2, 3}
    for label in range(10):
        chosen = data.denormalize(data.train.inputs[data.train.labels == label])
        first = digits.train.inputs[digits.train.labels == label][: len(chosen)]
        assert_close(chosen, digits.denormalize(first))


def test_a_large_limit_changes_nothing(digits):
    assert load_dataset("digits", limit=10_000).digest == digits.digest


def test_split_indexing(digits):
    part = digits.test[:7]
    assert isinstance(part, Split)
    assert len(part) == 7
    chosen = digits.test[torch.tensor([3, 1])]
    assert torch.equal(chosen.labels, digits.test.labels[[3, 1]])
    assert part.to("meta").inputs.device.type == "meta"
    with pytest.raises(ValueError, match="inputs 2, labels 3"):
        Split(torch.zeros(2, 1), torch.zeros(3))


# --- bad input -----------------------------------------------------------------------------------


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"expected one of digits.*got 'cifar-10'.*'cifar10'"):
        load_dataset("cifar-10")


@pytest.mark.parametrize("setting", ["image_size", "limit"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "16"])
def test_bad_settings_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"{setting}: expected a whole number ≥ 1.*got {value!r}"):
        load_dataset("digits", **{setting: value})


def test_failed_download_says_what_to_do(monkeypatch, tmp_path):
    import torchvision.datasets

    class Offline:
        def __init__(self, *args: object, **kwargs: object) -> None:
            raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Offline)
    with pytest.raises(RuntimeError, match="no route to host") as caught:
        load_dataset("cifar10", root=tmp_path)
    assert "expected" in str(caught.value)
    assert "root=" in str(caught.value)


# --- folders -------------------------------------------------------------------------------------


def write_image(path: Path, colour: tuple[int, int, int], side: int = 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    for part, count in (("train", 3), ("test", 2)):
        for number in range(count):
            write_image(root / part / "cat" / f"{number}.png", (255, 50 * number, 0))
            write_image(root / part / "dog" / f"{number}.png", (0, 0, 100))
    return root


def test_folder_of_images(folder):
    data = load_dataset(f"folder:{folder}")
    assert data.name == "pets"
    assert data.classes == ("cat", "dog")
    assert data.shape == (3, 4, 4)
    assert (len(data.train), len(data.test)) == (6, 4)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    images = data.denormalize(data.train.inputs)
    assert_close(images[1, :, 0, 0], torch.tensor([255, 50, 0]) / 255, rtol=0, atol=1e-5)
    assert_close(images[3, :, 2, 1], torch.tensor([0, 0, 100]) / 255, rtol=0, atol=1e-5)


def test_folder_reads_jpeg_and_grey_images(folder):
    Image.new("RGB", (4, 4), (200, 200, 200)).save(folder / "train" / "cat" / "z.jpg")
    grey = Image.fromarray(np.full((4, 4), 77, dtype=np.uint8))
    grey.save(folder / "train" / "dog" / "z.png")
    data = load_dataset(f"folder:{folder}")
    images = data.denormalize(data.train.inputs)
    assert_close(images[3], torch.full((3, 4, 4), 200 / 255), rtol=0, atol=0.02)
    assert_close(images[7], torch.full((3, 4, 4), 77 / 255), rtol=0, atol=1e-5)


def test_folder_is_resized_and_limited(folder):
    data = load_dataset(f"folder:{folder}", image_size=8, limit=4)
    assert tuple(data.train.inputs.shape) == (4, 3, 8, 8)
    assert data.train.labels.tolist() == [0, 0, 1, 1]


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder of classes, found none"):
        load_dataset(f"folder:{tmp_path / 'nowhere'}")


def test_folder_with_other_classes_in_its_test_part(folder):
    write_image(folder / "test" / "bird" / "0.png", (1, 2, 3))
    with pytest.raises(ValueError, match=r"expected the classes \['cat', 'dog'\].*'bird'"):
        load_dataset(f"folder:{folder}")


def test_folder_without_classes(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match=r"expected .* got \[\]"):
        load_dataset(f"folder:{tmp_path}")


@pytest.mark.parametrize("part", ["train", "test"])
def test_folder_with_unequal_sizes(folder, part):
    write_image(folder / part / "dog" / "big.png", (0, 0, 0), side=5)
    with pytest.raises(ValueError, match="expected images of one size"):
        load_dataset(f"folder:{folder}")


def test_folder_whose_parts_differ_in_size(folder):
    for file in (folder / "test").rglob("*.png"):
        write_image(file, (9, 9, 9), side=5)
    with pytest.raises(ValueError, match=r"expected .*got"):
        load_dataset(f"folder:{folder}")
    assert load_dataset(f"folder:{folder}", image_size=4).shape == (3, 4, 4)


def test_folder_with_a_file_that_is_no_image(folder):
    (folder / "train" / "cat" / "notes.dat").write_text("not an image")
    with pytest.raises(ValueError, match=r"notes\.dat: expected an image"):
        load_dataset(f"folder:{folder}")


def test_what_systems_and_people_leave_beside_images_is_left_out(folder):
    plain = load_dataset(f"folder:{folder}").digest
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "notes.txt", "labels.CSV", "._0.png"):
        (folder / "train" / "cat" / name).write_text("no image")
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "test" / "__MACOSX").mkdir()
    (folder / "train" / "README.md").write_text("no class")
    assert load_dataset(f"folder:{folder}").digest == plain


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_the_test_part_may_be_called_otherwise(folder, name):
    plain = load_dataset(f"folder:{folder}").digest
    (folder / "test").rename(folder / name)
    assert load_dataset(f"folder:{folder}").digest == plain
    for file in (folder / name).rglob("*.png"):
        write_image(folder / "test" / file.relative_to(folder / name), (3, 2, 1))
    assert load_dataset(f"folder:{folder}").digest != plain, "test goes before it"


def test_pixels_of_every_depth_keep_their_values(tmp_path):
    """One ramp as 8 and 16 bits and as float: all that the file holds is in the pixels."""
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            folder = tmp_path / part / name
            Image.fromarray((ramp * 255).round().astype(np.uint8)).save(folder / "0.png")
            Image.fromarray((ramp * 65535).round().astype(np.uint16)).save(folder / "1.png")
            Image.fromarray((ramp * 65535).round().astype(np.uint16)).save(folder / "2.tiff")
            Image.fromarray(ramp.astype(np.float32)).save(folder / "3.tiff")
    data = load_dataset(f"folder:{tmp_path}")
    assert data.shape == (1, 8, 8), "grey stays one channel where all images are"
    expected = torch.from_numpy(ramp).float()
    for image, step in zip(
        data.denormalize(data.train.inputs[:4]), (255, 65535, 65535, 1e7), strict=True
    ):
        assert_close(image[0], expected, rtol=0, atol=0.5 / step + 1e-6)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((4, 4), 200, np.float32), r"float pixels in \[0, 1\], got 200 to 200; divide"),
        (np.full((4, 4), np.nan, np.float32), r"float pixels in \[0, 1\]"),
        (np.full((4, 4), 70_000, np.int32), "expected 8 or 16 bits for a pixel, got 32"),
    ],
)
def test_pixels_without_a_known_range_are_refused(pixels, message, folder):
    Image.fromarray(pixels).save(folder / "train" / "cat" / "odd.tiff")
    with pytest.raises(ValueError, match=rf"odd\.tiff: .*{message}"):
        load_dataset(f"folder:{folder}")


def deep_png(pixels: np.ndarray, colours: int) -> bytes:
    """Write [H, W, C] as a PNG with 16 bits a channel, which Pillow itself does not."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    height, width = pixels.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, 16, colours, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize(("colours", "channels"), [(2, 3), (6, 4), (4, 2)])
def test_colours_deeper_than_they_can_be_read_are_refused(colours, channels, folder):
    pixels = np.full((4, 4, channels), 1000)  # of 65,535: 3.9 of 255
    (folder / "train" / "cat" / "deep.png").write_bytes(deep_png(pixels, colours))
    with pytest.raises(ValueError, match=r"deep\.png: expected 8 bits for each colour, got 16"):
        load_dataset(f"folder:{folder}")


def test_deep_colours_of_other_kinds_of_files_are_refused(folder):
    content = b"P6\n4 4\n65535\n" + np.full((4, 4, 3), 1000, ">u2").tobytes()
    (folder / "train" / "cat" / "deep.ppm").write_bytes(content)
    with pytest.raises(ValueError, match=r"deep\.ppm: expected 8 bits for each colour, got 16"):
        load_dataset(f"folder:{folder}")


def test_a_deep_grey_png_written_by_hand_is_read(folder):
    """The writer above is right: what it writes in grey has the values that it was given."""
    ramp = np.linspace(0, 65535, 16).round().astype(int).reshape(4, 4, 1)
    for part in ("train", "test"):
        for file in (folder / part).rglob("*.png"):
            file.write_bytes(deep_png(ramp, 0))
    data = load_dataset(f"folder:{folder}")
    expected = torch.from_numpy(ramp[..., 0] / 65535).float()
    assert_close(data.denormalize(data.train.inputs[:1])[0, 0], expected, rtol=0, atol=1e-6)


def test_mixed_sizes_are_resized_where_a_size_is_given(folder):
    write_image(folder / "train" / "dog" / "big.png", (0, 0, 100), side=9)
    with pytest.raises(ValueError, match="image_size="):
        load_dataset(f"folder:{folder}")
    data = load_dataset(f"folder:{folder}", image_size=6)
    assert data.shape == (3, 6, 6)
    images = data.denormalize(data.train.inputs)
    assert_close(images[-1, :, 0, 0], torch.tensor([0, 0, 100]) / 255, rtol=0, atol=1e-5)


def test_orientation_is_that_of_the_camera(folder):
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0] = 255  # the first row is white: turned by 90° clockwise, the last column
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(folder / "train" / "cat" / "0.png", exif=exif)
    data = load_dataset(f"folder:{folder}")
    expected = torch.zeros(4, 4)
    expected[:, -1] = 1
    assert_close(data.denormalize(data.train.inputs[:1])[0, 0], expected, rtol=0, atol=1e-5)


def test_what_cannot_be_read_is_named(folder, monkeypatch):
    cat = folder / "train" / "cat"
    whole = (cat / "0.png").read_bytes()
    Image.new("RGB", (300, 300), (1, 2, 3)).save(cat / "big.jpg")
    for name, content in {
        "cut.png": whole[:-20],
        "cut.jpg": (cat / "big.jpg").read_bytes()[:500],
        "empty.png": b"",
        "page.png": b"<html>404</html>",
    }.items():
        (cat / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: expected an image"):
            load_dataset(f"folder:{folder}", image_size=4)
        (cat / name).unlink()
    os.mkfifo(cat / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png: expected an image, got something else"):
        load_dataset(f"folder:{folder}", image_size=4)
    (cat / "pipe.png").unlink()
    (cat / "more").mkdir()
    with pytest.raises(ValueError, match="more: expected an image, got a folder"):
        load_dataset(f"folder:{folder}", image_size=4)
    (cat / "more").rmdir()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(ValueError, match=r"big\.jpg: expected an image, got: .*bomb"):
        load_dataset(f"folder:{folder}", image_size=4)


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_empty_class_is_named(folder, part):
    for file in (folder / part / "dog").iterdir():
        file.unlink()
    (folder / part / "dog" / ".DS_Store").write_text("")
    with pytest.raises(ValueError, match=rf"{part}/dog: expected at least one image, got none"):
        load_dataset(f"folder:{folder}")


def test_imagenette_lies_below_the_root_or_is_it(folder):
    target = folder.parent / "downloads" / "imagenette-64"
    target.parent.mkdir()
    folder.rename(target)
    data = load_dataset("imagenette-64", root=target.parent)
    assert (data.name, data.classes) == ("imagenette-64", ("cat", "dog"))
    assert load_dataset("imagenette-64", root=target).digest == data.digest


@pytest.fixture
def stand_in_cifar10(monkeypatch, tmp_path):
    """A tiny archive in CIFAR-10's own format, with torchvision's checksums set to its own."""
    from torchvision.datasets import CIFAR10

    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    sums = {}

    def write(name: str, content: dict) -> None:
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()

    names = ["airplane", "automobile", "bird", "cat", "deer"]
    names += ["dog", "frog", "horse", "ship", "truck"]
    pixels = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels[name] = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        write(name, {"data": pixels[name], "labels": [i % 10 for i in range(20)]})
    write("batches.meta", {"label_names": names})
    monkeypatch.setattr(CIFAR10, "train_list", [[n, sums[n]] for n in list(pixels)[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    train = np.concatenate([pixels[name] for name in list(pixels)[:5]]).reshape(-1, 3, 1024)
    means = tuple((train.astype(np.float64).mean(axis=(0, 2)) / 255).tolist())
    monkeypatch.setitem(KNOWN_CIFAR, "cifar10", (10, (10, 2), means))
    return tmp_path, pixels


@pytest.fixture
def cifar10_folders(stand_in_cifar10, tmp_path):
    """The same images as files, numbered anew within each class, and last batch first."""
    _, pixels = stand_in_cifar10
    root = tmp_path / "elsewhere"
    for number, (name, images) in enumerate(reversed(pixels.items())):
        for i, image in enumerate(images):
            part = "test" if name == "test_batch" else "train"
            file = root / "cifar10" / part / CIFAR10_CLASSES[i % 10] / f"{number}-{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.reshape(3, 32, 32).transpose(1, 2, 0)).save(file)
    return root


def test_cifar10_itself_is_read_through_torchvision(stand_in_cifar10):
    root, pixels = stand_in_cifar10
    data = load_dataset("cifar10", root=root)
    assert (len(data.train), len(data.test), data.shape) == (100, 20, (3, 32, 32))
    assert data.classes == CIFAR10_CLASSES
    assert data.mean == STATISTICS["cifar10"][0]
    images = {image.tobytes(): i % 10 for part in pixels.values() for i, image in enumerate(part)}
    for split in (data.train, data.test):
        raw = (data.denormalize(split.inputs) * 255).round().to(torch.uint8)
        assert [images.pop(image.numpy().tobytes()) for image in raw] == split.labels.tolist()
    assert not images


def test_cifar10_from_folders_is_cifar10_from_torchvision(stand_in_cifar10, cifar10_folders):
    ours, theirs = (load_dataset("cifar10", root=r) for r in (cifar10_folders, stand_in_cifar10[0]))
    assert ours.digest == theirs.digest
    assert (ours.classes, ours.mean, ours.std) == (theirs.classes, theirs.mean, theirs.std)
    assert torch.equal(ours.train.inputs, theirs.train.inputs)
    limited = load_dataset("cifar10", root=cifar10_folders, limit=20)
    assert limited.train.labels.bincount().tolist() == [2] * 10


def test_folders_go_before_an_archive(stand_in_cifar10, cifar10_folders, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "__init__", lambda *_, **__: pytest.fail("the archive was read"))
    assert len(load_dataset("cifar10", root=cifar10_folders).train) == 100


def resave(file: Path, change=lambda image: image, **options: object) -> None:
    with Image.open(file) as image:
        change(image.convert("RGB")).save(file, **options)


def lossy(root: Path) -> None:
    for file in sorted(root.glob("train/*/*.png")):
        resave(file, format="JPEG", quality=90)


def without_a_class(root: Path) -> None:
    for part in ("train", "test"):
        shutil.rmtree(root / part / "cat")


def without_an_image(root: Path) -> None:
    next((root / "test" / "dog").iterdir()).unlink()


def all_smaller(root: Path) -> None:
    for file in root.glob("*/*/*.png"):
        resave(file, lambda image: image.resize((16, 16)))


def one_larger(root: Path) -> None:
    resave(next((root / "train" / "ship").iterdir()), lambda image: image.resize((40, 40)))


def called_otherwise(root: Path) -> None:
    for part in ("train", "test"):
        (root / part / "automobile").rename(root / part / "car")  # after bird and before cat


@pytest.mark.parametrize(
    ("spoil", "expected", "got"),
    [
        (lossy, r"training pixels with channel means \(0\.\d+, ", r"\(0\.\d+, .*\), as after res"),
        (without_a_class, "10 classes", "9: airplane, automobile, bird and 6 more"),
        (without_an_image, "2 test images of each class", "1 of dog"),
        (all_smaller, "train images 3×32×32", "3×16×16"),
        (one_larger, "images 3×32×32", r"sizes \[\(32, 32\), \(40, 40\)\]"),
        (called_otherwise, "classes called airplane, automobile, bird and 7 more", "car"),
    ],
)
def test_a_folder_that_is_not_cifar10_is_told_in_one_sentence(
    cifar10_folders, spoil, expected, got
):
    folder = cifar10_folders / "cifar10"
    spoil(folder)
    sentence = (
        rf"cifar10: expected cifar10 itself, {expected}.*, got {got}.*; put all of its images "
    )
    with pytest.raises(
        ValueError, match=sentence + "there, lossless, or rename the folder"
    ) as told:
        load_dataset("cifar10", root=cifar10_folders)
    assert "\n" not in str(told.value)
    assert verify("cifar10", cifar10_folders) == (False, str(told.value))


def test_verify_looks_at_folders_and_at_what_torchvision_unpacked(
    stand_in_cifar10, cifar10_folders
):
    said = "120 images of 10 classes, channel means as published"
    assert verify("cifar10", cifar10_folders) == (True, said)
    root, _ = stand_in_cifar10
    assert verify("cifar10", root) == (True, "7 files, MD5 as published")
    (root / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"half")
    whole, text = verify("cifar10", root)
    assert not whole
    assert text == (f"cifar-10-python.tar.gz is missing; run dsv data fetch cifar10 --root {root}")


def test_a_damaged_cifar10_archive_is_not_read(stand_in_cifar10, monkeypatch):
    from torchvision.datasets import CIFAR10

    root, _ = stand_in_cifar10
    (root / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"half a download")
    monkeypatch.setattr(CIFAR10, "url", "file:///nowhere/cifar.tar.gz")
    with pytest.raises(RuntimeError, match=r"CIFAR10: expected the data set in .* go online once"):
        load_dataset("cifar10", root=root)
