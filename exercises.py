"""The course: exercises that are cut out of the scripts, and check themselves. EXERCISES.md tells more.

    python exercises.py                  # the list
    python exercises.py start e03        # blanks one function of a script (or hides a bug in it)
    python exercises.py check e03        # what was expected, what came
    python exercises.py hint e03         # again: the second hint
    python exercises.py solve e03        # puts the original back, and shows it; reset does it silently

    python exercises.py handout DIR e01 e03              # for students: functions blanked, no hints
    python exercises.py grade alice/ bob/ --ids e01 e03  # writes grades.csv

The table is exercises.toml, the checks are in tests/test_exercises.py. `.exercises/` keeps the originals.
"""
import ast, difflib, functools, importlib, io, json, subprocess, sys, tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent
KEPT = ROOT / ".exercises"
MARK = "# ---- Below this line: the tests of the course."       # a handout has only what is above


def fail(message):
    """Ends the program with one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def table():
    """-> {id: exercise}"""
    return tomllib.loads((ROOT / "exercises.toml").read_text())


# ---- One function of a file, and nothing else --------------------------------------------------------------

@functools.cache
def find(text, name):
    """The last function NAME, or Class.NAME, of a Python text. -> AST node; LookupError: there is none"""
    node = ast.parse(text)
    for part in name.split("."):
        node = next((n for n in reversed(node.body) if getattr(n, "name", "") == part), None)
        if node is None:
            raise LookupError(f"no function {name}")
    return node


def cut(text, name):
    """-> the text before a function, the function's own lines with its decorators, the text after it"""
    node, lines = find(text, name), list(io.StringIO(text, newline=""))
    first, end = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1, node.end_lineno
    return "".join(lines[:first]), "".join(lines[first:end]), "".join(lines[end:])


def given(text, name, key, e):
    """The function's lines as exercise `key` gives them to a student: with the mistake in it, or with `raise`
    for the body (signature and docstring stay)."""
    before, own, _ = cut(text, name)
    if e["kind"] == "bug":
        if own.count(e["old"]) != 1:
            raise LookupError(f"{key}: the text to change is not in {name} exactly once")
        return own.replace(e["old"], e["new"])
    body, lines = find(text, name).body, list(io.StringIO(text, newline=""))
    top = body[0].end_lineno if ast.get_docstring(find(text, name)) is not None else body[0].lineno - 1
    while lines[top - 1].strip().startswith("#"):       # a comment may tell too much
        top -= 1
    line = " " * body[0].col_offset + f"raise NotImplementedError({json.dumps(f'{key}: ' + e['equation'])})\n"
    return "".join(lines[:top])[len(before):] + line


# ---- For students ------------------------------------------------------------------------------------------

def pick(key):
    """-> exercise `key`, its file, the file that keeps its original; exits if there is no such exercise"""
    e = table().get(key) or fail(f"{key}: no such exercise; python exercises.py lists them")
    return e, ROOT / e["script"], KEPT / f"{key}.txt"


def show_list():
    """Every exercise on a line."""
    print("id   kind        file         minutes  level  state    title")
    for key, e in table().items():
        has, level = (lambda end: (KEPT / f"{key}.{end}").exists()), "*" * e["difficulty"]
        state = "done" if has("done") else "started" if has("txt") else ""
        print(f"{key:4} {e['kind']:11} {e['script']:12} {e['minutes']:7}  {level:5}  {state:8} {e['title']}")
    print("\npython exercises.py start ID, then check ID; hint ID helps, solve ID shows, reset ID undoes")


def start(key):
    """Blanks the function, or hides the bug in it, or asks for a prediction; says what to do."""
    e, path, kept = pick(key)
    task = f"{key}  {e['title']}  ({e['script']}, {e['minutes']} minutes)\n\n{e['text']}"
    if e["kind"] == "experiment":
        if not kept.exists():
            kept.write_text(input(f"{task}\n{e['predict']}\nYour prediction, in a line: "))
        print(f"You predicted: {kept.read_text()}\nNow run, then check {key}:\n\n" + "\n".join(e["commands"]))
        return
    if e.get("given"):
        print(f"{task}\nIt waits for you in {e['script']}.")
        return
    if kept.exists():
        fail(f"{key} is started already; check it, or put the original back: python exercises.py reset {key}")
    text, name = path.read_bytes().decode(), e["function"]
    before, own, after = cut(text, name)
    head = subprocess.run(["git", "-C", ROOT, "show", f"HEAD:./{e['script']}"], capture_output=True)
    if head.returncode == 0 and cut(head.stdout.decode(), name)[1] != own:
        fail(f"{name} in {e['script']} is not as in the last commit and would be lost: commit it first")
    new = given(text, name, key, e)
    kept.write_bytes(own.encode())
    path.write_bytes((before + new + after).encode())
    done = f"{name} in {e['script']} is blank now" if e["kind"] == "write" else "The bug is in the file now"
    print(f"{task}\n{done}. Then: python exercises.py check {key}")


def give_back(key, aloud):
    """solve and reset: the very lines that start took. The attempt is kept."""
    e, path, kept = pick(key)
    if not kept.exists():
        fail(f"{key} is not started" + (", and a handout has no solutions" if e.get("given") else ""))
    if e["kind"] != "experiment":
        old = kept.read_bytes().decode()
        before, mine, after = cut(path.read_bytes().decode(), e["function"])
        (KEPT / f"{key}.mine.txt").write_bytes(mine.encode())
        path.write_bytes((before + old + after).encode())
        both = mine.splitlines(True), old.splitlines(True)
        print("".join(difflib.unified_diff(*both, "yours", "original") if aloud else ()))
        print(f"{e['function']} in {e['script']} is the original; yours is in .exercises/{key}.mine.txt")
    elif aloud:
        print(e.get("because", "a handout has no solutions"))
    kept.unlink()


