"""data.py for cond_ldm.py: Canny against skimage, strokes, the cine phantom, ACDC and M&Ms-2 with traps."""
import os
import sys
import tracemalloc
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


# ---------------------------------------------------------------- ACDC, M&Ms-2

SHAPE, ZOOM = (60, 50), (1.0, 2.0)                               # 60 x 100 mm: rows are the second axis


def cine(folder, name, ids=(0, 1, 2, 3), slices=3, radius=18.0, extra=None, flat=False):
    """LV disc in a ring, RV disc to its left, round in mm; labels as ids says; one slice without heart."""
    import nibabel
    i, j = np.mgrid[:SHAPE[0], :SHAPE[1]]
    d = np.hypot((i - 35) * ZOOM[0], (j - 15) * ZOOM[1])         # upper right of the picture
    rv = np.hypot((i - 12) * ZOOM[0], (j - 15) * ZOOM[1]) < 8
    label = np.select([d < 0.6 * radius, d < radius, rv], [1, 2, 3], 0)
    image = np.array([50, 700, 200, 600])[label] + 5.0 * j
    stored = np.array([*ids, extra or 0])[label].astype(np.float64)
    if extra:
        stored[0, 0] = extra
    stored[stored == 2] = 1.9999
    volume = [np.stack([x] * slices, 2) for x in (image, stored)]
    if slices > 1:
        volume[1][..., 0] = 0
        volume[0][..., 0] *= 0.5
        volume[0][5, 5, 1] = 1e6                                 # one hot voxel
    for x, end in zip(volume, ("", "_gt")):
        nifti = nibabel.Nifti1Image(x * (not flat), np.diag([-1.0, -1, 1, 1]))
        nifti.header.set_zooms((*ZOOM, 9.0))                     # pixdim is right, the affine says 1 mm
        os.makedirs(folder, exist_ok=True)
        nibabel.save(nifti, os.path.join(folder, f"{name}{end}.nii.gz"))


def acdc_patient(root, part, name, info="ED: 1\nES: 12\nGroup: HCM\nHeight: 180.0\nNbFrame: 30\n", **how):
    folder = root / part / name
    cine(folder, f"{name}_frame01", ids=(0, 3, 2, 1), **how)     # ACDC: 1 RV, 2 myocardium, 3 LV
    cine(folder, f"{name}_frame12", ids=(0, 3, 2, 1), **{"radius": 12.0, **how})
    (folder / "Info.cfg").write_text(info)
    (folder / f"{name}_4d.nii.gz").write_text("never opened")


def mms_subject(root, name, **how):
    for view, slices in (("SA", 3), ("LA", 1)):                  # LA is H x W x 1
        cine(root / "dataset" / name, f"{name}_{view}_ED", slices=slices, **how)
        cine(root / "dataset" / name, f"{name}_{view}_ES", slices=slices, **{"radius": 12.0, **how})
        (root / "dataset" / name / f"{name}_{view}_CINE.nii.gz").write_text("never opened")


def heart_is_upright_and_round(d, row, radius):
    """LV in the ring, RV to its left, all in the upper half, sizes in mm: one convention for all sources."""
    mask, mm = d.mask[row], d.columns["spacing"][row]
    assert abs(mm - 100 / 256) < 1e-6
    lv, muscle, rv = (np.argwhere(mask == v) for v in (1, 2, 3))
    assert abs(np.sqrt(len(lv) / np.pi) * mm - 0.6 * radius) < 0.7
    assert abs(np.sqrt((len(lv) + len(muscle)) / np.pi) * mm - radius) < 0.7
    assert abs(np.ptp(lv[:, 0]) - np.ptp(lv[:, 1])) * mm < 2.1   # as round as 2 mm pixels are
    assert abs(lv.mean(0) - muscle.mean(0)).max() < 3 and rv[:, 1].max() < lv[:, 1].min()
    assert lv[:, 0].mean() < 110 and abs(lv[:, 1].mean() * mm - 55.5) < 1
    grey = [np.median(d.image[row][mask == v]) for v in (1, 2, 3)]
    assert grey[0] > 200 and grey[1] < 0.5 * grey[0] and grey[2] > 150


