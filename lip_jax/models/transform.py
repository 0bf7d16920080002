"""Repairing the head inside a parameter tree: the lens for heads around a method, or around a choice."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, PyTree

from lip_jax._checks import check_floating, is_concrete
from lip_jax._results import STATIC, ShortRepr
from lip_jax._types import Feats, Labels, Rank, Scalar, Weights
from lip_jax.choice.compare import Choice, choose, choose_strength
from lip_jax.choice.report import SelectionReport
from lip_jax.methods.calibrated import Calibrated
from lip_jax.methods.protocol import (
    Fit,
    Head,
    Method,
    Settled,
    check_made,
    check_method,
    is_refit,
    name_of,
    needs_of,
    path_of,
    prepare,
)
from lip_jax.methods.published import Published
from lip_jax.methods.ridge import Ridge
from lip_jax.models.lens import AnyHead, HeadLens, HeadName, OneHead, as_head, check_fits, head_lens
from lip_jax.models.trees import Layout
from lip_jax.numerics import linalg
from lip_jax.rows.checks import (
    check_label_kind,
    check_rows,
    check_several_classes,
    check_shares,
    raise_if_ignored,
)
from lip_jax.rows.labels import Rows, as_rows
from lip_jax.spectrum.split import SvdSplit
from lip_jax.sums.moments import Moments, check_moments_kind, check_split_given
from lip_jax.sums.tail import TailMoments


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class HeadReport(ShortRepr):
    """What a method that was asked for did to one head.

    Attributes:
        path: Where its kernel is, such as `params/head/kernel`.
        shape: `(q, l)`.
        method: The name of the method.
        refit: Whether it is a refit, whose strength is a rank.
        strength: The rank, or the ridge `λ`.
        change: `‖W' − W‖_F / ‖W‖_F`; infinite for a head of zeros that is none any more.
        ignored: How many rows could not be used (see `lip_jax.rows`); 0 outside `jit`.
        s: Singular values that a refit found, `(r,)`; for a calibrated one without the mean over classes.
        sigma: Singular values it left, in the order of `s`, `(r,)`.
    """

    path: str = field(metadata=STATIC)
    shape: tuple[int, int] = field(metadata=STATIC)
    method: str = field(metadata=STATIC)
    refit: bool = field(metadata=STATIC)
    strength: Scalar
    change: Float[jax.Array, ""]
    ignored: Int[jax.Array, ""]
    s: Float[jax.Array, "r"] | None
    sigma: Float[jax.Array, "r"] | None

    def __str__(self) -> str:
        strength = float(self.strength)
        done = f"the method {self.method} took its place"
        if not self.refit and not math.isnan(strength):
            done = f"a {self.method} readout of strength {strength:.3g} took its place"
        elif self.refit and self.s is not None:
            # What a refit of the package leaves is a spectrum. A user's own may have another strength.
            done = (
                f"{int(self.strength)} of {min(self.shape)} components preserved, the rest refitted as "
                f"{self.method}"
            )
        return f"{self.path} {self.shape}: {done}; relative change of the kernel {float(self.change):.3g}"


Report = HeadReport | SelectionReport


def apply(
    params: PyTree,
    feats: Feats | Mapping[str, Feats],
    labels: Labels | Mapping[str, Labels],
    *,
    method: Method | Choice | None = None,
    rank: Rank | Mapping[str, Rank] | None = None,
    validation: tuple | Mapping[str, tuple] | None = None,
    seen: bool = True,
    head: HeadName = None,
    num_classes: int | None = None,
    weights: Weights | Mapping[str, Weights] | None = None,
    layout: Layout = "q l",
    allow_tied: bool = False,
) -> PyTree:
    """Repair the head inside a model's parameters, or leave it as it is where that is better.

    - With `validation=`, `lip_jax.select` chooses among refits, readouts, their blends with the head and the
      head as it came, by labels the head has not seen.
    - With `seen=False`, neither the head nor its body was trained on `feats`: they need no second set, as
      each of 5 folds judges what was fitted to the others.
    - With neither, `lip_jax.select` judges a readout of `feats` that resembles the head in its place. Where
      there is none, or the body memorised these labels, the head comes back as it was, with a warning.
    - With `rank=k`, exactly that refit is made: `method=Published(rank=k)`, which is `lip_jax.refine`.
    - With `method=`, exactly that is done; `validation=` chooses the rank or strength that it leaves open.

    Where the body of the network memorised its training labels, pass rows held out from it for `feats` and
    `labels` too. Works inside `jax.jit`, with the head named or `num_classes` given; there the report tells
    what the warning would.

    Args:
        params: The parameters, in any of the forms that `lip_jax.models` lists.
        feats: Inputs of the head `(n, q)`, as `lip_jax.capture_features` gives them. With several heads: one
            array for all, or a mapping from the names in `head` to arrays.
        labels: Class ids `(n,)` or targets `(n, l)` (`lip_jax.rows`); for several heads as `feats`.
        method: A method, such as `lip_jax.Calibrated(rank=2)` or `lip_jax.Ridge()`, applied unasked; or a
            `lip_jax.Choice(methods=…, metric=…)`.
        rank: The rank of the method, of `Published()` if none is given; for several heads as `feats`.
        validation: `(feats, labels)` or `(feats, labels, weights)` to choose by; for several heads as
            `feats`.
        seen: Whether the head or its body was trained on `feats`. A choice without `validation=` hangs on it.
        head: A path to the head, with or without the leading `params/` and the leaf's name (`"Dense_2"`,
            `"params/head/kernel"`); several paths; or a predicate `(path, leaf) -> bool` that holds for
            one leaf. None: the only kernel of shape `(q, l)`, with `l` from `num_classes`, the width of
            targets, or the largest id plus one.
        num_classes: `l`, needed under `jit` where `head` is None and labels are ids.
        weights: Weight of each row `(n,)`; for several heads as `feats`.
        layout: How the kernel is stored: `"q l"` (Flax), `"l q"` (transposed), `"q ..."` or `"... q"`
            (several output axes, taken as one of `l` outputs).
        allow_tied: Change a kernel that is also used elsewhere (an embedding, a shared parameter). Under
            `jit` only the leaf that is found is changed: whether another holds the same array is not known.

    Returns:
        New parameters; for an `nnx.Module`, a new module.

    Raises:
        ValueError: If no kernel or several could be the head (all are listed), the kernel is tied, or may be
            under `jit`, arguments exclude each other, or as the method and `lip_jax.select`.

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
    given = (method, rank, validation, seen, head, num_classes, weights, layout, allow_tied)
    return _repaired(params, feats, labels, *given)[0]


