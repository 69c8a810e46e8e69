"""data.py for cond_ldm.py: Canny against skimage, strokes, the cine phantom, ACDC and M&Ms-2 with traps."""
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402


def one_error(capsys, call, *words):
    """`call` exits with 2 and says one line on stderr that holds all the words."""
    with pytest.raises(SystemExit) as stop:
        call()
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(str(w) in lines[0] for w in words), (words, lines[0])


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    path = tmp_path_factory.mktemp("views") / "v.h5"
    data.phantom_views(str(path), subjects=9, seed=1)
    return data.load(path)


# ---------------------------------------------------------------- edges

def drawings(views):
    i, j = np.mgrid[:61, :80]
    disc = (np.hypot(i - 30, j - 42) < 20).astype(float)
    noise = np.random.default_rng(0).random(disc.shape)
    return [disc, disc + 0.3 * noise, noise, (i > 30) * (j > 20) * 1.0, (i + j) / 140.0, disc * 0] \
        + list(views.image[[0, 7, -1]] / 255.0)


@pytest.mark.parametrize("sigma", [0.7, 1.0, 1.5, 2.5])
def test_canny_equals_skimage(views, sigma):
    feature = pytest.importorskip("skimage.feature")
    for image in drawings(views):
        for low, high in ((0.02, 0.1), (0.1, 0.2), (0.2, 0.6)):  # pixel for pixel, ties included
            assert (data.canny(image, sigma, low, high) == feature.canny(image, sigma, low, high)).all()
        if len(np.unique(image)) > 200:   # elsewhere rounding errors have quantiles
            ours = data.canny(image, sigma, 0.7, 0.9, tissue=np.ones(image.shape, bool))
            assert (ours == feature.canny(image, sigma, 0.7, 0.9, use_quantiles=True)).all()


def pieces(x):
    part, _ = ndimage.label(x, np.ones((3, 3)))
    return np.bincount(part.ravel())[1:]


def test_edges_follow_the_anatomy_and_drop_noise(views):
    image, mask = views.image[:12], views.mask[:12]
    found = data.edges(image)
    assert found.shape == image.shape and found.dtype == bool and 0.01 < found.mean() < 0.12
    assert min(min(pieces(x)) for x in found) >= 8               # at 128
    endo = data.edge_map(image, np.where(mask == 1, 1, 0).astype(np.uint8), "mask")
    near = np.array([ndimage.distance_transform_edt(~x) for x in found])
    assert (near[endo] <= 2).mean() > 0.9                        # blood against muscle is an edge
    assert (near[endo].mean()) < near.mean() / 3
    dim = (image * 0.5).astype(np.uint8)                         # thresholds are relative to the image
    assert abs(data.edges(dim).mean() / found.mean() - 1) < 0.25
    padded = np.pad(image, ((0, 0), (64, 64), (64, 64)))
    same = data.edges(padded, sigma=1.0, shortest=8)[:, 64:-64, 64:-64]
    assert (same == found)[:, 3:-3, 3:-3].mean() > 0.99          # and not to how much surrounds it
    assert not data.edges(np.zeros((2, 40, 40), np.uint8)).any()
    assert not data.edges(np.full((1, 40, 40), 90, np.uint8)).any()


def test_strokes_are_few_whole_edges_and_deterministic(views):
    found = data.edges(views.image[:10])
    a, b, c = (data.strokes(found, np.random.default_rng(s)) for s in (0, 0, 1))
    assert (a == b).all() and (a != c).any() and not (a & ~found).any()
    assert all(1 <= len(pieces(x)) <= 8 and min(pieces(x)) >= 5 for x in a)
    assert 0.05 < a.sum() / found.sum() < 0.6
    assert not data.strokes(np.zeros((1, 9, 9), bool), np.random.default_rng(0)).any()


def test_edge_modes(views):
    image, mask = views.image[:4], views.mask[:4]
    full = data.edge_map(image)
    assert (full == data.edges(image)).all() and (full == data.edge_map(full)).all()
    rng = np.random.default_rng
    assert (data.edge_map(full, mask, "sparse", rng(3)) == data.edge_map(image, mask, "sparse", rng(3))).all()
    assert not data.edge_map(image, mask, "none").any()
    contour = data.edge_map(image, mask, "mask")
    assert contour.dtype == bool and contour.any((1, 2)).all() and not contour[mask == 0].any()
    square = np.pad(np.full((1, 4, 4), 2, np.uint8), ((0, 0), (3, 3), (3, 3)))
    square[0, 4:6, 4:6] = 1
    assert data.edge_map(square, square, "mask").sum() == 12     # one pixel wide: the ring of 2s
    for bad in (("mask", None, None), ("sparse", mask, None), ("some", mask, rng(0))):
        with pytest.raises(ValueError, match=bad[0]):
            data.edge_map(image, bad[1], bad[0], bad[2])


# ---------------------------------------------------------------- phantom

def test_views_depend_on_seed_and_number_only(views, tmp_path):
    data.phantom_views(str(tmp_path / "a.h5"), subjects=2, seed=1)
    data.phantom_views(str(tmp_path / "b.h5"), subjects=2, seed=2)
    a, b = data.load(tmp_path / "a.h5"), data.load(tmp_path / "b.h5")
    k = len(a)
    assert (a.image == views.image[:k]).all() and (a.mask == views.mask[:k]).all()
    assert a.fingerprint != b.fingerprint and not set(a.subject) & set(b.subject)


