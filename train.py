"""The whole study: any of the four systems, on phantoms or your data, any seeds and GPUs, then one report.

    python train.py                                       # all four on phantoms, then out/report.html
    python train.py diffae normative --data-dir DIR       # DIR/emidec.h5, DIR/cohort.h5: see SYSTEMS
    python train.py --seeds 3 --gpus 8 -- --steps 9000 --ldae.S 50     # after --: flags for all, or for one

Each system is a program of its own and run as one: nothing of it is imported. The same command again goes on
where it was stopped, by whatever, and passes over what is finished: a run whose results.json is whole and was
made by this command from this code and data. Seed k > 0 of NAME runs in OUT/NAME_sk; what a script prints is
in its train.log. The report sets the numbers beside the papers' and the trivial ones, and judges what the
source documents claim by the rules in CLAIMS. Exit code: 0; 1, a script failed, the others ran all the same;
2, one line says what to do; 130 or 143, stopped, saved.
"""
import argparse, ast, base64, contextlib, hashlib, html, itertools, json, math, os, re, shlex, shutil, signal
import statistics, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:     # Windows: no lock on the output folder
    fcntl = None

ROOT = Path(__file__).resolve().parent
# script: its source, its question, its file in --data-dir (the first that is there), the columns of its table
SYSTEMS = {
    "diffae": ("Sudden cardiac death study",
               "Does a diffusion autoencoder's code, learnt without labels, see infarcts better than a VAE?",
               ["emidec.h5"],
               "recon_ssim semantic_ssim semantic_mean_ssim z_use_q4 probe_auroc patient_auroc probe_f1"),
    "normative": ("Normative diffusion autoencoders",
                  "Does distance from the healthy brain, learnt from healthy people alone, predict survival?",
                  ["cohort.h5"], "hr_per_sd c_index auroc severity_r logrank_p ks_p"),
    "cond_ldm": ("Conditional LDM",
                 "Can cardiac MR be drawn from edges and a semantic map, and does the picture obey them?",
                 ["mms", "mms.h5", "acdc", "acdc256.h5"],
                 "ssim nmse psnr fid fd_vq dice_gen edge_f1 dice_aug"),
    "ldae": ("Latent diffusion autoencoders",
             "Does the code of a latent diffusion autoencoder in 3D tell age, disease and progression, and "
             "what does the latent space gain over voxels?", ["brains.h5"],
             "ae_ssim recon_ssim_T10 recon_ssim_T100 semantic_ssim_T10 probe_auroc probe_acc age_mae "
             "interp_ssim_6m interp_mse_12m interp_ssim_24m interp_mse_24m"),
}
# With --more: further runs, which some claims are judged by. Their script, and their flags beside the others;
# x5: five times as many as the plain run's
MORE = {
    "long": ("diffae", {"recipe": "paper", "rivals": "false", "steps": "x5"}),
    "scaled": ("diffae", {"recipe": "paper", "rivals": "false", "z_scale": "3"}),
    "SA": ("cond_ldm", {"rivals": "false", "view": "SA"}),
}
TIMED = {"1/s", "GB", "x", "s"}     # units of what differs from run to run: all under "Time and memory"


def fail(message):
    """One line on stderr, exit 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def say(text, end="\n"):
    """Print at once. A closed pipe (`| head`) must not end a study."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")


# --------------------------------------------------------------------------------------------------------
# The claims. A rule compares numbers of results.json, which are intervals: it is true or false only if it is
# so for all of the interval, else None.

@dataclass
class Interval:
    """A number and its 95 % interval. A difference is taken as if the two were independent: too wide where
    both are of the same patients, so that a verdict errs towards "undecided"."""
    value: float
    low: float
    high: float

    def __sub__(self, other):
        o, v = other, self.value
        if not isinstance(o, Interval):
            return Interval(v - o, self.low - o, self.high - o)
        return Interval(v - o.value, v - o.value - math.hypot(v - self.low, o.high - o.value),
                        v - o.value + math.hypot(self.high - v, o.value - o.low))

    def __rmul__(self, k):     # k > 0
        return Interval(k * self.value, k * self.low, k * self.high)

    def __gt__(self, other):
        d = self - other
        return True if d.low > 0 else False if d.high <= 0 else None

    def __lt__(self, other):
        d = self - other
        return True if d.high < 0 else False if d.low >= 0 else None


