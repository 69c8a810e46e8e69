"""normative.py: what the score is, who may be in it, that the age enters by one door, and what is refused."""
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

import data as D
import metrics as M
import normative as m
from conftest import runs_of

main, error_of = runs_of(m)
TINY = m.Config(size=16, base=16, mult=(1, 2), enc_mult=(1, 2, 2), blocks=1, attention=8, groups=0, dropout=0.0,
                z_dim=8, steps=6, batch=4, lr=1e-3, bf16=False, device="cpu", S=4, eval_images=6)
FLAGS = ["--size=16", "--base=16", "--patch=1", "--mult=1,2", "--enc_mult=1,2,2", "--blocks=1", "--attention=8",
         "--z_dim=8", "--steps=6", "--batch=4", "--save_every=3", "--log_every=3", "--bf16=false", "--device=cpu",
         "--S=4", "--eval_images=6"]


def people(n=40, ill=16, seed=0, **change):
    """Columns of n healthy and `ill` patients: noise images, ages 30..70, everybody's time and event."""
    rng, total = np.random.default_rng(seed), n + ill
    columns = dict(image=rng.integers(0, 255, (total, 16, 16), dtype=np.uint8),
                   subject=np.array([f"s{seed}-{i:03d}" for i in range(total)]),
                   label=(np.arange(total) >= n).astype(int), age=np.linspace(30, 70, total)[rng.permutation(total)],
                   sex=np.where(rng.random(total) < 0.5, "F", "M"), time=rng.uniform(10, 900, total),
                   event=(np.arange(total) % 4 > 0).astype(np.uint8))
    columns["time"][:n], columns["event"][:n] = np.nan, 0
    columns["age"][[n, n + 1]] = 40, 60      # so that no patient is outside the healthy range by chance
    columns["age"][n:] = columns["age"][n:].clip(38, 62)
    return {k: v for k, v in (columns | change).items() if v is not None}


def file_of(tmp_path, name="cohort.h5", **change):
    path = str(tmp_path / name)
    D.write(path, [people(**change)], {})
    return path


def test_head_pca_starts_as_the_pca_of_the_images_and_knows_no_age():
    """tests/test_diffae.py has the rest; here the age enters beside the pixels, and must not at first."""
    torch.manual_seed(0)
    x = torch.randn(30, 1, 16, 16).tanh()
    model = m.start_from_pca(m.Model(replace(TINY, head="pca")), D.Loader({"image": x.numpy()}, "cpu"))
    pca = PCA(TINY.z_dim).fit(x.flatten(1).numpy())
    wanted = torch.as_tensor(pca.inverse_transform(pca.transform(x.flatten(1).numpy()))).view_as(x)
    with torch.no_grad():
        for age in (20.0, 90.0):
            z = model.encode({"image": x, "age": torch.full((30,), age)})
            assert (model.unet.z_image(z).view_as(x) - wanted).abs().max() < 1e-4


# ------------------------------------------------------------------------------------ the score

def test_similarities_against_their_definitions():
    rng = np.random.default_rng(0)
    z, age, rows = rng.normal(3, 1, (60, 5)), rng.uniform(20, 80, 60), np.arange(40)
    got = m.similarities(z, age, rows)
    mean = z[:40].mean(0)
    for i in (3, 50):
        assert abs(got["cosine"][i] - z[i] @ mean / np.linalg.norm(z[i]) / np.linalg.norm(mean)) < 1e-12
        u = np.stack([age[:40] ** 0, age[:40], age[:40] ** 2], 1)
        at = np.clip(age[i], age[:40].min(), age[:40].max()) ** np.arange(3) @ np.linalg.solve(u.T @ u, u.T @ z[:40])
        assert abs(got["l2"][i] + np.linalg.norm(z[i] - at)) < 1e-6
        assert abs(got["age_matched"][i] - z[i] @ at / np.linalg.norm(z[i]) / np.linalg.norm(at)) < 1e-6


def test_all_scores_fall_with_distance_from_healthy():
    """The direction that every table states: higher = healthier."""
    rng = np.random.default_rng(1)
    z, age = rng.normal(3, 0.3, (100, 6)), rng.uniform(20, 80, 100)
    z[50:] += np.linspace(0, 6, 50)[:, None] * np.array([1, -1, 0, 0, 1, 0])
    for name, score in m.similarities(z, age, np.arange(50)).items():
        assert M.spearman(score[50:], np.arange(50)) < -0.9, name


