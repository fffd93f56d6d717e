"""The images that the demo, the examples and the benchmarks train on."""

import gzip
import io
import math
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
_CLASSES = 10
# MNIST's training images take 47 MB. A header that claims ten times that is not believed.
_MAX_BYTES = 1 << 29
_CHUNK = 1 << 20


class DataError(ValueError):
    """A data file is missing or is not what it should be; the message names the file."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Labelled images in three parts that share no image.

    Images are rows of pixels in [0, 1], in torch's default dtype; labels are int64 class numbers.
    Choose everything on the validation part, look at the test part once.

    Attributes:
        name: what the images are.
        image_shape: (height, width); `images.view(-1, *image_shape)` undoes the flattening.
        classes: how many classes there are; labels lie in 0, ..., classes - 1.
    """

    name: str
    image_shape: tuple[int, int]
    classes: int
    train_images: Tensor = field(repr=False)  # (samples, height * width)
    train_labels: Tensor = field(repr=False)  # (samples,)
    validation_images: Tensor = field(repr=False)
    validation_labels: Tensor = field(repr=False)
    test_images: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)

    @property
    def features(self) -> int:
        """Pixels in one image."""
        return math.prod(self.image_shape)


def digits(seed: int = 0, *, validation: float = 0.15, test: float = 0.2) -> Dataset:
    """The 1,797 handwritten digits (8 x 8 pixels) that scikit-learn carries, split by class.

    Args:
        seed: of the split; the same seed gives the same three parts everywhere.
        validation: share of every class in the validation part, 0 <= validation < 1.
        test: share of every class in the test part, 0 <= test < 1.

    Returns:
        The data set.

    Raises:
        ValueError: for shares that leave nothing to train on.
        ImportError: without scikit-learn.

    Example:
        >>> data = digits(seed=0)
        >>> data.features, data.classes, len(data.train_images)
        (64, 10, 1169)
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the bundled digits come with scikit-learn, which is not installed: "
            'pip install "implicitdl[demo]"'
        ) from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images.astype(np.uint8))  # whole numbers 0, ..., 16
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    train, held_out, tested = _stratified(labels, seed, validation=validation, test=test)
    return Dataset(
        name="digits",
        image_shape=(images.shape[1], images.shape[2]),
        classes=_CLASSES,
        train_images=_pixels(images[train], 16),
        train_labels=labels[train],
        validation_images=_pixels(images[held_out], 16),
        validation_labels=labels[held_out],
        test_images=_pixels(images[tested], 16),
        test_labels=labels[tested],
    )


def mnist(folder: str | os.PathLike[str], *, validation: float = 1 / 12, seed: int = 0) -> Dataset:
    """MNIST, or a data set in its format, from idx files, gzipped or not.

    Args:
        folder: the one given to torchvision (it holds `MNIST/raw`), or its `MNIST`, or that `raw`.
        validation: share of every class of the training file kept for validation (5,000 of
            60,000 images by default); 0 trains on the whole file.
        seed: of that split.

    Returns:
        The data set; its test part is the test file.

    Raises:
        DataError: a file is missing, damaged, or not what its name says.
        ValueError: for a share outside [0, 1).
    """
    raw = _raw_folder(Path(folder))
    paths = {part: _find(raw, name) for part, name in _FILES.items()}
    train_images, train_labels = _pair(paths["train_images"], paths["train_labels"])
    test_images, test_labels = _pair(paths["test_images"], paths["test_labels"])
    if train_images.shape[1:] != test_images.shape[1:]:
        got, expected = (" x ".join(map(str, x.shape[1:])) for x in (test_images, train_images))
        raise DataError(
            f"{paths['test_images']}: got images of {got} pixels, expected {expected} as in "
            f"{paths['train_images'].name}; the files are not of one data set"
        )
    train, held_out, _ = _stratified(train_labels, seed, validation=validation, test=0.0)
    return Dataset(
        name="MNIST",
        image_shape=(train_images.shape[1], train_images.shape[2]),
        classes=_CLASSES,
        train_images=_pixels(train_images[train], 255),
        train_labels=train_labels[train],
        validation_images=_pixels(train_images[held_out], 255),
        validation_labels=train_labels[held_out],
        test_images=_pixels(test_images, 255),
        test_labels=test_labels,
    )


def _pixels(images: Tensor, largest: int) -> Tensor:
    """Whole numbers (samples, height, width) to rows in [0, 1]."""
    return images.flatten(1).to(torch.get_default_dtype()) / largest


def _stratified(
    labels: Tensor, seed: int, *, validation: float, test: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers of the three parts, each with the same share of every class, in mixed order."""
    for name, share in (("validation", validation), ("test", test)):
        if not 0 <= share < 1:
            raise ValueError(f"{name}: got {share}, expected a share in [0, 1)")
    if validation + test >= 1:
        raise ValueError(
            f"validation + test: got {validation} + {test}, expected less than 1, "
            "so that something is left to train on"
        )
    # numpy's generator, since its stream is the same on every platform and thread count.
    generator = np.random.default_rng(seed)
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    known = labels.numpy()
    for label in np.unique(known):
        rows = generator.permutation(np.flatnonzero(known == label))
        ends = np.cumsum([round(test * len(rows)), round(validation * len(rows))])
        for part, chosen in zip(parts, np.split(rows, ends), strict=True):
            part.append(chosen)
    tested, held_out, train = (
        torch.from_numpy(generator.permutation(np.concatenate(part))) for part in parts
    )
    return train, held_out, tested


