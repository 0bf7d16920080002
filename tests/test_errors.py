"""Every `ValueError` of the matrix level: it names the argument, what came, what was expected, what to do."""

import ast
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lip_jax
from lip_jax import _checks
from lip_jax.rows.checks import raise_for_bad_rows
from tests import own_methods

Q, L, N = 6, 4, 10
KERNEL, FEATS = np.eye(Q, L, dtype=np.float32), np.ones((N, Q), np.float32)
IDS, TARGETS = np.arange(N) % L, np.full((N, L), 0.25, np.float32)
SPLIT = lip_jax.spectrum.SvdSplit(np.eye(Q, L, dtype=np.float32), np.ones(L, np.float32), np.eye(L), 0)
KEY = jax.random.key(0)
MOMENTS_OF_FIVE = lip_jax.moment_accumulator(5, L).init()


def refine(kernel=KERNEL, feats=FEATS, labels=IDS, rank=1, **options):
    return lip_jax.refine(kernel, feats, labels, rank, **options)


def apply(method, **options):
    params = {"head": {"kernel": KERNEL, "bias": np.zeros(L, np.float32)}}
    return lip_jax.apply(params, FEATS, IDS, method=method, **options)


def changed(array, index, value):
    array = np.array(array)
    array[index] = value
    return array


def bound(**options):
    case = {"feats": FEATS, "num_classes": L, "gap": 0.5, "flip_rate": 0.1}
    return lip_jax.sin_theta_bound(**{**case, **options})


def noise(model="symmetric", labels=IDS, rate=0.1, num_classes=L, **options):
    return getattr(lip_jax.noise, model)(KEY, labels, rate, num_classes=num_classes, **options)


