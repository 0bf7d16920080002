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
"""# Repair a Flax linen classifier.

A small network is trained on handwritten digits of which some 40% carry a wrong label, for so long that it
learns the wrong labels by heart. `lip_jax` then repairs its last layer in closed form, without another
training step, and says whether that helped.

An accelerator is used where there is one, and not needed: under a minute on two CPU cores. The same for
`flax.nnx`: `quickstart_nnx.py`.
"""

# %%
import importlib.util

if importlib.util.find_spec("lip_jax") is None:  # on Colab; instead of the name, the path of a wheel will do
    get_ipython().run_line_magic("pip", "install --quiet 'lip_jax[demo]'")

# %%
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import lip_jax
from lip_jax import plot

SMALL = bool(os.environ.get("LIP_JAX_SMALL"))  # a shorter run, for tests
EPOCHS = 50 if SMALL else 200
METHODS = (lip_jax.Ridge(),) if SMALL else lip_jax.choice.DEFAULT_METHODS
print(f"jax {jax.__version__} on {jax.devices()}")

# %% [markdown]
"""
## Data with inaccurate labels

Three parts, each with its own role:

- **train**: images with noisy labels. They train the network and fit the repairs.
- **held out**: images the network never trains on, with labels just as noisy. They choose the repair.
- **test**: clean labels, which you would not have. They only say at the end how well it went.
"""

# %%
images, true = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(true))
images, true = (images[order] / 16).astype(np.float32), true[order].astype(np.int32)
given = np.asarray(lip_jax.noise.symmetric(jax.random.key(0), true, 0.4, num_classes=10))

train, held_out, test = slice(0, 1000), slice(1000, 1400), slice(1400, None)
print(f"{(given[train] != true[train]).mean():.0%} of the training labels are wrong")

# %% [markdown]
"""
## A model, trained as usual
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


model = Classifier()
params = jax.jit(model.init)(jax.random.key(0), images[:1])["params"]
state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(2e-3))
rng = np.random.default_rng(0)
for epoch in range(EPOCHS):
    for rows in rng.permutation(1000).reshape(-1, 50):
        state = train_step(state, images[rows], given[rows])
    if epoch == 19:
        early = state.params  # to compare with at the end


# %%
@jax.jit
def predict(params, x):
    """The most probable class of each row."""
    return model.apply({"params": params}, x).argmax(axis=1)


def accuracy(params, part, labels):
    """Share of the labels of a part that the network predicts."""
    return np.mean(predict(params, images)[part] == labels[part])


print(f"agrees with {accuracy(state.params, train, given):.1%} of the labels it was trained on")
print(f"agrees with {accuracy(state.params, held_out, given):.1%} of the labels held out, just as noisy")

# %% [markdown]
"""
A network that agrees with its own noisy labels, and far less with others of the same kind, has memorised
them. That much can be seen without one clean label.

## The repair

First the inputs of the head, as the model computes them. On a TPU JAX multiplies in bfloat16 unless told
otherwise, on recent GPUs in TF32. `lip_jax` asks for full precision in its own sums; for the model's
forward pass that is up to you, and the context manager below asks for it.
"""

# %%
with jax.default_matmul_precision("highest"):
    feats = lip_jax.capture_features(model, state.params, images, head="head")

repaired, report = lip_jax.apply_with_report(
    state.params,
    feats[train],
    given[train],
    validation=(feats[held_out], given[held_out]),
    head="head",
    method=lip_jax.Choice(METHODS),
)
print(report)

# %% [markdown]
"""
How to read it:

- There is a line for each *method* of repair, and `unchanged` for the head as it came. `published` refits
  the singular values as in the LIP paper, `calibrated` does so at the scale of the head's own logits,
  `ridge` is a new linear readout of the features, `purified` a logistic readout of the rows whose labels
  can be trusted.
- `strength` is the rank (of refits) or the ridge (of readouts) that did best on one half of the held-out
  rows. Rank 10 keeps all ten components: nothing changes but one common scale of the logits.
- All to the right of it was measured on the **other** half, against noisy labels. Of 40% wrong ones even a
  perfect classifier agrees with 60% only: read differences, not levels.
- `difference ± s.e.` compares with `unchanged`, row by row. The star marks what was taken. Nothing is taken
  that is not better by three standard errors, or that has a worse log-loss under the noise; the last line
  gives the reason.

`repaired` is the same tree as `state.params`; all but the head is untouched.
"""

# %%
changed = jax.tree.map(lambda before, after: not np.array_equal(before, after), state.params, repaired)
print("changed:", changed)

# %% [markdown]
"""
## Did it help?

Now, and only now, the clean test labels. Beside the repair: what the published refit alone would have done
at each rank, and the same network, had somebody stopped its training after 20 epochs.
"""

# %%
known = {
    "as trained": accuracy(state.params, test, true),
    "repaired": accuracy(repaired, test, true),
    "stopped after 20 epochs": accuracy(early, test, true),
}
for name, value in known.items():
    print(f"{name:24} {value:.1%}")

ranks = jnp.arange(11)  # arrays, so that one compiled program serves them all
refits = [lip_jax.apply(state.params, feats[train], given[train], rank=k, head="head") for k in ranks]
by_rank = np.array([accuracy(refit, test, true) for refit in refits])
kernels = {"as trained": state.params["head"]["kernel"], "repaired": repaired["head"]["kernel"]}

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
plot.spectrum({name: lip_jax.svd_split(kernel, 0).s for name, kernel in kernels.items()}, ax=left)
left.set_title("Singular values of the head")
plot.accuracy_by_rank(by_rank, references=known, ax=right)
right.set(title="Accuracy on clean test labels", ylim=(0, 1))
right.legend(loc="lower right", ncols=2)
plt.show()

# %% [markdown]
"""
What one sees:

- **Left.** The head that memorised is large. On the same features a small one does better.
- **Right.** The repair wins back most of what the wrong labels cost. The published refit (the curve) does
  not: at rank 10 it is the head as it came, and with fewer components kept it is mostly much worse. Its
  refitted part has the scale of one-hot targets, its preserved part the scale of logits; it was made for
  regularised heads. This is why the choice is left to held-out labels.
- Stopping early would have been better still, had anybody known when. The body has been spoiled too, and no
  head can mend that.

## With a model of your own

Pass its parameters (the `params` of a `TrainState`, a variables dict, a `FrozenDict`), the features of rows
with their given labels, and some hundred rows that were kept from training. The test part is not needed.

What to do about the labels themselves, and about data that does not fit into memory:
`noisy_label_pipeline.py`. Many devices: `multi_device.py`.
"""
