"""Cardiac MR from a drawing: a VQ-VAE, and latent diffusion conditioned on edges and a semantic map.

A VQ-VAE compresses slices into a small latent image of codebook vectors; a diffusion model learns to draw
such latents under a drawing of the heart: its edges, and which pixel is cavity, muscle or right ventricle.
Question: does the drawing survive its way into the small latent, and does the picture obey it?

    image (B,1,256,256) --VQVAE.encode--> z0 (B,3,32,32) --noise--> z_t --UNet(z_t, t, drawing)--> v
                                                                             ^
    edges (B,1,256,256), map (B,4,256,256), view, phase --Condition----------+ (B,cond_ch,32,32)

    drawing, noise z_T --DDIM or DDPM down--> z0 --VQVAE.decode: nearest codes--> image (B,1,256,256)

The study: T. Yang, Conditional LDM with medical images, 2024. VQ-VAE: van den Oord et al. 2017 (arXiv
1711.00937); the adversarial one and latent diffusion: Rombach et al. 2022 (arXiv 2112.10752).

    python cond_ldm.py                      # phantom hearts in two views; about 8 minutes on 2 CPU cores
    python cond_ldm.py --data acdc256.h5    # your hearts at 256x256; on a GPU the study's networks
    python cond_ldm.py --draw mine.h5       # images for your own maps and strokes, when it is trained

Differs from the study (`--recipe paper`) in:
- cond conv: strided convolutions read the drawing. The study resizes it to 32x32 by nearest neighbour and to
  one channel: of the cells that hold an edge 13 % keep it;
- latents are standardised; v-prediction; weights are averaged; lr 1e-4 instead of 8e-6; DDIM, not 1000 steps;
- edges mixed: one model for detected edges, a few strokes, only the map's contours, or no edges;
- the view and the phase of the beat are told. The VQ-VAE differs in its codebook, where idle codes are moved.
Differs from diffae.py: two stages, and no code z_sem: what is drawn is given, not learnt.
"""
import copy, dataclasses, datetime, difflib, functools, hashlib, inspect, json, math, os, platform
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
    data: str = ""            # HDF5 file, or a folder of one file per subject; empty: phantom views
    test: str = ""            # second file: train on all of --data, test on all of this one
    out: str = "out/cond_ldm" # everything the run leaves; the same command again goes on from there
    preset: str = ""          # demo, demo256 (laptop), paper (GPU); empty: what fits the device and --data
    recipe: str = "ours"      # ours, or paper: condition, objective, learning rates, sampler of the study
    device: str = ""          # cuda, mps, cpu; empty: the first of these that is there
    seed: int = 0             # of the split, the weights, the order of the data and every draw
    eval: bool = False        # only evaluate the checkpoints in --out
    draw: str = ""            # your own drawings, an HDF5 file (see load_drawings): only makes their images
    rivals: bool = True       # also train, for the table: --cond seed; segmenters on generated images
    vq: str = ""              # a ckpt_vq.pt of another run to start from; empty: train one
    # images
    size: int = 256           # images are resized to size x size
    patch: int = 1            # the networks see patch x patch pixels as channels: 2 is 4x faster, coarser
    augment: float = 0.5      # strength of random rotation, zoom, shift for VQ-VAE and segmenter; paper: 0
    # VQ-VAE
    channels: tuple = (64, 128, 256, 256)   # per level; each step from one to the next halves the image
    depth: int = 2            # blocks per level, here and in the UNet
    z_dim: int = 3            # channels of the latent
    codebook: int = 16384     # vectors in the codebook
    commit: float = 0.2       # weight of the commitment loss
    idle: int = 20            # a code unused for so many steps moves to where latents are
    gan: float = 0.01         # weight of the adversarial loss; 0: none; paper: 0.5
    gan_start: int = 1500     # the step from which the VQ-VAE feels it
    gan_channels: tuple = (64, 128, 256)    # of the patch discriminator
    perceptual: str = ""      # TorchScript file of LPIPS features (vgg16.pt as StyleGAN has it); empty: none
    # diffusion
    unet: tuple = (256, 384, 512, 768)      # channels per level; the middle goes back to the last but one
    heads: int = 8            # of self-attention
    attention: int = 32       # self-attention where the latent is at most this wide, and in the middles
    groups: int = 32          # of GroupNorm; 0: one per 16 channels (backward up to 50x faster on a CPU)
    dropout: float = 0.0      # in the UNet's blocks
    cond: str = "conv"        # conv: strided convolutions; seed: nearest pixel, 1 channel (the study)
    cond_ch: int = 64         # channels that conv makes of the drawing
    edges: str = "mixed"      # full, sparse, mask, none, in training and test; mixed: all, in one model
    view: str = ""            # one view alone (SA) for the diffusion model and the test: do others hurt it?
    variety: int = 4000       # moved copies of the training images are added until there are so many
    drop: float = 0.1         # share of training samples without condition: guidance needs them
    predict: str = "v"        # what the UNet outputs: v, or eps (paper)
    scale: bool = True        # standardise the latents; paper: false
    T: int = 1000             # diffusion steps, scaled-linear beta
    # training
    vq_steps: int = 3000      # optimizer steps of the VQ-VAE
    steps: int = 10000        # and of the diffusion model; raise it and run again to train longer
    seg_steps: int = 1000     # and of each segmenter, which judges the pictures
    batch: int = 36           # images per step, over all processes
    accum: int = 1            # passes per step, each on a part of the batch: for a batch that does not fit
    vq_lr: float = 8e-5       # Adam; constant after 100 steps of warm-up
    lr: float = 1e-4
    ema: float = 0.999        # decay of the averaged weights, which are what is evaluated; paper: 0
    bf16: bool = True         # bfloat16 autocast where the machine is fast at it
    compile: bool = True      # torch.compile, on CUDA
    save_every: int = 500     # steps between checkpoints
    log_every: int = 20       # steps between lines of the log
    # evaluation
    sampler: str = "ddim"     # ddim: S steps; ddpm: all T, with noise (paper)
    S: int = 50               # DDIM steps
    w: float = 2.0            # guidance: eps = eps_u + w (eps_c - eps_u); 1: as conditioned (paper)
    eval_images: int = 500    # at most this many test images are generated, per way of conditioning
    few: int = 64             # and for each w of the sweep
    aug_images: int = 2000    # at most this many training images are generated for the segmenters
    seg: tuple = (32, 64, 128, 256)         # channels per level of the segmenter
    inception: str = ""       # TorchScript Inception-v3 (inception-2015-12-05.pt): FID; empty: no FID


DEMO = dict(size=64, patch=2, channels=(32, 64), depth=1, codebook=1024, gan_channels=(16, 32), gan_start=300,
            unet=(64, 96, 128), heads=4, attention=8, groups=0, cond_ch=32, variety=1, batch=16, vq_lr=1e-3,
            lr=1e-3, vq_steps=500, steps=1200, seg_steps=250, save_every=300, S=15, eval_images=160, few=40,
            aug_images=400, seg=(16, 32, 64))
