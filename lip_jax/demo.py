"""What `lip-jax demo` computes: LIP at every rank on real data, and how far label noise turned the head.

A `Case` holds two heads on the same frozen features, one trained on the given, partly wrong labels and one
on the clean labels. LIP refits the first from the given labels alone; the second and the test labels only
judge it. A case is a small CNN trained on digits (`digits_case`) or precomputed features (`features_case`)
from a file:

| key of the `.npz` file | holds |
|---|---|
| `train_x`, `test_x` | features `(n, q)` and `(m, q)`, floating |
| `train_y`, `test_y` | clean class ids `(n,)` and `(m,)`, integer, from 0 |
| `train_y_noisy` (optional) | the given ids `(n,)`; without it symmetric noise is added to `train_y` |
| `kernel`, `bias` (optional) | a head `(q, l)`, `(l,)` trained on `train_y_noisy`; otherwise one is trained |
"""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float, Int

import lip_jax
from lip_jax._checks import describe, is_floating
from lip_jax._types import Array, Bias, ClassIds, Feats, Kernel
from lip_jax.bounds.angles import Angles, compare_heads, ridge_bounds
from lip_jax.numerics import linalg

OnEpoch = Callable[[str], object]

REQUIRED_KEYS = ("train_x", "train_y", "test_x", "test_y")

HEAD_IN_FILE = "the head in the file"

OPTIONAL_KEYS = ("train_y_noisy", "kernel", "bias")


@dataclass(frozen=True)
class Rows:
    """Inputs of a network or of a head, with their labels.

    Attributes:
        train_x: Training inputs `(n, …)`, float32.
        clean_y: Their clean class ids `(n,)`.
        given_y: The ids that training sees, partly wrong, `(n,)`.
        test_x: Test inputs `(m, …)`.
        test_y: Their clean class ids `(m,)`.
        num_classes: `l`.
        given_from: Where the given ids come from, in words.
    """

    train_x: Float[Array, "n ..."]
    clean_y: ClassIds
    given_y: ClassIds
    test_x: Float[Array, "m ..."]
    test_y: Int[Array, "m"]
    num_classes: int
    given_from: str

    @property
    def flip_rate(self) -> float:
        """The share of training rows whose given label is wrong."""
        return float(np.mean(np.asarray(self.clean_y) != np.asarray(self.given_y)))


@dataclass(frozen=True)
class SoftmaxHead:
    """A linear head: logits `x W + b`."""

    kernel: Kernel
    bias: Bias


HeldOut = tuple[Float[Array, "k ..."], Int[Array, "k"]]


@dataclass(frozen=True)
class CleanNetwork:
    """The network trained on clean labels: its head, and its own features of the test rows."""

    head: SoftmaxHead
    test_x: Feats


@dataclass(frozen=True)
class Case:
    """Two heads on the same features.

    Attributes:
        rows: The features with their labels.
        noisy: The head trained on the given labels, which LIP refits.
        clean: A head trained on the clean labels.
        noisy_from: Where the noisy head comes from, in words.
        network: For comparison, a network whose body saw no wrong label either.
        held_out: Features and given labels that were kept from training, to choose a repair by.
    """

    rows: Rows
    noisy: SoftmaxHead
    clean: SoftmaxHead
    noisy_from: str
    network: CleanNetwork | None = None
    held_out: HeldOut | None = None


@dataclass(frozen=True)
class Scores:
    """How a head does on each test row; a leading axis, where there is one, is the rank."""

    correct: Bool[Array, "*ranks m"]
    log_losses: Float[Array, "*ranks m"]

    @property
    def accuracy(self) -> Float[Array, "*ranks"]:
        """Share of rows whose largest logit is the label's."""
        return np.asarray(np.mean(self.correct, axis=-1))

    @property
    def log_loss(self) -> Float[Array, "*ranks"]:
        """Mean of `−log softmax(x W + b)[y]`."""
        return np.asarray(np.mean(self.log_losses, axis=-1))


@dataclass(frozen=True)
class Change:
    """The mean of paired differences with its standard error."""

    mean: Float[Array, "*ranks"]
    stderr: Float[Array, "*ranks"]

    @property
    def up(self) -> Bool[Array, "*ranks"]:
        """Where the mean exceeds 0 by more than two standard errors."""
        return self.mean > 2 * self.stderr

    @property
    def down(self) -> Bool[Array, "*ranks"]:
        """Where the mean falls below 0 by more than two standard errors."""
        return self.mean < -2 * self.stderr


