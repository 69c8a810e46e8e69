"""For the lecturer: `python exercises.py handout DIR IDS..` and `grade SUBMISSIONS.. --ids IDS..`.

A handout is the last commit with the chosen functions blanked (or their bug put in), in every script that has
the same function, without hints, history and the tests of the repository.

A submission is a folder with the scripts, or one .py file. Nothing of it is imported or run as a whole. The
named functions alone are read from it, by AST, and each is put into a clean copy of the last commit in a
temporary folder. There a process runs the checks on inputs that no student has seen (another seed)
and sends back WHAT CAME, numbers alone. This process compares them with what the original gives. So it
does not help to print "passed", to exit, or to change what a check compares with.
Three walls: 1. names and attributes that a formula does not need are refused before anything runs; 2. each
function runs in a process of its own, with limits of time and memory, its output closed; 3. an audit hook in
that process refuses to open files, to start processes and to connect. Needs git, and Linux or macOS.
"""
import argparse, ast, csv, importlib, io, json, os, secrets, select, shutil, signal, subprocess, sys, tarfile
import tempfile, textwrap, time, types
from pathlib import Path

import exercises as X

SECRET = ("hint", "old", "new", "because")      # keys of the table that a handout lacks
LEFT_OUT = ("tests", ".ci", "RESULTS.md", "LOG.md", "grade.py")
# What a function may use beside its own variables and what the original uses
MODULES = {"torch", "nn", "F", "np", "math"}
MAY_CALL = set("signal_noise q_sample v_target eps_from_v times ddim_step resample".split())
BUILTINS = set("""abs all any bool complex dict enumerate filter float int isinstance len list map max min pow
    print range reversed round set slice sorted str sum tuple zip ValueError TypeError IndexError
    AssertionError NotImplementedError ZeroDivisionError""".split())
# Attributes that it may not use: these, names of Python's own modules but FORMULAS, and all that begin with _
REFUSED = set("""load save savez savez_compressed savetxt loadtxt genfromtxt fromfile tofile fromregex memmap
    from_file frombuffer open_memmap hub ops jit compile utils distributed multiprocessing package library
    classes serialization storage untyped_storage ctypeslib f2py testing lib core open exec eval system popen
    set_default_dtype use_deterministic_algorithms data_ptr""".split())
FORMULAS = {"array", "trace", "select", "copy", "random"}
SECONDS, MEMORY, ANSWER = 20, 2 << 30, 1 << 25      # of a function: time, bytes on top, bytes that it sends


