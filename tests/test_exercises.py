"""The checks of the exercises, one generator for each, and below them the tests of the course.

A check yields (what is compared, what came, what was expected, the largest difference that is allowed). What was
expected comes from closed forms, loops in float64 or reference libraries. m: the module that holds the student's
function. rng: a numpy Generator for the inputs, so that `grade` can ask with others."""
import contextlib
import io
import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

F32, F64 = 1e-5, 1e-10      # what rounding may do; a mistake does more


def schedule(T=1000):
    """alpha_bar of DDPM in float64, (T,)"""
    return np.cumprod([1 - (1e-4 + (0.02 - 1e-4) * t / (T - 1)) for t in range(T)])


def normal(rng, *shape, dtype=torch.float64):
    return torch.as_tensor(rng.normal(size=shape)).to(dtype)


def mixtures(rng):
    """Images, volumes and codes with noise and times: (shape, x0, eps, t, sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t))"""
    ab, c = schedule(), int(rng.integers(1, 4))
    for shape, dtype in ((3, 1, 4, 5), torch.float32), ((4, c, 3, 5, 2), torch.float64), ((2, 7), torch.float64):
        t = rng.integers(0, 1000, shape[0])
        a = np.array([math.sqrt(ab[k]) for k in t]).reshape(-1, *[1] * (len(shape) - 1))
        x0, eps = (normal(rng, *shape, dtype=dtype) for _ in range(2))
        yield shape, x0, eps, torch.as_tensor(t), a, np.sqrt(1 - a ** 2)


# ------------------------------------------------------------------------------------- diffae.py

def e01(m, rng):
    ab = torch.as_tensor(schedule())
    for shape, x0, eps, t, a, s in mixtures(rng):
        wanted = np.array([a[i] * x0[i].numpy() + s[i] * eps[i].numpy() for i in range(len(t))])
        x_t = m.q_sample(x0, t, eps, ab)
        yield f"x_t of shape {shape}, {x0.dtype} (nan: another type), at t = {t.tolist()}", x_t if x_t.dtype == x0.dtype else math.nan, wanted, F32
    x0, eps = normal(rng, 2, 3), normal(rng, 2, 3)
    ends = torch.tensor([1.0, 0.0], dtype=torch.float64)
    x = m.q_sample(x0, torch.tensor([0, 1]), eps, ends)
    yield "alpha_bar 1 gives x0, 0 gives eps", x, torch.stack([x0[0], eps[1]]), F32
    x = m.q_sample(torch.tensor([[0.7]]), torch.tensor([300]), torch.tensor([[1.0]]), ab)
    yield "x_t of 0.7 and eps 1 at t = 300", x, [[0.7 * 0.394011123 ** 0.5 + (1 - 0.394011123) ** 0.5]], F32


def e02(m, rng):
    ab = torch.as_tensor(schedule())
    for shape, x0, eps, t, a, s in mixtures(rng):
        x_t = torch.as_tensor(a * x0.numpy() + s * eps.numpy())
        v = m.v_target(x0, t, eps, ab)
        # (x_t, v) is (x0, eps), turned by an angle: a product of complex numbers
        turned = (x0.numpy() + 1j * eps.numpy()) * (a - 1j * s)
        yield f"v of shape {shape}, {x0.dtype} (nan: another type), at t = {t.tolist()}", v if v.dtype == x0.dtype else math.nan, turned.imag, F32
        yield ".. gives eps back by eps_from_v", m.eps_from_v(v, x_t, t, ab), eps, F32
        yield ".. and x0 as a x_t - s v", a * x_t.numpy() - s * v.numpy(), x0, F32


def ddim_steps(m, rng):
    """Steps from a mixture of known x0 and eps: the result is their mixture at the other level."""
    ab = schedule()
    level = lambda t: 1.0 if t < 0 else 0.0 if t == 1000 else ab[t]
    mix = lambda x0, eps, t: math.sqrt(level(t)) * x0 + math.sqrt(1 - level(t)) * eps
    far = sorted(rng.integers(1, 999, 2).tolist())
    for t, s in ((far[1], far[0]), (far[0], far[1]), (49, -1), (0, -1), (-1, 49), (950, 1000), (400, 401), (1, 0)):
        x0, eps = normal(rng, 2, 1, 3, 4), normal(rng, 2, 1, 3, 4)
        x = m.ddim_step(mix(x0, eps, t), t, s, eps, torch.as_tensor(ab))
        yield f"from level {t} to level {s}", x, mix(x0, eps, s), F64
    x0, eps = torch.tensor([[0.5, 3.0, -1.2]]).double(), normal(rng, 1, 3)
    x, inside = mix(x0, eps, 600), torch.tensor([[0.5, 1.0, -1.0]]).double()
    new_eps = (x - math.sqrt(level(600)) * inside) / math.sqrt(1 - level(600))      # x is still their mixture
    step = lambda *args: m.ddim_step(*args, torch.as_tensor(ab), clip=True)
    yield "clipped, from 600 to 550", step(x, 600, 550, eps), mix(inside, new_eps, 550), F64
    yield "at the clean level nothing is clipped", step(x0, -1, 100, eps), mix(x0, eps, 100), F64


e03 = ddim_steps


def gaussian_eps(sd):
    """The exact eps_hat of x0 ~ N(0.5, sd^2)."""
    ab = schedule()
    return lambda x, t: math.sqrt(1 - ab[t]) * (x - math.sqrt(ab[t]) * 0.5) / (ab[t] * sd ** 2 + 1 - ab[t])


def e04(m, rng):
    ab = schedule()
    alpha_bar = torch.as_tensor(ab)
    ratio = lambda t: math.sqrt(1 / ab[t] - 1) if t >= 0 else 0.0
    for S, stride in ((4, "trailing"), (int(rng.integers(5, 30)), "trailing"), (10, "quadratic")):
        up, called = [-1] + m.times(S, 1000, stride), []
        x0, eps = normal(rng, 2, 1, 3, 3), {t: normal(rng, 2, 1, 3, 3) for t in range(1000)}
        x_T = m.ddim_encode(lambda x, t: called.append(t) or eps[t], x0, S, alpha_bar, stride)
        yield f"S = {S}, {stride}: the times that eps_fn is called at", called, [max(t, 0) for t in up[:-1]], F64
        # x / sqrt(alpha_bar) moves by eps times the change of sqrt(1 / alpha_bar - 1): Euler's method (DDIM eq. 14)
        y = x0 + sum(eps[max(t, 0)] * (ratio(s) - ratio(t)) for t, s in zip(up, up[1:]))
        yield ".. x_T of eps that hang on t alone", x_T, y * math.sqrt(ab[999]), F64
    E, x0 = normal(rng, 2, 3), normal(rng, 2, 3)
    yield "leading: x_T is the last eps", m.ddim_encode(lambda x, t: E, x0, 20, alpha_bar, "leading"), E, F64
    for S, rmse in ((20, 0.104), (50, 0.048), (100, 0.025), (250, 0.0103), (500, 0.0052)):
        two = torch.tensor([0.25, 0.75]).double()       # all maps are straight lines: two points tell them
        back = m.ddim_decode(gaussian_eps(0.25), m.ddim_encode(gaussian_eps(0.25), two, S, alpha_bar), S, alpha_bar)
        slope, middle = (back[1] - back[0]) / 0.5, back.mean()
        got = math.sqrt((middle - 0.5) ** 2 + (0.25 * (slope - 1)) ** 2)
        yield f"there and back of N(0.5, 0.25^2), S = {S}: RMSE", got, rmse, 5e-4


