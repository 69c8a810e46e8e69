"""Does each script run, and fit, on one GPU of 80 GB? Asked without a GPU, of the networks of the paper presets.

Tensors are fake: they have a shape and say that they are on a GPU, but hold nothing. An operation on tensors of
two devices fails as it would there, and so does one that waits for a number (.item(), .numpy()). The forward pass
of training and the samplers run. The backward pass of fake GPU tensors would need a driver. As a program this
prints the memory of each network: python tests/test_gpu_ready.py
"""
import contextlib
import ctypes
import sys
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import cond_ldm
import diffae
import ldae
import normative

LIMIT = 70          # GB; 10 are left to the driver, to caches and to gaps between blocks of memory
GPU = torch.device("cuda", 0)
MODULES = diffae, normative, cond_ldm, ldae


# ------------------------------------------------------------------------------------- a GPU that is not there

class Generator(torch.Generator):
    """A source of random numbers that says it is on the GPU"""
    device = GPU


class Watch(TorchDispatchMode):
    """Counts the bytes of GPU tensors that are alive, and the copies from the CPU, which wait for the GPU."""
    now = most = copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [x.device.type for x in tree_leaves(args) if isinstance(x, torch.Tensor) and x.ndim]
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device == GPU:
                self.copies += "cpu" in given
                storage = x.untyped_storage()
                if not hasattr(storage, "counted"):
                    storage.counted = weakref.finalize(storage, self.freed, storage.nbytes())
                    self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        return out

    def freed(self, size):
        self.now -= size


@contextlib.contextmanager
def fake_gpu():
    if not torch.cuda.is_available():
        # A torch without CUDA has nothing that makes a GPU the current one. What the device "meta" has for this
        # does nothing, and serves here. The table goes by torch's numbers of devices: 1 is CUDA, 14 is meta.
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        table = (ctypes.c_void_p * 15).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
        table[1] = table[14]
    with contextlib.ExitStack() as stack:
        patch = lambda *what: stack.enter_context(mock.patch.object(*what))
        patch(nn.init, "kaiming_uniform_", lambda weight, *_, **__: weight)        # the weights are fake anyway
        patch(torch.cuda, "synchronize", lambda *_: None)
        patch(ldae.M, "to_image", lambda x: x)            # for files and people: numpy
        for m in MODULES:
            patch(m, "amp", lambda device: contextlib.nullcontext())       # autocast refuses where no GPU is
            # a step of DDIM reads alpha_bar on the CPU, where a fake tensor has no number
            patch(m, "ddim_step", lambda x, t, t_to, eps, *_: (x + eps) / 2)
        stack.callback(torch.set_autocast_enabled, "cuda", torch.is_autocast_enabled("cuda"))
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(Watch())


def on_gpu(net):
    """The same network with fake weights. (.to() would try to change the real ones in place.)"""
    for module in net.modules():
        for tensors, kind in ((module._parameters, nn.Parameter), (module._buffers, lambda x: x)):
            for name, x in tensors.items():
                if x is not None:
                    new = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU)
                    tensors[name] = kind(new, x.requires_grad) if kind is nn.Parameter else new
    return net


# ------------------------------------------------------------------------------------- networks and batches
# Each function: settings, network, device -> the network with real weights, a batch, what it is used for.

def hearts(m, cfg, network, device):
    batch = {"image": torch.zeros(cfg.batch, 1, cfg.size, cfg.size, device=device),
             "age": torch.zeros(cfg.batch, device=device), "y": torch.zeros(cfg.batch, device=device)}
    with unset_fake_temporarily():
        net = diffae.build(network, cfg) if m is diffae else network(cfg)

    def use(net):
        z = net.encode(batch)
        if network is m.Model:
            m.decode(net, m.encode_noise(net, batch["image"], z), z)
    return net, batch, use


