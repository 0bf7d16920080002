"""Ridge readouts at every strength against scikit-learn, and rows left out against refits without them."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Ridge

import lip_jax
from lip_jax import Rows
from lip_jax.numerics import chunks
from lip_jax.quality.left_out import press
from lip_jax.sums.ridge import gcv, residual_sum, ridge_factors, ridge_grid, ridge_solution
from tests import oracles

N, Q, L = 90, 7, 4


def case(rng, dtype="float64", n=N, q=Q):
    feats = rng.normal(size=(n, q)) @ rng.normal(size=(q, q)) + 3
    labels = rng.integers(0, L, n).astype(np.int32)
    weights = rng.random(n) * (rng.random(n) > 0.2)
    return jnp.asarray(feats, dtype), jnp.asarray(labels), jnp.asarray(weights, dtype)


def reference(feats, labels, weights, ridge, intercept):
    """Kernel and intercept by scikit-learn, of the labelled rows."""
    targets, labelled = oracles.as_targets(labels, L)
    weights = None if weights is None else oracles.f64(weights)[labelled]
    model = Ridge(
        alpha=float(ridge), fit_intercept=intercept, solver="svd" if weights is None else "cholesky"
    )
    model.fit(oracles.f64(feats)[labelled], targets[labelled], sample_weight=weights)
    return model.coef_.T, model.intercept_ if intercept else np.zeros(L)


@pytest.mark.parametrize("intercept", [True, False], ids=["intercept", "no intercept"])
@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("shape", [(N, Q), (20, 40)], ids=["tall", "more features than rows"])
def test_every_strength_is_scikit_learns_ridge(rng, x64, intercept, weighted, shape):
    feats, labels, weights = case(rng, n=shape[0], q=shape[1])
    weights = weights if weighted else None
    path = ridge_factors(feats, labels, weights, L, intercept=intercept)
    for ridge in ridge_grid(path, 13):
        kernel, offset = ridge_solution(path, ridge)
        expected = reference(feats, labels, weights, ridge, intercept)
        assert oracles.relative_error(kernel, expected[0]) <= 1e-8
        np.testing.assert_allclose(offset, expected[1], rtol=1e-8, atol=1e-8)


def test_soft_targets_and_unlabelled_rows_are_scikit_learns_ridge(rng, x64):
    feats, _, weights = case(rng)
    soft = rng.dirichlet(np.ones(L), N)
    soft[4:9] = np.nan
    path = ridge_factors(feats, jnp.asarray(soft), weights, L, intercept=True)
    kernel, offset = ridge_solution(path, jnp.asarray(2.5))
    expected = reference(feats, soft, weights, 2.5, True)
    assert oracles.relative_error(kernel, expected[0]) <= 1e-12
    np.testing.assert_allclose(offset, expected[1], rtol=1e-11)


@pytest.mark.parametrize("intercept", [True, False], ids=["intercept", "no intercept"])
def test_class_ids_give_the_path_of_their_one_hot_targets(rng, x64, intercept):
    feats, labels, weights = case(rng)
    labels = labels.at[3:8].set(-1)
    targets = jnp.asarray(np.where(np.asarray(labels)[:, None] < 0, np.nan, np.eye(L)[labels]))
    by_id, by_target = (ridge_factors(feats, y, weights, L, intercept=intercept) for y in (labels, targets))
    chex.assert_trees_all_close(by_id, by_target, rtol=1e-12, atol=1e-12)


def test_strengths_span_six_decades_about_the_mean_eigenvalue(rng, x64):
    feats, labels, _ = case(rng)
    path = ridge_factors(feats, labels, None, L, intercept=True)
    off = oracles.f64(feats) - oracles.f64(feats).mean(axis=0)
    mean = np.trace(off.T @ off) / Q
    np.testing.assert_allclose(ridge_grid(path, 7), mean * 10.0 ** np.arange(-4, 3), rtol=1e-12)


def test_a_large_feature_mean_costs_float32_no_more_than_its_rounding(rng):
    # Features of spread 1 about 1e3 are stored to 6e-5, and read as stored; their mean errs by as much.
    feats = jnp.asarray(rng.normal(size=(500, Q)) + 1e3, jnp.float32)
    labels = jnp.argmax(feats[:, :L], axis=1).astype(jnp.int32)
    kernel, offset = ridge_solution(ridge_factors(feats, labels, None, L, intercept=True), jnp.float32(5.0))
    expected = reference(feats, labels, None, 5.0, True)
    assert oracles.relative_error(kernel, expected[0]) <= 1e-4
    logits = oracles.f64(feats) @ oracles.f64(kernel) + oracles.f64(offset)
    expected_logits = oracles.f64(feats) @ expected[0] + expected[1]
    np.testing.assert_allclose(logits, expected_logits, atol=5e-4)


@pytest.mark.parametrize("intercept", [True, False], ids=["intercept", "no intercept"])
def test_without_rows_the_readout_is_0_at_every_strength(intercept):
    path = ridge_factors(jnp.zeros((0, Q)), jnp.zeros(0, jnp.int32), None, L, intercept=intercept)
    for ridge in ridge_grid(path, 3):
        kernel, offset = ridge_solution(path, ridge)
        assert not kernel.any()
        assert not offset.any()


def test_rows_that_cannot_be_used_count_for_nothing(rng):
    feats, labels, _ = case(rng, "float32")
    spoilt = feats.at[3].set(jnp.nan), labels.at[5].set(L)
    without = jnp.ones(N).at[jnp.array([3, 5])].set(0)
    fit = jax.jit(lambda f, y, w: ridge_solution(ridge_factors(f, y, w, L, intercept=True), jnp.float32(2.0)))
    chex.assert_trees_all_close(fit(*spoilt, None), fit(feats, labels, without), rtol=1e-4, atol=1e-5)


def both_kinds(rng, feats, kind):
    """Labels of one kind with some rows unlabelled."""
    if kind == "ids":
        return jnp.asarray(rng.integers(-1, L, len(feats)), jnp.int32)
    soft = rng.dirichlet(np.ones(L), len(feats))
    soft[3:6] = np.nan
    return jnp.asarray(soft)


@pytest.mark.parametrize("kind", ["ids", "targets"])
@pytest.mark.parametrize("intercept", [True, False], ids=["intercept", "no intercept"])
@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "no weights"])
def test_leave_one_out_scores_are_those_of_refits_without_the_row(rng, x64, kind, intercept, weighted):
    feats, _, weights = case(rng, n=40)
    weights = weights if weighted else None
    labels = both_kinds(rng, feats, kind)
    options = {"weights": weights, "ridge": 0.7, "intercept": intercept}
    scores = lip_jax.leave_one_out_scores(feats, labels, num_classes=L, **options)
    expected = oracles.leave_one_out(feats, labels, L, **options)
    assert oracles.relative_error(scores, expected) <= 1e-8


def test_leave_one_out_scores_in_chunks_are_those_of_one_piece(rng, x64, monkeypatch):
    feats, labels, weights = case(rng)
    scores = lip_jax.leave_one_out_scores(feats, labels, num_classes=L, weights=weights, ridge=0.7)
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 17)
    jax.clear_caches()
    chunked = lip_jax.leave_one_out_scores(feats, labels, num_classes=L, weights=weights, ridge=0.7)
    jax.clear_caches()
    chex.assert_trees_all_close(chunked, scores, rtol=1e-11)


def test_fold_rows_passes_every_row_on_once_and_joins_what_comes_out():
    def step(total, chunk, fresh):
        return total + jnp.sum(jnp.where(fresh, chunk, 0)), 2 * chunk

    for n, size in ((10, 4), (10, 5), (10, 10), (10, 30), (4, 3)):
        rows = jnp.arange(n, dtype=jnp.int32) + 1
        total, doubled = chunks.fold_rows(step, jnp.int32(0), rows, size)
        assert int(total) == n * (n + 1) // 2
        np.testing.assert_array_equal(doubled, 2 * rows)


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_unusable_weights_are_found_where_no_row_has_weight(rng, value):
    n = 3_000
    feats, labels = rng.normal(size=(n, 3)).astype(np.float32), rng.integers(0, L, n)
    weights = np.repeat(np.array([1, 0, value], np.float32), n // 3)
    with pytest.raises(ValueError, match=r"weights must be finite and at least 0; got .* at row 2000"):
        lip_jax.leave_one_out_scores(feats, labels, weights=weights)
    found = jax.jit(partial(lip_jax.linear_readout, num_classes=L))(feats, labels, weights=weights)
    assert int(found.ignored) == n // 3
    expected = lip_jax.linear_readout(feats[:1000], labels[:1000], num_classes=L)
    np.testing.assert_allclose(found.kernel, expected.kernel, rtol=1e-4, atol=1e-5)


def test_weights_may_be_booleans(rng):
    feats, labels, _ = case(rng, "float32")
    kept = rng.random(len(feats)) < 0.7
    for solver in ("ridge", "logistic"):
        found, expected = (
            lip_jax.linear_readout(feats, labels, num_classes=L, solver=solver, weights=weights)
            for weights in (kept, kept.astype(np.asarray(feats).dtype))
        )
        np.testing.assert_array_equal(found.kernel, expected.kernel)
    mask = lip_jax.purify(feats, labels, num_classes=L, weights=kept)
    assert not np.asarray(mask.trusted)[~kept].any()


def test_a_row_that_stands_alone_is_scored_by_the_mean_of_the_others(x64):
    feats = jnp.eye(4)[:3] * jnp.array([[1.0], [1.0], [5.0]])
    labels = jnp.array([0, 1, 2])
    without = lip_jax.leave_one_out_scores(feats, labels, ridge=0.0, intercept=False)
    np.testing.assert_allclose(without, np.zeros((3, 3)), atol=1e-12)
    scores = lip_jax.leave_one_out_scores(feats, labels, ridge=0.0)
    np.testing.assert_allclose(scores, (1 - np.eye(3)) / 2, atol=1e-12)
    single = lip_jax.leave_one_out_scores(feats[:1], labels[:1], num_classes=3, ridge=1.0)
    np.testing.assert_array_equal(single, np.zeros((1, 3)))


@pytest.mark.parametrize("intercept", [True, False], ids=["intercept", "no intercept"])
def test_gcv_from_the_sums_is_that_of_the_hat_matrix(rng, x64, intercept):
    feats, labels, weights = case(rng, n=30)
    path = ridge_factors(feats, labels, weights, L, intercept=intercept)
    for ridge in (0.1, 3.0, 50.0):
        expected = oracles.generalised_cross_validation(
            feats, labels, L, weights=weights, ridge=ridge, intercept=intercept
        )
        np.testing.assert_allclose(gcv(path, jnp.asarray(ridge), intercept=intercept), expected, rtol=1e-9)


def test_gcv_does_not_take_interpolation_for_a_perfect_fit(rng):
    feats = jnp.asarray(rng.normal(size=(20, 40)), jnp.float32)
    path = ridge_factors(feats, jnp.arange(20, dtype=jnp.int32) % L, None, L, intercept=True)
    grid = ridge_grid(path, 61)
    errors = np.asarray(jax.vmap(lambda ridge: gcv(path, ridge, intercept=True))(grid))
    freedom = 20 - 1 - np.array([(path.eigenvalues / (path.eigenvalues + ridge)).sum() for ridge in grid])
    np.testing.assert_array_equal(np.isinf(errors), freedom <= 2)
    assert np.isinf(errors[0])
    assert np.isfinite(errors[-1])


def test_press_is_the_squared_error_of_the_leave_one_out_scores(rng, x64):
    feats, labels, weights = case(rng, n=30)
    rows = Rows(feats, labels, weights)
    path = ridge_factors(*rows, L, intercept=True)
    grid = jnp.array([0.1, 3.0, 50.0])
    targets, _ = oracles.one_hot(labels, L)
    for ridge, found in zip(grid, press(path, rows, grid, intercept=True), strict=True):
        scores = oracles.leave_one_out(feats, labels, L, weights=weights, ridge=float(ridge), intercept=True)
        expected = (oracles.f64(weights) * ((scores - targets) ** 2).sum(axis=1)).sum()
        np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("criterion", ["gcv", "press"])
def test_the_strength_that_is_chosen_has_the_least_error_of_the_path(rng, x64, criterion):
    feats, labels, _ = case(rng)
    readout = lip_jax.linear_readout(feats, labels, num_classes=L, criterion=criterion)
    rows = Rows(feats, labels, None)
    path = ridge_factors(*rows, L, intercept=True)
    grid = ridge_grid(path, 61)
    errors = {
        "gcv": jax.vmap(lambda ridge: gcv(path, ridge, intercept=True)),
        "press": lambda grid: press(path, rows, grid, intercept=True),
    }[criterion](grid)
    np.testing.assert_allclose(readout.ridge, grid[jnp.argmin(errors)], rtol=1e-12)


@pytest.mark.parametrize("intercept", [True, False], ids=["intercept", "no intercept"])
def test_a_ridge_readout_is_scikit_learns_ridge_and_attains_its_objective(rng, x64, intercept):
    feats, labels, weights = case(rng)
    readout = lip_jax.linear_readout(
        feats, labels, num_classes=L, ridge=2.0, weights=weights, intercept=intercept
    )
    expected = reference(feats, labels, weights, 2.0, intercept)
    solution = readout.kernel / readout.scale
    assert oracles.relative_error(solution, expected[0]) <= 1e-8
    if intercept:
        np.testing.assert_allclose(readout.bias / readout.scale, expected[1], rtol=1e-8)
    else:
        assert readout.bias is None
    offset = np.zeros(L) if readout.bias is None else oracles.f64(readout.bias / readout.scale)
    least = oracles.objective(solution, feats, labels, weights=weights, bias=offset, ridge=2.0)
    np.testing.assert_allclose(readout.objective, least, rtol=1e-9)


def test_without_penalty_the_solution_of_least_norm_is_taken(rng, x64):
    feats = jnp.asarray(rng.normal(size=(5, 12)))
    labels = jnp.arange(5, dtype=jnp.int32) % L
    readout = lip_jax.linear_readout(feats, labels, num_classes=L, ridge=0.0, intercept=False)
    expected = np.linalg.pinv(oracles.f64(feats)) @ oracles.one_hot(labels, L)[0]
    assert oracles.relative_error(readout.kernel, expected) <= 1e-9


def test_half_precision_features_are_summed_in_single(rng):
    feats, labels, _ = case(rng, "float16")
    half = lip_jax.linear_readout(feats, labels, num_classes=L, ridge=2.0)
    single = lip_jax.linear_readout(feats.astype(jnp.float32), labels, num_classes=L, ridge=2.0)
    chex.assert_trees_all_close(half, single, rtol=1e-6)


def test_rows_of_next_to_no_weight_are_no_rows_to_gcv(rng):
    q = 64
    feats = rng.normal(size=(2_000, q)).astype(np.float32)
    labels = np.where(feats[:, 0] + rng.normal(size=2_000) > 0, 1, 0).astype(np.int32)
    weights = np.where(np.arange(2_000) < 80, 1, 1e-6).astype(np.float32)
    found, few = (
        lip_jax.linear_readout(feats[:n], labels[:n], num_classes=2, weights=weights[:n]) for n in (2_000, 80)
    )
    assert float(found.ridge) == pytest.approx(float(few.ridge), rel=0.5)


def test_a_ridge_path_of_large_features_explains_what_that_of_small_ones_does(rng):
    feats, labels, weights = case(rng, "float32")
    small, large = (ridge_factors(scale * feats, labels, weights, L, intercept=True) for scale in (1, 1e15))
    for share in (0.01, 1.0):
        values = [float(residual_sum(path, share * path.eigenvalues.mean())) for path in (small, large)]
        assert values[1] == pytest.approx(values[0], rel=1e-3)


def test_press_of_many_features_is_as_exact_in_float32(rng):
    feats, labels = rng.normal(size=(120, 500)), rng.integers(0, L, 120).astype(np.int32)
    found = {}
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            rows = Rows(jnp.asarray(feats, dtype), jnp.asarray(labels), None)
            path = ridge_factors(*rows, L, intercept=True)
            found[dtype] = np.asarray(press(path, rows, ridge_grid(path, 13), intercept=True))
    np.testing.assert_allclose(found["float32"], found["float64"], rtol=0.02)


def test_finite_rows_whose_sums_overflow_make_no_readout(rng):
    # Of each row the sum of squares is half of what float32 holds.
    feats = (1.3e19 / np.sqrt(Q) * rng.choice([-1, 1], (40, Q))).astype(np.float32)
    labels = np.arange(40) % L
    with pytest.raises(ValueError, match=r"some rows could not be used: .* sums of them overflow float32"):
        lip_jax.linear_readout(feats, labels)
    found = jax.jit(partial(lip_jax.linear_readout, num_classes=L))(feats, labels)
    assert int(found.ignored) == 40
    assert jnp.isfinite(found.kernel).all()
    with pytest.raises(ValueError, match="batch 0: some rows could not be used"):
        lip_jax.accumulate(lip_jax.moment_accumulator(Q, L), [(feats, labels)])
