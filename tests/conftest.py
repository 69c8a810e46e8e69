"""What every test file needs: one thread per process, the repository on the path, and a run in this process."""
import gc
import os
import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}     # of the programs that tests start


@pytest.fixture(scope="module")
def quick_statistics():
    """10 resamples instead of 1,000, and probes without a search for the best penalty. test_metrics.py tests both; here
    they would take most of the time."""
    import metrics      # ROOT is on the path by now
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "bootstrap", partial(metrics.bootstrap, n=10))
        patch.setattr(metrics, "subject_folds", lambda *_: [])
        yield


def run_main(m, *flags):
    """Script m with these flags, in this process."""
    m.main([str(f) for f in flags])
    gc.collect()     # lets go of the lock on --out, as the end of a process does


def one_error(capsys, call, *words, code=2):
    """`call` exits with this code and says one line on stderr that holds all the words -> the line. Warnings and
    bars may come before."""
    capsys.readouterr()     # what was said before
    with pytest.raises(SystemExit) as e:
        call()
    status, text = e.value.code, capsys.readouterr().err
    lines = [t for t in text.strip().splitlines() if not t.startswith("warning: ") and "%|" not in t and t]
    del e
    gc.collect()     # the traceback keeps main's frame alive, and with it the lock on --out
    assert status == code and len(lines) == 1 and lines[0].startswith("error: "), text
    assert all(str(w) in lines[0] for w in words), (words, lines[0])
    return lines[0]


def run_error(m, capsys, *flags):
    """The one line that a run with these flags ends in, exit code 2."""
    return one_error(capsys, lambda: run_main(m, *flags))


def runs_of(m):
    """-> main(*flags), error_of(capsys, *flags) for a script."""
    return partial(run_main, m), partial(run_error, m)
