"""Every script, run as a program, against the same list of faults. Each ends with the right exit code and one line;
nothing that was saved is lost, and the same command goes on to what an unbroken run would have left.

Exit codes: 0 done, 2 the user can mend it, 1 the machine must (disk, divergence), 143 and 130 told to stop.

 1 kill -9 at random moments           met_every_fault (24 kills)    17 links, external storage     test_data nothing_outside
 2 kill -9 inside a save               met_every_fault               18 bombs; larger than memory   test_data bad_files; 40_gb
 3 disk full: checkpoint, log, PNG     met_every_fault               19 another run's checkpoint    refused
 4 SIGTERM, twice, in a save           met_every_fault               20 pickles that run code       refused; test_repo grep
 5 SIGTERM, SIGKILL to one of two      two_processes, torchrun       21 damaged, one byte flipped   refused; flipped_byte
 6 NaN in the data, also at step k     met_every_fault; test_data    22 out read-only, a file       refused
 7 loss not finite                     met_every_fault; test_diffae  23 out of GPU memory           met_every_fault; in_smaller
 8 constant, never written             test_data bad_content, files  24 no CUDA                     refused; without_a_gpu
 9 type, range, shape                  test_data bad_content         25 no compiler                 without_a_compiler
10 missing key, wrong case             test_data bad_content         26 two runs in one folder      refused
11 no rows, few rows, empty split      test_data; small_data         27 other threads, processes    two_processes
12 lengths that differ                 test_data bad_content         28 Ctrl-C                      met_every_fault
13 one class only, labels missing      test_diffae one_class; data   29 read while it is replaced   replaced_while
14 a subject in two parts              test_data bad_content         30 data changed                refused
15 survival times                      test_normative bad_cohorts    31 | head, ASCII, no terminal  met_every_fault; a_reader
16 truncated, not HDF5, missing        test_data bad_files           32 compiled gradients          test_diffae compiled
"""
import errno
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from conftest import ENV, ROOT, runs_of
import cond_ldm
import data as D
import diffae
import ldae
import metrics as M
import normative

SCRIPTS = {"diffae": diffae, "normative": normative, "ldae": ldae, "cond_ldm": cond_ldm}
EVERY = pytest.mark.parametrize("name", SCRIPTS)
COMMON = ("--batch=6 --save_every=5 --log_every=2 --bf16=false --device=cpu --S=2 --eval_images=2 --lr=1e-3 "
          "--dropout=0 --groups=0")
IMAGES = "--size=16 --base=16 --patch=1 --mult=1,2 --enc_mult=1,2,2 --blocks=1 --attention=8 --z_dim=8 --steps=20 "
FLAGS = {k: (COMMON + " " + v).split() for k, v in {
    "diffae": IMAGES + "--draws=1 --prior_steps=0 --recipe=paper",
    "normative": IMAGES,
    "ldae": "--patch=2 --ae_mult=1,2 --ae_base=8 --ae_blocks=1 --z_ch=2 --disc_base=4 --disc_layers=1 --base=16 --mult=1,2 "
            "--blocks=1 --attention=1 --slab=2 --enc_patch=2 --enc_base=16 --enc_mult=1,2 --z_dim=8 --adv_warmup=4 "
            "--ae_lr=1e-3 --ldm_lr=1e-3 --ae_steps=20 --ae_batch=6 --ldm_steps=20 --ldm_batch=6 --steps=20 --augment=0.5 "
            "--T=20 --prior_steps=0 --rivals=false",
    "cond_ldm": "--size=16 --patch=1 --channels=8,16 --depth=1 --codebook=32 --gan_channels=8,16 --gan_start=2 "
                "--unet=16,32 --heads=2 --attention=8 --cond_ch=8 --vq_steps=20 --steps=20 --seg_steps=20 --few=2 "
                "--aug_images=4 --seg=8,16 --variety=20 --w=1 --idle=6 --rivals=false",
}.items()}
FLAGS["cond_ldm"].remove("--dropout=0")
NETWORKS = {"diffae": ["ckpt", "ckpt_vae"], "normative": ["ckpt", "ckpt_no_age", "ckpt_vae"],
            "ldae": ["ckpt_A", "ckpt_B", "ckpt_C"], "cond_ldm": ["ckpt_vq", "ckpt_ldm", "ckpt_seg"]}