def commit(folder):
    """The files of the last commit, in an empty folder."""
    made = subprocess.run(["git", "-C", X.ROOT, "archive", "HEAD", "."], capture_output=True)
    if made.returncode:
        X.fail(f"no last commit to start from: {made.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(made.stdout)) as tar:
        tar.extractall(folder, filter="data")


# ---- handout -----------------------------------------------------------------------------------------------

def handout(words):
    """handout DIR IDS..: for students. A function is blanked in all scripts that have the same."""
    folder, table = Path(words[0]), {key: X.pick(key)[0] for key in words[1:]}
    if not table or folder.exists() and any(folder.iterdir()):
        X.fail(f"{folder}: name an empty folder, then exercises")
    with tempfile.TemporaryDirectory() as temporary:
        tree, blanked = Path(temporary), {}
        commit(tree)
        checks = (tree / "tests" / "test_exercises.py").read_text().partition(X.MARK)[0]
        for name in LEFT_OUT:
            shutil.rmtree(tree / name) if (tree / name).is_dir() else (tree / name).unlink(missing_ok=True)
        (tree / "tests").mkdir()
        (tree / "tests" / "test_exercises.py").write_text(checks)
        for key, e in table.items():
            if e["kind"] == "experiment":
                continue
            text, name = (tree / e["script"]).read_bytes().decode(), e["function"]
            own = X.cut(text, name)[1]
            if own in blanked:
                X.fail(f"{blanked[own]} and {key} use the same function: hand them out one after the other")
            new = X.given(text, name, key, e)
            blanked[new] = key
            for path in tree.glob("*.py"):
                path.write_bytes(path.read_bytes().replace(own.encode(), new.encode()))
        lines = ["# The exercises of this course."]
        for key, e in table.items():
            secret = (*SECRET, "function") if e["kind"] == "bug" else SECRET
            kept = {k: v for k, v in e.items() if k not in secret} | {"given": 1}
            lines += ["", f"[{key}]", *(f"{k} = {json.dumps(v)}" for k, v in kept.items())]
        (tree / "exercises.toml").write_text("\n".join(lines) + "\n")
        shutil.copytree(tree, folder, dirs_exist_ok=True)
    print(f"{folder}: {', '.join(table)}")


# ---- grade -------------------------------------------------------------------------------------------------

def words_of(node):
    """-> names that a function reads, its attributes, its own variables"""
    reads = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    attributes = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    own = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    own |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
    own |= {n.name for n in ast.walk(node) if isinstance(n, (ast.FunctionDef, ast.ExceptHandler)) and n.name}
    return reads, attributes, own


def refusal(node, original):
    """Why a submitted function does not run, in a line, or ''. Both are AST nodes."""
    header = lambda n: [ast.dump(part) for part in (n.args, *n.decorator_list, *filter(None, [n.returns]))]
    if type(node) is not type(original) or header(node) != header(original):
        return "another signature than the original's"
    never = ast.Import, ast.ImportFrom, ast.Global, ast.ClassDef, ast.AsyncFunctionDef, ast.Await
    if any(isinstance(n, never) for n in ast.walk(node)):
        return "imports, global, classes and async are not allowed"
    reads, attributes, own = words_of(node)
    known_reads, known_attributes, _ = words_of(original)
    bad = reads - own - known_reads - BUILTINS - MODULES - MAY_CALL
    bad |= {a for a in attributes - known_attributes - FORMULAS
            if a.startswith("_") or a in REFUSED or a in sys.stdlib_module_names}
    bad |= {f"{n.attr} = .." for n in ast.walk(node) if isinstance(n, ast.Attribute)
            and not isinstance(n.ctx, ast.Load) and n.attr not in known_attributes}
    bad |= {n.name for n in ast.walk(node) if isinstance(n, ast.FunctionDef) and n.name.startswith("__")}
    return f"not allowed here: {', '.join(sorted(bad))}" if bad else ""


def taken(path, e, original):
    """The function of exercise e in a submission -> its text, as indented in the original; or ValueError."""
    file = path / e["script"] if path.is_dir() else path
    if file.is_symlink() or not file.is_file() or file.stat().st_size > 2_000_000:
        raise ValueError(f"no file {file.name}, or a link, or more than 2 MB")
    try:
        node = X.find(file.read_bytes().decode(), e["function"])
        text, why = ast.unparse(node), refusal(node, original)
    except LookupError as error:
        raise ValueError(str(error)) from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"cannot be read: {type(error).__name__}") from None
    if why:
        raise ValueError(why)
    return textwrap.indent(text, " " * original.col_offset) + "\n"


def load(script, text):
    """A module made from the text of a script."""
    module = types.ModuleType(script.removesuffix(".py"))
    module.__file__ = str(X.ROOT / script)
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module       # a dataclass looks there for its own module
    try:
        exec(compile(text, script, "exec"), module.__dict__)
    finally:
        sys.modules[module.__name__] = before
        if before is None:
            del sys.modules[module.__name__]
    return module


def wall(event, args):
    """The audit hook of a process that runs a submission: reads of Python's own files, and nothing else."""
    if event == "open":
        path, _, flags = args
        own = sys.prefix, sys.base_prefix, "/proc/self/maps"        # the last one: threadpoolctl
        inside = isinstance(path, (str, bytes)) and os.fsdecode(path).startswith(own)
        if not inside or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            raise PermissionError(f"files are not allowed: {path}")
    elif event.startswith(("os.", "subprocess.", "socket.", "shutil.", "gc.")) and event not in (
            "os.listdir", "os.scandir", "os.putenv", "os.unsetenv"):
        raise PermissionError(f"{event} is not allowed")


def numbers(done, error):
    """What X.run() gives -> as JSON: [[name, tolerance, shape, numbers], ..], and the exception"""
    came = [[name, tolerance, got.shape, got.ravel().tolist()] for name, got, _, tolerance in done]
    return json.dumps([came, error])


