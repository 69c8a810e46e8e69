"""The course: exercises that are cut out of the scripts, and check themselves. EXERCISES.md tells more.

    python exercises.py                  # the list
    python exercises.py start e03        # blanks one function of a script (or hides a bug in it); says the task
    python exercises.py check e03        # what was expected, what came
    python exercises.py hint e03         # again: the second hint
    python exercises.py solve e03        # puts the original back, and shows it; reset does it silently

    python exercises.py handout DIR e01 e03              # for students: no solutions, no hints, no history
    python exercises.py grade alice/ bob/ --ids e01 e03  # writes grades.csv

The table is exercises.toml, the checks are the generators in tests/test_exercises.py. Your work stays in your
files. `.exercises/` keeps the original of each function that is started, and your attempts.
"""
import ast, difflib, importlib, json, subprocess, sys, tomllib
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


def read(path):
    """The text of a file, its line ends as they are."""
    return path.read_bytes().decode()


# ---- One function of a file, and nothing else --------------------------------------------------------------

def find(text, name):
    """The last function NAME, or Class.NAME, of a Python text. -> AST node; LookupError: there is none"""
    node = ast.parse(text)
    for part in name.split("."):
        found = [n for n in node.body if getattr(n, "name", "") == part]
        if not found:
            raise LookupError(f"no function {name}")
        node = found[-1]
    return node


def lines_of(text, name):
    """-> first and last + 1 of the function's lines, its decorators among them"""
    node = find(text, name)
    return min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1, node.end_lineno


def source(text, name):
    """-> the function's own lines"""
    first, last = lines_of(text, name)
    return "\n".join(text.split("\n")[first:last])


def put(text, name, new):
    """The text with other lines for this function; every other line stays as it is."""
    first, last = lines_of(text, name)
    lines = text.split("\n")
    return "\n".join(lines[:first] + [new] + lines[last:])


def blank(text, name, message):
    """The function's lines with the body replaced by one `raise`; signature and docstring stay."""
    body, lines = find(text, name).body, text.split("\n")
    top = body[0].lineno - 1
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):       # the docstring
        top = body[0].end_lineno
    while lines[top - 1].strip().startswith("#"):       # a comment may tell too much
        top -= 1
    line = " " * body[0].col_offset + f"raise NotImplementedError({json.dumps(message)})"
    return "\n".join(lines[lines_of(text, name)[0]:top] + [line])


def changed(text, name, key, e):
    """The function's lines as exercise `key` gives them to the student: blank, or with the bug."""
    if e["kind"] == "write":
        return blank(text, name, f"{key}: {e['equation']}")
    whole = source(text, name)
    if whole.count(e["old"]) != 1:
        raise LookupError(f"{key}: the line to change is not in {name} exactly once")
    return whole.replace(e["old"], e["new"])


# ---- For students ------------------------------------------------------------------------------------------

def pick(key):
    """-> exercise `key`, its file, the file that keeps its original; exits if there is no such exercise"""
    e = table().get(key) or fail(f"{key}: no such exercise; python exercises.py lists them")
    return e, ROOT / e["script"], KEPT / f"{key}.txt"


def show_list():
    """Every exercise on a line."""
    print("id   kind        file         minutes  level  state    title")
    for key, e in table().items():
        states = [s for s, end in (("done", "done"), ("started", "txt")) if (KEPT / f"{key}.{end}").exists()]
        print(f"{key:4} {e['kind']:11} {e['script']:12} {e['minutes']:7}  {'*' * e['difficulty']:5}  "
              f"{(states + [''])[0]:8} {e['title']}")
    print("\npython exercises.py start ID, then check ID; hint ID helps, solve ID shows, reset ID undoes")


def start(key):
    """Blanks the function, or hides the bug in it, or asks for a prediction; says what to do."""
    e, path, kept = pick(key)
    print(f"{key}  {e['title']}  ({e['script']}, {e['minutes']} minutes)\n\n{e['text'].strip()}\n")
    if kept.exists() and e["kind"] != "experiment":
        fail(f"{key} is started already; check it, or put the original back with reset {key}")
    KEPT.mkdir(exist_ok=True)
    if e["kind"] == "experiment":
        if not kept.exists():
            kept.write_text(input(f"{e['predict']}\nYour prediction, in a line: "))
        print(f"You predicted: {kept.read_text()}\nNow run, then check {key}:\n\n" + "\n".join(e["commands"]))
        return
    if e.get("given"):
        print(f"It is in {e['script']} already.")
        return
    text = read(path)
    head = subprocess.run(["git", "-C", ROOT, "show", f"HEAD:./{e['script']}"], capture_output=True)
    if head.returncode == 0 and source(head.stdout.decode(), e["function"]) != source(text, e["function"]):
        fail(f"{e['function']} in {e['script']} differs from the last commit, and start would lose that: put it "
             "back, or commit it; another exercise may use it")
    new = changed(text, e["function"], key, e)
    kept.write_bytes(source(text, e["function"]).encode())
    path.write_bytes(put(text, e["function"], new).encode())
    where = f"{e['function']} in {e['script']} is blank now" if e["kind"] == "write" else f"It is in {e['script']}"
    print(f"{where}. Then: python exercises.py check {key}")


