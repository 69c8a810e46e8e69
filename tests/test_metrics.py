"""metrics.py against oracles: scikit-image, scikit-learn, closed forms, brute force, planted truth."""
import itertools
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity
from sklearn.metrics import f1_score, precision_score, recall_score, roc_auc_score

import metrics as M


def smooth(shape, seed):
    """Images with structure, (N,*S) in [0,1]: blurred noise, scaled to its range."""
    from scipy.ndimage import gaussian_filter
    x = np.random.default_rng(seed).normal(size=shape)
    x = np.stack([gaussian_filter(v, 2.5) for v in x])
    return (x - x.min()) / (x.max() - x.min())


# Images

@pytest.mark.parametrize("shape", [(3, 40, 33), (2, 20, 24, 17)])
@pytest.mark.parametrize("window", ["gaussian", "uniform7"])
@pytest.mark.parametrize("kind", ["random", "real-like", "dark"])
def test_ssim_wang_eq13_equals_skimage(shape, window, kind):
    rng = np.random.default_rng(0)
    a = rng.random(shape) if kind == "random" else smooth(shape, 1) * (0.02 if kind == "dark" else 1)
    b = np.clip(a + 0.1 * rng.normal(size=shape), 0, 1)
    wang = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    options = wang if window == "gaussian" else {}
    expected = [structural_similarity(x, y, data_range=1, **options) for x, y in zip(a, b)]
    ours = M.ssim(a, b, window)
    assert ours.shape == (shape[0],) and ours.dtype == np.float64
    assert np.abs(ours - expected).max() < 1e-6
    tensors = torch.as_tensor(a)[:, None], torch.as_tensor(b)[:, None]  # with a channel axis
    assert np.array_equal(M.ssim(*tensors, window), ours)


