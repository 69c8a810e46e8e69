"""ldae.py: PDAE's losses against their formulas, the gradient of each network, a frozen network that stays
frozen, which rows each stage of a run sees, every part of the report on cases with a known answer, bad input."""
import json
import shutil
from dataclasses import replace

import numpy as np
import pandas
import pytest
import torch

import data as D
import ldae as m
from conftest import runs_of

main, error_of = runs_of(m)
AB = m.linear_alpha_bar(1000)
SIZE = (24, 26, 25)           # no multiple of the autoencoder's 4 voxels: latents are 6x7x7
TINY = m.Config(size=SIZE, patch=2, ae_base=8, ae_mult=(1, 2), z_ch=2, disc_base=4, base=16, mult=(1, 2), blocks=1,
                groups=0, enc_base=16, enc_mult=(1, 2), z_dim=8, ae_steps=4, ldm_steps=4, steps=4, ae_batch=2,
                batch=4, save_every=4, device="cpu", S=2, T=20, eval_images=2)
FLAGS = [f"--{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in vars(TINY).items()
         if v != getattr(m.Config, k) and k != "size"]


def heads(n, seed=0):
    """n volumes with a bright ball that holds a dark one, the label map, and the radius of the dark one."""
    rng, at = np.random.default_rng(seed), np.meshgrid(*[np.linspace(-1, 1, s) for s in SIZE], indexing="ij")
    r, inner = np.sqrt(np.square(at).sum(0))[None], rng.uniform(0.2, 0.5, (n, 1, 1, 1))
    mask = np.where(r < inner, 4, np.where(r < 0.55, 5, np.where(r < 0.9, 3, 0)))
    grey = np.array([0, 0, 0, 0.8, 0.15, 0.5])[mask] + rng.uniform(0, 0.15, mask.shape)
    return (grey * 255).astype(np.uint8), mask.astype(np.uint8), inner.ravel().astype(np.float32)


pytestmark = pytest.mark.usefixtures("quick_statistics")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """12 subjects, three scans each."""
    path = tmp_path_factory.mktemp("data") / "tiny.h5"
    image, mask, inner = heads(36)
    D.write(str(path), [dict(image=image, mask=mask, subject=np.repeat([f"p{i:02d}" for i in range(12)], 3),
                             label=np.repeat(np.arange(12) % 2, 3), age=50 + 60 * inner,
                             session=np.tile(np.float32([0, 6, 12]), 12), factor_ventricle_ml=inner,
                             factor_hippocampus_ml=-inner)], {})
    return str(path)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A whole tiny run -> its folder; by name of each call of fit: all its rows, its model, stage B's hash before."""
    out, calls, fit = tmp_path_factory.mktemp("run") / "out", {}, m.fit

    def spy(model, loader, cfg, name, *rest):
        rows = {k: v.float().numpy() for k, v in loader.batch(np.arange(len(loader))).items()}
        calls[name] = rows, model, m.hash_of(model.ldm.net) if name == "ckpt_C" else ""
        return fit(model, loader, cfg, name, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "fit", spy)
        main("--data", tiny, "--out", out, *FLAGS)
    return out, calls


def model_of(cfg=TINY):
    """An untrained stage C on an untrained stage B whose outputs, however, are not zero."""
    torch.manual_seed(0)
    z = torch.randn(8, 2, 6, 7, 7)
    b = m.Unconditional(cfg, z, torch.zeros_like(z))
    torch.nn.init.normal_(b.up.conv_out.weight, std=0.05)
    return m.Model(cfg, b, m.Autoencoder(cfg)).eval()


def batch(n=4):
    g, z = torch.Generator().manual_seed(0), (n, 2, 6, 7, 7)
    return {"image": torch.rand(n, 1, *SIZE, generator=g) * 2 - 1, "mean": torch.randn(z, generator=g)}