PRESETS = {
    "paper": {},
    "demo": DEMO,
    # What --data gets without a GPU, if no preset or size is asked for: your images at their full size.
    "demo256": DEMO | dict(size=256, patch=4, unet=(32, 64, 96, 128), batch=8, vq_steps=300, steps=400,
                           seg_steps=200, save_every=200, S=10, eval_images=80, few=12, aug_images=80),
}
RECIPES = {
    "ours": {},
    "paper": dict(augment=0.0, gan=0.5, cond="seed", edges="full", predict="eps", scale=False, lr=8e-6,
                  ema=0.0, sampler="ddpm", w=1.0),
}
# What may differ when a run goes on in the same folder: nothing here alters what is learnt, only how far.
FREE = {"data", "test", "out", "preset", "device", "eval", "draw", "rivals", "vq", "vq_steps", "steps",
        "seg_steps", "accum", "bf16", "compile", "save_every", "log_every", "sampler", "S", "w",
        "eval_images", "few", "aug_images", "inception"}
# What the VQ-VAE does not see: with these changed it is the same network still, and --vq can lend it.
LATER = {"recipe", "variety", "unet", "attention", "dropout", "cond", "cond_ch", "edges", "view", "drop",
         "predict", "scale", "T", "lr", "seg"}
# The words that a field may hold.
CHOICES = dict(cond=("conv", "seed"), edges=("mixed", *D.EDGES), predict=("v", "eps"),
               sampler=("ddim", "ddpm"))


# --------------------------------------------------------------------------------------------------------
# Schedule and forward process. Level t in 0..T-1 is noisy, -1 is clean (alpha_bar = 1), T is pure noise (0).


def scaled_linear_alpha_bar(T):
    """Product of 1 - beta up to t, sqrt(beta) linear from sqrt(0.0015) to sqrt(0.0195) (latent diffusion,
    Rombach et al. 2022, as its code has it). -> (T,)"""
    return torch.cumprod(1 - torch.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, T, dtype=torch.float64) ** 2, 0)


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


def gathered(x):
    """x (n,..) of every process, in the order of the ranks: what one process would hold. No gradient."""
    if ranks()[1] == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(ranks()[1])]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


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


