"""`lip-jax demo`: what `lip_jax.demo` computes, with a progress bar, printed and drawn."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

import lip_jax
from lip_jax import plot
from lip_jax._types import Array
from lip_jax.choice import SelectionReport
from lip_jax.commands.console import (
    PLAIN,
    UNWRITABLE,
    print_angles,
    print_similarity,
    print_table,
    stop,
    thinned,
)
from lip_jax.commands.files import check_out, written_whole
from lip_jax.demo import (
    Case,
    Study,
    Training,
    choose,
    digits_case,
    features_case,
    hold_out,
    load_digits,
    load_features,
    study,
)
from lip_jax.demo.measure import Gain, Scores
from lip_jax.demo.training import HEAD_IN_FILE

MOST_RANKS = 16


def demo(
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="Precomputed features in place of the digits. Arrays: train_x (n, q) and test_x (m, q), "
            "floating; train_y (n,) and test_y (m,), clean integer class ids from 0. Optional: "
            "train_y_noisy (n,), the given ids (otherwise noise is added to train_y); kernel (q, l) and "
            "bias (l,), a head trained on train_y_noisy (otherwise a softmax head is trained).",
        ),
    ] = None,
    noise: Annotated[float, typer.Option(min=0, max=1, help="Share of labels to make wrong.")] = 0.4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of noise, split, parameters, batches.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training rows.")] = 30,
    weight_decay: Annotated[
        float, typer.Option(min=0, max=1, help="To see an overfitted head: --weight-decay 0 --epochs 200.")
    ] = 0.005,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The picture to write; an old one is replaced.")
    ] = Path("lip_jax_demo.png"),
) -> None:
    """Train on wrong labels, refit the head by LIP at every rank, and see where it helps and where it hurts.

    Without --data: a small CNN on scikit-learn's handwritten digits; nothing is downloaded.
    """
    try:
        plot.check_path(out)
        check_out(out, force=True, inputs=(data,))
        if data is None:
            rows, head = load_digits(noise=noise, seed=seed), None
        else:
            rows, head = load_features(data, noise=noise, seed=seed)
    except ValueError as error:
        stop("demo", str(error))
    rows = hold_out(rows, seed=seed)

    stderr = Console(stderr=True)
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        tasks = {}

        def on_epoch(stage: str) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=epochs)
            progress.advance(tasks[stage])

        training = Training(seed, epochs, weight_decay, on_epoch)
        case = digits_case(rows, training) if data is None else features_case(rows, head, training)
        progress.add_task("every rank", total=None)
        ranks = thinned(0, min(case.noisy.kernel.shape), MOST_RANKS)
        found = study(case, np.array(ranks[1:]))
        chosen = choose(case) if case.data.held_out else None

    name = "scikit-learn digits" if data is None else data.name
    console = Console(**PLAIN)
    _print_case(console, case, name)
    _print_scores(console, found, ranks)
    _print_verdict(console, found)
    print_similarity(
        console,
        "Similarity φ(k,k) of the noisy head's leading class directions to those of the",
        {
            name: found.references[name].similarity
            for name in ("clean head", "clean network")
            if name in found.references
        },
        ranks[1:],
        case.data.num_classes,
    )
    print_angles(console, "Angles between leading subspaces, clean and noisy head", found.softmax, ranks[1:])
    print_angles(
        console,
        f"The same for ridge heads (λ = {found.ridge_strength:.3g}) fitted to clean and to given labels",
        found.ridge,
        ranks[1:],
    )
    console.print(
        "'paper' is the bound of the LIP paper and 'filter' its sharper form, both at the share of wrong "
        "labels above. They hold for such ridge heads, not for softmax heads; Wedin's hold for all heads."
    )
    if chosen:
        _print_choice(console, case, found, *chosen)
    try:
        # An old picture is replaced: mostly it is that of the last run.
        with written_whole(out, force=True) as fresh:
            _draw(case, found, name).savefig(fresh)
    except OSError as error:
        stop("demo", f"the picture could not be written: {error}", UNWRITABLE)
    console.print(f"\nPicture: {out.resolve()}", soft_wrap=True)


def _print_choice(
    console: Console, case: Case, found: Study, report: SelectionReport, repaired: Scores
) -> None:
    """Print what `lip_jax.apply(…, validation=…)` takes, and how that does on the test rows."""
    noisy = found.references["noisy head"].scores
    rows = f"{case.data.held_out.feats.shape[0]} held-out rows" if case.data.held_out else ""
    seen = ", which the head in the file may have seen" if case.noisy_from == HEAD_IN_FILE else ""
    console.print(
        f"\nWhat lip_jax.apply(…, validation=…) takes, by the given labels of {rows}{seen}", style="bold"
    )
    console.print(str(report), soft_wrap=True)
    console.print(
        f"On the test rows: accuracy {noisy.accuracy:.3f} → {repaired.accuracy:.3f} "
        f"({_signed(repaired.accuracy_gain, unit=100, digits=1)} points), "
        f"log-loss {noisy.log_loss:.3f} → {repaired.log_loss:.3f}."
    )


def _draw(case: Case, found: Study, name: str) -> Figure:
    references = found.references
    spectra = {name: references[name].s for name in ("clean head", "noisy head")}
    return plot.overview(
        spectra | {"LIP, rank 0": found.sigma},
        references["clean head"].similarity,
        found.by_rank.accuracy,
        references={name: float(references[name].scores.accuracy) for name in reversed(references)},
        title=f"{name}, {case.data.flip_rate:.0%} of the training labels wrong",
    )


def _print_case(console: Console, case: Case, name: str) -> None:
    data = case.data
    n, q = data.train.feats.shape
    console.print(
        f"{name}: {n} training rows, {data.test.feats.shape[0]} test rows, {data.num_classes} classes.\n"
        f"Given labels: {data.given_from}; {data.flip_rate:.1%} of them are wrong.\n\n"
        f"noisy head     {case.noisy_from}, on {q} features\n"
        "rank k         LIP: the first k components of the noisy head kept, the others\n"
        "               refitted to the given labels; the bias and the features stay\n"
        "clean head     a softmax head trained on the clean labels, on the same features"
    )
    if case.network is not None:
        console.print("clean network  the same CNN trained on the clean labels, on features of its own")
    console.print()


def _print_scores(console: Console, found: Study, ranks: list[int]) -> None:
    accuracy, log_loss, accuracy_gain, log_loss_gain = found.by_rank
    rows: list[list[str] | None] = [
        [name, f"{scores.accuracy:.3f}", "", f"{scores.log_loss:.3f}", "", _effective_rank(s)]
        for name, (scores, s, _) in found.references.items()
    ]
    rows.append(None)
    component, s_noisy = np.arange(found.sigma.shape[0]), found.references["noisy head"].s
    rows += [
        [
            f"rank {k}",
            f"{accuracy[k]:.3f}",
            _signed(accuracy_gain, k, unit=100, digits=1),
            f"{log_loss[k]:.3f}",
            _signed(log_loss_gain, k, unit=-1, digits=4),
            _effective_rank(np.where(component < k, s_noisy, found.sigma)),
        ]
        for k in ranks
    ]
    print_table(
        console,
        "Test scores, with changes against the noisy head ± 2 paired standard errors",
        ["", "accuracy", "% points", "log-loss", "change", "eff. rank"],
        rows,
    )
    if len(ranks) < len(accuracy):
        console.print(f"Thinned: {len(ranks)} of {len(accuracy)} ranks are shown; what follows counts all.\n")


def _signed(gain: Gain, at: int | tuple = (), *, unit: int, digits: int) -> str:
    """The gain in a unit, with two standard errors; a unit of −1 turns a gain in log-loss into a change."""
    # Adding 0 turns −0 into 0.
    mean, error = unit * float(gain.mean[at]) + 0, 2 * abs(unit) * float(gain.error[at])
    return f"{mean:+.{digits}f} ± {error:.{digits}f}"


def _effective_rank(s: Float[Array, "r"]) -> str:
    return f"{lip_jax.spectrum.effective_rank(np.sort(np.abs(s))[::-1]).entropy:.1f}"


def _print_verdict(console: Console, found: Study) -> None:
    accuracy = found.by_rank.accuracy_gain
    for name, gain in (("Accuracy", accuracy), ("Log-loss", found.by_rank.log_loss_gain)):
        console.print(
            f"{name}: LIP helped at {_ranks(gain.helped)}, hurt at {_ranks(gain.hurt)}, "
            f"made no clear difference at {_ranks(~(gain.helped | gain.hurt))}."
        )
    best = int(np.argmax(accuracy.mean))
    ratio = float(np.abs(found.sigma).sum() / np.sum(found.references["noisy head"].s))
    console.print(
        "Helped and hurt: by more than 2 paired standard errors. In hindsight, by the test labels, "
        f"the best accuracy is at rank {best} ({_signed(accuracy, best, unit=100, digits=1)} points); "
        "nothing here chooses a rank. Effective rank: exp of the spectrum's entropy.\n"
        f"Refitted at rank 0, the singular values sum to {ratio:.2g} of what they were: LIP fits one-hot "
        "targets, training fits logits. Far from 1, refitted components count for too little or too much "
        "beside kept ones.\n"
    )


def _ranks(where: Bool[Array, "ranks"]) -> str:
    """Where a mask over ranks holds: `ranks 0-3, 7`."""
    ranks = np.flatnonzero(where)
    if not ranks.size:
        return "no rank"
    runs = np.split(ranks, np.flatnonzero(np.diff(ranks) > 1) + 1)
    spans = [str(run[0]) if run.size == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' * (ranks.size > 1)} {', '.join(spans)}"