@dataclass(frozen=True)
class Study:
    """Everything the demo reports.

    Attributes:
        by_rank: Test scores of the refined head at ranks 0 to r.
        noisy: Test scores of the head as it came.
        clean: Test scores of the clean head.
        network: Test scores of the clean network, if there is one.
        s_network: Spectrum of its head `(r,)`.
        s_clean: Spectrum of the clean head `(r,)`.
        s_noisy: Spectrum of the noisy head `(r,)`.
        sigma: Its refitted singular values `(r,)`; rank k takes the first k from `s_noisy` instead.
        similarity: `φ(i, j)` of the clean and the noisy head, `(r, r)`.
        network_similarity: The same for the clean network's head, if there is one.
        softmax: Angles between the clean and the noisy head.
        ridge: Angles between ridge heads on the same features, for clean and for given labels.
        ridge_strength: Their `λ`.
    """

    by_rank: Scores
    noisy: Scores
    clean: Scores
    network: Scores | None
    s_network: Float[Array, "r"] | None
    s_clean: Float[Array, "r"]
    s_noisy: Float[Array, "r"]
    sigma: Float[Array, "r"]
    similarity: Float[Array, "r r"]
    network_similarity: Float[Array, "r r"] | None
    softmax: Angles
    ridge: Angles
    ridge_strength: float

    @property
    def accuracy_change(self) -> Change:
        """Of the refined head at each rank against the noisy head."""
        return paired_change(self.by_rank.correct.astype(float), self.noisy.correct.astype(float))

    @property
    def log_loss_change(self) -> Change:
        """Of the refined head at each rank against the noisy head."""
        return paired_change(self.by_rank.log_losses, self.noisy.log_losses)


def load_digits(*, noise: float, seed: int) -> Rows:
    """Scikit-learn's 1,797 handwritten digits, 70% for training, with symmetric noise in their labels.

    Args:
        noise: Flip rate, 0 to 1.
        seed: Of the split and of the noise.

    Returns:
        `Rows` of images `(n, 8, 8, 1)` with values in [0, 1].

    Raises:
        ValueError: If `noise` is out of range.

    Example:
        >>> from lip_jax import demo
        >>> demo.load_digits(noise=0.4, seed=0).train_x.shape
        (1258, 8, 8, 1)
    """
    from sklearn.datasets import load_digits

    images, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    order = np.random.default_rng(seed).permutation(labels.shape[0])
    train, test = np.split(order, [round(0.7 * labels.shape[0])])
    images, labels = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1), labels.astype(np.int32)
    given_y = lip_jax.noise.symmetric(_noise_key(seed), labels[train], noise, num_classes=10)
    given_from = f"symmetric noise at rate {noise:g}"
    return Rows(images[train], labels[train], given_y, images[test], labels[test], 10, given_from)


def load_features(path: str | Path, *, noise: float, seed: int) -> tuple[Rows, SoftmaxHead | None]:
    """Read precomputed features in the format of this module's table.

    Args:
        path: The `.npz` file.
        noise: Flip rate of the symmetric noise added where the file holds no `train_y_noisy`.
        seed: Of that noise.

    Returns:
        The rows, in float32, and the head if the file holds one.

    Raises:
        ValueError: If the file cannot be read, keys are missing, or shapes, dtypes or values do not fit.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from lip_jax import demo
        >>> x, y = np.eye(4, 3, dtype=np.float32), np.array([0, 1, 2, 0])
        >>> with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        ...     np.savez(file, train_x=x, train_y=y, test_x=x, test_y=y)
        ...     rows, head = demo.load_features(file.name, noise=0.0, seed=0)
        >>> rows.num_classes, head
        (3, None)
    """
    arrays = _read_npz(Path(path))
    train_x, test_x = (_as_feats(arrays[name], name) for name in ("train_x", "test_x"))
    n, q = train_x.shape
    if test_x.shape[1] != q:
        raise ValueError(f"test_x must have the q = {q} columns of train_x; got {describe(test_x)}.")
    clean_y = _as_ids(arrays["train_y"], "train_y", n)
    test_y = _as_ids(arrays["test_y"], "test_y", test_x.shape[0])
    given_y, given_from = clean_y, f"symmetric noise at rate {noise:g}"
    if "train_y_noisy" in arrays:
        given_y, given_from = (
            _as_ids(arrays["train_y_noisy"], "train_y_noisy", n),
            "train_y_noisy in the file",
        )
    num_classes = max(int(ids.max()) for ids in (clean_y, test_y, given_y)) + 1
    if num_classes < 2:
        raise ValueError("train_y must name at least two classes; every id is 0.")
    head = _as_head(arrays, q, num_classes)
    if head is not None:
        num_classes = head.kernel.shape[1]
    if "train_y_noisy" not in arrays:
        given_y = lip_jax.noise.symmetric(_noise_key(seed), clean_y, noise, num_classes=num_classes)
    return Rows(train_x, clean_y, given_y, test_x, test_y, num_classes, given_from), head


