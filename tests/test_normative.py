"""normative.py: what a lesion does to the scores, whose images decide them, where the age enters, and whole runs."""
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pandas
import pytest
import torch

import data as D
import normative as m
from conftest import runs_of

main, error_of = runs_of(m)
pytestmark = pytest.mark.usefixtures("quick_statistics")
SIZES = dict(size=16, base=16, mult=(1, 2), enc_mult=(1, 2, 2), blocks=1, attention=8, groups=0,
             z_dim=8, dropout=0.0, steps=4, batch=4, lr=1e-3, save_every=2, device="cpu", S=2, draws=1,
             eval_images=8)
TINY = m.Config(**SIZES)
FLAGS = [f"--{k}={','.join(map(str, v)) if k.endswith('mult') else v}" for k, v in SIZES.items()]


def people(n=40, ill=16, seed=0, **change):
    """Columns of n healthy and `ill` patients: noise images, ages 30..70, everybody's time and event."""
    rng, total = np.random.default_rng(seed), n + ill
    columns = dict(image=rng.integers(0, 255, (total, 16, 16), dtype=np.uint8),
                   subject=np.array([f"s{seed}-{i:03d}" for i in range(total)]),
                   label=(np.arange(total) >= n).astype(int), age=rng.permutation(np.linspace(30, 70, total)),
                   sex=np.where(rng.random(total) < 0.5, "F", "M"), time=rng.uniform(10, 900, total),
                   event=(np.arange(total) % 4 > 0).astype(np.uint8))
    columns["age"][n:] = columns["age"][n:].clip(40, 60)     # all within the healthy range
    return {k: v for k, v in (columns | change).items() if v is not None}


def file_of(tmp_path, name="cohort.h5", attrs={}, **change):
    path = str(tmp_path / name)
    D.write(path, [people(**change)], attrs)
    return path


def results_of(out):
    return json.loads((out / "results.json").read_text())


# ------------------------------------------------------------------------------------ the scores

def test_image_of_code_is_what_the_code_draws_at_the_noisiest_level():
    """An eps_hat that knows the image of each code: x0_hat is that image, whatever the noise."""
    drawn, ab = torch.rand(9, 1, 16, 16) * 1.6 - 0.8, m.linear_alpha_bar(1000)

    def eps(x_t, t, z):
        assert (t == 999).all()
        return ((x_t - ab[999].sqrt() * drawn[z[:, 0].long()]) / (1 - ab[999]).sqrt()).float()
    model = SimpleNamespace(cfg=TINY, alpha_bar=ab, eps=eps)
    got = m.image_of_code(model, torch.arange(9.0)[:, None], torch.Generator().manual_seed(0))
    assert abs(got - (drawn[:, 0].numpy() + 1) / 2).max() < 1e-3      # float32, and 1 / sqrt(alpha_bar) = 157


def test_deviation_counts_a_lesion_more_where_healthy_people_are_alike():
    rng, size = np.random.default_rng(0), lambda x: (((x - drawn) / m.usual_residual(x[:40], drawn[:40])) ** 2).mean((1, 2))
    drawn = np.full((80, 16, 16), 0.5)
    real = drawn + rng.normal(0, 1, (80, 16, 16)) * np.where(np.arange(16) < 8, 0.2, 0.02)
    healthy = ((0.2 / 0.21) ** 2 + (0.02 / 0.03) ** 2) / 2      # the 1 % counts where they are alike
    assert size(real)[:40].mean() == pytest.approx(healthy, abs=0.05)
    quiet, loud = real.copy(), real.copy()
    quiet[60:, 4:8, 10:14] -= 0.15
    loud[60:, 4:8, 2:6] -= 0.15
    assert (size(quiet) - size(real) > 1)[60:].all() and abs(size(loud) - size(real)).max() < 0.3


def test_lesion_gain_takes_off_what_a_control_gives():
    """0 and 1 are ill, 3 is the control of about their age. AUROC 1 is 1/2 above chance."""
    age, ill = np.array([60.0, 62, 20, 61]), np.array([True, True, False, False])
    lesion, brain = np.zeros((4, 8, 8), bool), np.ones((4, 8, 8), bool)
    lesion[:2, 2:4, 2:4], brain[:, :, 0] = True, False
    change = np.zeros((4, 8, 8))
    change[0, 2:4, 2:4], change[:, :, 0] = -1, 5       # of either sign; outside the brain none counts
    assert m.lesion_gain(change, lesion, brain, age, ill).tolist() == [0.5, 0]
    change[3] = change[0]                                 # the control of this age has the change, too
    assert m.lesion_gain(change, lesion, brain, age, ill).tolist() == [0, -0.5]
    change[2], change[3] = change[0], 0                   # a control of another age is not asked
    assert m.lesion_gain(change, lesion, brain, age, ill).tolist() == [0.5, 0]


