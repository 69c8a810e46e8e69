"""diffae.py: every cited equation against its closed form, samplers against an exact oracle and diffusers, the
training loop against a plain one, whole runs and what they refuse (tests/test_faults.py: runs that are cut)."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA

import data as D
import diffae as m
from conftest import ROOT, runs_of

main, error_of = runs_of(m)
AB = m.linear_alpha_bar(1000)
TINY = m.Config(size=16, base=16, mult=(1, 2), enc_mult=(1, 2, 2), blocks=1, attention=8, groups=0, dropout=0.0,
                z_dim=8, steps=12, batch=4, lr=1e-3, save_every=4, log_every=2, bf16=False, device="cpu", S=4, draws=2,
                eval_images=8, prior_steps=5, prior_width=16,
                prior_layers=2)
FLAGS = ["--size=16", "--base=16", "--patch=1", "--mult=1,2", "--enc_mult=1,2,2", "--blocks=1", "--attention=8",
         "--z_dim=8", "--steps=12", "--batch=4", "--save_every=4", "--log_every=2", "--bf16=false", "--device=cpu", "--S=4",
         "--draws=2", "--eval_images=8", "--prior_steps=5", "--prior_width=16", "--prior_layers=2"]


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


def test_ddpm_eq4_mean_and_variance():
    x0, t = torch.full((20000, 1, 1, 1), 0.7), 300
    x_t = m.q_sample(x0, torch.full((20000,), t), torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)), AB)
    assert abs(x_t.mean() - 0.7 * AB[t].sqrt()) < 0.02 and abs(x_t.var() - (1 - AB[t])) < 0.02


def test_times_of_training_follow_their_density():
    """P(t < a T) = a^(1/power), and every t from 0 to T-1 can be drawn."""
    g = torch.Generator().manual_seed(0)
    for power in (1.0, 0.5):
        t = m.random_t(200_000, 1000, power, g)
        assert t.min() >= 0 and t.max() == 999
        for a in (0.1, 0.5, 0.9):
            assert abs((t < 1000 * a).double().mean() - a ** (1 / power)) < 0.005


def test_salimans_v_target_and_its_inverse():
    g = torch.Generator().manual_seed(0)
    x0, eps, t = torch.randn(6, 1, 4, 4, generator=g), torch.randn(6, 1, 4, 4, generator=g), torch.tensor([0, 1, 9, 300, 700, 999])
    x_t, v = m.q_sample(x0, t, eps, AB), m.v_target(x0, t, eps, AB)
    a, s = AB[t].sqrt().view(-1, 1, 1, 1), (1 - AB[t]).sqrt().view(-1, 1, 1, 1)
    assert (a * eps - s * x0 - v).abs().max() < 1e-6
    assert (m.eps_from_v(v, x_t, t, AB) - eps).abs().max() < 1e-5          # and alpha x_t - sigma v gives x0 back
    assert (a * x_t - s * v - x0).abs().max() < 1e-5


def test_diffae_eq7_adagn():
    """z_s (t_s GN(h) + t_b) with 1 + on both scales, between the two convolutions."""
    torch.manual_seed(0)
    block = m.ResBlock(32, 16, 64, 8, 0.0, 0).double()
    torch.nn.init.normal_(block.conv2.weight)
    x, emb, z = torch.randn(2, 32, 8, 8).double(), torch.randn(2, 64).double(), torch.randn(2, 8).double()
    t_s, t_b = block.t_proj(F.silu(emb)).view(2, 32, 1, 1).split(16, 1)
    z_s = block.z_proj(F.silu(z)).view(2, 16, 1, 1)
    h = block.conv1(F.silu(F.group_norm(x, 2, block.norm1.weight, block.norm1.bias)))
    h = (1 + z_s) * ((1 + t_s) * F.group_norm(h, 1, block.norm2.weight, block.norm2.bias) + t_b)
    assert (block(x, emb, z) - block.skip(x) - block.conv2(F.silu(h))).abs().max() < 1e-12


def test_vae_eq10_kl():
    """The KL term against torch.distributions, through the loss: two betas differ by their KL."""
    torch.manual_seed(0)
    vae = m.VAE(replace(TINY, augment=0.0, head="position"))     # its log variance does not start at 0
    batch = {"image": torch.randn(4, 1, 16, 16)}
    loss = []
    for beta in (0.0, 3.0):
        vae.cfg = replace(vae.cfg, vae_beta=beta)
        loss.append(vae(batch, torch.Generator().manual_seed(1)).item())
    x0 = m.augment(batch["image"], 0.0, False, torch.Generator().manual_seed(1))
    mean, logvar = vae.encoder(x0).chunk(2, 1)
    N = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(N(mean, (logvar / 2).exp()), N(0.0, 1.0)).sum(1).mean().item()
    assert loss[1] - loss[0] == pytest.approx(3 * kl / 256, rel=1e-3)


def test_prior_schedule_is_constant_beta():
    ab = m.Prior(TINY).alpha_bar
    assert abs(ab[99] - 0.992 ** 100) < 1e-12


# --------------------------------------------------------------------------------- networks

def test_paper_network_has_the_original_number_of_parameters():
    cfg = m.Config(**m.RECIPES["paper"])
    with torch.device("meta"):
        model = m.Model(cfg)
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert (count(model.encoder), count(model.unet), count(model)) == (24_671_232, 103_867_009, 128_538_241)


@pytest.mark.parametrize("recipe", ["ours", "paper"])
def test_encoder_gets_gradient_from_the_third_step(recipe):
    """Zero-initialised layers hide the paper's encoder for two steps: by design, and then it must train. Ours has a
    second way, through the image of z_sem, which is open from the start."""
    torch.manual_seed(0)
    model = m.Model(replace(TINY, **m.RECIPES[recipe]))
    opt, g, seen = torch.optim.Adam(model.parameters(), 1e-3), torch.Generator().manual_seed(0), []
    for _ in range(3):
        opt.zero_grad()
        model({"image": torch.randn(4, 1, 16, 16, generator=g)}, g).backward()
        seen.append(max(p.grad.abs().max().item() for p in model.encoder.parameters()))
        opt.step()
    assert (seen[0] > 0) == (recipe == "ours") and seen[2] > 0


def test_resample_equals_interpolate_and_keeps_channels_last():
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(m.resample(x, "up"), F.interpolate(x, scale_factor=2))
    y = m.resample(x.to(memory_format=torch.channels_last), "up")
    assert y.is_contiguous(memory_format=torch.channels_last) and torch.equal(y, F.interpolate(x, scale_factor=2))
    assert torch.equal(m.resample(x, "down"), F.avg_pool2d(x, 2))


def test_position_head_sees_position_and_pool_does_not():
    """A disc moved by half the image: what pooling makes of it hardly moves, a flattened map does."""
    torch.manual_seed(0)
    x = torch.zeros(2, 1, 32, 32)
    x[0, :, 4:10, 4:10] = x[1, :, 20:26, 20:26] = 1.0
    moved = {}
    for head in ("pool", "position"):
        torch.manual_seed(0)
        z = m.Encoder(1, 32, 16, (1, 2, 2), 1, 0, 0, head, 8)(x)
        moved[head] = ((z[0] - z[1]).norm() / z.norm()).item()
    assert moved["position"] > 3 * moved["pool"], moved


@pytest.mark.parametrize("images", [6, 40])
def test_head_pca_starts_as_the_pca_of_the_training_images(images):
    """Before the first step: pixels to z_sem and back is scikit-learn's PCA, also of images that it has not
    seen; z_sem's numbers vary by 1 on average, and alike: none holds the first component alone. 6: fewer
    images than numbers."""
    torch.manual_seed(0)
    cfg = replace(TINY, patch=2, head="pca")      # below 500 pixels scikit-learn is exact
    blobs = torch.randn(2 * images, 1, 1, 1) + 0.5 * torch.randn(2 * images, 1, 6, 6)    # brightness leads
    x, new = F.interpolate(blobs, size=16, mode="bilinear").tanh().chunk(2)
    loader = D.Loader({"image": x.numpy()}, "cpu")
    model, vae = m.start_from_pca(m.Model(cfg), loader), m.start_from_pca(m.VAE(cfg), loader)
    pca = PCA(min(cfg.z_dim, images - 1)).fit(x.flatten(1).numpy())
    with torch.no_grad():
        z, log_variance = model.encode({"image": x}), vae.posterior(new)[1]
        wanted = torch.as_tensor(pca.inverse_transform(pca.transform(new.flatten(1).numpy()))).view_as(new)
        image = model.unet.z_image(model.encode({"image": new})).view(images, 4, 8, 8)
        assert (F.pixel_shuffle(image, 2) - wanted).abs().max() < 1e-4
        assert (vae.decode(vae.encode({"image": new})) - wanted).abs().max() < 1e-4
        assert log_variance.abs().max() == 0 and z.var(0).mean() == pytest.approx(1, rel=1e-3)
    if images == 40:
        first = pca.explained_variance_[0] / pca.explained_variance_.sum() * cfg.z_dim
        assert z.var(0).max() < 0.7 * first and z.mean(0).abs().max() < 1e-5


@pytest.mark.parametrize("predict", ["v", "eps"])
def test_head_pca_starts_as_bayes_rule(predict):
    """Before the first step x0_hat is the mean of x0 given x_t and z_sem, x0 being N(image of z_sem, left) in each
    pixel: two readings of it, weighted by their precisions. left: what PCA of the first half leaves of the second."""
    torch.manual_seed(0)
    cfg = replace(TINY, patch=2, head="pca", predict=predict, z_scale=1.5)
    x0, x_t, t = torch.randn(21, 1, 16, 16).tanh(), torch.randn(4, 1, 16, 16), torch.tensor([0, 50, 500, 999])
    model = m.start_from_pca(m.Model(cfg), D.Loader({"image": x0.numpy()}, "cpu"))
    with torch.no_grad():
        z = model.encode({"image": x0[:4]})
        image = F.pixel_shuffle(model.unet.z_image(1.5 * z).view(4, 4, 8, 8), 2)
        a, s = AB[t].sqrt().view(-1, 1, 1, 1), (1 - AB[t]).sqrt().view(-1, 1, 1, 1)
        x0_hat = (x_t - s * model.eps(x_t, t, z)) / a
    half, new = PCA(cfg.z_dim).fit(x0[:10].flatten(1).numpy()), x0[10:].flatten(1).numpy()
    left = np.square(new - half.inverse_transform(half.transform(new))).mean()
    of_image, of_x_t = 1 / left, a ** 2 / s ** 2
    wanted = (of_image * image + of_x_t * x_t / a) / (of_image + of_x_t)
    assert ((x0_hat - wanted).abs().amax((1, 2, 3)) < torch.tensor([1e-4, 1e-4, 1e-4, 1e-3])).all()
    assert (x0_hat[0] - x_t[0] / a[0]).abs().max() < 0.01 and (x0_hat[3] - image[3]).abs().max() < 0.01


@pytest.mark.filterwarnings("ignore:invalid value encountered")      # scikit-learn's share of no variance
@pytest.mark.parametrize("images", [1, 5])
def test_head_pca_of_images_that_are_all_alike_is_finite(images):
    loader = D.Loader({"image": np.full((images, 1, 16, 16), 0.3, np.float32)}, "cpu")
    model = m.start_from_pca(m.Model(replace(TINY, head="pca")), loader)
    assert all(torch.isfinite(p).all() for p in model.state_dict().values()) and model.left > 0


def test_augment_is_a_rigid_motion_of_the_image():
    """The disc's mass stays, its centre moves; strength 0 only flips, if asked."""
    x = torch.zeros(64, 1, 32, 32)
    x[:, :, 12:20, 10:16] = 1.0
    g = torch.Generator().manual_seed(0)
    y = m.augment(x, 1.0, False, g)
    mass = y.sum((1, 2, 3)) / x.sum((1, 2, 3))
    assert 0.7 < mass.min() < mass.max() < 1.35 and (y - x).abs().amax((1, 2, 3)).min() > 0
    z = m.augment(x, 0.0, True, g)
    flipped = (z == x.flip(3)).all(3).all(2).all(1)
    assert ((z == x).all(3).all(2).all(1) | flipped).all() and 16 < flipped.sum() < 48
    assert torch.equal(m.augment(x, 0.0, False, g), x)