class Numbers:
    """m["KEY.ROW"]: that number of a run, an Interval; m["LABEL:KEY.ROW"]: of that run of MORE. m.used: all.

    KEY.ours, and KEY.paper_recipe (cond_seed, cosine): of that recipe, also if the run calls it plain KEY."""
    def __init__(self, results):
        self.results, self.used = results, []

    def find(self, name):
        """Its entry in results.json; {} if there is none."""
        label, _, key = name.rpartition(":")
        results = self.results["more"].get(label) if label else self.results
        if not results:
            return {}
        published = results["config"].get("recipe") == "paper"
        for plain in ("paper_recipe", "cond_seed", "cosine") if published else ("ours",):
            key = key.removesuffix("." + plain)
        return results["metrics"].get(key, {})

    def __getitem__(self, name):
        m = self.find(name)
        if m.get("value") is None:
            raise KeyError(name)
        self.used.append(name)
        if m["n"] == 1:     # of one subject: no interval, and it decides nothing
            return Interval(m["value"], -math.inf, math.inf)
        return Interval(m["value"], *(m["value"] if end is None else end for end in m["ci"]))

    def at_full_size(self, answer):
        """None, undecided, if this is a demo."""
        return None if self.results["config"].get("preset") == "demo" else answer


BENCHMARKS = ("pca_cosine", "pca_mahalanobis", "vae_recon", "vae_latent", "brain_age_gap")
# script; what its source claims; the rule in words; the rule: true, false, None, or a list of which all must
# be true. Instead of a rule: what it would take.
CLAIMS = [
    ("diffae", "z_sem with x_T reconstructs better than a VAE (SSIM 0.66)",
     "published recipe: recon_ssim above the VAE's",
     lambda m: m["recon_ssim.paper_recipe"] > m["recon_ssim.vae"]),
    ("diffae", "z_sem alone, with a random x_T, collapses (SSIM 0.20)",
     "published recipe: semantic_ssim below half of recon_ssim",
     lambda m: m["semantic_ssim.paper_recipe"] < 0.5 * m["recon_ssim.paper_recipe"]),
    ("diffae", ".. its MSE is 91 to 202 % worse than the VAE's",
     "published recipe: semantic_mse above 1.91 times the VAE's",
     lambda m: m["semantic_mse.paper_recipe"] > 1.91 * m["semantic_mse.vae"]),
    ("diffae", ".. and so with our recipe", "ours: semantic_ssim below half of recon_ssim",
     lambda m: m["semantic_ssim.ours"] < 0.5 * m["recon_ssim.ours"]),
    ("diffae", "Reconstruction relies on x_T, z_sem adds next to nothing",
     "published recipe: another patient's z_sem raises the loss at high noise by under 5 % (z_use_q4)",
     lambda m: m["z_use_q4.paper_recipe"] < 0.05),
    ("diffae", ".. and so with our recipe", "ours: z_use_q4 below 0.05", lambda m: m["z_use_q4.ours"] < 0.05),
    ("diffae", "A VAE's code classifies better, by every measure",
     "published recipe: probe_auroc and probe_f1 below the VAE's",
     lambda m: [m[f"{k}.paper_recipe"] < m[f"{k}.vae"] for k in ("probe_auroc", "probe_f1")]),
    ("diffae", ".. and so with our recipe", "ours: the same; AUROC by the paired difference probe_auroc_gain",
     lambda m: [m["probe_auroc_gain.ours"] < 0, m["probe_f1.ours"] < m["probe_f1.vae"]]),
    ("diffae", "The cause: geometry. The code cannot say where things are",
     "published recipe: R2 of the heart's place below 0.5 (factor_r2_x, factor_r2_y)",
     lambda m: [m[f"factor_r2_{k}.paper_recipe"] < 0.5 for k in "xy"]),
    ("diffae", "Training 5 to 10 times longer improves reconstruction",
     "published recipe: recon_ssim after 5 times the steps (long) above that after 1",
     lambda m: m["long:recon_ssim.paper_recipe"] > m["recon_ssim.paper_recipe"]),
    ("diffae", ".. but classification stays below the VAE's",
     "published recipe, 5 times the steps: probe_auroc and probe_f1 below the VAE's",
     lambda m: [m[f"long:{k}.paper_recipe"] < m[f"{k}.vae"] for k in ("probe_auroc", "probe_f1")]),
    ("diffae", "Scaling z_sem in the conditioning improves reconstruction",
     "published recipe: recon_ssim with --z_scale 3 (scaled) above that without",
     lambda m: m["scaled:recon_ssim.paper_recipe"] > m["recon_ssim.paper_recipe"]),
    ("diffae", ".. and classification", "published recipe: the same of probe_auroc",
     lambda m: m["scaled:probe_auroc.paper_recipe"] > m["probe_auroc.paper_recipe"]),
    ("diffae", "Too few images were a cause", "", "needs a second run, with fewer training patients"),
    ("ldae", "A linear probe of z_sem tells Alzheimer's disease (AUROC 0.90)", "probe_auroc above 0.9",
     lambda m: m["probe_auroc"] > 0.9),
    ("ldae", ".. or at least better than chance", "probe_auroc above 0.5", lambda m: m["probe_auroc"] > 0.5),
    ("ldae", ".. and age (MAE 4.1 years)", "age_mae below 4.1", lambda m: m["age_mae"] < 4.1),
    ("ldae", ".. or at least better than guessing the mean", "age_mae below age_mae.mean",
     lambda m: m["age_mae"] < m["age_mae.mean"]),
    ("ldae", "Editing z_sem yields anatomically plausible changes", "towards disease ventricles grow and "
     "hippocampi shrink: manip_ventricle_slope above 0, manip_hippocampus_slope below",
     lambda m: [m["manip_ventricle_slope"] > 0, m["manip_hippocampus_slope"] < 0]),
    ("ldae", "A missing scan, 6 months: SSIM 0.969, MSE 0.0019",
     "6 months from the nearer scan: interp_ssim_6m above 0.969, interp_mse_6m below 0.0019",
     lambda m: [m["interp_ssim_6m"] > 0.969, m["interp_mse_6m"] < 0.0019]),
    ("ldae", "It stays good at 24 months: SSIM > 0.93, MSE < 0.004", "24 months from the nearer scan",
     lambda m: [m["interp_ssim_24m"] > 0.93, m["interp_mse_24m"] < 0.004]),
    ("ldae", ".. and so captures progression", "interp_mse_24m below that of copying the nearest scan",
     lambda m: m["interp_mse_24m"] < m["interp_mse_24m.copy_nearest"]),
    ("ldae", "Better reconstruction than a diffusion autoencoder of voxels", "recon_ssim_T10 above .dae's",
     lambda m: m["recon_ssim_T10"] > m["recon_ssim_T10.dae"]),
    ("ldae", "Inference is 20 times faster than in voxels",
     "throughput_ratio above 20; the demo's small volumes and networks decide nothing (README: 30 times)",
     lambda m: m.at_full_size(m["throughput_ratio"] > 20)),
    ("cond_ldm", "The VQ-VAE reconstructs well", "vq_ssim above that of another slice of the same heart",
     lambda m: m["vq_ssim"] > m["vq_ssim.other_slice"]),
    ("cond_ldm", "What is generated is poor (SSIM 0.40, NMSE 1.22)", "the study's condition path: NMSE above "
     "that of a constant image", lambda m: m["nmse.cond_seed"] > m["nmse.constant"]),
    ("cond_ldm", ".. and so with our condition path", "ours: NMSE above that of a constant image",
     lambda m: m["nmse.ours"] > m["nmse.constant"]),
    ("cond_ldm", "Detailed edges carry what the image looks like", "SSIM with all edges above SSIM with none",
     lambda m: m["ssim"] > m["ssim.edges_none"]),
    ("cond_ldm", ".. so a user's few strokes lose detail", "ssim and edge_f1 of few strokes below all edges'",
     lambda m: [m[f"{k}.edges_sparse"] < m[k] for k in ("ssim", "edge_f1")]),
    ("cond_ldm", "Mixing long- and short-axis views hurts",
     "SSIM on short-axis slices: trained on these alone (SA) above trained on both",
     lambda m: m["SA:ssim"] > m["ssim.view_SA"]),
    ("cond_ldm", "Too few training steps were a cause", "", "needs a second run, with more --steps"),
    ("normative", "Similarity to healthy predicts survival (hazard ratio 0.73)",
     "the published score, cosine: hr_per_sd below 1", lambda m: m["hr_per_sd.cosine"] < 1),
    ("normative", ".. and so with our score", "hr_per_sd below 1", lambda m: m["hr_per_sd.ours"] < 1),
    ("normative", "Survival separates clearly (KS test)", "cosine: p below 0.05, of KS and (as KS ignores "
     "censoring) of log-rank; and the healthier half lives longer, hr_per_sd below 1",
     lambda m: [m["hr_per_sd.cosine"] < 1, m["ks_p.cosine"] < 0.05, m["logrank_p.cosine"] < 0.05]),
    ("normative", ".. and so with our score", "the same",
     lambda m: [m["hr_per_sd.ours"] < 1, m["ks_p.ours"] < 0.05, m["logrank_p.ours"] < 0.05]),
    ("normative", "Better than generative and other benchmarks",
     f"cosine: c_index above each of {', '.join(BENCHMARKS)}",
     lambda m: [m["c_index.cosine"] > m[f"c_index.{k}"] for k in BENCHMARKS]),
    ("normative", ".. and so with our score", "the paired difference c_index_gain above 0, over each of them",
     lambda m: [m[f"c_index_gain.{k}"] > 0 for k in BENCHMARKS]),
    ("normative", "Large healthy cohorts raise statistical power", "", "needs a second run, with fewer"),
]


