"""Every number and figure that is reported: images, classification, probes, trivial rows, tables, pictures.

Two rules run through the file. The subject is the unit: intervals resample subjects, probes are tuned on
folds of subjects, slices are averaged to patients. And no number stands alone: beside each are the rows that
need no model (a constant image, another slice, all-positive, PCA): they score higher than one expects.

Numbers come back as numpy float64. Images are in [0,1] (data_range 1), AUROC in [0,1], 0/0 is nan.
"""
import dataclasses
import io
import json
import os
import subprocess
import textwrap
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from scipy.ndimage import maximum_filter
from scipy.stats import ks_2samp, norm, rankdata
from sklearn.compose import TransformedTargetRegressor
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.ensemble import BaggingClassifier, BaggingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, StratifiedKFold, cross_val_predict
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import data as D

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def to_numpy(x):
    """Tensor (any device, any float type) or array-like -> numpy array."""
    if torch.is_tensor(x):
        x = x.detach().cpu()
        x = x.float() if x.dtype == torch.bfloat16 else x  # numpy has no bfloat16
    return np.asarray(x)


# ------------------------------------------------------------------------------------------------------------
# Images. All take (N,*S) or (N,1,*S) in [0,1], S = (H,W) or (D,H,W), and return one number per image, (N,).

def image_pair(a, b):
    """-> the two as float64 (N,*S) tensors. ValueError on other shapes, or a range that is not [0,1]."""
    pair = []
    for x in (a, b):
        x = x.detach() if torch.is_tensor(x) else torch.from_numpy(np.array(x, dtype=np.float64))
        x = x.cpu() if x.device.type == "mps" else x  # MPS has no float64
        pair.append((x[:, 0] if x.ndim > 3 and x.shape[1] == 1 else x).double())
    a, b = pair[0], pair[1].to(pair[0].device)
    if a.shape != b.shape or a.ndim not in (3, 4):
        raise ValueError(f"images: need two (N,H,W) or (N,D,H,W), got {tuple(a.shape)} and {tuple(b.shape)}")
    # An overshoot is the model's error and counts. [-1,1] or 0..255 is the caller's and would go unnoticed:
    # SSIM with the wrong data_range is a plausible number. Hence an error, with half a unit of tolerance.
    for x in pair:
        if x.numel() and (x.min() < -0.5 or x.max() > 1.5):
            raise ValueError(f"images: need the range [0,1], got [{x.min():.2f}, {x.max():.2f}]")
    return a, b