def e05(m, rng):
    for dtype, tolerance in (torch.float64, F64), (torch.float32, F32):
        n, size = 5, (5, 1, int(rng.integers(3, 6)), 4)
        q = [np.linalg.qr(rng.normal(size=(math.prod(size[1:]), 2)))[0].T for _ in range(n)]     # two axes of each sample
        u, v = (np.stack([axes[i] for axes in q]) for i in (0, 1))
        omega, alpha, r = (rng.uniform(*span, (n, 1)) for span in ((0.3, 2.8), (0, 1), (1, 3)))
        point = lambda angle: torch.as_tensor((r * (np.cos(angle) * u + np.sin(angle) * v)).reshape(size)).to(dtype)
        a, b = point(0 * omega), point(omega)
        got = m.slerp(a, b, torch.as_tensor(alpha.ravel()).to(dtype))
        yield f"each sample by its own angle and alpha, {dtype}", got, point(alpha * omega), tolerance
        for k in (0, 0.5, 1):
            yield f"alpha = {k}", m.slerp(a, b, k), point(k * omega), tolerance
    a = normal(rng, 3, 4)
    for c, wanted in (a, a), (2 * a, 1.3 * a), (-a, 0.4 * a):
        yield "parallel samples on a straight line, alpha 0.3", m.slerp(a, c, 0.3), wanted, F64
    yield "numbers that are not finite, from a to 0", (~m.slerp(a, 0 * a, 0.3).isfinite()).sum(), 0, F64


def group_norm(h, groups):
    """Without its weights, in numpy. (B,C,H,W) -> same"""
    rows = h.reshape(len(h), groups, -1)
    rows = (rows - rows.mean(2, keepdims=True)) / np.sqrt(rows.var(2, keepdims=True) + 1e-5)
    return rows.reshape(h.shape)


def e06(m, rng):
    silu = lambda x: x / (1 + np.exp(-x))
    for how in ("", "down", "up"):
        cfg = SimpleNamespace(base=16, z_dim=6, groups=0, dropout=0.0)
        torch.manual_seed(int(rng.integers(1000)))
        block = m.ResBlock(32, 16, cfg, how).double()
        for p in block.parameters():
            torch.nn.init.normal_(p, 0.1, 0.2)      # nothing is zero, no gain is 1
        x, emb, z = normal(rng, 2, 32, 4, 6), normal(rng, 2, 64), normal(rng, 2, 6)
        with torch.no_grad():
            affine = lambda layer, h: h * layer.weight.numpy().reshape(-1, 1, 1) + layer.bias.numpy().reshape(-1, 1, 1)
            h = torch.as_tensor(silu(affine(block.norm1, group_norm(x.numpy(), 2))))
            h = affine(block.norm2, group_norm(block.conv1(m.resample(h, how)).numpy(), 1))
            by_t = silu(emb.numpy()) @ block.t_proj.weight.numpy().T + block.t_proj.bias.numpy()
            by_z = silu(z.numpy()) @ block.z_proj.weight.numpy().T + block.z_proj.bias.numpy()
            for b in range(2):
                for c in range(16):     # DiffAE eq. 7, one channel at a time
                    h[b, c] = (1 + by_z[b, c]) * ((1 + by_t[b, c]) * h[b, c] + by_t[b, 16 + c])
            block.dropout.forward = lambda h: 2 * h         # to see that it is there
            wanted = block.skip(m.resample(x, how)) + block.conv2(2 * torch.as_tensor(silu(h)))
            yield f"block that goes {how or 'level'}", block(x, emb, z), wanted, F64


class Toy(torch.nn.Module):
    """Three weights that are pulled to the data; remembers how they were at each step."""
    def __init__(self, start):
        super().__init__()
        self.w, self.seen = torch.nn.Parameter(torch.as_tensor(start).float()), []

    def forward(self, batch, g):
        self.seen.append(self.w.detach().double().numpy().copy())
        return (self.w - batch["y"].mean()).square().sum()

    def __deepcopy__(self, memo):
        return Toy(self.w.detach().clone())


def e07(m, rng):
    for ema, steps in (0.9999, 40), (0.3, 25):
        cfg = m.Config(out="/nowhere", batch=4, ema=ema, lr=0.3, save_every=1000, device="cpu", seed=int(rng.integers(99)))
        toy = Toy(rng.normal(size=3) + 3)
        loader = m.D.Loader({"y": rng.normal(size=20).astype(np.float32)}, "cpu")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), \
                mock.patch.multiple(m.D, save_checkpoint=mock.DEFAULT), \
                mock.patch.multiple(m.M, record=mock.DEFAULT, log_line=mock.DEFAULT):
            averaged, reached = m.fit(toy, loader, cfg, "ckpt", steps, {})
        weights = toy.seen[1:] + [toy.w.detach().double().numpy()]
        wanted = toy.seen[0]
        for k, w in enumerate(weights):
            decay = min(ema, (1 + k) / (10 + k))
            wanted = decay * wanted + (1 - decay) * w
        yield f"averaged weights after {steps} steps, decay {ema}", averaged.w, wanted, F32
        yield "steps made", reached, steps, F64


# ------------------------------------------------------------------------------------- normative.py

def e10(m, rng):
    age, rows = rng.uniform(20, 80, 50), np.arange(40)
    c = rng.normal(size=(3, 4)) * np.array([[30], [1], [0.01]])
    curve = lambda a: np.stack([c[0] + c[1] * x + c[2] * x * x for x in a])
    z = curve(age)
    z[40:] = 1e3        # these rows are not to be used
    inside = np.linspace(age[rows].min(), age[rows].max(), 7)
    yield "a parabola comes back", m.age_mean(z, age, rows)(inside), curve(inside), 1e-9
    noisy = z + rng.normal(size=z.shape)
    fitted = np.stack([np.polyval(np.polyfit(age[rows], noisy[rows, k], 2), inside) for k in range(4)], 1)
    f = m.age_mean(noisy, age, rows)
    yield "least squares, as numpy's polyfit", f(inside), fitted, 1e-9
    yield "constant below and above these ages", f(np.array([-5.0, 200.0])), fitted[[0, -1]], 1e-9


