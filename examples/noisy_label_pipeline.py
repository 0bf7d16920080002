# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
"""# From noisy labels to a repaired classifier.

The whole way, on a Flax linen network: train, stream the features into sums that survive an interruption,
refit the head from those sums, find the wrong labels, and report. And the question that comes before all of
it: has the network memorised its labels? If so, its features vouch for wrong labels too.

The data are scikit-learn's handwritten digits, some 40% of the labels made wrong. An accelerator is used
where there is one, and not needed: about a minute on two CPU cores.
"""

# %%
import importlib.util

if importlib.util.find_spec("lip_jax") is None:  # on Colab; instead of the name, the path of a wheel will do
    get_ipython().run_line_magic("pip", "install --quiet 'lip_jax[demo]'")

# %%
import os
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import lip_jax
from lip_jax import plot
from lip_jax.plot import COLORS

SMALL = bool(os.environ.get("LIP_JAX_SMALL"))  # a shorter run, for tests
EARLY, LATE = (10, 50) if SMALL else (20, 200)  # epochs
METHODS = (lip_jax.Ridge(),) if SMALL else lip_jax.choice.DEFAULT_METHODS
SOLVER = "ridge" if SMALL else "logistic"
print(f"jax {jax.__version__} on {jax.devices()}")

# %% [markdown]
"""
## Data

**Train**: noisy labels. **Held out**: just as noisy, never trained on; they choose and they warn. **Test**:
clean labels, which you would not have; they only tell at the end how well it went.
"""

# %%
images, true = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(true))
images, true = (images[order] / 16).astype(np.float32), true[order].astype(np.int32)
given = np.asarray(lip_jax.noise.symmetric(jax.random.key(0), true, 0.4, num_classes=10))

train, held_out, test = slice(0, 1000), slice(1000, 1400), slice(1400, None)
wrong = given != true
print(f"{wrong[train].mean():.0%} of the training labels are wrong")

# %% [markdown]
"""
## 1. Train

One network, kept at two moments: stopped early, and trained long after.
"""


# %%
class Classifier(nn.Module):
    """Two hidden layers and a head."""

    @nn.compact
    def __call__(self, x):
        """Map pixels `(n, 64)` to logits `(n, 10)`."""
        for width in (128, 64):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10, name="head")(x)


@jax.jit
def train_step(state, x, y):
    """One step of Adam on the mean cross-entropy."""

    def loss(params):
        logits = state.apply_fn({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def fit(images, labels, epochs):
    """Parameters after each of the given numbers of epochs."""
    params = jax.jit(model.init)(jax.random.key(0), images[:1])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(2e-3))
    rng, kept = np.random.default_rng(0), []
    for epoch in range(max(epochs)):
        order = rng.permutation(len(images))
        for start in range(0, len(images) - 49, 50):
            rows = order[start : start + 50]
            state = train_step(state, images[rows], labels[rows])
        if epoch + 1 in epochs:
            kept.append(state.params)
    return kept


model = Classifier()
early, late = fit(images[train], given[train], (EARLY, LATE))

# %% [markdown]
"""
## 2. May these features judge these labels?

`memorised` compares how often the head agrees with labels it was trained on and with labels held out, which
are wrong just as often. It needs no clean label.
"""


# %%
def features(params):
    """Inputs of the head for all images; at full precision on TPUs and GPUs too."""
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda x: lip_jax.capture_features(model, params, x, head="head"))(images)


bodies = {f"stopped after {EARLY} epochs": early, f"trained for {LATE} epochs": late}
feats = {name: features(params) for name, params in bodies.items()}
for name, params in bodies.items():
    x, head = feats[name], params["head"]
    found = lip_jax.memorised(
        head["kernel"],
        x[train],
        given[train],
        bias=head["bias"],
        validation=(x[held_out], given[held_out]),
    )
    print(f"{name}: {found}\n")

