"""Latent diffusion autoencoder (LDAE) on 3D brain MR, with its voxel-space rival.

An autoencoder compresses a volume to a small latent; a latent diffusion model learns how brains look; frozen,
it is steered by a semantic code z_sem, read from the volume by a 2.5D encoder without any label.
Question: does z_sem tell age, disease and progression, and what does the latent space gain over voxels?

    A  x (B,1,D,H,W) --Encoder3d--> z0 (B,c,D/f,H/f,W/f) --Decoder3d--> x
    B  z_t, t --UNet3d--> eps_theta                                     (unconditional, then frozen)
    C  x --SemanticEncoder--> z_sem (B,d) ---------------------------------> probes, edits, prior
       z_t, t --frozen UNet3d--> eps_theta, skips --Up3d(skips, z_sem)--> G
       eps_hat = eps_theta + c_t G: DDIM up gives z_T, DDIM down gives z0

Lozupone et al., Latent Diffusion Autoencoders, 2025 (arXiv 2504.08635). Stage C: PDAE (Zhang et al. 2022).

    python ldae.py                     # phantom brains; about 9 minutes on 2 CPU cores
    python ldae.py --data brains.h5    # your volumes; on a GPU these are the paper's networks

Differs from diffae.py in: 3D networks (names end in 3d), three stages instead of one, no clipping in latent
space. `--recipe paper` is the published objective of B and C; `--recipe ours`, the default, differs in:
- predict v, t_power 0.25: the published weights hardly train the high noise levels, where z_sem must decide;
- head position, z_map true: pooled slices and scaled channels both lose where things are;
- mean_map true: what is learnt is how a brain differs from the mean one.
"""
import copy, dataclasses, datetime, difflib, hashlib, inspect, io, itertools, json, math, os, platform
import signal, sys, time, zipfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data as D
import metrics as M

try:
    import fcntl, resource
except ImportError:     # Windows: no lock on the output folder, no figure for peak memory
    fcntl = resource = None


# --------------------------------------------------------------------------------------------------------
# Config: `--key value` changes any line. Order: these defaults < PRESETS < RECIPES < the command line.

@dataclass
class Config:
    data: str = ""            # HDF5 file, or a folder of one file per subject; empty: phantom brains
    test: str = ""            # second file: train on all of --data, test on all of this one
    out: str = "out/ldae"     # everything the run leaves; the same command again goes on from there
    preset: str = ""          # demo (laptop) or paper (one GPU); empty: paper on CUDA, demo elsewhere
    recipe: str = "ours"      # ours, or paper: objective and semantic network as published
    device: str = ""          # cuda, mps, cpu; empty: the first of these that is there
    seed: int = 0             # of the split, the weights, the order of the data and every draw
    target: str = ""          # column that the probe predicts, beside age; empty: label
    eval: bool = False        # only evaluate the checkpoints in --out
    rivals: bool = True       # also train the voxel-space autoencoder (as long) and the supervised encoder
    throughput: bool = False  # only time untrained networks of this size, latent and voxel space, and stop
    # volumes and networks
    size: tuple = (128, 160, 128)         # of the phantoms: W = D, H = 5/4 D; a file's volumes keep their own
    subjects: int = 160       # phantom subjects, 3 to 5 sessions each
    patch: int = 1            # stage A: patch^3 voxels enter as channels; 4 is quick, but blocks show
    ae_mult: tuple = (1, 2, 2, 2)         # stage A: channels per level, in units of ae_base
    ae_base: int = 64
    ae_blocks: int = 2        # residual blocks per level
    z_ch: int = 3             # channels of the latent
    disc_base: int = 64       # channels of the discriminator's first layer
    disc_layers: int = 3      # of stride 2, before one of stride 1
    mean_map: bool = True     # diffusion models deviations from the mean latent, place by place: brains are
                              # registered, and it need not learn what all share (paper: false)
    base: int = 256           # stages B and C: channels of the first level
    mult: tuple = (1, 2, 3)   # channels per level, in units of base; sides are halved between them
    blocks: int = 2           # residual blocks per level (one more on the way up)
    attention: int = 1        # self-attention from this level on (0: the first), and in the middle
    groups: int = 32          # of GroupNorm; 0: one per 16 channels (faster on a CPU)
    dropout: float = 0.1      # in the blocks of UNet and gradient decoder
    slab: int = 1             # the semantic encoder: adjacent axial slices that make one 2D image
    enc_patch: int = 4        # .. whose enc_patch x enc_patch pixels are channels
    enc_base: int = 96        # .. channels of its first level
    enc_mult: tuple = (1, 2, 4, 8)        # .. and per level, in units of enc_base
    z_dim: int = 768          # numbers in z_sem
    head: str = "position"    # of the semantic encoder: position (flattens), pool (averages: paper)
    z_map: bool = True        # a linear layer of z_sem is added to G (paper: false)
    dae_patch: int = 1        # the same for the voxel-space rival
    dae_base: int = 128       # its UNet: the published DiffAE's in 3D
    dae_mult: tuple = (1, 1, 2, 3, 4)
    # objective
    kl: float = 1e-7          # weight of the KL, summed over the latent (paper)
    adv: float = 0.025        # weight of the adversarial loss (paper)
    adv_warmup: int = 1000    # steps without it, then as many in which it grows (paper: none; 1 is nearly so)
    lpips: str = ""           # TorchScript file f(a, b) of (B,3,H,W) in [-1,1]: adds 1e-3 LPIPS on slices
    predict: str = "v"        # what the UNet outputs: v, or eps with PDAE's weights and coefficients (paper)
    t_power: float = 0.25     # stage C draws times as T u^t_power: below 1 favours high noise (paper: 1)
    ldm_t_power: float = 0.5  # the same for stage B and the voxel-space rival
    augment: float = 0.0      # strength of random rotation, zoom and shift in stage C and the rivals; few
                              # subjects need it, but latents are then made on the fly, not read (paper: 0)
    T: int = 1000             # diffusion steps, linear beta
    # training
    ae_steps: int = 20000     # optimizer steps of stage A
    ae_batch: int = 4         # volumes per step, over all processes
    ae_lr: float = 1e-4       # Adam; constant after 100 steps of warm-up
    ldm_steps: int = 20000    # of stage B
    ldm_batch: int = 64
    ldm_lr: float = 1e-4
    steps: int = 20000        # of stage C and of the supervised encoder; raise it, run again to train longer
    batch: int = 32           # .. and the voxel-space rival's (dae_batch)
    accum: int = 1            # passes per step, each on a part of the batch: for a batch that does not fit
    lr: float = 1e-4
    dae_batch: int = 4
    ema: float = 0.999        # decay of the averaged weights, which are what is evaluated
    bf16: bool = True         # bfloat16 autocast where the machine is fast at it
    compile: bool = True      # torch.compile, on CUDA
    save_every: int = 500     # steps between checkpoints
    log_every: int = 20       # steps between lines of the log
    # evaluation
    S: int = 20               # DDIM steps, both ways
    stride: str = "trailing"  # their times: the last is T-1
    eval_images: int = 40     # at most this many test volumes are reconstructed
    prior_steps: int = 10000  # of the latent DDIM that draws new z_sem; 0: none
    prior_width: int = 2048   # of the MLP that it is
    prior_layers: int = 10


PRESETS = {
    "paper": {},
    "demo": dict(size=(48, 56, 48), patch=4, ae_mult=(1,), ae_base=64, ae_blocks=1, z_ch=32, disc_base=8,
                 disc_layers=2, base=32, mult=(1, 2), blocks=1, attention=2, groups=0, dropout=0.0, slab=2,
                 enc_patch=4, enc_base=32, enc_mult=(1, 2, 4), z_dim=128, dae_patch=2, dae_base=32,
                 dae_mult=(1, 2, 2), adv_warmup=100, ae_steps=200, ae_batch=2, ae_lr=4e-3, ldm_steps=100,
                 ldm_batch=8, ldm_lr=2e-3, steps=220, batch=8, lr=2e-3, save_every=110, eval_images=3,
                 prior_steps=1000, prior_width=256, prior_layers=4),
}
RECIPES = {
    "ours": {},
    "paper": dict(predict="eps", t_power=1.0, head="pool", z_map=False, mean_map=False, ldm_t_power=1.0,
                  augment=0.0),
}
# What may differ when a run goes on in the same folder: nothing here alters what is learnt, only how far.
FREE = {"data", "test", "out", "preset", "device", "target", "eval", "rivals", "throughput", "steps",
        "accum", "ae_steps", "ldm_steps", "bf16", "compile", "save_every", "log_every", "S", "stride",
        "eval_images", "prior_steps", "subjects"}
# The words that a field may hold.
CHOICES = dict(predict=("v", "eps"), head=("position", "pool"), stride=("trailing", "leading"))
# The fields that a stage depends on, so that another semantic encoder does not retrain the autoencoder.
COMMON = "seed size patch groups ema "
LATENT = "ae_mult z_ch mean_map base mult blocks attention dropout predict ldm_t_power T "
SEMANTIC = "augment slab enc_patch enc_base enc_mult z_dim head z_map "
STAGES = {
    "ckpt_A": COMMON + "ae_mult ae_base ae_blocks z_ch disc_base disc_layers kl adv adv_warmup lpips",
    "ckpt_B": COMMON + LATENT,
    "ckpt_C": COMMON + LATENT + SEMANTIC + "t_power",
    "ckpt_dae": COMMON + SEMANTIC + "dae_patch dae_base dae_mult blocks dropout predict ldm_t_power T",
    "ckpt_supervised": COMMON + SEMANTIC + "dropout",
    "ckpt_prior": "seed ema T z_dim prior_width prior_layers",
}


def stage_config(cfg, name, batch, lr):
    """The Config of one stage: what it does not depend on is at its default. Name and numbers go to fit."""
    keys = set(STAGES[name].split()) | FREE
    mine = {k: v for k, v in dataclasses.asdict(cfg).items() if k in keys}
    return Config(**{**mine, "batch": batch, "lr": lr})


# --------------------------------------------------------------------------------------------------------
# Schedule and forward process. Level t in 0..T-1 is noisy, -1 is clean (alpha_bar = 1), T is pure noise (0).

def linear_alpha_bar(T):
    """Product of 1 - beta up to t, beta linear 1e-4 .. 0.02 (DDPM, Ho et al. 2020, sec. 4). -> (T,)"""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0)


def signal_noise(alpha_bar, t, ndim):
    """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) of levels t (B,), as (B,1,..) to multiply ndim-d tensors"""
    both = torch.stack([alpha_bar, 1 - alpha_bar]).sqrt().to(t.device, torch.float32)
    return both[:, t].view(2, -1, *[1] * (ndim - 1))


def q_sample(x0, t, eps, alpha_bar):
    """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps: q(x_t|x_0) (DDPM eq. 4). t (B,) -> like x0"""
    a, s = signal_noise(alpha_bar, t, x0.ndim)
    return a * x0 + s * eps


def v_target(x0, t, eps, alpha_bar):
    """v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x0 (Salimans & Ho 2022, sec. 4). -> like x0"""
    a, s = signal_noise(alpha_bar, t, x0.ndim)
    return a * eps - s * x0


def eps_from_v(v, x_t, t, alpha_bar):
    """eps = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t: the inverse of v_target, given x_t."""
    a, s = signal_noise(alpha_bar, t, x_t.ndim)
    return a * v + s * x_t


def snr_weight(alpha_bar):
    """PDAE's loss weight SNR^0.1 / (1 + SNR), SNR = alpha_bar / (1 - alpha_bar). It is .0003 at t = 0,
    .72 at 475 and .36 at 999. -> (T,)"""
    return (1 - alpha_bar) * (alpha_bar / (1 - alpha_bar)) ** 0.1


def shift_training(alpha_bar):
    """PDAE's coefficient of G in training: the mean of q(x_{t-1}|x_t) shifts by G times its variance.

    s_t = -sqrt(alpha_t) (1 - alpha_bar_{t-1}) / sqrt(1 - alpha_bar_t), alpha_t their ratio.
    Sampling uses -sqrt(1 - alpha_bar_t): the same but for small t (their ratio is 0 at t = 0). -> (T,)"""
    before = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
    return -(alpha_bar / before).sqrt() * (1 - before) / (1 - alpha_bar).sqrt()


def per_sample(table, t, ndim):
    """table (T,) at times t (B,), as float32 (B,1,..) to multiply ndim-d tensors."""
    return table.to(t.device, torch.float32)[t].view(-1, *[1] * (ndim - 1))


def ranks():
    """(rank, number of processes): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Source(torch.Generator):
    """What the networks draw from in training. It is for part k of the n into which processes and --accum cut
    the batch of a step; first, last: whether this is the first, the last part that its process works on."""
    part, first, last = (0, 1), True, True


def randn_like(x, g):
    """N(0,1) shaped as x, drawn for the whole batch and cut by part: N processes see the noise of one."""
    (k, n), b = getattr(g, "part", (0, 1)), len(x)
    return torch.randn(n * b, *x.shape[1:], generator=g, device=x.device)[k * b:(k + 1) * b]


def rand(b, width, g):
    """U(0,1) of shape (b,width), cut by part as in randn_like."""
    k, n = getattr(g, "part", (0, 1))
    return torch.rand(n * b, width, generator=g, device=g.device)[k * b:(k + 1) * b]


def random_t(n, T, power, g):
    """n times in 0..T-1: T u^power, u uniform; a power below 1 draws high noise more often. -> (n,)"""
    return (rand(n, 1, g)[:, 0] ** power * T).long().clamp(max=T - 1)


# --------------------------------------------------------------------------------------------------------
# Networks, small to large

def norm(ch, groups):
    """GroupNorm; its statistics are float32 also under autocast. groups 0: one per 16 channels."""
    return nn.GroupNorm(groups or max(1, ch // 16), ch)


def zero(layer):
    """Zero-initialised: a block starts as the identity, the network as x -> 0."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def time_embedding(t, dim):
    """Sinusoids of t (B,) -> (B,dim), cosines first, periods 2 pi .. 2 pi 10000."""
    freq = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t[:, None].float() * freq
    return torch.cat([angle.cos(), angle.sin()], 1)