def ssim(a, b, window="gaussian"):
    """Structural similarity (Wang et al. 2004, eq. 13), mean over the positions where the window fits.

    window: "gaussian" (Wang's: sigma 1.5, 11 taps, population covariance) or "uniform7" (7 equal taps, sample
    covariance: scikit-image's default). A volume gets a 3D window, which is not the mean over its slices.
    -> (N,), 1 = identical. ValueError if an image is smaller than the window."""
    a, b = image_pair(a, b)
    if window == "gaussian":
        taps = np.exp(-(np.arange(11) - 5) ** 2 / (2 * 1.5 ** 2))
        taps = (taps / taps.sum()).tolist()
        correction = 1  # of the (co)variances: none, population
    elif window == "uniform7":
        taps = [1 / 7] * 7
        correction = 7 ** (a.ndim - 1) / (7 ** (a.ndim - 1) - 1)  # n / (n - 1): sample covariance
    else:
        raise ValueError(f'ssim: window is "gaussian" or "uniform7", not {window!r}')
    if min(a.shape[1:]) < len(taps):
        raise ValueError(f"ssim: images {tuple(a.shape[1:])} are smaller than the {len(taps)}-tap window")

    def local_mean(x):  # separable window: per axis one weighted sum of shifted views, valid region only
        for dim in range(1, x.ndim):
            length = x.shape[dim] - len(taps) + 1
            x = sum(w * x.narrow(dim, i, length) for i, w in enumerate(taps))
        return x

    c1, c2 = 0.01 ** 2, 0.03 ** 2  # (K1 L)^2 and (K2 L)^2 with L = 1
    values = []
    few = max(1, 2 ** 16 // a[0].numel()) if len(a) else 1  # images at a time: stay in the cache
    for x, y in zip(a.split(few), b.split(few)):
        mx, my = local_mean(x), local_mean(y)
        vx = correction * (local_mean(x * x) - mx * mx)
        vy = correction * (local_mean(y * y) - my * my)
        cxy = correction * (local_mean(x * y) - mx * my)
        s = (2 * mx * my + c1) * (2 * cxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
        values.append(s.flatten(1).mean(1).cpu())
    return torch.cat(values).numpy() if values else np.zeros(0)


def mse(a, b):
    """Mean squared error per image, (N,)."""
    a, b = image_pair(a, b)
    return ((a - b) ** 2).flatten(1).mean(1).cpu().numpy()


def psnr(a, b):
    """10 log10(1 / MSE) in dB per image, (N,). Identical images: inf."""
    with np.errstate(divide="ignore"):
        return -10 * np.log10(mse(a, b))


def nmse(real, fake):
    """MSE / Var(real) per image, (N,). The image's own mean scores 1: above that, a flat grey is better."""
    x, _ = image_pair(real, fake)
    with np.errstate(divide="ignore", invalid="ignore"):
        return mse(real, fake) / x.flatten(1).var(1, correction=0).cpu().numpy()


def nmse_fastmri(real, fake):
    """||real - fake||^2 / ||real||^2 per image (fastMRI's), (N,). A black image scores 1. Not nmse."""
    x, _ = image_pair(real, fake)
    with np.errstate(divide="ignore", invalid="ignore"):
        return mse(real, fake) / (x ** 2).flatten(1).mean(1).cpu().numpy()


# ------------------------------------------------------------------------------------------------------------
# Generated images: as a population, against the drawing they were made from, and against the training set.

def frechet(a, b):
    """Frechet distance of two sets of features (n,d), (m,d) as Gaussians: |mean_a - mean_b|^2 +
    tr(A + B - 2 sqrt(A B)), A and B their covariances (Heusel et al. 2017, eq. 6). -> float >= 0

    Called FID in Inception features only. tr sqrt(A B) is the sum of the singular values of X Y^T, X the
    centred features / sqrt(n - 1): exact, also where n < d and A B has no stable square root. With few
    images it is biased upwards: print n, and the distance between two sets of real ones, beside it."""
    means, roots = [], []
    for x in (a, b):
        x = to_numpy(x).astype(np.float64)
        if x.ndim != 2 or len(x) < 2:
            raise ValueError(f"frechet: two sets (n,d) of at least 2 are needed, got {x.shape}")
        means.append(x.mean(0))
        roots.append(np.linalg.qr((x - means[-1]) / np.sqrt(len(x) - 1), mode="r"))
    cross = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return float(max(0, ((means[0] - means[1]) ** 2).sum() + sum((r ** 2).sum() for r in roots) - 2 * cross))


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


def edge_recall(hits):
    """Share of the wanted edge pixels that were found, pooled over edge_hits()."""
    _, _, wanted, hit = to_numpy(hits).sum(0)
    return float(hit / wanted) if wanted else np.nan


def edge_f1(hits):
    """Harmonic mean of precision and recall of edge pixels, each pooled over edge_hits()."""
    found, right, wanted, hit = to_numpy(hits).sum(0)
    if not found or not wanted:
        return np.nan if not wanted else 0.0
    precision, recall = right / found, hit / wanted
    return float(2 * precision * recall / max(precision + recall, 1e-12))


def nearest(x, bank, few=256):
    """Images (N,H,W), bank (M,H,W) in [0,1] or uint8 -> distance (root mean square) to and row of the nearest
    in the bank, each (N,): a generated image much nearer to training than a real one is a copy."""
    unit = lambda v: to_numpy(v).reshape(len(v), -1) / (255.0 if v.dtype == np.uint8 else 1.0)
    x, best, at = unit(x), np.full(len(x), np.inf), np.zeros(len(x), int)
    for i in range(0, len(bank), few):
        y = unit(bank[i:i + few])
        d = ((x ** 2).mean(1)[:, None] + (y ** 2).mean(1) - 2 * (x @ y.T) / x.shape[1]).clip(0)
        closer = d.min(1) < best
        best[closer], at[closer] = d.min(1)[closer], i + d.argmin(1)[closer]
    return np.sqrt(best), at


# ------------------------------------------------------------------------------------------------------------
# Intervals.

def bootstrap(statistic, subject, *arrays, n=1000, seed=0):
    """95 % percentile interval of statistic(*arrays) -> float, resampling subjects with all their rows.

    Slices of one heart are not independent: resampling rows would give too narrow an interval. To compare two
    methods, bootstrap their difference. Resamples where the statistic is nan (one class only) are left out.
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


# ------------------------------------------------------------------------------------------------------------
# Classification (y = 1 is pathological; a score is a logit, higher = more pathological) and regression.

def auroc(score, y):
    """P(a positive scores above a negative), ties half (Mann-Whitney U / n1 n0). One class only: nan."""
    score, y = to_numpy(score), to_numpy(y) > 0
    n1, n0 = y.sum(), (~y).sum()
    if n1 == 0 or n0 == 0:
        return np.nan
    return float((rankdata(score)[y].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def threshold_f1(score_val, y_val):
    """The threshold with the best F1 for `score >= threshold`; choose it on validation rows, never on test.

    Candidates: the midpoints between neighbouring scores, and -inf (everything positive). Ties: the one whose
    number of called positives is nearest to the true one. No positive in y_val: 0, the logit of p = 0.5."""
    score, y = to_numpy(score_val), to_numpy(y_val) > 0
    if not y.any():
        return 0.0
    values = np.unique(score).astype(np.float64)
    cuts = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2])
    called = score >= cuts[:, None]
    f1 = 2 * (called & y).sum(1) / (called.sum(1) + y.sum())
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    return float(cuts[best[np.argmin(abs(called[best].sum(1) - y.sum()))]])


def classify(score, y, threshold):
    """-> dict of f1, precision, recall, accuracy for `score >= threshold`; 0/0 is nan.

    The row to beat is all-positive, classify(zeros, y, 0): at prevalence p its F1 is 2p / (1 + p)."""
    called, true = to_numpy(score) >= threshold, to_numpy(y) > 0
    tp, fp, fn = (called & true).sum(), (called & ~true).sum(), (~called & true).sum()

    def ratio(a, b):
        return float(a / b) if b else np.nan

    return {"f1": ratio(2 * tp, 2 * tp + fp + fn), "precision": ratio(tp, tp + fp),
            "recall": ratio(tp, tp + fn), "accuracy": ratio((called == true).sum(), len(true))}


def patient_level(logit, subject, y):
    """Slices -> patients: (mean logit, max y), each (patients,), in the order of np.unique(subject)."""
    logit, y = to_numpy(logit), to_numpy(y)
    names, index = np.unique(to_numpy(subject), return_inverse=True)
    rows = [index == i for i in range(len(names))]
    return np.array([logit[r].mean() for r in rows]), np.array([y[r].max() for r in rows])


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
    fitted = LedoitWolf().fit(to_numpy(z)[rows])
    return np.sqrt(fitted.mahalanobis(to_numpy(z)))


# ------------------------------------------------------------------------------------------------------------
# Probes: what can be read from a frozen z.

def subject_folds(task, y, subject, seed=0):
    """Up to 4 (train, held-out) index pairs, no subject on both sides. [] if there are too few subjects."""
    y, subject = to_numpy(y), to_numpy(subject)
    groups = [subject[y == c] for c in np.unique(y)] if task == "class" else [subject]
    k = min(4, *(len(np.unique(group)) for group in groups))
    if k < 2:
        return []
    splitter = (StratifiedGroupKFold if task == "class" else GroupKFold)(k, shuffle=True, random_state=seed)
    folds = list(splitter.split(y, y, subject))
    one_class = task == "class" and any(len(np.unique(y[train])) < 2 for train, _ in folds)
    return [] if one_class else folds


class OneScale(StandardScaler):
    """Subtracts each number's mean and divides all numbers by one SD, the root of their mean variance."""

    def fit(self, X, y=None, sample_weight=None):
        super().fit(X, y, sample_weight)
        self.scale_ = np.full_like(self.scale_, max(np.sqrt(self.var_.mean()), 1e-12))
        return self


def probe(task, z, y, subject, seed=0):
    """Fits a linear probe from z (N,d) to y (N,), training rows only -> scikit-learn Pipeline.

    task "class": logistic regression, y in {0,1}, read it with logits(). "regression": ridge, read it with
    model.predict(z). The penalty and the scaling have the lowest log loss (or squared error) on held-out
    training subjects. ValueError if task is "class" and y does not have the two values."""
    z, y = to_numpy(z).astype(np.float64), to_numpy(y)
    if task == "class" and not np.array_equal(np.unique(y), [0, 1]):
        raise ValueError(f"probe: needs the classes 0 and 1 in training, got {np.unique(y).tolist()[:5]}")
    # The best penalty and scaling differ between codes. Numbers of z_sem are alike, and each can be divided by
    # its own SD. Most numbers of a PCA code are noise of small variance, which that would blow up.
    models = [make_pipeline(scaler(), LogisticRegression(C=1 / penalty, max_iter=1000) if task == "class"
                            else Ridge(alpha=penalty))
              for penalty in (100, 1, 10, 1000, 10000) for scaler in (StandardScaler, OneScale)]
    folds = subject_folds(task, y, subject, seed)
    losses = []
    with warnings.catch_warnings(), threadpool_limits(1):    # so small that threads only wait: 8 times slower
        warnings.simplefilter("ignore", ConvergenceWarning)
        for model in models if folds else ():
            if task == "class":
                p = cross_val_predict(model, z, y, cv=folds, method="predict_proba")
                losses.append(log_loss(y, p[:, 1]))
            else:
                losses.append(np.mean((cross_val_predict(model, z, y, cv=folds) - y) ** 2))
        return models[int(np.argmin(losses)) if folds else 0].fit(z, y)


def logits(model, z):
    """Log-odds of class 1 from a class probe, (N,); p is clipped at 1e-6: means over slices stay finite."""
    p = np.clip(model.predict_proba(to_numpy(z).astype(np.float64))[:, 1], 1e-6, 1 - 1e-6)
    return np.log(p / (1 - p))


def direction(model):
    """Unit vector (d,) in z space along which a linear probe's attribute grows; natural step: std of z @ it.

    A step along the weights in standardised space, mapped back: sd * w. (The gradient, w / sd, mostly
    moves the dimensions that vary least, off the data; see Haufe et al. 2014.)"""
    scaler, head = model[0], model[-1]
    v = scaler.scale_ * np.ravel(head.coef_)
    return v / max(np.linalg.norm(v), 1e-12)


# ------------------------------------------------------------------------------------------------------------
# Survival: time in days > 0, event 1 = died, 0 = censored (alive when last seen). Two directions meet here: a
# score is a similarity, higher = healthier = lives longer, so its hazard ratio is < 1; a risk is the reverse.
# lifelines and matplotlib are imported where they are used: a second or more, for one script of four.

def c_index(risk, time, event, counts=None):
    """Harrell's C: of all pairs in which one is known to have died first, the share in which that one had the
    higher risk, ties in risk half. (N,) each -> float, 0.5 is chance; nan: no such pair, or a nan in risk.

    counts (n,N): how often each patient is in each of n resamples -> (n,), as bootstrap(c_index, ..) draws
    them, some 50 times as fast: who is drawn w times counts w times in each pair, and copies of one patient
    are never comparable; with the N x N pairs known once, a resample is a product.

    The trap: this takes a RISK, lifelines' concordance_index what promises a long life: the same number is
    concordance_index(time, -risk, event), and a similarity goes in here as c_index(-similarity, ..). The
    wrong sign gives 1 - C, which looks like a weak result, not like a mistake."""
    risk, time, event = to_numpy(risk), to_numpy(time), to_numpy(event) > 0
    weight = np.ones((1, len(time))) if counts is None else counts * 1.0
    right, pairs = np.zeros(len(weight)), np.zeros(len(weight))
    died = np.flatnonzero(event)[:, None]
    for i in np.array_split(died, len(died) // 256 + 1):  # 256 rows of pairs at a time
        later = (time > time[i]) | (time == time[i]) & ~event  # censored on that day: outlived i
        order = (risk < risk[i]) + (risk == risk[i]) / 2
        w = weight[:, i[:, 0]]
        right += (w * (weight @ (later * order).T)).sum(1)
        pairs += (w * (weight @ later.T)).sum(1)
    right[np.isnan(risk).any() | (pairs == 0)] = np.nan
    c = right / np.maximum(pairs, 1)
    return float(c[0]) if counts is None else c


def cox_fit(time, event, covariates):
    """Cox regression (Efron's ties) on {name: (N,)}, each scaled by the mean and SD of these very rows.

    -> (lifelines' fitter, its table, {name: (mean, SD)}). Constant columns have no hazard ratio and are
    dropped; without any other the fitter is None. ValueError, one line: nan in a column, no convergence."""
    import pandas
    from lifelines import CoxPHFitter
    scale, scaled = {}, {}
    for name, x in covariates.items():
        x = to_numpy(x).astype(np.float64)
        if not np.isfinite(x).all():
            raise ValueError(f"cox: {name} is nan or infinite in {(~np.isfinite(x)).sum()} of {len(x)} rows")
        if np.ptp(x) > 1e-12 * abs(x).max():
            scale[name] = x.mean(), x.std()
            scaled[name] = (x - x.mean()) / x.std()
    if not scale:
        return None, None, {}
    rows = pandas.DataFrame({**scaled, "(time)": to_numpy(time), "(event)": to_numpy(event)})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")  # lifelines only warns when Newton's steps have not ended: no result
        try:
            fitter = CoxPHFitter().fit(rows, "(time)", "(event)")
        except ValueError as error:      # its ConvergenceError and numpy's LinAlgError are ValueErrors too
            said = [error]
    if any(isinstance(s, ValueError) or "failed to converge" in str(s.message) for s in said):
        raise ValueError(f"cox: no convergence on {', '.join(scale)} with {int(np.sum(event))} events in "
                         f"{len(rows)} rows: too few events, or columns that repeat or decide each other")
    return fitter, rows, scale


def cox(time, event, covariates):
    """-> {name: {"hr", "ci", "p", "coef", "sd", "ph_p"}} per SD of each of covariates {name: (N,)}.

    hr = exp(coef) with its 95 % Wald interval; coef / sd is per original unit. ph_p: test of proportional
    hazards (scaled Schoenfeld residuals against the rank of time), small = the ratio changes over time.
    Per SD, because the raw unit of a cosine of latents is absurd: all patients lie within 0.95 +- 0.01.
    A constant column is left out. ValueError as cox_fit."""
    from lifelines.statistics import proportional_hazard_test
    fitter, rows, scale = cox_fit(time, event, covariates)
    if not scale:
        return {}
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # one event: 0/0, nan
        warnings.simplefilter("ignore")
        ph = dict(zip(scale, proportional_hazard_test(fitter, rows, time_transform="rank").p_value))
        s = fitter.summary
    return {k: {"hr": float(s["exp(coef)"][k]), "coef": float(s["coef"][k]), "p": float(s["p"][k]),
                "ci": [float(s[f"exp(coef) {end} 95%"][k]) for end in ("lower", "upper")],
                "sd": float(sd), "ph_p": float(ph[k])} for k, (_, sd) in scale.items()}


def cox_risk(time, event, covariates, seed=0, folds=10):
    """Log partial hazard of every patient by a Cox fitted to the others, (N,): a risk, for c_index.

    On its own patients a Cox flatters: three useless columns and 220 patients give C = 0.54 on average. Folds
    are stratified by event. Held-out rows are scaled by mean and SD of the training rows, so 0 is the average
    training patient, nearly the same one in all folds: risks of different folds can be compared. Centred on
    its own mean, a fold that happens to be sicker would lose just that.
    ValueError: fewer than 2 events, or as cox_fit."""
    time, event = to_numpy(time), to_numpy(event) > 0
    covariates = {name: to_numpy(x).astype(np.float64) for name, x in covariates.items()}
    folds = min(folds, int(event.sum()))
    if folds < 2:
        raise ValueError(f"cox_risk: {folds} event, but one must be held out and one trained on")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer censored than folds: some folds have none, no harm
        splits = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(event, event))
    risk = np.zeros(len(time))
    for train, held in splits:
        fitter, _, scale = cox_fit(time[train], event[train], {k: x[train] for k, x in covariates.items()})
        for name, (mean, sd) in scale.items():
            risk[held] += fitter.params_[name] * (covariates[name][held] - mean) / sd
    return risk


def power(hr_per_sd, events):
    """Power of the two-sided 5 % test of a hazard ratio per SD (Schoenfeld 1983): 0.80 at 0.73, 79 events.

    Events count, not patients; a correlation r of the score with age and sex leaves (1 - r^2) of them."""
    return float(norm.cdf(abs(np.log(hr_per_sd)) * np.sqrt(events) - norm.isf(0.025)))


def median_split(score):
    """(N,) -> bool (N,), True above the median. Never a searched cut: the best of all cuts of a useless score
    has a log-rank p < 0.05 in 29 % of cohorts. Ties at the median are False; a constant or nan score: all."""
    score = to_numpy(score)
    return score > np.median(score)


def logrank_p(time, event, high):
    """Log-rank p of the patients in high (N,) bool against the others; nan if one side is empty."""
    from lifelines.statistics import logrank_test
    time, event = to_numpy(time), to_numpy(event)
    if high.all() or not high.any():
        return np.nan
    return float(logrank_test(time[high], time[~high], event[high], event[~high]).p_value)


def ks_p(time, high):
    """Kolmogorov-Smirnov p of the OBSERVED times of the two sides; nan if one is empty.

    It IGNORES CENSORING: sides with the same survival, followed for unequal spans, are "significant". Here
    because the paper reports KS tests (of which groups is not known); logrank_p is the one to believe."""
    time = to_numpy(time)
    return float(ks_2samp(time[high], time[~high]).pvalue) if high.any() and not high.all() else np.nan


def sex_code(sex):
    """Labels (N,), "" is missing -> (N,) for a Cox: 1 for the most frequent label (the first by alphabet, if
    equal), 0 for any other. Missing rows get the mean of the known ones: they stay, and say nothing about
    sex. One label only, or none: constant, which cox drops."""
    sex = np.asarray(sex).astype(str)
    known = sex != ""
    if not known.any():
        return np.zeros(len(sex))
    labels, count = np.unique(sex[known], return_counts=True)
    most = sex == labels[np.argmax(count)]
    return np.where(known, most, most[known].mean())


def survival_numbers(scores, time, event, age, sex, seed=0):
    """How well each of scores {name, "" is ours: (N,), higher = healthier} foretells survival; row = patient.

    age (N,) in years, sex (N,) as in sex_code. -> metrics, KEY for ours and KEY.NAME for the others:
    hr_per_sd, hr_p, ph_p (Cox of score, age, sex); hr_alone, hr_alone_p (Cox of the score: nearer to 1, even
    if age and score are unrelated); c_index (Cox of score, age, sex, out of fold); c_index_alone (the score
    itself, nothing fitted); logrank_p, ks_p (halves at the median; ks_p IGNORES CENSORING). NAME age_sex: the
    Cox without a score. c_index_gain: ours minus age_sex, c_index_gain.NAME: ours minus NAME, both on the
    same resamples. events; power (that these give at the paper's HR of 0.73 per SD).
    Intervals: Wald for HRs, else bootstrap over patients, whose risks stay as they are (nothing is refitted).
    A fit that fails, or a nan in a score: nan and a warning. What time, event and age hold is data.py's to
    check, and the script's that there are events."""
    time, event = to_numpy(time).astype(np.float64), to_numpy(event)
    scores = {name: to_numpy(x).astype(np.float64) for name, x in scores.items()}
    base = {"age": to_numpy(age).astype(np.float64), "sex": sex_code(sex)}
    n, out, draws = len(time), {}, {}
    rng = np.random.default_rng(0)  # the same resamples for all: differences are paired
    counts = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(1000)])
    def attempt(function, covariates, otherwise, **options):
        try:
            return function(time, event, covariates, **options)
        except ValueError as error:  # a rival that cannot be fitted must not take the others with it
            warnings.warn(f"survival{dot}: {error}")
            return otherwise

    def interval(value, draws):
        draws = draws[~np.isnan(draws)]
        return row(value, np.percentile(draws, [2.5, 97.5]) if len(draws) else (np.nan, np.nan), n)

    failed = {"hr": np.nan, "ci": [np.nan, np.nan], "p": np.nan, "ph_p": np.nan}
    for name, score in tqdm({**scores, "age_sex": None}.items(), "evaluate: survival", unit="score"):
        dot = f".{name}" if name else ""
        covariates = base if score is None else {"score": score, **base}
        fitted = attempt(cox_risk, covariates, np.full(n, np.nan), seed=seed)
        for key, risk in {"c_index": fitted, "c_index_alone": fitted if score is None else -score}.items():
            draws[key + dot] = c_index(risk, time, event, counts)
            out[key + dot] = interval(c_index(risk, time, event), draws[key + dot])
        if score is None:
            continue
        adjusted = attempt(cox, covariates, {}).get("score", failed)
        alone = attempt(cox, {"score": score}, {}).get("score", failed)
        high = median_split(score)
        out["hr_per_sd" + dot] = row(adjusted["hr"], adjusted["ci"], n, better="lower")
        out["hr_alone" + dot] = row(alone["hr"], alone["ci"], n, better="lower")
        out["ph_p" + dot] = row(adjusted["ph_p"], n=n)
        for key, p in {"hr_p": adjusted["p"], "hr_alone_p": alone["p"], "ks_p": ks_p(time, high),
                       "logrank_p": logrank_p(time, event, high)}.items():
            out[key + dot] = row(p, n=n, better="lower")
    for name in ("age_sex", *filter(None, scores)) if "" in scores else ():
        gain = out["c_index"]["value"] - out[f"c_index.{name}"]["value"]
        key = "c_index_gain" if name == "age_sex" else f"c_index_gain.{name}"
        out[key] = interval(gain, draws["c_index"] - draws[f"c_index.{name}"])
    out["events"], out["power"] = row(event.sum(), n=n), row(power(0.73, event.sum()), n=n)
    return out


