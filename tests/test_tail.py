"""The sums behind a refit: additive over rows, and never an n×l array from class ids."""

import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lip_jax
from lip_jax.sums import tail
from lip_jax.sums.tail import PROBES, centred_tail_sums, tail_sums
from tests import oracles

N, Q, L = 30, 6, 4


@pytest.fixture
def factors(rng):
    split = lip_jax.svd_split(rng.normal(size=(Q, L)).astype(np.float32), 0)
    return split.u, split.vt


@pytest.fixture
def rows(rng):
    """Features, class ids and weights."""
    return (
        jnp.asarray(rng.normal(size=(N, Q)), jnp.float32),
        jnp.asarray(rng.integers(-1, L, N), jnp.int32),
        jnp.asarray(rng.random(N), jnp.float32),
    )


def test_sums_match_their_definition(factors, rows, rng):
    bias = rng.normal(size=L).astype(np.float32)
    sums = tail_sums(*factors, *rows, bias)
    feats, targets, weights = oracles.used_rows(rows[0], rows[1], L, rows[2], bias)
    u, vt = (oracles.f64(part) for part in factors)
    expected = {
        "num": (weights[:, None] * (feats @ u) * (targets @ vt.T)).sum(axis=0),
        "den": (weights[:, None] * (feats @ u) ** 2).sum(axis=0),
        "ignored": 0,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(sums, name), value, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("components", [0, 1, 47, 64, 300])
@pytest.mark.parametrize("spread", ["even", "one direction", "one entry"])
def test_energy_is_seen_within_a_small_factor(rng, components, spread):
    n, q = 50, 300
    if spread == "one entry":
        feats = np.float32(rng.normal(size=(n, 1))) * np.eye(q, dtype=np.float32)[7]
    else:
        feats = np.float32(rng.normal(size=(n, q if spread == "even" else 1)))
        feats = feats if spread == "even" else feats * np.float32(rng.normal(size=q))
    u = np.linalg.qr(rng.normal(size=(q, components)))[0].astype(np.float32)
    vt, labels = np.eye(components, 301, dtype=np.float32), np.zeros(n, np.int32)
    energy = float(tail_sums(u, vt, feats, labels, None, None).energy)
    assert 0.1 < energy / (feats.astype(np.float64) ** 2).sum() < 10


@pytest.fixture(params=[False, True], ids=["wide", "skinny"])
def many_rows(rng, request, monkeypatch):
    """More rows than a chunk, of which some do not count, at a large mean and in order of their class."""
    monkeypatch.setattr(tail, "CPU_CHUNK_ROWS", 16)
    monkeypatch.setattr(tail, "ORIGIN_ROWS", 8)
    jax.clear_caches()
    n, q, l = 101, 300 if request.param else 7, 5
    labels = np.sort(rng.integers(0, l, n)).astype(np.int32)
    feats = rng.normal(size=(n, q)) + 2 * rng.normal(size=(l, q))[labels] + 100
    labels[:20] = -1
    split = lip_jax.svd_split(rng.normal(size=(q, l)).astype(np.float32), 0)
    yield (split.u, split.vt), (feats.astype(np.float32), labels, rng.random(n).astype(np.float32))
    jax.clear_caches()


def test_chunks_of_rows_add_up_to_all(many_rows):
    (u, vt), rows = many_rows
    sums = tail_sums(u, vt, *rows, None)
    feats, targets, weights = oracles.used_rows(rows[0], rows[1], 5, rows[2], None)
    along_u, along_v = feats @ oracles.f64(u), targets @ oracles.f64(vt).T
    np.testing.assert_allclose(sums.num, (weights[:, None] * along_u * along_v).sum(axis=0), rtol=1e-4)
    np.testing.assert_allclose(sums.den, (weights[:, None] * along_u**2).sum(axis=0), rtol=1e-5)
    assert int(sums.ignored) == 0


def test_centred_sums_lose_nothing_at_a_large_mean(many_rows):
    (u, vt), rows = many_rows
    sums, mean_u = jax.jit(centred_tail_sums)(u, vt, *rows)
    feats, targets, weights = oracles.used_rows(rows[0], rows[1], 5, rows[2], None)
    along_u, along_v = feats @ oracles.f64(u), targets @ oracles.f64(vt).T
    share = (weights / weights.sum())[:, None]
    mean = (share * along_u).sum(axis=0)
    off_u, off_v = along_u - mean, along_v - (share * along_v).sum(axis=0)
    np.testing.assert_allclose(mean_u, mean, rtol=1e-5)
    scale = np.sqrt((weights[:, None] * off_u**2).sum(axis=0) * (weights[:, None] * off_v**2).sum(axis=0))
    np.testing.assert_allclose(sums.den, (weights[:, None] * off_u**2).sum(axis=0), rtol=1e-3)
    np.testing.assert_allclose(
        sums.num, (weights[:, None] * off_u * off_v).sum(axis=0), atol=1e-4 * scale.max()
    )


def assert_sums_of(sums, split, feats, targets):
    """Those of rows in double precision."""
    along_u, along_v = feats @ oracles.f64(split.u), targets @ oracles.f64(split.vt).T
    scale = np.linalg.norm(along_u, axis=0) * np.linalg.norm(along_v, axis=0)
    np.testing.assert_allclose(sums.num, (along_u * along_v).sum(axis=0), atol=1e-5 * scale.max())
    np.testing.assert_allclose(sums.den, (along_u**2).sum(axis=0), rtol=1e-5)


@pytest.mark.parametrize("spoilt", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_targets_of_many_classes_are_not_cut_and_give_the_same_sums(rng, monkeypatch, shifted, spoilt):
    for platform in ("CPU", "ACCELERATOR"):
        monkeypatch.setattr(tail, f"{platform}_CHUNK_ROWS", 16)
    jax.clear_caches()
    n, q, l = 101, 7, 300
    split = lip_jax.svd_split(rng.normal(size=(q, l)).astype(np.float32), 0)
    feats, targets = (rng.normal(size=(n, size)).astype(np.float32) for size in (q, l))
    if spoilt:
        targets[5, 9] = np.nan
    # A bias has to be taken from targets, and is from a chunk of them.
    bias = rng.normal(size=l).astype(np.float32) if shifted else None
    arguments = (split.u, split.vt, feats, targets, None, bias)
    # Features in seven chunks, what they are projected to all at once.
    shapes = set(shapes_in(jax.make_jaxpr(tail_sums)(*arguments).jaxpr))
    assert (15, 16) in shapes
    assert ((n, 16) in shapes) == (not shifted)
    sums = tail_sums(*arguments)
    used = np.isfinite(targets).all(axis=1)
    used_feats, used_targets, _ = oracles.used_rows(feats[used], targets[used], l, None, bias)
    assert_sums_of(sums, split, used_feats, used_targets)
    assert int(sums.ignored) == spoilt
    jax.clear_caches()


@pytest.mark.parametrize("soft", [False, True])
def test_long_rows_are_projected_in_blocks_of_columns_and_give_the_same_sums(rng, soft):
    n, q, l = 40, 1030, 70
    split = lip_jax.svd_split(rng.normal(size=(q, l)).astype(np.float32), 0)
    feats = rng.normal(size=(n, q)).astype(np.float32)
    labels = rng.normal(size=(n, l)).astype(np.float32) if soft else rng.integers(0, l, n).astype(np.int32)
    shapes = set(shapes_in(jax.make_jaxpr(tail_sums)(split.u, split.vt, feats, labels, None, None).jaxpr))
    assert {(n, 64), (n, l + PROBES - 64)} <= shapes
    sums = tail_sums(split.u, split.vt, feats, labels, None, None)
    assert_sums_of(sums, split, oracles.f64(feats), oracles.as_targets(labels, l)[0])


def test_a_gradient_through_chunks_is_that_of_all_rows(many_rows, monkeypatch):
    (u, vt), (feats, labels, weights) = many_rows
    spoilt = feats.copy()
    spoilt[3] = np.nan

    def value(u, feats):
        sums = tail_sums(u, vt, feats, labels, weights, None)
        return (sums.num / sums.den).sum()

    chunked = jax.grad(value, argnums=(0, 1))(u, spoilt)
    monkeypatch.setattr(tail, "CPU_CHUNK_ROWS", 1000)
    jax.clear_caches()
    for part, whole in zip(chunked, jax.grad(value, argnums=(0, 1))(u, feats), strict=True):
        np.testing.assert_allclose(part, whole, rtol=1e-3, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize("start", [0, 1, L])
def test_the_sums_of_some_components_are_those_of_all(factors, rows, start):
    (u, vt), full = factors, tail_sums(*factors, *rows, None)
    part = tail_sums(u[:, start:], vt[start:], *rows, None)
    for name in ("num", "den"):
        np.testing.assert_allclose(getattr(part, name), getattr(full, name)[start:], rtol=1e-6)


def test_unusable_rows_are_counted_and_leave_the_sums_as_without_them(factors, rows):
    feats, labels, weights = rows
    labels = labels.at[:6].set(1)
    spoilt = (
        feats.at[0].set(jnp.nan).at[1, 2].set(jnp.inf).at[2].set(3e38),
        labels.at[3].set(L),
        weights.at[4].set(-1).at[5].set(jnp.nan),
    )
    sums = tail_sums(*factors, *spoilt, None)
    assert int(sums.ignored) == 6
    without = tail_sums(*factors, *(part[6:] for part in (feats, labels, weights)), None)
    chex.assert_trees_all_close((sums.num, sums.den, sums.energy), (without.num, without.den, without.energy))


def test_a_row_of_weight_zero_may_hold_anything(factors, rows):
    feats, labels, weights = rows
    weights = weights.at[:4].set(0)
    spoilt = feats.at[0].set(jnp.nan).at[1].set(jnp.inf).at[2].set(3e38).at[3].set(1e18)
    sums = tail_sums(*factors, spoilt, labels, weights, None)
    chex.assert_trees_all_close(sums, tail_sums(*factors, feats, labels, weights, None), rtol=1e-6)


def shapes_in(jaxpr):
    """Shapes of every value in a jaxpr, inner ones included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield tuple(variable.aval.shape)
        for inner in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                yield from shapes_in(getattr(inner, "jaxpr", inner))


def is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def test_rank_known_at_trace_time_pays_only_for_its_own_tail():
    n, q, l = 101, 23, 13
    arguments = (jnp.ones((q, l)), jnp.ones((n, q)), jnp.zeros(n, jnp.int32))
    static = set(shapes_in(jax.make_jaxpr(lambda *a: lip_jax.refine(*a, 10))(*arguments).jaxpr))
    traced = set(shapes_in(jax.make_jaxpr(lip_jax.refine)(*arguments, jnp.int32(10)).jaxpr))
    # With probes, up to 16.
    assert (n, 16) in static
    assert (n, l + PROBES) not in static
    assert (n, l + PROBES) in traced


@pytest.mark.parametrize(("components", "columns"), [(12, 16), (20, 24), (50, 64), (100, 104), (116, 128)])
def test_columns_are_padded_to_16_and_past_half_to_a_multiple_of_32(components, columns):
    n, q = 101, 150
    arguments = (
        jnp.ones((q, components)),
        jnp.ones((components, 120)),
        jnp.ones((n, q)),
        jnp.zeros(n, jnp.int32),
    )
    assert (n, columns) in set(shapes_in(jax.make_jaxpr(tail_sums)(*arguments, None, None).jaxpr))


def test_a_chunk_of_long_rows_has_fewer_of_them_on_the_cpu():
    n, q, l = 50_000, 2048, 200
    rows = (jax.ShapeDtypeStruct((n, q), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.int32))
    traced = jax.jit(tail_sums).trace(jnp.ones((q, l)), jnp.ones((l, l)), *rows, None, None)
    text = traced.lower(lowering_platforms=("cpu",)).as_text()
    lengths = set(re.findall(rf"dot_general.*tensor<(\d+)x{q}xf32>", text))
    # 49 chunks of equal length, none of more than 2²¹ entries.
    assert lengths == {"1021"}


@pytest.mark.parametrize("gradient", [False, True])
def test_class_ids_build_no_array_of_samples_by_classes(gradient):
    # r = min(q, l) is below l, so that the (n, r) coordinates of the rows are told from (n, l).
    n, q, l = 211, 61, 97
    arguments = (jnp.ones((q, l)), jnp.ones((n, q)))

    def refine(labels):
        def value(kernel, feats):
            refined = lip_jax.refine(
                kernel, feats, labels, jnp.int32(2), weights=jnp.ones(n), bias=jnp.ones(l)
            )
            return (refined**2).sum()

        return jax.make_jaxpr(jax.grad(value, argnums=(0, 1)) if gradient else value)(*arguments).jaxpr

    from_ids = set(shapes_in(refine(jnp.zeros(n, jnp.int32))))
    from_targets = set(shapes_in(refine(jnp.zeros((n, l)))))
    assert (n, q) in from_ids
    assert not any(set(shape) >= {n, l} for shape in from_ids)
    assert any(set(shape) >= {n, l} for shape in from_targets)
    # Two terms of all rows, stacked: these are fewer than a chunk.
    assert max(map(math.prod, from_ids)) == 2 * n * (q + PROBES)
