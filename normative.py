"""Normative diffusion autoencoder on brain MR: how far from healthy is a brain, and does it tell survival?

The autoencoder of diffae.py with one idea more: the semantic encoder also sees the age, z_sem = s(x0, age),
and only healthy brains are ever trained on. The published score of a patient is the cosine between z_sem and
the mean z_sem of held-out healthy people; Cox regression asks whether those more similar live longer.

    x0 (B,1,H,W), age (B,) --Encoder--> z_sem (B,d) --similarity to healthy--> score --Cox--> hazard ratio
         |                                 |      |                            (higher = healthier)
         +----------DDIM up: UNet(x_t, t, z_sem)--> x_T
                                           |      |
      healthy mean z_sem at this age ------+--DDIM down--> the healthy twin; its difference: what is ill

Ijishakin et al., Normative Diffusion Autoencoders, 2024 (arXiv 2407.14191). No code or cohort is public;
what the paper leaves open is as in diffae.py.

    python normative.py                     # phantom cohort; about 8 minutes on a CPU core
    python normative.py --data cohort.h5    # yours: label (0 healthy), age; for survival also time, event

Who is used for what: healthy people train the network (part "train"), give the healthy mean ("val", called
the reference) or are the controls ("test"); each is one of these only. Patients are always test.

Differs from diffae.py in:
- the encoder gets the age, as constant channels; the UNet gets it through z_sem only;
- augment 0.1: brains come registered, so that motion is small;
- score residual (--recipe paper: cosine). A code trained on healthy brains says what healthy brains differ
  in, and hardly what only the ill have: the cosine is blind to it. So the score is what z_sem leaves unsaid,
  the image minus what is drawn from z_sem, pixel by pixel in units of what is usual in healthy people.
"""
import copy, dataclasses, datetime, difflib, hashlib, inspect, json, math, os, platform, signal, sys, time
import zipfile
from dataclasses import dataclass
from pathlib import Path

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
    data: str = ""            # HDF5 file, or a folder of one file per subject; empty: phantom cohort
    test: str = ""            # second file: train on all of --data, test on all of this one
    out: str = "out/normative"  # everything the run leaves; the same command again goes on from there
    preset: str = ""          # demo (laptop) or paper (one GPU); empty: paper on CUDA, demo elsewhere
    recipe: str = "ours"      # ours, or paper: objective, network and sampling times as published
    device: str = ""          # cuda, mps, cpu; empty: the first of these that is there
    seed: int = 0             # of the split, the weights, the order of the data and every draw
    target: str = "label"     # column that tells healthy (0) from patients (above 0)
    eval: bool = False        # only evaluate the checkpoints in --out
    rivals: bool = True       # also train as long, for the table: the same without age, and a VAE
    # images and network
    size: int = 128           # images are resized to size x size
    patch: int = 1            # the networks see patch x patch pixels as channels: 2 is 4x faster, coarser
    base: int = 128           # channels of the first level
    mult: tuple = (1, 1, 2, 3, 4)         # channels per level of the UNet, in units of base
    enc_mult: tuple = (1, 1, 2, 3, 4, 4)  # the same for the encoder, one level deeper
    blocks: int = 2           # residual blocks per level (one more on the way up)
    attention: int = 16       # self-attention where the feature map is this wide, and in the middle
    groups: int = 32          # of GroupNorm; 0: one per 16 channels (backward up to 50x faster on a CPU)
    dropout: float = 0.1      # in the UNet's blocks
    z_dim: int = 512          # numbers in z_sem
    z_scale: float = 1.0      # multiplies z_sem where it conditions the UNet
    age: bool = True          # the encoder sees the age
    head: str = "pca"         # of the encoder: pool (averages: paper), position (flattens the feature map),
                              # pca (position, beside a linear layer of the pixels that starts as their PCA)
    z_map: str = "image"      # a linear layer of z_sem also enters: as an image beside x_t, as a map in the
                              # middle of the UNet, or none (paper)
    score: str = "residual"   # similarity to healthy: residual (what z_sem leaves unsaid); of z_sem with the
                              # healthy mean: cosine (paper), age_matched, l2, mahalanobis
    # objective
    predict: str = "v"        # what the UNet outputs: v, or eps (paper)
    t_power: float = 0.5      # times are drawn as T u^t_power: 0.5 favours high noise; paper: 1, uniform
    augment: float = 0.1      # strength of random rotation, zoom and shift: little, as brains come registered
    flip: bool = False        # random left-right flips (paper: true; but a lesion has its side)
    T: int = 1000             # diffusion steps, linear beta
    vae_beta: float = 1e-3    # weight of the VAE's KL
    # training
    steps: int = 5000         # optimizer steps; raise it and run again to train longer
    batch: int = 64           # images per step, over all processes
    accum: int = 1            # passes per step, each on a part of the batch: for a batch that does not fit
    lr: float = 1e-4          # Adam; constant after 100 steps of warm-up
    ema: float = 0.9999       # decay of the averaged weights, which are what is evaluated
    bf16: bool = True         # bfloat16 autocast where the machine is fast at it
    compile: bool = True      # torch.compile, on CUDA
    save_every: int = 500     # steps between checkpoints
    log_every: int = 20       # steps between lines of the log
    # evaluation
    S: int = 20               # DDIM steps, both ways
    stride: str = "trailing"  # their times: trailing (the last is T-1) or leading (0, 50, .. 950: paper)
    eval_images: int = 1000   # at most this many test images are reconstructed


PRESETS = {
    "paper": {},
    "demo": dict(size=48, patch=2, base=32, mult=(1, 2, 4), enc_mult=(1, 2, 4, 4), blocks=1, attention=6,
                 groups=0, dropout=0.0, z_dim=128, steps=300, batch=32, save_every=100,
                 eval_images=60),
}
RECIPES = {
    "ours": {},
    "paper": dict(predict="eps", t_power=1.0, head="pool", z_map="none", augment=0.0, flip=True,
                  stride="leading", score="cosine"),
}
# What may differ when a run goes on in the same folder: nothing here alters what is learnt, only how far.
FREE = {"data", "test", "out", "preset", "device", "target", "eval", "rivals", "steps", "accum", "bf16",
        "compile", "save_every", "log_every", "S", "stride", "eval_images", "score"}
