"""Accumulators: their sums by definition, their laws, and every solver from moments as from rows."""

import itertools
from functools import reduce

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lip_jax
from lip_jax.numerics import chunks
from lip_jax.sums import moments
from lip_jax.sums.moments import about, centred, from_zero
from tests import oracles, zoo

N, Q, L = 60, 6, 4


def rows_of(kind="ids", *, n=N, q=Q, l=L, mean=0.0, dtype=np.float32, seed=0):
    """Features, labels and weights, some rows unlabelled and some of weight 0."""
    rng = np.random.default_rng(seed)
    feats = (rng.normal(size=(n, q)) + mean * rng.normal(size=q)).astype(dtype)
    weights = np.where(rng.random(n) < 0.1, 0, rng.random(n)).astype(dtype)
    if kind == "ids":
        return feats, rng.integers(-1, l, n).astype(np.int32), weights
    targets = (rng.dirichlet(np.ones(l), n) + (mean if kind == "far targets" else 0)).astype(dtype)
    targets[rng.random(n) < 0.1] = np.nan
    return feats, targets, weights


def kernel_of(dtype=np.float32, q=Q, l=L):
    return np.random.default_rng(9).normal(size=(q, l)).astype(dtype)


def both_levels(kernel):
    split = lip_jax.svd_split(kernel, 0)
    return {
        "moments": lip_jax.moment_accumulator(*kernel.shape, dtype=split.s.dtype),
        "tail": lip_jax.tail_accumulator(split),
    }


def batches_of(rows, edges):
    edges = [0, *edges, len(rows[0])]
    return [tuple(part[a:b] for part in rows) for a, b in itertools.pairwise(edges)]


def taken(accumulator, batches):
    return reduce(lambda state, batch: accumulator.update(state, *batch), batches, accumulator.init())


def assert_same_solution(scores, logits, **close):
    """A readout from moments is the least-squares solution, that of rows the same times a logit scale."""
    assert scores.scale is None
    solution = jax.tree.map(lambda part: part / logits.scale, (logits.kernel, logits.bias))
    chex.assert_trees_all_close((scores.kernel, scores.bias), solution, **close)
    np.testing.assert_allclose(scores.ridge, logits.ridge, rtol=1e-5)


@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("kind", ["ids", "targets", "far targets"])
def test_sums_are_those_of_the_definition(kind, mean):
    rows = rows_of(kind, mean=mean)
    state = taken(lip_jax.moment_accumulator(Q, L), batches_of(rows, [20, 21, 50]))
    feats, targets, weights = oracles.used_rows(rows[0], rows[1], L, rows[2], None)
    x, y = feats - oracles.f64(state.origin_x), targets - oracles.f64(state.origin_y)
    weighted = weights[:, None] * x
    expected = {
        "total": weights.sum(),
        "rows": len(weights),
        "spread": (weights[:, None] * y**2).sum(),
        "sum_x": weighted.sum(axis=0),
        "sum_y": (weights[:, None] * y).sum(axis=0),
        "gram": weighted.T @ x,
        "cross": weighted.T @ y,
    }
    for name, value in expected.items():
        # Features near 1000 are rounded by 3e-5 before anything is done to them: to whole numbers of that.
        scale = np.abs(value).max() + 1
        np.testing.assert_allclose(getattr(state, name), value, atol=2e-6 * scale, err_msg=name)
    assert int(state.ignored) == 0


def test_sums_over_more_classes_than_a_chunk_has_rows_are_those_over_few(monkeypatch):
    rows = rows_of(mean=3.0)
    expected = taken(lip_jax.moment_accumulator(Q, L), [rows])
    monkeypatch.setattr(moments, "CHUNK_ROWS", L - 1)
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 7)
    jax.clear_caches()
    chex.assert_trees_all_close(
        taken(lip_jax.moment_accumulator(Q, L), [rows]).sums, expected.sums, rtol=1e-4, atol=1e-5
    )
    jax.clear_caches()


