"""Noise models: the distribution each promises, reproducibly, and the limits of the rate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import lip_jax

N, L = 40_000, 5


@pytest.fixture(scope="module")
def clean():
    ids = np.random.default_rng(1).integers(0, L, N)
    ids[:100] = -1
    return jnp.asarray(ids, jnp.int32)


@pytest.fixture(scope="module")
def feats():
    return jax.random.normal(jax.random.key(9), (N, 6))


def models(feats):
    """Every model that takes a rate, as a function of key, labels and rate."""
    return {
        "symmetric": lambda key, y, rate: lip_jax.noise.symmetric(key, y, rate, num_classes=L),
        "asymmetric": lambda key, y, rate: lip_jax.noise.asymmetric(key, y, rate, num_classes=L),
        "instance": lambda key, y, rate: lip_jax.noise.instance(key, feats, y, rate, num_classes=L),
        "transition": lambda key, y, rate: lip_jax.noise.transition(key, y, symmetric_matrix(rate)),
    }


def symmetric_matrix(rate):
    return jnp.where(jnp.eye(L, dtype=bool), 1 - rate, rate / (L - 1))


def transitions(clean, noisy):
    """Observed `P(y' = c | y)`, and a bound on its sampling error: five standard errors."""
    labelled = np.asarray(clean) >= 0
    counts = np.zeros((L, L))
    np.add.at(counts, (np.asarray(clean)[labelled], np.asarray(noisy)[labelled]), 1)
    rows = counts.sum(axis=1, keepdims=True)
    return counts / rows, 5 * 0.5 / np.sqrt(rows.min())


MODELS = ["symmetric", "asymmetric", "instance", "transition"]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.45, 1.0])
@pytest.mark.parametrize("model", MODELS)
def test_flip_rate_is_the_share_of_labels_that_became_wrong(clean, feats, model, rate):
    noisy = models(feats)[model](jax.random.key(0), clean, rate)
    assert noisy.dtype == clean.dtype
    assert int(noisy[100:].min()) >= 0
    assert int(noisy.max()) < L
    np.testing.assert_array_equal(noisy[:100], -1)
    flipped = float((noisy != clean)[100:].mean())
    assert flipped == pytest.approx(rate, abs=0 if rate in (0, 1) else 5 * 0.5 / np.sqrt(N))


@pytest.mark.parametrize("model", MODELS)
def test_noise_is_a_function_of_the_key_with_and_without_jit_and_x64(clean, feats, model):
    draw = models(feats)[model]
    noisy = draw(jax.random.key(0), clean, 0.4)
    np.testing.assert_array_equal(noisy, draw(jax.random.key(0), clean, 0.4))
    np.testing.assert_array_equal(noisy, jax.jit(draw)(jax.random.key(0), clean, jnp.float32(0.4)))
    assert (noisy != draw(jax.random.key(1), clean, 0.4)).any()
    if model != "transition":  # its draws follow the dtype of the matrix
        with jax.enable_x64(True):
            np.testing.assert_array_equal(noisy, draw(jax.random.key(0), clean, 0.4))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_instance_noise_multiplies_at_full_precision_everywhere(platform):
    draw = jax.jit(lambda key, feats, y: lip_jax.noise.instance(key, feats, y, 0.3, num_classes=L))
    specs = [jax.ShapeDtypeStruct(*spec) for spec in (((2,), "uint32"), ((N, 6), "float32"), ((N,), "int32"))]
    text = export.export(draw, platforms=[platform])(*specs).mlir_module()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_symmetric_noise_is_uniform_over_the_other_classes(clean):
    noisy = lip_jax.noise.symmetric(jax.random.key(0), clean, 0.4, num_classes=L)
    observed, error = transitions(clean, noisy)
    np.testing.assert_allclose(observed, symmetric_matrix(0.4), atol=error)


def test_asymmetric_noise_goes_to_the_partner_only(clean):
    partner = jnp.array([1, 0, 2, 4, 0])
    noisy = lip_jax.noise.asymmetric(jax.random.key(0), clean, 0.3, num_classes=L, partner=partner)
    observed, error = transitions(clean, noisy)
    expected = 0.7 * np.eye(L) + 0.3 * np.eye(L)[np.asarray(partner)]
    np.testing.assert_allclose(observed, expected, atol=error)
    assert (observed[expected == 0] == 0).all()
    cyclic = lip_jax.noise.asymmetric(jax.random.key(0), clean, 1.0, num_classes=L)
    np.testing.assert_array_equal(cyclic[100:], (clean[100:] + 1) % L)


def test_transition_noise_follows_its_matrix(clean):
    transition = np.random.default_rng(2).dirichlet(np.ones(L), L).astype(np.float32)
    transition[2] = [0, 0, 0.5, 0.5, 0]
    observed, error = transitions(clean, lip_jax.noise.transition(jax.random.key(0), clean, transition))
    np.testing.assert_allclose(observed, transition, atol=error)
    assert (observed[transition == 0] == 0).all()


def test_instance_noise_depends_on_the_sample(clean, feats):
    one_row = jnp.tile(feats[:1], (N, 1))
    labels = jnp.zeros(N, jnp.int32)
    noisy = lip_jax.noise.instance(jax.random.key(0), one_row, labels, 0.4, num_classes=L)
    mistaken = np.bincount(noisy, minlength=L)[1:] / (noisy != 0).sum()
    assert mistaken.max() - mistaken.min() > 0.05
    # Other samples are mistaken for other classes, under the same key.
    other = jnp.tile(feats[1:2], (N, 1))
    noisy = lip_jax.noise.instance(jax.random.key(0), other, labels, 0.4, num_classes=L)
    assert np.abs(np.bincount(noisy, minlength=L)[1:] / (noisy != 0).sum() - mistaken).max() > 0.05


def test_instance_noise_ignores_the_scale_of_a_row_and_survives_a_zero_one(clean, feats):
    feats = feats.at[200].set(0)
    first, second = (
        lip_jax.noise.instance(jax.random.key(0), scale * feats, clean, 0.4, num_classes=L)
        for scale in (1.0, 4.0)
    )
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_candidate_sets_hold_the_truth_and_false_candidates_at_the_rate(clean, rate):
    mask = np.asarray(lip_jax.noise.candidate_sets(jax.random.key(0), clean, rate, num_classes=L))
    assert mask.dtype == bool
    assert not mask[:100].any()
    truth = np.asarray(clean)[100:]
    rows = mask[100:]
    assert rows[np.arange(len(truth)), truth].all()
    false = rows[np.arange(L)[None, :] != truth[:, None]]
    assert false.mean() == pytest.approx(rate, abs=0 if rate in (0, 1) else 5 * 0.5 / np.sqrt(false.size))
    targets = lip_jax.candidate_targets(mask)
    np.testing.assert_allclose(np.nansum(targets, axis=1)[100:], 1, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int64"])
def test_labels_keep_their_dtype(dtype):
    labels = np.arange(L).astype(dtype)
    with jax.enable_x64(True):
        for draw in models(jnp.ones((L, 2), jnp.float32)).values():
            assert jax.jit(draw)(jax.random.key(0), labels, 0.5).dtype == dtype


@pytest.mark.parametrize(("dtype", "num_classes"), [("int8", 129), ("uint8", 257)])
def test_a_dtype_that_cannot_hold_the_classes_is_refused(dtype, num_classes):
    labels = np.zeros(20, dtype)
    with pytest.raises(ValueError, match=rf"holds num_classes = {num_classes} ids; got {dtype}\[20\]"):
        lip_jax.noise.symmetric(jax.random.key(0), labels, 0.5, num_classes=num_classes)
    noisy = lip_jax.noise.symmetric(jax.random.key(0), labels, 1.0, num_classes=num_classes - 1)
    assert (noisy > 0).all()


def test_vmap_over_keys_and_rates(clean, feats):
    keys, rates = jax.random.split(jax.random.key(0), 3), jnp.array([0.0, 0.2, 0.6])
    for name, draw in models(feats).items():
        stacked = jax.jit(jax.vmap(draw, in_axes=(0, None, 0)))(keys, clean, rates)
        flipped = (stacked != clean[None])[:, 100:].mean(axis=1)
        np.testing.assert_allclose(flipped, rates, atol=5 * 0.5 / np.sqrt(N), err_msg=name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rare_classes_are_drawn_from_matrices_of_low_precision_too(dtype):
    l, rate = 101, 0.01
    transition = (np.eye(l) * (1 - rate) + (1 - np.eye(l)) * rate / (l - 1)).astype(np.float32)
    labels = jnp.zeros(200_000, jnp.int32)
    noisy = lip_jax.noise.transition(jax.random.key(0), labels, jnp.asarray(transition).astype(dtype))
    assert float((noisy != 0).mean()) == pytest.approx(rate, rel=0.15)