def test_ssim_float32_input_many_images_and_symmetry():
    a = torch.rand(70, 1, 32, 32, generator=torch.Generator().manual_seed(0))  # more images than one chunk
    b = (a + 0.2 * torch.rand(a.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    one_by_one = np.concatenate([M.ssim(x[None], y[None]) for x, y in zip(a, b)])
    assert np.abs(M.ssim(a, b) - one_by_one).max() < 1e-12
    assert np.abs(M.ssim(a, b) - M.ssim(b, a)).max() < 1e-12


def test_ssim_identity_and_constants():
    x = smooth((2, 30, 30), 0)
    assert np.abs(M.ssim(x, x) - 1).max() < 1e-9
    p, q = np.full((1, 16, 16), 0.2), np.full((1, 16, 16), 0.7)  # no structure: the luminance term alone
    luminance = (2 * 0.2 * 0.7 + 1e-4) / (0.2 ** 2 + 0.7 ** 2 + 1e-4)
    for window in ("gaussian", "uniform7"):
        assert abs(M.ssim(p, q, window)[0] - luminance) < 1e-6


def test_a_constant_image_scores_high_ssim():
    """Why every table has a `constant` row: on a mostly dark image, a flat one is a good 'reconstruction'."""
    x = np.zeros((1, 64, 64))
    x[0, 24:40, 24:40] = smooth((1, 16, 16), 0)[0]
    assert M.ssim(x, np.zeros_like(x))[0] > 0.5


@pytest.mark.parametrize("a, b", [
    (np.zeros((1, 10, 30)), np.zeros((1, 10, 30))),  # smaller than the window
    (np.zeros((1, 30, 30)), np.zeros((1, 30, 31))),
    (np.zeros((30, 30)), np.zeros((30, 30))),
    (np.linspace(-1, 1, 900).reshape(1, 30, 30), np.zeros((1, 30, 30))),  # the wrong range
    (np.zeros((1, 30, 30), np.uint8), np.full((1, 30, 30), 255, np.uint8)),
])
def test_ssim_refuses(a, b):
    with pytest.raises(ValueError) as error:
        M.ssim(a, b)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError):
        M.ssim(np.zeros((1, 30, 30)), np.zeros((1, 30, 30)), "box")


def test_mse_psnr_nmse_closed_forms():
    x = smooth((3, 20, 22), 0)
    at_mean, zero = np.broadcast_to(x.mean((1, 2), keepdims=True), x.shape), np.zeros_like(x)
    assert np.abs(M.nmse(x, at_mean) - 1).max() < 1e-9
    assert np.abs(M.nmse_fastmri(x, zero) - 1).max() < 1e-9
    assert np.abs(M.nmse(x, zero) - (x ** 2).mean((1, 2)) / x.var((1, 2))).max() < 1e-9
    assert np.abs(M.mse(x, x + 0.1) - 0.01).max() < 1e-9
    assert np.abs(M.psnr(x, x + 0.1) - 20).max() < 1e-6
    assert np.isposinf(M.psnr(x, x)).all()
    volumes = smooth((2, 8, 9, 10), 1)  # 3D, and a tensor with a channel
    assert np.allclose(M.mse(torch.as_tensor(volumes)[:, None], torch.zeros(2, 1, 8, 9, 10)),
                       (volumes ** 2).mean((1, 2, 3)))


# Bootstrap

def test_bootstrap_resamples_whole_subjects():
    subject = np.array(["b", "a", "b", "c", "a", "b"])
    rows = {s: set(np.flatnonzero(subject == s)) for s in "abc"}
    seen = []

    def spy(index):
        seen.append(index)
        return 0.0
    result = M.bootstrap(spy, subject, np.arange(6), n=300)
    assert result["n"] == 3 and len(seen) == 301
    for index in seen:
        counts = np.bincount(index, minlength=6)
        for s in "abc":
            assert len({counts[i] for i in rows[s]}) == 1  # all rows of a subject, equally often
        assert sum(counts[min(rows[s])] for s in "abc") == 3  # three subjects drawn
    assert any(len(set(subject[i])) == 1 for i in seen)  # with replacement


def test_bootstrap_matches_every_resample():
    """With 4 subjects all 4^4 resamples can be written down: the interval is theirs."""
    subject, x = np.array([0, 0, 1, 2, 2, 2, 3]), np.array([.1, .2, .9, .4, .5, .3, .7])
    draws = itertools.product(range(4), repeat=4)
    every = [np.concatenate([x[subject == s] for s in draw]).mean() for draw in draws]
    result = M.bootstrap(np.mean, subject, x, n=20000)
    assert result["value"] == x.mean()
    assert np.abs(np.array(result["ci"]) - np.percentile(every, [2.5, 97.5])).max() < 0.01


def test_bootstrap_is_wider_over_subjects_than_over_rows():
    rng = np.random.default_rng(0)
    subject = np.repeat(np.arange(40), 7)
    x = rng.normal(size=40)[subject] + 0.1 * rng.normal(size=280)  # slices of a patient are alike
    width = [np.diff(M.bootstrap(np.mean, s, x)["ci"])[0] for s in (subject, np.arange(280))]
    assert width[0] > 2 * width[1]


def test_bootstrap_covers_the_mean():
    rng = np.random.default_rng(0)
    subject, hits = np.repeat(np.arange(40), 4), 0
    for seed in range(200):
        x = rng.normal(size=40)[subject] + 0.5 * rng.normal(size=160)
        low, high = M.bootstrap(np.mean, subject, x, n=300, seed=seed)["ci"]
        hits += low <= 0 <= high
    assert 0.90 <= hits / 200 <= 0.985  # 95 % +- about 3 standard errors


def test_bootstrap_deterministic_fast_and_degenerate_cases():
    import time
    x, subject = np.random.default_rng(0).random(100), np.arange(100)
    began = time.perf_counter()
    first = M.bootstrap(np.mean, subject, torch.as_tensor(x))
    assert time.perf_counter() - began < 0.5
    assert first == M.bootstrap(np.mean, subject, x) != M.bootstrap(np.mean, subject, x, seed=1)
    assert np.isnan(M.bootstrap(np.mean, ["a", "a"], [1.0, 2.0])["ci"]).all()  # one subject: no interval
    y = np.r_[1, np.zeros(5)]  # a third of the resamples have no positive: left out
    assert np.isfinite(M.bootstrap(M.auroc, np.arange(6), np.arange(6.0), y)["ci"]).all()
    assert np.isnan(M.bootstrap(M.auroc, np.arange(6), np.arange(6.0), y * 0)["value"])
    with pytest.raises(ValueError):
        M.bootstrap(np.mean, subject, x[:50])


# Classification and regression

def test_auroc_counts_pairs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        score, y = rng.integers(0, 6, 40).astype(float), rng.integers(0, 2, 40)  # many ties
        pairs = [(p > n) + 0.5 * (p == n) for p in score[y == 1] for n in score[y == 0]]
        assert abs(M.auroc(score, y) - np.mean(pairs)) < 1e-12
        assert abs(M.auroc(score, y) - roc_auc_score(y, score)) < 1e-12
    assert M.auroc([1, 2, 3], [0, 0, 1]) == 1 and M.auroc([1, 1, 1], [0, 0, 1]) == 0.5
    assert np.isnan(M.auroc([1, 2], [1, 1]))


def test_classify_equals_sklearn_and_all_positive_f1():
    rng = np.random.default_rng(0)
    score, y = rng.normal(size=50), rng.integers(0, 2, 50)
    ours, called = M.classify(score, y, 0.3), score >= 0.3
    for name, theirs in [("f1", f1_score), ("precision", precision_score), ("recall", recall_score)]:
        assert abs(ours[name] - theirs(y, called)) < 1e-12
    assert ours["accuracy"] == np.mean(called == y)
    y = np.r_[np.ones(67), np.zeros(33)]  # EMIDEC's 67 / 33
    p = 0.67
    assert abs(M.classify(np.zeros(100), y, 0)["f1"] - 2 * p / (1 + p)) < 1e-12
    nobody = M.classify(np.zeros(4), np.zeros(4), 1)
    assert np.isnan(nobody["f1"]) and nobody["accuracy"] == 1


def test_threshold_f1_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(30):
        score, y = rng.integers(-8, 8, 25) / 4, rng.integers(0, 2, 25)
        every = [-9, *(np.unique(score) - 1e-9), 9]
        best = max(f1_score(y, score >= c, zero_division=0) for c in every)
        cut = M.threshold_f1(score, y)
        assert abs(M.classify(score, y, cut)["f1"] - best) < 1e-12
        assert cut not in score  # between two scores, not on one
    assert M.threshold_f1([1, 2, 3, 4], [0, 0, 1, 1]) == 2.5
    assert M.threshold_f1([1, 2], [1, 1]) == -np.inf  # all positive
    assert M.threshold_f1([1, 2], [0, 0]) == 0
    # Tie: calling 2 or 4 of 4 rows positive both give F1 = 2/3; 2 is nearer to the true 2.
    score, y = np.array([4.0, 3.0, 2.0, 1.0]), np.array([1, 0, 0, 1])
    assert M.classify(score, y, -np.inf)["f1"] == pytest.approx(2 / 3)
    assert M.classify(score, y, 3.5)["f1"] == pytest.approx(2 / 3) and M.threshold_f1(score, y) == 3.5


def test_patient_level_by_hand():
    logit, y = M.patient_level([1.0, -4.0, 3.0, 0.0, 2.0], ["b", "a", "b", "c", "a"], [0, 0, 1, 0, 0])
    assert logit.tolist() == [-1.0, 2.0, 0.0] and y.tolist() == [0, 1, 0]  # a, b, c


def test_regression_by_hand():
    r = M.regression([1.0, 2.0, 5.0], [1.0, 3.0, 5.0])
    assert r["mae"] == pytest.approx(1 / 3) and r["rmse"] == pytest.approx(3 ** -0.5)
    assert r["r2"] == pytest.approx(1 - 1 / 8)
    assert M.regression([3.0] * 3, [1.0, 3.0, 5.0])["r2"] == 0  # the mean predictor
    assert np.isnan(M.regression([1.0], [1.0])["r2"])


# Probes

def cohort(subjects=50, slices=7, d=32, seed=0):
    """z (N,d) with a subject part and a slice part, subject (N,)."""
    rng = np.random.default_rng(seed)
    subject = np.repeat(np.arange(subjects), slices)
    return rng.normal(size=(subjects, d))[subject] + rng.normal(size=(len(subject), d)), subject, rng


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_probe_finds_what_is_there(kind):
    z, subject, rng = cohort()
    u = rng.normal(size=32)
    y, age = (z @ u > 0).astype(int), 60 + 2 * (z @ u)
    train = subject < 30
    model = M.probe(kind, "class", z[train], y[train], subject[train])
    assert M.auroc(M.logits(model, z[~train]), y[~train]) > 0.9
    assert np.array_equal(M.logits(model, torch.as_tensor(z)), M.logits(model, z))
    again = M.probe(kind, "class", z[train], y[train], subject[train])
    assert np.array_equal(M.logits(again, z), M.logits(model, z))  # deterministic
    model = M.probe(kind, "regression", z[train], age[train], subject[train])
    assert M.regression(model.predict(z[~train]), age[~train])["r2"] > 0.8


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_probe_of_useless_features_is_at_chance(kind):
    scores = []
    for seed in range(3):
        z, subject, rng = cohort(subjects=120, slices=5, seed=seed)
        y = rng.integers(0, 2, 120)[subject]
        train = subject < 60
        model = M.probe(kind, "class", z[train], y[train], subject[train])
        scores.append(M.auroc(M.logits(model, z[~train]), y[~train]))
    assert abs(np.mean(scores) - 0.5) < 0.1


def test_folds_by_row_would_choose_a_probe_that_knows_patients_by_heart(monkeypatch):
    """Each subject is recognisable and its label a coin. Held-out subjects say so; held-out rows do not."""
    z, subject, rng = cohort(subjects=60, slices=7, d=64)
    y = rng.integers(0, 2, 60)[subject]
    by_subject = M.probe("linear", "class", z, y, subject)
    real = M.subject_folds
    monkeypatch.setattr(M, "subject_folds", lambda task, y, _, seed: real(task, y, np.arange(len(y)), seed))
    by_row = M.probe("linear", "class", z, y, subject)
    assert by_subject[-1].C <= by_row[-1].C / 10


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_probe_keeps_a_weak_signal_in_many_dimensions(kind):
    """Too strong a penalty makes an MLP a constant, and the AUROC of a constant plus rounding is noise."""
    z, subject, rng = cohort(subjects=200, d=512)
    score = z[:, :4].sum(1) + 4 * rng.normal(size=len(subject))
    y, train = (score > 0).astype(int), subject < 50
    logit = M.logits(M.probe(kind, "class", z[train], y[train], subject[train]), z[~train])
    assert logit.std() > 0.01 and M.auroc(logit, y[~train]) > 0.53


@pytest.mark.parametrize("task", ["class", "regression"])
def test_inner_folds_share_no_subject(task):
    _, subject, rng = cohort(subjects=13, slices=4)
    y = rng.integers(0, 2, len(subject))
    folds = M.subject_folds(task, y, subject)
    assert len(folds) == 4
    assert sorted(np.concatenate([held for _, held in folds])) == list(range(len(subject)))
    for train, held in folds:
        assert not set(subject[train]) & set(subject[held])
    assert M.subject_folds(task, y[:4], subject[:4]) == []  # one subject


def test_probe_uses_those_folds_and_survives_few_subjects(monkeypatch):
    z, subject, rng = cohort(subjects=6, slices=3, d=4)
    y = (subject % 2).astype(int)
    seen = []
    real = M.subject_folds
    monkeypatch.setattr(M, "subject_folds", lambda *a: seen.append(real(*a)) or seen[-1])
    M.probe("linear", "class", z, y, subject)
    assert len(seen) == 1 and len(seen[0]) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for few in (subject < 2, subject < 3, subject < 4):
            for kind in ("linear", "mlp"):
                assert np.isfinite(M.logits(M.probe(kind, "class", z[few], y[few], subject[few]), z)).all()


def test_scaler_is_fit_on_train_only():
    z, subject, rng = cohort(d=5)
    z = z * [1, 10, 0.1, 3, 1] + 4
    y = (z[:, 0] > 4).astype(int)
    model = M.probe("linear", "class", z, y, subject)
    assert np.allclose(model[0].mean_, z.mean(0)) and np.allclose(model[0].scale_, z.std(0))
    before = model[:-1].transform(z[:10])
    shifted = M.logits(model, z + 100)  # a shifted test set is seen as shifted, not re-centred
    assert np.array_equal(model[:-1].transform(z[:10]), before)
    assert not np.allclose(shifted, M.logits(model, z))


def test_probe_refuses():
    z, subject, _ = cohort(subjects=4, d=3)
    for y in (subject * 0, subject):
        with pytest.raises(ValueError):
            M.probe("linear", "class", z, y, subject)
    with pytest.raises(ValueError):
        M.direction(M.probe("mlp", "class", z, subject % 2, subject))


def test_direction_recovers_a_planted_shift():
    """The attribute moves z by u, in dimensions of very different spread: u is what manipulation must add."""
    _, subject, rng = cohort(subjects=80)
    spread = np.geomspace(0.2, 5, 32)
    u = spread * rng.normal(size=32)
    u /= np.linalg.norm(u)
    y = rng.integers(0, 2, 80)[subject]
    age = rng.normal(size=80)[subject]
    noise = spread * rng.normal(size=(len(subject), 32))
    for task, target, factor in [("class", y, y), ("regression", 60 + 10 * age, age)]:
        v = M.direction(M.probe("linear", task, noise + 6 * factor[:, None] * u, target, subject))
        assert np.linalg.norm(v) == pytest.approx(1) and v @ u > 0.9


def test_logits_are_log_odds_and_finite():
    z, subject, _ = cohort(d=1)
    model = M.probe("linear", "class", z, (z[:, 0] > 0).astype(int), subject)
    p = model.predict_proba(z)[:, 1]
    inside = (p > 1e-5) & (p < 1 - 1e-5)
    assert np.allclose(M.logits(model, z)[inside], model.decision_function(z)[inside])
    assert np.isfinite(M.logits(model, z * 1e6)).all()


# Trivial rows

def test_pca_equals_eigendecomposition():
    x = smooth((30, 12, 12), 0)
    model = M.pca(5, x)
    centred = x.reshape(30, -1) - x.reshape(30, -1).mean(0)
    vectors = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :5]
    codes = M.pca_codes(model, x)
    assert np.abs(np.abs(codes) - np.abs(centred @ vectors)).max() < 1e-4  # an axis has no sign
    expected = (centred @ vectors @ vectors.T + x.reshape(30, -1).mean(0)).reshape(x.shape).clip(0, 1)
    assert np.abs(M.pca_reconstruct(model, torch.as_tensor(x)[:, None])[:, 0] - expected).max() < 1e-4
    full = M.pca(512, x)  # cannot have more components than images - 1
    assert M.pca_codes(full, x).shape == (30, 29)
    assert np.abs(M.pca_reconstruct(full, x) - x).max() < 1e-4