def hold_out(rows: Rows, *, seed: int) -> tuple[Rows, HeldOut | None]:
    """Keep a fifth of the training rows, with their given labels, from training.

    Fewer than 20 such rows could not tell one head from another: then none are kept.

    Args:
        rows: Inputs of a network or of a head.
        seed: Of the split.

    Returns:
        The rows without them, and `(inputs, given labels)` or None.

    Example:
        >>> from lip_jax import demo
        >>> rows, (inputs, labels) = demo.hold_out(demo.load_digits(noise=0.4, seed=0), seed=0)
        >>> rows.train_x.shape[0], inputs.shape[0], labels.shape[0]
        (1006, 252, 252)
    """
    order = np.random.default_rng([seed, 1]).permutation(rows.train_x.shape[0])
    kept, held = np.split(order, [round(0.8 * order.shape[0])])
    if held.shape[0] < 20:
        return rows, None
    fewer = replace(rows, **{name: getattr(rows, name)[kept] for name in ("train_x", "clean_y", "given_y")})
    return fewer, (rows.train_x[held], rows.given_y[held])


def digits_case(
    digits: Rows,
    held_out: HeldOut | None = None,
    *,
    seed: int,
    epochs: int,
    weight_decay: float,
    on_epoch: OnEpoch = lambda stage: None,
) -> Case:
    """Train the same CNN on clean and on given labels, and a clean head on the features of the latter.

    Args:
        digits: Images `(n, 8, 8, 1)` with their labels, from `load_digits`.
        held_out: Images and given labels from `hold_out`.
        seed: Of parameters and batches; both networks start alike.
        epochs: Passes over the training rows.
        weight_decay: Training adds `½ · weight_decay · ‖params‖²` to the mean cross-entropy.
        on_epoch: Called after each epoch with the name of what is being trained.

    Returns:
        A `Case` on the noisy network's features.

    Reference:
        [si2025]; [li2020], the features of a network trained on noisy labels.
    """
    model = _DigitsNet(digits.num_classes)

    settings = {"seed": seed, "epochs": epochs, "weight_decay": weight_decay}

    def train(labels, stage):
        variables = _train(
            model,
            digits.train_x,
            labels,
            learning_rate=0.03,
            on_epoch=partial(on_epoch, stage),
            **settings,
        )
        return variables, SoftmaxHead(**variables["params"]["head"])

    def feats(variables, images):
        return lip_jax.capture_features(model, variables, images, head="head")

    clean_variables, clean_head = train(digits.clean_y, "network on clean labels")
    noisy_variables, noisy_head = train(digits.given_y, "network on given labels")
    rows = replace(
        digits,
        train_x=feats(noisy_variables, digits.train_x),
        test_x=feats(noisy_variables, digits.test_x),
    )
    on_head_epoch = partial(on_epoch, "clean head")
    return Case(
        rows,
        noisy=noisy_head,
        clean=_fit_head(rows.train_x, rows.clean_y, rows.num_classes, on_epoch=on_head_epoch, **settings),
        noisy_from="the head of the CNN trained on the given labels",
        network=CleanNetwork(clean_head, feats(clean_variables, digits.test_x)),
        held_out=held_out and (feats(noisy_variables, held_out[0]), held_out[1]),
    )