def prior(m, cfg, network, device):
    with unset_fake_temporarily():
        net = network(cfg.T, torch.randn(8, cfg.z_dim))
    return net, {"z": torch.zeros(cfg.batch, cfg.z_dim, device=device)}, lambda net: net.sample(6, Generator())


def drawings(m, cfg, network, device):
    n, side = cfg.size // 2 ** (len(cfg.channels) - 1) // cfg.patch, cfg.size
    batch = {"image": torch.zeros(cfg.batch, 1, side, side, device=device),
             "z0": torch.zeros(cfg.batch, cfg.z_dim, n, n, device=device),
             "mask": torch.zeros(cfg.batch, side, side, dtype=torch.int64, device=device),
             "kind": torch.zeros(cfg.batch, 2, device=device),
             "edges": torch.zeros(cfg.batch, 3, side, side, dtype=torch.int64, device=device)}
    with unset_fake_temporarily():
        net = network(cfg, torch.randn(2, cfg.z_dim, n, n)) if network is m.Model else network(cfg)

    def use(net):
        if network is m.Model:
            m.ddim_decode(m.guided(net, m.planes(batch, "full"), 2.0), batch["z0"], 2, net.alpha_bar)
        elif network is m.VQVAE:
            net.decode(net.encode(batch["image"]))
        else:
            net.logits(batch["image"])
    return net, batch, use