# The words that a field may hold.
CHOICES = dict(predict=("v", "eps"), head=("pca", "position", "pool"), z_map=("image", "middle", "none"),
               stride=("trailing", "leading"),
               score=("residual", "cosine", "age_matched", "l2", "mahalanobis"))


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
    """norm, SiLU, resample, one conv (so the original encoder), plus skip. (B,ch_in,..) -> (B,ch_out,..)"""
    def __init__(self, ch_in, ch_out, groups, how=""):
        super().__init__()
        self.norm, self.how = norm(ch_in, groups), how
        self.conv = nn.Conv2d(ch_in, ch_out, 3, padding=1)
        self.skip = nn.Conv2d(ch_in, ch_out, 1) if ch_in != ch_out else nn.Identity()

    def forward(self, x):
        h = resample(F.silu(self.norm(x)), self.how)
        return self.skip(resample(x, self.how)) + self.conv(h)


class ResBlock(nn.Module):
    """UNet block: t scales and shifts, z_sem scales again (AdaGN, DiffAE eq. 7; the 1 + is their code's).

    x (B,C,H,W), emb (B,4*base), z (B,z_dim) -> (B,ch_out,H',W'). The second convolution starts at zero."""
    def __init__(self, ch_in, ch_out, emb, z_dim, dropout, groups, how=""):
        super().__init__()
        self.norm1, self.how = norm(ch_in, groups), how
        self.conv1 = nn.Conv2d(ch_in, ch_out, 3, padding=1)
        self.t_proj = nn.Linear(emb, 2 * ch_out)
        self.z_proj = nn.Linear(z_dim, ch_out)
        self.norm2, self.dropout = norm(ch_out, groups), nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(ch_out, ch_out, 3, padding=1))
        self.skip = nn.Conv2d(ch_in, ch_out, 1) if ch_in != ch_out else nn.Identity()

    def forward(self, x, emb, z):
        h = self.conv1(resample(F.silu(self.norm1(x)), self.how))
        t_scale, t_shift = self.t_proj(F.silu(emb))[:, :, None, None].chunk(2, 1)
        z_scale = self.z_proj(F.silu(z))[:, :, None, None]
        # (norm(h) (1 + t_scale) + t_shift) (1 + z_scale), multiplied out: two passes less over h
        h = self.norm2(h) * ((1 + t_scale) * (1 + z_scale)) + t_shift * (1 + z_scale)
        h = self.conv2(self.dropout(F.silu(h)))
        return self.skip(resample(x, self.how)) + h


class Encoder(nn.Module):
    """Half a UNet that never sees noise or t. x0 (B,ch,H,W) -> (B,ch_out).

    Head "pool" loses position. Head "pca": start_from_pca() fills the linear layer, the rest begins at 0."""
    def __init__(self, ch, width, base, mult, blocks, attention, groups, head, ch_out):
        super().__init__()
        self.linear = zero(nn.Linear(ch * width * width, ch_out)) if head == "pca" else None
        layers, c = [nn.Conv2d(ch, base, 3, padding=1)], base
        for i, m in enumerate(mult):
            for _ in range(blocks):
                layers.append(EncoderBlock(c, m * base, groups))
                c = m * base
                if width == attention:
                    layers.append(Attention(c, groups))
            if i < len(mult) - 1:
                layers.append(EncoderBlock(c, c, groups, "down"))
                width //= 2
        layers += [EncoderBlock(c, c, groups), Attention(c, groups), EncoderBlock(c, c, groups)]
        self.trunk = nn.Sequential(*layers, norm(c, groups), nn.SiLU())
        self.head = head
        self.out = nn.Linear(c if head == "pool" else c * width * width, ch_out)
        if head == "pca":
            zero(self.out)

    def forward(self, x):
        h = self.trunk(x)
        z = self.out(h.mean((2, 3)) if self.head == "pool" else h.flatten(1))
        return z if self.linear is None else z + self.linear(x.flatten(1))


