"""Pictures of heads: spectra, subspace similarity, accuracy by rank. Needs matplotlib (`lip_jax[demo]`).

Each function draws on the `Axes` it is given, or on those of a new `Figure`, and returns them; save with
`axes.figure.savefig(path)`. No global state: `pyplot` is not used. Colours are Okabe and Ito's and `cividis`,
which colour-blind readers can tell apart.
"""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from lip_jax._checks import check_floating
from lip_jax._types import Array

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES = ("--", ":", "-.", (0, (5, 1)), (0, (1, 1)))


def spectrum(spectra: Mapping[str, Float[Array, "_"]], *, ax: Axes | None = None) -> Axes:
    """Singular values of several heads against their index, `s_i` over `i = 1, …, r`.

    Args:
        spectra: Singular values by the name the legend shows; refitted ones may be negative.
        ax: Where to draw; None makes a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: If a spectrum is no floating vector.

    Example:
        >>> import numpy as np
        >>> from lip_jax import plot
        >>> plot.spectrum({"clean": np.array([3.0, 2.0]), "noisy": np.array([2.0, 1.5])}).get_ylabel()
        'singular value'

    Reference:
        [si2025], spectra of clean and noisy heads.
    """
    for name, s in spectra.items():
        check_floating(s, f"spectra[{name!r}]", "r")
    ax = _axes(ax)
    for (name, s), color, marker in zip(spectra.items(), cycle(COLORS), cycle(MARKERS), strict=False):
        every = -(-s.shape[0] // 20)
        index = np.arange(1, s.shape[0] + 1)
        ax.plot(index, np.asarray(s), color=color, marker=marker, markevery=every, markersize=5, label=name)
    if any(bool((np.asarray(s) < 0).any()) for s in spectra.values()):
        ax.axhline(0, color="0.6", linewidth=0.8)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="component", ylabel="singular value", title="Spectra")
    ax.legend(framealpha=1, edgecolor="none")
    return ax


def similarity_heatmap(
    similarity: Float[Array, "k m"],
    *,
    names: tuple[str, str] = ("clean", "noisy"),
    ax: Axes | None = None,
) -> Axes:
    """Subspace similarity `φ(i, j)` for all i and j, from 0 to 1.

    Args:
        similarity: `(k, m)`, from `lip_jax.kernel_similarity_grid`; entry `[i − 1, j − 1]` is `φ(i, j)`.
        names: What the rows and the columns belong to.
        ax: Where to draw; None makes a new figure. A colour bar is put beside it.

    Returns:
        The axes.

    Raises:
        ValueError: If `similarity` is no floating matrix.

    Example:
        >>> import numpy as np
        >>> from lip_jax import plot
        >>> plot.similarity_heatmap(np.eye(3)).get_xlabel()
        'leading components of noisy, j'

    Reference:
        [si2025], figure of φ(i, j).
    """
    check_floating(similarity, "similarity", "k m")
    ax = _axes(ax)
    k, m = similarity.shape
    image = ax.imshow(
        np.asarray(similarity),
        cmap="cividis",
        vmin=0,
        vmax=1,
        origin="lower",
        extent=(0.5, m + 0.5, 0.5, k + 0.5),
        interpolation="nearest",
    )
    ax.figure.colorbar(image, ax=ax, label="φ(i, j)", shrink=0.85)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    ax.set(
        xlabel=f"leading components of {names[1]}, j",
        ylabel=f"leading components of {names[0]}, i",
        title="Subspace similarity",
    )
    return ax


def accuracy_by_rank(
    accuracy: Float[Array, "ranks"],
    *,
    references: Mapping[str, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Accuracy of a refined head against its rank, 0 to r, beside heads that have no rank.

    Args:
        accuracy: One value for each of the ranks 0, …, r.
        references: Accuracies to draw as level lines, by the name the legend shows.
        ax: Where to draw; None makes a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: If `accuracy` is no floating vector.

    Example:
        >>> import numpy as np
        >>> from lip_jax import plot
        >>> ax = plot.accuracy_by_rank(np.array([0.7, 0.8]), references={"unchanged": 0.8})
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['LIP', 'unchanged']

    Reference:
        [si2025], accuracy against the number of preserved components.
    """
    check_floating(accuracy, "accuracy", "ranks")
    ax = _axes(ax)
    every = -(-accuracy.shape[0] // 20)
    ax.plot(
        np.asarray(accuracy), color=COLORS[2], marker=MARKERS[2], markevery=every, markersize=5, label="LIP"
    )
    colors = cycle((COLORS[1], COLORS[0], *COLORS[3:]))
    for (name, level), color, style in zip(
        (references or {}).items(), colors, cycle(LINE_STYLES), strict=False
    ):
        ax.axhline(level, color=color, linestyle=style, label=name)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="rank (components preserved)", ylabel="test accuracy", title="Accuracy by rank")
    ax.legend(framealpha=1, edgecolor="none")
    return ax


def check_path(path: Path) -> None:
    """Require a path a picture can be saved to, before the work whose result it shows.

    Args:
        path: Of the picture; its suffix names the format.

    Raises:
        ValueError: If the folder does not exist, the path is a folder, or the format is unknown.

    Example:
        >>> from pathlib import Path
        >>> from lip_jax import plot
        >>> plot.check_path(Path("picture.png"))
    """
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"the picture cannot be written to {path}: name a file in an existing folder.")
    formats = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in formats:
        raise ValueError(f"the picture {path} must end in one of: {', '.join(formats)}.")


def overview(
    spectra: Mapping[str, Float[Array, "_"]],
    similarity: Float[Array, "k m"],
    accuracy: Float[Array, "ranks"],
    *,
    references: Mapping[str, float] | None = None,
    title: str = "",
) -> Figure:
    """`spectrum`, `similarity_heatmap` and `accuracy_by_rank` side by side.

    Args:
        spectra: As in `spectrum`.
        similarity: As in `similarity_heatmap`.
        accuracy: As in `accuracy_by_rank`.
        references: As in `accuracy_by_rank`.
        title: Above the three.

    Returns:
        A figure, to be saved with `savefig`.

    Raises:
        ValueError: As the three functions.

    Example:
        >>> import numpy as np
        >>> from lip_jax import plot
        >>> figure = plot.overview({"noisy": np.ones(2)}, np.eye(2), np.array([0.5, 0.6, 0.7]))
        >>> [ax.get_title() for ax in figure.axes[:3]]
        ['Spectra', 'Subspace similarity', 'Accuracy by rank']
    """
    figure = Figure(figsize=(15, 4.6), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.15))
    left, middle, right = figure.subplots(1, 3)
    spectrum(spectra, ax=left)
    similarity_heatmap(similarity, ax=middle)
    accuracy_by_rank(accuracy, references=references, ax=right)
    figure.suptitle(title)
    return figure


def _axes(ax: Axes | None) -> Axes:
    return Figure(layout="constrained").add_subplot() if ax is None else ax
