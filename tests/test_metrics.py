"""metrics.py against scikit-image, scikit-learn, closed forms, brute force, planted truth and leaks."""
import dataclasses
import itertools
import json
import warnings

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity
from sklearn.metrics import f1_score, precision_score, recall_score, roc_auc_score

import metrics as M
from conftest import one_error


def smooth(shape, seed):
    """Images with structure, (N,*S) in [0,1]: blurred noise, scaled to its range."""
    x = np.random.default_rng(seed).normal(size=shape)
    x = np.stack([gaussian_filter(v, 2.5) for v in x])
    return (x - x.min()) / (x.max() - x.min())


@pytest.mark.parametrize("shape", [(3, 40, 33), (2, 20, 24, 17)])
@pytest.mark.parametrize("scale", [1, 0.02])
def test_ssim_wang_eq13_equals_skimage(shape, scale):
    a = smooth(shape, 1) * scale
    b = np.clip(a + 0.1 * np.random.default_rng(0).normal(size=shape), 0, 1)
    wang = dict(data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    expected = np.array([structural_similarity(x, y, **wang) for x, y in zip(a, b)])
    assert np.abs(M.ssim(a, b) - expected).max() < 1e-6
    tensors = (torch.as_tensor(x)[:, None] for x in (a, b))  # with a channel axis
    assert np.abs(M.ssim(*tensors) - expected).max() < 1e-6


def test_ssim_refuses_small_images_other_shapes_and_the_wrong_range():
    x = np.zeros((1, 30, 30))
    for a, b in ((x[:, :10], x[:, :10]), (x, x[:, :20]), (x, x - 1), (x, x + 255)):
        with pytest.raises(ValueError):
            M.ssim(a, b)


def test_mse_nmse_closed_forms():
    x = smooth((3, 20, 22), 0)
    at_mean, zero = np.broadcast_to(x.mean((1, 2), keepdims=True), x.shape), np.zeros_like(x)
    assert np.abs(M.nmse(x, at_mean) - 1).max() < 1e-9
    assert np.abs(M.nmse(x, zero) - (x ** 2).mean((1, 2)) / x.var((1, 2))).max() < 1e-9
    assert np.abs(M.mse(x, x + 0.1) - 0.01).max() < 1e-9
    pixels = torch.tensor([-3, -1, 0, 0.5, 1, 2.0], dtype=torch.bfloat16).reshape(1, 1, 2, 3)
    assert M.to_image(pixels).tolist() == [[[0, 0, 0.5], [0.75, 1, 1]]]


def test_image_numbers_are_ssim_and_mse_with_intervals():
    real, fake = np.random.default_rng(0).random((2, 6, 16, 16))
    subject = np.array(["a", "a", "b", "c", "c", "c"])
    got = M.image_numbers("recon", {"": real, "vae": fake}, real, subject)
    assert set(got) == {"recon_ssim", "recon_mse", "recon_ssim.vae", "recon_mse.vae"}
    assert got["recon_ssim"]["value"] == pytest.approx(1) and got["recon_mse"]["value"] == 0
    assert got["recon_ssim.vae"] == M.row_of(np.mean, subject, M.ssim(real, fake))
    assert got["recon_mse.vae"] == M.row_of(np.mean, subject, M.mse(real, fake), better="lower")


@pytest.mark.parametrize("n, m, d", [(40, 50, 8), (20, 30, 64), (200, 15, 40)])
def test_frechet_heusel_eq6_equals_sqrtm(n, m, d):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)), 0.5 + rng.normal(size=(m, d)) * rng.random(d)
    # A tiny ridge makes the product full rank for sqrtm, which is unstable without; ours needs none.
    s, t = (np.cov(x.T) + (1e-9 if min(n, m) > d else 1e-7) * np.eye(d) for x in (a, b))
    want = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * np.real(sqrtm(s @ t)))
    assert M.frechet(a, b) == pytest.approx(want, rel=2e-3 if min(n, m) < d else 1e-6)
    assert M.frechet(a, a) < 1e-9 and M.frechet(a + 3, a) == pytest.approx(9 * d)  # the means alone


def test_kid_equals_its_sums():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 3)), rng.normal(size=(4, 3)) + 1
    k = lambda x, y: (x @ y / 3 + 1) ** 3
    within = sum(np.mean([k(x, y) for x, y in itertools.permutations(c, 2)]) for c in (a, b))
    assert M.kid(a, b) == pytest.approx(within - 2 * np.mean([k(x, y) for x in a for y in b]))