# results.json, table, figures

def example():
    return {"recon_ssim": M.row(0.951, (0.94, 0.96), 20), "recon_ssim.constant": M.row(0.41, n=20),
            "recon_ssim.vae": M.row(0.8, n=20), "probe_auroc": M.row(np.nan, n=20),
            "probe_auroc.all_positive": M.row(0.5), "age_mae": M.row(3.2, (3, 4), 20, "years", "lower")}


def test_results_json_is_strict_and_complete(tmp_path):
    path = tmp_path / "results.json"
    config = {"seed": 0, "out": tmp_path}
    M.save_results(path, "diffae", "phantom", {"train": np.int64(80)}, 12.5, config, example())

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")
    r = json.loads(path.read_text(), parse_constant=refuse)
    assert list(r) == ["script", "data", "n", "seconds", "device", "torch", "git", "config", "metrics"]
    assert r["n"] == {"train": 80} and r["torch"] == torch.__version__ and r["config"]["out"] == str(tmp_path)
    for entry in r["metrics"].values():
        assert list(entry) == ["value", "ci", "n", "unit", "better"] and len(entry["ci"]) == 2
        assert entry["better"] in ("higher", "lower")
    assert r["metrics"]["probe_auroc"]["value"] is None and r["metrics"]["probe_auroc"]["ci"] == [None, None]
    assert M.row(**M.bootstrap(np.mean, [1, 2], [0.0, 1.0]), unit="dB")["value"] == 0.5
    with pytest.raises(ValueError):
        M.row(1, better="up")


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    M.write_atomically(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(M.os, "fsync", full)
    with pytest.raises(OSError):
        M.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_table_shows_everything():
    text = M.table(example(), ["recon_ssim", "probe_auroc", "age_mae", "peak_gb"], {"recon_ssim": 0.66})
    lines = text.split("\n")
    assert max(map(len, lines)) <= 110
    for name in ("constant", "vae", "all_positive"):
        assert name in text
    line = next(t for t in lines if t.startswith("recon_ssim")).split()
    assert line == ["recon_ssim", "↑", "20", "0.660", "0.951", "[0.940,", "0.960]", "0.410", "0.800", "-"]
    assert next(t for t in lines if t.startswith("age_mae")).startswith("age_mae (years) ↓")
    assert next(t for t in lines if t.startswith("peak_gb")).split()[1:] == ["-"] * 6
    assert M.table({}, ["ssim"], {}).split("\n")[1].split() == ["ssim", "-", "-", "-"]


def test_a_wide_table_continues_below():
    rows = "age_sex pca_cosine pca_mahalanobis vae_recon vae_latent brain_age_gap untrained no_age".split()
    metrics = {"hr_per_sd": M.row(0.7315, (0.6, 0.9), 99)}
    metrics |= {f"hr_per_sd.{name}": M.row(0.1 + i / 1000) for i, name in enumerate(rows)}
    text = M.table(metrics, ["hr_per_sd"], {}, width=70)
    assert max(map(len, text.split("\n"))) <= 70
    for i, name in enumerate(rows):
        assert name in text and f"{0.1 + i / 1000:.3f}" in text
    assert max(map(len, M.table(metrics, ["hr_per_sd"], {}).split("\n"))) <= 110


def test_number():
    expected = {0.9514: "0.951", 0: "0.000", 3.21e-5: "3.2e-05", 0.00412: "0.0041", 39.8765: "39.9",
                1234.5: "1234", -0.25: "-0.250", None: "-", float("nan"): "-", float("inf"): "-"}
    assert {k: M.number(k) for k in expected} == expected


def test_grid_shows_the_pixels_it_was_given(tmp_path):
    x, color = smooth((1, 40, 50), 0)[0], smooth((3, 40, 50), 1).transpose(1, 2, 0)
    path = tmp_path / "g.png"
    size = M.grid(path, [[x, None], [torch.as_tensor(x) * 2 - 0.5, color]],
                  ["real", "a long label of a row, wrapped"], ["one", "two"], "A caption.")
    picture = np.asarray(Image.open(path))
    assert picture.shape == (size[1], size[0], 3)
    h, w = 3 * 40, 3 * 50  # scale 3 makes 40 pixels >= 96
    top, left = size[1] - 2 * (h + 4), next(i for i in range(size[0]) if np.array_equal(
        picture[size[1] - 2 * (h + 4):, i:i + w][:h:3, ::3, 0], np.rint(x * 255)))
    assert np.array_equal(picture[top:top + h, left:left + w, 0], np.rint(x * 255).repeat(3, 0).repeat(3, 1))
    assert (picture[top:top + h, left + w + 4:left + 2 * w + 4] == 255).all()  # the gap
    below = top + h + 4
    clipped = np.rint((x * 2 - 0.5).clip(0, 1) * 255)
    assert np.array_equal(picture[below:below + h:3, left:left + w:3, 1], clipped)
    assert np.array_equal(picture[below:below + h:3, left + w + 4:left + 2 * w + 4:3], np.rint(color * 255))
    for label in (picture[:top, left:], picture[top:, :left]):  # something is written there, all inside
        assert label.min() < 100
    assert (picture[:, -2:][:top] == 255).all()
    M.grid(path, [torch.rand(2, 128, 128)], None, None, "no labels")
    assert Image.open(path).size[1] < 128 + 40  # large images are not enlarged


def test_labels_of_a_grid_are_wrapped_and_stay_in_their_column(tmp_path):
    text, black = "z_sem of another patient with the x_T of this one", np.zeros((96, 96))
    M.grid(tmp_path / "g.png", [[black, black]], None, [text, ""], "")
    top = np.asarray(Image.open(tmp_path / "g.png").convert("L"))[:-100]
    assert top[:, :100].min() < 100 and (top[:, 101:] == 255).all() and top.shape[0] > 4 * 17


def test_curves(tmp_path):
    log, other, path = tmp_path / "log.jsonl", tmp_path / "log_other.jsonl", tmp_path / "c.png"
    records = [{"step": i, "loss": 1 / (1 + i), **({"z_gap": 0.1} if i % 5 == 0 else {})} for i in range(40)]
    log.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 40, "lo')  # cut in the middle
    other.write_text('{"step": 0}\n')
    M.curves(path, {"ours": log, "other": other})
    two_panels = Image.open(path).size
    M.curves(path, {"ours": log}, keys=("loss",))
    assert Image.open(path).size[0] < two_panels[0]
    M.curves(tmp_path / "none.png", {"other": other})
    assert not (tmp_path / "none.png").exists()


# --------------------------------------------------------------------------------- what the scripts report

class Few:
    """A data set of 4 subjects, for trivial_images."""
    subject = np.array(["a", "a", "b", "c", "c", "c"])
    image = (np.arange(6)[:, None, None] * np.ones((6, 12, 12)) * 10).astype(np.uint8)


def test_trivial_images_copy_within_the_subject_and_average_over_training():
    got = M.trivial_images(Few, train=np.array([3, 4, 5]), test=np.array([0, 1, 2, 4]))
    assert np.allclose(got["constant"], 40 / 255)
    assert np.allclose(got["copy"][:, 0, 0] * 255, [10, 0, 0, 30])      # the other of a, of a, nothing, the earlier

    class Many:
        subject = np.random.default_rng(0).integers(0, 90, 200)
        image = np.arange(200, dtype=np.uint8)[:, None, None] + np.zeros((200, 1, 1), np.uint8)
    copy = np.rint(M.trivial_images(Many, np.arange(9), np.arange(200))["copy"][:, 0, 0] * 255)
    for i, j in enumerate(copy):
        rest = [r for r in np.flatnonzero(Many.subject == Many.subject[i]) if r != i]
        assert j == (min(rest, key=lambda r: (abs(r - i), r)) if rest else 0)


def test_the_mean_image_is_the_best_constant():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 255, (10, 12, 12), dtype=np.uint8)
    few = type("", (), dict(subject=np.arange(10), image=x))
    error = M.mse(x / 255, M.trivial_images(few, np.arange(10), np.arange(10))["constant"]).mean()
    assert error == pytest.approx((x / 255).var(0).mean())