def test_mahalanobis_is_whitened_distance():
    """With many rows the shrinkage goes to 0: the plain formula. And a rotation of z changes nothing."""
    rng = np.random.default_rng(2)
    z = rng.normal(0, 1, (20000, 3)) @ np.array([[3, 0, 0], [1, 0.5, 0], [0, 0, 1.0]])
    d = z - z.mean(0)
    exact = np.sqrt(np.einsum("ni,ij,nj->n", d, np.linalg.inv(np.cov(z.T, bias=True)), d))
    assert abs(M.mahalanobis(z, np.arange(20000)) / exact - 1).max() < 0.01
    few = M.mahalanobis(rng.normal(0, 1, (12, 40)), np.arange(8))       # singular without shrinkage
    assert np.isfinite(few).all() and (few < 1e3).all()


def test_centred_codes_have_no_cosine():
    z = np.random.default_rng(0).normal(5, 1, (50, 4))
    with pytest.raises(ValueError, match="centred"):
        m.similarities((z - z.mean(0)) / z.std(0), np.linspace(20, 80, 50), np.arange(50))


def test_age_mean_is_the_parabola_and_does_not_extrapolate():
    age = np.linspace(20, 80, 31)
    z = np.stack([1 + 2 * age, 0.01 * age ** 2 - age], 1)
    f = m.age_mean(z, age, np.arange(31))
    assert abs(f([33.3])[0] - [1 + 66.6, 0.01 * 33.3 ** 2 - 33.3]).max() < 1e-8
    assert np.allclose(f([95.0, 5.0]), f([80.0, 20.0]))


def test_the_reference_decides_not_the_others():
    rng = np.random.default_rng(3)
    z, age, rows = rng.normal(2, 1, (30, 4)), rng.uniform(20, 80, 30), np.arange(10)
    moved, old = z.copy(), m.similarities(z, age, rows)
    moved[25] += 7
    for name, score in m.similarities(moved, age, rows).items():
        assert np.array_equal(np.delete(score, 25), np.delete(old[name], 25)) and score[25] != old[name][25]


def test_brain_age_gap_is_free_of_age_and_finds_older_brains():
    rng = np.random.default_rng(4)
    age = rng.uniform(20, 80, 300)
    older = np.where(np.arange(300) >= 200, 8, 0)
    codes = np.stack([age + older + rng.normal(0, 5, 300), rng.normal(0, 1, 300)], 1)
    names = np.array([f"{i}" for i in range(300)])
    predict, gap = M.brain_age_gap(codes, age, np.arange(100), np.arange(100, 200), names)
    assert abs(np.corrcoef(gap[100:200], age[100:200])[0, 1]) < 1e-9
    assert 6 < gap[200:].mean() - gap[100:200].mean() < 10
    assert abs(predict(np.array([[50.0, 0.0]]))[0] - 50) < 3


def test_vae_latent_deviation_formula():
    torch.manual_seed(0)
    vae, loader = m.VAE(TINY).eval(), D.Loader({"image": people()["image"]}, "cpu")
    mean, logvar, residual = m.vae_reads(vae, loader)
    latent = m.latent_deviation(mean, logvar, np.arange(20))
    with torch.no_grad():
        x0 = loader.batch([30])["image"]
        mu, lv = (x.double().numpy() for x in vae.posterior(x0))
        healthy = np.concatenate([vae.posterior(loader.batch([i])["image"])[0].double().numpy() for i in range(20)])
        drawn = vae.decode(torch.tensor(mu).float())
    want = -(abs(mu[0] - healthy.mean(0)) / np.sqrt(healthy.var(0) + np.exp(lv[0]))).mean()
    assert abs(latent[30] - want) < 1e-5 and abs(residual[30] - ((x0 - drawn) / 2)[0, 0].numpy()).max() < 1e-5


