"""The data sets of the tables, read from the folder that `LIP_JAX_DATA` or `--data` names."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Dataset(NamedTuple):
    """Features in float32 and class ids in int32, split as published."""

    train_x: np.ndarray
    train_y: np.ndarray
    val_x: np.ndarray
    val_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def data_dir(path: str | None = None) -> Path:
    """The data folder, from the argument or else the environment."""
    path = path or os.environ.get("LIP_JAX_DATA")
    if not path:
        raise FileNotFoundError("name the data folder with --data or the variable LIP_JAX_DATA")
    return Path(path)


def load_clinc150(path: str | None = None) -> Dataset:
    """CLINC150 sentence embeddings, scaled to unit variance; 150 classes."""
    with np.load(data_dir(path) / "clinc150_minilm.npz") as file:
        arrays = {name: file[name] for name in file.files}
    scale = np.float32(np.sqrt(arrays["train_x"].shape[1]))
    return Dataset(
        *(
            arrays[name].astype(np.float32) * scale if name.endswith("x") else arrays[name].astype(np.int32)
            for name in Dataset._fields
        )
    )