def _raw_folder(folder: Path) -> Path:
    """The first of folder, folder/raw, folder/MNIST/raw that holds one of the four files."""
    candidates = (folder, folder / "raw", folder / "MNIST" / "raw")
    names = [name + suffix for name in _FILES.values() for suffix in ("", ".gz")]
    try:
        if not folder.is_dir():
            what = "a file" if folder.exists() else "nothing there"
            raise DataError(
                f"{folder}: got {what}, expected a folder that holds MNIST/raw, as torchvision "
                "lays it out"
            )
        for candidate in candidates:
            if any((candidate / name).exists() for name in names):
                return candidate
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error})") from error
    raise DataError(
        f"{folder}: got a folder without MNIST files, expected {_FILES['train_images']} and three "
        "more, each with or without .gz, in it, in its raw or in its MNIST/raw"
    )


def _find(raw: Path, name: str) -> Path:
    for path in (raw / name, raw / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{raw / name}: got no such file, expected it there, with or without .gz")


def _pair(image_path: Path, label_path: Path) -> tuple[Tensor, Tensor]:
    """Images (samples, height, width) and labels (samples,) that belong together."""
    images = _read_idx(image_path, "images", 3)
    labels = _read_idx(label_path, "labels", 1)
    if len(labels) != len(images):
        raise DataError(
            f"{label_path}: got {len(labels)} labels, expected {len(images)}, one for every image "
            f"in {image_path.name}"
        )
    if (largest := int(labels.max())) >= _CLASSES:
        first = int((labels >= _CLASSES).nonzero()[0])
        raise DataError(
            f"{label_path}: got a label of {largest} (first wrong one at position {first}), "
            f"expected labels from 0 to {_CLASSES - 1}"
        )
    return images, labels.to(torch.int64)


def _read_idx(path: Path, what: str, ndim: int) -> Tensor:
    """The bytes of an idx file, after every claim of its header has been checked.

    The header is a magic number (two zero bytes, 8 for unsigned bytes, the number of dimensions)
    and the dimensions, all big-endian; then the bytes and nothing more. No more is read than the
    header claims, and the claim is bounded, so a small gzip file cannot fill the memory.
    """
    magic = 0x0800 + ndim
    with _opened(path) as file:
        header = _read(file, 4 + 4 * ndim)
        if len(header) < 4 + 4 * ndim:
            raise DataError(
                f"{path}: got {len(header)} bytes in all, expected at least the "
                f"{4 + 4 * ndim} bytes of an idx header of {what}"
            )
        got, *shape = struct.unpack(f">{1 + ndim}I", header)
        if got != magic:
            raise DataError(
                f"{path}: got magic number {got}, expected {magic} (idx file of {what}: "
                f"unsigned bytes, {ndim} dimension{'s' if ndim > 1 else ''})"
            )
        claim = " x ".join(map(str, shape))
        size = math.prod(shape)
        if size == 0:
            raise DataError(f"{path}: got {claim} {what}, expected at least one")
        if size > _MAX_BYTES:
            raise DataError(
                f"{path}: got a header that claims {claim} = {size} bytes, expected at most "
                f"{_MAX_BYTES}; the header is damaged"
            )
        data = _read(file, size + 1)
    if len(data) != size:
        more = "more than that" if len(data) > size else f"{len(data)} (a truncated file?)"
        raise DataError(f"{path}: got {more}, expected the {size} bytes of {claim} {what}")
    return torch.frombuffer(data, dtype=torch.uint8).view(*shape)


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """The file's bytes, unpacked if they are gzipped, whatever its name says."""
    try:
        with open(path, "rb") as file:
            if file.peek(2)[:2] == b"\x1f\x8b":
                with gzip.GzipFile(fileobj=file) as unpacked:
                    yield unpacked
            else:
                yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: got a damaged gzip file ({error}), expected a whole one; fetch it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _read(file: io.BufferedIOBase, size: int) -> bytearray:
    """At most `size` bytes, in pieces, so that memory follows the data and not the claim."""
    data = bytearray()
    while len(data) < size and (piece := file.read(min(_CHUNK, size - len(data)))):
        data += piece
    return data