def e11(m, rng):
    n, d = int(rng.integers(20, 40)), int(rng.integers(2, 6))
    mean, logvar, rows = rng.normal(1, 2, (n, d)), rng.normal(-1, 1, (n, d)), np.arange(15)
    wanted = []
    for i in range(n):
        terms = []
        for k in range(d):
            healthy = [mean[r, k] for r in rows]
            mu = sum(healthy) / 15
            variance = sum((h - mu) ** 2 for h in healthy) / 15
            terms.append(abs(mean[i, k] - mu) / math.sqrt(variance + math.exp(logvar[i, k])))
        wanted.append(-sum(terms) / d)
    yield f"scores of {n} people, {d} numbers each", m.latent_deviation(mean, logvar, rows), wanted, F64


def e12(m, rng):
    x_T = torch.as_tensor(rng.normal(size=2000))
    x = m.ddim_decode(gaussian_eps(0.25), (x_T - x_T.mean()) / x_T.std(), 1000, torch.as_tensor(schedule()))
    yield "samples of N(0.5, 0.25^2): mean and SD", [x.mean(), x.std()], [0.5, 0.25], 5e-3
    yield from ddim_steps(m, rng)


def e13(m, rng):
    from sklearn.covariance import LedoitWolf
    n, rows = 40, np.arange(25)
    age, left = rng.uniform(20, 80, n), rng.uniform(1, 2, n)
    z = rng.normal(size=(n, 3)) + 4 + age[:, None] * rng.normal(size=3) / 30
    got = m.five_scores(z, left, age, rows)
    at_age = np.stack([np.polyval(np.polyfit(age[rows], z[rows, k], 2), np.clip(age, age[rows].min(), age[rows].max()))
                       for k in range(3)], 1)
    cosine = lambda a, b: sum(a * b) / math.sqrt(sum(a * a) * sum(b * b))
    healthy = sum(z[rows]) / len(rows)
    wanted = {"residual": -left, "cosine": [cosine(row, healthy) for row in z],
              "age_matched": [cosine(z[i], at_age[i]) for i in range(n)],
              "l2": [-math.sqrt(sum((z[i] - at_age[i]) ** 2)) for i in range(n)],
              "mahalanobis": -np.sqrt(LedoitWolf().fit((z - at_age)[rows]).mahalanobis(z - at_age))}
    for kind in wanted:
        yield f"score {kind}", got[kind], wanted[kind], 1e-8


# ------------------------------------------------------------------------------------- cond_ldm.py

def small_vq(m, rng, size=16):
    """A VQ-VAE in float64 of which nothing is zero, and a batch of images."""
    cfg = m.Config(size=size, patch=1, channels=(8, 16), depth=1, groups=0, codebook=32, augment=0.0, gan=0.0, device="cpu")
    torch.manual_seed(int(rng.integers(1000)))
    vq = m.VQVAE(cfg).double()
    for p in vq.parameters():
        torch.nn.init.normal_(p, 0, 0.1)
    vq.unused.zero_()
    return vq, {"image": torch.as_tensor(rng.uniform(-1, 1, (3, 1, size, size)))}


def nearest_code(z, codes):
    """z (B,C,h,w), codes (K,C) -> (B,h,w), one at a time"""
    return np.array([[[min(range(len(codes)), key=lambda k: ((column - codes[k]) ** 2).sum()) for column in line.T]
                      for line in image.transpose(1, 0, 2)] for image in z])


def e15(m, rng):
    vq, _ = small_vq(m, rng)
    for h, w in ((3, 4), (int(rng.integers(1, 6)), 5)):
        z = normal(rng, 2, vq.codes.shape[1], h, w) * 0.1
        wanted = nearest_code(z.numpy(), vq.codes.detach().numpy())
        yield f"nearest of 32 codes, latents of {h}x{w}", vq.nearest(z), wanted, F64
        codes = vq.codes[torch.as_tensor(wanted)].permute(0, 3, 1, 2)
        yield ".. and look_up gives these codes", vq.look_up(vq.nearest(z)), codes, F64


def e16(m, rng):
    vq, batch = small_vq(m, rng)
    z = (normal(rng, 3, vq.codes.shape[1], 8, 8) * 0.1).requires_grad_()
    vq.encoder.forward = lambda x: z
    index = torch.as_tensor(nearest_code(z.detach().numpy(), vq.codes.detach().numpy()))
    e = vq.codes[index].permute(0, 3, 1, 2).detach().requires_grad_()
    error = (vq.decoder(e) - batch["image"]).square().mean()
    at_e, = torch.autograd.grad(error, e)
    gap = z.detach() - e.detach()
    loss = vq(batch, torch.Generator())
    yield "the loss: error of the image + 1.2 times that of the latents", loss, error + 1.2 * gap.square().mean(), F64
    at_z, at_codes = torch.autograd.grad(loss, (z, vq.codes))
    yield "gradient at the latents", at_z, at_e + 0.4 * gap / gap.numel(), F64
    pull = np.zeros(tuple(vq.codes.shape))
    for b, y, x in np.ndindex(*index.shape):
        pull[index[b, y, x]] -= 2 * gap[b, :, y, x].numpy() / gap.numel()
    yield "gradient at the codes", at_codes, pull, F64
    used = torch.zeros(32)
    used[index.flatten()] = 1
    yield "steps trained; steps that each code was idle", [*vq.unused, vq.trained], [*(1 - used), 1], F64
    vq.discriminator, vq.adversarial = torch.nn.Identity(), lambda x0, recon: (x0 * recon).mean()
    with mock.patch.object(m.D, "augment", lambda x, *_: -x):
        loss, x0, recon = vq(batch, torch.Generator()), -batch["image"], vq.decoder(e)
    wanted = (recon - x0).square().mean() + (x0 * recon).mean() + 1.2 * gap.square().mean()
    yield "the loss of augmented images, with a discriminator", loss, wanted, F64


def two_gaussians(x_t, t, cond, s=0.3):
    """Exact eps of x0 ~ N(+-1, s^2), one line of x_t each: the Gaussian of sign(cond), or both where cond is 0."""
    ab = torch.as_tensor(scaled_schedule())[t].view(-1, 1)
    var = ab * s * s + 1 - ab
    eps = lambda c: (1 - ab).sqrt() * (x_t - ab.sqrt() * c) / var
    p = torch.sigmoid(2 * ab.sqrt() * x_t / var)
    return torch.where(cond == 0, p * eps(1) + (1 - p) * eps(-1), eps(cond.sign()))


def scaled_schedule():
    """alpha_bar of latent diffusion in float64, (1000,)"""
    return np.cumprod([1 - (0.0015 ** 0.5 + (0.0195 ** 0.5 - 0.0015 ** 0.5) * t / 999) ** 2 for t in range(1000)])