@pytest.mark.parametrize("predict, spatial", [("eps", False), ("v", True)])
def test_losses_and_sampling_follow_the_formulas(predict, spatial):
    cfg, x, g = replace(TINY, predict=predict, spatial=spatial), batch(), torch.Generator().manual_seed(1)
    z0, t, z = x["mean"], torch.tensor([0, 3, 9, 19]), torch.randn(4, 8, generator=g)
    eps, ab = torch.randn(z0.shape, generator=g), m.linear_alpha_bar(20)
    col = lambda v: v[t].float().view(-1, 1, 1, 1, 1)
    z_t = col(ab.sqrt()) * z0 + col((1 - ab).sqrt()) * eps
    model = model_of(cfg)
    torch.nn.init.normal_(model.gradient.conv_out.weight, std=0.05)
    if spatial:
        torch.nn.init.normal_(model.z_latent.weight, std=0.05)
    out, G = model.outputs(z_t, t, z)
    emb, skips = model.ldm.net.down(z_t, t)
    assert (out - model.ldm.net.up(emb, skips)).abs().max() < 1e-6      # the frozen network never sees z_sem
    steered = model.gradient(emb, skips, model.embed(z))
    if spatial:    # v = sqrt(ab) eps - sqrt(1 - ab) z0: what is added there shifts z0_hat by itself
        steered = steered - col((1 - ab).sqrt()) * model.z_latent(z).view(z0.shape)
    assert (G - steered).abs().max() < 1e-5 and G.abs().mean() > 1e-4
    if predict == "eps":
        snr = (ab / (1 - ab))[t]
        loss = snr ** 0.1 / (1 + snr) * (out + col(m.shift_training(ab)) * G - eps).square().mean((1, 2, 3, 4))
        sample = out - col((1 - ab).sqrt()) * G
    else:      # the loss of v is that of eps over alpha_bar: no noise level is left out
        sample = col(ab.sqrt()) * (out + G) + col((1 - ab).sqrt()) * z_t
        loss = (sample - eps).square().mean((1, 2, 3, 4)) / ab[t]
    assert (model.loss(z0, z, t, eps) / loss - 1).abs().max() < 1e-3
    assert (model.eps(z_t, t, z) - sample).abs().max() < 1e-5


def test_paper_networks_have_the_published_number_of_parameters():
    count = lambda net: sum(p.numel() for p in net.parameters())
    cfg = m.Config(**m.RECIPES["paper"])
    with torch.device("meta"):
        a = m.Autoencoder(cfg)
        b = m.Unconditional(cfg, *2 * [torch.empty(2, 3, 16, 20, 16)])
        c = m.Model(cfg, b, a)
    assert count(a.encoder) + count(a.decoder) == 13_766_248 and count(a.discriminator) == 11_048_769
    assert count(b) == 486_927_363 and count(c.gradient) + count(c.embed) == 378_411_779


def test_resample_and_pad():
    x = torch.randn(2, 3, 4, 6, 8)
    assert torch.equal(m.resample3d(x, "up"), torch.nn.functional.interpolate(x, scale_factor=2))
    odd = torch.randn(1, 1, 3, 5, 4)           # no padding counts in a mean
    assert m.resample3d(odd, "down")[0, 0, 1, 2, 0] == pytest.approx(odd[0, 0, 2, 4, :2].mean().item())
    padded = m.pad(odd, 4, -1.0)
    assert padded.shape == (1, 1, 4, 8, 4) and torch.equal(padded[:, :, :3, :5], odd)
    assert (padded[:, :, 3:] == -1).all() and (padded[:, :, :, 5:] == -1).all()
    enc, seen = m.SemanticEncoder(replace(TINY, spatial=True, size=(4, 30, 26))).eval(), []
    enc.trunk.register_forward_pre_hook(lambda trunk, args: seen.append(args[0]))
    enc(torch.zeros(1, 1, 4, 30, 26))       # the mean brain minus itself: no rim where it is padded to 32x28
    assert seen[0].shape[-2:] == (8, 7) and not seen[0].any()


