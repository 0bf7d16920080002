"""Pictures of heads and labels: spectra, subspaces, angles and their bounds, accuracy, label quality.

Needs matplotlib (`lip_jax[cli]`).

Each function draws on the `Axes` it is given, or on those of a new `Figure`, and returns them; save with
`axes.figure.savefig(path)`. No global state: `pyplot` is not used. Colours are Okabe and Ito's and `cividis`,
which colour-blind readers can tell apart.
"""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from lip_jax._checks import check_floating, describe
from lip_jax._types import Array
from lip_jax.networks.report import RepairReport

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

MARKERS = ("o", "s", "^", "D", "v", "P", "X")

# The range in which sines and their bounds are drawn.
SMALLEST_SINE, VACUOUS = 1e-2, 100

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
        similarity: `(k, m)`, from `lip_jax.spectrum.kernel_similarity_grid`: `φ(i, j)` at `[i − 1, j − 1]`.
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


def bound_against_measured(
    measured: Mapping[str, Float[Array, "k"]],
    bounds: Mapping[str, Float[Array, "k"]],
    *,
    ranks: Int[Array, "k"] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Measured `sin θ` between leading subspaces beside bounds on it, by rank, on a logarithmic scale.

    Bounds of 1 or more are vacuous, and lie in a shaded area. Those above 100, infinite ones too, are drawn
    on its upper edge, and what is below 0.01 at 0.01.

    Args:
        measured: Sines by the name the legend shows, one for each rank.
        bounds: Bounds likewise.
        ranks: The ranks they are for; None: 1, …, k.
        ax: Where to draw; None makes a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: If there is nothing to draw, or a value is no floating vector of one length with the rest.

    Example:
        >>> import numpy as np
        >>> from lip_jax import plot
        >>> ax = plot.bound_against_measured(
        ...     {"sin θ": np.array([0.1, 0.3])}, {"Wedin": np.array([0.2, np.inf])}
        ... )
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['sin θ', 'Wedin', 'vacuous']

    Reference:
        [si2025], bound on the angle between principal subspaces; [wedin1972].
    """
    lines = [(name, values, "measured", "-") for name, values in measured.items()]
    lines += [(name, values, "bounds", "--") for name, values in bounds.items()]
    if not lines:
        raise ValueError("measured and bounds are both empty: there is nothing to draw.")
    k = len(lines[0][1]) if ranks is None else ranks.shape[0]
    for name, values, argument, _ in lines:
        check_floating(values, f"{argument}[{name!r}]", "k")
        if values.shape[0] != k:
            raise ValueError(
                f"{argument}[{name!r}] must have one entry per rank, k = {k}; got {describe(values)}."
            )
    ax = _axes(ax)
    at = np.arange(1, k + 1) if ranks is None else np.asarray(ranks)
    for (name, values, _, style), color, marker in zip(lines, cycle(COLORS), cycle(MARKERS), strict=False):
        inside = np.clip(np.nan_to_num(np.asarray(values, np.float64), posinf=np.inf), SMALLEST_SINE, VACUOUS)
        ax.plot(
            at, inside, style, color=color, marker=marker, markevery=-(-k // 20), markersize=5, label=name
        )
    ax.axhspan(1, VACUOUS, color="0.9", zorder=0, label="vacuous")
    ax.set_yscale("log")
    ax.set_ylim(top=1.3 * VACUOUS)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="rank (components compared)", ylabel="sin θ", title="Angle between leading subspaces")
    # Below, as lines may run anywhere.
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)
    return ax


def label_quality_histogram(
    trust: Float[Array, "n"],
    *,
    wrong: Bool[Array, "n"] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """How many labels are right with which probability, in twenty bins.

    Args:
        trust: Probability that each label is right, such as `lip_jax.label_quality(…).trust`.
        wrong: Which labels are wrong, where that is known; they are drawn apart.
        ax: Where to draw; None makes a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: If `trust` is no floating vector, holds values outside [0, 1], or `wrong` does not fit.

    Example:
        >>> import numpy as np
        >>> from lip_jax import plot
        >>> plot.label_quality_histogram(np.array([0.02, 0.9, 0.99])).get_ylabel()
        'labels'

    Reference:
        The probabilities are this package's (`lip_jax.label_quality`); confident counts: [northcutt2021].
    """
    check_floating(trust, "trust", "n")
    trust = np.asarray(trust)
    if not ((trust >= 0) & (trust <= 1)).all():
        raise ValueError("trust must hold probabilities, 0 to 1; pass lip_jax.label_quality(...).trust.")
    if wrong is not None and np.asarray(wrong).shape != trust.shape:
        raise ValueError(f"wrong must have one entry per label, n = {trust.shape[0]}; got {describe(wrong)}.")
    ax = _axes(ax)
    bins = np.linspace(0, 1, 21).tolist()
    if wrong is None:
        ax.hist(trust, bins, color=COLORS[0], edgecolor="white", linewidth=0.5)
    else:
        wrong = np.asarray(wrong, bool)
        ax.hist(
            [trust[~wrong], trust[wrong]],
            bins,
            stacked=True,
            color=[COLORS[0], COLORS[1]],
            hatch=["", "///"],
            edgecolor="white",
            linewidth=0.5,
            label=["right", "wrong"],
        )
    ax.axvline(0.5, color="black", linestyle="--", linewidth=1, label="as likely wrong as right")
    ax.set(
        xlabel="probability that the label is right",
        ylabel="labels",
        xlim=(0, 1),
        title="Quality of the labels",
    )
    ax.legend(framealpha=1, edgecolor="none")
    return ax


def layers_against_head(report: RepairReport, *, ax: Axes | None = None) -> Axes:
    """What each layer and method of a repaired network gains over the head as it came, with standard errors.

    Args:
        report: Of `lip_jax.repair`.
        ax: Where to draw; None makes a new figure.

    Returns:
        The axes. Layers stand in the order of their calls, the head last; a ring is about what was taken.

    Raises:
        ValueError: If nothing was compared.

    Example:
        >>> import flax.linen as nn
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> from lip_jax import plot
        >>> model = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(3)])
        >>> x, labels = jax.random.normal(jax.random.key(0), (300, 4)), jnp.arange(300) % 3
        >>> variables = model.init(jax.random.key(1), x)
        >>> choice = lip_jax.Choice((lip_jax.Ridge(),), trust_feats=True)
        >>> options = {"head": "layers_2", "choice": choice, "seen": False}
        >>> report = lip_jax.repair(model, variables, x, labels, **options).report
        >>> [text.get_text() for text in plot.layers_against_head(report).get_xticklabels()]
        ['layers_0', 'layers_2']

    Reference:
        [li2020], the representations of layers.
    """
    head, layers = report.head, list(dict.fromkeys(report.layers))
    places = [*layers, report.path]
    # Layer, method, difference, its error, and whether it was taken.
    found = [
        (places.index(report.layers[i]), report.methods[i], report.difference[i], report.standard_error[i],
         i == report.chosen)
        for i in np.flatnonzero(report.available)
    ]  # fmt: skip
    found += [
        (len(layers), head.methods[i], head.difference[i], head.standard_error[i],
         report.chosen < 0 and i == int(head.chosen))
        for i in np.flatnonzero(head.available)[1:]
    ]  # fmt: skip
    if not found:
        raise ValueError("report must hold a candidate that could be judged; got none.")
    ax = _axes(ax)
    methods = list(dict.fromkeys(method for _, method, *_ in found))
    for k, (method, color, marker) in enumerate(zip(methods, cycle(COLORS), cycle(MARKERS), strict=False)):
        beside = 0.1 * (k - (len(methods) - 1) / 2)
        own = [(place + beside, *rest) for place, name, *rest in found if name == method]
        x, y, error, taken = (np.array(column) for column in zip(*own, strict=True))
        ax.errorbar(x, y, yerr=error, fmt=marker, color=color, markersize=5, capsize=2, label=method)
        if taken.any():
            ax.plot(x[taken], y[taken], "o", markersize=13, fillstyle="none", color="0.3")
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.set_xticks(range(len(places)), places)
    metric = head.metric.replace("_", "-")
    ax.set(
        xlabel="cut before", ylabel=f"gain in {metric} over the head as it came", title="Layers and methods"
    )
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
