"""train.py: rules against Python's arithmetic, studies of stand-in scripts that are stopped, killed, broken
or cut in half, and the report. The four scripts themselves: what --dry-run makes of their flags."""
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

import train as t
from conftest import ROOT

STUB = '''"""A stand-in: it counts, saves after each step, goes on from there, obeys SIGTERM and Ctrl-C.

Question: does it <count> & stop?
"""
import json, os, signal, sys, time
from dataclasses import asdict, dataclass
from pathlib import Path

@dataclass
class Config:
    data: str = ""
    test: str = ""
    out: str = "out"
    preset: str = "demo"
    recipe: str = "ours"
    device: str = "cpu"
    seed: int = 0
    fold: str = ""
    batch: int = 4
    size: int = 8
    steps: int = 3
    nap: float = 0.0
    does: str = ""

PRESETS, RECIPES = {"demo": {"steps": 2}, "paper": {}}, {"ours": {}, "paper": {}}
SHOWN, ROWS = {"recon_ssim": "SSIM", "probe_auroc": "AUROC"}, {"": "ours", "vae": "VAE"}

if __name__ == "__main__":
    began, stop = time.time(), []
    cfg = Config(**{k: type(getattr(Config, k))(v) for k, v in (w[2:].split("=", 1) for w in sys.argv[1:])})
    out, step = Path(cfg.out), Path(cfg.out, "step")
    with open(out / "starts", "a") as f:
        f.write("x")
    if cfg.does == "fail":
        sys.exit("fine\\nerror: as asked\\nerror: because\\n\\nsome.ChildFailedError: \\nand more")
    if cfg.does == "die":
        os.kill(os.getpid(), 9)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, frame: stop.append(n))
    for k in range(int(step.read_text()) if step.exists() else 0, cfg.steps):
        time.sleep(cfg.nap)
        step.write_text(str(k + 1))
        if stop:
            sys.exit(128 + stop[0])
    row = lambda v: {"value": v, "ci": [v - 0.01, v + 0.01], "n": 20, "unit": "", "better": "higher"}
    ours = 0.8 + 0.1 * (cfg.recipe == "ours") + 0.02 * cfg.seed + 0.01 * int(cfg.fold[:1] or 0)
    metrics = {"recon_ssim": row(ours), "recon_ssim.vae": row(0.85), "probe_auroc": row(0.1)}
    results = dict(data="d/hearts.h5", n={"train": 80, "test": 20}, device="cpu", torch="2", git="abc", memory_gb=1.5)
    results |= dict(seconds=time.time() - began, config=asdict(cfg), metrics=metrics)
    if cfg.does not in ("nothing", cfg.fold or None):       # of a fold: this one leaves nothing
        (out / "results.json").write_text(json.dumps(results))
        (out / "predictions.csv").touch()
'''


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """train.py in a folder beside four stand-ins. -> study(*flags) -> exit code"""
    for name in ("train", "data", "metrics"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    for name in t.CLAIMS:
        (tmp_path / f"{name}.py").write_text(STUB)
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]       # the real one comes back after the test
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(t, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    yield lambda *flags: pytest.raises(SystemExit, t.main, list(flags)).value.code
    for s, handler in handlers.items():
        signal.signal(s, handler)


def starts(folder):
    return {p.parent.name: len(p.read_text()) for p in sorted(folder.glob("out/*/starts"))}


# ------------------------------------------------------------------------------------ rules

def world(values, width=0.0, n=9):
    """The runs of one seed, in which each name of a rule has its value and an interval of that half width."""
    labels = ("ours", "paper", "long", "scaled", "image", "wall", "SA")
    runs = {label: dict(config={"preset": "paper"}, metrics={}, undertrained="") for label in labels}
    for name, v in values.items():
        label, _, key = name.rpartition(":")
        runs[label or "ours"]["metrics"][key] = {"value": v, "ci": [v - width, v + width], "n": n}
    return runs


RULES = [rule for claims in t.CLAIMS.values() for _, rule in claims if re.search("[<>]", rule)]


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_means_what_python_would_compute(rule):
    rng, seen, expression = random.Random(0), set(), rule.partition(", ")[0]
    names = sorted(set(re.findall(r"[A-Za-z][\w.:]*", expression)) - {"and"}, key=len, reverse=True)
    for _ in range(300):
        values = {name: rng.choice([-0.1, 0.001, 0.04, 0.3, 0.95, 1.2, 3.0, 30.0]) for name in names}
        text = re.sub(r"[A-Za-z][\w.:]*", lambda m: str(values.get(m[0], m[0])), expression)
        verdict = {True: "holds", False: "does not hold"}[eval(text)]
        assert t.judge(rule, "ours", [world(values)])[0] == verdict, text
        seen.add(verdict)
    assert len(seen) == 2 and t.judge(rule, "ours", [world({})])[1] == f"no {min(names, key=rule.index)}"
    assert t.judge(rule, "ours", [])[0] == "not tested"


def test_seeds_intervals_and_single_subjects():
    high, low = world({"a": 2.0}), world({"a": 0.0})
    assert t.judge("a > 1", "ours", [high, high])[0] == "holds"
    assert t.judge("a > 1", "paper", [high]) == ("not tested", "no a")
    assert t.judge("a > 1", "ours", [high, low])[0] == "undecided"
    assert t.judge("a > 1", "ours", [world({"a": 2.0}, 1.5)])[0] == "undecided"
    assert t.judge("a > 1", "ours", [world({"a": 2.0}, n=1)])[0] == "undecided"
    demo = world({"a": 2.0})
    demo["ours"]["config"]["preset"] = "demo"
    assert t.judge("a > 1, preset paper", "ours", [demo]) == ("not tested", "needs --preset paper")
    short = world({"a": 2.0})
    short["ours"]["undertrained"] = "steps 1 of 2"
    assert t.judge("a > 1", "ours", [high, short]) == ("undertrained", "steps 1 of 2")


def test_the_interval_of_a_difference_against_a_simulation():
    """a ~ N(1, .3), b ~ N(.4, .4): the 95 % interval of a - b touches 0 where 0.6 is shrunk to 1.96 x 0.5."""
    rng, half = np.random.default_rng(0), lambda sd: 1.96 * sd
    for mean in (0.90, 0.95, 1.00, 1.05):
        low = np.percentile(rng.normal(mean, 0.3, 400_000) - rng.normal(0, 0.4, 400_000), 2.5)
        verdict = t.greater((mean, mean - half(0.3), mean + half(0.3)), (0, -half(0.4), half(0.4)))
        assert verdict == (True if low > 0 else None), (mean, low)


# ------------------------------------------------------------------------------------ the command line

@pytest.mark.parametrize("flags, word", [
    ("diffusion", "diffusion: no such script"), ("--seeds 0", "at least 1"), ("--gpus two", "two"),
    ("--bogus", "--bogus"), ("--folds 0", "at least 1"), ("-- --fold=1/3", "--out, --seeds and --folds"),
    ("-- --seed 4", "--out, --seeds and --folds"), ("-- --diffusion.steps 4", "diffusion is no script"),
    ("-- steps=4", "diffae.py: unknown flag steps=4"), ("-- --stepz 4", "diffae.py: unknown flag --stepz"),
    ("-- --ldae.steps many", "ldae.py: argument --steps"), ("-- --lr 1", "diffae.py: unknown flag --lr"),
    ("-- --ldae.data=no.h5", "ldae.py: --data no.h5: no such file"), ("-- --ldae.help", "ldae.py: --help"),
    ("-- --cond_ldm.test no.h5", "cond_ldm.py: --test no.h5: no such file"),
    ("--gpus 3", "diffae.py: --batch 4: must be a multiple of --gpus 3")])
def test_errors_are_one_line_and_leave_nothing(flags, word, stubs, capsys, tmp_path):
    for more in ((), ("--dry-run",)):
        assert stubs(*more, *flags.split()) == 2
        printed = capsys.readouterr()
        assert word in printed.err and printed.err.count("\n") == 1
        assert not printed.out and not (tmp_path / "out").exists()


def test_dry_run_lists_the_commands_of_the_four_scripts(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--dry-run", "--more", "--seeds", "2", "--gpus", "2"]
    t.main([*flags, "--", "--steps=9", "--ldae.S", "50", "--diffae.z_dim=4"])
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 * (6 + 2 + 3 + 2) and not list(tmp_path.iterdir())
    found = {next(w for w in words if w.startswith("--out=")): words for words in lines}
    long = set(found["--out=out/diffae_long_s1"])
    assert {"--nproc_per_node=2", "--recipe=paper", "--z_dim=4", "--seed=1", "--steps=45"} <= long
    assert "50" in found["--out=out/ldae"] and "50" not in found["--out=out/diffae"]
    t.main(["diffae", "--dry-run", "--", "--recipe=paper"])
    assert capsys.readouterr().out.count("\n") == 1
    t.main(["--quick", "--dry-run", "--", "--diffae.steps=7"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].index("--steps=20") < lines[0].index("--steps=7")   # the later counts


# ------------------------------------------------------------------------------------ studies

def test_what_is_finished_is_passed_over_and_what_is_not_is_started_again(stubs, tmp_path, capsys):
    once = dict(diffae=1, diffae_paper=1, ldae=1, ldae_paper=1)
    assert stubs("diffae", "ldae") == 0 and starts(tmp_path) == once
    report = (tmp_path / "out" / "RESULTS.md").read_text()
    assert stubs("diffae", "ldae") == 0 and starts(tmp_path) == once
    assert (tmp_path / "out" / "RESULTS.md").read_text() == report
    results = tmp_path / "out" / "diffae" / "results.json"
    results.write_bytes(results.read_bytes()[:100])                             # half a file
    (tmp_path / "ldae.py").write_text(STUB)                                     # newer code
    assert stubs("diffae", "ldae") == 0
    assert starts(tmp_path) == dict(diffae=2, diffae_paper=1, ldae=2, ldae_paper=2)
    assert stubs("diffae", "--", "--steps=5") == 0 and starts(tmp_path)["diffae"] == 3
    assert stubs("diffae", "--", "--does=nothing") == 1
    assert "left no new results.json" in capsys.readouterr().out
    results.write_text(results.read_text())                                     # by somebody else, since
    assert stubs("diffae", "--", "--steps=5") == 0 and starts(tmp_path)["diffae"] == 5


def test_a_script_that_fails_does_not_stop_the_others(stubs, tmp_path, capsys):
    assert stubs("diffae", "ldae", "--", "--diffae.does=fail") == 1 and starts(tmp_path)["ldae"] == 1
    assert stubs("diffae", "ldae", "--", "--ldae.does=die") == 1
    said, report = capsys.readouterr().out, (tmp_path / "out" / "RESULTS.md").read_text()
    assert "diffae: FAILED, exit code 1: error: because after" in said
    assert "ldae_paper did not finish. killed by SIGKILL; out of memory?" in report
    assert "diffae did not" not in report


def test_the_report_sets_both_recipes_side_by_side(stubs, tmp_path):
    assert stubs("diffae", "--seeds", "2") == 0
    text = (tmp_path / "out" / "RESULTS.md").read_text()
    vae = "recon_ssim.vae 0.850 ± 0.000 [0.840, 0.860]"
    verdicts = [f"does not hold. recon_ssim 0.810 ± 0.014 [0.800, 0.820]; {vae}",
                f"holds. recon_ssim 0.910 ± 0.014 [0.900, 0.920]; {vae}"]
    assert " | ".join(["| recon_ssim > recon_ssim.vae", *verdicts]) in text
    assert "| recon_ssim ↑ | 0.910 ± 0.014 [0.900, 0.920] | 0.810 ± 0.014 [0.800, 0.820] |" in text
    assert "does it <count> & stop?" in text
    assert "python diffae.py --recipe=paper --seed=1 --out=out/diffae_paper_s1" in text
    assert sys.executable not in text       # no path of this machine


def test_means_over_folds(tmp_path):
    """p values become one that is valid. A fold without an interval takes the interval away."""
    def of(p, ci, n):
        entry = dict(n=n, unit="", better="")
        return SimpleNamespace(out=tmp_path), dict(config=dict(preset="demo", steps=600), metrics={
            "ks_p.vae": entry | dict(value=p, ci=[None, None]), "hr_per_sd": entry | dict(value=1 + p, ci=ci)})
    found = t.as_one("normative", [of(0.04, [0.9, 1.1], 9), of(0.2, [None, None], 5)])["metrics"]
    assert found["ks_p.vae"]["value"] == pytest.approx(0.24) and found["hr_per_sd"]["value"] == pytest.approx(1.12)
    assert found["hr_per_sd"]["ci"] == [None, None] and found["hr_per_sd"]["n"] == 5


def test_folds_are_pooled_by_recipe_and_seed(stubs, tmp_path, monkeypatch):
    asked = []

    def pooled(paths):
        asked.append([str(path) for path in paths])
        entry = dict(value=0.5 + 0.1 * len(asked), ci=[0.4, 0.95], n=60, unit="", better="higher")
        return {"probe_auroc": entry}
    monkeypatch.setattr(t.M, "pooled", pooled, raising=False)
    assert stubs("ldae", "--folds", "3", "--seeds", "2") == 0
    names = ("ldae", "ldae_paper", "ldae_s1", "ldae_paper_s1")      # each a recipe and a seed
    assert asked == [[f"out/{name}_f{k}/predictions.csv" for k in range(3)] for name in names]
    text = (tmp_path / "out" / "RESULTS.md").read_text()
    # ours pooled: .6 and .8 in seeds 0 and 1. SSIM: the mean of three folds, then of two seeds
    assert "| ours | 0.920 ± 0.014 [0.910, 0.930] | 0.700 ± 0.141 [0.400, 0.950] |" in text
    assert "AUROC ↑, all folds together" in text and "each subject is tested once" in text
    holds = "| probe_auroc > 0.5 | undecided. probe_auroc 0.800 ± 0.141 [0.400, 0.950] |"
    assert holds in text and "--seed=1 --fold=2/3 --out=out/ldae_s1_f2" in text
    asked.clear()
    assert stubs("ldae", "--folds", "3", "--", "--does=1/3") == 1 and asked == []       # two folds of three


def test_quick_draws_small_phantoms_and_gives_no_verdict(stubs, tmp_path, monkeypatch):
    draw = lambda path, subjects: (tmp_path / path).write_text(str(subjects))
    monkeypatch.setattr(t, "QUICK", {"diffae": (draw, dict(subjects=7), "--steps=1 --nap=0.01")})
    assert stubs("diffae", "--quick") == 0
    out = tmp_path / "out" / "quick"
    assert (out / "diffae.h5").read_text() == "7" and list(out.glob("*/step")) == [out / "diffae" / "step"]
    text = (out / "RESULTS.md").read_text()
    assert text.count("smoke test: no verdicts |") == 2 * len(t.CLAIMS["diffae"]) and "holds." not in text
    assert "--steps=1 --nap=0.01" in text and "--data=out/quick/diffae.h5" in text
    (tmp_path / "mine.h5").write_text("mine")
    assert stubs("diffae", "--quick", "--out=b", "--", "--data=mine.h5", "--steps=2") == 0
    assert not (tmp_path / "b" / "diffae.h5").exists() and (tmp_path / "b/diffae/step").read_text() == "2"


def test_a_claim_needs_the_steps_of_the_preset(stubs, tmp_path):
    for steps, verdict in ((1, "undertrained. steps 1 of 2"), (2, "holds. recon_ssim 0.900 [0.890, 0.910]")):
        assert stubs("diffae", "--", "--recipe=ours", f"--steps={steps}") == 0
        text = (tmp_path / "out" / "RESULTS.md").read_text()
        assert f"| recon_ssim > recon_ssim.vae | not tested. no recon_ssim | {verdict}" in text


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_study_that_is_stopped_or_killed_goes_on(number, code, stubs, tmp_path, capsys):
    flags, step = ["diffae", "--", "--steps=6", "--nap=0.3"], tmp_path / "out" / "diffae" / "step"
    p = subprocess.Popen([sys.executable, "train.py", *flags], stdout=subprocess.PIPE, text=True)
    while not step.exists():
        assert p.poll() is None, p.communicate()
        time.sleep(0.05)
    p.send_signal(number)
    assert p.wait() == code
    if number == signal.SIGKILL:        # the script that it left running holds the folder until it ends
        assert stubs(*flags) == 2 and "another run is using this folder" in capsys.readouterr().err
    else:
        assert int(step.read_text()) < 6 and "stopped; the same command goes on" in p.stdout.read()
    while (ended := stubs(*flags)) == 2:
        time.sleep(0.3)
    assert ended == 0 and step.read_text() == "6"
    assert starts(tmp_path) == dict(diffae=2, diffae_paper=1)
