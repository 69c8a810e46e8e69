"""ldae.py: PDAE's coefficients against closed forms, samplers against an oracle, each network's own gradients, a frozen
network that stays frozen, whole runs, and what they refuse."""
import functools
import json
import math
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

import data as D
import ldae as m
from conftest import ROOT, runs_of

main, error_of = runs_of(m)
AB = m.linear_alpha_bar(1000)
SIZE = (16, 24, 16)
TINY = m.Config(size=SIZE, patch=2, ae_mult=(1, 2), ae_base=8, ae_blocks=1, z_ch=2, disc_base=4, disc_layers=1, base=16,
                mult=(1, 2), blocks=1, attention=1, groups=0, dropout=0.1, slab=2, enc_patch=2, enc_base=16, enc_mult=(1, 2),
                z_dim=8, dae_patch=2, dae_base=8, dae_mult=(1, 1), adv_warmup=2, ae_steps=4, ae_batch=2, ldm_steps=4,
                ldm_batch=4, augment=0.5, steps=4, batch=4, dae_batch=2, save_every=4, log_every=2, bf16=False, device="cpu", S=4, T=20,
                eval_images=2, prior_steps=3, prior_width=16, prior_layers=2)
FLAGS = [f"--{k}={','.join(map(str, v)) if isinstance(v, tuple) else str(v).lower()}" for k, v in
         ((k, getattr(TINY, k)) for k in ("patch ae_mult ae_base ae_blocks z_ch disc_base disc_layers base mult blocks "
                                          "attention groups dropout slab enc_patch enc_base enc_mult z_dim dae_patch dae_base "
                                          "dae_mult adv_warmup ae_steps ae_batch ldm_steps ldm_batch steps batch dae_batch "
                                          "augment save_every log_every bf16 device S T eval_images prior_steps prior_width "
                                          "prior_layers").split())]


def heads(n, size=SIZE, seed=0):
    """n volumes with a bright ball that holds a dark one, and the label map."""
    rng, grid = np.random.default_rng(seed), np.stack(np.meshgrid(*[np.linspace(-1, 1, s) for s in size], indexing="ij"))
    r = np.sqrt((grid ** 2).sum(0))[None]
    inner = rng.uniform(0.2, 0.5, (n, 1, 1, 1))
    mask = np.where(r < inner, 4, np.where(r < 0.55, 5, np.where(r < 0.9, 3, 0)))
    grey = np.array([0, 0, 0, 0.8, 0.15, 0.5])[mask] + rng.uniform(0, 0.15, mask.shape)
    return (grey * 255).astype(np.uint8), mask.astype(np.uint8), inner.ravel()


@pytest.fixture(scope="module", autouse=True)
def quick_intervals():
    """50 resamples instead of 1000: intervals are tested in test_metrics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m.M, "bootstrap", functools.partial(m.M.bootstrap, n=50))
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """12 subjects, three scans each."""
    path = tmp_path_factory.mktemp("data") / "tiny.h5"
    image, mask, inner = heads(36)
    D.write(str(path), [dict(image=image, mask=mask, subject=np.repeat([f"p{i:02d}" for i in range(12)], 3),
                             label=np.repeat(np.arange(12) % 2, 3), age=50 + 60 * inner.astype(np.float32),
                             session=np.tile(np.float32([0, 6, 12]), 12), factor_ventricle_ml=inner.astype(np.float32),
                             factor_hippocampus_ml=-inner.astype(np.float32))], {})
    return str(path)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A whole tiny run -> its folder."""
    out = tmp_path_factory.mktemp("run") / "out"
    main("--data", tiny, "--out", out, *FLAGS)
    return out


torch.manual_seed(0)
AE = m.Autoencoder(TINY)       # untrained, where any will do


def frozen_b(cfg=TINY):
    torch.manual_seed(0)
    b = m.Unconditional(cfg)
    torch.nn.init.normal_(b.up.conv_out.weight, std=0.05)
    return b


