"""The published formulas in float64 NumPy, written as they are printed and sharing no code with the package.

Rows are samples: `X (n, q)`, `Y (n, l)`, kernel `W (q, l) = U diag(s) Vᵀ`.
"""

import numpy as np
from scipy.optimize import minimize_scalar


def f64(array):
    return np.asarray(array).astype(np.float64)


def one_hot(labels, l):
    """Targets of class ids, and which rows are labelled."""
    labels = np.asarray(labels).astype(np.int64)
    targets = np.zeros((len(labels), l))
    labelled = labels >= 0
    targets[np.flatnonzero(labelled), labels[labelled]] = 1
    return targets, labelled


def as_targets(labels, l):
    """Targets `(n, l)` of either kind of labels, 0 in unlabelled rows, and which rows are labelled."""
    if np.ndim(labels) == 1:
        return one_hot(labels, l)
    targets = f64(labels)
    labelled = ~np.isnan(targets).all(axis=1)
    return np.where(labelled[:, None], targets, 0), labelled


def candidate_targets(mask):
    """Each candidate set as a uniform distribution; an empty set as a row of NaN."""
    rows = [row / row.sum() if row.sum() else np.full(row.shape, np.nan) for row in f64(mask)]
    return np.stack(rows)


def used_rows(feats, labels, l, weights, bias):
    """`X`, `Y − b` and `w` in float64, of the rows that count."""
    targets, labelled = as_targets(labels, l)
    weights = np.ones(len(targets)) if weights is None else f64(weights)
    rows = labelled & (weights > 0)
    shift = 0 if bias is None else f64(bias)
    return f64(feats)[rows], targets[rows] - shift, weights[rows]


def tail_sigma(
    u, s, vt, rank, feats, labels, *, weights=None, bias=None, ridge=0.0, ridge_to="current", rcond=None
):
    """The published closed form, with its `n×l` residual and with the two `r×r` products.

    `σ_i* = u_iᵀ Xᵀ (Y − X W_k) v_i / (u_iᵀ XᵀX u_i)` for i > k. A ridge towards `c` minimises
    `‖X (W_k + Σ σ_i u_i v_iᵀ) − Y‖² + λ Σ (σ_i − c_i)²` instead.
    """
    u, s, vt = f64(u), f64(s), f64(vt)
    q, l = u.shape[0], vt.shape[1]
    feats, targets, weights = used_rows(feats, labels, l, weights, bias)
    principal = u[:, :rank] @ np.diag(s[:rank]) @ vt[:rank]
    residual = targets - feats @ principal
    tail_u, tail_v = u[:, rank:], vt[rank:].T
    numerator = np.diag(tail_u.T @ (feats.T * weights) @ residual @ tail_v)
    denominator = np.diag(tail_u.T @ ((feats.T * weights) @ feats) @ tail_u)
    centre = s[rank:] if ridge_to == "current" else 0
    if rcond is None:
        rcond = np.finfo(np.float64).eps * max(q, l)
    kept = (s[rank:] <= rcond * s[0]) if rcond else np.zeros(len(s) - rank, bool)
    refitted = np.divide(
        numerator + ridge * centre, denominator + ridge, out=s[rank:].copy(), where=denominator + ridge > 0
    )
    return np.concatenate([s[:rank], np.where(kept, s[rank:], refitted)])


def objective(kernel, feats, labels, *, weights=None, bias=None, ridge=0.0, prior=None):
    """`Σ w ‖x W + b − y‖² + λ ‖W − P‖_F²`, with `P = 0` unless given."""
    kernel = f64(kernel)
    feats, targets, weights = used_rows(feats, labels, kernel.shape[1], weights, bias)
    loss = (weights * ((feats @ kernel - targets) ** 2).sum(axis=1)).sum()
    return loss + ridge * ((kernel - (0 if prior is None else f64(prior))) ** 2).sum()


def ridge_optimum(feats, targets, ridge=0.0, weights=None):
    """`(XᵀX + λI)⁻¹ XᵀY`, without intercept."""
    feats, targets = f64(feats), f64(targets)
    weights = np.ones(len(feats)) if weights is None else f64(weights)
    gram = (feats.T * weights) @ feats + ridge * np.eye(feats.shape[1])
    return np.linalg.solve(gram, (feats.T * weights) @ targets)


def least_squares_with_intercept(feats, targets):
    """Kernel and bias that minimise `‖X W + 1bᵀ − Y‖_F²`."""
    design = np.concatenate([f64(feats), np.ones((len(feats), 1))], axis=1)
    solution = np.linalg.lstsq(design, f64(targets), rcond=None)[0]
    return solution[:-1], solution[-1]


