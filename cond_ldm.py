"""Cardiac MR from a drawing: a VQ-VAE, and latent diffusion conditioned on edges and a semantic map.

A VQ-VAE compresses a slice into a small latent image of codebook vectors. A diffusion model generates such
latents from a drawing of the heart: its edges, and which pixel is cavity, muscle or right ventricle.
Question: does the generated slice obey its drawing?

    image (B,1,256,256) --VQVAE.encode--> z0 (B,3,32,32) --noise--> z_t --LatentUNet(z_t, t, cond)--> v
                                                                                          |
    edges (B,1,256,256), map (B,4,256,256), view, phase --ConditionEncoder--> cond (B,64,32,32)

    cond, noise z_T --DDIM down--> z0 --VQVAE.decode: nearest codes--> image (B,1,256,256)

The study: T. Yang, Conditional LDM with medical images, 2024. VQ-VAE: van den Oord et al. 2017 (arXiv
1711.00937). Its discriminator, and latent diffusion: Rombach et al. 2022 (arXiv 2112.10752).

    python cond_ldm.py                      # phantom hearts in two views, 6 minutes on one CPU core
    python cond_ldm.py --data acdc256.h5    # your hearts; on a GPU the study's networks, at 256x256
    python cond_ldm.py --data acdc256.h5 --preset hearts    # cropped to 96x96, for 2 CPU cores
    python cond_ldm.py --apply drawings.h5  # images for your drawings, by the trained model

`--recipe paper` trains as the study did (but lr warms up, unused codes are moved, attention has one head, the
LPIPS loss is left out, and sampling is by DDIM). `--recipe ours`, the default, changes this:
- cond conv: strided convolutions read the drawing. The study resizes the drawing to 32x32 by nearest
  neighbour, and to one channel. Of the latent pixels whose square has an edge, 13 % show it.
  The view and the phase of the beat are planes of the drawing, too;
- edges mixed: one model learns from all edges, a few strokes, the map's contours, and no edges;
- predict v, of standardised latents, with averaged weights and a larger lr;
- guidance: w = 2 (hearts: 1.5);
- gan 0.01: the adversarial loss of the VQ-VAE is weaker, and its training images are moved (augment).
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
    data: str = ""            # HDF5 file, or a folder of one file per subject; empty: phantom views
    test: str = ""            # second file: all of it is tested; none of --data is
    fold: str = ""            # 0/5 .. 4/5: test on this fifth of the subjects, train on the others
    out: str = "out/cond_ldm" # everything the run leaves; the same command again goes on from there
    init: str = ""            # folder of another run: start from its weights (fine-tuning)
    apply: str = ""           # file of drawings: no training; OUT/apply/NAME/ gets an image for each
    preset: str = ""          # demo, hearts or paper (one GPU); empty: paper on CUDA, demo elsewhere
    recipe: str = "ours"      # ours or paper: the method, see above
    device: str = ""          # cuda, mps, cpu; empty: the first of these that is there
    seed: int = 0             # of the split, the weights, the order of the data and every draw
    view: str = ""            # diffusion model and test on this view alone (SA): do mixed views hurt?
    inception: str = ""       # TorchScript Inception-v3 (inception-2015-12-05.pt): FID; empty: no FID
    # images and VQ-VAE
    frame: Literal["image", "patient"] = "image"    # patient: see D.load_patients
    size: int = 256           # images are resized to size x size
    patch: int = 1            # patch x patch pixels become channels: 2 is 4x faster, at half the resolution
    augment: float = 0.5      # strength of random rotation, zoom and shift for the VQ-VAE; paper: 0
    channels: tuple = (64, 128, 256, 256)   # per level of the VQ-VAE; each next level halves the image
    depth: int = 2            # residual blocks per level, here and in the UNet
    groups: int = 32          # of GroupNorm; 0: one per 16 channels (backward up to 18x faster on a CPU)
    z_dim: int = 3            # channels of the latent
    codebook: int = 16384     # vectors in the codebook
    gan: float = 0.01         # weight of the adversarial loss, 0: no discriminator; paper: 0.5
    gan_start: int = 13000    # the step from which the VQ-VAE feels the discriminator
    # latent diffusion
    unet: tuple = (256, 384, 512, 768)      # channels per level; the middle goes back to the last but one
    cond: Literal["conv", "seed"] = "conv"  # conv: strided convolutions; seed: nearest pixel (paper)
    edges: Literal["mixed", "full", "sparse", "mask", "none"] = "mixed"     # that are drawn; paper: full
    predict: Literal["v", "eps"] = "v"      # what the UNet outputs; paper: eps
    scale: bool = True        # standardise the latents; paper: false
    # training
    vq_steps: int = 29000     # optimizer steps of the VQ-VAE; the segmenter that judges images takes half
    steps: int = 24000        # of the diffusion model; raise it and run again to train longer
    batch: int = 36           # images per step, over all processes
    vq_lr: float = 8e-5       # Adam; constant after 100 steps of warm-up (the segmenter's is 1e-3)
    lr: float = 1e-4          # of the diffusion model; paper: 8e-6
    ema: float = 0.999        # decay of the averaged weights; the averaged weights are evaluated; paper: 0
    minutes: float = 0.0      # at most so many minutes for each network; 0: no limit. Steps: in results.json
    save_every: int = 500     # steps between checkpoints
    # evaluation
    S: int = 50               # DDIM steps
    w: float = 2.0            # guidance, see guided(); what validation patients chose; paper: 1
    eval_images: int = 500    # at most this many test images are generated, per kind of drawing


PRESETS = {
    "paper": {},
    "demo": dict(size=64, patch=2, channels=(32, 64), depth=1, groups=0, codebook=1024, gan_start=300,
                 unet=(64, 96, 128), vq_steps=1000, steps=1400, batch=16, vq_lr=1e-3, lr=1e-3, save_every=300,
                 S=15, eval_images=160),
}
PRESETS["hearts"] = PRESETS["demo"] | dict(frame="patient", size=96, vq_steps=700, steps=2200, w=1.5)
RECIPES = {
    "ours": {},
    "paper": dict(augment=0.0, gan=0.5, cond="seed", edges="full", predict="eps", scale=False, lr=8e-6,
                  ema=0.0, w=1.0),
}
# A run may go on in the same folder with other values of these. All other settings need another --out.
MAY_CHANGE = {"data", "test", "out", "apply", "preset", "device", "inception", "steps", "save_every",
              "S", "w", "eval_images"}


# --------------------------------------------------------------------------------------------------------
# Schedule and forward process. Level t in 0..T-1 is noisy, -1 is clean (alpha_bar = 1), T is pure noise (0).

T = 1000    # diffusion steps


def scaled_linear_alpha_bar():
    """Product of 1 - beta up to t, sqrt(beta) linear from sqrt(0.0015) to sqrt(0.0195) (latent diffusion,
    Rombach et al. 2022, as its code has it). -> (T,)"""
    return torch.cumprod(1 - torch.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, T, dtype=torch.float64) ** 2, 0)


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


class Block(nn.Module):
    """norm, SiLU, conv, twice, plus skip; emb > 0: a vector shifts in between; attend: attention after.

    x (B,ch_in,H,W), emb (B,emb) -> (B,ch_out,H,W). The second convolution starts at zero."""
    def __init__(self, ch_in, ch_out, groups, attend=False, emb=0):
        super().__init__()
        self.norm1 = norm(ch_in, groups)
        self.conv1 = nn.Conv2d(ch_in, ch_out, 3, padding=1)
        self.t_proj = nn.Linear(emb, ch_out) if emb else None
        self.norm2 = norm(ch_out, groups)
        self.conv2 = zero(nn.Conv2d(ch_out, ch_out, 3, padding=1))
        self.skip = nn.Conv2d(ch_in, ch_out, 1) if ch_in != ch_out else nn.Identity()
        self.attention = Attention(ch_out, groups) if attend else nn.Identity()

    def forward(self, x, emb=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if self.t_proj is not None:
            h = h + self.t_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.attention(self.skip(x) + h)


class PatchDiscriminator(nn.Module):
    """Is a patch real (1) or reconstructed (0)? (Isola et al. 2017.) image (B,1,H,W) -> (B,1,h,w)"""
    def __init__(self, cfg):
        super().__init__()
        layers, c = [], 1
        for wide in cfg.channels[:3]:
            layers.append(nn.Conv2d(c, wide, 4, 2, 1))
            if c > 1:    # GroupNorm, not BatchNorm: a batch of reconstructions would give itself away
                layers.append(norm(wide, cfg.groups))
            layers.append(nn.LeakyReLU(0.2))
            c = wide
        self.net = nn.Sequential(*layers, nn.Conv2d(c, 1, 3, padding=1))

    def forward(self, x):
        return self.net(x).float()


class VQEncoder(nn.Module):
    """x (B,1,H,W) -> latent (B,z_dim,h,w) float32, before the codebook."""
    def __init__(self, cfg):
        super().__init__()
        self.patch, c = cfg.patch, cfg.channels[0]
        layers = [nn.Conv2d(cfg.patch ** 2, c, 3, padding=1)]
        for wide in cfg.channels[1:]:
            for _ in range(cfg.depth):
                layers.append(Block(c, wide, cfg.groups))
                c = wide
            layers.append(nn.Conv2d(c, c, 4, 2, 1))             # halves the image
        layers += [Block(c, c, cfg.groups, attend=i < cfg.depth) for i in range(cfg.depth + 1)]
        self.trunk = nn.Sequential(*layers)
        self.out = nn.Sequential(norm(c, cfg.groups), nn.SiLU(), nn.Conv2d(c, cfg.z_dim, 3, padding=1),
                                 nn.Conv2d(cfg.z_dim, cfg.z_dim, 1))

    def features(self, x):
        """The last feature map, averaged over its pixels: (B,1,H,W) -> (B,channels[-1])."""
        return self.trunk(F.pixel_unshuffle(x, self.patch)).float().mean((2, 3))

    def forward(self, x):
        return self.out(self.trunk(F.pixel_unshuffle(x, self.patch))).float()


class VQDecoder(nn.Module):
    """The encoder mirrored. Codes (B,z_dim,h,w) -> image (B,1,H,W) float32."""
    def __init__(self, cfg):
        super().__init__()
        self.patch, c = cfg.patch, cfg.channels[-1]
        layers = [nn.Conv2d(cfg.z_dim, cfg.z_dim, 1), nn.Conv2d(cfg.z_dim, c, 3, padding=1)]
        layers += [Block(c, c, cfg.groups, attend=i < cfg.depth) for i in range(cfg.depth + 1)]
        for wide in cfg.channels[-2::-1]:
            layers.append(nn.ConvTranspose2d(c, c, 4, 2, 1))    # kernel 4 at stride 2: no checkerboard
            for _ in range(cfg.depth):
                layers.append(Block(c, wide, cfg.groups))
                c = wide
        self.trunk = nn.Sequential(*layers, norm(c, cfg.groups), nn.SiLU(),
                                   nn.Conv2d(c, cfg.patch ** 2, 3, padding=1))

    def forward(self, z_q):
        return F.pixel_shuffle(self.trunk(z_q), self.patch).float()


class ConditionEncoder(nn.Module):
    """The drawing at the size of the latent. planes (B,7,H,W) of planes() -> (B,ch,h,w).

    conv: strided convolutions, which skip no pixel. seed, the study's: each latent pixel takes the pixel at
    its corner (nearest resize) of edges and map, and a 1x1 conv makes one channel; no view or phase."""
    def __init__(self, cfg):
        super().__init__()
        levels, c = len(cfg.channels) - 1, cfg.channels[0]
        self.nearest, self.patch, self.jump = cfg.cond == "seed", cfg.patch, cfg.patch * 2 ** levels
        self.ch = 1 if self.nearest else c
        if self.nearest:
            self.net = nn.Conv2d(5, 1, 1, bias=False)
        else:
            layers = [nn.Conv2d(7 * cfg.patch ** 2, c, 3, padding=1), nn.SiLU()]
            for _ in range(levels):
                layers += [nn.Conv2d(c, c, 4, 2, 1), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1), nn.SiLU()]
            self.net = nn.Sequential(*layers, nn.Conv2d(c, c, 3, padding=1))

    def forward(self, planes):
        if self.nearest:
            return self.net(planes[:, :5, ::self.jump, ::self.jump])
        return self.net(F.pixel_unshuffle(planes, self.patch))


class LatentUNet(nn.Module):
    """Denoiser. z_t (B,z_dim,h,w), t (B,), cond (B,ch,h,w) -> like z_t, float32, zero at initialisation.

    cfg.unet (a,b,c,d): down a>b, b>c, c>d, each then halved; middle d>d>c; up c+d>b, b+c>a, a+b>a/2."""
    def __init__(self, cfg, ch):
        super().__init__()
        channels, self.base, emb = cfg.unet, cfg.unet[0], 2 * cfg.unet[0]
        self.time = nn.Sequential(nn.Linear(self.base, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.conv_in = nn.Conv2d(cfg.z_dim + ch, channels[0], 3, padding=1)

        def blocks(a, b, n):
            return nn.ModuleList(Block(b if i else a, b, cfg.groups, True, emb) for i in range(n))
        self.down, self.shrink, self.grow, self.up = (nn.ModuleList() for _ in range(4))
        for a, b in zip(channels, channels[1:]):
            self.down.append(blocks(a, b, cfg.depth))
            self.shrink.append(nn.Conv2d(b, b, 4, 2, 1))
        self.middle = blocks(channels[-1], channels[-1], 1)
        self.middle.extend(blocks(channels[-1], channels[-2], cfg.depth))
        out = (channels[0] // 2, *channels)     # out[i]: what level i hands up, `below` of the next level
        for i in reversed(range(len(channels) - 1)):
            below, skip = channels[i:i + 2]
            self.grow.append(nn.ConvTranspose2d(below, below, 4, 2, 1))
            self.up.append(blocks(below + skip, out[i], cfg.depth))
        self.norm_out = norm(out[0], cfg.groups)
        self.conv_out = zero(nn.Conv2d(out[0], cfg.z_dim, 3, padding=1))

    def forward(self, z_t, t, cond):
        emb = self.time(time_embedding(t, self.base))
        h, skips = self.conv_in(torch.cat([z_t, cond], 1)), []
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
        return self.conv_out(F.silu(self.norm_out(h))).float()


# --------------------------------------------------------------------------------------------------------
# The three models that are trained. forward(batch, g) is the training loss.

IDLE = 20    # a code that is unused for so many steps is moved in every step until it is used


class VQVAE(nn.Module):
    """Images as a small grid of codebook vectors (van den Oord et al. 2017), with a patch discriminator."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.encoder, self.decoder = VQEncoder(cfg), VQDecoder(cfg)
        self.discriminator = PatchDiscriminator(cfg) if cfg.gan else None
        self.codes = nn.Parameter(torch.zeros(cfg.codebook, cfg.z_dim))
        # Steps since a code was used, and steps trained; the checkpoint has both. At first all codes count as
        # unused, so step 0 moves them to latents. (fit averages parameters alone: in the EMA neither moves.)
        self.register_buffer("unused", torch.full((cfg.codebook,), IDLE))
        self.register_buffer("trained", torch.tensor(0))
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def nearest(self, z):
        """z (B,z_dim,h,w) -> index (B,h,w) of the nearest code. No matrix product: TF32 would round it."""
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
        return self.look_up(self.nearest(self.encoder(x0)))

    def decode(self, z):
        """Any latent (B,z_dim,h,w), moved to the nearest codes: the decoder knows no others. -> (B,1,H,W)"""
        return self.decoder(self.look_up(self.nearest(z)))

    @torch.no_grad()
    def revive(self, z, index, g):
        """After a step that used the codes index (B,h,w): moves those unused for IDLE steps to latents drawn
        from z (B,z_dim,h,w). Else a codebook collapses to the few codes that win at first.

        In the EMA a code that keeps moving is a mean of latents, which is seldom the nearest."""
        used = torch.zeros_like(self.unused)
        used[index.flatten()] = 1
        rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        drawn = rows[torch.randint(len(rows), (len(self.codes),), generator=g, device=g.device)]
        if D.ranks()[1] > 1:      # all processes hold the same codes
            dist.all_reduce(used)
            dist.broadcast(drawn, 0)
        self.unused.add_(1).masked_fill_(used > 0, 0)
        self.codes.copy_(torch.where((self.unused >= IDLE)[:, None], drawn, self.codes))

    def adversarial(self, x0, recon):
        """Least squares (Mao et al. 2017): the autoencoder wants recon to pass for real, the discriminator
        tells them apart. Each term reaches the weights of its own side alone: one optimizer serves both."""
        net = self.discriminator
        net.requires_grad_(False)
        passes = (net(recon) - 1).square().mean()
        net.requires_grad_(True)
        apart = ((net(x0) - 1).square().mean() + net(recon.detach()).square().mean()) / 2
        return self.cfg.gan * (self.trained >= self.cfg.gan_start) * passes + apart

    def forward(self, batch, g):
        """VQ-VAE eq. 3: |x - recon|^2 + |sg[z] - e|^2 + 0.2 |z - sg[e]|^2, e the nearest codes, sg = detach.

        The decoder's gradient reaches the encoder as if e were z (straight through, sec. 3.2)."""
        x0 = D.augment(batch["image"], self.cfg.augment, False, g)
        z = self.encoder(x0)
        index = self.nearest(z)
        e = self.look_up(index)
        recon = self.decoder(z + (e - z).detach())
        loss = F.mse_loss(recon, x0) + F.mse_loss(e, z.detach()) + 0.2 * F.mse_loss(z, e.detach())
        if self.discriminator is not None:
            loss = loss + self.adversarial(x0, recon)
        self.revive(z.detach(), index, g)
        self.trained += 1
        return loss


