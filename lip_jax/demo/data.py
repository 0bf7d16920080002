"""Rows with clean and given labels: scikit-learn's digits, or features from a file."""

import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

import lip_jax
from lip_jax._checks import describe, is_floating
from lip_jax._types import ClassIds
from lip_jax.methods.protocol import Head
from lip_jax.rows.labels import Rows

REQUIRED_KEYS = ("train_x", "train_y", "test_x", "test_y")

OPTIONAL_KEYS = ("train_y_noisy", "kernel", "bias")

# Fewer held-out rows cannot tell one head from another.
FEWEST_HELD_OUT = 20


@dataclass(frozen=True)
class Data:
    """Inputs of a network or of a head, float32, with class ids, int32.

    Attributes:
        train: Training inputs `(n, …)` with the given ids, some of them wrong.
        clean_y: Their clean ids `(n,)`.
        test: Test inputs `(m, …)` with clean ids.
        num_classes: `l`.
        given_from: Where the given ids come from, in words.
        held_out: Rows kept from training, with given ids; they choose a repair.
    """

    train: Rows
    clean_y: ClassIds
    test: Rows
    num_classes: int
    given_from: str
    held_out: Rows | None = None

    @property
    def flip_rate(self) -> float:
        """The share of training rows whose given label is wrong."""
        return float(np.mean(np.asarray(self.clean_y) != np.asarray(self.train.labels)))


def load_digits(*, noise: float, seed: int) -> Data:
    """Scikit-learn's 1,797 handwritten digits, 70% for training, with symmetric noise in their labels.

    Images are `(n, 8, 8, 1)` with values in [0, 1]. `noise` is the flip rate.

    Example:
        >>> from lip_jax import demo
        >>> demo.load_digits(noise=0.4, seed=0).train.feats.shape
        (1258, 8, 8, 1)
    """
    from sklearn.datasets import load_digits

    images, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    images, labels = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1), labels.astype(np.int32)
    order = np.random.default_rng(seed).permutation(labels.shape[0])
    train, test = np.split(order, [round(0.7 * labels.shape[0])])
    given, given_from = _with_noise(labels[train], noise, seed, num_classes=10)
    return Data(Rows(images[train], given), labels[train], Rows(images[test], labels[test]), 10, given_from)


def load_features(path: str | Path, *, noise: float, seed: int) -> tuple[Data, Head | None]:
    """Data, and maybe a head, from an `.npz` file in the format of the table in `lip_jax.demo`.

    `noise` is the flip rate of the symmetric noise that is added where the file holds no `train_y_noisy`. A
    file that cannot be read or whose arrays do not fit raises a `ValueError`.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from lip_jax import demo
        >>> x, y = np.eye(4, 3, dtype=np.float32), np.array([0, 1, 2, 0])
        >>> with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        ...     np.savez(file, train_x=x, train_y=y, test_x=x, test_y=y)
        ...     data, head = demo.load_features(file.name, noise=0.0, seed=0)
        >>> data.num_classes, head
        (3, None)
    """
    arrays = _read_npz(Path(path))
    train_x, test_x = (_as_feats(arrays[name], name) for name in ("train_x", "test_x"))
    n, q = train_x.shape
    if test_x.shape[1] != q:
        raise ValueError(f"test_x must have the q = {q} columns of train_x; got {describe(test_x)}.")
    clean_y = _as_ids(arrays["train_y"], "train_y", n)
    test_y = _as_ids(arrays["test_y"], "test_y", test_x.shape[0])
    given = _as_ids(arrays["train_y_noisy"], "train_y_noisy", n) if "train_y_noisy" in arrays else None
    num_classes = max(int(ids.max()) for ids in (clean_y, test_y, given) if ids is not None) + 1
    if num_classes < 2:
        raise ValueError("train_y must name at least two classes; every id is 0.")
    head = _as_head(arrays, q, num_classes)
    if head is not None:
        num_classes = head.kernel.shape[1]
    given_from = "train_y_noisy in the file"
    if given is None:
        given, given_from = _with_noise(clean_y, noise, seed, num_classes=num_classes)
    return Data(Rows(train_x, given), clean_y, Rows(test_x, test_y), num_classes, given_from), head