def test_patch_code_is_a_convolution_whose_weights_may_differ_by_place():
    torch.manual_seed(0)
    code, x = m.PatchCode(3, 2, places=24), torch.randn(5, 1, 4, 6, 8)
    z = code.encode(x)
    weight = code.down[0].T.reshape(3, 1, 2, 2, 2)
    assert (z - torch.nn.functional.conv3d(x, weight, stride=2)).abs().max() < 1e-5
    before = code.decode(z)
    assert (before - torch.nn.functional.conv_transpose3d(z, weight, stride=2)).abs().max() < 1e-5
    with torch.no_grad():
        code.down[7] *= 2                      # places are counted along depth, height, width: 7 is (0,1,3)
        code.up[7] *= 3
    twice = (code.encode(x) - 2 * z).abs().amax((0, 1)) < 1e-5
    thrice = (code.decode(z) - 3 * before).abs().amax((0, 1)) < 1e-5
    assert twice.nonzero().tolist() == [[0, 1, 3]]
    assert thrice[:2, 2:4, 6:8].all() and thrice.sum() == 8


def test_the_autoencoder_codes_the_difference_from_the_mean_brain():
    ae, x = m.Autoencoder(replace(TINY, size=(12, 13, 14))).eval(), torch.rand(2, 1, 12, 13, 14) * 2 - 1
    ae.mean_brain[:] = torch.rand(1, 1, 12, 13, 14)
    seen = []
    ae.encoder.register_forward_pre_hook(lambda net, args: seen.append(args[0]))
    ae.posterior(x)
    assert torch.allclose(seen[0][:, :, :12, :13, :14], 4 * (x - ae.mean_brain))
    assert seen[0].shape[3] == 16 and not seen[0][:, :, :, 13:].any()      # no rim where sides are padded
    z = torch.randn(2, 2, 3, 4, 4)
    difference = ae.decode(z) - ae.mean_brain
    ae.mean_brain.zero_()
    assert torch.allclose(difference, ae.decode(z), atol=1e-6)


@pytest.mark.parametrize("spatial", [True, False])
def test_semantic_encoder_tells_where_a_slice_lies(spatial):
    torch.manual_seed(0)
    enc, x = m.SemanticEncoder(replace(TINY, spatial=spatial)).eval(), batch(2)["image"]
    z = enc(x)
    assert (enc(x.flip(2)) - z).abs().max() > 1e-4 and torch.allclose(enc(x[:1]), z[:1], atol=1e-5)


def test_z_sem_holds_a_linear_code_of_the_volume_beside_that_of_the_network():
    torch.manual_seed(0)
    enc, x = m.SemanticEncoder(replace(TINY, spatial=True)).eval(), batch(2)["image"]
    z = enc(x)
    torch.nn.init.zeros_(enc.out.weight), torch.nn.init.zeros_(enc.out.bias)
    blocks = x[..., :24, :24].reshape(2, 6, 4, 6, 4, 6, 4).mean((2, 4, 6)).flatten(1)      # the rim is left out
    linear = blocks @ enc.linear.weight.T + enc.linear.bias
    assert (enc(x) - linear).abs().max() < 1e-5 and (z - linear).abs().max() > 1e-3


def test_each_network_gets_its_own_adversarial_gradient():
    """One backward of the sum equals two separate passes in which the other network is constant."""
    torch.manual_seed(0)
    ae, g, x = m.Autoencoder(TINY), torch.Generator().manual_seed(0), batch()["image"]
    ae.step += 4                                     # after the warm-up
    ae({"image": x}, g.manual_seed(3)).backward()
    mean, logvar = ae.posterior(x)
    recon = ae.decode(mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=g.manual_seed(3)))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3, 4)).mean()
    loss = (recon - x).abs().mean() + 1e-7 * kl + m.Config.gan * (ae.discriminator(recon) - 1).square().mean()
    real, fake = ae.discriminator(x), ae.discriminator(recon.detach())
    judge = m.Config.gan * ((real - 1).square().mean() + fake.square().mean()) / 2
    judged = list(ae.discriminator.parameters())
    others = [*ae.encoder.parameters(), *ae.decoder.parameters()]
    for mine, params in ((loss, others), (judge, judged)):
        for p, grad in zip(params, torch.autograd.grad(mine, params)):
            assert (p.grad - grad).abs().max() < 1e-6 + 1e-4 * grad.abs().max()