def one_hot(mask):
    """Ids (B,H,W) int64 in 0..3 -> (B,4,H,W) float32"""
    return F.one_hot(mask, 4).permute(0, 3, 1, 2).float()


def planes(batch, edges, g=None):
    """The drawing as images (B,7,H,W) float32: edges, one-hot map (4), view and phase: -1, 1, unknown 0.

    edges: one of D.EDGES; mixed: each sample draws its kind from g; without g all are "full". All planes 0 is
    "no condition". With masks an empty drawing differs from that: its background plane is 1."""
    B, _, H, W = batch["edges"].shape
    which = torch.full((B,), D.EDGES.index(edges.replace("mixed", "full")), device=batch["kind"].device)
    if edges == "mixed" and g is not None:
        which = torch.randint(len(D.EDGES), (B,), generator=g, device=g.device)
    chosen = F.one_hot(which, 4)[:, :3].view(B, 3, 1, 1)     # of batch["edges"] (B,3,H,W); none is 0
    lines = (chosen * batch["edges"]).sum(1, keepdim=True).float()
    ids = one_hot(batch["mask"]) if "mask" in batch else lines.new_zeros(B, 4, H, W)
    return torch.cat([lines, ids, batch["kind"].view(B, 2, 1, 1).expand(B, 2, H, W)], 1)