def hint(key):
    """The first hint; when asked again, both."""
    e, seen = pick(key)[0], KEPT / f"{key}.hints"
    print("\n".join(e.get("hint", ["Experiments and handouts have no hints."])[:1 + seen.exists()]))
    seen.touch()


# ---- Checks ------------------------------------------------------------------------------------------------

def checks():
    """-> {id: generator function}: the part of tests/test_exercises.py above the mark"""
    path, names = ROOT / "tests" / "test_exercises.py", {"__name__": "checks"}
    exec(compile(path.read_text().partition(MARK)[0], str(path), "exec"), names)
    return names


def as_array(x):
    """Tensor, array or number -> float64 array"""
    import numpy
    return numpy.asarray(x.detach().cpu().double().numpy() if hasattr(x, "detach") else x, numpy.float64)


def difference(got, wanted):
    """-> largest difference of two arrays, in units of the largest wanted value if that is above 1;
    infinity: other shapes, or nan in other places"""
    import numpy
    nan = numpy.isnan(wanted)
    if got.shape != wanted.shape or (numpy.isnan(got) != nan).any():
        return float("inf")
    size = max(1.0, abs(wanted[~nan]).max(initial=0))
    return float(abs(got - wanted)[~nan].max(initial=0) / size)


def run(generator, load, seed):
    """The checks of an exercise on the module that load() gives. -> lists [name, what came, what was wanted,
    tolerance], arrays; the exception that ended them, in a line, or ''"""
    import numpy
    done = []
    try:
        for name, got, wanted, tolerance in generator(load(), numpy.random.default_rng(seed)):
            done.append([name, as_array(got), as_array(wanted), tolerance])
    except Exception as error:      # whatever a student's function may raise
        return done, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return done, ""


def short(x):
    """An array in a few characters."""
    return " ".join(f"{v:.5g}" for v in x.ravel()[:3]) + (f" .. {x.shape}" if x.size > 3 else "")


def check(key):
    """Runs the checks of an exercise on the student's file, or judges the results of an experiment."""
    e, path, kept = pick(key)
    if e["kind"] == "experiment":
        right = judge(e, kept.read_text() if kept.exists() else "(nothing)")
    else:
        sys.path.insert(0, str(ROOT))
        done, error = run(checks()[key], lambda: importlib.import_module(path.stem), 0)
        off = [difference(got, wanted) for _, got, wanted, _ in done]
        right = not error and all(d <= tolerance for d, (*_, tolerance) in zip(off, done))
        for d, (name, got, wanted, tolerance) in zip(off, done):
            verdict = "ok   " if d <= tolerance else "WRONG"
            print(f"{verdict} {name}: expected {short(wanted)}, got {short(got)}; off by {d:.0e}, at most "
                  f"{tolerance:.0e}")
        print(f"WRONG {error}\n" * bool(error) + key, "all right" if right else "not yet", sep=": ")
    if right and (kept.exists() or e.get("given")):
        (KEPT / f"{key}.done").touch()
    sys.exit(not right)


def holds(rule, results):
    """"a > 0.6 and paper:b < ours:b", numbers of results {label: metrics}; no label: those of the first run.
    -> [(clause, its two values, whether it holds)]; KeyError: there is no such number"""
    def value(term):
        label, _, key = term.rpartition(":")
        is_number = term.replace(".", "", 1).lstrip("-").isdigit()
        return float(term) if is_number else results[label or next(iter(results))][key]["value"]
    clauses = [(clause, *map(value, clause.split()[::2])) for clause in rule.split(" and ")]
    return [(clause, a, b, a > b if ">" in clause else a < b) for clause, a, b in clauses]


def judge(e, predicted):
    """The rule of an experiment on the results of its runs, beside what was predicted. -> holds or not"""
    results = {}
    for label, folder in (r.split("=") for r in e["runs"]):
        file = ROOT / folder / "results.json"
        if not file.exists():
            fail(f"{folder}/results.json: no such file; run first: {'; '.join(e['commands'])}")
        results[label] = json.loads(file.read_text())["metrics"]
    found = holds(e["rule"], results)
    print(f"{e['predict']}\nYou predicted: {predicted}\nIt came:")
    for clause, a, b, true in found:
        print(f"{'yes' if true else 'no '}  {clause}  ({a:.4g}, {b:.4g})")
    right = all(true for *_, true in found)
    print(e.get("because", "") if right else "In our runs all are so. Did yours run to its end?")
    return right


def main(words):
    command, *rest = words or ["list"]
    students = {"start": start, "check": check, "hint": hint, "solve": give_back, "reset": give_back}
    if words in ([], ["list"]):
        show_list()
    elif command in students and len(rest) == 1:
        KEPT.mkdir(exist_ok=True)
        try:
            students[command](*rest, *[command == "solve"] * (command in ("solve", "reset")))
        except (SyntaxError, LookupError, EOFError) as error:      # EOFError: asks where no terminal is
            fail(f"{rest[0]}: {type(error).__name__}, {error}: mend that first")
    elif command in ("handout", "grade") and rest and (ROOT / "grade.py").exists():
        import grade
        getattr(grade, command)(rest)
    else:
        print(__doc__)
        sys.exit(2 * (command not in ("-h", "--help")))


if __name__ == "__main__":
    main(sys.argv[1:])