def similarity(v, v_noisy, i, j):
    """`φ(i, j) = ‖V_:iᵀ V'_:j‖_F² / min(i, j)`."""
    product = f64(v)[:, :i].T @ f64(v_noisy)[:, :j]
    return np.linalg.norm(product, "fro") ** 2 / min(i, j)


def sin_theta(kernel, kernel_noisy, rank):
    """`sin θ` of the leading right and left singular subspaces: `‖(I − P) P'‖₂`, by projectors."""
    sines = []
    for side in (0, 2):
        first, second = (np.linalg.svd(f64(w))[side] for w in (kernel, kernel_noisy))
        first, second = (b.T[:, :rank] if side == 2 else b[:, :rank] for b in (first, second))
        outside = np.eye(len(first)) - first @ first.T
        sines.append(np.linalg.norm(outside @ second @ second.T, 2))
    return sines


def paper_bound(feats, l, entry_rate, ridge, gap):
    """`σ_max(X) √(n l) √p / (δ (λ_min(XᵀX) + λ))`."""
    feats = f64(feats)
    n = len(feats)
    largest = np.linalg.norm(feats, 2)
    smallest_eigenvalue = np.linalg.eigvalsh(feats.T @ feats)[0]
    return largest * np.sqrt(n * l) * np.sqrt(entry_rate) / (gap * (smallest_eigenvalue + ridge))


def filter_bound(feats, l, entry_rate, ridge, gap):
    """`‖(XᵀX + λI)⁻¹Xᵀ‖₂ √(n l p) / δ`, the norm taken of the matrix itself."""
    feats = f64(feats)
    gram = feats.T @ feats + ridge * np.eye(feats.shape[1])
    return np.linalg.norm(np.linalg.solve(gram, feats.T), 2) * np.sqrt(len(feats) * l * entry_rate) / gap


def mixed_gap(kernel, kernel_noisy, rank):
    """`s_rank(W) − s_{rank+1}(W')`."""
    s, s_noisy = (np.append(np.linalg.svd(f64(w), compute_uv=False), 0) for w in (kernel, kernel_noisy))
    return s[rank - 1] - s_noisy[rank]


def entropy_rank(s):
    """`exp(−Σ p log p)`, `p = s/Σs`."""
    p = f64(s)[f64(s) > 0]
    p = p / p.sum()
    return np.exp(-(p * np.log(p)).sum())


def stable_rank(s):
    """`‖W‖_F² / ‖W‖₂²`."""
    return (f64(s) ** 2).sum() / f64(s).max() ** 2


def rank_for_energy(s, fraction):
    """The smallest k with `Σ_{i≤k} s_i² ≥ fraction · Σ s_i²`."""
    energy = f64(s) ** 2
    return next(k for k in range(len(energy) + 1) if energy[:k].sum() >= fraction * energy.sum())


def relative_error(value, reference):
    """`‖value − reference‖ / ‖reference‖`."""
    return np.linalg.norm(f64(value) - f64(reference)) / np.linalg.norm(f64(reference))


def log_softmax(logits):
    """`z_c − log Σ_c exp(z_c)`."""
    below = f64(logits) - f64(logits).max(axis=1, keepdims=True)
    return below - np.log(np.exp(below).sum(axis=1, keepdims=True))


def softmax(logits):
    """`exp(z_c) / Σ_c exp(z_c)`."""
    return np.exp(log_softmax(logits))


def calibrated(kernel, bias, feats, labels, rank, *, weights=None, ridge=0.0):
    """Gauge, centre, scale and refit with explicit `n×l` matrices: kernel, bias, `α` and `σ`.

    `W_c = W H`, `Y_c = Y H` with `H = I − 11ᵀ/l`; given a bias, features and targets less their weighted
    means; `α = ⟨Z,Z⟩/⟨Z,Y_c⟩`, `Z = (X − μ) W_c`; the published refit towards `α Y_c`; the mean of the
    kernel put back, and `b' = b + μᵀ (W − W')`.
    """
    kernel = f64(kernel)
    q, l = kernel.shape
    feats, targets, weights = used_rows(feats, labels, l, weights, None)
    without_mean = np.eye(l) - np.ones((l, l)) / l
    gauge_free, mean_kernel = kernel @ without_mean, kernel.mean(axis=1, keepdims=True)
    mean_x = np.zeros(q) if bias is None else weights @ feats / weights.sum()
    mean_y = np.zeros(l) if bias is None else weights @ targets / weights.sum()
    off_x, off_y = feats - mean_x, (targets - mean_y) @ without_mean
    logits = off_x @ gauge_free
    scale = (weights[:, None] * logits**2).sum() / (weights[:, None] * logits * off_y).sum()
    u, s, vt = np.linalg.svd(gauge_free, full_matrices=False)
    rcond = 1e-10  # the gauge direction, which is empty, keeps its value
    sigma = tail_sigma(u, s, vt, rank, off_x, scale * off_y, weights=weights, ridge=ridge, rcond=rcond)
    refined = u @ np.diag(sigma) @ vt + mean_kernel
    moved = None if bias is None else f64(bias) + mean_x @ (kernel - refined)
    return refined, moved, scale, sigma


