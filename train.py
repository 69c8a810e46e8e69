"""The whole study: the four scripts as programs, in both recipes and with any seeds, then one report.

    python train.py                                   # everything on phantoms, then out/RESULTS.md
    python train.py --quick                           # does everything run? A smoke test in out/quick
    python train.py diffae --folds 5 -- --data emidec.h5 --steps 9000    # after --: flags of the scripts,
    python train.py diffae ldae --gpus 2 -- --ldae.data brains.h5        # .. or of one of them

Every script runs as it would by hand: our recipe in OUT/NAME, the published one in OUT/NAME_paper, seed 1 in
OUT/NAME_s1, fold 2 in OUT/NAME_f2. What it prints is in train.log there. The same command again goes on where
it was stopped, and passes over what is finished. The report, RESULTS.md, sets the recipes beside rows that
need no training, and judges what the papers claim by the rules in CLAIMS. Exit code: 0; 1, a script failed
and the others ran all the same; 2, one line says what to do; 130 or 143, stopped and saved.
"""
import argparse, collections, contextlib, importlib, io, itertools, json, math, os, re, shlex
import signal, statistics, subprocess, sys, time
from pathlib import Path

import data as D
import metrics as M

ROOT = Path(__file__).resolve().parent
# Further runs, which some claims need. script: {label: flags beside the user's}; long trains 5 times longer
MORE = {"diffae": {"long": ["--recipe=paper"], "scaled": ["--recipe=paper", "--z_scale=3"],
                   "image": ["--recipe=paper", "--frame=image"], "wall": ["--recipe=paper", "--frame=wall"]},
        "cond_ldm": {"SA": ["--recipe=paper", "--view=SA"]}}
# What --quick trains on, and how long. script: (what draws the phantoms, how many and how large, flags)
QUICK = {"diffae": (D.phantom_hearts, dict(subjects=30, size=48),
                    "--steps=20 --batch=16 --S=5 --draws=1 --eval_images=24"),
         "normative": (D.phantom_cohort, dict(subjects=150, patients=40, size=48),
                       "--steps=20 --batch=16 --S=5 --draws=1 --eval_images=24"),
         "cond_ldm": (D.phantom_views, dict(subjects=20, size=64),
                      "--vq_steps=40 --steps=40 --batch=8 --S=4 --w=1 --eval_images=24"),
         "ldae": (D.phantom_brains, dict(subjects=24, size=32),
                  "--ae_steps=40 --ldm_steps=20 --steps=40 --batch=4 --S=4 --eval_images=4")}


# --------------------------------------------------------------------------------------------------------
# The claims of the papers: (what is claimed, the rule that judges it) or (.., what it would take to test it).
# A rule compares numbers of results.json by < and >; "and": all must be so. Each is judged for the published
# recipe and for ours. LABEL:KEY is a number of a run in MORE; such a rule is for the published recipe only.