def test_semantic_residual_is_the_image_minus_what_the_code_draws():
    """An eps_hat that knows the image of each code, at T - 1: x0_hat is that image, whatever the noise."""
    loader = D.Loader({"image": people()["image"]}, "cpu")
    drawn = torch.rand(56, 1, 16, 16) * 1.6 - 0.8
    ab = m.linear_alpha_bar(1000)

    def eps(x_t, t, z):
        assert (t == 999).all()
        return ((x_t - ab[999].sqrt() * drawn[z[:, 0].long()]) / (1 - ab[999]).sqrt()).float()
    model = SimpleNamespace(cfg=TINY, alpha_bar=ab, eps=eps)
    got = m.semantic_residual(model, loader, torch.arange(56.0)[:, None], torch.Generator().manual_seed(0))
    want = (loader.batch(np.arange(56))["image"] - drawn)[:, 0].numpy() / 2
    assert abs(got - want).max() < 1e-3       # float32, and 1 / sqrt(alpha_bar) = 157


def test_residual_score_finds_a_local_lesion_in_a_quiet_place():
    """The same darkening lowers the score more where healthy people are alike than where they differ."""
    rng = np.random.default_rng(0)
    noisy = np.where(np.arange(16) < 8, 0.2, 0.02)
    residual = rng.normal(0, 1, (80, 16, 16)) * noisy
    quiet, loud = residual.copy(), residual.copy()
    quiet[60:, 4:8, 10:14] -= 0.15
    loud[60:, 4:8, 2:6] -= 0.15
    base, quiet, loud = (m.residual_score(x, np.arange(40))[60:] for x in (residual, quiet, loud))
    assert (quiet < base - 1).all() and abs(loud - base).max() < 0.3
    healthy = -((0.2 / 0.21) ** 2 + (0.02 / 0.03) ** 2) / 2        # the floor of 1 % counts where it is quiet
    assert abs(m.residual_score(residual, np.arange(40))[:40].mean() - healthy) < 0.05


# ------------------------------------------------------------------------------------ age, and who is who

def test_age_reaches_the_code_and_only_through_it():
    torch.manual_seed(0)
    batch = {"image": torch.rand(2, 1, 16, 16) * 2 - 1, "age": torch.tensor([30.0, 70.0])}
    aged, ageless = (m.Model(replace(TINY, head="position", age=age)) for age in (True, False))   # head pca starts at 0
    older = batch | {"age": batch["age"] + 20}
    assert (aged.encode(batch) - aged.encode(older)).abs().max() > 1e-4
    assert torch.equal(ageless.encode(batch), ageless.encode(older))
    torch.nn.init.normal_(aged.unet.conv_out.weight)
    g = lambda: torch.Generator().manual_seed(0)
    z = aged.encode(batch)
    aged.encode = lambda b: z                 # the code held fixed, another age changes nothing in the loss
    assert torch.equal(aged(batch, g()), aged(older, g()))


def test_diffae_without_age_is_the_same_network():
    import diffae
    torch.manual_seed(0)
    ours = m.Model(replace(TINY, age=False))
    torch.manual_seed(0)
    theirs = diffae.Model(diffae.Config(**{k: v for k, v in vars(TINY).items() if k in vars(diffae.Config())}))
    batch = {"image": torch.rand(3, 1, 16, 16), "age": torch.zeros(3)}
    losses = [model(batch, torch.Generator().manual_seed(1)) for model in (ours, theirs)]
    assert torch.equal(*losses)


def roles(path, test="", **change):
    cfg = replace(TINY, data=path, test=test, **change)
    data, part = D.load_study(path, test, None, 0, fractions=(0.6, 0.2, 0.2))
    return data, m.cohort(data, part, cfg)


def test_patients_are_only_ever_tested(tmp_path):
    data, part = roles(file_of(tmp_path))
    ill = data.columns["label"] > 0
    assert set(part[ill]) == {"test"} and set(part[~ill]) == {"train", "val", "test"}
    stored = people(split=np.array((["train"] * 30 + ["val"] * 10) + ["train"] * 8 + ["val"] * 8))
    D.write(str(tmp_path / "stored.h5"), [stored], {})
    data, part = roles(str(tmp_path / "stored.h5"))          # a file that says patients train: they do not
    assert set(part[data.columns["label"] > 0]) == {"test"} and "test" not in part[data.columns["label"] == 0]