def brains(m, cfg, network, device):
    n = cfg.ae_batch if network is m.Autoencoder else cfg.batch
    with unset_fake_temporarily():
        ae = m.Autoencoder(cfg)
        latent = [-(-s // ae.unit) for s in cfg.size]
        ldm = m.Unconditional(cfg, *torch.randn(2, 2, cfg.z_ch, *latent))
        net = {m.Autoencoder: ae, m.Unconditional: ldm}.get(network) or m.Model(cfg, ldm, ae)
    batch = {"image": torch.zeros(n, 1, *cfg.size, device=device)}
    batch |= {k: torch.zeros(n, cfg.z_ch, *latent, device=device) for k in ("mean", "std")}
    if device == GPU:
        on_gpu(ae), on_gpu(ldm)

    def use(net):
        if network is m.Autoencoder:
            net.decode(net.posterior(batch["image"])[0])
        elif network is m.Model:
            with mock.patch.object(nn.Module, "to", lambda net, *_, **__: on_gpu(net)):
                m.throughput(cfg, {"image": batch["image"][:1]}, net)
            z = m.in_batches(lambda x: net.encode({"image": x}), batch["image"], batch=8)
            m.travel(m.ddim_encode, net, batch["mean"], z)
    return net, batch, use


H, A, C, B = diffae.Config, normative.Config, cond_ldm.Config, ldae.Config
STAGES = {      # name: function above, script, network, what differs from the paper preset, optimizer steps
    "diffae": (hearts, diffae, "Model", dict(frame="crop"), H.steps),
    "diffae, wall": (hearts, diffae, "Model", dict(frame="wall"), H.steps),
    "diffae, VAE": (hearts, diffae, "VAE", {}, H.steps),
    "diffae, from labels": (hearts, diffae, "Supervised", {}, H.steps // 2),
    "diffae, prior": (prior, diffae, "Prior", {}, H.steps // 2),
    "normative": (hearts, normative, "Model", {}, A.steps),
    "normative, VAE": (hearts, normative, "VAE", {}, A.steps),
    "cond_ldm, VQ-VAE": (drawings, cond_ldm, "VQVAE", {}, C.vq_steps),
    "cond_ldm, judge": (drawings, cond_ldm, "Segmenter", {}, C.vq_steps // 2),
    "cond_ldm": (drawings, cond_ldm, "Model", {}, C.steps),
    "ldae, A": (brains, ldae, "Autoencoder", {}, B.ae_steps),
    "ldae, B": (brains, ldae, "Unconditional", {}, B.ldm_steps),
    "ldae, C": (brains, ldae, "Model", {}, B.steps),
    "ldae, C, published": (brains, ldae, "Model", dict(predict="eps", spatial=False), B.steps),
    "ldae, prior": (prior, ldae, "Prior", {}, B.steps),
}
HEART = dict(size=24, base=16, mult=(1, 2), enc_mult=(1, 2), blocks=1, attention=12, groups=0, z_dim=24, batch=2)
SMALL = {       # the same networks, small
    diffae: HEART, normative: HEART,
    cond_ldm: dict(size=16, channels=(16, 16), depth=1, groups=0, codebook=32, unet=(16, 32, 32), batch=2),
    ldae: dict(size=(24, 24, 24), patch=2, ae_base=16, ae_mult=(1, 1), disc_base=8, base=16, mult=(1, 2), blocks=1,
               groups=0, enc_base=16, enc_mult=(1, 2), z_dim=8, ae_batch=2, batch=2)}


def measure(stage):
    """-> GB of a training step, GB of the network in use, copies from the CPU in a second step, weights, and
    operations of a training step: three times those of the forward pass"""
    make, m, network, flags, _ = STAGES[stage]
    with fake_gpu() as watch:
        net, batch, use = make(m, m.Config(S=2, **flags), getattr(m, network), GPU)
        on_gpu(net).train()
        trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
        for _ in range(2):
            watch.most, watch.copies = watch.now, 0
            with FlopCounterMode(display=False) as count:
                loss = net(batch, Generator())  # as long as the loss lives, all lives that the backward pass needs
            assert loss.device == GPU and loss.dtype == torch.float32 and loss.ndim == 0
            del loss
        # beside each weight: its gradient, Adam's two moments, the average
        train, copies, watch.most = watch.most + 16 * trained, watch.copies, watch.now
        with torch.inference_mode():
            use(net.eval())
    return train / 1e9, watch.most / 1e9, copies, trained, 3 * count.get_total_flops()


TWICE = ("ldae, C, published", "normative, VAE", "ldae, prior")      # the text of another's, or a layer less


@pytest.mark.parametrize("stage", [s for s in STAGES if s not in TWICE])
def test_every_network_fits_on_a_gpu_and_does_not_wait_for_the_cpu(stage):
    train, use, copies, *_ = measure(stage)
    assert train < LIMIT and use < LIMIT, f"{stage}: training {train:.0f} GB, use {use:.0f} GB"
    assert copies == 0, f"{stage}: {copies} copies from the CPU in a training step"


@pytest.mark.parametrize("stage", [s for s in STAGES if not any(w in s for w in ("prior", "judge", "normative"))])
def test_every_network_compiles_as_a_whole(stage):
    """But for the two small ones whose layers are called one by one. What cannot be one graph is an error."""
    make, m, network, flags, _ = STAGES[stage]
    net, batch, _ = make(m, m.Config(**SMALL[m] | flags), getattr(m, network), torch.device("cpu"))
    torch._dynamo.reset()
    parts = [part for part in net.children() if list(part.children())]
    for part in parts:                  # as fit does, also for single layers, which stay as they are
        part.compile(fullgraph=True, backend="aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    net(batch, torch.Generator().manual_seed(0))        # traces the backward pass, too
    # a discriminator is called up to three times: of real and drawn images, with and without gradients
    assert len(parts) <= graphs["unique_graphs"] - before <= len(parts) + 2


if __name__ == "__main__":
    print("| network | batch | million weights | GB, training | GB, in use | TFLOP a step | steps | hours |\n" + 8 * "|---" + "|")
    for stage, (_, m, _, _, steps) in STAGES.items():
        train, use, _, size, flops = measure(stage)
        n = B.ae_batch if stage == "ldae, A" else m.Config.batch
        hours = flops * steps / 300e12 / 3600       # 30 % of what an H100 does in bfloat16
        print(f"| {stage} | {n} | {size / 1e6:.1f} | {train:.1f} | {use:.1f} | {flops / 1e12:.1f} | {steps} | {hours:.1f} |")