# --------------------------------------------------------------------------------- tiny data, and runs of programs

def columns(name, seed=0):
    """28 subjects, two images (ldae: volumes) each: what every script needs, and images that are floats."""
    rng = np.random.default_rng(seed)
    shape = (16, 16, 16) if name == "ldae" else (16, 16)
    axes = np.meshgrid(*[np.linspace(-1, 1, s) for s in shape], indexing="ij")
    r = np.sqrt(sum(a ** 2 for a in axes))[None]
    inner = np.repeat(rng.uniform(0.2, 0.5, 28), 2).reshape(-1, *[1] * len(shape))
    mask = np.where(r < inner, 1, np.where(r < inner + 0.25, 2, np.where(axes[-1] < -0.6, 3, 0)))
    grey = np.rint(np.array([30, 220, 90, 150])[mask] + rng.uniform(0, 30, mask.shape))
    label, n = np.repeat(np.arange(28) % 4 == 0, 2).astype(int), 56
    return dict(image=(grey / 255).astype(np.float32), mask=mask.astype(np.uint8), label=label, has_infarct=label,
                subject=np.repeat([f"p{seed}{i:02d}" for i in range(28)], 2), view=np.tile([0, 1], 28),
                age=np.repeat(np.linspace(30, 70, 28)[rng.permutation(28)], 2).astype(np.float32),
                session=np.tile(np.float32([0, 6]), 28), factor_size=inner.ravel()[:n].astype(np.float32))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """name -> file, and (name, "nan") -> the same with one voxel of every image not a number."""
    folder, made = tmp_path_factory.mktemp("data"), {}
    for name in SCRIPTS:
        for kind in (name, (name, "nan")):
            c = columns(name)
            if kind != name:
                c["image"][(slice(None), *[3] * (c["image"].ndim - 1))] = np.nan
            made[kind] = str(folder / f"{'_'.join([kind] if kind == name else kind)}.h5")
            D.write(made[kind], [c], dict(D.CINE_NAMES))
        made[name, "other"] = str(folder / f"{name}_other.h5")
        D.write(made[name, "other"], [columns(name, seed=1)], dict(D.CINE_NAMES))
    return made


def child(name, flags, faults, env, ends):
    """Body of a process: the script with these flags, after the faults were laid. ends: its stdout and stderr."""
    for fd, end in zip((1, 2), ends):
        os.dup2(end.fileno(), fd)
        end.close()
    os.environ.update(env)
    torch.set_num_threads(1)
    sys.argv = [f"{name}.py", *map(str, flags)]
    M.bootstrap = partial(M.bootstrap, n=10)
    for fault in faults:
        fault(SCRIPTS[name])
    D.program(SCRIPTS[name].main)


@pytest.fixture(scope="session")
def forks():
    """Processes that are forked from one which has imported everything, but run nothing: 20 ms, not 4 s."""
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    context.set_forkserver_preload(["test_faults", "torch._dynamo", "matplotlib.figure", "sklearn.linear_model", "lifelines"])
    return context


class Run:
    """One process of a script."""
    def __init__(self, context, name, flags, *faults, **env):
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        self.ends = [r for r, _ in pipes]
        self.process = context.Process(target=child, args=(name, flags, faults, env, [w for _, w in pipes]))
        self.process.start()
        for _, w in pipes:
            w.close()

    def wait(self, timeout=300):
        """-> exit code, stdout, stderr; killed by signal n: -n"""
        text = ["", ""]
        open_, late = dict(zip(self.ends, range(2))), time.monotonic() + timeout
        while open_:
            for end in multiprocessing.connection.wait(list(open_), max(0, late - time.monotonic())):
                got = os.read(end.fileno(), 65536)
                text[open_[end]] += got.decode()
                if not got:
                    del open_[end]
            if time.monotonic() > late:
                self.process.kill()
                raise TimeoutError(f"still running: {text}")
        self.process.join()
        return self.process.exitcode, *text