def give_back(key, aloud):
    """solve and reset: the very lines that start took. The attempt is kept."""
    e, path, kept = pick(key)
    if not kept.exists():
        fail(f"{key} is not started" + (": a handout has no solutions" if e.get("given") else ""))
    if e["kind"] != "experiment":
        text, old = read(path), kept.read_bytes().decode()
        mine = source(text, e["function"])
        (KEPT / f"{key}.mine.txt").write_bytes(mine.encode())
        path.write_bytes(put(text, e["function"], old).encode())
        if aloud:
            print("\n".join(difflib.unified_diff(mine.split("\n"), old.split("\n"), "yours", "original",
                                                 lineterm="")))
        print(f"{e['function']} in {e['script']} is the original again; yours is in .exercises/{key}.mine.txt")
    elif aloud:
        print(e.get("because", ""))
    kept.unlink()


def hint(key):
    """The first hint; when asked again, both."""
    e, _, _ = pick(key)
    if "hint" not in e:
        fail("a handout has no hints")
    seen = KEPT / f"{key}.hints"
    KEPT.mkdir(exist_ok=True)
    print("\n".join(e["hint"][:2 if seen.exists() else 1]))
    seen.touch()


def checks():
    """-> {id: generator function}: the part of tests/test_exercises.py above the mark"""
    path = ROOT / "tests" / "test_exercises.py"
    names = {"__name__": "checks"}
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


def run(generator, module, seed):
    """The checks of an exercise on a module. -> lists [name, array that came, array wanted, tolerance], and in
    the end the exception, as a line, or ''"""
    import numpy
    done = []
    try:
        for name, got, wanted, tolerance in generator(module, numpy.random.default_rng(seed)):
            done.append([name, as_array(got), as_array(wanted), tolerance])
    except Exception as error:      # whatever a student's function may raise
        return done, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return done, ""


def short(x):
    """An array in a few characters."""
    some = " ".join(f"{v:.5g}" for v in x.ravel()[:3])
    return some if x.size <= 3 else f"{some} .. {tuple(x.shape)}"


def check(key):
    """Runs the checks of an exercise on the student's file, or judges the results of an experiment."""
    e, path, kept = pick(key)
    if e["kind"] == "experiment":
        judge(key, e, kept)
        return
    sys.path.insert(0, str(ROOT))
    done, error = run(checks()[key], importlib.import_module(path.stem), 0)
    right = not error
    for name, got, wanted, tolerance in done:
        off = difference(got, wanted)
        right &= off <= tolerance
        print(f"{'ok   ' if off <= tolerance else 'WRONG'} {name}: expected {short(wanted)}, got {short(got)}, "
              f"largest difference {off:.1e} (allowed {tolerance:.0e})")
    if error:
        print(f"WRONG {error}")
    KEPT.mkdir(exist_ok=True)
    if right and (kept.exists() or e.get("given")):
        (KEPT / f"{key}.done").touch()
    print(f"{key}: all right" if right else f"{key}: not yet")
    sys.exit(not right)


def holds(rule, results):
    """"a.b > 0.6 and paper:c < ours:c" -> [(clause, its two values, whether it holds)]; results {label: metrics}

    A key without a label is of the only run. KeyError: there is no such number."""
    def value(term):
        label, _, key = term.rpartition(":")
        if term.replace(".", "", 1).lstrip("-").isdigit():
            return float(term)
        return results[label or next(iter(results))][key]["value"]
    clauses = [(c, *map(value, (c.split()[0], c.split()[2])), c.split()[1]) for c in rule.split(" and ")]
    return [(c, a, b, a > b if sign == ">" else a < b) for c, a, b, sign in clauses]


def judge(key, e, kept):
    """The rule of an experiment on the results of its runs, beside what the student predicted."""
    results = {}
    for run_ in e["runs"]:
        label, _, folder = run_.partition("=")
        file = ROOT / folder / "results.json"
        if not file.exists():
            fail(f"{folder}/results.json: no such file; run first: {'; '.join(e['commands'])}")
        results[label] = json.loads(file.read_text())["metrics"]
    print(f"{e['predict']}\nYou predicted: {kept.read_text() if kept.exists() else '(nothing)'}\nIt came:")
    found = holds(e["rule"], results)
    for clause, a, b, true in found:
        print(f"{'yes' if true else 'no '}  {clause}  ({a:.4g}, {b:.4g})")
    if all(true for *_, true in found):
        KEPT.mkdir(exist_ok=True)
        (KEPT / f"{key}.done").touch()
        print(e.get("because", "As in our runs.").strip())
    else:
        print("In our runs all of these are so. Did you run the command as it stands, to its end?")


def main(words):
    command, *rest = words or ["list"]
    students = {"start": start, "check": check, "hint": hint, "solve": lambda key: give_back(key, True),
                "reset": lambda key: give_back(key, False)}
    if command == "list" and not rest:
        show_list()
    elif command in students and len(rest) == 1:
        students[command](rest[0])
    elif command in ("handout", "grade") and rest and (ROOT / "grade.py").exists():
        import grade
        getattr(grade, command)(rest)
    else:
        print(__doc__)
        sys.exit(2 * (command not in ("-h", "--help")))


if __name__ == "__main__":
    main(sys.argv[1:])