BENCHMARKS = ("pca", "vae", "pca_cosine", "pca_mahalanobis", "vae_error", "vae_deviation", "brain_age_gap")
CLAIMS = {
    "diffae": [
        ("z_sem with x_T reconstructs better than a VAE (SSIM 0.66)", "recon_ssim > recon_ssim.vae"),
        ("z_sem alone collapses (SSIM 0.20)", "semantic_mean_ssim < semantic_mean_ssim.constant"),
        ("z_sem alone is worse than the VAE", "semantic_mean_gain.vae < 0"),
        ("Drawn from random x_T, another patient's z_sem hardly lowers SSIM", "semantic_gain < 0.05"),
        ("The VAE's code classifies better, by AUROC and F1",
         "probe_auroc_gain.vae < 0 and probe_f1 < probe_f1.vae"),
        ("The cause is geometry: in the whole image z_sem cannot say where the heart is",
         "image:factor_r2_x < 0.5 and image:factor_r2_y < 0.5"),
        (".. so it reads more where the heart is seen in the frame of its wall",
         "wall:probe_auroc > probe_auroc"),
        ("Training 5 to 10 times longer improves reconstruction", "long:recon_ssim > recon_ssim"),
        (".. but classification stays below the VAE's",
         "long:probe_auroc_gain.vae < 0 and long:probe_f1 < long:probe_f1.vae"),
        ("Scaling z_sem in AdaGN improves reconstruction", "scaled:recon_ssim > recon_ssim"),
        (".. and classification", "scaled:probe_auroc > probe_auroc"),
        ("Too few images were a cause", "needs a second run, with fewer training patients"),
    ],
    "normative": [
        ("Similarity to healthy brains predicts survival (hazard ratio 0.73)", "hr_per_sd < 1"),
        ("Survival of the two halves separates (KS test; log-rank, as KS ignores censoring)",
         "hr_per_sd < 1 and ks_p < 0.05 and logrank_p < 0.05"),
        ("It predicts better than other benchmarks",
         " and ".join(f"c_index_gain.{name} > 0" for name in BENCHMARKS)),
        ("Large healthy cohorts raise statistical power", "needs a second run, with fewer healthy people"),
    ],
    "cond_ldm": [
        ("The VQ-VAE reconstructs well", "ssim.vq > ssim.copy"),
        ("Generated images are poor (SSIM 0.40, NMSE 1.22)", "nmse > nmse.constant"),
        ("Detailed edges carry what the image looks like", "ssim > ssim.edges_none"),
        (".. so a user's few strokes lose detail",
         "ssim.edges_sparse < ssim and edge_f1.edges_sparse < edge_f1"),
        ("Mixing long- and short-axis views hurts the short-axis slices", "SA:ssim > ssim.view_SA"),
        ("Too few training steps were a cause", "needs a second run, with more --steps"),
    ],
    "ldae": [
        ("A linear probe of z_sem finds Alzheimer's disease (AUROC 0.90)", "probe_auroc > 0.9"),
        (".. or at least better than chance", "probe_auroc > 0.5"),
        ("A linear probe of z_sem reads age (error 4.1 years)", "age_mae < 4.1"),
        (".. or at least better than guessing the mean", "age_mae < age_mae.mean"),
        ("Moved towards disease, ventricles grow and hippocampi shrink",
         "manip_ventricle_slope > 0 and manip_hippocampus_slope < 0"),
        ("A missing scan, 6 months away: SSIM 0.969, MSE 0.0019",
         "interp_6m_ssim > 0.969 and interp_6m_mse < 0.0019"),
        (".. 24 months away: SSIM 0.93, MSE 0.004", "interp_24m_ssim > 0.93 and interp_24m_mse < 0.004"),
        (".. better than a copy of the nearest scan", "interp_24m_mse_gain.copy < 0"),
        ("Inference is 20 times faster than in voxels", "throughput_ratio > 20, preset paper"),
    ],
}


def interval(m):
    """An entry of results.json, or a number as text -> (value, low, high)"""
    if isinstance(m, str):
        return (float(m),) * 3
    if m["n"] == 1:     # one subject decides nothing
        return m["value"], -math.inf, math.inf
    return (m["value"], *m["ci"]) if None not in m["ci"] else (m["value"],) * 3


def greater(a, b):
    """Is a > b, each (value, low, high)? True or False if so over the whole interval of a - b, else None."""
    # as if both were independent: too wide if both are high in the same people, too narrow if opposed
    low = a[0] - b[0] - math.hypot(a[0] - a[1], b[2] - b[0])
    high = a[0] - b[0] + math.hypot(a[2] - a[0], b[0] - b[1])
    return True if low > 0 else False if high <= 0 else None


def judge(rule, recipe, seeds):
    """-> (verdict, the numbers that decided or why there is none). seeds: of each {label: as_one()}"""
    rule, _, preset = rule.partition(", preset ")
    if not re.search("[<>]", rule) or not seeds:
        return "not tested", "no run has finished" if seeds == [] else rule
    answers, used = set(), {word: [] for word in re.findall(r"\S*[a-z]\S*", rule) if word != "and"}
    for runs in seeds:
        for name in used:
            label, _, key = name.rpartition(":")
            results = runs.get(label or recipe, {"metrics": {}})
            m = results["metrics"].get(key, {"value": None})
            if m["value"] is None:
                return "not tested", f"no {name}"
            if results["undertrained"]:
                return "undertrained", results["undertrained"]
            used[name].append(m)
        if preset and runs[recipe]["config"]["preset"] != preset:
            return "not tested", f"needs --preset {preset}"
        parts = []
        for clause in rule.split(" and "):
            left, sign, right = re.split(" ([<>]) ", clause)
            a, b = (interval(used[text][-1] if text in used else text) for text in (left, right))
            parts.append(greater(a, b) if sign == ">" else greater(b, a))
        answers.add(False if False in parts else None if None in parts else True)
    verdict = {True: "holds", False: "does not hold"}.get(answers.pop() if len(answers) == 1 else None)
    return verdict or "undecided", "; ".join(f"{name} {cell(found)}" for name, found in used.items())


