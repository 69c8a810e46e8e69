"""Phantom brains: one individual at any age and in any disease, a local lesion, planted survival."""
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from lifelines import CoxPHFitter

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

VOXEL = 176 / 96
AT = data.grid((1, 96, 96), VOXEL)


def draw(number, **factors):
    return data.brain(np.random.default_rng(number), *AT, VOXEL, **factors)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("brains") / "cohort.h5")
    data.phantom_cohort(path, subjects=20, patients=30, seed=3, size=64)
    return path


def column(path, name, rows=slice(None)):
    with h5py.File(path) as file:
        return file[name].asstr()[rows] if name in ("subject", "sex") else file[name][rows]


def test_a_subject_depends_on_seed_and_number(cohort, tmp_path):
    less, other = str(tmp_path / "less.h5"), str(tmp_path / "other.h5")
    data.phantom_cohort(less, subjects=4, patients=3, seed=3, size=64)
    data.phantom_cohort(other, subjects=4, patients=3, seed=4, size=64)
    same = [0, 1, 2, 3, 20, 21, 22]
    with h5py.File(less) as file:
        for name in file:
            np.testing.assert_array_equal(column(less, name), column(cohort, name)[same], err_msg=name)
    assert (column(less, "image") != column(other, "image")).any((1, 2)).all()
    assert len(np.unique(column(cohort, "subject"))) == 50


def test_file_is_valid_and_columns_mean_what_they_say(cohort):
    warnings = data.check(cohort)
    assert len(warnings) == 1 and "time: 20 of 50" in warnings[0]      # healthy people have no survival
    label, time, event, severity = (column(cohort, n) for n in ("label", "time", "event", "factor_severity"))
    assert (label == np.repeat([0, 1], [20, 30])).all()
    assert np.isnan(time[:20]).all() and (time[20:] >= 1).all() and not event[:20].any()
    assert not severity[:20].any() and (severity[20:] > 0).all()
    image, mask = column(cohort, "image"), column(cohort, "mask")
    assert mask.max() == 4 and (image[:, [0, -1]] == 0).all() and (image == 0).mean() > 0.25
    grey = [np.median(image[mask == k]) for k in (1, 2, 3)]            # T1: CSF < grey < white
    assert grey[0] + 40 < grey[1] < grey[2] - 40
    with h5py.File(cohort) as file:
        assert file.attrs["hr_per_sd"] == 1 / 0.73
        assert list(file["mask"].attrs["mask_names"])[4] == "lesion"


def test_ageing_is_monotone_and_faster_after_60():
    ages = np.arange(20, 91, 10)
    drawn = [[draw(k, age=float(a)) for a in ages] for k in range(6)]
    ventricle = np.array([[d["ventricle"].sum() for d in row] for row in drawn])
    cortex = np.array([[(d["mask"] == 2).sum() for d in row] for row in drawn])
    sulci = np.array([[(d["image"] < 0.3)[d["head"] > 0.9].sum() for d in row] for row in drawn])
    assert (np.diff(ventricle) > 0).all()
    assert (np.diff(ventricle)[:, -3:].mean(1) > 1.5 * np.diff(ventricle)[:, :3].mean(1)).all()
    assert (cortex[:, -1] < cortex[:, 0]).all() and (np.diff(sulci) >= 0).all()
    assert all(abs(row[0]["head"] - row[-1]["head"]).max() == 0 for row in drawn)  # the skull stays
    size = ventricle[:, 4]
    assert size.max() / size.min() > 1.3                               # people differ


def test_disease_is_local_and_grows_with_severity():
    x, y, _ = np.broadcast_arrays(*AT)
    for k in range(8):
        healthy = draw(k, age=60.0)
        brain = (healthy["head"] > 0.5).sum()
        sizes, totals = [], []
        for severity in (0.25, 0.5, 0.75, 1.0):
            change = abs(draw(k, age=60.0, severity=severity)["image"] - healthy["image"])
            sizes.append((change > 0.05).sum() / brain)
            totals.append(change.sum())
        assert (np.diff(sizes) > 0).all() and (np.diff(totals) > 0).all() and 0.01 < sizes[-1] < 0.08
        assert (change == 0).mean() > 0.85                             # exactly the same elsewhere
        assert change[(y > 30) | (y < -40)].max() == 0                 # frontal, occipital
        assert change[abs(x) < 8].max() == 0                           # midline
        np.testing.assert_array_equal(draw(k, age=60.0, severity=1.0)["ventricle"], healthy["ventricle"])
        assert change[x > 30].sum() > 0.3 * totals[-1] / 3 and change[x < -30].sum() > 0.3 * totals[-1] / 3