class Model(nn.Module):
    """Latent diffusion from a drawing: || LatentUNet(z_t, t, ConditionEncoder(planes)) - target ||^2.

    z0 (n,z_dim,h,w): the training latents. Their mean and SD per channel standardise all latents."""
    def __init__(self, cfg, z0):
        super().__init__()
        self.cfg, self.shape = cfg, z0.shape[1:]
        self.condition = ConditionEncoder(cfg)
        self.unet = LatentUNet(cfg, self.condition.ch)
        mean, std = z0.mean((0, 2, 3), keepdim=True), z0.std((0, 2, 3), keepdim=True) + 1e-6
        self.register_buffer("mean", mean if cfg.scale else torch.zeros_like(mean))
        self.register_buffer("std", std if cfg.scale else torch.ones_like(std))
        self.alpha_bar = scaled_linear_alpha_bar()    # stays on the CPU: samplers read single numbers from it
        self.to(memory_format=torch.channels_last)

    def eps(self, z_t, t, cond):
        """eps_hat like z_t at levels t (B,), whatever the UNet was trained to predict."""
        out = self.unet(z_t, t, cond)
        return out if self.cfg.predict == "eps" else eps_from_v(out, z_t, t, self.alpha_bar)

    def forward(self, batch, g):
        z0, B = (batch["z0"] - self.mean) / self.std, len(batch["z0"])
        drawing = planes(batch, self.cfg.edges, g)
        # A tenth is trained without condition: guidance needs the unconditional eps, too.
        drawing = drawing * (torch.rand(B, 1, 1, 1, generator=g, device=g.device) >= 0.1)
        t = random_t(B, T, 1.0, g)
        eps = torch.randn(z0.shape, generator=g, device=g.device)
        target = eps if self.cfg.predict == "eps" else v_target(z0, t, eps, self.alpha_bar)
        out = self.unet(q_sample(z0, t, eps, self.alpha_bar), t, self.condition(drawing))
        return (out - target).square().mean()


