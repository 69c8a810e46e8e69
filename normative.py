"""Normative diffusion autoencoder on brain MR: how far from healthy is a brain, and does it tell survival?

The autoencoder of diffae.py, with one idea more: the encoder also sees the age, z_sem = Encoder(x0, age), and
only healthy people train it. A score says how healthy a brain is. Cox regression asks whether patients with
a higher score live longer.

    x0 (B,1,H,W), age (B,) --Encoder--> z_sem (B,d) --what it leaves out of x0--> score --Cox--> hazard ratio
         |                                 |
         +---------------DDIM up with z_sem--> x_T (B,1,H,W)
                                                |
      healthy mean of z_sem at this age --------+--DDIM down--> healthy twin (B,1,H,W)

Ijishakin et al., Normative Diffusion Autoencoders, 2024 (arXiv 2407.14191). Neither code nor data are public.
Where the paper is silent, this script does what diffae.py does.

    python normative.py                     # phantom cohort, 7 minutes on one CPU core
    python normative.py --data cohort.h5    # yours: label (0 healthy), age; for survival also time, event
    python normative.py --apply new.h5      # scores of new people, by the trained model

Each healthy person has one role: train the networks (part "train"), be the reference that says what is usual
(part "val"), or be a control (part "test"). Patients are always "test".

`--recipe paper` trains and scores as published, but lr and EMA warm up, and the healthy mean is that of part
"val". `--recipe ours`, the default, differs as in diffae.py in predict v, spatial and flip. It draws large t
more often (t_power 0.5) and ends DDIM at T - 1 (stride trailing). Two more differences:
- score residual (paper: cosine): a code of healthy brains has numbers for what healthy brains differ in. A
  lesion is none of that, so distances between codes hardly see it. The residual is the image minus what z_sem
  alone draws. It is measured pixel by pixel in units of what is usual in the reference;
- augment 0.1: brains come registered, so the random motion is smaller than that of hearts.
"""
import copy, dataclasses, functools, math, signal, sys, time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data as D
import metrics as M


# --------------------------------------------------------------------------------------------------------
# Config: `--key value` changes any line. Order: these defaults < PRESETS < RECIPES < the command line.

@dataclasses.dataclass
class Config:
    data: str = ""            # HDF5 file, or a folder of one file per subject; empty: phantoms
    test: str = ""            # second file: all of it is tested; none of --data is
    fold: str = ""            # 0/5 .. 4/5: test on this fifth of the healthy, and on all patients
    out: str = "out/normative"  # everything the run leaves; the same command again goes on from there
    init: str = ""            # folder of another run: start from its weights (fine-tuning)
    apply: str = ""           # file: no training; the model in --out reads it, into OUT/apply/NAME/
    preset: str = ""          # demo (laptop) or paper (one GPU); empty: paper on CUDA, demo elsewhere
    recipe: str = "ours"      # ours or paper: the method, see above
    device: str = ""          # cuda, mps, cpu; empty: the first of these that is there
    seed: int = 0             # of the split, the weights, the order of the data and every draw
    target: str = "label"     # column that tells healthy people (0) from patients (above 0)
    # images and network
    size: int = 128           # images are resized to size x size
    base: int = 128           # channels of the first level
    mult: tuple = (1, 1, 2, 3, 4)         # channels per level of the UNet, in units of base
    enc_mult: tuple = (1, 1, 2, 3, 4, 4)  # the same for the encoder, one level deeper
    blocks: int = 2           # residual blocks per level (one more on the way up)
    attention: int = 16       # self-attention at maps of this width, if there are any, and in the middle
    groups: int = 32          # of GroupNorm; 0: one per 16 channels (backward up to 18x faster on a CPU)
    dropout: float = 0.1      # in the UNet's blocks
    z_dim: int = 512          # numbers in z_sem
    z_scale: float = 1.0      # multiplies z_sem in AdaGN, in no other place; a study of hearts tried 3
    spatial: bool = True      # the encoder keeps position and the UNet sees an image of z_sem; paper: false
    # the primary score: see five_scores. paper: cosine
    score: Literal["residual", "cosine", "age_matched", "l2", "mahalanobis"] = "residual"
    # objective
    predict: Literal["v", "eps"] = "v"    # what the UNet outputs; paper: eps
    t_power: float = 0.5      # times are drawn as T u^t_power: 0.5 favours high noise; paper: 1, uniform
    augment: float = 0.1      # strength of random rotation, zoom and shift of the training images; paper: 0
    flip: bool = False        # random left-right flips (paper: true; but a body has its left and its right)
    T: int = 1000             # diffusion steps, linear beta; with far fewer, level T - 1 is not pure noise
    vae_beta: float = 1e-3    # weight of the VAE's KL; KL and squared error are sums over an image
    # training
    steps: int = 5000         # optimizer steps; raise it and run again to train longer
    batch: int = 64           # images per step, over all processes
    lr: float = 1e-4          # Adam; constant after 100 steps of warm-up
    ema: float = 0.9999       # decay of the averaged weights; the averaged weights are evaluated
    minutes: float = 0.0      # at most so many minutes for each network; 0: no limit. Steps: in results.json
    save_every: int = 500     # steps between checkpoints
    # evaluation
    S: int = 20               # DDIM steps, both ways
    stride: Literal["trailing", "leading"] = "trailing"     # DDIM times end at T-1; paper: 0, 50, .. 950
    draws: int = 8            # images from z_sem and random x_T; SSIM is of their mean
    eval_images: int = 1000   # at most this many test images are reconstructed


PRESETS = {
    "paper": {},
    "demo": dict(size=48, base=16, mult=(1, 2, 4), enc_mult=(1, 2, 4, 4), blocks=1, attention=6,
                 groups=0, dropout=0.0, z_dim=128, steps=600, batch=32, lr=1e-3, save_every=200,
                 eval_images=40),
}
RECIPES = {
    "ours": {},
    "paper": dict(predict="eps", t_power=1.0, spatial=False, augment=0.0, flip=True, stride="leading",
                  score="cosine"),
}
# A run may go on in the same folder with other values of these. All other settings need another --out.
MAY_CHANGE = {"data", "test", "out", "apply", "preset", "device", "target", "steps", "save_every",
              "minutes", "S", "draws", "eval_images", "score"}


# --------------------------------------------------------------------------------------------------------
# Schedule and forward process. Levels t in 0..T-1 are noisy. Two more exist for the samplers: at t = -1 the
# image is clean (alpha_bar = 1), at t = T it is pure noise (alpha_bar = 0).

def linear_alpha_bar(T):
    """Product of 1 - beta up to t, beta linear 1e-4 .. 0.02 (DDPM, Ho et al. 2020, sec. 4). -> (T,)"""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0)


@functools.cache
def sqrt_table(alpha_bar, device):
    """sqrt(alpha_bar), sqrt(1 - alpha_bar), copied once: a copy would wait for the GPU. -> (2,T) float32"""
    return torch.stack([alpha_bar, 1 - alpha_bar]).sqrt().float().to(device)


