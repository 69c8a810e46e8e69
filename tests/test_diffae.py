"""diffae.py: its equations against closed forms, samplers against an exact oracle and diffusers, the training loop
against a plain one, whole runs. The functions that an exercise asks for, here and in the other files, are tested by
the checks in test_exercises.py; what runs refuse, and runs that are cut, in test_faults.py."""
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data as D
import diffae as m
import metrics as M
from conftest import ENV, ROOT, runs_of
from test_exercises import gaussian_eps

main, error_of = runs_of(m)
pytestmark = pytest.mark.usefixtures("quick_statistics")
AB = m.linear_alpha_bar(1000)
TINY = m.Config(size=16, base=16, mult=(1, 2), enc_mult=(1, 2, 2), blocks=1, attention=8, groups=0, dropout=0.0,
                z_dim=8, steps=12, batch=4, lr=1e-3, save_every=4, device="cpu", S=4, draws=2, eval_images=8)
FLAGS = ["--size=16", "--base=16", "--mult=1,2", "--enc_mult=1,2,2", "--blocks=1", "--attention=8",
         "--z_dim=8", "--steps=12", "--batch=4", "--save_every=4", "--device=cpu", "--S=4", "--draws=2",
         "--eval_images=8"]


def images(n=12, size=16, seed=0):
    """Bright discs on noise, as uint8: something that can be learnt."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    c = rng.uniform(0.3, 0.7, (n, 2, 1, 1)) * size
    return (np.clip(((x - c[:, 0]) ** 2 + (y - c[:, 1]) ** 2 < size) * 0.7 + rng.uniform(0, 0.2, (n, size, size)), 0, 1)
            * 255).astype(np.uint8)


@pytest.fixture
def tiny(tmp_path):
    """A file of 12 subjects x 2 slices."""
    path = tmp_path / "tiny.h5"
    label = np.repeat(np.arange(12) % 2, 2)
    D.write(str(path), [dict(image=images(24), subject=np.repeat([f"p{i:02d}" for i in range(12)], 2), label=label,
                             has_infarct=label, factor_size=np.linspace(0, 1, 24).astype(np.float32))], {})
    return str(path)


# --------------------------------------------------------------------------------- equations

def test_ddpm_schedule():
    beta = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    assert abs(AB.numpy() - np.cumprod([1 - b for b in beta])).max() < 1e-14


def test_times_of_training_follow_their_density():
    """P(t < a T) = a^(1/power), and every t from 0 to T-1 can be drawn."""
    g = torch.Generator().manual_seed(0)
    for power in (1.0, 0.5):
        t = m.random_t(200_000, 1000, power, g)
        assert t.min() >= 0 and t.max() == 999
        for a in (0.1, 0.5, 0.9):
            assert abs((t < 1000 * a).double().mean() - a ** (1 / power)) < 0.005


def test_vae_eq10_kl():
    """The KL term against torch.distributions, through the loss: two betas differ by their KL."""
    torch.manual_seed(0)
    vae = m.VAE(replace(TINY, augment=0.0))
    batch = {"image": torch.randn(4, 1, 16, 16)}
    loss = []
    for beta in (0.0, 3.0):
        vae.cfg = replace(vae.cfg, vae_beta=beta)
        loss.append(vae(batch, torch.Generator().manual_seed(1)).item())
    mean, logvar = vae.encoder(batch["image"]).chunk(2, 1)
    N = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(N(mean, (logvar / 2).exp()), N(0.0, 1.0)).sum(1).mean().item()
    assert loss[1] - loss[0] == pytest.approx(3 * kl / 256, rel=1e-3)


def test_prior_schedule_is_constant_beta():
    ab = m.Prior(1000, torch.randn(5, 8)).alpha_bar
    assert abs(ab[99] - 0.992 ** 100) < 1e-12


def test_prior_draws_codes_like_those_it_has_seen_after_few_steps():
    """Predicting eps, as published, draws codes with nine times the SD of real ones after so few steps."""
    torch.manual_seed(0)
    codes, g = 3 + torch.randn(300, 4) @ torch.randn(4, 64), torch.Generator().manual_seed(0)
    prior = m.Prior(1000, codes)
    opt = torch.optim.Adam(prior.parameters(), lr=1e-3)
    for _ in range(150):
        opt.zero_grad()
        prior({"z": codes[torch.randint(300, (32,), generator=g)]}, g).backward()
        opt.step()
    with torch.no_grad():
        drawn = prior.sample(200, g)
    assert 0.7 < drawn.std() / codes.std() < 1.3 and abs(drawn.mean() - codes.mean()) < 0.5


# --------------------------------------------------------------------------------- networks

def test_paper_network_has_the_tensors_of_the_original():
    cfg = m.Config(**m.RECIPES["paper"])
    with torch.device("meta"):
        model = m.Model(cfg)
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert (count(model.encoder), count(model.unet), count(model)) == (24_671_232, 103_867_009, 128_538_241)
    assert len(model.state_dict()) == 608


@pytest.mark.parametrize("recipe", ["ours", "paper"])
def test_encoder_gets_gradient_from_the_third_step(recipe):
    """Zero-initialised layers hide the paper's encoder for two steps: by design, and then it must train. In ours the
    image of z_sem passes by the second of them."""
    torch.manual_seed(0)
    model = m.Model(replace(TINY, **m.RECIPES[recipe]))
    opt, g, seen = torch.optim.Adam(model.parameters(), 1e-3), torch.Generator().manual_seed(0), []
    for _ in range(3):
        opt.zero_grad()
        model({"image": torch.randn(4, 1, 16, 16, generator=g)}, g).backward()
        seen.append(max(p.grad.abs().max().item() for p in model.encoder.parameters()))
        opt.step()
    assert seen[0] == 0 and (seen[1] > 0) == (recipe == "ours") and seen[2] > 0


def test_resample_equals_interpolate_and_keeps_channels_last():
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(m.resample(x, "up"), F.interpolate(x, scale_factor=2))
    y = m.resample(x.to(memory_format=torch.channels_last), "up")
    assert y.is_contiguous(memory_format=torch.channels_last) and torch.equal(y, F.interpolate(x, scale_factor=2))
    assert torch.equal(m.resample(x, "down"), F.avg_pool2d(x, 2))


def test_spatial_encoder_sees_position_and_pooling_does_not():
    """A disc moved by half the image: the mean of the feature map hardly moves, the flattened map does."""
    x, moved = torch.zeros(2, 1, 32, 32), {}
    x[0, :, 4:10, 4:10] = x[1, :, 20:26, 20:26] = 1.0
    for spatial in (False, True):
        torch.manual_seed(0)
        z = m.Encoder(replace(TINY, size=32, attention=0, spatial=spatial), 1, 8)(x)
        moved[spatial] = ((z[0] - z[1]).norm() / z.norm()).item()
    assert moved[True] > 3 * moved[False], moved


@pytest.mark.parametrize("size, step", [(20, 1), (48, 4)])
def test_in_the_frame_of_the_wall_a_turn_leaves_z_sem_as_it_is(size, step):
    """There a turn of the heart shifts columns by multiples of the encoder's step. Depth is kept."""
    cfg, x = replace(TINY, size=size, frame="wall", z_dim=2 * size), torch.rand(2, 1, size, size)
    turned, deeper = x.roll(4 * step, 3), x.roll(4 * step, 2)
    for network in (m.Model, m.VAE):
        torch.manual_seed(0)
        z = m.build(network, cfg).encoder
        assert torch.allclose(z(turned), z(x), atol=1e-4) and not torch.allclose(z(deeper), z(x), atol=1e-2)
    rows = {20: 20, 48: 12}[size]
    x, bright = x * 0, x * 0
    bright[:, :, size // 2, :size // 4] = 3      # a bright part of the ring moves maxima: of the VAE's mean and variance alike
    torch.manual_seed(0)
    moved = (z(bright) - z(x)).abs()[0].view(2, -1, 2, rows).sum((1, 3))
    assert (moved > 0.05).all() and (moved[:, 1] > moved[:, 0]).all(), moved
    assert type(m.build(m.Model, replace(cfg, spatial=False)).encoder) is m.Encoder      # as published


def test_roughness_is_the_variance_of_the_laplacian():
    noise = np.random.default_rng(0).normal(0, 0.1, (3, 400, 400))
    assert np.allclose(M.roughness(noise), 20 * 0.01, rtol=0.03)        # weights 1, 1, 1, 1, -4: 4 + 16
    assert M.roughness(np.linspace(0, 1, 50)[None] * np.ones((1, 50, 1)))[0] < 1e-4


def test_augment_is_a_rigid_motion_of_the_image():
    """The disc's mass stays, its centre moves; strength 0 only flips, if asked."""
    x = torch.zeros(64, 1, 32, 32)
    x[:, :, 12:20, 10:16] = 1.0
    g = torch.Generator().manual_seed(0)
    y = D.augment(x, 1.0, False, g)
    mass = y.sum((1, 2, 3)) / x.sum((1, 2, 3))
    assert 0.7 < mass.min() < mass.max() < 1.35 and (y - x).abs().amax((1, 2, 3)).min() > 0
    z = D.augment(x, 0.0, True, g)
    flipped = (z == x.flip(3)).all(3).all(2).all(1)
    assert ((z == x).all(3).all(2).all(1) | flipped).all() and 16 < flipped.sum() < 48
    assert torch.equal(D.augment(x, 0.0, False, g), x)


def test_augment_is_exact_under_autocast():
    """affine_grid multiplies matrices; in bfloat16 the positions would be off by a quarter of a pixel."""
    x = torch.rand(8, 1, 32, 32) * 2 - 1
    plain = D.augment(x, 1.0, False, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(D.augment(x, 1.0, False, torch.Generator().manual_seed(0)), plain)


# --------------------------------------------------------------------------------- samplers

@pytest.mark.parametrize("stride, S, sd", [("trailing", 20, 0.453), ("trailing", 250, 0.937), ("quadratic", 50, 0.953)])
def test_encoded_noise_gets_its_sd_from_steps_at_low_noise(stride, S, sd):
    """N(.5, .002) has much fine detail. With the exact eps, few even steps leave x_T far from an SD of 1."""
    x0 = 0.5 + 0.002 ** 0.5 * torch.randn(100_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_T = m.ddim_encode(gaussian_eps(0.002 ** 0.5), x0, S, AB, stride)
    assert x_T.std().item() == pytest.approx(sd, abs=0.006)


@pytest.mark.parametrize("S", [1, 3, 20, 64, 128, 300, 1000])
def test_times_work_for_any_number_of_steps(S):
    ts = m.times(S, 1000)
    assert len(ts) == S and ts[-1] == 999 and ts[0] >= 0 and all(b > a for a, b in zip(ts, ts[1:]))
    dense = m.times(S, 1000, "quadratic")
    assert len(dense) == S and dense[-1] == 999 and dense[0] >= 0 and all(b > a for a, b in zip(dense, dense[1:]))
    assert m.times(20, 1000, "leading") == list(range(0, 1000, 50))
    with pytest.raises(ValueError):
        m.times(1001, 1000)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("S", [10, 20, 50])
def test_decoding_equals_diffusers_ddim(S, clip):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(1000, 1e-4, 0.02, "linear", clip_sample=clip, timestep_spacing="trailing")
    assert (scheduler.alphas_cumprod - AB).abs().max() < 1e-6
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = AB, torch.tensor(1.0).double()   # theirs is float32
    scheduler.set_timesteps(S)
    eps = lambda x, t: torch.tanh(x * (1 + t / 1000)) * 0.9            # any function will do
    x = y = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    for t in scheduler.timesteps:
        y = scheduler.step(eps(y, int(t)), int(t), y, use_clipped_model_output=True).prev_sample
    assert (m.ddim_decode(eps, x, S, AB, clip=clip) - y).abs().max() < 1e-6


def test_diffae_eq8_leading_stride_is_the_original_codes():
    """x0 counts as level 0, the last step goes to alpha_bar = 0: x_T is the last eps."""
    eps, calls = gaussian_eps(0.25), []
    x0 = torch.randn(5, 1, dtype=torch.float64)
    x_T = m.ddim_encode(lambda x, t: calls.append((x, t)) or eps(x, t), x0, 20, AB, "leading")
    assert [t for _, t in calls] == list(range(0, 1000, 50)) and torch.equal(calls[0][0], x0)
    assert (x_T - eps(calls[-1][0], 950)).abs().max() < 1e-12


# --------------------------------------------------------------------------------- training

def loader(n=12):
    return D.Loader({"image": images(n)}, "cpu")


def trained(model, cfg, steps, out, n=12):
    out.mkdir(exist_ok=True)
    return m.fit(model, loader(n), replace(cfg, out=str(out)), "ckpt", steps, {})[0]


def test_fit_equals_a_plain_loop(tmp_path, monkeypatch):
    """Weights and EMA of 12 steps against Adam written out, with the same batches, noise and clipping."""
    monkeypatch.setattr(m, "amp", lambda device: torch.autocast("cpu", enabled=False))
    torch.manual_seed(0)
    model, plain = m.Model(TINY), m.Model(TINY)
    plain.load_state_dict(model.state_dict())
    ema = trained(model, TINY, 12, tmp_path)
    average = [p.detach().clone() for p in plain.parameters()]
    first = [torch.zeros_like(p) for p in average]
    second = [torch.zeros_like(p) for p in average]
    for k in range(12):
        g = torch.Generator().manual_seed(D.mix(0, k, 0, 0))
        loss = plain(loader().batch(D.batch_rows(12, 4, 0, k)), g)
        grads = torch.autograd.grad(loss, list(plain.parameters()))
        size = torch.stack([x.norm() for x in grads]).norm()
        with torch.no_grad():
            for p, x, m1, m2, e in zip(plain.parameters(), grads, first, second, average):
                x = x * min(1, 1 / (size + 1e-6))
                m1.mul_(0.9).add_(0.1 * x)
                m2.mul_(0.999).add_(0.001 * x * x)
                step = m1 / (1 - 0.9 ** (k + 1)) / ((m2 / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
                p -= 1e-3 * (k + 1) / 100 * step
                decay = min(0.9999, (1 + k) / (10 + k))
                e.copy_(decay * e + (1 - decay) * p)
    for p, q, e, f in zip(model.parameters(), plain.parameters(), ema.parameters(), average):
        assert (p - q).abs().max() < 2e-5 and (e - f).abs().max() < 2e-5


def test_overfits_four_images(tmp_path):
    torch.manual_seed(0)
    trained(m.Model(TINY), replace(TINY, augment=0.0, save_every=1000, lr=3e-3), 160, tmp_path, n=4)
    losses = [r["loss"] for r in M.read_log(tmp_path / "log.jsonl")]
    assert np.mean(losses[-3:]) < 0.5 * losses[0]


def test_longer_training_on_top_of_a_finished_run(tmp_path):
    for out, lengths in (("once", (12,)), ("twice", (6, 12))):
        for steps in lengths:
            torch.manual_seed(0)
            trained(m.Model(TINY), TINY, steps, tmp_path / out)
    a, b = (torch.load(tmp_path / d / "ckpt.pt", weights_only=True) for d in ("once", "twice"))
    assert all(torch.equal(a[net][k], b[net][k]) for net in ("model", "ema") for k in a[net])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.compile is used on CUDA only, and there is none")
def test_compiled_gradients_are_those_of_eager():
    """Releases of torch have miscompiled blocks like these silently: gradients of zero, or wrong ones."""
    torch.manual_seed(0)
    model, batch = m.Model(TINY).cuda().eval(), {"image": torch.randn(4, 1, 16, 16, device="cuda")}
    for p in model.parameters():        # a layer that starts at zero hides everything before it
        torch.nn.init.normal_(p, std=0.05)
    grads = []
    for compiled in (False, True):
        if compiled:
            model.encoder.compile(), model.unet.compile()
        loss = model(batch, torch.Generator("cuda").manual_seed(0))
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    scale = max(a.norm() for a in grads[0])
    assert all((a - b).norm() < 1e-2 * (a.norm() + 1e-3 * scale) for a, b in zip(*grads))


# --------------------------------------------------------------------------------- whole runs

def test_whole_run_leaves_results_and_pictures(tiny, tmp_path, capsys, monkeypatch):
    out, fit, seen = tmp_path / "out", m.fit, {}

    def spy(model, loader, cfg, name, steps, facts, watch=None):
        seen[name] = loader.rows
        return fit(model, loader, cfg, name, steps, facts, watch)
    monkeypatch.setattr(m, "fit", spy)
    main("--data", tiny, "--out", out, *FLAGS)
    data, part = D.load_study(tiny, "", 16, 0)
    for name in ("ckpt", "ckpt_vae", "ckpt_supervised_has_infarct"):   # the networks see the training patients and nobody else
        assert np.array_equal(seen[name], np.flatnonzero(part == "train"))
    results, printed = json.loads((out / "results.json").read_text()), capsys.readouterr().out
    assert results["script"] == "diffae" and results["n"] == {"train": 8, "val": 2, "test": 2}
    assert "16x16" in printed and "Does z_sem tell has_infarct better" in printed
    for key in ("recon_ssim", "recon_mse", "semantic_mean_ssim", "semantic_gain", "x_T_sd_error", "probe_auroc",
                "probe_f1", "probe_precision", "probe_recall", "patient_auroc", "factor_r2_size"):
        assert set(results["metrics"][key]) == {"value", "ci", "n", "unit", "better"}, key
        assert results["metrics"][key]["n"] == 2, key
    rows = {"recon_ssim": "constant copy pca untrained vae", "semantic_mean_ssim": "constant copy pca untrained vae",
            "probe_auroc": "pca untrained vae supervised", "grain": "untrained vae", "probe_f1": "all_positive pca untrained vae"}
    for key, names in rows.items():
        assert all(f"{key}.{name}" in results["metrics"] for name in names.split()), key
    for name in ("reconstructions", "interpolation", "manipulation", "samples", "curves", "preview"):
        assert (out / f"{name}.png").stat().st_size > 1000, name
    assert (out / "diffae.py").read_text() == (ROOT / "diffae.py").read_text()
    assert json.loads((out / "config.json").read_text())["z_dim"] == 8


def test_a_trained_model_is_loaded_and_applied(tiny, tmp_path, capsys):
    """On the run's own data --apply says what the run said; nothing else in the folder changes."""
    out, new = tmp_path / "out", tmp_path / "new.h5"
    main("--data", tiny, "--out", out, *FLAGS, "--fold=1/3")
    model, cfg = m.load(out, device="cpu")
    data, part = D.load_study(tiny, "", 16, 0, fold="1/3")
    codes = pandas.read_csv(out / "codes.csv")
    assert np.array_equal(codes["part"], part) and (part == "test").sum() == len(part) / 3
    z = m.semantic_codes(model, D.Loader({"image": data.image}, "cpu"))
    assert np.allclose(codes.filter(regex="z[0-9]"), z, rtol=1e-4, atol=1e-5) and not z.requires_grad
    state = torch.load(out / "ckpt_vae.pt", weights_only=True)["ema"]
    vae, prior = m.load(out, "ckpt_vae")[0], m.load(out, "ckpt_prior_12")[0]
    assert all(torch.equal(v, state[k]) for k, v in vae.state_dict().items())
    assert prior.sample(3, torch.Generator().manual_seed(0)).shape == (3, 8)

    D.write(str(new), [dict(image=data.image, subject=data.subject, has_infarct=data.columns["has_infarct"])], {})
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    capsys.readouterr()
    main("--out", out, "--apply", new, "--device=cpu")
    said = capsys.readouterr()
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    assert "of these subjects" in said.err and "AUROC" in said.out
    wanted = {"codes": ["subject", "part", "z0", "z7"], "predictions": ["part", "truth", "score", "cut"]}
    for name, columns in wanted.items():
        ours, runs = (pandas.read_csv(folder / f"{name}.csv")[columns] for folder in (out / "apply" / "new", out))
        pandas.testing.assert_frame_equal(ours, runs, rtol=1e-4, atol=1e-4)
    results = json.loads((out / "apply" / "new" / "results.json").read_text())
    run = json.loads((out / "results.json").read_text())["metrics"]
    assert results["metrics"]["recon_ssim"]["n"] == len(set(data.subject[part == "test"]))     # and no others
    assert results["metrics"]["probe_auroc"]["value"] == pytest.approx(run["probe_auroc"]["value"])
    images = D.load(out / "apply" / "new" / "reconstructions.h5").image
    x0 = D.Loader({"image": data.image}, "cpu").batch(np.arange(len(data)))["image"]
    again = M.to_image(m.decode(model, m.encode_noise(model, x0, z), z))
    assert abs(images / 255 - again).max() < 0.003

    # Another run starts from these weights, and says so. Another network cannot.
    main("--data", tiny, "--out", tmp_path / "b", *FLAGS, "--steps=1", "--lr=1e-9", "--init", out)
    assert f"the model in {out} was trained on" in capsys.readouterr().err
    for name in ("ckpt", "ckpt_vae"):
        tuned, first = (torch.load(f / f"{name}.pt", weights_only=True) for f in (tmp_path / "b", out))
        assert all(torch.allclose(tuned["model"][k], v, atol=1e-6) for k, v in first["ema"].items())
    assert json.loads((tmp_path / "b" / "results.json").read_text())["config"]["init"] == str(out)
    other = error_of(capsys, "--data", tiny, "--out", tmp_path / "c", *FLAGS, "--z_dim=5", "--init", out)
    assert "out.weight is (8, 512)" in other and "(5, 512) in this network" in other
    assert "holds a run of other data than phantoms" in error_of(capsys, "--out", out, *FLAGS)
    assert "leave this flag away" in error_of(capsys, "--out", out, "--apply", new, "--lr=1")
    assert "no such file" in error_of(capsys, "--out", tmp_path / "none", "--apply", new)
    main("--data", tiny, "--out", out, *FLAGS, "--fold=1/3", "--S=3")         # a later evaluation tells what --apply takes
    assert (m.load(out)[1].S, model.cfg.S) == (3, 4)
    (out / "results.json").write_text("{")
    assert "results.json: damaged" in error_of(capsys, "--out", out, "--apply", new)


def test_the_commands_of_the_readme(tmp_path, monkeypatch):
    """Two folders of PNGs, the three commands, then the lines of Python: as they stand there, but for sizes."""
    readme = (ROOT / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    for folder, n in (("FOLDER", 96), ("OTHER", 16)):
        (tmp_path / folder).mkdir()
        for i, x in enumerate(images(n, 24, seed=n)):
            Image.fromarray(x).save(tmp_path / folder / f"{folder.lower()}{i // 8:02d}_{i}.png")
    commands = re.findall(r"^python (\w+\.py .*?)(?: +#.*)?$", readme, re.M)
    first = next(c for c in commands if c.startswith("data.py images"))
    train, use = (next(c for c in commands if c.startswith("diffae.py") and w in c) for w in ("--data mine.h5", "--apply"))
    for line in (first, first.replace("FOLDER", "OTHER").replace("mine.h5", "other.h5"), train, use):
        small = " ".join(["", *FLAGS]) if line == train else " --device=cpu" if line == use else ""
        subprocess.run([sys.executable, *f"{ROOT}/{line}{small}".split()], check=True, env=ENV, capture_output=True)
    codes = pandas.read_csv("out/mine/apply/other/codes.csv")
    assert codes["path"][0] == "other00_0.png" and len(codes) == 16 and set(codes["part"]) == {"new"} and codes["subject"].nunique() == 2
    assert (tmp_path / "out/mine/apply/other/reconstructions.h5").exists()

    hearts = dict(image=images(24), subject=np.repeat([f"p{i:02d}" for i in range(12)], 2),
                  label=np.repeat(np.arange(12) % 2, 2))
    (tmp_path / "out" / "diffae").mkdir()
    D.write("out/diffae/hearts.h5", [hearts], {})
    main("--data", "out/diffae/hearts.h5", *FLAGS)
    names = {}
    exec(readme.partition("<!-- python -->\n```python\n")[2].partition("```")[0], names)
    moved = (names["edited"] - names["again"]).abs().mean()
    assert names["x0"].shape == names["again"].shape == (8, 1, 16, 16) and moved > 0
    assert names["between"].shape == (1, 1, 16, 16) and Path("edit.png").stat().st_size > 1000


def test_the_untrained_row_is_the_same_network_at_step_0(tiny, tmp_path, monkeypatch):
    """With no step, "ours" and "untrained" are one network and get the same numbers."""
    main("--data", tiny, "--out", tmp_path / "out", *FLAGS, "--steps=0")
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    for key in ("recon_ssim", "semantic_mean_ssim", "probe_auroc"):
        assert metrics[key]["value"] == metrics[f"{key}.untrained"]["value"]


@pytest.mark.parametrize("flag, word", [("--size=18", "--size 18"), ("--S=2000", "2000"), ("--batch=99", "--batch 99"),
                                        ("--base=1000000000", "--size 16")])
def test_bad_flags(flag, word, tiny, tmp_path, capsys):
    assert word in error_of(capsys, "--data", tiny, "--out", tmp_path / "out", *FLAGS, flag)
    assert not list(tmp_path.glob("out/*.pt"))      # before anything is trained


@pytest.mark.parametrize("flags", [["--recipe=paper"], ["--z_scale=3", "--target=factor_size"]])
def test_other_settings_run(flags, tiny, tmp_path):
    main("--data", tiny, "--out", tmp_path / "out", *FLAGS, "--steps=2", *flags)
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    wanted = {"probe_r2", "probe_mae", "probe_mae.mean", "probe_mae.vae"} if "--z_scale=3" in flags else {"probe_auroc"}
    assert wanted <= set(metrics)


def test_z_scale_scales_adagn_and_not_the_image_of_z_sem():
    x, z, t = torch.randn(2, 1, 16, 16), torch.randn(2, 8), torch.tensor([3, 700])
    for spatial in (False, True):
        torch.manual_seed(0)
        unet = m.UNet(replace(TINY, spatial=spatial))
        for p in unet.parameters():
            torch.nn.init.normal_(p, std=0.1)
        tripled, once = unet(x, t, 3 * z), unet(x, t, z)
        unet.z_scale = 3.0
        assert torch.equal(unet(x, t, z), tripled) == (not spatial) and not torch.equal(unet(x, t, z), once)
        if spatial:         # the image of z_sem stays: with tripled AdaGN weights in place of z_scale, all is the same
            seen = []
            unet.z_image.register_forward_hook(lambda layer, args, out: seen.append(args[0]))
            unet(x, t, z)
            assert torch.equal(seen[0], z)


def test_test_file_is_all_test(tiny, tmp_path, capsys):
    """And nobody trained on is tested on after the split has changed: the old weights know today's patients."""
    other, out = tmp_path / "other.h5", tmp_path / "out"
    D.write(str(other), [dict(image=images(8, seed=9), subject=np.repeat(["q0", "q1", "q2", "q3"], 2),
                              label=np.repeat([0, 1, 0, 1], 2), has_infarct=np.repeat([0, 1, 0, 1], 2))], {})
    main("--data", tiny, "--test", other, "--out", out, *FLAGS, "--steps=2")
    assert json.loads((out / "results.json").read_text())["n"] == {"train": 10, "val": 2, "test": 4}
    assert "training subjects" in error_of(capsys, "--data", tiny, "--out", out, *FLAGS, "--steps=2")


def test_one_class_only_skips_the_probe(tmp_path, capsys):
    path = tmp_path / "one.h5"
    D.write(str(path), [dict(image=images(24), subject=np.repeat([f"p{i:02d}" for i in range(12)], 2),
                             label=np.ones(24, int))], {})
    main("--data", path, "--out", tmp_path / "out", *FLAGS, "--steps=2")
    assert "no probe of label: " in capsys.readouterr().out
    assert "probe_auroc" not in json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]


def test_real_hearts(tmp_path):
    path = ROOT.parent / "shared" / "data" / "emidec.h5"
    if not path.exists():
        pytest.skip("no real EMIDEC file beside the repository")
    main("--data", path, "--out", tmp_path / "out", *FLAGS, "--size=32", "--steps=4")
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert metrics["probe_auroc"]["n"] == 14
    assert metrics["recon_ssim.copy"]["value"] > metrics["recon_ssim.constant"]["value"] > 0.1   # real anatomy