def survival_curves(path, time, event, score, caption):
    """Writes a PNG: Kaplan-Meier curves of the halves of score (N,) (higher = healthier) with 95 % bands,
    a tick for every censored patient, how many are still at risk below, log-rank p in the legend."""
    from lifelines import KaplanMeierFitter
    from matplotlib.figure import Figure
    time, event, high = to_numpy(time).astype(np.float64), to_numpy(event) > 0, median_split(score)
    figure = Figure(figsize=(7, 5.2), layout="constrained")
    axis, below = figure.subplots(2, 1, height_ratios=[7, 1])
    halves = [("more similar to healthy", high, "#0072B2", "-"), ("less similar", ~high, "#D55E00", "--")]
    halves = [h for h in halves if h[1].any()]  # a constant score has one
    for label, half, color, style in halves:
        label = f"{label}: {half.sum()} patients, {event[half].sum()} events"
        KaplanMeierFitter(label=label).fit(time[half], event[half]).plot_survival_function(
            ax=axis, color=color, linestyle=style, show_censors=True, censor_styles={"marker": "|", "ms": 6})
    p = number(logrank_p(time, event, high))
    axis.set(ylim=(0, 1.02), xlim=(0, None), xlabel="days", ylabel="event-free share (Kaplan-Meier)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9, title=f"halves at the median, log-rank p = {p}")
    axis.secondary_xaxis("top", (lambda days: days / 365.25, lambda y: y * 365.25)).set_xlabel("years")
    for t in axis.get_xticks():
        for y, (_, half, color, _) in enumerate(halves):
            if t <= axis.get_xlim()[1]:
                below.text(t, -y, (time[half] >= t).sum(), color=color, ha="center", va="center", fontsize=9)
    below.set(xlim=axis.get_xlim(), ylim=(0.6 - len(halves), 0.6), xticks=[], yticks=[])
    below.set_ylabel("at risk", rotation=0, ha="right", va="center", labelpad=16)
    below.spines[:].set_visible(False)
    save_figure(path, figure, caption)


def scatter(path, x, y, groups, xlabel, ylabel, caption):
    """Writes a PNG: y over x (N,) each, coloured by groups {label: (N,) bool}."""
    from matplotlib.figure import Figure
    x, y = to_numpy(x), to_numpy(y)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    colors = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito: safe if colour-blind
    for i, (label, rows) in enumerate(groups.items()):
        axis.scatter(x[rows], y[rows], s=16, color=colors[i % 5], marker="osD^v"[i % 5], alpha=0.6,
                     linewidth=0, label=f"{label} ({np.sum(rows)})")
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    save_figure(path, figure, caption)


def save_figure(path, figure, caption):
    """Matplotlib figure -> PNG, with the caption above it."""
    figure.suptitle("\n".join(textwrap.wrap(caption, 95)), fontsize=10, x=0.01, ha="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Description": caption})
    write_atomically(path, buffer.getvalue())