def batch(n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = (n, TINY.z_ch, 4, 6, 4)
    return {"image": torch.rand(n, 1, *SIZE, generator=g) * 2 - 1, "mean": torch.randn(z, generator=g),
            "std": torch.full(z, 0.1)}


# --------------------------------------------------------------------------------- PDAE's coefficients

def test_snr_weight_closed_form():
    w, snr = m.snr_weight(AB), AB / (1 - AB)
    assert (w - snr ** 0.1 / (1 + snr)).abs().max() < 1e-12
    for t, value in ((0, .0003), (10, .004), (100, .13), (250, .48), (475, .72), (999, .36)):
        assert w[t].item() == pytest.approx(value, abs=0.005 if t > 10 else 5e-4)
    assert w.argmax().item() in range(460, 490) and w.mean().item() == pytest.approx(.49, abs=.005)


def test_training_and_sampling_shift():
    """s_t = -sqrt(alpha_t) (1 - ab_{t-1}) / sqrt(1 - ab_t) is -sqrt(1 - ab_t) but for small t."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    s, before = m.shift_training(AB), torch.cat([torch.ones(1).double(), AB[:-1]])
    posterior_variance = beta * (1 - before) / (1 - AB)           # the mean shifts by it times G
    eps_of_mean = -(1 - beta).sqrt() * (1 - AB).sqrt() / beta     # d eps / d mean of q(x_{t-1}|x_t)
    assert (s - posterior_variance * eps_of_mean).abs().max() < 1e-9
    ratio = s / -(1 - AB).sqrt()
    for t, value in ((0, 0), (1, .45), (10, .86), (100, .98)):
        assert ratio[t].item() == pytest.approx(value, abs=.011)
    assert (ratio[100:] > .975).all()


def test_losses_and_sampling_follow_the_formulas():
    x, g = batch(), torch.Generator().manual_seed(1)
    z0, t, eps, z = x["mean"], torch.tensor([0, 3, 9, 19]), torch.randn(x["mean"].shape, generator=g), torch.randn(4, 8, generator=g)
    ab = m.linear_alpha_bar(20)
    col = lambda v: v[t].float().view(-1, 1, 1, 1, 1)
    z_t = col(ab.sqrt()) * z0 + col((1 - ab).sqrt()) * eps
    for predict in ("eps", "v"):
        model = m.Model(replace(TINY, predict=predict), frozen_b(replace(TINY, predict=predict)), AE).eval()
        torch.nn.init.normal_(model.gradient.conv_out.weight, std=0.05)
        out, G = model.outputs(z_t, t, z)
        assert G.abs().mean() > 1e-4
        if predict == "eps":
            loss = m.snr_weight(ab)[t] * (out + col(m.shift_training(ab)) * G - eps).square().mean((1, 2, 3, 4))
            sample = out - col((1 - ab).sqrt()) * G
        else:      # the loss of v is that of eps over alpha_bar: no noise level is left out
            sample = col(ab.sqrt()) * (out + G) + col((1 - ab).sqrt()) * z_t
            loss = (sample - eps).square().mean((1, 2, 3, 4)) / ab[t]
        assert (model.loss(z0, z, t, eps) / loss - 1).abs().max() < 1e-3
        assert (model.eps(z_t, t, z) - sample).abs().max() < 1e-5
        assert (model.outputs(z_t, t, None)[0] - out).abs().max() == 0       # without z_sem: the frozen network


# --------------------------------------------------------------------------------- sampling latents

@pytest.mark.parametrize("S", [10, 20, 50, 100])
def test_clamping_unit_gaussian_latents_costs_their_tails(S):
    """An oracle that knows x0 exactly: with the clamp to +-1 the MSE is 2 (2 Q(1) - phi(1)) = .151 at every S."""
    g = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(1000, 3, 4, 5, 4, generator=g, dtype=torch.float64) for _ in range(2))
    oracle = lambda x, t: (x - AB[t].sqrt() * x0) / (1 - AB[t]).sqrt()
    error = {clip: (m.ddim_decode(oracle, noise, S, AB, clip=clip) - x0).square().mean().item() for clip in (False, True)}
    tails = 2 * (math.erfc(1 / math.sqrt(2)) - math.exp(-.5) / math.sqrt(2 * math.pi))      # 2 Q(1) = erfc(1 / sqrt 2)
    assert error[True] == pytest.approx(tails, rel=.02) and error[False] < 1e-12


def test_latents_are_not_clipped_and_voxels_are():
    assert m.Model(TINY, frozen_b(), AE).clip is False and m.DAE(TINY).clip is True


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_zero_output_round_trips_but_not_to_noise(predict):
    """Reconstruction alone proves nothing: a network that outputs zero is perfect at it. Its z_T is not white."""
    cfg = replace(TINY, T=1000, predict=predict, size=(24, 32, 24))
    b = m.Unconditional(cfg)     # untrained: the output is zero
    model, g = m.Model(cfg, b, AE).eval(), torch.Generator().manual_seed(0)
    z0 = torch.nn.functional.avg_pool3d(torch.randn(4, 2, 8, 10, 8, generator=g), 3, 1)
    z0 = z0 / z0.std()
    z_sem = torch.randn(4, 8, generator=g)
    z_T = m.invert(model, z0, z_sem, 20)
    assert (m.render(model, z_T, z_sem, 20) - z0).square().mean() < (1e-6 if predict == "eps" else 0.05)
    white = torch.randn(z0.shape, generator=g)
    far = lambda z: max(abs(z.std().item() - 1), m.neighbour_correlation(z).abs().max().item())
    assert far(white) < 0.1 and far(z_T) > 0.4


def test_slerp_is_never_nan():
    a = torch.randn(200, 2, 4, 6, 4, generator=torch.Generator().manual_seed(0))
    for b in (a, -a, a * 1.0001, torch.zeros_like(a)):
        assert m.slerp(a, b, torch.linspace(0, 1, 200)).isfinite().all()


# --------------------------------------------------------------------------------- networks

def test_paper_networks_have_the_published_number_of_parameters():
    count = lambda net: sum(p.numel() for p in net.parameters())
    cfg = m.Config(**m.RECIPES["paper"])
    with torch.device("meta"):
        a, b = m.Autoencoder(cfg), m.Unconditional(cfg)
        c = m.Model(cfg, b, a)
    assert count(a.encoder) + count(a.decoder) == 13_766_248 and count(a.discriminator) == 11_048_769
    assert count(b) == 486_927_363 and count(c.gradient) + count(c.embed) == 378_411_779


def test_fold_and_resample():
    x = torch.randn(2, 3, 4, 6, 8)
    assert torch.equal(m.unfold3d(m.fold3d(x, 2), 2), x) and m.fold3d(x, 2).shape == (2, 24, 2, 3, 4)
    assert torch.equal(m.resample3d(x, "up"), torch.nn.functional.interpolate(x, scale_factor=2))
    odd = torch.randn(1, 1, 3, 5, 4)
    assert m.resample3d(odd, "down").shape == (1, 1, 2, 3, 2) and m.resample3d(odd, "down")[0, 0, 1, 2, 0] == \
        pytest.approx(odd[0, 0, 2, 4, :2].mean().item())        # what is not there does not count


def test_autoencoder_of_patches_starts_as_their_pca():
    """Untrained it reconstructs as scikit-learn's PCA of 2x2x2 patches does, and no channel dominates the code."""
    cfg, g = replace(TINY, patch=2, ae_mult=(1,), z_ch=3), torch.Generator().manual_seed(0)
    x = torch.nn.functional.avg_pool3d(torch.randn(6, 1, 18, 26, 18, generator=g), 3, 1) + 0.3
    torch.manual_seed(0)
    ae = m.Autoencoder(cfg).start_from_pca(x)
    code, _ = ae.posterior(x)
    patches = m.fold3d(x, 2).movedim(1, -1).flatten(0, -2).numpy()
    pca = PCA(3).fit(patches)
    error = np.square(pca.inverse_transform(pca.transform(patches)) - patches).mean()
    assert (ae.decode(code) - x).square().mean().item() == pytest.approx(error, rel=1e-3) and error > 1e-3
    ours, theirs = (v.std(0) for v in (code.detach().movedim(1, -1).flatten(0, -2).numpy(), pca.transform(patches)))
    assert (code.mean((0, 2, 3, 4)).abs() < 1e-4).all() and ours.max() / ours.min() < theirs.max() / theirs.min()
    deep = m.Autoencoder(TINY)
    before = m.identity(deep)
    assert m.identity(deep.start_from_pca(x)) == before               # levels between: no patches to code


@pytest.mark.parametrize("head", ["position", "pool"])
def test_semantic_encoder_and_slices(head):
    """Position: swapping the two halves of the brain changes the code; pooled without place it would not."""
    torch.manual_seed(0)
    enc = m.SemanticEncoder(replace(TINY, head=head, dropout=0.0), 8).eval()
    x = batch(2)["image"]
    z = enc(x)
    assert z.shape == (2, 8) and (enc(x.flip(2)) - z).abs().max() > 1e-4
    assert torch.allclose(enc(x[:1]), z[:1], atol=1e-5)


def test_augment_moves_three_quarters_and_keeps_their_mass():
    x = torch.zeros(200, 1, 16, 20, 16)
    x[:, :, 6:10, 8:12, 6:10] = 1.0
    y = m.augment3d(x, 1.0, torch.Generator().manual_seed(0))
    moved = (y != x).flatten(1).any(1)
    mass = y.sum((1, 2, 3, 4))[moved] / 64
    assert 0.65 < moved.double().mean() < 0.85 and 0.6 < mass.min() < mass.max() < 1.6 and abs(mass.mean() - 1) < 0.1
    assert torch.equal(m.augment3d(x, 0.0, torch.Generator()), x)


def test_augment_turns_and_does_not_shear():
    """In a volume of unequal sides a ball stays a ball: its axes are equal (sheared, they differed by up to 1.7 times)."""
    size = 20, 40, 20
    at = torch.stack(torch.meshgrid(*[torch.arange(n) - (n - 1) / 2 for n in size], indexing="ij"))
    ball = torch.exp(-at.square().sum(0) / 8).expand(50, 1, *size)
    y = m.augment3d(ball, 1.0, torch.Generator().manual_seed(0))[:, 0]
    weight = (y / y.sum((1, 2, 3), keepdim=True)).flatten(1)
    at = at.flatten(1) - (weight @ at.flatten(1).T)[:, :, None]
    axes = torch.linalg.eigvalsh(torch.einsum("nv,niv,njv->nij", weight, at, at))
    assert (axes[:, 2] / axes[:, 0]).sqrt().max() < 1.05


# --------------------------------------------------------------------------------- training

def test_each_network_gets_its_own_adversarial_gradient():
    """One backward of the sum equals two separate passes in which the other network is constant."""
    torch.manual_seed(0)
    ae, g = m.Autoencoder(replace(TINY, adv=1.0)), torch.Generator().manual_seed(0)
    ae.step += 4                                     # after the warm-up
    x = batch()["image"]
    ae({"image": x}, g.manual_seed(3)).backward()
    joint = {k: p.grad.clone() for k, p in ae.named_parameters()}
    mean, logvar = ae.posterior(x)
    recon = ae.decode(mean + (logvar / 2).exp() * m.randn_like(mean, g.manual_seed(3)))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3, 4)).mean()
    both = [p for k, p in ae.named_parameters() if not k.startswith("discriminator")]
    names = [k for k in joint if not k.startswith("discriminator")]
    loss = (recon - x).abs().mean() + ae.cfg.kl * kl + (ae.discriminator(recon) - 1).square().mean()
    for k, grad in zip(names, torch.autograd.grad(loss, both, retain_graph=True)):
        assert (joint[k] - grad).abs().max() < 1e-5, k
    judge = (ae.discriminator(x) - 1).square().mean() / 2 + ae.discriminator(recon.detach()).square().mean() / 2
    for (k, p), grad in zip(ae.discriminator.named_parameters(), torch.autograd.grad(judge, list(ae.discriminator.parameters()))):
        assert (joint["discriminator." + k] - grad).abs().max() < 1e-5, k


