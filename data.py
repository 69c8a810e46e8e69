"""Data: HDF5 schema and checks, splits by subject, batches, phantoms, converters; flags and checkpoints.

    python data.py check   FILE_OR_FOLDER                  verify, naming file, dataset and row
    python data.py show    FILE_OR_FOLDER [--out X.png]    contact sheet with mask contours
    python data.py phantom hearts|views|cohort|brains OUT.h5 [--subjects N] [--seed 0] [--size N]
    python data.py emidec  ROOT OUT.h5                     EMIDEC's NIfTI folders -> HDF5
    python data.py acdc    ROOT OUTDIR                     ACDC's -> one HDF5 per subject, 256 x 256
    python data.py mms     ROOT OUTDIR                     M&Ms-2's -> the same
    python data.py volumes TABLE.csv OUT.h5 [--spacing 1.5] [--shape 128,160,128]
                                                           head scans that a CSV lists -> HDF5
    python data.py images  FOLDER_OR_CSV OUT.h5 [--size 128] [--spacing MM] [--slice axial:20:40]
                                                           your own images, or slices of your scans -> HDF5
    .. and `python data.py COMMAND --help` tells what a command does and what its flags mean

    image    (N,H,W) or (N,D,H,W)  uint8, or float in [0,1]                             required
    subject  (N,) utf-8            the unit of every split, test and interval           required
    mask     as image, uint8       label map; attr mask_names
    label    (N,) int >= 0         classes; attr label_names
    age sex session time event     years, text, months, days > 0, 0/1;  NaN or "" is missing, but not in event
    split    (N,) train/val/test   else made by split()
    path     (N,) text             the file that the row came from
    view phase slice  (N,) ints    cine: 0 SA, 1 LA;  0 ED, 1 ES;  from base or apex, as scanned
    anything else (N,) numeric is a probe target; factor_* are the known causes of a phantom
"""
import argparse, datetime, difflib, glob, hashlib, inspect, io, json, os, re, shutil, signal, sys
import typing, zipfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from types import SimpleNamespace
from warnings import catch_warnings

import h5py
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from tqdm import tqdm


def fail(message, status=2):
    """Print `error: message` as one line on stderr and exit: 2 is for the user to mend, 1 for the machine."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(status)


def warn(message):
    """Print `warning: message` on stderr."""
    print("warning:", message, file=sys.stderr)


@contextmanager
def writing(path):
    """Around whatever writes `path`: a full or broken disk is one line, which tells the room there is."""
    try:
        yield
    except (OSError, RuntimeError) as e:        # torch.save and h5py raise the latter
        folder, why = os.path.dirname(path) or ".", str(e).splitlines()[0]
        free = f"{shutil.disk_usage(folder).free / 1e6:.0f} MB free" if os.path.isdir(folder) else "no folder"
        fail(f"{path}: could not be written ({why}; {free}); what was saved before is kept, the same command "
             "goes on from there", 1)


@contextmanager
def replacing(path):
    """Yields the name of a file to write, which becomes `path` when all went well; else the old one stays."""
    part = f"{path}.part"
    with writing(path):
        if os.path.lexists(part):       # a run was killed here; a link is removed, not followed
            os.remove(part)
        try:
            yield part
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            if os.path.exists(part):
                os.remove(part)


def program(main):
    """Run main(flags) with the command line's flags. What its user can mend is one line, no traceback."""
    for stream in filter(None, (sys.stdout, sys.stderr)):       # None if the shell closed it
        stream.reconfigure(errors="replace", line_buffering=True)
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:         # the reader left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # Python flushes once more at exit
        sys.exit(1)
    except OSError as e:
        fail(f"{e.filename or 'output'}: {e.strerror or e}; what was saved before is kept", 1)
    except (MemoryError, RuntimeError) as e:
        signs = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and not any(s in str(e) for s in signs):
            raise
        fail("out of memory; lower --batch, --size or --base. What was saved before is kept")


# ---------------------------------------------------------------------------------------------------
# What a training script needs besides its data: flags, the order of its batches, checkpoints

def integers(text):
    """"1,2,4" -> (1, 2, 4)"""
    return tuple(int(n) for n in text.split(","))


def parse(Config, presets, recipes, doc, argv):
    """The flags in argv -> (Config, set of the keys that were given). Each field of the dataclass is a flag.

    Order: defaults of Config < preset < recipe < flags. The Config holds the device, preset and recipe that
    were chosen. A wrong flag or value is one line, exit 2."""
    if argv[:1] == ["--help"] and argv[1:] == ["metrics"]:
        import metrics      # not above: metrics.py imports this file
        print(*(f"{key}: {words}" for key, words in metrics.GLOSSARY.items()), sep="\n")
        raise SystemExit(0)
    if {"-h", "--help"} & set(argv):
        print(doc, inspect.getsource(Config), f"presets: {presets}", f"recipes: {recipes}", sep="\n")
        raise SystemExit(0)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = fail
    kinds = typing.get_type_hints(Config)
    for name, kind in kinds.items():
        choices = {"preset": presets, "recipe": recipes}.get(name) or typing.get_args(kind)
        if kind is bool:
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)
        elif choices:
            parser.add_argument(f"--{name}", choices=list(choices))
        else:
            parser.add_argument(f"--{name}", type=integers if kind is tuple else kind)
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], [f"--{name}" for name in kinds], 1)
        fail(f"unknown flag {unknown[0]}; " + (f"did you mean {near[0]}? " if near else "") + "see --help")

    given = vars(flags)
    if given.get("apply") and (more := sorted(set(given) - {"apply", "out", "device"})):
        fail(f"--{more[0]}: --apply takes all settings from the run in --out; leave this flag away")
    device = choose_device(given.get("device"))
    preset = given.get("preset") or ("paper" if device.startswith("cuda") else "demo")
    recipe = given.get("recipe", Config.recipe)
    chosen = dict(device=device, preset=preset, recipe=recipe)
    cfg = Config(**{**presets[preset], **recipes[recipe], **given, **chosen})
    for name, kind in kinds.items():
        value = getattr(cfg, name)
        least = 0 if kind is float or name in ("seed", "attention", "groups") or name.endswith("steps") else 1
        if kind in (int, float, tuple) and np.min(value) < least:
            fail(f"--{name} {value}: must be at least {least}")
        if kind is float and not np.isfinite(value) or name.endswith("lr") and value == 0:
            fail(f"--{name} {value}: must be a finite number above 0")
    if cfg.seed >= 2 ** 32:
        fail(f"--seed {cfg.seed}: must be below 2**32")
    return cfg, set(given)


def start(Config, presets, recipes, doc, argv):
    """parse(), and the device made ready. Under torchrun each process takes one GPU. -> Config, device"""
    cfg, _ = parse(Config, presets, recipes, doc, argv)
    device = torch.device(cfg.device)
    if "RANK" in os.environ:       # hours, since all processes wait for the one that draws or reads
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=6))
        if cfg.batch % dist.get_world_size():
            fail(f"--batch {cfg.batch}: must be a multiple of the {dist.get_world_size()} processes")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")      # TF32
        torch.backends.cudnn.benchmark = True
    return cfg, device


def ranks():
    """(rank, number of processes): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def leave():
    """All processes have trained, and rank 0 goes on alone. -> True in the others"""
    rank, world = ranks()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return rank > 0


def catch_signals():
    """From now on SIGTERM and Ctrl-C end no program. -> a list to which their numbers are added; restore()"""
    caught, numbers = [], (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(n, lambda number, frame: caught.append(number)) for n in numbers]
    return caught, lambda: [signal.signal(n, handler) for n, handler in zip(numbers, before)]


def choose_device(device=""):
    """`device` if this machine has it; if none is named, the first of cuda, mps, cpu that is there."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = ["cuda"] * bool(gpus) + ["mps"] * torch.backends.mps.is_available() + ["cpu"] + gpus
    if device and device not in devices:
        fail(f"--device {device}: this machine has {', '.join(devices)}")
    return device or devices[0]