def test_a_healthy_scan_of_a_later_patient_is_nobodys(tmp_path, capsys):
    """Trained on, it would put the patient on both sides; as a control, it may be ill already."""
    columns = people()
    columns["subject"][40:48] = columns["subject"][:8]
    D.write(str(tmp_path / "converts.h5"), [columns], {})
    data, part = roles(str(tmp_path / "converts.h5"))
    ill = data.columns["label"] > 0
    assert set(part[ill]) == {"test"} and set(part[:8]) == {""} and "" not in part[8:]
    assert not set(data.subject[part == "test"]) & set(data.subject[np.isin(part, ("train", "val"))])
    assert "8 healthy images of people who are also patients" in capsys.readouterr().err


def test_with_a_test_file_the_patients_beside_the_training_data_are_left_out(tmp_path):
    data, part = roles(file_of(tmp_path), file_of(tmp_path, "other.h5", seed=1))
    first = np.char.startswith(data.subject, "s0")
    assert set(part[first & (data.columns["label"] > 0)]) == {""} and set(part[~first]) == {"test"}


def test_trained_networks_never_see_patients_or_the_reference(tmp_path, monkeypatch):
    """What fit gets are the rows of healthy people in "train", and nothing else."""
    path, seen = file_of(tmp_path), []
    fit = m.fit

    def spy(model, loader, cfg, name, *rest):
        seen.append((name, set(loader.rows.tolist())))
        return fit(model, loader, cfg, name, *rest)
    monkeypatch.setattr(m, "fit", spy)
    main("--data", path, "--out", tmp_path / "out", *FLAGS, "--steps=1")
    data, part = roles(path)
    assert [name for name, _ in seen] == ["ckpt", "ckpt_no_age", "ckpt_vae"]
    for _, rows in seen:
        assert rows == set(np.flatnonzero((part == "train") & (data.columns["label"] == 0)).tolist())


# ------------------------------------------------------------------------------------ runs

ROWS = {"cosine", "age_matched", "l2", "mahalanobis", "no_age", "untrained", "vae_recon", "vae_latent", "vae_residual",
        "pca_residual", "pca_cosine", "pca_mahalanobis", "brain_age_gap"}


def test_a_run_on_phantoms_leaves_everything(tmp_path, capsys):
    path, out = str(tmp_path / "cohort.h5"), tmp_path / "out"
    D.phantom_cohort(path, subjects=40, patients=30, size=32)
    main("--data", path, "--out", out, *FLAGS, "--size=32")
    text = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    metrics = results["metrics"]
    assert results["script"] == "normative" and results["n"]["patients"] == 30
    for key in ("hr_per_sd", "hr_p", "c_index", "logrank_p", "ks_p", "auroc", "severity_r"):
        assert ROWS <= {k[len(key) + 1:] for k in metrics if k.startswith(key + ".")} and key in metrics, key
    assert {"c_index.age_sex", "twin_overlap", "twin_overlap.control", "residual_overlap_gain", "age_use", "events", "power"} <= set(metrics)
    assert abs(metrics["hr_planted"]["value"] - 0.73) < 1e-6
    assert abs(metrics["auroc.planted"]["value"] - 1) < 0.1
    assert "higher = healthier" in text
    for name in ("twins", "trajectory", "age", "survival", "curves", "preview_ours"):
        assert (out / f"{name}.png").stat().st_size > 1000, name
    main("--data", path, "--out", out, *FLAGS, "--size=32", "--eval")
    again = json.loads((out / "results.json").read_text())["metrics"]
    assert again["hr_per_sd"] == metrics["hr_per_sd"] and again["auroc"] == metrics["auroc"]


def test_without_survival_data_the_rest_is_there(tmp_path, capsys):
    path = file_of(tmp_path, time=None, event=None)
    main("--data", path, "--out", tmp_path / "out", *FLAGS, "--steps=1", "--rivals=false")
    assert "no survival analysis" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert "auroc" in metrics and "hr_per_sd" not in metrics and "twin_overlap" not in metrics