def judge(rule, runs):
    """A rule on the results of all seeds -> (verdict, the numbers it used, why it was not tested).

    It holds, or does not, if it does so in every seed; else an interval, or the seeds, straddle it."""
    if isinstance(rule, str) or not runs:
        return "not tested", [], rule if isinstance(rule, str) else "no run finished"
    answers = set()
    for results in runs:
        m = Numbers(results)
        try:
            found = rule(m)
        except KeyError as e:
            return "not tested", [], f"no {e.args[0]}" + (", see --more" if ":" in e.args[0] else "")
        found = found if isinstance(found, list) else [found]
        answers.add(False if False in found else None if None in found else True)
    verdict = {True: "holds", False: "does not hold"}.get(answers.pop() if len(answers) == 1 else None)
    return verdict or "undecided", list(dict.fromkeys(m.used)), ""


# --------------------------------------------------------------------------------------------------------
# The command line -> runs

@dataclass
class Run:
    """One script with one seed. flags: of the script, without --out. label: "" or one of MORE"""
    script: str
    seed: int
    flags: dict
    out: Path
    label: str = ""


def parse(argv):
    """-> settings, all plain values; a user error is one line and exit 2."""
    cut = argv.index("--") if "--" in argv else len(argv)
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False, usage="train.py [NAME ..] [flags] [-- flags of scripts]")
    p.error = fail
    p.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SYSTEMS) + "; default: all")
    p.add_argument("--data-dir", default="", help="folder of your data; phantoms for what it lacks")
    p.add_argument("--out", default="out", help="folder for everything")
    p.add_argument("--preset", choices=["demo", "paper"], help="demo: laptop, paper: GPU; default: what fits")
    p.add_argument("--seeds", type=int, default=1, help="runs of each script, with --seed 0, 1, ..")
    p.add_argument("--gpus", type=int, default=1, help="processes on a machine, through torchrun")
    p.add_argument("--nodes", type=int, default=1, help="machines; the same command on each, see README")
    p.add_argument("--more", action="store_true", help="also the runs that some claims need: see MORE")
    p.add_argument("--resume", action="store_true", help="the study in --out again, whatever its flags were")
    p.add_argument("--dry-run", action="store_true", help="print the commands and do nothing")
    args = vars(p.parse_args(argv[:cut])) | {"extra": argv[cut + 1:]}
    for name in set(args["names"]) - set(SYSTEMS):
        fail(f"{name}: no such system; choose from {', '.join(SYSTEMS)}")
    for key in ("seeds", "gpus", "nodes"):
        if args[key] < 1:
            fail(f"--{key} {args[key]}: must be at least 1")
    if args["data_dir"] and not os.path.isdir(args["data_dir"]):
        fail(f"--data-dir {args['data_dir']}: no such folder")
    args["data_dir"] = args["data_dir"] and os.path.abspath(args["data_dir"])
    args["names"] = [n for n in SYSTEMS if n in args["names"] or not args["names"]]
    return args


