"""CIFAR-10 and CIFAR-100 from their official on-disk format, "python version"."""

import pickle
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32)
STD = np.array([0.2470, 0.2435, 0.2616], np.float32)

# What an array pickled by Python 2 refers to, under the names it has had.
ALLOWED = {"_reconstruct", "ndarray", "dtype", "_frombuffer", "encode"}


class Images(NamedTuple):
    """Standardised images `(n, 32, 32, 3)` in float32 and class ids in int32."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


class _ArraysOnly(pickle.Unpickler):
    """A pickle can run any code; these files need nothing but arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED or module.split(".")[0] not in ("numpy", "_codecs"):
            raise pickle.UnpicklingError(f"a CIFAR batch holds arrays only; this one names {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_batch(file: BinaryIO) -> dict[bytes, Any]:
    """One pickled batch: `data (n, 3072)`, colour planes in turn, and `labels` or `fine_labels`."""
    return _ArraysOnly(file, encoding="bytes").load()


def load_cifar(folder: Path) -> Images:
    """The set in a folder as unpacked: five `data_batch_*` and `test_batch`, or `train` and `test`."""
    hundred = (folder / "train").exists()
    trained = ["train"] if hundred else [f"data_batch_{i}" for i in range(1, 6)]
    missing = [name for name in trained if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} holds neither CIFAR-10 (data_batch_1 to 5, test_batch) nor CIFAR-100 (train, test): "
            f"{missing[0]} is missing. Unpack the 'python version' archive and name the folder inside."
        )
    train_x, train_y = _read(folder, trained, b"fine_labels" if hundred else b"labels")
    test_x, test_y = _read(
        folder, ["test" if hundred else "test_batch"], b"fine_labels" if hundred else b"labels"
    )
    return Images(train_x, train_y, test_x, test_y)


def _read(folder: Path, names: list[str], labels_key: bytes) -> tuple[np.ndarray, np.ndarray]:
    images, labels = [], []
    for name in names:
        with (folder / name).open("rb") as file:
            batch = read_batch(file)
        images.append(batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(np.asarray(batch[labels_key], np.int32))
    pixels = np.concatenate(images).astype(np.float32) / 255
    return (pixels - MEAN) / STD, np.concatenate(labels)
