"""The data sets of the tables, from the folder that `LIP_JAX_DATA` or `--data` names, and label noise."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lip_jax

# A kind, and the share of labels it makes wrong.
Noise = tuple[str, float]


class Part(NamedTuple):
    """Inputs of a network or a head, and class ids or targets."""

    x: Any
    y: Any


class Dataset(NamedTuple):
    """Features in float32 and class ids in int32, in three parts."""

    train_x: np.ndarray
    train_y: np.ndarray
    val_x: np.ndarray
    val_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray

    @property
    def parts(self) -> tuple[Part, Part, Part]:
        """Training, validation and test rows."""
        return Part(*self[:2]), Part(*self[2:4]), Part(*self[4:])


def data_dir(path: str | None = None) -> Path:
    """The data folder, from the argument or else the environment."""
    path = path or os.environ.get("LIP_JAX_DATA")
    if not path:
        raise FileNotFoundError("name the data folder with --data or the variable LIP_JAX_DATA")
    return Path(path)


def load_clinc150(path: str | None = None) -> Dataset:
    """CLINC150 sentence embeddings, scaled to unit variance; 150 classes."""
    with np.load(data_dir(path) / "clinc150_minilm.npz") as file:
        scale = np.float32(np.sqrt(file["train_x"].shape[1]))
        x = lambda part: file[f"{part}_x"].astype(np.float32) * scale
        y = lambda part: file[f"{part}_y"].astype(np.int32)
        return Dataset(*(get(part) for part in ("train", "val", "test") for get in (x, y)))


def load_digits(seed: int) -> Dataset:
    """The 1,797 digits of 8×8 pixels that come with scikit-learn, in [0, 1], split 1,000 / 300 / 497."""
    from sklearn.datasets import load_digits as load

    images, labels = (np.asarray(part) for part in load(return_X_y=True))
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    parts = np.split(np.random.default_rng(seed).permutation(len(labels)), [1000, 1300])
    return Dataset(*(array[rows] for rows in parts for array in (images, labels)))


class HumanLabels(NamedTuple):
    """CIFAR-10N: features of a small CNN, the labels people gave, the true labels, and its head."""

    train: Part
    test: Part
    head: lip_jax.Head
    train_true: np.ndarray


def load_cifar10n(path: str | None = None) -> HumanLabels:
    """Features of CIFAR-10, with the human labels ("worse", 40.2% wrong); training rows ordered by class."""
    with np.load(data_dir(path) / "cifar10n_cnn.npz") as file:
        get = lambda name: file[name].astype(np.int32 if file[name].dtype.kind == "i" else np.float32)
        train, test = Part(get("train_x"), get("train_y_noisy")), Part(get("test_x"), get("test_y"))
        head = lip_jax.Head(jnp.asarray(get("kernel")), jnp.asarray(get("bias")))
        return HumanLabels(train, test, head, get("train_y"))


class PartialLabels(NamedTuple):
    """Standardised features `(n, q)`, candidate sets `(n, l)`, true class ids `(n,)`."""

    feats: np.ndarray
    candidates: np.ndarray
    labels: np.ndarray


def load_partial(name: str, path: str | None = None) -> PartialLabels:
    """A partial-label set as its authors publish it: `data`, `partial_target`, `target` in a `.mat` file."""
    from scipy.io import loadmat

    held = loadmat(data_dir(path) / f"{name}.mat")
    feats = held["data"].astype(np.float32)
    spread = feats.std(axis=0)
    feats = (feats - feats.mean(axis=0)) / np.where(spread > 0, spread, 1)
    candidates = held["partial_target"].toarray().T.astype(np.float32)
    return PartialLabels(feats, candidates, held["target"].toarray().T.argmax(axis=1).astype(np.int32))


def corrupt(noise: Noise, seed: int, parts: Sequence[Part], num_classes: int) -> list[jax.Array]:
    """Noisy labels of several parts, drawn at once so that they share one noise model.

    One key for all rates: labels wrong at a lower rate are wrong at the higher ones too.
    """
    kind, rate = noise
    key, labels = jax.random.key(seed), jnp.concatenate([jnp.asarray(part.y) for part in parts])
    if kind == "instance":
        flat = [jnp.asarray(part.x).reshape(part.x.shape[0], -1) for part in parts]
        noisy = lip_jax.noise.instance(key, jnp.concatenate(flat), labels, rate, num_classes=num_classes)
    else:
        noisy = getattr(lip_jax.noise, kind)(key, labels, rate, num_classes=num_classes)
    ends = np.cumsum([part.y.shape[0] for part in parts])
    return [noisy[end - part.y.shape[0] : end] for part, end in zip(parts, ends, strict=True)]
