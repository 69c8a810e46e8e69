"""train.py: the claims' rules in both directions, studies of small stand-in scripts that are stopped, killed, broken
or cut in half, one of a real script, and the report in a browser."""
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import metrics as M  # noqa: E402
import train as t  # noqa: E402

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

# A stand-in: trains by counting, saves after each step, resumes, obeys SIGTERM; numbers depend on seed and flags only.
STUB = '''"""A stand-in."""
import json, os, random, signal, sys, time
from pathlib import Path

PAPER = {"recon_ssim": 0.66, "hr_per_sd": 0.73}
name, flags = Path(__file__).stem, dict(w[2:].split("=", 1) for w in sys.argv[1:])
out = Path(flags["out"])
with open(out / "starts", "a") as f:
    f.write("x")
if flags.get("broken"):
    print("so far so good\\nerror: broken: as asked", file=sys.stderr)
    sys.exit(2)
if flags.get("killed"):
    print("\\rckpt:  20%|##   | 1/9 [00:00<00:05, 1step/s]", end="", file=sys.stderr, flush=True)
    os.kill(os.getpid(), 9)
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(143))
signal.signal(signal.SIGINT, lambda *_: stop.append(130))
saved = out / "step"
step = int(saved.read_text()) if saved.exists() else 0
while step < int(flags.get("steps", 3)):
    time.sleep(float(flags.get("nap", 0)))
    step += 1
    part = out / "step.part"
    part.write_text(str(step))
    os.replace(part, saved)
    print(f"\\rckpt:  {step}%|#   | 1/9 [00:00<00:0{step}, 1step/s]", end="", file=sys.stderr, flush=True)
    if stop:
        print(f"saved step {step}; resume with the same command")
        sys.exit(stop[0])
seed = int(flags["seed"])
row = lambda v, unit="": {"value": v, "ci": [v - 0.01, v + 0.01], "n": 20, "unit": unit, "better": "higher"}
metrics = {"recon_ssim": row(0.9 + 0.02 * seed), "recon_ssim.vae": row(0.5), "recon_ssim.paper_recipe": row(0.8),
           "semantic_ssim.paper_recipe": row(0.1), "hr_per_sd": row(0.7), "throughput_ratio": row(time.time() % 9, "x"),
           "train_img_s": row(random.random(), "1/s")}
from PIL import Image
from PIL.PngImagePlugin import PngInfo
note = PngInfo()
note.add_itxt("Description", f"<b>What</b> {name} & co. drew")
Image.effect_noise((900, 300), 60).save(out / "picture.png", pnginfo=note) if not (out / "picture.png").exists() else 0
results = dict(script=name, data=flags.get("data", "phantoms"), n={"train": 80, "test": 20}, seconds=time.time() % 99,
               device="cpu", torch="2", git="abc", config={"recipe": "ours", **flags, "seed": seed, "steps": step}, metrics=metrics)
(out / "results.json").write_text(json.dumps(results))
'''


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """A repository of four stand-ins, where train.py will look for its scripts; its signal handlers are put back."""
    folder = tmp_path / "repo"
    folder.mkdir()
    shutil.copy(ROOT / "train.py", folder)
    for name in t.SYSTEMS:
        (folder / f"{name}.py").write_text(STUB)
    monkeypatch.setattr(t, "ROOT", folder)
    monkeypatch.chdir(folder)
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)}
    yield folder
    for number, handler in before.items():
        signal.signal(number, handler)


def starts(out, *names):
    return [len((out / n / "starts").read_text()) if (out / n / "starts").exists() else 0 for n in names or t.SYSTEMS]


def timeless(folder):
    """The two reports without what is under "Time and memory"."""
    texts = [(folder / f"report.{kind}").read_text() for kind in ("html", "md")]
    assert all(text.count('<section id="times">') == text.count("</section>") == 1 for text in texts)
    texts = [re.sub(r"commit \w+", "", text) for text in texts]      # somebody may commit during the tests
    return [re.sub(r'<section id="times">.*?</section>', "", text, flags=re.S) for text in texts]


# ------------------------------------------------------------------------------------ claims