def flags_for(script, words):
    """Of the words after `--`: those for this script. --key value is for all, --SCRIPT.key value for one."""
    flags, key = {}, ""     # key: of the flag whose value may come next
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            whose, _, key = name.rpartition(".")
            if whose and whose not in SYSTEMS or key in ("out", "seed"):
                fail(f"--{name} after --: a prefix must name a system; --out and --seeds come before the --")
            key = key.replace("-", "_")
            mine = whose in ("", script)
            flags |= {key: value if equals else "true"} if mine else {}
            key = "" if equals else key
        elif key:
            flags |= {key: word} if mine else {}
            key = ""
        else:
            fail(f"{word} after --: the value of no flag; write --key value, or --SCRIPT.key value")
    return flags


def plan(args):
    """-> Runs"""
    runs, folder = [], args["data_dir"]
    for script in args["names"]:
        names = [os.path.join(folder, name) for name in SYSTEMS[script][2] if folder]
        found = [{"data": path} for path in names if os.path.exists(path)] or [{}]
        flags = ({"preset": args["preset"]} if args["preset"] else {}) | found[0]
        flags |= flags_for(script, args["extra"])
        labels = ["", *(label for label, (of, _) in MORE.items() if of == script and args["more"])]
        for seed, label in itertools.product(range(args["seeds"]), labels):
            own = {"seed": str(seed)} | (MORE[label][1] if label else {})
            name = script + (f"_{label}" if label else "") + (f"_s{seed}" if seed else "")
            runs.append(Run(script, seed, flags | own, Path(args["out"], name), label))
    if folder and not any("data" in run.flags for run in runs):
        wanted = ", ".join(name for script in args["names"] for name in SYSTEMS[script][2])
        fail(f"--data-dir {folder}: has none of {wanted}")
    return runs


