"""Latent diffusion autoencoder (LDAE) on 3D brain MR.

Stage A: an autoencoder compresses a volume to a small latent. Stage B: a diffusion model learns how latents
of brains look, and is then frozen. Stage C: an encoder reads a semantic code z_sem from the volume, without
any label, and a second decoder steers the frozen diffusion model by z_sem.
Question: does z_sem, learned without labels, tell Alzheimer's disease and age?

    A  x (B,1,D,H,W) --Encoder3d--> z0 (B,c,D/f,H/f,W/f) --Decoder3d--> x
    B  z_t, t --Down3d--> skips --Up3d--> v_theta, or eps_theta       (unconditional, then frozen)
    C  x --SemanticEncoder--> z_sem (B,d) -------------------------------> probes, edits, prior
       z_t, t --frozen Down3d--> skips --Up3d(skips, z_sem)--> G
       eps_hat of v_theta + G (paper: eps_theta - sqrt(1 - alpha_bar_t) G): DDIM up gives z_T, down z0

Lozupone et al., Latent Diffusion Autoencoders, 2025 (arXiv 2504.08635). Stage C is PDAE (Zhang et al. 2022,
arXiv 2212.12990).

    python ldae.py                     # phantom brains, 6 minutes on one CPU core
    python ldae.py --data brains.h5    # your volumes; on a GPU the default is the paper's networks
    python ldae.py --apply new.h5      # codes, predictions, reconstructions by the trained model

Latents are never clipped: they are standardised, and clipping a normal of SD 1 to [-1,1] costs an MSE of .15.
`--recipe paper` trains as published, but for these: the adversarial loss warms up, and LPIPS is left out (it
needs a download). The encoder has the widths of ConvNeXt, but DiffAE's blocks and no ImageNet weights. All
three axes are halved. A posterior's SD starts at .02. lr is 1e-4. Latents are standardised by channel. The
prior predicts v. DDIM ends at level -1, PDAE's at 0.
`--recipe ours`, the default, differs:
- gan 0.0025: at the paper's 0.025 a short stage A learns to please the discriminator first;
- predict v, t_power 0.25: at high noise z_t is nearly eps, so a loss of eps asks little of z_sem, and only
  there must z_sem decide;
- spatial: brains are registered, so a place means something. Stage A and the encoder see the difference from
  the mean brain. Beside the network of stage A, each place has a linear code of its own. Latents lose the
  mean of their place. The encoder flattens its feature maps where the paper averages them, and adds a linear
  code. A linear layer turns z_sem into a latent that is added to G.
"""
import copy, dataclasses, functools, hashlib, itertools, math, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
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
    data: str = ""            # HDF5 file, or a folder of one file per subject; empty: phantom brains
    test: str = ""            # second file: all of it is tested; none of --data is
    fold: str = ""            # 0/5 .. 4/5: test on this fifth of the subjects, train on the others
    out: str = "out/ldae"     # everything the run leaves; the same command again goes on from there
    init: str = ""            # folder of another run: start from its weights (fine-tuning)
    apply: str = ""           # file: no training; the model in --out reads it, into OUT/apply/NAME/
    preset: str = ""          # demo (laptop) or paper (one GPU); empty: paper on CUDA, demo elsewhere
    recipe: str = "ours"      # ours or paper (as published): see the top of this file
    device: str = ""          # cuda, mps, cpu; empty: the first of these that is there
    seed: int = 0             # of the split, the weights, the order of the data and every draw
    target: str = ""          # column that the probe predicts, beside age; empty: label
    # volumes, and the autoencoder of stage A
    size: tuple = (128, 160, 128)         # D, H, W of phantoms: D, 5/4 D cut to a multiple of 8, D
    patch: int = 1            # the first convolution takes steps of so many voxels: 4 is quick, but coarse
    ae_base: int = 64         # channels of the first level
    ae_mult: tuple = (1, 2, 2, 2)         # channels per level, in units of ae_base; sides are halved between
    z_ch: int = 3             # channels of the latent
    disc_base: int = 64       # discriminator: channels of the first layer
    gan: float = 0.0025       # weight of the adversarial loss; paper: 0.025
    # stages B and C; blocks, groups and spatial also stage A
    base: int = 256           # channels of the first level
    mult: tuple = (1, 2, 3)   # channels per level, in units of base
    blocks: int = 2           # residual blocks per level (one more on the way up of B and C)
    groups: int = 32          # of GroupNorm; 0: one per 16 channels (faster on a CPU)
    enc_base: int = 96        # semantic encoder: channels of the first level
    enc_mult: tuple = (1, 2, 4, 8)        # .. and per level, in units of enc_base
    z_dim: int = 768          # numbers in z_sem
    spatial: bool = True      # every stage makes use of places; paper: false
    # objective
    predict: Literal["v", "eps"] = "v"    # what B and C output; paper: eps, with PDAE's weights
    t_power: float = 0.25     # times are drawn as T u^t_power: 0.25 favours high noise; paper: 1, uniform
    T: int = 1000             # diffusion steps, linear beta
    # training
    ae_steps: int = 20000     # optimizer steps of stage A
    ldm_steps: int = 20000    # .. of stage B
    steps: int = 20000        # .. of stage C and of the prior; raise it and run again to train longer
    ae_batch: int = 2         # volumes per step of stage A, over all processes (about 23 GB each)
    batch: int = 32           # .. of stages B and C
    lr: float = 1e-4          # Adam; constant after 100 steps of warm-up
    ema: float = 0.999        # decay of the averaged weights; the averaged weights are evaluated
    minutes: float = 0.0      # at most so many minutes for each network; 0: no limit. Steps: in results.json
    save_every: int = 500     # steps between checkpoints
    # evaluation
    S: int = 20               # DDIM steps, both ways
    eval_images: int = 40     # at most this many test volumes are reconstructed, and missing scans per gap


PRESETS = {
    "paper": {},
    "demo": dict(size=(48, 56, 48), patch=4, ae_base=32, ae_mult=(1,), z_ch=4, disc_base=8, base=16,
                 mult=(1, 2), blocks=1, groups=0, enc_base=32, enc_mult=(1, 2), z_dim=128, ae_steps=600,
                 ldm_steps=150, steps=600, batch=8, lr=2e-3, save_every=100, S=10, eval_images=12),
}
RECIPES = {
    "ours": {},
    "paper": dict(predict="eps", t_power=1.0, spatial=False, gan=0.025),
}
# A run may go on in the same folder with other values of these. All other settings need another --out.
MAY_CHANGE = {"data", "test", "out", "apply", "preset", "device", "target", "steps", "save_every",
              "S", "eval_images"}
# AFTER_A: the fields that stage A does not read. AFTER_B: those that stage B does not read either. ckpt_A.pt
# and ckpt_B.pt hold the defaults of these, so that copies of them serve a run with another semantic encoder.
AFTER_B = ("enc_base", "enc_mult", "z_dim")
AFTER_A = (*AFTER_B, "recipe", "base", "mult", "predict", "t_power", "T", "ldm_steps")


# --------------------------------------------------------------------------------------------------------
# Schedule and forward process. Level t in 0..T-1 is noisy, -1 is clean (alpha_bar = 1), T is pure noise (0).

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


def snr_weight(alpha_bar):
    """PDAE's loss weight SNR^0.1 / (1 + SNR), SNR = alpha_bar / (1 - alpha_bar). It is .0003 at t = 0,
    .72 at 475 and .36 at 999. -> (T,)"""
    return (1 - alpha_bar) * (alpha_bar / (1 - alpha_bar)) ** 0.1


def shift_training(alpha_bar):
    """PDAE's coefficient of G in training: the mean of p(x_{t-1}|x_t) shifts by G times the variance of
    q(x_{t-1}|x_t,x_0).

    s_t = -sqrt(alpha_t) (1 - alpha_bar_{t-1}) / sqrt(1 - alpha_bar_t), with
    alpha_t = alpha_bar_t / alpha_bar_{t-1}. Sampling uses -sqrt(1 - alpha_bar_t): s_t over that is 0 at
    t = 0, and nearly 1 at large t. -> (T,)"""
    before = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
    return -(alpha_bar / before).sqrt() * (1 - before) / (1 - alpha_bar).sqrt()


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