@pytest.fixture(scope="module")
def start(forks):
    """start(name, flags, *faults) -> (exit code, stdout, stderr) of the finished process"""
    return lambda name, flags, *faults, **env: Run(forks, name, flags, *faults, **env).wait()


def no_evaluation(m):
    """The run ends when all is trained: numbers and pictures are not in question."""
    m.evaluate = lambda *a: sys.exit(0)


@pytest.fixture(scope="module")
def unbroken(start, files, tmp_path_factory):
    """name -> the folder of a run that met no fault. Made when first asked for."""
    made = {}

    def of(name):
        if name not in made:
            out = tmp_path_factory.mktemp("unbroken") / name
            code, said, err = start(name, [f"--data={files[name]}", f"--out={out}", *FLAGS[name]])
            assert code == 0 and (out / "results.json").exists(), err
            made[name] = out
        return made[name]
    return of


def same(u, v, tolerance=0.0):
    if torch.is_tensor(u):
        return u.shape == v.shape and (u.double() - v.double()).abs().max().item() <= tolerance if u.numel() else True
    if isinstance(u, dict):
        return u.keys() == v.keys() and all(same(u[k], v[k], tolerance) for k in u)
    return len(u) == len(v) and all(same(a, b, tolerance) for a, b in zip(u, v)) if isinstance(u, (list, tuple)) else u == v


def log_of(path):
    """A log without what depends on the machine."""
    return [{k: v for k, v in json.loads(t).items() if k not in ("img_s", "peak_gb")} for t in path.read_text().splitlines()]


def same_run(name, a, b):
    """Bitwise the same weights, averages, optimizers and logs in two folders."""
    for ckpt in NETWORKS[name]:
        x, y = (torch.load(d / f"{ckpt}.pt", weights_only=True) for d in (a, b))
        assert x["step"] == y["step"] == 20 and all(same(x[k], y[k]) for k in x), ckpt
        assert log_of(a / f"{ckpt.replace('ckpt', 'log')}.jsonl") == log_of(b / f"{ckpt.replace('ckpt', 'log')}.jsonl"), ckpt


# --------------------------------------------------------------------------------- faults, laid before main() runs

def at(k, action, m):
    """action(loss) -> loss or None before the k-th backward pass of the process, counted from 1."""
    real, calls = torch.Tensor.backward, []

    def backward(loss, *args, **more):
        calls.append(1)
        changed = action(loss) if len(calls) == k else None
        return real(loss if changed is None else changed, *args, **more)
    torch.Tensor.backward = backward


def tell(*numbers):
    """Signals to this process."""
    return partial(_tell, numbers)


def _tell(numbers, loss):
    for n in numbers:
        os.kill(os.getpid(), n)


def no_memory(loss):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def not_a_number(loss):
    return loss * float("nan")


def room(size, *numbers):
    """From now on no file can be longer than `size` bytes, or than the newest log and half a line more."""
    return partial(_room, size, numbers)


def _room(size, numbers, loss):
    out = Path(next(a for a in sys.argv if a.startswith("--out=")).removeprefix("--out="))
    newest = max(out.glob("log*.jsonl"), key=os.path.getmtime)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size or newest.stat().st_size + 10, hard))
    _tell(numbers, loss)


def replace_file(new, path):
    return partial(_replace_file, new, path)


def _replace_file(new, path, loss):
    shutil.copy(new, f"{path}.new")
    os.replace(f"{path}.new", path)


def in_save(number, m):
    """The signal comes when half of a checkpoint is written."""
    real = torch.save

    def half(state, file):
        whole = io.BytesIO()
        real(state, whole)
        file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), number)
        time.sleep(60)
    torch.save = half


def streamed(m):
    """Data that is too large for memory."""
    D.load = partial(D.load, max_gb=0)
    D.Loader.__init__.__defaults__ = (None, 0.0)


