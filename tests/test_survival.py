"""The survival part of metrics.py against published coefficients and planted truth."""
import numpy as np
import pytest
from lifelines.datasets import load_rossi
from lifelines.statistics import logrank_test
from PIL import Image
from scipy.stats import ks_2samp

import metrics as M

KEYS = ("hr_per_sd", "hr_p", "c_index", "logrank_p", "ks_p")


def cohort(seed, n=220, hr=1 / 0.73):
    """Exponential survival with a planted hazard ratio per SD of severity, age, sex; about 65 % events."""
    rng = np.random.default_rng(seed)
    age, sex, severity = rng.uniform(18, 90, n), np.where(rng.random(n) < 0.55, "M", "F"), rng.normal(size=n)
    hazard = np.exp(np.log(hr) * severity + 0.02 * (age - 54) + 0.3 * (sex == "M")) / 900
    death, lost = rng.exponential(1 / hazard), rng.uniform(6, 52, n) * 30.4
    return severity, np.minimum(death, lost) + 1e-6, (death <= lost).astype(np.uint8), age, sex


def test_cox_equals_the_published_coefficients_of_rossi():
    d = load_rossi()
    columns = {k: d[k].to_numpy() for k in d.columns[2:]} | {"constant": np.full(len(d), 0.1)}
    got = M.cox(d["week"].to_numpy(), d["arrest"].to_numpy(), columns).params_
    assert list(got.index) == ["fin", "age", "race", "wexp", "mar", "paro", "prio"]
    for name, published in {"fin": -0.3794, "age": -0.0574, "prio": 0.0915}.items():
        assert abs(got[name] - published) < 1e-4


def test_a_useless_score_does_not_beat_chance_out_of_fold():
    held_out, flattered = [], []
    for seed in range(15):
        _, time, event, *_ = cohort(1000 + seed, n=100, hr=1)
        x = {k: np.random.default_rng([seed, i]).normal(size=100) for i, k in enumerate("abc")}
        held_out.append(M.c_index(M.cox_risk(time, event, x), time, event))
        flattered.append(M.cox(time, event, x).concordance_index_)
    assert np.mean(held_out) < 0.515 and np.mean(flattered) > 0.535


def test_risk_of_a_patient_does_not_use_what_became_of_the_patient(monkeypatch):
    """Every patient is held out once, and no fold is fitted to a patient whose risk it gives."""
    severity, time, event, *_ = cohort(1, n=100)
    seen, real = [], M.cox
    monkeypatch.setattr(M, "cox", lambda t, e, x: seen.append(set(x["s"])) or real(t, e, x))
    risk = M.cox_risk(time, event, {"s": severity})
    held = [set(severity) - rows for rows in seen]
    assert len(held) == 10 and sorted(s for rows in held for s in rows) == sorted(severity)
    who = np.flatnonzero(event)[7]
    moved = M.cox_risk(np.where(np.arange(100) == who, 9999, time), event, {"s": severity})
    assert np.mean(moved != risk) > 0.5 and moved[who] == risk[who]


def test_survival_numbers_of_a_planted_cohort():
    severity, time, event, age, sex = cohort(5, n=260, hr=2)
    sex[:9] = ""
    scores = {"": -severity, "noise": np.random.default_rng(0).normal(size=260), "inverted": severity}
    got = M.survival_numbers(scores, time, event, age, sex)
    keys = {k + n for k in KEYS for n in ("", ".noise", ".inverted")}
    gains = {f"c_index_gain.{n}" for n in ("noise", "inverted", "age_sex")}
    assert set(got) == keys | gains | {"c_index.age_sex", "events", "power"}
    assert all(m["n"] == 260 and np.isfinite(m["value"]) for m in got.values())
    assert got["hr_p"]["unit"] == "" and got["hr_p.noise"]["unit"] == "exploratory"
    value = {k: m["value"] for k, m in got.items()}
    low, high = got["hr_per_sd"]["ci"]
    assert low < 0.5 < high < 0.9 and value["hr_per_sd.inverted"] == pytest.approx(1 / value["hr_per_sd"])
    assert value["hr_p"] < 1e-6 < 0.01 < value["hr_p.noise"]
    assert value["c_index"] > value["c_index.age_sex"] > 0.5 and got["c_index_gain.age_sex"]["ci"][0] > 0
    assert value["c_index_gain.age_sex"] == pytest.approx(value["c_index"] - value["c_index.age_sex"])
    assert got["c_index_gain.inverted"]["ci"] == pytest.approx([0, 0], abs=1e-12)  # paired: the same risks
    top = severity < np.median(severity)
    logrank = logrank_test(time[top], time[~top], event[top], event[~top])
    assert value["logrank_p"] == pytest.approx(logrank.p_value)
    assert value["ks_p"] == pytest.approx(ks_2samp(time[top], time[~top]).pvalue)
    other = M.survival_numbers({"": 0.95 - 0.003 * severity}, time, np.arange(260) < 79, age, sex)
    unit = M.survival_numbers({"": -severity}, time, np.arange(260) < 79, age, sex)
    assert other["hr_per_sd"]["value"] == pytest.approx(unit["hr_per_sd"]["value"], rel=1e-6)
    assert other["power"]["value"] == pytest.approx(0.8, abs=5e-3)  # of 79 events


def test_few_events_a_constant_and_a_nan_score_give_nan_and_not_a_crash():
    severity, time, _, age, _ = cohort(7, n=40)
    scores = {"": -severity, "constant": np.ones(40), "nan": np.where(age > 80, np.nan, severity)}
    for events in (1, 3):
        event = np.isin(np.arange(40), np.argsort(time)[[2, 9, 20][:events]])
        with pytest.warns(UserWarning, match="no Cox of nan"):
            got = M.survival_numbers(scores, time, event, age, np.full(40, ""))
        assert all(np.isnan(got[f"{k}.nan"]["value"]) for k in KEYS)
        assert np.isnan(got["hr_per_sd.constant"]["value"]) and got["events"]["value"] == events
        assert np.isnan(got["c_index"]["value"]) == (events < 2)   # a single death cannot be held out
    assert got["c_index.constant"]["value"] == got["c_index.age_sex"]["value"]


def test_survival_curves(tmp_path):
    severity, time, event, *_ = cohort(8)
    for name, score, lived in (("two", -severity, event), ("one", np.ones(220), event),
                               ("none", -severity, np.zeros(220))):
        M.survival_curves(tmp_path / f"{name}.png", time, lived, score, "Survival of the two halves. " * 6)
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).reshape(-1, 3)
        blue, red = ((pixels == c).all(1).sum() for c in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)))
        assert red > 100 and (blue > 100) == (name != "one"), name   # a constant score has one half