def node(args):
    """The number of this machine among --nodes."""
    rank = os.environ.get("NODE_RANK") or os.environ.get("SLURM_NODEID") or ""
    if args["nodes"] == 1:
        return 0
    if not os.environ.get("MASTER_ADDR") or rank not in map(str, range(args["nodes"])):
        fail(f"--nodes {args['nodes']}: on each machine, MASTER_ADDR (the first machine) and NODE_RANK, 0 to "
             f"{args['nodes'] - 1} (or SLURM_NODEID), must be in the environment; see README")
    return int(rank)


def command(run, args):
    """The words of the command of a Run: through torchrun if it is several processes."""
    start, rank = [sys.executable], node(args)
    if args["gpus"] * args["nodes"] > 1:
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={args['gpus']}"]
        start += ["--standalone"] if args["nodes"] == 1 else [
            f"--nnodes={args['nodes']}", f"--node_rank={rank}", f"--master_addr={os.environ['MASTER_ADDR']}",
            f"--master_port={os.environ.get('MASTER_PORT', '29500')}"]
    return [*start, os.path.relpath(ROOT / f"{run.script}.py"), f"--out={run.out}",
            *(f"--{k}={v}" for k, v in run.flags.items())]


# --------------------------------------------------------------------------------------------------------
# Running them

def receipt(run):
    """What the results of a Run hang on: its flags, the code, the data; and they themselves. -> dict"""
    digest = lambda b: hashlib.sha256(b).hexdigest()
    data = [Path(run.flags[key]) for key in ("data", "test") if key in run.flags]
    files = [f.stat() for path in data for f in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    code = [ROOT / name for name in (f"{run.script}.py", "data.py", "metrics.py")]
    return dict(flags=run.flags, data=digest(repr([(f.st_size, f.st_mtime_ns) for f in files]).encode()),
                code=digest(b"".join(f.read_bytes() for f in code if f.exists())),
                results=digest((run.out / "results.json").read_bytes()))


def finished(run):
    """Its results; None if it must be started: not ended yet, cut in half, other flags, code or data."""
    try:
        if json.loads((run.out / "done.json").read_text()) == receipt(run):
            return json.loads((run.out / "results.json").read_text())
    except (OSError, ValueError):
        pass


def write(path, text):
    """Atomic: a crash or a full disk leaves the old file or the new one, never half of one."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def lock(out):
    """One study per folder. -> the lock, an open file. Scripts hold it, too: where a killed study left one
    running, the next study waits for its end, since what it does is not lost."""
    handle, waits = open(out / ".lock", "a+"), False
    while fcntl:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            handle.seek(0)
            holder = handle.read()
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(holder), 0)     # raises if there is no such process
            fail(f"--out {out}: in use by process {holder}; wait for it, or choose another --out")
        if not waits:
            say(f"{out}: a script that a killed study left behind is still at work; waiting for its end")
        waits = not time.sleep(1)
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    return handle


def progress(log):
    """How far a script is, in a few words: the last progress bar that it printed."""
    with open(log, "rb") as f:
        f.seek(max(0, log.stat().st_size - 4000))
        text = f.read().decode("utf-8", "replace")
    bars = re.findall(r"([^\r\n]*): +(\d+)%\|[^\r\n]*<([\d:?]+)", text)
    return "{} {} %, {} left".format(*bars[-1]) if bars else "starts"


def reason(code, said):
    """Why a script failed: its own error line, else the exception, else the signal. Torchrun's report, which
    comes after them, names none of these."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + ("; the machine may be out of memory" if name == "SIGKILL" else "")
    kinds = (r"\berror: .+", r"\b\w+Error: .+", r"Signal \d+ \(\w+\) received", r"\S.*")
    found = next(filter(None, (re.findall(kind, said) for kind in kinds)), ["it said nothing"])
    return f"exit code {code}: {found[-1].strip()[:300]}"


class Study:
    """Starts the scripts one after another, and passes signals on to the one that runs."""
    def __init__(self, args, held):
        self.args, self.held, self.child, self.caught = args, held, None, []
        for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) != signal.SIG_IGN:     # nohup stays nohup
                signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        """The script saves and ends; a second signal ends it at once."""
        self.caught.append(number)
        if self.child and self.child.poll() is None:
            self.child.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def start(self, run):
        """Run one to its end, in one line on the terminal. -> why it failed, or None"""
        run.out.mkdir(parents=True, exist_ok=True)
        first, tty, began, shown = node(self.args) == 0, sys.stdout.isatty(), time.monotonic(), 0
        log, code, why = run.out / ("train.log" if first else f"train.node{node(self.args)}.log"), None, None
        line = lambda text: f"{run.out.name:12} {time.monotonic() - began:6.0f} s  {text}"
        with open(log, "wb") as f:     # in a session of its own: Ctrl-C comes to it once, through us
            self.child = subprocess.Popen(command(run, self.args), stdin=subprocess.DEVNULL, stdout=f,
                                          stderr=f, start_new_session=True,
                                          pass_fds=[self.held.fileno()] if self.held and fcntl else [])
        if self.caught:     # in the moment before
            self.child.terminate()
        while code is None:
            if time.monotonic() - shown > (1 if tty else 600):
                shown, text = time.monotonic(), line(progress(log))
                wide = shutil.get_terminal_size().columns - 1
                say(f"\r\033[K{text[:wide]}" if tty else text, "" if tty else "\n")
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self.child.wait(0.2)
        said = log.read_text(errors="replace").replace("\r", "\n")
        saved = re.findall(r"saved step \d+", said) or ["nothing was in training"]
        if code == 0 and first:
            try:
                json.loads((run.out / "results.json").read_text())
                write(run.out / "done.json", json.dumps(receipt(run)))
            except (FileNotFoundError, ValueError):
                why = "left no whole results.json"
        elif code and not self.caught:
            why = reason(code, said)
        text = f"FAILED, {why}" if why else f"stopped, {saved[-1]}" if code else "done"
        say(("\r\033[K" if tty else "") + line(text))
        return why