def mean(found):
    """Entries of a number in several runs -> one: the means of the values and of the intervals' ends."""
    def average(values):
        values = list(values)
        return None if None in values else statistics.fmean(values)
    found = [m for m in found if m["value"] is not None] or found
    ends = [average(m["ci"][i] for m in found) for i in (0, 1)]
    value, n = average(m["value"] for m in found), min(m["n"] for m in found)
    return found[0] | {"value": value, "ci": ends, "n": n}


def too_short(script, config):
    """Which training steps of a run are fewer than its preset has, as text; "" if none are."""
    module = importlib.import_module(script)
    preset = vars(module.Config) | module.PRESETS[config["preset"]]
    return ", ".join(f"{key} {config[key]} of {least}" for key, least in preset.items()
                     if key.endswith("steps") and config[key] < least)


def as_one(script, folds):
    """[(run, results)] of the folds of one recipe and seed -> results as of one run, and two entries more.
    pooled: what M.pooled makes of the scores of all subjects, each tested in one fold; it replaces what the
    folds have. The other numbers are means over the folds. undertrained: too_short() of a fold."""
    every, pooled = [results for _, results in folds], {}
    metrics = every[0]["metrics"]
    if len(folds) > 1:
        keys = dict.fromkeys(key for results in every for key in results["metrics"])
        paths = [run.out / "predictions.csv" for run, _ in folds]
        pooled = M.pooled(paths) if all(path.exists() for path in paths) else {}
        means = {key: mean([r["metrics"][key] for r in every if key in r["metrics"]]) for key in keys}
        for key, m in means.items():        # twice a mean of p values is a p (Rüschendorf 1982)
            if key.partition(".")[0].endswith("_p") and m["value"] is not None:
                m["value"] = min(1, 2 * m["value"])
        metrics = means | pooled
    short = max(too_short(script, r["config"]) for r in every)
    return every[0] | {"metrics": metrics, "pooled": pooled, "undertrained": short}


# --------------------------------------------------------------------------------------------------------
# The command line -> runs

# One script with one seed and fold. label: ours, paper or one of MORE; cfg: the script's Config
Run = collections.namedtuple("Run", "script label out command cfg")


def parse(argv):
    """-> settings, with the words after -- as `flags`. A wrong one is one line, exit 2."""
    cut = argv.index("--") if "--" in argv else len(argv)
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False, usage="train.py [NAME ..] [flags] [-- flags of scripts]")
    p.error = D.fail
    p.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CLAIMS) + "; default: all")
    p.add_argument("--out", help="folder for everything; default: out, or out/quick")
    p.add_argument("--seeds", type=int, default=1, help="runs of each script, with --seed 0, 1, ..")
    p.add_argument("--folds", type=int, default=1, help="runs of each seed: each tests other subjects")
    p.add_argument("--gpus", type=int, default=1, help="processes of a run, through torchrun")
    p.add_argument("--more", action="store_true", help="also the runs that some claims need: see MORE")
    p.add_argument("--quick", action="store_true", help="a smoke test: small phantoms, few steps, our recipe")
    p.add_argument("--dry-run", action="store_true", help="check everything and print the commands")
    args = p.parse_args(argv[:cut])
    args.flags, args.command = argv[cut + 1:], shlex.join(["python", "train.py", *argv])
    args.out = args.out or ("out/quick" if args.quick else "out")
    if unknown := set(args.names) - set(CLAIMS):
        D.fail(f"{', '.join(unknown)}: no such script; choose from {', '.join(CLAIMS)}")
    if min(args.seeds, args.folds, args.gpus) < 1:
        D.fail("--seeds, --folds and --gpus must be at least 1")
    return args