def test_image_numbers_are_ssim_and_mse_with_intervals():
    rng = np.random.default_rng(0)
    real, fake = rng.random((6, 16, 16)), rng.random((6, 16, 16))
    got = M.image_numbers("recon", "vae", real, fake, Few.subject)
    assert got["recon_ssim.vae"]["value"] == pytest.approx(M.ssim(real, fake).mean())
    assert got["recon_mse.vae"]["value"] == pytest.approx(((real - fake) ** 2).mean())
    assert got["recon_mse.vae"]["better"] == "lower" and got["recon_mse.vae"]["n"] == 3


def study(n=60, seed=0):
    """60 subjects x 3 slices; the first dimension of code "" knows y, "noise" knows nothing."""
    rng = np.random.default_rng(seed)
    subject = np.repeat([f"s{i:02d}" for i in range(n)], 3)
    part = np.repeat(np.where(np.arange(n) < 36, "train", np.where(np.arange(n) < 46, "val", "test")), 3)
    y = np.repeat(np.arange(n) % 2, 3).astype(float)
    return subject, part, y, {"": rng.normal(0, 1, (3 * n, 5)) + 2 * y[:, None] * (np.arange(5) == 0),
                              "noise": rng.normal(0, 1, (3 * n, 5))}


def test_probe_numbers_find_what_is_there_and_only_that():
    subject, part, y, codes = study()
    got, axis = M.probe_numbers(codes, y, part, subject)
    assert got["probe_auroc"]["value"] > 0.85 and got["linear_auroc"]["value"] > 0.85
    assert got["patient_auroc"]["value"] >= got["probe_auroc"]["value"] - 0.02 and got["patient_auroc"]["n"] == 14
    assert 0.25 < got["probe_auroc.noise"]["value"] < 0.75
    p = y[part == "test"].mean()
    assert got["probe_f1.all_positive"]["value"] == pytest.approx(2 * p / (1 + p))
    assert abs(M.direction(axis)[0]) > 0.9


