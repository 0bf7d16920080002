"""Batches of features, made by running a Flax model on batches of its inputs."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lip_jax._checks import describe
from lip_jax._types import Array
from lip_jax.models.capture import capture_features, check_model
from lip_jax.models.trees import Layout
from lip_jax.rows.labels import Rows, int32_ids
from lip_jax.stream.batches import check_count, jax_or_numpy, pad_rows, placed, rounded


def feature_batches(
    model: Any,
    variables: PyTree,
    batches: Iterable[Any],
    *,
    head: str | Callable[[str, Any], bool] | None = None,
    num_classes: int | None = None,
    layout: Layout = "q l",
    batch_rows: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
    **apply_kwargs: Any,
) -> Iterator[Rows]:
    """The inputs of a model's head for batches of the model's inputs, for `accumulate`; nothing is stored.

    Each batch takes one compiled forward pass, for which small batches are padded. Inputs of the head with
    more axes, such as the tokens of a sequence, become one row each.

    Args:
        model: A linen module, or an `nnx.Module` (which is copied, not touched).
        variables: For linen the variables dict, or its params. For nnx None, or an `nnx.State` that replaces
            the module's own.
        batches: Of `(inputs, labels)` or `(inputs, labels, weights)`; inputs are the model's input or a tuple
            of its positional arguments. Every array has one row for each row of the batch. Labels and
            weights may have one for each token instead. A batch of no rows gives `Rows` of none.
        head: A path or predicate, as in `lip_jax.capture_features`.
        num_classes: `l`, needed where `head` is None.
        layout: How the head's kernel is stored, as in `lip_jax.apply`.
        batch_rows: Rows of inputs per forward pass, at least as many as any batch has. None: as many as the
            first batch has.
        sharding: Where inputs are put, as in `accumulate`.
        **apply_kwargs: Passed to the model, such as `train=False` and arrays without one row for each row of
            the batch. Rows must not depend on each other.

    Returns:
        An iterator of `Rows`: features `(n, q)`, labels, and weights, which are 0 for padding.

    Raises:
        ValueError: If a batch does not fit, or as `lip_jax.capture_features`.

    Example:
        >>> import flax.linen as nn
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import lip_jax
        >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)])
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 4)))
        >>> inputs = [(jnp.ones((5, 4)), jnp.zeros(5, jnp.int32)), (jnp.ones((2, 4)), jnp.ones(2, jnp.int32))]
        >>> features = lip_jax.feature_batches(model, variables, inputs, head="layers_2")
        >>> moments = lip_jax.accumulate(lip_jax.moment_accumulator(q=8, l=3), features)
        >>> float(moments.rows)
        7.0

    Reference:
        [li2020], the representation a network learned.
    """
    check_model(model)
    if batch_rows is not None:
        check_count("batch_rows", batch_rows)
    from flax import linen, nnx

    if not isinstance(model, linen.Module) and variables is None:
        variables = nnx.state(model)

    @jax.jit
    def features(variables: PyTree, inputs: PyTree) -> Any:
        return capture_features(
            model, variables, inputs, head=head, num_classes=num_classes, layout=layout, **apply_kwargs
        )

    return _feature_batches(partial(features, variables), batches, batch_rows, sharding)


def _feature_batches(
    features: Callable, batches: Iterable[Any], size: int | None, sharding: jax.sharding.Sharding | None
) -> Iterator[Rows]:
    for index, given in enumerate(batches):
        if not isinstance(given, (tuple, list)) or len(given) not in (2, 3):
            raise ValueError(
                f"batch {index} must be (inputs, labels) or (inputs, labels, weights); got a "
                f"{type(given).__name__}. A model with several inputs takes a tuple of them."
            )
        inputs = jax.tree.map(jax_or_numpy, given[0])
        labels, weights = int32_ids(jax_or_numpy(given[1])), None if len(given) == 2 else given[2]
        weights = None if weights is None else jax_or_numpy(weights)
        n = row_count(inputs, labels, weights, index)
        weights = np.ones(n, np.float32) if weights is None else weights
        if not n:
            # Not dropped, because `accumulate` counts batches to know where to resume.
            shape = jax.eval_shape(features, pad_rows(inputs, size or 1))
            yield _flattened(jnp.zeros((0, *shape.shape[1:]), shape.dtype), labels, weights)
            continue
        if size is not None and n > size:
            raise ValueError(
                f"batch {index} has {n} rows, more than {size}. Pass batch_rows= of the largest batch."
            )
        size = rounded(size or n, sharding)
        inputs, labels, weights = placed(pad_rows((inputs, labels, weights), size), sharding)
        yield _flattened(features(inputs), labels, weights)


def row_count(inputs: PyTree, labels: Array, weights: Array | None, index: int) -> int:
    """The number of rows of a batch, which all of its parts must have."""
    leaves = jax.tree_util.tree_leaves_with_path(inputs)
    parts = {f"inputs{jax.tree_util.keystr(path)}": leaf for path, leaf in leaves} | {"labels": labels}
    if weights is not None:
        parts["weights"] = weights
    first = next((name for name, part in parts.items() if part.ndim), "labels")
    for name, part in parts.items():
        if not part.ndim or part.shape[:1] != parts[first].shape[:1]:
            raise ValueError(
                f"batch {index}: {name} must have a row for each of {first} {describe(parts[first])}; got "
                f"{describe(part)}. What has no row for each belongs in apply_kwargs."
            )
    return labels.shape[0]


def _flattened(feats: Array, labels: Array, weights: Array) -> Rows:
    """One row for each input of the head."""
    axes, targets = feats.shape[:-1], jnp.issubdtype(labels.dtype, jnp.floating)
    expected = labels.shape[:-1] if targets else labels.shape
    if expected != axes:
        raise ValueError(
            f"labels must have an entry for each input of the head, {axes}; got {describe(labels)}."
        )
    weights = jnp.broadcast_to(weights.reshape(weights.shape + (1,) * (len(axes) - weights.ndim)), axes)
    labels = labels.reshape((-1, labels.shape[-1]) if targets else (-1,))
    return Rows(feats.reshape(-1, feats.shape[-1]), labels, weights.reshape(-1))