def clock_runs_backwards(m):
    """On a terminal, whose bar reads the clock."""
    import tqdm.std
    now = [time.time()]

    def earlier():
        now[0] -= 3600
        return now[0]
    time.time = tqdm.std.time = earlier
    to, (ours, end) = os.dup(2), os.openpty()
    os.dup2(end, 2)
    threading.Thread(target=lambda: [os.write(to, b) for b in iter(lambda: os.read(ours, 4096), b"")], daemon=True).start()


def nobody_reads(m):
    """stdout and stderr are pipes without a reader, and the locale knows ASCII only."""
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    os.dup2(write, 2)
    sys.stdout = open(1, "w", encoding="ascii", closefd=False)


def read_only(m):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")
    Path.mkdir = refuse


def no_files(m):
    """This process cannot write a byte into any file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


# --------------------------------------------------------------------------------- cases 1 to 7, 23, 28, 31

@EVERY
def test_a_run_that_met_every_fault_ends_like_one_that_met_none(name, start, forks, unbroken, files, tmp_path):
    """One folder, one command, a fault at every start. In the end: bitwise the unbroken run's networks and logs."""
    data, out, rng = tmp_path / "data.h5", tmp_path / "out", random.Random(name)
    shutil.copy(files[name], data)
    command = [f"--data={data}", f"--out={out}", *FLAGS[name]]

    def meets(code, word, *faults, flags=()):
        """The run ends with the code and one line that holds the word; checkpoints are whole; nothing is left over."""
        got, said, err = start(name, [*command, *flags], *faults, no_evaluation)
        lines = [t for t in err.splitlines() if not t.startswith("warning: ") and "%|" not in t]
        assert got == code, (word, got, said, err)
        if code in (1, 2):
            assert len(lines) == 1 and lines[0].startswith("error: "), (word, err)
        assert word in (lines or [""])[-1] + said, (word, said, err)
        for path in out.glob("*.pt"):
            assert zipfile.ZipFile(path).testzip() is None
        if code > 0 and signal.SIGTERM not in faults:
            assert not [p for p in os.listdir(out) if p.endswith((".tmp", ".part"))], word

    meets(143, "saved step 3; resume", partial(at, 3, tell(signal.SIGTERM)))
    meets(2, "image[", streamed, partial(at, 1, replace_file(files[name, "nan"], data)), flags=["--save_every=50"])
    meets(2, "values NaN or Inf")                                                     # and so at the next start
    shutil.copy(files[name], data)
    meets(2, "--accum 2 goes on", partial(at, 2, no_memory))
    meets(1, "not finite at step", partial(at, 2, not_a_number))
    meets(1, ".pt: could not be written", partial(at, 2, room(20_000, signal.SIGTERM)))
    meets(143, "saved step", partial(at, 4, tell(signal.SIGUSR1)))                    # after a save that was due
    meets(1, ".jsonl: could not be written", partial(at, 1, room(0)), flags=["--log_every=1"])
    meets(1, "preview", partial(at, 1, room(300)), flags=["--save_every=1"])
    meets(130, "saved step", partial(at, rng.randint(1, 4), tell(signal.SIGINT)))
    meets(143, "", partial(at, 2, tell(signal.SIGTERM, signal.SIGTERM)))              # the second does not wait
    got, said, err = start(name, command, partial(at, 2, tell(signal.SIGTERM)), partial(in_save, signal.SIGTERM))
    assert got == 143 and "saved" not in said and len(list(out.glob("*.part"))) == 1
    meets(143, "saved step", clock_runs_backwards, partial(at, 6, tell(signal.SIGTERM)))
    meets(-9, "", partial(in_save, signal.SIGKILL))
    assert list(out.glob("*.part"))
    for _ in range(3):
        meets(-9, "", partial(at, rng.randint(1, 4), tell(signal.SIGKILL)))
    for _ in range(2):                                                                # and wherever it is then
        run = Run(forks, name, command, no_evaluation)
        time.sleep(rng.uniform(0.5, 2))
        run.process.kill()
        run.wait()
    whole = unbroken(name)
    (out / "results.json").write_bytes((whole / "results.json").read_bytes()[:500])
    (out / ".curves.png.7.tmp").write_bytes(b"half a picture")
    code, said, err = start(name, command, nobody_reads)
    assert code == 0
    same_run(name, whole, out)
    a, b = (json.loads((d / "results.json").read_text())["metrics"] for d in (whole, out))
    times = {k for k in a if k.split(".")[0].endswith(("_s", "peak_gb", "throughput_ratio", "train_ratio"))}
    assert a.keys() == b.keys() and all(a[k] == b[k] for k in a.keys() - times)
    assert not [p for p in os.listdir(out) if p.endswith((".tmp", ".part"))]