def features_case(
    rows: Rows,
    head: SoftmaxHead | None,
    held_out: HeldOut | None = None,
    *,
    seed: int,
    epochs: int,
    weight_decay: float,
    on_epoch: OnEpoch = lambda stage: None,
) -> Case:
    """Train the heads that precomputed features lack.

    Args:
        rows: Features with their labels, from `load_features`.
        head: The head trained on the given labels; None trains it.
        held_out: Features and given labels from `hold_out`.
        seed: Of parameters and batches; both heads start alike.
        epochs: Passes over the training rows.
        weight_decay: As in `digits_case`.
        on_epoch: Called after each epoch with the name of what is being trained.

    Returns:
        A `Case` on these features.

    Reference:
        [li2020], frozen features of a network trained on noisy labels.
    """
    # At unit mean square the weight decay means the same for every file; the kernel takes the scale back.
    scale = np.sqrt(np.mean(np.asarray(rows.train_x) ** 2))

    def fit(labels, stage):
        fitted = _fit_head(
            rows.train_x / scale,
            labels,
            rows.num_classes,
            seed=seed,
            epochs=epochs,
            weight_decay=weight_decay,
            on_epoch=partial(on_epoch, stage),
        )
        return SoftmaxHead(fitted.kernel / scale, fitted.bias)

    noisy_from = HEAD_IN_FILE
    if head is None:
        head = fit(rows.given_y, "noisy head")
        noisy_from = "a softmax head trained on the given labels"
    return Case(rows, head, fit(rows.clean_y, "clean head"), noisy_from, held_out=held_out)


def study(case: Case, ranks: Int[Array, "k"]) -> Study:
    """Apply LIP at every rank and measure what the demo reports.

    LIP is the published method: the tail is refitted to the given labels, one-hot, and the bias stays.

    Args:
        case: The heads, features and labels.
        ranks: Ranks from 1 to r at which angles are measured.

    Returns:
        A `Study`.

    Reference:
        [si2025], the label inaccuracy processor.
    """
    rows, noisy, network = case.rows, case.noisy, case.network
    split = lip_jax.svd_split(noisy.kernel, 0)
    sigma = lip_jax.solve_tail_sigma(split, rows.train_x, rows.given_y)
    ridge = 0.01 * float(jnp.mean(jnp.sum(jnp.asarray(rows.train_x) ** 2, axis=0)))
    logits = _logits(noisy.kernel, noisy.bias, rows.test_x)
    by_rank = _score_by_rank(split, sigma, logits, rows.test_x, rows.test_y)
    ranks = jnp.asarray(ranks)
    return Study(
        by_rank=Scores(*map(np.asarray, by_rank)),
        noisy=_score(noisy, rows.test_x, rows.test_y),
        clean=_score(case.clean, rows.test_x, rows.test_y),
        network=network and _score(network.head, network.test_x, rows.test_y),
        s_network=network and lip_jax.svd_split(network.head.kernel, 0).s,
        s_clean=lip_jax.svd_split(case.clean.kernel, 0).s,
        s_noisy=split.s,
        sigma=sigma,
        similarity=lip_jax.spectrum.kernel_similarity_grid(case.clean.kernel, noisy.kernel),
        network_similarity=network
        and lip_jax.spectrum.kernel_similarity_grid(network.head.kernel, noisy.kernel),
        softmax=compare_heads(case.clean.kernel, noisy.kernel, ranks),
        ridge=_compare_ridge_heads(rows, ridge, ranks),
        ridge_strength=ridge,
    )


def choose(case: Case) -> tuple[lip_jax.choice.SelectionReport, Scores]:
    """What `lip_jax.select` takes by the held-out given labels, and its test scores.

    Args:
        case: A case with `held_out`.

    Returns:
        The report, and the scores of the chosen head on the test rows.

    Raises:
        ValueError: If the case holds none.

    Reference:
        [si2025], [li2020]: the candidates.
    """
    rows, noisy = case.rows, case.noisy
    if case.held_out is None:
        raise ValueError("case.held_out is None: there are no labels to choose by. Make it with hold_out.")
    selection = lip_jax.select(noisy.kernel, noisy.bias, rows.train_x, rows.given_y, validation=case.held_out)
    bias = noisy.bias if selection.bias is None else selection.bias
    chosen = SoftmaxHead(selection.kernel, bias)
    return selection.report, _score(chosen, rows.test_x, rows.test_y)