def world(script, value, width=0.0, recipe="ours"):
    """Results in which KEY has the value and an interval of that half width."""
    row = lambda v: {"value": v, "ci": [v - width, v + width], "n": 9, "unit": "", "better": "higher"}
    made = {"script": script, "config": {"recipe": recipe}, "metrics": {k: row(v) for k, v in value.items()}, "more": {}}
    for label, (of, flags) in t.MORE.items():
        if of == script:
            mine = {k.split(":")[1]: row(v) for k, v in value.items() if k.startswith(label + ":")}
            made["more"][label] = {"config": flags, "metrics": mine}
    return made


# Numbers under which every claim is true, and such under which every one is false.
TRUE = {
    "diffae": {"recon_ssim.paper_recipe": 0.66, "recon_ssim.vae": 0.5, "semantic_ssim.paper_recipe": 0.2, "recon_ssim": 0.7,
               "semantic_ssim": 0.3, "semantic_mse.paper_recipe": 0.06, "semantic_mse.vae": 0.03, "z_use_q4": 0.01,
               "z_use_q4.paper_recipe": 0.0, "probe_auroc.paper_recipe": 0.6, "probe_auroc.vae": 0.8, "probe_f1": 0.6,
               "probe_f1.paper_recipe": 0.6, "probe_f1.vae": 0.7, "probe_auroc_gain": -0.1,
               "factor_r2_x.paper_recipe": 0.1, "factor_r2_y.paper_recipe": 0.2, "long:recon_ssim": 0.8,
               "long:probe_auroc": 0.7, "long:probe_f1": 0.65, "scaled:recon_ssim": 0.7, "scaled:probe_auroc": 0.7},
    "ldae": {"probe_auroc": 0.95, "age_mae": 4.0, "age_mae.mean": 9.0, "manip_ventricle_slope": 1.0,
             "manip_hippocampus_slope": -0.1, "interp_ssim_6m": 0.98, "interp_mse_6m": 0.001, "interp_ssim_24m": 0.94,
             "interp_mse_24m": 0.003, "interp_mse_24m.copy_nearest": 0.004, "recon_ssim_T10": 0.95,
             "recon_ssim_T10.dae": 0.89, "throughput_ratio": 21},
    "cond_ldm": {"vq_ssim": 0.9, "vq_ssim.other_slice": 0.7, "nmse": 1.1, "nmse.cond_seed": 1.22, "nmse.constant": 1.0,
                 "ssim": 0.6, "ssim.edges_none": 0.5, "ssim.edges_sparse": 0.55, "edge_f1": 0.8, "edge_f1.edges_sparse": 0.7,
                 "ssim.view_SA": 0.6, "SA:ssim": 0.7},
    "normative": {"hr_per_sd": 0.73, "hr_per_sd.cosine": 0.73, "ks_p": 0.01, "ks_p.cosine": 0.01, "logrank_p": 0.01,
                  "logrank_p.cosine": 0.01, "c_index.cosine": 0.7, **{f"c_index.{k}": 0.6 for k in t.BENCHMARKS},
                  **{f"c_index_gain.{k}": 0.1 for k in t.BENCHMARKS}}}
