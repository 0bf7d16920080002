"""The pictures show the numbers they are given, on the axes they are given."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from lip_jax import plot


@pytest.fixture
def ax():
    return Figure().add_subplot()


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_spectrum_draws_each_from_component_one(ax):
    spectra = {"clean": np.array([3.0, 2.0, 1.0]), "refitted": np.array([0.5, -0.25])}
    assert plot.spectrum(spectra, ax=ax) is ax
    assert legend(ax) == list(spectra)
    for line, s in zip(ax.get_lines(), spectra.values(), strict=False):
        np.testing.assert_array_equal(line.get_xdata(), np.arange(1, s.shape[0] + 1))
        np.testing.assert_array_equal(line.get_ydata(), s)
    zero = ax.get_lines()[2]
    assert set(zero.get_ydata()) == {0}


def test_spectrum_needs_no_zero_line_for_positive_values(ax):
    plot.spectrum({"clean": np.ones(3)}, ax=ax)
    assert len(ax.get_lines()) == 1


def test_heatmap_puts_phi_of_i_and_j_at_row_i_and_column_j(ax):
    similarity = np.linspace(0, 1, 6).reshape(2, 3)
    plot.similarity_heatmap(similarity, names=("A", "B"), ax=ax)
    image = ax.get_images()[0]
    np.testing.assert_array_equal(image.get_array(), similarity)
    assert image.get_extent() == [0.5, 3.5, 0.5, 2.5]
    assert image.origin == "lower"
    assert image.get_clim() == (0, 1)
    assert ("A" in ax.get_ylabel(), "B" in ax.get_xlabel()) == (True, True)
    assert len(ax.figure.axes) == 2


def test_accuracy_starts_at_rank_zero_beside_its_references(ax):
    plot.accuracy_by_rank(np.array([0.5, 0.7, 0.6]), references={"noisy": 0.6, "clean": 0.8}, ax=ax)
    refined, noisy, clean = ax.get_lines()
    np.testing.assert_array_equal(refined.get_xdata(), [0, 1, 2])
    np.testing.assert_array_equal(refined.get_ydata(), [0.5, 0.7, 0.6])
    assert set(noisy.get_ydata()) == {0.6}
    assert set(clean.get_ydata()) == {0.8}
    assert legend(ax) == ["LIP", "noisy", "clean"]
    assert len({line.get_color() for line in ax.get_lines()}) == 3
    assert len({line.get_linestyle() for line in ax.get_lines()}) == 3


def test_bounds_that_say_nothing_lie_in_the_shaded_area(ax):
    measured = {"sin θ": np.array([0.1, 0.3, 1e-9])}
    bounds = {"Wedin": np.array([0.2, np.inf, 5000.0]), "paper": np.array([2.0, 3.0, 4.0])}
    assert plot.bound_against_measured(measured, bounds, ranks=np.array([1, 5, 9]), ax=ax) is ax
    sine, wedin, paper = ax.get_lines()
    np.testing.assert_array_equal(sine.get_xdata(), [1, 5, 9])
    np.testing.assert_allclose(sine.get_ydata(), [0.1, 0.3, 0.01])
    np.testing.assert_allclose(wedin.get_ydata(), [0.2, 100, 100])
    np.testing.assert_array_equal(paper.get_ydata(), [2, 3, 4])
    assert legend(ax) == ["sin θ", "Wedin", "paper", "vacuous"]
    area = ax.patches[0].get_extents().transformed(ax.transData.inverted())
    np.testing.assert_allclose((area.y0, area.y1), (1, 100))
    assert ax.get_yscale() == "log"
    assert len({line.get_color() for line in ax.get_lines()}) == 3
    assert [line.get_linestyle() for line in ax.get_lines()] == ["-", "--", "--"]


def test_label_quality_counts_every_label_once(ax, rng):
    trust = rng.uniform(size=500)
    plot.label_quality_histogram(trust, ax=ax)
    heights = [bar.get_height() for bar in ax.patches]
    np.testing.assert_array_equal(heights, histogram(trust))
    assert legend(ax) == ["as likely wrong as right"]


def test_labels_known_to_be_wrong_are_stacked_on_the_right_ones(ax, rng):
    trust = rng.uniform(size=500)
    wrong = rng.uniform(size=500) > trust
    plot.label_quality_histogram(trust, wrong=wrong, ax=ax)
    right_bars, wrong_bars = ax.containers
    np.testing.assert_array_equal([bar.get_height() for bar in right_bars], histogram(trust[~wrong]))
    np.testing.assert_array_equal([bar.get_height() for bar in wrong_bars], histogram(trust[wrong]))
    np.testing.assert_array_equal([bar.get_y() for bar in wrong_bars], histogram(trust[~wrong]))
    assert set(legend(ax)) == {"right", "wrong", "as likely wrong as right"}
    assert wrong_bars[0].get_hatch()


def histogram(values):
    return np.histogram(values, 20, (0, 1))[0]


def test_an_overview_has_one_head_in_one_colour():
    spectra = {"clean head": np.ones(3), "noisy head": np.ones(3), "LIP": np.ones(3)}
    references = {"noisy head": 0.5, "clean head": 0.6}
    figure = plot.overview(spectra, np.eye(3), np.full(4, 0.5), references=references, title="digits")
    left, _, right, _ = figure.axes
    colours = [{line.get_label(): line.get_color() for line in ax.get_lines()} for ax in (left, right)]
    assert colours[0] == colours[1]
    assert figure.get_suptitle() == "digits"


@pytest.mark.parametrize(
    ("draw", "argument"),
    [
        (plot.spectrum, {"clean": np.ones(3)}),
        (plot.similarity_heatmap, np.eye(2)),
        (plot.accuracy_by_rank, np.ones(2)),
        (plot.label_quality_histogram, np.linspace(0, 1, 9)),
        (partial(plot.bound_against_measured, {"sin θ": np.full(3, 0.5)}), {"Wedin": np.full(3, np.inf)}),
    ],
)
def test_without_axes_each_makes_a_figure_that_saves(draw, argument, tmp_path):
    ax = draw(argument)
    ax.figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


@pytest.mark.usefixtures("unchecked")
def test_wrong_arrays_meet_a_sentence():
    with pytest.raises(ValueError, match=r"spectra\['clean'\] must have 1 axes"):
        plot.spectrum({"clean": np.eye(2)})
    with pytest.raises(ValueError, match="similarity must have 2 axes"):
        plot.similarity_heatmap(np.ones(2))
    with pytest.raises(ValueError, match="accuracy must be floating point"):
        plot.accuracy_by_rank(np.array([1, 2]))
    with pytest.raises(ValueError, match=r"bounds\['Wedin'\] must have one entry per rank, k = 2"):
        plot.bound_against_measured({"sin θ": np.ones(2)}, {"Wedin": np.ones(3)})
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.bound_against_measured({}, {})
    with pytest.raises(ValueError, match="trust must hold probabilities"):
        plot.label_quality_histogram(np.array([0.5, 1.5]))
    with pytest.raises(ValueError, match="wrong must have one entry per label, n = 2"):
        plot.label_quality_histogram(np.array([0.5, 1.0]), wrong=np.ones(3, bool))


def test_paths_are_checked(tmp_path):
    plot.check_path(tmp_path / "picture.PDF")
    for path in (tmp_path, tmp_path / "absent" / "picture.png"):
        with pytest.raises(ValueError, match="name a file in an existing folder"):
            plot.check_path(path)
    with pytest.raises(ValueError, match="must end in one of"):
        plot.check_path(Path("picture.doc"))


def test_importing_it_leaves_pyplot_alone():
    program = "import sys, lip_jax.plot; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