def e17(m, rng):
    model = SimpleNamespace(condition=lambda c: c + 5,       # the condition of an empty drawing is not zero
                            eps=lambda x, t, cond: two_gaussians(x, t.expand(len(x)), cond - 5))
    for w in (0, 1, 2, float(rng.uniform(3, 5))):
        x, cond, t = normal(rng, 9, 1), torch.ones(9, 1).double(), int(rng.integers(1000))
        levels = torch.full((9,), t)
        with_, without = two_gaussians(x, levels, cond).numpy(), two_gaussians(x, levels, 0 * cond).numpy()
        yield f"w = {w:.3g}, t = {t}", m.guided(model, cond, w)(x, t), (1 - w) * without + w * with_, F64
    from scipy.stats import norm
    x_T, ab = torch.as_tensor(norm.ppf((np.arange(500) + 0.5) / 500))[:, None], torch.as_tensor(scaled_schedule())
    for w, mean, sd in (0, 0.0, 1.041), (1, 0.9965, 0.2916), (2, 1.185, 0.2087), (4, 1.3909, 0.1678):
        x = m.ddim_decode(m.guided(model, torch.ones_like(x_T), w), x_T, 500, ab)
        yield f"samples of N(1, 0.3^2) beside N(-1, 0.3^2), w = {w}: mean and SD", [x.mean(), x.std()], [mean, sd], 6e-4


def e18(m, rng):
    for predict in ("v", "eps"):
        cfg = m.Config(size=16, patch=1, channels=(8, 16), depth=1, groups=0, unet=(16, 32), device="cpu", predict=predict)
        z0 = torch.as_tensor(rng.normal(3, 5, (6, 3, 8, 8))).float()
        model, calls, real = m.Model(cfg, z0), [], m.q_sample
        model.unet.forward = lambda z_t, t, cond: torch.zeros_like(z_t)
        edges, mask = (torch.as_tensor(rng.integers(0, n, shape)) for n, shape in ((2, (6, 3, 16, 16)), (4, (6, 16, 16))))
        batch = dict(z0=z0, edges=edges, mask=mask, kind=torch.ones(6, 2))
        with mock.patch.object(m, "q_sample", lambda *args: calls.append(args) or real(*args)):
            loss = model(batch, torch.Generator().manual_seed(int(rng.integers(1000))))
        x, t, eps, _ = calls[-1]
        yield f"predict {predict}: latents that get noise: mean and SD", [x.mean(), x.std()], [0, 1], 3e-3
        wanted = (z0.double() - z0.double().mean((0, 2, 3), keepdim=True)) / z0.double().std((0, 2, 3), keepdim=True)
        yield ".. themselves", x, wanted, F32
        a = np.sqrt(scaled_schedule()[t.numpy()]).reshape(-1, 1, 1, 1)
        target = a * eps.numpy() - np.sqrt(1 - a * a) * wanted.numpy() if predict == "v" else eps
        yield ".. the loss of a network that says 0", loss, (np.asarray(target, np.float64) ** 2).mean(), F32


# ------------------------------------------------------------------------------------- ldae.py

def e20(m, rng):
    for T in (1000, int(rng.integers(20, 100))):
        ab = schedule(T)
        wanted = []
        for t in range(T):
            before, beta = (ab[t - 1] if t else 1.0), 1 - ab[t] / (ab[t - 1] if t else 1.0)
            variance = beta * (1 - before) / (1 - ab[t])                # of q(x_{t-1} | x_t, x_0)
            wanted.append(-variance * math.sqrt((1 - beta) * (1 - ab[t])) / beta)      # times d eps / d mean
        yield f"s_t for T = {T}", m.shift_training(torch.as_tensor(ab)), wanted, F64
    s = m.shift_training(torch.as_tensor(schedule())).double()
    ratio = [float(s[t]) / -math.sqrt(1 - schedule()[t]) for t in (0, 1, 10, 100)]
    yield "beside the coefficient of sampling at t = 0, 1, 10, 100", ratio, [0, 0.454708, 0.863722, 0.981076], 1e-6


def e21(m, rng):
    ab = schedule()
    for predict in ("eps", "v"):
        shape = (3, 2, *rng.integers(2, 5, 3).tolist())
        z_t, out, G = (normal(rng, *shape) for _ in range(3))
        t, z_sem = torch.as_tensor(rng.integers(0, 1000, 3)), normal(rng, 3, 8)
        stub = SimpleNamespace(cfg=SimpleNamespace(predict=predict), alpha_bar=torch.as_tensor(ab),
                               outputs=lambda *args: (out, G) if args == (z_t, t, z_sem) else (None, None))
        wanted = np.empty(shape)
        for i, k in enumerate(t.tolist()):
            noise, signal = math.sqrt(1 - ab[k]), math.sqrt(ab[k])
            if predict == "eps":
                wanted[i] = out[i] - noise * G[i]
            else:       # x0_hat = signal z_t - noise v, and eps_hat fills what is missing in z_t
                x0_hat = signal * z_t[i] - noise * (out[i] + G[i])
                wanted[i] = (z_t[i] - signal * x0_hat) / noise
        yield f"predict {predict}, t = {t.tolist()}", m.Model.eps(stub, z_t, t, z_sem), wanted, F32


def e22(m, rng):
    S = int(rng.integers(5, 40))
    z0 = normal(rng, 3, 2, 4, 3, 5)
    model = SimpleNamespace(cfg=SimpleNamespace(S=S), alpha_bar=torch.as_tensor(schedule()), eps=lambda z, t, z_sem: 0 * z)
    z_T = m.travel(m.ddim_encode, model, z0, torch.zeros(3, 8))
    yield f"z_T of a network that says 0, S = {S}", z_T, math.sqrt(schedule()[999]) * z0, F64
    back = m.travel(m.ddim_decode, model, z_T, torch.zeros(3, 8))
    yield "mean squared error there and back", (back - z0).square().mean(), 0, F64
    yield "largest latent that comes back", abs(back).max(), abs(z0).max(), F64


# ------------------------------------------------------------------------------------- metrics.py, data.py

def e24(m, rng):
    taps = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5 ** 2))
    for shape in ((2, 13, 14), (1, 11, 12, 13)):
        a = rng.uniform(0, 1, shape)
        b = np.clip(a + rng.normal(0, 0.2, shape), 0, 1)
        window = taps
        for _ in shape[2:]:
            window = np.multiply.outer(window, taps)
        window, wanted = window / window.sum(), []
        for x, y in zip(a, b):
            values = []
            for corner in np.ndindex(*[s - 10 for s in shape[1:]]):
                p, q = (image[tuple(slice(c, c + 11) for c in corner)] for image in (x, y))
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                both = (window * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + 1e-4) * (2 * both + 9e-4) / ((mp ** 2 + mq ** 2 + 1e-4) * (vp + vq + 9e-4)))
            wanted.append(np.mean(values))
        yield f"SSIM of {shape}, window by window", m.ssim(a, b), wanted, F64
        yield ".. as tensors with a channel axis", m.ssim(*(torch.as_tensor(x)[:, None] for x in (a, b))), wanted, F64
        yield ".. of an image with itself", m.ssim(a, a), np.ones(len(a)), F64