def test_adversarial_warm_up_is_a_function_of_the_step():
    ae, g, seen = m.Autoencoder(replace(TINY, adv_warmup=2)), torch.Generator(), []
    ae.adversarial = lambda x, recon: (torch.tensor(1e4), torch.tensor(0.0))
    for _ in range(6):
        seen.append(ae({"image": batch()["image"]}, g.manual_seed(0)).item())
    weight = (np.array(seen) - seen[0]) / 1e4 / 0.025
    assert weight == pytest.approx([0, 0, 0, .5, 1, 1], abs=1e-3) and ae.step == 6
    ae.eval()({"image": batch()["image"]}, g)
    assert ae.step == 6                              # compile_checked and evaluation do not count


def test_frozen_stays_bitwise_frozen(tmp_path):
    b = frozen_b()
    before, model = m.identity(b), m.Model(TINY, b, AE)
    assert not any(p is q for p in model.parameters() for q in b.parameters())
    arrays = {k: v.numpy() for k, v in batch(8).items() if k != "image"} | {"image": heads(8)[0]}
    ema, _ = m.fit(model, D.Loader(arrays, "cpu"), replace(TINY, out=str(tmp_path)), "ckpt_C", {}, 4)
    assert m.identity(b) == before and all(p.grad is None and not p.requires_grad for p in b.parameters())
    assert not b.training and model.training and ema.frozen is model.frozen      # one copy, for both
    saved = torch.load(tmp_path / "ckpt_C.pt", weights_only=True)
    assert not any("frozen" in k for k in saved["model"])
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), m.Model(TINY, b, AE).parameters()))