# ------------------------------------------------------------------------------------ age, and who is who

def test_age_reaches_the_code_and_the_unet_only_through_it():
    torch.manual_seed(0)
    model, batch = m.Model(TINY), {"image": torch.rand(2, 1, 16, 16) * 2 - 1, "age": torch.tensor([30.0, 70])}
    older, z = batch | {"age": batch["age"] + 20}, model.encode(batch)
    assert (z - model.encode(older)).abs().max() > 1e-4
    torch.nn.init.normal_(model.unet.conv_out.weight)
    model.encode = lambda b: z                # the code held fixed, another age changes nothing in the loss
    losses = [model(b, torch.Generator().manual_seed(0)) for b in (batch, older)]
    assert torch.equal(*losses)


def test_only_the_reference_decides_what_is_healthy(tmp_path):
    """Another image of a tested person changes this person's scores; one of the reference, all."""
    data, part = D.load(file_of(tmp_path)), np.array(["train"] * 20 + ["val"] * 10 + ["test"] * 26)
    torch.manual_seed(0)
    models = {"": m.Model(TINY).eval(), "untrained": m.Model(TINY).eval(), "vae": m.VAE(TINY).eval()}
    torch.nn.init.normal_(models[""].unet.conv_out.weight, 0, 0.1)

    def scores(changed=()):
        copy = replace(data, image=data.image.copy())
        copy.image[list(changed)] //= 3
        loader = D.Loader({"image": copy.image, "age": data.columns["age"]}, "cpu")
        codes = {row: m.semantic_codes(model, loader) for row, model in models.items()}
        return m.all_scores(TINY, copy, part, models, codes, loader)[0]
    old, tested, reference = scores(), scores([33, 50]), scores([25])
    assert set(old) == set(m.ROWS) - {"age_sex", "planted", "constant"}
    rest = np.setdiff1d(np.arange(56), [33, 50])
    for row in old:
        assert np.array_equal(old[row][rest], tested[row][rest]), row
        assert (old[row][[33, 50]] != tested[row][[33, 50]]).all(), row
        if row != "vae_error":                # which compares with nobody
            assert (old[row][:20] != reference[row][:20]).all(), row


def test_which_rows_train_and_which_are_the_reference(tmp_path, monkeypatch):
    """Spies in a whole run: "train" and healthy trains the networks; every mean at an age is of "val"."""
    path, trained, means = file_of(tmp_path), [], []
    fit, age_mean = m.fit, m.age_mean

    def spy_fit(model, loader, cfg, name, *rest):
        trained.append((name, loader.rows.tolist()))
        return fit(model, loader, cfg, name, *rest)

    def spy_mean(z, age, rows):
        means.append(list(rows))
        return age_mean(z, age, rows)
    monkeypatch.setattr(m, "fit", spy_fit)
    monkeypatch.setattr(m, "age_mean", spy_mean)
    main("--data", path, "--out", tmp_path / "out", *FLAGS, "--steps=1")
    data, part = D.load_study(path, "", None, 0, fractions=(0.6, 0.2, 0.2))
    healthy = data.columns["label"] == 0
    train, val = (np.flatnonzero((part == p) & healthy).tolist() for p in ("train", "val"))
    assert trained == [("ckpt", train), ("ckpt_vae", train)] and not set(train) & set(val)
    assert len(means) > 20 and all(rows == val for rows in means)


# ------------------------------------------------------------------------------------ runs

def test_a_run_on_phantoms_leaves_everything(tmp_path, capsys):
    path, out = str(tmp_path / "cohort.h5"), tmp_path / "out"
    D.phantom_cohort(path, subjects=40, patients=30, size=32)
    main("--data", path, "--out", out, *FLAGS, "--size=32", "--eval_images=20")
    text, metrics = capsys.readouterr().out, results_of(out)["metrics"]
    for key in ("hr_per_sd", "hr_p", "c_index", "logrank_p", "ks_p", "auroc", "severity_r"):
        missing = {row for row in m.ROWS if f"{key}.{row}".strip(".") not in metrics}
        assert missing <= {"age_sex", "planted", "constant"}, key
        assert metrics[key] | {"unit": ""} == metrics[f"{key}.residual"] | {"unit": ""}
    assert metrics["auroc.planted"]["value"] == metrics["severity_r.planted"]["value"] == 1
    assert {"lesion_gain", "lesion_gain.constant", "c_index_gain.age_sex"} <= set(metrics)
    assert "The primary score is residual: name it before" in text and "Planted hazard ratio per SD of health: 0.73" in text
    table = text[text.index("hazard ratio per SD"):text.index("In brackets")]
    assert max(map(len, table.splitlines())) <= 100
    for name in ("twins", "trajectory", "age", "survival", "curves", "preview"):
        assert (out / f"{name}.png").stat().st_size > 1000, name


