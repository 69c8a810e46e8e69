"""data.py: splits that cannot leak, batches that do not depend on where they come from, phantoms that keep
their word, EMIDEC's traps, and one line for every bad file."""
import os
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

N, H = 12, 16


def columns(seed=0, **change):
    rng = np.random.default_rng(seed)
    made = dict(image=rng.integers(0, 256, (N, H, H), dtype=np.uint8),
                mask=rng.integers(0, 5, (N, H, H), dtype=np.uint8),
                subject=np.repeat(["a", "b", "c", "d"], 3), label=np.repeat([0, 1, 0, 1], 3),
                age=np.linspace(40, 60, N).astype(np.float32))
    made.update(change)
    return {k: v for k, v in made.items() if v is not None}


def make(path, **change):
    data.write(str(path), [columns(**change)], {})
    return str(path)


def table(subject, label=None, **more):
    """A Dataset without pixels, for split()."""
    cols = {} if label is None else {"label": np.asarray(label)}
    return data.Dataset("", None, None, np.asarray(subject), cols, more.get("split"), {}, [], "", [])


def one_error(capsys, call, *words):
    """`call` exits with 2 and says one line on stderr that holds all the words."""
    with pytest.raises(SystemExit) as stop:
        call()
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(str(w) in lines[0] for w in words), (words, lines[0])


# ---------------------------------------------------------------- split

def many(subjects=100, rows=7):
    names = np.repeat([f"s{i:03d}" for i in range(subjects)], rows)
    return names, np.repeat((np.arange(subjects) % 3 > 0).astype(int), rows)


def test_split_is_by_subject_stratified_and_of_the_right_size():
    subject, label = many()
    part = data.split(table(subject, label), seed=3)
    where = {s: set(part[subject == s]) for s in set(subject)}
    assert all(len(p) == 1 for p in where.values())
    assert [sum(p == {k} for p in where.values()) for k in ("train", "val", "test")] == [70, 10, 20]
    for k in ("train", "val", "test"):
        assert abs(label[part == k].mean() - label.mean()) < 0.05


def test_split_depends_on_seed_and_subject_only():
    subject, label = many()
    part = data.split(table(subject, label), seed=3)
    order = np.random.default_rng(0).permutation(len(subject))
    assert (data.split(table(subject[order], label[order]), seed=3) == part[order]).all()
    assert (data.split(table(subject, label), seed=4) != part).any()
    # pinned: a run of today and one of next year must test on the same patients
    assert " ".join(data.split(table(list("abcdefghij")), seed=0)) == \
        "val train test test train train train train train train"


def test_split_uses_the_largest_label_of_a_subject():
    subject, label = many(30, 4)
    patchy = label * np.tile([0, 1, 0, 0], 30)  # per slice: 3 of 4 slices of a patient look normal
    assert (data.split(table(subject, label)) == data.split(table(subject, patchy))).all()


@pytest.mark.parametrize("subjects", [3, 4, 5, 10])
def test_split_leaves_no_part_empty(subjects):
    part = data.split(table([str(i) for i in range(subjects)], np.arange(subjects) % 2))
    assert set(part) == {"train", "val", "test"}


def test_split_fractions_and_stored_split():
    subject, label = many(10, 1)
    assert set(data.split(table(subject, label), fractions=(0.8, 0.2, 0))) == {"train", "val"}
    stored = np.array(["test"] * 5 + ["train"] * 5)
    assert (data.split(table(subject, label, split=stored)) == stored).all()


# ---------------------------------------------------------------- load

def test_folder_equals_file_and_floats_equal_uint8(tmp_path):
    whole, c = data.load(make(tmp_path / "all.h5")), columns()
    (tmp_path / "parts").mkdir()
    for s in "abcd":
        make(tmp_path / "parts" / f"{s}.h5", **{k: v[c["subject"] == s] for k, v in c.items()})
    parts = data.load(tmp_path / "parts")
    floats = data.load(make(tmp_path / "float.h5", image=c["image"].astype(np.float64) / 255))
    for other in (parts, floats):
        assert (other.image == c["image"]).all() and (other.mask == whole.mask).all()
        assert list(other.subject) == list(whole.subject) and other.fingerprint == whole.fingerprint
        assert all((other.columns[k] == whole.columns[k]).all() for k in whole.columns)
    changed = c["image"].copy()
    changed[11, 0, 0] ^= 1
    assert data.load(make(tmp_path / "x.h5", image=changed)).fingerprint != whole.fingerprint