def e25(m, rng):
    who = np.repeat([f"p{i}" for i in range(9)], rng.integers(1, 5, 9))
    order, seen = rng.permutation(len(who)), []
    who, x = who[order], rng.normal(size=len(who))
    code, size = np.unique(who, return_inverse=True)[1], np.unique(who, return_counts=True)[1]
    means = []
    statistic = lambda a, b: seen.append(b.astype(int)) or means.append(a.mean()) or a.mean()
    got = m.bootstrap(statistic, who, x, code, n=200)
    if got["value"] in means:
        means.remove(got["value"])      # that of all rows; the rest are of resamples
    yield "interval: percentiles 2.5 and 97.5 of 200 resamples", [len(means), *got["ci"]], [
        200, *np.percentile(means, [2.5, 97.5])], F64
    yield "value, and number of subjects", [got["value"], got["n"]], [x.mean(), 9], F64
    drawn = [(1 / size[s]).sum().round(6) for s in seen]
    yield "resamples that hold another number of subjects than 9", np.not_equal(drawn, 9).sum(), 0, F64
    times_ = [np.bincount(s, minlength=9) / size for s in seen]
    yield "resamples that hold a part of a subject", sum((abs(t - t.round()) > 1e-9).any() for t in times_), 0, F64
    yield "all resamples are not the same", float(len({tuple(t) for t in times_}) > 100), 1, F64
    a, b = sorted(rng.normal(size=2))
    two = m.bootstrap(np.mean, ["a", "b", "b"], np.array([a, b, b]))        # both, a alone, or b alone
    yield "two subjects: interval from one to the other", two["ci"], [a, b], F64
    one = m.bootstrap(np.mean, ["a", "a"], np.array([1.0, 2.0]))
    yield "one subject: no interval", one["ci"], [np.nan, np.nan], F64
    nan = m.bootstrap(lambda v: v[0] if len(set(v)) == 2 else np.nan, ["a", "b"], np.array([3.0, 3.5]))
    yield "resamples where the statistic is nan are left out", nan["ci"], [3.0, 3.5], F64
    many = np.repeat(rng.normal(size=200), 4)                               # four copies are no more evidence
    low, high = m.bootstrap(np.mean, np.repeat(np.arange(200), 4), many)["ci"]
    width = (high - low) / (3.92 * many.std() / 200 ** 0.5)
    yield "width of the interval is about 3.92 SD / sqrt(200)", float(0.8 < width < 1.2), 1, F64


def e26(m, rng):
    def by_hand(risk, time, event):
        right = pairs = 0.0
        for i in range(len(time)):
            for j in range(len(time)):
                if event[i] and (time[j] > time[i] or time[j] == time[i] and not event[j]):
                    pairs += 1
                    right += 1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0
        return right / pairs
    ten = [5, 6, 6, 2, 4, 4, 9, 8, 1, 3], [6, 7, 10, 15, 19, 25, 6, 7, 32, 3], [1, 0, 1, 1, 0, 1, 1, 1, 0, 1]
    yield "ten patients", m.c_index(*map(np.array, ten)), by_hand(*ten), F64
    for n in (20, int(rng.integers(30, 50))):
        risk, time, event = rng.integers(0, 8, n) / 7, rng.integers(1, 12, n).astype(float), rng.random(n) < 0.67
        yield f"{n} patients with ties", m.c_index(risk, time, event), by_hand(risk, time, event), F64
    picks = rng.integers(n, size=(4, n))
    counts = np.stack([np.bincount(p, minlength=n) for p in picks])
    wanted = [by_hand(risk[p], time[p], event[p]) for p in picks]
    yield "resamples, all at once", m.c_index(risk, time, event, counts), wanted, F64
    yield "a nan in risk", m.c_index([1, np.nan, 3], [5, 6, 7], [1, 1, 1]), np.nan, F64
    yield "no pair is known", m.c_index([1, 2], [5, 9], [0, 1]), np.nan, F64


class Rows(SimpleNamespace):
    """The part of a data set that a split looks at."""
    def __len__(self):
        return len(self.subject)


def e27(m, rng):
    n = 40
    who = np.repeat([f"p{i:02d}" for i in range(n)], 4)
    label = np.repeat(rng.permutation(np.arange(n) % 2), 4)
    data = Rows(split=None, subject=who, columns={"label": label})
    seed = int(rng.integers(1000))
    part = m.split(data, seed)
    parts = {s: set(part[who == s]) for s in who}
    yield "subjects with rows in more than one part", sum(len(p) > 1 for p in parts.values()), 0, F64
    for value in (0, 1):
        count = [len(set(who[(label == value) & (part == p)])) for p in ("train", "val", "test")]
        yield f"subjects of class {value} in train, val, test", count, [14, 2, 4], F64
    order = rng.permutation(len(who))
    moved = m.split(Rows(split=None, subject=who[order], columns={"label": label[order]}), seed)
    yield "rows whose part hangs on the order of the rows", (moved != part[order]).sum(), 0, F64
    tested = [set(who[m.split(data, seed, fold=f"{k}/5") == "test"]) for k in range(5)]
    often = [sum(s in t for t in tested) for s in sorted(set(who))]
    yield "how often each subject is tested in five folds", often, np.ones(n), F64
    # A code that knows who it is, and nothing of disease: the label of the nearest training row
    code = np.repeat(rng.normal(size=(n, 8)), 4, 0) + 0.01 * rng.normal(size=(len(who), 8))
    train, test = np.flatnonzero(part == "train"), np.flatnonzero(part == "test")
    near = train[((code[test][:, None] - code[train]) ** 2).sum(2).argmin(1)]
    yield "such a code foretells the class of all test rows", float((label[near] == label[test]).all()), 0, F64


def e28(m, rng):
    who = np.repeat(np.arange(120), 2)
    y = rng.permutation(np.arange(120) % 2)[who].astype(float)
    z = rng.normal(size=(240, 4)) + 0.5 * y[:, None]
    part = np.repeat(["train", "val", "test"], [120, 60, 60])
    table, _ = m.predict({"": z}, y, part, who.astype(str))
    score, cut = table["score"].to_numpy(), float(table["cut"].iloc[0])

    def f1(threshold, rows):
        called, true = score[rows] >= threshold, y[rows] > 0
        return 2 * (called & true).sum() / (called.sum() + true.sum())
    val = part == "val"
    yield "F1 of the threshold on validation rows is the best there", f1(cut, val), max(f1(c, val) for c in score[val]), F64
    other = np.where(part == "test", 1 - y, y)
    again, _ = m.predict({"": z}, other, part, who.astype(str))
    yield "with other labels of test rows: the threshold", again["cut"].iloc[0], cut, F64
    yield ".. the scores", again["score"], score, F64
    train = part == "train"
    yield "scores rise with the label on training rows", float(np.corrcoef(score[train], y[train])[0, 1] > 0.2), 1, F64