def test_tail_sums_are_those_of_the_definition():
    rows, kernel = rows_of(mean=1e3), kernel_of()
    split = lip_jax.svd_split(kernel, 0)
    state = taken(lip_jax.tail_accumulator(split), batches_of(rows, [7, 30]))
    feats, targets, weights = oracles.used_rows(rows[0], rows[1], L, rows[2], None)
    a = feats @ oracles.f64(split.u) - oracles.f64(state.origin_u)
    c = targets @ oracles.f64(split.vt).T - oracles.f64(state.origin_v)
    weighted = weights[:, None] * a
    for name, value in {"sum_u": weighted.sum(axis=0), "squares": (weighted * a).sum(axis=0)}.items():
        # Projections of features near 1000 are rounded by some 1e-4.
        np.testing.assert_allclose(getattr(state, name), value, atol=2e-3 * np.abs(value).max(), err_msg=name)
    np.testing.assert_allclose(state.sum_v, (weights[:, None] * c).sum(axis=0), atol=1e-5)


@settings(max_examples=12)
@given(
    cuts=st.lists(st.sampled_from([0, 1, 30, 31, N]), max_size=3),
    order=st.randoms(use_true_random=False),
    setting=st.sampled_from([("ids", False), ("targets", True)]),
)
def test_any_batches_in_any_order_give_what_all_rows_give(cuts, order, setting):
    kind, double = setting
    dtype, tolerance = (np.float64, 1e-12) if double else (np.float32, 1e-6)
    with jax.enable_x64(double):
        rows, kernel = rows_of(kind, dtype=dtype), kernel_of(dtype)
        expected = np.asarray(lip_jax.refine(kernel, *rows[:2], 0, weights=rows[2]))
        # Written as a change of the kernel, a refit is rounded as that is.
        scale = np.abs(kernel).max()
        for accumulator in both_levels(kernel).values():
            batches = batches_of(rows, sorted(cuts))
            order.shuffle(batches)
            streamed = taken(accumulator, batches)
            parts = [taken(accumulator, [batch]) for batch in batches]
            merged = reduce(accumulator.merge, parts, accumulator.init())
            for state in (streamed, merged):
                found = lip_jax.refine_from(kernel, state, 0, split=accumulator.split)
                np.testing.assert_allclose(found, expected, atol=tolerance * scale)


@pytest.mark.parametrize("level", ["moments", "tail"])
def test_no_rows_are_an_identity(level):
    accumulator = both_levels(kernel_of())[level]
    state = taken(accumulator, batches_of(rows_of(mean=1e3), [20]))
    for first, second in ((state, accumulator.init()), (accumulator.init(), state)):
        chex.assert_trees_all_equal(accumulator.merge(first, second), state)
    nothing = tuple(part[:0] for part in rows_of())
    unlabelled = (np.ones((3, Q), np.float32), np.full(3, -1), np.ones(3, np.float32))
    for batch in (nothing, unlabelled):
        copied = jax.tree.map(jnp.array, state)
        chex.assert_trees_all_equal(accumulator.update(copied, *batch), state)
        begun = taken(accumulator, [batch, *batches_of(rows_of(mean=1e3), [20])])
        chex.assert_trees_all_equal(begun, state)