# %% [markdown]
"""
The long-trained network has learned wrong labels by heart. What to do then, in this order:

1. Take the network as it was before: an early checkpoint, or a new training stopped when agreement with
   held-out labels no longer rises. Its features do not vouch for the wrong labels.
2. If there is none, use rows the network has not seen, to choose (`validation=`) or to purify and fit.

Both are tried below.

## 3. Stream

Where features are many, they need not be kept: one pass takes sums of fixed size that stand for all rows.
Batches of images go through the network, spread over all devices there are (one on most machines, several
on a TPU), and the sums are saved as they grow. Here the disk fails after twelve batches.
"""

# %%
devices = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
over_devices = NamedSharding(devices, PartitionSpec("data"))


def image_batches(start=0, fail_after=None):
    """Batches of 40 images with their given labels, as a loader would read them."""
    for i in range(start, 25):
        if fail_after is not None and i >= fail_after:
            raise OSError("the disk went away")
        yield images[train][40 * i : 40 * (i + 1)], given[train][40 * i : 40 * (i + 1)]


def stream(fail_after=None, **options):
    """Moments of the early network's features."""
    return lip_jax.accumulate(
        lip_jax.moment_accumulator(q=64, l=10),
        lambda done: lip_jax.feature_batches(
            model, early, image_batches(done, fail_after), head="head", sharding=over_devices
        ),
        **options,
    )


with tempfile.TemporaryDirectory() as folder:
    try:
        stream(checkpoint=folder, every=5, fail_after=12)
    except OSError as error:
        print(f"interrupted: {error}")
    moments = stream(checkpoint=folder, every=5)
uninterrupted = stream()
same = all(
    (a == b).all() for a, b in zip(jax.tree.leaves(moments), jax.tree.leaves(uninterrupted), strict=True)
)
print(f"{float(moments.rows):.0f} rows in {sum(leaf.nbytes for leaf in jax.tree.leaves(moments)):,} bytes")
print(f"the same, bit for bit, as without the interruption: {same}")

# %% [markdown]
"""
The second call found the state after ten batches and went on from there.

## 4. Refine from the sums

The sums serve every method and every rank; no row is read again. The rank is chosen by the held-out noisy
labels.
"""


# %%
@jax.jit
def predict(params, x):
    """The most probable class of each row."""
    return model.apply({"params": params}, x).argmax(axis=1)


def accuracy(params, part, labels):
    """Share of the labels of a part that the network predicts."""
    return np.mean(predict(params, images)[part] == labels[part])


def best_refit(method):
    """The refit whose rank does best on the held-out noisy labels, and that rank."""
    refits = [lip_jax.apply_from(early, moments, method=method, rank=rank) for rank in jnp.arange(11)]
    scores = [accuracy(refit, held_out, given) for refit in refits]
    return refits[int(np.argmax(scores))], int(np.argmax(scores))


x = feats[next(iter(feats))]  # the sums do not tell at which scale scores are logits; a few rows do
readout = lip_jax.linear_readout_from(moments, validation=(x[held_out], given[held_out]))
results = {"as trained": early}
for method in (lip_jax.Published(), lip_jax.Calibrated()):
    results[f"{method.name} refit"], rank = best_refit(method)
    print(f"{method.name}: rank {rank} of 10")
results["ridge readout"] = lip_jax.replace_head(early, readout, head="head")

# %% [markdown]
"""
## 5. Purify

Every label is held against what a readout of all *other* rows says, and gets the probability that it is
right. Because the noise was made here, one can look how well that works; the method itself never sees
`true`.
"""

# %%
quality = {name: lip_jax.label_quality(x[train], given[train]) for name, x in feats.items()}

fig, axes = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True, layout="constrained")
for ax, (name, found) in zip(axes, quality.items(), strict=True):
    plot.label_quality_histogram(found.trust, wrong=wrong[train], ax=ax)
    ax.set_title(f"Network {name}")
plt.show()

for name, x in feats.items():
    purified = lip_jax.purify(x[train], given[train], quality=quality[name])
    kept = np.asarray(purified.trusted)
    print(f"{name}: {kept.sum()} of 1000 rows trusted, {1 - wrong[train][kept].mean():.1%} of them rightly")