class Segmenter(nn.Module):
    """The judge: a small UNet that finds the structures in an image. It learns from real training slices."""
    def __init__(self, cfg):
        super().__init__()
        self.patch, wide = cfg.patch, (32, 64, 128)
        self.conv_in = nn.Conv2d(cfg.patch ** 2, wide[0], 3, padding=1)
        self.down = nn.ModuleList(Block(a, b, 0) for a, b in zip(wide[:1] + wide, wide))
        self.up = nn.ModuleList(Block(a + b, a, 0) for a, b in reversed(list(zip(wide, wide[1:]))))
        self.out = nn.Sequential(norm(wide[0], 0), nn.SiLU(), nn.Conv2d(wide[0], 4 * cfg.patch ** 2, 1))
        self.to(memory_format=torch.channels_last)

    def logits(self, x0):
        """x0 (B,1,H,W) -> (B,4,H,W) float32"""
        h, skips = self.conv_in(F.pixel_unshuffle(x0, self.patch)), []
        for i, block in enumerate(self.down):
            h = block(resample(h, "down") if i else h)
            skips.append(h)
        skips.pop()
        for block in self.up:
            h = block(torch.cat([resample(h, "up"), skips.pop()], 1))
        return F.pixel_shuffle(self.out(h), self.patch).float()

    def forward(self, batch, g):
        both = torch.cat([batch["image"], one_hot(batch["mask"])], 1)      # they move together
        both = D.augment(both, 0.5, False, g)
        truth = one_hot(both[:, 1:].argmax(1))      # a moved plane has fractions: the largest wins
        logits = self.logits(both[:, :1])
        p = logits.softmax(1)
        dice = (2 * (p * truth).sum((2, 3)) + 1) / ((p + truth).sum((2, 3)) + 1)   # 1 where both have none
        return F.cross_entropy(logits, truth) + 1 - dice[:, 1:].mean()


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