def e29(m, rng):
    n = 80
    score = rng.permutation(np.linspace(-1, 1, n))
    death, top = rng.exponential(900, n), score > np.median(score)
    lost = np.where(top, rng.uniform(50, 250, n), rng.uniform(900, 1500, n))     # the same risk, other follow-up
    time, event = np.minimum(death, lost), (death <= lost).astype(int)
    age, sex = rng.uniform(20, 80, n), np.where(rng.random(n) < 0.5, "M", "F")
    got = m.survival_numbers({"": score}, time, event, age, sex)
    seen, expected, variance = 0.0, 0.0, 0.0
    for t in sorted(set(time[event == 1])):        # the log-rank test by hand
        at_risk, died = time >= t, (time == t) & (event == 1)
        share = (at_risk & top).sum() / at_risk.sum()
        seen, expected = seen + (died & top).sum(), expected + died.sum() * share
        variance += died.sum() * share * (1 - share) * (at_risk.sum() - died.sum()) / max(at_risk.sum() - 1, 1)
    p = math.erfc(abs(seen - expected) / math.sqrt(2 * variance))
    yield "log-rank p of two halves with the same risk, followed for unequal spans", got["logrank_p"]["value"], p, 1e-8
    from scipy.stats import ks_2samp
    yield "KS p, which is not a test of survival", got["ks_p"]["value"], ks_2samp(time[top], time[~top]).pvalue, 1e-8
    yield "events", got["events"]["value"], event.sum(), F64


# ---- Below this line: the tests of the course. ---------------------------------------------------------------

import csv
import importlib
import json
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT
import exercises as X
import grade as G

TABLE = X.table()
OF = {kind: [key for key, e in TABLE.items() if e["kind"] == kind] for kind in ("write", "bug", "experiment")}
# Plausible mistakes in the functions that students write: exercise, what is in the original, what comes instead
WRONG = [
    ("e01", "a * x0 + s * eps", "a * x0 + s ** 2 * eps"),
    ("e01", "a * x0 + s * eps", "s * x0 + a * eps"),
    ("e01", "return a * x0", "return a.double() * x0"),
    ("e02", "a * eps - s * x0", "s * x0 - a * eps"),
    ("e03", "        eps_hat = (x - math.sqrt(ab_from) * x0_hat) / math.sqrt(1 - ab_from)\n", ""),
    ("e03", "1.0 if t < 0 else ", ""),
    ("e03", " and ab_from < 1", ""),
    ("e04", "eps_fn(x, max(t, 0))", "eps_fn(x, t_next)"),
    ("e04", "    up = up + [len(alpha_bar)] if stride == \"leading\" else [-1] + up\n", "    up = [-1] + up\n"),
    ("e05", "F.cosine_similarity(a, b, dim=1).clamp(-1, 1).acos().unsqueeze(1)",
     "F.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1).acos().view(1, 1)"),
    ("e05", "omega.sin() < 1e-4, omega.sin().clamp(min=1e-4)", "omega.sin() < -1, omega.sin()"),
    ("e06", "+ t_shift * (1 + z_gain)", "+ t_shift"),
    ("e06", "self.skip(resample(x, self.how)) + h", "resample(x, self.how) + h"),
    ("e06", "self.dropout(F.silu(h))", "F.silu(h)"),
    ("e10", "np.clip(a, low, high)", "a"),
    ("e10", "np.linalg.lstsq(powers(age[rows]), z[rows], rcond=None)", "np.linalg.lstsq(powers(age), z, rcond=None)"),
    ("e11", "mean[rows].var(0)", "mean[rows].std(0)"),
    ("e11", "np.exp(logvar)", "np.exp(logvar / 2)"),
    ("e15", "torch.cdist(r, self.codes, compute_mode=\"donot_use_mm_for_euclid_dist\").argmin(1)",
     "(r @ self.codes.T).argmax(1)"),
    ("e16", "self.decoder(z + (e - z).detach())", "self.decoder(e)"),
    ("e16", "F.mse_loss(e, z.detach()) + 0.2 * F.mse_loss(z, e.detach())", "1.2 * F.mse_loss(e, z)"),
    ("e17", "eps_u + w * (eps_c - eps_u)", "eps_c + w * (eps_c - eps_u)"),
    ("e17", "model.condition(torch.zeros_like(drawing))", "torch.zeros_like(cond)"),
    ("e20", "(1 - before)", "(1 - alpha_bar)"),
    ("e21", "out - signal_noise", "out + signal_noise"),
    ("e21", "eps_from_v(out + G, z_t", "eps_from_v(out, z_t"),
    ("e24", "truncate=3.5", "truncate=4"),
    ("e24", "0.03 ** 2", "0.03"),
    ("e25", "np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])",
     "rng.integers(len(index), size=len(index))"),
    ("e25", "    draws = [d for d in draws if not np.isnan(d)]\n", ""),
    ("e25", "[2.5, 97.5]", "[5, 95]"),
    ("e26", " + (risk == risk[i]) / 2", ""),
    ("e26", " | (time == time[i]) & ~event", ""),
]


def text_of(key):
    """-> the script of an exercise as text, the name of its function"""
    return (ROOT / TABLE[key]["script"]).read_bytes().decode(), TABLE[key]["function"]


def passes(key, own=None, seed=0):
    """Do the checks of an exercise pass with these lines for its function? None: the original's"""
    script, (before, _, after) = TABLE[key]["script"], X.cut(*text_of(key))
    try:
        m = G.load(script, before + own + after) if own else importlib.import_module(script.removesuffix(".py"))
        results = globals()[key](m, np.random.default_rng(seed))
        return all(X.difference(X.as_array(got), X.as_array(wanted)) <= most for _, got, wanted, most in results)
    except Exception:       # whatever a mistake may lead to
        return False


def test_the_table_has_what_was_asked_for():
    for script in ("diffae.py", "normative.py", "cond_ldm.py", "ldae.py"):
        assert sum(e["script"] == script for e in TABLE.values()) >= 3, script
    for key, e in TABLE.items():
        assert len(e["hint"]) == 2 if e["kind"] != "experiment" else e["predict"] and e["commands"], key


def test_the_page_lists_every_exercise_as_the_table_has_it():
    page = (ROOT / "EXERCISES.md").read_text()
    for key, e in TABLE.items():
        stars = "★" * e["difficulty"]
        line = f"| {key} | {e['kind']} | `{e['script']}` | {e['minutes']} | {stars} | {e['title']} |\n"
        assert line in page, key
    for name in ("EXERCISES.md", "README.md"):
        assert f"{len(TABLE)} exercises" in (ROOT / name).read_text(), name


@pytest.mark.parametrize("key", OF["write"] + OF["bug"])
def test_the_original_passes_and_what_the_student_gets_does_not(key):
    text, name = text_of(key)
    for seed in range(2):
        assert passes(key, seed=seed) and not passes(key, X.given(text, name, key, TABLE[key]), seed)


@pytest.mark.parametrize("key, old, new", WRONG)
def test_a_plausible_mistake_fails(key, old, new):
    own = X.cut(*text_of(key))[1]
    assert own.count(old) == 1 and key in OF["write"]
    assert not passes(key, own.replace(old, new)) and not passes(key, own.replace(old, new), seed=1)


def test_every_function_that_is_written_has_a_plausible_mistake():
    assert {key for key, *_ in WRONG} == set(OF["write"])


