"""The whole study: the four scripts as programs, in both recipes and with any seeds, then one report.

    python train.py                                   # everything on phantoms, then out/report.html
    python train.py diffae --seeds 3 -- --data emidec.h5 --steps 9000    # after --: flags of the scripts,
    python train.py diffae ldae --gpus 8 -- --ldae.data brains.h5        # .. or of one of them

Every script runs as it would by hand: our recipe in OUT/NAME, the published one in OUT/NAME_paper, seed 1 in
OUT/NAME_s1 and OUT/NAME_paper_s1. What a script prints is in train.log there. The same command again goes on
where it was stopped, and passes over what is finished. The report sets both recipes beside the rows that need
no training, and judges what the papers claim by the rules in CLAIMS. Exit code: 0; 1, a script failed and the
others ran all the same; 2, one line says what to do; 130 or 143, stopped and saved.
"""
import argparse, base64, contextlib, html, importlib, io, itertools, json, math, os, re, shlex
import signal, statistics, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import data as D
import metrics as M

ROOT = Path(__file__).resolve().parent
# Further runs, which some claims need. script: {label: flags beside the user's}; long trains 5 times longer
MORE = {"diffae": {"long": ["--recipe=paper"], "scaled": ["--recipe=paper", "--z_scale=3"]},
        "cond_ldm": {"SA": ["--recipe=paper", "--view=SA"]}}


# --------------------------------------------------------------------------------------------------------
# The claims of the papers: (what is claimed, the rule that judges it) or (.., what it would take to test it).
# A rule compares numbers of results.json by < and >; "and": all must be so. Each is judged for the published
# recipe and for ours. LABEL:KEY is a number of a run in MORE; such a rule is for the published recipe only.

BENCHMARKS = ("pca_cosine", "pca_mahalanobis", "vae_error", "vae_deviation", "brain_age_gap")
CLAIMS = {
    "diffae": [
        ("z_sem with x_T reconstructs better than a VAE (SSIM 0.66)", "recon_ssim > recon_ssim.vae"),
        ("z_sem alone collapses (SSIM 0.20)", "semantic_mean_ssim < semantic_mean_ssim.constant"),
        ("z_sem alone is worse than the VAE", "semantic_mean_gain.vae < 0"),
        ("Another patient's z_sem hardly lowers SSIM: reconstruction relies on x_T", "semantic_gain < 0.05"),
        ("The VAE's code classifies better, by every measure",
         "probe_auroc_gain.vae < 0 and probe_f1 < probe_f1.vae"),
        ("The cause is geometry: z_sem cannot say where the heart is",
         "factor_r2_x < 0.5 and factor_r2_y < 0.5"),
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
        (".. better than a copy of the nearest scan", "interp_24m_mse < interp_24m_mse.copy"),
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
    # as if both were independent: the interval is too wide, and not too narrow, if they are of one group
    low = a[0] - b[0] - math.hypot(a[0] - a[1], b[2] - b[0])
    high = a[0] - b[0] + math.hypot(a[2] - a[0], b[0] - b[1])
    return True if low > 0 else False if high <= 0 else None


def judge(rule, recipe, seeds):
    """-> (verdict, the numbers that decided or why there is none). seeds: of each {label: results}"""
    rule, _, preset = rule.partition(", preset ")
    if not re.search("[<>]", rule) or not seeds:
        return "not tested", "no run has finished" if seeds == [] else rule
    answers, used = set(), {word: [] for word in re.findall(r"\S*[a-z]\S*", rule) if word != "and"}
    for runs in seeds:
        for name in used:
            label, _, key = name.rpartition(":")
            m = runs.get(label or recipe, {"metrics": {}})["metrics"].get(key, {"value": None})
            if m["value"] is None:
                return "not tested", f"no {name}"
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


# --------------------------------------------------------------------------------------------------------
# The command line -> runs

@dataclass
class Run:
    """One script with one seed. label: ours, paper or one of MORE; cfg: the script's Config"""
    script: str
    label: str
    out: Path
    command: list
    cfg: object


def parse(argv):
    """-> settings, with the words after -- as `flags`. A wrong one is one line, exit 2."""
    cut = argv.index("--") if "--" in argv else len(argv)
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False, usage="train.py [NAME ..] [flags] [-- flags of scripts]")
    p.error = D.fail
    p.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CLAIMS) + "; default: all")
    p.add_argument("--out", default="out", help="folder for everything")
    p.add_argument("--seeds", type=int, default=1, help="runs of each script, with --seed 0, 1, ..")
    p.add_argument("--gpus", type=int, default=1, help="processes of a run, through torchrun")
    p.add_argument("--more", action="store_true", help="also the runs that some claims need: see MORE")
    p.add_argument("--dry-run", action="store_true", help="print the commands and do nothing")
    args = p.parse_args(argv[:cut])
    args.flags = argv[cut + 1:]
    if unknown := set(args.names) - set(CLAIMS):
        D.fail(f"{', '.join(unknown)}: no such script; choose from {', '.join(CLAIMS)}")
    if min(args.seeds, args.gpus) < 1:
        D.fail("--seeds and --gpus must be at least 1")
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
    """What the script itself makes of its flags -> Config, set of the keys that were given."""
    module, said = importlib.import_module(script), io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return D.parse(module.Config, module.PRESETS, module.RECIPES, module.__doc__, flags)
    except SystemExit:
        D.fail(f"{script}.py: {said.getvalue().removeprefix('error: ')}")