def test_a_test_file_of_patients_alone_and_a_mask_without_a_lesion(tmp_path):
    """No controls: no AUROC, but survival. Nobody with a lesion: no overlap with one."""
    mask = {"mask": np.ones((56, 16, 16), np.uint8)}
    D.write(str(tmp_path / "all.h5"), [people() | mask], {"mask_names": ["air", "brain", "lesion"]})
    only = {k: v[40:] for k, v in people(seed=1).items()}
    D.write(str(tmp_path / "patients.h5"), [only], {})
    for test in ([], ["--test", tmp_path / "patients.h5"]):
        out = tmp_path / f"out{len(test)}"
        main("--data", tmp_path / "all.h5", *test, "--out", out, *FLAGS, "--steps=1", "--rivals=false")
        results = json.loads((out / "results.json").read_text())
        assert (results["metrics"]["auroc"]["value"] is None) == bool(test) == (results["n"]["controls"] == 0)
        assert results["metrics"]["hr_per_sd"]["n"] == 16 and "twin_overlap" not in results["metrics"]
        assert (out / "trajectory.png").exists()


def test_several_images_of_a_subject_are_one_patient(tmp_path):
    columns = people()
    D.write(str(tmp_path / "two.h5"), [columns, columns], {})
    main("--data", tmp_path / "two.h5", "--out", tmp_path / "out", *FLAGS, "--steps=1", "--rivals=false")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["metrics"]["hr_per_sd"]["n"] == 16 and results["n"]["patients"] == 16


# ------------------------------------------------------------------------------------ bad input, one line each

def bad(**rows):
    """A column of people() with some values changed: bad(age={3: nan})"""
    columns = people()
    for name, values in rows.items():
        for i, v in values.items():
            columns[name] = columns[name].astype(float) if isinstance(v, float) else columns[name]
            columns[name][i] = v
    return columns


@pytest.mark.parametrize("columns, word", [
    (bad(age={3: np.nan, 41: np.nan}), "age: missing in 2 rows: 3, 41"), (bad(time={50: -3.0}), "time[50]"),
    (bad(event={44: 2}), "event[44]"), (people() | {"label": np.zeros(56, int)}, "0 patients to test"),
    (people() | {"label": np.ones(56, int)}, "0 healthy people"), (bad(event={i: 0 for i in range(56)}), "censored"),
])
def test_bad_cohorts(columns, word, tmp_path, capsys):
    D.write(str(tmp_path / "bad.h5"), [columns], {})
    assert word in error_of(capsys, "--data", tmp_path / "bad.h5", "--out", tmp_path / "out", *FLAGS)
    assert not (tmp_path / "out" / "ckpt.pt").exists()


def test_an_unknown_diagnosis_is_not_healthy(tmp_path, capsys):
    columns = people()
    columns["ill"] = np.where(np.isin(np.arange(56), (2, 50)), np.nan, columns["label"])
    D.write(str(tmp_path / "bad.h5"), [columns], {})
    error = error_of(capsys, "--data", tmp_path / "bad.h5", "--target=ill", "--out", tmp_path / "out", *FLAGS)
    assert "ill: missing in 2 rows: 2, 50" in error


@pytest.mark.parametrize("gone, word", [("age", "age: no such"), ("label", "label: no such")])
def test_missing_columns(gone, word, tmp_path, capsys):
    columns = people()
    del columns[gone]
    D.write(str(tmp_path / "bad.h5"), [columns], {})
    assert word in error_of(capsys, "--data", tmp_path / "bad.h5", "--out", tmp_path / "out", *FLAGS)


def test_a_subject_with_two_survival_times(tmp_path, capsys):
    columns = people()
    columns["subject"][55] = columns["subject"][54]
    D.write(str(tmp_path / "bad.h5"), [columns], {})
    assert "s0-054 has several" in error_of(capsys, "--data", tmp_path / "bad.h5", "--out", tmp_path / "o", *FLAGS)


def test_warnings_with_counts(tmp_path, capsys):
    columns = bad(age={44: 95.0, 45: 91.0}, time={46: np.nan})
    columns["event"][40:] = np.arange(16) < 5
    D.write(str(tmp_path / "odd.h5"), [columns], {})
    roles(str(tmp_path / "odd.h5"))
    said = capsys.readouterr().err
    assert "2 of 16 patient images are of ages outside" in said and "1 of 16 patient images have no time" in said
    assert "5 events: too few" in said
