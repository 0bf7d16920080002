"""The published refit: parity with the oracle, fixed points, laws, and behaviour under JAX's transforms."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

import lip_jax
from tests import oracles

N = 60
SHAPES = {
    "tall": (12, 5, 5),
    "wide": (5, 12, 5),
    "square": (7, 7, 7),
    "tall, rank 3": (12, 5, 3),
    "wide, rank 3": (5, 12, 3),
    "sigmoid": (6, 1, 1),
}
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


def random_kernel(rng, q, l, rank):
    return rng.normal(size=(q, rank)) @ rng.normal(size=(rank, l)) / np.sqrt(rank)


def separated_kernel(rng, q, l, gap=0.1):
    """A kernel whose singular values are 1, and less by `gap` each."""
    r = min(q, l)
    u = np.linalg.qr(rng.normal(size=(q, r)))[0]
    v = np.linalg.qr(rng.normal(size=(l, r)))[0]
    return u @ np.diag(1 - gap * np.arange(r)) @ v.T


def random_ids(rng, n, l):
    return rng.integers(-1, l, n).astype(np.int32)


def soft_targets(rng, n, l):
    return rng.dirichlet(np.ones(l), n)


def candidate_rows(rng, n, l):
    mask = rng.random((n, l)) < 0.4
    mask[3] = False
    return oracles.candidate_targets(mask)


LABELS = {
    "class ids, some unlabelled": random_ids,
    "uint8 ids": lambda rng, n, l: rng.integers(0, l, n).astype(np.uint8),
    "float targets": lambda rng, n, l: rng.normal(size=(n, l)),
    "soft targets": soft_targets,
    "candidate sets, one empty": candidate_rows,
    "multi-label": lambda rng, n, l: (rng.random((n, l)) < 0.3).astype(float),
}
OPTIONS = {
    "plain": {},
    "weights": {"weights"},
    "bias": {"bias"},
    "ridge to current": {"ridge"},
    "ridge to zero": {"ridge", "zero"},
    "everything": {"weights", "bias", "ridge", "zero"},
}


def make_options(rng, names, n, l):
    options = {}
    if "weights" in names:
        options["weights"] = rng.random(n) * (rng.random(n) > 0.2)
    if "bias" in names:
        options["bias"] = rng.normal(size=l)
    if "ridge" in names:
        options["ridge"] = 2.5
    if "zero" in names:
        options["ridge_to"] = "zero"
    return options


def cast(tree, dtype):
    """Floating arrays to `dtype`, as JAX arrays; anything else as it is."""

    def leaf(value):
        if not isinstance(value, np.ndarray):
            return value
        return jnp.asarray(value, dtype if value.dtype.kind == "f" else value.dtype)

    return jax.tree.map(leaf, tree)


def worst_error(kernel, feats, labels, options):
    """Largest relative error of σ over all ranks, given the same factors as the oracle."""
    q, l = kernel.shape
    r = min(q, l)
    rcond = float(jnp.finfo(kernel.dtype).eps) * max(q, l)
    errors = []
    for rank in range(r + 1):
        split = lip_jax.svd_split(kernel, jnp.int32(rank))
        sigma = lip_jax.solve_tail_sigma(split, feats, labels, **options)
        chex.assert_shape(sigma, (r,))
        assert sigma.dtype == kernel.dtype
        factors = (split.u, split.s, split.vt)
        expected = oracles.tail_sigma(*factors, rank, feats, labels, rcond=rcond, **options)
        np.testing.assert_array_equal(sigma[:rank], split.s[:rank])
        errors.append(oracles.relative_error(sigma, expected))
    return max(errors)


def check_parity(rng, shape, labels, options, dtype):
    q, l, rank = shape
    options = make_options(rng, options, N, l)
    data = (random_kernel(rng, q, l, rank), rng.normal(size=(N, q)), labels(rng, N, l))
    with jax.enable_x64(dtype == "float64"):
        *data, options = cast((*data, options), dtype)
        assert worst_error(*data, options) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "sigmoid"])
def test_every_kernel_shape_and_option_matches_the_published_formula(rng, shape, options, dtype):
    check_parity(rng, SHAPES[shape], random_ids, OPTIONS[options], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("labels", LABELS)
def test_every_label_kind_matches_the_published_formula(rng, labels, options, dtype):
    check_parity(rng, SHAPES["tall"], LABELS[labels], OPTIONS[options], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_sigmoid_head_with_targets_matches_the_published_formula(rng, options, dtype):
    check_parity(rng, SHAPES["sigmoid"], LABELS["multi-label"], OPTIONS[options], dtype)


def test_tail_is_the_joint_least_squares_solution(rng, x64):
    kernel, feats, targets = random_kernel(rng, 8, 5, 5), rng.normal(size=(N, 8)), rng.normal(size=(N, 5))
    split = lip_jax.svd_split(kernel, 2)
    sigma = lip_jax.solve_tail_sigma(split, feats, targets)
    u, vt = np.asarray(split.u), np.asarray(split.vt)
    columns = [np.outer(feats @ u[:, i], vt[i]).ravel() for i in range(2, 5)]
    residual = (targets - feats @ np.asarray(split.principal_kernel)).ravel()
    expected = np.linalg.lstsq(np.stack(columns, axis=1), residual, rcond=None)[0]
    np.testing.assert_allclose(sigma[2:], expected, rtol=1e-10)


@pytest.mark.parametrize("gap", [0.1, 1e-2, 1e-3])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_refine_end_to_end_is_as_exact_as_the_gap_allows(rng, dtype, gap):
    # The computed SVD is that of W + E, ‖E‖ ≲ eps · s_1, whose vectors turn by up to ‖E‖ / gap. σ* is a
    # quotient of quadratic forms in them, so it moves by that times the condition number of XᵀX.
    kernel, feats = separated_kernel(rng, 9, 6, gap), rng.normal(size=(200, 9))
    labels = random_ids(rng, 200, 6)
    kernel, feats = (a.astype(dtype) for a in (kernel, feats))
    expected = refined_by_oracle(kernel, feats, labels, rank=2)
    with jax.enable_x64(dtype == "float64"):
        refined = lip_jax.refine(jnp.asarray(kernel), jnp.asarray(feats), labels, 2)
    tolerance = 2 * np.linalg.cond(feats) ** 2 * np.finfo(dtype).eps / gap
    assert tolerance < 5e-3
    assert oracles.relative_error(refined, expected) <= tolerance


def refined_by_oracle(kernel, feats, labels, rank, **options):
    u, s, vt = np.linalg.svd(oracles.f64(kernel), full_matrices=False)
    sigma = oracles.tail_sigma(u, s, vt, rank, feats, labels, **options)
    return u @ np.diag(sigma) @ vt


def null_direction_case(rng):
    """A softmax head as weight decay leaves it: its mean over classes is 0, a direction without size."""
    kernel, feats = separated_kernel(rng, 24, 12, 0.05), rng.normal(size=(300, 24))
    kernel -= kernel.mean(axis=1, keepdims=True)
    perturbation = rng.normal(size=kernel.shape)
    perturbation *= 1e-6 * np.linalg.norm(kernel) / np.linalg.norm(perturbation)
    return kernel, perturbation, feats, random_ids(rng, 300, 12)


@pytest.mark.parametrize("rank", [0, 6, 11])
def test_null_direction_does_not_amplify_a_small_perturbation(rng, rank):
    kernel, perturbation, feats, labels = null_direction_case(rng)
    before, after = (
        lip_jax.refine(jnp.asarray(k, jnp.float32), jnp.asarray(feats, jnp.float32), labels, rank)
        for k in (kernel, kernel + perturbation)
    )
    assert oracles.relative_error(after, before) <= 1e-4


def test_literal_rcond_refits_the_null_direction_and_does_amplify(rng):
    kernel, perturbation, feats, labels = null_direction_case(rng)
    before, after = (
        lip_jax.refine(jnp.asarray(k, jnp.float32), jnp.asarray(feats, jnp.float32), labels, 0, rcond=0.0)
        for k in (kernel, kernel + perturbation)
    )
    assert oracles.relative_error(after, before) > 1e-2


def test_rcond_keeps_exactly_the_components_at_or_below_it(rng, x64):
    u = np.linalg.qr(rng.normal(size=(8, 4)))[0]
    v = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    s = np.array([1.0, 0.5, 1e-3, 1e-9])
    split = lip_jax.spectrum.SvdSplit(u, s, v.T, 0)
    feats, labels = rng.normal(size=(N, 8)), random_ids(rng, N, 4)
    for rcond, kept in ((0.0, 0), (1e-12, 0), (1e-9, 1), (1e-4, 1), (1e-3, 2), (0.5, 3)):
        sigma = lip_jax.solve_tail_sigma(split, feats, labels, rcond=rcond)
        assert int((sigma == s).sum()) == kept, rcond


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_null_space_of_the_features_does_not_blow_up_the_head(rng, scale):
    q, empty = 40, 10
    basis = np.linalg.qr(rng.normal(size=(q, q)))[0]
    feats = scale * (rng.normal(size=(500, q - empty)) @ basis[:, empty:].T).astype(np.float32)
    v = np.linalg.qr(rng.normal(size=(q, q)))[0]
    spectrum = np.linspace(1, 0.1, q)
    split = lip_jax.spectrum.SvdSplit(
        *(jnp.asarray(a, jnp.float32) for a in (basis, spectrum, v.T)),
        rank=0,
    )
    labels = random_ids(rng, 500, q)
    sigma = lip_jax.solve_tail_sigma(split, feats, labels)
    np.testing.assert_array_equal(sigma[:empty], split.s[:empty])
    assert not np.any(np.asarray(sigma[empty:] == split.s[empty:]))
    with_data = oracles.tail_sigma(split.u, split.s, split.vt, 0, feats, labels)[empty:]
    np.testing.assert_allclose(sigma[empty:], with_data, rtol=1e-3, atol=1e-5 * np.abs(with_data).max())


@pytest.mark.parametrize(("ridge", "ridge_to"), [(0.0, "current"), (0.0, "zero"), (1.0, "current")])
def test_without_rows_the_head_keeps_its_value(rng, ridge, ridge_to):
    kernel = jnp.asarray(random_kernel(rng, 6, 4, 4), jnp.float32)
    nothing = (jnp.zeros((0, 6)), jnp.zeros((0,), jnp.int32))
    refined = lip_jax.refine(kernel, *nothing, 1, ridge=ridge, ridge_to=ridge_to)
    np.testing.assert_allclose(refined, kernel, rtol=1e-6)


def test_without_rows_a_ridge_to_zero_takes_the_tail_to_zero(rng):
    split = lip_jax.svd_split(jnp.asarray(random_kernel(rng, 6, 4, 4), jnp.float32), 1)
    sigma = lip_jax.solve_tail_sigma(
        split, jnp.zeros((0, 6)), jnp.zeros((0,), jnp.int32), ridge=1.0, ridge_to="zero"
    )
    np.testing.assert_array_equal(sigma, [float(split.s[0]), 0, 0, 0])


@pytest.mark.parametrize("rank", range(5))
def test_least_squares_optimum_is_a_fixed_point(rng, x64, rank):
    feats, labels = rng.normal(size=(N, 6)), rng.integers(0, 4, N)
    weights = rng.random(N)
    optimum = oracles.ridge_optimum(feats, oracles.one_hot(labels, 4)[0], weights=weights)
    refined = lip_jax.refine(optimum, feats, labels, rank, weights=weights)
    assert oracles.relative_error(refined, optimum) <= 1e-12


def test_least_squares_optimum_with_intercept_is_a_fixed_point_given_its_bias(rng, x64):
    feats, labels = rng.normal(size=(N, 6)) + 2, rng.integers(0, 4, N)
    optimum, bias = oracles.least_squares_with_intercept(feats, oracles.one_hot(labels, 4)[0])
    with_bias = lip_jax.refine(optimum, feats, labels, 0, bias=bias)
    assert oracles.relative_error(with_bias, optimum) <= 1e-11
    assert oracles.relative_error(lip_jax.refine(optimum, feats, labels, 0), optimum) > 1e-2


def test_ridge_optimum_is_a_fixed_point_of_the_same_ridge_to_zero(rng, x64):
    feats, labels = rng.normal(size=(N, 6)), rng.integers(0, 4, N)
    optimum = oracles.ridge_optimum(feats, oracles.one_hot(labels, 4)[0], ridge=7.0)
    refined = lip_jax.refine(optimum, feats, labels, 0, ridge=7.0, ridge_to="zero")
    assert oracles.relative_error(refined, optimum) <= 1e-12
    other = lip_jax.refine(optimum, feats, labels, 0, ridge=1.0, ridge_to="zero")
    assert oracles.relative_error(other, optimum) > 1e-3


@pytest.mark.parametrize("rank", [0, 2, 4])
@pytest.mark.parametrize("options", [{}, {"ridge": 3.0, "ridge_to": "zero"}], ids=["plain", "ridge to zero"])
def test_refitting_a_fixed_split_twice_is_refitting_it_once(rng, x64, rank, options):
    split = lip_jax.svd_split(random_kernel(rng, 7, 4, 4), rank)
    feats, labels = rng.normal(size=(N, 7)), random_ids(rng, N, 4)
    once = lip_jax.solve_tail_sigma(split, feats, labels, **options)
    twice = lip_jax.solve_tail_sigma(dataclasses.replace(split, s=once), feats, labels, **options)
    np.testing.assert_allclose(twice, once, rtol=1e-13)


def test_permuting_samples_changes_nothing_and_permuting_classes_permutes_columns(rng, x64):
    kernel, feats = separated_kernel(rng, 8, 5), rng.normal(size=(N, 8))
    labels, weights, bias = random_ids(rng, N, 5), rng.random(N), rng.normal(size=5)
    refined = lip_jax.refine(kernel, feats, labels, 2, weights=weights, bias=bias)
    rows, classes = rng.permutation(N), rng.permutation(5)
    by_row = lip_jax.refine(kernel, feats[rows], labels[rows], 2, weights=weights[rows], bias=bias)
    np.testing.assert_allclose(by_row, refined, rtol=1e-10, atol=1e-12)
    renamed = np.where(labels >= 0, np.argsort(classes)[labels], -1)
    by_class = lip_jax.refine(kernel[:, classes], feats, renamed, 2, weights=weights, bias=bias[classes])
    np.testing.assert_allclose(by_class, refined[:, classes], rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from(sorted(SHAPES)),
    ridge=st.sampled_from([0.0, 0.3, 30.0]),
    ridge_to=st.sampled_from(["current", "zero"]),
    with_bias=st.booleans(),
)
def test_objective_never_rises_and_falls_with_every_component_refitted(
    seed, shape, ridge, ridge_to, with_bias
):
    rng = np.random.default_rng(seed)
    q, l, rank = SHAPES[shape]
    kernel, feats = random_kernel(rng, q, l, rank), rng.normal(size=(N, q))
    targets = rng.normal(size=(N, l))
    options = {"weights": rng.random(N), "bias": rng.normal(size=l) if with_bias else np.zeros(l)}
    prior = kernel if ridge_to == "current" else None
    values = [oracles.objective(kernel, feats, targets, ridge=ridge, prior=prior, **options)]
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        for rank in range(min(q, l), -1, -1):
            refined = lip_jax.refine(
                kernel, feats, targets, jnp.int32(rank), ridge=ridge, ridge_to=ridge_to, **options
            )
            values.append(oracles.objective(refined, feats, targets, ridge=ridge, prior=prior, **options))
    assert values[1] == pytest.approx(values[0], rel=1e-12)
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(values))


@given(seed=st.integers(0, 2**31), factor=st.sampled_from([0.5, 2.0, 8.0]))
def test_scaling_laws(seed, factor):
    rng = np.random.default_rng(seed)
    kernel, feats, targets = (
        a.astype(np.float32)
        for a in (separated_kernel(rng, 7, 4), rng.normal(size=(N, 7)), rng.normal(size=(N, 4)))
    )
    sigma = {
        name: lip_jax.solve_tail_sigma(lip_jax.svd_split(kernel, jnp.int32(0)), *data, weights=weights)
        for name, data, weights in (
            ("base", (feats, targets), np.ones(N, np.float32)),
            ("targets", (feats, factor * targets), np.ones(N, np.float32)),
            ("feats", (factor * feats, targets), np.ones(N, np.float32)),
            ("weights", (feats, targets), np.full(N, factor, np.float32)),
        )
    }
    # Powers of two change no mantissa, so these hold exactly.
    np.testing.assert_array_equal(sigma["targets"], factor * sigma["base"])
    np.testing.assert_array_equal(sigma["feats"], sigma["base"] / factor)
    np.testing.assert_array_equal(sigma["weights"], sigma["base"])


@pytest.fixture
def case(rng):
    """Kernel, features, class ids, weights and bias in float32."""
    return (
        jnp.asarray(separated_kernel(rng, 8, 5), jnp.float32),
        jnp.asarray(rng.normal(size=(N, 8)), jnp.float32),
        jnp.asarray(random_ids(rng, N, 5)),
        jnp.asarray(rng.random(N), jnp.float32),
        jnp.asarray(rng.normal(size=5), jnp.float32),
    )


def close(actual, expected, rtol=1e-5):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=1e-6)


@pytest.mark.slow
def test_static_traced_vmapped_and_scanned_ranks_agree(case):
    kernel, feats, labels, weights, bias = case
    ranks = jnp.arange(6, dtype=jnp.int32)

    def refine(rank):
        return lip_jax.refine(kernel, feats, labels, rank, weights=weights, bias=bias)

    static = jnp.stack([refine(rank) for rank in range(6)])
    close(jnp.stack([jax.jit(refine)(rank) for rank in ranks]), static)
    close(jax.vmap(refine)(ranks), static)
    close(jax.lax.scan(lambda carry, rank: (carry, refine(rank)), None, ranks)[1], static)


def test_traced_rank_out_of_range_acts_as_the_nearest_end(case):
    kernel, feats, labels, *_ = case
    refine = jax.jit(lambda rank: lip_jax.refine(kernel, feats, labels, rank))
    np.testing.assert_array_equal(refine(jnp.int32(9)), kernel)
    np.testing.assert_array_equal(refine(jnp.int32(-3)), refine(jnp.int32(0)))


def test_vmap_over_a_stack_of_heads(case, rng):
    _, feats, labels, *_ = case
    kernels = jnp.stack([jnp.asarray(separated_kernel(rng, 8, 5), jnp.float32) for _ in range(3)])
    stacked = jax.vmap(lambda kernel: lip_jax.refine(kernel, feats, labels, 2))(kernels)
    close(stacked, jnp.stack([lip_jax.refine(kernel, feats, labels, 2) for kernel in kernels]))
    splits = jax.vmap(lambda kernel: lip_jax.svd_split(kernel, 2))(kernels)
    chex.assert_shape([splits.u, splits.s, splits.vt], [(3, 8, 5), (3, 5), (3, 5, 5)])
    sigmas = jax.vmap(lip_jax.solve_tail_sigma, in_axes=(0, None, None))(splits, feats, labels)
    close(jax.vmap(lip_jax.spectrum.recompose)(splits, sigmas), stacked)


def test_vmap_over_weightings(case, rng):
    kernel, feats, labels, *_ = case
    weightings = jnp.asarray(rng.random((3, N)), jnp.float32)
    stacked = jax.vmap(lambda w: lip_jax.refine(kernel, feats, labels, 2, weights=w))(weightings)
    one_by_one = [lip_jax.refine(kernel, feats, labels, 2, weights=w) for w in weightings]
    close(stacked, jnp.stack(one_by_one))


def test_one_compilation_serves_every_traced_rank(case, compilations):
    kernel, feats, labels, *_ = case
    refine = jax.jit(chex.assert_max_traces(lambda rank: lip_jax.refine(kernel, feats, labels, rank), n=1))
    ranks = [jnp.int32(rank) for rank in range(6)]
    refine(ranks[0])
    lip_jax.refine(kernel, feats, labels, ranks[0])
    before = compilations()
    for rank in ranks:
        refine(rank)
        lip_jax.refine(kernel, feats, labels, rank)
    assert refine._cache_size() == 1
    assert compilations() == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_full_rank_returns_the_kernel_bit_for_bit(case, dtype):
    kernel, feats, labels, *_ = case
    # A pruned weight may be −0, which + 0 would turn to +0.
    kernel = kernel.at[2, 1].set(-0.0).astype(dtype)
    for rank in (5, jnp.int32(5)):
        refined = lip_jax.refine(kernel, feats, labels, rank)
        assert refined.dtype == kernel.dtype
        assert np.asarray(refined).tobytes() == np.asarray(kernel).tobytes()


def test_inputs_are_not_modified(rng):
    arrays = [
        random_kernel(rng, 8, 5, 5).astype(np.float32),
        rng.normal(size=(N, 8)).astype(np.float32),
        random_ids(rng, N, 5).astype(np.int64),
        rng.random(N).astype(np.float32),
        rng.normal(size=5).astype(np.float32),
    ]
    before = [array.copy() for array in arrays]
    kernel, feats, labels, weights, bias = arrays
    lip_jax.refine(kernel, feats, labels, 1, weights=weights, bias=bias)
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)


def solve(split, feats, targets, weights, bias):
    return lip_jax.solve_tail_sigma(split, feats, targets, weights=weights, bias=bias, ridge=0.5)


def test_gradients_with_the_split_fixed_match_finite_differences(rng, x64):
    split = lip_jax.svd_split(separated_kernel(rng, 6, 4), 1)
    arguments = (rng.normal(size=(20, 6)), rng.normal(size=(20, 4)), 0.5 + rng.random(20), rng.normal(size=4))
    arguments = jax.tree.map(jnp.asarray, arguments)
    check_grads(lambda *a: solve(split, *a), arguments, order=1, modes=["fwd", "rev"], rtol=1e-6)
    check_grads(lambda *a: solve(split, *a), arguments, order=2, modes=["rev"], rtol=1e-4)


@pytest.mark.parametrize(("q", "l"), [(6, 4), (4, 6), (5, 5)], ids=["tall", "wide", "square"])
@pytest.mark.parametrize("rank", [0, 2, 4])
def test_gradient_in_the_kernel_matches_finite_differences_at_separated_spectra(rng, x64, q, l, rank):
    feats, labels = jnp.asarray(rng.normal(size=(30, q))), jnp.asarray(random_ids(rng, 30, l))
    kernel = jnp.asarray(separated_kernel(rng, q, l))
    check_grads(
        lambda k: lip_jax.refine(k, feats, labels, rank), (kernel,), 1, modes=["fwd", "rev"], rtol=1e-5
    )


@pytest.mark.parametrize("rcond", [None, 0.0])
@pytest.mark.parametrize("kind", ["tie", "near tie", "rank-deficient", "zero"])
def test_gradient_in_an_ill_posed_kernel_is_finite_and_not_that_of_rounding(rng, kind, rcond):
    kernel = {
        "tie": jnp.eye(6, 4),
        "near tie": jnp.eye(6, 4).at[1, 1].add(1e-7),
        "rank-deficient": jnp.asarray(random_kernel(rng, 6, 4, 2), jnp.float32),
        "zero": jnp.zeros((6, 4)),
    }[kind]
    feats = jnp.asarray(rng.normal(size=(30, 6)), jnp.float32)
    labels = jnp.asarray(random_ids(rng, 30, 4))
    gradient = jax.grad(lambda k: (lip_jax.refine(k, feats, labels, 1, rcond=rcond) ** 2).sum())(kernel)
    assert float(jnp.abs(gradient).max()) < 100


def test_unusable_rows_under_jit_leave_values_and_gradients_as_without_them(case):
    kernel, feats, labels, weights, bias = case
    targets = jnp.asarray(oracles.as_targets(labels, 5)[0], jnp.float32)
    weights = weights.at[jnp.array([2, 5, 8])].set(0)
    spoilt = (
        kernel,
        feats.at[2].set(jnp.nan),
        targets.at[5, 1].set(jnp.inf),
        weights.at[8].set(jnp.nan).at[2].set(1).at[5].set(1),
        bias,
    )

    @jax.jit
    def value_and_grads(*arguments):
        def loss(kernel, feats, targets, weights, bias):
            refined = lip_jax.refine(kernel, feats, targets, 1, weights=weights, bias=bias, ridge=0.1)
            return (refined**2).sum()

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4))(*arguments)

    clean, dirty = value_and_grads(kernel, feats, targets, weights, bias), value_and_grads(*spoilt)
    chex.assert_tree_all_finite(dirty)
    close(dirty[0], clean[0])
    close(dirty[1][0], clean[1][0], rtol=1e-4)
    used = jnp.ones(N, bool).at[jnp.array([2, 5, 8])].set(False)
    for part in (1, 2, 3):
        close(dirty[1][part][used], clean[1][part][used], rtol=1e-4)
        assert not dirty[1][part][~used].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_features_and_kernels_stay_within_their_rounding(case, dtype):
    # The arithmetic is float32: what is left is the rounding of the inputs, amplified by the gap 0.1,
    # and that of the result. That of the features averages out over the rows.
    kernel, feats, labels, weights, bias = case
    low = [array.astype(dtype) for array in (kernel, feats, weights, bias)]
    eps = float(jnp.finfo(dtype).eps)
    exact = lip_jax.refine(kernel, feats, labels, 2, weights=weights, bias=bias)
    low_kernel = lip_jax.refine(low[0], low[1], labels, 2, weights=low[2], bias=low[3])
    assert low_kernel.dtype == low[0].dtype
    chex.assert_tree_all_finite(low_kernel)
    assert oracles.relative_error(low_kernel, exact) <= 2 * eps
    same_inputs = lip_jax.refine(
        low[0].astype(jnp.float32),
        low[1].astype(jnp.float32),
        labels,
        2,
        weights=low[2].astype(jnp.float32),
        bias=low[3].astype(jnp.float32),
    )
    assert oracles.relative_error(low_kernel, same_inputs) <= eps
    low_feats = lip_jax.refine(kernel, low[1], labels, 2, weights=weights, bias=bias)
    assert low_feats.dtype == kernel.dtype
    assert oracles.relative_error(low_feats, exact) <= eps / 5


def test_float16_features_do_not_overflow_in_the_sums():
    kernel, feats = jnp.eye(3, dtype=jnp.float16), jnp.full((4000, 3), 200.0, jnp.float16)
    refined = lip_jax.refine(kernel, feats, jnp.zeros(4000, jnp.int32), 0)
    chex.assert_tree_all_finite(refined)
    np.testing.assert_allclose(oracles.f64(refined)[0], [1 / 200, 0, 0], rtol=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("q", "l"), [(40, 6), (6, 40), (7, 7), (5, 1)])
def test_a_kernel_that_is_not_finite_is_seen_in_its_singular_values(rng, q, l, value):
    kernel = rng.normal(size=(q, l)).astype(np.float32)
    feats, targets = (rng.normal(size=(9, width)).astype(np.float32) for width in (q, l))
    lip_jax.refine(kernel, feats, targets, 0)
    for entry in ((0, 0), (q - 1, l - 1), (q // 2, l // 2)):
        spoilt = kernel.copy()
        spoilt[entry] = value
        with pytest.raises(ValueError, match="kernel must be finite"):
            lip_jax.refine(spoilt, feats, targets, 0)


def test_a_kernel_whose_squares_overflow_is_not_called_infinite(rng):
    kernel = np.float32(1e30) * rng.normal(size=(8, 5)).astype(np.float32)
    feats, ids = rng.normal(size=(30, 8)).astype(np.float32), rng.integers(0, 5, 30)
    refined = lip_jax.refine(kernel, feats, ids, 5)
    np.testing.assert_array_equal(refined, kernel)


def test_vectors_in_float32_find_no_data_in_float64_where_there_is_none(rng, x64):
    q, empty = 40, 10
    basis, other = (np.linalg.qr(rng.normal(size=(q, q)))[0] for _ in range(2))
    feats = rng.normal(size=(500, q - empty)) @ basis[:, empty:].T
    s = np.linspace(1, 0.1, q).astype(np.float32)
    split = lip_jax.spectrum.SvdSplit(basis.astype(np.float32), s, other.T.astype(np.float32), 0)
    sigma = lip_jax.solve_tail_sigma(split, feats, rng.integers(0, q, 500))
    np.testing.assert_array_equal(sigma[:empty], s[:empty])
    assert not np.isclose(sigma[empty:], s[empty:]).any()