# --------------------------------------------------------------------------------- cases 19 to 22, 24, 26, 29, 30: refusals

class Bomb:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["BOMB"],)


def damaged(path, how):
    """Spoil a checkpoint."""
    good = path.read_bytes()
    if how == "bomb in torch":
        torch.save({"step": 1, "run": Bomb()}, path)
    else:
        path.write_bytes({"truncated": good[:-1000], "empty": b"", "text": b"a,b\n1,2\n", "bomb": pickle.dumps(Bomb()),
                          "one byte": good[:len(good) // 2] + bytes([good[len(good) // 2] ^ 1]) + good[len(good) // 2 + 1:],
                          "of another program": good}[how])
        if how == "of another program":
            state = torch.load(path, weights_only=True)
            torch.save({**state, "run": {**state["run"], "script": "nnunet"}}, path)


@EVERY
def test_what_is_refused_changes_nothing(name, start, unbroken, files, tmp_path, monkeypatch):
    """One line and exit 2 before anything is trained; every file of the finished run is as it was, and still good."""
    out, mark = tmp_path / "out", tmp_path / "exploded"
    monkeypatch.setenv("BOMB", str(mark))
    shutil.copytree(unbroken(name), out)
    command = [f"--data={files[name]}", f"--out={out}", *FLAGS[name]]
    kept = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file() and p.name != ".lock"}

    def refused(word, *flags, faults=(), **env):
        code, said, err = start(name, [*command, *flags], *faults, **env)
        lines = [t for t in err.splitlines() if not t.startswith("warning: ")]
        assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and word in lines[0], (word, code, said, err)
        assert " step " not in said

    if not torch.cuda.is_available():
        refused("--device cuda", "--device=cuda")
    (tmp_path / "file").write_text("not a folder")
    refused("cannot be written", f"--out={tmp_path / 'file'}")
    refused("Read-only file system", f"--out={tmp_path / 'new'}", faults=[read_only])
    refused("no such file", "--data=/no/such.h5")
    refused("seed 0 -> 3", "--seed=3")
    refused("data '", f"--data={files[name, 'other']}")
    refused("not divisible", "--accum=4")
    with SCRIPTS[name].lock(out):
        refused(f"in use by process {os.getpid()} on ")
    first = out / f"{NETWORKS[name][0]}.pt"
    for how in ("truncated", "empty", "text", "bomb", "bomb in torch", "one byte", "of another program"):
        damaged(first, how)
        refused("made by another run" if how == "of another program" else "put a copy back", BOMB=str(mark))
        assert not mark.exists()
        first.write_bytes(kept[first.name])
    changed = {p.name for p in out.iterdir() if p.name in kept and p.read_bytes() != kept[p.name]}
    assert changed <= {"config.json"}, changed
    (out / "results.json").unlink()
    code, said, err = start(name, command)
    assert code == 0 and (out / "results.json").exists(), err
    same_run(name, unbroken(name), out)