def flags_for(script, words):
    """Of the words after --: those for this script. --key value is for all, --SCRIPT.key value for one."""
    flags, mine = [], True
    for word in words:
        if word.startswith("--"):
            whose, key = re.match(r"--(?:(\w+)\.)?(.*)", word, re.S).groups()
            if whose and whose not in CLAIMS:
                D.fail(f"{word}: {whose} is no script; choose from {', '.join(CLAIMS)}")
            word, mine = f"--{key}", whose in (None, script)
        flags += [word] if mine else []
    return flags


def config_of(script, flags):
    """What the script itself makes of its flags -> Config, set of the keys that were given. A flag, a value
    or a file that it would refuse is one line, exit 2."""
    module, said = importlib.import_module(script), io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            cfg, given = D.parse(module.Config, module.PRESETS, module.RECIPES, module.__doc__, flags)
    except SystemExit:
        why = said.getvalue().removeprefix("error: ") or "--help is a flag of the script alone"
        D.fail(f"{script}.py: {why}")
    for key in {"data", "test", "inception", "init"} & given:
        path = getattr(cfg, key)
        if path and not os.path.exists(path):
            D.fail(f"{script}.py: --{key} {path}: no such file or folder")
    return cfg, given


def plan(args):
    """-> the Runs, all flags checked"""
    runs = []
    for script in [name for name in CLAIMS if name in args.names or not args.names]:
        flags = flags_for(script, args.flags)
        cfg, given = config_of(script, flags)
        if {"out", "seed", "fold"} & given:
            D.fail("--out, --seeds and --folds come before the --: each run has its own")
        for key in ("batch", "ae_batch"):
            if getattr(cfg, key, 0) % args.gpus:
                D.fail(f"{script}.py: --{key} {getattr(cfg, key)}: must be a multiple of --gpus {args.gpus}")
        variants = {"ours": ["--recipe=ours"], "paper": ["--recipe=paper"]}
        if args.quick:
            flags = ["--preset=demo", *QUICK[script][-1].split(), *flags]   # the last counts: the user's
            del variants["paper"]
        if "recipe" in given:
            variants = {cfg.recipe: []}
        elif args.more:
            variants |= MORE.get(script, {})
        every = itertools.product(range(args.seeds), variants.items(), range(args.folds))
        for seed, (label, own), fold in every:
            name = script + (f"_{label}" if label != "ours" else "") + (f"_s{seed}" if seed else "")
            own = [*own, f"--seed={seed}"]
            if args.folds > 1:
                name += f"_f{fold}"
                own.append(f"--fold={fold}/{args.folds}")
            if label == "long":
                own.append(f"--steps={5 * config_of(script, flags + own)[0].steps}")
            own.append(f"--out={Path(args.out, name)}")
            cfg, _ = config_of(script, flags + own)
            if args.quick and not cfg.data:
                cfg.data = str(Path(args.out, f"{script}.h5"))
                own.append(f"--data={cfg.data}")
            start = [sys.executable]
            if args.gpus > 1:
                start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.gpus}"]
            start += [os.path.relpath(ROOT / f"{script}.py")]
            runs.append(Run(script, label, Path(args.out, name), [*start, *flags, *own], cfg))
    return runs


# --------------------------------------------------------------------------------------------------------
# Running them

def receipt(run):
    """What says whose results.json is: the command, what the machine made of it, and the file's time."""
    return [*run.command, run.cfg.preset, run.cfg.device, Path(run.out, "results.json").stat().st_mtime]


def finished(run):
    """Its results if they are whole, are of this command and newer than code and data; else None."""
    code = [ROOT / name for name in (f"{run.script}.py", "data.py", "metrics.py")]
    data = [Path(path) for path in (run.cfg.data, run.cfg.test) if path]
    data += [file for path in data for file in path.rglob("*")]
    try:
        results, done = (json.loads((run.out / f"{name}.json").read_text()) for name in ("results", "done"))
        began = done[-1] - results["seconds"]
        if done == receipt(run) and began > max(path.stat().st_mtime for path in code + data):
            return results
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def reason(code, log):
    """Why a script failed: the signal that killed it, or its error line. (None of torchrun's own matches.)"""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}" + "; out of memory?" * (code == -signal.SIGKILL)
    errors = re.findall(r"\berror: .+|\b\w+Error: .+", log.read_text(errors="replace"))
    return f"exit code {code}: {errors[-1] if errors else f'see {log}'}"