@pytest.mark.parametrize("level", ["moments", "tail"])
def test_merging_is_associative_and_commutative(level):
    accumulator = both_levels(kernel_of())[level]
    a, b, c = (taken(accumulator, [rows_of(mean=mean, seed=s)]) for s, mean in enumerate((1.0, 5.0, 30.0)))
    merge = accumulator.merge

    def solved(state):
        return lip_jax.refine_from(kernel_of(), state, 0, split=accumulator.split)

    one, two, three = merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, merge(b, a))
    chex.assert_trees_all_close(solved(one), solved(two), rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(solved(one), solved(three), rtol=1e-4, atol=1e-5)


def test_moments_from_elsewhere_are_those_of_the_same_rows(x64):
    rows = rows_of("targets", dtype=np.float64)
    state = taken(lip_jax.moment_accumulator(Q, L, dtype=jnp.float64), [rows])
    rng = np.random.default_rng(1)
    moved = about(state, jnp.asarray(rng.normal(size=Q)), jnp.asarray(rng.normal(size=L)))
    back = about(moved, state.origin_x, state.origin_y)
    chex.assert_trees_all_close(back, state, rtol=1e-12, atol=1e-12)
    feats, targets, weights = oracles.used_rows(rows[0], rows[1], L, rows[2], None)
    x, y = feats - np.asarray(moved.origin_x), targets - np.asarray(moved.origin_y)
    np.testing.assert_allclose(moved.cross, (weights[:, None] * x).T @ y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moved.gram, (weights[:, None] * x).T @ x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("level", ["moments", "tail"])
def test_a_hundred_thousand_updates_lose_nothing(level):
    # In plain float32 the sums of so many equal terms are off by some 1e-4.
    steps = 100_000
    accumulator = both_levels(kernel_of())[level]
    batch = tuple(part[:3] for part in rows_of(seed=4, mean=1.0))
    one = taken(accumulator, [batch])

    @jax.jit
    def repeated(state):
        step = lambda state, _: (accumulator.update(state, *batch), None)  # noqa: E731
        return jax.lax.scan(step, state, length=steps)[0]

    found = repeated(accumulator.init())
    plain, _ = jax.lax.scan(lambda s, _: (s + one.total, None), jnp.float32(0), length=steps)
    assert abs(float(plain) / (steps * float(one.total)) - 1) > 5e-5
    for value, single in zip(found.sums, one.sums, strict=True):
        expected = steps * oracles.f64(single)
        # Terms are of the size of 1; one batch alone is rounded otherwise than within a loop.
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6 * steps)


@pytest.mark.parametrize("kind", ["ids", "targets"])
def test_a_million_rows_in_one_update_lose_nothing(kind):
    # In plain float32 some sums over so many chunks are off by 1e-6.
    rows = rows_of(kind, n=1_000_000, mean=3.0)
    state = taken(lip_jax.moment_accumulator(Q, L), [rows])
    feats, targets, weights = oracles.used_rows(rows[0], rows[1], L, rows[2], None)
    x, y = feats - oracles.f64(state.origin_x), targets - oracles.f64(state.origin_y)
    weighted = weights[:, None] * x
    squares = {"total": weights.sum(), "squared": (weights**2).sum(), "gram": weighted.T @ x}
    for name, value in (
        squares | {"spread": (weights[:, None] * y**2).sum(), "cross": weighted.T @ y}
    ).items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(getattr(state, name), value, atol=1.5e-7 * scale, err_msg=name)


def test_ten_million_rows_at_a_mean_of_a_thousand():
    n, q, l, size = 10_000_000, 4, 3, 2**18
    rng = np.random.default_rng(0)
    labels = rng.integers(0, l, size).astype(np.int32)
    feats = (
        rng.normal(size=(size, q)).astype(np.float32) + np.float32(1000) + np.eye(l, q)[labels].astype("f")
    )
    batches = ((feats[: n - start], labels[: n - start]) for start in range(0, n, size))
    moments = lip_jax.accumulate(lip_jax.moment_accumulator(q, l), batches)
    assert float(moments.rows) == n

    times, rest = divmod(n, size)
    weights = np.full(size, times, np.float64)
    weights[:rest] += 1
    x, y = feats.astype(np.float64), np.eye(l)[labels]
    mean_x, mean_y = weights @ x / n, weights @ y / n
    x, y = x - mean_x, y - mean_y
    gram, cross = (x.T * weights) @ x, (x.T * weights) @ y
    found = centred(moments)
    np.testing.assert_allclose(found.gram, gram, rtol=2e-6, atol=2e-6 * np.abs(gram).max())
    np.testing.assert_allclose(found.cross, cross, rtol=2e-6, atol=2e-6 * np.abs(cross).max())
    readout = lip_jax.linear_readout_from(moments, ridge=0.0)
    np.testing.assert_allclose(readout.kernel, np.linalg.solve(gram, cross), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("ids", (N, 6, 4)), ("targets", (N, 4, 6)), ("targets", (N, 5, 5)), ("ids", (3, 6, 4))],
)
def test_solvers_from_moments_are_those_of_rows(x64, kind, shape):
    n, q, l = shape
    rows, kernel = rows_of(kind, n=n, q=q, l=l, dtype=np.float64, mean=3.0), kernel_of(np.float64, q, l)
    feats, labels, weights = rows
    bias = np.linspace(-1, 1, l)
    split = lip_jax.svd_split(kernel, 0)
    gauge_free = lip_jax.svd_split(kernel - kernel.mean(axis=1, keepdims=True), 0)
    moments = taken(lip_jax.moment_accumulator(q, l, dtype=jnp.float64), batches_of(rows, [n // 2]))
    along = taken(lip_jax.tail_accumulator(split), batches_of(rows, [n // 3]))
    centred = taken(lip_jax.tail_accumulator(gauge_free), batches_of(rows, [n // 3]))
    close = {"rtol": 1e-9, "atol": 1e-9}
    # Traced ranks, so that each solver is compiled once.
    for rank in map(jnp.int32, range(min(q, l) + 1)):
        for ridge, to in ((0.5, "zero"), (0.5, "current")) + (((0.0, "current"),) if n > q else ()):
            options = {"bias": jnp.asarray(bias), "ridge": ridge, "ridge_to": to}
            expected = lip_jax.refine(kernel, feats, labels, rank, weights=weights, **options)
            chex.assert_trees_all_close(
                lip_jax.refine_from(kernel, moments, rank, **options), expected, **close
            )
            for state in (moments, along):
                found = lip_jax.refine_from(kernel, state, rank, split=split, **options)
                chex.assert_trees_all_close(found, expected, **close)
            at_rank = lip_jax.svd_split(kernel, rank)
            sigma = lip_jax.methods.solve_tail_sigma_from(at_rank, moments, **options)
            of_rows = lip_jax.solve_tail_sigma(at_rank, feats, labels, weights=weights, **options)
            chex.assert_trees_all_close(sigma, of_rows, **close)
        for held_bias in (None, jnp.asarray(bias)):
            options = {"bias": held_bias, "ridge": 0.1}
            expected = lip_jax.refine_calibrated(kernel, feats, labels, rank, weights=weights, **options)
            for state, given_split in ((moments, None), (moments, gauge_free), (centred, gauge_free)):
                found = lip_jax.methods.refine_calibrated_from(
                    kernel, state, rank, split=given_split, **options
                )
                chex.assert_trees_all_close(found, expected, **close)
    for intercept in (True, False):
        options = {"ridge": 0.3, "intercept": intercept}
        expected = lip_jax.linear_readout(feats, labels, num_classes=l, weights=weights, **options)
        assert_same_solution(lip_jax.linear_readout_from(moments, **options), expected, **close)


def test_the_strength_from_moments_is_that_of_rows():
    rows = rows_of(n=200)
    moments = taken(lip_jax.moment_accumulator(Q, L), batches_of(rows, [90]))
    expected = lip_jax.linear_readout(*rows[:2], num_classes=L, weights=rows[2])
    assert_same_solution(lip_jax.linear_readout_from(moments), expected, rtol=1e-4, atol=1e-5)


def test_bounds_from_moments_are_those_of_features():
    feats = rows_of(n=200, mean=2.0)[0]
    moments = taken(lip_jax.moment_accumulator(Q, L), [(feats, np.zeros(200, np.int32))])
    values = lip_jax.bounds.feature_singular_values_from(moments)
    np.testing.assert_allclose(values, lip_jax.bounds.feature_singular_values(feats), rtol=1e-5)
    options = {"num_classes": L, "gap": 0.5, "flip_rate": 0.1}
    found = lip_jax.sin_theta_bound(singular_values=values, num_samples=int(moments.rows), **options)
    np.testing.assert_allclose(found.value, lip_jax.sin_theta_bound(feats, **options).value, rtol=1e-4)
    flat = feats.copy()
    flat[:, 0] = flat[:, 1]
    moments = taken(lip_jax.moment_accumulator(Q, L), [(flat, np.zeros(200, np.int32))])
    assert float(lip_jax.bounds.feature_singular_values_from(moments)[-1]) == 0


def test_no_rows_change_no_head():
    kernel = kernel_of()
    for accumulator in both_levels(kernel).values():
        found = lip_jax.refine_from(kernel, accumulator.init(), 0, split=accumulator.split)
        np.testing.assert_array_equal(found, kernel)
    head = lip_jax.methods.refine_calibrated_from(
        kernel, lip_jax.moment_accumulator(Q, L).init(), 0, bias=None
    )
    np.testing.assert_array_equal(head.kernel, kernel)
    assert float(head.scale) == 0


@pytest.mark.parametrize("level", ["moments", "tail"])
def test_unusable_rows_are_counted_and_leave_the_sums_as_without_them(level):
    accumulator = both_levels(kernel_of())[level]
    feats, labels, weights = rows_of()
    labels[:6], weights[:6] = 1, 1
    feats[0], feats[1, 2], feats[2] = np.nan, np.inf, 3e38
    labels[3], weights[4], weights[5] = L, -1, np.nan
    state = taken(accumulator, [(feats, labels, weights)])
    assert int(state.ignored) == 6
    expected = taken(accumulator, [(feats[6:], labels[6:], weights[6:])])
    for ours, theirs in ((state, expected),):
        found = [lip_jax.refine_from(kernel_of(), s, 0, split=accumulator.split) for s in (ours, theirs)]
        chex.assert_trees_all_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", ["moments", "tail"])
def test_updates_compile_once_and_donate_the_state(level, compilations):
    accumulator = both_levels(kernel_of())[level]
    rows = rows_of()
    first = accumulator.init()
    state = accumulator.update(first, *rows)
    assert first.squares.is_deleted() if level == "tail" else first.gram.is_deleted()
    before = compilations()
    for seed in range(3):
        state = accumulator.update(state, *rows_of(seed=seed))
    assert compilations() == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_sums_keep_their_dtype_whatever_the_features(dtype):
    with jax.enable_x64(dtype == "float64"):
        feats, labels, weights = rows_of()
        expected = taken(lip_jax.moment_accumulator(Q, L), [(feats.astype(dtype), labels, weights)])
        assert {leaf.dtype.name for leaf in expected.sums} == {"float32"}
        exact = taken(lip_jax.moment_accumulator(Q, L), [(feats, labels, weights)])
        np.testing.assert_allclose(expected.gram, exact.gram, atol=0.02 * np.abs(exact.gram).max())


def test_tail_states_of_one_split_alone_are_merged():
    kernel = kernel_of()
    levels = both_levels(kernel)
    with pytest.raises(
        ValueError, match="first and second must be states of the same accumulator; got Moments"
    ):
        levels["moments"].merge(levels["moments"].init(), levels["tail"].init())
    other = lip_jax.tail_accumulator(lip_jax.svd_split(kernel[:, :3], 0))
    with pytest.raises(ValueError, match=r"TailMoments of float32\[4\] and TailMoments of float32\[3\]"):
        levels["tail"].merge(levels["tail"].init(), other.init())


@pytest.fixture(scope="module")
def models():
    """A linen and an nnx classifier, and features and labels of their heads."""
    images, labels = zoo.digits()
    model = zoo.BatchNormCNN()
    variables = model.init(jax.random.key(0), images[:1])
    linen_feats = lip_jax.capture_features(model, variables, images[:200], head="Dense_1")
    module = zoo.NnxClassifier(nnx.Rngs(0))
    module.eval()
    nnx_feats = lip_jax.capture_features(module, None, images[:200], head="head")
    return (variables, linen_feats, "Dense_1"), (module, nnx_feats, "head"), labels[:200]


@pytest.mark.parametrize("method", [lip_jax.Published(ridge=1.0), lip_jax.Calibrated(ridge=1.0)])
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_trees_are_refitted_from_moments(models, kind, method):
    tree, feats, head = models[0] if kind == "linen" else models[1]
    moments = taken(lip_jax.moment_accumulator(feats.shape[1], 10), [(feats, models[2])])
    options = {"method": method, "rank": 3, "head": head}
    found = lip_jax.apply_from(tree, moments, **options)
    expected = lip_jax.apply(tree, feats, models[2], **options)
    assert type(found) is type(expected)
    states = [nnx.state(part, nnx.Param) if kind == "nnx" else part for part in (found, expected, tree)]
    leaves = [jax.tree.leaves(state) for state in states]
    chex.assert_trees_all_close(leaves[0], leaves[1], rtol=1e-3, atol=1e-4)
    changed = [not bool((a == b).all()) for a, b in zip(leaves[0], leaves[2], strict=True)]
    assert sum(changed) == (1 if method.name == "published" else 2)


def test_a_head_is_found_by_the_shape_of_its_moments(models):
    variables, feats, head = models[0]
    moments = taken(lip_jax.moment_accumulator(feats.shape[1], 10), [(feats, models[2])])
    found = lip_jax.apply_from(variables, moments, rank=3)
    chex.assert_trees_all_close(found, lip_jax.apply_from(variables, moments, rank=3, head=head))
    kernel = variables["params"][head]["kernel"]
    split = lip_jax.svd_split(kernel, 0)
    along = taken(lip_jax.tail_accumulator(split), [(feats, models[2])])
    from_tail = lip_jax.apply_from(variables, along, rank=3, split=split)
    chex.assert_trees_all_close(found, from_tail, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="split must be given with TailMoments"):
        lip_jax.apply_from(variables, along, rank=3)


@pytest.mark.parametrize("level", ["moments", "tail"])
def test_what_rows_of_weight_zero_hold_moves_no_origin(level):
    accumulator = both_levels(kernel_of())[level]
    feats, labels, weights = rows_of()
    weights[::2] = 0
    expected = taken(accumulator, [(feats, labels, weights)])
    for junk in (1e15, np.nan):
        spoilt = feats.copy()
        spoilt[::2] = junk
        found = taken(accumulator, [(spoilt, labels, weights)])
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", ["ids", "targets"])
@pytest.mark.parametrize("level", ["moments", "tail"])
def test_class_ids_and_targets_may_come_in_one_stream(level, first):
    feats, ids, weights = rows_of(mean=3.0)
    targets, labelled = oracles.one_hot(ids, L)
    # Far from the one-hot rows that ids stand for: an origin that is taken from them matters.
    weights = np.where(labelled, weights, 0).astype(np.float32)
    targets = targets.astype(np.float32) + (np.arange(N) >= 20)[:, None] * np.float32(5)
    accumulator, kernel = both_levels(kernel_of())[level], kernel_of()
    parts = {
        "ids": (feats[:20], ids[:20], weights[:20]),
        "targets": (feats[20:], targets[20:], weights[20:]),
    }
    order = [parts[first], parts["targets" if first == "ids" else "ids"]]
    expected = taken(accumulator, [(feats, targets, weights)])
    for state in (
        taken(accumulator, order),
        accumulator.merge(*(taken(accumulator, [part]) for part in order)),
    ):
        for bias in (None, np.arange(L, dtype=np.float32)):
            found, wanted = (
                lip_jax.refine_from(kernel, held, 0, split=accumulator.split, bias=bias)
                for held in (state, expected)
            )
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
        if level == "moments":
            for name in ("spread", "sum_y", "cross"):
                found, wanted = (np.asarray(getattr(from_zero(held), name)) for held in (state, expected))
                atol = 1e-5 * np.abs(wanted).max()
                np.testing.assert_allclose(found, wanted, atol=atol, err_msg=name)


@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_directions_without_data_keep_their_value_from_moments_too(rng, mean):
    q, empty = 40, 10
    basis = np.linalg.qr(rng.normal(size=(q, q)))[0]
    feats = ((rng.normal(size=(500, q - empty)) + mean) @ basis[:, empty:].T).astype(np.float32)
    other = np.linalg.qr(rng.normal(size=(q, q)))[0]
    s = np.linspace(1, 0.1, q).astype(np.float32)
    split = lip_jax.spectrum.SvdSplit(basis.astype(np.float32), s, other.T.astype(np.float32), 0)
    labels = rng.integers(0, q, 500)
    moments = taken(lip_jax.moment_accumulator(q, q), [(feats, labels)])
    sigma = lip_jax.methods.solve_tail_sigma_from(split, moments)
    np.testing.assert_array_equal(sigma[:empty], s[:empty])
    of_rows = lip_jax.solve_tail_sigma(split, feats, labels)
    np.testing.assert_allclose(sigma[empty:], of_rows[empty:], rtol=1e-3, atol=1e-4)