def test_a_flipped_byte_is_found_wherever_it_matters(tmp_path, capsys):
    """Anywhere in the file: refused, or padding between tensors, and all that is read is right."""
    path, rng, found = tmp_path / "ckpt.pt", random.Random(0), 0
    diffae.save(path, {"run": {"seed": 1}, "step": 3, "model": {k: torch.randn(300) for k in "abcd"}})
    good, whole = path.read_bytes(), diffae.restore(path, {"seed": 1})
    for at_ in range(0, len(good), 23):
        path.write_bytes(good[:at_] + bytes([good[at_] ^ (1 << rng.randrange(8))]) + good[at_ + 1:])
        try:
            state = diffae.restore(path, {"seed": 1})
        except SystemExit:
            found += 1
        else:
            assert all(same(state[k], whole[k]) for k in whole), at_
    assert found > 150 and capsys.readouterr().err.count("error: ") == found


def test_a_checkpoint_that_is_replaced_while_it_is_read(tmp_path):
    """Whoever reads gets the old or the new one, never a mixture."""
    path, ready = tmp_path / "ckpt.pt", threading.Event()
    state = lambda k: {"run": {}, "step": k, "x": torch.full((20_000,), float(k))}
    diffae.save(path, state(0))
    writer = threading.Thread(target=lambda: [diffae.save(path, state(k)) for k in range(1, 60)] and ready.set())
    writer.start()
    seen = set()
    while not ready.is_set():
        got = diffae.restore(path, {})
        assert (got["x"] == got["step"]).all()
        seen.add(got["step"])
    writer.join()
    assert len(seen) > 2 and diffae.restore(path, {})["step"] == 59


# --------------------------------------------------------------------------------- cases 25, 32: torch.compile

