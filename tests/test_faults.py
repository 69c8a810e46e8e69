"""The faults that all four scripts share. Each run ends with the right exit code and one line, and nothing
that was saved is lost or changed. The same command goes on to what an unbroken run would have left.

Exit codes: 0 done, 2 the user can mend it, 1 the machine must (disk, divergence), 143 and 130 told to stop.
"""
import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import data as D
import metrics as M
from conftest import ROOT, runs_of

COMMON = "--steps=8 --batch=6 --save_every=4 --lr=1e-3 --device=cpu --S=2 --eval_images=4 --groups=0 "
IMAGES = COMMON + "--size=16 --base=16 --mult=1,2 --enc_mult=1,2,2 --blocks=1 --attention=8 "
FLAGS = {
    "diffae": IMAGES + "--z_dim=8 --draws=1",
    "normative": IMAGES + "--z_dim=8",
    "cond_ldm": COMMON + "--size=16 --patch=1 --channels=8,16 --depth=1 --codebook=32 --gan_start=2 --w=1 "
                         "--edges=full --unet=16,32,32 --vq_steps=8 --vq_lr=1e-3",
    "ldae": COMMON + "--patch=4 --ae_base=8 --ae_mult=1 --z_ch=2 --disc_base=4 --base=16 --mult=1,2 --T=20 "
                     "--blocks=1 --enc_base=16 --enc_mult=1,2 --z_dim=8 --ae_steps=8 --ldm_steps=8 "
                     "--ae_batch=6",
}
EVERY = pytest.mark.parametrize("name", FLAGS)


# ------------------------------------------------------------------------------------- tiny data

def columns(name):
    """28 subjects, two images (ldae: volumes) each, with every column that a script needs."""
    rng = np.random.default_rng(0)
    axes = np.meshgrid(*[np.linspace(-1, 1, 24 if name == "ldae" else 16)] * (3 if name == "ldae" else 2))
    inner = np.repeat(rng.uniform(0.2, 0.5, 28), 2).reshape(-1, *[1] * len(axes))
    r = np.sqrt(sum(a ** 2 for a in axes))[None]
    mask = np.where(r < inner, 1, np.where(r < inner + 0.25, 2, np.where(axes[-1] < -0.6, 3, 0)))
    grey = np.array([30, 220, 90, 150])[mask] + rng.uniform(0, 30, mask.shape)
    who = np.repeat(np.arange(28), 2)
    part = np.full(56, "train", "<U5")
    part[np.isin(who % 7, (1, 3))] = "val"
    part[(who % 7 == 2) | (who % 4 == 0)] = "test"      # patients (label 1), and some of the others
    return dict(image=grey.astype(np.uint8), mask=mask.astype(np.uint8), split=part, view=np.arange(56) % 2,
                subject=np.char.add("p", who.astype(str)), label=(who % 4 == 0).astype(int),
                has_infarct=(who % 3 == 0).astype(int), age=(30 + who).astype(np.float32),
                session=(np.arange(56) % 2 * 6).astype(np.float32))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """name -> its file; (name, part) -> the same file with other images and masks in that part"""
    folder, made = tmp_path_factory.mktemp("data"), {}
    for name in FLAGS:
        for part in ("", "train", "unseen"):
            c, rng = columns(name), np.random.default_rng(1)
            rows = np.flatnonzero((c["split"] == "train") == (part == "train")) if part else []
            c["image"][rows] = rng.integers(0, 255, c["image"][rows].shape)
            c["mask"][rows] = c["mask"][rows][::-1]
            made[(name, part) if part else name] = path = str(folder / f"{name}{part}.h5")
            D.write(path, [c], dict(D.CINE_NAMES))
    return made


# ------------------------------------------------------------------------------------- processes and faults

