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
"""# Repair a Flax nnx classifier.

The example of `quickstart_linen.py` on `flax.nnx`: a network learns by heart handwritten digits of which
some 40% carry a wrong label, and `lip_jax` repairs its last layer in closed form. With nnx a whole module
goes in and a new module comes out.

An accelerator is used where there is one, and not needed: under a minute on two CPU cores.
"""

# %%
import importlib.util

if importlib.util.find_spec("lip_jax") is None:  # on Colab; instead of the name, the path of a wheel will do
    get_ipython().run_line_magic("pip", "install --quiet 'lip_jax[demo]'")

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
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

**Train** (noisy labels) trains the network and fits the repairs, **held out** (just as noisy, never trained
on) chooses the repair, **test** (clean) only says at the end how well it went.
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
class Classifier(nnx.Module):
    """Two hidden layers and a head."""

    def __init__(self, rngs):
        self.first = nnx.Linear(64, 128, rngs=rngs)
        self.second = nnx.Linear(128, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        """Map pixels `(n, 64)` to logits `(n, 10)`."""
        return self.head(nnx.relu(self.second(nnx.relu(self.first(x)))))


@nnx.jit
def train_step(model, optimizer, x, y):
    """One step of Adam on the mean cross-entropy."""

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    optimizer.update(model, nnx.grad(loss)(model))


model = Classifier(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)
rng = np.random.default_rng(0)
for epoch in range(EPOCHS):
    for rows in rng.permutation(1000).reshape(-1, 50):
        train_step(model, optimizer, images[rows], given[rows])
    if epoch == 19:
        early = nnx.clone(model)  # to compare with at the end


# %%
@nnx.jit
def predict(model, x):
    """The most probable class of each row."""
    return model(x).argmax(axis=1)


def accuracy(model, part, labels):
    """Share of the labels of a part that the network predicts."""
    return np.mean(predict(model, images)[part] == labels[part])


print(f"agrees with {accuracy(model, train, given):.1%} of the labels it was trained on")
print(f"agrees with {accuracy(model, held_out, given):.1%} of the labels held out, just as noisy")

# %% [markdown]
"""
The gap between the two says that the network has memorised its labels.

## The repair

`capture_features` takes the module itself, and `None` in place of linen's variables. On a TPU JAX
multiplies in bfloat16 unless told otherwise, on recent GPUs in TF32. `lip_jax` asks for full precision in
its own sums; for the model's forward pass the context manager does.
"""

# %%
with jax.default_matmul_precision("highest"):
    feats = lip_jax.capture_features(model, None, images, head="head")

repaired, report = lip_jax.apply_with_report(
    model,
    feats[train],
    given[train],
    validation=(feats[held_out], given[held_out]),
    head="head",
    method=lip_jax.Choice(METHODS),
)
print(report)

# %% [markdown]
"""
A line for each method of repair, scored against noisy labels on one half of the held-out rows after the
other half has chosen its `strength`: a rank for refits, a ridge for readouts. The star marks what was
taken, the last line says why; `quickstart_linen.py` explains every column.

`repaired` is a new `Classifier`; the old one is as it was. Whoever keeps states rather than modules passes
an `nnx.State` and gets one back, here with a refit at a given rank:
"""

# %%
state = lip_jax.apply(nnx.state(model), feats[train], given[train], rank=8, head="head")
print(type(repaired).__name__, "and", type(state).__name__)

# %% [markdown]
"""
## Did it help?

Now, and only now, the clean test labels.
"""

# %%
known = {
    "as trained": accuracy(model, test, true),
    "repaired": accuracy(repaired, test, true),
    "stopped after 20 epochs": accuracy(early, test, true),
}
for name, value in known.items():
    print(f"{name:24} {value:.1%}")

ranks = jnp.arange(11)  # arrays, so that one compiled program serves them all
refits = [lip_jax.apply(model, feats[train], given[train], rank=k, head="head") for k in ranks]
by_rank = np.array([accuracy(refit, test, true) for refit in refits])

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
kernels = {"as trained": model.head.kernel[...], "repaired": repaired.head.kernel[...]}
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
- **Right.** The repair wins back most of what the wrong labels cost; the published refit alone (the curve)
  does not, and mostly harms. Stopping early would have been better still, had anybody known when: the body
  has been spoiled too, and no head can mend that.

What to do about the labels themselves, and about data that does not fit into memory:
`noisy_label_pipeline.py`. Many devices: `multi_device.py`.
"""