def batch_rows(n, batch, seed, step):
    """The `batch` row numbers of a step: an endless chain of permutations of 0..n-1, a new one each epoch."""
    if batch > n:
        fail(f"--batch {batch}: there are only {n} training images; choose at most {n}")
    at = np.arange(step * batch, (step + 1) * batch)
    order = {e: np.random.default_rng([seed, e]).permutation(n) for e in np.unique(at // n)}
    return np.array([order[i // n][i % n] for i in at])


def mix(*numbers):
    """One well-mixed 63-bit seed from several integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def phantom_path(cfg, name, draw):
    """--data; without it OUT/name, where a run keeps its phantoms: draw(path) writes them, in one process.
    Exits if OUT holds a run of other data."""
    path = os.path.join(cfg.out, name)
    if cfg.data:
        return cfg.data
    if not os.path.exists(path) and os.path.exists(os.path.join(cfg.out, "config.json")):
        fail(f"--out {cfg.out}: holds a run of other data than phantoms; give its --data, or another --out")
    rank, world = ranks()
    if rank == 0 and not os.path.exists(path):
        draw(path)
    if world > 1:
        dist.barrier()
    return path


def in_words(count):
    """{"train": 70, "test": 20} -> "70 train, 20 test"."""
    return ", ".join(f"{n} {part}" for part, n in count.items())


def describe(data, part):
    """-> {"train": number of subjects, "val": .., "test": ..}; what a checkpoint must agree on about the
    data: nobody it was trained on may be tested on, whatever the split is now."""
    who = {p: np.unique(data.subject[part == p]) for p in ("train", "val", "test")}
    count = {p: len(w) for p, w in who.items()}
    if not count["train"] or not count["test"]:
        fail(f"{data.path}: {count['train']} training, {count['test']} test subjects; one of each is needed")
    names = hashlib.sha256("\n".join(who["train"]).encode()).hexdigest()[:16]
    return count, {"images": data.fingerprint, "training_subjects": names}


def choose_target(data, target, usual):
    """The column that a probe predicts: `target` if given, else the first of `usual` that the data has, else
    label. Exits if the data has no numbers of the given name."""
    numeric = [k for k, x in data.columns.items() if x.dtype.kind in "biuf"]
    if target and target not in numeric:
        fail(f"--target {target}: no numbers of that name in {data.path}, which has {', '.join(numeric)}")
    chosen = target or next((k for k in usual if k in numeric), "label")
    if numeric and chosen not in numeric:
        warn(f"{data.path}: no label, so no prediction; --target can name one of {', '.join(numeric)}")
    if chosen == "label" and np.max(data.columns.get("label", 0)) > 1:
        warn(f"{data.path}: label has more classes than 0 and 1: it is read as a number; --target can name a "
             "column of 0 and 1")
    return chosen


def augment(x, strength, flip, g):
    """Random motion of images (B,1,H,W): at strength 1 uniformly up to 20 degrees, 12 % zoom, 8 % of the
    width of shift; what enters from outside repeats the border. flip: half are mirrored. -> like x"""
    u = torch.rand(len(x), 5, generator=g, device=g.device)
    mirror = torch.where(u[:, 0] < 0.5, -1.0, 1.0) if flip else torch.ones_like(u[:, 0])
    if strength == 0:
        return torch.where(mirror.view(-1, 1, 1, 1) < 0, x.flip(3), x)
    angle, zoom, dx, dy = (strength * (2 * u[:, 1:] - 1)).unbind(1)
    cos, sin = ((1 + 0.12 * zoom) * f(0.35 * angle) for f in (torch.cos, torch.sin))
    theta = torch.stack([cos * mirror, -sin, 0.16 * dx, sin * mirror, cos, 0.16 * dy], 1).view(-1, 2, 3)
    with torch.autocast(x.device.type, enabled=False):    # bfloat16 would round positions to a quarter pixel
        grid = F.affine_grid(theta, x.shape, align_corners=False)
        x = F.grid_sample(x, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return x.clamp(-1, 1)


def moved(x, cfg, g):
    """Images (B,1,H,W) moved at random: augment(), or in the wall frame turned and mirrored. -> like x"""
    if getattr(cfg, "frame", "image") != "wall":        # normative.py has no frames
        return augment(x, cfg.augment, cfg.flip, g)
    x, n = augment(x, 0, True, g), x.shape[3]
    turn = torch.randint(n, (len(x), 1), generator=g, device=g.device)
    column = (turn + torch.arange(n, device=g.device)) % n
    return x.gather(3, column[:, None, None].expand(x.shape))


def save_checkpoint(path, state):
    """Write `state`, plain values and tensors, to `path`: complete, or the old checkpoint is still there."""
    with replacing(path) as part:
        torch.save(state, part)


def read_state(path):
    """The state that save_checkpoint wrote to `path`, on the CPU: step, model, ema, optimizer, config.

    Exits if there is no such file, if it is damaged or if it holds other things."""
    if not os.path.lexists(path):
        fail(f"{path}: no such file; name the folder of a run that has trained this network")
    try:
        with zipfile.ZipFile(path) as file:
            if wrong := file.testzip():     # torch.load does not compare the checksums that torch.save wrote
                raise ValueError(f"checksum of {wrong}")
        state = torch.load(path, map_location="cpu", weights_only=True)     # never unpickles code
        moments = [v for parameter in state["optimizer"]["state"].values() for v in parameter.values()]
        tensors = [*state["model"].values(), *state["ema"].values(), *moments]
        numbers = type(state["step"]) is int and type(state.get("seconds", 0.0)) is float
        if not (numbers and state["step"] >= 0 and isinstance(state["config"], dict)
                and all(isinstance(v, torch.Tensor) for v in tensors)):
            raise ValueError("holds other things than a run saves")
        return state
    except MemoryError:
        raise
    except Exception as e:      # what a damaged file raises is of any kind
        why = e if isinstance(e, (OSError, ValueError)) else type(e).__name__
        fail(f"{path}: damaged, or not a checkpoint of this program ({why}); put a copy back, delete it "
             "to start over, or change --out")


def read_checkpoint(path, config, defaults, may_change):
    """read_state(path) for a run that goes on; None if there is no such file. Exits if its config differs
    from `config` in a key that is not in may_change. A key that its config lacks means defaults[key]."""
    if not os.path.lexists(path):
        return None
    state = read_state(path)
    # Keys that only the checkpoint has are of fields that Config had once. Nobody can set these today,
    # and if they changed the network, then load_into finds other shapes.
    was = {k: list(v) if isinstance(v, tuple) else v for k, v in {**defaults, **state["config"]}.items()}
    differ = [f"{k} {was.get(k)!r} -> {v!r}" if k in defaults else f"other {k.replace('_', ' ')}"
              for k, v in config.items() if k not in may_change and was.get(k) != v]
    if differ:
        data = was.get("data") or "phantoms"
        fail(f"{path}: made by another run, of {data} ({', '.join(differ)}); choose another --out")
    return state


def compare(path, part, theirs, ours):
    """Exits if two dicts {name: shape}, of the part of a checkpoint and of the network, differ."""
    for k in {**ours, **theirs}:
        if ours.get(k) != theirs.get(k):
            fail(f"{path}: {part}: {k} is {theirs.get(k, 'missing')} in the file and "
                 f"{ours.get(k, 'missing')} in this network (edited source, or other settings?)")


def load_weights(path, part, weights, net):
    """Load the state_dict `weights`, the `part` of a checkpoint, into a network. Other shapes exit 2."""
    shapes = lambda tensors: {k: tuple(v.shape) for k, v in tensors.items()}
    compare(path, part, shapes(weights), shapes(net.state_dict()))
    net.load_state_dict(weights)


def load_into(state, path, model, ema, optimizer):
    """Load what read_checkpoint returned into both networks and their Adam -> the step; 0 if state is None.

    Other shapes or keys exit 2."""
    if state is None:
        return 0
    load_weights(path, "model", state["model"], model)
    load_weights(path, "ema", state["ema"], ema)
    # optimizer.load_state_dict takes tensors of any shape, with which the fused kernel crashes the process.
    # That kernel walks raw memory: each tensor must also lie in memory as its parameter does.
    adam = state["optimizer"]["state"]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(params if state["step"] > 0 else []):      # at step 0 Adam has no moments yet
        shapes = dict(step=(), exp_avg=tuple(p.shape), exp_avg_sq=tuple(p.shape))
        found = {k: tuple(v.shape) for k, v in adam.get(i, {}).items()}
        compare(path, f"optimizer: parameter {i}", found, shapes)
        optimizer.state[p] = {k: torch.empty_like(p).copy_(adam[i][k]) for k in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p]["step"] = adam[i]["step"].to(p.device, torch.float32)
    return state["step"]


def start_from(path, *networks):
    """Load the averaged weights in the checkpoint of another run into all networks. Buffers are those of the
    trained network: the average of a VQ-VAE does not count which codes are in use."""
    state = read_state(path)
    for net in networks:
        buffers = {k: state["model"][k] for k, _ in net.named_buffers() if k in state["model"]}
        load_weights(path, "ema", state["ema"] | buffers, net)


def trained(path, Config, build, device=""):
    """A trained network, ready to use: build(cfg) with the averaged weights of its checkpoint.

    Settings of evaluation, as --S, are those of the last evaluation in its folder, if there was one.
    -> (the network on `device`, which "" chooses, in eval mode and without gradients; its Config)"""
    state, kinds = read_state(path), typing.get_type_hints(Config)
    results, last = os.path.join(os.path.dirname(path), "results.json"), {}
    if os.path.exists(results):
        try:
            with open(results) as file:
                last = dict(json.load(file)["config"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            fail(f"{results}: damaged ({type(e).__name__}: {e}); the same command writes it again")
    config = {k: v for k, v in (state["config"] | last).items() if k in kinds}
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    cfg = Config(**config | dict(out=os.path.dirname(path), device=choose_device(device)))
    model = build(cfg)
    load_weights(path, "ema", state["ema"], model)
    return model.to(cfg.device).eval().requires_grad_(False), cfg


# ---------------------------------------------------------------------------------------------------
# Reading. libhdf5 will happily read other files through a crafted one (external links, external
# storage, virtual datasets), so only plain datasets at the top level are ever opened.

@contextmanager
def guarded(path, what):
    """Around all that reads through libhdf5: what a damaged file raises, of a dozen types, is one line."""
    try:
        yield
    except MemoryError:
        raise
    except PermissionError:
        fail(f"{path}: no permission to read it; try chmod u+r")
    except Exception as e:
        if eof := re.search(r"eof = (\d+),.*stored_eof = (\d+)", str(e), re.S):
            fail(f"{path}: truncated: has {eof[1]} of {eof[2]} bytes; copy it again")
        if "signature not found" in str(e):
            fail(f"{path}: not an HDF5 file; `python data.py` lists the converters")
        fail(f"{path}: {what}: damaged, copy or write the file again ({type(e).__name__}: {e})")


@contextmanager
def open_h5(path):
    """One HDF5 file, open for reading. Fails in one line that says what is wrong with the file."""
    if not os.path.exists(path):
        fail(f"{path}: no such file or folder")
    if not os.path.isfile(path):  # a pipe or device would block
        fail(f"{path}: not a regular file")
    with guarded(path, "file"), h5py.File(path, "r", locking=False) as file:    # network disks have no locks
        yield file


def plain(file, path, name):
    """The dataset `name` of an open file, or None for a group; fails if its bytes lie elsewhere."""
    link = file.get(name, getlink=True)  # looks at the link without following it
    if link is None:
        fail(f"{path}: {name}: missing")
    kind = None if isinstance(link, h5py.HardLink) else type(link).__name__
    if not kind and file.get(name, getclass=True) is not h5py.Dataset:
        return None
    if not kind and file[name].is_virtual:
        kind = "virtual dataset"
    if not kind and file[name].external:
        kind = "dataset with external storage"
    if kind:
        fail(f"{path}: {name}: a {kind}, refused: nothing outside the file is read; store the values in it")
    return file[name]


def read_attrs(thing):
    """Attributes of a file or dataset -> dict of str, numbers and lists. *_names are lists of str, also where
    the text "a, b, c" is stored."""
    def text(v):
        v = v if isinstance(v, bytes) else str(v).encode("utf-8", "replace")
        return v.decode("utf-8", "replace").strip()

    attrs = {}
    for k, v in thing.attrs.items():
        v = v.tolist() if isinstance(v, (np.ndarray, np.generic)) else v
        v = text(v) if isinstance(v, (str, bytes)) else v
        if k.endswith("_names"):
            v = [text(n) for n in (v.split(",") if isinstance(v, str) else np.ravel(v).tolist())]
        attrs[k] = v
    return attrs


class Rows:
    """The rows of `image` or `mask`, read from disk when indexed: rows[ints] -> (len,*S) uint8.

    Floats become round(255 x); `size` resizes in-plane. Fails naming file, dataset and row on NaN,
    Inf, a float outside [0,1] or a damaged chunk."""
    def __init__(self, name, paths, counts, shape, size=None):
        self.name, self.paths, self.size = name, paths, size
        self.starts, self.stored = np.cumsum([0, *counts]), tuple(shape)
        self.shape = (int(self.starts[-1]), *((size, size) if size else shape))
        self.nbytes = int(np.prod(self.shape, dtype=object))

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        asked = np.arange(len(self))[rows]
        rows = asked.ravel()
        owner = np.searchsorted(self.starts, rows, "right") - 1
        out = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for k in tqdm(np.unique(owner), "reading", delay=2, leave=False, disable=None):
            path, here = self.paths[k], np.flatnonzero(owner == k)
            with open_h5(path) as file:
                dataset = plain(file, path, self.name)
                if dataset is None or dataset.shape != (np.diff(self.starts)[k], *self.stored):
                    fail(f"{path}: {self.name}: not what it was when this run began; put that file back")
                most = max(1, int(64e6 // (dataset.dtype.itemsize * np.prod(dataset.shape[1:]))))
                cut = (np.diff(rows[here]) != 1) | (np.arange(1, len(here)) % most == 0)
                runs = np.split(here, np.flatnonzero(cut) + 1)      # neighbours together, up to 64 MB
                for run in tqdm(runs, "reading", delay=2, leave=False, disable=None):
                    first = int(rows[run[0]] - self.starts[k])
                    with guarded(path, f"{self.name}[{first}..{first + len(run) - 1}]"):
                        block = dataset[first:first + len(run)]
                    out[run] = self.to_uint8(block, path, first)
        return out.reshape(*asked.shape, *self.shape[1:])

    def to_uint8(self, x, path, first):
        if x.dtype.kind == "f":
            for bad, what in ((~np.isfinite(x), "NaN or Inf"), ((x < 0) | (x > 1), "outside [0,1]")):
                if bad.any():
                    row = int(np.argmax(bad.reshape(len(x), -1).any(1)))
                    fail(f"{path}: {self.name}[{first + row}]: {int(bad[row].sum())} values {what} "
                         f"(first {x[row][bad[row]][0]:.9g}); rescale the image to [0,1], or clip it")
            x = x.astype(np.float32) * 255
        if self.size:
            x = resize(x, self.size, nearest=self.name == "mask")
        return x if x.dtype == np.uint8 else to_uint8(x)


def to_uint8(x):
    """Floats 0..255 -> the nearest uint8."""
    return np.rint(x).astype(np.uint8)


# Resampling as one matrix per axis. Output pixel i covers the source from start + i*step to
# start + (i+1)*step, in source pixels; what lies outside the source is 0.

def axis_weights(n, start, step, size):
    """-> (size, n) float32: exact area average if step >= 1, else bilinear between centres."""
    left = start + step * np.arange(size)[:, None]
    pixel = np.arange(n)[None]
    if step >= 1:
        overlap = np.minimum(left + step, pixel + 1) - np.maximum(left, pixel)
        return (np.clip(overlap, 0, None) / step).astype(np.float32)
    tent = np.clip(1 - abs(left + step / 2 - 0.5 - pixel), 0, None)
    return (tent / np.maximum(tent.sum(1, keepdims=True), 1e-9)).astype(np.float32)


def resample(x, start, step, size, nearest=False):
    """(n,H,W) -> (n,size,size); start and step are (row, column) pairs. Labels: nearest."""
    if not nearest:
        rows, columns = (axis_weights(x.shape[a + 1], start[a], step[a], size) for a in (0, 1))
        return rows @ x.astype(np.float32) @ columns.T
    index = [np.floor(start[a] + (np.arange(size) + 0.5) * step[a]).astype(int) for a in (0, 1)]
    inside = [(i >= 0) & (i < n) for i, n in zip(index, x.shape[1:])]
    picked = x[:, np.where(inside[0], index[0], 0)][:, :, np.where(inside[1], index[1], 0)]
    return picked * (inside[0][:, None] & inside[1]).astype(x.dtype)


def resize(x, size, nearest=False):
    """(n,H,W) -> (n,size,size): zero-padded to a square, then area-averaged down or bilinear up."""
    side = max(x.shape[1:])
    start = [-((side - n) // 2) for n in x.shape[1:]]
    return resample(x, start, (side / size, side / size), size, nearest)


@dataclass(repr=False)
class Dataset:
    """What a path holds. N rows; image and mask are uint8 (N,H,W) or (N,D,H,W), Rows when too big."""
    path: str
    image: object
    mask: object          # or None
    subject: object       # (N,) str
    columns: dict         # name -> (N,): label, age, sex, session, time, event, factor_*, ...
    split: object         # (N,) "train"/"val"/"test", or None
    attrs: dict
    label_names: list
    fingerprint: str      # hash of image and subject, so that a resumed run knows its data
    frame: str = "image"  # see load_framed()
    whole: object = None  # in the frame of the wall: a function row -> its slice and its mask, see unwrap()

    def __len__(self):
        return len(self.subject)

    def __repr__(self):
        return f"<{self.path}: image {self.image.shape}, columns {', '.join(self.columns)}>"

    def question(self, target):
        """What a probe of `target` tells: "AD from CN" for two named classes, else the column's name."""
        named = target == "label" and len(self.label_names) == 2
        return " from ".join(self.label_names[::-1]) if named else target


PIXELS = ("image", "mask")
TEXTS = ("subject", "sex", "split", "path")
KNOWN = (*PIXELS, *TEXTS, "label", "age", "session", "time", "event")


def read_columns(path):
    """Check all of one file but its pixels -> (columns, attrs); image and mask only as shapes."""
    columns = {}
    with open_h5(path) as file:
        names, attrs = list(file), read_attrs(file)
        for need in ("image", "subject"):
            if need not in names:
                fail(f"{path}: {need}: missing, the file has {', '.join(map(str, names)) or 'nothing'}")
        shape = getattr(plain(file, path, "image"), "shape", ())
        if len(shape) not in (3, 4) or shape[3:] in ((1,), (3,), (4,)) or 0 in shape or shape[0] > 1e7:
            fail(f"{path}: image: shape {shape}, expected (N,H,W) or (N,D,H,W); keep one colour")
        for name in names:
            if isinstance(name, bytes):
                fail(f"{path}: the name {name} is not utf-8; rename that dataset")
            with guarded(path, name):
                x = plain(file, path, name)
                if name not in KNOWN and (x is None or x.ndim != 1 or x.dtype.kind not in "biuf"):
                    warn(f"{path}: {name}: ignored, not an (N,) numeric column")
                    continue
                attrs.update({k: v for k, v in read_attrs(x).items() if k.endswith("_names")})
                check_storage(path, name, x, shape if name in PIXELS else shape[:1])
                if name in PIXELS:
                    columns[name] = x.shape
                else:
                    values = x.asstr("utf-8")[:] if h5py.check_string_dtype(x.dtype) else x[:]
                    columns[name] = check_column(path, name, values)
    return columns, attrs


def check_storage(path, name, x, shape):
    """Fails if shape, type or size of dataset x are not the schema's, before anything of it is read."""
    if x.shape != shape:
        fail(f"{path}: {name}: shape {x.shape}, expected {shape}: image has {shape[0]} rows")
    text = h5py.check_string_dtype(x.dtype) or x.dtype.kind in "iu"     # 1.0 is not "1"
    kinds = dict.fromkeys(TEXTS, (text, "text or whole numbers"))
    kinds["image"] = x.dtype == np.uint8 or x.dtype.kind == "f", "uint8 or float in [0,1]"
    kinds["mask"] = x.dtype == np.uint8, "uint8"
    good, expected = kinds.get(name, (x.dtype.kind in "biuf", "numbers"))
    if not good:
        fail(f"{path}: {name}: type {x.dtype}, expected {expected}")
    # A few kB can declare terabytes.
    stored, each = x.id.get_storage_size(), x.dtype.itemsize * np.prod(shape[1:], dtype=float)
    if stored == 0:
        fail(f"{path}: {name}: declared but never written; write the file again")
    if each > (4e9 if name in PIXELS else 1000) or x.nbytes > max(50e9, 2000 * stored):
        fail(f"{path}: {name}: declares {each:.3g} bytes a row, {x.nbytes / 1e9:.0f} GB in all, but stores "
             f"{stored / 1e6:.3g} MB; refused as damaged or hostile")


def check_column(path, name, x, lines=None):
    """Check the values of one (N,) column -> the column in its schema type. NaN and "" are missing,
    but label, event and slice need a number in each row.

    An error names the row, or the line of a table or the file that `lines` gives."""
    def refuse(bad, why):
        if bad.any():
            row = int(np.argmax(bad))
            where = f"{name}[{row}]" if lines is None else f"{lines[row]}: {name}"
            fail(f"{path}: {where}: {x[row]!s:.40} {why} ({int(bad.sum())} such rows)")

    if name in TEXTS:
        x = np.array([str(v).strip() for v in x])
        refuse(np.char.str_len(x) > 200, "... is longer than 200 characters")
        if name == "subject":
            refuse(np.isin(x, ["", "nan", "NaN", "None"]), "is an empty id; every row needs its subject")
        if name == "split":
            refuse(~np.isin(x, ["train", "val", "test"]), "is none of train, val, test")
        return x
    x = x.astype(np.uint8) if x.dtype == bool else x
    refuse(abs(x.astype(float)) > 3e38, "is infinite")   # as the float32 that it becomes
    if name in ("label", "slice"):
        refuse(~((x == np.floor(x)) & (x >= 0) & (x < 2 ** 31)), "is not a whole number from 0 to 2147483647")
        return x.astype(np.int64)
    if name == "event":
        refuse(~np.isin(x, [0, 1]), "is neither 0 (censored) nor 1")
        return x.astype(np.uint8)
    if name in ("view", "phase"):
        refuse(~(np.isin(x, [-1, 0, 1]) | np.isnan(x)), "is neither 0 nor 1; NaN or -1 is missing")
        return np.where(x == -1, np.nan, x) if (x == -1).any() else x
    if name == "time":
        refuse(x <= 0, "is not a time > 0 in days")
    return x.astype(np.float32) if name in ("age", "session", "time") else x


def check_split(path, subject, split):
    """Fails if a subject is in more than one part."""
    parts = pd.Series(split).groupby(subject).nunique()
    both = parts.index[parts > 1]
    if len(both):
        fail(f"{path}: split: {len(both)} subjects are in more than one part: {', '.join(both[:5])}; "
             "put each subject in one part")


def h5_files(path):
    """A file, or those of a folder -> their names."""
    if not os.path.isdir(path):
        return [str(path)]
    names = sorted(p for p in os.listdir(path)
                   if p.endswith((".h5", ".hdf5")) and not p.startswith("."))       # a Mac's ._a.h5
    return [os.path.join(path, p) for p in names] or fail(f"{path}: a folder without .h5 files")


def load(path, size=None, max_gb=4.0):
    """Read a file, or a folder of one file per subject -> Dataset. Runs every check, see check().

    size resizes 2D images in-plane, others than squares are padded first. What is larger than max_gb stays
    on disk, as Rows. Warnings go to stderr, a problem is one line and exit 2."""
    path, parts = str(path), []
    paths = h5_files(path)
    for p in tqdm(paths, "opening", delay=2, leave=False, disable=None):
        parts.append(read_columns(p))
        (here, mine), (first, attrs) = parts[-1], parts[0]
        shape = first["image"][1:]
        facts = ("image size", here["image"][1:], shape), ("datasets", sorted(here), sorted(first)), *(
            (k, mine.get(k), attrs.get(k)) for k in ("label_names", "mask_names"))
        for what, its, others in facts:
            if its != others:
                fail(f"{p}: {what} {its} but {others} in {paths[0]}; all files need the same")
    if size and len(shape) == 3:
        fail(f"{path}: image: volumes of {shape}, but slices are needed; ldae.py takes volumes, and `python "
             "data.py images FOLDER_OF_SCANS OUT.h5 --slice axial:mid` cuts slices of NIfTI files")
    if size and shape != (size, size):
        padded = "padded to squares and " if shape[0] != shape[1] else ""
        print(f"{path}: images of {shape[0]}x{shape[1]} are {padded}resized to {size}x{size}; see --size")
    size = None if shape == (size, size) else size
    columns = {k: np.concatenate([c[k] for c, _ in parts]) for k in first if k not in PIXELS}
    subject, split = columns.pop("subject"), columns.pop("split", None)
    twice = [s for s, n in Counter(s.casefold() for s in set(subject)).items() if n > 1]
    if twice:
        fail(f"{path}: subject: {', '.join(twice[:5])}: written in small and in capital letters; choose one")
    if split is not None:
        check_split(path, subject, split)
    counts = [c["image"][0] for c, _ in parts]
    image, mask = (Rows(k, paths, counts, shape, size) if k in first else None for k in PIXELS)
    digest = hashlib.sha256(repr((image.shape, subject.tolist())).encode())
    if image.nbytes * (2 if mask else 1) <= max_gb * 1e9:
        image, mask = image[:], mask[:] if mask else None
        if all(x.min() == x.max() for x in image):
            fail(f"{path}: image: every image is constant; was the file written completely?")
        digest.update(image)
    else:
        for row in np.unique(np.linspace(0, len(image) - 1, 64).astype(int)):
            digest.update(image[[row]])
    return Dataset(path, image, mask, subject, columns, split, attrs, attrs.get("label_names", []),
                   digest.hexdigest()[:16])


def check(path):
    """Verify a file or folder to the last pixel -> Dataset; the first problem exits 2."""
    data = load(path)
    for pixels in filter(lambda x: isinstance(x, Rows), (data.image, data.mask)):   # load() left them on disk
        for rows in np.array_split(np.arange(len(pixels)), pixels.nbytes // 2 ** 26 + 1):     # 64 MB each
            pixels[rows]
    return data


def split(data, seed=0, fractions=(0.7, 0.1, 0.2), fold=""):
    """-> (N,) "train"/"val"/"test": the stored split, else by subject, stratified by label.

    fold "k/K", k from 0: whatever is stored, every K-th subject is in test, from the k-th on, and of the
    others a share of val and train as in `fractions`. So each subject is in test in one of K folds.

    A function of (seed, subject, label) only: row and file order do not matter. A subject's label is
    its largest; classes of fewer than 3 subjects are pooled. No part is empty where that can be."""
    if data.split is not None and not fold:
        return data.split
    subjects, row_of = np.unique(data.subject, return_inverse=True)
    label = np.zeros(len(subjects), int)
    np.maximum.at(label, row_of, data.columns.get("label", np.zeros(len(data), int)))
    values, size = np.unique(label, return_counts=True)
    label[np.isin(label, values[size < 3])] = -1
    order = [hashlib.sha256(f"{seed} {s}".encode()).hexdigest() for s in subjects]
    part = np.empty(len(subjects), "<U5")
    if fold:
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", fold)
        k, n = map(int, found.groups()) if found else (0, 0)
        if not k < n or not 2 <= n <= len(subjects):
            fail(f"--fold {fold}: expected k/K, as in 0/5 to 4/5; K from 2 to the {len(subjects)} subjects")
        by_label = np.array(sorted(range(len(subjects)), key=lambda i: (label[i], order[i])))
        rest = np.delete(by_label, np.s_[k::n])
        every = round((fractions[0] + fractions[1]) / fractions[1])
        part[by_label[k::n]], part[rest], part[rest[every // 2::every]] = "test", "train", "val"
        return part[row_of]
    for value in np.unique(label):
        members = sorted(np.flatnonzero(label == value), key=lambda i: order[i])
        exact = np.array(fractions) * len(members) / sum(fractions)
        count = np.floor(exact + 1e-9).astype(int)
        for k in np.argsort(-(exact - count), kind="stable")[:len(members) - count.sum()]:
            count[k] += 1  # largest remainder
        for k in (0, 2, 1):  # when there are too few, train comes first and val last
            if count[k] == 0 and fractions[k] > 0 and count.max() > 1:
                count[count.argmax()] -= 1
                count[k] += 1
        part[members] = np.repeat(["train", "val", "test"], count)
    return part[row_of]


def wall_borders(mask, angles):
    """Walks outwards from the centre of the cavity. mask (H,W): 1 cavity, 2 wall, 0 others; angles (n,).

    -> centre (row, column); radii (n,) of the wall's inner and outer border in pixels, at least 2 apart."""
    middle = np.argwhere(mask == 1 if (mask == 1).sum() > 5 else mask > 0).mean(0)     # an apex has no cavity
    steps, edge = np.arange(0, max(mask.shape), 0.5), np.array(mask.shape)[:, None, None] - 1
    way = middle[:, None, None] + np.stack([np.sin(angles), np.cos(angles)])[:, :, None] * steps
    met = mask[tuple(np.rint(way).astype(int).clip(0, edge))] * ((way >= 0) & (way <= edge)).all(0)
    last = lambda hit: np.where(hit, steps, 0).max(1)
    inner = ndimage.gaussian_filter1d(last(met == 1), 1, mode="wrap")
    outer = ndimage.gaussian_filter1d(np.maximum(last(met == 2), inner + 2), 1, mode="wrap")
    return middle, inner, np.maximum(outer, inner + 2)


def unwrap(image, mask, size):
    """A heart in the frame of its wall: rows are depth, columns the angle. image, mask (H,W) -> (size,size)

    Row 0 is the cavity's centre. The wall lies between 2/5 and 4/5 of the way down; half a wall follows."""
    angles, depth = np.linspace(0, 2 * np.pi, size, endpoint=False), np.linspace(-1, 1.5, size)[:, None]
    middle, inner, outer = wall_borders(mask, angles)
    radius = np.where(depth < 0, inner * (1 + depth), inner + (outer - inner) * depth)
    at = middle[0] + radius * np.sin(angles), middle[1] + radius * np.cos(angles)
    return ndimage.map_coordinates(image.astype(np.float32), at, order=1, mode="nearest")


def square(mask, size, margin):
    """The square around a mask (H,W), `margin` times as wide -> start, step for resample() to size x size"""
    inside = np.argwhere(mask)
    side = margin * np.ptp(inside, 0).max() + 2
    return (inside.max(0) + inside.min(0) + 1 - side) / 2, np.repeat(side / size, 2)


def crop(image, mask, size, margin=1.3):
    """The square around a heart, `margin` times as wide as its mask. image, mask (H,W) -> (size,size)"""
    return resample(image[None], *square(mask, size, margin), size)[0]


def wrap(flat, image, mask):
    """The reverse of unwrap(): draws `flat` (size,size), a heart in the frame of its wall, onto its slice.

    image, mask (H,W) -> like image. What lies further out than half a wall stays as it is in `image`."""
    middle, inner, outer = wall_borders(mask, np.deg2rad(np.arange(360)))
    y, x = np.indices(image.shape) - middle[:, None, None]
    angle, radius = np.arctan2(y, x) % (2 * np.pi), np.hypot(y, x)
    full = np.linspace(0, 2 * np.pi, 361)
    inner, outer = (np.interp(angle, full, np.append(r, r[0])) for r in (inner, outer))
    depth = np.where(radius < inner, radius / np.maximum(inner, 1e-6) - 1, (radius - inner) / (outer - inner))
    at = (depth + 1) / 2.5 * (len(flat) - 1), angle / (2 * np.pi) * len(flat)
    ring = np.concatenate([flat, flat[:, :1]], 1)           # angle 360 is angle 0
    return np.where(depth < 1.5, ndimage.map_coordinates(ring, at, order=1, mode="nearest"), image)


def load_patients(path, size, margin=1.5):
    """load() with slices and masks cropped: a square around all that a patient's masks show in one view,
    `margin` times as wide. All slices of a patient have one scale: an apex stays small. The greys of a view
    are standardised, too: coil and window decide how bright a scan is, and no drawing can tell that. Black
    is 1.5 SD below the mean, white 3 SD above."""
    data = load(path)
    if data.mask is None or data.image.ndim != 3:
        fail(f"{path}: mask: missing, or not of slices; --frame patient crops around the masks")
    image, mask = (np.empty((len(data), size, size), np.uint8) for _ in PIXELS)
    view = data.columns.get("view", np.zeros(len(data)))
    stacks = np.array([f"{who}, view {v:g}" for who, v in zip(data.subject, view)])
    for stack in np.unique(stacks):
        rows = np.flatnonzero(stacks == stack)
        ids = data.mask[rows]
        if not ids.any():
            fail(f"{path}: mask: empty in all slices of {stack}; --frame image shows whole slices")
        place = square(ids.any(0), size, margin)
        grey = resample(data.image[rows], *place, size)
        grey = (grey - grey.mean()) / max(1e-6, grey.std())
        image[rows] = to_uint8(255 * np.clip((grey + 1.5) / 4.5, 0, 1))
        mask[rows] = resample(ids, *place, size, nearest=True)
    print(f"{path}: a square around each patient's heart, resized to {size}x{size}; see --frame and --size")
    return replace(data, image=image, mask=mask, frame="patient")


def load_framed(path, size, frame="image"):
    """load() with hearts in a frame: image; crop, a square around the wall; wall, see unwrap(); patient, see
    load_patients(). "" is crop if every mask shows a wall, else image. Infarct and no-reflow count as wall:
    disease is not geometry."""
    with open_h5(h5_files(path)[0]) as file:
        has_masks = "mask" in list(file)
    if frame == "image" or not frame and not has_masks:
        return load(path, size)
    if frame == "patient":
        return load_patients(path, size)
    data = load(path)
    kind = ids_by_name(data, ((2, "myo|infarct|reflow|wall"), (0, "rv|right"), (1, "cavity|lv|left")))
    kind[kind > 2] = 0
    images, wrong = np.empty((len(data), size, size), np.uint8), "has no masks of slices"
    if data.mask is not None and data.image.ndim == 3:
        wrong = "" if {1, 2} <= set(kind.tolist()) else "names no LV cavity and no myocardium in mask_names"
    whole = lambda row: (data.image[[row]][0], kind[data.mask[[row]][0]])
    for k in () if wrong else tqdm(range(len(data)), "reading", delay=2, leave=False, disable=None):
        image, mask = whole(k)
        if (mask == 2).sum() < 5:
            wrong = f"has no myocardium in mask[{k}]"
            break
        images[k] = to_uint8((unwrap if frame == "wall" else crop)(image, mask, size))
    if wrong and frame:
        fail(f"{path}: {wrong}, so there is no frame {frame}; --frame image needs no masks")
    if wrong:
        print(f"{path}: {wrong}, so images are shown whole; see --frame")
        return load(path, size)
    print(f"{path}: frame {frame or 'crop'}, hearts resized to {size}x{size}; see --frame and --size")
    return replace(data, image=images, mask=None, frame=frame or "crop",
                   whole=whole if frame == "wall" else None)


def on_hearts(data, rows, images):
    """Images (n,size,size) in [0,1] of `rows` as people look at hearts: from the frame of the wall back onto
    their slices, the square around the heart, (n,96,96). In other frames they stay as they are."""
    if data.whole is None:
        return images
    slices, masks = zip(*map(data.whole, rows))
    return np.stack([crop(wrap(x, image / 255, mask), mask, 96, 1.5)
                     for x, image, mask in zip(images, slices, masks)])


def load_study(path, test="", size=None, seed=0, fractions=(0.7, 0.1, 0.2), fold="", frame="image"):
    """-> (Dataset, (N,) "train"/"val"/"test"): path by its split; or path is train and val, `test` is test.

    size: slices are resized to it. fold: see split(). frame: see load_framed()."""
    if test and fold:
        fail(f"--fold {fold}, --test {test}: choose one of them; a fold tests a part of --data")
    data = load_framed(path, size, frame)
    if not test:
        return data, split(data, seed, fractions, fold)
    other = load_framed(test, size, data.frame)
    here, there = ({s.casefold() for s in d.subject} for d in (data, other))     # P01 and p01 are one person
    if both := sorted(here & there):
        fail(f"{test}: subject: {len(both)} are also in {path}: {', '.join(both[:5])}; a subject belongs to "
             "one part")
    if other.image.shape[1:] != data.image.shape[1:]:
        fail(f"{test}: image: {other.image.shape[1:]} but {path} has {data.image.shape[1:]}; give --size")
    if isinstance(data.image, Rows) or isinstance(other.image, Rows):
        fail(f"{path}, {test}: too large to join in memory; put both into one folder, with a split column")
    for key in ("label_names", "mask_names"):
        names = data.attrs.get(key, []), other.attrs.get(key, [])
        if any(n in names[1] and names[1].index(n) != k for k, n in enumerate(names[0])):
            fail(f"{test}: {key} {names[1]} but {path} has {names[0]}; one name needs one number in both")
        if any(a != b for a, b in zip(*names)):
            warn(f"{test}: {key} {names[1]} but {path} has {names[0]}; they count as the same")
    part = split(data, seed, (0.85, 0.15, 0)) if data.split is None else \
        np.where(data.split == "val", "val", "train")

    def join(a, b):
        return None if a is None or b is None else np.concatenate([a, b])
    # A healthy --data has no survival: it is unknown there, and must not hide that of the patients tested.
    known = {"time": np.full(len(data), np.nan, np.float32), "event": np.zeros(len(data), np.uint8)}
    known |= data.columns
    columns = {k: join(known[k], v) for k, v in other.columns.items() if k in known}
    whole = lambda row: data.whole(row) if row < len(data) else other.whole(row - len(data))
    both = {k: join(getattr(data, k), getattr(other, k)) for k in ("image", "mask", "subject")}
    joined = replace(data, path=f"{path} + {test}", columns=columns, split=None, **both,
                     whole=data.whole and whole)
    return joined, join(part, np.full(len(other), "test"))


def numbers(data, name):
    """The column `name` of a Dataset -> (N,) float64. Exits if there is none, or a value is missing."""
    values = data.columns.get(name, np.array(""))
    if values.dtype.kind not in "biuf":
        fail(f"{data.path}: {name}: no such numbers; it has {', '.join(data.columns) or 'no columns'}")
    missing = np.flatnonzero(np.isnan(values))
    if len(missing):
        fail(f"{data.path}: {name}: missing in {len(missing)} rows, as in {missing[0]}; fill in or drop")
    return values.astype(np.float64)


def cohort(data, part, target, has_test_file):
    """Check that the data can answer a normative question. -> part, in which patients are only in "test".

    data.columns[target] > 0 are patients. With a test file of their own, those of --data are left out ("").
    So are images of a patient from before the diagnosis: else the patient would be on both sides."""
    numbers(data, "age")
    ill = numbers(data, target) > 0             # whose label is unknown must not pass for healthy
    part = np.where(ill & (part != "test"), "" if has_test_file else "test", part)
    before = np.isin(data.subject, data.subject[ill]) & ~ill
    part[before] = ""
    if before.any():
        warn(f"{before.sum()} healthy images of people who are also patients are left out")
    for name, rows, least in (("healthy people to train on", part == "train", 1),
                              ("held-out healthy people for the reference", part == "val", 5),
                              ("patients to test", ill & (part == "test"), 1)):
        n = len(np.unique(data.subject[rows]))
        if n < least:
            fail(f"{data.path}: {target}: {n} {name}, at least {least} needed (0: healthy, above: ill)")
    patients = np.flatnonzero(ill & (part == "test"))
    if {"time", "event"} <= set(data.columns):
        people = pd.DataFrame({k: data.columns[k][patients] for k in ("time", "event")})
        people = people.groupby(data.subject[patients])
        several = people.nunique(dropna=False).max(axis=1) > 1
        if several.any():
            fail(f"{data.path}: time, event: subject {several.idxmax()} has several; each needs one")
        events = int(people.first().dropna()["event"].sum())
        if not events:
            fail(f"{data.path}: event: all patients are censored, no survival to regress; drop time")
        if events < 10:
            warn(f"{events} events: too few for Cox regression, its numbers mean nothing")
    return part


class Loader:
    """Batches of named (N,...) arrays (or Rows) on `device`; with `rows` only those, numbered from 0.

    All of it is resident when that fits in limit_gb (uint8 stays uint8, so 10,000 images of 128x128
    take 164 MB); else each batch is gathered from memory or disk."""

    def __init__(self, arrays, device, rows=None, limit_gb=8.0):
        n, *others = {len(a) for a in arrays.values()}
        if others:
            raise ValueError(f"arrays of different lengths: {n}, {others}")
        self.arrays, self.device, limit = arrays, torch.device(device), limit_gb * 1e9
        self.rows = np.arange(n) if rows is None else np.asarray(rows)
        if self.device.type == "cuda":  # half of what is free: the network needs the rest
            limit = min(limit, torch.cuda.mem_get_info(self.device)[0] / 2)
        self.resident = len(self.rows) / n * sum(a.nbytes for a in arrays.values()) <= limit
        if self.resident:
            self.arrays = {k: self.tensor(a[self.rows]) for k, a in arrays.items()}

    def __len__(self):
        return len(self.rows)

    def tensor(self, x):
        if x.dtype != np.uint8:         # MPS has no float64
            x = x.astype(np.float32 if x.dtype.kind == "f" else np.int64, copy=False)
        return self.to_device(torch.from_numpy(np.ascontiguousarray(x)))

    def to_device(self, x):
        """x on the device. Pinned memory is copied there without waiting for what a GPU is doing."""
        if self.device.type == "cuda" and not x.is_cuda:
            x = x.pin_memory()
        return x.to(self.device, non_blocking=True)

    def batch(self, rows):
        """Row numbers (B,), numpy or torch on any device -> dict of tensors: image (B,1,*S) float32 in
        [-1,1]; mask (B,*S) and other integers int64; floats float32."""
        rows = torch.as_tensor(rows)
        if self.resident:
            rows = self.to_device(rows)
            batch = {k: a[rows] for k, a in self.arrays.items()}
        else:
            rows = self.rows[rows.cpu().numpy()]
            batch = {k: self.tensor(a[rows]) for k, a in self.arrays.items()}
        for name, x in batch.items():
            if name == "image" and x.dtype == torch.uint8:
                batch[name] = (x.float() / 127.5 - 1).unsqueeze(1)
            elif x.dtype == torch.uint8:
                batch[name] = x.long()
        return batch


# ---------------------------------------------------------------------------------------------------
# Writing

PACKED = dict(compression="gzip", compression_opts=4, fletcher32=True)      # of one chunk per image


def check_name(out):
    """Exits unless `out` can be the name of a new or an HDF5 file: no other file is ever replaced."""
    if not out.endswith((".h5", ".hdf5")) or os.path.lexists(out) and not h5py.is_hdf5(out):
        fail(f"{out}: expected the name of a new or an HDF5 file, as out.h5")


def write(path, parts, attrs):
    """Write column dicts {name: (n,...)}, one after the other, as schema v1: complete or not at all."""
    check_name(str(path))
    with replacing(path) as part, h5py.File(part, "w") as file:
        fill(file, {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}, attrs)


def write_as_read(out, shape, found, columns, attrs):
    """Write schema v1 while its images are found -> number of subjects, of images.

    found: (row of columns, (n,*shape) uint8, numbers of these n slices in their volume), for n >= 0."""
    check_name(out)
    kept, slices = [], []
    with replacing(out) as part, h5py.File(part, "w") as file:
        pixels = file.create_dataset("image", (0, *shape), np.uint8, maxshape=(None, *shape),
                                     chunks=(1, *shape), **PACKED)
        for row, images, numbers in found:
            pixels.resize(len(kept) + len(images), 0)
            pixels[len(kept):] = images
            kept += [row] * len(images)
            slices += list(numbers)
        if not kept:
            fail(f"{out}: not written: every image is of one grey value in a frame of {shape}")
        columns = {k: x[kept] for k, x in columns.items()}
        fill(file, columns | ({"slice": np.array(slices)} if any(slices) else {}), attrs)
    return len(np.unique(columns["subject"])), len(kept)


def fill(file, columns, attrs):
    """Write columns and attributes into an open file."""
    for name, x in columns.items():
        if x.ndim > 1:
            file.create_dataset(name, data=x, chunks=(1, *x.shape[1:]), **PACKED)
        elif x.dtype.kind in "UO":
            file.create_dataset(name, data=x.astype(object), dtype=h5py.string_dtype())
        else:
            x = x.astype(np.float32) if x.dtype == np.float64 else x
            file.create_dataset(name, data=x, chunks=x.shape, fletcher32=True)
    file.attrs.update(attrs)


# ---------------------------------------------------------------------------------------------------
# Edges: the drawing that cond_ldm.py turns into a picture

EDGES = ("full", "sparse", "mask", "none")
CINE = ["background", "LV cavity", "myocardium", "RV cavity"]  # the mask ids of all cine files written here
CINE_NAMES = dict(mask_names=CINE, view_names=["SA", "LA"], phase_names=["ED", "ES"])


def canny(image, sigma, low, high, tissue):
    """Canny's edges of (H,W) float -> (H,W) bool, the same pixels as skimage.feature.canny.

    low, high: quantiles of the slopes where tissue, (H,W) bool."""
    smooth, inside = (ndimage.gaussian_filter(x, sigma, mode="constant") for x in (image, image * 0 + 1))
    smooth /= inside + np.finfo(image.dtype).eps          # at the border: the mean of what is there
    down, right = (ndimage.sobel(smooth, axis) for axis in (0, 1))
    slope = np.sqrt(down * down + right * right)
    low, high = np.quantile(slope[tissue], [low, high])
    # Thinning: a pixel stays if the slope is nowhere larger one step up or down the gradient.
    i, j = 1 + np.stack(np.nonzero(slope[1:-1, 1:-1] >= max(low, 1e-9)))
    step = np.stack([down[i, j], right[i, j]]) / np.maximum(abs(down[i, j]), abs(right[i, j]))
    sides = [ndimage.map_coordinates(slope, [i, j] + s * step, order=1) for s in (1, -1)]
    thin = np.zeros(image.shape, bool)
    thin[i, j] = np.maximum(*sides) <= slope[i, j]
    # Hysteresis: a weak edge stays where it touches a strong one.
    return ndimage.binary_propagation(thin & (slope >= high), np.ones((3, 3)), thin)


def edges(image):
    """(N,H,W) uint8 -> (N,H,W) bool: Canny's edges without the noise and without short ones.

    Thresholds are quantiles of the slope over the tissue (brighter than 5 % of full scale): padding and air
    have no say."""
    side, found = max(image.shape[1:]), np.zeros(image.shape, bool)
    for k, x in enumerate(image):
        tissue = x > 13
        if tissue.any():
            part, _ = ndimage.label(canny(x / 255.0, max(1.0, side / 170), 0.5, 0.8, tissue), np.ones((3, 3)))
            found[k] = (part > 0) & (np.bincount(part.ravel()) >= side // 16)[part]
    return found


def strokes(found, rng):
    """(N,H,W) bool edges -> (N,H,W) bool: 2 to 8 of each image's edges, as a user would draw.

    Edges are cut where they branch, and long ones are likelier. The images draw from rng in turn."""
    out = np.zeros_like(found)
    for k, x in enumerate(found):
        near = ndimage.convolve(x.astype(np.uint8), np.ones((3, 3), np.uint8), mode="constant")
        part, count = ndimage.label(x & (near <= 4), np.ones((3, 3)))    # itself and 3 neighbours: no branch
        length = np.bincount(part.ravel(), minlength=count + 1)
        length[0] = 0
        length[length < max(x.shape) // 24] = 0                          # nobody draws specks
        wanted = min(int(rng.integers(2, 9)), np.count_nonzero(length))
        if wanted:
            out[k] = np.isin(part, rng.choice(count + 1, wanted, replace=False, p=length / length.sum()))
    return out


def edge_map(image, mask=None, mode="full", rng=None):
    """One of EDGES for N images -> (N,H,W) bool. image: (N,H,W) uint8, or the bool edges() found before.

    full: edges(image). sparse: a few strokes() of them, drawn from rng, a numpy Generator. mask: only the
    contours of the label map, each on the side of the larger id. none: nothing."""
    if mode == "none":
        return np.zeros(image.shape, bool)
    if mode == "mask":
        cross = np.array([[[0, 1, 0], [1, 1, 1], [0, 1, 0]]], bool)
        return ndimage.minimum_filter(mask, footprint=cross) < mask
    found = image if image.dtype == bool else edges(image)
    return found if mode == "full" else strokes(found, rng)


def ids_by_name(data, kinds):
    """-> (256,) uint8 that takes a mask id of a Dataset to the number of its kind, to 255 if it has no name.

    kinds: (number, pattern); the first that a name matches counts; 254 if none does. The names are those of
    the file: the attribute mask_names, or text in `mask` such as ACDC's "0 background, 1 RV cavity"."""
    table = np.full(256, 255, np.uint8)
    names = data.attrs.get("mask_names") or str(data.attrs.get("mask", ""))
    for k, name in enumerate(names.split(",") if isinstance(names, str) else names):
        number = re.match(r"\s*(\d\d?)\b", name)
        kind = next((i for i, pattern in kinds if re.search(pattern, name.lower())), 254)
        table[int(number[1]) if number else k] = kind
    return table


def cine_ids(data):
    """-> (256,) uint8 that takes the mask ids of a Dataset to those of CINE: cine_ids(data)[mask].

    Fails if the file does not name these four, or a value has no name."""
    table = ids_by_name(data, ((2, "myo"), (3, "rv|right"), (1, "lv|left"), (0, "background")))  # LV myo: 2
    need = f"needs {', '.join(CINE)} once each in the attribute mask_names, in the order of its ids"
    if data.mask is None or sorted(table[table < 255]) != [0, 1, 2, 3]:
        names = data.attrs.get("mask_names") or data.attrs.get("mask")
        fail(f"{data.path}: mask: {'missing' if data.mask is None else f'names {names}'}; {need}")
    for k in range(len(data.mask)):
        mask = data.mask[[k]]
        if (table[mask] > 3).any():
            fail(f"{data.path}: mask[{k}]: holds {np.unique(mask)}, not all of them named; {need}")
    return table


def view_phase(columns, n):
    """Columns view and phase -> (n,2) float32: -1 for SA and ED, 1 for LA and ES, 0 where not known."""
    known = [columns.get(k, np.full(n, np.nan)) for k in ("view", "phase")]
    return np.stack([np.select([k == 0, k == 1], [-1, 1], 0) for k in known], 1).astype(np.float32)


def load_drawings(path, size, edges, with_mask, frame="image"):
    """A user's drawings in HDF5: edges (N,H,W), not 0 on a line; mask (N,H,W) uint8; view, phase (N,). Or
    a data set of slices without edges: those of its images, in this frame, and its masks are the drawings.

    edges: the model's --edges, one of EDGES or mixed; with_mask: whether the model reads masks. What the
    model does not read may be missing. -> {edges, mask: (N,size,size), kind: view_phase} for Loader, and the
    subject (N,) of a data set."""
    with open_h5(h5_files(path)[0]) as file:
        without_edges = {"image", "subject"} <= {*file} and "edges" not in {*file}
    if without_edges:
        data = load_framed(path, size, frame)
        arrays = {"kind": view_phase(data.columns, len(data)), "subject": data.subject}
        if with_mask:
            arrays["mask"] = cine_ids(data)[data.mask[:]]
        kind, rng = edges.replace("mixed", "full"), np.random.default_rng(0)
        lines = edge_map(data.image[:], arrays.get("mask"), kind, rng)
        return arrays | {"edges": lines.astype(np.uint8)}
    need = ["edges"] * (edges in ("full", "sparse")) + ["mask"] * with_mask
    with open_h5(path) as file:
        found = {*need, "edges", "view", "phase"} & {*file}     # `k in file` would open what a link points to
        stored = {k: x for k in found if (x := plain(file, path, k)) is not None}
        attrs = read_attrs(file) | read_attrs(stored.get("mask", file))
        read = {k: x[...] for k, x in stored.items()}
    missing = [k for k in need if k not in read]
    if missing:
        fail(f"{path}: {' and '.join(missing)} missing; this model draws from {' and '.join(need)} ({edges})")
    n = max(1, len(np.atleast_1d(read["mask" if with_mask else "edges"])))
    for k, x in read.items():
        shape = (n, size, size) if k in ("edges", "mask") else (n,)
        if x.shape != shape or x.dtype.kind not in "biuf" or k == "mask" and x.dtype != np.uint8:
            fail(f"{path}: {k}: {x.dtype} {x.shape}, expected numbers (uint8 of a mask) {shape}")
    arrays, lines = {"kind": view_phase(read, n)}, read.get("edges", np.zeros((n, size, size))) != 0
    if with_mask:
        arrays["mask"] = cine_ids(SimpleNamespace(path=path, mask=read["mask"], attrs=attrs))[read["mask"]]
    if edges in ("mask", "none"):       # whatever was drawn: the model has seen no other lines
        lines = edge_map(lines, arrays.get("mask"), edges)
    return arrays | {"edges": lines.astype(np.uint8)}


# ---------------------------------------------------------------------------------------------------
# Phantoms. A subject depends on (seed, number) only.

class Picture:
    """Grey values that are painted in layers; a layer fades in over about a pixel at its border."""
    def __init__(self, sharp):
        self.sharp = sharp      # per unit of distance

    def inside(self, distance):
        """Signed distance, negative inside -> share of a pixel that lies inside: smooth partial volume."""
        return 0.5 - 0.5 * np.tanh(distance * self.sharp)

    def rimmed(self, rim, width, colour, distance):
        """Paint what lies inside, with a rim of another colour around it."""
        self.over(rim, self.inside(distance - width))
        self.over(colour, self.inside(distance))

    def over(self, colour, share, label=None):
        """Paint over what is there; label: id in self.mask where this layer has most of a pixel."""
        self.grey = self.grey + (colour - self.grey) * share
        if label is not None:
            self.mask[share > 0.5] = label


def turned(x, y, angle):
    """x, y in axes that are turned by so many radians."""
    c, s = float(np.cos(angle)), float(np.sin(angle))
    return c * x + s * y, c * y - s * x


def ellipse(at, radii, corners=1):
    """Signed distance, to first order, to the ellipse or ellipsoid of these radii; negative inside."""
    e = corners * np.sqrt(sum((c / r) ** 2 for c, r in zip(at, radii))) + 1e-3
    return e * (e - 1) / np.sqrt(sum((c / r ** 2) ** 2 for c, r in zip(at, radii)) + 1e-9)


def smooth_noise(rng, n, size, cell, shared=0.8):
    """(n,size,size) noise of sd 1 with features of `cell` px at 128, alike in neighbouring slices."""
    knots = 128 // cell + 4
    grid = shared * rng.standard_normal((knots, knots)) \
        + np.sqrt(1 - shared ** 2) * rng.standard_normal((n, knots, knots))
    place = (np.arange(size) + 0.5) * 128 / size / cell + 1.5
    weight = np.exp(-0.5 * ((place[:, None] - np.arange(knots)) / 0.6) ** 2)
    noise = weight @ grid @ weight.T
    return noise / noise.std()


def lung(rng, pixel, fine, coarse):
    """(n,size,size) grey values of lung with 45 vessels; pixel (size,) runs from about -48 to 48."""
    image = rng.uniform(0.05, 0.2) + 0.02 * fine + 0.02 * coarse
    spot = rng.uniform(-48, 48, (2, 1, 1, 45)) + rng.normal(0, 4, (2, len(fine), 1, 45))  # drift over slices
    down, across = np.exp(-0.5 * ((pixel[:, None] - spot) / rng.uniform(0.5, 1.5, 45)) ** 2)
    return image + 0.3 * (down * rng.uniform(0.2, 1, 45)) @ across.transpose(0, 2, 1)


def rician(rng, image, sigma):
    """Image with Rician noise, in [0,1]."""
    real, imaginary = rng.standard_normal((2, *image.shape), np.float32) * sigma
    return np.clip(np.sqrt((image + real) ** 2 + imaginary ** 2), 0, 1)


def scanner(rng, image, fine, coarse, slope, noise=1.0):
    """Texture, contrast, surface-coil bias (along slope), Rician noise -> (n,size,size) uint8, the gamma.

    noise scales the sd, which falls as pixels grow."""
    n, size, _ = image.shape
    gamma, sigma = np.exp(rng.normal(-0.05, 0.12)), rng.uniform(0.018, 0.03) * size / 128
    image = np.clip(image * (1 + 0.03 * fine + 0.03 * coarse), 0, None) ** gamma
    bias = np.exp(0.12 * smooth_noise(rng, 1, size, 64) + rng.uniform(0.0, 0.2) * slope / 64)
    image = image * bias / bias.mean() * rng.normal(1, 0.03, (n, 1, 1))
    return to_uint8(255 * rician(rng, image, sigma * noise)), gamma


def phantom_file(path, command, names, draw, attrs):
    """Write what draw(i) -> columns makes of each subject of `names`; command: of `data.py phantom`."""
    table = []
    print(f"{path}: drawing {len(names)} phantoms", flush=True)
    for i, name in enumerate(tqdm(names, "drawing", leave=False, disable=None)):
        columns = draw(i)
        table.append(columns | dict(subject=np.repeat(name, len(columns["image"]))))
    write(path, table, attrs | dict(source=f"python data.py phantom {command}", licence="CC0"))


# ---------------------------------------------------------------------------------------------------
# Phantom hearts: late gadolinium enhancement in short axis, as EMIDEC shows it

UNIT = 1.3  # mm: the lengths below are in these
HEART = ["background", "LV cavity", "myocardium", "infarct", "no-reflow"]  # EMIDEC's mask ids


def heart(rng, size, infarcted):
    """One subject of phantom_hearts -> its columns, 6-8 slices from base to apex."""
    n = int(rng.integers(6, 9))
    z = ((np.arange(n) + 0.5) / n)[:, None, None]                       # 0 base ... 1 apex
    age, male = np.clip(rng.normal(60, 12), 25, 90), rng.random() < 0.7

    # Pose. Each slice is its own breath-hold. The frame is 125 mm wide, y points up.
    shift, tilt, breath = rng.normal(0, 4, 2), rng.normal(0, 2.5, 2), rng.normal(0, 0.8, (2, n, 1, 1))
    rotation, scale, stretch = np.array([14, 0.06, 0.03]) * rng.normal(0, 1, 3)
    dx, dy = (np.clip(s, -14, 14) + t * (z - 0.5) + b for s, t, b in zip(shift, tilt, breath))
    scale, stretch = np.exp(np.clip(scale, -.15, .15)), np.exp(stretch)
    pixel = ((np.arange(size) + 0.5) / size - 0.5) * 125 / UNIT
    x, y = turned(pixel[None, None, :] - dx, -pixel[None, :, None] - dy, np.deg2rad(rotation))
    x, y = x / (scale * stretch), y / (scale / stretch)
    rho, angle = np.sqrt(x * x + y * y) + 1e-3, np.arctan2(y, x)      # 0 lateral, 90 anterior, 180 septum

    def ripple(k, amount):
        return amount * np.cos(k * angle - rng.uniform(0, 2 * np.pi))

    # Left ventricle: cavity, wall; the right one is an ellipse behind it.
    radius = np.clip(rng.normal(20 + male, 2), 15, 26) * (1 - 0.5 * z ** 2.4)
    thick = np.clip(rng.normal(9.5 + 0.04 * (age - 60), 1.0), 6.5, 13) * (1 - 0.15 * z ** 2)
    endo = radius * (1 + ripple(2, 0.04) + ripple(3, 0.03) + ripple(5, 0.008) + ripple(9, 0.01))
    wall = thick * (1 + ripple(1, 0.06) + ripple(2, 0.05))
    d_endo, d_epi = rho - endo, rho - endo - wall
    outer = radius + thick
    width = rng.normal(22, 2.5) * np.sqrt(np.clip(1 - (z / 0.98) ** 2.2, 0, 1))
    a, b = 0.28 * outer + width, outer * (1.02 - 0.25 * z ** 2) * rng.normal(1, 0.05)
    rx, ry = x + 0.72 * outer, y + rng.normal(2.5, 1.5) - 0.18 * (x + outer)
    d_rv = ellipse((rx, ry), (a, b), 1 + 0.07 * np.cos(3 * np.arctan2(ry, rx) + 0.5))
    d_heart = np.minimum(d_epi, d_rv - 2.2)

    # Grey values as the inversion time leaves them: myocardium nulled, blood and scar medium, fat bright.
    blood, muscle = rng.uniform(0.52, 0.72), rng.uniform(0.12, 0.28)
    scar_grey, fat = blood * rng.uniform(0.85, 1.1), rng.uniform(0.75, 0.95)
    coarse, fine = smooth_noise(rng, n, size, 14), smooth_noise(rng, n, size, 4, 0.3)

    # Thorax: lung with vessels, liver below, stomach, aorta, chest wall to the upper left.
    picture = Picture(0.8 / max(0.75, 125 / UNIT / size))
    picture.grey = lung(rng, pixel, fine, coarse)
    over, inside, rimmed = picture.over, picture.inside, picture.rimmed
    lean = rng.normal(0, 0.1)
    d_liver = rng.normal(37, 3) - 6 * z + y * np.cos(lean) + x * np.sin(lean) + 0.004 * (x + 20) ** 2
    rimmed(fat * 0.85, 3, rng.uniform(0.26, 0.4) + 0.03 * fine + 0.02 * coarse, d_liver)
    sx, sy = rng.normal(48, 6), rng.normal(-50, 4)
    d_stomach = np.sqrt((x - sx) ** 2 + 1.3 * (y - sy) ** 2) - rng.uniform(12, 22)
    over(rng.uniform(0.3, 0.5), inside(d_stomach))
    over(0.08 + 0.06 * abs(coarse), inside(d_stomach + 3))
    ax, ay = rng.normal(47, 3), rng.normal(-30, 3)
    d_aorta = np.sqrt((x - ax) ** 2 + (y - ay) ** 2) - rng.uniform(6, 8)
    rimmed(0.25, 1.5, blood * 1.05, d_aorta)
    d_chest = rng.normal(46, 3) + 0.62 * x - 0.78 * y + 0.003 * (0.78 * x + 0.62 * y) ** 2
    over(0.3 + 0.08 * coarse, inside(d_chest))
    along = np.cos((0.78 * x + 0.62 * y) / rng.uniform(4.5, 6) + rng.uniform(0, 6))
    over(0.55, inside(np.maximum(abs(d_chest + 5) - 2.5, 3 * (0.3 - along))))
    over(fat, inside(d_chest + 11 + 2 * coarse))

    # Fat around the heart, the heart itself, its papillary muscles (in mid slices only).
    rim = 2.2 + ripple(1, 2.5) + ripple(2, 2.0) + 0.8 * coarse
    over(fat * 0.9, inside(np.maximum(d_chest, 0) + d_heart - rng.uniform(4, 18) - 2 * coarse))
    over(fat, inside(d_heart - np.maximum(rim, 0)) * np.clip(rim, 0, 1))
    rimmed(muscle * 0.6, 0.8, muscle, d_heart)
    over(blood * rng.normal(1, 0.04) + 0.03 * coarse, inside(np.maximum(d_rv, 0.8 - d_epi)))
    over(blood + 0.02 * coarse, inside(d_endo))
    belly = np.sqrt(np.clip(1 - ((z - 0.5) / 0.38) ** 2, 0, 1))
    for at in np.deg2rad(rng.normal([35, 238], 8)):
        px, py = 0.66 * radius * np.cos(at), 0.66 * radius * np.sin(at)
        over(muscle * 1.2, inside(np.sqrt((x - px) ** 2 + (y - py) ** 2) - 0.21 * radius * belly) * belly)

    # Infarct: from the endocardium outwards (wavefront), in one coronary territory.
    territory = rng.choice(3, p=[0.45, 0.33, 0.22])
    centre = np.deg2rad([118, 245, 345][territory] + rng.normal(0, 10))
    half = np.deg2rad(rng.uniform(40, 90))
    middle, reach = rng.uniform([0.4, 0.2, 0.2], [0.8, 0.7, 0.7])[territory], rng.uniform(0.3, 0.65)
    deepest, core = rng.uniform(0.5, 1.1), rng.random() < 0.45
    taper = np.sqrt(np.clip(1 - ((z - middle) / reach) ** 2, 0, 1)) * infarcted
    taper = np.where(taper > 0.3, taper, 0)
    away = abs((angle - centre + np.pi) % (2 * np.pi) - np.pi) / (half * np.maximum(taper, 0.3))
    dome = np.clip(1 - away ** 2, 0, 1) ** 0.35 * (1 + 0.12 * coarse)
    depth = np.minimum(deepest * np.sqrt(taper) * dome, 1)              # share of the wall, 0 = no scar
    d_scar = np.maximum(-d_endo, d_endo - depth * wall)
    over(scar_grey, inside(d_scar) * np.clip(depth / 0.15, 0, 1))
    d_core = np.maximum(abs(d_endo - 0.42 * depth * wall) - 0.17 * depth * wall, (away - 0.4) * half * rho)
    d_core = np.where(core & (deepest > 0.6) & (depth > 0.6), d_core, 9)
    over(muscle, inside(d_core))
    scar = (d_scar < 0) & (depth > 0.08)
    mask = np.select([d_endo < 0, scar & (d_core < 0), scar, d_epi < 0], [1, 4, 3, 2]).astype(np.uint8)

    image, gamma = scanner(rng, picture.grey, fine, coarse, y - x)
    fraction = infarct_fraction(mask)
    factors = dict(infarct_fraction=fraction, transmurality=np.where(fraction > 0, depth.max((1, 2)), 0),
                   wall_thickness=(thick * scale * UNIT).ravel(), lv_radius=(radius * scale * UNIT).ravel(),
                   x=(dx * UNIT).ravel(), y=(dy * UNIT).ravel(), rotation=np.full(n, rotation),
                   contrast=np.full(n, blood ** gamma - muscle ** gamma))
    return dict(image=image, mask=mask, slice=np.arange(n), label=np.full(n, int(infarcted)),
                has_infarct=(fraction > 0).astype(np.uint8), infarct_fraction=fraction, age=np.full(n, age),
                sex=np.full(n, "M" if male else "F"), **{f"factor_{k}": v for k, v in factors.items()})


def infarct_fraction(mask):
    """EMIDEC label maps (n,H,W) -> (n,) share of the myocardium (2, 3, 4) that is infarct (3, 4)."""
    return (mask >= 3).sum((1, 2)) / np.maximum((mask >= 2).sum((1, 2)), 1)


def phantom_hearts(out, subjects=100, seed=0, size=128):
    """Write LGE short-axis hearts with known causes; two thirds infarcted, mask ids as EMIDEC's.

    factor_*: x, y (right, up), lv_radius, wall_thickness in mm (the frame is 125 mm wide); rotation in
    degrees; shares infarct_fraction and transmurality; contrast = blood - myocardium of full scale."""
    phantom_file(out, f"hearts --subjects {subjects} --seed {seed} --size {size}",
                 [f"heart{seed}-{i:03d}" for i in range(subjects)],
                 lambda i: heart(np.random.default_rng([seed, i]), size, infarcted=i % 3 > 0),
                 dict(spacing_mm=[9.0, 125 / size, 125 / size], label_names=["normal", "pathological"],
                      mask_names=HEART))


# ---------------------------------------------------------------------------------------------------
# Phantom views: one beating heart in short axis and in four chambers, as cine MR shows it. Lengths in mm.

FRAME = 220.0  # an image of phantom_views is this wide


def cine(rng, size, group):
    """One subject of phantom_views -> its columns: 5-7 short-axis slices and a four-chamber view, ED and ES.

    group: 0 healthy, 1 dilated (large and weak), 2 hypertrophic (thick and strong)."""
    who = dict(radius=np.clip(rng.normal([24, 31, 21][group], 1.6), 17, 35),
               wall=np.clip(rng.normal([8.5, 8, 15][group], 1.0), 6, 18),
               ef=np.clip(rng.normal([0.60, 0.27, 0.68][group], 0.04), 0.15, 0.78),
               blood=rng.uniform(0.6, 0.78), muscle=rng.uniform(0.15, 0.25), fat=rng.uniform(0.8, 1.0),
               skin=rng.uniform(7, 20), scale=np.clip(rng.normal(1, 0.05), 0.88, 1.12))
    views = [cine_view(rng, size, n, n == 1, **who) for n in (int(rng.integers(5, 8)), 1)]
    columns = {k: np.concatenate([v[k] for v in views]) for k in views[0]}
    return columns | dict(label=np.full(len(columns["view"]), group))


def cine_view(rng, size, n, long_axis, radius, wall, ef, blood, muscle, fat, skin, scale):
    """n slices of one heart at ED, then the same at ES -> columns of 2n rows."""
    z = np.tile(np.linspace(0.12, 0.86, n) if n > 1 else [0.5], 2)[:, None, None]    # 0 base ... 1 apex
    es = np.repeat([0.0, 1.0], n)[:, None, None]
    shift = np.clip(rng.normal(0, 6, (2, 1, 1, 1)), -14, 14)
    dx, dy = np.tile(shift + rng.normal(0, 1, (2, n, 1, 1)), (1, 2, 1, 1))             # breath-holds differ
    rotation, pixel = rng.normal(0, 7), ((np.arange(size) + 0.5) / size - 0.5) * FRAME
    across = 18 if long_axis else -10
    gx, gy = pixel[None, None, :] - dx - across, -pixel[None, :, None] - dy - 5        # y points up
    x, y = (c / scale for c in turned(gx, gy, np.deg2rad(rotation)))
    coarse, fine = (np.tile(smooth_noise(rng, n, size, *a), (2, 1, 1)) for a in ((14,), (4, 0.3)))
    picture = Picture(0.8 / max(0.8, FRAME / size))
    picture.grey = 0.5 * np.tile(lung(rng, pixel * 96 / FRAME, fine[:n], coarse[:n]), (2, 1, 1))
    over, inside, rimmed = picture.over, picture.inside, picture.rimmed

    def wave(k, amount):
        return amount * np.cos(k * angle - rng.uniform(0, 2 * np.pi))

    # A beat: the base moves towards the apex, and the wall thickens so that its volume stays.
    short = 1 - 0.25 * ef * es                                          # length now / length at ED
    squeeze, grown = 1 - 0.2 * es, 1 + 0.1 * es                         # right ventricle; atria
    length = 84 * np.sqrt(radius / 24) * short
    r = radius * np.sqrt((1 - ef * es) / short)
    t = np.sqrt(r * r + ((radius + wall) ** 2 - radius ** 2) / short) - r
    outer = radius + wall

    # The heart as signed distances. The LV is an ellipsoid, widest 0.3 of its length from the base.
    if long_axis:                                                       # u: base to apex, v: septum to side
        axis = np.deg2rad(rng.normal(48, 5))
        u, v = np.cos(axis) * x + np.sin(axis) * y, np.sin(axis) * x - np.cos(axis) * y
        base, angle = length / short / 2 - length, np.arctan2(v, u)
        valve = base - u + 2 * np.cos(v / 10)                           # < 0: on the side of the ventricles
        w, half = u - base - 0.3 * length, 0.7 * length
        d_endo = np.maximum(ellipse((w, v), (half, r), 1 + wave(7, 0.015)), valve)
        d_epi = np.maximum(ellipse((w, v), (half + 0.75 * t, r + t)), valve)
        wide = outer / 2 + 33 * squeeze
        d_rv = ellipse((w + 0.1 * length, v + outer / 2), (0.6 * length, wide), 1 + wave(3, 0.02))
        d_rv = np.maximum(np.maximum(d_rv, 0.5 - d_epi), valve + 2)
        left = ellipse((u - base + 17 * grown, v + 3), (28 * grown, 25 * grown), 1 + wave(2, 0.04))
        right = ellipse((u - base + 15 * grown, v + outer + 14), (28 * grown, 25 * grown), 1 + wave(2, 0.05))
        d_atria = np.maximum(np.minimum(left, np.maximum(right, 2.5 - left)), 2.5 - valve)
        d_papillary, belly = ellipse((w - 0.12 * half, v - 0.6 * r), (0.25 * half, 3.5)), 0.8
    else:
        rho, angle = np.hypot(x, y), np.arctan2(y, x)                   # 0 lateral, 90 anterior, 180 septum
        part = np.clip(1 - (1 - z) / short, 0, 1)                       # which part is in this plane now
        profile = np.sqrt(1 - ((part - 0.3) / 0.7) ** 2)
        r, t, outer = r * profile, t * (1 - 0.25 * part ** 2), radius * profile + wall
        d_endo = rho - r * (1 + wave(2, 0.04) + wave(3, 0.03) + wave(9, 0.012))
        d_epi = d_endo - t * (1 + wave(1, 0.08))
        wide = 30 * squeeze * np.sqrt(np.clip(1 - (part / 0.93) ** 2.2, 0, 1))
        rx, ry = x + 0.78 * outer, y + 5 - 0.2 * (x + outer)
        d_rv = ellipse((rx, ry), (0.24 * outer + wide, outer * (1.05 - 0.25 * z ** 2) * np.sqrt(squeeze)),
                       1 + 0.09 * np.cos(3 * np.arctan2(ry, rx) + 0.5))
        d_rv, d_atria = np.maximum(d_rv, 0.5 - d_epi), np.full(x.shape, 99.0)
        belly = np.sqrt(np.clip(1 - ((part - 0.55) / 0.4) ** 2, 0, 1))
        at = np.deg2rad(rng.normal([40, 235], 8))[:, None, None, None]
        d_papillary = np.hypot(x - 0.68 * r * np.cos(at), y - 0.68 * r * np.sin(at)).min(0)
        d_papillary -= (0.13 * radius + 1) * belly
    d_heart = np.minimum(np.minimum(d_epi, d_rv - 3), d_atria - 2)

    # The chest wall. Short axis: the front of the chest is to the left. Four chambers: seen from below.
    a, b, cx, cy = (150, 98, -25, -18) if long_axis else (100, 155, 22, -30)
    bx, by = x - cx - rng.normal(0, 3), y - cy - rng.normal(0, 3)
    angle = np.arctan2(by / b, bx / a)
    d_skin = ellipse((bx, by), (a + skin, b + skin), 1 + wave(3, 0.015))
    d_flesh = d_skin + skin * (1 + wave(1, 0.35) + wave(3, 0.2) + wave(5, 0.08))
    d_chest = d_flesh + rng.uniform(8, 11) + wave(4, 2)
    over(0.02, 1 - inside(d_skin))
    over(fat + 0.03 * coarse, inside(d_skin) * (1 - inside(d_chest)))
    over(muscle * 1.1, inside(abs(d_flesh + 5) - 4.5 - wave(6, 1.5)))
    d_rib = np.hypot(d_chest - 4.5, 4.5 * ((14 * angle / np.pi + rng.uniform(0, 2)) % 2 - 1)) - 3
    rimmed(0.06, 1.2, 0.55 * fat, d_rib)

    # Behind and below the heart: back muscles, fat, spine, liver with its veins, descending aorta.
    if long_axis:
        sx, sy = x + rng.normal(22, 4), y + rng.normal(92, 3)
        over(muscle * 1.2, inside(np.maximum(ellipse((sx, sy + 6), (62, 26)), d_chest)))
        d_spine = ellipse((sx, sy), (19, 16))
        ax, ay, d_liver = sx - 27, sy - 20, ellipse((x + 112, y + rng.normal(42, 8)), (48, 40))
    else:
        d_belly = y + rng.normal(41, 2) + 0.0035 * (x - 8) ** 2 + 0.1 * x
        over(fat * 0.55 + 0.13 * coarse + 0.05 * fine, inside(np.maximum(d_belly, d_chest)))
        sx = x - rng.normal(62, 4) + 0.2 * (y + 60)
        over(muscle * 1.3, inside(np.maximum(np.maximum(-sx - 24, y + 42 + 0.3 * sx + 4 * coarse), d_chest)))
        d_disc = abs((y + rng.uniform(0, 30)) % 31 - 15.5) - 13         # between vertebrae 26 mm high
        d_spine = np.maximum(np.maximum(abs(sx) - 16, d_disc), y + 38)
        ax, ay = x - rng.normal(30, 3), (y + 68) / 1.5                  # the aorta is cut aslant
        d_liver = np.maximum(d_belly + 3, x - 12 - 0.3 * (y + 60) - 3 * coarse)
    rimmed(0.08, 1.5, rng.uniform(0.3, 0.42) + 0.03 * fine, d_spine)
    over(0.06, inside(np.maximum(d_liver - 1.5, d_chest)))
    over(rng.uniform(0.24, 0.34) + 0.015 * fine, inside(np.maximum(d_liver, d_chest)))
    vx, vy, thick = rng.uniform([30, 60, 1.5], [60, 105, 4], (6, 3)).T[:, :, None, None, None]
    d_vein = (np.hypot(x + vx, y + vy) - thick).min(0)
    over(blood * 0.8, inside(np.maximum(d_vein, d_liver + 3)))
    d_aorta = np.hypot(ax, ay) - rng.uniform(9, 12)
    rimmed(0.1, 1.5, blood * 1.05 + 0.02 * coarse, d_aorta)

    # Fat on the heart, muscle, blood, trabeculae at the endocardium, papillary muscles.
    angle = np.arctan2(y, x)
    over(fat * 0.85, inside(np.maximum(d_heart - 2.5 - wave(1, 2.5) - wave(3, 1.5) - coarse, d_chest)))
    rimmed(0.06, 0.8, muscle, d_heart)
    over(blood * 0.95 + 0.04 * coarse - 0.07 * np.clip(fine, 0, 2), inside(np.minimum(d_rv, d_atria)))
    over(blood + 0.03 * coarse + 0.02 * fine, inside(d_endo))
    over(muscle, 0.5 * inside(abs(d_endo + 1.5) - 2.5) * inside(2 - 4 * fine) * inside(d_endo))
    over(muscle * 1.1, inside(d_papillary) * belly)

    mask = np.select([d_endo < 0, d_epi < 0, d_rv < 0], [1, 2, 3]).astype(np.uint8)
    image, gamma = scanner(rng, picture.grey, fine, coarse, (y - x) / 2, noise=0.6)
    row = np.zeros((2 * n, 1, 1))
    factors = dict(lv_radius=r * scale, wall_thickness=t * scale, ejection_fraction=ef, x=dx, y=dy,
                   rotation=rotation, contrast=blood ** gamma - muscle ** gamma)
    return dict(image=image, mask=mask, view=np.full(2 * n, long_axis, np.uint8),
                phase=es.ravel().astype(np.uint8), slice=np.tile(np.arange(n), 2),
                **{f"factor_{k}": (row + f).ravel() for k, f in factors.items()})


def phantom_views(out, subjects=60, seed=0, size=128):
    """Write cine hearts, short axis and four chambers, ED and ES; a third each healthy, dilated, thick.

    factor_*: as of hearts, lv_radius and wall_thickness at that phase; x, y and rotation off the view's own
    place; ejection_fraction in [0,1]. The frame is FRAME mm wide."""
    phantom_file(out, f"views --subjects {subjects} --seed {seed} --size {size}",
                 [f"view{seed}-{i:03d}" for i in range(subjects)],
                 lambda i: cine(np.random.default_rng([seed, i]), size, i % 3),
                 dict(CINE_NAMES, spacing_mm=[10.0, FRAME / size, FRAME / size],
                      label_names=["healthy", "dilated", "hypertrophic"]))


# ---------------------------------------------------------------------------------------------------
# Phantom brains: implicit functions of x (right), y (anterior), z (superior) in mm from the anterior
# commissure, so that one drawing serves slices and volumes. Grey values are shares of full scale.

MIDDLE = np.array([0.0, -16.0, 12.0])  # of the frame: the level of the thalami
BRAIN = ["background", "CSF", "grey matter", "white matter", "ventricle", "hippocampus"]


def waves(rng, x, y, z, length, n=8, slope=False, own=None):
    """Sum (sd 1) of n random plane waves of `length` mm at x, y, z; with slope also its three derivatives.

    own: the waves are the same for everybody, but for phases that differ by so much (radians, SD)."""
    common = rng if own is None else np.random.default_rng(7)
    k = common.standard_normal((n, 3))
    k *= 2 * np.pi / length / np.linalg.norm(k, axis=1, keepdims=True)
    total, slopes = 0, [0, 0, 0]
    phases = common.uniform(0, 2 * np.pi, n) + (0 if own is None else rng.normal(0, own, n))
    for (a, b, c), phase in zip(k.tolist(), phases.tolist()):
        angle = a * x + b * y + c * z + phase
        total = total + np.cos(angle) * (2 / n) ** 0.5
        if slope:
            sine = np.sin(angle) * -(2 / n) ** 0.5
            slopes = [s + t * sine for s, t in zip(slopes, (a, b, c))]
    return (total, slopes) if slope else total


def tube(x, y, z, points, tall=1.0):
    """Distance in mm to a chain of (x, y, z, radius); tall > 1 stretches its section along z."""
    best = np.float32(99)
    for (*a, r), (*b, s) in zip(points[:-1], points[1:]):
        a[2], b[2] = a[2] / tall, b[2] / tall
        d = [q - p for p, q in zip(a, b)]
        px, py, pz = x - a[0], y - a[1], z / tall - a[2]
        t = np.clip((px * d[0] + py * d[1] + pz * d[2]) / sum(q * q for q in d), 0, 1)
        away = np.sqrt((px - t * d[0]) ** 2 + (py - t * d[1]) ** 2 + (pz - t * d[2]) ** 2)
        best = np.minimum(best, away - r - t * (s - r))
    return best


def ball(x, y, z, at, radii, tilt=0.0):
    """Distance to the ellipsoid around `at`, turned about z by tilt (radians)."""
    p, q = turned(x - at[0], y - at[1], -tilt)
    return ellipse((p, q, z - at[2]), radii)


def egg(at, radii, p=2.3):
    """e = 1 on an ellipsoid with fuller corners -> e at `at`, unit normal, |grad e|."""
    e = sum(abs(c / r) ** p for c, r in zip(at, radii)) ** (1 / p) + 1e-3
    normal = [np.sign(c) * abs(c / r) ** (p - 1) / r for c, r in zip(at, radii)]
    steep = np.sqrt(sum(c * c for c in normal)) + 1e-9
    return e, [c / steep for c in normal], steep / e ** (p - 1)


def grid(shape, voxel):
    """x, y, z in mm of (D,H,W) voxels around MIDDLE: columns go right, rows back, slices up."""
    up, back, right = ((np.arange(n) + 0.5 - n / 2) * voxel for n in shape)
    return right[None, None] + MIDDLE[0], MIDDLE[1] - back[None, :, None], MIDDLE[2] + up[:, None, None]


def brain(rng, x, y, z, voxel, age=40.0, severity=0.0, alzheimer=0.0, own=1.0):
    """The noise-free T1 picture of one skull-stripped brain, and what it was drawn from.

    rng (freshly seeded) is the individual: the same seed is the same head at any age, in any disease.
    x, y, z: mm, broadcastable to (D,H,W); voxel: mm, the width of partial volume. age: of the brain, years.
    severity (0..1) of motor neuron disease, alzheimer (0..1). own: of the shape that is a person's own; 1 is
    what deformable registration to a template leaves, 3 what affine registration leaves. -> dict of image in
    [0,1], mask (BRAIN), and the share of each voxel that is head, ventricle, hippocampus."""
    x, y, z = (np.asarray(c, np.float32) for c in np.broadcast_arrays(x, y, z))
    picture = Picture(2 / max(1, voxel))
    over, inside = picture.over, picture.inside

    def sided(sd):  # a value of its own in each hemisphere
        right, left = rng.normal(0, sd, 2)
        return np.where(x > 0, np.float32(right), np.float32(left))

    # Ageing: slow at first, faster later. 0 at 20 years, 1 at 80.
    wear = 0.35 * (age - 20) / 60 + 0.65 * max(age - 45, 0) ** 2 / 35 ** 2

    # The individual: warped coordinates; X = distance from the midplane; the surface of the cerebrum.
    warp = [own * (0.36 * waves(rng, x, y, z, 75, 6) + 0.12 * waves(rng, x, y, z, 34)) for _ in range(3)]
    x, y, z = (c + d for c, d in zip((x, y, z), warp))
    X, back, high = abs(x), y + 16, z - 18                             # from the middle of the head
    stretch = np.exp(rng.normal(0, 0.005 * own, 3)).tolist()
    radii = 66 * stretch[0] * (1 - 0.0011 * back), 79 * stretch[1], 58 * stretch[2]
    e, _, steep = egg((x, back, high), radii, 2.1)
    hull = (1 - e) / steep                                             # depth in mm
    lobe = np.minimum(np.minimum(X - 18, 37 - abs(back + 2)), z + 40)  # the temporal lobe hangs lower
    cerebrum = np.minimum(hull, np.maximum(z + 24 - 12 * inside((y + 42) * 0.2), lobe))
    centre = 1 - np.sqrt(((y + 4) / 40) ** 2 + ((z - 3) / 26) ** 2)  # > 0: below the corpus callosum's crest

    # Sulci are sheets that cut into the cerebrum: (distance, how far past the sheet's end, half width).
    gap, wide = 0.35 + 1.2 * wear, 0.7 + 0.8 * wear
    ends = 17 + sided(1.5)
    bend = [1.6 * waves(rng, x, y, z, 26) for _ in range(4)]
    strip = (y + 3 - sided(0.4) + 0.3 * (z - 16) + 0.28 * (62 - X)) * 0.92 + bend[0]  # central sulcus
    loss = np.clip(1 - (strip / 13) ** 2, 0, 1) * np.clip((34 - hull) / 12, 0, 1) * np.clip(z / 8, 0, 1)
    right, left = rng.permutation(np.float32([1, 0.65]))               # one side is worse
    loss = severity * loss * np.where(x > 0, right, left)
    insula = 39 - 0.8 * (y / 14) ** 2 + sided(1) + 0.6 * bend[3]
    lip = (z - 16 + 0.7 * (y + 25) + sided(0.5)) * 0.82 + 0.5 * bend[1]  # Sylvian fissure: climbs backwards
    over_lip = np.maximum(cerebrum - ends, 6 - lip)
    sheets = [(strip, over_lip, wide + 0.35 * gap + 8 * loss),
              (strip - 14 + bend[1], over_lip + 3, 0.7 * wide),
              (strip + 14 + bend[2], over_lip + 2, 0.7 * wide),
              (lip, np.maximum(insula - X, -44 - y), wide + 0.5 + 0.4 * wear + 1.0 * alzheimer),
              (X - insula, np.maximum(abs(y + 6) - 27, abs(z - 5) - 18), wide)]
    # Everywhere else: the zero set of random waves on the surface, carried inwards along rays.
    e, normal, _ = egg((X - 26, back, high), (np.where(X > 26, radii[0] - 26, 26), *radii[1:]))
    ray = np.maximum(e, 0.4)
    at = 26 + (X - 26) / ray + 99 * np.sign(x), back * (0.6 + 0.4 / ray), 0.65 * high / ray
    fold, slope = waves(rng, *at, 21, 16, slope=True, own=0.2 * own)
    slope[2] = 0.65 * slope[2]                                         # sulci stand rather than lie
    along = sum(n * s for n, s in zip(normal, slope))
    fold = fold * ray / np.sqrt(sum(s * s for s in slope) - along ** 2 + 1e-3)
    deep = 18 + 5 * waves(rng, x, y, z, 45, 6, own=0.2 * own)
    pia, half = np.float32(99), np.float32(99)                         # depth below the nearest surface

    def cut(depth, width):
        nonlocal pia, half
        half = np.where(depth < pia, width, half)
        pia = np.minimum(pia, depth) - np.maximum(4 - abs(pia - depth), 0) ** 2 / 16  # rounded gyri

    def sheet(s, past, width):
        cut(np.sqrt(s * s + np.maximum(past, 0) ** 2) - width, width)

    for each in sheets:
        sheet(*each)
    far = np.maximum(np.minimum(cerebrum, X) - deep, 34 * centre + 4)
    temporal = alzheimer * inside((lip + 2) * 0.4) * inside((15 - X) * 0.3)
    sheet(fold, np.maximum(far, 7 - pia), 0.85 * wide + 0.8 * temporal)
    sheet(x, 26 * centre, wide + 0.3)                                  # between the hemispheres
    cut(cerebrum - gap, 99)                                            # the surface itself
    thick = (3.3 - 0.5 * wear) * (1 - 0.5 * loss - 0.25 * temporal) + sided(0.1)

    # Ventricles, and hippocampi below and medial of the temporal horns.
    size = float(np.exp(rng.normal(0, 0.2))) * (0.75 + 1.6 * wear) * (1 + 0.6 * alzheimer)  # cross-section
    grow = size ** 0.5 * np.exp(sided(0.06))
    tip = float(rng.normal(-62, 3))
    d_body = tube(X, y, z, [(13, 29, 7, 1.6), (7, 20, 12, 3.2), (6, 5, 18, 3.4), (10, -16, 20, 3),
                            (21, -36, 14, 4.6), (22, -52, 11, 3), (19, tip, 9, 1)], 1.9) - (grow - 1) * 3.2
    d_horn = tube(X, y, z, [(22, -37, 12, 4), (32, -29, -3, 2.6), (33, -18, -13, 2), (29, -7, -17, 1.6)]) \
        - (grow - 1) * 2.4 - 2.2 * alzheimer
    d_third = np.maximum(X - 1.0 * grow, ball(X, y, z, (0, -12, 4), (9, 16, 13)))
    shrink = float(np.exp(rng.normal(0, 0.06))) * (1 - 0.12 * wear) * (1 - 0.25 * alzheimer)
    d_ammon = tube(X, y, z, [(*p, r * shrink) for *p, r in (
        (25, -8, -18, 7), (28, -19, -15, 5.8), (29, -28, -9, 5), (24, -36, 0, 3.6))])

    texture = waves(rng, x, y, z, 9)
    white, grey = 0.80 + 0.008 * texture, 0.53 + 0.015 * texture
    picture.grey, picture.mask = white, np.full(x.shape, 3, np.uint8)
    over(white - 0.18 * wear, np.exp(-np.maximum(np.minimum(d_body, d_horn), 0) / 5))
    tract = np.sqrt((X - 22.5) ** 2 + (y + 12 + 0.25 * (z - 16)) ** 2)  # corticospinal: internal capsule
    over(white - 0.5, severity * np.clip(2.2 - tract / 3.6, 0, 1) * np.clip(3 - abs(z - 12) / 10, 0, 1))
    over(grey, inside(pia - thick), 2)
    over(grey + 0.05, inside(ball(X, y, z, (27, 3, 6), (5.5, 16, 15), -0.18)), 2)      # putamen
    over(grey + 0.17, inside(ball(X, y, z, (20, -3, 2), (3.5, 8, 9), -0.45)), 2)       # pallidum
    over(grey + 0.03, inside(tube(X, y, z, [(14, 21, 8, 5), (14.5, 9, 14, 5), (17, -6, 20, 3.4),
                                            (22, -22, 20, 2)], 1.4)), 2)               # caudate
    over(grey + 0.08, inside(ball(X, y, z, (11, -16, 12), (8.5, 14, 13), 0.45)), 2)    # thalamus
    ventricle, hippocampus = inside(np.minimum(np.minimum(d_body, d_horn), d_third)), inside(d_ammon)
    over(0.14, ventricle, 4)
    over(grey - 0.01, hippocampus, 5)
    pia = np.maximum(pia, -half)
    over(0.15, inside(pia) - inside(pia + 2 * half), 1)  # a sheet thinner than a voxel stays thin
    # Below the cerebrum: brainstem, cerebellum with leaves that fan out from its core, cisterns between.
    below = inside(cerebrum + 0.5)
    d_stem = np.maximum(tube(x, y, z, [(0, -16, -6, 13), (0, -19, -25, 13), (0, -32, -60, 7)]), -56 - z)
    d_leaf = ball(X, y, z, (18, -56, -35), (30, 26, 20))
    fan, out = np.arctan2(z + 34, -y - 38), np.sqrt((z + 34) ** 2 + (y + 38) ** 2)
    d_leaves = abs(np.sin(8 * fan)) * out / 8
    over(0.15, below, 1)
    over(white - 0.04, below * inside(d_stem), 3)
    over(grey, below * inside(d_leaf), 2)
    over(white - 0.02, below * inside(np.maximum(d_leaf + 4, 2.2 - d_leaves)), 3)
    near = abs(np.minimum(d_leaf, d_stem) + cerebrum)
    head = inside(np.minimum(np.minimum(d_leaf, d_stem) - 1, -cerebrum) - np.maximum(12 - near, 0) ** 2 / 48)
    picture.mask[head < 0.5] = 0
    return dict(image=picture.grey * head, mask=picture.mask, head=head, hippocampus=hippocampus,
                ventricle=ventricle * (1 - hippocampus))


def pose(rng, x, y, z, amount=1.0):
    """What registration leaves: about 0.2 mm and 0.2 degrees, times amount -> x, y, z, float32."""
    a, b, c = amount * rng.normal(0, 0.004, 3)
    turn = np.array([[1, a, b], [-a, 1, c], [-b, -c, 1]])              # small angles
    shift = amount * rng.normal(0, 0.2, 3) - turn @ MIDDLE + MIDDLE
    return [np.asarray(t[0] * x + t[1] * y + t[2] * z + s, np.float32) for t, s in zip(turn, shift)]


def brain_volume(key, x, y, z, voxel, **factors):
    """brain() for volumes: the individual is default_rng(key). Drawn in slabs that fit the processor's cache,
    several times faster at 128x160x128; a slice does not depend on its neighbours."""
    step = max(1, 20000 // x[0].size)
    slabs = [brain(np.random.default_rng(key), *(c[i:i + step] for c in (x, y, z)), voxel, **factors)
             for i in range(0, len(x), step)]
    return {name: np.concatenate([s[name] for s in slabs]) for name in slabs[0]}


def scan(rng, drawn, x, y, z):
    """A picture by brain() as a scanner shows it: contrast, bias field, Rician noise; uint8, 0 outside."""
    image = drawn["image"] ** float(np.exp(rng.normal(0, 0.08))) * float(np.exp(rng.normal(0, 0.03)))
    image = image * np.exp(0.05 * waves(rng, x, y, z, 160, 4))
    image = rician(rng, image, drawn["head"] * float(rng.uniform(0.015, 0.03)))
    return to_uint8(255 * image * (drawn["head"] > 0.05))


HAZARD = dict(severity=np.log(1 / 0.73), age=np.log(1.3), male=np.log(1.2))  # per SD, per 10 years, for men
SEVERITY = 0.5, 20 ** -0.5  # mean and SD of the population: Beta(2, 2)


def survival(rng, severity, age, male):
    """Planted survival of patients (n,) -> time in days, event 0/1. Proportional hazards, see HAZARD.

    Weibull of shape 1.3, median 2.5 years at mean severity, 62 years; censored by the study's end alone."""
    risk = HAZARD["severity"] * (severity - SEVERITY[0]) / SEVERITY[1] \
        + HAZARD["age"] * (age - 62) / 10 + HAZARD["male"] * (male - 0.58)
    median = 2.5 * np.exp(-risk / 1.3)
    death = median * (rng.exponential(size=np.shape(risk)) / np.log(2)) ** (1 / 1.3)
    end = rng.uniform(1.5, 6.5, np.shape(risk))                        # years of follow-up
    return np.maximum(365.25 * np.minimum(death, end), 1), (death <= end).astype(np.uint8)


def person(rng, patient):
    """Who somebody in phantom_cohort is -> columns (1,) but for the picture. Years; time in days."""
    age = np.clip(rng.normal(62, 11, 1), 30, 85) if patient else rng.uniform(18, 90, 1)
    male = rng.random(1) < (0.58 if patient else 0.5)
    severity = rng.beta(2, 2, 1) * patient
    time, event = np.array([np.nan]), np.zeros(1, np.uint8)
    if patient:
        time, event = survival(rng, severity, age, male)
    return dict(label=np.array([int(patient)]), age=age, sex=np.where(male, "M", "F"), time=time, event=event,
                factor_severity=severity, factor_brain_age=np.clip(age + rng.normal(0, 5, 1), 18, 95))


def phantom_cohort(out, subjects=1000, patients=220, seed=0, size=128):
    """Write one axial T1 slice each of healthy adults and of patients whose survival is planted.

    factor_severity 0..1 (0 = healthy); factor_ventricle in mm2; factor_brain_age in years. The hazard is
    1/0.73 times higher per SD of severity, see survival(). mask 4: where the disease changed this patient's
    own picture by more than 5 % of full scale. The frame is 176 mm wide."""
    voxel = 176 / size
    # The level of the thalami. Stylised: the central sulcus, here only its lower end, is cut at full depth.
    x, y, z = grid((1, size, size), voxel)

    def draw(i):
        ill = int(i >= subjects)
        key = seed, i - subjects * ill, ill
        rng = np.random.default_rng(key)
        columns = person(rng, ill)
        at, age = pose(rng, x, y, z), float(columns["factor_brain_age"][0])
        drawn, *well = (brain(np.random.default_rng([*key, 1]), *at, voxel, age, s)
                        for s in [float(columns["factor_severity"][0]), 0.0][:1 + ill])
        mask = np.array([0, 1, 2, 3, 1, 2], np.uint8)[drawn["mask"]]
        for healthy in well:                                           # the same brain without the disease
            mask[abs(drawn["image"] - healthy["image"]) > 0.05] = 4
        area = drawn["ventricle"].sum((1, 2), dtype=float) * voxel ** 2
        return dict(columns, image=scan(rng, drawn, *at), mask=mask, factor_ventricle=area)

    phantom_file(out, f"cohort --subjects {subjects} --patients {patients} --seed {seed} --size {size}",
                 [f"control{seed}-{i:03d}" for i in range(subjects)]
                 + [f"patient{seed}-{i:03d}" for i in range(patients)], draw,
                 dict(spacing_mm=[voxel, voxel], hr_per_sd=1 / 0.73, label_names=["healthy", "patient"],
                      mask_names=[*BRAIN[:4], "lesion"]))


def phantom_brains(out, subjects=160, seed=0, size=48, own=1.0):
    """Write T1 volumes of controls (CN) and Alzheimer's disease (AD): 3 to 5 visits each within 4 years.

    (D,H,W) as in volumes(); H = size * 5/4, cut to a multiple of 8, is 176 mm. factor_rate: years that this
    brain ages per year; factor_alzheimer 0..1. own: how much people differ in shape and pose; 1: as after
    deformable registration, 3: as after an affine one. All is held in memory: 0.17 GB at 48x56x48."""
    shape = size, size * 5 // 32 * 8, size
    voxel = 176 / shape[1]
    frame = grid(shape, voxel)

    # On average, as in life: in AD hippocampi are a quarter smaller and shrink 5 % a year (CN: 1 %),
    # ventricles are half larger and grow 8 % a year (CN: 2 to 3 %); people of one age differ by 10 to 25 %.
    def draw(i):
        rng, ill = np.random.default_rng([seed, i]), i % 2
        first, sex = rng.uniform(50, 90), "FM"[rng.integers(2)]
        rate = np.exp(rng.normal(0, 0.3)) * (1 + ill)
        ahead, stage = rng.normal(0, 4), rng.uniform(0.3, 0.8) * ill
        visits = np.sort(rng.permutation(np.arange(6, 49, 6))[:rng.integers(2, 5)])    # most are missed
        at, months, rows = pose(rng, *frame, own), np.append(0.0, visits), []
        for years in months / 12:
            ill_now = min(float(stage + 0.03 * ill * rate * years), 1.0)
            old = float(first + ahead + rate * years)
            here = pose(rng, *at, 0.7)
            drawn = brain_volume([seed, i, 1], *here, voxel, age=old, alzheimer=ill_now, own=own)
            ml = {f"factor_{k}_ml": drawn[k].sum(dtype=float) * voxel ** 3 / 1000
                  for k in ("ventricle", "hippocampus")}
            rows.append(dict(image=scan(rng, drawn, *here), mask=drawn["mask"], age=first + years, **ml,
                             factor_brain_age=old, factor_alzheimer=ill_now))
        n = len(rows)
        return dict({k: np.array([row[k] for row in rows]) for k in rows[0]}, session=months,
                    label=np.full(n, ill), sex=np.full(n, sex), factor_rate=np.full(n, rate))

    phantom_file(out, f"brains --subjects {subjects} --seed {seed} --size {size} --own {own}",
                 [f"brain{seed}-{i:03d}" for i in range(subjects)], draw,
                 dict(spacing_mm=[voxel] * 3, label_names=["CN", "AD"], mask_names=BRAIN))


# ---------------------------------------------------------------------------------------------------
# NIfTI

def attempt(path, cases, read, skipped):
    """Yield (case, read(case)) with a progress bar; what cannot be read is printed and added to skipped.

    Exits if no case of `path` can be read."""
    for case in tqdm(cases, "reading", disable=None):
        try:
            with catch_warnings(action="ignore"):       # of libraries, about metadata
                result = read(case)
        except ImportError:
            fail("NIfTI files are read by nibabel: pip install nibabel")
        except Exception as why:  # of a dozen types: files are damaged in many ways
            reason = why if isinstance(why, (OSError, ValueError)) else f"{type(why).__name__} {why}"
            skipped.append(" ".join(f"{case}: {reason}".split()))
            tqdm.write(f"skipped {skipped[-1]}")
        else:
            yield case, result
    if len(skipped) == len(cases):
        fail(f"{path}: none of {len(cases)} could be converted; the first: {skipped[0]}")


def read_header(path):
    """.nii or .nii.gz -> nibabel's image, whose voxels are not read yet, and (3,) mm per voxel.

    ValueError says why not; nibabel raises others."""
    import nibabel
    volume = nibabel.load(path)
    shape = volume.shape
    with nibabel.openers.ImageOpener(path) as file:  # nibabel would mend a spacing of 0 to 1 mm
        header = type(volume.header).from_fileobj(file, check=False)
    zooms = abs(header["pixdim"][1:4]).astype(float)  # not the affine: EMIDEC's says 1 mm, wrongly
    one = len(shape) >= 3 and min(shape[:2]) > 1 and max(shape[3:], default=1) == 1
    if not one or np.prod(shape, dtype=object) > 1e9:
        raise ValueError(f"{path}: shape {shape}, expected one volume of up to 1e9 voxels")
    if not (np.isfinite(zooms).all() and (zooms > 0).all()):
        raise ValueError(f"{path}: spacing {zooms} mm")
    return volume, zooms


def read_voxels(path):
    """.nii or .nii.gz -> (X,Y,Z) float32 as stored, (3,) mm per voxel."""
    volume, zooms = read_header(path)
    voxels = volume.get_fdata(dtype=np.float32).reshape(volume.shape[:3])
    if not np.isfinite(voxels).all():
        raise ValueError(f"{path}: NaN or Inf")
    return voxels, zooms


def read_pair(image, labels, allowed):
    """Two NIfTI files without their ending -> image float32, labels uint8 (X,Y,Z), (3,) mm per voxel.

    Also found: NAME.nii, and a folder of either name that holds the file. ValueError says why not."""
    volumes = []
    for name in (image, labels):
        found = [p for end in (".gz", "", "/*.nii*", ".gz/*.nii*")
                 for p in sorted(glob.glob(glob.escape(name) + ".nii" + end)) if os.path.isfile(p)]
        if not found:
            raise ValueError(f"no {name}.nii.gz")
        volumes.append(read_voxels(found[0]))
    (x, zooms), (stored, _) = volumes
    if stored.shape != x.shape:
        raise ValueError(f"image {x.shape} but labels {stored.shape}")
    label = np.rint(stored)  # some are floats like 1.9999
    if abs(label - stored).max() > 0.1 or not np.isin(label, allowed).all() or not label.any():
        raise ValueError(f"{os.path.basename(labels)} holds {np.unique(stored)[:8]}, expected 0 to "
                         f"{max(allowed)} and some heart")
    return x, label.astype(np.uint8), zooms


def window(x, least=0):
    """Grey window of one volume, the same for all slices: percentiles `least` to 99.5 -> float in [0,255]."""
    low, high = np.percentile(x, [least, 99.5]).tolist()
    if high <= low:     # a few bright pixels on plain ground
        low, high = float(x.min()), float(x.max())
    if high <= low:
        raise ValueError(f"an image of one grey value, {low:g}")
    return 255 * ((np.clip(x, low, high) - low) / (high - low))


def subfolders(root, pattern, example):
    """-> {name: path} of the folders below root whose name matches."""
    found = {os.path.basename(path): path for path, *_ in os.walk(root)}
    found = {name: found[name] for name in sorted(found) if re.fullmatch(pattern, name)}
    return found or fail(f"{root}: no folders {example}...; pass the folder that holds them")


def read_entries(path):
    """Lines "key: value" of a file -> dict, keys in lower case."""
    with open(path, encoding="latin-1") as file:  # "Age\xa0: 61": strip() drops no-break spaces
        return {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in file)}


def read_table(path, needed):
    """CSV -> DataFrame of stripped texts, NaN where missing; columns in lower case, line numbers as index."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            text = file.read()
        if "\0" in text:
            raise ValueError("it is not text, expected a CSV")
        comma = max(",;\t", key=text.strip().partition("\n")[0].count)
        table = pd.read_csv(io.StringIO(text), sep=comma, header=None, dtype=str, skip_blank_lines=False,
                            skipinitialspace=True, na_values=["?", "na", "none"])
    except (OSError, ValueError) as error:      # pandas' are ValueErrors
        fail(f"{path}: cannot be read as a table: {error}")
    table.index += 1
    table = table.apply(lambda column: column.str.strip()).dropna(how="all").dropna(axis=1, how="all")
    if len(table) < 2:
        fail(f"{path}: no rows; expected a line with the names of columns and one line per row")
    table, header = table.iloc[1:], table.iloc[0].fillna("").str.lower()
    if comma == ";":  # decimal commas come with it
        table = table.apply(lambda column: column.str.replace(r"^(-?\d+),(\d+)$", r"\1.\2", regex=True))
    table.columns = header.str.replace(r"\W+", "_", regex=True)       # "a/b" would be a group
    for name in needed:
        if name not in table:
            fail(f"{path}: no column {name}, the header has {', '.join(header):.200}")
    for name in table.columns[table.columns.duplicated()]:
        fail(f"{path}: several columns have the name {name}; rename all but one")
    return table.loc[:, table.notna().any() | table.columns.isin(needed)]


# EMIDEC (Lalande et al. 2020): Case_N006/Images/Case_N006.nii.gz, Case_N006/Contours/..., "Case N006.txt"

def emidec(root, out):
    """Convert EMIDEC: 128x128 pixels of 1 mm around each heart; rows = first NIfTI axis.

    Grey window of each cropped volume. Slices without myocardium are dropped; skipped cases are listed with
    the reason."""
    cases, skipped = subfolders(root, r"Case_[NP]\d+", "Case_N006"), []

    def read(case):
        files = (os.path.join(cases[case], folder, case) for folder in ("Images", "Contours"))
        image, mask, zooms = read_pair(*files, range(5))
        where, keep = np.argwhere(mask >= 2)[:, :2], np.flatnonzero((mask >= 2).any((0, 1)))
        if not len(where):
            raise ValueError("contours without myocardium")
        text = os.path.join(os.path.dirname(cases[case]), case.replace("_", " ") + ".txt")
        entry, n, step = read_entries(text) if os.path.isfile(text) else {}, len(keep), 1 / zooms[:2]
        age = re.match(r"\d+(\.\d+)?", entry.get("age", ""))
        start = (where.min(0) + where.max(0) + 1) / 2 - 64 * step
        image, mask = (resample(v.transpose(2, 0, 1)[keep], start, step, 128, nearest)
                       for v, nearest in ((image, False), (mask, True)))
        return dict(image=to_uint8(window(image)), mask=mask, slice=keep, subject=np.full(n, case),
                    label=np.full(n, int(case[5] == "P")), age=np.full(n, float(age[0]) if age else np.nan),
                    sex=np.full(n, entry.get("sex", "")[:1].upper()), infarct_fraction=infarct_fraction(mask),
                    has_infarct=(mask >= 3).any((1, 2)).astype(np.uint8))

    parts = [columns for _, columns in attempt(root, cases, read, skipped)]
    write(out, parts, dict(
        source="EMIDEC (emidec.com, Lalande et al. 2020), python data.py emidec", licence="CC BY-NC-SA 4.0",
        spacing_mm=[1.0, 1.0], label_names=["normal", "pathological"], mask_names=HEART))
    print(f"{out}: {len(parts)} subjects, {len(skipped)} skipped")


# Cine MR: ACDC (Bernard et al. 2018) and M&Ms-2 (Martin-Isla et al. 2023), one file per subject

def read_cine(folder, name, ids, size=256):
    """NAME.nii.gz and NAME_gt.nii.gz -> columns image, mask, slice, spacing (mm per pixel).

    Only slices that show a structure: the others have no map to be generated from. Padded to a square in mm,
    resized; rows = second NIfTI axis, so that the chest is upright. ids[k] is label k's place in CINE."""
    image, label, zooms = read_pair(*(os.path.join(folder, name + end) for end in ("", "_gt")), range(4))
    mask, keep = np.array(ids, np.uint8)[label], np.flatnonzero(label.any((0, 1)))
    sides, mm = np.array(image.shape[1::-1]), zooms[1::-1]               # (rows, columns)
    spacing = (sides * mm).max() / size
    start = (sides - size * spacing / mm) / 2
    image, mask = (resample(v.transpose(2, 1, 0)[keep], start, spacing / mm, size, nearest)
                   for v, nearest in ((window(image), False), (mask, True)))
    return dict(image=to_uint8(image), mask=mask, slice=keep, spacing=np.full(len(keep), spacing))


def cine_files(root, out, folders, describe, ids, diseases, source, licence):
    """Write OUT/SUBJECT.h5 for folders {subject: path}.

    describe(subject) -> [(view, phase, NIfTI name)], disease; one that is not in diseases is "unknown"."""
    with writing(out):
        os.makedirs(out, exist_ok=True)
    diseases, skipped = [*diseases, "unknown"], []

    def read(subject):
        series, disease = describe(subject)
        label, parts = diseases.index(disease if disease in diseases else "unknown"), []
        for view, phase, name in series:
            columns = read_cine(folders[subject], name, ids)
            n = len(columns["slice"])
            parts.append(columns | dict(view=np.full(n, view, np.uint8), phase=np.full(n, phase, np.uint8),
                                        label=np.full(n, label), subject=np.full(n, subject)))
        return parts

    attrs = dict(CINE_NAMES, source=source, licence=licence, label_names=diseases)
    for subject, parts in attempt(root, folders, read, skipped):
        write(os.path.join(out, subject + ".h5"), parts, attrs)
    print(f"{out}: {len(folders) - len(skipped)} subjects, {len(skipped)} skipped")


def acdc(root, out):
    """Convert ACDC, {training,testing}/patientNNN, into a folder of one file per subject, ED and ES.

    Its label ids, 1 RV, 2 myocardium, 3 LV, become those of CINE. label: its five groups."""
    folders = subfolders(root, r"patient\d{3}", "patient001")

    def describe(subject):
        entry = read_entries(os.path.join(folders[subject], "Info.cfg"))
        if not all(entry.get(k, "").isdecimal() for k in ("ed", "es")):
            raise ValueError("Info.cfg has no frame numbers ED and ES")
        frames = [f"{subject}_frame{int(entry[k]):02d}" for k in ("ed", "es")]  # both count from 1
        return [(0, phase, name) for phase, name in enumerate(frames)], entry.get("group")

    cine_files(root, out, folders, describe, [0, 3, 2, 1], ["DCM", "HCM", "MINF", "NOR", "RV"],
               "ACDC (Bernard et al. 2018), python data.py acdc; its ids 1 RV, 2 myocardium, 3 LV mapped to "
               "1 LV, 2 myocardium, 3 RV", "CC BY-NC-SA 4.0")


def mms(root, out):
    """Convert M&Ms-2, root/**/NNN and root/dataset_information.csv, into a folder of one file per subject.

    Short axis and four chambers (H,W,1), ED and ES; CINE has no labels and is left. Ids are those of CINE."""
    folders = subfolders(root, r"\d{3}", "dataset/001")
    table = read_table(os.path.join(root, "dataset_information.csv"), ("subject_code", "disease"))
    disease = dict(zip(table["subject_code"].str.zfill(3), table["disease"].fillna("unknown")))

    def describe(subject):
        return [(view, phase, f"{subject}_{v}_{p}") for view, v in enumerate(CINE_NAMES["view_names"])
                for phase, p in enumerate(CINE_NAMES["phase_names"])], disease.get(subject)

    cine_files(root, out, folders, describe, [0, 1, 2, 3], sorted({*disease.values()} - {"unknown"}),
               "M&Ms-2 (Martin-Isla et al. 2023), python data.py mms", "as the challenge's: ub.edu/mnms-2")


# ---------------------------------------------------------------------------------------------------
# Volumes: head scans that a CSV lists, e.g. ADNI, OASIS-3, IXI or a private cohort. Stored as
# D inferior to superior, H anterior (row 0) to posterior, W patient's left (column 0) to right: an axial
# slice stands upright with left on the left. Slices of the other two planes have superior in row 0.

HEALTHY = {"CN", "NC", "NL", "HC", "CONTROL", "CONTROLS", "HEALTHY", "NORMAL"}
PLANES = ("axial", "coronal", "sagittal")


def list_table(path, one_each=True):
    """CSV with columns path, subject -> {"line 2: a.nii": its path}, columns of the schema, attributes.

    one_each: a row of its own for each subject and session; else for each path. The texts of diagnosis become
    label: healthy, if there is such a row, is 0; the others follow, sorted. Fails, naming the line, where a
    value is refused by check_column."""
    table = read_table(path, ("path", "subject"))
    paths = table["path"].fillna("")
    files = {f"line {line}: {name}": os.path.join(os.path.dirname(path), name)
             for line, name in paths.items()}
    columns, attrs = {"path": paths.str[-200:].to_numpy(str)}, {"licence": "as the source's"}
    if "diagnosis" in table and "label" not in table:
        text = table["diagnosis"].str.upper()
        for line in table.index[text.isna()]:
            fail(f"{path}: line {line}: diagnosis: missing; every row needs one, such as healthy")
        names = ["healthy"] * bool(set(text) & HEALTHY) + sorted(set(text) - HEALTHY)
        table = table.assign(label=text.map(dict.fromkeys(HEALTHY, 0) | {t: k for k, t in enumerate(names)}))
        attrs["label_names"] = names
    if "event" in table and "time" in table:      # the healthy rows of a cohort may have no follow-up
        table = table.assign(event=table["event"].mask(table["time"].isna(), "0"))
    for name in table.columns.drop(["path", "diagnosis", *PIXELS], errors="ignore"):
        x = table[name]
        if name in TEXTS:
            x = x.fillna("").to_numpy(str)
            x = {"sex": np.char.upper(x.astype("<U1")), "split": np.char.lower(x)}.get(name, x)
        else:
            x = pd.to_numeric(x, errors="coerce").to_numpy(float)
            wrong = table.index[np.isnan(x) & table[name].notna()]
            if len(wrong):
                why = f"{path}: line {wrong[0]}: {name}: {table[name][wrong[0]]!r:.40} is no number"
                if name in KNOWN:
                    fail(why + "; names of classes go into a column diagnosis" * (name == "label"))
                warn(f"{why}: column ignored")
                continue
        columns[name] = check_column(path, name, x, "line " + table.index.astype(str))
    visits = pd.DataFrame({k: columns.get(k, "") for k in ("subject", "session")}, table.index)
    for line in table.index[visits.duplicated() & one_each]:
        fail(f"{path}: line {line}: subject {visits['subject'][line]} has this session already; keep one, or "
             "tell them apart in a column session, in months")
    for line in table.index[paths.duplicated() & (paths != "") & (not one_each)]:
        fail(f"{path}: line {line}: path: {paths[line]} is listed twice; keep one of these lines")
    if "split" in columns:
        check_split(path, columns["subject"], columns["split"])
    return files, columns, attrs


def upright(path, header_only=False):
    """.nii or .nii.gz -> (D,H,W) float32, axes as told above (header_only: D, H, W), (3,) mm per voxel."""
    import nibabel
    volume, zooms = read_header(path)
    turn = nibabel.io_orientation(volume.affine)
    order = np.argsort(turn[:, 0])[::-1]
    if header_only:
        return np.array(volume.shape)[order], zooms[order]
    x = nibabel.apply_orientation(read_voxels(path)[0], turn)
    return x.transpose(2, 1, 0)[:, ::-1], zooms[order]


def read_brain(path, spacing, shape):
    """-> (D,H,W) uint8 around the head at one isotropic spacing. A head taller than the frame keeps its top.

    Grey window: percentiles 0.5-99.5 of what stands out from the corners (air) by a tenth of the 98th
    percentile. ValueError, or one of nibabel's many errors, says why not."""
    if not os.path.isfile(path):
        raise ValueError("no such file")
    x, zooms = upright(path)
    corners = x[::x.shape[0] - 1, ::x.shape[1] - 1, ::x.shape[2] - 1]
    far = abs(x - np.median(corners))
    head = far > 0.1 * np.percentile(far[far > 0], 98) if far.any() else far > 0
    low, high = np.percentile(x[head], [0.5, 99.5]).tolist() if head.any() else (0, 0)
    if head.sum() < 100 or high <= low:
        raise ValueError(f"no brain: {head.sum()} voxels of {low:g} to {high:g} stand out from the corners")
    x = np.clip((x - low) / (high - low), 0, 1)
    x[far == 0] = 0  # black also where the background's 0 lies between the greys of the brain (z-scores)
    areas = [head.sum(axes) for axes in ((1, 2), (0, 2), (0, 1))]
    ends = np.array([np.flatnonzero(a > 0.02 * a.max())[[0, -1]] for a in areas])  # not single hot voxels
    first, last, step = ends[:, 0], ends[:, 1] + 1, spacing / zooms
    start = (first + last - step * shape) / 2
    start[0] = max(start[0], last[0] - step[0] * shape[0])  # the neck goes, not the crown
    depth, rows, columns = (axis_weights(x.shape[a], start[a], step[a], shape[a]) for a in range(3))
    return to_uint8(255 * rows @ np.tensordot(depth, x, 1) @ columns.T)


def volumes(path, out, spacing=1.5, shape=(128, 160, 128)):
    """Convert the head scans of a CSV into frames of shape (D,H,W) voxels of `spacing` mm.

    Columns: path, subject; age, sex, diagnosis or label, session, time, event, split; other numeric ones
    become probe targets. One volume is in memory at a time. Rows that cannot be read are listed with line and
    reason; a table that is wrong in itself exits 2 before any volume is read."""
    if len(shape) != 3 or not all(8 <= n <= 1024 for n in shape) or not 0.01 <= spacing <= 100:
        fail(f"--shape {shape}, --spacing {spacing}: expected three lengths of 8 to 1024, and mm")
    files, columns, attrs = list_table(path)
    rows, skipped = {case: i for i, case in enumerate(files)}, []
    found = attempt(path, files, lambda case: read_brain(files[case], spacing, shape), skipped)
    n, images = write_as_read(out, shape, ((rows[case], x[None], [0]) for case, x in found), columns, dict(
        attrs, source=f"python data.py volumes {os.path.basename(path)}, {shape}", spacing_mm=[spacing] * 3))
    print(f"{out}: {n} subjects, {images} images of {' x '.join(map(str, shape))} at {spacing:g} mm, "
          f"{len(skipped)} rows skipped")


# ---------------------------------------------------------------------------------------------------
# Images: anyone's own, and slices of anyone's own volumes

NIFTI = (".nii", ".nii.gz")
IMAGES = (*NIFTI, ".npy", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


def list_images(root):
    """Images below a folder, but no hidden ones -> {name: path}, columns (subject, path), attributes.

    subject: the first folder below root, else a file's name up to "_". Links to folders are not followed."""
    paths = sorted(os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names)
    names = [os.fsencode(os.path.relpath(path, root)).decode("utf-8", "backslashreplace") for path in paths]
    files = {name: path for name, path in zip(names, paths)
             if name.lower().endswith(IMAGES) and os.sep + "." not in os.sep + name}
    others = f"{len(paths) - len(files)} hidden files or other types"
    if not files:
        fail(f"{root}: no images ({' '.join(IMAGES)}), but {others}; dcm2niix makes NIfTI of DICOM")
    print(f"{root}: {len(files)} images; {others} are passed over")
    subjects = [name.split(os.sep)[0] if os.sep in name else
                re.match(r"(.[^_]*?)(_|(\.nii)?\.\w+$)", name, re.S | re.I)[1] for name in files]
    columns = {"subject": check_column(root, "subject", np.array(subjects), list(files)),
               "path": np.array([name[-200:] for name in files])}
    return files, columns, {"licence": "as the source's"}


def read_image(path, plane, cut):
    """An image file -> (n,H,W) float32, the numbers of these slices, (2,) mm per pixel or None.

    cut(n): which of n slices. Colours become grey (ITU-R 601). An error of any kind says why not."""
    kind, axis, mm = path.lower(), PLANES.index(plane), None
    if kind.endswith(NIFTI):
        x, mm = upright(path)
        x, mm = np.moveaxis(x, axis, 0)[:, ::-1 if axis else 1], np.delete(mm, axis)    # superior on top
    elif kind.endswith(".npy"):
        x = np.lib.format.open_memmap(path, mode="r")       # nothing is read or reserved yet
        colours = x.ndim == 3 and {x.shape[0], x.shape[2]} & {3, 4}
        if x.dtype.kind not in "biuf" or x.ndim not in (2, 3) or colours or x.size > 1e9:
            raise ValueError(f"{x.dtype} {x.shape}, expected numbers (H,W) or (slices,H,W), without colours")
        x = x.reshape(-1, *x.shape[-2:])
    if kind.endswith((*NIFTI, ".npy")):
        slices = cut(len(x))
        x = x[slices].astype(np.float32)
    else:
        with Image.open(path, formats=("PNG", "JPEG", "TIFF", "BMP")) as file:
            slices, size, pages = cut(file.n_frames if file.format == "TIFF" else 1), file.size, []
            for page in slices:
                file.seek(page)
                if file.size != size or len(slices) * size[0] * size[1] > 1e9:
                    raise ValueError("pages of several sizes, or more than 1e9 pixels")
                pages.append(np.asarray(file if file.mode[0] in "IF" else file.convert("L"), np.float32))
        x = np.stack(pages)
    if min(x.shape[1:]) < 2 or x.min() == x.max():
        raise ValueError(f"{x.shape[1]} x {x.shape[2]} pixels of one grey value")
    if not (abs(x) < 1e30).all():
        raise ValueError("NaN, Inf or beyond 1e30")
    return x, slices, mm


def images(path, out, size=128, spacing=0.0, slice="axial:all"):
    """Convert the images, or the slices of volumes, of a folder or a CSV into frames of size x size pixels.

    A folder: list_images() tells who is the subject. A CSV: columns path, subject, others as of volumes().
    slice: axial, coronal or sagittal, then :all, :mid or, as in Python, :20:40. Whatever the plane, .npy is
    cut along its first axis, TIFF into its pages. A pixel of NIfTI gets `spacing` mm; 0: such that the median
    field of view fills the frame. What is larger is cropped. Other images are padded to a square and resized.
    Grey window: percentiles 0.5 to 99.5 of all images of a subject. One subject is in memory at a time. Files
    that cannot be read are listed with the reason."""
    plane, _, which = slice.partition(":")
    if plane not in PLANES or not re.fullmatch(r"all|mid|(-?\d{1,6})?:(-?\d{1,6})?", which):
        fail(f"--slice {slice}: expected axial, coronal or sagittal, then :all, :mid or as :20:40")
    if not (16 <= size <= 4096 and 0 <= spacing <= 100):
        fail(f"--size {size}, --spacing {spacing}: expected 16 to 4096 pixels, and 0 to 100 mm")
    if not os.path.exists(path):
        fail(f"{path}: no such folder or CSV")
    root = os.path.join(os.path.realpath(path), "") if os.path.isdir(path) else ""
    files, columns, attrs = list_images(path) if root else list_table(path, one_each=False)
    cases, subject = list(files), columns["subject"]
    row = {cases[i]: i for i in np.argsort(subject, kind="stable")}
    missing, skipped, count = [], [], Counter()

    def view(case):
        """The longer side of the slices of a NIfTI file in mm, from its header; 0 of other files."""
        file = os.path.realpath(files[case])
        if not file.startswith(root):
            raise ValueError("a link that leads out of the folder")
        if not os.path.isfile(file):        # a pipe would block
            raise ValueError("no such file" + " beside the CSV" * (not root))
        if not case.lower().endswith(NIFTI):
            return 0.0
        return np.delete(np.prod(upright(file, header_only=True), 0), PLANES.index(plane)).max()

    def cut(n):
        ends = {"all": ":", "mid": f"{n // 2}:{n // 2 + 1}"}.get(which, which).split(":")
        first, last = (int(end) if end else None for end in ends)
        chosen = range(n)[first:last] if n > 1 else range(1)        # an image alone is not cut
        if not chosen:
            raise ValueError(f"--slice {slice}: none of its {n} slices")
        return chosen

    def frames():
        """Of one subject after the other, what write_as_read takes."""
        found = attempt(path, views, lambda case: read_image(files[case], plane, cut), skipped)
        for _, group in groupby(found, lambda pair: subject[row[pair[0]]]):
            group = list(group)
            grey = window(np.concatenate([x.ravel() for _, (x, *_) in group]), 0.5)
            for case, (x, numbers, mm) in group:
                x, grey = grey[:x.size].reshape(x.shape), grey[x.size:]
                step = np.repeat(max(x.shape[1:]) / size, 2) if mm is None else spacing / mm
                sides, start = x.shape[1:] / step, (x.shape[1:] - step * size) / 2
                start = np.where(np.isclose(step, 1), np.floor(start), start)       # half a pixel would blur
                x = to_uint8(resample(x, start, step, size))
                good = x.min((1, 2)) < x.max((1, 2))
                count["that are not square were padded"] += good.sum() * (sides.min() < 0.999 * sides.max())
                count["were cropped; give a larger --spacing"] += good.sum() * (sides.max() > 1.001 * size)
                count["of one grey value were left out"] += (~good).sum()
                yield row[case], x[good], np.array(numbers)[good]

    views = dict(attempt(path, row, view, missing))
    known = [mm for mm in views.values() if mm]
    if spacing and not known:
        fail(f"--spacing {spacing}: no file of {path} tells its mm, only NIfTI's headers do")
    spacing = spacing or float(np.median(known or [0])) / size
    attrs |= {"source": f"python data.py images {os.path.basename(path)} --slice {slice}"}
    attrs |= {"spacing_mm": [spacing] * 2} if len(known) == len(views) else {}
    people, n = write_as_read(out, (size, size), frames(), columns, attrs)
    for what, some in (+count).items():
        print(f"{some} images {what}")
    if root and people < 3:
        warn(f"{path}: only {people} subjects; if its folders are no people, list path, subject in a CSV")
    print(f"{out}: {people} subjects, {n} images of {size} x {size}, {len(missing) + len(skipped)} skipped")


# ---------------------------------------------------------------------------------------------------
# Command line

PHANTOMS = dict(hearts=phantom_hearts, views=phantom_views, cohort=phantom_cohort, brains=phantom_brains)


def summary(path):
    """Check, then print what the file holds; ends with ok."""
    data = check(path)
    part = split(data)
    people = {p: len(np.unique(data.subject[part == p])) for p in ("train", "val", "test")}
    print(f"{path}: {len(np.unique(data.subject))} subjects, {len(data)} images of "
          f"{' x '.join(map(str, data.image.shape[1:]))}; {'no ' * (data.mask is None)}masks")
    for name, x in data.columns.items():
        if name == "path":
            continue
        if x.dtype.kind == "U" or name == "label":
            names = dict(enumerate(data.label_names)) if name == "label" else {"": "missing"}
            values = zip(*np.unique(x, return_counts=True))
            print(f"  {name}: " + ", ".join(f"{names.get(v, v)} {n}" for v, n in values))
        else:
            known = x[~np.isnan(x)]
            limits = f"{known.min():.4g} to {known.max():.4g}" if len(known) else "no values"
            print(f"  {name}: {limits}, {len(x) - len(known)} missing")
    print(f"  split ({'seed 0' if data.split is None else 'stored'}): {people} subjects\nok")


def show(path, out="sheet.png"):
    """Contact sheet: 12 subjects as rows, 4 images of each (middle of volumes) with mask contours."""
    import metrics      # not above: metrics.py imports this file
    if not out.endswith(".png"):
        fail(f"--out {out}: expected the name of a picture, as sheet.png")
    data, lines = load(path), []
    subjects = np.sort(np.random.default_rng(0).permutation(np.unique(data.subject))[:12])
    for subject in subjects:
        lines.append([])
        for row in metrics.evenly(np.flatnonzero(data.subject == subject), 4):
            image, *mask = (a[[row]] for a in (data.image, data.mask) if a is not None)
            image, *mask = (a[:, a.shape[1] // 2] if a.ndim == 4 else a for a in (image, *mask))
            tile = np.repeat(resize(image, 192)[0][..., None] / 255, 3, 2)
            for m in (resize(m, 192, nearest=True) for m in mask):
                tile[edge_map(m, m, "mask")[0]] = 1, 0.3, 0.3
            lines[-1].append(tile)
    metrics.grid(out, lines, list(subjects), [], f"{path}: {len(data)} images, some of them.")
    print(out)


COMMANDS = dict(check=summary, show=show, emidec=emidec, acdc=acdc, mms=mms, volumes=volumes,
                images=images, **{f"phantom {kind}": draw for kind, draw in PHANTOMS.items()})


def main(flags):
    """Each function of COMMANDS is a command; its parameters are the arguments and flags."""
    layout = dict(formatter_class=argparse.RawTextHelpFormatter)
    parser = argparse.ArgumentParser(description=__doc__, **layout)
    parser.error = lambda message: fail(f"{message}; see python data.py --help")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, function in COMMANDS.items():
        p = commands.add_parser(name, description=inspect.getdoc(function), **layout)
        p.error = parser.error
        p.set_defaults(function=function)
        for word, parameter in inspect.signature(function).parameters.items():
            default, kind = parameter.default, type(parameter.default)
            if default is parameter.empty:
                p.add_argument(word)
            else:
                shown = ",".join(map(str, default)) if kind is tuple else default
                p.add_argument(f"--{word}", type=integers if kind is tuple else kind, default=default,
                               help=f"default: {shown}")
    if flags[:1] == ["phantom"]:        # `phantom hearts` is one command
        flags = [" ".join(flags[:2]), *flags[2:]]
    given = vars(parser.parse_args(flags))
    function, folder = given.pop("function"), os.path.dirname(given.get("out", ""))
    if folder and not os.path.isdir(folder):    # said before the work, not after it
        fail(f"{given['out']}: no folder {folder}; make it first")
    for key, least in dict(subjects=1, patients=0, seed=0, size=16).items():
        if given.get(key, least) < least:
            fail(f"--{key} {given[key]}: must be at least {least}")
    function(**given)


if __name__ == "__main__":
    program(main)