FALSE = {
    "diffae": {"recon_ssim.paper_recipe": 0.4, "recon_ssim.vae": 0.5, "semantic_ssim.paper_recipe": 0.3, "recon_ssim": 0.7,
               "semantic_ssim": 0.5, "semantic_mse.paper_recipe": 0.05, "semantic_mse.vae": 0.03, "z_use_q4": 5,
               "z_use_q4.paper_recipe": 0.1, "probe_auroc.paper_recipe": 0.9, "probe_auroc.vae": 0.8, "probe_f1": 0.8,
               "probe_f1.paper_recipe": 0.8, "probe_f1.vae": 0.7, "probe_auroc_gain": 0.1,
               "factor_r2_x.paper_recipe": 0.9, "factor_r2_y.paper_recipe": 0.9, "long:recon_ssim": 0.3,
               "long:probe_auroc": 0.9, "long:probe_f1": 0.75, "scaled:recon_ssim": 0.3, "scaled:probe_auroc": 0.7},
    "ldae": {"probe_auroc": 0.45, "age_mae": 10.0, "age_mae.mean": 9.0, "manip_ventricle_slope": -1.0,
             "manip_hippocampus_slope": 0.1, "interp_ssim_6m": 0.9, "interp_mse_6m": 0.01, "interp_ssim_24m": 0.9,
             "interp_mse_24m": 0.005, "interp_mse_24m.copy_nearest": 0.004, "recon_ssim_T10": 0.8,
             "recon_ssim_T10.dae": 0.89, "throughput_ratio": 3},
    "cond_ldm": {"vq_ssim": 0.6, "vq_ssim.other_slice": 0.7, "nmse": 0.3, "nmse.cond_seed": 0.8, "nmse.constant": 1.0,
                 "ssim": 0.4, "ssim.edges_none": 0.5, "ssim.edges_sparse": 0.55, "edge_f1": 0.6, "edge_f1.edges_sparse": 0.7,
                 "ssim.view_SA": 0.6, "SA:ssim": 0.5},
    "normative": {"hr_per_sd": 1.1, "hr_per_sd.cosine": 1.2, "ks_p": 0.5, "ks_p.cosine": 0.06, "logrank_p": 0.5,
                  "logrank_p.cosine": 0.06, "c_index.cosine": 0.5, **{f"c_index.{k}": 0.6 for k in t.BENCHMARKS},
                  **{f"c_index_gain.{k}": -0.1 for k in t.BENCHMARKS}}}


@pytest.mark.parametrize("claim", [c for c in t.CLAIMS if callable(c[3])], ids=lambda c: f"{c[0]}: {c[2]}")
def test_every_rule_can_come_out_either_way(claim):
    script, _, words, rule = claim
    yes, no = world(script, TRUE[script], 1e-6), world(script, FALSE[script], 1e-6)
    assert t.judge(rule, [yes])[0] == "holds" and t.judge(rule, [yes, yes])[0] == "holds"
    assert t.judge(rule, [no])[0] == "does not hold" and t.judge(rule, [no, no, no])[0] == "does not hold"
    assert t.judge(rule, [yes, no])[0] == "undecided"                               # the seeds disagree
    assert t.judge(rule, [world(script, TRUE[script], 99.0)])[0] == "undecided"     # the intervals say nothing
    assert t.judge(rule, [])[0] == t.judge(rule, [world(script, {})])[0] == "not tested" and words
    used = t.judge(rule, [yes])[1]
    assert used and all(t.Numbers(yes).find(name) for name in used)


def test_a_demo_decides_nothing_on_speed():
    rule = next(rule for _, claim, _, rule in t.CLAIMS if "20 times faster" in claim)
    demo = world("ldae", TRUE["ldae"])
    assert t.judge(rule, [demo])[0] == "holds"
    demo["config"]["preset"] = "demo"
    assert t.judge(rule, [demo])[:2] == ("undecided", ["throughput_ratio"])


def test_survival_that_separates_the_wrong_way_round_is_no_support():
    rules = [c[3] for c in t.CLAIMS if "of KS" in c[2] or c[2] == "the same"]
    wrong = TRUE["normative"] | {"hr_per_sd": 1.4, "hr_per_sd.cosine": 1.4}      # p 0.01, but the healthier die sooner
    assert [t.judge(rule, [world("normative", wrong, 1e-6)])[0] for rule in rules] == ["does not hold"] * 2


def test_claims_without_a_rule_say_what_it_would_take():
    for script, claim, words, rule in t.CLAIMS:
        if not callable(rule):
            verdict, used, why = t.judge(rule, [world(script, TRUE[script])])
            assert verdict == "not tested" and not used and "second run" in why and not words
    assert {c[0] for c in t.CLAIMS} == set(t.SYSTEMS)