def numbers_of(script):
    """The first table of a script in RESULTS.md -> {"ours": {key: {"value": ..}}, "paper": ..}"""
    m, found = importlib.import_module(script), {"ours": {}, "paper": {}}
    names = {title: key for key, title in m.SHOWN.items()}
    rows = {title: row for row, title in m.ROWS.items()}
    section = (ROOT / "RESULTS.md").read_text().split(f"\n## {script}\n")[1].split("\n## ")[0]
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    for cells in lines[2:]:
        recipe, _, title = cells[0].partition(": ")
        for head, cell in zip(lines[0][1:], cells[1:]):
            key = next((k for t, k in names.items() if head.startswith(t + " ")), None)
            if key and cell != "-" and (not title or title in rows):
                found[recipe][f"{key}.{rows.get(title, '')}".strip(".")] = {"value": float(cell.split()[0])}
    return found


# Experiments whose runs are not in RESULTS.md, as they came on one CPU core. e19: a line of LOG.md
MEASURED = {
    "e19": {"conv": dict(dice=0.932, edge_f1=0.860), "seed": dict(dice=0.805, edge_f1=0.664)},
    "e30": {"few": dict(recon_ssim=0.9368, x_T_sd_error=0.1031, semantic_mean_ssim=0.7103),
            "many": {"recon_ssim": 0.9997, "x_T_sd_error": 0.0496, "x_T_sd_error.untrained": 0.6094,
                     "semantic_mean_ssim": 0.6472}},
    "e31": {"steps": dict(semantic_mean_ssim=0.664, x_T_sd_error=0.039),
            "patients": dict(semantic_mean_ssim=0.289, x_T_sd_error=0.228)},
    "e32": {"random": dict(probe_auroc=0.636),
            "pca": {"probe_auroc": 0.796, "probe_auroc_gain.untrained": 0.021, "semantic_mean_ssim": 0.422,
                    "semantic_mean_ssim.pca": 0.897}},
}


@pytest.mark.parametrize("key", OF["experiment"])
def test_the_rule_of_an_experiment_holds_for_our_run_and_not_for_its_opposite(key):
    results = {label: {k: {"value": v} for k, v in run.items()} for label, run in MEASURED.get(key, {}).items()}
    results = results or numbers_of(TABLE[key]["script"][:-3])
    found = X.holds(TABLE[key]["rule"], results)
    assert all(true for *_, true in found) and all(a != b for _, a, b, _ in found), found
    opposite = {label: {k: {"value": 1 - v["value"]} for k, v in metrics.items()} for label, metrics in results.items()}
    assert not all(true for *_, true in X.holds(TABLE[key]["rule"], opposite))


# ------------------------------------------------------------------------------------- start, solve, reset, handout

@pytest.fixture
def course(tmp_path, monkeypatch):
    """A small repository with the course -> its exercises module, its folder"""
    folder = tmp_path / "course"
    (folder / "tests").mkdir(parents=True)
    for path in (*ROOT.glob("*.py"), ROOT / "exercises.toml", ROOT / "tests" / "test_exercises.py", ROOT / ".gitignore"):
        shutil.copy(path, folder / path.relative_to(ROOT))
    git = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "master"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(X, "ROOT", folder)
    monkeypatch.setattr(X, "KEPT", folder / ".exercises")
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.*") if path.is_file()}


def test_start_touches_one_function_and_the_way_back_gives_the_very_bytes(course, capsys):
    for key, back in zip(OF["write"] + OF["bug"], ["solve", "reset"] * 99):
        before, (text, name) = files(course), text_of(key)
        X.main(["start", key])
        said, after = capsys.readouterr().out, files(course)
        first, own, rest = X.cut(text, name)
        changed = after[TABLE[key]["script"]].decode()
        assert changed.startswith(first) and changed.endswith(rest) and changed != text
        assert {k for k in before if before[k] != after[k]} == {TABLE[key]["script"]}
        new = changed[len(first):len(changed) - len(rest)]
        if key in OF["write"]:
            assert f"{key}: " in new and new.count("raise NotImplementedError") == 1
            assert own.startswith(new.rpartition("    raise")[0].rstrip(" "))       # signature, docstring
        else:       # where it is, is not said; and no comment tells it
            assert f"{name} in" not in said and key not in new and new.count("#") == own.count("#")
        X.main([back, key])
        assert files(course) == before and (course / ".exercises" / f"{key}.mine.txt").read_text() == new


def test_start_does_not_lose_an_edit(course, capsys):
    path = course / "diffae.py"
    path.write_text(path.read_text().replace("return a * x0 + s * eps", "return s * eps + a * x0"))
    edited = path.read_bytes()
    for words, line in ((["start", "e01"], "q_sample in diffae.py is not as in the last commit"),
                        (["solve", "e01"], "e01 is not started"), (["start", "e99"], "no such exercise")):
        with pytest.raises(SystemExit) as e:
            X.main(words)
        assert e.value.code == 2 and line in capsys.readouterr().err and path.read_bytes() == edited
    path.write_bytes(edited + b"def f(:\n")
    with pytest.raises(SystemExit):
        X.main(["start", "e02"])
    assert "SyntaxError" in capsys.readouterr().err and path.read_bytes() == edited + b"def f(:\n"
    path.write_bytes(edited)
    X.main(["start", "e02"])        # another function of the file
    with pytest.raises(SystemExit):
        X.main(["start", "e02"])
    mine = path.read_text().replace('raise NotImplementedError("e02: Salimans & Ho 2022, sec. 4")', "return 3 * x0")
    path.write_text(mine)
    X.main(["reset", "e02"])
    assert path.read_bytes() == edited and "3 * x0" in (course / ".exercises" / "e02.mine.txt").read_text()


def test_check_hint_and_list(course, capsys):
    def run(*words):
        made = subprocess.run([sys.executable, "exercises.py", *words], cwd=course, capture_output=True, text=True)
        return made.returncode, made.stdout + made.stderr

    run("start", "e01")
    code, said = run("check", "e01")
    assert code == 1 and "WRONG NotImplementedError: e01: DDPM" in said and "Traceback" not in said
    path = course / "diffae.py"
    path.write_text(path.read_text().replace(
        'raise NotImplementedError("e01: DDPM, Ho et al. 2020, eq. 4")',
        "a, s = signal_noise(alpha_bar, t, x0.ndim)\n    return eps * s + x0 * a"))
    code, said = run("check", "e01")
    assert code == 0 and "e01: all right" in said and "off by" in said and "expected" in said
    X.main([])
    assert "e01  write       diffae.py         10  *      done" in capsys.readouterr().out
    X.main(["hint", "e01"])
    first = capsys.readouterr().out
    X.main(["hint", "e01"])
    assert capsys.readouterr().out == "\n".join(TABLE["e01"]["hint"]) + "\n" and len(first.splitlines()) == 1