def test_dice_by_hand_and_pooled():
    a, b = np.zeros((2, 2, 4, 4), int)
    a[0, :2], b[0, 1:3] = 1, 1                                   # 8 and 8 pixels, 4 in common
    b[1, 0, 0] = 2                                               # never found
    counts = M.overlap(a, b, (1, 2, 3))
    assert counts[0, 0].tolist() == [8, 16] and counts[1, 1].tolist() == [0, 1]
    assert M.dice(counts) == pytest.approx((0.5 + 0) / 2)        # id 3 is nowhere: left out
    assert M.dice(M.overlap(b, b, (1, 2))) == 1 and np.isnan(M.dice(M.overlap(a * 0, a * 0, (1, 2))))


def test_edge_f1_tolerates_a_pixel():
    wanted = np.arange(9)[None, :, None] + np.zeros((1, 9, 9)) == 4      # a line
    for shift, tolerance, f1 in ((0, 1, 1), (1, 1, 1), (2, 1, 0), (2, 2, 1)):
        assert M.edge_f1(M.edge_hits(np.roll(wanted, shift, 1), wanted, tolerance)) == pytest.approx(f1)
    half = wanted.copy()
    half[0, 4, 4:] = False
    half[0, 7, :2] = True                               # 6 found, 4 right; of 9 wanted 4 + 1 are near
    hits = M.edge_hits(half, wanted, 1)
    assert hits.tolist() == [[6, 4, 9, 5]]
    assert M.edge_f1(hits) == pytest.approx(2 * (4 / 6) * (5 / 9) / (4 / 6 + 5 / 9))
    assert M.edge_f1(M.edge_hits(wanted & False, wanted)) == 0
    assert np.isnan(M.edge_f1(M.edge_hits(wanted, wanted & False)))


def test_nearest_is_brute_force():
    rng = np.random.default_rng(0)
    x, bank = rng.random((5, 6, 6)), rng.integers(0, 256, (40, 6, 6)).astype(np.uint8)
    d, at = M.nearest(x, bank)
    brute = np.sqrt(((x[:, None] - bank / 255) ** 2).mean((2, 3)))
    assert np.allclose(d, brute.min(1)) and (at == brute.argmin(1)).all()


def test_bootstrap_covers_the_mean():
    rng = np.random.default_rng(0)
    subject, hits = np.repeat(np.arange(40), 4), 0
    for seed in range(200):
        x = rng.normal(size=40)[subject] + 0.5 * rng.normal(size=160)  # slices of a patient are alike
        low, high = M.bootstrap(np.mean, subject, x, n=300, seed=seed)["ci"]
        hits += low <= 0 <= high
    assert 0.90 <= hits / 200 <= 0.985  # 95 % +- about 3 standard errors


def test_auroc_and_classify_equal_sklearn():
    rng = np.random.default_rng(0)
    for _ in range(20):
        score, y = rng.integers(0, 6, 40).astype(float), rng.integers(0, 2, 40)  # many ties
        assert abs(M.auroc(score, y) - roc_auc_score(y, score)) < 1e-12
        ours, called = M.classify(score, y, 3), score >= 3
        for name, theirs in [("f1", f1_score), ("precision", precision_score), ("recall", recall_score)]:
            assert abs(ours[name] - theirs(y, called)) < 1e-12
    assert np.isnan(M.auroc([1, 2], [1, 1]))
    assert np.isnan(M.classify(np.zeros(4), np.zeros(4), 1)["f1"])


def test_threshold_f1_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(30):
        score, y = rng.integers(-8, 8, 25) / 4, rng.integers(0, 2, 25)
        best = max(f1_score(y, score >= c, zero_division=0) for c in [-9, *score, 9])
        assert abs(M.classify(score, y, M.threshold_f1(score, y))["f1"] - best) < 1e-12
    assert M.threshold_f1([1, 2], [0, 0]) == 0


def test_regression_and_spearman():
    r = M.regression([1.0, 2.0, 5.0], [1.0, 3.0, 5.0])
    assert [r["mae"], r["rmse"], r["r2"]] == pytest.approx([1 / 3, 3 ** -0.5, 1 - 1 / 8])
    a, b = np.random.default_rng(0).integers(0, 5, (2, 40))
    assert abs(M.spearman(a, b) - spearmanr(a, b).statistic) < 1e-12
    assert np.isnan(M.spearman(a, np.ones(40)))


