"""Every number, table and figure that is reported, and the files that a run leaves in its folder.

Two rules run through the file. The subject is the unit: intervals resample subjects, probes are tuned on
folds of subjects, slices are averaged to patients. And no number stands alone: beside each are the rows that
need no model (a constant image, another slice, all-positive, PCA): they score higher than one expects.

Arrays (N,) are float64. Images are in [0,1] (data_range 1), AUROC in [0,1].
"""
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import textwrap
import time
import warnings
import zipfile
from pathlib import Path

import lifelines.exceptions
import matplotlib
import numpy as np
import pandas
import torch
from lifelines import CoxPHFitter, KaplanMeierFitter
from lifelines.plotting import add_at_risk_counts
from lifelines.statistics import multivariate_logrank_test
from matplotlib.figure import Figure  # without pyplot: no display is needed
from scipy.ndimage import gaussian_filter, laplace, maximum_filter
from scipy.stats import ks_2samp, norm, rankdata
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import pairwise_distances_argmin_min, precision_recall_curve
from sklearn.model_selection import GridSearchCV, GroupKFold, StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import data as D

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None


def to_numpy(x):
    """Tensor (any device, any float type) or array-like -> numpy array."""
    if torch.is_tensor(x):
        x = x.detach().cpu()
        x = x.float() if x.dtype == torch.bfloat16 else x  # numpy has no bfloat16
    return np.asarray(x)


def to_image(x):
    """Tensor (B,1,*S) in [-1,1] -> numpy (B,*S) in [0,1], clipped."""
    return ((to_numpy(x[:, 0].float()) + 1) / 2).clip(0, 1)


# ---- Images: (N,*S) or (N,1,*S) in [0,1], S = (H,W) or (D,H,W) -> one number per image, (N,) ---------------

def image_pair(a, b):
    """-> the two as float64 (N,*S) arrays. ValueError on other shapes, or a range that is not [0,1]."""
    a, b = (to_numpy(x).astype(np.float64) for x in (a, b))
    a, b = (x[:, 0] if x.ndim > 3 and x.shape[1] == 1 else x for x in (a, b))
    if a.shape != b.shape or a.ndim not in (3, 4):
        raise ValueError(f"images: need two (N,H,W) or (N,D,H,W), got {a.shape} and {b.shape}")
    for x in (a, b):  # SSIM of 0..255 or [-1,1] is a plausible number. An overshoot of the model is allowed.
        if x.size and (x.min() < -0.5 or x.max() > 1.5):
            raise ValueError(f"images: need the range [0,1], got [{x.min():.2f}, {x.max():.2f}]")
    return a, b


def ssim(a, b):
    """Structural similarity (Wang et al. 2004, eq. 13), mean over the positions where the window fits. The
    window is Wang's, a Gaussian of sigma 1.5 and 11 taps, 3D for a volume. ValueError: smaller images."""
    a, b = image_pair(a, b)
    if min(a.shape[1:]) < 11:
        raise ValueError(f"ssim: images {a.shape[1:]} are smaller than the 11-tap window")
    inside = (slice(5, -5),) * (a.ndim - 1)
    local_mean = lambda x: gaussian_filter(x, 1.5, truncate=3.5)[inside]
    c1, c2 = 0.01 ** 2, 0.03 ** 2  # (K1 L)^2 and (K2 L)^2 with L = 1
    out = np.zeros(len(a))
    for i, (x, y) in enumerate(zip(a, b)):
        mx, my = local_mean(x), local_mean(y)
        vx = local_mean(x * x) - mx * mx
        vy = local_mean(y * y) - my * my
        cxy = local_mean(x * y) - mx * my
        s = (2 * mx * my + c1) * (2 * cxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
        out[i] = s.mean()
    return out


def mse(a, b):
    """Mean squared error per image, (N,)."""
    a, b = image_pair(a, b)
    return ((a - b) ** 2).mean(axis=tuple(range(1, a.ndim)))


def nmse(real, fake):
    """MSE / Var(real) per image, (N,). The image's own mean scores 1: above that, a flat grey is better."""
    x, _ = image_pair(real, fake)
    with np.errstate(divide="ignore", invalid="ignore"):
        return mse(real, fake) / x.var(axis=tuple(range(1, x.ndim)))


# ---- Generated images, as a population and one by one ------------------------------------------------------

def roughness(images):
    """Variance of the Laplacian of images (N,H,W): grain raises it, blur lowers it. -> (N,)"""
    return np.array([laplace(x).var() for x in to_numpy(images)])


def frechet(a, b):
    """Frechet distance of two sets of features (n,d), (m,d) as Gaussians: |mean_a - mean_b|^2 +
    tr(A + B - 2 sqrt(A B)), A and B their covariances (Heusel et al. 2017, eq. 6). -> float >= 0
    Call it FID in Inception features only. It is biased upwards with few images: print n, and the distance
    between two sets of real ones, beside it."""
    a, b = (to_numpy(x).astype(np.float64) for x in (a, b))
    # tr sqrt(A B) is the sum of the singular values of X Y^T, X and Y the centred features / sqrt(n - 1).
    # Their triangles have the same: exact, also where n < d and A B has no stable square root.
    r, s = (np.linalg.qr((x - x.mean(0)) / np.sqrt(len(x) - 1), mode="r") for x in (a, b))
    cross = np.linalg.svd(r @ s.T, compute_uv=False).sum()
    return float(max(0, ((a.mean(0) - b.mean(0)) ** 2).sum() + (r ** 2).sum() + (s ** 2).sum() - 2 * cross))


def kid(a, b):
    """Kernel distance of two sets of features (n,d), (m,d): unbiased squared MMD with the kernel
    (x.y / d + 1)^3 (Binkowski et al. 2018, sec. 3). -> float; around 0, also below, for one distribution."""
    a, b = (to_numpy(x).astype(np.float64) for x in (a, b))
    aa, bb, ab = (((x @ y.T) / a.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (aa, bb))
    return float(within - 2 * ab.mean())


def overlap(found, wanted, ids):
    """Label maps (N,H,W) -> (N,len(ids),2): per image and id 2 |A and B|, |A| + |B|. For dice()."""
    found, wanted = to_numpy(found), to_numpy(wanted)
    return np.stack([[2 * ((found == i) & (wanted == i)).sum((1, 2)),
                      (found == i).sum((1, 2)) + (wanted == i).sum((1, 2))] for i in ids]).transpose(2, 0, 1)


def dice(counts):
    """Mean over the structures of Dice = 2 |A and B| / (|A| + |B|), each pooled over the N slices of
    overlap(): a structure that a slice has no pixel of must not decide. A structure in none: left out."""
    both, sizes = to_numpy(counts).sum(0).T
    return float(np.mean(both[sizes > 0] / sizes[sizes > 0])) if sizes.any() else np.nan


def edge_hits(found, wanted, tolerance=1):
    """Edge maps (N,H,W) bool -> (N,4): found, of them within `tolerance` pixels (chessboard) of a wanted one;
    wanted, of them within it of a found one."""
    found, wanted = to_numpy(found) > 0, to_numpy(wanted) > 0
    wide = [maximum_filter(x, (1, 2 * tolerance + 1, 2 * tolerance + 1)) for x in (found, wanted)]
    return np.stack([x.sum((1, 2)) for x in (found, found & wide[1], wanted, wanted & wide[0])], 1)


def edge_f1(hits):
    """Harmonic mean of precision and recall of edge pixels, each pooled over edge_hits()."""
    found, right, wanted, hit = to_numpy(hits).sum(0)
    if not found or not wanted:
        return np.nan if not wanted else 0.0
    precision, recall = right / found, hit / wanted
    return float(2 * precision * recall / max(precision + recall, 1e-12))


def nearest(x, bank):
    """Images (N,*S), bank (M,*S) in [0,1] or uint8 -> distance (root mean square) to and row of the nearest
    in the bank, each (N,): a generated image much nearer to training than a real one is a copy."""
    unit = lambda v: v.reshape(len(v), -1) / np.float32(255 if v.dtype == np.uint8 else 1)
    at, distance = pairwise_distances_argmin_min(unit(to_numpy(x)), unit(to_numpy(bank)))
    return distance / np.sqrt(np.prod(bank.shape[1:])), at


# ---- Intervals, and the entries of results.json ------------------------------------------------------------

def bootstrap(statistic, subject, *arrays, n=1000, seed=0):
    """95 % percentile interval of statistic(*arrays) -> float, resampling subjects with all their rows: the
    slices of a heart are not independent. Resamples where the statistic is nan (one class) are left out.
    -> {"value", "ci": [lo, hi], "n": subjects}; ci is nan below 2 subjects. ValueError on unequal lengths."""
    arrays = [to_numpy(a) for a in arrays]
    names, index = np.unique(to_numpy(subject), return_inverse=True)
    if not len(index) or any(len(a) != len(index) for a in arrays):
        raise ValueError(f"bootstrap: {len(index)} subject rows, but arrays of {[len(a) for a in arrays]}")
    rows = [np.flatnonzero(index == i) for i in range(len(names))]
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(n if len(rows) > 1 else 0):
        pick = np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])
        draws.append(float(statistic(*(a[pick] for a in arrays))))
    draws = [d for d in draws if not np.isnan(d)]
    ci = np.percentile(draws, [2.5, 97.5]).tolist() if draws else [np.nan, np.nan]
    return {"value": float(statistic(*arrays)), "ci": ci, "n": len(names)}