def test_an_experiment_asks_first_and_judges_then(course, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question: print(question) or "chance")
    X.main(["start", "e08"])
    assert TABLE["e08"]["predict"] in capsys.readouterr().out
    with pytest.raises(SystemExit) as e:
        X.main(["check", "e08"])
    assert e.value.code == 2 and "python diffae.py" in capsys.readouterr().err
    (course / "out" / "diffae").mkdir(parents=True)
    metrics = numbers_of("diffae")["ours"]
    for right in (True, False):
        metrics["probe_auroc.untrained"]["value"] = 0.77 if right else 0.5
        (course / "out" / "diffae" / "results.json").write_text(json.dumps({"metrics": metrics}))
        with pytest.raises(SystemExit) as e:
            X.main(["check", "e08"])
        said = capsys.readouterr().out
        assert e.value.code == (not right) and "You predicted: chance" in said and ("Random convolutions" in said) == right


def test_a_handout_gives_nothing_away(course, tmp_path, capsys):
    keys = ["e01", "e03", "e06", "e07", "e08", "e27"]
    X.main(["handout", str(tmp_path / "out"), *keys])
    everything = {p.relative_to(tmp_path / "out"): p.read_text() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    names = {str(path) for path in everything}
    assert "tests/test_exercises.py" in names and not any(n.startswith(".git/") for n in names) and "grade.py" not in names
    text = "\n".join(everything.values())
    for key in keys:
        e = TABLE[key]
        for secret in (*e.get("hint", ()), e.get("because", "\0").strip(), e.get("old", "\0")):
            assert secret not in text, (key, secret)
    for name in ("q_sample", "ddim_step"):      # in all scripts that have it
        assert "a * x0 + s * eps" not in text and "x0_hat.clamp(-1, 1)" not in text, name
    assert "WRONG" not in everything[[p for p in everything if p.name == "test_exercises.py"][0]]
    for path, source in everything.items():
        if path.suffix == ".py":
            compile(source, str(path), "exec")
    made = subprocess.run([sys.executable, "exercises.py"], cwd=tmp_path / "out", capture_output=True, text=True)
    assert [line[:3] for line in made.stdout.splitlines()[1:-2]] == keys and made.returncode == 0
    with pytest.raises(SystemExit):
        X.main(["handout", str(tmp_path / "out"), "e01"])       # not empty
    with pytest.raises(SystemExit):
        X.main(["handout", str(tmp_path / "two"), "e03", "e12"])
    assert "e03 and e12 use the same function" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- grade

RIGHT = "    a, s = signal_noise(alpha_bar, t, x0.ndim)\n    return a * x0 + s * eps\n"
SUBMISSIONS = {     # body of q_sample, points, a word of the reason
    "right": (RIGHT, 1, ""),
    "blank": ('    raise NotImplementedError("e01")\n', 0, "NotImplementedError"),
    "wrong_sign": (RIGHT.replace("+", "-"), 0, "off by"),
    "infinite_loop": ("    while True:\n        pass\n", 0, "no answer in time"),
    "exits": ("    os._exit(0)\n", 0, "not allowed here: _exit"),
    "prints_passed": ('    print("e01: all right\\npassed" * 10**6)\n    return x0\n', 0, "off by"),
    "patches_torch": ("    torch.Tensor.numpy = 0\n    torch.allclose = lambda *a: True\n" + RIGHT, 0, "allclose = .."),
    "imports_master": ("    import normative\n    return normative.q_sample(x0, t, eps, alpha_bar)\n", 0, "imports"),
    "syntax_error": ("    return a *\n", 0, "SyntaxError"),
    "renamed": (None, 0, "no function q_sample"),
    # .. and what the wall of names lets through, if one takes it down: see below
    "reads_files": ("    open('/etc/passwd')\n" + RIGHT, 0, "not allowed here: open"),
    "through_numpy": ("    np.load('a')\n" + RIGHT, 0, "not allowed here: load"),
    "through_frames": ("    return (lambda: 0).__globals__\n", 0, "not allowed here: __globals__"),
    "nested": ("    return " + "(" * 150 + "x0" + ")" * 150 + "\n", 0, "off by"),
    "deeper": ("    return " + "-" * 9000 + "x0\n", 0, "cannot be read"),
}


def submit(folder, names):
    text = (ROOT / "diffae.py").read_text()
    for name in names:
        body = SUBMISSIONS[name][0]
        (folder / name).mkdir(parents=True)
        new = text.replace("def q_sample", "def q_sampel") if body is None else text.replace(RIGHT, body, 1)
        assert new != text or name == "right"
        (folder / name / "diffae.py").write_text("import pathlib\npathlib.Path('ran').touch()\n" + new)    # never runs
    return [str(folder / name) for name in names]


def graded(folder, monkeypatch, names, *flags):
    monkeypatch.chdir(folder)
    X.main(["grade", *submit(folder / "in", names), "--ids", "e01", "--seconds", "2", *flags])
    with open(folder / "grades.csv", newline="") as f:
        return {row["submission"].rpartition("/")[2]: row for row in csv.DictReader(f)}


def test_submissions_get_what_they_deserve_and_nothing_more(course, tmp_path, monkeypatch):
    before = files(course)
    rows = graded(tmp_path, monkeypatch, list(SUBMISSIONS))
    for name, (_, points, word) in SUBMISSIONS.items():
        assert float(rows[name]["points"]) == points and word in rows[name]["reason"], rows[name]
    assert rows["right"]["reason"] == "" and rows["right"]["exercise"] == "e01"
    assert files(course) == before and sorted(p.name for p in tmp_path.iterdir()) == ["course", "grades.csv", "in"]


ATTACKS = {     # what a function might do, if the first wall had a hole
    "exits": "    import os; os._exit(0)\n",
    "writes": "    open({path!r}, 'w').write('x')\n" + RIGHT,
    "deletes": "    import os; os.unlink({keep!r})\n" + RIGHT,
    "spawns": "    import subprocess; subprocess.run(['touch', {path!r}])\n" + RIGHT,
    "forks": "    import os; os.fork()\n" + RIGHT,
    "reads": "    open({keep!r}).read()\n" + RIGHT,
    "kills": "    import os, signal; os.kill(os.getppid(), signal.SIGKILL)\n" + RIGHT,
    "eats": "    return torch.zeros(2 ** 33)\n",
    "floods": "    return torch.zeros(2 ** 24) + x0.sum()\n",
    "right": RIGHT,
}


def test_behind_the_first_wall_stand_two_more(course, tmp_path, monkeypatch):
    """The wall of names is taken down. What runs can neither touch a file nor another's grade."""
    (tmp_path / "keep").write_text("kept")
    monkeypatch.setattr(G, "refusal", lambda *_: "")
    for name, body in ATTACKS.items():
        body = body.format(path=str(tmp_path / "made"), keep=str(tmp_path / "keep"))
        monkeypatch.setitem(SUBMISSIONS, name, (body, 0, ""))
    rows = graded(tmp_path, monkeypatch, list(ATTACKS))
    for name, row in rows.items():
        assert float(row["points"]) == (name == "right"), row
    assert sorted(p.name for p in tmp_path.iterdir()) == ["course", "grades.csv", "in", "keep"]
    assert (tmp_path / "keep").read_text() == "kept"
