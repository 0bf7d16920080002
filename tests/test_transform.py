"""`apply` with a method: what it does to the head, which options reach it, and what the report says."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lip_jax
from tests import zoo

RANK = 4


def test_works_inside_jit_with_the_head_named_or_counted(cnn):
    _, _, variables, _, noisy, feats = cnn
    eager = lip_jax.apply(variables, feats, noisy, rank=RANK)
    for options in ({"head": "Dense_1"}, {"num_classes": 10}):
        jitted = jax.jit(lambda v, f, y, k, o=options: lip_jax.apply(v, f, y, rank=k, **o))
        chex.assert_trees_all_close(jitted(variables, feats, noisy, RANK), eager, rtol=1e-4, atol=1e-5)
        jitted(variables, feats, noisy, RANK + 1)
        assert jitted._cache_size() == 1


def test_jit_without_head_or_count_says_what_to_pass(cnn):
    _, _, variables, _, noisy, feats = cnn
    with pytest.raises(ValueError, match=r"Pass head= or num_classes="):
        jax.jit(lambda y: lip_jax.apply(variables, feats, y, rank=RANK))(noisy)


def test_use_bias_takes_the_heads_own_bias(cnn):
    _, _, variables, _, noisy, feats = cnn
    head = variables["params"]["Dense_1"]
    repaired = lip_jax.apply(variables, feats, noisy, method=lip_jax.Published(RANK, use_bias=True))
    expected = lip_jax.refine(head["kernel"], feats, noisy, RANK, bias=head["bias"])
    chex.assert_trees_all_close(repaired["params"]["Dense_1"]["kernel"], expected)
    without = {"kernel": head["kernel"]}
    chex.assert_trees_all_close(
        lip_jax.apply(without, feats, noisy, method=lip_jax.Published(RANK, use_bias=True))["kernel"],
        lip_jax.refine(head["kernel"], feats, noisy, RANK),
    )


def test_options_of_a_method_reach_the_refit(cnn):
    _, _, variables, _, noisy, feats = cnn
    options = {"ridge": 50.0, "ridge_to": "zero", "rcond": 0.0}
    weights = jnp.linspace(0, 1, len(noisy))
    method = lip_jax.Published(RANK, **options)
    repaired = lip_jax.apply(variables, feats, noisy, method=method, weights=weights)
    kernel = variables["params"]["Dense_1"]["kernel"]
    expected = lip_jax.refine(kernel, feats, noisy, RANK, weights=weights, **options)
    chex.assert_trees_all_close(repaired["params"]["Dense_1"]["kernel"], expected)


def test_several_heads_each_with_their_own_rows():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "species": {"kernel": jax.random.normal(keys[0], (12, 5))},
        "sex": {"kernel": jax.random.normal(keys[1], (8, 2))},
        "body": {"kernel": jnp.ones((3, 3))},
    }
    feats = {
        "species": jax.random.normal(keys[2], (60, 12)),
        "sex": jax.random.normal(keys[3], (40, 8)),
    }
    labels = {"species": jnp.arange(60) % 5, "sex": jnp.arange(40) % 2}
    repaired, reports = lip_jax.apply_with_report(
        params, feats, labels, head=["species", "sex"], rank={"species": 2, "sex": 0}
    )
    for name, rank in (("species", 2), ("sex", 0)):
        expected = lip_jax.refine(params[name]["kernel"], feats[name], labels[name], rank)
        chex.assert_trees_all_close(repaired[name]["kernel"], expected)
        assert reports[name].path == f"{name}/kernel"
    assert zoo.changed_paths(params, repaired) == {"species/kernel", "sex/kernel"}
    with pytest.raises(ValueError, match=r"rank is a mapping by head name and lacks 'sex'"):
        lip_jax.apply(params, feats, labels, head=["species", "sex"], rank={"species": 2})
    with pytest.raises(ValueError, match=r"more than once"):
        lip_jax.apply(params, feats["sex"], labels["sex"], head=["sex", "sex/kernel"], rank=0)


def test_report_tells_the_spectrum_before_and_after(cnn):
    _, _, variables, _, noisy, feats = cnn
    repaired, report = lip_jax.apply_with_report(variables, feats, noisy, rank=RANK)
    split = lip_jax.svd_split(variables["params"]["Dense_1"]["kernel"], RANK)
    chex.assert_trees_all_close(report.s, split.s, rtol=1e-5)
    chex.assert_trees_all_close(report.sigma, lip_jax.solve_tail_sigma(split, feats, noisy), rtol=1e-4)
    after = jnp.linalg.svd(repaired["params"]["Dense_1"]["kernel"], compute_uv=False)
    chex.assert_trees_all_close(jnp.sort(jnp.abs(report.sigma))[::-1], after, rtol=1e-4, atol=1e-5)
    assert int(report.ignored) == 0
    assert "params/Dense_1/kernel (32, 10): 4 of 10 components preserved" in str(report)


def test_rows_ignored_under_jit_are_counted_in_the_report(cnn):
    _, _, variables, _, noisy, feats = cnn
    bad = noisy.at[:3].set(10).at[3:5].set(-1)
    spoiled = feats.at[7, 2].set(jnp.nan)
    refit = jax.jit(lambda y, f: lip_jax.apply_with_report(variables, f, y, rank=RANK, head="Dense_1"))
    repaired, report = refit(bad, spoiled)
    assert int(report.ignored) == 4
    kept = jnp.ones(len(noisy), jnp.float32).at[:5].set(0).at[7].set(0)
    expected = lip_jax.apply(variables, feats, noisy, rank=RANK, weights=kept)
    chex.assert_trees_all_close(repaired, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"head params/Dense_1/kernel: labels must be class ids below l = 10"
    ):
        lip_jax.apply(variables, feats, bad, rank=RANK, head="Dense_1")


def test_features_of_the_wrong_width_name_the_head(cnn, unchecked):
    _, _, variables, _, noisy, feats = cnn
    with pytest.raises(ValueError, match=r"head params/Dense_1/kernel: feats .*q = 32.*float32\[1797,31\]"):
        lip_jax.apply(variables, feats[:, :31], noisy, rank=RANK, head="Dense_1")


def test_a_refit_beyond_the_dtype_of_the_head_is_an_error(rng):
    feats, labels = 1e-6 * rng.normal(size=(300, 8)).astype(np.float32), np.arange(300) % 3
    params = {"head": {"kernel": np.eye(8, 3, dtype=np.float16)}}
    with pytest.raises(ValueError, match=r"must be finite in the dtype of head/kernel.* range of float16"):
        lip_jax.apply(params, feats, labels, rank=0)
    moments = lip_jax.accumulate(lip_jax.moment_accumulator(8, 3), [(feats, labels)])
    with pytest.raises(ValueError, match=r"range of float16\. Store the head in bfloat16 or float32"):
        lip_jax.apply_from(params, moments, rank=0)


def test_a_readout_that_is_put_in_unasked_cannot_be_a_choice(unchecked):
    params = {"head": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
    with pytest.raises(ValueError, match="must be one readout"):
        lip_jax.apply_readout(params, jnp.ones((4, 3)), jnp.array([0, 1, 0, 1]), method=lip_jax.Choice())