def metrics(logits, labels, weights=None, bins=15):
    """Accuracy, balanced accuracy, log-loss and calibration error by loops over rows, classes and bins."""
    targets, labelled = as_targets(labels, np.shape(logits)[1])
    weights = np.ones(len(targets)) if weights is None else f64(weights)
    rows = labelled & (weights > 0) & np.isfinite(f64(logits)).all(axis=1)
    log_chances, targets, weights = log_softmax(f64(logits)[rows]), targets[rows], weights[rows]
    predicted, confidence = log_chances.argmax(axis=1), np.exp(log_chances.max(axis=1))
    hit = targets[np.arange(len(targets)), predicted]
    by_class = [weights * targets[:, c] for c in range(targets.shape[1])]
    recalls = [held[predicted == c].sum() / held.sum() for c, held in enumerate(by_class) if held.sum() > 0]
    gaps = 0.0
    for b in range(bins):
        inside = (confidence >= b / bins) & ((confidence < (b + 1) / bins) | (b == bins - 1))
        gaps += abs((weights * (hit - confidence))[inside].sum())
    return {
        "accuracy": (weights * hit).sum() / weights.sum(),
        "balanced_accuracy": np.mean(recalls),
        "log_loss": -(weights * (targets * log_chances).sum(axis=1)).sum() / weights.sum(),
        "calibration_error": gaps / weights.sum(),
    }


def scores(logits, labels, metric, weights=None):
    """Each row's score, higher is better, and the weights under which their mean is the metric."""
    targets, labelled = as_targets(labels, np.shape(logits)[1])
    weights = np.where(labelled, np.ones(len(targets)) if weights is None else f64(weights), 0)
    if metric == "log_loss":
        return (targets * log_softmax(logits)).sum(axis=1), weights
    hit = targets[np.arange(len(targets)), f64(logits).argmax(axis=1)]
    if metric == "accuracy":
        return hit, weights
    per_class = weights @ targets
    share = targets / np.where(per_class > 0, per_class, 1)
    of_all = share.sum(axis=1)
    hit = share[np.arange(len(targets)), f64(logits).argmax(axis=1)] / np.where(of_all > 0, of_all, 1)
    return hit, weights * of_all


def paired_difference(logits, base_logits, labels, metric, weights=None):
    """Weighted mean of the paired difference and its standard error, one disagreement added."""
    (score, weights), (base, _) = (scores(z, labels, metric, weights) for z in (logits, base_logits))
    used = weights > 0
    difference, weights = (score - base)[used], weights[used]
    mean = np.average(difference, weights=weights)
    share = weights / weights.sum()
    return mean, np.sqrt((share**2 * (difference - mean) ** 2).sum() + (share**2).sum() ** 2)


def noise_loss(logits, labels, weights, transition):
    """Mean of `−log Σ_i p_i P(given | true = i)`."""
    chances = np.exp(log_softmax(f64(logits))) @ f64(transition)
    rows = np.asarray(labels) >= 0
    return np.average(
        -np.log(np.maximum(chances[np.arange(len(rows)), labels], 1e-300))[rows],
        weights=np.ones(rows.sum()) if weights is None else f64(weights)[rows],
    )


def best_scale(logits, labels, weights=None, transition=None):
    """The minimiser of the log-loss by scipy, over the logarithm of the scale."""

    def loss(log_scale):
        scaled = np.exp(log_scale) * f64(logits)
        if transition is not None:
            return noise_loss(scaled, labels, weights, transition)
        return metrics(scaled, labels, weights)["log_loss"]

    grid = np.linspace(-12, 12, 97)
    start = grid[np.argmin([loss(x) for x in grid])]
    return np.exp(minimize_scalar(loss, (start - 0.25, start, start + 0.25), tol=1e-10).x)


