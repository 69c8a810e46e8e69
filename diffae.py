"""Diffusion autoencoder (DiffAE) on 2D cardiac MR, with a VAE as the baseline.

An encoder compresses an image into a short vector, the semantic code z_sem. A diffusion model decodes z_sem.
The same model can also go from the image to noise (deterministic DDIM). It stores in a noise image x_T what
z_sem leaves out. Question: does z_sem, learned without labels, show an infarct better than the code of a VAE,
the simplest rival? A probe answers: a linear model, fitted to the frozen codes of training patients.

    x0 (B,1,H,W) ---Encoder---> z_sem (B,d) ------> probes, edits, prior
      |                           |
      +--- DDIM up with z_sem --> x_T (B,1,H,W) --- DDIM down with z_sem --> image (B,1,H,W)

Up is towards noise, down towards the image. In the demo H = W = 48 and d = 192. In these images (late
gadolinium enhancement) healthy muscle is a dark ring and an infarct is a bright part of the ring. Where the
data have masks, images are cropped to the heart; --frame wall unrolls the ring to depth by angle.

Preechakul et al., Diffusion Autoencoders, CVPR 2022 (arXiv 2111.15640).

    python diffae.py                     # phantom hearts, 8 minutes on one CPU core
    python diffae.py --data emidec.h5    # your hearts; on a GPU the default size is the paper's, 128x128
    python diffae.py --apply new.h5      # codes, predictions, reconstructions by the trained model

--preset is the size and the budget (demo or paper), --recipe the method. `--recipe paper` is as published,
but lr and EMA warm up, and the prior predicts v. `--recipe ours`, the default, differs in this:
- predict v, t_power 0.7: at low noise x_t already shows the image. Only at high noise is z_sem needed. The
  eps loss gives high noise little weight. So the UNet predicts v, and large t are drawn more often;
- spatial: faces are aligned, hearts are not. Average pooling forgets where things are, and AdaGN scales whole
  channels. So the encoder flattens its last feature map, and a linear layer turns z_sem into an image that
  the UNet sees beside x_t. The VAE gets the same encoder;
- augment 0.5, no flip: small random motions of the training images, and no mirrored hearts;
- stride quadratic, S 50 (demo: 20): DDIM ends at T - 1, the noisiest trained level, and steps finely at low
  noise;
- with --frame wall the encoder pools over the angle and keeps the depth, see RingEncoder.
In that frame both recipes turn training images by any angle and mirror them; augment and flip do nothing.
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
    fold: str = ""            # 0/5 .. 4/5: test on this fifth of the subjects, train on the others
    out: str = "out/diffae"   # everything the run leaves; the same command again goes on from there
    init: str = ""            # folder of another run: start from its weights (fine-tuning)
    apply: str = ""           # file: no training; the model in --out reads it, into OUT/apply/NAME/
    preset: str = ""          # demo (laptop) or paper (one GPU); empty: paper on CUDA, demo elsewhere
    recipe: str = "ours"      # ours or paper: the method, see above
    device: str = ""          # cuda, mps, cpu; empty: the first of these that is there
    seed: int = 0             # of the split, the weights, the order of the data and every draw
    target: str = ""          # column that the probe predicts; empty: has_infarct if there, else label
    # images and network
    frame: Literal["", "image", "crop", "wall"] = ""    # empty: crop where all hearts have masks, else image
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
    # objective
    predict: Literal["v", "eps"] = "v"    # what the UNet outputs; paper: eps
    t_power: float = 0.7      # times are drawn as T u^t_power: below 1 favours high noise; paper: 1, uniform
    augment: float = 0.5      # strength of random rotation, zoom and shift of the training images; paper: 0
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
    S: int = 50               # DDIM steps, both ways; paper: 20
    stride: Literal["quadratic", "trailing", "leading"] = "quadratic"   # see times(); paper: leading
    draws: int = 8            # images from z_sem and random x_T; SSIM is of their mean
    eval_images: int = 1000   # at most this many test images are reconstructed


PRESETS = {
    "paper": {},
    "demo": dict(size=48, base=16, mult=(1, 2, 4), enc_mult=(1, 2, 4, 4), blocks=1, attention=6,
                 groups=0, dropout=0.0, z_dim=192, steps=600, batch=32, lr=1e-3, save_every=200,
                 S=20, eval_images=40),
}
RECIPES = {
    "ours": {},
    "paper": dict(predict="eps", t_power=1.0, spatial=False, augment=0.0, flip=True, stride="leading", S=20),
}
# A run may go on in the same folder with other values of these. All other settings need another --out.
MAY_CHANGE = {"data", "test", "out", "apply", "preset", "device", "target", "steps", "save_every",
              "minutes", "S", "draws", "eval_images"}


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


class RingEncoder(Encoder):
    """Encoder for the frame of the wall, where rows are depth and columns are the angle, a closed ring.

    A turn of the heart shifts the columns. The code is the mean and the maximum over the columns, in each row
    of a few channels. Both ignore the order of the columns, so a turn by whole columns of the last map does
    not change them. D.moved turns training images by any angle. Convolutions wrap around: a border of zeros
    would tell them the angle. (The rows wrap, too: the centre sees a little of what lies outside.)
    x (B,ch_in,H,W) -> (B,ch_out) float32; ch_out: a multiple of twice the rows of the last map (demo: 12)"""
    def __init__(self, cfg, ch_in, ch_out):
        halvings = max(0, int(math.log2(cfg.size / 12)))
        mult = cfg.enc_mult[:halvings + 1]
        super().__init__(dataclasses.replace(cfg, enc_mult=mult), ch_in, ch_out)
        numbers = 2 * (cfg.size // 2 ** (len(mult) - 1))
        if ch_out % numbers:
            raise ValueError(f"z_dim {cfg.z_dim}: in the frame of the wall it is a multiple of {numbers}")
        self.out = nn.Conv2d(mult[-1] * cfg.base, ch_out // numbers, 1)
        for layer in self.trunk.modules():
            if isinstance(layer, nn.Conv2d):
                layer.padding_mode = "circular"

    def forward(self, x):
        h = self.out(self.trunk(x)).float()
        return torch.cat([h.mean(3), h.amax(3)], 2).flatten(1)     # channel by channel: a VAE halves it


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
# The models that are compared. forward(batch, g) is the training loss; batch is a dict, see D.Loader.

class Model(nn.Module):
    """Diffusion autoencoder: || UNet(x_t, t, z_sem) - target ||^2, z_sem = Encoder(x0) (DiffAE sec. 3)."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg, 1, cfg.z_dim)
        self.unet = UNet(cfg)
        self.alpha_bar = linear_alpha_bar(cfg.T)    # stays on the CPU: samplers read single numbers from it
        self.to(memory_format=torch.channels_last)

    def encode(self, batch):
        """batch["image"] (B,1,H,W) in [-1,1] -> z_sem (B,z_dim)."""
        return self.encoder(batch["image"])

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