def answer(job, pipe, generators, seconds):
    """In a process of its own: runs the checks of a job on a submission and sends what came."""
    import resource
    _, key, text, seed = job
    e = X.table()[key]
    before, _, after = X.cut((X.ROOT / e["script"]).read_bytes().decode(), e["function"])
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    statm = Path("/proc/self/statm")
    limits = {resource.RLIMIT_CPU: int(seconds) + 1, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    if statm.exists():
        limits[resource.RLIMIT_AS] = int(statm.read_text().split()[0]) * resource.getpagesize() + MEMORY
    for which, most in limits.items():
        resource.setrlimit(which, (most, most))
    sys.addaudithook(wall)
    data = numbers(*X.run(generators[key], lambda: load(e["script"], before + text + after), seed)).encode()
    while data:
        data = data[os.write(pipe, data[:65536]):]


def receive(pipe, seconds):
    """All that comes through a pipe until it ends -> bytes; too late or too much -> None"""
    data, end = b"", time.monotonic() + seconds
    while len(data) < ANSWER and select.select([pipe], [], [], max(0, end - time.monotonic()))[0]:
        some = os.read(pipe, 65536)
        if not some:
            return data
        data += some
    return None


def serve():
    """In the clean copy: runs the originals, then forks for each job of stdin. A line of stdout for each."""
    seed, keys, jobs, seconds = json.loads(sys.stdin.read())
    generators = X.checks()
    for key in keys:        # this also imports what they need: after the fork it could not be read
        script = X.table()[key]["script"].removesuffix(".py")
        came = numbers(*X.run(generators[key], lambda: importlib.import_module(script), seed))
        print(json.dumps([-1, key, came]), flush=True)
    for job in jobs:
        out, into = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setsid()
                os.close(out)
                answer(job, into, generators, seconds)
            finally:
                os._exit(0)
        os.close(into)
        data = receive(out, seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(out)
        said = None if data is None else data.decode(errors="replace")
        print(json.dumps([job[0], job[1], said]), flush=True)


def points(e, said, wanted):
    """What a process said, beside what the original's said -> points from 0 to 1, reason"""
    import numpy as np
    if said is None:
        return 0.0, "no answer in time"
    try:
        came, error = json.loads(said)
        came = [np.reshape(np.array(numbers, float), shape) for _, _, shape, numbers in came]
        error = "".join(c for c in str(error)[:300] if c.isprintable())
    except Exception:       # whatever it may have sent
        return 0.0, "it ended without an answer"
    lost, right = [error] if error else [], 0
    for got, (name, tolerance, shape, numbers) in zip(came, wanted):
        off = X.difference(got, np.reshape(np.array(numbers, float), shape))
        right += off <= tolerance
        if off > tolerance:
            lost.append(f"{name}: off by {off:.2g} (allowed {tolerance:.0e})")
    share = right / len(wanted)
    if e["kind"] == "bug":      # it is found, or not
        share = float(share == 1)
    return round(share, 2), "; ".join(lost)


def grade(words):
    """grade SUBMISSIONS.. --ids IDS..: writes grades.csv: submission, exercise, points of 1, reason."""
    parser = argparse.ArgumentParser(prog="exercises.py grade")
    parser.add_argument("submissions", nargs="+", type=Path)
    all_ids = [key for key, e in X.table().items() if e["kind"] != "experiment"]
    parser.add_argument("--ids", nargs="+", default=all_ids)
    parser.add_argument("--out", default="grades.csv")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    args = parser.parse_args(words)
    seed, rows, jobs = secrets.randbits(32), [], []
    with tempfile.TemporaryDirectory() as tree:
        commit(tree)
        for key in args.ids:
            e = X.pick(key)[0]
            if e["kind"] == "experiment":
                X.fail(f"{key} is an experiment: its results are not graded")
            original = X.find(Path(tree, e["script"]).read_bytes().decode(), e["function"])
            for path in args.submissions:
                rows.append([str(path), key, 0.0, ""])
                try:
                    jobs.append([len(rows) - 1, key, taken(path, e, original), seed])
                except ValueError as error:
                    rows[-1][3] = str(error)
        program = "import sys; sys.path.insert(0, '.'); import grade; grade.serve()"
        made = subprocess.run([sys.executable, "-I", "-c", program], stdout=subprocess.PIPE, text=True,
                              input=json.dumps([seed, args.ids, jobs, args.seconds]), cwd=tree,
                              env={"OMP_NUM_THREADS": "1", "MPLCONFIGDIR": tree})
    said = [json.loads(line) for line in made.stdout.splitlines()]
    if len(said) != len(args.ids) + len(jobs):
        X.fail("the process that grades ended early. Is the exercise committed? Nothing is written")
    wanted = {}
    for at, key, text in said:
        if at < 0:
            wanted[key], error = json.loads(text)
            if error:
                X.fail(f"{key}: the original fails its own checks: {error}")
        else:
            rows[at][2:] = points(X.table()[key], text, wanted[key])
    with open(args.out, "w", newline="") as f:
        csv.writer(f).writerows([["submission", "exercise", "points", "reason"], *rows])
    for row in rows:
        print(f"{row[0]}  {row[1]}  {row[2]:.2f}  {row[3]}")