class MultiAttention(nn.Module):
    """Self-attention over all pixels, several heads, residual; its projection starts at zero. -> like x"""
    def __init__(self, ch, heads, groups):
        super().__init__()
        self.norm, self.heads = norm(ch, groups), heads
        self.qkv = nn.Conv2d(ch, 3 * ch, 1)
        self.proj = zero(nn.Conv2d(ch, ch, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).view(B, 3, self.heads, C // self.heads, H * W).transpose(3, 4)
        h = F.scaled_dot_product_attention(*qkv.unbind(1))                     # (B,heads,H*W,C/heads)
        return x + self.proj(h.transpose(2, 3).reshape(B, C, H, W))


class Block(nn.Module):
    """norm, SiLU, conv, twice, plus skip; emb > 0: a vector shifts in between; heads > 0: attention after.

    x (B,ch_in,H,W), emb (B,emb) -> (B,ch_out,H,W). The second convolution starts at zero."""
    def __init__(self, ch_in, ch_out, groups, heads=0, emb=0, dropout=0.0):
        super().__init__()
        self.norm1 = norm(ch_in, groups)
        self.conv1 = nn.Conv2d(ch_in, ch_out, 3, padding=1)
        self.t_proj = nn.Linear(emb, ch_out) if emb else None
        self.norm2, self.dropout = norm(ch_out, groups), nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(ch_out, ch_out, 3, padding=1))
        self.skip = nn.Conv2d(ch_in, ch_out, 1) if ch_in != ch_out else nn.Identity()
        self.attend = MultiAttention(ch_out, heads, groups) if heads else nn.Identity()

    def forward(self, x, emb=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if self.t_proj is not None:
            h = h + self.t_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.attend(self.skip(x) + h)


def halve(ch):
    """(B,ch,H,W) -> (B,ch,H/2,W/2), learnt."""
    return nn.Conv2d(ch, ch, 4, 2, 1)


def double(ch):
    """(B,ch,H,W) -> (B,ch,2H,2W), learnt; kernel 4 at stride 2 covers all pixels evenly: no checkerboard."""
    return nn.ConvTranspose2d(ch, ch, 4, 2, 1)


class Discriminator(nn.Module):
    """Real or made, patch by patch (Isola et al. 2017). image (B,1,H,W) -> (B,1,h,w), wanted 1 and 0."""
    def __init__(self, channels, groups):
        super().__init__()
        layers, c = [nn.Conv2d(1, channels[0], 4, 2, 1), nn.LeakyReLU(0.2)], channels[0]
        for wide in channels[1:]:      # GroupNorm, not BatchNorm: a batch of made images gives itself away
            layers += [nn.Conv2d(c, wide, 4, 2, 1, bias=False), norm(wide, groups), nn.LeakyReLU(0.2)]
            c = wide
        self.net = nn.Sequential(*layers, nn.Conv2d(c, 1, 3, padding=1))

    def forward(self, x):
        return self.net(x).float()


class Condition(nn.Module):
    """The drawing at the size of the latent. planes (B,7,H,W) of planes() -> (B,ch,H/f,W/f).

    seed: each cell takes the pixel at its corner (nearest resize) of edges and map, 1x1 conv to one channel,
    no view or phase: the study's. conv: as many strided convolutions as it takes, nothing is skipped."""
    def __init__(self, cfg):
        super().__init__()
        levels = len(cfg.channels) - 1
        self.patch, self.jump, self.nearest = cfg.patch, cfg.patch * 2 ** levels, cfg.cond == "seed"
        self.ch = c = 1 if self.nearest else cfg.cond_ch
        if self.nearest:
            self.net = nn.Conv2d(5, 1, 1, bias=False)
        else:
            layers = [nn.Conv2d(7 * cfg.patch ** 2, c, 3, padding=1), nn.SiLU()]
            for _ in range(levels):
                layers += [halve(c), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1), nn.SiLU()]
            self.net = nn.Sequential(*layers, nn.Conv2d(c, c, 3, padding=1))

    def forward(self, planes):
        if self.nearest:
            return self.net(planes[:, :5, ::self.jump, ::self.jump])
        return self.net(F.pixel_unshuffle(planes, self.patch))


class LatentUNet(nn.Module):
    """Denoiser. z_t (B,z_dim,h,w), t (B,), drawing (B,cond,h,w) -> like z_t, zero at initialisation.

    cfg.unet (a,b,c,d): blocks a-b, b-c, c-d, each then halved; the middle d-d-c; back with the skips."""
    def __init__(self, cfg, cond, width):
        super().__init__()
        channels = cfg.unet
        self.base, emb = channels[0], 2 * channels[0]
        self.time = nn.Sequential(nn.Linear(self.base, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.conv_in = nn.Conv2d(cfg.z_dim + cond, channels[0], 3, padding=1)
        self.down, self.shrink, self.grow, self.up = (nn.ModuleList() for _ in range(4))

        block = functools.partial(Block, groups=cfg.groups, emb=emb, dropout=cfg.dropout)

        def blocks(a, b, heads):
            return nn.ModuleList(block(b if i else a, b, heads=heads) for i in range(cfg.depth))
        for i, (a, b) in enumerate(zip(channels, channels[1:])):
            here = cfg.heads if width >> i <= cfg.attention else 0
            out = channels[i - 1] if i else channels[0] // 2
            self.down.append(blocks(a, b, here))
            self.shrink.append(halve(b))
            self.grow.insert(0, double(a))         # what the level below gives is a wide
            self.up.insert(0, blocks(a + b, out, here))
        c, d = channels[-2:]
        self.middle = nn.ModuleList([block(d, d, heads=cfg.heads), *blocks(d, c, cfg.heads)])
        self.norm_out = norm(out := channels[0] // 2, cfg.groups)
        self.conv_out = zero(nn.Conv2d(out, cfg.z_dim, 3, padding=1))

    def forward(self, z_t, t, drawing):
        emb = self.time(time_embedding(t, self.base))
        h, skips = self.conv_in(torch.cat([z_t, drawing], 1)), []
        for blocks, shrink in zip(self.down, self.shrink):
            for block in blocks:
                h = block(h, emb)
            skips.append(h)
            h = shrink(h)
        for block in self.middle:
            h = block(h, emb)
        for grow, blocks in zip(self.grow, self.up):
            h = torch.cat([grow(h), skips.pop()], 1)
            for block in blocks:
                h = block(h, emb)
        return self.conv_out(F.silu(self.norm_out(h)))


# --------------------------------------------------------------------------------------------------------
# The three that are trained. forward(batch, g) is the training loss.


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


@functools.cache
def scripted(path, device):
    """A frozen network from a TorchScript file: weights that this program does not train or ship."""
    try:
        net = torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as e:
        D.fail(f"{path}: not a TorchScript file ({str(e).splitlines()[0][:80]})")
    for p in net.parameters():
        p.requires_grad = False
    return net


class VQVAE(nn.Module):
    """Images as a small grid of codebook vectors (van den Oord et al. 2017), with a patch discriminator."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, z, groups = cfg, cfg.z_dim, cfg.groups
        c, *rest = cfg.channels
        layers = [nn.Conv2d(cfg.patch ** 2, c, 3, padding=1)]
        for wide in rest:
            layers += [*(Block(wide if i else c, wide, groups) for i in range(cfg.depth)), halve(wide)]
            c = wide

        def middle():      # of both: attention, at the size of the latent
            return [*(Block(c, c, groups, cfg.heads) for _ in range(cfg.depth)), Block(c, c, groups)]
        self.encoder = nn.Sequential(*layers, *middle())
        self.to_z = nn.Sequential(norm(c, groups), nn.SiLU(), nn.Conv2d(c, z, 3, padding=1),
                                  nn.Conv2d(z, z, 1))
        layers = [nn.Conv2d(z, z, 1), nn.Conv2d(z, c, 3, padding=1), *middle()]
        for wide in reversed(cfg.channels[:-1]):
            layers += [double(c), *(Block(wide if i else c, wide, groups) for i in range(cfg.depth))]
            c = wide
        self.decoder = nn.Sequential(*layers, norm(c, groups), nn.SiLU(),
                                     nn.Conv2d(c, cfg.patch ** 2, 3, padding=1))
        self.codes = nn.Parameter(torch.zeros(cfg.codebook, cfg.z_dim))
        self.discriminator = Discriminator(cfg.gan_channels, cfg.groups) if cfg.gan else None
        # State, and so in the checkpoint. At first every code is idle: step 0 puts all on latents. fit
        # averages parameters only: the copy's idle and trained stay as they began, and nothing reads them.
        self.register_buffer("idle", torch.full((cfg.codebook,), 10 ** 6))
        self.register_buffer("trained", torch.tensor(0))

    def features(self, x0):
        """x0 (B,1,H,W) -> (B,channels[-1]): the encoder's last feature map, averaged."""
        return self.encoder(F.pixel_unshuffle(x0, self.cfg.patch)).float().mean((2, 3))

    def latent(self, x0):
        """x0 (B,1,H,W) -> z_e (B,z_dim,h,w) float32, before the codebook."""
        return self.to_z(self.encoder(F.pixel_unshuffle(x0, self.cfg.patch))).float()

    @torch.no_grad()
    def nearest(self, z):
        """z (B,z_dim,h,w) -> index (B,h,w) of the nearest code. No matrix product: in TF32 it would err."""
        with torch.autocast(z.device.type, enabled=False):
            rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
            found = [torch.cdist(r, self.codes, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
                     for r in rows.split(2 ** 26 // len(self.codes))]          # 256 MB of distances at a time
        return torch.cat(found).view(len(z), *z.shape[2:])

    def look_up(self, index):
        """index (B,h,w) -> codes (B,z_dim,h,w)"""
        return F.embedding(index, self.codes).permute(0, 3, 1, 2)

    def encode(self, x0):
        """x0 (B,1,H,W) -> z0 (B,z_dim,h,w): codes."""
        return self.look_up(self.nearest(self.latent(x0)))

    def picture(self, z_q):
        """Codes (B,z_dim,h,w) -> (B,1,H,W) float32."""
        return F.pixel_shuffle(self.decoder(z_q).float(), self.cfg.patch)

    def decode(self, z):
        """Any latent (B,z_dim,h,w), moved to the nearest codes, all that the decoder knows. -> (B,1,H,W)"""
        return self.picture(self.look_up(self.nearest(z)))

    @torch.no_grad()
    def revive(self, z, g):
        """Codes that have been idle for cfg.idle steps move to latents drawn from the batch z (B,z_dim,h,w).

        Without, a codebook collapses to the few codes that win at first. The averaged copy of a moved code
        lags behind; as codes compete by distance, one that lies far from all latents does no harm."""
        rows = gathered(z).permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        pick = torch.randint(len(rows), (len(self.codes),), generator=g, device=z.device)
        self.codes.copy_(torch.where((self.idle >= self.cfg.idle)[:, None], rows[pick], self.codes))

    def losses(self, x0, z):
        """Images, their latents z_e -> (index, recon, what trains the autoencoder, the discriminator's loss).

        VQ-VAE eq. 3: |x - x_hat|^2 + |sg[z_e] - e|^2 + commit |z_e - sg[e]|^2, sg = detach. The decoder's
        gradient reaches the encoder as if z_e had not been moved to e (straight through, sec. 3.2)."""
        c, index = self.cfg, self.nearest(z)
        e = self.look_up(index)
        recon = self.picture(z + (e - z).detach())
        loss = F.mse_loss(recon, x0) + F.mse_loss(e, z.detach()) + c.commit * F.mse_loss(z, e.detach())
        if c.perceptual:
            lpips = lambda x: scripted(c.perceptual, str(x.device))(
                (127.5 * x + 127.5).expand(-1, 3, -1, -1), resize_images=False, return_lpips=True)
            loss = loss + (lpips(recon) - lpips(x0)).square().sum(1).mean()
        if not c.gan:
            return index, recon, loss, 0.0
        # Least squares (Mao et al. 2017). One backward serves both sides: what the autoencoder is to feel
        # goes through detached weights, what the discriminator is to learn through detached images.
        frozen = {k: p.detach() for k, p in self.discriminator.named_parameters()}
        fooled = (torch.func.functional_call(self.discriminator, frozen, recon) - 1).square().mean()
        loss = loss + c.gan * (self.trained >= c.gan_start) * fooled
        seen, made = self.discriminator(x0), self.discriminator(recon.detach())
        return index, recon, loss, ((seen - 1).square().mean() + made.square().mean()) / 2

    def forward(self, batch, g):
        x0 = augment(batch["image"], self.cfg.augment, False, g)
        z = self.latent(x0)
        if self.training and getattr(g, "first", True):    # with --accum: once a step, from its first part
            self.revive(z.detach(), g)
            self.idle += 1
        index, _, autoencoder, discriminator = self.losses(x0, z)
        if self.training:
            self.idle[gathered(index)] = 0
            self.trained += getattr(g, "last", True)
        return autoencoder + discriminator


STROKES = 6    # drawings of an image by a few strokes, made once: which of them is drawn per step
EDGE_BIT = dict(full=0, sparse=2, mask=1, none=8)      # of each of D.EDGES the first in edge_bits


def edge_bits(image, mask, seed):
    """The edge maps of all images, as bits of one byte: 0 full, 1 contours of the mask, 2..7 strokes.

    image (N,H,W) uint8, mask likewise or None -> (N,H,W) uint8"""
    out, rng = np.empty(image.shape, np.uint8), np.random.default_rng(seed)
    for rows in np.array_split(np.arange(len(image)), -(-len(image) // 50)):
        found = D.edges(image[rows])
        maps = [found, D.edge_map(found, mask[rows], "mask") if mask is not None else found & False]
        maps += [D.edge_map(found, None, "sparse", rng) for _ in range(STROKES)]
        out[rows] = np.packbits(maps, 0, bitorder="little")[0]
    return out


def which_edges(mode, u):
    """Which bit of edge_bits each sample sees; 8: no edges. mixed: each of D.EDGES for a quarter of them.

    u (B,2) in [0,1): 0 is the choice at test -> (B,) int64"""
    strokes = (STROKES * u[:, 1]).long()
    bits = {m: bit + (strokes if m == "sparse" else 0 * strokes) for m, bit in EDGE_BIT.items()}
    if mode != "mixed":
        return bits[mode]
    return torch.stack(list(bits.values()), 1).gather(1, (4 * u[:, :1]).long())[:, 0]


def one_hot(mask):
    """Ids (B,H,W) int64 in 0..3 -> (B,4,H,W) float32"""
    return F.one_hot(mask, 4).permute(0, 3, 1, 2).float()


def planes(batch, bit):
    """The condition as images (B,7,H,W) float32: edges, one-hot map (4), view and phase: -1, 1, unknown 0.

    All 0 is no condition: it differs from an empty drawing, whose background is 1. bit: of which_edges."""
    edges = (batch["edges"] >> bit.view(-1, 1, 1) & 1).float().unsqueeze(1)
    B, _, H, W = edges.shape
    ids = one_hot(batch["mask"]) if "mask" in batch else edges.new_zeros(B, 4, H, W)
    return torch.cat([edges, ids, batch["kind"].view(B, 2, 1, 1).expand(B, 2, H, W)], 1)


def drawn(batch, mode):
    """planes() at test: always the same stroke drawing; of mixed, the full edges."""
    return planes(batch, which_edges(mode, batch["kind"].new_zeros(len(batch["kind"]), 2)))


class Model(nn.Module):
    """Latent diffusion under a drawing: || UNet(z_t, t, Condition(planes)) - target ||^2, z0 standardised."""
    def __init__(self, cfg, mean=0.0, std=1.0):
        super().__init__()
        self.cfg = cfg
        self.width = cfg.size // (cfg.patch * 2 ** (len(cfg.channels) - 1))
        self.condition = Condition(cfg)
        self.unet = LatentUNet(cfg, self.condition.ch, self.width)
        # Of the training latents, per channel; in the checkpoint, so that sampling undoes what training did.
        self.register_buffer("mean", torch.zeros(cfg.z_dim) + mean)
        self.register_buffer("std", torch.zeros(cfg.z_dim) + std)
        self.alpha_bar = scaled_linear_alpha_bar(cfg.T)    # stays on the CPU: samplers read numbers from it

    def eps(self, z_t, t, drawing):
        """eps_hat, whatever the UNet was trained to predict. drawing (B,ch,h,w) of condition() -> like z_t"""
        out = self.unet(z_t, t, drawing).float()
        return out if self.cfg.predict == "eps" else eps_from_v(out, z_t, t, self.alpha_bar)

    def loss(self, z0, cond, t, eps):
        """Squared error of the prediction per image. cond (B,7,H,W) of planes() -> (B,)"""
        target = eps if self.cfg.predict == "eps" else v_target(z0, t, eps, self.alpha_bar)
        out = self.unet(q_sample(z0, t, eps, self.alpha_bar), t, self.condition(cond)).float()
        return (out - target).square().mean((1, 2, 3))

    def forward(self, batch, g):
        z0 = (batch["z0"] - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)
        u = rand(len(z0), 3, g)
        keep = (u[:, 2] >= self.cfg.drop).float().view(-1, 1, 1, 1)
        cond = keep * planes(batch, which_edges(self.cfg.edges, u[:, :2]))
        t, eps = random_t(len(z0), self.cfg.T, 1.0, g), randn_like(z0, g)
        return self.loss(z0, cond, t, eps).mean()


class Segmenter(nn.Module):
    """The judge: a small UNet that finds the structures in an image. Trained on pairs of image and mask."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, wide = cfg, cfg.seg
        self.first = nn.Conv2d(cfg.patch ** 2, wide[0], 3, padding=1)
        self.down = nn.ModuleList(Block(a, b, cfg.groups) for a, b in zip(wide[:1] + wide, wide))
        self.up = nn.ModuleList(Block(a + b, a, cfg.groups) for a, b in reversed(list(zip(wide, wide[1:]))))
        self.last = nn.Sequential(norm(wide[0], cfg.groups), nn.SiLU(),
                                  nn.Conv2d(wide[0], 4 * cfg.patch ** 2, 1))

    def logits(self, x0):
        """x0 (B,1,H,W) -> (B,4,H,W) float32"""
        h, skips = self.first(F.pixel_unshuffle(x0, self.cfg.patch)), []
        for i, block in enumerate(self.down):
            h = block(resample(h, "down") if i else h)
            skips.append(h)
        skips.pop()
        for block in self.up:
            h = block(torch.cat([resample(h, "up"), skips.pop()], 1))
        return F.pixel_shuffle(self.last(h).float(), self.cfg.patch)

    def forward(self, batch, g):
        both = torch.cat([batch["image"], 2 * one_hot(batch["mask"]) - 1], 1)      # they move together
        both = augment(both, self.cfg.augment, False, g)
        maps = one_hot(both[:, 1:].argmax(1))
        logits = self.logits(both[:, :1])
        p = logits.softmax(1)
        dice = (2 * (p * maps).sum((2, 3)) + 1) / ((p + maps).sum((2, 3)) + 1)     # per image; absent: 1
        return F.cross_entropy(logits, maps) + 1 - dice[:, 1:].mean()


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


def ddpm_step(x_t, t, eps_hat, alpha_bar, noise):
    """x_t -> x_{t-1}, drawn from the posterior q(x_{t-1} | x_t, x0_hat) (DDPM eq. 7). Like x_t.

    Its variance is beta (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t): 0 at t = 0, where nothing is drawn."""
    ab, prev = float(alpha_bar[t]), float(alpha_bar[t - 1]) if t else 1.0
    beta, x0_hat = 1 - ab / prev, (x_t - math.sqrt(1 - ab) * eps_hat) / math.sqrt(ab)
    mean = (math.sqrt(prev) * beta * x0_hat + math.sqrt(1 - beta) * (1 - prev) * x_t) / (1 - ab)
    return mean + math.sqrt(beta * (1 - prev) / (1 - ab)) * noise


def ddpm_decode(eps_fn, x_T, alpha_bar, g):
    """x_T -> x_0 in T calls of eps_fn(x_t, t), with fresh noise in each (DDPM, algorithm 2)."""
    x = x_T
    for t in reversed(range(len(alpha_bar))):
        noise = torch.randn(x.shape, generator=g, device=x.device)
        x = ddpm_step(x, t, eps_fn(x, t), alpha_bar, noise)
    return x


def guided(model, cond, w):
    """model.eps at a fixed condition, guided: eps_u + w (eps_c - eps_u), eps_u without condition (Ho &
    Salimans 2022 with w - 1 for their w). As the samplers want it: (x_t (B,..), t int) -> like x_t"""
    with amp(model.cfg, cond.device):     # once for all steps
        drawings = [model.condition(c) for c in ([cond] if w == 1 else [cond, 0 * cond])]

    def fn(x_t, t):
        k = len(drawings)
        with amp(model.cfg, x_t.device):
            level = torch.full((k * len(x_t),), t, device=x_t.device)
            eps_c, *eps_u = model.eps(torch.cat(k * [x_t]), level, torch.cat(drawings)).chunk(k)
        return eps_u[0] + w * (eps_c - eps_u[0]) if eps_u else eps_c
    return fn


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
# Evaluation: every number is of patients that no network has seen


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


def shown(x):
    """(B,1,H,W) in [-1,1] -> numpy (B,H,W) in [0,1]"""
    return ((x[:, 0].float().cpu().numpy() + 1) / 2).clip(0, 1)


def spread(rows, n):
    """At most n of these rows, evenly."""
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), n)).astype(int)]


def fingerprint(model):
    """Hash of a network's weights: what was trained on its output belongs to these and no others."""
    h = hashlib.sha256()
    for k, v in model.state_dict().items():
        h.update(k.encode() + v.cpu().contiguous().numpy().tobytes())
    return h.hexdigest()[:16]


def latents(vq, loader, rows):
    """z0 of these rows, numpy (n,z_dim,h,w) float32."""
    with amp(vq.cfg, loader.device):
        return in_batches(lambda r: vq.encode(loader.batch(r)["image"]), rows).cpu().numpy()


def training_pairs(cfg, vq, arrays, device):
    """What the diffusion model learns from: the drawings of these images and their latents z0, then of moved
    copies of them until there are cfg.variety. -> arrays, image replaced by z0 (n,z_dim,h,w)"""
    pairs, n = [], len(arrays["image"])
    copies = -(-cfg.variety // n) if cfg.augment and not cfg.eval else 1
    for k in tqdm(range(copies), "latents", disable=ranks()[0] > 0):
        here = dict(arrays)
        if k:     # the same for every process: edges and latents of moved images, not moved edges and latents
            rng = np.random.default_rng([cfg.seed, k])
            here["image"], here["mask"] = D.moved(here["image"], here.get("mask"), cfg.augment, rng)
            here["edges"] = edge_bits(here["image"], here["mask"], cfg.seed + k)
        here["z0"] = latents(vq, D.Loader({"image": here.pop("image")}, device), np.arange(n))
        pairs.append(here)
    return {name: np.concatenate([p[name] for p in pairs]) for name in pairs[0]}


def reconstruct(vq, loader, rows):
    """Through the codebook and back -> (images (n,H,W) in [0,1], how often each code was used (K,))."""
    with amp(vq.cfg, loader.device):
        index = in_batches(lambda r: vq.nearest(vq.latent(loader.batch(r)["image"])), rows)
        images = in_batches(lambda i: vq.picture(vq.look_up(i)), index)
    return shown(images), torch.bincount(index.flatten(), minlength=len(vq.codes)).double().cpu().numpy()


def perplexity(used):
    """exp of the entropy of code counts (K,): how many codes, were all used equally."""
    p = used[used > 0] / used.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def generate(model, vq, loader, rows, mode, w, seed):
    """Images for the drawings of these rows, with edges of that mode -> (n,H,W) in [0,1]. Noise from seed."""
    c, g = model.cfg, torch.Generator(loader.device).manual_seed(seed)
    noise = torch.randn(len(rows), c.z_dim, model.width, model.width, generator=g, device=loader.device)

    def some(r, z_T):
        eps = guided(model, drawn(loader.batch(r), mode), w)
        z = ddpm_decode(eps, z_T, model.alpha_bar, g) if c.sampler == "ddpm" else \
            ddim_decode(eps, z_T, c.S, model.alpha_bar)
        with amp(c, loader.device):
            return vq.decode(z * model.std.view(-1, 1, 1) + model.mean.view(-1, 1, 1))
    return shown(in_batches(some, rows, noise))


def watch_vq(cfg, loader, ema, step):
    """For fit's log: is the codebook alive? And preview_vq.png. loader: validation images."""
    rows = spread(np.arange(len(loader)), 32)
    real, (fake, used) = shown(loader.batch(rows)["image"]), reconstruct(ema, loader, rows)
    M.grid(Path(cfg.out, "preview_vq.png"), [real[::4], fake[::4]], ["image", "VQ-VAE"], [],
           f"validation patients at step {step}")
    return dict(val_psnr=float(M.psnr(real, fake).mean()), perplexity=perplexity(used),
                codes_used=int((used > 0).sum()))


def watch_ldm(vq, cfg, loader, name, ema, step):
    """For fit's log: loss with the drawing, and with another validation image's; NAME.png to look at."""
    rows = spread(np.arange(len(loader)), 16)
    g, batch = torch.Generator(loader.device).manual_seed(0), loader.batch(rows)
    z0 = torch.as_tensor(latents(vq, loader, rows), device=loader.device)
    z0 = (z0 - ema.mean.view(-1, 1, 1)) / ema.std.view(-1, 1, 1)
    cond = drawn(batch, cfg.edges)
    t = ((torch.arange(len(rows), device=z0.device) + 0.5) / len(rows) * cfg.T).long()
    eps = torch.randn(z0.shape, generator=g, device=z0.device)
    with torch.inference_mode(), amp(cfg, loader.device):
        right, wrong = (ema.loss(z0, x, t, eps).mean().item() for x in (cond, cond.roll(len(t) // 2, 0)))
    lines = [*(v[::4] for v in drawing(cond)), shown(batch["image"][::4]),
             generate(ema, vq, loader, rows[::4], cfg.edges, 1.0, 0)]
    M.grid(Path(cfg.out, f"{name}.png"), lines, ["edges", "map", "real", "generated"], [],
           f"validation patients at step {step}")
    return dict(val_loss=right, val_loss_other_drawing=wrong)


COLOURS = np.array([[0, 0, 0], [0.84, 0.37, 0], [0, 0.62, 0.45], [0.34, 0.71, 0.91]])    # cavity, wall, RV


def drawing(cond):
    """planes (n,7,H,W) to look at -> edges (n,H,W), map (n,H,W,3), in [0,1]"""
    cond = cond.cpu().numpy()
    return cond[:, 0], COLOURS[cond[:, 1:5].argmax(1)]


def segment(judge, images):
    """Images (n,H,W) in [0,1] -> label maps (n,H,W) int64, numpy."""
    device = next(judge.parameters()).device

    def one(x):
        with amp(judge.cfg, device):
            x = torch.as_tensor(2 * x - 1, dtype=torch.float32, device=device)[:, None]
            return judge.logits(x).argmax(1)
    return in_batches(one, images).cpu().numpy()


def feature_sets(cfg, vq, device):
    """{two keys of metrics: images (n,H,W) in [0,1] -> features (n,d)}: our own; --inception's, if given."""
    batch = lambda x: torch.tensor(x, dtype=torch.float32, device=device)[:, None]
    own = lambda v: vq.features(2 * batch(v) - 1)
    out = {("fd_vq", "kid_vq"): lambda x: in_batches(own, x).cpu().numpy()}
    if cfg.inception:     # it resizes to 299 x 299 by itself, and wants 0..255 in three channels
        net = scripted(cfg.inception, str(device))
        eight = lambda v: (255 * batch(v)).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
        read = lambda v: net(eight(v), return_features=True).float()
        out["fid", "kid"] = lambda x: in_batches(read, x).cpu().numpy()
    return out


def load_drawings(path, cfg, maps):
    """A user's drawings, HDF5: edges (N,H,W), not 0 where there is a line; mask (N,H,W) with the attribute
    mask_names; view, phase (N,) as in data.py. H and W are cfg.size; maps: whether the model reads masks.

    -> arrays for Loader. edges may be missing if the model knows drawings without, a mask if not read. What
    was trained with --edges mask, or none, gets these whatever was drawn: it has seen no others."""
    names = ("edges", "view", "phase", *(["mask"] if maps else []))
    with D.open_h5(path) as file:
        found = [k for k in names if k in list(file)]       # `k in file` would open what a link points to
        stored = {k: x for k in found if (x := D.plain(file, path, k)) is not None}
        attrs = {k: D.as_python(v) for x in (file, stored.get("mask", file)) for k, v in x.attrs.items()}
        read = {k: x[...] for k, x in stored.items()}
    need = [k for k, v in (("edges", cfg.edges in ("full", "sparse")), ("mask", maps)) if v and k not in read]
    if need:
        D.fail(f"{path}: {' and '.join(need)} missing; this model draws from "
               f"{'a mask and ' if maps else ''}edges ({cfg.edges})")
    n = max(1, len(np.atleast_1d(read["mask" if maps else "edges"])))
    for k, x in read.items():
        shape = (n, cfg.size, cfg.size) if k in ("edges", "mask") else (n,)
        kind = "uint8" if k == "mask" else "numbers"
        if x.shape != shape or x.dtype.kind not in "biuf" or k == "mask" and x.dtype != np.uint8:
            D.fail(f"{path}: {k}: {x.dtype} {x.shape}, expected {kind} {shape}")
    edges, arrays = read.get("edges", np.zeros((n, cfg.size, cfg.size))) != 0, {"kind": told(read, n)}
    if maps:
        arrays["mask"] = D.cine_ids(SimpleNamespace(path=path, mask=read["mask"], attrs=attrs))[read["mask"]]
    if cfg.edges in ("mask", "none"):
        edges = D.edge_map(edges, arrays.get("mask"), cfg.edges)
    return arrays | {"edges": edges.astype(np.uint8)}


def told(columns, n):
    """View and phase, (n,2): -1 for the first (SA, ED), 1 for the second (LA, ES), 0 where not known."""
    known = [columns.get(k, np.full(n, np.nan)) for k in ("view", "phase")]
    return np.stack([np.select([k == 0, k == 1], [-1, 1], 0) for k in known], 1).astype(np.float32)


def view_of(data):
    """The name of every row's view, (N,) str; "" where the file does not say."""
    names, view = list(data.attrs.get("view_names", [])), data.columns.get("view", np.full(len(data), np.nan))
    return np.array(["" if v != v else names[int(v)] if v < len(names) else f"{v:.0f}" for v in view])


def from_drawings(cfg, model, vq, arrays, device):
    """Images for the arrays of load_drawings -> OUT/drawn.h5, OUT/drawn.png."""
    loader, path = D.Loader(arrays, device), Path(cfg.out, "drawn.h5")
    n = len(loader)
    images = generate(model, vq, loader, np.arange(n), "full", cfg.w, cfg.seed)
    edges, labels = drawing(drawn(loader.batch(np.arange(min(n, 8))), "full"))
    M.grid(path.with_suffix(".png"), [edges, labels, images[:8]], ["edges", "map", "generated"], [],
           f"Drawn from {cfg.draw}, w {cfg.w:g}.")
    columns = dict(image=np.rint(255 * images).astype(np.uint8), subject=np.arange(n).astype(str))
    columns |= {"mask": arrays["mask"]} if "mask" in arrays else {}
    D.write(str(path), [columns], D.CINE_NAMES | dict(source=f"generated by cond_ldm.py from {cfg.draw}"))
    print(f"{n} images: {path}, {path.with_suffix('.png')}")


def evaluate(cfg, data, part, arrays, loader, vq, models, judges):
    """Every number and picture of a run, on its test patients. -> metrics, as in results.json

    models: {"": the diffusion model, "cond_seed": its rival}; judges: segmenters {"real", "generated", ""},
    "" saw both; arrays, loader: all rows of data."""
    train, val, test = (np.flatnonzero(part == p) for p in ("train", "val", "test"))
    test, seen, few = spread(test, cfg.eval_images), spread(train, 5000), spread(test, cfg.few)
    subject, real = data.subject[test], arrays["image"][test] / 255
    mode = "full" if cfg.edges == "mixed" else cfg.edges
    metrics, ids = {}, {"lv": 1, "myo": 2, "rv": 3}

    def put(key, who, *values, statistic=np.mean, **kw):
        metrics[key] = M.row_of(statistic, who, *values, **kw)

    def hits(images, rows, m):
        wanted = arrays["edges"][rows] >> EDGE_BIT[m] & 1
        found = D.edges(np.rint(255 * images).astype(np.uint8))
        return M.edge_hits(found, wanted, 2 if cfg.size > 128 else 1)      # pixels of tolerance

    def score(name, images, rows=test):
        """Everything of single images that stand for these rows of data, as rows `name` of the table."""
        dot, who, x = f".{name}" if name else "", data.subject[rows], arrays["image"][rows] / 255
        put("ssim" + dot, who, M.ssim(x, images))
        put("ssim_uniform7" + dot, who, M.ssim(x, images, "uniform7"))      # scikit-image's, as the study
        put("nmse" + dot, who, M.nmse(x, images), better="lower")
        put("nmse_fastmri" + dot, who, M.nmse_fastmri(x, images), better="lower")
        put("psnr" + dot, who, M.psnr(x, images), unit="dB")
        if "real" in judges:
            counts = M.overlap(segment(judges["real"], images), arrays["mask"][rows], ids.values())
            put("dice_gen" + dot, who, counts, statistic=M.dice)
            for k, structure in enumerate(ids):
                put(f"dice_gen_{structure}{dot}", who, counts[:, k:k + 1], statistic=M.dice)
        put("edge_f1" + dot, who, hits(images, rows, "full"), statistic=M.edge_f1)

    # One set of images per way of making them, in the order of the test rows.
    ways, made, began = {name: (model, mode) for name, model in models.items()}, {}, time.perf_counter()
    ways |= {f"edges_{m}": (models[""], m) for m in D.EDGES[1:] if cfg.edges == "mixed"}
    for name, (model, m) in tqdm(ways.items(), "evaluate: generate", unit="way"):
        made[name] = generate(model, vq, loader, test, m, cfg.w, cfg.seed)
    metrics["gen_img_s"] = M.row(len(ways) * len(test) / (time.perf_counter() - began), unit="1/s")
    made["vq"], used = reconstruct(vq, loader, test)
    alike = np.array([f"{s} {v}" for s, v in zip(data.subject, view_of(data))])   # short is no guess of long
    trivial = M.trivial_images(dataclasses.replace(data, subject=alike), spread(train, 2000), test)
    made |= {"constant": trivial["constant"], "other_slice": trivial["copy"]}
    for name, images in tqdm(made.items(), "evaluate: score", unit="way"):
        score(name, images)
        if name in ("", "edges_sparse", "edges_mask"):      # how many of the edges that were drawn are there?
            there = hits(images, test, ways[name][1])
            put("edge_recall" + (name and "." + name), subject, there, statistic=M.edge_recall)
    for name, judge in judges.items():
        counts = M.overlap(segment(judge, real), arrays["mask"][test], ids.values())
        put("dice_aug" + (name and "." + name), subject, counts, statistic=M.dice)
        if name == "real":
            metrics["dice_gen.real"] = metrics["dice_aug.real"]
    for name, row in (("", "vq"), (".constant", "constant"), (".other_slice", "other_slice")):
        for key in ("ssim", "psnr"):
            metrics[f"vq_{key}{name}"] = metrics[f"{key}.{row}"]
    metrics["vq_perplexity"] = M.row(perplexity(used), n=len(test))
    metrics["vq_usage"] = M.row((used > 0).mean(), n=len(test))

    # Views apart: the study thought that mixing them was half of its trouble.
    view = view_of(data)[test]
    for v in np.unique(view) if len(np.unique(view)) > 1 else ():
        score(f"view_{v or 'unknown'}", made[""][view == v], test[view == v])

    # Guidance, on fewer images. To be chosen by the validation patients: val_w1 and so on.
    sweep = {}
    for prefix, rows in (("val_", spread(val, cfg.few)), ("", few)):
        for w in (1, 2, 4) if len(rows) else ():
            images = generate(models[""], vq, loader, rows, mode, w, cfg.seed)
            score(f"{prefix}w{w}", images, rows)
            sweep[f"w = {w}"] = images      # the test rows' come last, and stay for the picture

    # Populations: n of each beside n training images that are real, at the same n as it biases the distance.
    other = arrays["image"][spread(train, len(test))] / 255
    for keys, features in feature_sets(cfg, vq, loader.device).items():
        target = features(real)
        for name, images in {**made, "real": other}.items():
            here = features(images)
            for key, distance in zip(keys, (M.frechet, M.kid)):
                value = distance(here, target)
                metrics[key + (name and "." + name)] = M.row(value, n=len(images), better="lower")
    # Memorisation: how far to the nearest training slice. A copy is nearer than a real new patient is.
    for name in ("", "edges_none", "vq", "real"):
        if name in made or name == "real":
            d, at = M.nearest(made.get(name, real), arrays["image"][seen])
            put("memorisation" + (name and "." + name), subject, d)
            near = arrays["image"][seen][at] / 255 if not name else near

    # Eight patients, a slice near the middle of each, in turns of each view.
    at = []
    for i, p in enumerate(np.unique(subject)[:8]):
        rows = np.flatnonzero(subject == p)
        rows = rows[view[rows] == np.unique(view[rows])[i % len(np.unique(view[rows]))]]
        at.append(rows[len(rows) // 2])
    out, people, batch = Path(cfg.out), list(subject[at]), loader.batch(test[at])
    seen_as = {m: drawing(drawn(batch, m)) for m in D.EDGES}
    edges, labels = seen_as[mode]
    lines = {f"edges, {mode}": edges, "map": labels, "real": real[at], "VQ-VAE": made["vq"][at],
             "generated": made[""][at]}
    lines |= {"with --cond seed": made["cond_seed"][at]} if "cond_seed" in made else {}
    M.grid(out / "samples.png", list(lines.values()), list(lines), people,
           f"Test patients, whom no network has seen. {cfg.sampler}, w {cfg.w:g}.")
    if cfg.edges == "mixed":
        lines = {"map": labels, "real": real[at]}
        for m in D.EDGES:
            images = made["" if m == "full" else f"edges_{m}"]
            lines |= {f"edges, {m}": seen_as[m][0], f"generated from {m}": images[at]}
        M.grid(out / "edges.png", list(lines.values()), list(lines), people,
               "One model, four drawings: edges that Canny finds, a few strokes, the map's contours, none.")
    show = spread(np.arange(len(few)), 8)
    M.grid(out / "guidance.png", [arrays["image"][few[show]] / 255, *(v[show] for v in sweep.values())],
           ["real", *sweep], [], "Guidance: eps_u + w (eps_c - eps_u).")
    M.grid(out / "memorisation.png", [real[at], made[""][at], near[at]],
           ["real", "generated", "nearest training slice"], people,
           "Is it a copy? It should be nearer to row 1.")
    logs = {p.stem[4:]: p for p in sorted(out.glob("log_*.jsonl")) if "seg" not in p.stem}
    M.curves(out / "curves.png", logs, ("loss", "val_loss", "perplexity"))
    return metrics


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


def check_stages(c):
    """Refuse sizes that these networks cannot have, and name some that they can."""
    unit = c.patch * 2 ** max(len(c.channels) + len(c.unet) - 2, len(c.seg) - 1)
    if c.size % unit:
        near = c.size + -c.size % unit
        D.fail(f"--size {c.size}: these networks need a multiple of {unit}, such as {near}")
    if c.size < 16:
        D.fail(f"--size {c.size}: at least 16, SSIM's window is 11 pixels wide")
    if c.gan and 2 ** len(c.gan_channels) > c.size:
        D.fail(f"--gan_channels {c.gan_channels}: each halves the image, {c.size} pixels can be halved "
               f"{c.size.bit_length() - 1} times")
    if len(c.unet) < 2 or c.unet[0] % 4:
        D.fail(f"--unet {c.unet}: at least two levels, the first a multiple of 4 wide")
    wide = {*c.channels, *c.unet, c.unet[0] // 2, *c.seg, *c.gan_channels[1:]}
    sums = {a + b for a, b in (*zip(c.unet, c.unet[1:]), *zip(c.seg, c.seg[1:]))}
    if any(v % (c.groups or max(1, v // 16)) for v in wide | sums):
        D.fail(f"--groups {c.groups}: must divide the channels of every level and of two neighbours together")
    if any(v % c.heads for v in {c.channels[-1], *c.unet, c.unet[0] // 2}):
        D.fail(f"--heads {c.heads}: must divide the channels {c.unet}, {c.unet[0] // 2}, {c.channels[-1]}")
    if c.drop > 1:
        D.fail(f"--drop {c.drop}: a share, from 0 to 1")


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


PAPER = {"ssim_uniform7": 0.40, "nmse": 1.22, "fid": 140.54}     # the study's, 10 patients of M&Ms-2
TAKES = {"demo": "about 8 minutes on 2 CPU cores", "demo256": "about 10 minutes on 2 CPU cores",
         "paper": "made for one GPU, not yet timed on one"}


def main(argv):
    began = time.perf_counter()
    cfg, given, device = start(argv)
    if cfg.preset == "demo" and cfg.data and not {"preset", "size"} & set(given):
        cfg, _ = parse([*argv, "--preset=demo256"])
    check_stages(cfg)
    out, (rank, world) = Path(cfg.out), ranks()
    held = lock(out) if rank == 0 else None        # until the process ends

    path = cfg.data or str(out / "views.h5")
    if rank == 0 and not cfg.data and not os.path.exists(path):
        D.phantom_views(path, subjects=100, size=cfg.size)
    if rank == 0 and cfg.vq and not (out / "ckpt_vq.pt").exists():
        if not os.path.isfile(cfg.vq):
            D.fail(f"--vq {cfg.vq}: no such file; python cond_ldm.py --out FOLDER makes FOLDER/ckpt_vq.pt")
        M.write_atomically(out / "ckpt_vq.pt", Path(cfg.vq).read_bytes())
    if world > 1:
        dist.barrier()
    data, part = D.load_study(path, cfg.test, cfg.size, cfg.seed, square="size" not in given)
    whole = np.flatnonzero(part == "train")        # for VQ-VAE and segmenters, which see all views always
    if cfg.view and cfg.view not in (views := view_of(data)):
        D.fail(f"--view {cfg.view}: {path} has {', '.join(np.unique(views[views != ''])) or 'no view_names'}")
    part = np.where(views == cfg.view, part, "") if cfg.view else part
    train, val = np.flatnonzero(part == "train"), np.flatnonzero(part == "val")
    count = {p: len(np.unique(data.subject[part == p])) for p in ("train", "val", "test")}
    slices = min((part == "test").sum(), cfg.eval_images)     # one has no distance of populations
    if not count["train"] or slices < 2:
        D.fail(f"{path}: {count['train']} training subjects, {slices} test slices (--eval_images "
               f"{cfg.eval_images} at most); at least 1 and 2 are needed")
    if data.mask is None and cfg.edges not in ("full", "sparse"):
        D.fail(f"{data.path}: mask: missing; --edges full (or sparse) draws from edges alone")
    mask = None if data.mask is None else D.cine_ids(data)[D.in_memory(data.mask)]
    if mask is not None and cfg.test and (D.cine_ids(D.load(cfg.test, cfg.size)) != D.cine_ids(data)).any():
        D.fail(f"{cfg.test}: mask: other ids than in {path}; convert both with the same program")
    drawings = load_drawings(cfg.draw, cfg, mask is not None) if cfg.draw else None
    if cfg.inception:     # as with drawings: what is wrong with the file shows now, not in the end
        scripted(cfg.inception, str(device))
    if rank == 0:
        why = "as asked" if "preset" in given else f"the default on {device.type}"
        print(f"cond_ldm: preset {cfg.preset} ({why}), recipe {cfg.recipe}, {device}, "
              f"torch {torch.__version__}\n"
              f"data: {data.path} at {cfg.size}x{cfg.size}; patients (slices): " +
              ", ".join(f"{p} {n} ({(part == p).sum()})" for p, n in count.items()) +
              f"\n{cfg.vq_steps} steps for the VQ-VAE, {cfg.steps} a diffusion model. The preset as it is: "
              f"{TAKES[cfg.preset]}\nout: {out}/; stop at any time, the same command goes on", flush=True)
        record(cfg)
    arrays = {"image": data.image, "edges": edge_bits(data.image, mask, cfg.seed),
              "kind": told(data.columns, len(data))}
    arrays |= {"mask": mask} if mask is not None else {}
    everything, unseen = D.Loader(arrays, device), D.Loader(arrays, device, val)

    # A checkpoint must agree on these: nobody it was trained on may be tested on, whatever the split is now.
    who = hashlib.sha256("\n".join(sorted(set(data.subject[whole]))).encode()).hexdigest()[:16]
    facts = dict(data=data.fingerprint, training_subjects=who)
    images = D.Loader({"image": data.image}, device, whole)
    first = dataclasses.replace(cfg, **{k: getattr(Config, k) for k in LATER} | {"lr": cfg.vq_lr})
    watch = functools.partial(watch_vq, cfg, unseen) if len(val) else None
    vq, _ = stage("ckpt_vq", VQVAE, first, cfg.vq_steps, images, facts, watch)

    # And a diffusion model on the VQ-VAE whose latents it was trained on: with another it would draw noise.
    pairs = training_pairs(cfg, vq, {name: v[train] for name, v in arrays.items()}, device)
    z, codes = pairs["z0"], D.Loader(pairs, device)
    mean, std = (z.mean((0, 2, 3)), z.std((0, 2, 3)) + 1e-6) if cfg.scale else (0.0, 1.0)
    make = lambda c: Model(c, *map(torch.as_tensor, (mean, std)))
    facts |= dict(vq=fingerprint(vq), drawings=hashlib.sha256(arrays["edges"]).hexdigest()[:16])
    watch = lambda name: functools.partial(watch_ldm, vq, cfg, unseen, name) if len(val) else None
    models, judges = {}, {}
    models[""], reached = stage("ckpt_ldm", make, cfg, cfg.steps, codes, facts, watch("preview_ldm"))
    if cfg.draw:
        return None if leave() else from_drawings(cfg, models[""], vq, drawings, device)
    if cfg.rivals and cfg.cond == "conv":     # for as many steps, also when the run was longer once
        rival = dataclasses.replace(cfg, cond="seed")
        show = watch("preview_seed")
        models["cond_seed"], step = stage("ckpt_seed", make, rival, reached, codes, facts, show)
        if step < reached:     # --eval of a run that was stopped
            D.fail(f"{out}/ckpt_seed.pt: {step} of {reached} steps, no fair rival; the same command without "
                   "--eval trains it, --rivals false leaves it out")
    judge = dataclasses.replace(cfg, lr=1e-3)
    if mask is not None:
        seen = D.Loader({"image": data.image, "mask": mask}, device, whole)
        judges["real"], _ = stage("ckpt_seg", Segmenter, judge, cfg.seg_steps, seen, facts)
    if leave():
        return
    if mask is not None and cfg.rivals:     # can generated slices teach a segmenter? Alone, beside real ones
        rows = spread(train, cfg.aug_images)
        x = data.image[rows]
        if not cfg.eval:      # else both are only loaded
            x = generate(models[""], vq, everything, rows, cfg.edges, cfg.w, cfg.seed + 1)
            x = np.rint(255 * x).astype(np.uint8)
        made = {"image": x, "mask": mask[rows]}
        both = {k: np.concatenate([v, arrays[k][whole]]) for k, v in made.items()}     # and all real ones
        for who, pairs in (("generated", made), ("", both)):      # named by what the images depend on
            name = f"ckpt_seg_{who or 'both'}_{reached}_{cfg.sampler}{cfg.S}_w{cfg.w:g}_{len(rows)}"
            judges[who], _ = stage(name, Segmenter, judge, cfg.seg_steps, D.Loader(pairs, device), facts)
    metrics = evaluate(cfg, data, part, arrays, everything, vq, models, judges)
    log = [json.loads(line) for line in Path(out, "log_ldm.jsonl").read_text().splitlines()]
    metrics["train_img_s"] = M.row(np.median([r["img_s"] for r in log if "img_s" in r]), unit="1/s")
    metrics["peak_gb"] = M.row(peak_gb(device), unit="GB", better="lower")
    M.save_results(out / "results.json", "cond_ldm", cfg.data or "phantom views", count,
                   time.perf_counter() - began, dataclasses.asdict(cfg) | {"steps": reached}, metrics, device)
    distances = [k for k in ("fid", "fd_vq", "kid_vq") if k in metrics]
    keys = [k for k in ("ssim", "ssim_uniform7", "nmse", *distances, "dice_gen", "edge_f1") if k in metrics]
    print(M.row_table(metrics, keys, PAPER))
    print(f"{', '.join(distances)}: of {metrics['fd_vq']['n']} images and as many real ones")
    print(M.table(metrics, [k for k in metrics if "." not in k and k not in keys], PAPER))
    print(f"{time.perf_counter() - began:.0f} s. Numbers: {out}/results.json. Pictures: {out}/*.png")


if __name__ == "__main__":
    D.program(main)