class UNet(nn.Module):
    """Denoiser. x_t (B,ch,H,W), t (B,), z_sem (B,z_dim) -> (B,ch,H,W), zero at initialisation."""
    def __init__(self, ch, width, base, mult, blocks, attention, groups, dropout, z_dim, z_map):
        super().__init__()
        self.base, emb = base, 4 * base
        self.time = nn.Sequential(nn.Linear(base, emb), nn.SiLU(), nn.Linear(emb, emb))
        # AdaGN scales whole channels: it cannot say where. A map made of z_sem can.
        self.z_image = nn.Linear(z_dim, ch * width * width) if z_map == "image" else None
        self.conv_in = nn.Conv2d(2 * ch if z_map == "image" else ch, base, 3, padding=1)
        skips, c = [base], base
        self.down = nn.ModuleList()   # each entry: a list of layers whose output is kept for the way up
        for i, m in enumerate(mult):
            for _ in range(blocks):
                layers = [ResBlock(c, m * base, emb, z_dim, dropout, groups)]
                c = m * base
                if width == attention:
                    layers.append(Attention(c, groups))
                self.down.append(nn.ModuleList(layers))
                skips.append(c)
            if i < len(mult) - 1:
                self.down.append(nn.ModuleList([ResBlock(c, c, emb, z_dim, dropout, groups, "down")]))
                skips.append(c)
                width //= 2
        self.z_middle = nn.Linear(z_dim, c * width * width) if z_map == "middle" else None
        self.middle = nn.ModuleList([ResBlock(c, c, emb, z_dim, dropout, groups), Attention(c, groups),
                                     ResBlock(c, c, emb, z_dim, dropout, groups)])
        self.up = nn.ModuleList()     # each entry: takes one skip
        for i, m in reversed(list(enumerate(mult))):
            for j in range(blocks + 1):
                layers = [ResBlock(c + skips.pop(), m * base, emb, z_dim, dropout, groups)]
                c = m * base
                if width == attention:
                    layers.append(Attention(c, groups))
                if i > 0 and j == blocks:
                    layers.append(ResBlock(c, c, emb, z_dim, dropout, groups, "up"))
                    width *= 2
                self.up.append(nn.ModuleList(layers))
        self.norm_out = norm(c, groups)
        self.conv_out = zero(nn.Conv2d(c, ch, 3, padding=1))

    def forward(self, x, t, z):
        emb = self.time(time_embedding(t, self.base))
        run = lambda layer, h: layer(h, emb, z) if isinstance(layer, ResBlock) else layer(h)
        if self.z_image is not None:
            x = torch.cat([x, self.z_image(z).view(x.shape)], 1)
        h = self.conv_in(x)
        skips = [h]
        for layers in self.down:
            for layer in layers:
                h = run(layer, h)
            skips.append(h)
        if self.z_middle is not None:
            h = h + self.z_middle(z).view(h.shape)
        for layer in self.middle:
            h = run(layer, h)
        for layers in self.up:
            h = torch.cat([h, skips.pop()], 1)
            for layer in layers:
                h = run(layer, h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """The VAE's decoder: the encoder's trunk mirrored. z (B,z_dim) -> (B,ch,H,W)."""
    def __init__(self, ch, width, base, mult, blocks, groups, head, z_dim):
        super().__init__()
        self.z_image = nn.Linear(z_dim, ch * width * width) if head == "pca" else None
        self.width = width // 2 ** (len(mult) - 1)
        self.c = c = mult[-1] * base
        self.fc = nn.Linear(z_dim, c * self.width ** 2)
        layers = [EncoderBlock(c, c, groups), Attention(c, groups), EncoderBlock(c, c, groups)]
        for i, m in reversed(list(enumerate(mult))):
            for _ in range(blocks):
                layers.append(EncoderBlock(c, m * base, groups))
                c = m * base
            if i > 0:
                layers.append(EncoderBlock(c, c, groups, "up"))
        self.trunk = nn.Sequential(*layers, norm(c, groups), nn.SiLU(), nn.Conv2d(c, ch, 3, padding=1))
        if head == "pca":
            zero(self.trunk[-1])

    def forward(self, z):
        x = self.trunk(self.fc(z).view(-1, self.c, self.width, self.width))
        return x if self.z_image is None else x + self.z_image(z).view(x.shape)


# --------------------------------------------------------------------------------------------------------
# The two models that are compared. forward(batch, g) is the training loss.

def augment(x, strength, flip, g):
    """Random motion of images (B,1,H,W): at strength 1 uniformly up to 20 degrees, 12 % zoom, 8 % of the
    width of shift; what enters from outside repeats the border. flip: half are mirrored. -> like x"""
    u = rand(len(x), 5, g)
    mirror = torch.where(u[:, 0] < 0.5, -1.0, 1.0) if flip else torch.ones_like(u[:, 0])
    if strength == 0:
        return torch.where(mirror.view(-1, 1, 1, 1) < 0, x.flip(3), x)
    angle, zoom, dx, dy = ((2 * u[:, 1:] - 1) * strength * u.new_tensor([0.35, 0.12, 0.16, 0.16])).unbind(1)
    cos, sin = angle.cos() * (1 + zoom), angle.sin() * (1 + zoom)
    theta = torch.stack([cos * mirror, -sin, dx, sin * mirror, cos, dy], 1).view(-1, 2, 3)
    with torch.autocast(x.device.type, enabled=False):    # bfloat16 would round positions to a quarter pixel
        grid = F.affine_grid(theta, x.shape, align_corners=False)
        x = F.grid_sample(x, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return x.clamp(-1, 1)


AGE = 16    # channels of the age embedding


class Model(nn.Module):
    """Diffusion autoencoder: || UNet(x_t, t, z_sem) - target ||^2, z_sem = Encoder(x0, age) (Fig. 1, 2)."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        ch, width = cfg.patch ** 2, cfg.size // cfg.patch
        self.encoder = Encoder(ch + AGE * cfg.age, width, cfg.base, cfg.enc_mult, cfg.blocks, cfg.attention,
                               cfg.groups, cfg.head, cfg.z_dim)
        self.unet = UNet(ch, width, cfg.base, cfg.mult, cfg.blocks, cfg.attention, cfg.groups, cfg.dropout,
                         cfg.z_dim, cfg.z_map)
        starts = cfg.head == "pca" and cfg.z_map == "image"
        self.register_buffer("left", torch.ones(()) if starts else None)    # variance of a pixel given z_sem
        self.alpha_bar = linear_alpha_bar(cfg.T)    # stays on the CPU: samplers read single numbers from it

    def encode(self, batch):
        """batch["image"] (B,1,H,W) in [-1,1], batch["age"] (B,) years -> z_sem (B,z_dim): s(x0, age)."""
        x = F.pixel_unshuffle(batch["image"], self.cfg.patch)
        if self.cfg.age:     # embedded as t is, as constant channels; the UNet gets it through z_sem only
            planes = time_embedding(batch["age"], AGE)[:, :, None, None].expand(-1, -1, *x.shape[2:])
            x = torch.cat([x, planes], 1)
        return self.encoder(x)

    def output(self, x_t, t, z_sem):
        """What is predicted, v or eps, of x_t (B,1,H,W) at levels t (B,). -> like x_t, float32

        Head "pca" with z_map "image": the UNet learns what Bayes' rule misses. If each pixel is N(that of the
        image made of z_sem, self.left), x0_hat is the mean of x0 given x_t and z_sem."""
        z, x, p = self.cfg.z_scale * z_sem, F.pixel_unshuffle(x_t, self.cfg.patch), self.cfg.patch
        out = F.pixel_shuffle(self.unet(x, t, z).float(), p)
        if self.left is None:
            return out
        image = F.pixel_shuffle(self.unet.z_image(z).float().view(x.shape), p)
        a, s = signal_noise(self.alpha_bar, t, x_t.ndim)
        x0_hat = (s ** 2 * image + a * self.left * x_t) / (s ** 2 + a ** 2 * self.left)
        return out + (x_t - a * x0_hat if self.cfg.predict == "eps" else a * x_t - x0_hat) / s

    def eps(self, x_t, t, z_sem):
        """eps_hat (B,1,H,W) at levels t (B,), whatever the UNet was trained to predict."""
        out = self.output(x_t, t, z_sem)
        return out if self.cfg.predict == "eps" else eps_from_v(out, x_t, t, self.alpha_bar)

    def loss(self, x0, z_sem, t, eps):
        """Squared error of the prediction per image. -> (B,)"""
        target = eps if self.cfg.predict == "eps" else v_target(x0, t, eps, self.alpha_bar)
        out = self.output(q_sample(x0, t, eps, self.alpha_bar), t, z_sem)
        return (out - target).square().mean((1, 2, 3))

    def forward(self, batch, g):
        x0 = augment(batch["image"], self.cfg.augment, self.cfg.flip, g)
        t, eps = random_t(len(x0), self.cfg.T, self.cfg.t_power, g), randn_like(x0, g)
        return self.loss(x0, self.encode(batch | {"image": x0}), t, eps).mean()


class VAE(nn.Module):
    """The baseline (Kingma & Welling 2014, eq. 10): the same encoder and code length, a plain decoder."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        ch, width = cfg.patch ** 2, cfg.size // cfg.patch
        self.encoder = Encoder(ch, width, cfg.base, cfg.enc_mult, cfg.blocks, cfg.attention, cfg.groups,
                               cfg.head, 2 * cfg.z_dim)
        self.decoder = Decoder(ch, width, cfg.base, cfg.enc_mult, cfg.blocks, cfg.groups, cfg.head,
                               cfg.z_dim)

    def posterior(self, x0):
        """x0 (B,1,H,W) -> mean and log variance of q(z|x0), each (B,z_dim) float32."""
        mean, logvar = self.encoder(F.pixel_unshuffle(x0, self.cfg.patch)).float().chunk(2, 1)
        return mean, logvar.clamp(-20, 10)

    def encode(self, batch):
        """batch["image"] (B,1,H,W) -> posterior mean (B,z_dim): the code that is probed."""
        return self.posterior(batch["image"])[0]

    def decode(self, z):
        """z (B,z_dim) -> (B,1,H,W)."""
        return F.pixel_shuffle(self.decoder(z).float(), self.cfg.patch)

    def forward(self, batch, g):
        x0 = augment(batch["image"], self.cfg.augment, self.cfg.flip, g)
        mean, logvar = self.posterior(x0)
        recon = self.decode(mean + (logvar / 2).exp() * randn_like(mean, g))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1).mean()
        return (recon - x0).square().mean() + self.cfg.vae_beta * kl / x0[0].numel()