def apply_with_report(
    params: PyTree,
    feats: Feats | Mapping[str, Feats],
    labels: Labels | Mapping[str, Labels],
    *,
    method: Method | Choice | None = None,
    rank: Rank | Mapping[str, Rank] | None = None,
    validation: tuple | Mapping[str, tuple] | None = None,
    seen: bool = True,
    head: HeadName = None,
    num_classes: int | None = None,
    weights: Weights | Mapping[str, Weights] | None = None,
    layout: Layout = "q l",
    allow_tied: bool = False,
) -> tuple[PyTree, Report | dict[str, Report]]:
    """`apply`, and a report of what was done: `(params, report)`.

    Args:
        params: As in `apply`, and so are all arguments below.
        feats: Inputs of the head `(n, q)`.
        labels: Class ids `(n,)` or targets `(n, l)`.
        method: A method or a choice.
        rank: The rank of the method.
        validation: Rows to choose by.
        seen: Whether the head or its body was trained on `feats`.
        head: A path, several, a predicate, or None.
        num_classes: `l`.
        weights: Weight of each row `(n,)`.
        layout: How the kernel is stored.
        allow_tied: Change a kernel that is also used elsewhere.

    Returns:
        New parameters and a report: a `lip_jax.models.HeadReport` for a method, a
        `lip_jax.choice.SelectionReport` for a choice; where `head` is a sequence, a dict of reports by name.

    Raises:
        ValueError: As `apply`.

    Example:
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> params = {"head": {"kernel": jnp.diag(jnp.array([3.0, 2.0]))}}
        >>> _, report = lip_jax.apply_with_report(params, jnp.eye(2), jnp.array([0, 1]), rank=1)
        >>> print(report)
        head/kernel (2, 2): 1 of 2 components preserved, the rest refitted as published; relative change of
        the kernel 0.277

    Reference:
        [si2025], the label inaccuracy processor.
    """
    given = (method, rank, validation, seen, head, num_classes, weights, layout, allow_tied)
    return _repaired(params, feats, labels, *given)