def test_probe_numbers_do_not_look_at_test_labels():
    """Turning the test labels over turns the AUROC over: nothing was fitted, chosen or cut on them."""
    subject, part, y, codes = study()
    turned = np.where(part == "test", 1 - y, y)
    a, b = (M.probe_numbers({"": codes[""]}, t, part, subject)[0] for t in (y, turned))
    assert a["probe_auroc"]["value"] == pytest.approx(1 - b["probe_auroc"]["value"])


def test_probe_numbers_regress_and_refuse():
    subject, part, y, codes = study()
    target = codes[""][:, 0] * 3 + 50
    got, _ = M.probe_numbers({"": codes[""]}, target, part, subject)
    assert got["probe_r2"]["value"] > 0.8 and got["probe_mae"]["value"] < got["probe_mae.mean"]["value"]
    with pytest.raises(ValueError, match="one value"):
        M.probe_numbers({"": codes[""]}, np.ones(180), part, subject)
    with pytest.raises(ValueError, match="no test row"):
        M.probe_numbers({"": codes[""]}, np.where(part == "test", np.nan, y), part, subject)


def test_factor_numbers_recover_a_planted_factor():
    subject, part, _, codes = study()
    got = M.factor_numbers(codes, {"factor_size": codes[""] @ np.arange(5.0), "age": codes[""][:, 0]}, part, subject)
    assert set(got) == {"factor_r2_size", "factor_r2_size.noise"}
    assert got["factor_r2_size"]["value"] > 0.95 and got["factor_r2_size.noise"]["value"] < 0.3