def test_acdc_layout_and_traps(tmp_path, capsys, monkeypatch):
    pytest.importorskip("nibabel")
    root, out = tmp_path / "database", tmp_path / "out"
    acdc_patient(root, "training", "patient001")
    acdc_patient(root, "testing", "patient101", info="ED: 1\nES: 12\n")  # no group
    acdc_patient(root, "training", "patient002", extra=4)  # a fifth value
    acdc_patient(root, "training", "patient003", info="ED: 1\nES: 9\nGroup: NOR\n")  # frame09 is missing
    acdc_patient(root, "training", "patient004", info="Group: NOR\n")
    acdc_patient(root, "training", "patient005", flat=True)  # no heart anywhere
    acdc_patient(root, "training", "patient006")
    os.remove(root / "training" / "patient006" / "Info.cfg")
    acdc_patient(root, "training", "patient007")
    broken = root / "training" / "patient007" / "patient007_frame12.nii.gz"
    broken.write_bytes(broken.read_bytes()[:300] + b"\xff" * 40 + broken.read_bytes()[340:])
    data.acdc(str(root), str(out))
    said = capsys.readouterr().out
    whys = ("_gt holds [0.", "frame09.nii.gz", "no frame numbers ED and ES", "some heart", "Info.cfg", "")
    for k, why in enumerate(whys, 2):
        line = [x for x in said.splitlines() if x.startswith(f"skipped patient{k:03d}: ")]
        assert len(line) == 1 and why in line[0], (why, said)
    assert "2 subjects, 2 of them new with 8 slices, 6 skipped" in said
    assert sorted(os.listdir(out)) == ["patient001.h5", "patient101.h5"]
    d = data.load(out)                                           # a folder is one data set
    assert d.image.shape == (8, 256, 256) and data.check(out) == []
    assert d.attrs["mask_names"] == data.CINE and "1 RV" in d.attrs["source"]
    assert d.attrs["spacing_mm"] == [9.0, 100 / 256, 100 / 256]
    assert [d.label_names[k] for k in d.columns["label"][[0, -1]]] == ["HCM", "unknown"]
    assert d.columns["phase"].tolist() == [0, 0, 1, 1] * 2 and d.columns["slice"].tolist() == [1, 2] * 4
    assert not d.columns["view"].any() and list(d.subject) == ["patient001"] * 4 + ["patient101"] * 4
    for row in (0, 1, 2, 3):
        heart_is_upright_and_round(d, row, (18, 18, 12, 12)[row])
    # again: finished files are not touched, a subject that was mended is added, no trace of a killed run
    before = {p: os.stat(out / p).st_mtime_ns for p in os.listdir(out)}
    (root / "training" / "patient004" / "Info.cfg").write_text("ED: 1\nES: 12\nGroup: NOR\n")
    data.acdc(str(root), str(out))
    assert "3 subjects, 1 of them new" in capsys.readouterr().out
    assert all(os.stat(out / p).st_mtime_ns == t for p, t in before.items())
    assert sorted(os.listdir(out)) == ["patient001.h5", "patient004.h5", "patient101.h5"]
    assert data.load(out).label_names == ["DCM", "HCM", "MINF", "NOR", "RV", "unknown"]


