"""cond_ldm.py: the codebook against brute force, one backward pass against two, samplers and guidance against
closed forms, drawings that reach the picture, whole runs and what they refuse."""
import json
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import cond_ldm as m
from conftest import ROOT, runs_of
import data as D
import metrics as M

main, error_of = runs_of(m)
SMALL = dict(size=16, patch=1, channels=(8, 16), depth=1, codebook=32, gan_channels=(8, 16), gan_start=2,
             unet=(16, 32), heads=2, attention=8, groups=0, cond_ch=8, vq_steps=6, steps=6, seg_steps=3, batch=4,
             vq_lr=1e-3, lr=1e-3, save_every=3, log_every=2, bf16=False, S=3, eval_images=10, few=3, aug_images=8,
             seg=(8, 16), variety=20, w=1.0, device="cpu")
TINY = m.Config(**SMALL)
FLAGS = [f"--{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in SMALL.items()]
AB = m.scaled_linear_alpha_bar(1000)


def slices(subjects=10, size=16, seed=0):
    """Discs in rings, two views of each: columns of a file that can be drawn."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    n = 2 * subjects
    c, r = rng.uniform(0.4, 0.6, (n, 2, 1, 1)) * size, rng.uniform(0.1, 0.2, (n, 1, 1)) * size
    d = np.hypot(x - c[:, 0], y - c[:, 1])
    mask = np.select([d < r, d < r + 2, x - c[:, 0] < -r - 2], [1, 2, 3], 0) * (d < r + 5)
    image = np.array([40, 200, 90, 180])[mask] + rng.integers(0, 20, (n, size, size))
    return dict(image=image.astype(np.uint8), mask=mask.astype(np.uint8), view=np.tile([0, 1], subjects),
                subject=np.repeat([f"p{i:02d}" for i in range(subjects)], 2))


def written(path, columns, **attrs):
    D.write(str(path), [columns], {**D.CINE_NAMES, **attrs})
    return str(path)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Intervals are tested in test_metrics.py: here they would be most of the time."""
    monkeypatch.setattr(M, "bootstrap", partial(M.bootstrap, n=10))


@pytest.fixture
def tiny(tmp_path):
    return written(tmp_path / "tiny.h5", slices())


def a_batch(n=4, size=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return dict(image=torch.rand(n, 1, size, size, generator=g) * 2 - 1,
                mask=torch.randint(0, 4, (n, size, size), generator=g),
                edges=torch.randint(0, 256, (n, size, size), generator=g),
                kind=torch.tensor([[1.0, -1.0]] * n), z0=torch.randn(n, 3, size // 2, size // 2, generator=g))


def a_vq(**changes):
    torch.manual_seed(0)
    vq = m.VQVAE(replace(TINY, augment=0.0, **{"gan": 0.5, **changes})).train()
    for p in vq.parameters():                     # nothing stays zero-initialised: every path carries gradient
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.1)
    return vq


# --------------------------------------------------------------------------------- codebook

def test_nearest_code_is_brute_force():
    vq, z = a_vq(), torch.randn(2, 3, 8, 8)
    far = (z.permute(0, 2, 3, 1)[..., None, :] - vq.codes).square().sum(-1)
    index = vq.nearest(z)
    assert torch.equal(index, far.argmin(-1))
    assert torch.equal(vq.look_up(index)[1, :, 2, 5], vq.codes[index[1, 2, 5]])
    assert torch.equal(vq.decode(vq.look_up(index) + 1e-6), vq.picture(vq.look_up(index)))     # moved to codes


def test_vqvae_eq3_straight_through():
    """The reconstruction's gradient reaches z_e as if it were e; the codebook term moves codes only, the
    commitment latents only."""
    vq = a_vq(gan=0.0)
    x0, z = a_batch()["image"], torch.randn(4, 3, 8, 8, requires_grad=True)
    index, recon, loss, other = vq.losses(x0, z)
    e = vq.look_up(index).detach().requires_grad_()
    want = F.mse_loss(vq.picture(e), x0)
    at_e, = torch.autograd.grad(want, e)
    at_z, at_codes = torch.autograd.grad(loss, (z, vq.codes))
    commit = 2 * TINY.commit * (z - e) / z.numel()
    assert other == 0.0 and (at_z - at_e - commit).abs().max() < 1e-7
    pull = torch.zeros_like(vq.codes).index_add(0, index.flatten(), (2 * (e - z) / z.numel()).detach()
                                                .permute(0, 2, 3, 1).reshape(-1, 3))
    assert (at_codes - pull).abs().max() < 1e-7
    assert loss.item() == pytest.approx((want + (1 + TINY.commit) * F.mse_loss(e, z)).item())


def test_idle_codes_move_to_latents_and_used_ones_stay():
    vq = a_vq(idle=3)
    z, g = torch.randn(4, 3, 8, 8), torch.Generator().manual_seed(0)
    vq.idle.copy_(torch.arange(32) % 5)
    before = vq.codes.detach().clone()
    vq.revive(z, g)
    moved = (vq.codes != before).any(1)
    assert torch.equal(moved, torch.arange(32) % 5 >= 3)
    rows = z.permute(0, 2, 3, 1).reshape(-1, 3)
    assert ((vq.codes[moved][:, None] - rows).abs().sum(-1).min(1).values == 0).all()


def test_codebook_comes_alive_and_counts():
    """All codes at zero to begin with: after a few steps most are used, and idle says for how long not."""
    vq, g = a_vq(), torch.Generator()
    with torch.no_grad():
        vq.codes.zero_()
    for k in range(3):
        g.manual_seed(k)
        vq(a_batch(seed=k), g)
    used = vq.nearest(vq.latent(a_batch(seed=2)["image"])).unique()
    assert len(used) > 16 and vq.trained == 3
    assert (vq.idle[used] == 0).all() and (vq.idle[vq.idle > 0] <= 3).all()
    vq.eval()
    state = {k: v.clone() for k, v in vq.state_dict().items()}
    vq(a_batch(), g)                              # as compile_checked does: must leave no trace
    assert all(torch.equal(v, state[k]) for k, v in vq.state_dict().items())


def test_codes_are_counted_once_when_memory_runs_out(monkeypatch):
    """What does not fit on a GPU is done again in smaller batches."""
    vq, tried, loader = a_vq().eval(), [], D.Loader({"image": slices()["image"]}, "cpu")
    want, used = m.reconstruct(vq, loader, np.arange(20))
    picture = vq.picture

    def full(z):
        tried.append(len(z))
        if len(z) > 8:
            raise torch.OutOfMemoryError
        return picture(z)
    monkeypatch.setattr(vq, "picture", full)
    images, again = m.reconstruct(vq, loader, np.arange(20))
    assert tried == [20, 20, 16, 8, 8, 4] and abs(images - want).max() < 1e-5 and np.array_equal(again, used)
    assert used.sum() == 20 * 8 * 8


def test_perplexity():
    assert m.perplexity(np.array([5.0, 5, 0, 0])) == pytest.approx(2)
    assert m.perplexity(np.array([7.0, 0])) == pytest.approx(1)


@pytest.mark.parametrize("trained", [0, 5])
def test_one_backward_is_two(trained):
    """Autoencoder and discriminator each get the gradient of their own loss, as two optimizers would give."""
    vq, batch = a_vq(), a_batch()
    vq.trained.fill_(trained)
    z = vq.latent(batch["image"])
    _, _, autoencoder, discriminator = vq.losses(batch["image"], z)
    params = dict(vq.named_parameters())
    together = dict(zip(params, torch.autograd.grad(autoencoder + discriminator, params.values())))

    x0, z = batch["image"], vq.latent(batch["image"])
    index = vq.nearest(z)
    e = vq.look_up(index)
    recon = vq.picture(z + (e - z).detach())
    loss = F.mse_loss(recon, x0) + F.mse_loss(e, z.detach()) + TINY.commit * F.mse_loss(z, e.detach())
    if trained >= TINY.gan_start:
        loss = loss + 0.5 * (vq.discriminator(recon) - 1).square().mean()
    mine = {k: p for k, p in params.items() if "discriminator" not in k}
    theirs = {k: p for k, p in params.items() if "discriminator" in k}
    for k, v in zip(mine, torch.autograd.grad(loss, mine.values(), retain_graph=True)):
        assert (together[k] - v).abs().max() < 1e-6 and v.abs().max() > 0, k
    told = 0.5 * ((vq.discriminator(x0) - 1) ** 2).mean() + 0.5 * (vq.discriminator(recon.detach()) ** 2).mean()
    for k, v in zip(theirs, torch.autograd.grad(told, theirs.values())):
        assert (together[k] - v).abs().max() < 1e-6 and v.abs().max() > 0, k


def test_perceptual_loss_from_a_file(tmp_path, capsys):
    class Features(torch.nn.Module):
        def forward(self, x, resize_images: bool, return_lpips: bool):
            assert x.shape[1] == 3 and not resize_images and return_lpips
            return x.mean((2, 3)) / 255
    path = str(tmp_path / "lpips.pt")
    torch.jit.script(Features()).save(path)
    batch, g = a_batch(), torch.Generator()
    z = a_vq().latent(batch["image"])
    _, recon, plain, _ = a_vq().losses(batch["image"], z)
    _, _, more, _ = a_vq(perceptual=path).losses(batch["image"], z)
    want = (((recon - batch["image"]) / 2).mean((1, 2, 3)) ** 2 * 3).mean()
    assert (more - plain).item() == pytest.approx(want.item(), rel=1e-3)
    with pytest.raises(SystemExit):
        m.scripted(__file__, "cpu")
    assert "not a TorchScript file" in capsys.readouterr().err


# --------------------------------------------------------------------------------- schedule, samplers, guidance

def test_schedule_is_scaled_linear():
    beta = [(0.0015 ** 0.5 + (0.0195 ** 0.5 - 0.0015 ** 0.5) * t / 999) ** 2 for t in range(1000)]
    assert abs(AB.numpy() - np.cumprod([1 - b for b in beta])).max() < 1e-12


def test_ddpm_eq7_posterior():
    """Mean and variance of q(x_{t-1} | x_t, x_0) by Bayes' rule, in float64; nothing is drawn at t = 0."""
    x0, x_t = 0.4, -0.3
    for t in (0, 1, 7, 400, 999):
        ab, prev = AB[t].item(), AB[t - 1].item() if t else 1.0
        eps_hat = torch.tensor([(x_t - ab ** 0.5 * x0) / (1 - ab) ** 0.5], dtype=torch.float64)
        step = lambda noise: m.ddpm_step(torch.tensor([x_t], dtype=torch.float64), t, eps_hat, AB, noise).item()
        mean, deviation = step(0.0), step(1.0) - step(0.0)
        if t == 0:
            assert mean == pytest.approx(x0) and deviation == 0
            continue
        a = ab / prev                             # q(x_t | x_{t-1}) = N(sqrt(a) x_{t-1}, 1 - a)
        precision = 1 / (1 - prev) + a / (1 - a)
        assert deviation ** 2 == pytest.approx(1 / precision, rel=1e-9)
        assert mean == pytest.approx((prev ** 0.5 * x0 / (1 - prev) + a ** 0.5 * x_t / (1 - a)) / precision, rel=1e-9)


def oracle(x_t, t, cond, s=0.3):
    """Exact eps for x_0 ~ N(+-1, s^2): the class of sign(cond), or both in equal parts where cond is 0."""
    ab = AB[t].view(-1, 1)
    var = ab * s * s + 1 - ab
    eps = lambda c: (1 - ab).sqrt() * (x_t - ab.sqrt() * c) / var            # -sqrt(1 - ab) score
    p = torch.sigmoid(2 * ab.sqrt() * x_t / var)                             # of class +1, given x_t
    return torch.where(cond == 0, p * eps(1) + (1 - p) * eps(-1), eps(cond.sign()))


def test_guidance_against_two_gaussians():
    model, n = SimpleNamespace(cfg=TINY, condition=lambda c: c, eps=oracle), 4000
    x, cond = torch.randn(n, 1, generator=torch.Generator().manual_seed(0)).double(), torch.ones(n, 1)
    for w in (0, 1, 3.5):
        for t in (3, 500, 999):
            times = torch.full((n,), t)
            eps_c, eps_u = oracle(x, times, cond), oracle(x, times, 0 * cond)
            assert (m.guided(model, cond, w)(x, t) - (eps_u + w * (eps_c - eps_u))).abs().max() < 1e-12
    samples = {w: m.ddim_decode(m.guided(model, cond, w), x, 1000, AB) for w in (0, 1, 3)}
    assert abs(samples[1].mean() - 1) < 0.03 and abs(samples[1].std() - 0.3) < 0.03
    assert abs((samples[0] > 0).double().mean() - 0.5) < 0.05
    assert samples[3].mean() > samples[1].mean() + 0.02 and samples[3].min() > samples[1].min()
    drawn = m.ddpm_decode(m.guided(model, -cond, 1), x, AB, torch.Generator().manual_seed(1))
    assert abs(drawn.mean() + 1) < 0.03 and abs(drawn.std() - 0.3) < 0.03


# --------------------------------------------------------------------------------- drawings

def test_edge_bits_are_the_edge_maps():
    c = slices(size=32)
    bits = m.edge_bits(c["image"], c["mask"], 0)
    full, strokes = D.edges(c["image"]), (bits >> 2 & 1).astype(bool)
    assert np.array_equal(bits & 1, full) and np.array_equal(bits >> 1 & 1, D.edge_map(full, c["mask"], "mask"))
    assert not (strokes & ~full).any() and 0 < strokes.sum() < full.sum()
    assert len({(bits >> b & 1).tobytes() for b in range(2, 8)}) > 1 and np.array_equal(bits, m.edge_bits(c["image"], c["mask"], 0))
    assert not (m.edge_bits(c["image"], None, 0) >> 1 & 1).any()


def test_which_edges_mixes_all_modes_by_u_alone():
    u = torch.rand(8000, 2, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(m.which_edges("mixed", u), minlength=9) / 8000
    want = torch.tensor([1 / 4, 1 / 4, *[1 / 24] * 6, 1 / 4])
    assert (share - want).abs().max() < 0.02
    for mode, bit in zip(D.EDGES, (0, 2, 1, 8)):
        assert (m.which_edges(mode, torch.zeros(3, 2)) == bit).all()
    assert set(m.which_edges("sparse", u).tolist()) == set(range(2, 8))


def test_planes():
    batch = a_batch()
    x = m.planes(batch, torch.tensor([0, 1, 2, 8]))
    assert x.shape == (4, 7, 16, 16)
    for i, bit in enumerate((0, 1, 2)):
        assert torch.equal(x[i, 0], (batch["edges"][i] >> bit) % 2)
    assert (x[3, 0] == 0).all() and torch.equal(x[:, 1:5].argmax(1), batch["mask"]) and (x[:, 1:5].sum(1) == 1).all()
    assert (x[:, 5] == 1).all() and (x[:, 6] == -1).all()
    del batch["mask"]
    assert (m.planes(batch, torch.zeros(4).long())[:, 1:5] == 0).all()


@pytest.mark.parametrize("cond", ["conv", "seed"])
def test_the_drawing_reaches_the_picture(cond):
    torch.manual_seed(0)
    model, batch = m.Model(replace(TINY, cond=cond)), a_batch()
    torch.nn.init.normal_(model.unet.conv_out.weight)
    t, out = torch.full((4,), 500), lambda x: model.unet(batch["z0"], t, model.condition(x))
    x = m.planes(batch, torch.zeros(4).long())
    for channel in range(7):
        other = x.clone()
        other[:, channel] = 1 - other[:, channel]
        told = channel < 5 or cond == "conv"             # the study's path knows of no view and no phase
        assert ((out(other) - out(x)).abs().max() > 1e-6) == told, channel
    other = x.clone()
    other[:, 0, 1::2] = 1 - other[:, 0, 1::2]            # edges between the pixels that "nearest" looks at
    assert ((out(other) - out(x)).abs().max() > 1e-6) == (cond == "conv")


def test_paper_networks_are_of_the_studys_size():
    cfg = m.Config(**m.RECIPES["paper"])
    with torch.device("meta"):
        vq, model = m.VQVAE(cfg), m.Model(cfg)
        assert vq.latent(torch.empty(1, 1, 256, 256)).shape == (1, 3, 32, 32) and len(vq.codes) == 16384
    size = lambda net, but="": sum(p.numel() for k, p in net.named_parameters() if not but or but not in k) / 1e6
    assert size(vq, "discriminator") == pytest.approx(22.0, rel=0.1) and size(model.unet) == pytest.approx(103.5, rel=0.1)


def test_latents_are_standardised_and_dropping_drops(monkeypatch):
    torch.manual_seed(0)
    model, batch, seen = m.Model(replace(TINY, drop=0.5), torch.tensor([1.0, 2, 3]), torch.tensor([4.0, 5, 6])), a_batch(400), []
    monkeypatch.setattr(model, "loss", lambda z0, cond, t, eps: seen.append((z0, cond)) or z0.mean((1, 2, 3)))
    model(batch, torch.Generator().manual_seed(0))
    z0, cond = seen[0]
    assert torch.allclose(z0 * torch.tensor([4.0, 5, 6]).view(3, 1, 1) + torch.tensor([1.0, 2, 3]).view(3, 1, 1), batch["z0"], atol=1e-5)
    dropped = (cond == 0).all((1, 2, 3)).double().mean()
    assert 0.4 < dropped < 0.6


def test_segmenter_learns_and_moves_image_and_mask_together(tmp_path):
    c = slices(8)
    loader = D.Loader({"image": c["image"], "mask": c["mask"]}, "cpu")
    cfg = replace(TINY, out=str(tmp_path), lr=1e-2, save_every=1000)
    judge, _ = m.fit(m.Segmenter(cfg), loader, cfg, "ckpt_seg", {}, 150)
    assert M.dice(M.overlap(m.segment(judge, c["image"] / 255), c["mask"], (1, 2))) > 0.7


# --------------------------------------------------------------------------------- runs

def test_whole_run_leaves_results_and_pictures(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    main("--data", tiny, "--out", out, *FLAGS)
    printed = capsys.readouterr().out
    assert "16x16" in printed and "dice_gen" in printed and "fid" not in printed.lower()
    head, paper = (next(t for t in printed.splitlines() if t.startswith(word)) for word in ("    ", "paper"))
    assert paper[head.index("ssim_uniform7"):].startswith("0.400") and paper[head.index("nmse"):].startswith("1.220")
    results = json.loads((out / "results.json").read_text())
    assert results["script"] == "cond_ldm" and results["n"] == {"train": 7, "val": 1, "test": 2}
    for key in ("vq_ssim", "vq_psnr", "vq_perplexity", "vq_usage", "ssim", "ssim_uniform7", "nmse", "nmse_fastmri", "psnr",
                "fd_vq", "kid_vq", "dice_gen", "dice_gen_lv", "dice_gen_myo", "dice_gen_rv", "edge_f1", "edge_recall",
                "dice_aug", "memorisation", "gen_img_s", "train_img_s", "peak_gb"):
        assert set(results["metrics"][key]) == {"value", "ci", "n", "unit", "better"}, key
    for key in ("ssim", "nmse", "dice_gen", "edge_f1"):
        for row in ("edges_sparse", "edges_mask", "edges_none", "cond_seed", "vq", "constant", "other_slice", "view_SA",
                    "view_LA", "w1", "w2", "w4", "val_w1", "val_w2", "val_w4"):
            assert f"{key}.{row}" in results["metrics"], (key, row)
    for key in ("fd_vq.real", "kid_vq.real", "fd_vq.cond_seed", "dice_gen.real", "dice_aug.real", "dice_aug.generated",
                "memorisation.real", "memorisation.vq", "vq_ssim.constant"):
        assert key in results["metrics"], key
    assert not [k for k in results["metrics"] if k.startswith(("fid", "kid.")) or k == "kid"]
    for name in ("samples", "edges", "guidance", "memorisation", "curves", "preview_vq", "preview_ldm", "preview_seed"):
        assert (out / f"{name}.png").stat().st_size > 1000, name
    assert Image.open(out / "guidance.png").width < 5 * 96      # --few 3: three slices, each once
    assert (out / "cond_ldm.py").read_text() == (ROOT / "cond_ldm.py").read_text()
    first = json.loads((out / "log_vq.jsonl").read_text().splitlines()[0])
    assert {"val_psnr", "perplexity", "codes_used"} <= set(first)
    before = (out / "ckpt_ldm.pt").read_bytes()
    main("--data", tiny, "--out", out, *FLAGS, "--eval")                   # changes nothing, gives the same numbers
    again = json.loads((out / "results.json").read_text())["metrics"]
    assert (out / "ckpt_ldm.pt").read_bytes() == before
    assert all(again[k] == v for k, v in results["metrics"].items() if k not in ("gen_img_s", "peak_gb"))

    # Segmenters are of so many generated images, and a rival that is half-trained is none.
    again = ["--data", tiny, "--out", out, *FLAGS, "--eval"]
    assert "generated_6_ddim3_w1_4.pt" in error_of(capsys, *again, "--aug_images=4")
    assert "ckpt_seed.pt: 6 of 7 steps" in error_of(capsys, "--data", tiny, "--out", half_trained(out, 7), *FLAGS, "--eval")

    # With the file that users of FID have, and only then; another VQ-VAE is refused, this one can be lent.
    class Inception(torch.nn.Module):
        def forward(self, x, return_features: bool):
            assert x.dtype == torch.uint8 and x.shape[1] == 3 and return_features
            return x.double().mean((2, 3))
    path = tmp_path / "inception.pt"
    torch.jit.script(Inception()).save(str(path))
    main("--data", tiny, "--out", out, *FLAGS, "--eval", "--inception", path)
    metrics = json.loads((out / "results.json").read_text())["metrics"]
    assert {"fid", "kid", "fid.real", "kid.cond_seed", "fd_vq"} <= set(metrics)
    capsys.readouterr()
    lent, short = tmp_path / "lent", [*FLAGS, "--rivals=false", "--steps=3"]
    main("--data", tiny, "--out", lent, *short, "--vq", out / "ckpt_vq.pt", "--cond=seed", "--scale=false", "--predict=eps",
         "--attention=4")
    assert (lent / "ckpt_vq.pt").read_bytes() == (out / "ckpt_vq.pt").read_bytes()
    assert torch.load(lent / "ckpt_ldm.pt", weights_only=True)["model"]["std"].tolist() == [1, 1, 1]    # not scaled
    assert "codebook 32 -> 16" in error_of(capsys, "--data", tiny, "--out", out, *FLAGS, "--codebook=16")
    other = tmp_path / "other"
    assert "codebook 32 -> 16" in error_of(capsys, "--data", tiny, "--out", other, *short, "--codebook=16", "--vq",
                                           out / "ckpt_vq.pt")
    main("--data", tiny, "--out", tmp_path / "more", *short, "--vq_steps=7", "--edges=none", "--cond=conv")
    (tmp_path / "more" / "ckpt_vq.pt").replace(out / "ckpt_vq.pt")
    assert "vq '" in error_of(capsys, "--data", tiny, "--out", out, *FLAGS)


def half_trained(out, step):
    """A copy of a finished run in which the diffusion model is at that step: the rival still has to follow."""
    copy = out.with_name("half")
    shutil.copytree(out, copy)
    state = torch.load(copy / "ckpt_ldm.pt", weights_only=True)
    torch.save(state | {"step": step}, copy / "ckpt_ldm.pt")
    return copy


def test_a_users_drawings(tiny, tmp_path, capsys):
    """The pictures of own drawings are those the report makes of the same edges and maps; strange files: a line."""
    out, h5py = tmp_path / "out", pytest.importorskip("h5py")
    short = ["--data", tiny, "--out", out, *FLAGS, "--rivals=false", "--steps=3", "--w=2"]

    def mine(attrs=D.CINE_NAMES, **columns):
        path = tmp_path / "mine.h5"
        with h5py.File(path, "w") as f:
            for k, v in columns.items():
                f[k] = v
            f.attrs.update(attrs)
        return path
    c, n = slices(), 6
    edges, mask, view = D.edges(c["image"][:n]), c["mask"][:n], c["view"][:n]
    main(*short, "--draw", mine(edges=edges, mask=mask, view=view))
    assert "drawn.png" in capsys.readouterr().out and not (out / "results.json").exists()
    made = D.load(out / "drawn.h5")
    assert np.array_equal(made.mask, mask) and (out / "drawn.png").stat().st_size > 1000
    cfg = replace(TINY, out=str(out), w=2.0)
    model, vq = m.Model(cfg), m.VQVAE(cfg)
    model.load_state_dict(torch.load(out / "ckpt_ldm.pt", weights_only=True)["ema"])
    vq.load_state_dict(torch.load(out / "ckpt_vq.pt", weights_only=True)["ema"])
    told = np.stack([2 * view - 1, 0 * view], 1).astype(np.float32)
    everything = D.Loader({"edges": m.edge_bits(c["image"][:n], mask, 0), "mask": mask, "kind": told}, "cpu")
    want = m.generate(model, vq, everything, np.arange(n), "full", 2.0, 0)
    assert abs(made.image / 255 - want).max() < 0.01 and want.std() > 0.01
    swapped = dict(mask_names=["background", "RV cavity", "myocardium", "LV cavity"])
    main(*short, "--draw", mine(swapped, mask=np.uint8([0, 3, 2, 1])[mask]), "--eval")         # the ids that it names
    assert np.array_equal(D.load(out / "drawn.h5").mask, mask)
    bad = [(dict(view=view), "mask missing"), (dict(edges=edges), "mask missing"), (dict(mask=0 * mask[:, ::2]), "(6, 16, 16)"),
           (dict(mask=mask[:0]), "expected uint8 (1, 16, 16)"), (dict(mask=np.uint8(1)), "expected uint8 (1, 16, 16)"),
           (dict(attrs={}, mask=mask), "mask_names"), (dict(mask=mask + 1), "mask[0]"), (dict(mask=mask, edges=edges[1:]), "edges"),
           (dict(mask=mask, phase=h5py.ExternalLink("gone.h5", "phase")), "refused")]
    for columns, word in bad:
        assert word in error_of(capsys, *short, "--draw", mine(**columns)), word
    assert "no such file" in error_of(capsys, *short, "--draw", tmp_path / "no.h5")
    arrays = m.load_drawings(mine(edges=7 * edges, phase=np.ones(n)), replace(cfg, edges="full"), False)
    assert np.array_equal(arrays["edges"], edges) and "mask" not in arrays and (arrays["kind"] == [0, 1]).all()
    for mode in ("mask", "none"):      # such a model has never seen the edges of anything else
        arrays = m.load_drawings(mine(edges=edges, mask=mask), replace(cfg, edges=mode), True)
        assert np.array_equal(arrays["edges"], D.edge_map(edges, mask, mode)) and arrays["edges"].any() == (mode == "mask")


def test_one_view_alone(tiny, tmp_path, capsys, monkeypatch):
    """--view SA, with the VQ-VAE of all views: only such slices are learnt, tested and beside the results."""
    out, flags, seen, stage = tmp_path / "out", ["--data", tiny, *FLAGS, "--steps=3"], {}, m.stage
    monkeypatch.setattr(m, "stage", lambda name, make, cfg, steps, loader, *more: (
        seen.update({name[:12]: len(loader)}) or stage(name, make, cfg, steps, loader, *more)))
    main(*flags, "--out", out, "--view=SA")
    assert seen == {"ckpt_vq": 14, "ckpt_ldm": 21, "ckpt_seed": 21, "ckpt_seg": 14, "ckpt_seg_gen": 7, "ckpt_seg_bot": 21}
    results = json.loads((out / "results.json").read_text())
    assert results["metrics"]["fd_vq"]["n"] == 2 and "ssim.view_SA" not in results["metrics"]
    assert torch.load(out / "ckpt_vq.pt", weights_only=True)["run"]["view"] == ""
    assert "LA, SA" in error_of(capsys, *flags, "--out", tmp_path / "no", "--view=4CH")


def test_the_other_slice_is_of_the_same_view(tmp_path):
    c = slices(12)
    c |= dict(subject=np.repeat(list("abcdef"), 4), view=np.tile([0, 0, 1, 1], 6))
    c["split"] = np.where(c["subject"] < "d", "train", "test")
    path = written(tmp_path / "four.h5", c)
    main("--data", path, "--out", tmp_path / "out", *FLAGS, "--rivals=false", "--edges=full", "--steps=2", "--few=2")
    x, metrics = c["image"][12:] / 255, json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    shown = np.linspace(0, 11, 10).astype(int)      # --eval_images 10
    want = M.psnr(x, x.reshape(6, 2, 16, 16)[:, ::-1].reshape(12, 16, 16))[shown].mean()
    assert metrics["psnr.other_slice"]["value"] == pytest.approx(want)


def test_image_only_file_is_drawn_from_edges(tmp_path, capsys):
    columns = slices()
    del columns["mask"], columns["view"]
    path = written(tmp_path / "plain.h5", columns)
    assert "--edges full" in error_of(capsys, "--data", path, "--out", tmp_path / "a", *FLAGS)
    main("--data", path, "--out", tmp_path / "a", *FLAGS, "--edges=full", "--steps=2", "--vq_steps=2", "--sampler=ddpm", "--T=5")
    metrics = json.loads((tmp_path / "a" / "results.json").read_text())["metrics"]
    assert "edge_f1" in metrics and "ssim.cond_seed" in metrics and not [k for k in metrics if "dice" in k or "view" in k]


def test_paper_recipe_on_a_test_file(tiny, tmp_path):
    other = written(tmp_path / "other.h5", {**slices(3, seed=1), "subject": np.repeat(list("abc"), 2)})
    main("--data", tiny, "--test", other, "--out", tmp_path / "out", *FLAGS, "--recipe=paper", "--T=6", "--rivals=false")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["n"] == {"train": 9, "val": 1, "test": 3}
    assert {k: results["config"][k] for k in ("cond", "edges", "predict", "sampler", "scale", "ema")} == dict(
        cond="seed", edges="full", predict="eps", sampler="ddpm", scale=False, ema=0.0)
    assert "dice_aug.real" in results["metrics"] and not [k for k in results["metrics"] if "edges_" in k or "cond_seed" in k]


# --------------------------------------------------------------------------------- bad input, one line each

@pytest.mark.parametrize("flags, word", [
    (["--cnod=seed"], "did you mean --cond"), (["--cond=both"], "conv, seed"), (["--edges=some"], "mixed, full"),
    (["--size=18"], "such as"), (["--heads=5"], "must divide"), (["--groups=7"], "must divide"), (["--S=2000"], "at most T"),
    (["--sampler=euler"], "ddim"), (["--drop=1.5"], "from 0 to 1"), (["--vq=/no/such.pt"], "no such file"),
    (["--unet=16"], "two levels"), (["--data=/no/such.h5"], "no such file"), (["--eval"], "without --eval trains it"),
    (["--eval_images=1"], "1 test slices"), (["--gan_channels=8,8,8,8,8"], "halved 4 times"),
    (["--inception=/no/such.pt"], "not a TorchScript file"),
])
def test_bad_flags(flags, word, tiny, tmp_path, capsys):
    assert word in error_of(capsys, "--data", tiny, "--out", tmp_path / "out", *FLAGS, *flags)
    assert not list(tmp_path.glob("out/*.pt"))     # nothing was trained for it


def test_bad_files(tmp_path, capsys):
    good, out = slices(), tmp_path / "out"
    five = {**good, "mask": np.where(good["mask"] == 3, 4, good["mask"]).astype(np.uint8)}
    assert "mask[0]" in error_of(capsys, "--data", written(tmp_path / "five.h5", five), "--out", out, *FLAGS)
    small = {**good, "mask": good["mask"][:, ::2, ::2]}
    assert "as image" in error_of(capsys, "--data", written(tmp_path / "small.h5", small), "--out", out, *FLAGS)
    unnamed = written(tmp_path / "unnamed.h5", good, mask_names=["a", "b", "c", "d"])
    assert "mask_names" in error_of(capsys, "--data", unnamed, "--out", out, *FLAGS)
    swapped = written(tmp_path / "swapped.h5", {**slices(4, seed=1), "subject": np.repeat(list("abcd"), 2)},
                      mask_names=["background", "RV cavity", "myocardium", "LV cavity"])
    tiny = written(tmp_path / "tiny.h5", good)
    assert "other ids" in error_of(capsys, "--data", tiny, "--test", swapped, "--out", out, *FLAGS)
    plain = {k: v for k, v in slices(3, seed=1).items() if k != "mask"} | dict(subject=np.repeat(list("abc"), 2))
    plain = written(tmp_path / "plain.h5", plain)
    assert "plain.h5: mask: missing" in error_of(capsys, "--data", tiny, "--test", plain, "--out", out, *FLAGS)
    assert not list(out.glob("*.pt"))
