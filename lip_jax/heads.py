"""Repairing the head inside a parameter tree.

A tree may be a linen `params` dict, a whole variables dict `{"params": …, "batch_stats": …}` (only its
parameters are searched), a `FrozenDict`, an `nnx.State`, an `nnx.Module`, or any pytree whose keys spell
a path such as `params/Dense_2/kernel`. What comes back has the same structure, types, dtypes and
sharding, and shares every leaf but the head's.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, PyTree

from lip_jax._checks import (
    all_finite,
    check_feats,
    check_floating,
    check_label_kind,
    describe,
    is_concrete,
    see,
)
from lip_jax._types import Feats, Labels, Rank, Scalar, Weights
from lip_jax.calibrate import refine_calibrated, refine_calibrated_from
from lip_jax.layers import AnyHead, kernel_and_bias, logit_readout
from lip_jax.moments import Moments, check_moments_kind, check_split_given
from lip_jax.readout import Solver
from lip_jax.refit import raise_if_ignored, refine_from, refit_kernel
from lip_jax.selection import DEFAULT_FAMILIES, Family, Metric, SelectionReport, select, select_seen
from lip_jax.spectral import SvdSplit
from lip_jax.tail import TailMoments
from lip_jax.trees import (
    Layout,
    Leaf,
    OpenedTree,
    as_matrix,
    bias_of,
    check_unaltered,
    find_head,
    from_matrix,
    open_tree,
    stored_like,
    ties_of,
    twins_of,
)

OneHead = str | Callable[[str, Any], bool] | None
HeadName = OneHead | Sequence[str]


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
    families: Sequence[str | Family] = DEFAULT_FAMILIES,
    metric: Metric = "accuracy",
    level: float | int = 3.0,
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
            heads, of kernel and bias. This and the options from `use_bias` to `rcond` go with `rank=` only.
        families: What to choose among, as in `lip_jax.select`. This, `metric` and `level` go without `rank=`.
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
        ValueError: If no kernel or several could be the head (all are listed), the kernel is tied, an option
            would have no effect, or as `lip_jax.refine` and `lip_jax.select`.

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
    families: Sequence[str | Family] = DEFAULT_FAMILIES,
    metric: Metric = "accuracy",
    level: float | int = 3.0,
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
    rows = [
        {
            what: _for_head(value, name, what)
            for what, value in {
                "feats": feats,
                "labels": labels,
                "weights": weights,
                "rank": rank,
                "validation": validation,
            }.items()
        }
        for name in names
    ]
    of_refit = {
        "method": method,
        "use_bias": use_bias,
        "ridge": ridge,
        "ridge_to": ridge_to,
        "rcond": rcond,
    }
    of_selection = {"families": tuple(families), "metric": metric, "level": float(level)}
    _refuse_without_effect(of_refit, of_selection, [given["rank"] is not None for given in rows])
    reports, changed = {}, {}
    for name, given in zip(names, rows, strict=True):
        check_floating(given["feats"], "feats", "n q")
        check_label_kind(given["labels"])
        found = _find(
            opened, name, layout, given["feats"].shape[1], given["labels"], num_classes, allow_tied=allow_tied
        )
        if found.leaf.path in changed:
            raise ValueError(f"head = {names} names the kernel {found.leaf.name} more than once.")
        try:
            if given["rank"] is None:
                kernel, bias, report = _select(found.kernel, found.bias, **given, **of_selection)
            elif given["validation"] is not None:
                raise ValueError("rank and validation exclude each other: rank= refits at that rank unasked.")
            else:
                kernel, bias, report = _refit(found.kernel, found.bias, found.leaf.name, **given, **of_refit)
        except ValueError as error:
            raise ValueError(f"head {found.leaf.name}: {error}") from None
        changed.update(_stored(opened, found, kernel, bias, layout))
        reports[name] = report
    return _rebuilt(opened, changed), reports if several else reports[names[0]]


def apply_from(
    params: PyTree,
    moments: Moments | TailMoments,
    rank: Rank,
    *,
    head: OneHead = None,
    num_classes: int | None = None,
    split: SvdSplit | None = None,
    method: Literal["published", "calibrated"] = "published",
    use_bias: bool = False,
    ridge: Scalar = 0.0,
    ridge_to: Literal["current", "zero"] = "current",
    rcond: Scalar | None = None,
    layout: Layout = "q l",
    allow_tied: bool = False,
) -> PyTree:
    """Refit the head inside a model's parameters from moments: `apply` with `rank=`, without rows.

    Args:
        params: The parameters, in any of the forms this module's docstring lists.
        moments: `Moments` of the inputs of the head and its labels, or `TailMoments` along its components, as
            `lip_jax.accumulate` takes them in one pass.
        rank: How many leading components are preserved, 0 to `min(q, l)`.
        head: A path or predicate as in `apply`; None: the only kernel of the moments' shape.
        num_classes: `l`, where the head is to be checked against it.
        split: The split that `TailMoments` were taken for.
        method: `"published"`, of the kernel alone, or `"calibrated"`, of kernel and bias.
        use_bias: For the published refit take `Y − b` for targets.
        ridge: `λ ≥ 0`.
        ridge_to: `"current"` or `"zero"`.
        rcond: Default `eps · max(q, l)`; 0 is the literal paper.
        layout: How the kernel is stored, as in `apply`.
        allow_tied: Refit a kernel that is also used elsewhere.

    Returns:
        New parameters in the structure, dtypes and sharding of the old ones; for an `nnx.Module`, a new
        module.

    Raises:
        ValueError: If no kernel or several could be the head (all are listed), the kernel is tied, or as
            `lip_jax.refine_from` and `lip_jax.refine_calibrated_from`.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> params = {"head": {"kernel": jnp.diag(jnp.array([3.0, 2.0]))}}
        >>> batches = [(jnp.eye(2), jnp.array([0, 1]))] * 3
        >>> moments = lip_jax.accumulate(lip_jax.moment_accumulator(q=2, l=2), batches)
        >>> lip_jax.apply_from(params, moments, rank=1)["head"]["kernel"].round(4).tolist()
        [[3.0, 0.0], [0.0, 1.0]]

    Reference:
        [si2025], the label inaccuracy processor.
    """
    opened = open_tree(params)
    check_moments_kind(moments)
    check_split_given(moments, split)
    q, l = cast(Moments, moments).cross.shape if split is None else (split.u.shape[0], split.vt.shape[1])
    num_classes = l if head is None and num_classes is None else num_classes
    found = _find(opened, head, layout, q, None, num_classes, allow_tied=allow_tied)
    options = {"split": split, "ridge": ridge, "rcond": rcond}
    try:
        if method == "calibrated":
            _refuse_published(ridge_to, use_bias)
            refit = refine_calibrated_from(found.kernel, found.bias, moments, rank, **options)
            kernel, bias = refit.kernel, refit.bias
        else:
            _check_published(method)
            bias = found.bias
            kernel = refine_from(
                found.kernel, moments, rank, bias=bias if use_bias else None, ridge_to=ridge_to, **options
            )
    except ValueError as error:
        raise ValueError(f"head {found.leaf.name}: {error}") from None
    return _rebuilt(opened, _stored(opened, found, kernel, bias, layout))


def replace_head(
    params: PyTree,
    readout: AnyHead,
    *,
    head: OneHead = None,
    num_classes: int | None = None,
    layout: Layout = "q l",
    allow_tied: bool = False,
) -> PyTree:
    """Put a readout in the place of the head: its kernel and its bias.

    Args:
        params: The parameters, in any of the forms this module's docstring lists.
        readout: A `lip_jax.Readout`, or anything else with a kernel `(q, l)` and a bias `(l,)` or None, such
            as a `lip_jax.Head` or a pair. Scores of a ridge readout are no logits: see `apply_readout`.
        head: A path or predicate as in `apply`; None: the only kernel of the readout's shape.
        num_classes: `l`, where the head is to be checked against it.
        layout: How the kernel is stored, as in `apply`.
        allow_tied: Replace a kernel that is also used elsewhere.

    Returns:
        New parameters in the structure, dtypes and sharding of the old ones; for an `nnx.Module`, a new
        module. A bias the readout lacks becomes 0.

    Raises:
        ValueError: If no kernel or several could be the head (all are listed), the kernel is tied, the
            shapes differ, or the readout has a bias that is not 0, or under `jit` cannot be seen to be, and
            the head has none.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> params = {"head": {"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)}}
        >>> replaced = lip_jax.replace_head(params, (jnp.eye(8, 3), None))
        >>> float(replaced["head"]["kernel"].sum()), float(replaced["head"]["bias"].sum())
        (3.0, 0.0)

    Reference:
        [li2020], a linear model in the place of the last layer.
    """
    opened = open_tree(params)
    kernel, bias = kernel_and_bias(readout)
    q, l = kernel.shape
    found = _find(
        opened, head, layout, q, None, l if head is None and num_classes is None else num_classes,
        allow_tied=allow_tied,
    )  # fmt: skip
    if found.kernel.shape != (q, l):
        raise ValueError(
            f"the readout's kernel must have the shape of the head {found.leaf.name}, (q, l) = "
            f"{found.kernel.shape}; got {describe(kernel)}. Fit it to the inputs of this head "
            f"(lip_jax.capture_features), with num_classes={found.kernel.shape[1]}."
        )
    if bias is None and found.bias is not None:
        bias = jnp.zeros_like(found.bias)
    elif bias is not None and found.bias is None:
        if not is_concrete(bias) or see(lambda: (jnp.asarray(bias) != 0).any()):
            raise ValueError(
                f"the readout has a bias, but the head {found.leaf.name} has none to hold it. Fit the "
                f"readout without: lip_jax.linear_readout(..., intercept=False)."
            )
        bias = None
    return _replaced(opened, found, kernel, bias, layout)


def apply_readout(
    params: PyTree,
    feats: Feats,
    labels: Labels,
    *,
    head: OneHead = None,
    num_classes: int | None = None,
    solver: Solver = "ridge",
    ridge: Scalar | None = None,
    weights: Weights | None = None,
    layout: Layout = "q l",
    allow_tied: bool = False,
) -> PyTree:
    """The clean readout: the head replaced by a linear model learned on its inputs.

    `lip_jax.linear_readout`, with an intercept where the head has a bias. The scores of a ridge readout are
    scaled to logits, `a · kernel`, `a · bias`, by the `lip_jax.fit_logit_scale` of its leave-one-out scores.
    The head is replaced whatever comes of it: `apply` with `validation=` does so only where that is better.

    Works inside `jax.jit`, with the head named or `num_classes` given.

    Args:
        params: The parameters, in any of the forms this module's docstring lists.
        feats: Inputs of the head `(n, q)`, as `lip_jax.capture_features` gives them.
        labels: Class ids `(n,)` or targets `(n, l)` (`lip_jax.labels`), which should be clean.
        head: A path or predicate as in `apply`; None: the only kernel of shape `(q, l)`, with `l` from
            `num_classes`, the width of targets, or the largest id plus one.
        num_classes: `l`, needed under `jit` where `head` is None and labels are ids.
        solver: `"ridge"` or `"logistic"`.
        ridge: `λ ≥ 0`; None: as `lip_jax.linear_readout` chooses it.
        weights: Weight of each row `(n,)`.
        layout: How the kernel is stored, as in `apply`.
        allow_tied: Replace a kernel that is also used elsewhere.

    Returns:
        New parameters; for an `nnx.Module`, a new module.

    Raises:
        ValueError: If no kernel or several could be the head (all are listed), the kernel is tied, or as
            `lip_jax.linear_readout`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> labels = jnp.arange(300) % 3
        >>> feats = jax.random.normal(jax.random.key(0), (300, 8)).at[jnp.arange(300), labels].add(3.0)
        >>> params = {"head": {"kernel": jnp.ones((8, 3)), "bias": jnp.zeros(3)}}
        >>> head = lip_jax.apply_readout(params, feats, labels)["head"]
        >>> float(lip_jax.head_metrics(feats @ head["kernel"] + head["bias"][None, :], labels).accuracy) > 0.9
        True

    Reference:
        [li2020], a linear model in the place of the last layer.
    """
    opened = open_tree(params)
    check_floating(feats, "feats", "n q")
    check_label_kind(labels)
    found = _find(opened, head, layout, feats.shape[1], labels, num_classes, allow_tied=allow_tied)
    try:
        check_feats(feats, found.kernel.shape[0])
        readout = logit_readout(
            feats,
            labels,
            num_classes=found.kernel.shape[1],
            solver=solver,
            ridge=ridge,
            weights=weights,
            intercept=found.bias is not None,
        )
    except ValueError as error:
        raise ValueError(f"head {found.leaf.name}: {error}") from None
    return _replaced(opened, found, readout.kernel, readout.bias, layout)


class _Found(NamedTuple):
    """One head of an opened tree: its leaves, and what they hold as `(q, l)` and `(l,)`."""

    leaf: Leaf
    bias_leaf: Leaf | None
    kernel: jax.Array
    bias: jax.Array | None


def _find(opened: OpenedTree, head, layout, q, labels, num_classes, *, allow_tied: bool) -> _Found:
    leaf = find_head(opened.leaves, head, layout, q, labels, num_classes)
    check_unaltered(opened.leaves, leaf)
    ties = ties_of(opened, leaf)
    if ties and not allow_tied:
        raise ValueError(
            f"the head's kernel {leaf.name} is tied: {ties}, so changing it would change more than the "
            f"head. Untie it, or pass allow_tied=True if that is meant."
        )
    kernel = as_matrix(jnp.asarray(leaf.value), layout)
    bias_leaf = bias_of(opened.leaves, leaf, kernel.shape[1])
    bias = None if bias_leaf is None else jnp.asarray(bias_leaf.value).reshape(-1)
    return _Found(leaf, bias_leaf, kernel, bias)


def _stored(opened: OpenedTree, found: _Found, kernel, bias, layout: Layout) -> dict[tuple[str, ...], Any]:
    """New values by path: the kernel, wherever it stands, and the bias if both sides have one."""
    stored = stored_like(from_matrix(kernel, found.leaf.value.shape, layout), found.leaf.value)
    changed = {twin.path: stored for twin in twins_of(opened.leaves, found.leaf)}
    if found.bias_leaf is not None and bias is not None:
        value = found.bias_leaf.value
        changed[found.bias_leaf.path] = stored_like(bias.reshape(value.shape), value)
    for value in changed.values():
        if is_concrete(value) and not see(lambda value=value: all_finite(value)):
            raise ValueError(
                f"the new head must be finite in the dtype of {found.leaf.name}; got values beyond the range "
                f"of {value.dtype}. Store the head in bfloat16 or float32."
            )
    return changed


def _replaced(opened: OpenedTree, found: _Found, kernel, bias, layout: Layout) -> PyTree:
    return _rebuilt(opened, _stored(opened, found, kernel, bias, layout))


def _rebuilt(opened: OpenedTree, changed: dict[tuple[str, ...], Any]) -> PyTree:
    return opened.rebuild([changed.get(leaf.path, leaf.value) for leaf in opened.leaves])


def _refuse_without_effect(of_refit: dict, of_selection: dict, with_rank: list[bool]) -> None:
    """An option that would be ignored is refused: whoever gave it expects something of it."""
    given = _not_default(of_refit)
    if given and not any(with_rank):
        raise ValueError(
            f"{', '.join(given)}: belongs to a refit at a given rank, and there is none. Pass rank= with it, "
            f"or leave it out: without a rank, families, metric and level say what is chosen."
        )
    given = _not_default(of_selection)
    if given and all(with_rank):
        raise ValueError(
            f"{', '.join(given)}: belongs to the choice among heads, and rank= makes one refit unasked. "
            f"Leave out rank=, with or without validation=, or leave this out."
        )


def _not_default(options: dict[str, Any]) -> list[str]:
    defaults = inspect.signature(apply).parameters
    return [
        name
        for name, value in options.items()
        # An array may be traced, so that its value cannot be compared.
        if isinstance(value, jax.Array) or value != defaults[name].default
    ]


def _refit(
    kernel, bias, path, *, feats, labels, weights, rank, validation, method, use_bias, ridge, ridge_to, rcond
) -> tuple[jax.Array, jax.Array | None, HeadReport]:
    """Exactly the refit that was asked for."""
    if method == "calibrated":
        _refuse_published(ridge_to, use_bias)
        head = refine_calibrated(kernel, bias, feats, labels, rank, weights=weights, ridge=ridge, rcond=rcond)
        report = HeadReport(path, kernel.shape, rank, head.s, head.sigma, head.ignored)
        return head.kernel, head.bias, report
    _check_published(method)
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


def _refuse_published(ridge_to: str, use_bias: bool) -> None:
    if ridge_to != "current" or use_bias:
        raise ValueError("ridge_to='zero' and use_bias belong to method='published'; leave them out.")


def _check_published(method: str) -> None:
    if method != "published":
        raise ValueError(f"method must be 'published' or 'calibrated'; got {method!r}.")


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