def signal_noise(alpha_bar, t, ndim):
    """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) of levels t (B,), as (B,1,..) to multiply ndim-d tensors"""
    return sqrt_table(alpha_bar, t.device)[:, t].view(2, -1, *[1] * (ndim - 1))


def q_sample(x0, t, eps, alpha_bar):
    """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps: q(x_t|x_0) (DDPM eq. 4). t (B,) -> like x0"""
    a, s = signal_noise(alpha_bar, t, x0.ndim)
    return a * x0 + s * eps


def v_target(x0, t, eps, alpha_bar):
    """v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x0 (Salimans & Ho 2022, sec. 4). -> like x0"""
    a, s = signal_noise(alpha_bar, t, x0.ndim)
    return a * eps - s * x0


def eps_from_v(v, x_t, t, alpha_bar):
    """eps = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t: the eps that v and x_t imply. -> like x_t"""
    a, s = signal_noise(alpha_bar, t, x_t.ndim)
    return a * v + s * x_t


def random_t(n, T, power, g):
    """n timesteps in 0..T-1: T u^power, u uniform; a power below 1 draws large t more often. -> (n,)"""
    u = torch.rand(n, generator=g, device=g.device)
    return (u ** power * T).long().clamp(max=T - 1)


# --------------------------------------------------------------------------------------------------------
# Networks, small to large