def test_adversarial_warm_up_is_a_function_of_the_step():
    ae, g, seen = m.Autoencoder(replace(TINY, ae_steps=20)), torch.Generator(), []
    ae.adversarial = lambda x, recon: (torch.tensor(1e4), torch.tensor(0.0))
    for _ in range(6):
        seen.append(ae({"image": batch()["image"]}, g.manual_seed(0)).item())
    assert (np.array(seen) - seen[0]) / 1e4 / m.Config.gan == pytest.approx([0, 0, 0, .5, 1, 1], abs=1e-3)
    ae.eval()({"image": batch()["image"]}, g)
    assert ae.step == 6                              # evaluation does not count


def test_bfloat16_gradients_of_the_discriminator_are_finite():
    """Its last maps have 3 voxels a side, for which oneDNN's bfloat16 gradients were infinite."""
    ae = m.Autoencoder(replace(TINY, disc_base=32, size=(32, 40, 32)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = sum(ae.adversarial(*torch.rand(2, 2, 1, 32, 40, 32)))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in ae.discriminator.parameters())


# --------------------------------------------------------------------------------- a whole run

def test_every_stage_is_of_the_training_scans_alone(finished, tiny):
    """Their latents are of mean 0 at every place; each channel, draws of the posterior included, of variance 1."""
    out, calls = finished
    seen, (data, part) = {name: call[0] for name, call in calls.items()}, D.load_study(tiny, "", None, 0)
    train = part == "train"
    for name in ("ckpt_A", "ckpt_C"):
        assert np.array_equal(seen[name]["image"][:, 0], data.image[train].astype(np.float32) / 127.5 - 1)
    assert np.array_equal(seen["ckpt_B"]["mean"], seen["ckpt_C"]["mean"])
    assert len(seen["ckpt_prior_4"]["z"]) == train.sum()
    mean_brain = torch.load(out / "ckpt_A.pt", weights_only=True)["ema"]["mean_brain"][0, 0]
    assert np.allclose(mean_brain, data.image[train].mean(0) / 127.5 - 1, atol=1e-6)
    saved = torch.load(out / "ckpt_B.pt", weights_only=True)["ema"]
    shift, scale = saved["shift"].numpy(), saved["scale"].numpy()
    z, std = (seen["ckpt_B"]["mean"] - shift) / scale, seen["ckpt_B"]["std"] / scale
    assert abs(z.mean(0)).max() < 1e-3 and np.allclose((z ** 2 + std ** 2).mean((0, 2, 3, 4)), 1, atol=1e-3)


def test_stage_c_trains_itself_and_leaves_stage_b_bitwise_alone(finished):
    out, calls = finished
    _, model, before = calls["ckpt_C"]
    frozen, saved = model.ldm.net, torch.load(out / "ckpt_C.pt", weights_only=True)["model"]
    assert m.hash_of(frozen) == before and not frozen.training and model.training
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert saved.keys() == model.state_dict().keys() and not any(k.startswith(("ldm", "ae")) for k in saved)
    for part in ("encoder", "embed", "gradient", "z_latent"):
        assert any(p.grad.abs().max() > 0 for p in getattr(model, part).parameters()), part


def test_results_have_all_rows(finished):
    out, _ = finished
    metrics = json.loads((out / "results.json").read_text())["metrics"]
    for key in ("recon_ssim.ae recon_mse.copy semantic_ssim.constant semantic_mse.pca semantic_gain z_T_sd_error "
                "probe_auroc.untrained probe_auroc.pca probe_f1.all_positive age_mae.mean interp_6m_mse.copy "
                "interp_6m_mse.voxel_mean interp_6m_ssim.ae manip_ventricle_slope manip_hippocampus_slope "
                "manip_head_change factor_r2_ventricle_ml.untrained throughput_ratio").split():
        assert key in metrics and key.split(".")[0] in metrics, key
    pictures = "reconstructions manipulation missing samples curves preview_A preview_C".split()
    assert {p.stem for p in out.glob("*.png")} == set(pictures)


def test_a_trained_model_is_loaded_and_applied(finished, tiny, capsys):
    out, before = finished[0], {p.name: p.read_bytes() for p in finished[0].iterdir() if p.is_file()}
    main("--out", out, "--apply", tiny, "--device=cpu")
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    for name, columns in (("codes", ["part", "z0", "z7"]), ("predictions", ["key", "truth", "score"])):
        ours, run = (pandas.read_csv(f / f"{name}.csv")[columns] for f in (out / "apply" / "tiny", out))
        pandas.testing.assert_frame_equal(ours, run, rtol=1e-3, atol=1e-3)
    model, cfg = m.load(out, device="cpu")
    data = D.load(tiny)
    loader, ldm = D.Loader({"image": data.image}, "cpu"), model.ldm.net
    z, x = m.over_rows(model.encode, loader)[:12], loader.batch(np.arange(12))["image"]
    z0 = m.in_batches(lambda x: (model.ae.net.posterior(x)[0] - ldm.shift) / ldm.scale, x, batch=4)
    images = m.render(model, m.travel(m.ddim_encode, model, z0, z), z)
    assert abs(D.load(out / "apply" / "tiny" / "reconstructions.h5").image[:12] / 255 - images).max() < 0.003
    assert "of these subjects" in capsys.readouterr().err


def test_stages_a_and_b_serve_another_encoder(finished, tiny, capsys, tmp_path, monkeypatch):
    """But a stage B on another stage A is refused."""
    out, _ = finished
    command = ["--data", tiny, "--out", tmp_path, *FLAGS, "--z_dim=16", "--steps=2"]
    for name in ("ckpt_A.pt", "ckpt_B.pt"):
        shutil.copy(out / name, tmp_path)
    monkeypatch.setattr(m, "evaluate", lambda *_: {})
    main(*command)
    for name in ("ckpt_A.pt", "ckpt_B.pt"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    state = torch.load(tmp_path / "ckpt_A.pt", weights_only=True)
    state["ema"] = {k: v + 0.01 if v.is_floating_point() else v for k, v in state["ema"].items()}
    torch.save(state, tmp_path / "ckpt_A.pt")
    message = error_of(capsys, *command)
    assert "ckpt_B.pt" in message and "stage A" in message


def test_paper_recipe_reads_disease_against_health(tmp_path):
    """A third class, as in ADNI's tables, is left out: its number is a name and no quantity to regress on."""
    image, person = heads(36)[0], np.repeat(np.arange(12), 3)
    data = tmp_path / "three.h5"
    D.write(str(data), [dict(image=image, subject=person.astype(str), label=person % 3)], {})
    main("--data", data, "--out", tmp_path, *FLAGS, "--recipe=paper", "--steps=2", "--eval_images=1")
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert "probe_r2" not in metrics and metrics["probe_auroc"]["n"] == metrics["probe_auroc.pca"]["n"] < 3


def study(n=12):
    """-> Dataset of n subjects with three scans, whose images are an even grey: 40, 60, 100 at months 0, 6, 18"""
    image = np.broadcast_to(np.tile(np.uint8([40, 60, 100]), n)[:, None, None, None], (3 * n, *SIZE))
    columns = dict(session=np.tile([0.0, 6, 18], n), label=np.tile([0, 1, 1], n))
    return D.Dataset("study", image, None, np.repeat(np.arange(n), 3).astype(str), columns, None, {}, [], "")


def test_missing_scans_are_compared_with_the_real_one(tmp_path):
    """The scan in the middle is the mean of the two voxel by voxel; the nearer one is 20 grey levels off."""
    cfg, z, z0 = replace(TINY, out=str(tmp_path)), torch.zeros(36, 8), batch(36)["mean"]
    made = m.missing_scans(cfg, study(), np.arange(6), model_of(), z, z0)
    assert made["interp_6m_mse.voxel_mean"]["value"] < 1e-12
    assert made["interp_6m_mse.copy"]["value"] == pytest.approx((20 / 255) ** 2) and made["interp_6m_mse"]["n"] == 2
    assert made["interp_6m_mse_gain.copy"]["value"] == pytest.approx(made["interp_6m_mse"]["value"] - (20 / 255) ** 2)
    months = np.array([12, 0, 6, 0, 6, np.nan, 6.0])
    assert m.triples(np.array(list("aaabbbb")), months).tolist() == [[1, 2, 0]]


def test_manipulation_moves_codes_along_their_covariance_with_the_training_labels(tmp_path, monkeypatch):
    data, moved, train = study(), [], np.arange(20)
    z = torch.randn(36, 8, generator=torch.Generator().manual_seed(0))
    empty = np.zeros((3, *SIZE))
    monkeypatch.setattr(m, "render", lambda model, z_T, z_sem: moved.append(z_sem) or empty)
    cfg = replace(TINY, out=str(tmp_path), target="label")
    m.manipulation(cfg, data, train, np.arange(30, 33), model_of(), z, batch(36)["mean"])
    axis = np.array([np.cov(z[train, k], data.columns["label"][train])[0, 1] for k in range(8)])
    axis = axis / np.linalg.norm(axis)
    step = (z[train].numpy() @ axis).std(ddof=1) * axis
    for alpha, codes in zip((-1.5, -0.75, 0, 0.75, 1.5), moved):
        assert np.allclose(codes - z[30:33], alpha * step, atol=1e-4)


def test_volume_reader_measures_what_it_has_not_seen():
    image, mask, inner = heads(60)
    data = D.Dataset("heads", image, mask, np.arange(60) // 2, {}, None, {}, [], "")
    read = m.volume_reader(data, np.arange(50), 4, inner)
    assert np.corrcoef(read(image[50:] / 255), inner[50:])[0, 1] > 0.97


def test_throughput_times_the_same_number_of_steps_in_both_spaces(monkeypatch):
    calls, forward = [], m.Down3d.forward
    monkeypatch.setattr(m.Down3d, "forward", lambda self, x, *rest: calls.append(len(x[0])) or forward(self, x, *rest))
    out = {k: v["value"] for k, v in m.throughput(TINY, batch(1), model_of()).items()}
    assert calls.count(2) == calls.count(1) == 2 * 2 * TINY.S    # latents of 2 channels, voxels; twice, both ways
    assert out["throughput_ratio"] == pytest.approx(out["recon_s.voxel"] / out["recon_s"])


# --------------------------------------------------------------------------------- bad input, one line each

@pytest.mark.parametrize("flags, word", [
    (["--groups=7"], "divisible by num_groups"), (["--base=15"], "no such network"), (["--S=2000"], "S=2000"),
    (["--enc_mult=1,2,4,8"], "no such network"), (["--target=nose"], "nose"),
    (["--recipe=paper", "--z_dim=100"], "num_heads"), (["--base=1000000000"], "no such network")])
def test_bad_flags(flags, word, tiny, tmp_path, capsys):
    assert word in error_of(capsys, "--data", tiny, "--out", tmp_path / "out", *FLAGS, *flags)
    assert not list(tmp_path.glob("out/c*"))            # no checkpoint, no config.json


def test_volumes_that_cannot_be_are_one_line(tmp_path, capsys):
    image, subject = heads(8)[0], np.array(list("abcdefgh"))
    small = image[:, :20, :20, :20]
    for name, x, word in (("flat", image[:, 8], "needs volumes"), ("small", small, "at least 24")):
        D.write(str(tmp_path / f"{name}.h5"), [dict(image=x, subject=subject)], {})
        assert word in error_of(capsys, "--data", tmp_path / f"{name}.h5", "--out", tmp_path / "out", *FLAGS)
    D.phantom_brains(str(tmp_path / "brains.h5"), subjects=2, size=16)
    message = error_of(capsys, "--out", tmp_path, *FLAGS, "--size=24,24,24")
    assert "phantoms of (16, 16, 16), not of --size" in message
    assert "phantoms have D" in error_of(capsys, "--out", tmp_path, *FLAGS, "--size=48")      # before they are drawn