class Supervised(nn.Module):
    """For comparison: the same encoder, trained on the labels y (0 or 1) of training patients. It is
    no upper bound: there are few labels."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.encoder, self.head = Encoder(cfg, 1, cfg.z_dim), nn.Linear(cfg.z_dim, 1)

    def encode(self, batch):
        """batch["image"] (B,1,H,W) -> (B,z_dim): what is probed."""
        return self.encoder(batch["image"])

    def forward(self, batch, g):
        x0 = D.moved(batch["image"], self.cfg, g)
        log_odds = self.head(self.encoder(x0)).squeeze(1).float()
        return F.binary_cross_entropy_with_logits(log_odds, batch["y"])


def build(network, cfg):
    """Model(cfg), VAE(cfg) or Supervised(cfg), in the frame of the wall with a RingEncoder. The published
    recipe keeps its networks in every frame."""
    net = network(cfg)
    if cfg.frame == "wall" and cfg.spatial:
        net.encoder = RingEncoder(cfg, 1, net.encoder.out.out_features)
    return net.to(memory_format=torch.channels_last)


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
# Evaluation: every number is of patients that no network, probe or threshold has seen

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


def evaluate(cfg, data, part, models, prior, device):
    """Every number and picture of a run. -> metrics, as in results.json

    models: {"": the diffusion autoencoder, "untrained": the same with random weights, "vae": ..,
    "supervised": ..}; prior: a Prior"""
    out, train = Path(cfg.out), np.flatnonzero(part == "train")
    loader = D.Loader({"image": data.image}, device)
    test = M.evenly(np.flatnonzero(part == "test"), cfg.eval_images)
    who, real, x0 = data.subject[test], data.image[test] / 255, loader.batch(test)["image"]
    g = torch.Generator(device).manual_seed(cfg.seed)
    noise = torch.randn(cfg.draws, *x0.shape, generator=g, device=device)
    codes = {row: semantic_codes(model, loader) for row, model in models.items()}

    # Images from z_sem with the encoded x_T (recon), and from z_sem alone (mean over random x_T). The VAE and
    # the trivial rows have one image for both. Ours comes last: its model, z, x_T, draws are used below.
    recon = M.trivial_images(data, train, test, cfg.z_dim)
    recon["vae"] = M.to_image(in_batches(models["vae"].decoder, codes["vae"][test]))
    ratio = lambda a, b: a.mean() / b.mean()
    grain = lambda images: M.row_of(ratio, who, M.roughness(images), M.roughness(real), better="")
    mean, metrics = dict(recon), {"grain.vae": grain(recon["vae"])}     # mean: row -> (n,H,W), over the draws
    for row in tqdm(("untrained", ""), "evaluate: images", unit="model"):
        model, z, dot = models[row], codes[row][test], f".{row}" if row else ""
        x_T = encode_noise(model, x0, z)
        recon[row] = M.to_image(decode(model, x_T, z))
        draws = [M.to_image(decode(model, x, z)) for x in noise]
        mean[row] = np.mean(draws, 0)
        metrics["grain" + dot] = grain(draws[0])
        of_another = M.to_image(decode(model, noise[0], z[M.other_subject(who)]))
        gain = M.ssim(real, draws[0]) - M.ssim(real, of_another)
        metrics["semantic_gain" + dot] = M.row_of(np.mean, who, gain)
        sd_error = (x_T.std((1, 2, 3)) - 1).abs()           # noise has an SD of 1; alone that is no proof
        metrics["x_T_sd_error" + dot] = M.row_of(np.mean, who, sd_error, better="lower")
    metrics |= M.image_numbers("recon", recon, real, who) | M.image_numbers("semantic_mean", mean, real, who)
    gain = M.ssim(real, mean[""]) - M.ssim(real, mean["vae"])
    metrics["semantic_mean_gain.vae"] = M.row_of(np.mean, who, gain)

    # What is read from the codes of all test images, by a linear probe fitted to the training patients
    all_codes = {row: code.cpu().numpy() for row, code in codes.items()}
    all_codes["pca"] = M.pca_codes(data, train, cfg.z_dim)
    if data.frame == "wall":        # sorted along the angle: a linear code that forgets where on the ring
        ring = dataclasses.replace(data, image=np.sort(data.image, 2))
        all_codes["pca_sorted"] = M.pca_codes(ring, train, cfg.z_dim)
    axis = None
    M.save_codes(out / "codes.csv", data, part, all_codes[""])
    try:
        table, probes = M.predict(all_codes, data.columns.get(cfg.target), part, data.subject, cfg.seed)
    except ValueError as e:
        print(f"no probe of {cfg.target}: {e}; --target names another column")
    else:
        metrics |= M.probe_numbers(table)
        M.save_predictions(out / "predictions.csv", {("probe", cfg.target): table})
        M.save_probes(out / "probes.json", {"probe": (cfg.target, table, probes[""])}, all_codes[""][train],
                      data.label_names)
        axis = torch.as_tensor(M.direction(probes[""], all_codes[""][train]), dtype=z.dtype, device=device)
    metrics |= M.factor_numbers(all_codes, data.columns, part, data.subject, cfg.seed)

    middle = [np.flatnonzero(who == p)[(who == p).sum() // 2] for p in np.unique(who)[:8]]
    rows = {"test image": real, "z_sem + x_T": recon[""], "z_sem, random x_T": draws[0],
            f"mean of {cfg.draws} random x_T": mean[""], "VAE": mean["vae"], "PCA": mean["pca"]}
    M.grid(out / "reconstructions.png", [D.on_hearts(data, test[middle], x[middle]) for x in rows.values()],
           list(rows), list(who[middle]),
           f"A middle slice of test patients, whom no network has seen. {cfg.S} DDIM steps.")
    picture = lambda x: D.on_hearts(data, test[middle], M.to_image(x))
    if axis is not None and data.frame == "wall":       # an edit must change the wall and nothing else
        less, more = (M.to_image(decode(model, x_T, z + k * axis)) for k in (-2, 2))
        change, depth = abs(more - less).mean(2), np.linspace(-1, 1.5, cfg.size)        # as in D.unwrap
        for name, at in ("cavity", depth < 0), ("wall", abs(depth - 0.5) < 0.5), ("outside", depth > 1):
            metrics[f"edit_{name}"] = M.row_of(np.mean, who, change[:, at].mean(1), better="")
    edits(out, model, x_T[middle], z[middle], axis, picture)
    new = decode(model, torch.randn(8, *x0.shape[1:], generator=g, device=device), prior.sample(8, g))
    bank = data.image[M.evenly(train, 5000)] / 255
    _, nearest = M.nearest(M.to_image(new), bank)
    M.grid(out / "samples.png", [M.to_image(new), bank[nearest]], ["new heart", "nearest training image"], [],
           "New hearts: z_sem from the prior, random x_T. Row 2 shows whether they are copies.")
    M.curves(out / "curves.png", {"diffusion": out / "log.jsonl", "VAE": out / "log_vae.jsonl"})
    return metrics


def edits(out, model, x_T, z, axis, picture):
    """interpolation.png and manipulation.png. x_T (n,1,H,W), z (n,d). axis (d,): direction of the probe, as
    long as one SD of the training codes; None if there is no probe. picture: (n,1,H,W) -> n images to show"""
    alpha, lines = torch.linspace(0, 1, 7, device=z.device), []
    for i in range(0, len(z) - 1, 2):
        between = slerp(x_T[[i] * 7], x_T[[i + 1] * 7], alpha), torch.lerp(z[[i]], z[[i + 1]], alpha[:, None])
        lines.append(M.to_image(decode(model, *between)))
    if lines:
        M.grid(out / "interpolation.png", lines, [], [f"{a:.2f}" for a in alpha.tolist()],
               "From one test patient (0) to another (1): z_sem on a straight line, x_T on the sphere.")
    if axis is not None:
        moved = {f"{k:+d} SD": picture(decode(model, x_T, z + k * axis)) for k in (-4, -2, -1, 0, 1, 2, 4)}
        M.grid(out / "manipulation.png", list(moved.values()), list(moved), [],
               "A column per patient. z_sem moved by so many SDs along the probe (+: to class 1); x_T kept.")


# --------------------------------------------------------------------------------------------------------
# Using a trained model

def load(out, name="ckpt", device=""):
    """A network that a run has trained in the folder `out`, ready to use. -> (network, Config)

    name: ckpt, the diffusion autoencoder; ckpt_vae, the VAE; ckpt_prior_STEPS, the prior. device: "" is the
    first of cuda, mps, cpu that is there. A file that is damaged or of another network exits 2."""
    make = lambda cfg: build(VAE if name == "ckpt_vae" else Model, cfg)
    if name.startswith("ckpt_prior"):
        make = lambda cfg: Prior(cfg.T, torch.zeros(2, cfg.z_dim))
    return D.trained(Path(out, f"{name}.pt"), Config, make, device)


def apply(out, path, device):
    """The model in the folder `out` reads the images in `path`. Nothing is trained, and nothing is written
    but OUT/apply/NAME/: codes.csv, predictions.csv, reconstructions.h5 and .png, results.json."""
    began = time.perf_counter()
    model, cfg = load(out, device=device)
    M.check_evaluated(out)
    data = D.load_framed(path, cfg.size, cfg.frame)
    folder = Path(out, "apply", Path(path).stem)
    folder.mkdir(parents=True, exist_ok=True)
    loader = D.Loader({"image": data.image}, cfg.device)
    part = M.known_part(out, data.subject)
    z = semantic_codes(model, loader)
    M.save_codes(folder / "codes.csv", data, part, z)
    metrics = M.apply_probes(out, folder, data, part, z)

    images, sd_error = [], []
    for rows in tqdm(np.array_split(np.arange(len(data)), len(data) // 64 + 1), "reconstruct", unit="batch"):
        x_T = encode_noise(model, loader.batch(rows)["image"], z[rows])
        images.append(M.to_image(decode(model, x_T, z[rows])))
        sd_error.append(M.to_numpy((x_T.std((1, 2, 3)) - 1).abs()))
    images, few = np.concatenate(images), M.evenly(np.arange(len(data)), 8)
    D.write(folder / "reconstructions.h5", [dict(image=D.to_uint8(255 * images), subject=data.subject)],
            dict(source=f"z_sem + x_T of {path} by the model in {out}"))
    g = torch.Generator(cfg.device).manual_seed(0)
    noise = torch.randn(1, 1, cfg.size, cfg.size, generator=g, device=cfg.device)
    alone = M.to_image(decode(model, noise.expand(len(few), -1, -1, -1), z[few]))
    shown = [D.on_hearts(data, few, x) for x in (data.image[few] / 255, images[few], alone)]
    M.grid(folder / "reconstructions.png", shown, ["image", "z_sem + x_T", "z_sem, random x_T"],
           list(data.subject[few]), f"Images of {path}.")
    new = np.flatnonzero(~np.isin(part, ["train", "val"]))      # numbers are of those it did not learn from
    if len(new):
        metrics |= M.image_numbers("recon", {"": images[new]}, data.image[new] / 255, data.subject[new])
        sd_error = np.concatenate(sd_error)[new]
        metrics["x_T_sd_error"] = M.row_of(np.mean, data.subject[new], sd_error, better="lower")
    M.save_applied(folder, "diffae", data, part, cfg, metrics, SHOWN, ROWS, time.perf_counter() - began)


# --------------------------------------------------------------------------------------------------------
# The command

# The table that ends a run. z_sem + x_T proves little. Where v is predicted, an untrained UNet outputs 0, and
# each DDIM step only scales the image. x_T is 0.92 times the image then (S = 50: 0.97), and the way back
# makes a slightly paler image. So look at the SD of x_T, and at z_sem alone, the mean over random x_T.
SHOWN = {"recon_ssim": "z_sem + x_T, SSIM", "semantic_mean_ssim": "z_sem alone (mean), SSIM",
         "semantic_gain": "right - wrong z_sem, SSIM", "grain": "grain of one draw, times real",
         "x_T_sd_error": "SD of x_T, off 1 by",
         "probe_auroc": "AUROC, slice", "patient_auroc": "AUROC, patient",
         "ill_auroc": "AUROC, slices of the ill", "probe_f1": "F1, slice", "probe_r2": "R2, slice"}
ROWS = {"": "diffusion autoencoder", "untrained": "the same, untrained", "vae": "VAE", "pca": "PCA",
        "pca_sorted": "PCA, sorted along the angle", "supervised": "same encoder, from labels",
        "copy": "nearest slice, same patient", "constant": "mean training image",
        "all_positive": "all called positive", "mean": "mean training label"}


def main(argv):
    began = time.perf_counter()
    cfg, device = D.start(Config, PRESETS, RECIPES, __doc__, argv)
    if cfg.apply:
        return apply(cfg.out, cfg.apply, cfg.device)
    out, (rank, _) = Path(cfg.out), D.ranks()
    try:        # settings that do not fit each other are an error before anything is read or written
        times(cfg.S, cfg.T, cfg.stride)
        with torch.device("meta"):
            model, vae, t = build(Model, cfg), build(VAE, cfg), torch.zeros(2, dtype=torch.long)
            x0 = torch.empty(2, 1, cfg.size, cfg.size)
            images = model.unet(x0, t, model.encoder(x0)), vae.decoder(vae.encode({"image": x0}))
        if cfg.size < 11 or any(x.shape != x0.shape for x in images):
            raise ValueError(f"--size {cfg.size} is below 11 (SSIM) or cannot be halved once per level")
    except (ValueError, RuntimeError, OverflowError) as e:
        D.fail(f"--size {cfg.size}, --mult, --enc_mult, --groups, --S: do not fit each other ({e})")
    held = M.lock(out) if rank == 0 else None           # until the process ends
    path = D.phantom_path(cfg, "hearts.h5", D.phantom_hearts)
    data, part = D.load_study(path, cfg.test, cfg.size, cfg.seed, fold=cfg.fold, frame=cfg.frame)
    count, facts = D.describe(data, part)
    target = D.choose_target(data, cfg.target, ["has_infarct"])
    cfg = dataclasses.replace(cfg, target=target, frame=data.frame)
    if rank == 0:
        M.warn_if_edited(cfg, __file__)
        if cfg.init:
            M.check_init(cfg.init, ["ckpt", "ckpt_vae"], data.subject[part == "test"])
        print(f"diffae: preset {cfg.preset}, recipe {cfg.recipe}, {device}, torch {torch.__version__}\n"
              f"data: {data.path} at {cfg.size}x{cfg.size}; subjects: {D.in_words(count)}\n"
              f"trains the autoencoder and the VAE, {cfg.steps} steps each; an encoder from labels; a prior\n"
              f"out: {out}; stop at any time, the same command goes on", flush=True)

    rows = [np.flatnonzero(part == "train"), M.evenly(np.flatnonzero(part == "val"), 6)]     # six to look at
    images, val_images = (D.Loader({"image": data.image}, device, r) for r in rows)
    watch = preview(cfg, val_images) if len(val_images) else None
    torch.manual_seed(D.mix(cfg.seed, 0))
    model, vae = build(Model, cfg), build(VAE, cfg)
    models = {"untrained": copy.deepcopy(model).to(device).eval()}      # what random features already give
    models[""], reached = fit(model, images, cfg, "ckpt", cfg.steps, facts, watch)
    models["vae"], _ = fit(vae, images, cfg, "ckpt_vae", reached, facts)
    y = data.columns.get(cfg.target, np.full(len(data), np.nan)).astype(float)
    known = rows[0][~np.isnan(y[rows[0]])]
    if set(y[known]) == {0, 1} and len(known) >= cfg.batch:
        labelled = D.Loader({"image": data.image, "y": y}, device, known)
        torch.manual_seed(D.mix(cfg.seed, 2))
        net = build(Supervised, cfg)
        name, labels = f"ckpt_supervised_{cfg.target}", facts | {"labels": D.mix(*y[known].astype(int))}
        models["supervised"], _ = fit(net, labelled, cfg, name, reached // 2, labels)
    if D.leave():       # the rest is the work of one process
        return
    z = semantic_codes(models[""], images)
    torch.manual_seed(D.mix(cfg.seed, 1))
    codes = D.Loader({"z": z.cpu().numpy()}, device)
    prior, _ = fit(Prior(cfg.T, z), codes, cfg, f"ckpt_prior_{reached}", cfg.steps // 2, facts)
    metrics = evaluate(cfg, data, part, models, prior, device)
    seconds, config = time.perf_counter() - began, dataclasses.asdict(cfg) | {"steps": reached}
    M.save_results(out / "results.json", "diffae", data.path, count, seconds, config, metrics, device)
    print(M.table(metrics, SHOWN, ROWS))
    if "probe_auroc_gain.vae" in metrics:
        print(M.answer(f"Does z_sem tell {data.question(cfg.target)} better than the VAE's code?", "AUROC",
                       metrics["probe_auroc"], metrics["probe_auroc.vae"], metrics["probe_auroc_gain.vae"]))
    print(f"{seconds:.0f} s. Numbers: {out}/results.json. Pictures: {out}/*.png")


if __name__ == "__main__":
    D.program(main)