def resample(x, how):
    """Halve ("down", 2x2 mean) or double ("up", each pixel four times) the side of (B,C,H,W).

    Doubling is not F.interpolate, whose inputs torch.compile has given zero gradients, but copies side by
    side of (B,H,W,C), as channels_last lies in memory: what follows stays in the fast layout."""
    if how == "down":
        return F.avg_pool2d(x, 2)
    if how == "up":
        B, C, H, W = x.shape
        x = x.permute(0, 2, 3, 1)
        x = torch.cat([x, x], 3).view(B, H, 1, 2 * W * C)
        return torch.cat([x, x], 2).view(B, 2 * H, 2 * W, C).permute(0, 3, 1, 2)
    return x


def resample3d(x, how):
    """Halve ("down", 2x2x2 mean; an odd side is rounded up) or double ("up") all sides of (B,C,D,H,W).

    All three axes: the original's 3D code halves the last two only. Doubling copies, as in resample."""
    if how == "down":
        return F.avg_pool3d(x, 2, ceil_mode=True, count_include_pad=False)
    if how == "up":
        B, C, D_, H, W = x.shape
        x = x.view(B, C, D_, 1, H, 1, W, 1).expand(B, C, D_, 2, H, 2, W, 2)
        return x.reshape(B, C, 2 * D_, 2 * H, 2 * W)
    return x


