"""data.py for cond_ldm.py: Canny against skimage, strokes, the cine phantom, ACDC and M&Ms-2 with traps."""
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402


def test_hearts_are_what_they_were():
    """Parts of heart() now serve both phantoms: these numbers are from before."""
    c = data.heart(np.random.default_rng([7, 2]), 64, 1.0, True)
    assert np.bincount(c["mask"].ravel()).tolist() == [19425, 2652, 2204, 257, 38]
    means = [129.459, 129.007, 123.547, 119.102, 108.034, 97.666]
    assert abs(c["image"].mean((1, 2)) - means).max() < 0.01