def resample3d(x, how):
    """Halve ("down", 2x2x2 mean; an odd side is rounded up) or double ("up") all sides of (B,C,D,H,W).

    All three axes: the original's 3D code halves the last two only. Doubling copies, as in resample."""
    if how == "down":
        return F.avg_pool3d(x, 2, ceil_mode=True, count_include_pad=False)
    if how == "up":
        B, C, d, h, w = x.shape
        x = x.view(B, C, d, 1, h, 1, w, 1).expand(B, C, d, 2, h, 2, w, 2)
        return x.reshape(B, C, 2 * d, 2 * h, 2 * w)
    return x


def pad(x, unit, value):
    """`value` behind the end of each side, up to a multiple of unit. (B,C,*S) -> (B,C,*S')"""
    missing = [n for s in reversed(x.shape[2:]) for n in (0, -s % unit)]    # F.pad begins with the last axis
    return F.pad(x, missing, value=value)


class Attention3d(nn.Module):
    """Self-attention over all voxels, one head, residual, projection zero at first. (B,C,D,H,W) -> same

    It takes emb and c, as ResBlock3d does, and ignores both."""
    def __init__(self, ch, groups):
        super().__init__()
        self.norm = norm(ch, groups)
        self.qkv = nn.Conv3d(ch, 3 * ch, 1)
        self.proj = zero(nn.Conv3d(ch, ch, 1))

    def forward(self, x, emb, c):
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)  # (B,1,D*H*W,C)
        h = F.scaled_dot_product_attention(q, k, v)
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


class ConvBlock3d(nn.Module):
    """The autoencoder's block: twice norm, SiLU, conv, plus skip. (B,ch_in,D,H,W) -> (B,ch_out,D,H,W)"""
    def __init__(self, ch_in, ch_out, groups):
        super().__init__()
        self.norm1, self.conv1 = norm(ch_in, groups), nn.Conv3d(ch_in, ch_out, 3, padding=1)
        self.norm2, self.conv2 = norm(ch_out, groups), nn.Conv3d(ch_out, ch_out, 3, padding=1)
        self.skip = nn.Conv3d(ch_in, ch_out, 1) if ch_in != ch_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class PatchCode(nn.Module):
    """A linear code: ch numbers for each patch of f^3 voxels, and back. (B,1,D,H,W) <-> (B,ch,D/f,H/f,W/f)

    Brains are registered, so each place has weights of its own. They start alike."""
    def __init__(self, ch, f, places):
        super().__init__()
        self.f, start = f, torch.randn(f ** 3, ch) / f ** 1.5
        self.down = nn.Parameter(start.repeat(places, 1, 1))
        self.up = nn.Parameter(start.T.repeat(places, 1, 1))

    def encode(self, x):
        f, (d, h, w) = self.f, (s // self.f for s in x.shape[2:])
        x = x.view(-1, d, f, h, f, w, f).permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, d * h * w, 1, f ** 3)
        return (x @ self.down).squeeze(2).transpose(1, 2).view(len(x), -1, d, h, w).float()

    def decode(self, z):
        f, (d, h, w) = self.f, z.shape[2:]
        x = z.flatten(2).transpose(1, 2).unsqueeze(2) @ self.up                 # (B,places,1,f^3)
        x = x.view(-1, d, h, w, f, f, f).permute(0, 1, 4, 2, 5, 3, 6)
        return x.reshape(-1, 1, d * f, h * f, w * f).float()


class Encoder3d(nn.Module):
    """The autoencoder's way down. x (B,1,D,H,W) -> mean, log variance (B,z_ch,D/f,H/f,W/f)

    f = patch 2^(levels - 1) must divide the sides."""
    def __init__(self, cfg):
        super().__init__()
        c, p = cfg.ae_base, cfg.patch
        layers = [nn.Conv3d(1, c, p + 2, stride=p, padding=1)]
        for i, m in enumerate(cfg.ae_mult):
            for _ in range(cfg.blocks):
                layers.append(ConvBlock3d(c, m * cfg.ae_base, cfg.groups))
                c = m * cfg.ae_base
            if i < len(cfg.ae_mult) - 1:
                layers.append(nn.Conv3d(c, c, 3, stride=2, padding=1))
        layers += [norm(c, cfg.groups), nn.SiLU(), nn.Conv3d(c, cfg.z_ch, 3, padding=1)]
        self.trunk = nn.Sequential(*layers)
        self.mean, self.logvar = nn.Conv3d(cfg.z_ch, cfg.z_ch, 1), nn.Conv3d(cfg.z_ch, cfg.z_ch, 1)
        nn.init.constant_(self.logvar.bias, -8)     # SD .02: at SD 1 short runs only fight the noise

    def forward(self, x):
        h = self.trunk(x)
        return self.mean(h).float(), self.logvar(h).float().clamp(-30, 20)


class Double3d(nn.Module):
    """Twice the side, then a convolution. (B,C,D,H,W) -> (B,C,2D,2H,2W)"""
    def __init__(self, ch):
        super().__init__()
        self.conv = nn.Conv3d(ch, ch, 3, padding=1)

    def forward(self, x):
        return self.conv(resample3d(x, "up"))


class Decoder3d(nn.Module):
    """The autoencoder's way up, Encoder3d mirrored. z (B,z_ch,d,h,w) -> (B,1,d f,h f,w f) float32"""
    def __init__(self, cfg):
        super().__init__()
        c, p = cfg.ae_mult[-1] * cfg.ae_base, cfg.patch
        layers = [nn.Conv3d(cfg.z_ch, cfg.z_ch, 1), nn.Conv3d(cfg.z_ch, c, 3, padding=1)]
        for i, m in reversed(list(enumerate(cfg.ae_mult))):
            for _ in range(cfg.blocks):
                layers.append(ConvBlock3d(c, m * cfg.ae_base, cfg.groups))
                c = m * cfg.ae_base
            if i > 0:
                layers.append(Double3d(c))
        layers += [norm(c, cfg.groups), nn.SiLU(), nn.ConvTranspose3d(c, 1, p + 2, stride=p, padding=1)]
        self.trunk = nn.Sequential(*layers)

    def forward(self, z):
        return self.trunk(z).float()