# Name → (call, parts the message must hold, in order).
CASES = {
    "kernel is a list": (
        lambda: refine(kernel=KERNEL.tolist()),
        ("kernel must be", "array (q, l)", "got list", "jnp.asarray(kernel)"),
    ),
    "kernel has three axes": (
        lambda: refine(kernel=np.ones((2, Q, L), np.float32)),
        ("kernel must have 2 axes (q, l)", "got float32[2,6,4]", "Reshape"),
    ),
    "kernel is of integers": (
        lambda: refine(kernel=KERNEL.astype(int)),
        ("kernel must be floating", "got int64[6,4]", "kernel.astype(jnp.float32)"),
    ),
    "kernel is empty": (
        lambda: refine(kernel=np.ones((Q, 0), np.float32)),
        ("kernel must have at least one row and one column", "got float32[6,0]"),
    ),
    "kernel is not finite": (
        lambda: refine(kernel=changed(KERNEL, (2, 1), np.nan)),
        ("kernel must be finite", "NaN or infinity in float32[6,4]", "restore an earlier checkpoint"),
    ),
    "kernel of a sigmoid head where softmax is needed": (
        lambda: lip_jax.refine_calibrated(np.ones((Q, 1), np.float32), FEATS, TARGETS[:, :1], 0, bias=None),
        ("kernel must be a softmax head's", "at least two outputs", "got float32[6,1]", "lip_jax.refine"),
    ),
    "feats do not fit the kernel": (
        lambda: refine(feats=FEATS[:, :5]),
        ("feats must have as many columns", "q = 6", "got float32[10,5]", "capture_features", "transposed"),
    ),
    "feats of one axis": (
        lambda: bound(feats=FEATS[0]),
        ("feats must have 2 axes (n, q)", "got float32[6]", "Reshape"),
    ),
    "weights of another length": (
        lambda: refine(weights=np.ones(N + 1)),
        ("weights must have shape (n,) = (10,)", "one per row of feats", "got float64[11]"),
    ),
    "weights are a number": (
        lambda: refine(weights=1.0),
        ("weights must have shape (n,) = (10,)", "got float"),
    ),
    "weights are complex": (
        lambda: refine(weights=np.ones(N, complex)),
        ("weights must be real numbers or booleans", "got complex128[10]"),
    ),
    "bias of another length": (
        lambda: refine(bias=np.ones(Q, np.float32)),
        ("bias must have one entry per class, l = 4", "got float32[6]"),
    ),
    "bias is not finite": (
        lambda: refine(bias=changed(np.zeros(L, np.float32), 2, -np.inf)),
        ("bias must be finite", "got -inf for class 2", "leave it out of the head, and mask the logits"),
    ),
    "bias of a refit from moments is not finite": (
        lambda: lip_jax.refine_from(
            KERNEL, lip_jax.moment_accumulator(Q, L).init(), 1, bias=np.full(L, np.nan, np.float32)
        ),
        ("bias must be finite", "got nan for class 0"),
    ),
    "labels are a list": (
        lambda: refine(labels=IDS.tolist()),
        ("labels must be a JAX or NumPy array", "got list", "jnp.asarray(labels)"),
    ),
    "labels are an integer matrix": (
        lambda: refine(labels=TARGETS.astype(np.int32)),
        ("labels of two axes must be float targets", "got int32[10,4]", "lip_jax.candidate_targets(mask)"),
    ),
    "labels are a boolean matrix": (
        lambda: refine(labels=TARGETS > 0),
        ("labels of two axes must be float targets", "got bool[10,4]", "lip_jax.candidate_targets(mask)"),
    ),
    "labels are floats of one axis": (
        lambda: refine(labels=IDS.astype(np.float32)),
        ("labels of one axis must be integer class ids", "got float32[10]", "labels.astype(jnp.int32)"),
    ),
    "labels have three axes": (
        lambda: refine(labels=TARGETS[None]),
        ("labels must be class ids (n,) or float targets (n, l)", "got float32[1,10,4]"),
    ),
    "labels of another length": (
        lambda: refine(labels=IDS[:7]),
        ("labels must have one row per row of feats, n = 10", "got int64[7]"),
    ),
    "targets of another width": (
        lambda: refine(labels=TARGETS[:, :3]),
        ("labels given as targets must have one column per class, l = 4", "got float32[10,3]"),
    ),
    "class ids for a sigmoid head": (
        lambda: refine(kernel=KERNEL[:, :1]),
        ("labels are class ids", "one output (a sigmoid head)", "float targets of shape (n, 1)"),
    ),
    "rank is a float": (
        lambda: refine(rank=1.5),
        ("rank must be an integer", "got 1.5 (float)", "lip_jax.spectrum.rank_for_energy"),
    ),
    "rank is a boolean": (
        lambda: refine(rank=True),
        ("rank must be an integer", "got True (bool)"),
    ),
    "rank is an array of floats": (
        lambda: refine(rank=jnp.float32(1)),
        ("rank must be an integer", "got float32[]"),
    ),
    "rank is out of range": (
        lambda: refine(rank=5),
        ("rank must lie in [0, 4]", "min(q, l) = 4", "got 5"),
    ),
    "rank is negative": (
        lambda: lip_jax.svd_split(KERNEL, np.int32(-1)),
        ("rank must lie in [0, 4]", "got -1"),
    ),
    "similarity of no vectors": (
        lambda: lip_jax.subspace_similarity(np.eye(L), np.eye(L), 0, 1),
        ("i must lie in [1, 4]", "got 0"),
    ),
    "unknown target of the ridge": (
        lambda: refine(ridge_to="mean"),
        ("ridge_to must be 'current' or 'zero'", "got 'mean'"),
    ),
    "negative ridge": (
        lambda: refine(ridge=-1.0),
        ("ridge must be finite and at least 0", "got -1.0"),
    ),
    "ridge is not a number": (
        lambda: refine(ridge=float("nan")),
        ("ridge must be finite and at least 0", "got nan"),
    ),
    "rcond of 1": (
        lambda: refine(rcond=1.0),
        ("rcond must lie in [0, 1)", "got 1.0", "0 is the literal paper"),
    ),
    "fraction above 1": (
        lambda: lip_jax.spectrum.rank_for_energy(np.ones(3, np.float32), 90.0),
        ("fraction must lie in [0, 1]", "got 90.0"),
    ),
    "rate below 0": (
        lambda: noise(rate=-0.1),
        ("rate must lie in [0, 1]", "got -0.1"),
    ),
    "negative weight": (
        lambda: refine(weights=changed(np.ones(N), 4, -2)),
        ("weights must be finite and at least 0", "got -2.0 at row 4", "(1 such rows)", "weight 0"),
    ),
    "id of l": (
        lambda: refine(labels=changed(IDS, [3, 8], L)),
        (
            "labels must be class ids below l = 4",
            "got 4 at row 3",
            "(2 such rows)",
            "unlabelled rows with -1",
        ),
    ),
    "targets partly NaN": (
        lambda: refine(labels=changed(TARGETS, (6, 2), np.nan)),
        ("labels given as targets must be finite", "row 6", "(1 such rows)", "NaN throughout"),
    ),
    "infinite feature": (
        lambda: refine(feats=changed(FEATS, (5, 0), np.inf)),
        ("feats must be finite", "row 5", "(1 such rows)", "weight 0"),
    ),
    "feature whose square overflows": (
        lambda: refine(feats=changed(FEATS, (5, 0), 3e38)),
        ("feats must be finite", "row 5", "square overflows", "Drop these rows"),
    ),
    "parts of a split do not fit": (
        lambda: lip_jax.solve_tail_sigma(
            lip_jax.spectrum.SvdSplit(KERNEL, np.ones(3, np.float32), SPLIT.vt, 0), FEATS, IDS
        ),
        ("split must hold u (q, r), s (r,), vt (r, l)", "u float32[6,4], s float32[3]", "lip_jax.svd_split"),
    ),
    "part of a split has another number of axes": (
        lambda: lip_jax.solve_tail_sigma(lip_jax.spectrum.SvdSplit(KERNEL, KERNEL, SPLIT.vt, 0), FEATS, IDS),
        ("split.s must have 1 axes (r)", "got float32[6,4]"),
    ),
    "basis is not orthonormal": (
        lambda: lip_jax.spectrum.subspace_similarity_grid(np.eye(L), 2 * np.eye(L)),
        ("v_noisy must have orthonormal columns", "got float64[4,4]", "up to 3", "pass vt.T"),
    ),
    "bases of different spaces": (
        lambda: lip_jax.spectrum.principal_angles(np.eye(L), np.eye(L + 1)),
        ("v and v_noisy must live in the same space", "float64[4,4] and float64[5,5]"),
    ),
    "no rate": (
        lambda: bound(flip_rate=None),
        ("exactly one of entry_rate", "and flip_rate", "got entry_rate=None, flip_rate=None"),
    ),
    "two rates": (
        lambda: bound(entry_rate=0.1),
        ("exactly one of entry_rate", "got entry_rate=0.1, flip_rate=0.1"),
    ),
    "rate as a percentage": (
        lambda: bound(flip_rate=40.0),
        ("flip_rate must lie in [0, 1]", "got 40.0"),
    ),
    "unknown form": (
        lambda: bound(form="best"),
        ("form must be 'paper' or 'filter'", "got 'best'"),
    ),
    "no features": (
        lambda: bound(feats=None),
        ("either feats, or both singular_values", "and num_samples", "got feats=None, singular_values=None"),
    ),
    "features and their singular values": (
        lambda: bound(singular_values=np.ones(2, np.float32)),
        ("not both", "got feats=given, singular_values=given, num_samples=None"),
    ),
    "unknown gap": (
        lambda: lip_jax.bounds.wedin_bound(KERNEL, KERNEL, 1, gap="other"),
        ("gap must be 'mixed' or 'own'", "got 'other'"),
    ),
    "kernels of different shapes": (
        lambda: lip_jax.bounds.wedin_bound(KERNEL, KERNEL[:5], 1),
        ("kernel and kernel_noisy must have the same shape", "got (6, 4) and (5, 4)"),
    ),
    "second kernel is not finite": (
        lambda: lip_jax.bounds.wedin_bound(KERNEL, KERNEL + np.inf, 1),
        ("kernel_noisy must be finite", "float32[6,4]"),
    ),
    "gap after rank 0": (
        lambda: lip_jax.bounds.mixed_gap(np.ones(3, np.float32), np.ones(3, np.float32), 0),
        ("rank must lie in [1, 3]", "got 0"),
    ),
    "features of a bound are not finite": (
        lambda: bound(feats=changed(FEATS, (2, 1), np.nan)),
        ("feats must be finite", "got NaN or infinity", "Drop the rows"),
    ),
    "mask of one axis": (
        lambda: lip_jax.candidate_targets(IDS > 0),
        ("mask must have two axes (n, l)", "got bool[10]"),
    ),
    "mask is a list": (
        lambda: lip_jax.candidate_targets([[True]]),
        ("mask must have two axes (n, l)", "got list"),
    ),
    "mask of soft targets": (
        lambda: lip_jax.candidate_targets(TARGETS),
        ("mask must hold only zeros and ones", "got 0.25", "pass them as float labels"),
    ),
    "noise on targets": (
        lambda: noise(labels=TARGETS),
        ("labels must be integer class ids (n,)", "got float32[10,4]"),
    ),
    "noise on one class": (
        lambda: noise(labels=0 * IDS, num_classes=1),
        ("num_classes must be at least 2", "got 1"),
    ),
    "noise on ids beyond the classes": (
        lambda: noise(num_classes=3),
        ("labels must be class ids below num_classes = 3", "got 3"),
    ),
    "noise on ids of too narrow a dtype": (
        lambda: noise(labels=IDS.astype(np.int8), num_classes=200),
        ("labels must have a dtype that holds num_classes = 200 ids", "got int8[10]", "astype(jnp.int32)"),
    ),
    "partner for too few classes": (
        lambda: noise("asymmetric", partner=np.array([1, 0])),
        ("partner must hold a class id for each of num_classes = 4 classes", "got int32[2]"),
    ),
    "partner beyond the classes": (
        lambda: noise("asymmetric", partner=np.array([1, 2, 3, 4])),
        ("partner must hold class ids from 0 to 3", "got [1, 2, 3, 4]", "its own partner"),
    ),
    "transition is not square": (
        lambda: lip_jax.noise.transition(KEY, IDS, TARGETS),
        ("transition must be square, (l, l)", "got float32[10,4]"),
    ),
    "transition does not sum to 1": (
        lambda: lip_jax.noise.transition(KEY, IDS, 2 * np.eye(L)),
        ("transition must be row-stochastic", "Divide each row by its sum", "range 2 to 2"),
    ),
    "noise for another number of rows": (
        lambda: lip_jax.noise.instance(KEY, FEATS[:4], IDS, 0.1, num_classes=L),
        ("labels must have one row per row of feats, n = 4", "got int32[10]"),
    ),
    "num_classes is a float": (
        lambda: lip_jax.linear_readout(FEATS, IDS, num_classes=4.0),
        ("num_classes must be a positive integer", "sets a shape", "got 4.0", "None takes"),
    ),
    "num_classes is not given, and no label says": (
        lambda: lip_jax.linear_readout(FEATS, np.full(N, -1)),
        ("num_classes is not given", "no row of labels, int64[10], names a class", "Pass num_classes="),
    ),
    "num_classes is not given under jit": (
        lambda: jax.jit(lip_jax.linear_readout)(FEATS, IDS),
        ("num_classes is not given", "cannot be seen under jit", "num_classes="),
    ),
    "criterion is unknown": (
        lambda: lip_jax.leave_one_out_scores(FEATS, IDS, criterion="aic"),
        ("criterion must be 'gcv' or 'press'", "got 'aic'"),
    ),
    "solver is unknown": (
        lambda: lip_jax.linear_readout(FEATS, IDS, solver="svm"),
        ("solver must be 'ridge' or 'logistic'", "got 'svm'"),
    ),
    "init for a closed form": (
        lambda: lip_jax.linear_readout(FEATS, IDS, init=(KERNEL, None)),
        ("init belongs to solver='logistic'", "Leave it out"),
    ),
    "criterion for a logistic readout": (
        lambda: lip_jax.linear_readout(FEATS, IDS, solver="logistic", criterion="press"),
        ("criterion='press' belongs to solver='ridge'", "held-out rows choose"),
    ),
    "targets that sum to more than 1": (
        lambda: lip_jax.select(KERNEL, FEATS, 2 * np.eye(L, dtype=np.float32)[IDS], bias=None),
        ("targets of a softmax head must sum to 1", "the first being row 0, of sum 2", "candidate_targets"),
    ),
    "rows too few to be their own judges": (
        lambda: lip_jax.select(KERNEL, FEATS[:7], IDS[:7], bias=None),
        ("feats must hold at least 10 rows", "validation=", "got 7"),
    ),
    "methods are a name": (
        lambda: lip_jax.select(KERNEL, FEATS, IDS, bias=None, methods="ridge"),
        ("methods must be a sequence of methods", "(lip_jax.Ridge(),)", "got 'ridge'"),
    ),
    "metric is unknown": (
        lambda: lip_jax.select(KERNEL, FEATS, IDS, bias=None, metric="auc"),
        ("metric must be 'accuracy', 'balanced_accuracy' or 'log_loss'", "got 'auc'"),
    ),
    "fewer than no standard errors": (
        lambda: lip_jax.select(KERNEL, FEATS, IDS, bias=None, num_standard_errors=-1.0),
        ("num_standard_errors must be at least 0", "got -1.0"),
    ),
    "method is a class": (
        lambda: apply(lip_jax.Ridge),
        ("method must be a value such as lip_jax.Published(rank=50)", "got the class Ridge"),
    ),
    "method is a class beside its rank": (
        lambda: apply(lip_jax.Published, rank=2),
        ("method must be a value such as", "got the class Published"),
    ),
    "method is a name": (
        lambda: apply("calibrated"),
        ("method must be a value such as", "an object with path(head, fit)", "got 'calibrated'"),
    ),
    "method cannot be hashed": (
        lambda: apply(own_methods.Unhashable()),
        ("method must be hashable", "got Unhashable(options=[])", "a frozen dataclass"),
    ),
    "method to choose among cannot be hashed": (
        lambda: lip_jax.select(KERNEL, FEATS, IDS, bias=None, methods=(own_methods.Unhashable(),)),
        ("method must be hashable", "got Unhashable(options=[])"),
    ),
    "method makes a head of another dtype": (
        lambda: apply(own_methods.Wrong("another dtype")),
        ("method wrong must make heads like", "kernel float32[6,4]", "it made kernel float16[6,4]", "Cast"),
    ),
    "method makes a head of another shape": (
        lambda: apply(own_methods.Wrong("another shape")),
        ("method wrong must make heads like", "kernel float32[6,4]", "it made kernel float32[5,4]"),
    ),
    "method makes a head without bias": (
        lambda: apply(own_methods.Wrong("no bias")),
        ("must make heads like", "bias float32[4]", "no bias", "only where the head has none"),
    ),
    "method to choose among makes a head of another shape": (
        lambda: lip_jax.select(
            KERNEL, FEATS, IDS, bias=None, seen=False, methods=(own_methods.Wrong("another shape"),)
        ),
        ("method wrong must make heads like", "it made kernel float32[5,4]"),
    ),
    "method makes a bare pair": (
        lambda: apply(own_methods.Wrong("a pair")),
        ("method wrong must return a lip_jax.Head or a path of heads", "HeadStack", "got tuple"),
    ),
    "method makes nothing": (
        lambda: apply(own_methods.Wrong("nothing")),
        ("method wrong must return a lip_jax.Head or a path of heads", "got NoneType"),
    ),
    "method settles on another head": (
        lambda: apply(own_methods.Settles(right=False)),
        ("method settles must make heads like", "it made kernel bfloat16[6,4]"),
    ),
    "method makes several heads, and nothing chooses": (
        lambda: apply(own_methods.Shrunk((1.0, 0.5))),
        ("method shrunk makes 2 heads", "nothing here can choose one", "Pass validation="),
    ),
    "refit without a rank": (
        lambda: apply(lip_jax.Published()),
        ("method published leaves its rank open", "Give rank=, or validation= rows"),
    ),
    "validation rows with nothing to choose": (
        lambda: apply(lip_jax.Published(2), validation=(FEATS, IDS)),
        ("validation= has nothing to choose", "published leaves neither rank nor strength open"),
    ),
    "rank beside a method that has one": (
        lambda: apply(lip_jax.Calibrated(2), rank=2),
        ("rank= is the rank of a refit that leaves it open", "got it beside Calibrated(rank=2"),
    ),
    "rank beside a readout": (
        lambda: apply(lip_jax.Ridge(), rank=2),
        ("rank= is the rank of a refit that leaves it open", "got it beside Ridge("),
    ),
    "readout of one class": (
        lambda: lip_jax.linear_readout(FEATS, TARGETS[:, :1]),
        ("labels must name at least two classes", "class ids and num_classes=2", "lip_jax.refine"),
    ),
    "metrics of one output": (
        lambda: lip_jax.head_metrics(FEATS[:, :1], TARGETS[:, :1]),
        ("logits must have at least two columns", "got float32[10,1]"),
    ),
    "top of no classes": (
        lambda: lip_jax.purify(FEATS, IDS, rule="top", top=0),
        ("top must be an integer of at least 1", "got 0"),
    ),
    "top is no integer": (
        lambda: lip_jax.purify(FEATS, IDS, rule="top", top=2.5),
        ("top must be an integer of at least 1", "got 2.5"),
    ),
    "moments of a tree are something else": (
        lambda: lip_jax.apply_from({"head": {"kernel": KERNEL}}, FEATS, rank=1),
        ("moments must be lip_jax.sums.Moments or lip_jax.sums.TailMoments", "got ndarray"),
    ),
    "weights overflow in the dtype that was computed in": (
        lambda: raise_for_bad_rows(FEATS, IDS, changed(np.ones(N), 3, 1e300), L),
        ("weights must be finite", "got inf at row 3"),
    ),
    "a row that cannot be used for no reason that can be seen": (
        lambda: raise_for_bad_rows(FEATS, IDS, None, L),
        ("some rows could not be used", "overflow float32", "Scale feats or weights down"),
    ),
    "init is a kernel alone": (
        lambda: lip_jax.linear_readout(FEATS, IDS, solver="logistic", init=KERNEL),
        ("init must be a pair (kernel, bias)", "got ndarray"),
    ),
    "init is of another shape": (
        lambda: lip_jax.linear_readout(FEATS, IDS, solver="logistic", init=(KERNEL[:3], None)),
        ("init's kernel must have shape (q, l) = (6, 4)", "got float32[3,4]"),
    ),
    "rule is unknown": (
        lambda: lip_jax.purify(FEATS, IDS, rule="best"),
        ("rule must be 'posterior', 'top', 'margin' or 'noise_rate'", "got 'best'"),
    ),
    "threshold for a rule without one": (
        lambda: lip_jax.purify(FEATS, IDS, rule="top", threshold=0.5),
        ("threshold belongs to rule='posterior' and rule='margin'", "got rule='top'"),
    ),
    "threshold is no probability": (
        lambda: lip_jax.purify(FEATS, IDS, threshold=2.0),
        ("threshold must lie in [0, 1]", "got 2.0"),
    ),
    "top for another rule": (
        lambda: lip_jax.purify(FEATS, IDS, top=2),
        ("top belongs to rule='top'", "got rule='posterior'"),
    ),
    "min_per_class is negative": (
        lambda: lip_jax.purify(FEATS, IDS, min_per_class=-1),
        ("min_per_class must be an integer of at least 0", "got -1"),
    ),
    "quality of other rows": (
        lambda: lip_jax.purify(FEATS, IDS, quality=lip_jax.label_quality(FEATS[:8], IDS[:8])),
        ("quality must be that of the same rows and classes, (n, l) = (10, 4)", "got (8, 4)"),
    ),
    "quality of other classes": (
        lambda: lip_jax.purify(FEATS, IDS, quality=lip_jax.label_quality(FEATS, IDS, num_classes=L + 1)),
        ("(n, l) = (10, 4)", "got (10, 5)", "Pass num_classes= to both"),
    ),
    "split of another kernel": (
        lambda: lip_jax.refine_from(KERNEL[:5], MOMENTS_OF_FIVE, 1, split=SPLIT),
        ("split must be that of the kernel, (q, l) = (5, 4)", "got one of (6, 4)"),
    ),
    "moments are rows": (
        lambda: lip_jax.refine_from(KERNEL, FEATS, 1),
        (
            "moments must be lip_jax.sums.Moments or lip_jax.sums.TailMoments",
            "lip_jax.accumulate",
            "got ndarray",
        ),
    ),
    "moments of another width": (
        lambda: lip_jax.refine_from(KERNEL, MOMENTS_OF_FIVE, 1),
        ("moments must be of rows with (q, l) = (6, 4)", "got float32[5,4]"),
    ),
    "moments along another number of components": (
        lambda: lip_jax.methods.solve_tail_sigma_from(
            lip_jax.svd_split(KERNEL[:, :3], 0), lip_jax.tail_accumulator(SPLIT).init()
        ),
        ("moments must be along r = 3 components", "got float32[4]", "the split they were taken for"),
    ),
    "moments along components without their split": (
        lambda: lip_jax.refine_from(KERNEL, lip_jax.tail_accumulator(SPLIT).init(), 1),
        ("split must be given with TailMoments", "lip_jax.tail_accumulator was made with"),
    ),
    "calibrated refit from moments along components without their split": (
        lambda: lip_jax.methods.refine_calibrated_from(
            KERNEL, lip_jax.tail_accumulator(SPLIT).init(), 1, bias=None
        ),
        ("split must be given with TailMoments", "the kernel less its mean over classes"),
    ),
    "readout from moments along components": (
        lambda: lip_jax.linear_readout_from(lip_jax.tail_accumulator(SPLIT).init()),
        ("moments must be lip_jax.sums.Moments", "lip_jax.moment_accumulator", "got TailMoments"),
    ),
    "singular values from moments along components": (
        lambda: lip_jax.bounds.feature_singular_values_from(lip_jax.tail_accumulator(SPLIT).init()),
        ("moments must be lip_jax.sums.Moments, of lip_jax.moment_accumulator", "got TailMoments"),
    ),
    "accumulator of no features": (
        lambda: lip_jax.moment_accumulator(0, L),
        ("q must be an int of at least 1", "got 0"),
    ),
    "accumulator in low precision": (
        lambda: lip_jax.moment_accumulator(Q, L, dtype=jnp.bfloat16),
        ("dtype must be float32, or float64 where jax_enable_x64 is set", "got bfloat16", "loses nothing"),
    ),
    "states of two accumulators": (
        lambda: lip_jax.moment_accumulator(Q, L).merge(
            MOMENTS_OF_FIVE, lip_jax.tail_accumulator(SPLIT).init()
        ),
        ("first and second must be states of the same accumulator", "got Moments of float32[5,4]"),
    ),
    "validation of another width": (
        lambda: lip_jax.memorised(KERNEL, FEATS, IDS, bias=None, validation=(FEATS[:, :3], IDS)),
        ("validation: feats must have as many columns", "q = 6", "got float32[10,3]"),
    ),
    "validation of one row": (
        lambda: lip_jax.memorised(KERNEL, FEATS, IDS, bias=None, validation=(FEATS[:1], IDS[:1])),
        ("validation must hold at least 2 rows", "got 1"),
    ),
    "validation without labels": (
        lambda: lip_jax.memorised(KERNEL, FEATS, IDS, bias=None, validation=(FEATS,)),
        ("validation must be (feats, labels)", "got a tuple of length 1"),
    ),
}
CHAPTERS = ("numerics", "rows", "spectrum", "sums", "bounds", "quality", "methods", "choice")
PACKAGE = Path(lip_jax.__file__).parent
MODULES = [
    *(PACKAGE / "_checks.py", PACKAGE / "noise.py"),
    *(path for chapter in CHAPTERS for path in sorted((PACKAGE / chapter).glob("*.py"))),
]