def plan(args):
    """-> the Runs, all flags checked"""
    runs = []
    for script in [name for name in CLAIMS if name in args.names or not args.names]:
        flags = flags_for(script, args.flags)
        cfg, given = config_of(script, flags)
        if {"out", "seed"} & given:
            D.fail("--out and --seeds come before the --: each run has a folder and a seed of its own")
        variants = {"ours": ["--recipe=ours"], "paper": ["--recipe=paper"]}
        if "recipe" in given:
            variants = {cfg.recipe: []}
        elif args.more:
            variants |= MORE.get(script, {})
        for seed, (label, own) in itertools.product(range(args.seeds), variants.items()):
            name = script + (f"_{label}" if label != "ours" else "") + (f"_s{seed}" if seed else "")
            own = [*own, f"--seed={seed}", f"--out={Path(args.out, name)}"]
            if label == "long":
                own.append(f"--steps={5 * config_of(script, flags + own)[0].steps}")
            cfg, _ = config_of(script, flags + own)
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
        results = json.loads(Path(run.out, "results.json").read_text())
        done = json.loads(Path(run.out, "done.json").read_text())
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
# The report: blocks (kind, text, ..), written as Markdown and as one page of HTML

CSS = """:root{color-scheme:light dark}body{margin:auto;max-width:64rem;padding:1rem;font:1rem/1.5 system-ui}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.86rem}img{max-width:100%;background:#fff}
th,td{padding:.3rem 1rem .3rem 0;text-align:left;vertical-align:top;border-bottom:1px solid #8886}"""


def cell(found):
    """The entries of a number in all seeds -> text: mean ± SD over seeds [interval, the mean of its ends]"""
    found = [m for m in found if m and m["value"] is not None]
    values, ends = [m["value"] for m in found], [m["ci"] for m in found if None not in m["ci"]]
    text = M.number(statistics.fmean(values)) if values else "-"
    text += f" ± {M.number(statistics.stdev(values))}" if len(values) > 1 else ""
    low_high = ", ".join(M.number(statistics.fmean(end)) for end in zip(*ends))
    return text + (f" [{low_high}]" if ends else "")


def system(script, runs, seeds):
    """-> blocks: what was trained on whom, the numbers of every run and row, pictures"""
    module = importlib.import_module(script)
    blocks = [("h2", script), ("p", " ".join(module.__doc__.split("\n\n")[1].split()))]
    if not seeds:
        return blocks
    first = next(iter(seeds[0].values()))
    subjects = ", ".join(f"{k} {n}" for k, n in first["n"].items())
    blocks.append(("p", f"Data: {Path(first['data']).name}; subjects: {subjects}. Preset "
                        f"{first['config']['preset']}, {first['device']}, torch {first['torch']}."))

    labels = [label for label in dict.fromkeys(run.label for run in runs) if any(label in s for s in seeds)]
    every = {k: m for s in seeds for results in s.values() for k, m in results["metrics"].items()}
    value = lambda label, key: cell([s[label]["metrics"].get(key) for s in seeds if label in s])
    arrow = lambda key: f"{'↓' if every[key]['better'] == 'lower' else '↑'} {every[key]['unit']}".strip()
    shown = {key: words for key, words in module.SHOWN.items() if key in every}
    rows = [[label, *(value(label, key) for key in shown)] for label in labels]
    for row in filter(None, module.ROWS):
        if any(f"{key}.{row}" in every for key in shown):
            rows.append([module.ROWS[row], *(value(labels[0], f"{key}.{row}") for key in shown)])
    blocks.append(("table", "", ["", *(f"{words} {arrow(key)}" for key, words in shown.items())], rows))
    rows = [[f"{key} {arrow(key)}", *(value(label, key) for label in labels)] for key in every]
    blocks.append(("table", f"All {len(rows)} numbers", ["", *labels], rows))
    folder = next(run.out for run in runs if run.label in seeds[0])
    for path in sorted(folder.glob("*.png")):
        if path.stem != "preview":      # that one was for watching the training
            blocks.append(("image", Image.open(path).info.get("Description", path.stem), path))
    return blocks