def test_row_table_has_a_line_per_row_with_its_own_numbers():
    metrics = {"hr": M.row(0.8, (0.7, 0.9), 50, better="lower"), "hr.pca": M.row(1.1, (0.9, 1.3), 50, better="lower"),
               "auroc": M.row(0.75), "auroc.vae": M.row(0.6)}
    lines = [line.split() for line in M.row_table(metrics, ["hr", "auroc"], {"hr": 0.73}).splitlines()]
    assert lines == [["hr", "↓", "auroc", "↑"], ["ours", "0.800", "[0.700,", "0.900]", "0.750"],
                     ["pca", "1.100", "[0.900,", "1.300]", "-"], ["vae", "-", "0.600"], ["paper", "0.730", "-"]]


def test_spearman_equals_scipy_and_a_constant_has_none():
    from scipy.stats import spearmanr
    a, b = np.random.default_rng(0).integers(0, 5, (2, 40))
    assert abs(M.spearman(a, b) - spearmanr(a, b).statistic) < 1e-12
    assert np.isnan(M.spearman(a, np.ones(40)))


# Generated images

@pytest.mark.parametrize("n, m, d", [(40, 50, 8), (20, 30, 64), (200, 15, 40)])
def test_frechet_heusel_eq6_equals_sqrtm(n, m, d):
    from scipy.linalg import sqrtm
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)), 0.5 + rng.normal(size=(m, d)) * rng.random(d)
    # A tiny ridge makes the product full rank for sqrtm, which is unstable without; ours needs none.
    s, t = (np.cov(x.T) + (1e-9 if min(n, m) > d else 1e-7) * np.eye(d) for x in (a, b))
    want = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * np.real(sqrtm(s @ t)))
    assert M.frechet(a, b) == pytest.approx(want, rel=2e-3 if min(n, m) < d else 1e-6)
    assert M.frechet(a, a) < 1e-9 and M.frechet(a, b) == pytest.approx(M.frechet(b, a))
    assert M.frechet(a + 3, a) == pytest.approx(9 * d)          # equal covariances: the means alone


