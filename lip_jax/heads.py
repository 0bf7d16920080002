"""Repairing the head inside a parameter tree.

A tree may be a linen `params` dict, a whole variables dict `{"params": …, "batch_stats": …}` (only its
parameters are searched), a `FrozenDict`, an `nnx.State`, an `nnx.Module`, or any pytree whose keys spell
a path such as `params/Dense_2/kernel`. What comes back has the same structure, types, dtypes and
sharding, and shares every leaf but the head's.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, PyTree

from lip_jax._checks import check_floating, check_label_kind, is_concrete
from lip_jax._types import Feats, Labels, Rank, Scalar, Weights
from lip_jax.calibrate import refine_calibrated
from lip_jax.refit import raise_if_ignored, refit_kernel
from lip_jax.selection import Family, Metric, SelectionReport, select, select_seen
from lip_jax.trees import (
    Layout,
    as_matrix,
    bias_of,
    find_head,
    from_matrix,
    open_tree,
    stored_like,
    ties_of,
    twins_of,
)

HeadName = str | Sequence[str] | Callable[[str, Any], bool] | None


@dataclass(frozen=True)
class HeadReport:
    """What a refit at a given rank did to one head.

    Attributes:
        path: Where its kernel is, such as `params/head/kernel`.
        shape: `(q, l)`.
        rank: How many leading components were preserved.
        s: Singular values before, `(r,)`.
        sigma: Singular values after, in the order of `s`, `(r,)`.
        ignored: How many rows could not be used (see `lip_jax.labels`); 0 outside `jit`.
    """

    path: str
    shape: tuple[int, int]
    rank: Rank
    s: Float[jax.Array, "r"]
    sigma: Float[jax.Array, "r"]
    ignored: Int[jax.Array, ""]

    def __str__(self) -> str:
        change = float(jnp.linalg.norm(self.sigma - self.s) / jnp.maximum(jnp.linalg.norm(self.s), 1e-30))
        return (
            f"{self.path} {self.shape}: {int(self.rank)} of {self.s.shape[0]} components preserved, "
            f"the rest refitted; relative change of the kernel {change:.3g}"
        )


jax.tree_util.register_dataclass(
    HeadReport, data_fields=("rank", "s", "sigma", "ignored"), meta_fields=("path", "shape")
)


Report = HeadReport | SelectionReport


def apply(
    params: PyTree,
    feats: Feats | Mapping[str, Feats],
    labels: Labels | Mapping[str, Labels],
    *,
    rank: Rank | Mapping[str, Rank] | None = None,
    validation: tuple | Mapping[str, tuple] | None = None,
    head: HeadName = None,
    num_classes: int | None = None,
    weights: Weights | Mapping[str, Weights] | None = None,
    method: Literal["published", "calibrated"] = "published",
    families: Sequence[str | Family] = ("published", "calibrated", "ridge"),
    metric: Metric = "accuracy",
    level: float = 3.0,
    use_bias: bool = False,
    ridge: Scalar = 0.0,
    ridge_to: Literal["current", "zero"] = "current",
    rcond: Scalar | None = None,
    layout: Layout = "q l",
    allow_tied: bool = False,
) -> PyTree:
    """Repair the head inside a model's parameters, or leave it as it is where that is better.

    - With `validation=`, `lip_jax.select` chooses among refits, readouts and the head as it came, by labels
      the head has not seen. This is the way to use it.
    - With `rank=`, exactly that refit is made: `lip_jax.refine`, or with `method="calibrated"`
      `lip_jax.refine_calibrated`.
    - With neither, only readouts are tried, as refits keep directions that have seen these rows: fitted on
      one half and judged on the other, where the head is favoured. If it agrees with those labels far more
      than a readout that has not seen them, they look memorised: the head comes back unchanged, with a
      warning. Deterministic, and conservative: mostly the head comes back as it was.

    Where the body of the network memorised its training labels, pass rows held out from it for `feats` and
    `labels` too. Works inside `jax.jit`, with the head named or `num_classes` given; there the report tells
    what the warning would.

    Args:
        params: The parameters, in any of the forms this module's docstring lists.
        feats: Inputs of the head `(n, q)`, as `lip_jax.capture_features` gives them. With several
            heads: one array for all, or a mapping from the names in `head` to arrays.
        labels: Class ids `(n,)` or targets `(n, l)` (`lip_jax.labels`); for several heads as `feats`.
        rank: How many leading components are preserved, 0 to `min(q, l)`; for several heads as `feats`.
        validation: `(feats, labels)` or `(feats, labels, weights)` to choose by; for several heads as
            `feats`.
        head: A path to the head, with or without the leading `params/` and the leaf's name (`"Dense_2"`,
            `"params/head/kernel"`); several paths; or a predicate `(path, leaf) -> bool` that holds for
            one leaf. None: the only kernel of shape `(q, l)`, with `l` from `num_classes`, the width of
            targets, or the largest id plus one.
        num_classes: `l`, needed under `jit` where `head` is None and labels are ids.
        weights: Weight of each row `(n,)`; for several heads as `feats`.
        method: Which refit `rank=` makes: the paper's, of the kernel alone, or the calibrated one for softmax
            heads, of kernel and bias.
        families: What to choose among, as in `lip_jax.select`.
        metric: By which metric, as in `lip_jax.select`.
        level: By how many standard errors, as in `lip_jax.select`.
        use_bias: For the published refit take `Y − b` for targets, with `b` the head's bias if it has one,
            which itself is not changed. False is the strict paper.
        ridge: `λ ≥ 0`, as in `lip_jax.solve_tail_sigma`.
        ridge_to: `"current"` or `"zero"`.
        rcond: Default `eps · max(q, l)`; 0 is the literal paper.
        layout: How the kernel is stored: `"q l"` (Flax), `"l q"` (transposed), `"q ..."` or `"... q"`
            (several output axes, taken as one of `l` outputs).
        allow_tied: Refit a kernel that is also used elsewhere (an embedding, a shared parameter).

    Returns:
        New parameters; for an `nnx.Module`, a new module.

    Raises:
        ValueError: If no kernel or several could be the head (all are listed), the kernel is tied, or
            as `lip_jax.refine` and `lip_jax.select`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> params = {"hidden": {"kernel": jnp.ones((4, 8))}, "head": {"kernel": jnp.eye(8, 3)}}
        >>> feats, labels = jax.random.normal(jax.random.key(0), (100, 8)), jnp.arange(100) % 3
        >>> repaired = lip_jax.apply(params, feats, labels, rank=2)
        >>> [bool(jnp.array_equal(repaired[name]["kernel"], params[name]["kernel"])) for name in params]
        [True, False]

    Reference:
        [si2025], the label inaccuracy processor; [li2020], readouts.
    """
    repaired, _ = apply_with_report(
        params,
        feats,
        labels,
        rank=rank,
        validation=validation,
        head=head,
        num_classes=num_classes,
        weights=weights,
        method=method,
        families=families,
        metric=metric,
        level=level,
        use_bias=use_bias,
        ridge=ridge,
        ridge_to=ridge_to,
        rcond=rcond,
        layout=layout,
        allow_tied=allow_tied,
    )
    return repaired


def apply_with_report(
    params: PyTree,
    feats: Feats | Mapping[str, Feats],
    labels: Labels | Mapping[str, Labels],
    *,
    rank: Rank | Mapping[str, Rank] | None = None,
    validation: tuple | Mapping[str, tuple] | None = None,
    head: HeadName = None,
    num_classes: int | None = None,
    weights: Weights | Mapping[str, Weights] | None = None,
    method: Literal["published", "calibrated"] = "published",
    families: Sequence[str | Family] = ("published", "calibrated", "ridge"),
    metric: Metric = "accuracy",
    level: float = 3.0,
    use_bias: bool = False,
    ridge: Scalar = 0.0,
    ridge_to: Literal["current", "zero"] = "current",
    rcond: Scalar | None = None,
    layout: Layout = "q l",
    allow_tied: bool = False,
) -> tuple[PyTree, Report | dict[str, Report]]:
    """`apply`, and a report of what was done: `(params, report)`.

    Args:
        params: As in `apply`, and so are all arguments below.
        feats: Inputs of the head `(n, q)`.
        labels: Class ids `(n,)` or targets `(n, l)`.
        rank: How many leading components are preserved.
        validation: Rows to choose by.
        head: A path, several, a predicate, or None.
        num_classes: `l`.
        weights: Weight of each row `(n,)`.
        method: Which refit `rank=` makes.
        families: What to choose among.
        metric: By which metric.
        level: By how many standard errors.
        use_bias: Take `Y − b` for targets.
        ridge: `λ ≥ 0`.
        ridge_to: `"current"` or `"zero"`.
        rcond: Default `eps · max(q, l)`.
        layout: How the kernel is stored.
        allow_tied: Refit a kernel that is also used elsewhere.

    Returns:
        New parameters and a report: a `HeadReport` for `rank=`, else a `SelectionReport`; where `head` is a
        sequence, a dict of reports by name.

    Raises:
        ValueError: As `apply`.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> params = {"head": {"kernel": jnp.diag(jnp.array([3.0, 2.0]))}}
        >>> _, report = lip_jax.apply_with_report(params, jnp.eye(2), jnp.array([0, 1]), rank=1)
        >>> print(report)
        head/kernel (2, 2): 1 of 2 components preserved, the rest refitted; relative change of the
        kernel 0.277

    Reference:
        [si2025], the label inaccuracy processor.
    """
    opened = open_tree(params)
    several = isinstance(head, Sequence) and not isinstance(head, str)
    names = list(head) if isinstance(head, Sequence) and not isinstance(head, str) else [head]
    reports, changed = {}, {}
    for name in names:
        given = {
            what: _for_head(value, name, what)
            for what, value in {
                "feats": feats,
                "labels": labels,
                "weights": weights,
                "rank": rank,
                "validation": validation,
            }.items()
        }
        check_floating(given["feats"], "feats", "n q")
        check_label_kind(given["labels"])
        leaf = find_head(opened.leaves, name, layout, given["feats"], given["labels"], num_classes)
        ties = ties_of(opened, leaf)
        if ties and not allow_tied:
            raise ValueError(
                f"the head's kernel {leaf.name} is tied: {ties}, so refitting it would change more than the "
                f"head. Untie it, or pass allow_tied=True if that is meant."
            )
        if leaf.path in changed:
            raise ValueError(f"head = {names} names the kernel {leaf.name} more than once.")
        kernel = as_matrix(jnp.asarray(leaf.value), layout)
        bias_leaf = bias_of(opened.leaves, leaf, kernel.shape[1])
        bias = None if bias_leaf is None else jnp.asarray(bias_leaf.value).reshape(-1)
        try:
            if given["rank"] is None:
                kernel, bias, report = _select(
                    kernel, bias, **given, families=families, metric=metric, level=level
                )
            elif given["validation"] is not None:
                raise ValueError("rank and validation exclude each other: rank= refits at that rank unasked.")
            else:
                kernel, bias, report = _refit(
                    kernel, bias, leaf.name, **given, method=method, use_bias=use_bias,
                    ridge=ridge, ridge_to=ridge_to, rcond=rcond,
                )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"head {leaf.name}: {error}") from None
        stored = stored_like(from_matrix(kernel, leaf.value.shape, layout), leaf.value)
        changed.update({twin.path: stored for twin in twins_of(opened.leaves, leaf)})
        if bias_leaf is not None and bias is not None:
            changed[bias_leaf.path] = stored_like(bias.reshape(bias_leaf.value.shape), bias_leaf.value)
        reports[name] = report
    repaired = opened.rebuild([changed.get(leaf.path, leaf.value) for leaf in opened.leaves])
    return repaired, reports if several else reports[names[0]]


def _refit(
    kernel, bias, path, *, feats, labels, weights, rank, validation, method, use_bias, ridge, ridge_to, rcond
) -> tuple[jax.Array, jax.Array | None, HeadReport]:
    """Exactly the refit that was asked for."""
    if method == "calibrated":
        if ridge_to != "current" or use_bias:
            raise ValueError("ridge_to='zero' and use_bias belong to method='published'; leave them out.")
        head = refine_calibrated(kernel, bias, feats, labels, rank, weights=weights, ridge=ridge, rcond=rcond)
        report = HeadReport(path, kernel.shape, rank, head.s, head.sigma, head.ignored)
        return head.kernel, head.bias, report
    if method != "published":
        raise ValueError(f"method must be 'published' or 'calibrated'; got {method!r}.")
    refit = refit_kernel(
        kernel,
        feats,
        labels,
        rank,
        weights=weights,
        bias=bias if use_bias else None,
        ridge=ridge,
        ridge_to=ridge_to,
        rcond=rcond,
    )
    raise_if_ignored(refit.ignored, feats, labels, weights, kernel.shape[1])
    return refit.kernel, bias, HeadReport(path, kernel.shape, rank, refit.s, refit.sigma, refit.ignored)


def _select(
    kernel, bias, *, feats, labels, weights, rank, validation, families, metric, level
) -> tuple[jax.Array, jax.Array | None, SelectionReport]:
    """The choice by validation rows, or the default without any."""
    if validation is not None:
        chosen = select(
            kernel,
            bias,
            feats,
            labels,
            validation=validation,
            weights=weights,
            families=families,
            metric=metric,
            level=level,
        )
        return chosen.kernel, chosen.bias, chosen.report
    chosen = select_seen(
        kernel, bias, feats, labels, weights=weights, families=families, metric=metric, level=level
    )
    if is_concrete(chosen.report.memorised) and bool(chosen.report.memorised):
        warnings.warn(
            "the head agrees with these labels far more than a readout that has not seen them: it has "
            "memorised them, so they cannot tell what would repair it. It is returned unchanged. Pass "
            "validation=(feats, labels) of rows it was not trained on; their labels may be noisy.",
            stacklevel=4,
        )
    return chosen.kernel, chosen.bias, chosen.report


def _for_head(value: Any, name: Any, what: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    if name not in value:
        raise ValueError(
            f"{what} is a mapping by head name and lacks {name!r}; it holds {sorted(value)}. "
            f"Its keys must be the names given in head=."
        )
    return value[name]
