"""How fast is the UNet of diffae.py beside those of three libraries, with the same channels and levels?

    pip install diffusers monai denoising-diffusion-pytorch      # what is missing is left out
    python tests/bench.py --side 64 --base 32 --batch 16
    python tests/bench.py --growth growth.png                    # ours alone: batch, side and base in turn

A round times every network in every setting once, so that a busy machine slows all of them. A training step is
forward, squared error, backward and Adam. A reconstruction is S DDIM steps up and S down (20). On a CPU the time of
the process counts, on a GPU the time between two events. The ceiling is a large matrix product of the same number
format. The networks differ in operations per image; GFLOP/s and the share of the ceiling allow for that.
"""
import argparse, copy, dataclasses, itertools, multiprocessing, resource, statistics, sys, time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import diffae

LEVELS = (1, 2, 4)
GROWTH = {"batch": (4, 8, 16, 32, 64), "side": (32, 48, 64, 96, 128), "base": (8, 16, 32, 64)}


def ours(side, base):
    """The UNet of the published recipe: without an image of z_sem, as no other network has one."""
    cfg = dataclasses.replace(diffae.Config(), **diffae.PRESETS["demo"] | dict(
        size=side, base=base, mult=LEVELS, spatial=False, groups=0, attention=side // 4))
    net, z = diffae.UNet(cfg), torch.zeros(1, cfg.z_dim)
    return net, lambda x, t: net(x, t, z.to(x.device).expand(len(x), -1))


def diffusers(side, base):
    from diffusers import UNet2DModel
    kinds = ["DownBlock2D"] * (len(LEVELS) - 1) + ["AttnDownBlock2D"]
    net = UNet2DModel(sample_size=side, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=16,
                      block_out_channels=[m * base for m in LEVELS], down_block_types=kinds,
                      up_block_types=[k.replace("Down", "Up") for k in kinds[::-1]], attention_head_dim=None)
    return net, lambda x, t: net(x, t).sample


def monai(side, base):
    from monai.networks.nets import DiffusionModelUNet
    net = DiffusionModelUNet(spatial_dims=2, in_channels=1, out_channels=1, num_res_blocks=1,
                             channels=[m * base for m in LEVELS], norm_num_groups=16, resblock_updown=True,
                             attention_levels=[False, False, True], num_head_channels=LEVELS[-1] * base)
    return net, net


def lucidrains(side, base):
    from denoising_diffusion_pytorch import Unet
    net = Unet(base, channels=1, dim_mults=LEVELS, full_attn=(False, False, True))
    return net, net


def clock(device):
    """-> seconds that a run of work() takes on the device"""
    def seconds(work):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            return begin.elapsed_time(end) / 1000
        began = time.process_time()
        work()
        return time.process_time() - began
    return seconds


def ceiling(device, dtype, seconds):
    """Operations per second of a large matrix product"""
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / min(seconds(lambda: a @ a) for _ in range(5))


def works(make, args, device, dtype, layout):
    """-> a training step, a reconstruction, operations of one forward pass of an image, parameters"""
    torch.manual_seed(0)
    net, call = make(args.side, args.base)
    net.to(device, memory_format=layout)
    x = torch.randn(args.batch, 1, args.side, args.side, device=device).contiguous(memory_format=layout)
    t = torch.full((args.batch,), 500, device=device)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    alpha_bar, S = diffae.linear_alpha_bar(1000), args.S
    autocast = lambda: torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def train():
        with autocast():
            loss = F.mse_loss(call(x, t).float(), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.inference_mode()
    def reconstruct():
        eps_fn = lambda x_t, s: call(x_t, torch.full((len(x_t),), s, device=device)).float()
        with autocast():
            x_T = diffae.ddim_encode(eps_fn, x, S, alpha_bar)
            diffae.ddim_decode(eps_fn, x_T, S, alpha_bar)

    with FlopCounterMode(display=False) as count, torch.no_grad():
        call(x, t)
    return train, reconstruct, count.get_total_flops() / args.batch, sum(p.numel() for p in net.parameters())


def step_alone(args, device, dtype):
    """Ours in its default layout, in a process of its own -> images/s of a training step, GB at most"""
    torch.set_num_threads(args.threads)
    gpu = device == "cuda"
    memory = lambda: torch.cuda.max_memory_allocated() if gpu else \
        1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss         # Linux; macOS counts bytes
    seconds, before = clock(device), memory()
    train = works(ours, args, device, dtype, torch.channels_last)[0]
    took = [seconds(train) for _ in range(args.rounds + 1)][1:]
    return args.batch / statistics.median(took), (memory() - before) / 1e9


def growth(args, device, dtype):
    """A picture: how images/s and memory change with one number while the others stay"""
    fig, panels = plt.subplots(2, len(GROWTH), figsize=(8, 4), sharex="col", layout="constrained")
    for column, (name, values) in zip(panels.T, GROWTH.items()):
        rows = []
        for value in values:
            one = copy.copy(args)
            setattr(one, name, value)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows.append(pool.apply(step_alone, (one, device, dtype)))
            print(f"{name} {value}: {rows[-1][0]:.2f} images/s, {rows[-1][1]:.2f} GB", flush=True)
        for panel, row, word in zip(column, zip(*rows), ("images/s", "GB")):
            panel.plot(values, row, "o-")
            panel.set(ylim=0, ylabel=word, xticks=values)
        column[1].set_xlabel(name)
    fig.savefig(args.growth, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(side=48, base=16, batch=16, rounds=5, threads=1, S=20).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--growth", metavar="PNG")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with diffae.amp(torch.device(device)):
        dtypes = [torch.float32] + [torch.bfloat16] * torch.is_autocast_enabled(device)
    if args.growth:
        return growth(args, device, dtypes[-1])
    seconds, cases = clock(device), {}
    for make, dtype, layout in itertools.product((ours, diffusers, monai, lucidrains), dtypes,
                                                 (torch.contiguous_format, torch.channels_last)):
        name = make.__name__, str(dtype)[6:], "channels_last" if layout == torch.channels_last else "NCHW"
        try:
            cases[name] = works(make, args, device, dtype, layout)
        except ImportError as e:
            print(f"left out: {e}")

    took = {name: ([], []) for name in cases}
    for _ in range(args.rounds + 1):        # the first is slower, and not counted
        for name, (train, reconstruct, *_) in cases.items():
            took[name][0].append(seconds(train))
            took[name][1].append(seconds(reconstruct))
    peak = {dtype: ceiling(device, dtype, seconds) for dtype in dtypes}
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else 'cpu'}, torch {torch.__version__}, {args}\n"
          + ", ".join(f"{str(d)[6:]} ceiling {v / 1e9:.0f} GFLOP/s" for d, v in peak.items()))
    print(f"{'network':<34}{'M par.':>7}{'GFLOP':>7}{'train img/s (range)':>24}{'GFLOP/s':>9}{'share':>7}"
          f"{'recon img/s':>13}{'GFLOP/s':>9}")
    for name, (_, _, flops, size) in cases.items():
        rates = [[args.batch / s for s in each[1:]] for each in took[name]]
        train, recon = map(statistics.median, rates)
        top = peak[getattr(torch, name[1])]
        print(f"{' '.join(name):<34}{size / 1e6:7.2f}{flops / 1e9:7.3f}"
              f"{train:10.1f} ({min(rates[0]):.1f}..{max(rates[0]):.1f})".ljust(72)
              + f"{3 * flops * train / 1e9:9.1f}{3 * flops * train / top:7.0%}{recon:13.2f}"
              f"{2 * args.S * flops * recon / 1e9:9.1f}")


if __name__ == "__main__":
    main()