def row(value, ci=(np.nan, np.nan), n=0, unit="", better="higher"):
    """One entry of the "metrics" in results.json. n: subjects; better: "higher", "lower" or "" (neither)."""
    return {"value": float(value), "ci": [float(c) for c in ci], "n": int(n), "unit": unit, "better": better}


def row_of(statistic, subject, *arrays, unit="", better="higher"):
    """row() of a statistic with its bootstrap interval over subjects."""
    return row(**bootstrap(statistic, subject, *arrays), unit=unit, better=better)


def image_numbers(key, images, real, subject):
    """SSIM and MSE of images {row name, "" is ours: (N,*S) in [0,1]} against real (N,*S).
    -> {KEY_ssim[.NAME], KEY_mse[.NAME]: row(..)}"""
    out = {}
    for name, x in images.items():
        dot = f".{name}" if name else ""
        out[f"{key}_ssim{dot}"] = row_of(np.mean, subject, ssim(real, x))
        out[f"{key}_mse{dot}"] = row_of(np.mean, subject, mse(real, x), better="lower")
    return out


# ---- Classification (y = 1 is pathological; a score is a logit: higher = worse) and regression -------------

def auroc(score, y):
    """P(a positive scores above a negative), ties half (Mann-Whitney U / n1 n0). One class only: nan.
    scikit-learn's takes ten times as long, and a bootstrap calls it 1,000 times."""
    score, y = to_numpy(score), to_numpy(y) > 0
    n1, n0 = y.sum(), (~y).sum()
    if n1 == 0 or n0 == 0:
        return np.nan
    return float((rankdata(score)[y].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def threshold_f1(score_val, y_val):
    """The threshold with the best F1 for `score >= threshold`; choose it on validation rows, never on test.
    No positive in y_val: 0, the logit of p = 0.5."""
    y = to_numpy(y_val) > 0
    if not y.any():
        return 0.0
    precision, recall, cuts = precision_recall_curve(y, to_numpy(score_val))
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(cuts[np.argmax(f1[:-1])])  # the last point of the curve has no threshold


def classify(score, y, threshold):
    """-> dict of f1, precision, recall for `score >= threshold`; 0/0 is nan.
    The row to beat is all-positive, classify(zeros, y, 0): at prevalence p its F1 is 2p / (1 + p)."""
    called, true = to_numpy(score) >= threshold, to_numpy(y) > 0
    tp, wrong = (called & true).sum(), (called != true).sum()
    with np.errstate(invalid="ignore"):
        return {"f1": 2 * tp / (2 * tp + wrong), "precision": tp / called.sum(), "recall": tp / true.sum()}


def regression(pred, y):
    """-> dict of r2, mae, rmse in the units of y. r2 can be negative: worse than predicting the mean of y."""
    pred, y = to_numpy(pred).astype(np.float64), to_numpy(y).astype(np.float64)
    error, spread = ((pred - y) ** 2).sum(), ((y - y.mean()) ** 2).sum()
    return {"r2": float(1 - error / spread) if spread else np.nan,
            "mae": float(abs(pred - y).mean()), "rmse": float(np.sqrt(error / len(y)))}


def spearman(a, b):
    """Rank correlation of (N,) and (N,), in [-1,1]; nan if one of them is constant."""
    a, b = rankdata(a), rankdata(b)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else np.nan


def mahalanobis(z, rows):
    """Distance of z (N,d) from the mean of its `rows` in their standard deviations, (N,).
    The covariance is shrunk (Ledoit & Wolf 2004): with few rows the plain one is singular."""
    return np.sqrt(LedoitWolf().fit(to_numpy(z)[rows]).mahalanobis(to_numpy(z)))


# ---- Probes: what a straight line reads from a frozen z. A probe sees training rows only -------------------

def subject_folds(task, y, subject, seed=0):
    """Up to 4 (train, held-out) index pairs, no subject on both sides. [] if there are too few subjects."""
    y, subject = to_numpy(y), to_numpy(subject)
    groups = [subject[y == c] for c in np.unique(y)] if task == "class" else [subject]
    k = min(4, *(len(np.unique(group)) for group in groups))
    if k < 2:
        return []
    splitter = (StratifiedGroupKFold if task == "class" else GroupKFold)(k, shuffle=True, random_state=seed)
    folds = list(splitter.split(y, y, subject))
    one_class = task == "class" and any(len(np.unique(y[rows])) < 2 for fold in folds for rows in fold)
    return [] if one_class else folds


class OneScale(StandardScaler):
    """Subtracts each number's mean and divides all numbers by one SD, the root of their mean variance."""

    def fit(self, X, y=None, sample_weight=None):
        super().fit(X, y, sample_weight)
        self.scale_ = np.full_like(self.scale_, max(np.sqrt(self.var_.mean()), 1e-12))
        return self


def probe(task, z, y, subject, seed=0):
    """Fits a linear probe from z (N,d) to y (N,), training rows only -> scikit-learn Pipeline.
    task "class": logistic regression, y in {0,1}; decision_function(z) is the log-odds of 1. "regression":
    ridge; predict(z). The penalty and the scaling are those with the lowest log loss (or squared error) on
    held-out training subjects. ValueError if task is "class" and y does not have the two values."""
    z, y = to_numpy(z).astype(np.float64), to_numpy(y)
    if task == "class" and not np.array_equal(np.unique(y), [0, 1]):
        raise ValueError(f"probe: needs the classes 0 and 1 in training, got {np.unique(y).tolist()[:5]}")
    # With few hundred rows the penalty and the scaling decide the result, and the best differ between codes.
    # Most numbers of a PCA code are noise of small variance, which a division by their own SD would blow up.
    penalty = np.array([1, 10, 100, 1000, 10000])
    if task == "class":
        head, choice, loss = LogisticRegression(max_iter=1000), {"head__C": 1 / penalty}, "neg_log_loss"
    else:
        head, choice, loss = Ridge(), {"head__alpha": penalty}, "neg_mean_squared_error"
    model = Pipeline([("scale", StandardScaler()), ("head", head)])
    folds = subject_folds(task, y, subject, seed)
    with threadpool_limits(1):    # so small that threads only wait: 8 times slower
        if not folds:
            return model.fit(z, y)
        choice["scale"] = [StandardScaler(), OneScale()]
        return GridSearchCV(model, choice, scoring=loss, cv=folds).fit(z, y).best_estimator_


def linear(model):
    """A fitted probe as one line: z @ weights + intercept is its log-odds or value. -> (d,), float"""
    weights = np.ravel(model[-1].coef_) / model[0].scale_
    return weights, float(np.ravel(model[-1].intercept_)[0] - weights @ model[0].mean_)


def direction(model, z):
    """Direction (d,) in z space along which a probe's attribute grows, as long as one SD of codes z (N,d).
    A step along the weights in standardised space, mapped back: sd * w. (The gradient, w / sd, mostly
    moves the dimensions that vary least, off the data; see Haufe et al. 2014.)"""
    v = model[0].scale_ * np.ravel(model[-1].coef_)
    v = v / max(np.linalg.norm(v), 1e-12)
    return v * (to_numpy(z) @ v).std()


def predict(codes, y, part, subject, seed=0):
    """Reads y (N,), nan where unknown, from each of the codes {row name, "" is ours: (N,d)} by a linear probe
    of training rows. y None: there is no such column. -> (table, {row name: fitted probe})
    table: a DataFrame with a line per row: subject, row, part, truth, score[.NAME]; if y is in {0,1},
    cut[.NAME]: the threshold, chosen on validation rows; else mean: that of y over training rows.
    ValueError: the rows cannot answer."""
    if y is None:
        raise ValueError("the data have no such column, so there are no predictions")
    y = to_numpy(y).astype(np.float64)
    train, val = (np.flatnonzero((part == p) & ~np.isnan(y)) for p in ("train", "val"))
    if not np.any((part == "test") & ~np.isnan(y)):
        raise ValueError("no test row has a value")
    if len(np.unique(y[train])) < 2:
        raise ValueError("the training rows have one value only")
    people, d = len(np.unique(subject[train])), codes[""].shape[1]
    if d >= people:
        D.warn(f"{d} numbers in a code, {people} training subjects: so few that a probe finds what is "
               "chance, too; trust folds more than one split")
    task = "class" if set(np.unique(y[train])) == {0, 1} else "regression"
    table = pandas.DataFrame({"subject": subject, "row": np.arange(len(y)), "part": part, "truth": y})
    probes, table = {}, table if task == "class" else table.assign(mean=y[train].mean())
    for name, z in codes.items():
        z, dot = to_numpy(z).astype(np.float64), f".{name}" if name else ""
        probes[name] = probe(task, z[train], y[train], subject[train], seed)
        score = probes[name].decision_function(z) if task == "class" else probes[name].predict(z)
        table["score" + dot] = score
        if task == "class":
            table["cut" + dot] = threshold_f1(score[val], y[val]) if len(val) else 0.0
    return table, probes


def per_subject(subject, *arrays):
    """The mean over each subject's rows. subject and arrays (N,) -> names (n,), then (n,) of each array"""
    names, index, rows = np.unique(subject, return_inverse=True, return_counts=True)
    return names, *(np.bincount(index, x) / rows for x in arrays)


def probe_numbers(table, key="probe"):
    """Numbers of the test rows in a table of predict(), or in those of several folds, one below the other.
    y in {0,1}: probe_auroc, _f1, _precision, _recall of rows, patient_auroc (mean score, any positive),
    ill_auroc (rows of subjects with a positive row alone: to know who is ill does not help).
    Other y: probe_r2, _mae, _rmse. probe_auroc_gain.NAME, probe_r2_gain.NAME: ours minus that row, by a
    paired bootstrap. key: another first word than probe. -> {KEY[.NAME]: row(..)}"""
    known = table[table["truth"].notna()]
    test = known[known["part"] == "test"]
    who, truth, out = test["subject"].to_numpy(str), test["truth"].to_numpy(float), {}
    names = [c.partition(".")[2] for c in table if c.partition(".")[0] == "score"]
    column = lambda word, name: test[f"{word}.{name}" if name else word].to_numpy(float)
    guesses, is_class = {name: column("score", name) for name in names}, "cut" in table
    cuts = {name: column("cut", name) for name in names} if is_class else {}
    cuts["all_positive"] = np.zeros(len(test))

    main, summary = f"{key}_auroc", auroc
    if not is_class:
        main, summary = f"{key}_r2", lambda g, t: regression(g, t)["r2"]
    gain = lambda ours, other, t: summary(ours, t) - summary(other, t)
    for name in filter(None, names):
        out[f"{main}_gain.{name}"] = row_of(gain, who, guesses[""], guesses[name], truth)
    ill = np.isin(who, who[truth > 0])
    if is_class:
        guesses["all_positive"] = np.zeros(len(test))
    elif "mean" in table:           # of the training rows; --apply has none
        guesses["mean"] = test["mean"].to_numpy(float)
    for name, guess in guesses.items():
        dot = f".{name}" if name else ""
        if not is_class:
            for k, better in (("r2", "higher"), ("mae", "lower"), ("rmse", "lower")):
                statistic = lambda g, t: regression(g, t)[k]
                out[f"{key}_{k}{dot}"] = row_of(statistic, who, guess, truth, better=better)
            continue
        out[f"{key}_auroc{dot}"] = row_of(auroc, who, guess, truth)
        out[f"patient_auroc{dot}"] = row_of(auroc, *per_subject(who, guess, truth))
        out[f"ill_auroc{dot}"] = row_of(auroc, who[ill], guess[ill], truth[ill]) if ill.any() else row(np.nan)
        for k in ("f1", "precision", "recall"):
            statistic = lambda g, t, cut: classify(g, t, cut)[k]
            out[f"{key}_{k}{dot}"] = row_of(statistic, who, guess, truth, cuts[name])
    return out


def factor_numbers(codes, columns, part, subject, seed=0):
    """R2 on test rows of a linear probe of every factor_NAME of a phantom, for each of the codes (as above).
    -> {factor_r2_NAME[.ROW]: row(..)}. A factor with fewer than 2 known rows is left out."""
    out = {}
    for name in sorted(k for k in columns if k.startswith("factor_")):
        y = to_numpy(columns[name]).astype(np.float64)
        train, test = (np.flatnonzero((part == p) & ~np.isnan(y)) for p in ("train", "test"))
        if min(len(train), len(test)) < 2:
            continue
        for code, z in codes.items():
            fitted = probe("regression", z[train], y[train], subject[train], seed)
            guess = fitted.predict(to_numpy(z[test]).astype(np.float64))
            key = f"factor_r2_{name.removeprefix('factor_')}" + (f".{code}" if code else "")
            out[key] = row_of(lambda g, t: regression(g, t)["r2"], subject[test], guess, y[test])
    return out


def brain_age_gap(codes, age, train, rows, subject):
    """Age as read from codes (N,k) by a ridge fit to the healthy `train` rows, minus the true one, (N,).
    Such a guess falls towards the mean age, so the gap falls with age: the line of gap on age over `rows`,
    held-out healthy, is taken off (de Lange & Cole 2020)."""
    gap = probe("regression", codes[train], age[train], subject[train]).predict(codes) - age
    return gap - np.polyval(np.polyfit(age[rows], gap[rows], 1), age)


# ---- Rows that need no training, or little -----------------------------------------------------------------

def evenly(rows, n):
    """At most n of the rows, evenly spaced, the first and the last among them. -> array"""
    at = np.linspace(0, len(rows) - 1, min(n, len(rows)))
    return np.asarray(rows)[at.round().astype(int)]


def other_subject(subject):
    """For each row a row of another subject, about half the list away, or itself. (N,) -> (N,) int"""
    n = len(subject)
    far = n // 2 + np.arange(n)
    return np.array([next((j for j in (i + far) % n if subject[j] != subject[i]), i) for i in range(n)])


def pca_of_rows(data, train, z_dim):
    """-> a PCA of data.image[train] in [0,1], flattened, of min(z_dim, N - 1, pixels) components; a function
    rows -> those images, flattened, (len,pixels). It is fitted to at most 5,000 of the rows `train`, fewer if
    they are more than 1 GB."""
    flat = lambda rows: data.image[rows].reshape(len(rows), -1) / np.float32(255)
    x = flat(evenly(train, min(5000, max(2, 2 ** 28 // int(np.prod(data.image.shape[1:]))))))
    return PCA(min(z_dim, len(x) - 1, x.shape[1]), random_state=0).fit(x), flat


def pca_codes(data, train, z_dim):
    """PCA codes of all images, (N,k), by a PCA of training rows. Read in chunks: they may exceed memory."""
    model, flat = pca_of_rows(data, train, z_dim)
    chunks = np.array_split(np.arange(len(data.image)), len(data.image) // 256 + 1)
    return np.concatenate([model.transform(flat(rows)) for rows in chunks])


def trivial_images(data, train, test, z_dim):
    """Stand-ins for the images data.image[test]. -> {"constant", "copy", "pca": (len(test),*S) in [0,1]}
    constant: the mean training image, the best squared error without looking. copy: the nearest other row of
    the same subject, the earlier of two; black if it has no other. pca: rebuilt from z_dim numbers."""
    near = []
    for i in test:
        rest = np.setdiff1d(np.flatnonzero(data.subject == data.subject[i]), i)
        near.append(rest[np.argmin(abs(rest - i))] if len(rest) else -1)
    copy = data.image[np.maximum(near, 0)] / 255
    copy[np.less(near, 0)] = 0
    model, flat = pca_of_rows(data, train, z_dim)
    rebuilt = model.inverse_transform(model.transform(flat(test)))
    return {"constant": np.broadcast_to(model.mean_.reshape(copy.shape[1:]), copy.shape), "copy": copy,
            "pca": rebuilt.reshape(copy.shape).clip(0, 1)}


# ---- Survival: time in days > 0, event 1 = died, 0 = censored (alive when last seen) -----------------------
# A score is high in the healthy: they live longer, so its hazard ratio is below 1. A risk is the reverse.

def c_index(risk, time, event, counts=None):
    """Harrell's C: of all pairs in which one is known to have died first, the share in which that one had the
    higher risk, ties in risk half. (N,) each -> float, 0.5 is chance; nan: no such pair, or a nan in risk.
    counts (n,N): how often each patient is in each of n resamples -> (n,), some 50 times as fast as
    lifelines' concordance_index(time, -risk, event), which is the same number, in a bootstrap."""
    risk, time, event = to_numpy(risk), to_numpy(time), to_numpy(event) > 0
    copies = np.ones((1, len(time))) if counts is None else counts * 1.0
    i = np.flatnonzero(event)[:, None]
    later = (time > time[i]) | (time == time[i]) & ~event  # (events,N); censored on that day: outlived i
    right = later * np.where(np.isnan(risk), np.nan, (risk < risk[i]) + (risk == risk[i]) / 2)
    total = lambda pairs: (copies[:, i[:, 0]] * (copies @ pairs.T)).sum(1)
    with np.errstate(invalid="ignore"):
        c = total(right) / total(later)
    return float(c[0]) if counts is None else c


def cox(time, event, covariates):
    """Cox regression (Efron's ties) on {name: (N,)} -> lifelines' fitter. Constant columns are left out.
    Raises what lifelines raises or warns: nan in a column, nothing that varies, no convergence."""
    columns = {name: x for name, x in covariates.items() if np.ptp(x) != 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error", lifelines.exceptions.ConvergenceWarning)
        return CoxPHFitter().fit(pandas.DataFrame({**columns, "time": time, "event": event}), "time", "event")


def cox_risk(time, event, covariates, seed=0):
    """Log partial hazard of every patient by a Cox fitted to the others, in 10 folds, (N,): for c_index.
    On its own patients a Cox flatters: three useless columns and 220 patients give C = 0.54 on average.
    0 is the average training patient, nearly the same one in all folds: their risks can be compared."""
    risk, folds = np.zeros(len(time)), min(10, int(np.sum(event)))
    for train, held in StratifiedKFold(folds, shuffle=True, random_state=seed).split(event, event):
        fitter = cox(time[train], event[train], {name: x[train] for name, x in covariates.items()})
        columns = np.stack([covariates[name][held] for name in fitter.params_.index], 1)
        risk[held] = fitter.predict_log_partial_hazard(columns)
    return risk


def survival_numbers(scores, time, event, age, sex, seed=0):
    """How well each of scores {name, "" is ours: (N,), higher = healthier} foretells survival; row = patient.
    KEY[.NAME]: hr_per_sd, hr_p (Cox with age and sex), c_index (of that Cox, out of fold), c_index.age_sex
    (without a score), logrank_p, ks_p (halves); c_index_gain.NAME: ours minus NAME; events, power.
    "" is the primary score. The others are marked as exploratory, by their unit: of many, one has a small p
    by chance. Intervals: Wald for hr_per_sd, else bootstrap. A Cox that fails: nan and a warning."""
    time, event, n = to_numpy(time).astype(np.float64), to_numpy(event).astype(int), len(time)
    known = np.asarray(sex) != ""
    most = np.isin(sex, pandas.Series(sex)[known].mode()[:1])  # has the most frequent label
    base = {"age": to_numpy(age).astype(np.float64),           # unknown: half-way, says nothing about sex
            "sex": np.where(known, most, most[known].mean() if known.any() else 0)}
    rng = np.random.default_rng(0)  # the same resamples for all: differences are paired
    counts = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(1000)])
    out, values, draws = {}, {}, {}

    def interval(value, draws, unit):
        ci = np.nanpercentile(draws, [2.5, 97.5]) if np.isfinite(value) else (np.nan, np.nan)
        return row(value, ci, n, unit)

    for name, score in {**scores, "age_sex": np.zeros(n)}.items():
        dot, unit = (f".{name}", "exploratory") if name else ("", "")
        score = to_numpy(score).astype(np.float64)
        covariates = {"score": score / (score.std() or 1), **base}
        try:
            fitted, risk = cox(time, event, covariates).summary.T, cox_risk(time, event, covariates, seed)
        except (ValueError, TypeError, Warning) as error:  # must not take the other scores with it
            warnings.warn(f"survival: no Cox of {name or 'ours'}: {str(error).strip().splitlines()[0]}")
            fitted, risk = {}, np.full(n, np.nan)
        values[name], draws[name] = c_index(risk, time, event), c_index(risk, time, event, counts)
        out[f"c_index{dot}"] = interval(values[name], draws[name], unit)
        if name == "age_sex":
            continue
        hr = ("exp(coef)", "exp(coef) lower 95%", "exp(coef) upper 95%", "p")
        hr, low, high, p = (fitted["score"][k] if "score" in fitted else np.nan for k in hr)
        out[f"hr_per_sd{dot}"] = row(hr, (low, high), n, unit, "lower")
        # Halves at the median, never at a searched cut: the best of all cuts of a useless score has a
        # log-rank p < 0.05 in 3 of 4 cohorts. KS compares observed times and IGNORES CENSORING: halves with
        # the same survival, followed for unequal spans, are "significant". It is here as the paper has it.
        top = score > np.median(score)
        ks = ks_2samp(time[top], time[~top]).pvalue if 0 < top.sum() < n else np.nan
        logrank = multivariate_logrank_test(time, top, event).p_value
        for key, value in {"hr_p": p, "logrank_p": logrank, "ks_p": ks}.items():
            out[f"{key}{dot}"] = row(value, n=n, unit=unit, better="lower")
    for name in filter(None, values):
        out[f"c_index_gain.{name}"] = interval(values[""] - values[name], draws[""] - draws[name], "")
    # Power of a test at the paper's HR of 0.73 per SD (Schoenfeld 1983): events count, 79 of them give 0.80.
    power = norm.cdf(abs(np.log(0.73)) * np.sqrt(event.sum()) - norm.isf(0.025))
    return out | {"events": row(event.sum(), n=n), "power": row(power, n=n)}


# ---- What a run leaves in its folder -----------------------------------------------------------------------

def lock(out):
    """Makes the folder `out` and refuses a second run in it. -> the lock's file: keep it until the run ends.
    The kernel drops the lock when the process ends, however it ends. Windows has no such lock."""
    safe = getattr(os, "O_NOFOLLOW", 0)  # a link at OUT/.lock must not lead to another file
    try:
        os.makedirs(out, exist_ok=True)
        file = open(Path(out, ".lock"), "ab+", 0, opener=lambda path, mode: os.open(path, mode | safe, 0o644))
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        D.fail(f"--out {out}: another run is using this folder; wait for it, or choose another --out")
    except OSError as e:
        D.fail(f"--out {out}: cannot be used ({e.strerror}: {e.filename}); choose another --out")


def record(cfg, script_path):
    """Writes OUT/config.json and a copy of the script beside it. cfg: a dataclass with `out`."""
    config = json.dumps(dataclasses.asdict(cfg), indent=1, default=str)
    write_atomically(Path(cfg.out, "config.json"), config.encode())
    write_atomically(Path(cfg.out, Path(script_path).name), Path(script_path).read_bytes())


def warn_if_edited(cfg, script_path):
    """Warns if the script is not the one that record() copied: the weights in OUT are of other code."""
    path = Path(cfg.out, Path(script_path).name)
    if path.exists() and path.read_bytes() != Path(script_path).read_bytes():
        D.warn(f"{path.name} has changed since it made {path.parent}: those weights are of old code; give "
               "an edited script another --out")


def log_line(path, row):
    """Appends a dict to a log as one line of JSON."""
    with D.writing(path), open(path, "a") as f:
        f.write(json.dumps(row) + "\n")


class Progress:
    """What a loop says while it trains: lines of OUT/log*.jsonl, and a bar, or lines where no terminal is.

    ends_at: when the time is over, as time.perf_counter() counts. Only rank 0 says something."""
    def __init__(self, cfg, name, step, steps, ends_at, rank):
        self.name, self.step, self.steps, self.batch, self.ends_at = name, step, steps, cfg.batch, ends_at
        self.log = Path(cfg.out, f"{name.replace('ckpt', 'log')}.jsonl")
        self.bar = tqdm(total=steps, initial=step, desc=name, unit="step", disable=rank > 0 or None)
        self.began = self.said = time.perf_counter()
        if step and rank == 0:
            print(f"{name}: going on from step {step} of {steps}", flush=True)

    def say(self, step, loss, grad_norm, lr, saves):
        """loss and grad_norm: means over the steps since the last call; saves: a checkpoint comes next."""
        now = time.perf_counter()
        speed = (step - self.step) * self.batch / (now - self.began)
        log_line(self.log, dict(step=step, loss=loss, grad_norm=grad_norm, lr=lr, img_s=round(speed, 2)))
        self.bar.set_postfix(loss=f"{loss:.4f}", img_s=f"{speed:.4g}")
        if self.bar.disable and (saves or now - self.said > 20):
            left = max(0, min((self.steps - step) * self.batch / speed, self.ends_at - now))
            print(f"{self.name}: step {step} of {self.steps}, loss {loss:.4f}, {speed:.4g} images/s, "
                  f"{left:.0f} s left", flush=True)
            self.said = now
        self.step = step


def read_log(path):
    """The records of a log in order of their step -> list of dicts; [] if there is no such file. A broken or
    foreign line is skipped. A run that was killed repeats steps when it resumes: the last record counts."""
    rows = {}
    for line in Path(path).read_bytes().splitlines() if Path(path).exists() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        step = record.get("step") if isinstance(record, dict) else None
        if type(step) is int and 0 <= step < 2 ** 53:
            rows[step] = record
    return [rows[step] for step in sorted(rows)]


def write_atomically(path, data):
    """bytes -> file; a crash or a full disk leaves the old file or the new one, never half of one."""
    with D.replacing(path) as part:
        Path(part).write_bytes(data)


def as_json(results):
    """-> results as strict JSON has them: numpy's numbers as Python's, paths as text, nan and inf as None"""
    text = json.dumps(results, default=lambda v: v.item() if isinstance(v, np.generic) else str(v))
    return json.loads(text, parse_constant=lambda constant: None)


def save_results(path, script, data, n, seconds, config, metrics, device="cpu"):
    """Writes results.json: what was measured, on what, by which commit. n, config, metrics: dicts.
    metrics: key -> row(...). device: "cpu", "mps", "cuda" (the card's name is added). Strict JSON, atomic."""
    git = subprocess.run("git rev-parse --short HEAD", shell=True, cwd=Path(__file__).resolve().parent,
                         capture_output=True, text=True).stdout.strip()  # "" without git
    name, memory = "", None  # the peak: of the GPU, else of the process (in kB, on a Mac in bytes)
    if str(device).startswith("cuda"):
        name = f" ({torch.cuda.get_device_name(device)})"
        memory = torch.cuda.max_memory_allocated(device) / 1e9
    elif resource:
        unit = 1e9 if sys.platform == "darwin" else 1e6
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    results = {"script": script, "data": data, "n": n, "seconds": seconds, "device": f"{device}{name}",
               "memory_gb": memory, "torch": torch.__version__, "git": git, "config": config,
               "metrics": metrics}
    write_atomically(path, (json.dumps(as_json(results), indent=1, allow_nan=False) + "\n").encode())


# ---- Codes and predictions, as CSV; probes, as JSON --------------------------------------------------------

def rows_of(data, part):
    """The first columns of every CSV: subject, row, part (N,), and path if the Dataset has it. -> dict"""
    path = {"path": data.columns["path"]} if "path" in data.columns else {}
    return {"subject": data.subject, "row": np.arange(len(data)), "part": part, **path}


def save_scores(path, data, part, columns):
    """Writes a CSV with a line per image: rows_of(data, part), then columns {name: (N,)}."""
    table = pandas.DataFrame({**rows_of(data, part), **columns})
    write_atomically(path, table.to_csv(index=False, float_format="%.6g").encode())


def save_codes(path, data, part, z):
    """Writes a CSV with a line per image: rows_of(data, part), then z0, z1, .. of its code z (N,d)."""
    save_scores(path, data, part, {f"z{i}": x for i, x in enumerate(to_numpy(z).T)})


def save_predictions(path, tables):
    """Writes tables of predict(), one below the other. tables: {(key, target): table}; key: the first word of
    the table's keys in results.json, target: the column that was predicted."""
    tables = [table.assign(key=key, target=target) for (key, target), table in tables.items()]
    write_atomically(path, pandas.concat(tables).to_csv(index=False, float_format="%.6g").encode())


def pooled(paths):
    """Numbers over all folds: each subject is tested once, by a model that has not seen the subject.
    paths: predictions.csv of every fold -> {KEY[.NAME]: row(..)}, the keys of probe_numbers()"""
    table = pandas.concat([pandas.read_csv(path, dtype={"subject": str}, keep_default_na=False,
                                           na_values=[""]) for path in paths])
    numbers = [probe_numbers(of_key.dropna(axis=1, how="all"), key) for key, of_key in table.groupby("key")]
    return as_json({k: m for found in numbers for k, m in found.items()})    # as in results.json


def save_probes(path, probes, z, classes):
    """Writes probes as plain numbers. probes: {key: (target, table, probe)}, the latter two of predict();
    z: the training codes; classes: label_names. score = z @ weights + intercept; axis: see direction()."""
    out = {}
    for key, (target, table, model) in probes.items():
        weights, intercept = linear(model)
        out[key] = dict(target=target, weights=weights.tolist(), intercept=intercept,
                        axis=direction(model, z).tolist(), classes=classes if target == "label" else [])
        out[key] |= dict(cut=float(table["cut"].iloc[0])) if "cut" in table else {}
    write_atomically(path, json.dumps(out).encode())


def read_probes(out):
    """What save_probes wrote in the folder `out` -> {key: {"target", "weights", "intercept", "axis",
    "classes", of a class also "cut"}}, weights and axis (d,) float32; {}: no probe. A damaged file exits 2"""
    path = Path(out, "probes.json")
    try:
        probes = json.loads(path.read_text()) if path.exists() else {}
        for p in probes.values():
            p |= {k: np.array(p[k], np.float32) for k in ("weights", "axis")}
            p |= {k: p[k] for k in ("target", "intercept", "classes")}
        return probes
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        D.fail(f"{path}: damaged ({type(e).__name__}: {e}); the command that trained the run writes it again")


def apply_probes(out, folder, data, part, z):
    """The probes of the run in `out` on codes z (N,d) of other data. Writes folder/predictions.csv.
    part: of known_part(). -> the numbers of the rows that have a truth and that the run did not learn from"""
    tables, metrics = {}, {}
    for key, p in read_probes(out).items():
        if p["classes"] and data.label_names and p["classes"] != data.label_names:
            D.fail(f"{data.path}: label_names {data.label_names}, but the model learned {p['classes']}; a "
                   "class needs one number")
        table = pandas.DataFrame(rows_of(data, part))
        table["truth"] = to_numpy(data.columns.get(p["target"], np.full(len(data), np.nan))).astype(float)
        table["score"] = to_numpy(z) @ p["weights"] + p["intercept"]
        if "cut" in p:
            table["truth"] = table["truth"].where(table["truth"] <= 1)   # it knows 0 and 1 alone
            table["cut"] = p["cut"]
            table["called"] = (table["score"] >= p["cut"]).astype(int)
        tables[key, p["target"]] = table
        unseen = table[~np.isin(part, ["train", "val"])].assign(part="test")
        if unseen["truth"].notna().any():
            metrics |= probe_numbers(unseen, key)
    if tables:
        save_predictions(Path(folder, "predictions.csv"), tables)
    return metrics


def save_arrays(path, arrays):
    """Writes {name: array} as .npz."""
    with D.replacing(path) as part, open(part, "wb") as file:
        np.savez(file, **arrays)


def read_arrays(path, names):
    """What save_arrays wrote -> {name: array}. A file that is damaged or lacks one of the names exits 2."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        D.fail(f"{path}: missing or damaged ({e}); the command that trained the run writes it again")


def check_evaluated(out, log="log.jsonl"):
    """Exits if the network in `out`, whose training wrote this log, was trained on after its evaluation: then
    the probes and scores there are of older weights."""
    lines, results = read_log(Path(out, log)), Path(out, "results.json")
    if lines and results.exists() and json.loads(results.read_text())["config"]["steps"] < lines[-1]["step"]:
        D.fail(f"{out}: trained on after its evaluation; let the command that trains it run to its end")


def check_init(out, names, subject):
    """Exits unless the folder `out` holds the checkpoints `names`, from which --init starts. Warns if its
    networks were trained on any of the subjects."""
    for name in names:
        if not Path(out, f"{name}.pt").exists():
            D.fail(f"--init {out}: {name}.pt is missing; name the folder of a finished run of this script")
    known_part(out, subject)


def known_part(out, subject):
    """In which part of the run in `out` was each subject (N,)? -> (N,) train, val, test, or new. Warns of
    those in train: a number of them says nothing about new patients."""
    path = Path(out, "codes.csv")
    path = path if path.exists() else Path(out, "subjects.csv")         # of cond_ldm.py, which has no codes
    try:
        run = pandas.read_csv(path, usecols=["subject", "part"], dtype=str, keep_default_na=False)
    except (OSError, ValueError) as e:
        D.warn(f"{path}: {e}; so nobody knows which subjects were trained on")
        return np.full(len(subject), "unknown")
    parts = dict(zip(run["subject"].str.casefold(), run["part"]))
    part = np.array([parts.get(s.casefold(), "new") for s in subject])
    seen = np.unique(subject[part == "train"])
    if len(seen):
        D.warn(f"the model in {out} was trained on {len(seen)} of these subjects ({', '.join(seen[:3])}): "
               "their numbers say nothing about new patients")
    return part


# ---- The table and the sentence that end a run -------------------------------------------------------------

GLOSSARY = {  # first words of keys in results.json; a longer one wins
    "recon_ssim": "likeness of the image drawn from z_sem and its own noise; 1 is the image itself",
    "semantic": "the same, from z_sem alone: the noise is random",
    "semantic_gain": "likeness with the right z_sem minus with another's; 0: it is ignored",
    "grain": "variance of the Laplacian, over that of real images; 1 is as rough as they are",
    "x_T_sd_error": "a noise image has an SD of 1; far from 1, it still holds the image",
    "z_T_sd_error": "a noise latent has an SD of 1; far from 1, it still holds the scan",
    "probe_auroc": "a line through the codes scores an ill image above a healthy one; 0.5 is chance",
    "patient_auroc": "the same for patients, by the mean over their images",
    "ill_auroc": "the same among the images of ill patients alone; 0.5 is chance",
    "probe_f1": "harmonic mean of precision and recall; the threshold is of validation patients",
    "probe_r2": "share of the variance that a line through the codes explains; 0 is the mean",
    "age_mae": "age as a line through the codes reads it, mean absolute error",
    "hr_per_sd": "hazard for one SD more of the score, age and sex kept; 1: no effect",
    "c_index": "of two patients, the one with the higher risk dies first; 0.5 is chance",
    "logrank_p": "p of: patients above and below the median score live equally long",
    "ks_p": "p of: their times are alike, censored or not; the paper's test, a small p proves little",
    "auroc": "a patient scores below a control, age taken off; 0.5 is chance",
    "severity_r": "rank correlation with the planted severity, of patients",
    "lesion_gain": "the difference finds the lesion better than a control's does; 0 is chance",
    "dice": "overlap of drawn structures and those that a segmenter finds; 1 is all",
    "edge_f1": "drawn edges that are found again, and found ones that were drawn; 1 is all",
    "ssim": "likeness to the real slice; 1 is the slice itself",
    "nmse": "squared error over the slice's variance; 1 is a flat grey",
    "fid": "distance of the sets in Inception's features; compare with real slices of other patients",
    "kid": "the same, by a kernel; 0 is one distribution",
    "fd_vq": "distance of the sets in the VQ-VAE's features; compare with real slices",
    "kid_vq": "the same, by a kernel; 0 is one distribution",
    "edit": "mean change of grey there, from 2 SD towards health to 2 SD towards disease",
    "interp": "a scan that is missing between two visits, drawn from both",
    "manip_ventricle_slope": "growth of the ventricles for one SD of z_sem towards disease",
    "recon_s": "seconds to encode and draw one scan again",
}


def explain(key):
    """The line of GLOSSARY for a key of results.json, or ""."""
    found = [word for word in GLOSSARY if key.startswith(word)]
    return GLOSSARY[max(found, key=len)] if found else ""


def number(v):
    """-> text: 3 decimals around 1, fewer for large, 2 digits for tiny; "-" for None, nan and inf."""
    if v is None or not np.isfinite(v):
        return "-"
    if v == 0 or 0.01 <= abs(v) < 10:
        return f"{v:.3f}"
    return f"{v:.2g}" if abs(v) < 0.01 else f"{v:.1f}" if abs(v) < 1000 else f"{v:.0f}"


def cell(m):
    """A row(..) -> its number and its interval, if it has one, as text."""
    low, high = (number(c) for c in m["ci"])
    return number(m["value"]) + ("" if low == high == "-" else f" [{low}, {high}]")


def table(metrics, shown, rows):
    """The table that ends a run: one line per row, one column per key, each value with its interval.
    metrics: KEY and KEY.ROW -> row(..). shown: {key: name in words}. rows: {row name, "" is ours: words}.
    Columns beyond 100 letters go to a block below. A row that has none of a block's keys is left out."""
    columns = []  # (the heading's lines, {row name: cell})
    for key, words in shown.items():
        found = {name: metrics[k] for name in rows if (k := f"{key}.{name}" if name else key) in metrics}
        if found:
            first = next(iter(found.values()))
            heading = textwrap.wrap(f"{words} {dict(lower='↓', higher='↑').get(first['better'], '')}", 24)
            columns.append((heading, {name: cell(m) for name, m in found.items()}))
    left, lines = max(map(len, rows.values())), []
    fit = max(1, (100 - left) // 26)  # columns of 24, two spaces apart
    for block in (columns[i:i + fit] for i in range(0, len(columns), fit)):
        for k in range(max(len(heading) for heading, _ in block)):
            lines.append(["", *("".join(heading[k:k + 1]) for heading, _ in block)])
        for name, words in rows.items():
            if any(name in cells for _, cells in block):
                lines.append([words, *(cells.get(name, "-") for _, cells in block)])
        lines.append([""])
    text = ["  ".join([line[0].ljust(left), *(t.ljust(24) for t in line[1:])]).rstrip() for line in lines]
    n = sorted({m["n"] for key, m in metrics.items() if key.partition(".")[0] in shown} - {0})
    who = f"{n[0]} to {n[-1]} subjects" if len(n) > 1 else f"{n[0]} subjects" if n else "subjects"
    wald = "; of hazard ratios, Wald's" if any(key.startswith("hr") for key in shown) else ""
    few = " With so few, intervals are too narrow." if n and n[0] < 10 else ""
    text.append(f"In brackets: the 95 % interval, by bootstrap over {who}{wald}.{few}")
    text.append("↑ higher is better, ↓ lower is better.")
    return "\n".join(text + [f"{words}: {explain(key)}" for key, words in shown.items()
                             if any(k.partition(".")[0] == key for k in metrics)])


def answer(question, name, ours, other, gain):
    """The sentence that ends a run: the question, both numbers, their difference, and what it says.
    ours, other, gain: row(..); gain is ours minus other. yes: its interval lies on the better side of 0;
    no: on the worse; undecided: 0 is inside, or there is no interval."""
    low, high = gain["ci"] if gain["better"] == "higher" else (-gain["ci"][1], -gain["ci"][0])
    verdict = "yes" if low > 0 else "no" if high < 0 else "undecided"
    plus = "+" if gain["value"] > 0 else ""
    return (f"{question} {name} {number(ours['value'])} against {number(other['value'])}, "
            f"{plus}{cell(gain)}, {gain['n']} patients: {verdict}.")


def save_applied(folder, script, data, part, cfg, metrics, shown, rows, seconds):
    """The end of --apply: writes results.json, prints the table and the subjects. part: of known_part()"""
    count = {p: len(np.unique(data.subject[part == p])) for p in np.unique(part).tolist()}
    save_results(Path(folder, "results.json"), f"{script} --apply", data.path, count, seconds,
                 dataclasses.asdict(cfg), metrics, cfg.device)
    if metrics:
        print(table(metrics, shown, rows))
    print(f"{len(data)} images; subjects: {D.in_words(count)}; {seconds:.0f} s: {folder}/")


# ---- Figures -----------------------------------------------------------------------------------------------

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito: safe if colour-blind


def save_figure(path, figure, caption):
    """Matplotlib figure -> PNG, with the caption above it."""
    figure.suptitle(textwrap.fill(caption, int(13 * figure.get_figwidth())), fontsize=10, x=0.01, ha="left",
                    y=1 - 0.06 / figure.get_figheight(), va="top")
    with D.replacing(path) as part:
        figure.savefig(part, format="png", dpi=100, metadata={"Description": caption})


@matplotlib.rc_context({"text.parse_math": False})  # a subject may be called a$b$
def grid(path, rows, row_labels, col_labels, caption):
    """Writes a labelled PNG. rows: lists of (H,W) or (H,W,3) images in [0,1] of one size; None leaves a gap.
    Each pixel becomes so many equal ones that a cell is 96 wide or more (smoothing would flatter the model).
    Labels (or None) and caption are wrapped. -> (width, height)"""
    cells = [[None if x is None else to_numpy(x) for x in r] for r in rows]
    h, w = next(x.shape[:2] for r in cells for x in r if x is not None)
    scale = -(-96 // min(h, w))  # rounded up
    h, w, gap, line = h * scale, w * scale, 4, 17
    row_labels = [textwrap.fill(str(t), 20) for t in row_labels or ()]
    col_labels = [textwrap.fill(str(t), w // 8) for t in col_labels or ()]
    left = gap + max((9 * len(t) + 8 for t in "\n".join(row_labels).split("\n") if t), default=0)
    picture = np.full((len(cells) * (h + gap), max(map(len, cells)) * (w + gap), 3), 255, np.uint8)
    for i, images in enumerate(cells):
        for j, x in enumerate(images):
            if x is not None:
                x = np.rint(np.nan_to_num(x).clip(0, 1) * 255).repeat(scale, 0).repeat(scale, 1)
                place = picture[i * (h + gap):, j * (w + gap):][:h, :w]
                place[:] = x if x.ndim == 3 else x[..., None]
    height, width = picture.shape[:2]
    whole = max(left + width, 420)  # a caption needs some room
    top = line * (len(textwrap.wrap(caption, whole * 13 // 100)) + 1)
    top += line * max((t.count("\n") + 1 for t in col_labels), default=0)
    figure = Figure(figsize=(whole / 100, (top + height) / 100), dpi=100)
    axis = figure.add_axes([left / whole, 0, width / whole, height / (top + height)])
    axis.imshow(picture, interpolation="nearest", aspect="auto")
    axis.set_xticks(np.arange(len(col_labels)) * (w + gap) + w / 2, col_labels, fontsize=9)
    axis.set_yticks(np.arange(len(row_labels)) * (h + gap) + h / 2, row_labels, fontsize=9)
    axis.tick_params(length=0, bottom=False, labelbottom=False, labeltop=True)
    axis.spines[:].set_visible(False)
    save_figure(path, figure, caption)
    return whole, top + height


def curves(path, logs, keys=("loss",)):
    """Writes a PNG, one panel per key: every log's value over step, pale, and its running mean.
    logs: {label: path of a log.jsonl}. Keys in no record are left out. Nothing to draw: no file."""
    read = {label: read_log(log) for label, log in logs.items()}
    keys = [key for key in keys if any(key in record for log in read.values() for record in log)]
    if not keys:
        return
    figure = Figure(figsize=(5.5 * len(keys), 3.6), layout="constrained")
    for axis, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys):
        for color, (label, log) in zip(itertools.cycle(COLORS), read.items()):
            value = {r["step"] + 1: r[key] for r in log if isinstance(r.get(key), (int, float))}
            value = pandas.Series(value, dtype=float)
            mean = value.rolling(max(5, len(value) // 25), min_periods=1).mean()  # a loss hangs on its t
            axis.plot(value.index, value, color=color, alpha=0.25, linewidth=0.8)
            axis.plot(mean.index, mean, color=color, label=label if len(value) else None)
        axis.set(xlabel="step", ylabel=key)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save_figure(path, figure, "Training: " + " and ".join(keys) + " over steps, and the running mean.")


def scatter(path, x, y, groups, xlabel, ylabel, caption):
    """Writes a PNG: y over x (N,) each, coloured by groups {label: (N,) bool}."""
    x, y = to_numpy(x), to_numpy(y)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for color, (label, rows) in zip(itertools.cycle(COLORS), groups.items()):
        label = f"{label} ({np.sum(rows)})"
        axis.scatter(x[rows], y[rows], s=16, color=color, alpha=0.6, linewidth=0, label=label)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    save_figure(path, figure, caption)


def survival_curves(path, time, event, score, caption):
    """Writes a PNG: Kaplan-Meier curves of the halves of score (N,) (higher = healthier) with 95 % bands,
    a tick for every censored patient, how many are still at risk below, log-rank p in the legend."""
    time, event, score = to_numpy(time).astype(np.float64), to_numpy(event).astype(int), to_numpy(score)
    figure = Figure(figsize=(7, 5.2))
    axis = figure.add_axes([0.15, 0.27, 0.82, 0.58])
    high, fitted = score > np.median(score), []
    for label, half, color in (("healthier half", high, COLORS[0]), ("other half", ~high, COLORS[1])):
        if half.any():  # a constant score has one half
            label = f"{label}: {half.sum()} patients, {event[half].sum()} events"
            fitted.append(KaplanMeierFitter(label=label).fit(time[half], event[half]))
            fitted[-1].plot_survival_function(ax=axis, color=color, show_censors=True,
                                              censor_styles={"marker": "|", "ms": 6})
    axis.set(ylim=(0, 1.02), xlim=(0, None), xlabel="days", ylabel="event-free share (Kaplan-Meier)")
    axis.grid(alpha=0.3)
    p = number(multivariate_logrank_test(time, high, event).p_value)
    axis.legend(fontsize=9, title=f"halves at the median, log-rank p = {p}")
    add_at_risk_counts(*fitted, labels=["more", "less"][-len(fitted):], rows_to_show=["At risk"], ax=axis,
                       fig=figure)
    save_figure(path, figure, caption)