def paired_change(after: Float[Array, "*ranks m"], before: Float[Array, "m"]) -> Change:
    """The mean of `after − before` over the same rows, with its standard error.

    Args:
        after: One value a row, `(…, m)`.
        before: One value a row, `(m,)`.

    Returns:
        A `Change` with the leading axes of `after`; the standard error of a single row is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from lip_jax import demo
        >>> change = demo.paired_change(jnp.array([1.0, 1.0, 1.0, 0.0]), jnp.zeros(4))
        >>> float(change.mean), float(change.stderr)
        (0.75, 0.25)
    """
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    m = difference.shape[-1]
    mean = difference.mean(axis=-1, keepdims=True)
    squares = np.asarray(np.sum((difference - mean) ** 2, axis=-1))
    stderr = np.sqrt(squares / (m * (m - 1))) if m > 1 else np.full_like(squares, np.nan)
    return Change(mean[..., 0], np.asarray(stderr))


class _DigitsNet(nn.Module):
    """A small CNN for 8×8 images, with 64 features before its head."""

    num_classes: int

    @nn.compact
    def __call__(self, images):
        hidden = nn.relu(nn.Conv(16, (3, 3), strides=(2, 2))(images))
        hidden = nn.relu(nn.Conv(32, (3, 3), strides=(2, 2))(hidden))
        feats = nn.relu(nn.Dense(64)(hidden.reshape(hidden.shape[0], -1)))
        return nn.Dense(self.num_classes, name="head")(feats)


def _noise_key(seed: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), 1)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path} is no file.")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no .npz file. Write one with np.savez(path, train_x=…, train_y=…, …).")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = sorted(file.files)
            arrays = {name: file[name] for name in (*REQUIRED_KEYS, *OPTIONAL_KEYS) if name in found}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    missing = [name for name in REQUIRED_KEYS if name not in arrays]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}; it holds {', '.join(found) or 'nothing'}. "
            f"Required are {', '.join(REQUIRED_KEYS)}."
        )
    return arrays