def norm(ch, groups):
    """GroupNorm; its statistics are float32 also under autocast. groups 0: one per 16 channels."""
    return nn.GroupNorm(groups or max(1, ch // 16), ch)


def zero(layer):
    """Zero-initialised: a residual block starts as its skip, and the output of a network is 0."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def time_embedding(t, dim):
    """Sinusoids of t (B,), as in DDPM, cosines first. -> (B,dim)"""
    freq = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t[:, None].float() * freq
    return torch.cat([angle.cos(), angle.sin()], 1)


def resample(x, how):
    """Halve ("down", 2x2 mean) or double ("up", each pixel four times) the side of (B,C,H,W); "": neither.

    F.interpolate would do, but torch.compile has lost its gradient, and this keeps channels_last order."""
    if how == "down":
        return F.avg_pool2d(x, 2)
    if how == "up":
        B, C, H, W = x.shape
        x = x.permute(0, 2, 3, 1)
        x = torch.cat([x, x], 3).view(B, H, 1, 2 * W * C)      # each pixel twice in its row
        return torch.cat([x, x], 2).view(B, 2 * H, 2 * W, C).permute(0, 3, 1, 2)    # each row twice
    return x


class Attention(nn.Module):
    """Self-attention over all pixels, one head, residual; its projection starts at zero. (B,C,H,W) -> same"""
    def __init__(self, ch, groups):
        super().__init__()
        self.norm = norm(ch, groups)
        self.qkv = nn.Conv2d(ch, 3 * ch, 1)
        self.proj = zero(nn.Conv2d(ch, ch, 1))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)  # (B,1,H*W,C)
        h = F.scaled_dot_product_attention(q, k, v)  # softmax in float32 inside
        return x + self.proj(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class EncoderBlock(nn.Module):
    """norm, SiLU, resample, one conv, plus skip, as in the original encoder. (B,ch_in,..) -> (B,ch_out,..)"""
    def __init__(self, ch_in, ch_out, groups, how=""):
        super().__init__()
        self.norm, self.how = norm(ch_in, groups), how
        self.conv = nn.Conv2d(ch_in, ch_out, 3, padding=1)
        self.skip = nn.Conv2d(ch_in, ch_out, 1) if ch_in != ch_out else nn.Identity()

    def forward(self, x):
        h = resample(F.silu(self.norm(x)), self.how)
        return self.skip(resample(x, self.how)) + self.conv(h)


class ResBlock(nn.Module):
    """Block: t scales and shifts, z_sem scales again (AdaGN, DiffAE eq. 7; the 1 + is of their code).

    x (B,C,H,W), emb (B,4*base), z (B,z_dim) -> (B,ch_out,H',W'). The second convolution starts at zero."""
    def __init__(self, ch_in, ch_out, cfg, how=""):
        super().__init__()
        self.norm1, self.how = norm(ch_in, cfg.groups), how
        self.conv1 = nn.Conv2d(ch_in, ch_out, 3, padding=1)
        self.t_proj = nn.Linear(4 * cfg.base, 2 * ch_out)
        self.z_proj = nn.Linear(cfg.z_dim, ch_out)
        self.norm2, self.dropout = norm(ch_out, cfg.groups), nn.Dropout(cfg.dropout)
        self.conv2 = zero(nn.Conv2d(ch_out, ch_out, 3, padding=1))
        self.skip = nn.Conv2d(ch_in, ch_out, 1) if ch_in != ch_out else nn.Identity()

    def forward(self, x, emb, z):
        h = self.conv1(resample(F.silu(self.norm1(x)), self.how))
        t_scale, t_shift = self.t_proj(F.silu(emb))[:, :, None, None].chunk(2, 1)
        z_gain = self.z_proj(F.silu(z))[:, :, None, None]
        # (norm(h) (1 + t_scale) + t_shift) (1 + z_gain), multiplied out: two passes less over h
        h = self.norm2(h) * ((1 + t_scale) * (1 + z_gain)) + t_shift * (1 + z_gain)
        h = self.conv2(self.dropout(F.silu(h)))
        return self.skip(resample(x, self.how)) + h


class Encoder(nn.Module):
    """Convolutions and attention; sees neither noise nor t. x (B,ch_in,H,W) -> (B,ch_out) float32"""
    def __init__(self, cfg, ch_in, ch_out):
        super().__init__()
        self.spatial, width, c = cfg.spatial, cfg.size, cfg.base
        layers = [nn.Conv2d(ch_in, c, 3, padding=1)]
        for i, m in enumerate(cfg.enc_mult):
            for _ in range(cfg.blocks):
                layers.append(EncoderBlock(c, m * cfg.base, cfg.groups))
                c = m * cfg.base
                if width == cfg.attention:
                    layers.append(Attention(c, cfg.groups))
            if i < len(cfg.enc_mult) - 1:
                layers.append(EncoderBlock(c, c, cfg.groups, "down"))
                width //= 2
        layers += [EncoderBlock(c, c, cfg.groups), Attention(c, cfg.groups), EncoderBlock(c, c, cfg.groups)]
        self.trunk = nn.Sequential(*layers, norm(c, cfg.groups), nn.SiLU())
        self.out = nn.Linear(c * width * width if cfg.spatial else c, ch_out)

    def forward(self, x):
        h = self.trunk(x)       # (B,C,h,w), 6x6 in the demo, 4x4 in the paper
        return self.out(h.flatten(1) if self.spatial else h.mean((2, 3))).float()


class UNet(nn.Module):
    """Denoiser. x_t (B,1,H,W), t (B,), z_sem (B,z_dim) -> (B,1,H,W) float32, zero at initialisation."""
    def __init__(self, cfg):
        super().__init__()
        self.base, self.z_scale, width, c = cfg.base, cfg.z_scale, cfg.size, cfg.base
        self.time = nn.Sequential(nn.Linear(c, 4 * c), nn.SiLU(), nn.Linear(4 * c, 4 * c))
        # AdaGN scales whole channels, so it cannot say where. An image made of z_sem can.
        self.z_image = nn.Linear(cfg.z_dim, width * width) if cfg.spatial else None
        self.conv_in = nn.Conv2d(2 if cfg.spatial else 1, c, 3, padding=1)
        def block(ch_in, ch_out):     # width is that of the level at which it is called
            layers = [ResBlock(ch_in, ch_out, cfg)]
            layers += [Attention(ch_out, cfg.groups)] if width == cfg.attention else []
            return nn.ModuleList(layers)
        skips = [c]                   # channels of what the way up takes, last in first out, as in forward
        self.down = nn.ModuleList()   # each entry: a list of layers whose output is kept for the way up
        for i, m in enumerate(cfg.mult):
            for _ in range(cfg.blocks):
                self.down.append(block(c, m * cfg.base))
                c = m * cfg.base
                skips.append(c)
            if i < len(cfg.mult) - 1:
                self.down.append(nn.ModuleList([ResBlock(c, c, cfg, "down")]))
                skips.append(c)
                width //= 2
        self.middle = nn.ModuleList([ResBlock(c, c, cfg), Attention(c, cfg.groups), ResBlock(c, c, cfg)])
        self.up = nn.ModuleList()     # each entry: takes one skip
        for i, m in reversed(list(enumerate(cfg.mult))):
            for _ in range(cfg.blocks + 1):
                self.up.append(block(c + skips.pop(), m * cfg.base))
                c = m * cfg.base
            if i > 0:
                self.up[-1].append(ResBlock(c, c, cfg, "up"))
                width *= 2
        self.norm_out = norm(c, cfg.groups)
        self.conv_out = zero(nn.Conv2d(c, 1, 3, padding=1))

    def forward(self, x_t, t, z_sem):
        z = self.z_scale * z_sem
        if self.z_image is not None:
            x_t = torch.cat([x_t, self.z_image(z_sem).view(x_t.shape)], 1)
        emb = self.time(time_embedding(t, self.base))
        def run(layers, h):
            for layer in layers:
                h = layer(h, emb, z) if isinstance(layer, ResBlock) else layer(h)
            return h
        skips = [self.conv_in(x_t)]
        for layers in self.down:
            skips.append(run(layers, skips[-1]))
        h = run(self.middle, skips[-1])
        for layers in self.up:
            h = run(layers, torch.cat([h, skips.pop()], 1))
        return self.conv_out(F.silu(self.norm_out(h))).float()


class Decoder(nn.Module):
    """The VAE's decoder: the encoder's levels in reverse, attention at the narrowest.

    z (B,z_dim) -> (B,1,H,W) float32"""
    def __init__(self, cfg):
        super().__init__()
        self.width = cfg.size // 2 ** (len(cfg.enc_mult) - 1)
        c = cfg.enc_mult[-1] * cfg.base
        self.fc = nn.Linear(cfg.z_dim, c * self.width ** 2)
        layers = [EncoderBlock(c, c, cfg.groups), Attention(c, cfg.groups), EncoderBlock(c, c, cfg.groups)]
        for i, m in reversed(list(enumerate(cfg.enc_mult))):
            for _ in range(cfg.blocks):
                layers.append(EncoderBlock(c, m * cfg.base, cfg.groups))
                c = m * cfg.base
            if i > 0:
                layers.append(EncoderBlock(c, c, cfg.groups, "up"))
        self.trunk = nn.Sequential(*layers, norm(c, cfg.groups), nn.SiLU(), nn.Conv2d(c, 1, 3, padding=1))

    def forward(self, z):
        return self.trunk(self.fc(z).view(len(z), -1, self.width, self.width)).float()


# --------------------------------------------------------------------------------------------------------
# The models that are compared. forward(batch, g) is the training loss; batch is a dict, see D.Loader.

class Model(nn.Module):
    """Diffusion autoencoder: || UNet(x_t, t, z_sem) - target ||^2, z_sem = Encoder(x0, age) (Fig. 2)."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg, 2, cfg.z_dim)
        self.unet = UNet(cfg)
        self.alpha_bar = linear_alpha_bar(cfg.T)    # stays on the CPU: samplers read single numbers from it
        self.to(memory_format=torch.channels_last)

    def encode(self, batch):
        """image (B,1,H,W) in [-1,1]; age (B,) in years, a constant second channel -> z_sem (B,z_dim)"""
        age = (batch["age"] / 50 - 1).view(-1, 1, 1, 1).expand(batch["image"].shape)
        return self.encoder(torch.cat([batch["image"], age], 1))

    def eps(self, x_t, t, z_sem):
        """eps_hat (B,1,H,W) at levels t (B,), whatever the UNet was trained to predict."""
        out = self.unet(x_t, t, z_sem)
        return out if self.cfg.predict == "eps" else eps_from_v(out, x_t, t, self.alpha_bar)

    def forward(self, batch, g):
        x0 = D.moved(batch["image"], self.cfg, g)
        t = random_t(len(x0), self.cfg.T, self.cfg.t_power, g)
        eps = torch.randn(x0.shape, generator=g, device=g.device)
        z_sem = self.encode(batch | {"image": x0})
        out = self.unet(q_sample(x0, t, eps, self.alpha_bar), t, z_sem)
        target = eps if self.cfg.predict == "eps" else v_target(x0, t, eps, self.alpha_bar)
        return (out - target).square().mean()


class VAE(nn.Module):
    """The baseline (Kingma & Welling 2014, eq. 10, KL weighted): an encoder of the same width,
    and a code of the same length. It sees the image alone: in normative.py, not the age."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg, 1, 2 * cfg.z_dim)
        self.decoder = Decoder(cfg)
        self.to(memory_format=torch.channels_last)

    def posterior(self, x0):
        """x0 (B,1,H,W) -> mean and log variance of q(z|x0), each (B,z_dim)."""
        mean, logvar = self.encoder(x0).chunk(2, 1)
        return mean, logvar.clamp(-20, 10)

    def encode(self, batch):
        """batch["image"] (B,1,H,W) -> posterior mean (B,z_dim): the code that is probed."""
        return self.posterior(batch["image"])[0]

    def forward(self, batch, g):
        x0 = D.moved(batch["image"], self.cfg, g)
        mean, logvar = self.posterior(x0)
        z = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=g, device=g.device)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1).mean()
        return (self.decoder(z) - x0).square().mean() + self.cfg.vae_beta * kl / x0[0].numel()


# --------------------------------------------------------------------------------------------------------
# Samplers: functions of eps_fn(x_t, t), so that tests can replace the network by an exact formula

def times(S, T, stride="trailing"):
    """S of T times, increasing. trailing: round(i T/S) - 1, i = 1..S; leading: floor(i T/S), i = 0..S-1;
    quadratic: round(i^2 T/S^2) - 1, but at least i - 1; dense at low noise (DDIM, sec. D.2), where x_T gets
    its fine detail."""
    if not 1 <= S <= T:
        raise ValueError(f"S={S} sampling steps: from 1 to T={T} are possible")
    if stride == "leading":
        return [i * T // S for i in range(S)]
    if stride == "quadratic":
        return [max(i - 1, round(i * i * T / S ** 2) - 1) for i in range(1, S + 1)]
    return [round(i * T / S) - 1 for i in range(1, S + 1)]


def ddim_step(x, t_from, t_to, eps_hat, alpha_bar, clip=False):
    """Deterministic DDIM from one level to another, up or down (Song et al. 2021, eq. 12 with sigma = 0).

    x, eps_hat (B,..). Levels: -1 clean, 0..T-1, T pure noise. clip: x0_hat to the greys that an image can
    have; eps then changes so that x is still their mixture. -> like x"""
    level = lambda t: 1.0 if t < 0 else 0.0 if t == len(alpha_bar) else float(alpha_bar[t])
    ab_from, ab_to = level(t_from), level(t_to)
    x0_hat = (x - math.sqrt(1 - ab_from) * eps_hat) / math.sqrt(ab_from)
    if clip and ab_from < 1:
        x0_hat = x0_hat.clamp(-1, 1)
        eps_hat = (x - math.sqrt(ab_from) * x0_hat) / math.sqrt(1 - ab_from)
    return math.sqrt(ab_to) * x0_hat + math.sqrt(1 - ab_to) * eps_hat


def ddim_decode(eps_fn, x_T, S, alpha_bar, stride="trailing", clip=False):
    """x_T -> x_0 in S calls of eps_fn(x_t, t), down the levels (DDIM eq. 12); S = 4: 999, 749, 499, 249, -1.
    -> like x_T"""
    x, down = x_T, times(S, len(alpha_bar), stride)[::-1] + [-1]
    for t, t_prev in zip(down, down[1:]):
        x = ddim_step(x, t, t_prev, eps_fn(x, t), alpha_bar, clip)
    return x


def ddim_encode(eps_fn, x0, S, alpha_bar, stride="trailing", clip=False):
    """x_0 -> x_T, up the levels (DiffAE eq. 8); S = 4: -1, 249, 499, 749, 999. Level -1 is not trained: the
    first step takes eps at t = 0. stride "leading" is the original code's: 0, 250, 500, 750, T."""
    x, up = x0, times(S, len(alpha_bar), stride)
    up = up + [len(alpha_bar)] if stride == "leading" else [-1] + up
    for t, t_next in zip(up, up[1:]):
        x = ddim_step(x, t, t_next, eps_fn(x, max(t, 0)), alpha_bar, clip)
    return x


# --------------------------------------------------------------------------------------------------------
# Training. Batch, noise and dropout of step k are functions of (seed, k, rank) alone. So there is no random
# state to save: on a CPU, a run that was killed and started again ends with the very bits of an unbroken one.

def amp(device):
    """bfloat16 autocast, if the device is fast at it (CPUs without AVX512-BF16 are not)."""
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else \
        device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def fit(model, loader, cfg, name, steps, facts, watch=None):
    """Train `model` to step `steps` -> (its EMA, the step reached). model(batch, g) is the loss of a batch.

    Goes on from OUT/name.pt, or exits if that file has another cfg or other facts (hashes of the data). A new
    run starts from the weights in --init, if given. watch(ema) is called at the start and at each save.
    SIGTERM and Ctrl-C: finish the step, save, exit. After cfg.minutes: finish the step, save, return."""
    (rank, world), device, path = D.ranks(), loader.device, Path(cfg.out, f"{name}.pt")
    params = [p for p in model.to(device).train().parameters() if p.requires_grad]
    opt = torch.optim.Adam(params, lr=cfg.lr, fused=True)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    averaged = [e for e, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(cfg).items()} | facts
    state = D.read_checkpoint(path, config, dataclasses.asdict(Config()), MAY_CHANGE)
    step = D.load_into(state, path, model, ema, opt)        # 0 if there is none
    spent, limit = (state or {}).get("seconds", 0.0), 60 * cfg.minutes or math.inf
    if step >= steps or spent >= limit:
        return ema, step
    own = "prior" in name or "supervised" in name           # of the codes or labels of this run
    if cfg.init and not step and not own:
        D.start_from(Path(cfg.init, f"{name}.pt"), model, ema)
    if rank == 0:
        M.record(cfg, __file__)
        if watch:           # a fault in watch shows now, and not after hours
            watch(ema)
    for net in model.children() if device.type == "cuda" else ():      # the networks: forward() draws noise
        net.compile()
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    caught, restore = D.catch_signals()
    started = time.perf_counter() - spent                   # as if it had never been stopped
    progress = M.Progress(cfg, name, step, steps, started + limit, rank)

    g, seen, ends = torch.Generator(device), [], False
    mine = slice(rank * cfg.batch // world, (rank + 1) * cfg.batch // world)
    while not ends:
        batch = loader.batch(D.batch_rows(len(loader), cfg.batch, cfg.seed, step)[mine])
        g.manual_seed(D.mix(cfg.seed, step, rank, 0))          # t, noise, augmentation
        torch.manual_seed(D.mix(cfg.seed, step, rank, 1))      # dropout
        lr = cfg.lr * min(1, (step + 1) / 100)
        opt.param_groups[0]["lr"] = lr
        with amp(device):
            loss = net(batch, g)
        opt.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        with torch.no_grad():               # the decay grows from 0.1: the EMA must forget the first weights
            torch._foreach_lerp_(averaged, params, 1 - min(cfg.ema, (1 + step) / (10 + step)))
        seen.append(torch.stack([loss.detach(), grad_norm]))
        step += 1
        progress.bar.update()

        stop = torch.tensor([bool(caught), time.perf_counter() - started >= limit], dtype=torch.int)
        if world > 1:                       # all stop at one step; a CPU tensor does not wait for the GPU
            dist.all_reduce(stop)
        killed, ends = bool(stop[0]), bool(stop.any()) or step == steps
        due = ends or step % cfg.save_every == 0
        if not due and step % 20:           # what follows waits for the device: not in every step
            continue
        loss, grad_norm = torch.stack(seen).mean(0).tolist()
        if not math.isfinite(loss + grad_norm):
            D.fail(f"{name}: loss {loss:.3g}, gradient {grad_norm:.3g} in steps {step - len(seen) + 1} to "
                   f"{step}, lr {lr:.2g}; {path} is of the last save; try a smaller --lr and a new --out", 1)
        seen = []
        if rank == 0:
            progress.say(step, loss, grad_norm, lr, due)
            if due:
                D.save_checkpoint(path, dict(step=step, config=config, model=model.state_dict(),
                                             ema=ema.state_dict(), optimizer=opt.state_dict(),
                                             seconds=time.perf_counter() - started))
                if watch:
                    watch(ema)
        progress.began = time.perf_counter()        # the speed is that of the training alone
    progress.bar.close()
    restore()
    if world > 1:
        dist.barrier()      # a process that leaves early would take the one that is saving with it
    if killed:
        print(f"saved step {step}; the same command goes on", flush=True)
        sys.exit(128 + (caught or [signal.SIGTERM])[0])
    return ema, step


# --------------------------------------------------------------------------------------------------------
# Evaluation: every number is of people whom no network and no reference has seen

@torch.inference_mode()
def in_batches(fn, *tensors, batch=64):
    """fn over slices of the tensors' first axis, concatenated: any number of images in bounded memory."""
    with amp(tensors[0].device):
        return torch.cat([fn(*rows) for rows in zip(*(x.split(batch) for x in tensors))])


def semantic_codes(model, loader):
    """z_sem (the VAE: its mean) of every row, not augmented. -> (N,z_dim)"""
    rows = torch.arange(len(loader), device=loader.device)
    return in_batches(lambda i: model.encode(loader.batch(i)), rows)


def walk(sampler, model, x, z_sem):
    """sampler (ddim_encode or ddim_decode) with model at fixed z_sem (B,z_dim), from x (B,1,H,W) -> like x"""
    def few(x, z):
        eps_fn = lambda x_t, t: model.eps(x_t, torch.full((len(x),), t, device=x.device), z)
        return sampler(eps_fn, x, model.cfg.S, model.alpha_bar, model.cfg.stride, clip=True)
    return in_batches(few, x, z_sem)


def encode_noise(model, x0, z_sem):
    """The x_T from which, with z_sem, decode() comes back close to x0. x0 (B,1,H,W) -> same"""
    return walk(ddim_encode, model, x0, z_sem)


def decode(model, x_T, z_sem):
    """x_T (B,1,H,W), noise or encoded, and z_sem (B,z_dim) -> images (B,1,H,W) in [-1,1]"""
    return walk(ddim_decode, model, x_T, z_sem)


def preview(cfg, loader):
    """-> watch(ema) for fit: preview.png of validation images. If row 3 is unlike row 1, z_sem is unused."""
    def watch(ema):
        x0, z = loader.batch(np.arange(len(loader)))["image"], semantic_codes(ema, loader)
        noise = torch.randn(x0.shape, generator=torch.Generator(x0.device).manual_seed(0), device=x0.device)
        rows = [x0, decode(ema, encode_noise(ema, x0, z), z), decode(ema, noise, z)]
        M.grid(Path(cfg.out, "preview.png"), [M.to_image(x) for x in rows],
               ["image", "z_sem + x_T", "z_sem, random x_T"], [],
               "Validation images, before training or at the last save. Row 2 looks good even untrained.")
    return watch


def image_of_code(model, z_sem, g):
    """The mean image that z_sem (N,d) stands for: x0_hat at T - 1, where x_t tells nothing, in one step. DDIM
    would add details of its own. (An error of eps is multiplied by 157 here: for predict eps, this is mostly
    noise.) -> (N,H,W) numpy in [0,1]"""
    def few(z):
        t = torch.full((len(z),), model.cfg.T - 1, device=z.device)
        x_T = torch.randn(len(z), 1, model.cfg.size, model.cfg.size, generator=g, device=z.device)
        a, s = signal_noise(model.alpha_bar, t, 4)
        return ((x_T - s * model.eps(x_T, t, z)) / a).clamp(-1, 1)          # DDPM eq. 4 solved for x0
    return M.to_image(in_batches(few, z_sem))


def age_mean(z, age, rows):
    """The mean of z (N,d) at each age: a parabola per dimension, least squares over `rows`. -> f

    f(age (n,)) -> (n,d). Beyond the ages of these rows f stays constant: a parabola would run away."""
    low, high = age[rows].min(), age[rows].max()
    powers = lambda a: ((np.clip(a, low, high) - low) / max(high - low, 1e-9))[:, None] ** np.arange(3)
    weights = np.linalg.lstsq(powers(age[rows]), z[rows], rcond=None)[0]
    return lambda a: powers(a) @ weights


def usual_residual(real, drawn):
    """What a code usually leaves out of the images (n,H,W) of healthy people: the RMS at each pixel. -> (H,W)

    1 % of the range is added: the residual of an image is divided by it."""
    return np.sqrt(((real - drawn) ** 2).mean(0)) + 0.01


def five_scores(z, deviation, age, rows):
    """How healthy is z (N,d)? -> {kind: (N,)}, higher = healthier. rows: of the healthy reference.

    cosine: with their mean z, whatever the age (the paper). age_matched, l2, mahalanobis: a cosine with, or
    minus a distance from, their mean at this age. residual: minus `deviation` (N,), the mean square over an
    image of what its code leaves out, in units of usual_residual()."""
    at_age = age_mean(z, age, rows)(age)
    length = lambda a: np.linalg.norm(a, axis=-1)
    cosine = lambda a, b: (a * b).sum(-1) / (length(a) * length(b))
    return {"residual": -deviation, "cosine": cosine(z, z[rows].mean(0)),
            "age_matched": cosine(z, at_age), "l2": -length(z - at_age),
            "mahalanobis": -M.mahalanobis(z - at_age, rows)}


def reference_scores(z, deviation, age, subject):
    """five_scores of the healthy reference, each fifth of its people judged by the other four. (Who is part
    of a mean and a covariance is too near to them. New people are not.) -> {kind: (n,)}"""
    out, fold = {}, np.unique(subject, return_inverse=True)[1] % 5
    for k in range(5):
        for kind, score in five_scores(z, deviation, age, np.flatnonzero(fold != k)).items():
            out.setdefault(kind, score)[fold == k] = score[fold == k]
    return out


def latent_deviation(mean, logvar, rows):
    """A VAE's own score: minus the mean over i of |mean_i - healthy mean_i| / sqrt(healthy var_i + var_i).

    mean, logvar (N,d) of its posterior (Lawry Aguila et al. 2022). -> (N,)"""
    return -(abs(mean - mean[rows].mean(0)) / np.sqrt(mean[rows].var(0) + np.exp(logvar))).mean(1)


def all_scores(cfg, data, part, models, codes, loader):
    """-> scores {row: (N,)}; of our code left_out (N,H,W) = (image - image_of_code()) / usual, and usual
    (H,W), see usual_residual(). Only part "val", the reference, says what is usual.

    Rows: KIND of our code, CODE_KIND of another (names: ROWS). "" and CODE are the kind in cfg.score."""
    age, real = data.columns["age"].astype(np.float64), data.image[np.arange(len(data))] / np.float32(255)
    train, rows = np.flatnonzero(part == "train"), np.flatnonzero(part == "val")
    g = torch.Generator(loader.device).manual_seed(cfg.seed)
    drawn = {row: image_of_code(models[row], codes[row], g) for row in ("", "untrained")}
    drawn["vae"] = M.to_image(in_batches(models["vae"].decoder, codes["vae"]))
    codes = {row: code.double().cpu().numpy() for row, code in codes.items()}
    pca, flat = M.pca_of_rows(data, train, cfg.z_dim)
    z_pca = pca.transform(flat(np.arange(len(data))))
    drawn["pca"] = pca.inverse_transform(z_pca).reshape(real.shape).clip(0, 1)
    codes["pca"] = z_pca + pca.components_ @ pca.mean_      # not centred: a cosine with the mean needs a mean
    scores = {}
    usual = {row: usual_residual(real[rows], images[rows]) for row, images in drawn.items()}
    left_out = {row: (real - images) / usual[row] for row, images in drawn.items()}
    for row in drawn:
        kinds = five_scores(codes[row], (left_out[row] ** 2).mean((1, 2)), age, rows)
        scores |= {row: kinds[cfg.score]} | {f"{row}_{kind}".strip("_"): kinds[kind] for kind in kinds}
    every = torch.arange(len(data), device=loader.device)
    logvar = in_batches(lambda i: models["vae"].posterior(loader.batch(i)["image"])[1], every)
    scores["vae_deviation"] = latent_deviation(codes["vae"], logvar.cpu().numpy(), rows)
    scores["vae_error"] = -((real - drawn["vae"]) ** 2).mean((1, 2))
    scores["brain_age_gap"] = -M.brain_age_gap(z_pca, age, train, rows, data.subject)
    if "factor_severity" in data.columns:       # a phantom: the score of somebody who knows
        scores["planted"] = -data.columns["factor_severity"].astype(np.float64)
    return {row: scores[row] for row in ROWS if row in scores}, left_out[""], usual[""]


def lesion_gain(change, lesion, brain, age, ill):
    """Does |change| (n,H,W) find the lesions of the ill (n,)? AUROC over the pixels of the brain, minus that
    of the same lesion in the change of a control of about this age, since edges change in everybody.

    lesion, brain: masks (n,H,W). -> one number for each who is ill and has a lesion"""
    controls, out = np.flatnonzero(~ill), []
    for k in np.flatnonzero(ill & lesion.any((1, 2))):
        other = controls[abs(age[controls] - age[k]).argmin()]
        own, control = (M.auroc(abs(change[i])[brain[k]], lesion[k][brain[k]]) for i in (k, other))
        out.append(own - control)
    return np.array(out)


def evaluate(cfg, data, part, models, device):
    """Every number and picture of a run. -> metrics, as in results.json

    models: {"": the diffusion autoencoder, "untrained": the same with random weights, "vae": ..}"""
    out, train = Path(cfg.out), np.flatnonzero(part == "train")
    loader = D.Loader({"image": data.image, "age": data.columns["age"]}, device)
    test = M.evenly(np.flatnonzero(part == "test"), cfg.eval_images)
    who, real, x0 = data.subject[test], data.image[test] / 255, loader.batch(test)["image"]
    g = torch.Generator(device).manual_seed(cfg.seed)
    noise = torch.randn(cfg.draws, *x0.shape, generator=g, device=device)
    codes = {row: semantic_codes(model, loader) for row, model in models.items()}

    # Images from z_sem with the encoded x_T (recon), and from z_sem alone (mean over random x_T). The VAE and
    # the trivial rows have one image for both. Ours comes last: its model and x_T are used below.
    recon = M.trivial_images(data, train, test, cfg.z_dim)
    recon["vae"] = M.to_image(in_batches(models["vae"].decoder, codes["vae"][test]))
    mean, metrics = dict(recon), {}
    for row in tqdm(("untrained", ""), "evaluate: images", unit="model"):
        model, z, dot = models[row], codes[row][test], f".{row}" if row else ""
        x_T = encode_noise(model, x0, z)
        recon[row] = M.to_image(decode(model, x_T, z))
        draws = [M.to_image(decode(model, x, z)) for x in noise]
        mean[row] = np.mean(draws, 0)
        of_another = M.to_image(decode(model, noise[0], z[M.other_subject(who)]))
        gain = M.ssim(real, draws[0]) - M.ssim(real, of_another)
        metrics["semantic_gain" + dot] = M.row_of(np.mean, who, gain)
        sd_error = (x_T.std((1, 2, 3)) - 1).abs()           # noise has an SD of 1; alone that is no proof
        metrics["x_T_sd_error" + dot] = M.row_of(np.mean, who, sd_error, better="lower")
    metrics |= M.image_numbers("recon", recon, real, who) | M.image_numbers("semantic_mean", mean, real, who)
    gain = M.ssim(real, mean[""]) - M.ssim(real, mean["vae"])
    metrics["semantic_mean_gain.vae"] = M.row_of(np.mean, who, gain)

    # Patients against controls: how far a score lies below that of healthy people of the same age.
    age, ill = data.columns["age"].astype(np.float64), data.columns[cfg.target] > 0
    reference, tested = np.flatnonzero(part == "val"), np.flatnonzero(part == "test")
    patients = tested[ill[tested]]
    scores, left_out, usual = all_scores(cfg, data, part, models, codes, loader)
    M.save_codes(out / "codes.csv", data, part, codes[""].cpu())
    columns = {"age": age, "ill": ill, **{row or cfg.score: score for row, score in scores.items()}}
    M.save_scores(out / "scores.csv", data, part, columns)
    # All that --apply needs of the healthy reference. Their images are not among it.
    of_healthy = {"z": codes[""][reference].double().cpu().numpy(), "age": age[reference], "usual": usual,
                  "deviation": (left_out[reference] ** 2).mean((1, 2)), "subject": data.subject[reference]}
    M.save_arrays(out / "reference.npz", of_healthy)
    for row, score in scores.items():
        dot, below = f".{row}" if row else "", age_mean(score, age, reference)(age) - score
        people = M.per_subject(data.subject[tested], below[tested], ill[tested])
        metrics["auroc" + dot] = M.row_of(M.auroc, *people)
        if "planted" in scores:
            people = M.per_subject(data.subject[patients], below[patients], -scores["planted"][patients])
            metrics["severity_r" + dot] = M.row_of(M.spearman, *people)

    # Survival: one line per patient, the mean over the patient's images.
    _, first, index = np.unique(data.subject[patients], return_index=True, return_inverse=True)
    if {"time", "event"} <= set(data.columns):
        known = ~np.isnan(data.columns["time"][patients][first])
        of_patient = lambda x: (np.bincount(index, x[patients]) / np.bincount(index))[known]
        sex = data.columns.get("sex", np.full(len(data), ""))[patients][first][known]
        survival = of_patient(data.columns["time"]), of_patient(data.columns["event"])
        metrics |= M.survival_numbers({row: of_patient(x) for row, x in scores.items()}, *survival,
                                      of_patient(age), sex, cfg.seed)
        M.survival_curves(out / "survival.png", *survival, of_patient(scores[""]),
                          f"Patients above and below the median score ({cfg.score}).")

    # The healthy twin: z_sem moved to the healthy mean at this age, x_T kept.
    typical = age_mean(codes[""].double().cpu().numpy(), age, reference)
    healthy_z = lambda ages: torch.as_tensor(typical(ages), dtype=torch.float32, device=device)
    twin = M.to_image(decode(model, x_T, healthy_z(age[test])))
    names, lesion = list(data.attrs.get("mask_names", [])), np.zeros(real.shape, bool)
    if data.mask is not None and "lesion" in names and not ill[test].all():
        mask, lesion = data.mask[test], data.mask[test] == names.index("lesion")
        lesion &= ((mask > 0) & ~lesion).any((1, 2), keepdims=True)     # no brain in the mask: none
        found = ill[test] & lesion.any((1, 2))
        # Ours is the healthy twin. The others have none: it is what their own code of the patient draws.
        for row, images in (mean | {"": twin}).items() if found.any() else ():
            gain = lesion_gain(real - images, lesion, mask > 0, age[test], ill[test])
            metrics["lesion_gain" + (f".{row}" if row else "")] = M.row_of(np.mean, who[found], gain)

    # Pictures
    few = np.flatnonzero(ill[test])
    few = few[scores[""][test[few]].argsort()[:8]]
    rows = {"patient": real, "z_sem + x_T": recon[""], "healthy twin": twin,
            "patient - twin: red brighter, blue darker": signed((real - twin) / 0.3),
            "what z_sem leaves out, in healthy SDs": signed(left_out[test] / 6)}
    if lesion.any():
        rows["lesion"] = lesion
    if len(few):
        M.grid(out / "twins.png", [images[few] for images in rows.values()], list(rows),
               [f"{age[test[k]]:.0f} y, {scores[''][test[k]]:.2f}" for k in few],
               "Patients with the lowest scores. Twin: the same x_T, and z_sem of healthy people this old.")
    ages = np.linspace(age[reference].min(), age[reference].max(), 8).clip(age[train].min(), age[train].max())
    near = train[abs(age[train] - ages[:, None]).argmin(1)]
    control = ill[test].argmin()        # the first, if there is one
    path = M.to_image(decode(model, x_T[[control] * 8], healthy_z(ages)))
    M.grid(out / "trajectory.png", [path, data.image[near] / 255], ["healthy mean z_sem", "a training image"],
           [f"{a:.0f} years" for a in ages], "The healthy brain at the ages of training, from one x_T.")
    groups = {"training": part == "train", "reference": part == "val", "controls": (part == "test") & ~ill,
              "patients": (part == "test") & ill}
    M.scatter(out / "age.png", age, scores[""], groups, "age (years)", f"score ({cfg.score})",
              "The score, higher is healthier, against age.")
    M.curves(out / "curves.png", {"diffusion": out / "log.jsonl", "VAE": out / "log_vae.jsonl"})
    return metrics


def signed(x):
    """(n,H,W) in -1..1 -> (n,H,W,3): black at 0, red above, blue below."""
    return np.stack([x.clip(0, 1), 0.4 * abs(x).clip(0, 1), (-x).clip(0, 1)], -1)


# --------------------------------------------------------------------------------------------------------
# Using a trained model

def load(out, name="ckpt", device=""):
    """A network that a run has trained in the folder `out`, ready to use. -> (network, Config)

    name: ckpt, the diffusion autoencoder; ckpt_vae, the VAE. device: "" is the first of cuda, mps, cpu that
    is there. A file that is damaged or of another network exits 2."""
    return D.trained(Path(out, f"{name}.pt"), Config, VAE if name == "ckpt_vae" else Model, device)


def apply(out, path, device):
    """Scores of the people in `path` by the model in the folder `out`, beside healthy people.

    Nothing is trained, and nothing is written but OUT/apply/NAME/: codes.csv; scores.csv, each score and its
    percentile (low: ill); twins.h5 and .png, healthy twins and the differences from them; results.json."""
    began, (model, cfg) = time.perf_counter(), load(out, device=device)
    M.check_evaluated(out)
    data, folder = D.load(path, cfg.size), Path(out, "apply", Path(path).stem)
    healthy = M.read_arrays(Path(out, "reference.npz"), ("z", "age", "usual", "deviation", "subject"))
    age = D.numbers(data, "age")
    folder.mkdir(parents=True, exist_ok=True)
    loader, part = D.Loader({"image": data.image, "age": age}, cfg.device), M.known_part(out, data.subject)
    real, n, g = data.image[np.arange(len(data))] / 255, len(healthy["age"]), torch.Generator(cfg.device)
    z = semantic_codes(model, loader)
    M.save_codes(folder / "codes.csv", data, part, z)

    # The reference comes first, the people in question after it: one scale for both. (`usual` is of this very
    # reference: where that has few people, the residuals of new healthy ones look a little worse.)
    left_out = (real - image_of_code(model, z, g.manual_seed(cfg.seed))) / healthy["usual"]
    deviation = np.concatenate([healthy["deviation"], (left_out ** 2).mean((1, 2))])
    ages = np.concatenate([healthy["age"], age])
    everyone, rows = np.concatenate([healthy["z"], z.double().cpu()]), np.arange(n)
    columns, metrics, ill = {"age": age}, {}, data.columns.get(cfg.target, np.full(len(data), np.nan))
    known = ~np.isnan(ill) & ~np.isin(part, ["train", "val"])       # numbers: of those it has not seen
    held_out = reference_scores(healthy["z"], healthy["deviation"], healthy["age"], healthy["subject"])
    for kind, score in five_scores(everyone, deviation, ages, rows).items():
        score[:n] = held_out[kind]
        below = age_mean(score, ages, rows)(ages) - score       # what the age does not tell
        columns[kind] = score[n:]
        columns[f"{kind}_percentile"] = 100 * (below[:n] > below[n:, None]).mean(1)
        if known.any():
            people = M.per_subject(data.subject[known], below[n:][known], ill[known])
            metrics[f"auroc.{kind}"] = M.row_of(M.auroc, *people)
    M.save_scores(folder / "scores.csv", data, part, columns)

    typical, twins = age_mean(healthy["z"], healthy["age"], rows), []
    for some in tqdm(np.array_split(np.arange(len(data)), len(data) // 64 + 1), "twins", unit="batch"):
        x_T = encode_noise(model, loader.batch(some)["image"], z[some])
        healthy_z = torch.as_tensor(typical(age[some]), dtype=torch.float32, device=cfg.device)
        twins.append(M.to_image(decode(model, x_T, healthy_z)))
    twins, few = np.concatenate(twins), columns[f"{cfg.score}_percentile"].argsort()[:8]
    D.write(folder / "twins.h5", [dict(image=D.to_uint8(255 * twins), subject=data.subject, age=age,
                                       difference=(real - twins).astype(np.float32))],
            dict(source=f"healthy twins of {path} by the model in {out}"))
    rows = {"image": real, "healthy twin": twins, "image - twin": signed((real - twins) / 0.3),
            "what z_sem leaves out, in healthy SDs": signed(left_out / 6)}
    M.grid(folder / "twins.png", [images[few] for images in rows.values()], list(rows),
           [f"{data.subject[k]}, {columns[f'{cfg.score}_percentile'][k]:.0f} %" for k in few],
           f"The lowest percentiles of {cfg.score} among healthy people, age taken off.")
    M.save_applied(folder, "normative", data, part, cfg, metrics, {"auroc": SHOWN["auroc"]}, KINDS,
                   time.perf_counter() - began)


# --------------------------------------------------------------------------------------------------------
# The command

# The table that ends a run: the numbers that answer the question, and the rows beside them.
SHOWN = {"hr_per_sd": "hazard ratio per SD", "c_index": "C-index with age and sex",
         "logrank_p": "log-rank p, halves", "ks_p": "KS p (ignores censoring)",
         "auroc": "AUROC, patients against controls", "severity_r": "correlation with severity",
         "lesion_gain": "AUROC of the lesion in |image - twin| (others: - their drawing), minus a control's",
         "recon_ssim": "z_sem + x_T, SSIM", "semantic_mean_ssim": "z_sem alone (mean), SSIM"}
KINDS = {"residual": "residual", "cosine": "cosine", "age_matched": "cosine at this age",
         "l2": "distance at this age", "mahalanobis": "Mahalanobis"}
ROWS = {"": "ours, primary score", **{kind: f"* {words}" for kind, words in KINDS.items()},
        "untrained": "untrained, the same", "untrained_mahalanobis": "untrained, Mahalanobis",
        "vae": "VAE, the same", "vae_error": "VAE, image error", "vae_deviation": "VAE, latent deviation",
        "pca": "PCA, the same", "pca_residual": "PCA, residual", "pca_cosine": "PCA, cosine",
        "pca_mahalanobis": "PCA, Mahalanobis", "brain_age_gap": "brain-age gap", "age_sex": "age and sex",
        "planted": "planted severity", "constant": "mean training image"}


def main(argv):
    began = time.perf_counter()
    cfg, device = D.start(Config, PRESETS, RECIPES, __doc__, argv)
    if cfg.apply:
        return apply(cfg.out, cfg.apply, cfg.device)
    out, (rank, _) = Path(cfg.out), D.ranks()
    try:        # settings that do not fit each other are an error before anything is read or written
        times(cfg.S, cfg.T, cfg.stride)
        with torch.device("meta"):
            model, vae, t = Model(cfg), VAE(cfg), torch.zeros(2, dtype=torch.long)
            x0 = torch.empty(2, 1, cfg.size, cfg.size)
            batch = {"image": x0, "age": torch.empty(2)}
            images = model.unet(x0, t, model.encode(batch)), vae.decoder(vae.encode(batch))
        if cfg.size < 11 or any(x.shape != x0.shape for x in images):
            raise ValueError(f"--size {cfg.size} is below 11 (SSIM) or cannot be halved once per level")
    except (ValueError, RuntimeError, OverflowError) as e:
        D.fail(f"--size {cfg.size}, --mult, --enc_mult, --groups, --S: do not fit each other ({e})")
    held = M.lock(out) if rank == 0 else None           # until the process ends
    path = D.phantom_path(cfg, "cohort.h5", D.phantom_cohort)
    data, part = D.load_study(path, cfg.test, cfg.size, cfg.seed, (0.6, 0.2, 0.2), cfg.fold)
    part = D.cohort(data, part, cfg.target, bool(cfg.test))
    count, facts = D.describe(data, part)
    count["patients"] = len(np.unique(data.subject[(part == "test") & (data.columns[cfg.target] > 0)]))
    if rank == 0:
        M.warn_if_edited(cfg, __file__)
        if cfg.init:
            M.check_init(cfg.init, ["ckpt", "ckpt_vae"], data.subject[part == "test"])
        print(f"normative: preset {cfg.preset}, recipe {cfg.recipe}, {device}, torch {torch.__version__}\n"
              f"data: {data.path} at {cfg.size}x{cfg.size}; subjects: {D.in_words(count)}\n"
              f"trains the autoencoder and the VAE, {cfg.steps} steps each; evaluates\n"
              f"out: {out}; stop at any time, the same command goes on", flush=True)

    arrays = {"image": data.image, "age": data.columns["age"]}
    rows = [np.flatnonzero(part == "train"), M.evenly(np.flatnonzero(part == "val"), 6)]     # six to look at
    images, val_images = (D.Loader(arrays, device, r) for r in rows)
    watch = preview(cfg, val_images) if len(val_images) else None
    torch.manual_seed(D.mix(cfg.seed, 0))
    model, vae = Model(cfg), VAE(cfg)
    models = {"untrained": copy.deepcopy(model).to(device).eval()}      # what random features already give
    models[""], reached = fit(model, images, cfg, "ckpt", cfg.steps, facts, watch)
    models["vae"], _ = fit(vae, images, cfg, "ckpt_vae", reached, facts)
    if D.leave():       # the rest is the work of one process
        return
    metrics = evaluate(cfg, data, part, models, device)
    seconds, config = time.perf_counter() - began, dataclasses.asdict(cfg) | {"steps": reached}
    M.save_results(out / "results.json", "normative", data.path, count, seconds, config, metrics, device)
    rows = {row: words for row, words in ROWS.items() if not row.endswith(cfg.score)}  # shown as "" or CODE
    print(M.table(metrics, SHOWN, rows))
    if "c_index" in metrics:
        print(f"The primary score is {cfg.score}: name it before you see results. * is exploratory: of many "
              "scores one looks good by chance.")
        if "hr_per_sd" in data.attrs:
            print(f"Planted hazard ratio per SD of health: {1 / data.attrs['hr_per_sd']:.2f}.")
        print(M.answer("Does the primary score add to age and sex in foretelling survival?", "C-index",
                       metrics["c_index"], metrics["c_index.age_sex"], metrics["c_index_gain.age_sex"]))
    else:
        print("no survival analysis: the data have no columns time and event")
    print(f"{seconds:.0f} s. Numbers: {out}/results.json. Pictures: {out}/*.png")


if __name__ == "__main__":
    D.program(main)