def fold3d(x, p):
    """(B,C,D,H,W) -> (B,C p^3,D/p,H/p,W/p): each cube of p^3 voxels becomes channels."""
    B, C, *S = x.shape
    x = x.reshape(B, C, S[0] // p, p, S[1] // p, p, S[2] // p, p).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(B, C * p ** 3, *(s // p for s in S))


def unfold3d(x, p):
    """The inverse of fold3d. (B,C p^3,D,H,W) -> (B,C,D p,H p,W p)"""
    B, C, *S = x.shape
    x = x.reshape(B, C // p ** 3, p, p, p, *S).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(B, C // p ** 3, *(s * p for s in S))


class Attention3d(nn.Module):
    """Self-attention over all voxels, one head, residual, projection zero at first. (B,C,D,H,W) -> same

    Called as a ResBlock3d is, but neither t nor z_sem changes it."""
    def __init__(self, ch, groups):
        super().__init__()
        self.norm = norm(ch, groups)
        self.qkv = nn.Conv3d(ch, 3 * ch, 1)
        self.proj = zero(nn.Conv3d(ch, ch, 1))

    def forward(self, x, emb=None, z=None):
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)  # (B,1,D*H*W,C)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class EncoderBlock(nn.Module):
    """norm, SiLU, resample, one conv (so the original encoder), plus skip. (B,ch_in,..) -> (B,ch_out,..)"""
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


class Encoder3d(nn.Module):
    """The autoencoder's way down. x (B,ch,D,H,W) -> mean, log variance (B,z_ch,D/f,H/f,W/f)

    f = 2^(levels - 1). Where ch are the voxels of a patch, a linear code is near: it gets its own layer."""
    def __init__(self, ch, base, mult, blocks, groups, z_ch):
        super().__init__()
        layers, c = [nn.Conv3d(ch, base, 3, padding=1)], base
        for i, m in enumerate(mult):
            for _ in range(blocks):
                layers.append(ConvBlock3d(c, m * base, groups))
                c = m * base
            if i < len(mult) - 1:
                layers.append(nn.Conv3d(c, c, 3, stride=2, padding=1))
        self.trunk = nn.Sequential(*layers, norm(c, groups), nn.SiLU(), nn.Conv3d(c, z_ch, 3, padding=1))
        self.mean, self.logvar = nn.Conv3d(z_ch, z_ch, 1), nn.Conv3d(z_ch, z_ch, 1)
        nn.init.constant_(self.logvar.bias, -8)     # sd .02: at sd 1 short runs only fight the noise
        f = 2 ** (len(mult) - 1)
        self.short = nn.Conv3d(ch, z_ch, f, stride=f) if ch > 1 else None
        if self.short:
            zero(self.mean)

    def forward(self, x):
        h = self.trunk(x)
        mean = self.mean(h) + (self.short(x) if self.short else 0.0)
        return mean.float(), self.logvar(h).float().clamp(-30, 20)


class Double3d(nn.Module):
    """Twice the side, then a convolution. (B,C,D,H,W) -> (B,C,2D,2H,2W)"""
    def __init__(self, ch):
        super().__init__()
        self.conv = nn.Conv3d(ch, ch, 3, padding=1)

    def forward(self, x):
        return self.conv(resample3d(x, "up"))


class Decoder3d(nn.Module):
    """The autoencoder's way up, Encoder3d mirrored. z (B,z_ch,d,h,w) -> (B,ch,d f,h f,w f)"""
    def __init__(self, ch, base, mult, blocks, groups, z_ch):
        super().__init__()
        c = mult[-1] * base
        layers = [nn.Conv3d(z_ch, z_ch, 1), nn.Conv3d(z_ch, c, 3, padding=1)]
        for i, m in reversed(list(enumerate(mult))):
            for _ in range(blocks):
                layers.append(ConvBlock3d(c, m * base, groups))
                c = m * base
            if i > 0:
                layers.append(Double3d(c))
        self.trunk = nn.Sequential(*layers, norm(c, groups), nn.SiLU(), nn.Conv3d(c, ch, 3, padding=1))
        f = 2 ** (len(mult) - 1)
        self.short = nn.ConvTranspose3d(z_ch, ch, f, stride=f) if ch > 1 else None
        if self.short:
            zero(self.trunk[-1])

    def forward(self, z):
        return self.trunk(z) + (self.short(z) if self.short else 0.0)


class Discriminator3d(nn.Module):
    """Says for each patch of a volume whether it is real (1) or not (0). (B,1,D,H,W) -> (B,1,d,h,w)

    Normalised per volume, not over the batch: a batch of two halves is then the same as two batches."""
    def __init__(self, base, layers, groups):
        super().__init__()
        blocks, c = [nn.Conv3d(1, base, 4, stride=2, padding=1), nn.LeakyReLU(0.2)], base
        for i in range(1, layers + 1):
            new = base * 2 ** min(i, 3)
            blocks += [nn.Conv3d(c, new, 4, stride=2 if i < layers else 1, padding=1, bias=False),
                       norm(new, groups), nn.LeakyReLU(0.2)]
            c = new
        self.trunk = nn.Sequential(*blocks, nn.Conv3d(c, 1, 4, padding=1))

    def forward(self, x):
        return self.trunk(x).float()


class Wide(nn.Linear):
    """A linear layer of many inputs whose step in function space does not grow with their number: Adam moves
    every weight by lr, and hundreds of those in one direction had made z_sem 99 % a constant."""
    def __init__(self, ch_in, ch_out):
        super().__init__(ch_in, ch_out)
        nn.init.normal_(self.weight)

    def forward(self, x):
        return F.linear(x / math.sqrt(self.in_features), self.weight, self.bias)


class SemanticEncoder(nn.Module):
    """2.5D: a 2D network on each slab of axial slices, then attention over slabs. (B,1,D,H,W) -> (B,ch_out)

    Head "pool" (paper): a slab is the mean of its feature map, a volume what one pooled query attends to.
    Head "position": both are flattened, so that where something lies is not averaged away, and a linear layer
    sees the blurred slabs directly: what a linear code can tell is learnt first."""
    def __init__(self, cfg, ch_out):
        super().__init__()
        self.slab, self.patch, self.head, g = cfg.slab, cfg.enc_patch, cfg.head, cfg.groups
        n, *sides = cfg.size[0] // cfg.slab, *(s // cfg.enc_patch for s in cfg.size[1:])
        layers, c = [nn.Conv2d(cfg.slab * cfg.enc_patch ** 2, cfg.enc_base, 3, padding=1)], cfg.enc_base
        for i, m in enumerate(cfg.enc_mult):
            layers.append(EncoderBlock(c, m * cfg.enc_base, g))
            c = m * cfg.enc_base
            layers.append(EncoderBlock(c, c, g, "down"))
            sides = [s // 2 for s in sides]
        self.trunk = nn.Sequential(*layers, EncoderBlock(c, c, g), norm(c, g), nn.SiLU())
        d = ch_out if self.head == "pool" else 64
        self.token = nn.Linear(c, d) if self.head == "pool" else Wide(c * sides[0] * sides[1], d)
        blurred = cfg.slab * (cfg.size[1] // 4) * (cfg.size[2] // 4)
        self.glance = Wide(blurred, d) if self.head == "position" else None
        self.register_buffer("place", time_embedding(torch.arange(n), d), persistent=False)
        self.drop, self.score = nn.Dropout(cfg.dropout), nn.Linear(d, 1) if self.head == "pool" else None
        self.attend = nn.MultiheadAttention(d, 8, batch_first=True)
        self.norm = nn.LayerNorm(d)
        self.out = Wide(n * d, ch_out) if self.head == "position" else None

    def forward(self, x):
        B, _, n, H, W = x.shape
        x = x.reshape(B * n // self.slab, self.slab, H, W).contiguous(memory_format=torch.channels_last)
        h = self.trunk(F.pixel_unshuffle(x, self.patch))
        if self.head == "pool":
            h = self.token(h.mean((2, 3)))
        else:
            h = self.token(h.flatten(1)) + 3 * self.glance(F.avg_pool2d(x, 4).flatten(1))
        h = self.drop(h.view(B, n // self.slab, -1) + self.place)                # (B,slabs,d)
        if self.head == "pool":
            query = (self.score(h).softmax(1) * h).sum(1, keepdim=True)
            return self.norm(self.attend(query, h, h, need_weights=False)[0].squeeze(1))
        q = self.norm(h)
        return self.out((h + self.attend(q, q, q, need_weights=False)[0]).flatten(1))


class ResBlock3d(nn.Module):
    """UNet block: t scales and shifts, then z_sem does (PDAE: AdaGN twice, each with 1 +); z_dim 0: t only.

    x (B,C,D,H,W), emb (B,4*base), z (B,z_dim) -> (B,ch_out,D',H',W'). The second conv starts at zero."""
    def __init__(self, ch_in, ch_out, emb, z_dim, dropout, groups, how=""):
        super().__init__()
        self.norm1, self.how = norm(ch_in, groups), how
        self.conv1 = nn.Conv3d(ch_in, ch_out, 3, padding=1)
        self.t_proj = nn.Linear(emb, 2 * ch_out)
        self.z_proj = nn.Linear(z_dim, 2 * ch_out) if z_dim else None
        self.norm2, self.dropout = norm(ch_out, groups), nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv3d(ch_out, ch_out, 3, padding=1))
        self.skip = nn.Conv3d(ch_in, ch_out, 1) if ch_in != ch_out else nn.Identity()

    def forward(self, x, emb, z):
        h = self.conv1(resample3d(F.silu(self.norm1(x)), self.how))
        scale, shift = self.t_proj(F.silu(emb))[..., None, None, None].chunk(2, 1)
        scale = 1 + scale
        if self.z_proj is not None:
            z_scale, z_shift = self.z_proj(F.silu(z))[..., None, None, None].chunk(2, 1)
            scale, shift = scale * (1 + z_scale), shift * (1 + z_scale) + z_shift
        h = self.conv2(self.dropout(F.silu(self.norm2(h) * scale + shift)))
        return self.skip(resample3d(x, self.how)) + h


class Down3d(nn.Module):
    """First half of a UNet. x_t (B,ch,D,H,W), t (B,), z -> embedding of t, skips (the last is the bottom)"""
    def __init__(self, ch, base, mult, blocks, attention, groups, dropout, z_dim):
        super().__init__()
        self.base, emb = base, 4 * base
        self.time = nn.Sequential(nn.Linear(base, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.conv_in = nn.Conv3d(ch, base, 3, padding=1)
        self.steps, c = nn.ModuleList(), base      # each entry: a list of layers whose output is a skip
        for i, m in enumerate(mult):
            for _ in range(blocks):
                layers = [ResBlock3d(c, m * base, emb, z_dim, dropout, groups)]
                c = m * base
                self.steps.append(nn.ModuleList(layers + [Attention3d(c, groups)] * (i >= attention)))
            if i < len(mult) - 1:
                self.steps.append(nn.ModuleList([ResBlock3d(c, c, emb, z_dim, dropout, groups, "down")]))

    def forward(self, x, t, z=None):
        emb = self.time(time_embedding(t, self.base))
        skips = [self.conv_in(x)]
        for layers in self.steps:
            h = skips[-1]
            for layer in layers:
                h = layer(h, emb, z)
            skips.append(h)
        return emb, skips


class Up3d(nn.Module):
    """Second half of a UNet, and alone PDAE's gradient decoder: middle, way up, output, on given skips.

    map_shape: of the bottom, where a linear layer of z_sem is added as a map: AdaGN scales whole channels, it
    cannot say where. -> (B,ch,D,H,W), zero at initialisation"""
    def __init__(self, ch, base, mult, blocks, attention, groups, dropout, z_dim, map_shape=None):
        super().__init__()
        emb, c = 4 * base, mult[-1] * base
        skips = [base]
        for i, m in enumerate(mult):
            skips += [m * base] * (blocks + (i < len(mult) - 1))
        self.middle = nn.ModuleList([ResBlock3d(c, c, emb, z_dim, dropout, groups), Attention3d(c, groups),
                                     ResBlock3d(c, c, emb, z_dim, dropout, groups)])
        self.z_map = nn.Sequential(
            nn.Linear(z_dim, 8 * math.prod(map_shape)), nn.Unflatten(1, (8, *map_shape)), nn.Conv3d(8, c, 1)
        ) if map_shape else None
        self.steps = nn.ModuleList()      # each entry: takes one skip
        for i, m in reversed(list(enumerate(mult))):
            for j in range(blocks + 1):
                layers = [ResBlock3d(c + skips.pop(), m * base, emb, z_dim, dropout, groups)]
                c = m * base
                layers += [Attention3d(c, groups)] * (i >= attention)
                if i > 0 and j == blocks:
                    layers.append(ResBlock3d(c, c, emb, z_dim, dropout, groups, "up"))
                self.steps.append(nn.ModuleList(layers))
        self.norm_out = norm(c, groups)
        self.conv_out = zero(nn.Conv3d(c, ch, 3, padding=1))

    def forward(self, emb, skips, z=None):
        h = skips[-1] if self.z_map is None else skips[-1] + self.z_map(z)
        for layer in self.middle:
            h = layer(h, emb, z)
        for layers, skip in zip(self.steps, skips[::-1]):
            d, height, w = skip.shape[2:]
            h = h[:, :, :d, :height, :w]           # an odd side was rounded up on the way down
            h = torch.cat([h, skip], 1)
            for layer in layers:
                h = layer(h, emb, z)
        return self.conv_out(F.silu(self.norm_out(h)))


class Prior(nn.Module):
    """Latent DDIM: z_t (B,d), t (B,) -> eps_hat (B,d). An MLP whose every layer sees z_t (DiffAE app. A).

    Its forward is the training loss on a batch of standardised z_sem: L1, constant beta = 0.008."""
    def __init__(self, cfg):
        super().__init__()
        z_dim, hidden, layers = cfg.z_dim, cfg.prior_width, cfg.prior_layers
        self.alpha_bar = 0.992 ** torch.arange(1, cfg.T + 1, dtype=torch.float64)
        self.time = nn.Sequential(nn.Linear(64, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.lin = nn.ModuleList(nn.Linear(z_dim + hidden * (i > 0), hidden) for i in range(layers))
        self.scale = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        self.norm = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(layers))
        self.out = nn.Linear(hidden + z_dim, z_dim)

    def eps(self, z_t, t):
        emb = F.silu(self.time(time_embedding(t, 64)))
        h = z_t
        for i, (lin, scale, norm) in enumerate(zip(self.lin, self.scale, self.norm)):
            h = lin(h if i == 0 else torch.cat([h, z_t], 1))
            h = F.silu(norm(h * (1 + scale(emb))))
        return self.out(torch.cat([h, z_t], 1))

    def forward(self, batch, g):
        z0 = batch["z"]
        t, eps = random_t(len(z0), len(self.alpha_bar), 1.0, g), randn_like(z0, g)
        return (self.eps(q_sample(z0, t, eps, self.alpha_bar), t) - eps).abs().mean()


# --------------------------------------------------------------------------------------------------------
# The stages and the rivals. forward(batch, g) is the training loss.

def augment3d(x, strength, g):
    """Random motion of three quarters of the volumes (B,C,D,H,W): at strength 1 uniformly up to 17 degrees
    about each axis, 12 % zoom, 6 % of each side of shift; what enters from outside repeats the border."""
    if strength == 0:
        return x
    u = rand(len(x), 8, g)
    s = (2 * u[:, :7] - 1) * strength * (u[:, 7:] < 0.75)      # trilinear blurs: some stay sharp
    skew = torch.zeros(len(x), 3, 3, device=x.device)
    for k, (i, j) in enumerate(((0, 1), (0, 2), (1, 2))):
        skew[:, i, j], skew[:, j, i] = 0.3 * s[:, k], -0.3 * s[:, k]
    side = torch.tensor(x.shape[:1:-1], device=x.device)       # positions are in units of the sides, x first
    rotate = torch.linalg.matrix_exp(skew) * side / side[:, None] * (1 + 0.12 * s[:, 3]).view(-1, 1, 1)
    with torch.autocast(x.device.type, enabled=False):         # bfloat16 would round the positions
        grid = F.affine_grid(torch.cat([rotate, 0.12 * s[:, 4:7, None]], 2), x.shape, align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


class Frozen:
    """Holds a network that must not change: in eval mode, without gradients, and no registered part of the
    module that holds it. So no optimizer, EMA, train() or checkpoint of that module can touch it."""
    def __init__(self, net):
        self.net = net.eval().requires_grad_(False)

    def __deepcopy__(self, memo):
        return self


class Autoencoder(nn.Module):
    """Stage A, AutoencoderKL in 3D: L1 + KL + a patch adversarial loss (least squares) with warm-up."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        sizes = cfg.patch ** 3, cfg.ae_base, cfg.ae_mult, cfg.ae_blocks, cfg.groups, cfg.z_ch
        self.encoder, self.decoder = Encoder3d(*sizes), Decoder3d(*sizes)
        self.discriminator = Discriminator3d(cfg.disc_base, cfg.disc_layers, cfg.groups)
        self.lpips = Frozen(torch.jit.load(cfg.lpips, "cpu")) if cfg.lpips else None
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))   # saved: resumes exactly

    def start_from_pca(self, x):
        """Where the latent is a code of patches, the linear layers beside the networks start as their PCA, of
        volumes x (n,1,D,H,W) in [-1,1]; the axes are turned at random: all channels then vary alike, and an
        error costs the image alike in each. -> self"""
        if self.encoder.short is not None and len(self.cfg.ae_mult) == 1:
            v = fold3d(x, self.cfg.patch).movedim(1, -1).flatten(0, -2).double()       # (patches, voxels)
            axes = torch.linalg.eigh(torch.cov(v.T))[1][:, -self.cfg.z_ch:]
            axes = (axes @ torch.linalg.qr(torch.randn(self.cfg.z_ch, self.cfg.z_ch, dtype=v.dtype))[0]).T
            encode, decode = self.encoder.short, self.decoder.short
            with torch.no_grad():
                for p, value in ((encode.weight, axes), (encode.bias, -axes @ v.mean(0)),
                                 (decode.weight, axes), (decode.bias, v.mean(0))):
                    p.copy_(value.view(p.shape))
        return self

    def posterior(self, x):
        """x (B,1,D,H,W) in [-1,1] -> mean, log variance of q(z|x), (B,z_ch,D/f,H/f,W/f) float32"""
        return self.encoder(fold3d(x, self.cfg.patch))

    def decode(self, z):
        """z (B,z_ch,d,h,w) -> (B,1,D,H,W)"""
        return unfold3d(self.decoder(z).float(), self.cfg.patch)

    def adversarial(self, x, recon):
        """-> (generator's loss, discriminator's loss), least squares (Mao et al. 2017).

        The first sees the discriminator's weights detached, the second the reconstruction detached: one
        backward pass of their sum gives each network the gradient of its own loss and nothing else."""
        weights = {k: p.detach() for k, p in self.discriminator.named_parameters()}
        fooled = torch.func.functional_call(self.discriminator, weights, (recon,))
        real, fake = self.discriminator(torch.cat([x, recon.detach()])).chunk(2)
        return (fooled - 1).square().mean(), ((real - 1).square().mean() + fake.square().mean()) / 2

    def perceptual(self, x, recon, g):
        """LPIPS of 4 random axial slices per volume. -> scalar"""
        k = torch.randint(x.shape[2], (4,), generator=g, device=x.device)      # the same for every process
        a, b = (v[:, 0, k].flatten(0, 1).unsqueeze(1).expand(-1, 3, -1, -1) for v in (recon, x))
        return self.lpips.net.to(x.device)(a, b).mean()

    def forward(self, batch, g):
        c, x = self.cfg, batch["image"]
        mean, logvar = self.posterior(x)
        recon = self.decode(mean + (logvar / 2).exp() * randn_like(mean, g))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3, 4)).mean()
        fool, judge = self.adversarial(x, recon)
        warm = (self.step / c.adv_warmup - 1).clamp(0, 1)
        if self.training and getattr(g, "last", True):
            self.step += 1
        # Adam divides a factor of the discriminator's loss out again; but clipping is of all gradients
        # together, and must not be the discriminator's alone. Hence the same weight for both.
        loss = (recon - x).abs().mean() + c.kl * kl + c.adv * (warm * fool + judge)
        return loss + 1e-3 * self.perceptual(x, recon, g) if self.lpips else loss


class Unconditional(nn.Module):
    """Stage B: || UNet3d(z_t, t) - target ||^2 on standardised latents: (latent - shift) / scale, over the
    training scans of mean 0 and of variance 1 per channel. Both are saved with the weights."""
    def __init__(self, cfg, shift=None, scale=None):
        super().__init__()
        self.cfg = cfg
        sizes = cfg.z_ch, cfg.base, cfg.mult, cfg.blocks, cfg.attention, cfg.groups, cfg.dropout, 0
        self.down, self.up = Down3d(*sizes), Up3d(*sizes)
        one = torch.ones(1, cfg.z_ch, 1, 1, 1)
        self.register_buffer("shift", 0 * one if shift is None else torch.as_tensor(shift))
        self.register_buffer("scale", one if scale is None else torch.as_tensor(scale))
        self.alpha_bar = linear_alpha_bar(cfg.T)    # stays on the CPU: samplers read single numbers from it

    def latent(self, batch, g=None):
        """Standardised latents of a batch {"mean", "std"}: a draw from the posterior, without g its mean."""
        z = batch["mean"] if g is None else batch["mean"] + batch["std"] * randn_like(batch["mean"], g)
        return (z - self.shift) / self.scale

    def forward(self, batch, g):
        z0 = self.latent(batch, g)
        t, eps = random_t(len(z0), self.cfg.T, self.cfg.ldm_t_power, g), randn_like(z0, g)
        target = eps if self.cfg.predict == "eps" else v_target(z0, t, eps, self.alpha_bar)
        out = self.up(*self.down(q_sample(z0, t, eps, self.alpha_bar), t)).float()
        return (out - target).square().mean((1, 2, 3, 4)).mean()


class Model(nn.Module):
    """Stage C: a gradient decoder G(z_t, t, z_sem) steers the frozen stage B; z_sem = SemanticEncoder(x).

    predict eps (paper): lambda_t || eps_theta + s_t G - eps ||^2 trains, eps_theta - sqrt(1 - alpha_bar_t) G
    samples. predict v: || v_theta + G - v ||^2, which is || eps_hat - eps ||^2 / alpha_bar_t."""
    def __init__(self, cfg, frozen, ae):
        super().__init__()
        self.cfg, self.frozen, self.ae = cfg, Frozen(frozen), Frozen(ae)
        latent = [s // cfg.patch // 2 ** (len(cfg.ae_mult) - 1) for s in cfg.size]
        self.encoder = SemanticEncoder(cfg, cfg.z_dim)
        self.embed = nn.Linear(cfg.z_dim, 4 * cfg.base)
        self.gradient = Up3d(cfg.z_ch, cfg.base, cfg.mult, cfg.blocks, cfg.attention, cfg.groups, cfg.dropout,
                             4 * cfg.base)
        self.z_map = zero(nn.Linear(cfg.z_dim, cfg.z_ch * math.prod(latent))) if cfg.z_map else None
        self.alpha_bar = frozen.alpha_bar
        self.clip = False      # standardised latents are not bounded by 1: clipping costs MSE .15 at every S

    def encode(self, batch):
        """batch["image"] (B,1,D,H,W) in [-1,1] -> z_sem (B,z_dim)"""
        return self.encoder(batch["image"])

    def outputs(self, z_t, t, z_sem):
        """-> what the frozen network predicts (v or eps) and G (0 without z_sem), both like z_t, float32"""
        with torch.no_grad():
            emb, skips = self.frozen.net.down(z_t, t)
            out = self.frozen.net.up(emb, skips)
        if z_sem is None:
            return out.float(), 0.0
        G = self.gradient(emb, skips, self.embed(z_sem)).float()
        if self.z_map is not None:     # v holds -sqrt(1 - alpha_bar_t) x0: a linear decoder of z_sem for x0
            G = G - signal_noise(self.alpha_bar, t, z_t.ndim)[1] * self.z_map(z_sem).float().view(z_t.shape)
        return out.float(), G

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
        error = out + per_sample(shift_training(self.alpha_bar), t, z0.ndim) * G - eps
        return per_sample(snr_weight(self.alpha_bar), t, 1) * error.square().mean((1, 2, 3, 4))

    def forward(self, batch, g):
        if self.cfg.augment:       # of the volume: its latent is no longer the cached one
            x = augment3d(batch["image"], self.cfg.augment, g)
            with torch.no_grad():
                mean, logvar = self.ae.net.posterior(x)
            batch = {"image": x, "mean": mean, "std": (logvar / 2).exp()}
        z0 = self.frozen.net.latent(batch, g)
        t, eps = random_t(len(z0), self.cfg.T, self.cfg.t_power, g), randn_like(z0, g)
        return self.loss(z0, self.encode(batch), t, eps).mean()


class DAE(nn.Module):
    """The voxel-space rival: diffae.py's model in 3D, with the semantic encoder of stage C."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, deepest = cfg, len(cfg.dae_mult) - 1
        sizes = (cfg.dae_patch ** 3, cfg.dae_base, cfg.dae_mult, cfg.blocks, deepest + 1, cfg.groups,
                 cfg.dropout, cfg.z_dim)
        bottom = [-(-s // cfg.dae_patch // 2 ** deepest) for s in cfg.size]
        self.encoder = SemanticEncoder(cfg, cfg.z_dim)
        self.down, self.up = Down3d(*sizes), Up3d(*sizes, bottom if cfg.z_map else None)
        self.alpha_bar = linear_alpha_bar(cfg.T)
        self.clip = True       # voxels are bounded

    def encode(self, batch):
        """batch["image"] (B,1,D,H,W) in [-1,1] -> z_sem (B,z_dim)"""
        return self.encoder(batch["image"])

    def output(self, x_t, t, z_sem):
        """What the UNet predicts, v or eps. -> (B,1,D,H,W) float32"""
        emb, skips = self.down(fold3d(x_t, self.cfg.dae_patch), t, z_sem)
        return unfold3d(self.up(emb, skips, z_sem).float(), self.cfg.dae_patch)

    def eps(self, x_t, t, z_sem):
        """eps_hat (B,1,D,H,W) at levels t (B,), whatever the UNet was trained to predict."""
        out = self.output(x_t, t, z_sem)
        return out if self.cfg.predict == "eps" else eps_from_v(out, x_t, t, self.alpha_bar)

    def loss(self, x0, z_sem, t, eps):
        """Squared error of the prediction per volume. -> (B,)"""
        target = eps if self.cfg.predict == "eps" else v_target(x0, t, eps, self.alpha_bar)
        out = self.output(q_sample(x0, t, eps, self.alpha_bar), t, z_sem)
        return (out - target).square().mean((1, 2, 3, 4))

    def forward(self, batch, g):
        x0 = augment3d(batch["image"], self.cfg.augment, g)
        t, eps = random_t(len(x0), self.cfg.T, self.cfg.ldm_t_power, g), randn_like(x0, g)
        return self.loss(x0, self.encode({"image": x0}), t, eps).mean()


class Supervised(nn.Module):
    """The supervised rival: the semantic encoder with one output per column of batch["y"] (B,k), nan missing.

    binary (k,) bools: those columns are 0 or 1 (cross-entropy), the others standardised (squared error)."""
    def __init__(self, cfg, binary):
        super().__init__()
        self.cfg, self.binary, self.encoder = cfg, binary, SemanticEncoder(cfg, cfg.z_dim)
        self.out = nn.Linear(cfg.z_dim, len(binary))

    def encode(self, batch):
        """-> (B,k): a logit or a standardised value per column; what semantic_codes collects"""
        return self.out(self.encoder(batch["image"]))

    def forward(self, batch, g):
        x, y, losses = augment3d(batch["image"], self.cfg.augment, g), batch["y"], []
        out = self.encode({"image": x}).float()
        for k, binary in enumerate(self.binary):
            known = ~y[:, k].isnan()
            o, target = out[:, k], torch.where(known, y[:, k], torch.zeros_like(y[:, k]))
            loss = F.binary_cross_entropy_with_logits(o, target, reduction="none") if binary else \
                (o - target).square()
            losses.append((loss * known).mean())     # not over the known: a part of a batch has its own share
        return torch.stack(losses).sum()


# --------------------------------------------------------------------------------------------------------
# Samplers: functions of eps_fn(x_t, t), so that a closed-form oracle can stand in for the network

def times(S, T, stride="trailing"):
    """S of T times, increasing. trailing: round(i T/S) - 1, i = 1..S; leading: floor(i T/S), i = 0..S-1."""
    if not 1 <= S <= T:
        raise ValueError(f"S={S} sampling steps: from 1 to T={T} are possible")
    if stride == "leading":
        return [i * T // S for i in range(S)]
    return [round(i * T / S) - 1 for i in range(1, S + 1)]


def ddim_step(x, t_from, t_to, eps_hat, alpha_bar, clip=False):
    """Deterministic DDIM from one level to another, up or down (Song et al. 2021, eq. 12 with sigma = 0).

    x, eps_hat (B,..). Levels: -1 clean, 0..T-1, T pure noise. clip: x0_hat to [-1,1] and eps re-derived.
    -> like x"""
    ab = [1.0 if t < 0 else 0.0 if t == len(alpha_bar) else float(alpha_bar[t]) for t in (t_from, t_to)]
    x0_hat = (x - math.sqrt(1 - ab[0]) * eps_hat) / math.sqrt(ab[0])
    if clip and ab[0] < 1:
        x0_hat = x0_hat.clamp(-1, 1)
        eps_hat = (x - math.sqrt(ab[0]) * x0_hat) / math.sqrt(1 - ab[0])
    return math.sqrt(ab[1]) * x0_hat + math.sqrt(1 - ab[1]) * eps_hat


def ddim_decode(eps_fn, x_T, S, alpha_bar, stride="trailing", clip=False):
    """x_T -> x_0 in S calls of eps_fn(x_t, t): the walk down (DDIM eq. 12). Shapes of x_T."""
    x, ts = x_T, [-1] + times(S, len(alpha_bar), stride)
    for t, t_prev in zip(ts[:0:-1], ts[-2::-1]):
        x = ddim_step(x, t, t_prev, eps_fn(x, t), alpha_bar, clip)
    return x


def ddim_encode(eps_fn, x0, S, alpha_bar, stride="trailing", clip=False):
    """x_0 -> x_T: the same walk up (DiffAE eq. 8), with eps at the level it is on (at 0 for the first step).

    stride "leading" is the original code's: x_0 counts as level 0, and x_T is the last eps_hat itself."""
    x, ts = x0, times(S, len(alpha_bar), stride)
    ts = [-1] + ts if stride == "trailing" else ts + [len(alpha_bar)]
    for t, t_next in zip(ts[:-1], ts[1:]):
        x = ddim_step(x, t, t_next, eps_fn(x, max(t, 0)), alpha_bar, clip)
    return x


def slerp(a, b, alpha):
    """From noise a to noise b on the sphere, each sample by its own angle. a, b (B,..); alpha number or (B,).

    Never NaN: the cosine is clamped, and (anti)parallel samples are joined by a straight line. -> like a"""
    shape, a, b = a.shape, a.flatten(1), b.flatten(1)
    alpha = torch.as_tensor(alpha, dtype=a.dtype, device=a.device).view(-1, 1)
    cos = F.cosine_similarity(a, b, dim=1).clamp(-1, 1).unsqueeze(1)
    omega = cos.acos()
    straight = omega.sin() < 1e-4
    wa = torch.where(straight, 1 - alpha, ((1 - alpha) * omega).sin() / omega.sin().clamp(min=1e-4))
    wb = torch.where(straight, alpha, (alpha * omega).sin() / omega.sin().clamp(min=1e-4))
    return (wa * a + wb * b).view(shape)


# --------------------------------------------------------------------------------------------------------
# Training. Batch, noise and dropout of step k are functions of (seed, k) alone: there is no random state to
# save, and a run that is killed and started again ends bitwise with the weights of one that was not.

def mix(*numbers):
    """One well-mixed 63-bit seed from several integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def batch_rows(n, batch, seed, step):
    """The `batch` row numbers of a step: an endless chain of permutations of 0..n-1, a new one each epoch."""
    at = np.arange(step * batch, (step + 1) * batch)
    order = {e: np.random.default_rng([seed, e]).permutation(n) for e in np.unique(at // n)}
    return np.array([order[i // n][i % n] for i in at])


def save(path, state):
    """Atomic: written beside, fsynced, renamed. When that fails, the checkpoint that was there is kept."""
    part = path.with_suffix(".part")
    with D.writing(path):
        try:
            with open(part, "wb") as f:
                torch.save(state, f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def restore(path, run):
    """The checkpoint at `path`, or None. Exits if it is damaged, unsafe or not of the `run` described."""
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as f:
            if wrong := f.testzip():     # torch.load does not compare the checksums that torch.save wrote
                raise ValueError(f"checksum of {wrong}")
        state = torch.load(path, map_location="cpu", weights_only=True)  # never unpickles code
        was = state["run"]
    except Exception as e:    # what a damaged file raises is of any kind
        why = e if isinstance(e, (OSError, ValueError)) else type(e).__name__
        D.fail(f"{path}: damaged, or not a checkpoint of this program ({why}); put a copy back, delete it to "
               "start over, or change --out")
    differ = [f"{k} {was.get(k)!r} -> {run.get(k)!r}" for k in {**was, **run} if was.get(k) != run.get(k)]
    if differ:
        D.fail(f"{path}: made by another run ({', '.join(differ)}); choose another --out, or delete it")
    return state


def compile_checked(model, batch, cfg, g):
    """torch.compile the networks of `model`, unless one batch's gradients then differ from eager's.

    Releases 2.10 to 2.13 have miscompiled blocks like these silently. The weights are shaken to compare, as a
    zero-initialised layer hides what lies upstream of it; dropout is off. -> what was done, for the log"""
    networks = [net for net in model.children() if any(True for _ in net.parameters())]
    params, training = list(model.parameters()), model.training
    kept = [p.detach().clone() for p in params]

    def gradients():
        with amp(cfg, g.device):
            loss = model.eval()(batch, g.manual_seed(0))
        return torch.autograd.grad(loss, params)

    try:
        with torch.no_grad():
            for p in params:
                p.add_(0.02 * torch.randn(p.shape, generator=g, device=p.device))
        eager = gradients()
        for net in networks:
            net.compile()
        scale = max(a.norm() for a in eager)     # a tensor whose gradient is all rounding must not count
        errors = [(a - b).norm() / (a.norm() + 1e-3 * scale) for a, b in zip(eager, gradients())]
        worst = float(torch.stack(errors).max())
        outcome = f"compiled; its gradients are within {100 * worst:.1f} % of eager's"
        if not worst < 0.3:                      # bfloat16 gives some per cent, the known bugs 100 or NaN
            raise ArithmeticError(f"gradients off by {100 * worst:.0f} %")
    except Exception as e:     # no compiler, an unsupported GPU, a miscompilation: slower, but right
        outcome = f"runs eager, torch.compile failed ({type(e).__name__}: {str(e).splitlines()[0][:80]})"
        for net in networks:
            net._compiled_call_impl = None
    with torch.no_grad():
        for p, old in zip(params, kept):
            p.copy_(old)
    model.train(training)
    return outcome


def amp(cfg, device):
    """bfloat16 autocast, if cfg wants it and the device is fast at it (CPUs without AVX512-BF16 are not)."""
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else \
        device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16 and fast)


def peak_gb(device):
    """The most memory that this process has held, in GB: on the GPU, else in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0
    return rss / (1e9 if sys.platform == "darwin" else 1e6)


def trim_log(path, step):
    """Keep the lines of `path` up to `step`: later ones will be made again, one may be cut in half."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    M.write_atomically(path, "".join(line + "\n" for line in kept).encode())


def log_line(path, row):
    """Append a dict to a log as one line of JSON."""
    with D.writing(path), open(path, "a") as f:
        f.write(json.dumps(row) + "\n")


def fast_layout(model):
    """Convolution weights, and with them all feature maps, in the memory layout that is fastest. -> model

    Channels last; but on a CPU not in 3D, where GroupNorm would lose more than convolutions gain."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)
        elif isinstance(layer, nn.Conv3d) and layer.weight.is_cuda:
            layer.to(memory_format=torch.channels_last_3d)
    return model


def backward(net, batch, cfg, g, step):
    """The gradients of a step, in cfg.accum passes over parts of what this process has of the batch. -> loss

    The parts give what the whole would, up to rounding: only dropout is drawn for each by itself."""
    (rank, world), share, total = ranks(), len(next(iter(batch.values()))), 0.0
    accum = math.gcd(cfg.accum, share)       # a stage whose batch is smaller may need fewer
    for i in range(accum):
        g.manual_seed(mix(cfg.seed, 1, step))
        torch.manual_seed(mix(cfg.seed, 2, step, rank * accum + i))      # dropout
        g.part, g.first, g.last = (rank * accum + i, world * accum), i == 0, i == accum - 1
        net.require_backward_grad_sync = g.last                          # processes exchange sums, not parts
        rows = slice(i * share // accum, (i + 1) * share // accum)
        with amp(cfg, g.device):
            loss = net({k: v[rows] for k, v in batch.items()}, g) / accum
        loss.backward()
        total = total + loss.detach()
    return total


def fit(model, loader, cfg, name, run, steps, watch=None):
    """Train `model` to step `steps`. -> (its EMA, the step reached). model(batch, g) is the loss of a batch.

    Goes on from OUT/name.pt, which must be of the same `run` (a dict of plain values). watch(ema, step)
    -> dict joins the log at step 0 and each save. SIGTERM, SIGUSR1, SIGINT: save, exit with 143 or 130."""
    rank, world = ranks()
    device = next(model.parameters()).device
    path, log_path = Path(cfg.out, f"{name}.pt"), Path(cfg.out, f"{name.replace('ckpt', 'log')}.jsonl")
    fast_layout(model).train()
    params = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.Adam(params, lr=cfg.lr, fused=True)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    averaged = [e for e, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]
    step, seen = 0, []     # seen: (loss, gradient norm) of each step since the last line of the log
    where = f"{device.type}, {torch.get_num_threads()} threads, {world} processes, --accum {cfg.accum}"

    state, fresh = restore(path, run), True
    if state:
        if rank == 0 and state["step"] < steps and state.get("where", where) != where:
            tqdm.write(f"{name}: from {state['where']} to {where}: equal up to rounding only")
        try:
            model.load_state_dict(state["model"])
            ema.load_state_dict(state["ema"])
            opt.load_state_dict(state["optimizer"])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, KeyError):
            D.fail(f"{path}: its weights do not fit this network (edited source?); choose another --out")
        for p in params:   # the fused kernel walks raw memory: the state must lie in it as its parameter does
            opt.state[p] = {k: torch.empty_like(p).copy_(v) if v.shape == p.shape else v
                            for k, v in opt.state[p].items()}
        step, seen, state, fresh = state["step"], list(state["seen"].to(device)), None, False
    if rank == 0:
        trim_log(log_path, -1 if fresh else step)
    if step >= steps:
        return ema, step

    g = Source(device)
    mine = slice(rank * cfg.batch // world, (rank + 1) * cfg.batch // world)
    rows_of = lambda k: batch_rows(len(loader), cfg.batch, cfg.seed, k)[mine]
    row = dict(step=0)
    if cfg.compile and device.type == "cuda":
        row["note"] = compile_checked(model, loader.batch(rows_of(0)), cfg, g)
        tqdm.write(f"{name}: {row['note']}")
    if rank == 0 and fresh:    # a fault in watch shows now, and not after hours
        row |= watch(ema, 0) if watch else {}
        log_line(log_path, row)
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model

    caught = []

    def on_signal(number, frame):
        if caught:
            os._exit(128 + number)                       # the second one does not wait
        caught.append(number)
    signals = [getattr(signal, s) for s in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, s)]
    handlers = [signal.signal(s, on_signal) for s in signals]

    bar = tqdm(total=steps, initial=step, desc=name, unit="step", mininterval=1, disable=rank > 0 or None)
    began, since = time.perf_counter(), step     # no jump of the clock can make a rate negative
    for batch in loader.stream(rows_of(k) for k in range(step, steps)):
        lr = cfg.lr * min(1, (step + 1) / 100)
        for group in opt.param_groups:
            group["lr"] = lr
        opt.zero_grad()
        loss = backward(net, batch, cfg, g, step)
        grad_norm = nn.utils.clip_grad_norm_(params, 1.0)
        opt.found_inf = (~torch.isfinite(grad_norm)).float()     # if so, the fused step skips itself: no sync
        opt.step()
        with torch.no_grad():      # else the average would remember all of its past, for a gradient
            torch._foreach_lerp_(averaged, params, 1 - min(cfg.ema, (1 + step) / (10 + step)))
        seen.append(torch.stack([loss, grad_norm]))
        step += 1
        bar.update()

        stop = bool(caught)
        if world > 1:                                        # one process was told: all save the same step
            flag = torch.tensor(float(stop), device=device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            stop = flag.item() > 0
        due = step % cfg.save_every == 0 or step == steps
        line = due or step % cfg.log_every == 0
        if not (line or stop):                               # the rest waits for the device: not every step
            continue
        values = torch.stack(seen)
        if world > 1:
            dist.all_reduce(values)
            values /= world
        bad = (~torch.isfinite(values)).any(1).nonzero()
        if len(bad):
            D.fail(f"loss or gradient not finite at step {step - len(seen) + int(bad[0])}, lr {lr:.2g}: "
                   f"stopped before the weights changed; {path} is the last save; try a smaller --lr", 1)
        seen = [] if line else list(values)
        if line and rank == 0:
            loss, grad_norm = values.cpu().double().mean(0).tolist()
            row = dict(step=step, loss=loss, grad_norm=grad_norm, lr=lr, peak_gb=round(peak_gb(device), 3),
                       img_s=float(f"{(step - since) * cfg.batch / (time.perf_counter() - began):.4g}"))
            row |= watch(ema, step) if due and watch else {}
            log_line(log_path, row)
            bar.set_postfix(loss=f"{loss:.4f}", img_s=row["img_s"])
            if due and bar.disable:                          # no terminal: a line per save
                print(f"{name}: step {step} of {steps}, loss {loss:.4f}, {row['img_s']} images/s", flush=True)
            began, since = time.perf_counter(), step
        if (due or stop) and rank == 0:
            seen_yet = torch.stack(seen) if seen else torch.zeros(0, 2)
            save(path, dict(run=run, where=where, step=step, seen=seen_yet, model=model.state_dict(),
                            ema=ema.state_dict(), optimizer=opt.state_dict()))
        if stop:
            break
    bar.close()
    for s, handler in zip(signals, handlers):
        signal.signal(s, handler)
    if world > 1:
        dist.barrier()         # a process that leaves early takes the one that is saving with it
    if caught or stop:
        print(f"saved step {step}; resume with the same command", flush=True)
        sys.exit(130 if caught == [signal.SIGINT] else 143)
    return ema, step


# --------------------------------------------------------------------------------------------------------
# Evaluation: every number is of subjects that no network, probe or threshold has seen

@torch.inference_mode()
def in_batches(fn, *tensors, batch=64):
    """fn over slices of the tensors' first axis, concatenated: any number of images in bounded memory."""
    while True:
        try:
            starts = range(0, len(tensors[0]), batch)
            return torch.cat([fn(*(t[i:i + batch] for t in tensors)) for i in starts])
        except torch.OutOfMemoryError:      # what was trained with --accum must be evaluated, too
            if batch == 1:
                raise
            batch //= 2


def semantic_codes(model, loader):
    """z_sem (the VAE: its mean) of every row, not augmented. -> (N,z_dim) float32"""
    with amp(model.cfg, loader.device):
        encode = lambda rows: model.encode(loader.batch(rows)).float()
        return in_batches(encode, np.arange(len(loader)))


def eps_fn(model, z_sem):
    """model.eps at a fixed z_sem, as the samplers want it: (x_t (B,..), t int) -> eps_hat, like x_t."""
    def fn(x_t, t):
        with amp(model.cfg, x_t.device):
            return model.eps(x_t, torch.full((len(x_t),), t, device=x_t.device), z_sem)
    return fn


def invert(model, x0, z_sem, S):
    """The noise from which, with z_sem, render() comes back to x0, latents or voxels. -> like x0"""
    up = lambda x, z: ddim_encode(eps_fn(model, z), x, S, model.alpha_bar, model.cfg.stride, model.clip)
    return in_batches(up, x0, z_sem, batch=16)


def render(model, x_T, z_sem, S):
    """Noise, drawn or inverted, and z_sem -> latents or voxels, like x_T"""
    down = lambda x, z: ddim_decode(eps_fn(model, z), x, S, model.alpha_bar, model.cfg.stride, model.clip)
    return in_batches(down, x_T, z_sem, batch=16)


def shown(x):
    """(B,1,H,W) in [-1,1] -> numpy (B,H,W) in [0,1]"""
    return ((x[:, 0].float().cpu().numpy() + 1) / 2).clip(0, 1)


def other_patient(subject):
    """For each row a row of another subject, about half the list away. (N,) -> (N,) int"""
    n = len(subject)
    far = (np.arange(n)[:, None] + n // 2 + np.arange(n)) % n
    return np.array([next((j for j in far[i] if subject[j] != subject[i]), i) for i in range(n)])


def z_losses(model, x0, z_sem, z_wrong, g, strata=8):
    """Is z_sem used? The loss of each image with its z_sem and with a wrong one, t and eps being the same.

    One t in each of the strata. -> two (strata,B), low to high noise. Their difference is z_gap; 0: unused"""
    out = []
    for k in range(strata):
        t = ((k + torch.rand(len(x0), generator=g, device=x0.device)) / strata * model.cfg.T).long()
        eps = torch.randn(x0.shape, generator=g, device=x0.device)
        with amp(model.cfg, x0.device):
            out.append(torch.stack([in_batches(model.loss, x0, z, t, eps) for z in (z_sem, z_wrong)]))
    return torch.stack(out, 1)


def neighbour_correlation(z):
    """Correlation of adjacent voxels, mean of three axes, of each sample: 0 if white. (B,C,D,H,W) -> (B,)"""
    z = z - z.mean((2, 3, 4), keepdim=True)
    power = z.square().mean((1, 2, 3, 4))
    shifted = [z.narrow(d, 1, z.shape[d] - 1) * z.narrow(d, 0, z.shape[d] - 1) for d in (2, 3, 4)]
    return sum(v.mean((1, 2, 3, 4)) for v in shifted) / (3 * power)


def identity(model):
    """Hash of all weights: what later stages remember of the one they were built on. -> 16 hex digits"""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def cached_latents(ae, path, loader, key):
    """Posterior mean and standard deviation of every volume: from `path` if they are of this `key` (stage A
    and data), else computed and saved there. -> two (N,z_ch,d,h,w) float32"""
    try:
        with np.load(path, allow_pickle=False) as f:
            if str(f["key"]) == key:
                return f["mean"], f["std"]
    except Exception:       # not there or damaged: what is derived can be made again
        pass
    chunks = []
    for rows in tqdm(np.array_split(np.arange(len(loader)), -(-len(loader) // 8)), "latents", unit="batch"):
        with torch.inference_mode(), amp(ae.cfg, loader.device):
            mean, logvar = ae.posterior(loader.batch(rows)["image"])
        chunks.append([mean.cpu().numpy(), (logvar / 2).exp().cpu().numpy()])
    mean, std = (np.concatenate(c) for c in zip(*chunks))
    buffer = io.BytesIO()
    np.savez(buffer, key=key, mean=mean, std=std)
    M.write_atomically(path, buffer.getvalue())
    return mean, std


def pictures_of(ae, prior, z0):
    """Standardised latents (B,z_ch,d,h,w) -> volumes, numpy (B,D,H,W) in [0,1]"""
    with amp(ae.cfg, z0.device):
        return shown(in_batches(lambda z: ae.decode(z * prior.scale + prior.shift), z0, batch=8))


def view(x):
    """(D,H,W) -> axial and coronal middle slice side by side, the coronal one head up. -> (max(H,D),2W)"""
    axial, coronal = x[x.shape[0] // 2], x[::-1, x.shape[1] // 2]
    high = max(len(axial), len(coronal))
    pad = lambda s: np.pad(s, (((high - len(s)) // 2, (high - len(s) + 1) // 2), (0, 0)))
    return np.concatenate([pad(axial), pad(coronal)], 1)


def small(x, voxels=200_000):
    """(N,D,H,W) -> float32 block means of at most so many voxels: for linear models of large volumes."""
    k = next(k for k in (1, 2, 4, 8, 16) if x[0].size <= voxels * k ** 3)
    means = [F.avg_pool3d(torch.as_tensor(np.asarray(v), dtype=torch.float32)[None], k)[0].numpy() for v in x]
    return np.stack(means)


def watch_autoencoder(cfg, loader):
    """-> watch(ema, step) for fit: L1 and SSIM of 4 validation volumes, preview_A.png to look at."""
    x = loader.batch(evenly(np.arange(len(loader)), 4))["image"]

    def watch(ema, step):
        with torch.inference_mode(), amp(cfg, x.device):
            recon = ema.decode(ema.posterior(x)[0])
        lines = [shown(x), shown(recon)]
        M.grid(Path(cfg.out, "preview_A.png"), [[view(v) for v in line] for line in lines],
               ["scan", "autoencoder"], [], f"validation subjects at step {step}")
        return dict(val_l1=(recon - x).abs().mean().item(), val_ssim=float(M.ssim(*lines).mean()))
    return watch


def watch_semantic(cfg, loader, subject):
    """-> watch(ema, step) for fit of stage C: z_gap of 8 validation volumes, preview_C.png to look at."""
    rows = evenly(np.arange(len(loader)), 8)
    wrong, batch = torch.as_tensor(other_patient(subject[rows])), loader.batch(rows)

    def watch(ema, step):
        g = torch.Generator(loader.device).manual_seed(0)
        with torch.inference_mode(), amp(cfg, loader.device):
            z, z0 = ema.encode(batch).float(), ema.frozen.net.latent(batch)
        true, shuffled = z_losses(ema, z0, z, z[wrong.to(z.device)], g, strata=4).mean((1, 2)).tolist()
        back = render(ema, torch.randn(z0[::3].shape, generator=g, device=z0.device), z[::3], 10)
        lines = [shown(batch["image"][::3]),
                 *(pictures_of(ema.ae.net, ema.frozen.net, v) for v in (z0[::3], back))]
        M.grid(Path(cfg.out, "preview_C.png"), [[view(v) for v in line] for line in lines],
               ["scan", "autoencoder", "z_sem, random z_T"], [], f"validation subjects at step {step}")
        return dict(val_loss=true, val_loss_shuffled=shuffled, z_gap=shuffled - true)
    return watch


def linear_numbers(key, codes, scores, y, part, subject, seed):
    """Linear probes of y (N,), nan missing, from codes {row: (N,d)}, "" being ours; scores {row: (N,)} are
    predictions already. y in {0,1}: KEY_auroc, _acc, _precision, _recall, _f1 (called: p > 1/2); else
    KEY_mae, _rmse, _r2. With the trivial row. -> metrics. ValueError: the rows cannot answer"""
    y = y.astype(np.float64)
    train, test = (np.flatnonzero((part == p) & ~np.isnan(y)) for p in ("train", "test"))
    if len(np.unique(y[train])) < 2 or not len(test):
        raise ValueError("the training rows have one value only" if len(test) else "no test row has a value")
    out, rows = {}, {}
    classes = set(np.unique(y[train])) == {0, 1}
    for row, code in codes.items():
        probe = M.probe("linear", "class" if classes else "regression", code[train], y[train], subject[train],
                        seed)
        rows[row] = M.logits(probe, code) if classes else probe.predict(code.astype(np.float64))
    if classes:
        numbers = lambda score, truth: M.classify(score, truth, 0.0) | {"auroc": M.auroc(score, truth)}
        short = {"accuracy": "acc"}
        trivial, keys = {"all_positive": np.full(len(y), np.inf)}, "auroc accuracy precision recall f1"
    else:
        numbers, short = M.regression, {}
        trivial, keys = {"mean": np.full(len(y), y[train].mean())}, "mae rmse r2"
    for row, score in {**rows, **scores, **trivial}.items():
        for k in keys.split():
            out[f"{key}_{short.get(k, k)}" + (f".{row}" if row else "")] = M.row_of(
                lambda score, truth: numbers(score, truth)[k], subject[test], score[test], y[test],
                better="lower" if k in ("mae", "rmse") else "higher")
    return out


def volume_reader(images, masks, label, ml, subject):
    """Measures a structure in volumes without a mask: ridge regression from the voxels in and next to where
    it lies in any of these masks to its volume. images (N,D,H,W); ml, subject (N,) -> read(images), ml"""
    where = np.stack([(m == label).any(0) for m in np.array_split(masks, -(-len(masks) // 64))]).any(0)
    where = F.max_pool3d(torch.as_tensor(where, dtype=torch.float32)[None], 3, 1, 1)[0].bool().numpy()
    where = np.flatnonzero(where)
    where = where[np.linspace(0, len(where) - 1, min(len(where), 4000)).astype(int)]
    pick = lambda x: np.stack([np.asarray(v).reshape(-1)[where] for v in x]).astype(np.float64)
    fitted = M.probe("linear", "regression", pick(images), ml, subject)
    return lambda x: fitted.predict(pick(x))


def evenly(rows, n):
    """At most n of the rows, evenly spaced, the first and the last among them."""
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), n)).astype(int)]


def triples(subject, session):
    """Every (start, target, end) of rows of one subject, in order of time. -> (n,3) int"""
    out = []
    for s in np.unique(subject):
        rows = sorted(np.flatnonzero((subject == s) & ~np.isnan(session)), key=lambda i: session[i])
        out += [t for t in itertools.combinations(rows, 3) if len(set(session[list(t)])) == 3]
    return np.array(out, int).reshape(-1, 3)


def seconds_of(fn, device):
    """Wall-clock time of one call of fn, and on CUDA the peak memory, else nan."""
    wait = lambda: torch.cuda.synchronize(device) if device.type == "cuda" else None
    wait()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    fn()
    wait()
    return time.perf_counter() - began, peak_gb(device) if device.type == "cuda" else math.nan


def throughput(cfg, batch, ae, model, dae, k, crop=1):
    """Latent against voxel space: same volumes, steps, batch, machine, run; each is called once before.

    Reconstruction is z_sem, S steps of inversion, S of sampling (and the autoencoder both ways); k of them
    are timed and taken S / k times. Training is forward, backward and Adam; stage C's is on cached latents.
    crop > 1: the voxel-space UNet, all convolutions but for its middle, was built for a crop by this factor
    of each side; its time is taken crop^3 times. -> metrics. Both models' gradients are overwritten"""
    device, metrics, n = batch["image"].device, {}, len(batch["image"])
    for row, net in (("", model), (".dae", dae)):
        opt = torch.optim.Adam(net.requires_grad_(True).train().parameters(), lr=0.0, fused=True)
        D_, H, W = (s // crop for s in batch["image"].shape[2:])
        x0 = batch["image"][:, :, :D_, :H, :W] if row else net.frozen.net.latent(batch)
        t, eps = torch.full((n,), cfg.T // 2, device=device), torch.randn_like(x0)
        z = torch.zeros(n, cfg.z_dim, device=device, requires_grad=True)

        def unet():
            with amp(cfg, device):
                loss = net.loss(x0, z, t, eps).mean()
            loss.backward()

        def rest():        # what a crop does not shorten
            with amp(cfg, device):
                z_sem = net.encode(batch)
            z_sem.backward(z.grad.to(z_sem.dtype))
            opt.step()

        @torch.inference_mode()
        def ends():        # what does not depend on S
            with amp(cfg, device):
                net.encode(batch)
                if not row:
                    ae.decode(ae.posterior(batch["image"])[0])
        walk = lambda: render(net, invert(net, x0, z.detach(), k), z.detach(), k)
        for kind, part, other, factor in (("train", unet, rest, 1), ("recon", walk, ends, cfg.S / k)):
            factor *= crop ** 3 if row else 1
            part(), other()
            (a, gb_a), (b, gb_b) = seconds_of(part, device), seconds_of(other, device)
            metrics[f"{kind}_vol_s{row}"] = M.row(n / (factor * a + b), unit="1/s")
            if device.type == "cuda":
                metrics[f"{kind}_peak_gb{row}"] = M.row(max(gb_a, gb_b), unit="GB", better="lower")
            net.eval()
        net.zero_grad()
        del opt                # gradients and moments of one model at a time
    for key, kind in (("throughput_ratio", "recon"), ("train_ratio", "train")):
        value = metrics[f"{kind}_vol_s"]["value"] / metrics[f"{kind}_vol_s.dae"]["value"]
        metrics[key] = M.row(value, unit="x")
    return metrics


class Study:
    """What every part of the report reads: trained stages, scans and latents, by row of the data.

    models: {"ae", "ldm", "": stage C, "dae" or not}, EMAs; loader: all rows, with latents."""
    def __init__(self, cfg, data, part, loader, models):
        self.cfg, self.data, self.part, self.loader, self.device = cfg, data, part, loader, loader.device
        self.ae, self.ldm, self.model, self.dae = (models.get(k) for k in ("ae", "ldm", "", "dae"))
        self.g, self.metrics = torch.Generator(self.device).manual_seed(cfg.seed), {}
        self.train, self.test = np.flatnonzero(part == "train"), np.flatnonzero(part == "test")
        self.some, self.few = evenly(self.train, 500), evenly(self.test, cfg.eval_images)
        self.first = self.test[np.unique(data.subject[self.test], return_index=True)[1]]    # of each subject
        self.codes = {row: semantic_codes(models[row], loader) for row in ("", "dae") if row in models}
        self.z = self.codes[""]

    def volumes(self, rows):
        """-> scans (n,D,H,W) in [0,1]"""
        return np.stack([self.data.image[i] for i in rows]) / 255

    def latent(self, rows):
        """-> standardised posterior means (n,z_ch,d,h,w)"""
        return in_batches(lambda i: self.ldm.latent(self.loader.batch(i)), np.asarray(rows))

    def images(self, z0):
        """Standardised latents -> volumes, numpy (n,D,H,W) in [0,1]"""
        return pictures_of(self.ae, self.ldm, z0)

    def noise(self, n):
        """-> (n,z_ch,d,h,w)"""
        return torch.randn(n, *self.latent([0]).shape[1:], generator=self.g, device=self.device)

    def put(self, key, rows, *arrays, better="higher", unit="", statistic=np.mean):
        """One number with its interval over the subjects of these rows."""
        self.metrics[key] = M.row_of(statistic, self.data.subject[rows], *arrays, unit=unit, better=better)

    def put_images(self, key, row, real, fake, rows):
        """SSIM and MSE of fake against real (n,D,H,W). key: "recon_{}_T10", with a place for their names"""
        dot = f".{row}" if row else ""
        self.put(key.format("ssim") + dot, rows, M.ssim(real, fake))
        self.put(key.format("mse") + dot, rows, M.mse(real, fake), better="lower")

    def grid(self, name, rows, *labels):
        """Volumes as pairs of slices, to OUT/name.png"""
        cells = [[x if x.ndim == 2 else view(x) for x in row] for row in rows]
        M.grid(Path(self.cfg.out, f"{name}.png"), cells, *labels)


def report_images(s):
    """1. The ceiling (stage A), with the inverted z_T, and from z_sem alone; z_T; is z_sem used? -> PCA"""
    rows, model, device = s.few, s.model, s.device
    real, z0, z, x0 = s.volumes(rows), s.latent(rows), s.z[rows], s.loader.batch(rows)["image"]
    some = s.volumes(s.some)
    mean, pca = np.broadcast_to(some.mean(0), real.shape), M.pca(s.cfg.z_dim, small(some))
    pictures = {"scan": real, "autoencoder": s.images(z0)}
    s.put_images("ae_{}", "", real, pictures["autoencoder"], rows)
    s.put_images("ae_{}", "constant", real, mean, rows)
    s.put("ae_psnr", rows, M.psnr(real, pictures["autoencoder"]), unit="dB")
    if small(real[:1]).shape == real[:1].shape:
        s.put_images("ae_{}", "pca", real, M.pca_reconstruct(pca, real), rows)
    eps = s.noise(len(rows))
    for S in sorted({10, 20, 50, 100, s.cfg.S} & set(range(s.cfg.T + 1))):
        z_T = invert(model, z0, z, S)
        for key, label, start in (("recon", "z_sem + z_T", z_T), ("semantic", "z_sem, random z_T", eps)):
            images = s.images(render(model, start, z, S))
            s.put_images(f"{key}_{{}}_T{S}", "", real, images, rows)
            for k in ("ssim", "mse"):
                s.metrics[f"{key}_{k}_T{S}.constant"] = s.metrics[f"ae_{k}.constant"]
            if S == s.cfg.S:
                pictures[label], noise = images, z_T
    # Is z_T white noise? A network that outputs zero round-trips perfectly: if it predicts eps with a z_T of
    # sd .006, if it predicts v with one of sd 1 that still is the picture (zT_corr is 0 for noise).
    for k, value in (("mean", noise.mean((1, 2, 3, 4))), ("std", noise.std((1, 2, 3, 4))),
                     ("max", noise.abs().amax((1, 2, 3, 4))), ("corr", neighbour_correlation(noise))):
        s.put(f"zT_{k}", rows, value.cpu().numpy(), better="lower")
    wrong = torch.as_tensor(other_patient(s.data.subject[rows]), device=device)
    seeded = lambda: torch.Generator(device).manual_seed(0)
    right, bad = z_losses(model, z0, z, z[wrong], seeded()).cpu().numpy()
    without = SimpleNamespace(cfg=model.cfg, loss=lambda x, z, t, eps: model.loss(x, None, t, eps))
    none = z_losses(without, z0, z, z, seeded())[0].cpu().numpy()
    for key, value in (("loss_true", right), ("loss_shuffled", bad), ("loss_none", none)):
        s.put(key, rows, value.mean(0), better="lower")
    s.put("z_gap", rows, (bad - right).mean(0))
    if s.dae:
        z = s.codes["dae"][rows]
        noise = torch.randn(x0.shape, generator=s.g, device=device)
        for key, start in (("recon", invert(s.dae, x0, z, 10)), ("semantic", noise)):
            pictures[f"voxel DAE, {key}"] = shown(render(s.dae, start, z, 10))
            s.put_images(f"{key}_{{}}_T10", "dae", real, pictures[f"voxel DAE, {key}"], rows)
    s.grid("reconstructions", [line[:6] for line in pictures.values()], list(pictures),
           list(s.data.subject[rows[:6]]), "Test subjects, whom no network has seen: axial, coronal slice. "
           f"{s.cfg.S} DDIM steps (DAE: 10).")
    return pca


def report_probes(s, scores, pca):
    """2. What a linear probe reads from each code: the target, age, on phantoms the known factors."""
    chunks = np.array_split(np.arange(len(s.data)), -(-len(s.data) // 50))
    flat = {row: v.cpu().numpy() for row, v in s.codes.items()}
    flat["pca"] = np.concatenate([M.pca_codes(pca, small(s.volumes(rows))) for rows in chunks])
    target = s.cfg.target or "label"
    for key, name in {"probe": target, "age": "age"}.items() if target != "age" else [("probe", "age")]:
        try:
            if name not in s.data.columns:
                raise ValueError("no such column" + "; --target names another" * (key == "probe"))
            direct = {"supervised": scores[name]} if name in scores else {}
            s.metrics |= linear_numbers(key, flat, direct, s.data.columns[name], s.part, s.data.subject,
                                        s.cfg.seed)
        except ValueError as e:
            print(f"no {key} numbers: {name}: {e}")
    s.metrics |= M.factor_numbers(flat, s.data.columns, s.part, s.data.subject, s.cfg.seed)


def report_manipulation(s):
    """3. z_sem moved as it changes with the target, z_T kept: pictures; on phantoms, the anatomy."""
    who, device = s.data.subject, s.device
    rows = evenly(s.first, 3 * s.cfg.eval_images)
    # A probe's weights tell how to read an attribute, and hold what cancels other causes too; how
    # codes change with it is their covariance with it (Haufe et al. 2014).
    y = s.data.columns[s.cfg.target or "label"][s.train].astype(np.float32)
    known = ~np.isnan(y)
    seen = s.z[torch.as_tensor(s.train[known], device=device)]
    v = (seen - seen.mean(0)).T @ torch.as_tensor(y[known] - y[known].mean(), device=device)
    v = v / v.norm()
    moves = torch.tensor([-1.5, -0.75, 0.0, 0.75, 1.5], device=device)
    sd = (seen @ v).std()
    z_T = invert(s.model, s.latent(rows), s.z[rows], s.cfg.S)
    moved = np.stack([s.images(render(s.model, z_T, s.z[rows] + m * sd * v, s.cfg.S)) for m in moves], 1)
    lines = [[scan, *line, abs(view(line[-1]) - view(line[0])) * 2] for scan, line in
             zip(s.volumes(rows[:5]), moved)]
    s.grid("manipulation", lines, list(who[rows[:5]]),
           ["scan", *[f"{m:+.2f} SD" for m in moves.tolist()], "2 |last - first|"],
           f"z_sem moved as it changes with {s.cfg.target or 'label'}, in SDs of the training codes.")
    # What must stay: the head's size, and whose head it is, told by the nearest of all test scans.
    heads, ends = (moved > 0.1).mean((2, 3, 4)), moved[:, [0, -1]].reshape(-1, *moved.shape[2:])
    s.put("manip_head_change", rows, abs(heads[:, -1] / heads[:, 0] - 1), better="lower")
    near = s.test[M.nearest(ends, s.data.image[s.test], 16)[1]].reshape(-1, 2)
    s.put("manip_same_subject", rows, (who[near] == who[rows][:, None]).mean(1))
    if s.data.mask is None or not {"factor_ventricle_ml", "factor_hippocampus_ml"} <= set(s.data.columns):
        return                     # no phantoms
    some, held, x = small(s.volumes(s.some)), small(s.volumes(s.test)), moves.cpu().numpy()
    k = s.data.image.shape[1] // some.shape[1]
    masks = np.stack([s.data.mask[i][::k, ::k, ::k] for i in s.some])
    for name, label, sign, better in (("ventricle", 4, 1, "higher"), ("hippocampus", 5, -1, "lower")):
        ml = s.data.columns[f"factor_{name}_ml"]
        read = volume_reader(some, masks, label, ml[s.some], who[s.some])
        s.put(f"manip_{name}_reader_r2", s.test, read(held), ml[s.test],
              statistic=lambda p, t: M.regression(p, t)["r2"])
        found = np.stack([read(small(moved[:, i])) for i in range(len(moves))], 1)     # (subjects, moves) ml
        s.put(f"manip_{name}_slope", rows, found @ x / (x @ x), unit="ml/SD", better=better)
        s.put(f"manip_{name}_monotone", rows, (np.diff(sign * found) > 0).all(1))


def report_missing(s):
    """4. The scan between two others of one test subject, against the real one. Gap: months from it to the
    nearer of the two, which is what copying bridges; all gaps are drawn from alike."""
    session = s.data.columns.get("session")
    three = s.test[triples(s.data.subject[s.test], session[s.test])] if session is not None else []
    if not len(three):
        print("no missing-scan numbers: no test subject has three sessions")
        return
    start, goal, end = session[three.T]
    gap, alpha = np.rint(np.minimum(goal - start, end - goal)).astype(int), (goal - start) / (end - start)
    keep = np.concatenate([evenly(np.flatnonzero(gap == m), 6 * s.cfg.eval_images) for m in np.unique(gap)])
    three, gap, alpha = three[keep], gap[keep], alpha[keep]
    rows, at = np.unique(three, return_inverse=True)
    at, z0, z = at.reshape(three.shape), s.latent(rows), s.z[rows]
    z_T = invert(s.model, z0, z, s.cfg.S)

    def candidates(i):
        """Triples i -> {name: volumes (n,D,H,W)}: the three scans, and what stands for the middle one"""
        a, target, c = at[i].T
        w, far = torch.as_tensor(alpha[i], device=s.device), alpha[i][:, None, None, None]
        lerp = lambda x: torch.lerp(x[a], x[c], w.view(-1, *[1] * (x.ndim - 1)).to(x.dtype))
        before, truth, after = (s.volumes(rows) for rows in three[i].T)
        return {"start": before, "real target": truth, "end": after,
                "": s.images(render(s.model, slerp(z_T[a], z_T[c], w), lerp(z), s.cfg.S)),
                "latent_lerp": s.images(lerp(z0)), "ae": s.images(z0[target]),
                "voxel_lerp": (1 - far) * before + far * after,
                "copy_nearest": np.where(far <= 0.5, before, after)}
    for months in np.unique(gap):      # one at a time: at the paper's size all of them fill 160 GB
        here = np.flatnonzero(gap == months)
        made = candidates(here)
        for row in ("", "latent_lerp", "ae", "voxel_lerp", "copy_nearest"):
            s.put_images(f"interp_{{}}_{months}m", row, made["real target"], made[row], three[here, 1])
    pick = evenly(np.arange(len(three)), 4)
    made = candidates(pick)
    s.grid("missing", list(zip(*made.values())),
           [f"{s.data.subject[three[i, 1]]}, {gap[i]} months" for i in pick],
           [name or "z_sem lerp, z_T slerp" for name in made],
           "The scan between two others of a test subject; months to the nearer one.")


def report_samples(s, prior):
    """5. What z_sem leaves open, and nobody's brains."""
    rows = s.first[:4]
    draws = [s.images(render(s.model, s.noise(4), s.z[[i] * 4], s.cfg.S)) for i in rows]
    s.grid("variations", [[scan, *line] for scan, line in zip(s.volumes(rows), draws)],
           list(s.data.subject[rows]), ["scan"], "One z_sem, four random z_T.")
    if prior is None:
        return
    seen = s.z[torch.as_tensor(s.train, device=s.device)]
    with torch.inference_mode():
        noise = torch.randn(6, seen.shape[1], generator=s.g, device=s.device)
        z = ddim_decode(lambda z_t, t: prior.eps(z_t, torch.full((6,), t, device=s.device)), noise,
                        min(50, s.cfg.T), prior.alpha_bar)
    fake = s.images(render(s.model, s.noise(6), z * seen.std(0) + seen.mean(0), s.cfg.S))
    near = s.some[M.nearest(fake, s.data.image[s.some], 16)[1]]
    s.grid("samples", [fake, s.volumes(near)], ["new subject", "nearest training scan"], [],
           "z_sem from the latent DDIM prior, z_T fresh noise. Row 2 shows whether they are copies.")


def evaluate(cfg, data, part, loader, models, scores, prior):
    """Every number and picture of a run, on its test subjects. -> metrics, as in results.json

    models, loader: as in Study; scores: {column: (N,) predictions of the supervised encoder}."""
    s = Study(cfg, data, part, loader, models)
    pca = report_images(s)
    report_probes(s, scores, pca)
    if {"probe_auroc", "probe_r2"} & set(s.metrics):       # the target varies: there is a direction
        report_manipulation(s)
    report_missing(s)
    report_samples(s, prior)
    logs = {p.stem[4:]: p for p in sorted(Path(cfg.out).glob("log_[ABCd]*.jsonl"))}
    M.curves(Path(cfg.out, "curves.png"), logs)
    batches = {"A": cfg.ae_batch, "B": cfg.ldm_batch, "C": cfg.batch, "dae": cfg.dae_batch}
    for row, stages in (("", "ABC"), (".dae", ["dae"])):       # what both were given to learn
        if set(stages) <= set(logs):
            seconds = sum(training_seconds(logs[k], batches[k]) for k in stages)
            s.metrics["training_s" + row] = M.row(seconds, unit="s", better="lower")
    for n in (4, 2, 1) if s.dae else ():       # 6. speed, of as many volumes as fit without --accum
        try:
            s.metrics |= throughput(cfg, loader.batch(s.train[:n]), s.ae, copy.deepcopy(s.model),
                                    copy.deepcopy(s.dae), min(cfg.S, 2))
            break
        except torch.OutOfMemoryError:
            print(f"no throughput of {n} volumes at a time: they do not fit the GPU")
    return s.metrics


# --------------------------------------------------------------------------------------------------------
# The command

def parse(argv):
    """Flags (`--key value`, `--key=value`, `--key` alone for a switch) -> (Config, the keys that were given).

    Presets and recipes are filled in; an unknown key or a value of the wrong type is one line and exit 2."""
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\n{inspect.getsource(Config)}\npresets: {PRESETS}\n\nrecipes: {RECIPES}")
        raise SystemExit(0)
    kinds = {f.name: type(f.default) for f in dataclasses.fields(Config)}
    given, words = {}, list(argv)
    while words:
        flag, equals, value = words.pop(0).partition("=")
        key = flag.removeprefix("--").replace("-", "_")
        if key not in kinds or not flag.startswith("--"):
            near = difflib.get_close_matches(key, kinds, 1)
            hint = f"did you mean --{near[0]}? " if near else ""
            D.fail(f"unknown flag {flag}; {hint}--help lists them all")
        kind, more = kinds[key], bool(words) and not words[0].startswith("--")
        if not equals:
            if not more and kind is not bool:
                D.fail(f"{flag} needs a value, a {kind.__name__}")
            value = words.pop(0) if more else "true"
        try:
            given[key] = {"true": True, "false": False}[value.lower()] if kind is bool else \
                tuple(int(v) for v in value.split(",")) if kind is tuple else kind(value)
        except (KeyError, ValueError):
            example = {bool: "true or false", tuple: "1,2,4", int: "3", float: "0.5"}[kind]
            D.fail(f"{flag} {value}: not of the form {example}")
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device, recipe = given.get("device") or found, given.get("recipe") or "ours"
    preset = given.get("preset") or ("paper" if device.startswith("cuda") else "demo")
    for key, value, known in (("preset", preset, PRESETS), ("recipe", recipe, RECIPES)):
        if value not in known:
            D.fail(f"--{key} {value}: choose from {', '.join(known)}")
    chosen = dict(device=device, preset=preset, recipe=recipe)
    return Config(**{**PRESETS[preset], **RECIPES[recipe], **given, **chosen}), given


def check_config(c):
    """Refuse impossible values, in one line, before anything is read or written."""
    for f in dataclasses.fields(c):
        value = getattr(c, f.name)
        low = 0 if f.name in ("seed", "attention", "groups", "prior_steps") else 1
        if type(value) is int and value < low or type(value) is tuple and min(value) < 1:
            D.fail(f"--{f.name} {value}: must be at least {low}")
        if type(value) is float and not 0 <= value < math.inf:
            D.fail(f"--{f.name} {value}: must be a number >= 0")
    for key, known in CHOICES.items():
        if getattr(c, key) not in known:
            D.fail(f"--{key} {getattr(c, key)}: choose from {', '.join(known)}")
    for key, fine, wanted in (("seed", c.seed < 2 ** 32, "below 2**32"), ("out", c.out, "a folder's name"),
                              ("device", c.device.startswith(("cuda", "mps", "cpu")), "cuda, mps or cpu"),
                              ("S", c.S <= c.T, f"at most T = {c.T}"), ("lr", c.lr > 0, "above 0"),
                              ("ema", c.ema < 1, "below 1"), ("dropout", c.dropout < 1, "below 1")):
        if not fine:
            D.fail(f"--{key} {getattr(c, key)}: must be {wanted}")
    if c.batch % (ranks()[1] * c.accum):
        D.fail(f"--batch {c.batch}: not divisible by {ranks()[1]} processes x --accum {c.accum}")
    try:
        local = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if c.device == "cuda" else c.device
        torch.empty(1, device=local)
    except (RuntimeError, AssertionError) as e:
        D.fail(f"--device {c.device}: {str(e).splitlines()[0][:120]}")


def check_network3d(c):
    """Refuse volumes and widths that the networks cannot have, and name some that they can."""
    unit = c.patch * 2 ** (len(c.ae_mult) - 1)
    if len(c.size) != 3 or any(s % unit for s in c.size):
        near = "x".join(str(max(1, round(s / unit)) * unit) for s in c.size)
        D.fail(f"volumes of {'x'.join(map(str, c.size))}: the autoencoder needs sides that are multiples of "
               f"{unit} (patch {c.patch}, {len(c.ae_mult)} levels), such as {near}; crop or choose --patch")
    plane = c.enc_patch * 2 ** len(c.enc_mult)
    if min(c.size) < 16 or c.size[0] % c.slab or any(s % c.enc_patch or s < plane for s in c.size[1:]):
        D.fail(f"volumes of {'x'.join(map(str, c.size))}: the semantic encoder needs sides of at least "
               f"{max(16, plane)}, D a multiple of --slab {c.slab}, H and W of --enc_patch {c.enc_patch}")
    if any(s % c.dae_patch for s in c.size) or min(c.size) < 3 * 2 ** c.disc_layers:
        D.fail(f"volumes of {'x'.join(map(str, c.size))}: sides must be multiples of --dae_patch "
               f"{c.dae_patch} and at least 3 * 2^{c.disc_layers} for --disc_layers {c.disc_layers}")
    if c.base % 2 or c.dae_base % 2 or c.T < 10:
        D.fail(f"--base {c.base} --dae_base {c.dae_base} --T {c.T}: widths must be even, T at least 10")
    if len(c.ae_mult) == 1 and 1 < c.patch ** 3 < c.z_ch:
        D.fail(f"--z_ch {c.z_ch}: a patch has {c.patch ** 3} voxels, its code cannot have more numbers")
    try:     # the rest is known to the networks: without memory they are built in a second
        with torch.device("meta"):
            Model(c, Unconditional(c), Autoencoder(c)), DAE(c)
    except (ValueError, RuntimeError, AssertionError) as e:
        D.fail(f"networks that cannot be: {str(e).splitlines()[0]}; see --groups, --ae_base, --disc_base, "
               "--base, --enc_base, --dae_base, --z_dim, --lpips")
    for key in ("ae_batch", "ldm_batch", "dae_batch"):
        if getattr(c, key) % ranks()[1]:
            D.fail(f"--{key} {getattr(c, key)}: not divisible by {ranks()[1]} processes")


def lock(out):
    """One run per output folder: the kernel drops the lock when the process ends, even by kill -9. -> file"""
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = open(out / ".lock", "a+")
    except OSError as e:
        D.fail(f"--out {out}: cannot be written ({e.strerror})")
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.seek(0)
        D.fail(f"--out {out}: in use by process {handle.read() or '?'}; wait for it, or choose another --out")
    handle.truncate(0)
    handle.write(f"{os.getpid()} on {platform.node()}")
    handle.flush()
    for stray in [*out.glob("*.tmp"), *out.glob("*.part")]:     # a run was killed while it wrote them
        stray.unlink()
    return handle


def start(argv):
    """The flags, checked, and the device, made ready. -> (Config, the keys that were given, torch.device)"""
    if "RANK" in os.environ:           # started by torchrun; hours, as all wait for one that draws or reads
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=6))
    cfg, given = parse(argv)
    check_config(cfg)
    device = torch.device(cfg.device)
    if device.type == "cpu" and "device" not in given and ranks()[0] == 0:
        print("no GPU is used:", "torch sees none; is the driver too old, or CUDA_VISIBLE_DEVICES set?"
              if torch.version.cuda or torch.version.hip else "this torch is built for the CPU alone")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    return cfg, given, device


def record(cfg):
    """Leaves the configuration and this script beside what they make. Says so if the script has changed."""
    text, copy = Path(__file__).read_bytes(), Path(cfg.out, Path(__file__).name)
    M.write_atomically(Path(cfg.out, "config.json"), json.dumps(dataclasses.asdict(cfg), indent=1).encode())
    if copy.exists() and copy.read_bytes() != text and any(copy.parent.glob("ckpt*.pt")):
        print(f"{copy.name} has changed since it made the weights in {cfg.out}: they are kept, and go on. To "
              "train anew, choose another --out")
    if not cfg.eval:
        M.write_atomically(copy, text)


def stage(name, make, cfg, steps, loader, facts, watch=None):
    """One network, make(cfg): trained from where it was left to `steps`; --eval: only loaded.

    facts: what else its checkpoint must agree on. -> (EMA, step reached)"""
    run = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(cfg).items()}
    run = {k: v for k, v in run.items() if k not in FREE}
    run |= dict(script=Path(__file__).stem, stage=name, **facts)
    path = Path(cfg.out, f"{name}.pt")
    if cfg.eval and not path.exists():
        D.fail(f"{path}: not there; the same command without --eval trains it")
    torch.manual_seed(mix(cfg.seed, 3))
    try:
        ema, reached = fit(make(cfg).to(loader.device), loader, cfg, name, run, 0 if cfg.eval else steps,
                           watch)
    except torch.OutOfMemoryError:
        D.fail(f"{name}: out of GPU memory with --batch {cfg.batch} --accum {cfg.accum} (peak "
               f"{peak_gb(loader.device):.1f} GB); the same command with --accum {2 * cfg.accum} goes on "
               "from the last save, to the same result; a smaller --batch needs another --out")
    if reached < steps:
        print(f"{name}: evaluated as it is after {reached} of {steps} steps")
    return ema, reached


def leave():
    """The rest is the work of one process: True for all others, which are done."""
    rank, world = ranks()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return rank > 0


def training_seconds(path, batch):
    """What the steps in a log took, by its rates. -> seconds"""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [r for r in rows if "img_s" in r]
    before = [0, *[r["step"] for r in rows]]
    return sum((r["step"] - b) * batch / max(r["img_s"], 1e-3) for r, b in zip(rows, before))


PAPER = {"ae_ssim": 0.962, "recon_ssim_T10": 0.953, "recon_ssim_T20": 0.960, "recon_ssim_T50": 0.962,
         "recon_ssim_T100": 0.962, "semantic_ssim_T10": 0.872, "semantic_ssim_T20": 0.871,
         "semantic_ssim_T50": 0.870, "semantic_ssim_T100": 0.869, "probe_auroc": 0.895, "probe_acc": 0.837,
         "probe_precision": 0.847, "probe_recall": 0.910, "probe_f1": 0.877, "age_mae": 4.16,
         "age_rmse": 5.23, "throughput_ratio": 20}


def time_only(cfg, device):
    """--throughput: untrained networks of this preset on noise, batch 1. A table, and no other trace.

    Off a GPU, where the voxel-space UNet of 128x160x128 takes minutes and tens of GB a step, one of the S
    steps is timed, and that UNet on a crop of a quarter of each side: see throughput."""
    check_network3d(cfg)
    batch = {"image": torch.rand(1, 1, *cfg.size, device=device) * 2 - 1}
    crop = 1 if device.type == "cuda" else 4
    a, b, c, d = (stage_config(cfg, f"ckpt_{k}", 1, cfg.lr) for k in ("A", "B", "C", "dae"))
    ae = Autoencoder(a).to(device).eval()
    latent = [s // cfg.patch // 2 ** (len(cfg.ae_mult) - 1) for s in cfg.size]
    batch |= {k: torch.ones(1, cfg.z_ch, *latent, device=device) for k in ("mean", "std")}
    ldm = Unconditional(b).to(device)
    model = fast_layout(Model(c, ldm, ae).to(device))
    dae = DAE(dataclasses.replace(d, size=tuple(s // crop for s in cfg.size), enc_mult=(1,)))
    dae.encoder = copy.deepcopy(model.encoder)       # of the whole volume, in both
    metrics = throughput(cfg, batch, ae, model, fast_layout(dae.to(device)), cfg.S if crop == 1 else 1, crop)
    print(M.table(metrics, [k for k in metrics if "." not in k], PAPER))
    if crop > 1:
        print(f"1 of {cfg.S} steps timed; the voxel-space UNet on 1/{crop ** 3} of the volume: extrapolated")


def main(argv):
    began = time.perf_counter()
    cfg, given, device = start(argv)
    out, (rank, world) = Path(cfg.out), ranks()
    if cfg.throughput:
        return time_only(cfg, device)
    held = lock(out) if rank == 0 else None        # until the process ends

    path = cfg.data or str(out / "brains.h5")
    if not cfg.data:
        check_network3d(cfg)
        if rank == 0 and not os.path.exists(path):
            D.phantom_brains(path, subjects=cfg.subjects, size=cfg.size[0])
    if world > 1:
        dist.barrier()
    data, part = D.load_study(path, cfg.test, None, cfg.seed, square=False)
    if len(data.image.shape) != 4:
        D.fail(f"{path}: image: slices of {data.image.shape[1:]}; ldae.py needs volumes (N,D,H,W)")
    drawn = len(np.unique(data.subject)), data.image.shape[1]
    if not (cfg.data or cfg.test) and drawn != (cfg.subjects, cfg.size[0]):
        D.fail(f"{path}: {drawn[0]} phantoms of side {drawn[1]}, --subjects {cfg.subjects} --size "
               f"{cfg.size[0]}: delete it, or choose another --out")
    cfg = dataclasses.replace(cfg, size=tuple(data.image.shape[1:]))
    check_network3d(cfg)
    if (label := data.columns.get("label")) is not None and (label > 1).any():
        print(f"label: 1 against 0; {(label > 1).sum()} scans of other classes are left out of the probes")
        data.columns["label"] = np.where(label > 1, np.nan, label)
    train, val = np.flatnonzero(part == "train"), np.flatnonzero(part == "val")
    if cfg.target and data.columns.get(cfg.target, np.array("")).dtype.kind not in "biuf":
        names = ", ".join(data.columns) or "none"
        D.fail(f"--target {cfg.target}: no numbers of that name in {path}, which has {names}")
    count = {p: len(np.unique(data.subject[part == p])) for p in ("train", "val", "test")}
    if not count["train"] or not count["test"]:
        D.fail(f"{path}: {count['train']} training and {count['test']} test subjects; one of each is needed")
    if rank == 0:
        why = "as asked" if "preset" in given else f"the default on {device.type}"
        print(f"ldae: preset {cfg.preset} ({why}), recipe {cfg.recipe}, {device}, torch {torch.__version__}\n"
              f"data: {data.path} at {'x'.join(map(str, cfg.size))}; subjects (scans): " +
              ", ".join(f"{p} {n} ({(part == p).sum()})" for p, n in count.items()) +
              f"\n{cfg.ae_steps}, {cfg.ldm_steps}, {cfg.steps} steps for stages A, B, C; bars show the time "
              f"left. The demo takes about 9 minutes on 2 CPU cores.\n"
              f"out: {out}/; stop at any time, the same command goes on", flush=True)
        record(cfg)

    # A checkpoint must agree on these: nobody it was trained on may be tested on, whatever the split is now.
    who = hashlib.sha256("\n".join(sorted(set(data.subject[train]))).encode()).hexdigest()[:16]
    facts = dict(data=data.fingerprint, training_subjects=who)
    a = stage_config(cfg, "ckpt_A", cfg.ae_batch, cfg.ae_lr)
    b = stage_config(cfg, "ckpt_B", cfg.ldm_batch, cfg.ldm_lr)
    c = stage_config(cfg, "ckpt_C", cfg.batch, cfg.lr)
    models, subject = {}, data.subject
    images, unseen = (D.Loader({"image": data.image}, device, rows) for rows in (train, val))
    watch = watch_autoencoder(a, unseen) if len(val) else None
    some = images.batch(evenly(np.arange(len(images)), 50))["image"].cpu()
    first = lambda c: Autoencoder(c).start_from_pca(some)
    models["ae"], _ = stage("ckpt_A", first, a, cfg.ae_steps, images, facts, watch)

    facts_b = facts | dict(stage_A=identity(models["ae"]))
    everything = D.Loader({"image": data.image}, device)
    tested = hashlib.sha256(data.image[part == "test"]).hexdigest() if cfg.test else ""
    key = hashlib.sha256(repr((facts_b, list(subject), tested)).encode()).hexdigest()
    if rank == 0:
        cached_latents(models["ae"], out / "latents.npz", everything, key)
    if world > 1:
        dist.barrier()
    mean, std = cached_latents(models["ae"], out / "latents.npz", everything, key)
    shift = mean[train].mean(0 if cfg.mean_map else (0, 2, 3, 4), keepdims=True)
    scale = np.sqrt(((mean[train] - shift) ** 2 + std[train] ** 2).mean((0, 2, 3, 4), keepdims=True))
    arrays = {"mean": mean, "std": std}
    models["ldm"], _ = stage("ckpt_B", lambda c: Unconditional(c, shift, scale), b, cfg.ldm_steps,
                             D.Loader(arrays, device, train), facts_b)
    facts_c = facts_b | dict(stage_B=identity(models["ldm"]))
    arrays["image"] = data.image
    both, unseen = (D.Loader(arrays, device, rows) for rows in (train, val))
    watch = watch_semantic(c, unseen, subject[val]) if len(val) else None
    steer = lambda c: Model(c, models["ldm"], models["ae"])
    models[""], reached = stage("ckpt_C", steer, c, cfg.steps, both, facts_c, watch)

    scores, tasks = {}, [k for k in dict.fromkeys((cfg.target or "label", "age")) if k in data.columns]
    if cfg.rivals:
        # The voxel-space autoencoder gets the time that stages A, B and C took together, at its own rate.
        d = stage_config(cfg, "ckpt_dae", cfg.dae_batch, cfg.lr)
        fresh = None if cfg.eval else 30
        if fresh:
            stage("ckpt_dae", DAE, d, fresh, images, facts)
            spent = sum(training_seconds(out / f"log_{k}.jsonl", n.batch) for k, n in zip("ABC", (a, b, c)))
            rows = [json.loads(line) for line in (out / "log_dae.jsonl").read_text().splitlines()]
            rate = [r["img_s"] for r in rows if 0 < r["step"] <= fresh][-1]
            fresh = max(fresh, round(spent * rate / d.batch))
        models["dae"], _ = stage("ckpt_dae", DAE, d, fresh or 0, images, facts)
        if tasks:
            s = stage_config(cfg, "ckpt_supervised", cfg.batch, cfg.lr)
            y = np.stack([data.columns[k].astype(np.float32) for k in tasks], 1)
            facts_s = facts | dict(columns=tasks, values=hashlib.sha256(y[train]).hexdigest()[:16])
            binary = [set(np.unique(v[~np.isnan(v)])) <= {0, 1} for v in y[train].T]
            m, sd = (np.where(binary, x, f(y[train], 0)) for f, x in ((np.nanmean, 0), (np.nanstd, 1)))
            y = ((y - m) / np.maximum(sd, 1e-6)).astype(np.float32)
            net, _ = stage("ckpt_supervised", lambda c: Supervised(c, binary), s, cfg.steps,
                           D.Loader({"image": data.image, "y": y}, device, train), facts_s)
            found = semantic_codes(net, everything).cpu().numpy() * sd + m
            scores = {k: found[:, i] for i, k in enumerate(tasks)}
    if leave():
        return
    everything, prior = D.Loader(arrays, device), None
    if cfg.prior_steps:
        z = semantic_codes(models[""], everything)[torch.as_tensor(train, device=device)]
        z = ((z - z.mean(0)) / z.std(0).clamp(min=1e-6)).cpu().numpy()
        p = stage_config(cfg, "ckpt_prior", cfg.batch, cfg.lr)
        prior, _ = stage(f"ckpt_prior_at_{reached}", Prior, p, cfg.prior_steps, D.Loader({"z": z}, device),
                         facts_c | dict(stage_C=identity(models[""])))
    metrics = evaluate(cfg, data, part, everything, models, scores, prior)
    metrics["peak_gb"] = M.row(peak_gb(device), unit="GB", better="lower")
    M.save_results(out / "results.json", "ldae", cfg.data or "phantom brains", count,
                   time.perf_counter() - began, dataclasses.asdict(cfg) | {"steps": reached}, metrics, device)
    print(M.table(metrics, [k for k in metrics if "." not in k], PAPER))
    print(f"{time.perf_counter() - began:.0f} s. Numbers: {out}/results.json. Pictures: {out}/*.png")


if __name__ == "__main__":
    D.program(main)