def test_average_of_the_weights_keeps_no_history(tmp_path):
    """An EMA that is updated outside no_grad remembers every step for a gradient that nobody takes."""
    b = frozen_b()
    ema, _ = m.fit(b, D.Loader({k: v.numpy() for k, v in batch(8).items() if k != "image"}, "cpu"),
                   replace(TINY, out=str(tmp_path)), "ckpt_B", {}, 3)
    assert all(p.is_leaf and not p.requires_grad for p in ema.parameters())


# --------------------------------------------------------------------------------- whole runs

def test_whole_run_leaves_results_and_pictures(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["script"] == "ldae" and results["n"] == {"train": 8, "val": 2, "test": 2}
    for key in ("ae_ssim", "ae_mse", "ae_psnr", "recon_ssim_T10", "semantic_ssim_T20", "recon_mse_T10", "zT_mean", "zT_std", "zT_max",
                "zT_corr", "loss_true", "loss_shuffled", "loss_none", "probe_auroc", "probe_acc", "probe_precision", "probe_recall",
                "probe_f1", "age_mae", "age_rmse", "interp_ssim_6m", "interp_mse_6m", "manip_ventricle_slope",
                "manip_hippocampus_slope", "throughput_ratio", "train_ratio", "peak_gb", "factor_r2_ventricle_ml"):
        assert set(results["metrics"][key]) == {"value", "ci", "n", "unit", "better"}, key
    for key in ("ae_ssim.constant", "recon_ssim_T10.dae", "probe_auroc.pca", "probe_auroc.dae", "probe_auroc.supervised",
                "probe_f1.all_positive", "age_mae.mean", "age_mae.supervised", "interp_mse_6m.copy_nearest",
                "interp_mse_6m.voxel_lerp", "interp_mse_6m.latent_lerp", "manip_head_change", "manip_same_subject",
                "training_s", "training_s.dae"):
        assert key in results["metrics"], key
    for name in ("reconstructions", "manipulation", "missing", "variations", "samples", "curves", "preview_A", "preview_C"):
        assert (finished / f"{name}.png").stat().st_size > 1000, name


def test_latents_are_standardised_over_the_training_scans(finished, tiny):
    """At every place of mean 0, each channel, draws from the posterior included, of variance 1."""
    train = D.load_study(tiny, "", None, 0, square=False)[1] == "train"
    saved = torch.load(finished / "ckpt_B.pt", weights_only=True)["ema"]
    with np.load(finished / "latents.npz") as f:
        z, std = (f["mean"][train] - saved["shift"].numpy()) / saved["scale"].numpy(), f["std"][train] / saved["scale"].numpy()
    assert abs(z.mean(0)).max() < 1e-3 and z.shape[1:] == saved["shift"].shape[1:]
    assert np.allclose((z ** 2 + std ** 2).mean((0, 2, 3, 4)), 1, atol=1e-3)


def test_the_same_command_changes_nothing(finished, tiny, monkeypatch):
    """Nor does a voxel-space rival too large to be timed four volumes at a time cost the report."""
    sizes, timed = [], m.throughput

    def too_small(cfg, batch, *others):
        sizes.append(len(batch["image"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("GPU")
        return timed(cfg, batch, *others)
    monkeypatch.setattr(m, "throughput", too_small)
    before = {p.name: p.read_bytes() for p in finished.glob("*.pt")}
    first = json.loads((finished / "results.json").read_text())["metrics"]
    main("--data", tiny, "--out", finished, *FLAGS, "--eval")
    again = json.loads((finished / "results.json").read_text())["metrics"]
    assert before == {p.name: p.read_bytes() for p in finished.glob("*.pt")}
    assert sizes == [4, 2] and "throughput_ratio" in again
    assert all(first[k]["value"] == again[k]["value"] for k in ("ae_ssim", "recon_ssim_T10", "age_mae", "interp_mse_6m"))


def test_missing_or_foreign_stages_say_what_to_do(finished, tiny, capsys, tmp_path):
    command = ["--data", tiny, "--out", finished, *FLAGS]
    for stage in ("ckpt_A", "ckpt_B"):
        path, aside = finished / f"{stage}.pt", tmp_path / f"{stage}.pt"
        path.rename(aside)
        assert f"{stage}.pt: not there; the same command without --eval" in error_of(capsys, *command, "--eval")
        aside.rename(path)
    for stage, after, what in (("ckpt_A", "ckpt_B", "stage_A"), ("ckpt_B", "ckpt_C", "stage_B"),
                               ("ckpt_C", "ckpt_prior_at_4", "stage_C")):
        path = finished / f"{stage}.pt"
        kept, state = path.read_bytes(), torch.load(path, weights_only=True)
        state["ema"] = {k: v + 0.01 if v.is_floating_point() else v for k, v in state["ema"].items()}
        torch.save(state, path)
        message = error_of(capsys, *command)
        assert f"{after}.pt" in message and what in message and "delete it" in message
        torch.save({**state, "run": {**state["run"], "data": "other"}}, path)
        assert f"{stage}.pt: made by another run (data 'other'" in error_of(capsys, *command)
        path.write_bytes(kept)
    # the supervised encoder of other labels
    with h5py.File(tiny) as old, h5py.File(tmp_path / "older.h5", "w") as new:
        for name in old:
            old.copy(name, new)
        new["age"][:] += 1
    message = error_of(capsys, "--data", tmp_path / "older.h5", *command[2:])
    assert "ckpt_supervised.pt: made by another run (values" in message
    # the latents of another autoencoder, or a damaged file of them, are made again
    (finished / "latents.npz").write_bytes(b"half a file")
    main(*command, "--eval")
    with np.load(finished / "latents.npz") as f:
        assert f["mean"].shape == (36, 2, 4, 6, 4)


def test_another_semantic_encoder_keeps_stages_a_and_b(finished, tiny, capsys, tmp_path):
    for name in ("ckpt_A.pt", "ckpt_B.pt", "log_A.jsonl", "log_B.jsonl"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    main("--data", tiny, "--out", tmp_path, *FLAGS, "--head=pool", "--z_map=false", "--rivals=false", "--prior_steps=0")
    assert (tmp_path / "ckpt_A.pt").read_bytes() == (finished / "ckpt_A.pt").read_bytes()
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert "probe_auroc" in metrics and "throughput_ratio" not in metrics


def test_paper_recipe_reads_disease_against_health(tmp_path):
    """A third class, as in ADNI's tables, is left out: its number is a name and no quantity to regress on."""
    image, subject = heads(36)[0], np.repeat([f"p{i:02d}" for i in range(12)], 3)
    D.write(str(tmp_path / "three.h5"), [dict(image=image, subject=subject, label=np.repeat(np.arange(12) % 3, 3))], {})
    main("--data", tmp_path / "three.h5", "--out", tmp_path, *FLAGS, "--recipe=paper", "--rivals=false", "--prior_steps=0",
         "--steps=2", "--S=2", "--eval_images=1")
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert {"loss_none", "probe_auroc"} <= set(metrics) and "probe_r2" not in metrics
    assert metrics["probe_auroc"]["n"] == metrics["probe_auroc.pca"]["n"] < 3


def test_latents_of_another_test_file_are_made_again(tmp_path):
    """Same training file, same subjects, other images: what is cached is not of these."""
    image, flags, made = heads(16)[0], ["--rivals=false", "--prior_steps=0", "--steps=1", "--S=1", "--eval_images=1"], []
    D.write(str(tmp_path / "train.h5"), [dict(image=image[:12], subject=np.array(list("abcdefghijkl")))], {})
    for brightness in (image[12:], 255 - image[12:]):
        D.write(str(tmp_path / "test.h5"), [dict(image=brightness, subject=np.array(list("wxyz")))], {})
        main("--data", tmp_path / "train.h5", "--test", tmp_path / "test.h5", "--out", tmp_path / "out", *FLAGS, *flags)
        with np.load(tmp_path / "out" / "latents.npz") as f:
            made.append(f["mean"])
    assert np.array_equal(made[0][:12], made[1][:12]) and abs(made[0][12:] - made[1][12:]).max() > 1e-3


def test_throughput_without_training(capsys, tmp_path):
    main("--throughput", "--out", tmp_path / "none", "--size=16,24,16", *FLAGS)
    printed = capsys.readouterr().out
    assert "throughput_ratio" in printed and "1/64 of the volume: extrapolated" in printed and not (tmp_path / "none").exists()


def test_real_hippocampi(tmp_path, capsys):
    """No label, age or session: what cannot be said is left out in one line each."""
    path = ROOT.parent / "shared" / "data" / "hippocampus3d.h5"
    if not path.exists():
        pytest.skip("no real hippocampi beside the repository")
    main("--data", path, "--out", tmp_path, *FLAGS, "--target=volume_mm3", "--steps=2", "--ae_steps=2", "--ldm_steps=2",
         "--rivals=false", "--prior_steps=0", "--patch=4", "--S=2", "--T=10")
    printed, metrics = capsys.readouterr().out, json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert "age: no such column" in printed and "three sessions" in printed and {"probe_r2", "probe_mae.mean"} <= set(metrics)


# --------------------------------------------------------------------------------- pieces of the report

def test_triples_are_within_a_subject_and_in_time():
    subject, session = np.array(list("aaabbbb")), np.array([12, 0, 6, 0, 6, np.nan, 6.0])
    assert m.triples(subject, session).tolist() == [[1, 2, 0]]
    assert len(m.triples(np.array(list("aaaaa")), np.arange(5.0))) == 10


def test_evenly_keeps_the_ends():
    assert m.evenly(np.arange(10), 4).tolist() == [0, 3, 6, 9] and m.evenly(np.arange(3), 5).tolist() == [0, 1, 2]
    assert not len(m.evenly(np.arange(0), 5))


def test_volume_reader_measures_what_it_has_not_seen():
    image, mask, inner = heads(60)
    seen, probe = [], m.M.probe
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m.M, "probe", lambda kind, task, z, y, subject: seen.append(subject) or probe(kind, task, z, y, subject))
        read = m.volume_reader(image[:50], mask[:50], 4, inner[:50], np.arange(50) // 2)
    assert np.corrcoef(read(image[50:]), inner[50:])[0, 1] > 0.97
    assert (seen[0] == np.arange(50) // 2).all()      # its penalty is chosen on other subjects, not on other visits


def test_linear_numbers_of_codes_and_of_direct_scores():
    rng = np.random.default_rng(0)
    y, subject = np.arange(80) % 2, np.repeat(np.arange(40), 2).astype(str)
    part = np.repeat(["train", "val", "test"], [40, 20, 20])
    codes = {"": y[:, None] + 0.1 * rng.normal(size=(80, 3)), "noise": rng.normal(size=(80, 3))}
    out = m.linear_numbers("probe", codes, {"supervised": y - 0.5}, y, part, subject, 0)
    assert out["probe_auroc"]["value"] == out["probe_auroc.supervised"]["value"] == out["probe_acc.supervised"]["value"] == 1
    assert out["probe_auroc.noise"]["value"] < 0.9 and out["probe_recall.all_positive"]["value"] == 1
    assert out["probe_auroc.all_positive"]["value"] == 0.5
    out = m.linear_numbers("age", codes, {}, y * 10 + 60.5, part, subject, 0)
    assert out["age_mae"]["value"] < 1.5 < out["age_mae.mean"]["value"]


# --------------------------------------------------------------------------------- bad input, one line each

@pytest.mark.parametrize("flags, word", [
    (["--stesp=3"], "did you mean --steps"), (["--patch=5"], "multiples of"), (["--slab=5"], "--slab"), (["--head=nose"], "position"),
    (["--enc_mult=1,2,4,8"], "at least 32"), (["--groups=7"], "divisible by num_groups (7)"), (["--target=nose"], "factor_ventricle_ml"),
    (["--base=40"], "divisible"), (["--dae_base=56"], "divisible"), (["--disc_base=60"], "divisible"),
    (["--head=pool", "--z_dim=100"], "num_heads"), (["--disc_layers=3"], "at least 3 * 2^3"), (["--dae_patch=3"], "multiples of --dae_patch 3"),
    (["--lpips=/no/such"], "/no/such"), (["--T=9"], "T at least 10"), (["--ae_mult=1", "--z_ch=9"], "8 voxels"),
    (["--S=2000"], "at most T"), (["--data=/no/such.h5"], "no such file"), (["--z_ch=0"], "at least 1"), (["--kl=-1"], ">= 0"),
])
def test_bad_flags(flags, word, tiny, tmp_path, capsys):
    assert word in error_of(capsys, "--data", tiny, "--out", tmp_path / "out", *FLAGS, *flags)


def test_phantoms_of_another_size_are_not_used_in_silence(tmp_path, capsys):
    D.phantom_brains(str(tmp_path / "brains.h5"), subjects=2, size=16)
    assert "brains.h5: 2 phantoms of side 16, --subjects 3 --size 48: delete it" in \
        error_of(capsys, "--out", tmp_path, *FLAGS, "--subjects=3")


def test_slices_are_not_volumes(tmp_path, capsys):
    path = tmp_path / "flat.h5"
    D.write(str(path), [dict(image=heads(8)[0][:, 8], subject=np.array(list("abcdefgh")))], {})
    assert "volumes (N,D,H,W)" in error_of(capsys, "--data", path, "--out", tmp_path / "out", *FLAGS)