def test_new_people_get_their_percentile_among_healthy_people_of_their_age(tmp_path, capsys):
    """The run's own people: their scores are those of the run."""
    path, out = file_of(tmp_path), tmp_path / "out"
    main("--data", path, "--out", out, *FLAGS, "--steps=2", "--recipe=paper")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    main("--out", out, "--apply", path, "--device=cpu")
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    folder = out / "apply" / Path(path).stem
    run, ours = (pandas.read_csv(f / "scores.csv") for f in (out, folder))
    for kind in ("cosine", "age_matched", "l2", "mahalanobis"):
        assert np.allclose(run[kind], ours[kind], rtol=1e-4, atol=1e-4), kind
    rank = ours["cosine_percentile"]
    assert rank.between(0, 100).all() and rank.nunique() > 3
    assert results_of(folder)["metrics"]["auroc.cosine"]["n"] == run.loc[run["part"] == "test", "subject"].nunique()
    with h5py.File(folder / "twins.h5") as f:
        assert np.allclose(f["image"][:] / 255 + f["difference"][:], D.load(path).image / 255, atol=0.01)
    assert (folder / "twins.png").stat().st_size > 1000 and "of these subjects" in capsys.readouterr().err
    (out / "reference.npz").write_bytes(b"PK")
    assert "reference.npz" in error_of(capsys, "--out", out, "--apply", path)


def test_a_new_healthy_person_has_the_percentile_fifty():
    """Scored in sample, the reference would be much nearer to its own mean and covariance than anybody new."""
    rng = np.random.default_rng(0)
    z, age, rows = rng.standard_normal((1200, 128)), rng.uniform(20, 80, 1200), np.arange(200)
    for twice in (False, True):
        if twice:       # the reference has two scans of 100 people: a scan must not judge the other one
            z[100:200], age[100:200] = z[:100] + 0.1 * rng.standard_normal((100, 128)), age[:100]
        reference = m.reference_scores(z[rows], z[rows, 0] ** 2, age[rows], rows % 100 if twice else rows)
        for kind, score in m.five_scores(z, z[:, 0] ** 2, age, rows).items():
            percentile = 100 * (reference[kind] < score[200:, None]).mean()
            assert abs(percentile - 50) < (15 if twice else 8), (kind, percentile)


def test_data_without_survival_controls_or_lesions(tmp_path, capsys):
    """No survival: the AUROC is there. Patients alone to test: survival, no AUROC. A mask: no lesion."""
    path = file_of(tmp_path, time=None, event=None)
    main("--data", path, "--out", tmp_path / "a", *FLAGS, "--steps=1", "--recipe=paper")
    assert "no survival analysis" in capsys.readouterr().out
    metrics = results_of(tmp_path / "a")["metrics"]
    assert metrics["auroc"] == metrics["auroc.cosine"]          # the paper's recipe, the paper's score
    assert not [k for k in metrics if k.startswith(("hr_", "lesion"))]

    names = {"mask_names": ["air", "brain", "lesion"]}
    healthy = file_of(tmp_path, "healthy.h5", names, mask=np.ones((56, 16, 16), np.uint8))
    columns = people(seed=1, mask=np.ones((56, 16, 16), np.uint8))
    D.write(str(tmp_path / "ill.h5"), [{k: v[40:] for k, v in columns.items()}] * 2, names)
    main("--data", healthy, "--test", tmp_path / "ill.h5", "--out", tmp_path / "b", *FLAGS, "--steps=1")
    results = results_of(tmp_path / "b")
    assert results["n"]["patients"] == results["n"]["test"] == 16       # two images each
    assert results["metrics"]["hr_per_sd"]["n"] == 16 and results["metrics"]["auroc"]["value"] is None
    assert not [k for k in results["metrics"] if k.startswith("lesion")]


def test_bad_flags_and_a_bad_cohort_end_in_one_line(tmp_path, capsys):
    path = file_of(tmp_path, label=np.zeros(56, int))
    out = tmp_path / "out"
    assert "0 patients" in error_of(capsys, "--data", path, "--out", out, *FLAGS)
    assert not (out / "ckpt.pt").exists()
    for flags in (["--score=euclid"], ["--size=18"], ["--S=2000"]):
        assert error_of(capsys, "--data", path, "--out", tmp_path / "none", *FLAGS, *flags)
    assert not (tmp_path / "none").exists()
