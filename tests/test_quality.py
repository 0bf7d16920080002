"""Label quality against Bayes' rule written out, the rules of purification, and what memorised labels do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lip_jax
from lip_jax.quality import trust
from lip_jax.quality.trust import SHARPNESS, evident_transition
from tests import oracles

N, Q, L = 300, 8, 4


def clusters(rng, n=N, spread=1.0, dtype=np.float32):
    """Classes around the first unit vectors."""
    true = (np.arange(n) % L).astype(np.int32)
    feats = spread * rng.normal(size=(n, Q)) + 4 * np.eye(L, Q)[true]
    return jnp.asarray(feats, dtype), jnp.asarray(true)


@pytest.fixture
def noisy(rng):
    feats, true = clusters(rng)
    return feats, true, lip_jax.noise.symmetric(jax.random.key(0), true, 0.3, num_classes=L)


def test_trust_is_bayes_rule_on_the_leave_one_out_scores(rng, x64):
    feats, true = clusters(rng, n=120, dtype=np.float64)
    given = np.asarray(lip_jax.noise.asymmetric(jax.random.key(0), true, 0.3, num_classes=L))
    quality = lip_jax.label_quality(feats, jnp.asarray(given), ridge=5.0)
    scores = oracles.leave_one_out(feats, given, L, weights=None, ridge=5.0, intercept=True)
    transition = oracles.label_transition(scores, given, L)
    counts = np.zeros((L, L))
    np.add.at(counts, (np.asarray(quality.suggested), given), 1)
    right = np.trace(counts) / 120
    counts += right * np.eye(L) + (1 - right) / (L - 1) * (
        1 - np.eye(L)
    )  # a row of the average for each class
    np.testing.assert_allclose(quality.transition, counts / counts.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(
        quality.trust, oracles.trust(scores, given, transition, float(quality.sharpness)), rtol=1e-7
    )
    others = np.where(np.eye(L, dtype=bool)[given], -np.inf, scores)
    own = scores[np.arange(120), given]
    np.testing.assert_allclose(quality.margin, own - others.max(axis=1), atol=1e-9)
    np.testing.assert_array_equal(quality.num_above, (scores > own[:, None]).sum(axis=1))
    rates = [1 - np.asarray(quality.trust)[given == c].mean() for c in range(L)]
    np.testing.assert_allclose(quality.noise_rate, rates, rtol=1e-9)


def test_sharpness_has_the_greatest_likelihood_of_its_grid(rng, x64):
    feats, true = clusters(rng, n=120, dtype=np.float64)
    given = np.asarray(lip_jax.noise.symmetric(jax.random.key(0), true, 0.3, num_classes=L))
    quality = lip_jax.label_quality(feats, jnp.asarray(given), ridge=5.0)
    scores = oracles.leave_one_out(feats, given, L, weights=None, ridge=5.0, intercept=True)
    transition = oracles.label_transition(scores, given, L)

    def likelihood(a):
        powers = np.exp(a * (scores - scores.max(axis=1, keepdims=True)))
        return np.log((powers / powers.sum(axis=1, keepdims=True) * transition[:, given].T).sum(axis=1)).sum()

    best = max(map(likelihood, SHARPNESS))
    first = next(a for a in SHARPNESS if likelihood(a) >= best - 1e-5 * abs(best))
    np.testing.assert_allclose(quality.sharpness, first)


@pytest.mark.parametrize("held_out", [0, 1])
def test_rows_held_out_at_even_distances_do_not_take_the_sample_with_them(rng, held_out):
    # 2,000 of 10,000 rows are looked at: every fifth.
    true = rng.integers(0, 10, 10_000).astype(np.int32)
    feats = (rng.normal(size=(10_000, 16)) + 4 * np.eye(10, 16)[true]).astype(np.float32)
    given = lip_jax.noise.symmetric(jax.random.key(0), true, 0.4, num_classes=10)
    weights = (np.arange(10_000) % 5 != held_out).astype(np.float32)
    for labels, options in (
        (given, {"weights": weights}),
        (jnp.where(weights > 0, given, -1), {"num_classes": 10}),
    ):
        quality = lip_jax.label_quality(feats, labels, **options)
        assert float(quality.sharpness) > SHARPNESS[0]
        right = (np.asarray(quality.trust) > 0.5) == np.asarray(given == true)
        assert right[weights > 0].mean() > 0.95


def test_sums_by_class_lose_nothing_beside_millions_of_rows(rng):
    values = (0.95 + 0.01 * rng.random(6_000_000)).astype(np.float32)
    slot = (rng.random(6_000_000) < 0.1).astype(np.int32)
    exact = np.bincount(slot, values.astype(np.float64), 2)
    found = trust._sums_by_class(jnp.asarray(values), jnp.asarray(slot), 2)
    np.testing.assert_allclose(found, exact, rtol=1e-5)


def test_two_held_out_rows_prove_no_memorisation(rng):
    feats, true = clusters(rng, n=400)
    kernel = jnp.linalg.lstsq(feats, jax.nn.one_hot(true, L))[0]
    wrong = feats[:2], (true[:2] + 1) % L
    found = lip_jax.memorised(kernel, feats, true, bias=None, validation=wrong)
    assert float(found.reference) == 0
    assert float(found.standard_error) >= 0.5
    assert not bool(found.memorised)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_wrong_labels_are_found_and_how_they_err_is_estimated(rng, kind):
    feats, true = clusters(rng, n=2000)
    model = getattr(lip_jax.noise, kind)
    given = model(jax.random.key(0), true, 0.3, num_classes=L)
    quality = lip_jax.label_quality(feats, given)
    right = np.asarray(given == true)
    assert ((np.asarray(quality.trust) > 0.5) == right).mean() > 0.95
    assert (np.asarray(quality.suggested) == np.asarray(true)).mean() > 0.95
    counts = np.zeros((L, L))
    np.add.at(counts, (np.asarray(true), np.asarray(given)), 1)
    np.testing.assert_allclose(quality.transition, counts / counts.sum(axis=1, keepdims=True), atol=0.06)
    wrong = [1 - right[np.asarray(given) == c].mean() for c in range(L)]
    np.testing.assert_allclose(quality.noise_rate, wrong, atol=0.05)


def test_rows_that_do_not_count_are_not_judged_but_get_a_suggestion(noisy):
    feats, true, given = noisy
    given = given.at[:20].set(-1)
    weights = jnp.ones(N).at[20:40].set(0)
    quality = lip_jax.label_quality(feats, given, weights=weights)
    assert not np.asarray(quality.trust)[:40].any()
    assert (np.asarray(quality.given)[:40] == -1).all()
    assert (np.asarray(quality.suggested)[:40] == np.asarray(true)[:40]).mean() > 0.9
    without = lip_jax.label_quality(feats[40:], given[40:])
    np.testing.assert_allclose(quality.trust[40:], without.trust, rtol=1e-3, atol=1e-4)


def test_candidate_sets_are_judged_by_their_best_candidate(rng):
    feats, true = clusters(rng)
    mask = lip_jax.noise.candidate_sets(jax.random.key(0), true, 0.3, num_classes=L)
    targets = lip_jax.candidate_targets(mask)
    quality = lip_jax.label_quality(feats, targets)
    assert (np.asarray(quality.given) == np.asarray(true)).mean() > 0.95
    scores = lip_jax.leave_one_out_scores(feats, targets, ridge=quality.ridge)
    best = np.where(np.asarray(mask), np.asarray(scores), -np.inf).argmax(axis=1)
    np.testing.assert_array_equal(quality.given, best)
    several = np.asarray(mask).sum(axis=1) > 1
    np.testing.assert_array_equal(np.asarray(quality.suggested)[several], best[several])


def test_one_hot_targets_are_judged_as_their_ids(noisy, x64):
    feats, _, given = noisy
    feats = feats.astype(jnp.float64)
    by_id = lip_jax.label_quality(feats, given)
    by_target = lip_jax.label_quality(feats, jax.nn.one_hot(given, L))
    np.testing.assert_allclose(by_id.trust, by_target.trust, rtol=1e-9)
    np.testing.assert_array_equal(by_id.given, by_target.given)


def expected_mask(quality, rule, threshold=None, top=1):
    right, margin, num_above, given = (
        np.asarray(part) for part in (quality.trust, quality.margin, quality.num_above, quality.given)
    )
    if rule == "posterior":
        return right > (0.5 if threshold is None else threshold)
    if rule == "margin":
        return margin > (0 if threshold is None else threshold)
    if rule == "top":
        return num_above < top
    keep = np.ones(len(given), bool)
    for c in range(L):
        rows = np.flatnonzero(given == c)
        wrong = round(float(quality.noise_rate[c]) * len(rows))
        keep[rows[np.argsort(margin[rows])[:wrong]]] = False
    return keep


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("posterior", {}),
        ("posterior", {"threshold": 0.9}),
        ("margin", {}),
        ("margin", {"threshold": 0.3}),
        ("top", {}),
        ("top", {"top": 2}),
        ("noise_rate", {}),
    ],
)
def test_every_rule_is_its_definition(noisy, rule, options):
    feats, _, given = noisy
    quality = lip_jax.label_quality(feats, given)
    purified = lip_jax.purify(feats, given, rule=rule, quality=quality, min_per_class=0, **options)
    expected = expected_mask(quality, rule, **options)
    np.testing.assert_array_equal(purified.trusted, expected)
    np.testing.assert_array_equal(purified.weights, expected.astype(np.float32))
    np.testing.assert_array_equal(purified.kept, np.bincount(np.asarray(given)[expected], minlength=L))
    np.testing.assert_array_equal(purified.offered, np.bincount(np.asarray(given), minlength=L))
    assert not purified.rescued.any()


def test_no_class_is_emptied_and_what_was_rescued_is_counted(rng):
    feats, true = clusters(rng)
    # The rows given as class 3 are all of class 0: each contradicts its neighbours.
    rows = np.flatnonzero(np.asarray(true) == 0)[:9]
    keep = np.concatenate([np.flatnonzero(np.asarray(true) != 3), rows])
    given = jnp.asarray(np.concatenate([np.asarray(true)[keep[:-9]], np.full(9, 3, np.int32)]))
    emptied = lip_jax.purify(feats[keep], given, num_classes=L, min_per_class=0)
    assert int(emptied.kept[3]) == 0
    purified = lip_jax.purify(feats[keep], given, num_classes=L, min_per_class=2)
    np.testing.assert_array_equal(purified.rescued, [0, 0, 0, 2])
    assert int(purified.kept[3]) == 2
    best = np.argsort(-np.asarray(purified.quality.trust)[-9:])[:2]
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(purified.trusted)[-9:]), np.sort(best))
    assert "1 classes hold rows kept only so as not to lose the class" in str(purified)


def test_weights_are_kept_where_trusted(noisy):
    feats, _, given = noisy
    weights = jnp.linspace(0, 2, N)
    purified = lip_jax.purify(feats, given, weights=weights)
    np.testing.assert_array_equal(purified.weights, np.where(purified.trusted, weights, 0))
    assert not bool(purified.trusted[0])


def test_purification_under_jit_counts_what_cannot_be_used(noisy):
    feats, _, given = noisy
    run = jax.jit(lambda f, y: lip_jax.purify(f, y, num_classes=L))
    spoilt = run(feats.at[3].set(jnp.nan), given.at[7].set(99))
    plain = run(feats, given.at[jnp.array([3, 7])].set(-1))
    assert int(spoilt.quality.ignored) == 2
    np.testing.assert_array_equal(spoilt.trusted, plain.trusted)


def test_a_head_that_memorised_is_found_by_leave_one_out_and_by_held_out_rows(rng):
    feats, labels = jnp.asarray(rng.normal(size=(200, 100)), jnp.float32), jnp.arange(200) % 2
    memorising = jnp.linalg.pinv(feats) @ jax.nn.one_hot(labels, 2)
    found = lip_jax.memorised(memorising, feats, labels, bias=None)
    assert bool(found.memorised)
    assert not found.held_out
    assert str(found).startswith("memorised: the head agrees with")
    held_out = jnp.asarray(rng.normal(size=(200, 100)), jnp.float32), labels
    found = lip_jax.memorised(memorising, feats, labels, bias=None, validation=held_out)
    assert bool(found.memorised)
    assert found.held_out
    assert abs(float(found.reference) - 0.5) < 0.15


def test_a_head_that_learned_the_classes_is_not_taken_for_memorising(rng):
    feats, true = clusters(rng)
    given = lip_jax.noise.symmetric(jax.random.key(0), true, 0.3, num_classes=L)
    kernel = 3 * jnp.eye(Q, L)
    assert not bool(lip_jax.memorised(kernel, feats, given, bias=jnp.zeros(L)).memorised)
    more, true = clusters(np.random.default_rng(1))
    held_out = more, lip_jax.noise.symmetric(jax.random.key(1), true, 0.3, num_classes=L)
    found = lip_jax.memorised(kernel, feats, given, bias=jnp.zeros(L), validation=held_out)
    assert not bool(found.memorised)
    assert str(found).startswith("not memorised")


def test_the_agreement_of_leave_one_out_scores_is_the_reference(rng):
    feats, true = clusters(rng)
    given = lip_jax.noise.symmetric(jax.random.key(0), true, 0.3, num_classes=L)
    found = lip_jax.memorised(3 * jnp.eye(Q, L), feats, given, bias=jnp.zeros(L))
    scores = lip_jax.leave_one_out_scores(feats, given)
    np.testing.assert_allclose(found.reference, (scores.argmax(axis=1) == given).mean(), atol=0.01)


@pytest.mark.parametrize("n", [0, 1])
def test_no_rows_and_one_row_have_a_quality(n):
    quality = lip_jax.label_quality(jnp.ones((n, Q)), jnp.zeros(n, jnp.int32), num_classes=L)
    assert quality.trust.shape == (n,)
    assert jnp.isfinite(quality.transition).all()


@pytest.mark.parametrize("side", ["rows", "validation", "weights"])
def test_memorisation_cannot_be_told_without_a_labelled_row_on_both_sides(rng, side):
    feats, true = clusters(rng, n=40)
    # Not all right: where both agree with nearly all labels nothing can be told either.
    true = true.at[:8].set((true[:8] + 1) % L)
    labels, held, weights = true, true, jnp.ones(40)
    if side == "rows":
        labels = jnp.full_like(true, -1)
    elif side == "validation":
        held = jnp.full_like(true, -1)
    else:
        weights = jnp.zeros(40)
    kernel = 3 * jnp.eye(Q, L)
    for validation in ((feats, held), None):
        found = lip_jax.memorised(kernel, feats, labels, bias=None, weights=weights, validation=validation)
        told = side == "validation" and validation is None
        assert bool(found.can_tell) == told
        assert not bool(found.memorised)
        assert str(found).startswith("not memorised" if told else "cannot tell")


def test_a_top_that_counts_no_classes_is_refused(rng, unchecked):
    feats, true = clusters(rng, n=40)
    kernel = jnp.eye(Q, L)
    for top in (0, -1, 2.5, True):
        message = rf"top must be an integer of at least 1, a number of classes; got {top!r}"
        for call in (
            lambda top=top: lip_jax.purify(feats, true, rule="top", top=top),
            lambda top=top: lip_jax.purified_readout(feats, true, rule="top", top=top),
            lambda top=top: lip_jax.apply(
                {"kernel": kernel}, feats, true, method=lip_jax.Purified(rule="top", top=top)
            ),
        ):
            with pytest.raises(ValueError, match=message):
                call()


# What cannot be told.


@pytest.mark.parametrize("kind", ["constant", "zeros", "noise"])
def test_features_that_say_nothing_call_no_label_wrong(kind):
    rng = np.random.default_rng(0)
    labels = jnp.arange(600, dtype=jnp.int32) % 5
    feats = {
        "constant": np.full((600, 16), 0.3),
        "zeros": np.zeros((600, 16)),
        "noise": rng.normal(size=(600, 16)),
    }
    said = str(lip_jax.label_quality(jnp.asarray(feats[kind], jnp.float32), labels))
    assert said.startswith("600 labels: cannot tell which labels are wrong: without a row's own label")
    assert "% wrong;" not in said


def carried_labels(n=600, wrong=0.4):
    """Features that carry noisy labels, as those of a body that memorised them, and these labels."""
    true = jnp.arange(n, dtype=jnp.int32) % 3
    given = lip_jax.noise.symmetric(jax.random.key(1), true, wrong, num_classes=3)
    feats = jax.random.normal(jax.random.key(0), (n, 8)).at[jnp.arange(n), given].add(8.0)
    return feats, given


def test_near_total_agreement_is_no_proof_of_clean_labels():
    feats, given = carried_labels()
    quality = lip_jax.label_quality(feats, given)
    assert "cannot tell clean labels from memorised ones: the features predict" in str(quality)
    readout = lip_jax.linear_readout(feats, given, num_classes=3)
    found = lip_jax.memorised(readout.kernel, feats, given, bias=readout.bias)
    assert not bool(found.can_tell)
    assert not bool(found.memorised)
    assert str(found).startswith(
        "cannot tell whether the network memorised these labels: the head agrees with"
    )
    # Rows that the body has not seen do tell.
    held = jax.random.normal(jax.random.key(2), feats.shape), given
    unseen = lip_jax.memorised(readout.kernel, feats, given, bias=readout.bias, validation=held)
    assert bool(unseen.can_tell)
    assert bool(unseen.memorised)


def test_labels_that_are_wrong_now_and_then_are_in_no_doubt():
    true = jnp.arange(600, dtype=jnp.int32) % 3
    given = lip_jax.noise.symmetric(jax.random.key(1), true, 0.2, num_classes=3)
    feats = jax.random.normal(jax.random.key(0), (600, 8)).at[jnp.arange(600), true].add(4.0)
    assert lip_jax.label_quality(feats, given).doubt == ""


def test_the_evident_transition_keeps_pair_flips_and_spreads_the_rest():
    true = jnp.arange(6000, dtype=jnp.int32) % 20
    feats = jax.random.normal(jax.random.key(0), (6000, 24)).at[jnp.arange(6000), true].add(6.0)
    for noise, beside in ((lip_jax.noise.asymmetric, 0.4), (lip_jax.noise.symmetric, 0.4 / 19)):
        given = noise(jax.random.key(1), true, 0.4, num_classes=20)
        found = np.asarray(evident_transition(lip_jax.label_quality(feats, given, num_classes=20)))
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
        flipped = found[np.arange(20), (np.arange(20) + 1) % 20]
        assert np.diagonal(found).mean() == pytest.approx(0.6, abs=0.06)
        assert flipped.mean() == pytest.approx(beside, abs=0.06)
        assert np.abs(flipped - beside).max() < 0.2
    # Even noise: all entries beside the diagonal are alike, where counts of 300 rows a class would not be.
    off = found[~np.eye(20, dtype=bool)]
    assert off.std() < 0.15 * off.mean()