@pytest.mark.parametrize("name", CASES)
def test_message_says_what_came_what_was_expected_and_what_to_do(name, unchecked):
    call, parts = CASES[name]
    with pytest.raises(ValueError) as error:
        call()
    message, place = str(error.value), 0
    for part in parts:
        assert part in message[place:], message
        place = message.index(part, place) + len(part)


def test_every_raise_of_the_matrix_level_has_a_case(unchecked):
    raised = set()
    for call, _ in CASES.values():
        try:
            call()
        except ValueError as caught:
            error = caught
            # An error that was given the name of the head keeps the one it was as its context.
            while error is not None:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                raised.add((Path(frame.filename).resolve(), frame.lineno))
                error = error.__context__
    missed = []
    for path in map(Path.resolve, MODULES):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise):
                lines = {(path, line) for line in range(node.lineno, node.end_lineno + 1)}
                missed += [] if raised & lines else [f"{path.relative_to(PACKAGE.resolve())}:{node.lineno}"]
    assert not missed, "\n".join(missed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((KERNEL, FEATS[:, :5], IDS, 1), "feats must have as many columns"),
        ((KERNEL, FEATS, TARGETS.astype(np.int32), 1), "labels of two axes must be float targets"),
        ((KERNEL, FEATS, IDS[:3], 1), "labels must have one row per row of feats"),
        ((KERNEL.astype(np.int32), FEATS, IDS, 1), "kernel must be floating point"),
        ((KERNEL, FEATS, IDS, 1.5), r"rank must be an integer .* got float32\[\]"),
    ],
    ids=["feats", "labels", "rows", "kernel", "rank"],
)
def test_shapes_and_dtypes_are_checked_under_jit_too(arguments, message, unchecked):
    with pytest.raises(ValueError, match=message):
        jax.jit(lip_jax.refine)(*arguments)


def test_rows_that_do_not_count_are_never_blamed():
    feats, labels, weights = FEATS.copy(), IDS.copy(), np.ones(N)
    feats[0], labels[0] = np.nan, -1
    labels[1], weights[1] = 99, 0
    feats[7] = np.nan
    with pytest.raises(ValueError, match=r"feats must be finite; row 7 .*\(1 such rows\)"):
        refine(feats=feats, labels=labels, weights=weights)


def test_wrong_shapes_are_type_errors_where_run_time_checks_are_on():
    with pytest.raises(TypeError, match="feats"):
        refine(feats=FEATS[:, :5])


def test_describe_writes_dtype_and_shape_as_jax_does():
    assert _checks.describe(jnp.zeros((3, 4), jnp.bfloat16)) == "bfloat16[3,4]"
    assert _checks.describe(jnp.int32(1)) == "int32[]"