def cohort(subjects=50, slices=7, d=32, seed=0):
    """z (N,d) with a subject part and a slice part, subject (N,)."""
    rng = np.random.default_rng(seed)
    subject = np.repeat(np.arange(subjects), slices)
    return rng.normal(size=(subjects, d))[subject] + rng.normal(size=(len(subject), d)), subject, rng


def test_probe_survives_few_subjects_and_refuses_one_class():
    z, subject, _ = cohort(subjects=6, slices=3, d=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for few in (subject < 2, subject < 3, subject < 4):
            model = M.probe("class", z[few], subject[few] % 2, subject[few])
            assert np.isfinite(model.decision_function(z)).all()
    with pytest.raises(ValueError):
        M.probe("class", z, subject * 0, subject)


def test_a_probe_of_pca_codes_is_not_drowned_by_their_noise():
    """Three numbers of large variance carry the target, 97 of small variance are noise: one common SD."""
    z, subject, rng = cohort(subjects=60, slices=2, d=100)
    z *= np.where(np.arange(100) < 3, 1, 0.02)
    y, train = z[:, :3].sum(1), subject < 40
    model = M.probe("regression", z[train], y[train], subject[train])
    assert isinstance(model[0], M.OneScale) and M.regression(model.predict(z[~train]), y[~train])["r2"] > 0.95


def test_direction_recovers_a_planted_shift():
    """The attribute moves z by u, in dimensions of very different spread: u is what manipulation must add."""
    _, subject, rng = cohort(subjects=80)
    spread = np.geomspace(0.2, 5, 32)
    u = spread * rng.normal(size=32)
    u /= np.linalg.norm(u)
    y = rng.integers(0, 2, 80)[subject]
    z = spread * rng.normal(size=(len(subject), 32)) + 6 * y[:, None] * u
    for task in ("class", "regression"):
        model = M.probe(task, z, y, subject)
        v, (weights, intercept) = M.direction(model, z), M.linear(model)
        assert np.linalg.norm(v) == pytest.approx((z @ v).std() / np.linalg.norm(v)) and v @ u > 0.9 * np.linalg.norm(v)
        read = model.decision_function if task == "class" else model.predict
        assert np.allclose(z @ weights + intercept, read(z), atol=1e-9)


@dataclasses.dataclass
class Table:
    """What metrics.py needs of a Dataset."""
    subject: object
    columns: dict
    label_names: list
    path: str = "new.h5"

    def __len__(self):
        return len(self.subject)


def study(n=60, seed=0):
    """n subjects x 3 slices; the first number of code "" knows y, "noise" knows nothing."""
    rng = np.random.default_rng(seed)
    subject = np.repeat([f"s{i:02d}" for i in range(n)], 3)
    part = np.repeat(rng.permutation(["train"] * 36 + ["val"] * 10 + ["test"] * (n - 46)), 3)
    y = np.repeat(np.arange(n) % 2, 3).astype(float)
    return subject, part, y, {"": rng.normal(0, 1, (3 * n, 5)) + 2 * y[:, None] * (np.arange(5) == 0),
                              "noise": rng.normal(0, 1, (3 * n, 5))}


def test_probe_numbers_find_what_is_there_and_only_that():
    subject, part, y, codes = study()
    table, probes = M.predict(codes, y, part, subject)
    got, fitted = M.probe_numbers(table), probes[""]
    kinds = ("probe_auroc", "patient_auroc", "ill_auroc", "probe_f1", "probe_precision", "probe_recall")
    rows = {k + name for k in kinds for name in ("", ".noise", ".all_positive")}
    assert set(got) == rows | {"probe_auroc_gain.noise"}
    value = {k: m["value"] for k, m in got.items()}
    assert 0.25 < value["probe_auroc.noise"] < 0.75 < 0.85 < value["probe_auroc"]
    test, p = part == "test", y[part == "test"].mean()
    score = fitted.decision_function(codes[""][test])
    assert value["probe_auroc"] == pytest.approx(roc_auc_score(y[test], score))
    patients = roc_auc_score(y[test][::3], score.reshape(-1, 3).mean(1))
    assert value["patient_auroc"] == pytest.approx(patients) and np.argmax(abs(M.linear(fitted)[0])) == 0
    assert got["patient_auroc"]["n"] == 14 and value["probe_f1.all_positive"] == 2 * p / (1 + p)
    mixed = table.assign(truth=np.where(np.arange(len(y)) % 3 == 0, 0.0, y))     # the ill have a healthy slice
    there = test & (y == 1)
    assert M.probe_numbers(mixed)["ill_auroc"]["value"] == pytest.approx(roc_auc_score(
        mixed["truth"][there], table["score"][there]))
    same = M.probe_numbers(M.predict({"": codes[""], "copy": codes[""]}, y, part, subject)[0])
    assert same["probe_auroc_gain.copy"]["ci"] == [0, 0]  # paired: the same resamples for both


def test_probe_numbers_regress_and_refuse():
    subject, part, y, codes = study()
    y = codes[""][:, 0] * 3 + 50
    got = M.probe_numbers(M.predict(codes, y, part, subject)[0])
    factors = M.factor_numbers(codes, {"factor_size": y, "age": y}, part, subject)
    assert factors == {"factor_r2_size": got["probe_r2"], "factor_r2_size.noise": got["probe_r2.noise"]}
    assert got["probe_r2"]["value"] > 0.8 and got["probe_mae"]["value"] < got["probe_mae.mean"]["value"]
    assert got["probe_r2.mean"]["value"] <= 0 and got["probe_r2_gain.noise"]["ci"][0] > 0
    # In folds, the mean to beat is that of the training rows of a fold: of 2 and 3 for 0 and 1, and the reverse.
    table = pandas.DataFrame(dict(subject=list("abcd"), part="test", truth=[0, 1, 2, 3.0], score=0.0, mean=[2.5, 2.5, 0.5, 0.5]))
    assert M.probe_numbers(table)["probe_r2.mean"]["value"] == pytest.approx(1 - 17 / 5)
    for bad, why in ((0 * y, "one value"), (np.where(part == "test", np.nan, y), "no test row")):
        with pytest.raises(ValueError, match=why):
            M.predict(codes, bad, part, subject)


@pytest.mark.parametrize("task", ["class", "regression", "factor"])
def test_which_rows_fit_cut_and_are_scored(monkeypatch, task):
    """The first number of a code names its row: training rows fit, validation rows cut, test rows count."""
    subject, part, y, codes = study()
    y = y if task == "class" else codes[""][:, 0] + y
    y[::7] = np.nan
    train, val, test = (np.flatnonzero((part == p) & ~np.isnan(y)) for p in ("train", "val", "test"))
    codes = {name: np.column_stack([np.arange(len(y)), z]) for name, z in codes.items()}
    fits, cuts, scored, real_fit = [], [], [], M.Pipeline.fit

    def fit(model, z, target):
        fits.append(z[:, 0].astype(int))
        assert np.array_equal(target, y[fits[-1]])
        return real_fit(model, z, target)

    monkeypatch.setattr(M.Pipeline, "fit", fit)
    monkeypatch.setattr(M, "threshold_f1", lambda *pair: cuts.append(pair) or 0.0)
    monkeypatch.setattr(M, "row_of", lambda _, *arrays, **rest: scored.append(arrays) or M.row(0))
    if task == "factor":
        M.factor_numbers(codes, {"factor_size": y, "age": y}, part, subject)
    else:
        table, probes = M.predict(codes, y, part, subject)
        M.probe_numbers(table)
    assert fits and all(set(rows) <= set(train) for rows in fits)
    for rows in fits:  # an inner fold holds out whole subjects
        assert not set(subject[rows]) & set(subject[np.setdiff1d(train, rows)])
    assert sum(np.array_equal(rows, train) for rows in fits) == len(codes)
    assert len(cuts) == (len(codes) if task == "class" else 0)
    if task == "class":
        assert np.array_equal(cuts[0][0], probes[""].decision_function(codes[""][val]))
        assert np.array_equal(cuts[0][1], y[val])
    slices = [entry for entry in scored if len(entry[0]) == len(test)]
    assert slices and len(scored) - len(slices) == (6 if task == "class" else 0)  # of patients, of the ill
    assert all(np.array_equal(who, subject[test]) and any(np.array_equal(a, y[test]) for a in arrays)
               for who, *arrays in slices)


def test_folds_are_pooled_and_saved_probes_read_like_the_fitted_ones(tmp_path, capsys):
    """Two folds, each with its own probe: the AUROC of all their test rows. A subject may be called NA."""
    subject, part, y, codes = study()
    subject = np.where(subject == "s00", "NA", subject)
    at, score, names = [], [], np.random.default_rng(1).permutation(np.unique(subject))
    for k in range(2):
        part = np.where(np.isin(subject, names[k::2]), "test", "train")
        table, probes = M.predict(codes, y, part, subject)
        M.save_predictions(tmp_path / f"{k}.csv", {("probe", "label"): table})
        at += [np.flatnonzero(part == "test")]
        score += [probes[""].decision_function(codes[""][at[-1]])]
    got = M.pooled([tmp_path / "0.csv", tmp_path / "1.csv"])
    assert got["probe_auroc"]["value"] == pytest.approx(roc_auc_score(y[np.concatenate(at)], np.concatenate(score)))
    assert got["probe_auroc"]["n"] == 60 and {"probe_f1.noise", "probe_auroc_gain.noise"} <= set(got)
    tested = pandas.read_csv(tmp_path / "0.csv", keep_default_na=False)
    tested[(tested["part"] != "test") | (tested["truth"] == 1)].to_csv(tmp_path / "ill.csv", index=False)
    assert M.pooled([tmp_path / "ill.csv"])["probe_auroc"]["value"] is None     # train.py: not tested, no verdict

    # New data: the saved probe reads what the fitted one does, and nobody who was trained on is counted.
    M.save_probes(tmp_path / "probes.json", {"probe": ("label", table, probes[""])}, codes[""], ["well", "ill"])
    M.save_codes(tmp_path / "codes.csv", Table(subject, {}, []), part, codes[""])
    data = Table(np.append(subject, ["new", "third class"]), {"label": np.append(y, [1, 2]), "path": np.full(len(y) + 2, "a.png")}, [])
    known = M.known_part(tmp_path, data.subject)
    assert np.array_equal(known, np.append(part, ["new", "new"])) and "was trained on 30 of these subjects" in capsys.readouterr().err
    numbers = M.apply_probes(tmp_path, tmp_path, data, known, np.append(codes[""], codes[""][:2], 0))
    read = pandas.read_csv(tmp_path / "predictions.csv")
    assert np.allclose(read["score"][:-2], probes[""].decision_function(codes[""]), atol=1e-4)
    assert np.array_equal(read["part"], known) and numbers["probe_auroc"]["n"] == 31
    assert np.array_equal(read["called"], read["score"] >= table["cut"][0]) and set(read["path"]) == {"a.png"}
    other = dataclasses.replace(data, label_names=["ill", "well"])
    one_error(capsys, lambda: M.apply_probes(tmp_path, tmp_path, other, known, codes[""]), "label_names", "ill")
    # A network that was trained on since then is not read by these probes.
    (tmp_path / "results.json").write_text('{"config": {"steps": 20}}')
    M.check_evaluated(tmp_path)
    M.log_line(tmp_path / "log.jsonl", dict(step=20))
    M.check_evaluated(tmp_path)
    M.log_line(tmp_path / "log.jsonl", dict(step=40))
    one_error(capsys, lambda: M.check_evaluated(tmp_path), "trained on after its evaluation")
    saved = json.loads((tmp_path / "probes.json").read_text())["probe"]
    for key in ("weights", "axis", "classes"):
        rest = {k: v for k, v in saved.items() if k != key}
        (tmp_path / "probes.json").write_text(json.dumps({"probe": rest}))
        one_error(capsys, lambda: M.read_probes(tmp_path), "probes.json", "damaged")


def test_a_patient_counts_once_however_many_images():
    who, score = np.array(["a"] * 50 + list("bc") + list("defgh")), np.r_[np.ones(50), 0, 0, 0.1, 0.3, 0.5, 0.7, 0.9]
    names, value, ill = M.per_subject(who, score, np.arange(57) < 52)
    assert list(names) == list("abcdefgh") and M.auroc(value, ill) == pytest.approx(1 / 3)


def test_brain_age_gap_is_what_was_planted():
    rng = np.random.default_rng(0)
    age, ahead = rng.uniform(20, 90, 300), np.where(np.arange(300) >= 250, 8.0, 0)  # the last 50 are ill
    codes = ((age + ahead) / 20)[:, None] + 0.3 * rng.normal(size=(300, 4))
    gap = M.brain_age_gap(codes, age, np.arange(150), np.arange(150, 250), np.arange(300))
    assert abs(gap[150:250].mean()) < 1e-9 and abs(np.polyfit(age[150:250], gap[150:250], 1)[0]) < 1e-9
    assert gap[250:].mean() == pytest.approx(8, abs=2)
    d = M.mahalanobis(5 + 2 * rng.normal(size=(4000, 3)), np.arange(2000))
    assert (d ** 2).mean() == pytest.approx(3, rel=0.1)  # chi-squared with 3 degrees of freedom


class Few:
    subject = np.array(["a", "a", "b", "c", "c", "c"])
    image = (np.arange(6)[:, None, None] * np.ones((6, 12, 12)) * 10).astype(np.uint8)


def test_trivial_images_copy_within_the_subject_and_average_over_training():
    got = M.trivial_images(Few, train=np.array([3, 4, 5]), test=np.array([0, 1, 2, 4]), z_dim=1)
    assert np.allclose(got["constant"], 40 / 255)
    assert np.allclose(got["copy"][:, 0, 0] * 255, [10, 0, 0, 30])  # other of a, of a, none, earlier of c
    assert np.allclose(got["pca"] * 255, Few.image[[0, 1, 2, 4]], atol=1e-3)  # one axis holds all of them


def test_pca_equals_eigendecomposition_of_the_training_rows():
    x = np.rint(smooth((300, 12, 12), 0) * 255).astype(np.uint8)
    train = np.arange(0, 300, 2)
    codes = M.pca_codes(type("", (), dict(image=x)), train, 5)
    flat = x.reshape(300, -1) / 255
    centred = flat - flat[train].mean(0)
    vectors = np.linalg.eigh(centred[train].T @ centred[train])[1][:, ::-1][:, :5]
    assert np.abs(np.abs(codes) - np.abs(centred @ vectors)).max() < 1e-3  # an axis has no sign


def test_evenly_and_other_subject():
    assert M.evenly(np.arange(10) * 2, 4).tolist() == [0, 6, 12, 18]
    assert M.evenly([3, 4], 9).tolist() == [3, 4] and M.evenly([], 5).size == 0
    who = np.array(["a", "a", "a", "b", "c"])
    assert (who[M.other_subject(who)] != who).all() and M.other_subject(["a", "a"]).tolist() == [0, 1]


def test_a_log_with_foreign_lines(tmp_path):
    log = tmp_path / "log.jsonl"
    assert M.read_log(log) == []
    for step, loss in ((0, 3.0), (5, 2.0), (5, float("nan")), (1, 2.5)):
        M.log_line(log, {"step": step, "loss": loss})
    with open(log, "ab") as f:
        f.write(b'[1, 2]\n"step"\n{"loss": 1}\n{"step": "7"}\n{"step": true}\n\xff\xfe\n')
        f.write(b"[" * 100000 + b"\n" + b"9" * 99 + b"\n")
        f.write(b'{"step": -1}\n{"step": 9999999999999999999}\n{"step": 6, "loss": [2]}\n{"step": 9, "lo')
    got = M.read_log(log)
    assert [r["step"] for r in got] == [0, 1, 5, 6] and np.isnan(got[2]["loss"])
    M.curves(tmp_path / "c.png", {"ours": log, "none": tmp_path / "none"}, ("loss", "z_gap"))
    assert (tmp_path / "c.png").exists()
    M.curves(tmp_path / "n.png", {"none": tmp_path / "none"})
    assert not (tmp_path / "n.png").exists()


def test_record_and_results_json_which_is_strict_and_complete(tmp_path, capsys):
    config = dataclasses.make_dataclass("Config", ["out", "widths"])(str(tmp_path), (1, 2))
    M.record(config, __file__)
    assert json.loads((tmp_path / "config.json").read_text()) == {"out": str(tmp_path), "widths": [1, 2]}
    assert (tmp_path / "test_metrics.py").read_text() == open(__file__).read()
    M.warn_if_edited(config, __file__)
    assert not capsys.readouterr().err
    (tmp_path / "test_metrics.py").write_text("old")
    M.warn_if_edited(config, __file__)
    assert "test_metrics.py has changed since" in capsys.readouterr().err
    path = tmp_path / "results.json"
    metrics = {"auroc": M.row(np.nan, n=20), "mae": M.row(3, (1, 4), 9, "years")}
    M.save_results(path, "diffae", "phantom", {"train": np.int64(80)}, 12.5, {"out": tmp_path}, metrics)
    r = json.loads(path.read_text(), parse_constant=lambda constant: pytest.fail(constant))
    assert list(r) == "script data n seconds device memory_gb torch git config metrics".split()
    assert 0.05 < r["memory_gb"] < 64
    assert r["n"] == {"train": 80} and r["torch"] == torch.__version__ and r["config"]["out"] == str(tmp_path)
    assert r["metrics"]["mae"] == {"value": 3, "ci": [1, 4], "n": 9, "unit": "years", "better": "higher"}
    assert r["metrics"]["auroc"]["value"] is None and r["metrics"]["auroc"]["ci"] == [None, None]


def test_table_has_a_line_per_row_and_fits():
    keys = {f"metric_{i}": f"a number with a name of several words, {i}" for i in range(8)}
    rows = {"": "ours", "vae": "the VAE's code", "constant": "the mean training image", "absent": "nowhere"}
    metrics = {f"metric_{i}": M.row(i / 10, (0.1, 0.999), 20) for i in range(8)}
    metrics |= {"metric_1.vae": M.row(-0.123, (-0.2, -0.1), 20), "metric_7.constant": M.row(12345.6)}
    text = M.table(metrics, keys | {"none": "never"}, rows)
    assert max(map(len, text.split("\n"))) <= 100 and "never" not in text and "nowhere" not in text
    starts = [line[:4] for line in text.split("\n")]
    assert starts.count("ours") == 4 and text.count("0.700 [0.100, 0.999]") == 1  # two columns a block
    vae = [line.split()[3:] for line in text.split("\n") if line.startswith("the VAE's code")]
    assert vae == [["-", "-0.123", "[-0.200,", "-0.100]"]] and text.count("12346") == 1
    assert "over 20 subjects" in text


@pytest.mark.parametrize("ci, better, verdict", [
    ((0.01, 0.1), "higher", "yes"), ((-0.1, -0.01), "higher", "no"), ((-0.02, 0.12), "higher", "undecided"),
    ((0.01, 0.1), "lower", "no"), ((-0.1, -0.01), "lower", "yes"), ((np.nan, np.nan), "lower", "undecided")])
def test_answer(ci, better, verdict):
    text = M.answer("Better?", "AUROC", M.row(0.71), M.row(0.66), M.row(0.05, ci, 20, better=better))
    assert text.startswith("Better? AUROC 0.710 against 0.660, +0.050") and text.endswith(f"nts: {verdict}.")


def test_grid_shows_the_pixels_it_was_given(tmp_path):
    x, color = smooth((1, 40, 50), 0)[0], smooth((3, 40, 50), 1).transpose(1, 2, 0)
    path, h, w = tmp_path / "g.png", 3 * 40, 3 * 50  # scale 3 makes 40 pixels >= 96
    size = M.grid(path, [[x, None], [torch.as_tensor(x) * 2 - 0.5, color]], ["real", "a$b_$c is no formula"],
                  ["one", "two, with a label as long as this one"], "A caption.")
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert picture.shape == (size[1], size[0], 3) and Image.open(path).info["Description"] == "A caption."
    top, left = size[1] - 2 * (h + 4), size[0] - 2 * (w + 4)
    below, right = top + h + 4, left + w + 4
    large = lambda v: np.rint(v * 255).repeat(3, 0).repeat(3, 1)
    assert np.array_equal(picture[top:top + h, left:left + w, 0], large(x))
    assert np.array_equal(picture[below:below + h, left:left + w, 1], large((x * 2 - 0.5).clip(0, 1)))
    assert np.array_equal(picture[below:below + h, right:right + w], large(color))
    assert (picture[top:top + h, right:] == 255).all()  # the gap
    assert picture[:top, right:right + w].min() < 100 and picture[top:, :left].min() < 100  # labels
    M.grid(path, [torch.rand(2, 128, 128)] * 4, None, None, "no labels")
    assert Image.open(path).size == (420, 4 * 132 + 34)  # large images are not enlarged