def hold_out(data: Data, *, seed: int) -> Data:
    """Keep a fifth of the training rows, with their given labels, from training, if that is 20 rows or more.

    Example:
        >>> from lip_jax import demo
        >>> data = demo.hold_out(demo.load_digits(noise=0.4, seed=0), seed=0)
        >>> data.train.feats.shape[0], data.held_out.feats.shape[0]
        (1006, 252)
    """
    order = np.random.default_rng([seed, 1]).permutation(data.train.feats.shape[0])
    kept, held = np.split(order, [round(0.8 * order.shape[0])])
    if held.shape[0] < FEWEST_HELD_OUT:
        return data
    parts = [jax.tree.map(lambda part, at=at: part[at], data.train) for at in (kept, held)]
    return replace(data, train=parts[0], clean_y=data.clean_y[kept], held_out=parts[1])


def _with_noise(clean_y: np.ndarray, noise: float, seed: int, *, num_classes: int) -> tuple[jax.Array, str]:
    key = jax.random.fold_in(jax.random.key(seed), 1)
    given = lip_jax.noise.symmetric(key, clean_y, noise, num_classes=num_classes)
    return given, f"symmetric noise at rate {noise:g}"


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path} is no file.")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no .npz file. Write one with np.savez(path, train_x=…, train_y=…, …).")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = sorted(file.files)
            arrays = {name: file[name] for name in (*REQUIRED_KEYS, *OPTIONAL_KEYS) if name in found}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    missing = [name for name in REQUIRED_KEYS if name not in arrays]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}; it holds {', '.join(found) or 'nothing'}. "
            f"Required are {', '.join(REQUIRED_KEYS)}."
        )
    return arrays


def _as_feats(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim != 2 or 0 in array.shape or not is_floating(array):
        raise ValueError(f"{name} must be floating, with two axes and no empty one; got {describe(array)}.")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
        energy = np.sum(array**2)
    if not 0 < energy < np.inf:
        raise ValueError(
            f"{name} must be finite, squares included, and not zero throughout; its squares sum to {energy}."
        )
    return array


def _as_ids(array: np.ndarray, name: str, n: int) -> np.ndarray:
    if array.shape != (n,) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must hold one integer class id per row, n = {n}; got {describe(array)}.")
    if array.min() < 0 or array.max() >= 2**31:
        raise ValueError(f"{name} must hold class ids from 0; got {array.min()} to {array.max()}.")
    return array.astype(np.int32)


def _as_head(arrays: dict[str, np.ndarray], q: int, num_classes: int) -> Head | None:
    if "kernel" not in arrays:
        if "bias" in arrays:
            raise ValueError("bias came without kernel. Give both, or neither to have a head trained.")
        return None
    if "train_y_noisy" not in arrays:
        raise ValueError("kernel came without train_y_noisy, the labels that head was trained on.")
    kernel = _as_feats(arrays["kernel"], "kernel")
    if kernel.shape[0] != q or kernel.shape[1] < num_classes:
        raise ValueError(
            f"kernel must be (q, l), with the q = {q} columns of train_x and at least the {num_classes} "
            f"classes of the labels; got {describe(kernel)}."
        )
    bias = arrays.get("bias", np.zeros(kernel.shape[1], np.float32))
    if bias.shape != kernel.shape[1:] or not is_floating(bias) or not np.isfinite(bias).all():
        raise ValueError(
            f"bias must be finite and floating, one entry per column of kernel, l = {kernel.shape[1]}; "
            f"got {describe(bias)}."
        )
    return Head(jax.numpy.asarray(kernel), jax.numpy.asarray(bias.astype(np.float32)))
