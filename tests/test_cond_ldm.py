"""cond_ldm.py: a codebook that comes alive, one backward pass against two, drawings that reach the picture, which rows
a run learns from, and what a run refuses."""
import json
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cond_ldm as m
import data as D
import metrics as M
from conftest import runs_of

main, error_of = runs_of(m)
SMALL = dict(size=16, patch=1, channels=(8, 16), depth=1, groups=0, codebook=32, gan_start=2, unet=(16, 32),
             vq_steps=6, steps=6, batch=4, vq_lr=1e-3, lr=1e-3, save_every=3, S=3, eval_images=9,
             device="cpu")
TINY = m.Config(**SMALL)
FLAGS = [f"--{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in SMALL.items()]
AB = m.scaled_linear_alpha_bar()


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


def metrics_of(out):
    return json.loads((out / "results.json").read_text())["metrics"]


pytestmark = pytest.mark.usefixtures("quick_statistics")


@pytest.fixture
def tiny(tmp_path):
    return written(tmp_path / "tiny.h5", slices())


def a_batch(n=4, size=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return dict(image=torch.rand(n, 1, size, size, generator=g) * 2 - 1,
                mask=torch.randint(0, 4, (n, size, size), generator=g),
                edges=torch.randint(0, 2, (n, 3, size, size), generator=g),
                kind=torch.tensor([[1.0, -1.0]] * n), z0=torch.randn(n, 3, size // 2, size // 2, generator=g))


def a_vq():
    torch.manual_seed(0)
    vq = m.VQVAE(replace(TINY, augment=0.0, gan=0.5))
    for p in vq.parameters():       # nothing stays zero-initialised: every path carries gradient
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.1)
    vq.unused.zero_()               # and no code moves
    return vq


# --------------------------------------------------------------------------- codebook

def test_what_is_decoded_is_a_code():
    vq = a_vq()
    e = vq.look_up(vq.nearest(torch.randn(2, 3, 8, 8)))
    assert torch.equal(vq.decode(e + 1e-6), vq.decoder(e))


def test_unused_codes_move_to_latents_and_used_ones_stay():
    vq, z = a_vq(), torch.randn(4, 3, 8, 8)
    vq.unused.copy_(m.IDLE - torch.arange(32) % 4)              # 0, 1, 2, 3 steps short of it
    before, index = vq.codes.detach().clone(), torch.tensor([[[0, 1]]])
    vq.revive(z, index, torch.Generator().manual_seed(0))
    moved = (vq.codes != before).any(1)
    late = (torch.arange(32) % 4 < 2) & (torch.arange(32) > 1)
    assert torch.equal(moved, late) and vq.unused[:2].tolist() == [0, 0] and vq.unused[3] == m.IDLE - 2
    rows = z.permute(0, 2, 3, 1).reshape(-1, 3)
    assert ((vq.codes[moved][:, None] - rows).abs().sum(-1).min(1).values == 0).all()


def test_fine_tuning_keeps_the_codebook(tmp_path):
    """The average does not count which codes are in use; a network that starts from it must know."""
    model, ema = a_vq(), m.VQVAE(replace(TINY, augment=0.0, gan=0.5))
    assert (ema.unused == m.IDLE).all()
    state = dict(step=3, config={}, model=model.state_dict(), ema=ema.state_dict(), optimizer={"state": {}})
    m.D.save_checkpoint(str(tmp_path / "vq.pt"), state)
    new = a_vq()
    m.D.start_from(tmp_path / "vq.pt", new)
    assert (new.unused == 0).all() and torch.equal(new.codes, ema.codes)


def test_codebook_comes_alive():
    """All codes begin at zero. After the first step they are where latents are, and most of them are used."""
    torch.manual_seed(0)
    vq, batch = m.VQVAE(replace(TINY, augment=0.0)), a_batch()
    for k in range(2):
        vq(batch, torch.Generator().manual_seed(k))
    with m.amp(torch.device("cpu")):
        share = np.bincount(vq.nearest(vq.encoder(batch["image"])).flatten(), minlength=32) / 256
    perplexity = m.reconstruct(vq, batch["image"])[1]
    assert perplexity == pytest.approx(np.exp(-(share * np.log(share + 1e-30)).sum())) and perplexity > 12


@pytest.mark.parametrize("trained", [0, 5])
def test_one_backward_is_two(trained):
    """Autoencoder and discriminator each get the gradient of their own loss, as two optimizers would give."""
    vq, batch = a_vq(), a_batch()
    vq.trained.fill_(trained)
    params = dict(vq.named_parameters())
    loss = vq(batch, torch.Generator())
    together = dict(zip(params, torch.autograd.grad(loss, params.values())))

    x0, z = batch["image"], vq.encoder(batch["image"])
    e = vq.encode(x0)
    recon = vq.decoder(z + (e - z).detach())
    loss = F.mse_loss(recon, x0) + F.mse_loss(e, z.detach()) + 0.2 * F.mse_loss(z, e.detach())
    if trained >= TINY.gan_start:
        loss = loss + 0.5 * (vq.discriminator(recon) - 1).square().mean()
    mine = {k: p for k, p in params.items() if "discriminator" not in k}
    theirs = {k: p for k, p in params.items() if "discriminator" in k}
    for k, v in zip(mine, torch.autograd.grad(loss, mine.values(), retain_graph=True)):
        assert (together[k] - v).abs().max() < 1e-6 and v.abs().max() > 0, k
    real, made = vq.discriminator(x0), vq.discriminator(recon.detach())
    apart = ((real - 1).square().mean() + made.square().mean()) / 2
    for k, v in zip(theirs, torch.autograd.grad(apart, theirs.values())):
        assert (together[k] - v).abs().max() < 1e-6 and v.abs().max() > 0, k


# --------------------------------------------------------------------------- schedule, guidance

def test_schedule_is_scaled_linear():
    beta = [(0.0015 ** 0.5 + (0.0195 ** 0.5 - 0.0015 ** 0.5) * t / 999) ** 2 for t in range(1000)]
    assert abs(AB.numpy() - np.cumprod([1 - b for b in beta])).max() < 1e-12


# --------------------------------------------------------------------------- drawings, networks

def test_edge_maps_and_planes():
    c = slices(size=32)
    maps, found = m.edge_maps(c["image"], c["mask"], 0), D.edges(c["image"])
    assert np.array_equal(maps[:, 0], found)
    assert np.array_equal(maps[:, 2], D.edge_map(found, c["mask"], "mask"))
    assert not (maps[:, 1] & ~found).any() and 0 < maps[:, 1].sum() < found.sum()
    assert np.array_equal(maps[:, :2], m.edge_maps(c["image"], None, 0)[:, :2])
    batch = a_batch(400)
    for k, word in enumerate(D.EDGES):
        x = m.planes(batch, word)
        assert torch.equal(x[:, 0], batch["edges"][:, k].float() if k < 3 else 0 * x[:, 0]), word
    assert torch.equal(x[:, 1:5].argmax(1), batch["mask"]) and (x[:, 1:5].sum(1) == 1).all()
    assert (x[:, 5] == 1).all() and (x[:, 6] == -1).all()
    assert torch.equal(m.planes(batch, "mixed"), m.planes(batch, "full"))
    x = m.planes(batch, "mixed", torch.Generator().manual_seed(0))[:, 0]
    for k in range(4):                                  # a quarter of the samples each
        right = batch["edges"][:, k].float() if k < 3 else 0 * x
        assert 0.19 < (x == right).all((1, 2)).double().mean() < 0.31


@pytest.mark.parametrize("cond", ["conv", "seed"])
def test_the_drawing_reaches_the_picture(cond):
    torch.manual_seed(0)
    batch = a_batch()
    model, x = m.Model(replace(TINY, cond=cond), batch["z0"]), m.planes(batch, "full")
    torch.nn.init.normal_(model.unet.conv_out.weight)
    out = lambda x: model.unet(batch["z0"], torch.full((4,), 500), model.condition(x))
    for channel in range(7):
        other = x.clone()
        other[:, channel] = 1 - other[:, channel]
        known = channel < 5 or cond == "conv"            # the study's path knows of no view and no phase
        assert ((out(other) - out(x)).abs().max() > 1e-6) == known, channel
    other = x.clone()
    other[:, 0, 1::2] = 1 - other[:, 0, 1::2]            # edges between the pixels that "nearest" looks at
    assert ((out(other) - out(x)).abs().max() > 1e-6) == (cond == "conv")


def test_paper_networks_are_of_the_studys_size():
    cfg = m.Config(**m.RECIPES["paper"])
    with torch.device("meta"):
        vq = m.VQVAE(cfg)
        z0 = vq.encoder(torch.empty(2, 1, 256, 256))
        unet = m.Model(cfg, z0).unet
    assert z0.shape == (2, 3, 32, 32) and len(vq.codes) == 16384
    count = lambda net: sum(p.numel() for p in net.parameters()) / 1e6
    assert count(vq) - count(vq.discriminator) == pytest.approx(22.0, rel=0.1)
    assert count(unet) == pytest.approx(103.5, rel=0.1)


def test_loss_is_of_standardised_latents_and_a_tenth_has_no_condition(monkeypatch):
    torch.manual_seed(0)
    batch, g = a_batch(1000), torch.Generator().manual_seed(0)
    z0 = 5 * batch["z0"] + torch.tensor([1.0, 2, 3]).view(3, 1, 1)
    model, seen = m.Model(replace(TINY, edges="full"), z0), {}
    monkeypatch.setattr(m, "q_sample", lambda z0, *more: seen.update(z0=z0) or z0)
    model.condition.register_forward_pre_hook(lambda net, args: seen.update(x=args[0]))
    loss = model(dict(batch, z0=z0), g)
    assert abs(seen["z0"].mean((0, 2, 3))).max() < 1e-5 and abs(seen["z0"].std((0, 2, 3)) - 1).max() < 1e-5
    assert 0.07 < (seen["x"] == 0).all((1, 2, 3)).double().mean() < 0.13
    assert loss.item() == pytest.approx(1, abs=0.05)     # the UNet begins at 0, v has variance 1


def test_judge_learns_from_image_and_mask_that_move_together():
    """An image that is its own mask: a judge that reads it off is right after every motion."""
    mask, g = torch.as_tensor(slices()["mask"]).long() // 3 * 3, torch.Generator().manual_seed(0)
    judge = m.Segmenter(TINY)
    judge.logits = lambda x: 9 * m.one_hot(3 * (x[:, 0] > 0))
    assert judge(dict(image=mask[:, None] / 1.5 - 1, mask=mask), g) < 0.1


def test_painted_is_the_mean_grey_of_training_rows():
    image, mask = np.full((4, 2, 2), 100, np.uint8), np.zeros((4, 2, 2), np.uint8)
    image[:, 0, 0], mask[:, 0, 0] = [10, 30, 250, 250], 2
    x = m.painted(SimpleNamespace(image=image), mask, np.array([0, 1]), np.array([2, 3])) * 255
    assert np.allclose(x, [[20, 100], [100, 100]])


# --------------------------------------------------------------------------- runs

def test_a_run_learns_from_training_rows_and_is_tested_on_others(tiny, tmp_path, capsys, monkeypatch):
    seen, made, compared, fit, nmse, generate, evaluate = {}, [], [], m.fit, M.nmse, m.generate, m.evaluate
    columns, part, out = slices(), D.load_study(tiny)[1], tmp_path / "out"
    train, val, test = (np.flatnonzero(part == p).tolist() for p in ("train", "val", "test"))
    rows_of = lambda images: [int(abs(columns["image"] / 255 - x).sum((1, 2)).argmin()) for x in images]

    def spy(model, loader, cfg, name, *more):
        seen[name] = loader.rows.tolist()
        if name == "ckpt_ldm":
            z0 = loader.batch(np.arange(len(loader)))["z0"]
            assert (model.mean - z0.mean((0, 2, 3), keepdim=True)).abs().max() < 1e-6
        return fit(model, loader, cfg, name, *more)
    monkeypatch.setattr(m, "fit", spy)
    monkeypatch.setattr(M, "nmse", lambda real, fake: compared.append(rows_of(real)) or nmse(real, fake))
    monkeypatch.setattr(m, "generate", lambda *a: made.append(generate(*a)) or made[-1])
    monkeypatch.setattr(m, "evaluate", lambda *a: seen.update(at=len(made)) or evaluate(*a))
    main("--data", tiny, "--out", out, *FLAGS)
    assert seen["ckpt_vq"] == seen["ckpt_judge"] == seen["ckpt_ldm"] == train
    assert test in compared and not set(sum(compared, [])) & {*train, *val}

    metrics, printed = metrics_of(out), capsys.readouterr().out
    assert "Does a slice obey its drawing more than" in printed and "fid" not in printed.lower()
    for key in ("ssim", "nmse", "dice", "edge_f1", "fd_vq", "kid_vq"):
        for row in ("", "edges_sparse", "edges_mask", "edges_none", "other_drawing", "untrained", "vq", "pca",
                    "painted", "copy", "constant", "real"):
            assert f"{key}.{row}".rstrip(".") in metrics, (key, row)
    assert {"ssim.view_SA", "nmse.view_LA", "dice_gain.real", "vq_perplexity"} <= set(metrics)
    for name in ("samples", "curves", "preview_vq", "preview_ldm"):
        assert (out / f"{name}.png").stat().st_size > 1000, name
    assert [r["step"] for r in M.read_log(out / "log_vq.jsonl") if "perplexity" in r] == [0, 3, 6]
    # `copy` shows the same view of the same patient: there is none here, so it is black.
    x = columns["image"][test] / 255
    assert metrics["nmse.copy"]["value"] == pytest.approx(nmse(x, 0 * x).mean())

    # A user's drawings: those of the test rows give the images that evaluate() has made of these.
    with h5py.File(tmp_path / "mine.h5", "w") as f:
        f["edges"] = D.edges(columns["image"][test])
        f["mask"], f["view"] = columns["mask"][test], columns["view"][test]
        f.attrs.update(D.CINE_NAMES)
    main("--out", out, "--apply", tmp_path / "mine.h5", "--device=cpu")
    drawn = D.load(out / "apply" / "mine" / "drawn.h5")
    assert abs(drawn.image / 255 - made[seen["at"]]).max() < 0.003
    assert np.array_equal(drawn.mask, columns["mask"][test])
    main("--out", out, "--apply", tiny, "--device=cpu")         # or slices: their edges and masks are the drawings
    assert f"{out} was trained on" in capsys.readouterr().err
    again = D.load(out / "apply" / "tiny" / "drawn.h5")
    assert np.array_equal(again.mask, columns["mask"]) and np.array_equal(again.subject, columns["subject"])
    with h5py.File(written(tmp_path / "both.h5", columns), "a") as f:        # a user's own lines win
        f["edges"] = 0 * columns["mask"]
    assert not D.load_drawings(str(tmp_path / "both.h5"), 16, "mixed", True)["edges"].any()
    read = D.load_drawings(tiny, 16, "mixed", True)
    assert np.array_equal(read["edges"], D.edges(columns["image"])) and read["kind"][:2].tolist() == [[-1, 0], [1, 0]]

    # With Inception's file the distances are FID and KID. Nothing is trained again.
    class Inception(torch.nn.Module):
        def forward(self, x, return_features: bool):
            assert x.dtype == torch.uint8 and x.shape[1] == 3 and return_features
            return x.double().mean((2, 3))
    torch.jit.script(Inception()).save(str(tmp_path / "inception.pt"))
    main("--data", tiny, "--out", out, *FLAGS, "--inception", tmp_path / "inception.pt")
    assert {"fid", "kid.real"} <= set(metrics_of(out)) and "fd_vq" not in metrics_of(out)
    assert metrics_of(out)["ssim"] == metrics["ssim"]


def test_more_steps_go_on_where_a_run_ended(tiny, tmp_path, capsys):
    """No step, then some. But a diffusion model is of the latents of one VQ-VAE."""
    flags = ["--data", tiny, *FLAGS, "--w=1", "--edges=full", "--out", tmp_path / "a"]
    for steps in (0, 3):
        main(*flags, f"--steps={steps}")
    assert torch.load(tmp_path / "a" / "ckpt_ldm.pt", weights_only=True)["step"] == 3
    before = (tmp_path / "a" / "ckpt_vq.pt").read_bytes()
    for more in ("--vq_steps=7", "--minutes=1"):
        assert "choose another --out" in error_of(capsys, *flags, more)
    assert (tmp_path / "a" / "ckpt_vq.pt").read_bytes() == before


def test_one_view_alone(tiny, tmp_path, capsys, monkeypatch):
    """--view SA: the diffusion model learns and is tested on SA alone, VQ-VAE and judge see both views. --frame
    patient: they see squares around the hearts."""
    flags, seen, fit = ["--data", tiny, *FLAGS, "--steps=3", "--frame=patient"], {}, m.fit
    monkeypatch.setattr(m, "fit", lambda model, loader, *more: (
        seen.update({more[1]: loader.rows, "heart": loader.arrays.get("mask", 0) > 0}) or fit(model, loader, *more)))
    main(*flags, "--out", tmp_path / "out", "--view=SA")
    assert seen["heart"].float().mean() < 0.8 * (slices()["mask"] > 0).mean()      # the squares are wider than these images
    assert (seen["ckpt_ldm"] % 2 == 0).all() and len(seen["ckpt_ldm"]) == 7 and len(seen["ckpt_vq"]) == 14
    assert len(seen["ckpt_judge"]) == 14 and not [k for k in metrics_of(tmp_path / "out") if "view" in k]
    assert "LA, SA" in error_of(capsys, *flags, "--out", tmp_path / "no", "--view=4CH")


def test_the_papers_recipe_on_images_alone(tmp_path, capsys):
    columns = slices()
    whole = written(tmp_path / "whole.h5", columns)
    del columns["mask"], columns["view"]
    path = written(tmp_path / "plain.h5", columns)
    assert "--edges full" in error_of(capsys, "--data", path, "--out", tmp_path / "a", *FLAGS)
    main("--data", path, "--out", tmp_path / "a", *FLAGS, "--recipe=paper", "--steps=2")
    config, metrics = json.loads((tmp_path / "a" / "config.json").read_text()), metrics_of(tmp_path / "a")
    assert {k: config[k] for k in ("cond", "edges", "predict", "scale", "ema", "w")} == dict(
        cond="seed", edges="full", predict="eps", scale=False, ema=0.0, w=1.0)
    assert "edge_f1.untrained" in metrics
    refused = error_of(capsys, "--data", whole, "--out", tmp_path / "b", *FLAGS, "--init", tmp_path / "a")
    assert "ckpt_judge.pt is missing" in refused       # before anything is trained
    assert not [k for k in metrics if "dice" in k or "edges_" in k or "view" in k]
    model = torch.load(tmp_path / "a" / "ckpt_ldm.pt", weights_only=True)["model"]
    assert model["std"].flatten().tolist() == [1, 1, 1]       # not standardised
    other = written(tmp_path / "other.h5", slices(4, seed=1) | dict(subject=np.repeat(list("abcd"), 2)),
                    mask_names=["background", "RV cavity", "myocardium", "LV cavity"])
    assert "mask_names" in error_of(capsys, "--data", whole, "--test", other, "--out", tmp_path / "b", *FLAGS)


@pytest.mark.parametrize("flag, word", [
    ("--cond=both", "invalid choice"), ("--edges=some", "invalid choice"), ("--size=18", "no such network"),
    ("--size=17", "no such network"), ("--groups=7", "no such network"), ("--S=2000", "--S 2000"),
    ("--unet=16", "no such network"), ("--unet=21,42", "no such network"), ("--eval_images=1", "at least 2"),
    ("--channels=8,8,8,8,8,8", "no such network"), ("--inception=/no/such.pt", "--inception"),
    ("--data=/no/such.h5", "no such file"), ("--apply=/no/such.h5", "leave this flag away"),
])
def test_bad_flags(flag, word, tiny, tmp_path, capsys):
    assert word in error_of(capsys, "--data", tiny, "--out", tmp_path / "out", *FLAGS, flag)
    assert not list(tmp_path.glob("out/*.pt"))     # nothing was trained for it