def test_views_pass_check_and_say_what_they_hold(views):
    assert data.check(views.path) == [] and views.attrs["licence"] == "CC0"
    assert views.attrs["mask_names"] == data.CINE and views.attrs["view_names"] == ["SA", "LA"]
    assert views.attrs["phase_names"] == ["ED", "ES"] and views.attrs["spacing_mm"][1] == data.FRAME / 128
    assert views.label_names == ["healthy", "dilated", "hypertrophic"]
    assert (data.cine_ids(views)[:4] == range(4)).all()
    c = views.columns
    for s in set(views.subject):
        r = views.subject == s
        count = [(r & (c["view"] == v) & (c["phase"] == p)).sum() for v in (0, 1) for p in (0, 1)]
        assert count[0] == count[1] >= 5 and count[2:] == [1, 1]
    assert {len(set(c["label"][views.subject == s])) for s in set(views.subject)} == {1}


def test_views_masks_are_nested_and_hearts_beat(views):
    c, m = views.columns, views.mask
    assert all((m == v).any((1, 2))[c["view"] == 1].all() for v in (1, 2, 3))
    around = np.array([ndimage.binary_dilation(x == 1) for x in m])
    short = c["view"] == 0
    assert np.isin(m[around & short[:, None, None]], (1, 2)).all()           # the cavity touches only muscle
    assert np.isin(m[around & ~short[:, None, None]], (1, 2)).mean() > 0.97  # but is open to the atrium
    area = {v: (m == v).sum((1, 2)) for v in (1, 2, 3)}
    ef = {}
    for s in sorted(set(views.subject)):
        for view in (0, 1):
            here = (views.subject == s) & (c["view"] == view)
            ed, es = (np.flatnonzero(here & (c["phase"] == p)) for p in (0, 1))
            assert (c["slice"][ed] == c["slice"][es]).all() and (area[1][es] < area[1][ed]).all()
            if view == 0:
                ef[s] = 1 - area[1][es].sum() / area[1][ed].sum(), c["factor_ejection_fraction"][ed[0]]
            else:                                                               # the wall keeps its volume
                assert 0.85 < area[2][es[0]] / area[2][ed[0]] < 1.35
    assert np.corrcoef(np.array(list(ef.values())).T)[0, 1] > 0.95
    radius = np.sqrt(area[1][short] / np.pi) * views.attrs["spacing_mm"][1]
    assert abs(radius - c["factor_lv_radius"][short]).max() < 1.5


def test_views_look_like_bssfp(views):
    grey = [np.median(views.image[views.mask == v]) for v in range(4)]
    assert grey[2] < 0.55 * grey[1] and grey[2] < 0.55 * grey[3] and abs(grey[1] / grey[3] - 1) < 0.2
    shape = [data.resize(views.image[views.columns["view"] == v], 16).mean(0).ravel() for v in (0, 1)]
    assert np.corrcoef(shape)[0, 1] < 0.8                                       # two views, not one


def test_hearts_are_what_they_were():
    """Parts of heart() now serve both phantoms: these numbers are from before."""
    c = data.heart(np.random.default_rng([7, 2]), 64, 1.0, True)
    assert np.bincount(c["mask"].ravel()).tolist() == [19425, 2652, 2204, 257, 38]
    means = [129.459, 129.007, 123.547, 119.102, 108.034, 97.666]
    assert abs(c["image"].mean((1, 2)) - means).max() < 0.01


# ---------------------------------------------------------------- whose ids

def test_the_convention_is_read_from_the_names(tmp_path, capsys):
    def made(values, **attrs):
        x = np.arange(32, dtype=np.uint8).reshape(2, 4, 4)
        part = dict(image=x, mask=values, subject=np.array(["a", "b"]))
        data.write(str(tmp_path / "m.h5"), [part], attrs)
        return data.load(tmp_path / "m.h5")
    mask = np.arange(32, dtype=np.uint8).reshape(2, 4, 4) % 4
    ids = data.cine_ids(made(mask, mask="0 background, 1 RV cavity, 2 LV myocardium, 3 LV cavity"))
    assert ids[mask][0, 0].tolist() == [0, 3, 2, 1]
    names = ["background", "Left ventricle", "Myocardium", "Right ventricle"]
    ids = data.cine_ids(made(mask, mask_names=names))
    assert ids[:4].tolist() == [0, 1, 2, 3]
    one_error(capsys, lambda: data.cine_ids(made(mask)), "m.h5: mask", "mask_names")
    one_error(capsys, lambda: data.cine_ids(made(mask, mask_names=data.HEART)), "infarct")
    five = mask.copy()
    five[1, 2, 2] = 4
    one_error(capsys, lambda: data.cine_ids(made(five, mask_names=data.CINE)), "mask[1]", "4")


def test_real_acdc_has_its_own_ids():
    path = ROOT.parent / "shared" / "data" / "acdc256.h5"
    if not path.exists():
        pytest.skip(f"real hearts not found at {path}")
    d = data.load(path)
    assert data.cine_ids(d)[:4].tolist() == [0, 3, 2, 1]
    found = data.edges(d.image[::200])
    assert 0.01 < found.mean() < 0.1


def test_command_line(tmp_path, capsys, monkeypatch):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, words)])
        data.main()
        return capsys.readouterr().out
    path = tmp_path / "v.h5"
    run("phantom", "views", path, "--subjects", 3, "--size", 32, "--seed", 4)
    out = run("check", path)
    assert "3 subjects" in out and "LV cavity, myocardium, RV cavity" in out and out.endswith("ok\n")
    for words in (["phantom", "views", path, "--jitter", "1"], ["phantom", "views", path, "--subjects", "0"],
                  ["phantom", "lungs", path]):
        one_error(capsys, lambda: run(*words))