def test_augment_is_exact_under_autocast():
    """affine_grid multiplies matrices; in bfloat16 the positions would be off by a quarter of a pixel."""
    x = torch.rand(8, 1, 32, 32) * 2 - 1
    plain = m.augment(x, 1.0, False, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(m.augment(x, 1.0, False, torch.Generator().manual_seed(0)), plain)


# --------------------------------------------------------------------------------- samplers

def gaussian_eps(mean=0.5, sd=0.25):
    """The exact eps_hat of x0 ~ N(mean, sd^2): E[eps | x_t] in closed form."""
    def eps(x_t, t):
        ab = float(AB[t])
        return (1 - ab) ** 0.5 * (x_t - ab ** 0.5 * mean) / (ab * sd ** 2 + 1 - ab)
    return eps


@pytest.mark.parametrize("S, rmse", [(20, 0.104), (50, 0.048), (100, 0.025), (250, 0.0103), (500, 0.0052)])
def test_ddim_round_trip_of_the_gaussian_oracle(S, rmse):
    x0 = 0.5 + 0.25 * torch.randn(200_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_T = m.ddim_encode(gaussian_eps(), x0, S, AB)
    back = m.ddim_decode(gaussian_eps(), x_T, S, AB)
    assert (back - x0).square().mean().sqrt().item() == pytest.approx(rmse, rel=0.02)


def test_ddim_decode_of_the_oracle_gives_its_distribution():
    x_T = torch.randn(200_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = m.ddim_decode(gaussian_eps(), x_T, 1000, AB)
    assert abs(x.mean() - 0.5) < 0.005 and abs(x.std() - 0.25) < 0.005


@pytest.mark.parametrize("S", [1, 3, 20, 64, 128, 300, 1000])
def test_times_work_for_any_number_of_steps(S):
    ts = m.times(S, 1000)
    assert len(ts) == S and ts[-1] == 999 and ts[0] >= 0 and all(b > a for a, b in zip(ts, ts[1:]))
    assert m.times(20, 1000, "leading") == list(range(0, 1000, 50))
    with pytest.raises(ValueError):
        m.times(1001, 1000)


def test_ddim_eq12_single_steps_in_float64():
    x, eps = torch.randn(3, 1, 4, 4).double(), torch.randn(3, 1, 4, 4).double()
    for t, s in ((999, 949), (49, -1), (0, -1), (-1, 49), (400, 401)):
        a, b = (float(AB[i]) if i >= 0 else 1.0 for i in (t, s))
        expected = b ** 0.5 * (x - (1 - a) ** 0.5 * eps) / a ** 0.5 + (1 - b) ** 0.5 * eps
        assert (m.ddim_step(x, t, s, eps, AB) - expected).abs().max() < 1e-11
    x0_hat = ((x - (1 - AB[400]).sqrt() * eps) / AB[400].sqrt()).clamp(-1, 1)       # clipped: eps re-derived
    eps2 = (x - AB[400].sqrt() * x0_hat) / (1 - AB[400]).sqrt()
    expected = AB[350].sqrt() * x0_hat + (1 - AB[350]).sqrt() * eps2
    assert (m.ddim_step(x, 400, 350, eps, AB, clip=True) - expected).abs().max() < 1e-12


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
    eps, calls = gaussian_eps(), []
    x0 = torch.randn(5, 1, dtype=torch.float64)
    x_T = m.ddim_encode(lambda x, t: calls.append((x, t)) or eps(x, t), x0, 20, AB, "leading")
    assert [t for _, t in calls] == list(range(0, 1000, 50)) and torch.equal(calls[0][0], x0)
    assert (x_T - eps(calls[-1][0], 950)).abs().max() < 1e-12


def test_slerp():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 1, 8, 8, generator=g), torch.randn(300, 1, 8, 8, generator=g)
    half = m.slerp(a, b, 0.5)
    assert (half.flatten(1).norm(dim=1) / a.flatten(1).norm(dim=1) - 1).abs().max() < 0.45
    assert abs(half.std() - 1) < 0.02
    assert torch.allclose(m.slerp(a, b, 0.0), a, atol=1e-5) and torch.allclose(m.slerp(a, b, 1.0), b, atol=1e-5)
    for c in (a, -a, a * 1.0001, torch.zeros_like(a)):
        assert m.slerp(a, c, torch.linspace(0, 1, 300)).isfinite().all()
    per_sample = m.slerp(a, b, 0.3)
    assert torch.allclose(per_sample[:1], m.slerp(a[:1], b[:1], 0.3), atol=1e-6)              # own angle for each


# --------------------------------------------------------------------------------- is z_sem used?

def test_z_losses_of_a_decoder_that_ignores_or_uses_z():
    model = m.Model(replace(TINY, z_map="none"))             # untrained: the output is zero whatever z_sem
    x0, g = torch.randn(6, 1, 16, 16), torch.Generator().manual_seed(0)
    true, other = m.z_losses(model, x0, torch.randn(6, 8), torch.randn(6, 8), g)
    assert true.shape == (8, 6) and torch.equal(true, other)
    model.loss = lambda x0, z, t, eps: z.square().sum(1)
    true, other = m.z_losses(model, x0, torch.zeros(6, 8), torch.ones(6, 8), g)
    assert (other - true).mean() == 8


def test_other_patient_is_another():
    s = np.array(list("aaaaabbc"))
    assert all(s[i] != s[j] for i, j in enumerate(m.other_patient(s)))
    assert m.other_patient(np.array(["a", "a"])).tolist() == [0, 1]       # nobody else: itself


# --------------------------------------------------------------------------------- training

def loader(n=12):
    return D.Loader({"image": images(n)}, "cpu")


def test_batch_rows_are_chained_permutations():
    rows = np.concatenate([m.batch_rows(10, 4, 7, k) for k in range(10)])
    epochs = rows.reshape(4, 10)
    assert all(sorted(e) == list(range(10)) for e in epochs) and len({tuple(e) for e in epochs}) == 4
    assert not np.array_equal(rows[:4], m.batch_rows(10, 4, 8, 0))
    assert sorted(m.batch_rows(3, 6, 0, 0)) == [0, 0, 1, 1, 2, 2]          # a batch larger than the data


def test_fit_equals_a_plain_loop(tmp_path):
    """Weights and EMA of 12 steps against unfused Adam written out, with the same batches and noise."""
    torch.manual_seed(0)
    model = m.Model(TINY)
    plain = m.Model(TINY)
    plain.load_state_dict(model.state_dict())
    ema, _ = m.fit(model, loader(), replace(TINY, out=str(tmp_path)), "ckpt", {}, 12)
    average = [p.detach().clone() for p in plain.parameters()]
    first = [torch.zeros_like(p) for p in average]
    second = [torch.zeros_like(p) for p in average]
    for k in range(12):
        g = torch.Generator().manual_seed(m.mix(0, 1, k))
        loss = plain(loader().batch(m.batch_rows(12, 4, 0, k)), g)
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
    cfg = replace(TINY, out=str(tmp_path), augment=0.0, save_every=1000, log_every=10, lr=3e-3)
    torch.manual_seed(0)
    m.fit(m.Model(cfg), loader(4), cfg, "ckpt", {}, 150)
    rows = [json.loads(t) for t in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert np.mean([r["loss"] for r in rows[-3:]]) < 0.5 * rows[1]["loss"]


def test_longer_training_on_top_of_a_finished_run(tmp_path):
    for out, lengths in (("once", (12,)), ("twice", (6, 12))):
        (tmp_path / out).mkdir()
        for steps in lengths:
            torch.manual_seed(0)
            m.fit(m.Model(TINY), loader(), replace(TINY, out=str(tmp_path / out)), "ckpt", {}, steps)
    a, b = (torch.load(tmp_path / d / "ckpt.pt", weights_only=True) for d in ("once", "twice"))
    assert all(torch.equal(a["ema"][k], b["ema"][k]) for k in a["ema"])


def test_going_on_elsewhere_is_said_once(tmp_path, capsys):
    def said(steps, accum):
        m.fit(m.Model(TINY), loader(), replace(TINY, out=str(tmp_path), accum=accum), "ckpt", {}, steps)
        return "--accum 1 to cpu" in (text := "".join(capsys.readouterr())) and "up to rounding" in text

    assert [said(*run) for run in ((4, 1), (8, 1), (8, 2), (10, 2), (12, 2))] == [False, False, False, True, False]


def test_nonfinite_loss_stops_before_the_step(tmp_path, capsys):
    cfg = replace(TINY, out=str(tmp_path), log_every=1, save_every=2)
    model = m.Model(cfg)
    forward, calls = model.forward, []

    def broken(batch, g):
        calls.append(1)
        return forward(batch, g) * (float("nan") if len(calls) == 6 else 1)
    model.forward = broken
    with pytest.raises(SystemExit) as e:
        m.fit(model, loader(), cfg, "ckpt", {}, 12)
    message = capsys.readouterr().err.splitlines()[-1]
    assert e.value.code == 1 and "at step 5" in message and "lr" in message
    kept = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert kept["step"] == 4 and all(torch.isfinite(v).all() for v in kept["model"].values())
    assert all(torch.isfinite(p).all() for p in model.parameters())      # the bad step did not reach the weights


def test_compiled_gradients_are_checked_against_eager(monkeypatch, tmp_path):
    """compile_checked keeps what agrees, drops what does not, and leaves the weights as they were."""
    torch.manual_seed(0)
    model = m.Model(replace(TINY, mult=(1,), enc_mult=(1,), attention=0))
    before, batch, g = [p.detach().clone() for p in model.parameters()], loader().batch(range(4)), torch.Generator()
    kept = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: setattr(self, "_compiled_call_impl", self._call_impl))
    assert "within" in m.compile_checked(model, batch, TINY, g) and model.unet._compiled_call_impl is not None
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda self: setattr(self, "_compiled_call_impl", lambda *a: self._call_impl(*a).detach() * 1.0
                                             if self is model.encoder else self._call_impl(*a)))
    assert "eager" in m.compile_checked(model, batch, TINY, g) and model.unet._compiled_call_impl is None
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before)), kept