def test_a_difference_of_intervals_is_that_of_independent_normal_numbers():
    """Against a simulation: two normal estimates with 95 % intervals 1.96 sd to either side."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(1.0, 0.3, 400_000), rng.normal(0.4, 0.4, 400_000)
    d = t.Interval(1.0, 1.0 - 1.96 * 0.3, 1.0 + 1.96 * 0.3) - t.Interval(0.4, 0.4 - 1.96 * 0.4, 0.4 + 1.96 * 0.4)
    low, high = np.percentile(a - b, [2.5, 97.5])
    assert abs(d.low - low) < 0.01 and abs(d.high - high) < 0.01 and math.isclose(d.value, 0.6)
    half = 0.5 * t.Interval(2.0, 1.0, 4.0)
    assert (half.value, half.low, half.high) == (1.0, 0.5, 2.0)


def test_comparisons_have_three_answers():
    a = t.Interval(0.5, 0.4, 0.6)
    assert (a > 0.3, a > 0.5, a > 0.7) == (True, None, False) and (a < 0.3, a < 0.5, a < 0.7) == (False, None, True)
    # An interval that ends below the value it is compared with, but whose difference does not exclude 0
    assert (a > t.Interval(0.45, 0.2, 0.6)) is None and (a > t.Interval(0.2, 0.15, 0.25)) is True
    assert t.judge(lambda m: [m["a"] > 0, m["b"] > 0], [world("", {"a": 1, "b": -1})])[0] == "does not hold"
    assert t.judge(lambda m: [m["a"] > 0, m["b"] > 0], [world("", {"a": 1, "b": 0}, 0.1)])[0] == "undecided"


def test_a_number_without_interval_is_taken_as_it_is_and_no_number_is_not_tested():
    run = world("", {"a": 2.0})
    run["metrics"]["a"]["ci"] = [None, None]
    assert t.judge(lambda m: m["a"] > 1, [run])[0] == "holds"
    run["metrics"]["a"]["n"] = 1      # but one subject decides nothing
    assert t.judge(lambda m: m["a"] > 1, [run])[0] == t.judge(lambda m: m["a"] > m["a"], [run])[0] == "undecided"
    run["metrics"]["a"]["value"] = None
    verdict, _, why = t.judge(lambda m: m["a"] > 1, [run])
    assert verdict == "not tested" and why == "no a"


def test_rows_of_a_recipe_are_found_whichever_recipe_the_run_has():
    ours, paper = world("", {"k": 1, "k.paper_recipe": 2}), world("", {"k": 3}, recipe="paper")
    assert t.Numbers(ours)["k.ours"].value == 1 and t.Numbers(ours)["k.paper_recipe"].value == 2
    assert t.Numbers(paper)["k.paper_recipe"].value == t.Numbers(paper)["k.cosine"].value == 3
    with pytest.raises(KeyError):
        t.Numbers(paper)["k.ours"]


# ------------------------------------------------------------------------------------ the command line

@pytest.mark.parametrize("flags, word", [
    ("diffusion", "diffusion: no such system"), ("--data-dir /no/where", "no such folder"), ("--seeds 0", "at least 1"),
    ("--gpus 0", "at least 1"), ("--bogus", "--bogus"), ("--preset small", "small"), ("--nodes 2", "MASTER_ADDR"),
    ("--resume", "no study in"), ("-- --seed 4", "--out and --seeds"), ("-- --diffusion.steps 4", "a prefix must name"),
    ("-- steps=4", "steps=4 after --"), ("-- --steps 4 5", "5 after --"), ("-- --ldae.S=4 5", "5 after --"),
    ("--data-dir .", "has none of emidec.h5"), ("--seeds two", "two")])
def test_errors_are_one_line_and_leave_nothing(flags, word, stubs, capsys, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(SystemExit) as e:
        t.main(flags.split())
    printed = capsys.readouterr()
    assert e.value.code == 2 and word in printed.err and printed.err.startswith("error: "), printed.err
    assert printed.err.count("\n") == 1 and not printed.out and not (stubs / "out").exists()


def test_dry_run_prints_the_commands_and_does_nothing(stubs, tmp_path, capsys):
    data = tmp_path / "my data"
    (data / "mms").mkdir(parents=True)
    (data / "emidec.h5").touch()
    flags = ["--seeds", "2", "--data-dir", str(data), "--gpus", "4", "--preset", "demo", "--dry-run", "--", "--steps=9",
             "--ldae.S", "50", "--bf16", "--diffae.mult=1,2"]
    assert t.main(flags) == 0
    words = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=4", "--standalone"]
    both = ["--steps=9", "--bf16=true"]
    assert words[0] == [*torchrun, "diffae.py", "--out=out/diffae", "--preset=demo", f"--data={data}/emidec.h5", *both,
                        "--mult=1,2", "--seed=0"]
    assert words[1][6] == "--out=out/diffae_s1" and words[1][-1] == "--seed=1" and len(words) == 8
    assert not [w for w in words[2] if "data" in w] and f"--data={data}/mms" in words[4]
    assert words[6][5:] == ["ldae.py", "--out=out/ldae", "--preset=demo", "--steps=9", "--S=50", "--bf16=true", "--seed=0"]
    assert not (stubs / "out").exists()
    assert t.main(["--dry-run", "--more", "diffae"]) == 0      # x5 is no number: said so
    assert re.findall("--steps=(.*)", capsys.readouterr().out) == ["x5   # x5: 5 times the steps of diffae"]
    assert t.main(["--dry-run", "normative"]) == 0
    assert capsys.readouterr().out == f"{sys.executable} normative.py --out=out/normative --seed=0\n"


def test_nodes_go_through_torchrun(stubs, capsys, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "first")
    monkeypatch.setenv("SLURM_NODEID", "1")
    assert t.main(["ldae", "--nodes", "2", "--gpus", "8", "--dry-run"]) == 0
    line = capsys.readouterr().out
    for flag in ("--nnodes=2", "--node_rank=1", "--master_addr=first", "--master_port=29500", "--nproc_per_node=8"):
        assert flag in line
    monkeypatch.setenv("NODE_RANK", "2")
    with pytest.raises(SystemExit):
        t.main(["ldae", "--nodes", "2", "--dry-run"])


# ------------------------------------------------------------------------------------ studies

def test_a_study_and_what_it_skips(stubs, capsys):
    """Whole and of this very command: passed over. Cut in half, other flags, another script: started again."""
    assert t.main([]) == 0
    printed, out = capsys.readouterr().out, stubs / "out"
    assert starts(out) == [1, 1, 1, 1] and printed.count("done") == 4 and "report: out/report.html" in printed
    first = timeless(out)
    assert t.main([]) == 0 and starts(out) == [1, 1, 1, 1]
    assert capsys.readouterr().out.count("finished before") == 4 and timeless(out) == first
    results = out / "normative" / "results.json"
    results.write_bytes(results.read_bytes()[:300])
    assert t.main([]) == 0 and starts(out) == [1, 2, 1, 1] and timeless(out) == first
    (out / "ldae" / "results.json").unlink()
    with open(stubs / "cond_ldm.py", "a") as f:
        f.write("# another program\n")
    assert t.main([]) == 0 and starts(out) == [1, 2, 2, 2] and timeless(out) == first
    assert t.main(["diffae", "--", "--steps", "5"]) == 0 and starts(out) == [2, 2, 2, 2]
    assert (out / "diffae" / "step").read_text() == "5"
    assert t.main(["--resume"]) == 0 and starts(out) == [2, 2, 2, 2]       # that study: its flags need not be said again
    with pytest.raises(SystemExit) as e:
        t.main(["normative", "--resume"])
    assert e.value.code == 2 and "names" in capsys.readouterr().err


def test_other_data_is_another_study(stubs, tmp_path):
    (tmp_path / "emidec.h5").write_text("1")
    flags = ["diffae", "--data-dir", str(tmp_path)]
    assert t.main(flags) == t.main(flags) == 0 and starts(stubs / "out", "diffae") == [1]
    (tmp_path / "emidec.h5").write_text("22")
    assert t.main(flags) == 0 and starts(stubs / "out", "diffae") == [2]


def test_a_script_that_fails_does_not_stop_the_others(stubs, capsys):
    assert t.main(["--", "--normative.broken"]) == 1
    printed, out = capsys.readouterr().out, stubs / "out"
    assert starts(out) == [1, 1, 1, 1] and "FAILED, exit code 2: error: broken: as asked" in printed
    for text in timeless(out):
        assert "normative did not finish." in text and "exit code 2: error: broken: as asked" in text
    assert t.main([]) == 0 and starts(out) == [1, 2, 1, 1]
    assert "did not finish" not in timeless(out)[0]
    (stubs / "ldae.py").write_text("")      # ends well, but leaves nothing
    assert t.main(["ldae", "--out", "other"]) == 1 and "left no whole results.json" in capsys.readouterr().out


def test_a_failure_is_named_by_its_cause(stubs, capsys):
    assert t.main(["diffae", "--", "--killed"]) == 1
    assert "FAILED, killed by SIGKILL; the machine may be out of memory\n" in capsys.readouterr().out
    assert "**diffae did not finish.** killed by SIGKILL" in (stubs / "out" / "report.md").read_text()
    bar = "ckpt:  20%|##   | 1/9 [00:00<00:05, 1step/s]"
    torchrun = ("\nTraceback (most recent call last):\n    raise ChildFailedError(\ntorch.distributed.elastic.multiprocessing."
                "errors.ChildFailedError: \n=====\na.py FAILED\n  error_file: <N/A>\n  traceback : {}\n=====\n")
    elsewhere = torchrun.format("To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html")
    for said, cause in (
            (f"{bar}error: not finite at step 3, lr 1", "error: not finite at step 3, lr 1"),      # an open bar
            (f"{bar}\nerror: broken{elsewhere}", "error: broken"),
            (f"Traceback\n  File a.py\nValueError: boom{elsewhere}", "ValueError: boom"),
            (bar + torchrun.format("Signal 9 (SIGKILL) received by PID 4"), "Signal 9 (SIGKILL) received"),
            ("gone\n\n", "gone"), ("", "it said nothing")):
        assert t.reason(2, said) == f"exit code 2: {cause}"


def test_seeds_give_mean_and_spread(stubs):
    assert t.main(["diffae", "--seeds", "3"]) == 0
    page, text = timeless(stubs / "out")
    values = np.array([0.9, 0.92, 0.94])
    assert f"{values.mean():.3f} ± {values.std(ddof=1):.3f}<br>[0.910, 0.930]" in text       # mean of the intervals' ends
    assert "0.920 ± 0.020<small>[0.910, 0.930]</small>" in page and "| seeds | 0, 1, 2 |" in text
    assert [json.loads((stubs / "out" / n / "results.json").read_text())["config"]["seed"]
            for n in ("diffae", "diffae_s1", "diffae_s2")] == [0, 1, 2]


def test_more_runs_for_the_claims_that_need_them(stubs, capsys):
    assert t.main(["diffae", "cond_ldm", "--more", "--seeds", "2", "--", "--steps=4", "--cond_ldm.broken"]) == 1
    out = stubs / "out"
    names = ("diffae", "diffae_long", "diffae_scaled", "diffae_s1", "diffae_long_s1", "cond_ldm", "cond_ldm_SA")
    assert starts(out, *names) == [1] * 6 + [0] and (out / "diffae_long_s1" / "step").read_text() == "20"
    config = json.loads((out / "diffae_scaled_s1" / "results.json").read_text())["config"]
    assert config["z_scale"] == "3" and config["recipe"] == "paper" and config["seed"] == 1 and config["steps"] == 4
    page, text = timeless(out)
    row = next(line for line in text.splitlines() if "5 times the steps (long)" in line)
    assert row.startswith("| holds |") and "long:recon_ssim.paper_recipe 0.910 ± 0.014" in row
    assert "cond_ldm_SA did not finish" in page and t.main(["diffae", "--more", "--seeds=2", "--", "--steps=4"]) == 0
    assert starts(out, *names[:5]) == [1] * 5
    assert t.main(["diffae", "--more", "--out=no", "--", "--diffae.broken"]) == 1
    assert starts(stubs / "no", "diffae", "diffae_long") == [1, 0] and "needs diffae" in (stubs / "no" / "report.md").read_text()


def test_reports_are_one_file_and_say_the_same(stubs):
    assert t.main(["diffae", "ldae"]) == 0
    page, text = ((stubs / "out" / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page and "http" not in page
    assert 'name="viewport"' in page and "prefers-color-scheme:dark" in page
    assert "&lt;b&gt;What&lt;/b&gt; diffae &amp; co. drew" in page and "*<b>What</b> diffae & co. drew*" in text
    for path in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (stubs / "out" / path).stat().st_size
    assert page.count("<img") == text.count("![") == 2
    visible = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<head>.*</head>", "", page, flags=re.S)))
    for verdict in ("holds", "does not hold", "undecided", "not tested"):
        assert text.count(f"| {verdict} |") == len(re.findall(rf'<td class="{verdict.split()[0]}">{verdict}<td', page))
    assert "recon_ssim.paper_recipe 0.800 [0.790, 0.810]" in visible and "recon_ssim.paper_recipe 0.800 [0.790" in text
    assert "0.660" in visible                                          # the paper's, read from the script's source
    assert "<br>throughput_ratio under Time and memory |" in text and re.search(r"throughput_ratio \d.* x", text)


def study(folder, *flags, **kinds):
    return subprocess.Popen([sys.executable, "train.py", *map(str, flags)], cwd=folder, env=ENV, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kinds)


def wait_for(path, seconds=120):
    end = time.time() + seconds
    while not path.exists():
        assert time.time() < end, path
        time.sleep(0.02)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_passed_on_and_the_study_goes_on_later(number, code, stubs):
    flags = ["diffae", "ldae", "--out", "stopped", "--", "--steps=6", "--nap=0.3"]
    p = study(stubs, *flags)
    wait_for(stubs / "stopped" / "diffae" / "step")
    p.send_signal(number)
    printed = p.communicate()[0]
    assert p.returncode == code and re.search(r"stopped, saved step \d", printed), printed
    assert "python train.py --resume --out stopped" in printed and starts(stubs / "stopped", "ldae") == [0]
    assert int((stubs / "stopped" / "diffae" / "step").read_text()) < 6 and "Traceback" not in printed
    assert t.main(["--resume", "--out", "stopped"]) == 0 and starts(stubs / "stopped", "diffae", "ldae") == [2, 1]
    assert t.main([*flags[:2], "--out", "whole", "--", "--steps=6"]) == 0
    for run in ("diffae", "ldae"):     # noise of their own
        shutil.copy(stubs / "whole" / run / "picture.png", stubs / "stopped" / run)
    assert t.main(["--resume", "--out", "stopped"]) == 0 and timeless(stubs / "stopped") == timeless(stubs / "whole")


def test_kill_9_at_random_moments_gives_the_same_report(stubs):
    """What is killed is train.py; the script it leaves behind is waited for, by the same command again."""
    flags, rng = ["diffae", "cond_ldm", "--out", "killed", "--", "--steps=5", "--nap=0.2"], random.Random(0)
    for _ in range(4):
        p = study(stubs, *flags)
        time.sleep(rng.uniform(0.3, 3))
        p.kill()
        p.wait()
    p = study(stubs, *flags)
    printed = p.communicate()[0]
    assert p.returncode == 0, printed
    assert t.main([*flags[:2], "--out", "whole", "--", "--steps=5", "--nap=0.2"]) == 0
    for run in ("diffae", "cond_ldm"):
        shutil.copy(stubs / "killed" / run / "picture.png", stubs / "whole" / run)
    assert t.main(["--resume", "--out", "whole"]) == 0 and timeless(stubs / "killed") == timeless(stubs / "whole")


def test_two_studies_in_one_folder(stubs):
    first = study(stubs, "diffae", "--", "--steps=99", "--nap=0.2")
    wait_for(stubs / "out" / "diffae" / "step")
    second = study(stubs, "ldae")
    printed = second.communicate()[0]
    assert second.returncode == 2 and f"in use by process {first.pid}" in printed and printed.count("\n") == 1
    first.send_signal(signal.SIGTERM)
    first.communicate()
    assert first.returncode == 143 and t.main(["ldae"]) == 0


def test_progress_is_read_from_the_last_bar(tmp_path):
    log = tmp_path / "train.log"
    log.write_text("diffae: preset demo\n")
    assert t.progress(log) == "starts"
    log.write_text("x\n\rckpt:   0%|   | 1/800 [00:00<?, ?step/s]\rckpt_vae:  45%|███  | 360/800 [01:20<01:38, 4.4step/s]")
    assert t.progress(log) == "ckpt_vae 45 %, 01:38 left"
    log.write_text("evaluate: images: 100%|####| 3/3 [00:08<00:00,  2.89s/model]")
    assert t.progress(log) == "evaluate: images 100 %, 00:00 left"


# ------------------------------------------------------------------------------------ a real script; a browser

def test_a_real_script_stopped_and_started_again_gives_the_same_report(tmp_path):
    from test_diffae import D, FLAGS, images
    D.write(str(tmp_path / "emidec.h5"), [dict(      # no labels: the probes take longest
        image=images(24), subject=np.repeat([f"p{i:02d}" for i in range(12)], 2),
        factor_x=np.linspace(0, 1, 24).astype(np.float32))], {})
    flags = ["diffae", "--data-dir", tmp_path, "--", *FLAGS, "--steps=40", "--prior_steps=0"]
    command = lambda out: study(ROOT, "--out", tmp_path / out, *flags)
    p = command("stopped")
    wait_for(tmp_path / "stopped" / "diffae" / "ckpt.pt")
    p.send_signal(signal.SIGTERM)
    printed = p.communicate()[0]
    assert p.returncode == 143 and "stopped, " in printed, printed
    for out in ("stopped", "whole"):
        p = command(out)
        printed = p.communicate()[0]
        assert p.returncode == 0, printed
    for stopped, whole in zip(*(map(timeless, (tmp_path / "stopped", tmp_path / "whole")))):
        assert stopped == whole and "recon_ssim.paper_recipe" in whole and "0.660" in whole
    assert "Swapped codes" in whole and "Sudden cardiac death study" in whole


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>addEventListener("load", () => parent.postMessage(JSON.stringify({
  images: [...document.images].map(i => i.naturalWidth), wide: document.documentElement.scrollWidth, page: innerWidth,
  small: [...document.images].every(i => i.getBoundingClientRect().right <= innerWidth),
  tables: [...document.querySelectorAll(".scroll")].filter(d => d.scrollWidth > d.clientWidth).length}), "*"))</script>"""