def guided(model, drawing, w):
    """eps_fn for ddim_decode at a fixed drawing (B,7,H,W): eps_u + w (eps_c - eps_u), eps_u without condition
    (Ho & Salimans 2022, eq. 6; their w is our w - 1)."""
    cond = model.condition(drawing)
    no_cond = model.condition(torch.zeros_like(drawing))

    def eps_fn(z_t, t):
        t = torch.full((len(z_t),), t, device=z_t.device)
        eps_c = model.eps(z_t, t, cond)
        if w == 1:
            return eps_c
        eps_u = model.eps(z_t, t, no_cond)
        return eps_u + w * (eps_c - eps_u)
    return eps_fn


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
# Evaluation: every number is of patients that no network has seen

@torch.inference_mode()
def in_batches(fn, *tensors, batch=64):
    """fn over slices of the tensors' first axis, concatenated: any number of images in bounded memory."""
    with amp(tensors[0].device):
        return torch.cat([fn(*rows) for rows in zip(*(x.split(batch) for x in tensors))])


def edge_maps(image, mask, seed):
    """Edges of the kinds full, sparse and mask: image, mask (N,H,W) uint8 -> (N,3,H,W) uint8, 1 on a line.

    mask None: the third has no lines."""
    out = np.zeros((len(image), 3, *image.shape[1:]), np.uint8)
    for rows in np.array_split(np.arange(len(image)), len(image) // 64 + 1):
        found = D.edges(image[rows])
        out[rows, 0] = found
        for i, full in zip(rows, found):    # its own generator: a row's strokes do not hang on other rows
            out[i, 1] = D.edge_map(full[None], None, "sparse", np.random.default_rng([seed, i]))[0]
        if mask is not None:
            out[rows, 2] = D.edge_map(found, mask[rows], "mask")
    return out


def view_names(data):
    """The name of every row's view, (N,) str; "" where the file does not say."""
    names = [*data.attrs.get("view_names", []), "0", "1"][:2]
    view = data.columns.get("view", np.full(len(data), np.nan))
    return np.array(["" if np.isnan(v) else names[int(v)] for v in view])


def to_picture(drawing):
    """planes (n,7,H,W) -> to look at: edges (n,H,W); map (n,H,W,3), cavity red, muscle green, RV blue"""
    colours = np.array([[0, 0, 0], [0.84, 0.37, 0], [0, 0.62, 0.45], [0.34, 0.71, 0.91]])
    drawing = drawing.cpu().numpy()
    return drawing[:, 0], colours[drawing[:, 1:5].argmax(1)]


def generate(model, vq, loader, rows, edges):
    """Images for the drawings of these rows, with edges as in planes(). -> (n,H,W) in [0,1]"""
    g = torch.Generator(loader.device).manual_seed(model.cfg.seed)
    noise = torch.randn(len(rows), *model.shape, generator=g, device=loader.device)

    def few(z_T, rows):
        eps_fn = guided(model, planes(loader.batch(rows), edges), model.cfg.w)
        z = ddim_decode(eps_fn, z_T, model.cfg.S, model.alpha_bar)
        return vq.decode(z * model.std + model.mean)
    return M.to_image(in_batches(few, noise, torch.as_tensor(rows)))


def reconstruct(vq, x0):
    """x0 (n,1,H,W) through the codebook and back -> images (n,H,W) in [0,1]; how many codes are in use:
    perplexity, exp of the entropy of their counts."""
    index = in_batches(lambda x: vq.nearest(vq.encoder(x)), x0)
    images = in_batches(lambda i: vq.decoder(vq.look_up(i)), index)
    p = torch.bincount(index.flatten()).double() / index.numel()
    return M.to_image(images), float(torch.special.entr(p).sum().exp())


def preview_vq(cfg, loader):
    """-> watch(ema) for fit: preview_vq.png of validation images, and log_vq.jsonl notes the codes in use."""
    def watch(ema):
        x0 = loader.batch(M.evenly(np.arange(len(loader)), 32))["image"]
        images, perplexity = reconstruct(ema, x0)
        log = Path(cfg.out, "log_vq.jsonl")
        last = (M.read_log(log) or [dict(step=0)])[-1]
        M.log_line(log, last | dict(perplexity=perplexity))         # of a step the last record counts
        M.grid(Path(cfg.out, "preview_vq.png"), [M.to_image(x0)[::4], images[::4]], ["image", "VQ-VAE"], [],
               "Validation images at the last save.")
    return watch


def preview_ldm(cfg, loader, vq):
    """-> watch(ema) for fit: preview_ldm.png. If rows 4 and 5 are alike, the drawing is not used yet."""
    def watch(ema):
        rows, edges = M.evenly(np.arange(len(loader)), 6), cfg.edges
        batch = loader.batch(rows)
        images = [generate(ema, vq, loader, r, edges) for r in (rows, np.roll(rows, 1))]
        M.grid(Path(cfg.out, "preview_ldm.png"),
               [*to_picture(planes(batch, edges)), M.to_image(batch["image"]), *images],
               ["edges", "map", "image", "generated", "from the drawing to the left"], [],
               "Validation images at the last save.")
    return watch


def to_tensor(images, device):
    """The inverse of M.to_image: (n,H,W) in [0,1] -> tensor (n,1,H,W) in [-1,1]."""
    return torch.as_tensor(2 * images - 1, dtype=torch.float32, device=device)[:, None]


def features(vq, inception, x):
    """Images (n,1,H,W) in [-1,1] -> (n,d), of the network `inception` if there is one, else of the VQ-VAE."""
    def few(x):
        if inception is None:
            return vq.encoder.features(x)
        x = (127.5 * x + 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
        with torch.autocast(x.device.type, enabled=False):
            return inception(x, return_features=True).float()
    return in_batches(few, x).cpu().numpy()


def painted(data, mask, train, test):
    """Images for drawings without a network: the mean training image, each structure in its mean grey."""
    some = M.evenly(train, 2000)
    image, ids = data.image[some] / 255, mask[some]
    grey = np.bincount(ids.ravel(), image.ravel(), 4) / np.bincount(ids.ravel(), minlength=4).clip(1)
    return np.where(mask[test] > 0, grey[mask[test]], image.mean(0))


def evaluate(cfg, data, part, arrays, vq, models, judge, inception):
    """Every number and picture of a run. -> metrics, as in results.json

    arrays: for Loader, all rows; models: {"": the diffusion model, "untrained": random weights}; judge: a
    Segmenter, or None if there are no masks; inception: the network of --inception, or None"""
    device, out = vq.codes.device, Path(cfg.out)
    loader, train = D.Loader(arrays, device), np.flatnonzero(part == "train")
    test = M.evenly(np.flatnonzero(part == "test"), cfg.eval_images)
    who, real, view = data.subject[test], data.image[test] / 255, view_names(data)
    edges, wrong, metrics = cfg.edges, test.copy(), {}
    for name in np.unique(view[test]):          # wrong: rows of another patient in the same view
        at = np.flatnonzero(view[test] == name)
        wrong[at] = test[at[M.other_subject(who[at])]]

    # Images for the drawings of the test rows, in their order, by the model and without it.
    ways = {"": ("", test, edges)}
    ways |= {f"edges_{kind}": ("", test, kind) for kind in (D.EDGES[1:] if edges == "mixed" else ())}
    ways |= {"other_drawing": ("", wrong, edges), "untrained": ("untrained", test, edges)}
    made = {}
    for name, (model, rows, kind) in tqdm(ways.items(), "evaluate: images", unit="way"):
        made[name] = generate(models[model], vq, loader, rows, kind)
    made["vq"], perplexity = reconstruct(vq, loader.batch(test)["image"])
    metrics["vq_perplexity"] = M.row(perplexity)
    same_view = np.array([f"{s} {v}" for s, v in zip(data.subject, view)])       # `copy` is of the same view
    numbers = math.prod(models[""].shape)        # of a latent; the PCA gets as many
    made |= M.trivial_images(dataclasses.replace(data, subject=same_view), train, test, numbers)
    if judge is not None:
        made["painted"] = painted(data, arrays["mask"], train, test)

    # Image by image: like the real slice? And does a segmenter, or an edge detector, find what was drawn?
    key, obeys = ("edge_f1", M.edge_f1) if judge is None else ("dice", M.dice)
    found = {}

    def score(name, images, at):
        dot = f".{name}" if name else ""
        metrics["ssim" + dot] = M.row_of(np.mean, who[at], M.ssim(real[at], images))
        metrics["nmse" + dot] = M.row_of(np.mean, who[at], M.nmse(real[at], images), better="lower")
        near = 2 if cfg.size > 128 else 1           # pixels
        canny = D.edges(np.rint(255 * images.clip(0, 1)).astype(np.uint8))
        found[name] = M.edge_hits(canny, arrays["edges"][test[at], 0], near)
        metrics["edge_f1" + dot] = M.row_of(M.edge_f1, who[at], found[name])
        if judge is not None:
            labels = in_batches(lambda x: judge.logits(x).argmax(1), to_tensor(images, device))
            found[name] = M.overlap(labels, arrays["mask"][test[at]], (1, 2, 3))
            metrics["dice" + dot] = M.row_of(M.dice, who[at], found[name])

    everywhere = np.arange(len(test))
    for name, images in tqdm((made | {"real": real}).items(), "evaluate: numbers", unit="row"):
        score(name, images, everywhere)
    for name in np.unique(view[test]) if len(np.unique(view[test])) > 1 else ():
        at = np.flatnonzero(view[test] == name)
        score(f"view_{name or 'unknown'}", made[""][at], at)
    for name in ("other_drawing", "real"):
        gain = lambda ours, other: obeys(ours) - obeys(other)
        metrics[f"{key}_gain.{name}"] = M.row_of(gain, who, found[""], found[name])

    # As a population: distance to the test slices. Row `real`: as many real slices of training patients.
    names = ("fd_vq", "kid_vq") if inception is None else ("fid", "kid")
    target = features(vq, inception, to_tensor(real, device))
    for name, images in (made | {"real": data.image[M.evenly(train, len(test))] / 255}).items():
        here = features(vq, inception, to_tensor(images, device))
        for k, distance in zip(names, (M.frechet, M.kid)):
            value = M.row(distance(here, target), n=len(np.unique(who)), better="lower")
            metrics[f"{k}.{name}" if name else k] = value

    # Pictures: a middle slice of each of eight patients, another view in turn.
    few = []
    for i, p in enumerate(np.unique(who)[:8]):
        views = np.unique(view[test][who == p])
        rows = np.flatnonzero((who == p) & (view[test] == views[i % len(views)]))
        few.append(rows[len(rows) // 2])
    batch, bank = loader.batch(test[few]), data.image[M.evenly(train, 5000)] / 255
    _, nearest = M.nearest(made[""][few], bank)
    lines = {"map": to_picture(planes(batch, edges))[1], "real slice": real[few],
             "VQ-VAE of it": made["vq"][few]}
    for name in ("", *(k for k in ways if k.startswith("edges_"))):
        kind = ways[name][2].replace("mixed", "full")
        lines[f"edges, {kind}"] = to_picture(planes(batch, kind))[0]
        lines[f"from {kind}"] = made[name][few]
    lines |= {"from another's drawing": made["other_drawing"][few], "nearest training slice": bank[nearest]}
    M.grid(out / "samples.png", list(lines.values()), list(lines), list(who[few]),
           f"Test patients, whom no network has seen. {cfg.S} DDIM steps, w = {cfg.w:g}.")
    logs = {"VQ-VAE": out / "log_vq.jsonl", "diffusion": out / "log_ldm.jsonl"}
    M.curves(out / "curves.png", logs, ("loss", "perplexity"))
    return metrics


# --------------------------------------------------------------------------------------------------------
# Using a trained model

def load(out, name="ckpt_ldm", device=""):
    """A network that a run has trained in the folder `out`, ready to use. -> (network, Config)

    name: ckpt_ldm, the diffusion model; ckpt_vq, the VQ-VAE; ckpt_judge, the segmenter. device: "" is the
    first of cuda, mps, cpu that is there. A file that is damaged or of another network exits 2."""
    def diffusion(cfg):
        with torch.device("meta"):      # for the shape of a latent
            z0 = VQVAE(cfg).encoder(torch.empty(2, 1, cfg.size, cfg.size))
        return Model(cfg, torch.zeros(z0.shape))
    build = {"ckpt_ldm": diffusion, "ckpt_vq": VQVAE}.get(name, Segmenter)
    return D.trained(Path(out, f"{name}.pt"), Config, build, device)


def apply(out, path, device):
    """Images for the drawings in `path`, or for those of its slices, by the model in the folder `out`.

    Nothing is trained, and nothing is written but OUT/apply/NAME/drawn.h5 and drawn.png."""
    (model, cfg), (vq, _) = load(out, device=device), load(out, "ckpt_vq", device)
    folder = Path(out, "apply", Path(path).stem)
    reads_mask = Path(out, "ckpt_judge.pt").exists()        # exactly a run with masks has a judge
    arrays = D.load_drawings(path, cfg.size, cfg.edges, reads_mask, cfg.frame)
    folder.mkdir(parents=True, exist_ok=True)
    n = len(arrays["kind"])
    if "subject" in arrays:
        M.known_part(out, arrays["subject"])        # warns of those that the model has learned from
    subject = arrays.pop("subject", np.arange(n).astype(str))
    loader = D.Loader(arrays | {"edges": arrays["edges"][:, None]}, cfg.device)     # the plane of "full"
    images = generate(model, vq, loader, np.arange(n), "full")
    columns = dict(image=np.rint(255 * images).astype(np.uint8), subject=subject)
    columns |= {"mask": arrays["mask"]} if "mask" in arrays else {}
    source = f"{path}, drawn by the model in {out}"
    D.write(folder / "drawn.h5", [columns], D.CINE_NAMES | dict(source=source))
    few = M.evenly(np.arange(n), 8)
    M.grid(folder / "drawn.png", [*to_picture(planes(loader.batch(few), "full")), images[few]],
           ["edges", "map", "generated"], [], f"Drawings of {path}. {cfg.S} DDIM steps, w = {cfg.w:g}.")
    print(f"{n} images: {folder}/")


# --------------------------------------------------------------------------------------------------------
# The command

# The table that ends a run: the numbers that answer the question, and the rows beside them.
SHOWN = {"dice": "Dice, segmenter with map", "edge_f1": "F1 of edges", "ssim": "SSIM",
         "nmse": "MSE / variance", "fid": "FID", "kid": "KID", "fd_vq": "Frechet, VQ features",
         "kid_vq": "KID, VQ features"}
ROWS = {"": "ours", "edges_sparse": "a few strokes", "edges_mask": "contours, no edges inside",
        "edges_none": "no edges", "other_drawing": "another patient's drawing",
        "view_SA": "short-axis slices alone", "view_LA": "long-axis slices alone",
        "untrained": "untrained diffusion", "painted": "map in mean greys",
        "copy": "nearest slice, same patient", "constant": "mean training image",
        "pca": "PCA of the real slice", "vq": "VQ-VAE of the real slice",
        "real": "real slices (distances: of others)"}


def main(argv):
    began = time.perf_counter()
    cfg, device = D.start(Config, PRESETS, RECIPES, __doc__, argv)
    if cfg.apply:
        return apply(cfg.out, cfg.apply, cfg.device)
    out, (rank, _) = Path(cfg.out), D.ranks()
    try:        # settings that do not fit each other are an error before anything is read or written
        times(cfg.S, T)
        inception = torch.jit.load(cfg.inception, device).eval() if cfg.inception else None
        with torch.device("meta"):      # nothing is computed; a + fails where two shapes differ
            vq, x0, t = VQVAE(cfg), torch.empty(2, 1, cfg.size, cfg.size), torch.ones(2).long()
            z0 = vq.encoder(x0)
            model, recon = Model(cfg, z0), vq.decoder(z0)
            model.unet(z0, t, model.condition(x0.expand(-1, 7, -1, -1))) + z0
            if cfg.gan:
                vq.adversarial(recon + x0, recon)
            Segmenter(cfg).logits(x0)
    except (ValueError, IndexError, RuntimeError, OverflowError) as e:
        D.fail(f"--size {cfg.size}, --patch {cfg.patch}, --S {cfg.S}, --channels, --unet, --groups or "
               f"--inception: no such network ({str(e).splitlines()[0]})")
    held = M.lock(out) if rank == 0 else None           # until the process ends
    path = D.phantom_path(cfg, "views.h5", lambda out: D.phantom_views(out, 100, size=cfg.size))
    data, part = D.load_study(path, cfg.test, cfg.size, cfg.seed, fold=cfg.fold, frame=cfg.frame)
    # The VQ-VAE and the judge learn from all views, --view or not: facts and `split` are of all.
    (_, facts), split, all_views = D.describe(data, part), part, np.flatnonzero(part == "train")
    if cfg.view:
        view = view_names(data)
        if cfg.view not in view:
            D.fail(f"--view {cfg.view}: {path} has {', '.join(np.unique(view[view != ''])) or 'no views'}")
        part = np.where(view == cfg.view, part, "")
    count, _ = D.describe(data, part)
    if min(cfg.eval_images, (part == "test").sum()) < 2:
        D.fail(f"--eval_images {cfg.eval_images}, {(part == 'test').sum()} test slices: at least 2 needed")
    if data.mask is None and cfg.edges not in ("full", "sparse"):
        D.fail(f"{data.path}: mask: missing; --edges full (or sparse) learns from edges alone")
    arrays = {"image": data.image, "kind": D.view_phase(data.columns, len(data))}
    if data.mask is not None:
        arrays["mask"] = D.cine_ids(data)[data.mask[:]]
    arrays["edges"] = edge_maps(data.image, arrays.get("mask"), cfg.seed)
    if rank == 0:
        M.warn_if_edited(cfg, __file__)
        if cfg.init:
            names = ["ckpt_vq", "ckpt_ldm"] + ["ckpt_judge"] * (data.mask is not None)
            M.check_init(cfg.init, names, data.subject[part == "test"])
        print(f"cond_ldm: preset {cfg.preset}, recipe {cfg.recipe}, {device}, torch {torch.__version__}\n"
              f"data: {data.path} at {cfg.size}x{cfg.size}; subjects: {D.in_words(count)}\n"
              f"trains VQ-VAE, {cfg.vq_steps} steps, a judge, diffusion model, {cfg.steps}; evaluates\n"
              f"out: {out}; stop at any time, the same command goes on", flush=True)

    train, val = np.flatnonzero(part == "train"), np.flatnonzero(part == "val")
    val_images = D.Loader(arrays, device, val)
    images = D.Loader({"image": data.image}, device, all_views)
    torch.manual_seed(D.mix(cfg.seed, 0))
    watch = preview_vq(cfg, val_images) if len(val) else None
    vq_cfg = dataclasses.replace(cfg, lr=cfg.vq_lr)
    vq, vq_reached = fit(VQVAE(cfg), images, vq_cfg, "ckpt_vq", cfg.vq_steps, facts, watch)
    judge = None
    if "mask" in arrays:
        pairs = D.Loader({k: arrays[k] for k in ("image", "mask")}, device, all_views)
        torch.manual_seed(D.mix(cfg.seed, 1))
        judge_cfg = dataclasses.replace(cfg, lr=1e-3)
        judge, _ = fit(Segmenter(cfg), pairs, judge_cfg, "ckpt_judge", cfg.vq_steps // 2, facts)

    # Latents of all rows; the diffusion model gets those of train. It belongs to this VQ-VAE: one that was
    # trained longer has others.
    everything = D.Loader({"image": data.image}, device)
    rows = torch.arange(len(data), device=device)
    z0 = in_batches(lambda rows: vq.encode(everything.batch(rows)["image"]), rows)
    latents = {k: v for k, v in arrays.items() if k != "image"} | {"z0": z0.cpu().numpy()}
    facts |= {"vq_reached": vq_reached}
    torch.manual_seed(D.mix(cfg.seed, 2))
    model = Model(cfg, z0[train])
    models = {"untrained": copy.deepcopy(model).to(device).eval()}
    watch = preview_ldm(cfg, val_images, vq) if len(val) else None
    latents = D.Loader(latents, device, train)
    models[""], reached = fit(model, latents, cfg, "ckpt_ldm", cfg.steps, facts, watch)
    if D.leave():       # the rest is the work of one process
        return
    metrics = evaluate(cfg, data, part, arrays, vq, models, judge, inception)
    reached = dict(vq_steps=vq_reached, steps=reached)
    seconds, config = time.perf_counter() - began, dataclasses.asdict(cfg) | reached
    M.save_scores(out / "subjects.csv", data, split, {})        # for known_part()
    M.save_results(out / "results.json", "cond_ldm", data.path, count, seconds, config, metrics, device)
    print(M.table(metrics, SHOWN, ROWS))
    key = "edge_f1" if judge is None else "dice"
    print(M.answer("Does a slice obey its drawing more than one generated from another patient's drawing?",
                   SHOWN[key], metrics[key], metrics[f"{key}.other_drawing"],
                   metrics[f"{key}_gain.other_drawing"]))
    print(f"{seconds:.0f} s. Numbers: {out}/results.json. Pictures: {out}/*.png")


if __name__ == "__main__":
    D.program(main)
