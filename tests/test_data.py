"""The bundled digits, and idx files as they should be and as they should not."""

import dataclasses
import gzip
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from implicitdl._data import DataError, Dataset, digits, mnist

NAMES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
TRAIN, TEST, SHAPE = 120, 30, (4, 3)


def idx(array: np.ndarray, magic: int | None = None, shape: tuple[int, ...] | None = None) -> bytes:
    """The bytes of an idx file, with a false header where one is given."""
    magic = 0x0800 + array.ndim if magic is None else magic
    shape = array.shape if shape is None else shape
    return struct.pack(f">{1 + len(shape)}I", magic, *shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    images = generator.integers(0, 256, (TRAIN + TEST, *SHAPE))
    images[0, 0, 0] = 255
    labels = np.arange(TRAIN + TEST) % 10
    return {
        "train_images": images[:TRAIN],
        "train_labels": labels[:TRAIN],
        "test_images": images[TRAIN:],
        "test_labels": labels[TRAIN:],
    }


@pytest.fixture
def write(tmp_path: Path, arrays: dict[str, np.ndarray]) -> Callable[..., Path]:
    """Writes MNIST/raw under tmp_path, single files replaced by given bytes; returns raw."""

    def write_(suffix: str = "", **replaced: bytes) -> Path:
        raw = tmp_path / "MNIST" / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        for part, name in NAMES.items():
            content = replaced.get(part, idx(arrays[part]))
            if suffix == ".gz" and part not in replaced:
                content = gzip.compress(content)
            (raw / (name + suffix)).write_bytes(content)
        return raw

    return write_


def refused(folder: Path, name: str, *parts: str) -> str:
    """The one-line message of the DataError, which must hold every given part."""
    with pytest.raises(DataError) as caught:
        mnist(folder)
    message = str(caught.value)
    assert message.startswith(str(folder)) and name in message and "\n" not in message
    for part in ("expected", *parts):
        assert part in message, message
    return message


def all_rows(data: Dataset) -> torch.Tensor:
    """Every image with its label, sorted, so that two splits of the same images are equal."""
    parts = [
        torch.cat([images, labels[:, None].to(images.dtype)], dim=1)
        for images, labels in (
            (data.train_images, data.train_labels),
            (data.validation_images, data.validation_labels),
            (data.test_images, data.test_labels),
        )
    ]
    return torch.from_numpy(np.array(sorted(map(tuple, torch.cat(parts).tolist()))))


def test_digits_are_the_bundled_ones_each_once():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    data = digits(seed=3)
    expected = np.column_stack([bunch.data / 16, bunch.target])
    assert torch.equal(all_rows(data), torch.from_numpy(np.array(sorted(map(tuple, expected)))))
    assert data.name == "digits" and data.image_shape == (8, 8)
    assert data.features == 64 and data.classes == 10
    assert data.train_images.min() == 0 and data.train_images.max() == 1


def test_digits_split_follows_the_seed_and_the_classes():
    first, again, other = digits(seed=5), digits(seed=5), digits(seed=6)
    for field in dataclasses.fields(Dataset):
        a, b = getattr(first, field.name), getattr(again, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert not torch.equal(first.test_images, other.test_images)
    total = sum(labels.bincount() for labels in (first.train_labels, first.validation_labels))
    total = total + first.test_labels.bincount()
    assert torch.all((first.test_labels.bincount() - 0.2 * total).abs() <= 0.5)
    assert torch.all((first.validation_labels.bincount() - 0.15 * total).abs() <= 0.5)
    # Classes come mixed: a first batch of one class only would spoil the training.
    assert len(first.train_labels[:100].unique()) == 10


def test_digits_follow_the_default_dtype(float32):
    assert digits().train_images.dtype == torch.float32
    assert digits().train_labels.dtype == torch.int64


@pytest.mark.parametrize(
    "shares", [{"validation": -0.1}, {"test": 1.0}, {"validation": 0.5, "test": 0.5}]
)
def test_impossible_shares_are_refused(shares):
    with pytest.raises(ValueError, match=r"validation|test"):
        digits(**shares)


def test_dataset_is_frozen_and_short_to_print():
    data = digits()
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.name = "other"
    assert repr(data) == "Dataset(name='digits', image_shape=(8, 8), classes=10)"


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("above", [0, 1, 2])
def test_mnist_reads_what_was_written(write, arrays, suffix, above):
    raw = write(suffix)
    folder = (raw, raw.parent, raw.parent.parent)[above]
    data = mnist(folder, validation=0)
    rows = torch.from_numpy(arrays["test_images"].reshape(TEST, -1) / 255)
    assert torch.equal(data.test_images, rows)
    assert torch.equal(data.test_labels, torch.from_numpy(arrays["test_labels"]))
    assert data.train_images.shape == (TRAIN, 12) and data.validation_images.shape == (0, 12)
    assert data.image_shape == SHAPE and data.train_images.max() == 1
    # Images and labels stay together through the shuffle.
    wanted = np.column_stack([arrays["train_images"].reshape(TRAIN, -1), arrays["train_labels"]])
    got = torch.column_stack([(data.train_images * 255).round(), data.train_labels])
    assert sorted(map(tuple, got.tolist())) == sorted(map(tuple, wanted.tolist()))


def test_mnist_validation_comes_from_the_training_file_only(write, arrays):
    data = mnist(str(write()), validation=0.25, seed=2)
    assert len(data.validation_labels) == TRAIN // 4 and len(data.test_labels) == TEST
    assert torch.equal(data.validation_labels.bincount(), torch.full((10,), 3))
    assert torch.equal(all_rows(data), all_rows(mnist(write(), validation=0.0, seed=9)))


def test_a_gzipped_file_is_known_by_its_content(write, arrays):
    raw = write(train_images=gzip.compress(idx(arrays["train_images"])))
    assert len(mnist(raw, validation=0).train_images) == TRAIN


def test_missing_files_and_folders(tmp_path, write):
    refused(tmp_path / "nowhere", "nowhere", "nothing there")
    refused(tmp_path, str(tmp_path), "without MNIST files", NAMES["train_images"])
    raw = write()
    refused(raw / NAMES["test_labels"], NAMES["test_labels"], "got a file")
    (raw / NAMES["test_labels"]).unlink()
    refused(raw, NAMES["test_labels"], "got no such file")
    (raw / NAMES["test_labels"]).mkdir()
    refused(raw, NAMES["test_labels"], "got no such file")


@pytest.mark.parametrize("part", NAMES)
def test_wrong_magic_number(write, arrays, part):
    array = arrays[part]
    right = 0x0800 + array.ndim
    for magic in (0, right + 1, right + 0x0100, 0xFFFFFFFF):
        raw = write(**{part: idx(array, magic=magic)})
        refused(raw, NAMES[part], f"got magic number {magic}", str(right))


@pytest.mark.parametrize("part", NAMES)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_every_truncation_is_refused(write, arrays, part, suffix):
    content = idx(arrays[part])
    header = 4 + 4 * arrays[part].ndim
    for end in (0, 3, 4, header - 1, header, header + 1, len(content) - 1):
        cut = content[:end]
        raw = write(suffix, **{part: gzip.compress(cut) if suffix else cut})
        refused(raw, NAMES[part], "bytes")


def test_trailing_bytes_are_refused(write, arrays):
    content = idx(arrays["test_labels"]) + b"\0"
    refused(write(test_labels=content), NAMES["test_labels"], "more than that", "30 bytes")


def test_damaged_gzip(write, arrays):
    whole = gzip.compress(idx(arrays["train_images"]))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    no_block = whole[:10] + b"\xff" + whole[11:]  # a kind of block that deflate does not have
    for damaged in (whole[: len(whole) // 2], whole[:-4], bytes(flipped), no_block, whole + b"x"):
        refused(write(".gz", train_images=damaged), NAMES["train_images"], "damaged gzip")


def test_a_header_cannot_ask_for_the_memory(write, arrays):
    huge = idx(arrays["train_images"], shape=(2**32 - 1, 2**32 - 1, 2**32 - 1))
    refused(write(train_images=huge), NAMES["train_images"], "claims", str((2**32 - 1) ** 3))
    # A small file that unpacks to far more than its header says is read no further than that.
    bomb = gzip.compress(idx(arrays["train_images"]) + bytes(1 << 24))
    refused(write(train_images=bomb), NAMES["train_images"], "more than that")
    # A claim below the limit costs no memory before the data are there.
    claim = idx(arrays["train_images"], shape=(1 << 9, 1 << 10, 1 << 10))
    assert math.prod((1 << 9, 1 << 10, 1 << 10)) == 1 << 29
    refused(write(train_images=claim), NAMES["train_images"], "truncated")


def test_empty_dimensions_are_refused(write, arrays):
    refused(write(test_labels=idx(np.zeros(0))), NAMES["test_labels"], "at least one")
    refused(write(test_images=idx(np.zeros((TEST, 0, 3)))), NAMES["test_images"], "at least one")


def test_labels_out_of_range(write, arrays):
    labels = arrays["train_labels"].copy()
    labels[7] = 10
    refused(write(train_labels=idx(labels)), NAMES["train_labels"], "label of 10", "position 7")


def test_files_that_do_not_belong_together(write, arrays):
    short = idx(arrays["train_labels"][:-1])
    refused(write(train_labels=short), NAMES["train_labels"], "119 labels", "expected 120")
    other = idx(np.zeros((TEST, 5, 3)))
    refused(write(test_images=other), NAMES["test_images"], "5 x 3", "4 x 3")


def test_data_error_is_a_value_error():
    assert issubclass(DataError, ValueError)


def test_doctest_count_is_honest(float32):
    """The number in the docstring of `digits` is the one that the default shares give."""
    number = re.search(r"\(64, 10, (\d+)\)", digits.__doc__)
    assert number is not None and len(digits().train_images) == int(number[1])