def execute(run, held, caught):
    """Run a script to its end. caught: signals that arrive, passed on to it. -> why it failed, or None"""
    run.out.mkdir(parents=True, exist_ok=True)
    log, began, passed_on = run.out / "train.log", time.time(), 0
    print(f"{run.out.name}: runs, see {log}", flush=True)
    # A session of its own: Ctrl-C comes to the script once, through this program. It holds the lock of the
    # study too: if this program is killed, no second study starts beside what the first left running.
    with open(log, "wb") as f:
        child = subprocess.Popen(run.command, stdin=subprocess.DEVNULL, stdout=f, stderr=f,
                                 start_new_session=True,
                                 pass_fds=[held.fileno()] if os.name == "posix" else [])
    while child.poll() is None:
        for number in caught[passed_on:]:
            child.send_signal(number)
            passed_on += 1
        time.sleep(0.1)
    why = reason(child.returncode, log) if child.returncode else "left no new results.json"
    if not child.returncode and os.path.exists(run.out / "results.json") and receipt(run)[-1] > began:
        M.write_atomically(run.out / "done.json", json.dumps(receipt(run)).encode())
        why = None
    state = "stopped" if caught else f"FAILED, {why}" if why else "done"
    print(f"{run.out.name}: {state} after {time.time() - began:.0f} s", flush=True)
    return why


# --------------------------------------------------------------------------------------------------------
# The report, in Markdown

SMOKE = "smoke test: no verdicts"
FOLDS = ("All folds together: each subject is tested once, by a run that has not seen them. One interval "
         "for all. Columns without these words are means over the folds, as are the ends of their intervals.")


def cell(found):
    """The entries of a number in all seeds -> text: mean ± SD over seeds [interval, the mean of its ends]"""
    if not (found := [m for m in found if m and m["value"] is not None]):
        return "-"
    value, *interval = M.cell(mean(found)).partition(" [")
    spread = f" ± {M.number(statistics.stdev(m['value'] for m in found))}" if len(found) > 1 else ""
    return "".join([value, spread, *interval])


def table(head, rows):
    """-> the same in Markdown"""
    lines = ["| " + " | ".join(t.replace("|", "/") for t in row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "| --- " * len(head) + "|", *lines[1:]])


def system(script, runs, seeds):
    """-> paragraphs: what was trained on whom, the numbers of every run and row, pictures"""
    module = importlib.import_module(script)
    text = [f"## {script}", " ".join(module.__doc__.split("\n\n")[1].split())]
    if not seeds:
        return text
    first = next(iter(seeds[0].values()))
    subjects = ", ".join(f"{k} {n}" for k, n in first["n"].items())
    text.append(f"Data: {Path(first['data']).name}; subjects of a run: {subjects}. Preset "
                f"{first['config']['preset']}, {first['device']}, torch {first['torch']}.")

    labels = [label for label in dict.fromkeys(run.label for run in runs) if any(label in s for s in seeds)]
    every = {k: m for s in seeds for results in s.values() for k, m in results["metrics"].items()}
    value = lambda label, key: cell([s[label]["metrics"].get(key) for s in seeds if label in s])
    arrows = {"lower": "↓", "higher": "↑", "": ""}
    arrow = lambda key: (f"{arrows[every[key]['better']]} {every[key]['unit']}".strip()
                         + ", all folds together" * (key in first["pooled"]))
    shown, rows = [key for key in module.SHOWN if key in every], []
    for label, (row, words) in itertools.product(labels, module.ROWS.items()):
        numbers = [value(label, f"{key}.{row}" if row else key) for key in shown]
        if set(numbers) != {"-"}:
            rows.append([f"{label}: {words}" if row else label, *numbers])
    text.append(table(["", *(f"{module.SHOWN[key]} {arrow(key)}" for key in shown)], rows))
    rows = [[f"{key} {arrow(key)}", *(value(label, key) for label in labels)] for key in every]
    text += [f"<details><summary>All {len(rows)} numbers</summary>", table(["", *labels], rows), "</details>"]
    folder = next(run.out for run in runs if run.label in seeds[0])
    for path in sorted(folder.glob("*.png")):
        if not path.stem.startswith("preview"):     # these were for watching the training
            text.append(f"![{path.stem}]({folder.name}/{path.name})")       # a picture shows its own caption
    return text