def test_lesions_of_the_file(cohort):
    mask, severity = column(cohort, "mask"), column(cohort, "factor_severity")
    share = (mask == 4).sum((1, 2)) / (mask > 0).sum((1, 2))
    assert not share[:20].any() and share.max() < 0.08
    assert np.corrcoef(share[20:], severity[20:])[0, 1] > 0.8


def test_lesion_survives_48_pixels():
    """Severe against none, same brain: the darkest change of the 48x48 average exceeds the noise by far."""
    at = data.grid((1, 128, 128), 1.375)
    for k in range(4):
        pair = [data.brain(np.random.default_rng(k), *at, 1.375, 60.0, s)["image"] for s in (0.0, 0.9)]
        a, b = data.resize(np.concatenate(pair), 48)
        assert (b - a).min() < -0.12


def fit(severity, age, male, time, event):
    table = pd.DataFrame(dict(severity=(severity - data.SEVERITY[0]) / data.SEVERITY[1], age=age / 10,
                              male=male.astype(float), time=time, event=event))
    model = CoxPHFitter().fit(table, "time", "event")
    return model.params_, model.standard_errors_


def test_cox_recovers_the_planted_hazards():
    rng = np.random.default_rng(0)
    severity, age, male = rng.beta(2, 2, 4000), rng.normal(62, 11, 4000), rng.random(4000) < 0.58
    time, event = data.survival(rng, severity, age, male)
    found, error = fit(severity, age, male, time, event)
    for name, truth in (("severity", np.log(1 / 0.73)), ("age", np.log(1.3)), ("male", np.log(1.2))):
        assert abs(found[name] - truth) < 3 * error[name], name
    assert error.max() < 0.06
    assert abs(severity.mean() - data.SEVERITY[0]) < 0.015 and abs(severity.std() - data.SEVERITY[1]) < 0.01
    mean = np.full(4000, 0.5), np.full(4000, 62.0), np.full(4000, 0.58)
    alive = data.survival(rng, *mean)[0] > 365.25                      # S(1 y) of Weibull(1.3), median 2.5 y
    assert abs(alive.mean() - 0.5 ** (0.4 ** 1.3)) < 0.03              # (nobody is censored before 1.5 y)


def test_every_seed_has_events_enough():
    people = [[data.person(np.random.default_rng([seed, k, 1]), True) for k in range(220)]
              for seed in range(20)]
    events = [sum(int(p["event"][0]) for p in row) for row in people]
    assert min(events) >= 120 and 140 < np.mean(events) < 165
    everyone = [p for row in people for p in row]
    found, error = fit(*(np.concatenate([p[k] for p in everyone]) for k in ("factor_severity", "age")),
                       np.array([p["sex"][0] == "M" for p in everyone]),
                       *(np.concatenate([p[k] for p in everyone]) for k in ("time", "event")))
    assert abs(found["severity"] - np.log(1 / 0.73)) < 3 * error["severity"]   # as the file is made
    gap = np.concatenate([p["factor_brain_age"] - p["age"] for p in everyone])
    assert 4.5 < gap.std() < 5.5
    assert 0.55 < np.mean([p["sex"][0] == "M" for p in everyone]) < 0.61


@pytest.mark.parametrize("bad", [dict(subjects=0), dict(patients=-1), dict(size=8), dict(seed=-1)])
def test_bad_arguments_are_one_line(bad, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        data.phantom_cohort(str(tmp_path / "x.h5"), **bad)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# ---------------------------------------------------------------- volumes

@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("brains") / "brains.h5")
    data.phantom_brains(path, subjects=12, seed=2, size=48)
    return path


def test_a_slice_is_a_slice_of_the_volume():
    voxel = 4.0
    x, y, z = data.grid((9, 40, 36), voxel)
    at = data.pose(np.random.default_rng(5), x, y, z)
    factors = dict(age=70.0, alzheimer=0.5)
    volume = data.brain_volume(7, *at, voxel, **factors)
    for k in (0, 4, 8):
        one = data.brain(np.random.default_rng(7), *(c[k:k + 1] for c in at), voxel, **factors)
        for name in one:
            np.testing.assert_array_equal(one[name][0], volume[name][k], err_msg=name)