def test_mms_layout_and_traps(tmp_path, capsys):
    pytest.importorskip("nibabel")
    root, out = tmp_path / "MnM2", tmp_path / "out"
    for k in (1, 2, 4):
        mms_subject(root, f"{k:03d}")
    mms_subject(root, "003", extra=5)
    os.remove(root / "dataset" / "004" / "004_LA_ES_gt.nii.gz")
    blank = ",,,,\r\n"
    (root / "dataset_information.csv").write_text(
        "\ufeffSUBJECT_CODE,DISEASE,VENDOR,SCANNER,FIELD\r\n1,NOR,SIEMENS,Avanto,1.5\r\n" + blank * 300_000
        + "2,FALL,GE MEDICAL SYSTEMS,Signa,1.5\r\n" + blank * 3, encoding="utf-8")
    tracemalloc.start()
    data.mms(str(root), str(out))
    assert tracemalloc.get_traced_memory()[1] < 20e6  # blank rows are not kept
    tracemalloc.stop()
    said = capsys.readouterr().out
    assert "skipped 003: 003_SA_ED_gt holds" in said
    assert "skipped 004: no " in said and "004_LA_ES_gt" in said
    d = data.load(out)
    c = d.columns
    assert d.image.shape == (12, 256, 256) and data.check(out) == []
    assert list(d.subject[::6]) == ["001", "002"]
    assert d.label_names == ["FALL", "NOR", "unknown"] and c["label"][::6].tolist() == [1, 0]
    assert c["view"][:6].tolist() == [0, 0, 0, 0, 1, 1] and c["phase"][:6].tolist() == [0, 0, 1, 1, 0, 1]
    for row, radius in ((0, 18), (2, 12), (4, 18), (5, 12)):
        heart_is_upright_and_round(d, row, radius)  # as ACDC's
    assert d.image[0].max() == 255 and d.image[1, :, :50].max() == 0  # window; padding


def test_converter_errors(tmp_path, capsys, monkeypatch):
    pytest.importorskip("nibabel")
    out = str(tmp_path / "out")
    one_error(capsys, lambda: data.acdc(str(tmp_path), out), tmp_path, "patient001")
    one_error(capsys, lambda: data.mms(str(tmp_path), out), tmp_path, "dataset/001")
    mms_subject(tmp_path, "001", flat=True)
    one_error(capsys, lambda: data.mms(str(tmp_path), out), "dataset_information.csv")
    (tmp_path / "dataset_information.csv").write_text("CODE;DISEASE\n1;NOR\n")
    one_error(capsys, lambda: data.mms(str(tmp_path), out), "SUBJECT_CODE")
    (tmp_path / "dataset_information.csv").write_text("SUBJECT_CODE;DISEASE\n1;NOR\n")
    one_error(capsys, lambda: data.mms(str(tmp_path), out), "none of 1", "some heart")
    (tmp_path / "file").write_text("")
    one_error(capsys, lambda: data.mms(str(tmp_path), str(tmp_path / "file")), "file", "folder")
    monkeypatch.setitem(sys.modules, "nibabel", None)
    for convert in (data.acdc, data.mms):
        one_error(capsys, lambda: convert(str(tmp_path), out), "pip install nibabel")


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
                  ["acdc", tmp_path], ["mms", tmp_path / "none", tmp_path]):
        one_error(capsys, lambda: run(*words))


def test_moved_keeps_image_and_mask_together():
    """The mask of a moved image is where a threshold finds it; at strength 0 nothing moves; same rng, same."""
    y, x = np.mgrid[:64, :64]
    mask = np.repeat((np.hypot(x - 24, (y - 40) / 2) < 8)[None], 6, 0).astype(np.uint8)
    image = (60 + 150 * mask).astype(np.uint8)
    a, b = data.moved(image, mask, 1.0, np.random.default_rng(0))
    assert abs((a > 135).astype(int) - b).mean() < 0.01 and len({v.tobytes() for v in b}) == 6
    assert (image == 60 + 150 * mask).all() and abs(b.sum((1, 2)) / mask[0].sum() - 1).max() < 0.3
    centre = np.array([[(b[k] * v).sum() / b[k].sum() for v in (x, y)] for k in range(6)])
    assert 0.5 < abs(centre - [24, 40]).max() < 15
    again, still = data.moved(image, None, 1.0, np.random.default_rng(0)), data.moved(image, mask, 0.0, np.random.default_rng(0))
    assert np.array_equal(again[0], a) and again[1] is None
    assert np.array_equal(still[0], image) and np.array_equal(still[1], mask)
