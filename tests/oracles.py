"""The published formulas in float64 NumPy, written as they are printed and sharing no code with the package.

Rows are samples: `X (n, q)`, `Y (n, l)`, kernel `W (q, l) = U diag(s) Vᵀ`.
"""

import numpy as np


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
