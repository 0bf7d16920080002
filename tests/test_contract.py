"""One contract for every public function of arrays and every method: what holds for all, said once."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lip_jax
from tests import own_methods

N, Q, L = 12, 6, 4

# Not functions of arrays alone: these have tests of their own.
ELSEWHERE = {
    "accumulate",
    "array_batches",
    "capture_features",
    "capture_layers",
    "compare_heads",
    "feature_batches",
    "moment_accumulator",
    "repair",
    "shard_batches",
    "tail_accumulator",
    "truncate_at",
}
SPACES = [lip_jax, *(getattr(lip_jax, name) for name in lip_jax.__all__)]


def _public_functions():
    """Names of the functions of the top level and of the namespaces; those of noise need its name."""
    for space in filter(inspect.ismodule, SPACES):
        for name in getattr(space, "__all__", ()):
            if inspect.isfunction(getattr(space, name)):
                yield name
    for name, function in vars(lip_jax.noise).items():
        own = inspect.isfunction(function) and function.__module__ == lip_jax.noise.__name__
        if own and not name.startswith("_"):
            yield f"noise.{name}"


class Case(NamedTuple):
    """A public function with static options closed over, and NumPy arguments for it.

    What comes back has the dtype of the arguments, however low, or is in float32, or is both: a head and a
    report of it.
    """

    function: Callable
    arguments: tuple
    keeps_low_precision: bool = False
    reports: bool = False


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
# Labels that logits rise with, as calibration is undefined elsewhere and leaves the head as it is.
LIKED = np.where(np.arange(N) % 5, (FEATS @ KERNEL + _normal(N, L, seed=13)).argmax(axis=1), -1)
LIKED = LIKED.astype(np.int32)
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
    head = lip_jax.refine_calibrated(kernel, feats, labels, rank, bias=bias, weights=weights, ridge=ridge)
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
    return lip_jax.memorised(kernel, feats, labels, bias=bias, weights=weights)


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
        kernel, _moments(feats, labels, weights), rank, bias=bias, ridge=ridge
    )
    return head.kernel, head.bias


def _readout_from(feats, labels, weights, ridge):
    return lip_jax.linear_readout_from(_moments(feats, labels, weights), ridge=ridge)


def _singular_values_from(feats, labels):
    return lip_jax.bounds.feature_singular_values_from(_moments(feats, labels, None))


def _head(tree):
    return tree["head"]["kernel"], tree["head"]["bias"]


def _apply(kernel, bias, feats, labels, rank, weights):
    tree = {"head": {"kernel": kernel, "bias": bias}}
    return _head(lip_jax.apply(tree, feats, labels, rank=rank, head="head", weights=weights))


def _apply_with_report(kernel, bias, feats, labels, rank, weights):
    tree = {"head": {"kernel": kernel, "bias": bias}}
    method = lip_jax.Calibrated(rank)
    tree, report = lip_jax.apply_with_report(tree, feats, labels, method=method, head="head", weights=weights)
    return *_head(tree), report


def _apply_from(kernel, bias, feats, labels, rank, weights):
    tree = {"head": {"kernel": kernel, "bias": bias}}
    return _head(lip_jax.apply_from(tree, _moments(feats, labels, weights), rank=rank, head="head"))


def _apply_readout(kernel, bias, feats, labels, weights):
    tree = {"head": {"kernel": kernel, "bias": bias}}
    return _head(lip_jax.apply_readout(tree, feats, labels, head="head", weights=weights))


def _replace_head(kernel, bias, other):
    return _head(lip_jax.replace_head({"head": {"kernel": kernel, "bias": bias}}, (other, None)))


def _select(kernel, bias, feats, labels, test_feats, weights):
    chosen = lip_jax.select(
        kernel,
        feats,
        labels,
        bias=bias,
        validation=(test_feats, labels, weights),
        weights=weights,
        methods=(lip_jax.Calibrated(), lip_jax.Ridge(0.5)),
        metric="log_loss",
        num_standard_errors=0.5,
    )
    return chosen.kernel, chosen.bias, chosen.report.chosen, chosen.report.log_loss


def _method(method):
    """A method put to a tree, unasked."""

    def call(kernel, bias, feats, labels, weights):
        tree = {"head": {"kernel": kernel, "bias": bias}}
        return _head(lip_jax.apply(tree, feats, labels, method=method, head="head", weights=weights))

    return call


ROWS = (FEATS, IDS, TWO, WEIGHTS, BIAS, THIRD)
HEAD_ROWS = (KERNEL, BIAS, FEATS, LIKED, TWO, WEIGHTS)
READOUT_ROWS = (FEATS, IDS, WEIGHTS, THIRD)
CASES = {
    "apply": Case(_apply, HEAD_ROWS, True),
    "apply_from": Case(_apply_from, HEAD_ROWS, True),
    "apply_readout": Case(_apply_readout, (KERNEL, BIAS, FEATS, IDS, WEIGHTS), True),
    "apply_with_report": Case(_apply_with_report, HEAD_ROWS, True, reports=True),
    "candidate_targets": Case(lip_jax.candidate_targets, (MASK,), True),
    "effective_rank": Case(lip_jax.spectrum.effective_rank, (SPECTRUM,)),
    "feature_singular_values": Case(lip_jax.bounds.feature_singular_values, (FEATS,)),
    "feature_singular_values_from": Case(_singular_values_from, (FEATS, IDS)),
    "fit_logit_scale": Case(_weighted(lip_jax.fit_logit_scale), (LOGITS, IDS, WEIGHTS)),
    "head_metrics": Case(_weighted(lip_jax.head_metrics), (LOGITS, IDS, WEIGHTS)),
    "kernel_similarity": Case(lip_jax.spectrum.kernel_similarity, (KERNEL, OTHER, ONE, TWO)),
    "kernel_similarity_grid": Case(lip_jax.spectrum.kernel_similarity_grid, (KERNEL, OTHER)),
    "label_quality": Case(_readout(lip_jax.label_quality), READOUT_ROWS),
    "leave_one_out_scores": Case(_readout(lip_jax.leave_one_out_scores), READOUT_ROWS),
    "linear_readout": Case(_readout(lip_jax.linear_readout), READOUT_ROWS),
    "linear_readout_from": Case(_readout_from, READOUT_ROWS),
    "memorised": Case(_memorised, (KERNEL, BIAS, FEATS, IDS, WEIGHTS)),
    "mixed_gap": Case(lip_jax.bounds.mixed_gap, (SPECTRUM, OTHER_SPECTRUM, TWO)),
    "noise.asymmetric": Case(_with_classes(lip_jax.noise.asymmetric), (KEY, IDS, THIRD)),
    "noise.candidate_sets": Case(_with_classes(lip_jax.noise.candidate_sets), (KEY, IDS, THIRD)),
    "noise.instance": Case(_with_classes(lip_jax.noise.instance), (KEY, FEATS, IDS, THIRD)),
    "noise.symmetric": Case(_with_classes(lip_jax.noise.symmetric), (KEY, IDS, THIRD)),
    "noise.transition": Case(lip_jax.noise.transition, (KEY, IDS, TRANSITION)),
    "predictive_power": Case(_predictive_power, (FEATS, IDS, _normal(N, Q, seed=12), WEIGHTS, THIRD)),
    "principal_angles": Case(lip_jax.spectrum.principal_angles, (_basis(2, 8), _basis(2, 9))),
    "purified_readout": Case(_readout(lip_jax.purified_readout), READOUT_ROWS),
    "purify": Case(_purify, (FEATS, IDS, WEIGHTS)),
    "rank_for_energy": Case(lip_jax.spectrum.rank_for_energy, (SPECTRUM, THIRD)),
    "recompose": Case(_recompose, (*_svd(KERNEL), TWO, OTHER_SPECTRUM), True),
    "refine": Case(_refine, (KERNEL, *ROWS), True),
    "refine_calibrated": Case(_refine_calibrated, (*HEAD_ROWS, THIRD), True),
    "refine_calibrated_from": Case(_refine_calibrated_from, (*HEAD_ROWS, THIRD), True),
    "refine_from": Case(_refine_from, (KERNEL, *ROWS), True),
    "replace_head": Case(_replace_head, (KERNEL, BIAS, OTHER), True),
    "select": Case(_select, (KERNEL, BIAS, FEATS, IDS, _normal(N, Q, seed=12), WEIGHTS), True, reports=True),
    "sin_theta_bound": Case(_sin_theta_bound, (FEATS, THIRD, THIRD, THIRD)),
    "solve_tail_sigma": Case(_solve, (*_svd(KERNEL), TWO, FEATS, IDS, WEIGHTS, BIAS, THIRD), True),
    "solve_tail_sigma_from": Case(_solve_from, (*_svd(KERNEL), TWO, FEATS, IDS, WEIGHTS, BIAS, THIRD), True),
    "subspace_similarity": Case(lip_jax.subspace_similarity, (_basis(2, 8), _basis(3, 9), ONE, TWO)),
    "subspace_similarity_grid": Case(lip_jax.spectrum.subspace_similarity_grid, (_basis(2, 8), _basis(3, 9))),
    "svd_split": Case(lip_jax.svd_split, (KERNEL, TWO)),
    "wedin_bound": Case(lip_jax.bounds.wedin_bound, (KERNEL, OTHER, TWO)),
}
METHODS = {
    "Published": lip_jax.Published(2, use_bias=True, ridge=0.3),
    "Calibrated": lip_jax.Calibrated(2, ridge=0.3),
    "Ridge": lip_jax.Ridge(),
    "Ridge by PRESS": lip_jax.Ridge(criterion="press"),
    "Logistic": lip_jax.Logistic(0.5, tolerance=1e-4, max_steps=40),
    "Purified": lip_jax.Purified(strength=0.5),
    "Purified, ridge": lip_jax.Purified(solver="ridge", strength=0.5),
    "a readout of one's own": own_methods.ClassMeans(),
    "a refit of one's own": own_methods.Shrunk(),
}
ALL = CASES | {
    name: Case(_method(method), (KERNEL, BIAS, FEATS, LIKED, WEIGHTS), True)
    for name, method in METHODS.items()
}
# A program that searches takes seconds to compile.
SEARCHES = {"Logistic", "Purified", "purified_readout"}
DIFFERENTIABLE = {name for name in ALL if not name.startswith("noise.")} - {
    *SEARCHES,  # a search ends when it is done
    "Purified, ridge",
    "purify",
    "rank_for_energy",
    "select",
}
# Shared, so that tests which ask for the same program compile it once.
JITTED = {name: jax.jit(case.function) for name, case in ALL.items()}
every_case = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in {*SEARCHES, "select"})) for name in ALL]
)


def is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype if is_float(leaf) else leaf.dtype), tree)


def assert_close(actual, expected, rtol=1e-5):
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=1e-6)


def test_every_public_function_is_under_the_contract():
    assert set(_public_functions()) - ELSEWHERE == set(CASES)


def test_every_case_of_a_refit_changes_the_head():
    for name in ("apply", "apply_from", "apply_with_report", "refine_calibrated", "refine_calibrated_from"):
        kernel = JITTED[name](*ALL[name].arguments)[0]
        assert float(jnp.abs(kernel - KERNEL).max()) > 0.01, name


def test_every_method_is_under_the_contract():
    methods = {name for name in lip_jax.__all__ if hasattr(getattr(lip_jax, name), "path")}
    assert methods == {type(method).__name__ for method in METHODS.values()} - {"ClassMeans", "Shrunk"}


@every_case
def test_numpy_arrays_device_arrays_and_jit_give_one_answer(name):
    function, arguments = ALL[name][:2]
    on_device = jax.tree.map(jnp.asarray, arguments)
    expected = JITTED[name](*on_device)
    for given in (arguments, on_device):
        assert_close(jax.tree.map(jnp.asarray, function(*given)), expected)


@every_case
def test_second_call_with_the_same_shapes_compiles_nothing(name, compilations):
    case = ALL[name]
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
            results[dtype] = jax.tree.leaves(JITTED[name](*cast(ALL[name].arguments, dtype)))
        floating = {leaf.dtype.name for leaf in results[dtype] if is_float(leaf)}
        others = {leaf.dtype.name for leaf in results[dtype] if not is_float(leaf)}
        assert floating <= {dtype}
        assert others <= {"int32", "bool"}
    if name == "noise.transition":
        return  # its draws follow the dtype of the matrix
    for single, double in zip(*results.values(), strict=True):
        # The signs of singular vectors are arbitrary.
        np.testing.assert_allclose(np.abs(single), np.abs(double), rtol=1e-4, atol=1e-5)


@every_case
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_arguments_give_finite_results_in_the_stated_dtype(name, dtype):
    results = jax.tree.leaves(JITTED[name](*cast(ALL[name].arguments, dtype)))
    floating = [leaf for leaf in results if is_float(leaf)]
    case = ALL[name]
    stated = {dtype} if case.keeps_low_precision else {"float32"}
    assert {leaf.dtype.name for leaf in floating} <= stated | ({"float32"} if case.reports else set())
    chex.assert_tree_all_finite(floating)


@every_case
def test_vmap_is_a_loop(name):
    function, arguments = ALL[name][:2]
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1] if leaf.ndim else leaf]), arguments)
    looped = [JITTED[name](*(leaf[i] for leaf in stacked)) for i in range(2)]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *looped)
    assert_close(jax.jit(jax.vmap(function))(*stacked), expected)


@pytest.mark.parametrize("name", sorted(DIFFERENTIABLE))
def test_gradients_are_finite(name):
    function, arguments = ALL[name][:2]
    arguments = cast(arguments, "float32")

    def total(*arguments):
        return sum(leaf.sum() for leaf in jax.tree.leaves(function(*arguments)) if is_float(leaf))

    places = tuple(i for i, leaf in enumerate(arguments) if is_float(leaf))
    chex.assert_tree_all_finite(jax.jit(jax.grad(total, argnums=places))(*arguments))