def test_alzheimer_shrinks_hippocampi_and_opens_horns():
    voxel = 3.0
    at = np.broadcast_arrays(*data.grid((40, 56, 48), voxel))
    for k in range(3):
        hippocampus, ventricle = zip(*((d["hippocampus"].sum(), d["ventricle"].sum()) for d in (
            data.brain_volume(k, *at, voxel, age=70.0, alzheimer=a) for a in (0.0, 0.5, 1.0))))
        assert (np.diff(hippocampus) < 0).all() and (np.diff(ventricle) > 0).all()
        assert hippocampus[-1] < 0.75 * hippocampus[0] and ventricle[-1] > 1.2 * ventricle[0]


def test_volume_files_keep_their_word(volumes, tmp_path):
    assert data.check(volumes) == []
    subject, label, session, age, rate, ventricle, hippocampus, mask, image = (column(volumes, n) for n in (
        "subject", "label", "session", "age", "factor_rate", "factor_ventricle_ml", "factor_hippocampus_ml",
        "mask", "image"))
    assert image.shape[1:] == (48, 56, 48) and image.dtype == np.uint8 and mask.max() == 5
    assert np.median(hippocampus[label == 1]) < 0.85 * np.median(hippocampus[label == 0])
    assert 3 < hippocampus.min() and hippocampus.max() < 11 and 8 < ventricle.min() and ventricle.max() < 150
    voxel = 176 / 56
    counted = (mask == 5).sum((1, 2, 3)) * voxel ** 3 / 1000           # labels agree with the shares
    assert np.corrcoef(counted, hippocampus)[0, 1] > 0.97
    for s in np.unique(subject):
        rows = np.flatnonzero(subject == s)
        assert 3 <= len(rows) <= 5 and session[rows[0]] == 0 and session[rows].max() <= 48
        assert (np.diff(session[rows]) > 0).all() and (session[rows] % 6 == 0).all()
        np.testing.assert_allclose(age[rows] - age[rows[0]], session[rows] / 12, atol=1e-4)
        assert len(set(rate[rows])) == len(set(label[rows])) == 1
        if label[rows[0]]:                                             # AD: every session is worse
            assert (np.diff(ventricle[rows]) > 0).all() and (np.diff(hippocampus[rows]) < 0).all()
        here, last, other = (image[k, 20:40, 12:44, 12:36].ravel().astype(float)
                             for k in (rows[0], rows[-1], rows[0] - len(image) // 2))
        own = np.corrcoef(here, last)[0, 1]                            # the same head, with new noise
        assert 0.8 < own < 0.999 and own > np.corrcoef(here, other)[0, 1] + 0.05
    last = np.flatnonzero(np.append(subject[1:] != subject[:-1], True))
    first = np.append(0, last[:-1] + 1)
    growth, loss = (12 * np.log(x[last] / x[first]) / session[last] for x in (ventricle, hippocampus))
    ill = label[last] == 1                                             # per year, see phantom_brains
    assert 0.05 < np.median(growth[ill]) < 0.12 and 0.01 < np.median(growth[~ill]) < 0.04 and growth.min() > 0
    assert -0.08 < np.median(loss[ill]) < -0.03 and -0.02 < np.median(loss[~ill]) < -0.003
    assert np.corrcoef(growth, rate[last])[0, 1] > 0.7                 # the rate is what moves them
    data.phantom_brains(str(tmp_path / "b.h5"), subjects=2, seed=2, size=48)
    n = len(column(str(tmp_path / "b.h5"), "label"))
    np.testing.assert_array_equal(column(str(tmp_path / "b.h5"), "image"), image[:n])


def test_command_line(tmp_path, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["data.py", "phantom", *words])
        data.main()

    run("brains", str(tmp_path / "b.h5"), "--subjects", "1", "--size", "32")
    assert column(str(tmp_path / "b.h5"), "image").shape[1:] == (32, 40, 32)
    run("cohort", str(tmp_path / "c.h5"), "--subjects", "2", "--patients", "1", "--size", "32")
    assert len(column(str(tmp_path / "c.h5"), "label")) == 3
    capsys.readouterr()
    for words in (["brains", "x.h5", "--patients", "3"], ["cohort", "x.h5", "--jitter", "1"], ["brains"]):
        with pytest.raises(SystemExit) as stop:
            run(*words)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