# %% [markdown]
"""
**Left**, of the network that was stopped early: nearly all right labels are trusted, most wrong ones are
not. **Right**, of the one that has memorised: its features have been bent to fit the wrong labels, so that
nearly all of them are trusted too. Without the colours, which you would not have, the second histogram
looks like that of clean labels. This is why step 2 comes first.

The labels that the early network's features contradict most, with what they suggest instead:
"""

# %%
found = quality[next(iter(quality))]
suspects = np.argsort(np.asarray(found.trust))[:10]
fig, axes = plt.subplots(2, 5, figsize=(8, 3.8), layout="constrained")
for ax, row in zip(axes.flat, suspects, strict=True):
    ax.imshow(images[train][row].reshape(8, 8), cmap="gray_r")
    ax.set_title(f"given {given[train][row]}, suggested {found.suggested[row]}", fontsize=8)
    ax.axis("off")
plt.show()

# %% [markdown]
"""
## 6. Repair and report

A readout of the trusted rows; a new training on them alone; and `apply_with_report`, which chooses among
refits and readouts, or leaves the head as it is, by held-out labels.
"""

# %%
x = feats[next(iter(feats))]
purified = lip_jax.purify(x[train], given[train], quality=found)
trusted = np.asarray(purified.trusted)
readout = lip_jax.linear_readout(x[train], given[train], weights=purified.weights, solver=SOLVER)
results["readout of trusted rows"] = lip_jax.replace_head(early, readout, head="head")
(results["trained anew on trusted rows"],) = fit(images[train][trusted], given[train][trusted], (EARLY,))

choice = lip_jax.Choice(METHODS)
results["apply, by held-out rows"], report = lip_jax.apply_with_report(
    early, x[train], given[train], validation=(x[held_out], given[held_out]), head="head", method=choice
)
print(report)

# %% [markdown]
"""
Each method chose its strength on one half of the held-out rows and was scored on the other, against noisy
labels. The star marks what was taken, the last line says why (`quickstart_linen.py` explains the columns).
Now the same for the network that has memorised: as it came, repaired by choice of held-out rows, and with a
readout fitted on purified held-out rows, which its body has not seen.
"""

# %%
x = feats[next(reversed(feats))]
memorised = {"as trained": late}
memorised["apply, by held-out rows"], report = lip_jax.apply_with_report(
    late, x[train], given[train], validation=(x[held_out], given[held_out]), head="head", method=choice
)
print(report.reason)
unseen = lip_jax.purify(x[held_out], given[held_out])
readout = lip_jax.linear_readout(x[held_out], given[held_out], weights=unseen.weights)
memorised["readout of trusted held-out rows"] = lip_jax.replace_head(late, readout, head="head")

table = {f"early: {name}": params for name, params in results.items()}
table |= {f"late: {name}": params for name, params in memorised.items()}
scores = {name: accuracy(params, test, true) for name, params in table.items()}

fig, ax = plt.subplots(figsize=(8, 4), layout="constrained")
colors = [COLORS[0] if name.startswith("early") else COLORS[1] for name in scores]
bars = ax.barh(list(scores), list(scores.values()), color=colors)
ax.bar_label(bars, fmt="{:.1%}", padding=3)
ax.invert_yaxis()
ax.set(title="What became of the two networks", xlabel="accuracy on clean test labels", xlim=(0, 1.1))
plt.show()

# %% [markdown]
"""
What one sees:

- **The network that was stopped early** has little to gain. The ridge readout adds a point and a half, the
  refits next to nothing; a readout of the trusted rows even loses as much, for a sixth of them are trusted
  wrongly, and training anew on them gains nothing. `apply` kept the head as it came: on 200 noisy rows a
  point is far less than three standard errors. That is the price of not being fooled.
- **The network that memorised** is repaired by some thirty points. A readout of 400 rows that its body has
  not seen, purified, is the best of all, ahead of what the thousand it has seen can give.
- Which is best on clean labels is known here only because the noise was made. The held-out noisy labels are
  what you would have, and they cannot see a difference of a point.
"""