def apply_from(
    params: PyTree,
    moments: Moments | TailMoments,
    *,
    method: Method | None = None,
    rank: Rank | None = None,
    split: SvdSplit | None = None,
    head: OneHead = None,
    num_classes: int | None = None,
    layout: Layout = "q l",
    allow_tied: bool = False,
) -> PyTree:
    """Apply a method to the head inside a model's parameters from moments: `apply` without rows.

    Args:
        params: The parameters, in any of the forms that `lip_jax.models` lists.
        moments: `Moments` of the inputs of the head and its labels, or `TailMoments` along its components, as
            `lip_jax.accumulate` takes them in one pass.
        method: `Published` or `Calibrated`. None: `Published()`.
        rank: The rank of a refit, as in `apply`.
        split: The split that `TailMoments` were taken for.
        head: A path or predicate as in `apply`; None: the only kernel of the moments' shape.
        num_classes: `l`, where the head is to be checked against it.
        layout: How the kernel is stored, as in `apply`.
        allow_tied: Change a kernel that is also used elsewhere.

    Returns:
        New parameters in the structure, dtypes and sharding of the old ones; for an `nnx.Module`, a new
        module.

    Raises:
        ValueError: If no kernel or several could be the head (all are listed), the kernel is tied, the method
            needs rows, or as the method.

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
    check_moments_kind(moments)
    method = Published() if method is None else method
    asked = _at_rank(method, rank)
    from_moments = getattr(asked, "from_moments", None)
    if from_moments is None:
        raise ValueError(
            f"the method {name_of(method)} looks at every row, and moments hold none. Use lip_jax.Published "
            f"or lip_jax.Calibrated, or put lip_jax.linear_readout_from(…) into the model with "
            f"lip_jax.replace_head."
        )
    check_split_given(moments, split)
    if isinstance(moments, Moments):
        q, l = moments.cross.shape
    elif split is not None:
        q, l = split.u.shape[0], split.vt.shape[1]
    else:
        q, l = None, num_classes
    num_classes = l if head is None and num_classes is None else num_classes
    lens = head_lens(params, head, q=q, num_classes=num_classes, layout=layout, allow_tied=allow_tied)
    with lens.named():
        return lens.put(from_moments(lens.head, moments, split).head)


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
        params: The parameters, in any of the forms that `lip_jax.models` lists.
        readout: What any readout function, `lip_jax.select` or `lip_jax.refine_calibrated` returns, or a pair
            of kernel `(q, l)` and bias `(l,)` or None, such as a `lip_jax.Head`.
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
    kernel, bias = as_head(readout)
    q, l = kernel.shape
    num_classes = l if head is None and num_classes is None else num_classes
    lens = head_lens(params, head, q=q, num_classes=num_classes, layout=layout, allow_tied=allow_tied)
    return lens.put(check_fits(kernel, bias, lens))


def apply_readout(
    params: PyTree,
    feats: Feats,
    labels: Labels,
    *,
    method: Method | None = None,
    head: OneHead = None,
    num_classes: int | None = None,
    weights: Weights | None = None,
    layout: Layout = "q l",
    allow_tied: bool = False,
) -> PyTree:
    """The clean readout: the head replaced by a linear model learned on its inputs.

    The head is replaced whatever comes of it: `apply` with `validation=` does so only where that is better.
    The readout has an intercept where the head has a bias, and gives logits. Works inside `jax.jit`, with the
    head named or `num_classes` given.

    Args:
        params: The parameters, in any of the forms that `lip_jax.models` lists.
        feats: Inputs of the head `(n, q)`, as `lip_jax.capture_features` gives them.
        labels: Class ids `(n,)` or targets `(n, l)` (`lip_jax.rows`), which should be clean.
        method: `lip_jax.Ridge()`, which is the default, `Logistic()`, `Purified()`, or another readout.
        head: A path or predicate as in `apply`; None: the only kernel of shape `(q, l)`, with `l` from
            `num_classes`, the width of targets, or the largest id plus one.
        num_classes: `l`, needed under `jit` where `head` is None and labels are ids.
        weights: Weight of each row `(n,)`.
        layout: How the kernel is stored, as in `apply`.
        allow_tied: Replace a kernel that is also used elsewhere.

    Returns:
        New parameters; for an `nnx.Module`, a new module.

    Raises:
        ValueError: If no kernel or several could be the head (all are listed), the kernel is tied, the method
            is a refit, or as `lip_jax.linear_readout`.

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
    method = Ridge() if method is None else method
    if is_refit(method):
        raise ValueError(
            f"method must be a readout, such as lip_jax.Ridge(); {name_of(method)} is a refit, which keeps "
            f"directions of the head. lip_jax.apply applies it."
        )
    if isinstance(method, Choice):
        raise ValueError(
            "method must be one readout, such as lip_jax.Ridge(), as the head is replaced unasked; got a "
            "lip_jax.Choice. lip_jax.apply makes the choice."
        )
    given = (method, None, None, True, head, num_classes, weights, layout, allow_tied)
    return _repaired(params, feats, labels, *given)[0]