def _as_feats(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim != 2 or 0 in array.shape or not is_floating(array):
        raise ValueError(f"{name} must be floating, with two axes and no empty one; got {describe(array)}.")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
        energy = np.sum(array**2)
    if not 0 < energy < np.inf:
        raise ValueError(
            f"{name} must be finite, squares included, and not zero throughout; its squares sum to {energy}."
        )
    return array


def _as_ids(array: np.ndarray, name: str, n: int) -> np.ndarray:
    if array.shape != (n,) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must hold one integer class id per row, n = {n}; got {describe(array)}.")
    if array.min() < 0 or array.max() >= 2**31:
        raise ValueError(f"{name} must hold class ids from 0; got {array.min()} to {array.max()}.")
    return array.astype(np.int32)


def _as_head(arrays: dict[str, np.ndarray], q: int, num_classes: int) -> SoftmaxHead | None:
    if "kernel" not in arrays:
        if "bias" in arrays:
            raise ValueError("bias came without kernel. Give both, or neither to have a head trained.")
        return None
    if "train_y_noisy" not in arrays:
        raise ValueError("kernel came without train_y_noisy, the labels that head was trained on.")
    kernel = _as_feats(arrays["kernel"], "kernel")
    if kernel.shape[0] != q or kernel.shape[1] < num_classes:
        raise ValueError(
            f"kernel must be (q, l), with the q = {q} columns of train_x and at least the {num_classes} "
            f"classes of the labels; got {describe(kernel)}."
        )
    bias = arrays.get("bias", np.zeros(kernel.shape[1], np.float32))
    if bias.shape != kernel.shape[1:] or not is_floating(bias) or not np.isfinite(bias).all():
        raise ValueError(
            f"bias must be finite and floating, one entry per column of kernel, l = {kernel.shape[1]}; "
            f"got {describe(bias)}."
        )
    return SoftmaxHead(kernel, bias.astype(np.float32))


def _train(model, inputs, labels, *, learning_rate, seed, epochs, weight_decay, on_epoch):
    """Minimise the penalised cross-entropy by SGD with momentum, the learning rate falling linearly to 0."""
    inputs, labels = jnp.asarray(inputs), jnp.asarray(labels)
    n = inputs.shape[0]
    batch_size = min(n, max(64, min(n // 64, 256)))
    steps = epochs * (n // batch_size)
    init_key, order_key = jax.random.split(jax.random.key(seed))
    variables = model.init(init_key, inputs[:1])
    settings = (steps, weight_decay, learning_rate)
    state = _optimizer(*settings).init(variables)
    train_epoch = partial(_train_epoch, model=model, settings=settings, batch_size=batch_size)
    for key in jax.random.split(order_key, epochs):
        variables, state = jax.block_until_ready(train_epoch(variables, state, inputs, labels, key))
        on_epoch()
    return variables


def _optimizer(steps: int, weight_decay: float, learning_rate: float) -> optax.GradientTransformation:
    # optax's own schedules mix int32 steps with floats, which strict dtype promotion refuses.
    def schedule(step):
        return learning_rate * (1 - jnp.asarray(step).astype(jnp.float32) / steps)

    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(schedule, momentum=0.9))


@partial(jax.jit, static_argnames=("model", "settings", "batch_size"))
def _train_epoch(variables, state, inputs, labels, key, *, model, settings, batch_size):
    optimizer = _optimizer(*settings)

    def loss(variables, rows):
        logits = model.apply(variables, inputs[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    def step(carry, rows):
        variables, state = carry
        updates, state = optimizer.update(jax.grad(loss)(variables, rows), state, variables)
        return (optax.apply_updates(variables, updates), state), None

    batches = inputs.shape[0] // batch_size
    order = jax.random.permutation(key, inputs.shape[0])[: batches * batch_size]
    carry, _ = jax.lax.scan(step, (variables, state), order.reshape(batches, batch_size))
    return carry


def _fit_head(feats, labels, num_classes, **settings) -> SoftmaxHead:
    # The curvature of the loss is at most (mean ‖x‖² + 1)/2, the 1 being the bias's: its inverse is a
    # learning rate for any features.
    feats = jnp.asarray(feats)
    learning_rate = 2 / (float(jnp.mean(jnp.sum(feats**2, axis=1))) + 1)
    variables = _train(nn.Dense(num_classes), feats, labels, learning_rate=learning_rate, **settings)
    return SoftmaxHead(**variables["params"])


def _score(head: SoftmaxHead, feats, labels) -> Scores:
    return Scores(*map(np.asarray, _score_rows(_logits(head.kernel, head.bias, feats), labels)))


@jax.jit
def _logits(kernel, bias, feats):
    return linalg.matmul(feats, kernel) + bias[None, :]


@jax.jit
def _score_rows(logits, labels):
    log_probs = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]
    return logits.argmax(axis=1) == labels, -own


@jax.jit
def _score_by_rank(split, sigma, logits, feats, labels):
    # Rank k adds Σ_{i>k} (σ_i* − s_i) (x·u_i) v_i to the logits: one solve and one compilation for all.
    along_u = linalg.matmul(feats, split.u)

    def at(rank):
        change = jnp.where(jnp.arange(sigma.shape[0]) >= rank, sigma - split.s, 0)
        return _score_rows(logits + linalg.matmul(along_u * change[None, :], split.vt), labels)

    return jax.lax.map(at, jnp.arange(sigma.shape[0] + 1))


def _compare_ridge_heads(rows: Rows, ridge: float, ranks) -> Angles:
    fit = partial(_ridge_kernel, rows.train_x, num_classes=rows.num_classes, ridge=ridge)
    kernel, kernel_noisy = fit(labels=rows.clean_y), fit(labels=rows.given_y)
    angles = compare_heads(kernel, kernel_noisy, ranks)
    n, q = rows.train_x.shape
    bound = partial(
        ridge_bounds,
        # With fewer rows than features XᵀX has eigenvalues 0 that the thin SVD leaves out.
        jnp.pad(lip_jax.bounds.feature_singular_values(rows.train_x), (0, max(q - n, 0))),
        lip_jax.svd_split(kernel, 0).s,
        lip_jax.svd_split(kernel_noisy, 0).s,
        ranks,
        num_samples=n,
        num_classes=rows.num_classes,
        flip_rate=rows.flip_rate,
        ridge=ridge,
    )
    bounds = {
        "Wedin, mixed gap": angles.bounds["Wedin, mixed gap"],
        "paper": bound(form="paper"),
        "filter": bound(form="filter"),
    }
    return Angles(angles.feats_side, angles.class_side, bounds)


@partial(jax.jit, static_argnames=("num_classes",))
def _ridge_kernel(feats, labels, num_classes, ridge):
    """`(XᵀX + λI)⁻¹ XᵀY` with one-hot `Y`."""
    gram = linalg.matmul(feats.T, feats)
    class_sums = jax.ops.segment_sum(feats, labels, num_classes).T
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    return jax.scipy.linalg.solve(gram + ridge * identity, class_sums, assume_a="pos")