# --------------------------------------------------------------------------------------------------------
# The report: Markdown blocks, which as_html makes a page of. A cell's lines after the first are small print.

CSS = """:root{color-scheme:light dark;--soft:#60666e;--line:#dcdfe2;
--good:#1a7f4b;--bad:#b3341f;--open:#8a6100}
@media(prefers-color-scheme:dark){:root{--soft:#9aa1a9;--line:#363b41;
--good:#5cc28a;--bad:#f0826c;--open:#dfb04d}}
body{margin:0 auto;max-width:62rem;padding:1rem 1rem 4rem;font:16px/1.55 system-ui,sans-serif}
h2{margin:3rem 0 .3rem;padding-top:.9rem;border-top:1px solid var(--line)}p{max-width:44rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{min-width:7rem;padding:.32rem 1.1rem .32rem 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line)}td small{display:block}.ours{font-weight:600}
th,small,.caption,summary,.not{color:var(--soft);font-weight:400}
.holds{color:var(--good)}.does{color:var(--bad)}.undecided{color:var(--open)}
img{max-width:100%;height:auto;background:#fff;margin-top:1.2rem}"""


def number(v):
    """As in the tables of the scripts."""
    from metrics import number     # here, as it takes seconds: torch
    return number(v)


def cell(metrics):
    """A number of all seeds, as text: mean ± SD over seeds; below it the 95 % interval, mean of its ends."""
    metrics = [m for m in metrics if m and m["value"] is not None]
    values, ends = [m["value"] for m in metrics], [m["ci"] for m in metrics if None not in m["ci"]]
    if not values:
        return "-"
    text = number(statistics.fmean(values))
    text += f" ± {number(statistics.stdev(values))}" if len(values) > 1 else ""
    return text + (f"\n[{', '.join(number(statistics.fmean(e)) for e in zip(*ends))}]" if ends else "")


def table(head, rows):
    """-> a Markdown table"""
    return "\n".join("| " + " | ".join(t.replace("|", "/").replace("\n", "<br>") for t in row) + " |"
                     for row in [head, ["---"] * len(head), *rows])


def evidence(name, metrics):
    """-> the name and the number of all seeds; rates are in a section of their own"""
    timed = metrics[0]["unit"] in TIMED
    return f"{name} " + ("under Time and memory" if timed else cell(metrics).replace("\n", " "))


def claims(script, runs):
    """-> the blocks of one source's claims: verdict, claim and rule, the numbers that decided"""
    rows = []
    for _, claim, words, rule in (c for c in CLAIMS if c[0] == script):
        verdict, used, why = judge(rule, runs)
        numbers = [evidence(k, [Numbers(r).find(k) for r in runs]) for k in used]
        rows.append([verdict, f"{claim}\n{words}".strip(), "\n" + ("\n".join(numbers) or why)])
    return [f"### {SYSTEMS[script][0]}", table(["verdict", "claim, rule", "evidence"], rows)]