class Discriminator3d(nn.Module):
    """Says for each patch of a volume whether it is real (1) or not (0). (B,1,D,H,W) -> (B,1,d,h,w) float32

    PatchGAN in 3D (Isola et al. 2017) for sides from 24 on. GroupNorm, so that no volume sees its batch."""
    def __init__(self, base, groups):
        super().__init__()
        step = lambda c, stride: [nn.Conv3d(c, 2 * c, 4, stride=stride, padding=1, bias=False),
                                  norm(2 * c, groups), nn.LeakyReLU(0.2)]
        self.trunk = nn.Sequential(nn.Conv3d(1, base, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
                                   *step(base, 2), *step(2 * base, 2))
        self.head = nn.Sequential(*step(4 * base, 1), nn.Conv3d(8 * base, 1, 4, padding=1))

    def forward(self, x):
        h = self.trunk(x).float()
        # oneDNN (torch 2.13) makes infinite bfloat16 gradients of 4x4x4 kernels on maps of 3 voxels.
        with torch.autocast(x.device.type, enabled=False):
            return self.head(h)


class SemanticEncoder(nn.Module):
    """2.5D: a 2D network on each axial slice, then attention over the slices. (B,1,D,H,W) -> (B,z_dim)

    spatial: one linear layer reads the maps of a slice, another one the tokens of all slices. A linear code
    of the volume at a quarter of its resolution is added. Where shapes of phantoms differ threefold, that
    code reads more than the network. Otherwise (paper) a token is the mean of the maps, and a query, a
    weighted mean of the tokens, attends to them."""
    def __init__(self, cfg):
        super().__init__()
        n, *sides = cfg.size
        self.spatial, c = cfg.spatial, cfg.enc_base
        layers = [nn.Conv2d(16, c, 3, padding=1)]        # 4x4 pixels are channels, as in ConvNeXt
        sides = [-(-s // 4) for s in sides]
        for m in cfg.enc_mult:
            layers.append(EncoderBlock(c, m * cfg.enc_base, cfg.groups))
            c = m * cfg.enc_base
            layers.append(EncoderBlock(c, c, cfg.groups, "down"))
            sides = [s // 2 for s in sides]
        self.trunk = nn.Sequential(*layers, EncoderBlock(c, c, cfg.groups), norm(c, cfg.groups), nn.SiLU())
        self.trunk.to(memory_format=torch.channels_last)
        d = 64 if cfg.spatial else cfg.z_dim
        self.token = nn.Linear(c * math.prod(sides) if cfg.spatial else c, d)
        self.register_buffer("place", time_embedding(torch.arange(n), d), persistent=False)
        self.dropout = nn.Dropout(0.1)
        self.score = None if cfg.spatial else nn.Linear(d, 1)
        self.attend = nn.MultiheadAttention(d, 8, batch_first=True)
        self.norm = nn.LayerNorm(d)
        self.out = nn.Linear(n * d, cfg.z_dim) if cfg.spatial else None
        self.linear = nn.Linear(math.prod(s // 4 for s in cfg.size), cfg.z_dim) if cfg.spatial else None

    def forward(self, x):
        B, _, n, H, W = x.shape
        background = 0.0 if self.spatial else -1.0      # spatial: x is the difference from the mean brain
        slices = pad(x.reshape(B * n, 1, H, W), 4, background).contiguous(memory_format=torch.channels_last)
        h = self.trunk(F.pixel_unshuffle(slices, 4))
        h = self.token(h.flatten(1) if self.spatial else h.mean((2, 3)))
        h = self.dropout(h.view(B, n, -1) + self.place)                                        # (B,n,d)
        if self.spatial:
            q = self.norm(h)
            h = self.out((h + self.attend(q, q, q, need_weights=False)[0]).flatten(1))
            return (h + self.linear(F.avg_pool3d(x, 4).flatten(1))).float()
        query = (self.score(h).softmax(1) * h).sum(1, keepdim=True)
        return self.norm(self.attend(query, h, h, need_weights=False)[0].squeeze(1)).float()


class ResBlock3d(nn.Module):
    """UNet block: x (1 + scale) + shift from t, then again from c (PDAE); c_dim 0: from t only.

    x (B,C,D,H,W), emb (B,4*base), c (B,c_dim) -> (B,ch_out,D',H',W'). The second conv starts at zero."""
    def __init__(self, ch_in, ch_out, cfg, c_dim, how=""):
        super().__init__()
        self.norm1, self.how = norm(ch_in, cfg.groups), how
        self.conv1 = nn.Conv3d(ch_in, ch_out, 3, padding=1)
        self.t_proj = nn.Linear(4 * cfg.base, 2 * ch_out)
        self.z_proj = nn.Linear(c_dim, 2 * ch_out) if c_dim else None
        self.norm2, self.dropout = norm(ch_out, cfg.groups), nn.Dropout(0.1)
        self.conv2 = zero(nn.Conv3d(ch_out, ch_out, 3, padding=1))
        self.skip = nn.Conv3d(ch_in, ch_out, 1) if ch_in != ch_out else nn.Identity()

    def forward(self, x, emb, c):
        h = self.conv1(resample3d(F.silu(self.norm1(x)), self.how))
        scale, shift = self.t_proj(F.silu(emb))[..., None, None, None].chunk(2, 1)
        scale = 1 + scale
        if self.z_proj is not None:
            c_scale, c_shift = self.z_proj(F.silu(c))[..., None, None, None].chunk(2, 1)
            scale, shift = scale * (1 + c_scale), shift * (1 + c_scale) + c_shift    # one after the other
        h = self.conv2(self.dropout(F.silu(self.norm2(h) * scale + shift)))
        return self.skip(resample3d(x, self.how)) + h


class Down3d(nn.Module):
    """First half of a UNet. x_t (B,ch,D,H,W), t (B,) -> embedding of t, skips (the last is the bottom)

    The two deepest levels have self-attention, but never the first one."""
    def __init__(self, cfg, ch):
        super().__init__()
        self.base, c = cfg.base, cfg.base
        self.time = nn.Sequential(nn.Linear(c, 4 * c), nn.SiLU(), nn.Linear(4 * c, 4 * c))
        self.conv_in = nn.Conv3d(ch, c, 3, padding=1)
        self.steps = nn.ModuleList()      # each entry: a list of layers whose output is a skip
        for i, m in enumerate(cfg.mult):
            for _ in range(cfg.blocks):
                layers = [ResBlock3d(c, m * cfg.base, cfg, 0)]
                c = m * cfg.base
                if i >= max(1, len(cfg.mult) - 2):
                    layers.append(Attention3d(c, cfg.groups))
                self.steps.append(nn.ModuleList(layers))
            if i < len(cfg.mult) - 1:
                self.steps.append(nn.ModuleList([ResBlock3d(c, c, cfg, 0, "down")]))

    def forward(self, x_t, t):
        emb = self.time(time_embedding(t, self.base))
        skips = [self.conv_in(x_t)]
        for layers in self.steps:
            h = skips[-1]
            for layer in layers:
                h = layer(h, emb, None)
            skips.append(h)
        return emb, skips


class Up3d(nn.Module):
    """Second half of a UNet, on the skips of Down3d: middle, way up, output. PDAE's gradient decoder is one.

    emb (B,4*base), skips of Down3d, c (B,c_dim) of z_sem -> (B,ch,D,H,W) float32, zero at initialisation"""
    def __init__(self, cfg, ch, c_dim):
        super().__init__()
        c, skip_ch = cfg.mult[-1] * cfg.base, [cfg.base]        # channels of Down3d's skips, in their order
        for i, m in enumerate(cfg.mult):
            skip_ch += [m * cfg.base] * (cfg.blocks + (i < len(cfg.mult) - 1))
        self.middle = nn.ModuleList([ResBlock3d(c, c, cfg, c_dim), Attention3d(c, cfg.groups),
                                     ResBlock3d(c, c, cfg, c_dim)])
        self.steps = nn.ModuleList()      # each entry: takes one skip
        for i, m in reversed(list(enumerate(cfg.mult))):
            for j in range(cfg.blocks + 1):
                layers = [ResBlock3d(c + skip_ch.pop(), m * cfg.base, cfg, c_dim)]
                c = m * cfg.base
                if i >= max(1, len(cfg.mult) - 2):
                    layers.append(Attention3d(c, cfg.groups))
                if i > 0 and j == cfg.blocks:
                    layers.append(ResBlock3d(c, c, cfg, c_dim, "up"))
                self.steps.append(nn.ModuleList(layers))
        self.norm_out = norm(c, cfg.groups)
        self.conv_out = zero(nn.Conv3d(c, ch, 3, padding=1))

    def forward(self, emb, skips, c=None):
        h = skips[-1]
        for layer in self.middle:
            h = layer(h, emb, c)
        for layers, skip in zip(self.steps, skips[::-1]):
            D, H, W = skip.shape[2:]
            h = torch.cat([h[:, :, :D, :H, :W], skip], 1)      # an odd side was rounded up on the way down
            for layer in layers:
                h = layer(h, emb, c)
        return self.conv_out(F.silu(self.norm_out(h))).float()


class Prior(nn.Module):
    """A diffusion model of z_sem, for new codes: an MLP whose every layer sees z_t again (DiffAE app. A).

    codes (N,d): of the training images; inside, they are standardised. forward is the training loss, L1 at
    constant beta = 0.008. It predicts v, not eps as published: an error of eps at pure noise is an error of
    the code 55 times as large, and drawn codes were far from all real ones."""
    def __init__(self, T, codes):
        super().__init__()
        d, width, layers = codes.shape[1], 4 * codes.shape[1], 10
        self.register_buffer("mean", codes.mean(0))
        self.register_buffer("sd", codes.std(0).clamp(min=1e-6))
        self.alpha_bar = (1 - 0.008) ** torch.arange(1, T + 1, dtype=torch.float64)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.lin = nn.ModuleList(nn.Linear(d + width * (i > 0), width) for i in range(layers))
        self.scale = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.out = nn.Linear(width + d, d)

    def v(self, z_t, t):
        """Standardised codes z_t (B,d) at levels t (B,) -> v_hat (B,d)."""
        emb, h = F.silu(self.time(time_embedding(t, 64))), z_t
        for i, (lin, scale, norm) in enumerate(zip(self.lin, self.scale, self.norm)):
            h = lin(h if i == 0 else torch.cat([h, z_t], 1))
            h = F.silu(norm(h * (1 + scale(emb))))
        return self.out(torch.cat([h, z_t], 1))

    def forward(self, batch, g):
        z0 = (batch["z"] - self.mean) / self.sd
        t = random_t(len(z0), len(self.alpha_bar), 1.0, g)
        eps = torch.randn(z0.shape, generator=g, device=g.device)
        v = v_target(z0, t, eps, self.alpha_bar)
        return (self.v(q_sample(z0, t, eps, self.alpha_bar), t) - v).abs().mean()

    def sample(self, n, g):
        """n new codes -> (n,d)"""
        z_T = torch.randn(n, len(self.mean), generator=g, device=g.device)
        def eps_fn(z_t, t):
            t = torch.full((n,), t, device=g.device)
            return eps_from_v(self.v(z_t, t), z_t, t, self.alpha_bar)
        return self.mean + self.sd * ddim_decode(eps_fn, z_T, min(50, len(self.alpha_bar)), self.alpha_bar)


# --------------------------------------------------------------------------------------------------------
# The three stages. forward(batch, g) is the training loss.

class Frozen:
    """Holds a network that must not change: in eval mode, without gradients, and no registered part of the
    module that holds it. So no optimizer, EMA, train() or checkpoint of that module can touch it."""
    def __init__(self, net):
        self.net = net.eval().requires_grad_(False)

    def __deepcopy__(self, memo):
        return self


class Autoencoder(nn.Module):
    """Stage A, AutoencoderKL in 3D: L1 + KL + a patch adversarial loss (least squares) that warms up.

    spatial: it encodes the difference from `mean_brain`, the mean of training scans. What all brains share
    needs no latent. A linear code is added to the network's: most of a patch is linear in its latent."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.unit = cfg, cfg.patch * 2 ** (len(cfg.ae_mult) - 1)
        self.sides = [-(-s // self.unit) for s in cfg.size]      # of the latent
        self.encoder, self.decoder = Encoder3d(cfg), Decoder3d(cfg)
        if cfg.spatial:
            self.register_buffer("mean_brain", torch.zeros(1, 1, *cfg.size))
            self.patches = PatchCode(cfg.z_ch, self.unit, math.prod(self.sides))
        self.discriminator = Discriminator3d(cfg.disc_base, cfg.groups)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))   # so a checkpoint has it

    def difference(self, x):
        """x minus the mean brain, times 4, which brings its SD nearer to 1. -> like x"""
        return 4 * (x - self.mean_brain)

    def posterior(self, x):
        """x (B,1,D,H,W) in [-1,1] -> mean, log variance of q(z|x), (B,z_ch,d,h,w). Sides are padded."""
        if not self.cfg.spatial:
            return self.encoder(pad(x, self.unit, -1.0))
        x = pad(self.difference(x), self.unit, 0.0)
        mean, logvar = self.encoder(x)
        return mean + self.patches.encode(x), logvar

    def decode(self, z):
        """z (B,z_ch,d,h,w) -> (B,1,D,H,W) of the Config's size"""
        d, h, w = self.cfg.size
        if not self.cfg.spatial:
            return self.decoder(z)[:, :, :d, :h, :w]
        return self.mean_brain + (self.decoder(z) + self.patches.decode(z))[:, :, :d, :h, :w] / 4

    def adversarial(self, x, recon):
        """-> (loss of the autoencoder, loss of the discriminator), least squares (Mao et al. 2017).

        The first sees the discriminator's weights detached, the second the reconstruction detached: one
        backward pass of their sum gives each network the gradient of its own loss and nothing else."""
        weights = {k: p.detach() for k, p in self.discriminator.named_parameters()}
        fooled = torch.func.functional_call(self.discriminator, weights, (recon,))
        real, fake = self.discriminator(torch.cat([x, recon.detach()])).chunk(2)
        return (fooled - 1).square().mean(), ((real - 1).square().mean() + fake.square().mean()) / 2

    def forward(self, batch, g):
        x = batch["image"]
        mean, logvar = self.posterior(x)
        recon = self.decode(mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=g, device=g.device))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3, 4)).mean()
        fool, judge = self.adversarial(x, recon)
        # A tenth of the steps without the adversarial loss; in the next tenth its weight grows to cfg.gan.
        warm = (10 * self.step / self.cfg.ae_steps - 1).clamp(0, 1)
        self.step += self.training
        # Gradients are clipped by their joint norm. With weight 1 the discriminator's would be most of it,
        # and would set the size of the autoencoder's steps. (Adam divides the weight out again.)
        return (recon - x).abs().mean() + 1e-7 * kl + self.cfg.gan * (warm * fool + judge)


class Unconditional(nn.Module):
    """Stage B: || UNet(z_t, t) - target ||^2 on standardised latents, (latent - shift) / scale.

    mean, std (N,z_ch,d,h,w): posteriors of the training scans. shift is their mean in each channel (spatial:
    at each place, too), and scale gives each channel variance 1. Both are saved with the weights."""
    def __init__(self, cfg, mean, std):
        super().__init__()
        self.cfg = cfg
        self.down, self.up = Down3d(cfg, cfg.z_ch), Up3d(cfg, cfg.z_ch, 0)
        shift = mean.mean(0 if cfg.spatial else (0, 2, 3, 4), keepdim=True)
        scale = ((mean - shift).square() + std.square()).mean((0, 2, 3, 4), keepdim=True).sqrt()
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale.clamp(min=1e-6))
        self.alpha_bar = linear_alpha_bar(cfg.T)    # stays on the CPU: samplers read single numbers from it

    def latent(self, batch, g=None):
        """Standardised latents of a batch {"mean", "std"}: a draw from the posterior, without g its mean."""
        z = batch["mean"]
        if g is not None:
            z = z + batch["std"] * torch.randn(z.shape, generator=g, device=g.device)
        return (z - self.shift) / self.scale

    def forward(self, batch, g):
        z0 = self.latent(batch, g)
        t = random_t(len(z0), self.cfg.T, self.cfg.t_power, g)
        eps = torch.randn(z0.shape, generator=g, device=g.device)
        target = eps if self.cfg.predict == "eps" else v_target(z0, t, eps, self.alpha_bar)
        return (self.up(*self.down(q_sample(z0, t, eps, self.alpha_bar), t)) - target).square().mean()


class Model(nn.Module):
    """Stage C: a gradient decoder G(z_t, t, z_sem) steers the frozen stage B; z_sem = SemanticEncoder(x).

    predict eps (paper): lambda_t || eps_theta + s_t G - eps ||^2 trains, eps_theta - sqrt(1 - alpha_bar_t) G
    samples. lambda_t: `weight`. predict v: || v_theta + G - v ||^2 = || eps_hat - eps ||^2 / alpha_bar_t."""
    def __init__(self, cfg, ldm, ae):
        super().__init__()
        self.cfg, self.ldm, self.ae, self.alpha_bar = cfg, Frozen(ldm), Frozen(ae), ldm.alpha_bar
        self.register_buffer("s_t", shift_training(self.alpha_bar).float(), persistent=False)
        self.register_buffer("weight", snr_weight(self.alpha_bar).float(), persistent=False)
        self.encoder = SemanticEncoder(cfg)
        self.embed = nn.Linear(cfg.z_dim, 4 * cfg.base)
        self.gradient = Up3d(cfg, cfg.z_ch, 4 * cfg.base)
        # AdaGN scales whole channels, so it cannot say where. A latent made of z_sem can.
        linear = cfg.spatial and cfg.predict == "v"
        self.z_latent = zero(nn.Linear(cfg.z_dim, cfg.z_ch * math.prod(ae.sides))) if linear else None

    def encode(self, batch):
        """batch["image"] (B,1,D,H,W) in [-1,1] -> z_sem (B,z_dim)"""
        x = batch["image"]
        return self.encoder(self.ae.net.difference(x) if self.cfg.spatial else x)

    def outputs(self, z_t, t, z_sem):
        """-> the prediction (v or eps) of the frozen network, and G, both like z_t"""
        with torch.no_grad():
            emb, skips = self.ldm.net.down(z_t, t)
            out = self.ldm.net.up(emb, skips)
        G = self.gradient(emb, skips, self.embed(z_sem))
        if self.z_latent is not None:     # v holds -sqrt(1 - alpha_bar_t) z0: this is a linear decoder for z0
            z0_hat = self.z_latent(z_sem).float().view(z_t.shape)
            G = G - signal_noise(self.alpha_bar, t, z_t.ndim)[1] * z0_hat
        return out, G

    def eps(self, z_t, t, z_sem):
        """eps_hat at levels t (B,) for sampling and inversion. -> like z_t"""
        out, G = self.outputs(z_t, t, z_sem)
        if self.cfg.predict == "eps":
            return out - signal_noise(self.alpha_bar, t, z_t.ndim)[1] * G
        return eps_from_v(out + G, z_t, t, self.alpha_bar)

    def loss(self, z0, z_sem, t, eps):
        """Weighted squared error of the prediction per latent. -> (B,)"""
        out, G = self.outputs(q_sample(z0, t, eps, self.alpha_bar), t, z_sem)
        if self.cfg.predict == "v":
            return (out + G - v_target(z0, t, eps, self.alpha_bar)).square().mean((1, 2, 3, 4))
        error = out + self.s_t[t].view(-1, 1, 1, 1, 1) * G - eps
        return self.weight[t] * error.square().mean((1, 2, 3, 4))

    def forward(self, batch, g):
        z0 = self.ldm.net.latent(batch, g)
        t = random_t(len(z0), self.cfg.T, self.cfg.t_power, g)
        eps = torch.randn(z0.shape, generator=g, device=g.device)
        return self.loss(z0, self.encode(batch), t, eps).mean()


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


def slerp(a, b, alpha):
    """From noise a to noise b on the sphere, each sample by its own angle. a, b (B,..); alpha number or (B,).

    Never NaN: the cosine is clamped, and (anti)parallel samples are joined by a straight line. -> like a"""
    shape, a, b = a.shape, a.flatten(1), b.flatten(1)
    alpha = torch.as_tensor(alpha, dtype=a.dtype, device=a.device).view(-1, 1)
    omega = F.cosine_similarity(a, b, dim=1).clamp(-1, 1).acos().unsqueeze(1)
    straight, sin = omega.sin() < 1e-4, omega.sin().clamp(min=1e-4)
    wa = torch.where(straight, 1 - alpha, ((1 - alpha) * omega).sin() / sin)
    wb = torch.where(straight, alpha, (alpha * omega).sin() / sin)
    return (wa * a + wb * b).view(shape)


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
# Between the stages

def posteriors(ae, loader):
    """Posterior mean and standard deviation of every volume. -> two (N,z_ch,d,h,w) on the loader's device"""
    mean, logvar = over_rows(lambda batch: torch.cat(ae.posterior(batch["image"]), 1), loader).chunk(2, 1)
    return mean, (logvar / 2).exp()


def hash_of(model):
    """Hash of all weights. A checkpoint remembers the hash of the stage that it was built on. -> 16 digits"""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def fast_layout(model, device):
    """On a GPU, convolutions are fastest with channels last. (On a CPU GroupNorm loses more.) -> model"""
    for layer in model.modules():
        if isinstance(layer, nn.Conv3d) and device.type == "cuda":
            layer.to(memory_format=torch.channels_last_3d)
    return model


# --------------------------------------------------------------------------------------------------------
# Evaluation: every number is of subjects that no network, probe or threshold has seen

@torch.inference_mode()
def in_batches(fn, *tensors, batch=64):
    """fn over slices of the tensors' first axis, concatenated: any number of images in bounded memory."""
    with amp(tensors[0].device):
        return torch.cat([fn(*rows) for rows in zip(*(x.split(batch) for x in tensors))])


def over_rows(fn, loader):
    """fn(batch) of all rows of the loader, concatenated; with Model.encode: z_sem (N,z_dim)"""
    rows = torch.arange(len(loader), device=loader.device)
    return in_batches(lambda i: fn(loader.batch(i)), rows, batch=4)


def travel(sampler, model, x, z_sem):
    """sampler (ddim_encode or ddim_decode) with model at fixed z_sem (B,z_dim), from x (B,..). -> like x"""
    def few(x, z):
        eps_fn = lambda x_t, t: model.eps(x_t, torch.full((len(x),), t, device=x.device), z)
        return sampler(eps_fn, x, model.cfg.S, model.alpha_bar)
    return in_batches(few, x, z_sem, batch=16)


def volumes(model, z0):
    """Standardised latents (B,z_ch,d,h,w) -> volumes, numpy (B,D,H,W) in [0,1]"""
    ldm, ae = model.ldm.net, model.ae.net
    return M.to_image(in_batches(lambda z: ae.decode(z * ldm.scale + ldm.shift), z0, batch=4))


def render(model, z_T, z_sem):
    """z_T (B,z_ch,d,h,w), noise or inverted, and z_sem (B,z_dim) -> volumes, numpy (B,D,H,W) in [0,1]"""
    return volumes(model, travel(ddim_decode, model, z_T, z_sem))


def redraw(model, x, z_sem):
    """Volumes x (B,1,D,H,W) drawn again from their z_sem (B,z_dim) and z_T -> numpy (B,D,H,W) in [0,1]"""
    ldm, ae = model.ldm.net, model.ae.net
    z0 = in_batches(lambda x: ldm.latent({"mean": ae.posterior(x)[0]}), x, batch=4)
    return render(model, travel(ddim_encode, model, z0, z_sem), z_sem)


def view(x):
    """(D,H,W) -> axial and coronal middle slice side by side, the coronal one head up. -> (max(H,D),2W)"""
    axial, coronal = x[x.shape[0] // 2], x[::-1, x.shape[1] // 2]
    high = max(len(axial), len(coronal))
    square = lambda s: np.pad(s, (((high - len(s)) // 2, (high - len(s) + 1) // 2), (0, 0)))
    return np.concatenate([square(axial), square(coronal)], 1)


def preview3d(cfg, loader, name, draw):
    """-> watch(ema) for fit: OUT/name of validation volumes. draw(ema, batch) -> {label: (B,D,H,W)}"""
    def watch(ema):
        lines = draw(ema, loader.batch(np.arange(len(loader))))
        M.grid(Path(cfg.out, name), [[view(x) for x in line] for line in lines.values()], list(lines), [],
               "Validation subjects at the last save: axial and coronal slice.")
    return watch


def draw_autoencoder(ae, batch):
    """The rows of preview_A.png"""
    recon = in_batches(lambda x: ae.decode(ae.posterior(x)[0]), batch["image"], batch=4)
    return {"scan": M.to_image(batch["image"]), "autoencoder": M.to_image(recon)}


def draw_semantic(model, batch):
    """The rows of preview_C.png. If row 3 is unlike row 1, z_sem is not used yet."""
    z0, z = model.ldm.net.latent(batch), in_batches(lambda x: model.encode({"image": x}), batch["image"])
    noise = torch.randn(z0.shape, generator=torch.Generator(z0.device).manual_seed(0), device=z0.device)
    return {"scan": M.to_image(batch["image"]),
            "z_sem + z_T": render(model, travel(ddim_encode, model, z0, z), z),
            "z_sem, random z_T": render(model, noise, z)}


def evaluate(cfg, data, part, loader, models, prior, device):
    """Every number and picture of a run. -> metrics, as in results.json

    loader: all rows, with latents. models: {"": stage C, "untrained": random weights}; prior: a Prior"""
    out, train, model = Path(cfg.out), np.flatnonzero(part == "train"), models[""]
    everything = np.flatnonzero(part == "test")
    test = M.evenly(everything, cfg.eval_images)
    who, real, g = data.subject[test], data.image[test] / 255, torch.Generator(device).manual_seed(cfg.seed)
    codes = {row: over_rows(m.encode, loader) for row, m in models.items()}
    z, z0 = codes[""], over_rows(model.ldm.net.latent, loader)
    noise = torch.randn(z0[test].shape, generator=g, device=device)

    # Images from z_sem with the inverted z_T (recon), and from z_sem alone (semantic, one random z_T). The
    # autoencoder's own images are the ceiling of both. The trivial rows have one image for both.
    recon = M.trivial_images(data, train, test, cfg.z_dim)
    recon["ae"] = volumes(model, z0[test])
    semantic = dict(recon)
    z_T = travel(ddim_encode, model, z0[test], z[test])
    recon[""], semantic[""] = render(model, z_T, z[test]), render(model, noise, z[test])
    metrics = M.image_numbers("recon", recon, real, who) | M.image_numbers("semantic", semantic, real, who)
    wrong = render(model, noise, z[test][torch.as_tensor(M.other_subject(who), device=device)])
    gain = M.ssim(real, semantic[""]) - M.ssim(real, wrong)
    metrics["semantic_gain"] = M.row_of(np.mean, who, gain)
    # A network whose output is 0 reconstructs well. If that is eps, its z_T has an SD near 0. If it is v, z_T
    # is .83 z0 (S = 10) or .91 z0 (S = 20), and its SD looks right: so look at z_sem alone, too.
    metrics["z_T_sd_error"] = M.row_of(np.mean, who, (z_T.std((1, 2, 3, 4)) - 1).abs(), better="lower")
    lines = {"test scan": real, "autoencoder": recon["ae"], "z_sem + z_T": recon[""],
             "z_sem, random z_T": semantic[""], f"PCA, {cfg.z_dim} numbers": recon["pca"]}
    M.grid(out / "reconstructions.png", [[view(x) for x in line[:6]] for line in lines.values()], list(lines),
           list(who[:6]), f"Test subjects: axial and coronal slice. {cfg.S} DDIM steps.")

    # What a linear probe reads from the codes of all test scans: the target, age, on phantoms known factors.
    all_codes = {row: code.cpu().numpy() for row, code in codes.items()}
    all_codes["pca"] = M.pca_codes(data, train, cfg.z_dim)
    # The linear part of z_sem sees the volume at a quarter of its resolution. So does this PCA.
    small = over_rows(lambda batch: F.avg_pool3d(batch["image"], 4), loader)
    small = dataclasses.replace(data, image=255 * M.to_image(small))
    all_codes["pca_small"] = M.pca_codes(small, train, cfg.z_dim)
    M.save_codes(out / "codes.csv", data, part, all_codes[""])
    probes = {}
    for key, column in (("age", "age"), ("probe", cfg.target)):
        try:
            table, fitted = M.predict(all_codes, data.columns.get(column), part, data.subject, cfg.seed)
        except ValueError as e:
            print(f"no probe of {column}: {e}")
        else:
            metrics |= M.probe_numbers(table, key)
            probes[key] = column, table, fitted[""]
    if probes:
        M.save_predictions(out / "predictions.csv", {(k, column): t for k, (column, t, _) in probes.items()})
        M.save_probes(out / "probes.json", probes, all_codes[""][train], data.label_names)
    metrics |= M.factor_numbers(all_codes, data.columns, part, data.subject, cfg.seed)

    first = everything[np.unique(data.subject[everything], return_index=True)[1]]    # of each subject
    if "probe" in probes:
        metrics |= manipulation(cfg, data, train, M.evenly(first, cfg.eval_images), model, z, z0)
    if "session" in data.columns:
        metrics |= missing_scans(cfg, data, everything, model, z, z0)
    metrics |= throughput(cfg, loader.batch(test[:1]), model)

    noise = torch.randn(6, *z0.shape[1:], generator=g, device=device)
    new = render(model, noise, prior.sample(6, g))
    bank = data.image[M.evenly(train, 200)]
    coarse = lambda x: x[:, ::2, ::2, ::2]
    nearest = bank[M.nearest(coarse(new), coarse(bank))[1]] / 255
    M.grid(out / "samples.png", [[view(x) for x in line] for line in (new, nearest)],
           ["new brain", "nearest training scan"], [],
           "New brains: z_sem from the prior, random z_T. Row 2 shows whether they are copies.")
    M.curves(out / "curves.png", {stage: out / f"log_{stage}.jsonl" for stage in "ABC"})
    return metrics


def volume_reader(data, rows, label, ml):
    """Measures a structure in volumes without a mask. It is a ridge regression to ml (N,) from the voxels in
    and next to the mask's label, fitted to `rows`. -> a function of volumes (n,D,H,W) in [0,1] -> (n,) ml"""
    where = np.any([data.mask[i] == label for i in rows], 0)
    where = M.evenly(np.flatnonzero(F.max_pool3d(torch.as_tensor(where)[None].float(), 3, 1, 1)), 4000)
    pick = lambda x: np.stack([v.reshape(-1)[where] for v in x])
    fitted = M.probe("regression", pick(data.image[i] / 255 for i in rows), ml[rows], data.subject[rows])
    return lambda x: fitted.predict(pick(x))


def manipulation(cfg, data, train, rows, model, z, z0):
    """z_sem of the scans `rows` moved along its covariance with the target, z_T kept. -> metrics, a picture

    Heads must keep their size. On phantoms, ventricles must grow and hippocampi shrink."""
    # The weights of a probe say how to read an attribute, and also hold what cancels other causes. How codes
    # change with the attribute is their covariance with it (Haufe et al. 2014). probes.json has the weights.
    y = torch.as_tensor(data.columns[cfg.target], dtype=z.dtype, device=z.device)[train]
    seen, y = z[train][~y.isnan()], y[~y.isnan()]
    axis = (seen - seen.mean(0)).T @ (y - y.mean())
    axis = axis * (seen @ axis).std() / axis.norm() ** 2        # as long as one SD of the training codes
    moves = np.array([-1.5, -0.75, 0, 0.75, 1.5])
    z_T = travel(ddim_encode, model, z0[rows], z[rows])
    moved = np.stack([render(model, z_T, z[rows] + float(m) * axis) for m in moves], 1)      # (n,5,D,H,W)
    lines = [[view(data.image[i] / 255), *map(view, line), 2 * abs(view(line[-1]) - view(line[0]))]
             for i, line in zip(rows[:5], moved)]
    M.grid(Path(cfg.out, "manipulation.png"), lines, list(data.subject[rows[:5]]),
           ["scan", *[f"{m:+.2f} SD" for m in moves], "2 |last - first|"],
           f"z_sem moved as it changes with {cfg.target}, in SDs of the training codes; z_T kept.")
    who, head = data.subject[rows], (moved > 0.1).mean((2, 3, 4))
    change = abs(head[:, -1] - head[:, 0]) / head[:, 0].clip(1e-6)
    metrics = {"manip_head_change": M.row_of(np.mean, who, change, better="lower")}
    if data.mask is None or not {"factor_ventricle_ml", "factor_hippocampus_ml"} <= set(data.columns):
        return metrics                     # no phantoms
    for name, label, better in (("ventricle", 4, "higher"), ("hippocampus", 5, "lower")):
        ml = data.columns[f"factor_{name}_ml"]
        read = volume_reader(data, M.evenly(train, 500), label, ml)
        r2 = M.row_of(lambda p, t: M.regression(p, t)["r2"], who, read(data.image[rows] / 255), ml[rows])
        found = np.stack([read(moved[:, k]) for k in range(len(moves))], 1)      # (n,5) ml
        metrics[f"manip_{name}_reader_r2"] = r2
        metrics[f"manip_{name}_slope"] = M.row_of(np.mean, who, found @ moves / (moves @ moves), unit="ml/SD",
                                                  better=better)
    return metrics


def triples(subject, session):
    """Every (before, missing, after) of rows of one subject, in order of time. -> (n,3) int"""
    out = []
    for s in np.unique(subject):
        rows = sorted(np.flatnonzero((subject == s) & ~np.isnan(session)), key=lambda i: session[i])
        out += [t for t in itertools.combinations(rows, 3) if len(set(session[list(t)])) == 3]
    return np.array(out, int).reshape(-1, 3)


def missing_scans(cfg, data, test, model, z, z0):
    """The scan between two others of a test subject, against the real one. -> metrics; missing.png

    z_sem on a straight line, z_T on the sphere. Gap: months from the missing scan to the nearer one."""
    three = test[triples(data.subject[test], data.columns["session"][test])]
    if not len(three):
        print("no missing-scan numbers: no test subject has three sessions")
        return {}
    start, goal, end = data.columns["session"][three.T]
    gap, share = np.rint(np.minimum(goal - start, end - goal)).astype(int), (goal - start) / (end - start)
    metrics, picture = {}, []
    for months in np.unique(gap):
        here = M.evenly(np.flatnonzero(gap == months), cfg.eval_images)
        a, target, b = three[here].T
        passed = share[here, None, None, None]      # of the time between both: 0 before, 1 after
        w = torch.as_tensor(share[here], dtype=z.dtype, device=z.device)
        z_T = [travel(ddim_encode, model, z0[rows], z[rows]) for rows in (a, b)]
        who, (before, real, after) = data.subject[target], (data.image[rows] / 255 for rows in (a, target, b))
        made = {"": render(model, slerp(*z_T, w), torch.lerp(z[a], z[b], w[:, None])),
                "latent_mean": volumes(model, torch.lerp(z0[a], z0[b], w.view(-1, 1, 1, 1, 1))),
                "voxel_mean": (1 - passed) * before + passed * after,
                "copy": np.where(passed <= 0.5, before, after),
                "ae": volumes(model, z0[target])}
        metrics |= M.image_numbers(f"interp_{months}m", made, real, who)
        gain = M.mse(real, made[""]) - M.mse(real, made["copy"])
        metrics[f"interp_{months}m_mse_gain.copy"] = M.row_of(np.mean, who, gain, better="lower")
        picture.append([before, real, after, *made.values()])
    M.grid(Path(cfg.out, "missing.png"), [[view(x[0]) for x in line] for line in picture],
           [f"{m} months" for m in np.unique(gap)],
           ["before", "real scan", "after", "ours", "mean latent", "mean of both", "nearer", "autoencoder"],
           "A test subject's scan, drawn from one before and one after. Left: months to the nearer one.")
    return metrics


def throughput(cfg, batch, model):
    """Seconds to reconstruct batch["image"], S steps up and S down, in latent and in voxel space.

    The voxel network is one UNet that takes z_sem, untrained, a quarter as wide as stage B (at least 8
    channels), with more levels above until one has the latent's size.
    -> metrics recon_s, recon_s.voxel, throughput_ratio"""
    x, mult = batch["image"], (1,) * round(math.log2(model.ae.net.unit)) + cfg.mult
    small = dataclasses.replace(cfg, base=max(8, cfg.base // 4), mult=mult, groups=1)
    down, up = (fast_layout(net.to(x.device).eval(), x.device)
                for net in (Down3d(small, 1), Up3d(small, 1, cfg.z_dim)))
    voxel = SimpleNamespace(cfg=cfg, alpha_bar=model.alpha_bar, eps=lambda x, t, z: up(*down(x, t), z))
    in_latents = lambda z: redraw(model, x, z)
    in_voxels = lambda z: travel(ddim_decode, voxel, travel(ddim_encode, voxel, x, z), z).cpu()     # waits
    metrics = {}
    for key, draw in (("recon_s", in_latents), ("recon_s.voxel", in_voxels)):
        for _ in range(2):      # the first call is slower: only the second counts
            began = time.perf_counter()
            draw(in_batches(lambda x: model.encode({"image": x}), x))
        metrics[key] = M.row((time.perf_counter() - began) / len(x), unit="s", better="lower")
    ratio = metrics["recon_s.voxel"]["value"] / metrics["recon_s"]["value"]
    return metrics | {"throughput_ratio": M.row(ratio, unit="x")}


# --------------------------------------------------------------------------------------------------------
# Using a trained model

def load(out, name="ckpt_C", device=""):
    """A network that a run has trained in the folder `out`, ready to use. -> (network, Config)

    name: ckpt_C, the whole model; ckpt_A, the autoencoder; ckpt_B, the unconditional diffusion model;
    ckpt_prior_STEPS, the prior. device: "" is the first of cuda, mps, cpu that is there. A file that is
    damaged or of another network exits 2."""
    if name == "ckpt_A":
        build = Autoencoder
    elif name.startswith("ckpt_prior"):
        build = lambda cfg: Prior(cfg.T, torch.zeros(2, cfg.z_dim))
    else:
        ae, _ = load(out, "ckpt_A", device)
        build = lambda cfg: Unconditional(cfg, *torch.zeros(2, 2, cfg.z_ch, *ae.sides))
        if name == "ckpt_C":
            ldm, _ = load(out, "ckpt_B", device)
            build = lambda cfg: Model(cfg, ldm, ae)
    net, cfg = D.trained(Path(out, f"{name}.pt"), Config, build, device)
    return fast_layout(net, torch.device(cfg.device)), cfg


def apply(out, path, device):
    """The model in the folder `out` reads the volumes in `path`. Nothing is trained, and nothing is written
    but OUT/apply/NAME/: codes.csv, predictions.csv, reconstructions.h5 and .png, results.json."""
    began, (model, cfg) = time.perf_counter(), load(out, device=device)
    M.check_evaluated(out, "log_C.jsonl")
    data, folder = D.load(path), Path(out, "apply", Path(path).stem)
    if data.image.shape[1:] != cfg.size:
        D.fail(f"{path}: image: {data.image.shape[1:]}, but the model in {out} reads volumes of {cfg.size}")
    folder.mkdir(parents=True, exist_ok=True)
    loader, part = D.Loader({"image": data.image}, cfg.device), M.known_part(out, data.subject)
    z = over_rows(model.encode, loader)
    M.save_codes(folder / "codes.csv", data, part, z)
    metrics = M.apply_probes(out, folder, data, part, z)

    batches = np.array_split(np.arange(len(data)), len(data) // 16 + 1)
    images = np.concatenate([redraw(model, loader.batch(rows)["image"], z[rows])
                             for rows in tqdm(batches, "reconstruct", unit="batch")])
    few = M.evenly(np.arange(len(data)), 6)
    D.write(folder / "reconstructions.h5", [dict(image=D.to_uint8(255 * images), subject=data.subject)],
            dict(source=f"z_sem + z_T of {path} by the model in {out}"))
    lines = [[view(x) for x in line] for line in (data.image[few] / 255, images[few])]
    M.grid(folder / "reconstructions.png", lines, ["scan", "z_sem + z_T"],
           list(data.subject[few]), f"Scans of {path}: axial and coronal slice.")
    new = np.flatnonzero(~np.isin(part, ["train", "val"]))      # numbers are of those it did not learn from
    if len(new):
        metrics |= M.image_numbers("recon", {"": images[new]}, data.image[new] / 255, data.subject[new])
    M.save_applied(folder, "ldae", data, part, cfg, metrics, SHOWN, ROWS, time.perf_counter() - began)


# --------------------------------------------------------------------------------------------------------
# The command

# The table that ends a run: the numbers that answer the question, and the rows beside them.
SHOWN = {"recon_ssim": "z_sem + z_T, SSIM", "semantic_ssim": "z_sem alone, SSIM",
         "semantic_gain": "right - wrong z_sem, SSIM", "probe_auroc": "AUROC, scan",
         "probe_r2": "R2, scan", "age_mae": "age, years off",
         "interp_18m_mse": "missing scan, 18 months, MSE", "interp_24m_mse": "the same, 24 months",
         "manip_ventricle_slope": "ventricles, ml per SD", "recon_s": "reconstruction, s"}
ROWS = {"": "ours", "untrained": "untrained encoder", "ae": "autoencoder alone", "pca": "PCA",
        "pca_small": "PCA, quarter resolution", "copy": "another visit",
        "voxel_mean": "mean of two visits", "latent_mean": "mean latent",
        "constant": "mean training image", "all_positive": "all called positive", "mean": "training mean",
        "voxel": "small voxel network"}


def check_networks(cfg):
    """Settings that do not fit each other end the run in one line: no memory is needed to find out."""
    try:
        times(cfg.S, cfg.T)
        with torch.device("meta"):
            x, t, ae = torch.empty(2, 1, *cfg.size), torch.ones(2).long(), Autoencoder(cfg)
            latent, _ = ae.posterior(x)
            ae.decode(latent)
            model = Model(cfg, Unconditional(cfg, latent, latent), ae)
            model.outputs(latent, t, model.encode({"image": x}))
        if min(cfg.size) < 24:
            raise ValueError("the discriminator needs sides of at least 24 voxels")
    except (ValueError, RuntimeError, AssertionError, OverflowError, TypeError) as e:
        size = "x".join(map(str, cfg.size))
        D.fail(f"volumes of {size}, --S {cfg.S}, --groups {cfg.groups}, --base {cfg.base}, --ae_base, "
               f"--enc_base, --enc_mult: no such network ({e})")


def main(argv):
    began = time.perf_counter()
    cfg, device = D.start(Config, PRESETS, RECIPES, __doc__, argv)
    if cfg.apply:
        return apply(cfg.out, cfg.apply, cfg.device)
    out, (rank, world) = Path(cfg.out), D.ranks()
    if cfg.ae_batch % world:
        D.fail(f"--ae_batch {cfg.ae_batch}: must be a multiple of the {world} processes")
    if not cfg.data:
        if cfg.size != (cfg.size[0], cfg.size[0] * 5 // 32 * 8, cfg.size[0]):
            D.fail(f"--size {cfg.size}: phantoms have D, 5/4 D cut to a multiple of 8, D, as 48,56,48")
        check_networks(cfg)
    held = M.lock(out) if rank == 0 else None           # until the process ends
    path = D.phantom_path(cfg, "brains.h5", lambda out: D.phantom_brains(out, size=cfg.size[0]))
    data, part = D.load_study(path, cfg.test, None, cfg.seed, fold=cfg.fold)
    shape = tuple(data.image.shape[1:])
    if len(shape) != 3:
        D.fail(f"{path}: image: slices of {shape[0]}x{shape[1]}; ldae.py needs volumes (N,D,H,W)")
    if not cfg.data and shape != cfg.size:
        D.fail(f"{path}: phantoms of {shape}, not of --size {cfg.size}; choose that size, or another --out")
    label = data.columns.get("label", np.zeros(1))
    if (label > 1).any():
        print(f"label: 1 against 0; {(label > 1).sum()} scans of other classes are left out of the probes")
        data.columns["label"] = np.where(label > 1, np.nan, label)
    cfg = dataclasses.replace(cfg, size=shape, target=D.choose_target(data, cfg.target, []))
    check_networks(cfg)
    count, facts = D.describe(data, part)
    if rank == 0:
        M.warn_if_edited(cfg, __file__)
        if cfg.init:
            M.check_init(cfg.init, ["ckpt_A", "ckpt_B", "ckpt_C"], data.subject[part == "test"])
        print(f"ldae: preset {cfg.preset}, recipe {cfg.recipe}, {device}, torch {torch.__version__}\n"
              f"data: {data.path} at {'x'.join(map(str, shape))}; subjects: {D.in_words(count)}\n"
              f"trains stage A: {cfg.ae_steps} steps, B: {cfg.ldm_steps}, C, prior: {cfg.steps}; evaluates\n"
              f"out: {out}; stop at any time, the same command goes on", flush=True)

    rows = [np.flatnonzero(part == "train"), M.evenly(np.flatnonzero(part == "val"), 4)]     # four to look at
    D.batch_rows(len(rows[0]), cfg.batch, cfg.seed, 0)      # a --batch that is too large is refused now
    default = lambda keys: {k: getattr(Config, k) for k in keys}
    torch.manual_seed(D.mix(cfg.seed, 0))
    a = dataclasses.replace(cfg, **default(AFTER_A), batch=cfg.ae_batch)
    images, val_images = (D.Loader({"image": data.image}, device, r) for r in rows)
    watch = preview3d(cfg, val_images, "preview_A.png", draw_autoencoder) if len(val_images) else None
    ae = fast_layout(Autoencoder(a), device)
    if cfg.spatial:
        ae.mean_brain[:] = torch.as_tensor(data.image[M.evenly(rows[0], 200)].mean(0) / 127.5 - 1)
    ae, ae_reached = fit(ae, images, a, "ckpt_A", cfg.ae_steps, facts, watch)

    facts = facts | {"stage_A": hash_of(ae)}
    mean, std = posteriors(ae, D.Loader({"image": data.image}, device))
    arrays = {"mean": mean.cpu().numpy(), "std": std.cpu().numpy()}
    b = dataclasses.replace(cfg, **default(AFTER_B))
    torch.manual_seed(D.mix(cfg.seed, 1))
    ldm = Unconditional(b, mean[rows[0]], std[rows[0]])
    latents = D.Loader(arrays, device, rows[0])
    ldm, ldm_reached = fit(fast_layout(ldm, device), latents, b, "ckpt_B", cfg.ldm_steps, facts)

    facts = facts | {"stage_B": hash_of(ldm)}
    arrays["image"] = data.image
    scans, val_images = (D.Loader(arrays, device, r) for r in rows)
    watch = preview3d(cfg, val_images, "preview_C.png", draw_semantic) if len(val_images) else None
    torch.manual_seed(D.mix(cfg.seed, 2))
    model = fast_layout(Model(cfg, ldm, ae), device)
    models = {"untrained": copy.deepcopy(model).to(device).eval()}
    models[""], reached = fit(model, scans, cfg, "ckpt_C", cfg.steps, facts, watch)
    if D.leave():       # the rest is the work of one process
        return
    z = over_rows(models[""].encode, scans)
    torch.manual_seed(D.mix(cfg.seed, 3))
    codes = D.Loader({"z": z.cpu().numpy()}, device)
    prior, _ = fit(Prior(cfg.T, z), codes, cfg, f"ckpt_prior_{reached}", cfg.steps, facts)
    metrics = evaluate(cfg, data, part, D.Loader(arrays, device), models, prior, device)
    reached = dict(ae_steps=ae_reached, ldm_steps=ldm_reached, steps=reached)
    seconds, config = time.perf_counter() - began, dataclasses.asdict(cfg) | reached
    M.save_results(out / "results.json", "ldae", data.path, count, seconds, config, metrics, device)
    print(M.table(metrics, SHOWN, ROWS))
    if "probe_auroc_gain.untrained" in metrics:
        question = f"Does z_sem tell {data.question(cfg.target)} better than the untrained encoder's code?"
        print(M.answer(question, "AUROC", metrics["probe_auroc"], metrics["probe_auroc.untrained"],
                       metrics["probe_auroc_gain.untrained"]))
    print(f"{seconds:.0f} s. Numbers: {out}/results.json. Pictures: {out}/*.png")


if __name__ == "__main__":
    D.program(main)