def test_without_a_compiler_networks_run_eager(forks, tmp_path):
    """The real torch.compile, which finds no C++ compiler: one line in the log, gradients as before."""
    def outcome(**env):
        read, write = forks.Pipe(duplex=False)
        process = forks.Process(target=compile_something, args=(write, env))
        process.start()
        write.close()
        try:
            return read.recv()
        finally:
            process.join()
    said, right = outcome(CXX="/no/such/compiler", PATH="/nowhere", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert "runs eager, torch.compile failed" in said and right


def compile_something(answer, env):
    os.environ.update(env)
    torch.set_num_threads(1)

    class Inner(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).sin() * 2

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner(3, 3)

        def forward(self, batch, g):
            return self.inner(batch["x"]).sum()
    net, batch = Net(), {"x": torch.ones(2, 3)}
    before = torch.autograd.grad(net(batch, None), list(net.parameters()))
    said = diffae.compile_checked(net, batch, diffae.Config(bf16=False), torch.Generator())
    after = torch.autograd.grad(net(batch, None), list(net.parameters()))
    answer.send((said, all(map(torch.equal, before, after))))


# --------------------------------------------------------------------------------- case 31 once more, by a real shell

def test_a_reader_who_leaves(files, tmp_path):
    """2>&1 | head -1, in a locale without arrows: the run goes on to its end, with exit code 0."""
    flags = " ".join([f"--data={files['diffae']}", f"--out={tmp_path}", *FLAGS["diffae"], "--steps=2", "--rivals=false"])
    line = f"{sys.executable} diffae.py {flags} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"
    env = {**ENV, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("diffae: preset") and not done.stderr, done
    assert json.loads((tmp_path / "results.json").read_text())["metrics"]["recon_ssim"]["value"] > -1


# --------------------------------------------------------------------------------- cases 11, 23, 24: small things

@EVERY
def test_small_data_and_no_gpu(name, start, tmp_path):
    """Fewer images than a batch: works. --device is not given: says why there is no GPU."""
    path = tmp_path / "small.h5"
    D.write(str(path), [{k: v[:32] for k, v in columns(name).items()}], dict(D.CINE_NAMES))
    flags = [f for f in FLAGS[name] if not f.startswith("--device") and "steps" not in f]
    code, said, err = start(name, [f"--data={path}", f"--out={tmp_path / 'out'}", *flags, "--steps=1", *(
        {"ldae": ["--ae_steps=1", "--ldm_steps=1"], "cond_ldm": ["--vq_steps=1", "--seg_steps=1"]}.get(name, [])),
        "--batch=40", *(["--prior_steps=0"] if name in ("diffae", "ldae") else [])], no_evaluation)
    assert code == 0 and "step 1 of 1" in said, err
    assert torch.cuda.is_available() or "no GPU is used: " in said


def test_what_does_not_fit_is_evaluated_in_smaller_pieces():
    """A GPU that holds 5 images at a time."""
    sizes = []

    def fn(x):
        sizes.append(len(x))
        if len(x) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x + 1
    x = torch.arange(30.0)
    assert torch.equal(diffae.in_batches(fn, x), x + 1) and max(sizes[4:]) == 4
    with pytest.raises(torch.OutOfMemoryError):
        diffae.in_batches(lambda x: fn(torch.ones(6)), x)


# --------------------------------------------------------------------------------- several processes, several passes

def together(forks, name, flags, faults=((), ())):
    """One run of two processes, as torchrun would start them. -> their (exit code, stdout, stderr)"""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    runs = [Run(forks, name, flags, *faults[r], no_evaluation, RANK=str(r), LOCAL_RANK=str(r), **env) for r in (0, 1)]
    return [run.wait() for run in runs]


@EVERY
def test_two_processes_give_the_run_of_one(name, forks, unbroken, files, tmp_path):
    """After one was killed and one was told to stop. 40 rows in batches of 6: epochs end within a batch. The second
    process could not write a byte if it tried."""
    command = [f"--data={files[name]}", f"--out={tmp_path}", *FLAGS[name]]
    killed = together(forks, name, command, ((), [no_files, partial(at, 8, tell(signal.SIGKILL))]))
    assert killed[1][0] == -signal.SIGKILL and killed[0][0] != 0, killed         # the other one does not wait for ever
    stopped = together(forks, name, command, ((), [no_files, partial(at, 2, tell(signal.SIGTERM))]))
    assert [code for code, _, _ in stopped] == [143, 143] and "saved step 7" in stopped[0][1], stopped
    done = together(forks, name, command, ((), [no_files]))
    assert [code for code, _, _ in done] == [0, 0], done
    for ckpt in NETWORKS[name]:
        a, b = (torch.load(d / f"{ckpt}.pt", weights_only=True) for d in (unbroken(name), tmp_path))
        for k in ("model", "ema"):
            worst = max((a[k][p].double() - b[k][p].double()).abs().max().item() for p in a[k])
            assert worst < 1e-5, (ckpt, k, worst)
        logs = [log_of(d / f"{ckpt.replace('ckpt', 'log')}.jsonl")[1:] for d in (unbroken(name), tmp_path)]
        losses = [[r["loss"] for r in log] for log in logs]
        assert len(losses[0]) == len(losses[1]) > 10 and np.abs(np.subtract(*losses)).max() < 1e-5, ckpt


def test_torchrun_ends_when_a_worker_is_killed_and_goes_on_when_started_again(unbroken, files, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517", ROOT / "diffae.py",
               f"--data={files['diffae']}", f"--out={tmp_path}", *FLAGS["diffae"], "--rivals=false"]
    job = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "ckpt.pt").exists() and job.poll() is None:
        time.sleep(0.02)
    os.kill(int((tmp_path / ".lock").read_text().split()[0]), signal.SIGKILL)
    assert job.wait(timeout=120) != 0
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = (torch.load(d / "ckpt.pt", weights_only=True) for d in (unbroken("diffae"), tmp_path))
    assert a["step"] == b["step"] == 20 and same(a["model"], b["model"], 1e-5)


@EVERY
def test_passes_over_parts_give_the_gradient_of_the_batch(name, files, tmp_path, monkeypatch):
    """--accum 2, 3 and 6 against 1, for every network that the script trains: gradients, loss and counters."""
    m, tested = SCRIPTS[name], []

    def check(stage, make, cfg, steps, loader, facts, watch=None):
        torch.manual_seed(0)
        model, found = make(cfg).train(), {}
        with torch.no_grad():
            for p in model.parameters():         # nothing stays zero-initialised: every path carries gradient
                p.add_(0.05 * torch.randn(p.shape))
        if hasattr(model, "idle"):               # codes that move do so to latents of the first part
            model.idle.zero_()
        start = {k: v.clone() for k, v in model.state_dict().items()}
        for accum in (1, 2, 3, 6):
            model.load_state_dict(start)
            model.zero_grad()
            loss = m.backward(model, loader.batch(np.arange(6) % len(loader)), replace(cfg, accum=accum), m.Source("cpu"), 3)
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            found[accum] = [loss, *grads, *[b.clone() for b in model.buffers()]]
        scale = max(g.abs().max() for g in found[1][1:])
        for accum in (2, 3, 6):
            assert len(found[accum]) == len(found[1]) and same(found[1], found[accum], 1e-5 * max(1, scale)), (stage, accum)
        tested.append(stage)
        return model.eval(), steps
    monkeypatch.setattr(m, "stage", check)
    monkeypatch.setattr(m, "evaluate", lambda *a: sys.exit(0))
    flags = [f for f in FLAGS[name] if f != "--rivals=false"] + (["--eval"] if name == "ldae" else ["--T=20"])
    main, _ = runs_of(m)
    with pytest.raises(SystemExit):
        main(f"--data={files[name]}", f"--out={tmp_path}", *[f.replace("prior_steps=0", "prior_steps=3") for f in flags])
    assert len(tested) >= {"diffae": 3, "normative": 3, "ldae": 6, "cond_ldm": 4}[name], tested


# --------------------------------------------------------------------------------- case 18: data larger than memory

def test_40_gb_are_read_by_chunk(tmp_path):
    """A file of 42 GB (one compressed image, 40,000 times: 50 MB on disk), with 1 GB of address space to spare: loaded,
    trained on, and resized. The step hardly waits for the data."""
    path = tmp_path / "large.h5"
    image = np.random.default_rng(0).integers(0, 255, (1024, 1024), dtype=np.uint8) // 128 * 100
    image[:, 64:] = 7
    with h5py.File(path, "w") as f:
        d = f.create_dataset("image", (40_000, 1024, 1024), "u1", chunks=(1, 1024, 1024), compression="gzip")
        d[0] = image
        chunk = d.id.read_direct_chunk((0, 0, 0))[1]
        for i in range(1, len(d)):
            d.id.write_direct_chunk((i, 0, 0), chunk)
        f["subject"] = np.repeat(np.arange(10_000), 4).astype("S6")
    done = subprocess.run([sys.executable, Path(__file__), path, tmp_path], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    print(told)
    assert told["gb"] > 40 and told["peak_gb"] < 1.5 and told["waited"] < 0.5 * told["reading"], told   # 1 without read-ahead


def large(path, out):
    """Body of the process that has little memory."""
    size = int(next(t for t in open("/proc/self/status") if t.startswith("VmSize")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + 10 ** 9, size + 10 ** 9))
    data, part = D.load_study(path)
    loader = D.Loader({"image": data.image}, "cpu", np.flatnonzero(part == "train"))
    assert isinstance(data.image, D.Rows) and not loader.resident
    rows = [diffae.batch_rows(len(loader), 4, 0, k) for k in range(30)]
    began = time.perf_counter()
    for r in rows[:10]:
        loader.batch(r)
    reading = (time.perf_counter() - began) / 10
    stream, waits = loader.stream(rows[10:]), []
    for _ in rows[10:]:
        asked = time.perf_counter()
        batch = next(stream)
        waits.append(time.perf_counter() - asked)
        time.sleep(3 * reading)                   # the step: on the GPU, which leaves the processor to the reader
    assert batch["image"].shape == (4, 1, 1024, 1024)
    small = D.Rows("image", [path], [40_000], (1024, 1024), 64)
    assert D.Loader({"image": small}, "cpu", np.arange(300)).resident     # neighbours: 1.3 GB as floats
    print(json.dumps(dict(gb=data.image.nbytes / 1e9, reading=reading, waited=float(np.median(waits)),
                          peak_gb=diffae.peak_gb(torch.device("cpu")))))


if __name__ == "__main__":
    large(*sys.argv[1:])