def child(name, flags, log, faults, env):
    """Body of a process: the script with these flags, after the faults were laid."""
    with open(log, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    os.environ.update(env)
    torch.set_num_threads(1)
    sys.argv = [f"{name}.py", *map(str, flags)]
    module = importlib.import_module(name)
    module.evaluate = lambda *_: sys.exit(0)        # the run ends when all is trained
    for fault in faults:
        fault(module)
    D.program(module.main)


class Run:
    """A process of a script, forked from one that has imported everything: it starts in 20 ms, not 5 s."""
    def __init__(self, name, flags, *faults, **env):
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(["test_faults", "torch._dynamo", *FLAGS])
        out = next(f for f in flags if f.startswith("--out=")).removeprefix("--out=")
        self.log = Path(f"{out}.{time.monotonic_ns()}.log")
        self.process = forks.Process(target=child, args=(name, flags, self.log, faults, env))
        self.process.start()

    def wait(self):
        """-> exit code (killed by signal n: -n), all that it printed"""
        self.process.join(600)
        self.process.kill()
        return self.process.exitcode, self.log.read_text()


def at(k, number, module):
    """The signal comes in the k-th backward pass of the process, counted from 1."""
    real, calls = torch.Tensor.backward, []

    def backward(loss, *args, **more):
        calls.append(1)
        if len(calls) == k:
            signal.raise_signal(number)
        return real(loss, *args, **more)
    torch.Tensor.backward = backward


def after_a_save(module):
    """The process is killed in the second step after the first save of a fourth step: mostly within a stage."""
    save, backward, steps = D.save_checkpoint, torch.Tensor.backward, []

    def saves(path, state):
        save(path, state)
        steps.extend(["save"] if state["step"] == 4 and not steps else [])

    def counts(loss):
        steps.extend(["step"] if steps else [])
        if len(steps) == 3:
            signal.raise_signal(signal.SIGKILL)
        return backward(loss)
    D.save_checkpoint, torch.Tensor.backward = saves, counts


def half_a_checkpoint(module):
    """The process is killed when its second checkpoint is half written."""
    real, calls = torch.save, []

    def save(state, file):
        real(state, file)
        calls.append(1)
        if len(calls) == 2:
            os.truncate(file, os.path.getsize(file) // 2)
            signal.raise_signal(signal.SIGKILL)
    torch.save = save


def disk_is_full(module):
    """No file can be longer than 20 kB, so no checkpoint can be written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def no_numbers(module):
    """The run ends with a results.json without numbers."""
    module.evaluate, module.M.table = lambda *_: {}, lambda *_: sys.exit(0)


def no_noise(module):
    """No random numbers and no bfloat16: what is learned depends on the data alone."""
    torch.randn = lambda *shape, generator=None, **more: torch.zeros(*shape, **more)
    torch.rand = lambda *shape, generator=None, **more: torch.full(shape, 0.5, **more)
    torch.nn.functional.dropout = lambda x, *_: x
    module.amp = lambda device: contextlib.nullcontext()
    if hasattr(module, "VQVAE"):        # it would move idle codes to latents that the first process draws
        module.VQVAE.revive = lambda vq, *_: vq.codes.data.copy_(
            torch.linspace(-1, 1, vq.codes.numel()).view_as(vq.codes)) if vq.trained == 0 else None


def same(u, v):
    if torch.is_tensor(u):
        return torch.equal(u, v)
    if isinstance(u, dict):
        return u.keys() == v.keys() and all(same(u[k], v[k]) for k in u)
    return len(u) == len(v) and all(map(same, u, v)) if isinstance(u, (list, tuple)) else u == v


def networks(out, *parts):
    """-> checkpoint name: its parts"""
    states = {p.name: torch.load(p, weights_only=True) for p in sorted(out.glob("ckpt*.pt"))}
    return {name: {part: state[part] for part in parts} for name, state in states.items()}


def digest(folder, pattern="*"):
    """All files but the lock, which is empty. -> name: hash"""
    found = [p for p in folder.glob(pattern) if p.name != ".lock"]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


@pytest.fixture(scope="module")
def unbroken(files, tmp_path_factory):
    """name -> the folder of a run that met no fault, made when first asked for"""
    made = {}

    def of(name):
        if name not in made:
            out = tmp_path_factory.mktemp("unbroken") / name
            code, said = Run(name, [f"--data={files[name]}", f"--out={out}", *FLAGS[name].split()]).wait()
            assert code == 0, said
            made[name] = out
        return made[name]
    return of


# ------------------------------------------------------------------------------------- runs that are cut

@EVERY
def test_a_run_that_is_killed_and_stopped_ends_bitwise_like_an_unbroken_one(name, unbroken, files, tmp_path):
    out = tmp_path / "out"
    command = [f"--data={files[name]}", f"--out={out}", *FLAGS[name].split()]

    def meets(wanted, words, *faults):
        code, said = Run(name, command, *faults).wait()
        assert code in wanted and words in said and "Traceback" not in said, (words, code, said)
        assert said.count("error: ") == (code == 1), said

    meets([143], "saved step 3", partial(at, 3, signal.SIGTERM))
    if name == "diffae":            # the same lines in all four
        meets([130], "saved step 5", partial(at, 2, signal.SIGINT))
        before = digest(out, "ckpt*")
        meets([1], "could not be written", disk_is_full)
        assert digest(out, "ckpt*") == before
        meets([-9], "", half_a_checkpoint)      # the second: so the next stage has none yet
    for _ in range(4):              # the number of stages, or more
        meets([-9, 0], "", after_a_save)
    for log in out.glob("log*.jsonl"):      # what others wrote into the logs does not matter
        log.write_text('{"half a li\n[1]\n{"step": "x"}\n{"loss": 1}\n' + log.read_text() + '{"step": 7, "lo')
    meets([0], "")
    a, b = (networks(folder, "step", "model", "ema", "optimizer") for folder in (unbroken(name), out))
    assert a.keys() == b.keys() and [k for k in a if not same(a[k], b[k])] == []


@EVERY
def test_minutes_end_every_network_early_and_the_run_says_so(name, unbroken, files, tmp_path):
    command = [f"--data={files[name]}", f"--out={tmp_path / 'run'}", *FLAGS[name].split()]
    code, said = Run(name, [*command, "--minutes=1e-9"], no_numbers).wait()
    assert code == 0, said
    assert {*re.findall(r"(\S+) s left", said)} == {"0"}         # not the time that all --steps would take
    before, states = digest(tmp_path / "run", "ckpt*"), networks(tmp_path / "run", "step")
    assert {state["step"] for state in states.values()} == {1}
    config = json.loads((tmp_path / "run/results.json").read_text())["config"]
    assert {v for k, v in config.items() if k.endswith("steps")} == {1}
    if name == "diffae":
        assert Run(name, [*command, "--minutes=1e-9"]).wait()[0] == 0
        assert digest(tmp_path / "run", "ckpt*") == before      # the time of the first run counts
    code, said = Run(name, ["--minutes=9", *command]).wait()
    if name in ("cond_ldm", "ldae"):        # a later stage is built on the first, which must not train on
        assert code == 2 and "choose another --out" in said and digest(tmp_path / "run", "ckpt*") == before
    else:
        parts = "step", "model", "ema", "optimizer"
        assert same(*(networks(out, *parts)["ckpt.pt"] for out in (unbroken(name), tmp_path / "run")))


@pytest.mark.parametrize("name", ["diffae", "cond_ldm"])
def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(name, files, tmp_path):
    flags = [f"--data={files[name]}", f"--out={tmp_path / 'out'}", *FLAGS[name].split()]
    code, said = Run(name, [f.replace("lr=1e-3", "lr=1e9") for f in flags]).wait()
    line = next(t for t in said.splitlines() if t.startswith("error: "))
    assert code == 1 and "steps " in line and "lr " in line and "Traceback" not in said, said
    for state in networks(tmp_path / "out", "model", "ema").values():
        assert all(v.isfinite().all() for part in state.values() for v in part.values())


# ------------------------------------------------------------------------------------- refusals

def test_a_spoilt_checkpoint_is_refused_and_nothing_changes(unbroken, files, tmp_path, capsys):
    """One that is cut off, and one of another network. test_data.py has the other kinds."""
    out, (_, error_of) = tmp_path / "out", runs_of(importlib.import_module("diffae"))
    shutil.copytree(unbroken("diffae"), out)
    path = out / "ckpt.pt"
    state = torch.load(path, weights_only=True)
    path.write_bytes(path.read_bytes()[:-1000])
    for _ in range(2):
        before = digest(out)
        line = error_of(capsys, f"--data={files['diffae']}", f"--out={out}", *FLAGS["diffae"].split())
        assert str(path) in line and digest(out) == before, line
        key = next(k for k, v in state["ema"].items() if v.ndim > 1 and len(v) > 1)
        state["ema"][key] = state["ema"][key][:1]
        torch.save(state, path)


@EVERY
def test_a_run_of_another_kind_is_refused_and_nothing_changes(name, unbroken, files, capsys, tmp_path):
    out, (_, error_of) = unbroken(name), runs_of(importlib.import_module(name))
    command = [f"--data={files[name]}", f"--out={out}", *FLAGS[name].split()]
    before = digest(out)
    for flag, words in {
            "--seed=3": "seed 0 -> 3", "--lr=0.5": "lr 0.001 -> 0.5", "--stepz=3": "unknown flag --stepz",
            f"--data={files[name, 'train']}": "other images",
            "--data=/no/such.h5": "/no/such.h5: no such file"}.items():
        line = error_of(capsys, *command, flag)
        assert words in line and digest(out) == before, (flag, line)
    with M.lock(out):
        assert "another run is using this folder" in error_of(capsys, *command) and digest(out) == before
    (tmp_path / "linked").mkdir()
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "linked" / ".lock").symlink_to(tmp_path / "precious")
    assert "cannot be used" in error_of(capsys, *command, f"--out={tmp_path / 'linked'}")
    assert (tmp_path / "precious").read_text() == "kept" and os.listdir(tmp_path / "linked") == [".lock"]


def test_a_field_that_a_checkpoint_lacks_means_its_default(unbroken, files, capsys, tmp_path):
    """So a new field of Config does not orphan old checkpoints, unless it is set to something else."""
    module, out = importlib.import_module("diffae"), tmp_path / "out"
    shutil.copytree(unbroken("diffae"), out)
    command = [f"--data={files['diffae']}", f"--out={out}", *FLAGS["diffae"].split()]
    path = out / "ckpt.pt"
    state = torch.load(path, weights_only=True)
    assert state["config"].pop("seed") == module.Config.seed
    torch.save(state, path)
    code, said = Run("diffae", command).wait()
    assert code == 0, said
    state["config"].pop("batch")
    torch.save(state, path)
    assert f"batch {module.Config.batch} -> 6" in runs_of(module)[1](capsys, *command)


# ------------------------------------------------------------------------------------- who is trained on

@EVERY
def test_weights_depend_on_training_rows_and_on_no_others(name, unbroken, files, tmp_path):
    """Other images and masks of everyone else: all networks stay bitwise the same. Of training rows: none."""
    equal = {}
    for part in ("train", "unseen"):
        out = tmp_path / part
        code, said = Run(name, [f"--data={files[name, part]}", f"--out={out}", *FLAGS[name].split()]).wait()
        assert code == 0, said
        a, b = (networks(folder, "model", "ema") for folder in (unbroken(name), out))
        equal[part] = [k for k in a if same(a[k], b[k])]
    assert equal == {"train": [], "unseen": list(a)}


@EVERY
def test_two_processes_train_like_one(name, files, tmp_path):
    """Through gloo. Each sees half of every batch; all weights end as those of one process, to rounding."""
    command = [f"--data={files[name]}", *FLAGS[name].split()]
    code, said = Run(name, [*command, f"--out={tmp_path / 'one'}"], no_noise).wait()
    assert code == 0, said
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    command.append(f"--out={tmp_path / 'two'}")
    both = [Run(name, command, no_noise, RANK=rank, LOCAL_RANK=rank, **env) for rank in "01"]
    assert [run.wait()[0] for run in both] == [0, 0], [run.log.read_text() for run in both]
    one, two = (networks(tmp_path / n, "model", "ema") for n in ("one", "two"))
    assert one.keys() == two.keys()
    for ckpt, part in ((ckpt, part) for ckpt in one for part in ("model", "ema")):
        for key, value in one[ckpt][part].items():
            off = (value.double() - two[ckpt][part][key].double()).abs().max().item()
            assert off < 1e-5, (ckpt, part, key, off)