# ------------------------------------------------------------------------------------------------------------
# Rows that need no training, or little.

def evenly(rows, n):
    """At most n of the rows, evenly spaced, the first and the last among them. -> array"""
    at = np.linspace(0, len(rows) - 1, min(n, len(rows)))
    return np.asarray(rows)[at.round().astype(int)]


def other_subject(subject):
    """For each row a row of another subject, about half the list away. (N,) -> (N,) int

    A row gets itself if there is only one subject."""
    n = len(subject)
    far = n // 2 + np.arange(n)
    return np.array([next((j for j in (i + far) % n if subject[j] != subject[i]), i) for i in range(n)])


def pca(z_dim, x_train):
    """PCA of the flattened training images, of the code's dimension: min(z_dim, N - 1, pixels) components."""
    x = to_numpy(x_train).reshape(len(x_train), -1).astype(np.float32)
    return PCA(min(z_dim, len(x) - 1, x.shape[1]), random_state=0).fit(x)


def pca_sample(data, train):
    """The images data.image[train] in [0,1], float32: at most 5,000 of them, and at most 1 GB."""
    pixels = int(np.prod(data.image.shape[1:]))
    return data.image[evenly(train, min(5000, max(2, 2 ** 28 // pixels)))] / np.float32(255)


def pca_codes(data, train, z_dim):
    """The PCA codes of all images, (N,*S) -> (N,k). The PCA is fitted to at most 5,000 training rows."""
    model = pca(z_dim, pca_sample(data, train))
    chunks = np.array_split(np.arange(len(data.image)), len(data.image) // 256 + 1)
    return np.concatenate([model.transform(data.image[rows].reshape(len(rows), -1) / np.float32(255))
                           for rows in chunks])


def trivial_images(data, train, test, z_dim):
    """Stand-ins for the images data.image[test]. -> {"constant", "copy", "pca": (len(test),*S) in [0,1]}

    constant: the mean training image, the best squared error without looking. copy: the nearest other row of
    the same subject, the earlier of two; black if it has no other. pca: the reconstruction from z_dim numbers."""
    near = []
    for i in test:
        rest = np.setdiff1d(np.flatnonzero(data.subject == data.subject[i]), i)
        near.append(rest[np.argmin(abs(rest - i))] if len(rest) else -1)
    copy = data.image[np.maximum(near, 0)] / 255
    copy[np.less(near, 0)] = 0
    some = pca_sample(data, train)
    model = pca(z_dim, some)
    flat = data.image[test].reshape(len(test), -1) / np.float32(255)
    return {"constant": np.broadcast_to(some.mean(0), copy.shape), "copy": copy,
            "pca": model.inverse_transform(model.transform(flat)).reshape(copy.shape).clip(0, 1)}


# ------------------------------------------------------------------------------------------------------------
# results.json and the table that ends a run.

def row(value, ci=(np.nan, np.nan), n=0, unit="", better="higher"):
    """One entry of results.json's "metrics"; row(**bootstrap(...), better="lower") is the usual call."""
    if better not in ("higher", "lower"):
        raise ValueError(f'row: better is "higher" or "lower", not {better!r}')
    return {"value": float(value), "ci": [float(c) for c in ci], "n": int(n), "unit": unit, "better": better}


def row_of(statistic, subject, *arrays, unit="", better="higher"):
    """row() of a statistic with its bootstrap interval over subjects."""
    return row(**bootstrap(statistic, subject, *arrays), unit=unit, better=better)


def to_image(x):
    """Tensor (B,1,*S) in [-1,1] -> numpy (B,*S) in [0,1], clipped."""
    return ((to_numpy(x[:, 0].float()) + 1) / 2).clip(0, 1)


def image_numbers(key, images, real, subject):
    """SSIM and MSE of images {row name, "" is ours: (N,*S) in [0,1]} against real (N,*S).

    -> {KEY_ssim[.NAME], KEY_mse[.NAME]: row(..)}"""
    out = {}
    for name, x in images.items():
        dot = f".{name}" if name else ""
        out[f"{key}_ssim{dot}"] = row_of(np.mean, subject, ssim(real, x))
        out[f"{key}_mse{dot}"] = row_of(np.mean, subject, mse(real, x), better="lower")
    return out


def probe_numbers(codes, y, part, subject, seed=0):
    """Reads y (N,) from each of the codes {row name, "" is ours: (N,d)} by a linear probe of training rows.

    y in {0,1}: probe_auroc, _f1, _precision, _recall of rows (the threshold is from validation rows) and
    patient_auroc. Other y: probe_r2, _mae, _rmse. probe_auroc_gain.NAME, probe_r2_gain.NAME: ours minus that
    row. Rows with y nan are left out.
    -> (metrics, the fitted probe of codes[""]). ValueError if training or test rows cannot answer."""
    y = to_numpy(y).astype(np.float64)
    train, val, test = (np.flatnonzero((part == p) & ~np.isnan(y)) for p in ("train", "val", "test"))
    if not len(test):
        raise ValueError("no test row has a value")
    if len(np.unique(y[train])) < 2:
        raise ValueError("the training rows have one value only")
    task = "class" if set(np.unique(y[train])) == {0, 1} else "regression"
    who, truth = subject[test], y[test]
    out, fitted, scores = {}, {}, {}
    for name, z in tqdm(codes.items(), "evaluate: probes", unit="code"):
        dot = f".{name}" if name else ""
        fitted[name] = probe(task, z[train], y[train], subject[train], seed)
        if task == "regression":
            scores[name] = fitted[name].predict(to_numpy(z[test]).astype(np.float64))
            for k, better in (("r2", "higher"), ("mae", "lower"), ("rmse", "lower")):
                out[f"probe_{k}{dot}"] = row_of(lambda p, t: regression(p, t)[k], who, scores[name], truth,
                                                better=better)
            continue
        scores[name] = logits(fitted[name], z[test])
        cut = threshold_f1(logits(fitted[name], z[val]), y[val]) if len(val) else 0.0
        out[f"probe_auroc{dot}"] = row_of(auroc, who, scores[name], truth)
        out[f"patient_auroc{dot}"] = row_of(auroc, np.unique(who), *patient_level(scores[name], who, truth))
        for k in ("f1", "precision", "recall"):
            out[f"probe_{k}{dot}"] = row_of(lambda s, t: classify(s, t, cut)[k], who, scores[name], truth)
    if task == "regression":
        key, statistic = "probe_r2", lambda p, t: regression(p, t)["r2"]
        mean = np.full(len(truth), y[train].mean())
        for k in ("r2", "mae", "rmse"):
            out[f"probe_{k}.mean"] = row_of(lambda p, t: regression(p, t)[k], who, mean, truth,
                                            better=out[f"probe_{k}"]["better"])
    else:
        key, statistic = "probe_auroc", auroc
        for k in ("f1", "precision", "recall"):
            out[f"probe_{k}.all_positive"] = row_of(lambda t: classify(0 * t, t, 0)[k], who, truth)
    for name in filter(None, scores):      # of a difference, the interval of the difference
        gain = lambda a, b, t: statistic(a, t) - statistic(b, t)
        out[f"{key}_gain.{name}"] = row_of(gain, who, scores[""], scores[name], truth)
    return out, fitted[""]


def factor_numbers(codes, columns, part, subject, seed=0):
    """R2 of a linear probe of every known factor_NAME of a phantom, for each of the codes (as above)."""
    train, test, out = np.flatnonzero(part == "train"), np.flatnonzero(part == "test"), {}
    for name in sorted(k for k in columns if k.startswith("factor_")):
        for code, z in codes.items():
            y = columns[name]
            known = [rows[~np.isnan(y[rows].astype(float))] for rows in (train, test)]
            if min(map(len, known)) < 2:
                continue
            fitted = probe("regression", z[known[0]], y[known[0]], subject[known[0]], seed)
            guess, y, who = fitted.predict(z[known[1]]), y[known[1]], subject[known[1]]
            key = f"factor_r2_{name.removeprefix('factor_')}" + (f".{code}" if code else "")
            out[key] = row_of(lambda p, t: regression(p, t)["r2"], who, guess, y)
    return out


def brain_age_gap(codes, age, train, rows, subject):
    """Age as read from codes (N,k) by a ridge fit to the healthy `train` rows, minus the true one, (N,).

    Such a guess falls towards the mean age, so the gap falls with age: the line of gap on age over `rows`,
    held-out healthy, is taken off (de Lange & Cole 2020). -> (predict(codes) -> ages, gap)"""
    model = probe("regression", codes[train], age[train], subject[train])
    gap = model.predict(codes) - age
    return model.predict, gap - np.polyval(np.polyfit(age[rows], gap[rows], 1), age)


def write_atomically(path, data):
    """bytes -> file; a crash or a full disk leaves the old file or the new one, never half of one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())  # else the rename can reach the disk before the bytes do
        os.replace(temporary, path)
    except OSError as e:
        e.filename = str(path)  # a full disk has no name of its own
        raise
    finally:
        temporary.unlink(missing_ok=True)


def lock(out):
    """Makes the folder `out` and refuses a second run in it. -> the lock's file: keep it until the run ends.

    The kernel drops the lock when the process ends, however it ends. Windows has no such lock."""
    safe = getattr(os, "O_NOFOLLOW", 0)  # a link at OUT/.lock must not lead to another file
    try:
        os.makedirs(out, exist_ok=True)
        file = open(Path(out, ".lock"), "ab+", 0, opener=lambda path, flags: os.open(path, flags | safe, 0o644))
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


def log_line(path, row):
    """Appends a dict to a log as one line of JSON."""
    with D.writing(path), open(path, "a") as f:
        f.write(json.dumps(row) + "\n")


def read_log(path):
    """The records of a log in order of their step -> list of dicts; [] if there is no such file.

    A broken line (the run was killed) and a foreign one are skipped. A step that was done twice, as a
    killed run does when it resumes, counts as it was done last."""
    rows = {}
    for line in Path(path).read_bytes().splitlines() if Path(path).exists() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            rows[record["step"]] = record
    return [rows[step] for step in sorted(rows)]


def save_results(path, script, data, n, seconds, config, metrics, device="cpu"):
    """Writes results.json: what was measured, on what, by which commit. n, config, metrics: dicts.

    metrics: key -> row(...). device: "cpu", "mps", "cuda" (the card's name is added). Strict JSON, atomic."""
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).resolve().parent,
                             capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        git = ""  # no git on this machine: the results are still worth having
    device = str(device)
    if device.startswith("cuda"):
        device += f" ({torch.cuda.get_device_name(device)})"
    results = {"script": script, "data": data, "n": n, "seconds": seconds, "device": device,
               "torch": torch.__version__, "git": git, "config": config, "metrics": metrics}
    # Numbers of numpy become Python's, paths text; then nan and inf, which strict JSON does not know, null.
    text = json.dumps(results, default=lambda v: v.item() if isinstance(v, np.generic) else str(v))
    results = json.loads(text, parse_constant=lambda constant: None)
    write_atomically(path, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())


def number(v):
    """-> text: 3 decimals around 1, fewer for large, 2 significant digits for tiny; "-" for None, nan."""
    if v is None or isinstance(v, str):
        return v or "-"
    if not np.isfinite(v):
        return "-"
    if v == 0 or 0.01 <= abs(v) < 10:
        return f"{v:.3f}"
    return f"{v:.2g}" if abs(v) < 0.01 else f"{v:.1f}" if abs(v) < 1000 else f"{v:.0f}"


def cell(m):
    """A row(..) -> its number and its interval, if it has one, as text. None: ""."""
    if not m:
        return ""
    low, high = (number(c) for c in m.get("ci", (None, None)))
    return number(m.get("value")) + ("" if low == high == "-" else f" [{low}, {high}]")


def table(metrics, shown, rows, width=100):
    """The table that ends a run: one line per row, one column per key, each value with its interval.

    metrics: KEY and KEY.ROW -> row(..). shown: {key: name in words}. rows: {row name, "" is ours: words}.
    Columns beyond `width` continue in a block below. A row that has none of a block's keys is left out."""
    find = lambda key, name: metrics.get(f"{key}.{name}" if name else key)
    columns = []
    for key, words in shown.items():
        have = [m for m in (find(key, name) for name in rows) if m]
        if have:
            unit = f" ({have[0]['unit']})" if have[0]["unit"] else ""
            arrow = "↓" if have[0]["better"] == "lower" else "↑"
            columns.append((textwrap.wrap(f"{words}{unit} {arrow}", 22), {name: cell(find(key, name)) for name in rows}))
    left = max(map(len, rows.values()))
    per_block = max(1, (width - left) // 24)
    lines = []
    for i in range(0, len(columns), per_block):
        block = columns[i:i + per_block]
        for k in range(max(len(head) for head, _ in block)):
            lines.append([""] + [head[k] if k < len(head) else "" for head, _ in block])
        for name, words in rows.items():
            cells = [texts[name] for _, texts in block]
            if any(cells):
                lines.append([words] + [text or "-" for text in cells])
        lines.append([])
    text = "\n".join("  ".join(t.ljust(22 if k else left) for k, t in enumerate(line)).rstrip() for line in lines)
    n = [m["n"] for key in shown for m in [metrics.get(key)] if m and m["n"]]
    return f"{text}\n[ ]: 95 % interval over {min(n, default=0)} subjects. ↑ higher is better, ↓ lower is better."


def answer(question, name, ours, other, gain, unit="patients"):
    """One sentence that ends a run: the question, both numbers, their difference and what it says.

    ours, other, gain: row(..); gain is ours minus other. yes or no if its interval excludes 0."""
    low, high = gain["ci"] if gain["better"] == "higher" else (-gain["ci"][1], -gain["ci"][0])
    verdict = "yes" if low > 0 else "no" if high < 0 else "undecided"
    plus = "+" if gain["value"] > 0 else ""
    return (f"{question} {name} {number(ours['value'])} against {number(other['value'])}, "
            f"{plus}{cell(gain)}, {gain['n']} {unit}: {verdict}.")


# ------------------------------------------------------------------------------------------------------------
# Figures.

def grid(path, rows, row_labels, col_labels, caption):
    """Writes a labelled PNG. rows: lists of (H,W) or (H,W,3) images in [0,1] of one size; None leaves a gap.

    Each pixel becomes so many equal ones that a cell is 96 wide or more (smoothing would flatter the model).
    Labels (or None) and caption: Latin letters, wrapped. -> (width, height)."""
    cells = [[None if x is None else to_numpy(x) for x in r] for r in rows]
    h, w = next(x.shape[:2] for r in cells for x in r if x is not None)
    scale = -(-96 // min(h, w))  # rounded up
    h, w, gap, line = h * scale, w * scale, 4, 17
    font = ImageFont.load_default(size=13)
    wrap = lambda text, pixels: textwrap.fill(str(text), max(pixels // 7, 1), break_long_words=False)
    row_labels, col_labels = [wrap(t, 150) for t in row_labels or ()], [wrap(t, w) for t in col_labels or ()]
    left = gap + max((int(font.getlength(t)) + 8 for t in "\n".join(row_labels).split("\n") if t), default=0)
    width = max(left + max(map(len, cells)) * (w + gap), 420)  # a caption needs some room
    note = PngInfo()  # for programs: train.py's report
    note.add_itxt("Description", caption)
    caption = wrap(caption, width - 2 * gap)
    top = 2 * gap + line * (caption.count("\n") + 1)
    first = top + gap + line * max((t.count("\n") + 1 for t in col_labels), default=0)
    picture = Image.new("RGB", (width, first + len(cells) * (h + gap)), "white")
    write = ImageDraw.Draw(picture).multiline_text
    write((gap, gap), caption, "black", font)
    for j, text in enumerate(col_labels):
        write((left + j * (w + gap), top), text, "black", font)
    for i, text in enumerate(row_labels):
        write((gap, first + i * (h + gap)), text, "black", font)
    for i, images in enumerate(cells):
        for j, x in enumerate(images):
            if x is not None:
                x = np.rint(np.nan_to_num(x).clip(0, 1) * 255).astype(np.uint8)
                x = Image.fromarray(x.repeat(scale, 0).repeat(scale, 1)).convert("RGB")
                picture.paste(x, (left + j * (w + gap), first + i * (h + gap)))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=note)
    write_atomically(path, buffer.getvalue())
    return picture.size


def curves(path, logs, keys=("loss", "z_gap")):
    """Writes a PNG, one panel per key: every log's value over step (log axis), raw and as a running mean.

    logs: {label: path of a log.jsonl}. Keys in no record are left out. Nothing to draw: no file."""
    from matplotlib.ticker import LogLocator, NullFormatter
    from matplotlib.figure import Figure  # slow to import, used only here; without pyplot: no display needed

    read = {label: read_log(log) for label, log in logs.items()}
    keys = [k for k in keys if any(k in r for log in read.values() for r in log)]
    if not keys:
        return
    figure = Figure(figsize=(5.5 * len(keys), 3.6), layout="constrained")
    for axis, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys):
        for color, (label, log) in enumerate(read.items()):
            points = [(r["step"] + 1, r[key]) for r in log if isinstance(r.get(key), (int, float))]
            if not points:
                continue
            step, value = np.array(points, dtype=np.float64).T
            k = max(1, len(value) // 25)  # the diffusion loss of a batch is mostly the luck of its t
            mean = np.convolve(value, np.ones(k) / k, "valid")
            axis.plot(step, value, color=f"C{color}", alpha=0.25, linewidth=0.8)
            axis.plot(step[k - 1:], mean, color=f"C{color}", label=label)
        axis.set(xscale="log", xlabel="step", title=key)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    save_figure(path, figure, "Training: " + ", ".join(keys) + " over steps, raw and as a running mean.")