def test_kid_is_unbiased_and_equals_its_sums():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 3)), rng.normal(size=(4, 3)) + 1
    k = lambda x, y: (x @ y / 3 + 1) ** 3
    mean = lambda values: sum(values) / len(values)
    want = mean([k(x, y) for x, y in itertools.permutations(a, 2)]) \
        + mean([k(x, y) for x, y in itertools.permutations(b, 2)]) - 2 * mean([k(x, y) for x in a for y in b])
    assert M.kid(a, b) == pytest.approx(want)
    same = [M.kid(*rng.normal(size=(2, 30, 4))) for _ in range(300)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(300) and min(same) < 0


def test_dice_by_hand_and_pooled():
    a, b = np.zeros((2, 2, 4, 4), int)
    a[0, :2], b[0, 1:3] = 1, 1                                   # 8 and 8 pixels, 4 in common
    b[1, 0, 0] = 2                                               # never found
    counts = M.overlap(a, b, (1, 2, 3))
    assert counts[0, 0].tolist() == [8, 16] and counts[1, 1].tolist() == [0, 1]
    assert M.dice(counts) == pytest.approx((0.5 + 0) / 2)        # id 3 is nowhere: left out
    assert M.dice(M.overlap(b, b, (1, 2))) == 1 and np.isnan(M.dice(M.overlap(a * 0, a * 0, (1, 2))))


def test_edge_f1_tolerates_a_pixel():
    wanted = np.zeros((1, 9, 9), bool)
    wanted[0, 4] = True
    for shift, tolerance, f1 in ((0, 1, 1), (1, 1, 1), (2, 1, 0), (2, 2, 1)):
        hits = M.edge_hits(np.roll(wanted, shift, 1), wanted, tolerance)
        assert M.edge_f1(hits) == pytest.approx(f1), (shift, tolerance)
    half = wanted.copy()
    half[0, 4, 4:] = False
    half[0, 7, :2] = True                                        # 6 found, 4 right; of 9 wanted 4 + 1 are near
    hits = M.edge_hits(half, wanted, 1)
    assert hits.tolist() == [[6, 4, 9, 5]] and M.edge_recall(hits) == pytest.approx(5 / 9)
    assert M.edge_f1(hits) == pytest.approx(2 * (4 / 6) * (5 / 9) / (4 / 6 + 5 / 9))
    assert M.edge_f1(M.edge_hits(wanted & False, wanted)) == 0
    assert np.isnan(M.edge_f1(M.edge_hits(wanted, wanted & False)))


def test_nearest_is_brute_force():
    rng = np.random.default_rng(0)
    x, bank = rng.random((5, 6, 6)), rng.integers(0, 256, (40, 6, 6)).astype(np.uint8)
    d, at = M.nearest(x, bank, few=7)
    brute = np.sqrt(((x[:, None] - bank / 255) ** 2).mean((2, 3)))
    assert np.allclose(d, brute.min(1)) and (at == brute.argmin(1)).all()
    assert M.nearest(bank[3:4], bank)[0][0] < 1e-7