def ridge_fit(feats, targets, weights, ridge, intercept):
    """Kernel and intercept of `min Σ w‖y − Wᵀx − b‖² + λ‖W‖²`, the intercept as an unpenalised column."""
    q = feats.shape[1]
    design = np.column_stack([feats, np.ones(len(feats))]) if intercept else feats
    penalty = ridge * np.eye(design.shape[1])
    if intercept:
        penalty[q, q] = 0
    solution = np.linalg.pinv((design.T * weights) @ design + penalty) @ (design.T * weights) @ targets
    return solution[:q], solution[q] if intercept else np.zeros(targets.shape[1])


def leave_one_out(feats, labels, l, *, weights, ridge, intercept):
    """Scores `(n, l)` by one refit for each row without it; rows that do not count leave nothing out."""
    targets, labelled = as_targets(labels, l)
    feats, weights = (
        f64(feats),
        np.where(labelled, np.ones(len(feats)) if weights is None else f64(weights), 0),
    )
    scores = np.empty((len(feats), l))
    for n in range(len(feats)):
        others = (np.arange(len(feats)) != n) & (weights > 0)
        kernel, bias = ridge_fit(feats[others], targets[others], weights[others], ridge, intercept)
        scores[n] = feats[n] @ kernel + bias
    return scores


def generalised_cross_validation(feats, labels, l, *, weights, ridge, intercept):
    """`n RSS/(n − tr H)²` with the hat matrix written out, `n = (Σ w)²/Σ w²`."""
    feats, targets, weights = used_rows(feats, labels, l, weights, None)
    kernel, bias = ridge_fit(feats, targets, weights, ridge, intercept)
    residual = (weights * ((targets - feats @ kernel - bias) ** 2).sum(axis=1)).sum()
    identity = np.eye(len(feats))
    by_row = ridge_fit(feats, identity, weights, ridge, intercept)
    rows = weights.sum() ** 2 / (weights**2).sum()
    return rows * residual / (rows - np.trace(feats @ by_row[0] + by_row[1])) ** 2


def logistic_objective(kernel, bias, feats, labels, l, *, weights, ridge):
    """`Σ w CE(y, Wᵀx + b) + λ/2 ‖W‖²` and its gradient by kernel and bias."""
    feats, targets, weights = used_rows(feats, labels, l, weights, None)
    logits = feats @ f64(kernel) + f64(bias)
    log_z = np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)) + logits.max(axis=1)
    value = (weights * (targets.sum(axis=1) * log_z - (targets * logits).sum(axis=1))).sum()
    residual = targets.sum(axis=1, keepdims=True) * np.exp(logits - log_z[:, None]) - targets
    by_kernel = feats.T @ (weights[:, None] * residual) + ridge * f64(kernel)
    return value + ridge / 2 * (f64(kernel) ** 2).sum(), by_kernel, (weights[:, None] * residual).sum(axis=0)


def trust(scores, given, transition, sharpness):
    """Bayes' rule row by row: the probability that the given label is right."""
    found = np.empty(len(given))
    for n, label in enumerate(given):
        powers = np.exp(sharpness * (scores[n] - scores[n].max()))
        joint = powers / powers.sum() * transition[:, label]
        found[n] = joint[label] / joint.sum()
    return found


def label_transition(scores, given, l):
    """`P(given | true)` from confident disagreements, entry by entry as `lip_jax.purify` tells."""
    own = scores[np.arange(len(given)), given]
    average = [own[given == c].mean() if (given == c).any() else 0.0 for c in range(l)]
    counts = np.zeros((l, l))
    for row, label in zip(scores, given, strict=True):
        if row.max() >= average[row.argmax()]:
            counts[row.argmax(), label] += 1
    total, right = counts.sum(), np.trace(counts)
    structure = np.zeros((l, l))
    for i in range(l):
        for j in range(l):
            if i != j:
                structure[i, j] = max(counts[i, j] - 3 * np.sqrt(counts[i, j]), 0)
    even = (total - right - structure.sum()) / total
    transition = np.empty((l, l))
    for i in range(l):
        for j in range(l):
            if i == j:
                transition[i, j] = counts[i, i] + right / total
            else:
                spread = even * counts[i].sum() + (total - right) / total
                transition[i, j] = structure[i, j] + spread / (l - 1)
    return transition / transition.sum(axis=1, keepdims=True)
