"""The survival part of metrics.py against lifelines, published coefficients, brute force, planted truth."""
import itertools

import numpy as np
import pytest
from lifelines import CoxPHFitter
from lifelines.datasets import load_rossi
from lifelines.statistics import proportional_hazard_test
from lifelines.utils import concordance_index
from PIL import Image
from scipy.stats import norm

import metrics as M

HR = 0.73  # per SD of similarity, the paper's


def cohort(seed, n=220, hr=1 / HR, months=(6, 52)):
    """Exponential survival with a planted hazard ratio per SD of severity, age, sex; about 65 % events."""
    rng = np.random.default_rng(seed)
    age, sex, severity = rng.uniform(18, 90, n), np.where(rng.random(n) < 0.55, "M", "F"), rng.normal(size=n)
    hazard = np.exp(np.log(hr) * severity + 0.02 * (age - 54) + 0.3 * (sex == "M")) / 900
    death, lost = rng.exponential(1 / hazard), rng.uniform(*months, n) * 30.4
    time, event = np.minimum(death, lost) + 1e-6, (death <= lost).astype(np.uint8)
    return severity, time, event, age, sex


def tied(seed, n=60):
    """Risk, time, event with many ties in risk and in time, a third censored."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 8, n) / 7, rng.integers(1, 12, n).astype(float), rng.random(n) < 0.67


# C-index

def test_c_index_equals_lifelines_and_brute_force():
    for seed in range(20):
        risk, time, event = tied(seed)
        right = pairs = 0.0
        for i, j in itertools.permutations(range(len(risk)), 2):
            if event[i] and (time[i] < time[j] or time[i] == time[j] and not event[j]):
                pairs += 1
                right += 1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0
        got = M.c_index(risk, time, event)
        assert abs(got - right / pairs) < 1e-12
        assert abs(got - concordance_index(time, -risk, event)) < 1e-12
        assert abs(got + M.c_index(-risk, time, event) - 1) < 1e-12


def test_c_index_takes_a_risk():
    assert M.c_index([3, 2, 1], [10, 20, 30], [1, 1, 1]) == 1  # the riskiest died first
    severity, time, event, *_ = cohort(0)
    assert M.c_index(severity, time, event) > 0.53
    assert M.c_index(-severity, time, event) < 0.47


def test_c_index_without_a_comparable_pair_is_nan():
    assert np.isnan(M.c_index([1, 2], [5, 9], [0, 0]))
    assert np.isnan(M.c_index([1, 2], [5, 5], [1, 1]))   # died on the same day: nobody was first
    assert np.isnan(M.c_index([1, 2], [5, 9], [0, 1]))   # lost before the other died
    assert M.c_index([1, 2], [5, 5], [1, 0]) == 0        # alive when lost on the day the other died
    assert np.isnan(M.c_index([1, np.nan, 0], [1, 2, 3], [1, 1, 1]))


def counts_of(n, draws, seed):
    """How often each of n patients is in each resample that bootstrap draws."""
    rng = np.random.default_rng(seed)
    return np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(draws)])


@pytest.mark.parametrize("n", [40, 700])                 # 700: more events than one block of pairs
def test_vectorised_resamples_equal_the_plain_bootstrap(n):
    risk, time, event = tied(1, n)
    draws = M.c_index(risk, time, event, counts_of(n, 25, seed=3))
    plain = []
    rng = np.random.default_rng(3)
    for _ in range(25):
        pick = rng.integers(n, size=n)
        plain.append(M.c_index(risk[pick], time[pick], event[pick]))
    assert np.abs(draws - plain).max() < 1e-12 and np.std(draws) > 0
    expected = M.bootstrap(M.c_index, np.arange(n), risk, time, event, n=25, seed=3)["ci"]
    assert np.percentile(draws, [2.5, 97.5]) == pytest.approx(expected, abs=1e-12)


def test_resamples_without_a_comparable_pair_are_nan():
    event, counts = np.arange(6) == 0, counts_of(6, 200, seed=0)
    draws = M.c_index(np.arange(6.0), np.arange(1.0, 7), event, counts)
    assert 0.2 < np.isnan(draws).mean() < 0.5            # (5/6)^6 = 0.33: the only death was not drawn
    assert (draws[~np.isnan(draws)] == 0).all()
    assert np.isnan(M.c_index(np.full(6, np.nan), np.arange(1.0, 7), event, counts)).all()
    assert np.isnan(M.c_index(np.arange(6.0), np.arange(1.0, 7), event & False, counts)).all()


# Cox

def test_cox_equals_the_published_coefficients_of_rossi():
    d = load_rossi()
    got = M.cox(d["week"], d["arrest"], {k: d[k].to_numpy() for k in d.columns[2:]})
    assert list(got) == ["fin", "age", "race", "wexp", "mar", "paro", "prio"]
    for name, published in {"fin": -0.3794, "age": -0.0574, "prio": 0.0915}.items():
        assert abs(got[name]["coef"] / got[name]["sd"] - published) < 1e-4
    assert got["fin"]["p"] == pytest.approx(0.047, abs=2e-3)
    for g in got.values():  # estimate, interval and p are one Wald test
        assert g["hr"] == pytest.approx(np.exp(g["coef"]))
        se = np.diff(np.log(g["ci"]))[0] / (2 * norm.isf(0.025))
        assert np.mean(np.log(g["ci"])) == pytest.approx(g["coef"], abs=1e-9)
        assert 2 * norm.sf(abs(g["coef"]) / se) == pytest.approx(g["p"], rel=1e-6)
    fitter = CoxPHFitter().fit(d, "week", "arrest")
    ph = proportional_hazard_test(fitter, d, time_transform="rank").p_value
    assert [g["ph_p"] for g in got.values()] == pytest.approx(ph, rel=1e-4)
    assert got["age"]["ph_p"] < 0.01 < got["prio"]["ph_p"]  # age is the known violation in these data


def test_cox_does_not_depend_on_units_or_order():
    severity, time, event, age, _ = cohort(3)
    got = M.cox(time, event, {"s": severity, "age": age})
    shuffled = np.random.default_rng(0).permutation(len(time))
    other = M.cox(time[shuffled] / 30, event[shuffled],
                  {"age": age[shuffled] * 12, "s": 0.95 + 1e-4 * severity[shuffled]})
    for name, key in itertools.product(("s", "age"), ("hr", "p", "ph_p")):
        assert other[name][key] == pytest.approx(got[name][key], rel=1e-4)
    assert other["age"]["sd"] == pytest.approx(12 * got["age"]["sd"])


def test_cox_intervals_cover_the_planted_hazard_ratio():
    covered, violated, events = [], [], []
    for seed in range(50):
        severity, time, event, age, sex = cohort(seed)
        got = M.cox(time, event, {"score": severity, "age": age, "sex": M.sex_code(sex)})["score"]
        covered.append(got["ci"][0] <= 1 / HR <= got["ci"][1])
        violated.append(got["ph_p"] < 0.05)
        events.append(event.mean())
    assert 0.88 <= np.mean(covered) <= 0.99 and 0.55 < np.mean(events) < 0.75
    assert np.mean(violated) < 0.2                       # hazards are proportional here


def test_a_useless_score_is_significant_in_one_cohort_of_twenty():
    p = []
    for seed in range(200):
        _, time, event, *_ = cohort(1000 + seed, n=120)
        p.append(M.cox(time, event, {"score": np.random.default_rng(seed).normal(size=120)})["score"]["p"])
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.09


def test_hazards_that_cross_are_flagged():
    rng = np.random.default_rng(0)
    group = np.arange(300) % 2
    time = np.where(group == 1, rng.weibull(0.6, 300), rng.weibull(3, 300)) + 1e-6  # dies early or late
    assert M.cox(time, np.ones(300), {"group": group})["group"]["ph_p"] < 1e-3


def test_cox_drops_constant_columns_and_refuses_in_one_line():
    severity, time, event, age, _ = cohort(0, n=80)
    assert list(M.cox(time, event, {"s": severity, "one": np.full(80, 0.1)})) == ["s"]
    assert M.cox(time, event, {"one": np.ones(80)}) == {}
    assert (M.cox_risk(time, event, {"one": np.ones(80)}) == 0).all()
    late = time.argsort().argsort() * 1.0
    bad = {"no convergence on s, twice": (event, {"s": severity, "twice": 2 * severity}),
           "no convergence on late with 80 events": (np.ones(80), {"late": late}),  # decides who dies next
           "no convergence on s with 0 events": (np.zeros(80), {"s": severity}),
           "s is nan or infinite in 1 of 80": (event, {"s": np.where(late == 3, np.nan, severity)})}
    for message, (e, covariates) in bad.items():
        with pytest.raises(ValueError, match=message) as error:
            M.cox(time, e, covariates)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="1 event"):
        M.cox_risk(time, np.arange(80) == 4, {"s": severity})


# Out of fold

def test_risk_of_a_patient_does_not_use_what_became_of_the_patient():
    severity, time, event, age, _ = cohort(1, n=100)
    covariates = {"s": severity, "age": age}
    risk = M.cox_risk(time, event, covariates)
    assert np.array_equal(risk, M.cox_risk(time, event, covariates))
    assert not np.array_equal(risk, M.cox_risk(time, event, covariates, seed=1))
    who = int(np.flatnonzero(event)[7])
    time = time.copy()
    time[who] = 5 * time.max()
    moved = M.cox_risk(time, event, covariates)
    assert moved[who] == risk[who] and np.mean(moved != risk) > 0.5


def test_risks_of_different_folds_share_their_zero():
    severity, time, event, *_ = cohort(2, n=300, hr=4)
    cosine = 0.95 - 0.003 * severity                     # in units of its own, far from 0
    in_sample = M.cox(time, event, {"s": cosine})["s"]
    whole = in_sample["coef"] * (cosine - cosine.mean()) / in_sample["sd"]
    error = np.abs(M.cox_risk(time, event, {"s": cosine}) - whole)
    assert error.max() < 0.35 and error.mean() < 0.07    # a fold centred on itself is off by 1.4 / sqrt(30)


def test_out_of_fold_risk_of_useless_columns_does_not_beat_chance():
    held_out, flattered = [], []
    for seed in range(25):
        _, time, event, *_ = cohort(seed, n=100, hr=1)
        x = {k: np.random.default_rng([seed, i]).normal(size=100) for i, k in enumerate("abc")}
        held_out.append(M.c_index(M.cox_risk(time, event, x, folds=5), time, event))
        flattered.append(M.c_index(sum(v["coef"] * x[k] / v["sd"] for k, v in M.cox(time, event, x).items()),
                                   time, event))
    assert np.mean(held_out) < 0.515 and np.mean(flattered) > 0.535


# Halves, power, sex

def test_median_split():
    assert M.median_split([5, 1, 3, 2]).tolist() == [True, False, True, False]
    assert M.median_split([1, 2, 2, 2, 9]).tolist() == [False, False, False, False, True]
    assert not M.median_split(np.ones(4)).any() and not M.median_split([1, np.nan, 3]).any()


def test_ks_ignores_censoring_and_the_log_rank_test_does_not():
    rng = np.random.default_rng(0)
    death, high = rng.exponential(900, 600), np.arange(600) < 300
    lost = np.where(high, rng.uniform(0, 300, 600), 9000)  # same survival, one half hardly followed
    time, event = np.minimum(death, lost), death <= lost
    assert M.ks_p(time, high) < 1e-6 and M.logrank_p(time, event, high) > 0.05
    death[high] *= 2                                       # a true difference both see when followed alike
    assert M.ks_p(death, high) < 1e-3 and M.logrank_p(death, np.ones(600), high) < 1e-3
    nobody = np.zeros(600, bool)
    for side in (nobody, ~nobody):
        assert np.isnan(M.ks_p(time, side)) and np.isnan(M.logrank_p(time, event, side))


def test_power_counts_events():
    assert M.power(0.73, 79) == pytest.approx(0.80, abs=0.005)
    assert M.power(1 / 0.73, 79) == pytest.approx(M.power(0.73, 79))
    assert M.power(1, 500) == pytest.approx(0.025) and M.power(0.73, 0) == pytest.approx(0.025)


def test_sex_code():
    assert M.sex_code(["M", "F", "M", ""]).tolist() == [1, 0, 1, pytest.approx(2 / 3)]
    assert M.sex_code(["M", "F"]).tolist() == [0, 1]       # equally many: the first of the alphabet
    for constant in (["", ""], ["M", ""], ["F", "F"]):
        assert np.ptp(M.sex_code(constant)) == 0


# What a script reports

KEYS = "hr_per_sd hr_p hr_alone hr_alone_p ph_p c_index c_index_alone logrank_p ks_p".split()


def test_survival_numbers_of_a_planted_cohort():
    severity, time, event, age, sex = cohort(5, n=260, hr=2)
    sex[:9] = ""
    scores = {"": -severity, "noise": np.random.default_rng(0).normal(size=260), "inverted": severity}
    got = M.survival_numbers(scores, time, event, age, sex)
    expected = {k + n for k in (*KEYS, "c_index_gain") for n in ("", ".noise", ".inverted")}
    expected |= {"c_index.age_sex", "c_index_alone.age_sex", "events", "power"}
    assert set(got) == expected and all(m["n"] == 260 for m in got.values())
    value = {k: m["value"] for k, m in got.items()}
    assert np.isfinite(list(value.values())).all()
    low, high = got["hr_per_sd"]["ci"]
    assert low < 0.5 < high < 0.9                          # planted 1 / 2 per SD of similarity
    assert got["hr_per_sd"]["better"] == "lower" and value["hr_per_sd.inverted"] > 1.2
    assert value["hr_per_sd.inverted"] == pytest.approx(1 / value["hr_per_sd"])
    assert value["hr_p"] < 1e-6 < 0.01 < value["hr_p.noise"] and value["logrank_p"] < 1e-3
    assert value["c_index"] > value["c_index.age_sex"] > 0.5
    assert value["c_index_alone"] > 0.6 and value["c_index_alone.inverted"] < 0.4
    assert value["c_index_alone"] == M.c_index(severity, time, event)
    assert value["c_index.inverted"] == pytest.approx(value["c_index"])    # a Cox finds the sign by itself
    assert value["c_index_alone.age_sex"] == value["c_index.age_sex"]
    assert value["c_index_gain"] == pytest.approx(value["c_index"] - value["c_index.age_sex"])
    assert got["c_index_gain"]["ci"][0] > 0
    assert got["c_index_gain.inverted"]["ci"] == pytest.approx([0, 0], abs=1e-12)  # paired: the same risks
    assert value["events"] == event.sum() and value["power"] == M.power(0.73, event.sum())
    high = M.median_split(-severity)
    assert value["ks_p"] == M.ks_p(time, high) and value["logrank_p"] == M.logrank_p(time, event, high)


def test_interval_of_the_gain_is_that_of_the_paired_difference():
    severity, time, event, age, sex = cohort(6, n=70)
    got = M.survival_numbers({"": -severity}, time, event, age, sex, seed=4)
    base = {"age": age, "sex": M.sex_code(sex)}
    ours, other = (M.cox_risk(time, event, x, seed=4) for x in ({"score": -severity, **base}, base))
    difference = M.bootstrap(lambda a, b, t, e: M.c_index(a, t, e) - M.c_index(b, t, e), np.arange(70),
                             ours, other, time, event)
    assert got["c_index_gain"]["value"] == pytest.approx(difference["value"])
    assert got["c_index_gain"]["ci"] == pytest.approx(difference["ci"], abs=1e-9)


@pytest.mark.filterwarnings("ignore:survival")
@pytest.mark.parametrize("events", [1, 3])
def test_few_events_a_constant_and_a_nan_score_give_nan_and_not_a_crash(events):
    severity, time, _, age, _ = cohort(7, n=40)
    event = np.zeros(40)
    event[np.argsort(time)[[2, 9, 20][:events]]] = 1
    scores = {"": -severity, "constant": np.ones(40), "nan": np.where(age > 80, np.nan, severity)}
    with pytest.warns(UserWarning, match=r"survival\.nan: cox"):
        got = M.survival_numbers(scores, time, event, age, np.full(40, ""))
    assert all(np.isnan(got[f"{k}.nan"]["value"]) for k in (*KEYS, "c_index_gain"))
    assert np.isnan(got["hr_per_sd.constant"]["value"]) and got["c_index_alone.constant"]["value"] == 0.5
    assert got["events"]["value"] == events and got["power"]["value"] < 0.1
    assert np.isnan(got["c_index"]["value"]) == (events == 1)   # a single death cannot be held out
    if events == 3:
        assert got["c_index.constant"] == got["c_index.age_sex"]


# Figures

def test_survival_curves(tmp_path):
    severity, time, event, *_ = cohort(8)
    for name, score, lived in (("two", -severity, event), ("one", np.ones(220), event),
                               ("all", -severity, np.ones(220)), ("none", -severity, np.zeros(220))):
        M.survival_curves(tmp_path / f"{name}.png", time, lived, score, "Survival of the two halves. " * 6)
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).reshape(-1, 3)
        blue, red = ((pixels == c).all(1).sum() for c in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)))
        assert red > 100 and (blue > 100) == (name != "one"), name   # a constant score has one half
    assert len(list(tmp_path.iterdir())) == 4


def test_scatter(tmp_path):
    x = np.arange(40.0)
    groups = {"healthy": x < 20, "patients": x >= 20}
    M.scatter(tmp_path / "a.png", x, -x, groups, "age (years)", "similarity", "Caption")
    r, _, b = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)[100:-60].transpose(2, 0, 1)
    blue, red = np.nonzero(b - r > 60)[1], np.nonzero(r - b > 60)[1]      # the healthy are left of the patients
    assert len(blue) > 200 and len(red) > 200 and np.median(blue) < np.median(red) - 100