def browse(page, *flags):
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage",
                           "--enable-logging=stderr", "--virtual-time-budget=20000", f"--user-data-dir={page.parent}/profile",
                           *flags, page.as_uri()], capture_output=True, text=True, timeout=300)
    assert "CONSOLE" not in done.stderr, done.stderr      # errors and warnings of the page
    return done.stdout


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here: the report is not tried in a browser")
@pytest.mark.parametrize("width", [390, 1200])
def test_the_report_in_a_browser(width, stubs, tmp_path):
    """No error on the console, every picture loads and fits, only tables scroll sideways; a screenshot is drawn."""
    assert t.main(["--seeds", "2"]) == 0
    report = (stubs / "out" / "report.html").read_text()
    (tmp_path / "probed.html").write_text(report.replace("</body>", PROBE + "</body>"))
    page = tmp_path / "page.html"
    page.write_text(f'<body style="margin:0"><iframe src="probed.html" style="border:0;width:{width}px;height:800px"></iframe>'
                    '<script>addEventListener("message", e => document.body.append("FOUND" + e.data + "END"))</script>')
    found = json.loads(re.search(r"FOUND(\{.*?\})END", browse(page, "--dump-dom"))[1])
    assert found["images"] == [900] * 4 and found["small"] and found["page"] == width
    assert found["wide"] <= width and (found["tables"] > 0 or width > 390)
    shot = tmp_path / "shot.png"
    browse(stubs / "out" / "report.html", f"--window-size={width},1500", f"--screenshot={shot}")
    from PIL import Image
    drawn = np.asarray(Image.open(shot).convert("L"))
    assert drawn.shape == (1500, width) and drawn.std() > 10