def about(script, runs, results, failures):
    """The blocks of the report on one system. results: of its finished runs"""
    _, question, _, keys = SYSTEMS[script]
    blocks = [f"## {script}", question]
    blocks += [f"**{name} did not finish.** {why}" for name, why in failures.items()
               if name in [run.out.name for run in runs]]
    if not results:
        return blocks
    first, metrics = results[0], [r["metrics"] for r in results]
    source = ast.parse((ROOT / f"{script}.py").read_text()).body      # read: scripts are not imported
    paper = next((ast.literal_eval(line.value) for line in source if isinstance(line, ast.Assign)
                  and getattr(line.targets[0], "id", "") == "PAPER"), {})
    people = ", ".join(f"{k} {n}" for k, n in first["n"].items())
    blocks.append(table(["", ""], [
        ["data", f"{Path(first['data']).name}; subjects: {people}"],
        ["network", ", ".join(f"{k} {first['config'].get(k)}" for k in "preset recipe size steps".split())],
        ["machine", f"{first['device']}, torch {first['torch']}, commit {first['git'] or 'unknown'}"],
        ["seeds", ", ".join(str(r["config"].get("seed", 0)) for r in results)]]))

    every = {k: m for numbers in reversed(metrics) for k, m in numbers.items()}
    arrow = lambda k: f"{k} {'↓' if every[k]['better'] == 'lower' else '↑'} {every[k]['unit']}".rstrip()
    keys = [k for k in keys.split() if k in every]
    rows = sorted(dict.fromkeys(k.partition(".")[2] for k in every if k.split(".")[0] in keys), key=bool)
    body = [["paper", *(number(paper.get(k)) for k in keys)]] if paper else []
    body += [[row or "ours", *(cell([m.get(f"{k}.{row}".rstrip(".")) for m in metrics]) for k in keys)]
             for row in rows]
    still = [k for k, m in every.items() if m["unit"] not in TIMED]
    rest = [[arrow(k), number(paper.get(k)), cell([m.get(k) for m in metrics]), str(every[k]["n"] or "-")]
            for k in still]
    blocks += [table(["", *map(arrow, keys)], body), f"<details><summary>All {len(rest)} numbers</summary>",
               table(["", "paper", "ours", "n"], rest), "</details>"]
    from PIL import Image
    folder = next(run.out for run in runs if run.out.name not in failures and not run.label)
    order = lambda path: (path.stem == "curves", path.stem != "reconstructions", path.name)
    for path in sorted(folder.glob("*.png"), key=order):
        if "preview" not in path.stem:     # those were for watching
            caption = Image.open(path).info.get("Description", path.stem)
            blocks += [f"![{path.stem}]({folder.name}/{path.name})", f"*{caption}*"]
    return blocks


def report(args, runs, done, failures):
    """Writes OUT/report.html and OUT/report.md. done: folder of a run -> its results"""
    results = {script: [] for script in args["names"]}
    for run in runs:
        if run.out.name in done and not run.label:
            beside = [r for r in runs if r.script == run.script and r.seed == run.seed]
            more = {r.label: done.get(r.out.name) for r in beside}
            results[run.script].append(done[run.out.name] | {"more": more})
    verdicts = [judge(c[3], results[c[0]])[0] for c in CLAIMS if c[0] in results]
    seeds = f"{args['seeds']} seeds each: mean ± SD" if args["seeds"] > 1 else "one seed each"
    blocks = [
        "# Study report", f"{', '.join(args['names'])}; {seeds}. In brackets, below a number: its 95 % "
        "interval, by bootstrap over subjects unless its script says otherwise. Phantoms are drawings: on "
        "them, a verdict is about the method, not about patients. For research and teaching only.",
        "## What the sources claim, and what this study found",
        f"Of {len(verdicts)} claims " + ", ".join(f"{verdicts.count(v)} {name}" for v, name in (
            ("holds", "hold"), ("does not hold", "do not hold"), ("undecided", "are undecided"),
            ("not tested", "were not tested"))) + ".",
        "A claim **holds** if its rule is true over the whole 95 % interval, in every seed; it **does not "
        "hold** if the rule is false in the same way; it is **undecided** if an interval, or the seeds, lie "
        "on both sides. Two numbers are compared as if they were independent. A number without an interval "
        "is taken as it is, but one of a single subject decides nothing."]
    for script in results:
        blocks += claims(script, results[script])
    for script in results:
        blocks += about(script, [r for r in runs if r.script == script], results[script], failures)
    rows = [[name, f"{r['seconds']:.0f}", "\n" + "\n".join(
        f"{k} {number(m['value'])} {m['unit']}" for k, m in r["metrics"].items() if m["unit"] in TIMED)]
        for name, r in done.items()]
    blocks += [
        '<section id="times">', "## Time and memory", "What depends on the machine and the moment. All that "
        "is above is the same when a study is stopped, by whatever, and started again" + (
            " (but for rows dae: that network gets the time which others took)" if "ldae" in results else ""
        ) + ". Seconds are those of a script's last start: it took more in all if it was stopped.",
        table(["run", "seconds", "rates, memory"], rows), "</section>"]
    write(Path(args["out"], "report.md"), "\n\n".join(blocks) + "\n")
    write(Path(args["out"], "report.html"), as_html(blocks, Path(args["out"])))