# --------------------------------------------------------------------------------- whole runs

def test_whole_run_leaves_results_and_pictures(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    main("--data", tiny, "--out", out, *FLAGS)
    printed = capsys.readouterr().out
    assert "has changed" not in printed and "evaluated as" not in printed
    assert "12x" not in printed and "16x16" in printed and "recon_ssim" in printed
    results = json.loads((out / "results.json").read_text())
    assert results["script"] == "diffae" and results["n"] == {"train": 8, "val": 2, "test": 2}
    for key in ("recon_ssim", "recon_mse", "semantic_ssim", "semantic_mse", "semantic_mean_ssim", "shuffled_ssim", "z_gap",
                "probe_auroc", "probe_f1", "probe_precision", "probe_recall", "patient_auroc", "factor_r2_size",
                "train_img_s", "recon_img_s", "peak_gb"):
        entry = results["metrics"][key]
        assert set(entry) == {"value", "ci", "n", "unit", "better"}, key
    for key in ("recon_ssim.constant", "recon_ssim.copy", "recon_ssim.pca", "recon_ssim.vae", "recon_ssim.paper_recipe",
                "recon_ssim.pca_moved", "probe_auroc.pca_moved",
                "probe_f1.all_positive", "probe_auroc.vae", "probe_auroc.pca", "factor_r2_size.vae", "probe_auroc_gain",
                "semantic_mean_gain"):
        assert key in results["metrics"], key
    for name in ("reconstructions", "swap", "interpolation", "manipulation", "samples", "curves", "preview_ours"):
        assert (out / f"{name}.png").stat().st_size > 1000, name
    assert (out / "diffae.py").read_text() == (ROOT / "diffae.py").read_text()
    assert json.loads((out / "config.json").read_text())["z_dim"] == 8
    before = (out / "ckpt.pt").read_bytes()
    (out / "diffae.py").write_text("# as it was when the weights were made\n")
    main("--data", tiny, "--out", out, *FLAGS, "--eval", "--steps=20")     # changes nothing, gives the same numbers
    told = capsys.readouterr().out
    assert "diffae.py has changed" in told and "ckpt: evaluated as it is after 12 of 20 steps" in told
    again = json.loads((out / "results.json").read_text())
    assert (out / "ckpt.pt").read_bytes() == before
    assert again["metrics"]["recon_ssim"] == results["metrics"]["recon_ssim"]


@pytest.mark.parametrize("flags", [["--recipe=paper"], ["--z_scale=3"], ["--z_map=middle"], ["--z_map=none"]])
def test_the_settings_that_readme_names_run(flags, tiny, tmp_path):
    main("--data", tiny, "--out", tmp_path / "out", *FLAGS, "--steps=2", "--prior_steps=0", *flags)
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert "recon_ssim.vae" in metrics and ("recon_ssim.paper_recipe" in metrics) == (flags != ["--recipe=paper"])


def test_z_scale_multiplies_z_sem_in_the_conditioning():
    torch.manual_seed(0)
    model = m.Model(TINY)
    torch.nn.init.normal_(model.unet.conv_out.weight)
    x, z, t = torch.randn(2, 1, 16, 16), torch.randn(2, 8), torch.tensor([3, 700])
    tripled = model.output(x, t, 3 * z)
    model.cfg = replace(TINY, z_scale=3.0)
    assert torch.equal(model.output(x, t, z), tripled) and not torch.equal(tripled, model.output(x, t, 3 * z))


def test_test_file_is_all_test(tiny, tmp_path):
    other = tmp_path / "other.h5"
    D.write(str(other), [dict(image=images(8, seed=9), subject=np.repeat(["q0", "q1", "q2", "q3"], 2),
                              label=np.repeat([0, 1, 0, 1], 2), has_infarct=np.repeat([0, 1, 0, 1], 2))], {})
    main("--data", tiny, "--test", other, "--out", tmp_path / "out", *FLAGS, "--rivals=false", "--prior_steps=0")
    n = json.loads((tmp_path / "out" / "results.json").read_text())["n"]
    assert n == {"train": 10, "val": 2, "test": 4}


# --------------------------------------------------------------------------------- bad input, one line each

@pytest.mark.parametrize("flags, word", [
    (["--stesp=3"], "did you mean --steps"), (["--steps=many"], "not of the form"), (["--steps"], "needs a value"),
    (["--preset=huge"], "demo"), (["--recipe=theirs"], "ours"), (["--size=30"], "such as"), (["--S=2000"], "at most T"),
    (["--device=tpu9"], "--device"), (["--mult=1,b"], "1,2,4"), (["--batch=0"], "at least 1"), (["--lr=-1"], "number >= 0"),
    (["--data=/no/such.h5"], "no such file"), (["--head=nose"], "position"), (["steps"], "unknown flag"),
    (["--groups=7"], "multiples of the groups"), (["--eval=maybe"], "true or false"),
    (["--seed=4294967296"], "2**32"), (["--device=meta"], "cuda, mps or cpu"), (["--out="], "a folder"),
])
def test_bad_flags(flags, word, tmp_path, capsys):
    assert word in error_of(capsys, "--out", tmp_path / "out", *FLAGS, *flags)


def test_nobody_trained_on_is_tested_on_after_the_split_changed(tiny, tmp_path, capsys):
    """First with --test (all of --data trains), then without: the old weights know today's test patients."""
    other, out = tmp_path / "other.h5", tmp_path / "out"
    D.write(str(other), [dict(image=images(8, seed=9), subject=np.repeat(["q0", "q1", "q2", "q3"], 2))], {})
    short = ["--out", out, *FLAGS, "--rivals=false", "--prior_steps=0", "--steps=2"]
    main("--data", tiny, "--test", other, *short)
    capsys.readouterr()
    assert "training_subjects" in error_of(capsys, "--data", tiny, *short)


def test_eval_without_a_checkpoint(tiny, tmp_path, capsys):
    assert "without --eval" in error_of(capsys, "--data", tiny, "--out", tmp_path / "out", *FLAGS, "--eval")


def test_image_shapes_that_do_not_fit(tmp_path, capsys):
    wide = tmp_path / "wide.h5"
    D.write(str(wide), [dict(image=np.random.default_rng(0).integers(0, 255, (6, 16, 24), dtype=np.uint8),
                             subject=np.array(list("abcdef")))], {})
    assert "--size" in error_of(capsys, "--data", wide, "--out", tmp_path / "o", *[f for f in FLAGS if "--size" not in f])
    deep = tmp_path / "deep.h5"
    D.write(str(deep), [dict(image=np.random.default_rng(0).integers(0, 255, (6, 16, 16, 16), dtype=np.uint8),
                             subject=np.array(list("abcdef")))], {})
    assert "deep.h5" in error_of(capsys, "--data", deep, "--out", tmp_path / "o", *FLAGS)


def test_one_class_only_skips_the_probe(tmp_path, capsys):
    path = tmp_path / "one.h5"
    D.write(str(path), [dict(image=images(24), subject=np.repeat([f"p{i:02d}" for i in range(12)], 2),
                             label=np.ones(24, int))], {})
    main("--data", path, "--out", tmp_path / "out", *FLAGS, "--rivals=false", "--prior_steps=0", "--steps=2")
    assert "no probe: label" in capsys.readouterr().out
    assert "probe_auroc" not in json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]


def test_unknown_target(tiny, tmp_path, capsys):
    assert "factor_size" in error_of(capsys, "--data", tiny, "--out", tmp_path / "out", *FLAGS, "--target=ejection")


def test_continuous_target(tiny, tmp_path):
    main("--data", tiny, "--out", tmp_path / "out", *FLAGS, "--target=factor_size", "--prior_steps=0", "--steps=2")
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert {"probe_r2", "probe_mae", "probe_mae.mean", "probe_mae.vae"} <= set(metrics)


def test_real_hearts(tmp_path):
    path = ROOT.parent / "shared" / "data" / "emidec.h5"
    if not path.exists():
        pytest.skip("no real EMIDEC file beside the repository")
    main("--data", path, "--out", tmp_path / "out", *FLAGS, "--size=32", "--steps=4", "--prior_steps=2")
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert metrics["probe_auroc"]["n"] == 14
    assert metrics["recon_ssim.copy"]["value"] > metrics["recon_ssim.constant"]["value"] > 0.1   # real anatomy