def report(args, runs, done, failures):
    """Writes RESULTS.md. done: folder name -> results; failures: folder name -> why"""
    seeds = {run.script: [] for run in runs}
    for (script, _), group in itertools.groupby(runs, lambda run: (run.script, run.cfg.seed)):
        found = {}
        for label, folds in itertools.groupby(group, lambda run: run.label):
            folds = [(run, done.get(run.out.name)) for run in folds]
            if all(results for _, results in folds):
                found[label] = as_one(script, folds)
        seeds[script] += [found] if found else []
    minutes = sum(results["seconds"] for results in done.values()) / 60
    text = [
        "# Study report",
        "For research and teaching only. Phantoms are drawings: on them a verdict is about the method, not "
        "about patients. ours is our recipe, paper is the published one. In brackets is the 95 % interval "
        "over subjects, after ± the standard deviation over seeds.",
        f"{args.command} (seeds: {args.seeds}, folds: {args.folds}, minutes: {minutes:.1f})",
        *([f"This is a {SMOKE}."] if args.quick else []),
        *([FOLDS] if args.folds > 1 else []),
        *(f"{name} did not finish. {why}" for name, why in failures.items()),
        "## What the papers claim, and what this study found",
        "A claim holds if its rule is true over the whole 95 % interval of the difference, in every seed. It "
        "does not hold if the rule is false in the same way. It is undecided if an interval, or the seeds, "
        "lie on both sides. Two numbers count as independent; a gain is paired. Runs of fewer training steps "
        "than their preset has are undertrained: they judge no claim."]
    for script, found in seeds.items():
        rows = []
        for claim, rule in CLAIMS[script]:
            both = judge(rule, "paper", found), ("", "") if ":" in rule else judge(rule, "ours", found)
            both = [(SMOKE, "")] * 2 if args.quick else both
            rows.append([claim, rule, *(". ".join(filter(None, verdict)) for verdict in both)])
        text += [f"### {script}", table(["claim", "rule", "published recipe", "ours"], rows)]
    for script, found in seeds.items():
        text += system(script, [run for run in runs if run.script == script], found)
    rows = [[run.out.name, r["device"], f"{r['seconds'] / 60:.1f}", M.number(r["memory_gb"]),
             r["git"] or "unknown", shlex.join(["python", *run.command[1:]])]
            for run in runs if (r := done.get(run.out.name))]
    head = ["run", "device", "minutes, last start", "GB at most", "commit", "command"]
    text += ["## Runs", table(head, rows)]
    M.write_atomically(Path(args.out, "RESULTS.md"), ("\n\n".join(text) + "\n").encode())


def main(argv):
    args = parse(argv)
    runs, out, done, failures = plan(args), Path(args.out), {}, {}
    if args.dry_run:
        for run in runs:
            print(shlex.join(run.command))
        return
    held = M.lock(out)
    caught, _ = D.catch_signals()
    for run in runs:
        name = run.out.name
        if args.quick and not os.path.exists(run.cfg.data):
            draw, size, _ = QUICK[run.script]
            draw(run.cfg.data, **size)
        if finished(run):
            print(f"{name}: finished before", flush=True)
        elif why := execute(run, held, caught):
            failures[name] = why
        if caught:
            print("stopped; the same command goes on")
            sys.exit(128 + caught[0])
        if name not in failures:
            done[name] = json.loads((run.out / "results.json").read_text())
    report(args, runs, done, failures)
    print(f"report: {out}/RESULTS.md")
    sys.exit(bool(failures))


if __name__ == "__main__":
    D.program(main)