def start_from_pca(model, loader):
    """Head "pca": the linear layers, pixels to z_sem and back, start as PCA of the loader's images. -> model

    The axes are turned at random: then all of z_sem's numbers vary alike, on average with variance 1. What
    PCA does not say of an image that is new to it, model.left, is measured between halves of the images."""
    decoder = model.decoder if isinstance(model, VAE) else model.unet
    if model.cfg.head == "pca":
        some = np.linspace(0, len(loader) - 1, min(len(loader), 5000)).astype(int)
        x = F.pixel_unshuffle(loader.batch(some)["image"], model.cfg.patch).flatten(1).cpu()
        pca = M.pca(model.cfg.z_dim, x)
        axes, mean = torch.from_numpy(pca.components_), torch.from_numpy(pca.mean_)
        sd = max(1e-3, math.sqrt(pca.explained_variance_.sum() / model.cfg.z_dim))   # not 0: all alike
        turn = torch.linalg.qr(torch.randn(model.cfg.z_dim, model.cfg.z_dim))[0][:, :len(axes)]
        encode, decode = model.encoder.linear, decoder.z_image
        with torch.no_grad():     # the VAE's mean comes first, its log variance stays 0
            encode.weight[:model.cfg.z_dim, :len(mean)] = turn @ axes / sd
            encode.bias[:model.cfg.z_dim] = -turn @ axes @ mean / sd
            if decode is not None:
                decode.weight.copy_(sd * (turn @ axes).T)
                decode.bias.copy_(mean)
        if getattr(model, "left", None) is not None and len(x) > 3:
            seen, new = x.numpy()[:len(x) // 2], x.numpy()[len(x) // 2:]
            half = M.pca(model.cfg.z_dim, seen)
            model.left.fill_(max(1e-3, ((half.inverse_transform(half.transform(new)) - new) ** 2).mean()))
    return model


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
# Evaluation: every number is of patients that no network, probe or threshold has seen

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


def encode_noise(model, x0, z_sem):
    """The x_T from which, with z_sem, decode() comes back to x0. x0 (B,1,H,W) -> same"""
    c = model.cfg
    up = lambda x, z: ddim_encode(eps_fn(model, z), x, c.S, model.alpha_bar, c.stride, clip=True)
    return in_batches(up, x0, z_sem)


def decode(model, x_T, z_sem):
    """x_T (B,1,H,W), noise or encoded, and z_sem (B,z_dim) -> images (B,1,H,W) in [-1,1]"""
    c = model.cfg
    down = lambda x, z: ddim_decode(eps_fn(model, z), x, c.S, model.alpha_bar, c.stride, clip=True)
    return in_batches(down, x_T, z_sem)


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


def watcher(cfg, loader, subject):
    """-> watch(ema, step) for fit: z_gap of 16 validation images for the log, preview_*.png to look at."""
    rows = np.linspace(0, len(loader) - 1, min(16, len(loader))).astype(int)
    wrong = torch.as_tensor(other_patient(subject[rows]))

    def watch(ema, step):
        batch, g = loader.batch(rows), torch.Generator(loader.device).manual_seed(0)
        with torch.inference_mode(), amp(cfg, loader.device):
            x0, z = batch["image"], ema.encode(batch).float()
        true, shuffled = z_losses(ema, x0, z, z[wrong.to(z.device)], g, strata=4).mean((1, 2)).tolist()
        x0, z = x0[::4], z[::4]
        noise = torch.randn(x0.shape, generator=g, device=x0.device)
        lines = [x0, decode(ema, encode_noise(ema, x0, z), z), decode(ema, noise, z)]
        M.grid(Path(cfg.out, f"preview_{cfg.recipe}.png"), [shown(x) for x in lines],
               ["image", "z_sem + x_T", "z_sem, random x_T"], [], f"validation patients at step {step}")
        return dict(val_loss=true, val_loss_shuffled=shuffled, z_gap=shuffled - true)
    return watch


def age_mean(z, age, rows):
    """Healthy mean of z (N,d) at each age: a parabola per dimension, least squares over `rows`. -> f

    f(age (n,)) -> (n,d). Beyond the ages of those rows it stays where it was: no parabola extrapolates."""
    low, high = age[rows].min(), age[rows].max()
    powers = lambda a: ((np.clip(a, low, high) - low) / max(high - low, 1e-9))[:, None] ** np.arange(3)
    weights = np.linalg.lstsq(powers(age[rows]), z[rows], rcond=None)[0]
    return lambda a: powers(np.asarray(a, np.float64)) @ weights


def similarities(z, age, rows):
    """How healthy is z (N,d)? Four answers (N,), higher = healthier. rows: the reference, held-out healthy.

    cosine: with their mean, whatever their age: the published score. The others compare with their mean at
    the same age: age_matched: cosine; l2: minus the distance; mahalanobis: minus the distance in healthy SDs.
    ValueError if the mean is 0, as that of standardised codes is: then no cosine with it exists."""
    mean, at_age = z[rows].mean(0), age_mean(z, age, rows)(age)
    norm = lambda a: np.linalg.norm(a, axis=-1)
    if norm(mean) < 0.01 * norm(z[rows]).mean():
        raise ValueError("the healthy mean of the codes is 0: codes that were centred have no cosine with it")
    cosine = lambda a, b: (a * b).sum(-1) / (norm(a) * norm(b))
    return {"cosine": cosine(z, mean), "age_matched": cosine(z, at_age), "l2": -norm(z - at_age),
            "mahalanobis": -M.mahalanobis(z - at_age, rows)}


def semantic_residual(model, loader, z_sem, g):
    """What z_sem (N,d) leaves unsaid: x0 - x0_hat(x_T, T-1, z_sem), x_T noise: one call of the UNet, which
    from noise can only draw what z_sem says. -> (N,H,W) numpy, in units of the image's range"""
    a, s = signal_noise(model.alpha_bar, torch.tensor([model.cfg.T - 1], device=loader.device), 4)

    def residual(rows, z):
        x0, t = loader.batch(rows)["image"], torch.full((len(rows),), model.cfg.T - 1, device=loader.device)
        x_T = torch.randn(x0.shape, generator=g, device=loader.device)
        x0_hat = (x_T - s * model.eps(x_T, t, z)) / a         # DDPM eq. 4 solved for x0
        return (x0 - x0_hat.clamp(-1, 1))[:, 0].float() / 2
    with amp(model.cfg, loader.device):
        return in_batches(residual, np.arange(len(loader)), z_sem).cpu().numpy()


def vae_reads(model, loader):
    """A VAE's mean and log variance (N,d), and x0 - decode(mean) (N,H,W) as semantic_residual; all numpy."""
    def numbers(rows):
        x0 = loader.batch(rows)["image"]
        mean, logvar = model.posterior(x0)
        return torch.cat([mean, logvar, (x0 - model.decode(mean)).flatten(1) / 2], 1)
    with amp(model.cfg, loader.device):
        out = in_batches(numbers, np.arange(len(loader))).cpu().numpy()
    mean, logvar, residual = np.split(out, [model.cfg.z_dim, 2 * model.cfg.z_dim], 1)
    return mean, logvar, residual.reshape(len(out), model.cfg.size, model.cfg.size)


def usual(residual, rows):
    """RMS (H,W) of the residual over rows, held-out healthy people; plus 1 % against division by 0."""
    return np.sqrt((residual[rows] ** 2).mean(0)) + 0.01


def residual_score(residual, rows):
    """Minus the mean square of residual (N,H,W) in units of what is usual at each pixel, (N,)."""
    return -((residual / usual(residual, rows)) ** 2).mean((1, 2))


def latent_deviation(mean, logvar, rows):
    """Minus the mean over i of |mean_i - healthy mean_i| / sqrt(healthy var_i + var_i), (N,); mean and logvar
    (N,d) of a VAE's posterior (Lawry Aguila et al. 2022)."""
    return -(abs(mean - mean[rows].mean(0)) / np.sqrt(mean[rows].var(0) + np.exp(logvar))).mean(1)


def signed(x):
    """(H,W) in -1..1 -> (H,W,3): black at 0, red above, blue below."""
    return np.stack([x.clip(0, 1), 0.4 * abs(x).clip(0, 1), (-x).clip(0, 1)], -1)


def evaluate(cfg, data, part, loader, models):
    """Every number and picture of a run. -> metrics, as in results.json; all scores: higher = healthier

    models: {"": the normative autoencoder, "no_age": .., "vae": ..}, EMAs; loader: all rows of data."""
    age, ill = data.columns["age"].astype(np.float64), data.columns[cfg.target] > 0
    train, rows, test = (np.flatnonzero(part == p) for p in ("train", "val", "test"))
    metrics = {}

    # Scores, one per image. PCA: not centred, for a cosine with a mean needs a mean.
    g = torch.Generator(loader.device).manual_seed(cfg.seed)
    torch.manual_seed(mix(cfg.seed, 3))
    networks = {row: model for row, model in models.items() if row != "vae"}
    random = dataclasses.replace(cfg, age=False, head="position")      # head pca begins at 0
    networks["untrained"] = Model(random).to(loader.device).eval()
    scores, codes, left = {"": None}, {}, {}
    for row, model in tqdm(networks.items(), "evaluate: scores", unit="model"):
        z = semantic_codes(model, loader)
        codes[row] = z.double().cpu().numpy()
        kinds = similarities(codes[row], age, rows)
        if row in ("", "no_age"):
            left[row] = semantic_residual(model, loader, z, g)
            kinds["residual"] = residual_score(left[row], rows)
        if not row:
            scores |= {"": kinds[cfg.score]} | {k: s for k, s in kinds.items() if k != cfg.score}
        else:     # an untrained decoder leaves everything unsaid: its best other score
            scores[row] = kinds["mahalanobis" if row == "untrained" else cfg.score]
    if "vae" in models:
        mean, logvar, left["vae"] = vae_reads(models["vae"], loader)
        scores |= {"vae_recon": -(left["vae"] ** 2).mean((1, 2)),
                   "vae_residual": residual_score(left["vae"], rows),
                   "vae_latent": latent_deviation(mean, logvar, rows)}
    some = train[np.linspace(0, len(train) - 1, min(len(train), 5000)).astype(int)]
    pca = M.pca(cfg.z_dim, data.image[some] / 255)
    pixels, residual = [], []
    for k in np.array_split(np.arange(len(data)), -(-len(data) // 1000)):
        x = data.image[k] / 255
        pixels.append(M.pca_codes(pca, x).astype(np.float64))
        residual.append((x - M.pca_reconstruct(pca, x)).astype(np.float32))
    pixels, residual = np.concatenate(pixels), np.concatenate(residual)
    linear = similarities(pixels + pca.mean_ @ pca.components_.T, age, rows)
    brain_age, gap = M.brain_age_gap(pixels, age, train, rows, data.subject)
    scores |= {"pca_cosine": linear["cosine"], "pca_mahalanobis": linear["mahalanobis"],
               "pca_residual": residual_score(residual, rows), "brain_age_gap": -gap}
    severity = data.columns.get("factor_severity")
    if severity is not None:    # a phantom: what a perfect score would give
        scores["planted"] = -severity.astype(np.float64)

    # Patients against controls: what a score says beyond the age, as the healthy reference has it.
    for row, score in scores.items():
        dot, beyond = f".{row}" if row else "", score - age_mean(score[:, None], age, rows)(age)[:, 0]
        metrics["auroc" + dot] = M.row_of(M.auroc, data.subject[test], -beyond[test], ill[test])
        if severity is not None and row != "planted":
            p = test[ill[test]]
            metrics["severity_r" + dot] = M.row_of(M.spearman, data.subject[p], -beyond[p], severity[p])
    older = D.Loader({"image": data.image, "age": data.columns["age"] + 20}, loader.device, rows)
    moved = semantic_codes(models[""], older).double().cpu().numpy() - codes[""][rows]
    spread = np.linalg.norm(codes[""][rows] - codes[""][rows].mean(0), axis=1).mean()
    metrics["age_use"] = M.row(np.linalg.norm(moved, axis=1).mean() / spread)

    # Survival: one line per patient, the mean over their images.
    names, first, index = np.unique(data.subject[test[ill[test]]], return_index=True, return_inverse=True)
    line = lambda x: np.bincount(index, x[test[ill[test]]]) / np.bincount(index)
    once = {k: data.columns[k][test[ill[test]]][first] for k in ("time", "event", "sex") if k in data.columns}
    of_patient = {row: line(score) for row, score in scores.items()}
    if {"time", "event"} <= set(once):
        known = once["time"] == once["time"]
        time_, event = once["time"][known].astype(np.float64), once["event"][known]
        sex = once.get("sex", np.full(len(names), ""))[known]
        metrics |= M.survival_numbers({row: s[known] for row, s in of_patient.items()}, time_, event,
                                      line(age)[known], sex, cfg.seed)
        if "hr_per_sd" in data.attrs:    # of severity, planted; a similarity points the other way
            metrics["hr_planted"] = M.row(1 / data.attrs["hr_per_sd"], better="lower")
        M.survival_curves(Path(cfg.out, "survival.png"), time_, event, of_patient[""][known],
                          "Patients above and below the median similarity to the healthy mean.")
    else:
        print("no survival analysis: the data has no time and event columns")
    interpret(cfg, data, part, loader, models[""], codes[""], left, scores, brain_age, pca, metrics)
    return metrics


def interpret(cfg, data, part, loader, model, codes, left, scores, brain_age, pca, metrics):
    """The pictures of a run and the numbers that go with them, which join `metrics`.

    left: {"": the semantic residual, "vae": the VAE's, if there is one}, (N,H,W) each."""
    out, device, age = Path(cfg.out), loader.device, data.columns["age"].astype(np.float64)
    ill, reference, test = data.columns[cfg.target] > 0, part == "val", part == "test"
    tensor = lambda z: torch.as_tensor(z, dtype=torch.float32, device=device)
    typical = age_mean(codes, age, np.flatnonzero(reference))
    g = torch.Generator(device).manual_seed(cfg.seed)

    # The healthy twin: z_sem moved to the healthy mean at this age, x_T kept. The map: patient minus twin.
    real, recon, twin, rows = {}, {}, {}, {}
    groups = {"reference": reference, "controls": test & ~ill, "patients": test & ill}
    groups = {name: group for name, group in groups.items() if group.any()}     # --test: maybe no controls
    for name, group in tqdm(groups.items(), "evaluate: healthy twins", unit="group"):
        rows[name] = np.flatnonzero(group)
        rows[name] = i = rows[name][np.linspace(0, len(rows[name]) - 1, min(len(rows[name]), cfg.eval_images))
                                    .astype(int)]
        x0, z, real[name] = loader.batch(i)["image"], tensor(codes[i]), data.image[i] / 255
        x_T = encode_noise(model, x0, z)
        recon[name] = shown(decode(model, x_T, z))
        twin[name] = shown(decode(model, x_T, tensor(typical(age[i]))))
        if name == "patients":
            noise = torch.randn(x0.shape, generator=g, device=device)
            drawn = {"": shown(decode(model, noise, z)), "pca": M.pca_reconstruct(pca, real[name])}
            drawn["constant"] = np.broadcast_to((data.image[part == "train"] / 255).mean(0), real[name].shape)
            if "vae" in left:
                drawn["vae"] = (real[name] - left["vae"][i]).clip(0, 1)
            who = data.subject[i]
            metrics |= M.image_numbers("recon", "", real[name], recon[name], who)
            for row, images in drawn.items():
                metrics |= M.image_numbers("semantic", row, real[name], images, who)
    change = {name: real[name] - twin[name] for name in groups}
    deviation = left[""] / usual(left[""], np.flatnonzero(reference))
    patients, lesion = rows["patients"], None
    names = list(data.attrs.get("mask_names", []))
    if data.mask is not None and "lesion" in names:
        lesion = data.mask[patients] == names.index("lesion")
    if lesion is not None and lesion.any() and "controls" in groups:
        # Where is the change? AUROC of the pixels of the brain, lesion or not: chance is what the change in a
        # control of the same age gives for the same lesion (edges change in everybody). by_z: the part of it
        # that moving z_sem makes, reconstruction minus twin; the rest is what the reconstruction lacks.
        other = np.array([np.argmin(abs(age[rows["controls"]] - age[p])) for p in patients])
        keep, brain = np.flatnonzero(lesion.sum((1, 2)) > 0), data.mask[patients] > 0
        who = data.subject[patients[keep]]
        by_z = {name: recon[name] - twin[name] for name in groups}
        for key, own, control in (
                ("twin_overlap", change["patients"], change["controls"][other]),
                ("twin_by_z_overlap", by_z["patients"], by_z["controls"][other]),
                ("residual_overlap", deviation[patients], deviation[rows["controls"][other]])):
            here, chance = (np.array([M.auroc(abs(x[k])[brain[k]], lesion[k][brain[k]]) for k in keep])
                            for x in (own, control))
            metrics[key], metrics[key + ".control"] = (M.row_of(np.mean, who, v) for v in (here, chance))
            metrics[key + "_gain"] = M.row_of(np.mean, who, here - chance)

    worst = np.argsort(scores[""][patients])[:8]     # the least similar to healthy
    lines = [[v["patients"][k] for k in worst] for v in (real, recon, twin)]
    lines.append([signed(change["patients"][k] / 0.3) for k in worst])
    lines.append([signed(deviation[patients[k]] / 6) for k in worst])
    labels = ["patient", "z_sem + x_T", "healthy twin: z_sem of the healthy mean at this age",
              "patient - twin: red brighter, blue darker", "what z_sem leaves unsaid, in healthy SDs"]
    if lesion is not None:
        lines.append([lesion[k] for k in worst])
        labels.append("planted lesion")
    M.grid(out / "twins.png", lines, labels, [f"{age[patients[k]]:.0f} y, {scores[''][patients[k]]:.2f}"
                                              for k in worst],
           "The patients least similar to healthy: age and similarity, reconstruction, healthy twin, change.")
    asked = np.linspace(20, 90, 8)
    known = rows.get("controls", rows["reference"])
    one = known[[np.argmin(abs(age[known] - 55))]]                             # whose x_T it is
    x_T = encode_noise(model, loader.batch(one)["image"], tensor(codes[one])).expand(8, -1, -1, -1)
    path = shown(decode(model, x_T, tensor(typical(asked))))
    healthy = np.flatnonzero(~ill)
    near = data.image[healthy[[np.argmin(abs(age[healthy] - a)) for a in asked]]] / 255
    M.grid(out / "trajectory.png", [path, near], ["healthy mean z_sem, one x_T", "a healthy person so old"],
           [f"{a:.0f} years" for a in asked], "The healthy brain from 20 to 90, from one person's x_T.")
    metrics["trajectory_age_mae"] = M.row(abs(brain_age(M.pca_codes(pca, path)) - asked).mean(), unit="years",
                                          better="lower")
    M.scatter(out / "age.png", age, scores[""], {"training": part == "train", "reference": reference,
                                                 "controls": test & ~ill, "patients": test & ill},
              "age (years)", f"similarity ({cfg.score})", "Similarity to the healthy mean, against age.")
    M.curves(out / "curves.png", {p.stem[4:] or cfg.recipe: p for p in sorted(out.glob("log*.jsonl"))})

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


def check_network(c):
    """Refuse sizes that the 2D networks cannot have, and name some that they can."""
    unit = c.patch * 2 ** (max(len(c.mult), len(c.enc_mult)) - 1)
    if c.size % unit:
        near = c.size // unit * unit
        fits = " or ".join(str(v) for v in (near, near + unit) if v)
        D.fail(f"--size {c.size}: this network needs a multiple of {unit}, such as {fits}")
    if c.size < 16:
        D.fail(f"--size {c.size}: at least 16, SSIM's window is 11 pixels wide")
    if c.base % 2 or c.groups and any(m * c.base % c.groups for m in (*c.mult, *c.enc_mult)):
        D.fail(f"--base {c.base} --groups {c.groups}: widths must be even and multiples of the groups")


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


def cohort(data, part, cfg):
    """Check that the data can answer. -> part; patients are only ever in "test" (with --test: or left out).

    Images of a patient from before the diagnosis are left out (""): they would be on both sides."""
    for need in ("age", cfg.target):
        values = data.columns.get(need, np.array(""))
        if values.dtype.kind not in "biuf":
            D.fail(f"{data.path}: {need}: no such numbers; it has {', '.join(data.columns) or 'no columns'}")
        missing = np.flatnonzero(np.isnan(values))     # whose label is unknown must not pass for healthy
        if len(missing):
            D.fail(f"{data.path}: {need}: missing in {len(missing)} rows: {', '.join(map(str, missing[:10]))}"
                   f"{' ...' if len(missing) > 10 else ''}; everybody's is needed: fill in or drop the rows")
    age, ill = data.columns["age"], data.columns[cfg.target] > 0
    part = np.where(ill & (part != "test"), "" if cfg.test else "test", part)
    before = np.isin(data.subject, data.subject[ill]) & ~ill
    part[before] = ""
    if before.any():
        print(f"warning: {before.sum()} healthy images of people who are also patients are left out",
              file=sys.stderr)
    for name, rows, least in (("healthy people to train on", part == "train", 1),
                              ("held-out healthy people for the reference mean", part == "val", 3),
                              ("patients to test", ill & (part == "test"), 1)):
        n = len(np.unique(data.subject[rows]))
        if n < least:
            D.fail(f"{data.path}: {cfg.target}: {n} {name}, at least {least} needed (0: healthy, above: ill)")
    who, healthy = np.flatnonzero(ill & (part == "test")), age[part == "train"]
    outside = (age[who] < healthy.min()) | (age[who] > healthy.max())
    if outside.any():
        print(f"warning: {outside.sum()} of {len(who)} patient images are of ages outside the healthy range, "
              f"{healthy.min():.0f} to {healthy.max():.0f}: they are compared with its end", file=sys.stderr)
    if {"time", "event"} <= set(data.columns):
        time_, event = (data.columns[k][who] for k in ("time", "event"))
        unknown = np.isnan(time_)
        if unknown.any():
            print(f"warning: {unknown.sum()} of {len(who)} patient images have no time: survival analysis "
                  "leaves them out", file=sys.stderr)
        for s in np.unique(data.subject[who]):
            mine = data.subject[who] == s
            if len(np.unique(time_[mine])) > 1 or len(np.unique(event[mine])) > 1:
                D.fail(f"{data.path}: time, event: subject {s} has several; one per subject is needed")
        events = len(np.unique(data.subject[who][(event == 1) & ~unknown]))
        if not events:
            D.fail(f"{data.path}: event: all patients are censored, no survival to regress; drop the time "
                   "column to run without")
        if events < 10:
            print(f"warning: {events} events: too few for Cox regression, its numbers mean nothing",
                  file=sys.stderr)
    return part


PAPER = {"hr_per_sd": 0.73}     # published "per unit of similarity"; the scale is not: see README


def main(argv):
    began = time.perf_counter()
    cfg, given, device = start(argv)
    check_network(cfg)
    out, (rank, world) = Path(cfg.out), ranks()
    held = lock(out) if rank == 0 else None        # until the process ends

    path = cfg.data or str(out / "cohort.h5")
    if rank == 0 and not cfg.data and not os.path.exists(path):
        D.phantom_cohort(path)
    if world > 1:
        dist.barrier()
    data, part = D.load_study(path, cfg.test, cfg.size, cfg.seed, square="size" not in given,
                              fractions=(0.6, 0.2, 0.2))
    part = cohort(data, part, cfg)
    ill = data.columns[cfg.target] > 0
    train, val = np.flatnonzero(part == "train"), np.flatnonzero(part == "val")
    count = {"training": part == "train", "reference": part == "val", "controls": (part == "test") & ~ill,
             "patients": (part == "test") & ill}
    count = {k: len(np.unique(data.subject[rows])) for k, rows in count.items()}
    if rank == 0:
        why = "as asked" if "preset" in given else f"the default on {device.type}"
        print(f"normative: preset {cfg.preset} ({why}), recipe {cfg.recipe}, {device}, "
              f"torch {torch.__version__}\n"
              f"data: {data.path} at {cfg.size}x{cfg.size}; subjects: " +
              ", ".join(f"{k} {n}" for k, n in count.items()) +
              f"\n{cfg.steps} steps a network; bars show the time left. The demo takes about 8 minutes on a "
              f"CPU core.\nout: {out}/; stop at any time, the same command goes on", flush=True)
        record(cfg)

    # A checkpoint must agree on these: nobody it was trained on may be tested on, whatever the split is now.
    people = sorted(f"{s} {a:g}" for s, a in zip(data.subject[train], data.columns["age"][train]))
    who = hashlib.sha256("\n".join(people).encode()).hexdigest()[:16]
    facts = dict(data=data.fingerprint, training_subjects=who)
    arrays = {"image": data.image, "age": data.columns["age"]}
    images, unseen = (D.Loader(arrays, device, rows) for rows in (train, val))
    watch = watcher(cfg, unseen, data.subject[val])
    models = {}
    diffusion, vae = (lambda c: start_from_pca(Model(c), images)), (lambda c: start_from_pca(VAE(c), images))
    models[""], reached = stage("ckpt", diffusion, cfg, cfg.steps, images, facts, watch)
    if cfg.rivals:     # for as many steps, also when the run was longer once
        ageless = dataclasses.replace(cfg, age=False)
        models["no_age"], _ = stage("ckpt_no_age", diffusion, ageless, reached, images, facts)
        models["vae"], _ = stage("ckpt_vae", vae, cfg, reached, images, facts)
    if leave():
        return
    metrics = evaluate(cfg, data, part, D.Loader(arrays, device), models)
    log = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    metrics["train_img_s"] = M.row(np.median([r["img_s"] for r in log if "img_s" in r]), unit="1/s")
    metrics["peak_gb"] = M.row(peak_gb(device), unit="GB", better="lower")
    M.save_results(out / "results.json", "normative", cfg.data or "phantom cohort", count,
                   time.perf_counter() - began, dataclasses.asdict(cfg) | {"steps": reached}, metrics, device)
    scores = [k for k in ("hr_per_sd", "hr_p", "c_index", "logrank_p", "ks_p", "auroc", "severity_r")
              if k in metrics]     # results.json has more of each score: alone, gains, proportional hazards
    print(M.table(metrics, [k for k in metrics if "." not in k and f"{k}.pca_cosine" not in metrics], {}))
    print("\nScores: similarity to healthy, higher = healthier: a good one has a hazard ratio below 1.")
    print(M.row_table(metrics, scores, PAPER))
    print("hr_per_sd, c_index: Cox of score, age and sex (c_index out of fold). ks_p ignores censoring.\n"
          "auroc: patients against controls, beyond age. Intervals: of hr_per_sd Wald, else bootstrap.")
    print(f"{time.perf_counter() - began:.0f} s. Numbers: {out}/results.json. Pictures: {out}/*.png")


if __name__ == "__main__":
    D.program(main)
