"""One contract for every public function of arrays: what holds for all of them, said once."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import lip_jax

N, Q, L = 12, 6, 4

# Not functions of arrays alone, or with a report beside the arrays: these have tests of their own.
ELSEWHERE = {
    "accumulate",
    "apply",
    "apply_from",
    "apply_readout",
    "apply_with_report",
    "array_batches",
    "capture_features",
    "feature_batches",
    "moment_accumulator",
    "replace_head",
    "select",
    "shard_batches",
    "tail_accumulator",
    "truncate_at",
}


class Case(NamedTuple):
    """A public function with static options closed over, and NumPy arguments for it."""

    function: Callable
    arguments: tuple
    keeps_low_precision: bool = False


def _rng(seed):
    return np.random.default_rng(seed)


def _normal(*shape, seed=0):
    return _rng(seed).normal(size=shape).astype(np.float32)


def _basis(k, seed):
    return np.linalg.qr(_rng(seed).normal(size=(L, k)))[0].astype(np.float32)


def _svd(kernel):
    return tuple(np.ascontiguousarray(part) for part in np.linalg.svd(kernel, full_matrices=False))


KERNEL, OTHER = _normal(Q, L), _normal(Q, L, seed=1)
FEATS, WEIGHTS, BIAS = _normal(N, Q, seed=2), _rng(3).random(N, np.float32), _normal(L, seed=4)
IDS = _rng(5).integers(-1, L, N).astype(np.int32)
LOGITS = _normal(N, L, seed=11)
MASK = (_rng(6).random((N, L)) < 0.5).astype(np.float32)
MASK[:, 0] = 1  # no set is empty: NaN would stand for it
TRANSITION = _rng(7).dirichlet(np.ones(L), L).astype(np.float32)
KEY = np.array([0, 42], np.uint32)
SPECTRUM, OTHER_SPECTRUM = _svd(KERNEL)[1], _svd(OTHER)[1]
ONE, TWO, THIRD = np.array(1, np.int32), np.array(2, np.int32), np.array(0.3, np.float32)


def _solve(u, s, vt, rank, feats, labels, weights, bias, ridge):
    split = lip_jax.spectrum.SvdSplit(u, s, vt, rank)
    return lip_jax.solve_tail_sigma(split, feats, labels, weights=weights, bias=bias, ridge=ridge)


def _refine(kernel, feats, labels, rank, weights, bias, ridge):
    return lip_jax.refine(kernel, feats, labels, rank, weights=weights, bias=bias, ridge=ridge)


def _refine_calibrated(kernel, bias, feats, labels, rank, weights, ridge):
    head = lip_jax.refine_calibrated(kernel, bias, feats, labels, rank, weights=weights, ridge=ridge)
    return head.kernel, head.bias


def _weighted(function):
    return lambda logits, labels, weights: function(logits, labels, weights=weights)


def _recompose(u, s, vt, rank, sigma):
    return lip_jax.spectrum.recompose(lip_jax.spectrum.SvdSplit(u, s, vt, rank), sigma)


def _with_classes(function):
    return lambda *arguments: function(*arguments, num_classes=L)


def _sin_theta_bound(feats, gap, rate, ridge):
    return lip_jax.sin_theta_bound(feats, num_classes=L, gap=gap, flip_rate=rate, ridge=ridge)


def _predictive_power(feats, labels, test_feats, weights, ridge):
    options = {"num_classes": L, "ridge": ridge, "weights": weights}
    return lip_jax.predictive_power(feats, labels, test_feats, labels, **options)


def _readout(function, **options):
    def call(feats, labels, weights, ridge):
        return function(feats, labels, num_classes=L, weights=weights, ridge=ridge, **options)

    return call


def _purify(feats, labels, weights):
    purified = lip_jax.purify(feats, labels, num_classes=L, weights=weights)
    return purified.trusted, purified.weights, purified.kept, purified.rescued


def _memorised(kernel, bias, feats, labels, weights):
    return lip_jax.memorised(kernel, bias, feats, labels, weights=weights)


def _moments(feats, labels, weights, accumulator=None):
    dtype = jnp.float64 if feats.dtype == np.float64 else jnp.float32
    accumulator = accumulator or lip_jax.moment_accumulator(Q, L, dtype=dtype)
    return accumulator.update(accumulator.init(), feats, labels, weights)


def _solve_from(u, s, vt, rank, feats, labels, weights, bias, ridge):
    split = lip_jax.spectrum.SvdSplit(u, s, vt, rank)
    moments = _moments(feats, labels, weights, lip_jax.tail_accumulator(split))
    return lip_jax.methods.solve_tail_sigma_from(split, moments, bias=bias, ridge=ridge)


def _refine_from(kernel, feats, labels, rank, weights, bias, ridge):
    return lip_jax.refine_from(kernel, _moments(feats, labels, weights), rank, bias=bias, ridge=ridge)


def _refine_calibrated_from(kernel, bias, feats, labels, rank, weights, ridge):
    head = lip_jax.methods.refine_calibrated_from(
        kernel, bias, _moments(feats, labels, weights), rank, ridge=ridge
    )
    return head.kernel, head.bias


def _readout_from(feats, labels, weights, ridge):
    return lip_jax.linear_readout_from(_moments(feats, labels, weights), ridge=ridge)


def _singular_values_from(feats, labels):
    return lip_jax.bounds.feature_singular_values_from(_moments(feats, labels, None))


ROWS = (FEATS, IDS, TWO, WEIGHTS, BIAS, THIRD)
READOUT_ROWS = (FEATS, IDS, WEIGHTS, THIRD)
CASES = {
    "asymmetric_noise": Case(_with_classes(lip_jax.noise.asymmetric), (KEY, IDS, THIRD)),
    "candidate_sets": Case(_with_classes(lip_jax.noise.candidate_sets), (KEY, IDS, THIRD)),
    "candidate_targets": Case(lip_jax.candidate_targets, (MASK,), True),
    "effective_rank": Case(lip_jax.spectrum.effective_rank, (SPECTRUM,)),
    "feature_singular_values": Case(lip_jax.bounds.feature_singular_values, (FEATS,)),
    "feature_singular_values_from": Case(_singular_values_from, (FEATS, IDS)),
    "fit_logit_scale": Case(_weighted(lip_jax.fit_logit_scale), (LOGITS, IDS, WEIGHTS)),
    "head_metrics": Case(_weighted(lip_jax.head_metrics), (LOGITS, IDS, WEIGHTS)),
    "instance_noise": Case(_with_classes(lip_jax.noise.instance), (KEY, FEATS, IDS, THIRD)),
    "kernel_similarity": Case(lip_jax.spectrum.kernel_similarity, (KERNEL, OTHER, ONE, TWO)),
    "kernel_similarity_grid": Case(lip_jax.spectrum.kernel_similarity_grid, (KERNEL, OTHER)),
    "label_quality": Case(_readout(lip_jax.label_quality), READOUT_ROWS),
    "leave_one_out_scores": Case(_readout(lip_jax.leave_one_out_scores), READOUT_ROWS),
    "linear_readout": Case(_readout(lip_jax.linear_readout), READOUT_ROWS),
    "linear_readout_from": Case(_readout_from, READOUT_ROWS),
    "memorised": Case(_memorised, (KERNEL, BIAS, FEATS, IDS, WEIGHTS)),
    "mixed_gap": Case(lip_jax.bounds.mixed_gap, (SPECTRUM, OTHER_SPECTRUM, TWO)),
    "predictive_power": Case(_predictive_power, (FEATS, IDS, _normal(N, Q, seed=12), WEIGHTS, THIRD)),
    "principal_angles": Case(lip_jax.spectrum.principal_angles, (_basis(2, 8), _basis(2, 9))),
    "purified_readout": Case(_readout(lip_jax.purified_readout, tolerance=1e-2), READOUT_ROWS),
    "purify": Case(_purify, (FEATS, IDS, WEIGHTS)),
    "rank_for_energy": Case(lip_jax.spectrum.rank_for_energy, (SPECTRUM, THIRD)),
    "recompose": Case(_recompose, (*_svd(KERNEL), TWO, OTHER_SPECTRUM), True),
    "refine": Case(_refine, (KERNEL, *ROWS), True),
    "refine_calibrated": Case(_refine_calibrated, (KERNEL, BIAS, FEATS, IDS, TWO, WEIGHTS, THIRD), True),
    "refine_calibrated_from": Case(
        _refine_calibrated_from, (KERNEL, BIAS, FEATS, IDS, TWO, WEIGHTS, THIRD), True
    ),
    "refine_from": Case(_refine_from, (KERNEL, *ROWS), True),
    "sin_theta_bound": Case(_sin_theta_bound, (FEATS, THIRD, THIRD, THIRD)),
    "solve_tail_sigma": Case(_solve, (*_svd(KERNEL), TWO, FEATS, IDS, WEIGHTS, BIAS, THIRD), True),
    "solve_tail_sigma_from": Case(_solve_from, (*_svd(KERNEL), TWO, FEATS, IDS, WEIGHTS, BIAS, THIRD), True),
    "subspace_similarity": Case(lip_jax.subspace_similarity, (_basis(2, 8), _basis(3, 9), ONE, TWO)),
    "subspace_similarity_grid": Case(lip_jax.spectrum.subspace_similarity_grid, (_basis(2, 8), _basis(3, 9))),
    "svd_split": Case(lip_jax.svd_split, (KERNEL, TWO)),
    "symmetric_noise": Case(_with_classes(lip_jax.noise.symmetric), (KEY, IDS, THIRD)),
    "transition_noise": Case(lip_jax.noise.transition, (KEY, IDS, TRANSITION)),
    "wedin_bound": Case(lip_jax.bounds.wedin_bound, (KERNEL, OTHER, TWO)),
}
DIFFERENTIABLE = set(CASES) - {
    "asymmetric_noise",
    "candidate_sets",
    "instance_noise",
    "purified_readout",  # its search ends when it is done
    "purify",
    "rank_for_energy",
    "symmetric_noise",
    "transition_noise",
}
# Shared, so that tests which ask for the same program compile it once.
JITTED = {name: jax.jit(case.function) for name, case in CASES.items()}
every_case = pytest.mark.parametrize("name", CASES)


def is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype if is_float(leaf) else leaf.dtype), tree)


def assert_close(actual, expected, rtol=1e-5):
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=1e-6)


def test_every_public_function_is_under_the_contract():
    functions = {name for name in lip_jax.__all__ if inspect.isfunction(getattr(lip_jax, name))}
    assert functions - ELSEWHERE == set(CASES)


class TestVariants(chex.TestCase):
    """Jitted or not, from NumPy arrays or from device arrays: one answer."""

    @chex.variants(with_device=True, without_device=True)
    @parameterized.named_parameters(*((name, name) for name in CASES))
    def test_every_variant_gives_the_same_answer(self, name):
        function, arguments, _ = CASES[name]
        expected = JITTED[name](*jax.tree.map(jnp.asarray, arguments))
        assert_close(jax.tree.map(jnp.asarray, self.variant(function)(*arguments)), expected)


@every_case
def test_second_call_with_the_same_shapes_compiles_nothing(name, compilations):
    case = CASES[name]
    chex.clear_trace_counter()
    jitted = jax.jit(chex.assert_max_traces(case.function, n=1))
    first = jax.tree.map(jnp.asarray, case.arguments)
    # Other ids of the same shape: a value that had become static would compile again.
    second = tuple(x[::-1].copy() if x.dtype == np.int32 and x.ndim else x for x in case.arguments)
    second = jax.tree.map(jnp.asarray, second)
    jax.block_until_ready((jitted(*first), case.function(*first)))
    before = compilations()
    jax.block_until_ready((jitted(*second), case.function(*second)))
    assert compilations() == before


def test_compilations_are_counted(compilations):
    before = compilations()
    jax.jit(lambda x: x + 1)(jnp.ones(3))
    assert compilations() > before


@every_case
def test_double_precision_confirms_single_and_each_keeps_its_dtype(name):
    results = {}
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            results[dtype] = jax.tree.leaves(JITTED[name](*cast(CASES[name].arguments, dtype)))
        floating = {leaf.dtype.name for leaf in results[dtype] if is_float(leaf)}
        others = {leaf.dtype.name for leaf in results[dtype] if not is_float(leaf)}
        assert floating <= {dtype}
        assert others <= {"int32", "bool"}
    if name == "transition_noise":
        return  # its draws follow the dtype of the matrix
    for single, double in zip(*results.values(), strict=True):
        # The signs of singular vectors are arbitrary.
        np.testing.assert_allclose(np.abs(single), np.abs(double), rtol=1e-4, atol=1e-5)


@every_case
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_arguments_give_finite_results_in_the_stated_dtype(name, dtype):
    results = jax.tree.leaves(JITTED[name](*cast(CASES[name].arguments, dtype)))
    floating = [leaf for leaf in results if is_float(leaf)]
    assert {leaf.dtype.name for leaf in floating} <= (
        {dtype} if CASES[name].keeps_low_precision else {"float32"}
    )
    chex.assert_tree_all_finite(floating)


@every_case
def test_vmap_is_a_loop(name):
    function, arguments, _ = CASES[name]
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1] if leaf.ndim else leaf]), arguments)
    looped = [JITTED[name](*(leaf[i] for leaf in stacked)) for i in range(2)]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *looped)
    assert_close(jax.jit(jax.vmap(function))(*stacked), expected)


@pytest.mark.parametrize("name", sorted(DIFFERENTIABLE))
def test_gradients_are_finite(name):
    function, arguments, _ = CASES[name]
    arguments = cast(arguments, "float32")

    def total(*arguments):
        return sum(leaf.sum() for leaf in jax.tree.leaves(function(*arguments)) if is_float(leaf))

    places = tuple(i for i, leaf in enumerate(arguments) if is_float(leaf))
    chex.assert_tree_all_finite(jax.jit(jax.grad(total, argnums=places))(*arguments))