def _repaired(
    params: PyTree,
    feats: Any,
    labels: Any,
    method: Any,
    rank: Any,
    validation: Any,
    seen: bool,
    head: Any,
    num_classes: int | None,
    weights: Any,
    layout: Layout,
    allow_tied: bool,
) -> tuple[PyTree, Any]:
    """Each head in turn: find it, repair it, put it back."""
    several = isinstance(head, Sequence) and not isinstance(head, str)
    reports, paths = {}, []
    names: list[Any] = list(head) if several else [head]
    for name in names:
        rows = Rows(
            *(_for_head(*each, name) for each in (("feats", feats), ("labels", labels), ("weights", weights)))
        )
        check_floating(rows.feats, "feats", "n q")
        check_label_kind(rows.labels)
        lens = head_lens(
            params, name, q=rows.feats.shape[1], labels=rows.labels, num_classes=num_classes, layout=layout,
            allow_tied=allow_tied,
        )  # fmt: skip
        if lens.name in paths:
            raise ValueError(f"head = {list(head)} names the kernel {lens.name} more than once.")
        paths.append(lens.name)
        with lens.named():
            asked = _at_rank(method, _for_head("rank", rank, name))
            held = _for_head("validation", validation, name)
            repaired, reports[name] = _repair(lens, rows, asked, held, seen)
            params = lens.put(repaired)
    return params, reports if several else reports[head]


def _for_head(what: str, value: Any, name: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if name not in value:
        raise ValueError(
            f"{what} is a mapping by head name and lacks {name!r}; it holds {sorted(value)}. "
            f"Its keys must be the names given in head=."
        )
    return value[name]


def _at_rank(method: Any, rank: Any) -> Any:
    """The method with the rank that was given beside it."""
    if isinstance(method, type):
        # A class has the defaults of its fields, and so looks like a value.
        check_method(method)
    if rank is None:
        return Choice() if method is None else method
    method = Published() if method is None else method
    if getattr(method, "rank", 0) is not None:
        raise ValueError(
            f"rank= is the rank of a refit that leaves it open, lip_jax.Published() or lip_jax.Calibrated(); "
            f"got it beside {method!r}. Leave one of the two out."
        )
    return replace(method, rank=rank)


def _repair(lens: HeadLens, rows: Rows, method: Any, validation: Any, seen: bool) -> tuple[Head, Report]:
    """The head by a choice among methods, or by the one that was asked for, with the report."""
    if isinstance(method, Choice):
        chosen = choose(lens.head, rows, method, validation, seen=seen)
        if is_concrete(chosen.report.chosen):
            for warning in chosen.report.warnings:
                warnings.warn(warning, stacklevel=4)
        return Head(chosen.kernel, chosen.bias), chosen.report
    done = _settled(lens.head, rows, method, validation)
    before, after = lens.head.kernel, done.head.kernel
    change = _relative_change(before, after)
    report = HeadReport(
        path=lens.name,
        shape=(before.shape[0], before.shape[1]),
        method=name_of(method),
        refit=is_refit(method),
        strength=done.strength,
        change=change,
        ignored=done.ignored,
        s=done.s,
        sigma=done.sigma,
    )
    return done.head, report


def _settled(head: Head, rows: Rows, method: Method, validation: Any) -> Settled:
    """The one head of a method: by itself, or at the strength that validation rows prefer."""
    (q, l), (feats, labels, weights) = head.kernel.shape, rows
    check_rows(q, l, feats, labels, weights, head.bias, 0.0, "current")
    if not is_refit(method):
        check_several_classes(l)
        check_shares(labels)
    if validation is not None:
        check_method(method)
        done = choose_strength(head, rows, method, validation)
    else:
        feats_array, labels_array, weights_array, bias = as_rows(feats, labels, weights, head.bias)
        arrays = Rows(feats_array, labels_array, weights_array)
        settle = getattr(method, "settle", None)
        if isinstance(method, Published | Calibrated):
            # Refits count unusable rows as they go. They are not compiled in: their rank may be traced.
            fit = Fit(arrays, None, None, jnp.zeros((), jnp.int32))
        else:
            check_method(method)
            fit = prepare(arrays, l, intercept=bias is not None, needs=needs_of(method))
        if settle is not None:
            done = settle(head, fit)
            check_made(method, done.head, head)
        else:
            path = path_of(method, head, fit)
            if path.strength.shape[0] != 1:
                raise ValueError(
                    f"the method {name_of(method)} makes {path.strength.shape[0]} heads, and nothing here "
                    f"can choose one. Pass validation=, or give the method a settle(head, fit)."
                )
            done = Settled(path.head(0), path.strength[0], fit.ignored)
    raise_if_ignored(done.ignored, feats, labels, weights, l)
    return done


@jax.jit
def _relative_change(before: jax.Array, after: jax.Array) -> jax.Array:
    dtype = linalg.compute_dtype(before)
    size, moved = _norm(before.astype(dtype)), _norm(after.astype(dtype) - before.astype(dtype))
    share = jnp.where(size > 0, moved / jnp.where(size > 0, size, 1), jnp.inf)
    return jnp.where(moved > 0, share, 0)


def _norm(array: jax.Array) -> jax.Array:
    """The Frobenius norm, with the derivative 0 at 0."""
    square = jnp.sum(array**2)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