def report(out, runs, done, failures):
    """Writes OUT/report.html and OUT/report.md. done: folder name -> results; failures: folder name -> why"""
    seeds = {run.script: [] for run in runs}
    for (script, _), group in itertools.groupby(runs, lambda run: (run.script, run.cfg.seed)):
        found = {run.label: done[run.out.name] for run in group if run.out.name in done}
        seeds[script] += [found] if found else []
    blocks = [
        ("h1", "Study report"),
        ("p", "For research and teaching only. Phantoms are drawings: on them a verdict is about the method, "
              "not about patients. ours is our recipe, paper is the published one. In brackets is the 95 % "
              "interval over subjects, after ± the standard deviation over seeds."),
        *(("p", f"{name} did not finish. {why}") for name, why in failures.items()),
        ("h2", "What the papers claim, and what this study found"),
        ("p", "A claim holds if its rule is true over the whole 95 % interval of the difference, in every "
              "seed. It does not hold if the rule is false in the same way. It is undecided if an interval, "
              "or the seeds, lie on both sides. Two numbers count as independent; a gain is paired.")]
    for script, found in seeds.items():
        rows = []
        for claim, rule in CLAIMS[script]:
            both = judge(rule, "paper", found), ("", "") if ":" in rule else judge(rule, "ours", found)
            rows.append([claim, rule, *(". ".join(filter(None, verdict)) for verdict in both)])
        blocks += [("h3", script), ("table", "", ["claim", "rule", "published recipe", "ours"], rows)]
    for script, found in seeds.items():
        blocks += system(script, [run for run in runs if run.script == script], found)
    rows = [[run.out.name, f"{done[run.out.name]['seconds']:.0f}", done[run.out.name]["git"] or "unknown",
             shlex.join(run.command)] for run in runs if run.out.name in done]
    blocks += [("h2", "Commands"), ("table", "", ["run", "seconds, last start", "commit", "command"], rows)]
    M.write_atomically(out / "report.md", as_markdown(blocks).encode())
    M.write_atomically(out / "report.html", as_html(blocks).encode())


def as_markdown(blocks):
    """-> text; pictures are links"""
    out = []
    for kind, text, *rest in blocks:
        if kind == "table":
            rows = [rest[0], ["---"] * len(rest[0]), *rest[1]]
            table = "\n".join("| " + " | ".join(t.replace("|", "/") for t in row) + " |" for row in rows)
            out.append(f"**{text}**\n\n{table}" if text else table)
        elif kind == "image":
            out.append(f"![{text}]({rest[0].parent.name}/{rest[0].name})\n\n*{text}*")
        else:
            out.append({"h1": "# ", "h2": "## ", "h3": "### ", "p": ""}[kind] + text)
    return "\n\n".join(out) + "\n"


def as_html(blocks):
    """-> a page that needs no network and no script; pictures are inside"""
    out = []
    for kind, text, *rest in blocks:
        text = html.escape(text)
        if kind == "table":
            line = lambda tag, row: "<tr>" + "".join(f"<{tag}>{html.escape(t)}" for t in row)
            rows = [line("th", rest[0]), *(line("td", row) for row in rest[1])]
            table = '<div class="scroll"><table>' + "\n".join(rows) + "</table></div>"
            out.append(f"<details><summary>{text}</summary>{table}</details>" if text else table)
        elif kind == "image":
            picture = base64.b64encode(rest[0].read_bytes()).decode()
            out.append(f'<p><img alt="" src="data:image/png;base64,{picture}"><br><small>{text}</small></p>')
        else:
            out.append(f"<{kind}>{text}</{kind}>")
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Study report</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{CSS}</style></head>\n<body>\n" + "\n".join(out) + "\n</body></html>\n")


def main(argv):
    args = parse(argv)
    runs, out, caught, done, failures = plan(args), Path(args.out), [], {}, {}
    if args.dry_run:
        for run in runs:
            print(shlex.join(run.command))
        return
    held = M.lock(out)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: caught.append(number))
    for run in runs:
        name = run.out.name
        if finished(run):
            print(f"{name}: finished before", flush=True)
        elif why := execute(run, held, caught):
            failures[name] = why
        if caught:
            print("stopped; the same command goes on")
            sys.exit(128 + caught[0])
        if name not in failures:
            done[name] = json.loads((run.out / "results.json").read_text())
    report(out, runs, done, failures)
    print(f"report: {out}/report.html, {out}/report.md")
    sys.exit(bool(failures))


if __name__ == "__main__":
    D.program(main)