def as_html(blocks, folder):
    """One page that needs nothing else: no network, no script."""
    def inline(text):
        return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html.escape(text))

    def td(text):
        first, *small = map(inline, text.split("<br>"))
        verdict = first.split()[0] if first in ("holds", "does not hold", "undecided", "not tested") else ""
        return f'<td class="{verdict}">{first}' + (f"<small>{'<br>'.join(small)}</small>" if small else "")

    out = []
    for block in blocks:
        if block.startswith("#"):
            marks, text = block.split(" ", 1)
            out.append(f"<h{len(marks)}>{inline(text)}</h{len(marks)}>")
        elif block.startswith("|"):
            head, _, *rows = [line[2:-2].split(" | ") for line in block.split("\n")]
            out.append('<div class="scroll"><table><tr>' + "".join(f"<th>{inline(t)}" for t in head))
            for row in rows:
                out.append(f'<tr class="{row[0] if row[0] == "ours" else ""}">' + "".join(map(td, row)))
            out.append("</table></div>")
        elif block.startswith("!"):
            name, path = re.fullmatch(r"!\[(.*)\]\((.*)\)", block).groups()
            data = base64.b64encode((folder / path).read_bytes()).decode()
            out.append(f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">')
        elif block.startswith("<"):
            out.append(block)
        else:
            caption = re.fullmatch(r"\*([^*].*)\*", block)
            out.append(f'<p class="caption">{inline(caption[1])}' if caption else f"<p>{inline(block)}")
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Study report</title>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<link rel="icon" href="data:,"><style>{CSS}</style></head>\n<body>\n'
            + "\n".join(out) + "\n</body></html>\n")


# --------------------------------------------------------------------------------------------------------

def main(argv):
    args = parse(argv)
    out = Path(args["out"])
    about_now = {k: args.pop(k) for k in ("out", "resume", "dry_run")}
    if about_now["resume"]:
        try:
            saved = json.loads((out / "study.json").read_text())
        except (OSError, ValueError):
            fail(f"--resume: no study in {out}; without --resume one is started")
        differ = [k for k in args if args[k] != saved.get(k) and args[k] != parse([])[k]]
        if differ:
            fail(f"--resume: the study in {out} had other {', '.join(differ)}; leave that out, or --resume")
        args = saved
    args |= about_now
    runs, first = plan(args), node(args) == 0
    if args["dry_run"]:
        for run in runs:
            note = f"   # x5: 5 times the steps of {run.script}" if run.flags.get("steps") == "x5" else ""
            say(shlex.join(command(run, args)) + note)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    with lock(out) if first else contextlib.nullcontext() as held:
        if first:
            write(out / "study.json", json.dumps({k: v for k, v in args.items() if k not in about_now}))
        data = {r.script: r.flags.get("data", "phantoms") for r in runs}
        say("data: " + ", ".join(f"{script} {path}" for script, path in data.items()))
        study, failures, done = Study(args, held), {}, {}
        for run in runs:
            name, plain = run.out.name, run.out.name.replace(f"_{run.label}", "")
            if run.label and plain in failures:
                failures[name] = f"needs {plain}"
                continue
            if run.flags.get("steps") == "x5":
                config = json.loads((out / plain / "results.json").read_text())["config"]
                run.flags["steps"] = str(5 * config["steps"])
            found = finished(run)
            if found:
                say(f"{name:12} finished before")
            elif why := study.start(run):
                failures[name] = why
            if study.caught:
                again = shlex.join(["python", "train.py", "--resume", "--out", args["out"]])
                say(f"stopped; the same command goes on, and so does {again}")
                return 130 if study.caught[0] == signal.SIGINT else 143
            if first and name not in failures:
                done[name] = found or json.loads((run.out / "results.json").read_text())
        if first:
            report(args, runs, done, failures)
            say(f"report: {out}/report.html, {out}/report.md")
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as e:
        fail(f"{e.filename or 'output'}: {e.strerror or e}; what is finished is kept")