def test_lazy_rows_equal_the_array(tmp_path):
    c = columns()
    (tmp_path / "parts").mkdir()
    for s in "abcd":
        make(tmp_path / "parts" / f"{s}.h5", **{k: v[c["subject"] == s] for k, v in c.items()})
    lazy = data.load(tmp_path / "parts", max_gb=0)
    assert isinstance(lazy.image, data.Rows) and lazy.image.shape == (N, H, H)
    for rows in ([11, 0, 5, 5, 4], [3], np.arange(N), []):
        assert (lazy.image[rows] == c["image"][rows]).all() and (lazy.mask[rows] == c["mask"][rows]).all()
    small, eager = (data.load(tmp_path / "parts", size=8, max_gb=gb) for gb in (0, 4))
    assert (small.image[[7, 2]] == eager.image[[7, 2]]).all()
    assert (eager.mask == c["mask"][:, 1::2, 1::2]).all()  # labels are picked, never averaged


def test_resize_is_the_area_mean_and_keeps_labels():
    x = np.random.default_rng(0).integers(0, 256, (3, 12, 12)).astype(np.uint8)
    assert np.allclose(data.resize(x, 4), x.reshape(3, 4, 3, 4, 3).mean((2, 4)), atol=1e-3)
    fine = x.repeat(5, 1).repeat(5, 2)  # 12 -> 5 is 60 -> 5 after repeating each pixel 5 times
    assert np.allclose(data.resize(x, 5), fine.reshape(3, 5, 12, 5, 12).mean((2, 4)), atol=1e-3)
    ramp = np.arange(8, dtype=np.float32)[None, None].repeat(8, 1)
    assert np.allclose(data.resize(ramp, 16)[0, 0, 1:-1], np.arange(1, 15) / 2 - 0.25, atol=1e-5)  # bilinear
    flat = np.full((1, 12, 6), 7, np.uint8)  # not square: zeros left and right, geometry kept
    assert np.allclose(data.resize(flat, 4)[0], [[0, 7, 7, 0]] * 4)
    assert set(np.unique(data.resize(x // 60, 7, nearest=True))) <= set(np.unique(x // 60))


def test_names_missing_values_and_strings(tmp_path):
    path = make(tmp_path / "a.h5", subject=np.repeat([" a", "b ", "c", "é"], 3),
                sex=np.array(["M", "F"] * 6), age=row(np.full(N, 50.0), 0, np.nan), score=np.arange(N))
    with h5py.File(path, "a") as f:
        f["label"].attrs["label_names"] = ["healthy", "ill"]
        f.create_group("extra")
    d = data.load(path)
    with h5py.File(path, "a") as f:
        del f["subject"]
        f["subject"] = np.repeat([s.encode() for s in ("a", "b", "c", "é")], 3)    # declared as ASCII
    assert data.load(path).fingerprint == d.fingerprint
    assert list(d.subject[::3]) == ["a", "b", "c", "é"] and d.label_names == ["healthy", "ill"]
    assert d.columns["score"][5] == 5 and d.columns["sex"][1] == "F" and len(d) == N
    assert any("age: 1 of 12" in w for w in d.warnings) and any("extra" in w for w in d.warnings)


# ---------------------------------------------------------------- batches

def arrays(tmp_path):
    c = columns()
    return dict(image=c["image"], mask=c["mask"], y=c["label"], age=c["age"])


def test_batch_types_and_values(tmp_path):
    a, rows = arrays(tmp_path), [5, 0, 5]
    b = data.Loader(a, "cpu").batch(rows)
    assert b["image"].shape == (3, 1, H, H) and b["image"].dtype == torch.float32
    assert torch.equal(b["image"][:, 0], torch.tensor(a["image"][rows]) / 127.5 - 1)
    assert b["mask"].dtype == b["y"].dtype == torch.int64 and (b["mask"].numpy() == a["mask"][rows]).all()
    assert b["age"].dtype == torch.float32


def test_streamed_equals_resident(tmp_path):
    path, order = make(tmp_path / "a.h5"), [np.array(r) for r in ([3, 1], [11, 11], [0, 7], [4, 2])]
    lazy, a = data.load(path, max_gb=0), arrays(tmp_path)
    resident = data.Loader(a, "cpu")
    disk = data.Loader(dict(a, image=lazy.image, mask=lazy.mask), "cpu", limit_gb=0)
    assert resident.resident and not disk.resident
    for one, two, rows in zip(resident.stream(order), disk.stream(order), order, strict=True):
        for name, x in disk.batch(rows).items():
            assert torch.equal(one[name], two[name]) and torch.equal(one[name], x)


def test_prefetch_raises_in_the_consumer_and_ends_with_it(tmp_path, capsys):
    loader = data.Loader(arrays(tmp_path), "cpu", limit_gb=0)
    stream = loader.stream(iter([np.array([0]), np.array([99])]))
    next(stream)
    with pytest.raises(IndexError):
        next(stream)
    before = threading.active_count()
    endless = loader.stream(np.array([i % N]) for i in iter(int, 1))
    next(endless)
    assert threading.active_count() == before + 1
    endless.close()
    assert threading.active_count() == before
    with pytest.raises(ValueError):
        data.Loader(dict(image=np.zeros((3, 4, 4), np.uint8), y=np.zeros(4)), "cpu")
    # a file that goes bad during training is still a one-line error
    c = columns(image=np.random.default_rng(0).random((N, H, H)))
    c["image"][9, 2, 3] = np.nan
    rows = data.Rows("image", [make(tmp_path / "nan.h5", **c)], [N], (H, H))
    bad = data.Loader(dict(image=rows), "cpu", limit_gb=0)
    one_error(capsys, lambda: list(bad.stream([np.array([1]), np.array([9])])), "nan.h5", "image[9]")


@pytest.mark.parametrize("change", [
    dict(image=columns()["image"][:5], mask=None, subject=np.array(["a"] * 5), label=None, age=None),
    dict(image=columns()["image"][:, :8], mask=None), dict(image=None)])
def test_a_file_that_changes_during_the_run_is_one_line(tmp_path, capsys, change):
    path = make(tmp_path / "a.h5")
    rows = data.load(path, max_gb=0).image
    make(path, **change)
    one_error(capsys, lambda: rows[[1, 9]], "a.h5: image")


# ---------------------------------------------------------------- phantom hearts

@pytest.fixture(scope="module")
def hearts(tmp_path_factory):
    path = tmp_path_factory.mktemp("hearts") / "h.h5"
    data.phantom_hearts(str(path), subjects=30, seed=1)
    return data.load(path)


def test_phantom_is_deterministic_and_its_masks_keep_their_word(hearts, tmp_path):
    data.phantom_hearts(str(tmp_path / "again.h5"), subjects=3, seed=1)
    again = data.load(tmp_path / "again.h5")  # a subject is the same whatever the number of subjects
    assert (again.image == hearts.image[:len(again)]).all() and (again.mask == hearts.mask[:len(again)]).all()
    data.phantom_hearts(str(tmp_path / "other.h5"), subjects=3, seed=2)
    other = data.load(tmp_path / "other.h5")
    assert other.fingerprint != again.fingerprint and not set(other.subject) & set(hearts.subject)
    scar, muscle = (hearts.mask >= 3).sum((1, 2)), (hearts.mask >= 2).sum((1, 2))
    c = hearts.columns
    assert np.allclose(c["infarct_fraction"], scar / muscle) and (c["has_infarct"] == (scar > 0)).all()
    assert ((c["factor_transmurality"] > 0) == (scar > 0)).all()
    rows = [hearts.subject == s for s in set(hearts.subject)]
    patient = {i: (c["label"][r].max(), scar[r]) for i, r in enumerate(rows)}
    assert sum(label for label, _ in patient.values()) == 20  # two thirds
    assert all((area > 0).any() == bool(label) for label, area in patient.values())
    assert 0.35 < c["has_infarct"].mean() < 0.65 and (hearts.mask == 4).any()
    radius = np.sqrt((hearts.mask == 1).sum((1, 2)) / np.pi)
    assert np.corrcoef(radius, c["factor_lv_radius"])[0, 1] > 0.98
    assert abs(radius - c["factor_lv_radius"]).mean() < 1


def test_phantom_looks_like_lge(hearts):
    grey = [np.mean([x[m == v].mean() for x, m in zip(hearts.image, hearts.mask) if (m == v).any()])
            for v in range(5)]
    assert grey[2] < grey[1] < grey[3] and grey[4] < grey[3]  # nulled muscle < blood < scar > no-reflow
    small = data.resize(hearts.image, 32)  # the scar must survive 32 x 32
    inner = data.resize(np.isin(hearts.mask, (2, 3)).astype(np.uint8), 32) > 0.99
    top = np.array([np.quantile(x[i], 0.95) - np.median(x[i]) for x, i in zip(small, inner)])
    scarred = hearts.columns["infarct_fraction"] > 0.08
    assert np.median(top[scarred]) > 2 * np.median(top[hearts.columns["infarct_fraction"] == 0])


def test_phantom_slices_of_one_subject_are_alike(hearts):
    x = data.resize(hearts.image, 32).reshape(len(hearts), -1)
    r = np.corrcoef(x)
    same = hearts.subject[:, None] == hearts.subject
    assert np.median(r[same & ~np.eye(len(x), dtype=bool)]) > np.median(r[~same]) + 0.1


def test_phantom_jitter_is_pose_and_nothing_else(tmp_path):
    centres = {}
    for jitter in (0.0, 1.0):
        data.phantom_hearts(str(tmp_path / "j.h5"), subjects=8, seed=0, jitter=jitter)
        d = data.load(tmp_path / "j.h5")
        centres[jitter] = np.array([np.argwhere(m > 0).mean(0) for m in d.mask])
        assert ((d.columns["factor_rotation"] == 0).all()) == (jitter == 0)
        age = d.columns["age"]
    assert centres[0.0].std(0).max() < 1.0 < 3.0 < centres[1.0].std(0).min()
    right_up = np.stack([63.5 - centres[1.0][:, 0], centres[1.0][:, 1] - 63.5])
    known = np.stack([d.columns["factor_y"], d.columns["factor_x"]])
    assert abs(right_up - known).max() < 2.5 and len(np.unique(age)) == 8


# ---------------------------------------------------------------- EMIDEC

def emidec_case(root, name, centre, zoom, radius=20.0, suffix=".nii.gz", text=None, scar=True, spike=0.0):
    """A disc of 1s in a ring of 2s (outer radius in mm), scar on one side; float64 labels, wrong affine."""
    import nibabel
    shape = (90, 70, 4)
    i, j = np.meshgrid(np.arange(90), np.arange(70), indexing="ij")
    d = np.hypot((i - centre[0]) * zoom, (j - centre[1]) * zoom)
    flat = np.select([d < radius * 0.6, (d < radius) & (j > centre[1]) & scar, d < radius], [1, 3, 2], 0)
    mask = np.stack([flat * 0, flat, flat, flat], 2).astype(np.float64)  # one slice without heart
    image = np.stack([100 + 400 * (flat == 1) + 800 * (flat == 3)] * 4, 2).astype(np.float64)
    image[..., 2] *= 0.5
    image[centre[0] + 2, centre[1] - 2, 1] += spike
    mask[mask == 2] = 1.9999
    for folder, x in (("Images", image), ("Contours", mask)):
        nifti = nibabel.Nifti1Image(x, np.diag([-1.0, -1, 1, 1]))
        nifti.header.set_zooms((zoom, zoom, 10.0))  # pixdim is right, the affine says 1 mm
        path = root / name / folder / (name + suffix)
        if suffix == ".nii/":
            path.mkdir(parents=True)
            path = path / "volume.nii"
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nifti, path)
    if text:
        (root / (name.replace("_", " ") + ".txt")).write_bytes(text.encode("latin-1"))


def test_emidec_layout_and_traps(tmp_path, capsys):
    pytest.importorskip("nibabel")
    root = tmp_path / "emidec"
    emidec_case(root, "Case_N006", (45, 30), 1.0, scar=False,
                text="Case\xa0: N006\r\nSex\xa0: M\r\nAge\xa0:\xa061\r\nObésité : 0\r\n")
    emidec_case(root, "Case_P007", (30, 40), 1.6, suffix=".nii", text="Sex : F\r\nAge : \r\n")
    emidec_case(root, "Case_P008", (40, 40), 1.3, radius=25, suffix=".nii/", spike=1e6)
    (root / "Case_P009" / "Images").mkdir(parents=True)
    emidec_case(root, "Case_P010", (40, 40), 1.3)
    broken = root / "Case_P010" / "Contours" / "Case_P010.nii.gz"
    broken.write_bytes(broken.read_bytes()[:200])
    data.emidec(str(root), str(tmp_path / "out.h5"))
    said = capsys.readouterr().out
    assert "skipped Case_P009: no " in said and "skipped Case_P010: " in said
    d = data.load(tmp_path / "out.h5")
    assert d.image.shape == (9, 128, 128)
    assert list(d.subject[::3]) == ["Case_N006", "Case_P007", "Case_P008"]
    assert list(d.columns["label"][::3]) == [0, 1, 1] and list(d.columns["slice"][:3]) == [1, 2, 3]
    assert d.columns["age"][0] == 61 and np.isnan(d.columns["age"][3:]).all()
    assert list(d.columns["sex"][::3]) == ["M", "F", ""]
    assert list(d.columns["has_infarct"][::3]) == [0, 1, 1]
    spacing = d.attrs["spacing_mm"][1]
    assert abs(spacing - 1.5 * 50 / 128) < 0.03  # the largest heart is 50 mm across
    for s, radius in (("Case_N006", 20), ("Case_P007", 20), ("Case_P008", 25)):  # mm: zooms, not affine
        m = d.mask[d.subject == s][0]
        assert abs(np.sqrt((m > 0).sum() / np.pi) * spacing - radius) < 0.5
        assert abs(np.argwhere(m > 0).mean(0) - 63.5).max() < 1.5  # cropped around the heart
    n = d.subject == "Case_N006"
    bright = [x[m == 1].mean() for x, m in zip(d.image[n], d.mask[n])]
    assert abs(bright[1] / bright[0] - 0.5) < 0.15 and bright[0] > 230  # one window for all slices
    scar = d.image[d.subject == "Case_P008"][0][d.mask[d.subject == "Case_P008"][0] == 3]
    assert scar.mean() > 200  # one hot voxel does not dim the heart
    i, j = (np.argwhere(d.mask[d.subject == "Case_P007"][0] == v).mean(0) for v in (3, 2))
    assert i[1] > j[1] + 10 and abs(i[0] - j[0]) < 2  # axes neither swapped nor flipped
    data.emidec(str(root), str(tmp_path / "coarse.h5"), spacing=1.0)
    assert data.load(tmp_path / "coarse.h5").attrs["spacing_mm"][1] == 1.0


def test_emidec_errors(tmp_path, capsys, monkeypatch):
    one_error(capsys, lambda: data.emidec(str(tmp_path), "x.h5"), tmp_path, "Case_")
    monkeypatch.setitem(sys.modules, "nibabel", None)
    one_error(capsys, lambda: data.emidec(str(tmp_path), "x.h5"), "pip install nibabel")


def test_real_emidec():
    path = ROOT.parent / "shared" / "data" / "emidec.h5"
    if not path.exists():
        pytest.skip(f"real hearts not found at {path}")
    d = data.load(path, size=64)
    part = data.split(d)
    assert d.image.shape == (493, 64, 64) and set(np.unique(d.mask)) == set(range(5))
    assert [len(set(d.subject[part == p])) for p in ("train", "val", "test")] == [49, 7, 14]
    fraction = (d.mask >= 3).sum((1, 2)) / np.maximum((d.mask >= 2).sum((1, 2)), 1)
    assert np.corrcoef(fraction, d.columns["infarct_fraction"])[0, 1] > 0.99


# ---------------------------------------------------------------- bad files

rng = np.random.default_rng(5)
nan = rng.random((N, H, H)).astype(np.float32)
nan[7, 1, 1:4] = [np.nan, np.inf, np.nan]
wide = rng.random((N, H, H)).astype(np.float32)
wide[4, 0, 0] = 1.5


def row(values, i, v):
    values = np.array(values)
    values[i] = v
    return values


@pytest.mark.parametrize("change, words", [
    (dict(image=None), ["image: missing", "subject"]),
    (dict(image=None, Images=columns()["image"]), ["image: missing", "rename Images to image"]),
    (dict(subject=None), ["subject: missing", "image, label"]),
    (dict(image=np.zeros((N, H), np.uint8)), ["image", "(12, 16)", "(N,H,W)"]),
    (dict(image=np.zeros((N, H, H, 3), np.uint8), mask=None), ["image", "channels last"]),
    (dict(image=np.zeros((N, H, H), np.int16)), ["image", "int16", "uint8"]),
    (dict(image=nan), ["image[7]", "3 values NaN or Inf"]),
    (dict(image=wide), ["image[4]", "1.5", "outside [0,1]"]),
    (dict(image=wide / 1.5 * np.float32(1.000001)), ["image[4]", "1.00000", "outside [0,1]"]),
    (dict(image=np.full((N, H, H), 9, np.uint8)), ["image", "every image is constant"]),
    (dict(label=np.zeros(N - 1, int)), ["label", "(11,)", "12 rows"]),
    (dict(mask=np.zeros((N, H, H + 1), np.uint8)), ["mask", "(12, 16, 17)"]),
    (dict(mask=np.zeros((N, H, H), np.int32)), ["mask", "int32"]),
    (dict(subject=row(np.repeat(["aa", "b"], 6), 5, " ")), ["subject[5]", "empty"]),
    (dict(subject=row(np.repeat(["aaa", "b"], 6), 5, "nan")), ["subject[5]: nan", "empty"]),
    (dict(subject=row(np.arange(N) + 0.0, 5, np.nan)), ["subject", "float", "text or whole numbers"]),
    (dict(sex=row(np.ones(N), 5, np.nan)), ["sex", "float", "text or whole numbers"]),
    (dict(subject=row(np.repeat(["a" * 300, "b"], 6), 5, "c")), ["subject[0]: aaaa", "longer than 200"]),
    (dict(split=np.array(["train", "val"] * 6)), ["split", "a, b, c, d"]),
    (dict(subject=np.array(["a", "a "] * 6), split=np.array(["train", "val"] * 6)), ["1 subjects", " a;"]),
    (dict(split=row(["train"] * N, 3, "dev")), ["split[3]", "dev"]),
    (dict(label=row(np.zeros(N), 2, 0.5)), ["label[2]", "0.5"]),
    (dict(label=row(np.zeros(N, int), 2, -1)), ["label[2]", "-1"]),
    (dict(age=row(np.ones(N), 6, np.inf)), ["age[6]", "inf"]),
    (dict(age=row(np.ones(N, np.longdouble), 6, 1e39)), ["age[6]", "infinite"]),    # as a float32
    (dict(label=row(np.zeros(N, np.uint64), 2, 2 ** 63)), ["label[2]", "9223372036854775808"]),
    (dict(label=row(np.zeros(N, np.longdouble), 2, 2.0 ** 70)), ["label[2]", "1.18059", "2147483647"]),
    (dict(age=np.array(["old"] * N)), ["age", "expected numbers"]),
    (dict(event=row(np.zeros(N, int), 8, 2), time=np.ones(N)), ["event[8]"]),
    (dict(event=np.zeros(N, int), time=row(np.ones(N), 1, 0)), ["time[1]"]),
])
def test_bad_content(tmp_path, capsys, change, words):
    path = make(tmp_path / "bad.h5", **change)
    one_error(capsys, lambda: data.check(path), path, *words)


def garbage(path):
    path.write_text("subject,label\na,1\n" * 200)


def empty(path):
    path.write_bytes(b"")


def eight_bytes(path):
    path.write_bytes(b"\x89HDF\r\n\x1a\n")


def truncated(path):
    make(path)
    os.truncate(path, path.stat().st_size // 2)


def flipped(path):
    make(path)
    with h5py.File(path) as f:
        assert f["image"].fletcher32 and f["image"].chunks == (1, H, H)
        at = f["image"].id.get_chunk_info(5).byte_offset
    with open(path, "r+b") as f:
        f.seek(at + 40)
        f.write(b"\xff\x00\xff\x00")


def folder(path):
    path.mkdir()


def pipe(path):
    os.mkfifo(path)


def zero_rows(path):
    with h5py.File(path, "w") as f:
        f["image"], f["subject"] = np.zeros((0, H, H), np.uint8), np.zeros(0, "S1")


def never_written(path):
    with h5py.File(path, "w") as f:
        f.create_dataset("image", (N, H, H), "u1", chunks=(1, H, H))
        f["subject"] = ["a"] * N


def bomb(path):  # a few kB that declare 4 TB
    with h5py.File(path, "w") as f:
        f.create_dataset("image", (4_000_000, 1000, 1000), "u1", chunks=(1, 1000, 1000))[0] = 1
        f["subject"] = ["a"] * N


def wide_bomb(path):  # 20 kB that inflate to 100 GB an image
    with h5py.File(path, "w") as f:
        f.create_dataset("image", (2, 100_000, 1_000_000), "u1", chunks=(1, 1000, 1000), compression="gzip")[0, 0, 0] = 1
        f["subject"] = ["a", "b"]


def name_bomb(path):  # ids of 1 GB each
    make(path)
    with h5py.File(path, "a") as f:
        del f["subject"]
        f.create_dataset("subject", (N,), "S1000000000", chunks=(1,), compression="gzip").id.set_extent((N,))
        f["subject"].id.write_direct_chunk((0,), b"x")


def many_bomb(path):  # 300 million rows in a few kB
    with h5py.File(path, "w") as f:
        for name, shape in (("image", (300_000_000, 1, 1)), ("subject", (300_000_000,))):
            f.create_dataset(name, shape, "u1", chunks=(1_000_000, *shape[1:]), compression="gzip")[0] = 1


@pytest.mark.parametrize("build, words", [
    (wide_bomb, ["image", "1e+11 bytes"]), (name_bomb, ["subject", "1e+09 bytes"]), (many_bomb, ["300000000 rows"]),
    (lambda path: None, ["no such file"]), (garbage, ["not an HDF5 file"]), (empty, ["empty (0 bytes)"]),
    (eight_bytes, []), (truncated, ["truncated: has", "bytes"]), (flipped, ["image[", "damaged"]),
    (folder, ["without .h5"]), (pipe, ["not a regular file"]), (zero_rows, ["image", "no pixel"]),
    (never_written, ["image", "never written"]), (bomb, ["image", "4000 GB"])])
def test_bad_files(tmp_path, capsys, build, words):
    path = tmp_path / "bad.h5"
    build(path)
    one_error(capsys, lambda: data.check(path), path, *words)


def test_unreadable_and_locked_files(tmp_path, capsys, monkeypatch):
    path, real = make(tmp_path / "a.h5"), h5py.File

    def locked(name, mode, locking=None):
        if locking is None:
            raise BlockingIOError(11, "Unable to synchronously open file (unable to lock file, errno = 11)")
        return real(name, mode, locking=locking)
    monkeypatch.setattr(h5py, "File", locked)
    assert len(data.load(path)) == N  # another program has it open: read without a lock

    def forbidden(*_):  # root may read everything, so chmod would not do
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(h5py, "File", forbidden)
    one_error(capsys, lambda: data.load(path), path, "no permission")


@pytest.mark.parametrize("kind", ["external link", "soft link", "external storage", "virtual"])
def test_nothing_outside_the_file_is_read(tmp_path, kind):
    """The target is a pipe: whoever opened it would hang until the timeout."""
    path, target = tmp_path / "bad.h5", tmp_path / "target"
    os.mkfifo(target)
    with h5py.File(path, "w") as f:
        f["subject"] = ["a"] * N
        f["real"] = columns()["image"]
        if kind == "external link":
            f["image"] = h5py.ExternalLink(str(target), "image")
        elif kind == "soft link":
            f["image"] = h5py.SoftLink("/real")
        elif kind == "external storage":
            dcpl = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            dcpl.set_external(str(target).encode(), 0, N * H * H)
            space = h5py.h5s.create_simple((N, H, H))
            h5py.h5d.create(f.id, b"image", h5py.h5t.NATIVE_UINT8, space, dcpl)
        else:
            layout = h5py.VirtualLayout((N, H, H), "u1")
            layout[:] = h5py.VirtualSource(str(target), "image", (N, H, H))
            f.create_virtual_dataset("image", layout)
    done = subprocess.run([sys.executable, ROOT / "data.py", "check", path], capture_output=True,
                          text=True, timeout=60)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert str(path) in lines[0] and "image: a " in lines[0] and "refused" in lines[0]


@pytest.mark.parametrize("stored", [
    ["none", "scar"], "none, scar", np.bytes_(b"none,scar"), np.array([b"none", b"scar"])])
def test_names_are_a_list_of_text_however_they_are_stored(tmp_path, stored, capsys):
    path = make(tmp_path / "a.h5", mask=columns()["mask"] % 2)
    with h5py.File(path, "a") as f:
        f["mask"].attrs["mask_names"] = f.attrs["label_names"] = stored
    d = data.load(path)
    assert d.attrs["mask_names"] == d.label_names == ["none", "scar"]
    data.summary(path)
    assert "label: none 6, scar 6" in capsys.readouterr().out
    with h5py.File(path, "a") as f:
        f["mask"].attrs["mask_names"] = f.attrs["label_names"] = 5
        f.attrs["empty_names"] = h5py.Empty("S1")
    data.summary(path)


def test_a_class_has_one_number_in_all_files(tmp_path, capsys):
    """[healthy, ill] in one file and [ill, healthy] in the other would train on half of the labels inverted."""
    a, b = make(tmp_path / "a.h5"), make(tmp_path / "b.h5", subject=np.repeat(["e", "f", "g", "h"], 3))
    for path, names in ((a, ["healthy", "ill"]), (b, ["ill", "healthy"])):
        with h5py.File(path, "a") as f:
            f.attrs["label_names"] = names
    one_error(capsys, lambda: data.load(tmp_path), "b.h5", "label_names", "['ill', 'healthy']", "a.h5")
    one_error(capsys, lambda: data.load_study(a, b), "b.h5", "label_names", "['ill', 'healthy']", "a.h5")
    with h5py.File(b, "a") as f:
        f.attrs["label_names"] = ["healthy", "infarct"]     # other words for the same number: their choice
    assert len(data.load_study(a, b)[0]) == 2 * N


def test_folder_of_mixed_files(tmp_path, capsys):
    make(tmp_path / "a.h5")
    make(tmp_path / "b.h5", image=columns()["image"][:, :8, :8], mask=None)
    one_error(capsys, lambda: data.load(tmp_path), "a.h5", "b.h5", "(8, 8)", "(16, 16)")
    make(tmp_path / "b.h5", age=None)
    one_error(capsys, lambda: data.load(tmp_path), "a.h5", "b.h5", "age")
    make(tmp_path / "b.h5")
    (tmp_path / "._b.h5").write_bytes(b"Mac OS X")
    assert len(data.load(tmp_path)) == 2 * N


def test_volumes_and_warnings(tmp_path, capsys):
    x = np.random.default_rng(0).integers(0, 255, (N, 6, 8, 10), dtype=np.uint8)
    x[3] = 7
    path = make(tmp_path / "v.h5", image=x, mask=None)
    assert data.load(path).image.shape == x.shape
    assert any("1 constant images, rows 3" in w for w in data.check(path))
    capsys.readouterr()
    one_error(capsys, lambda: data.load(path, size=8), path, "image", "not resized")


def test_a_failed_write_leaves_the_old_file(tmp_path, capsys, monkeypatch):
    path = tmp_path / "keep.h5"
    make(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(data.os, "replace", full)
    one_error(capsys, lambda: make(path, seed=1), path, "No space left")
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["keep.h5"]
    one_error(capsys, lambda: make(tmp_path / "no" / "where.h5"), "where.h5", "cannot be written")


# ---------------------------------------------------------------- command line

def test_command_line(tmp_path, capsys, monkeypatch):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, words)])
        data.main()
        return capsys.readouterr().out
    path = tmp_path / "h.h5"
    run("phantom", "hearts", path, "--subjects", 4, "--size", 64)
    out = run("check", path)
    assert "4 subjects" in out and "64 x 64" in out and out.endswith("ok\n")
    run("show", path, "--out", tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 10_000
    for words in (["check"], ["phantom", "lungs", path], ["chck"], ["check", path, "--fast"],
                  ["phantom", "hearts", path, "--subjects", "0"], ["show", path, "--out", path / "x.png"],
                  ["phantom", "hearts", tmp_path / "no" / "x.h5"], ["phantom", "views", path, "--seed", "-1"],
                  ["phantom", "hearts", path, "--jitter", "nan"], ["emidec", tmp_path, path, "--spacing", "0"]):
        one_error(capsys, lambda: run(*words))


def test_a_reader_who_leaves_is_no_traceback(tmp_path):
    path = make(tmp_path / "a.h5")
    command = f'{sys.executable} {ROOT / "data.py"} check {path} | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == ""


# ---------------------------------------------------------------- load_study

def test_study_with_a_test_file_trains_on_one_and_tests_on_the_other(tmp_path):
    a = make(tmp_path / "a.h5", subject=np.array([f"a{i}" for i in range(N)]))
    b = make(tmp_path / "b.h5", subject=np.array([f"b{i}" for i in range(N)]), seed=1, extra=np.arange(N, dtype=np.float32))
    joined, part = data.load_study(a, b)
    assert (part[:N] != "test").all() and (part[N:] == "test").all() and {"train", "val"} == set(part[:N])
    assert np.array_equal(joined.image[N:], data.load(b).image) and "extra" not in joined.columns
    assert len(joined.columns["age"]) == 2 * N
    alone, part = data.load_study(a)
    assert np.array_equal(part, data.split(alone, 0))


def test_healthy_people_without_survival_do_not_hide_that_of_the_patients_tested(tmp_path):
    died = dict(time=np.arange(1, N + 1, dtype=np.float32), event=np.arange(N) % 2)
    a = make(tmp_path / "a.h5", subject=np.array([f"a{i}" for i in range(N)]))
    b = make(tmp_path / "b.h5", subject=np.array([f"b{i}" for i in range(N)]), **died)
    columns_of = data.load_study(a, b)[0].columns
    assert np.isnan(columns_of["time"][:N]).all() and np.array_equal(columns_of["time"][N:], died["time"])
    assert np.array_equal(columns_of["event"], [*[0] * N, *died["event"]])
    assert {"time", "event"}.isdisjoint(data.load_study(b, a)[0].columns)


def test_study_refuses_a_subject_of_both_files(tmp_path, capsys):
    a = make(tmp_path / "a.h5")
    b = make(tmp_path / "b.h5", subject=np.repeat(["x", "y", "c", "z"], 3))
    one_error(capsys, lambda: data.load_study(a, b), "b.h5", "c", "one part")


def test_ids_that_differ_in_case_alone(tmp_path, capsys):
    a = make(tmp_path / "a.h5", subject=np.repeat(["P1", "p1 ", "c", "caf\u00e9"], 3))
    assert any("P1, p1" in w for w in data.load(a).warnings)
    b = make(tmp_path / "b.h5", subject=np.repeat(["x", "y", "z", "cafe\u0301"], 3))
    assert data.load(b).warnings == []
    capsys.readouterr()
    with pytest.raises(SystemExit):
        data.load_study(a, b)
    said = capsys.readouterr().err
    assert "b.h5: subject: 1 are also in" in said and "caf\u00e9" in said


def test_study_refuses_what_is_not_square_unless_a_size_is_asked_for(tmp_path, capsys):
    a = make(tmp_path / "a.h5", image=np.random.default_rng(0).integers(0, 255, (N, 16, 24), dtype=np.uint8), mask=None)
    one_error(capsys, lambda: data.load_study(a, size=16, square=True), "a.h5", "--size 16")
    assert data.load_study(a, size=16, square=False)[0].image.shape == (N, 16, 16)


def test_loader_of_some_rows_counts_in_them(tmp_path):
    path = make(tmp_path / "a.h5")
    rows = np.array([7, 2, 9])
    for limit in (8.0, 0.0):
        loader = data.Loader({"image": data.load(path).image}, "cpu", rows, limit)
        assert len(loader) == 3
        expected = data.load(path).image[rows[[2, 0]]] / 127.5 - 1
        assert abs(loader.batch([2, 0])["image"][:, 0].numpy() - expected).max() < 1e-6
        assert abs(next(loader.stream([np.array([2, 0])]))["image"][:, 0].numpy() - expected).max() < 1e-6
