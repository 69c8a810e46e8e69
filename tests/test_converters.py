"""Converters: layouts and traps of EMIDEC, ACDC and M&Ms-2; head scans of a table, where left stays left and
a mm stays a mm; anyone's own images. What they write passes check."""
import os
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image

import data
from conftest import one_error

nibabel = pytest.importorskip("nibabel")


# ---------------------------------------------------------------- EMIDEC

def emidec_case(root, name, centre, zoom, radius=20.0, suffix=".nii.gz", text=None, scar=True, spike=0.0):
    """A disc of 1s in a ring of 2s (outer radius in mm), scar on one side; float64 labels, wrong affine."""
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
    for s, radius in (("Case_N006", 20), ("Case_P007", 20), ("Case_P008", 25)):  # mm: zooms, not affine
        m = d.mask[d.subject == s][0]
        assert abs(np.sqrt((m > 0).sum() / np.pi) - radius) < 0.5
        assert abs(np.argwhere(m > 0).mean(0) - 63.5).max() < 1.5  # cropped around the heart
    n = d.subject == "Case_N006"
    bright = [x[m == 1].mean() for x, m in zip(d.image[n], d.mask[n])]
    assert abs(bright[1] / bright[0] - 0.5) < 0.15 and bright[0] > 230  # one window for all slices
    scar = d.image[d.subject == "Case_P008"][0][d.mask[d.subject == "Case_P008"][0] == 3]
    assert scar.mean() > 200  # one hot voxel does not dim the heart
    i, j = (np.argwhere(d.mask[d.subject == "Case_P007"][0] == v).mean(0) for v in (3, 2))
    assert i[1] > j[1] + 8 and abs(i[0] - j[0]) < 2  # axes neither swapped nor flipped


# ---------------------------------------------------------------- ACDC, M&Ms-2

SHAPE, ZOOM = (60, 50), (1.0, 2.0)                               # 60 x 100 mm: rows are the second axis


def cine(folder, name, ids=(0, 1, 2, 3), slices=3, radius=18.0, extra=None, flat=False):
    """LV disc in a ring, RV disc to its left, round in mm; labels as ids says; one slice without heart."""
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
    root, out = tmp_path / "database", tmp_path / "out"
    acdc_patient(root, "training", "patient001")
    acdc_patient(root, "testing", "patient101", info="ED: 1\nES: 12\n")  # no group
    acdc_patient(root, "training", "patient002", extra=4)  # a fifth value
    acdc_patient(root, "training", "patient003", info="ED: 1\nES: 9\nGroup: NOR\n")  # frame09 is missing
    acdc_patient(root, "training", "patient004", info="Group: NOR\n")
    acdc_patient(root, "training", "patient005", flat=True)  # no heart anywhere
    acdc_patient(root, "training", "patient006")
    broken = root / "training" / "patient006" / "patient006_frame12.nii.gz"
    broken.write_bytes(broken.read_bytes()[:300] + b"\xff" * 40 + broken.read_bytes()[340:])
    acdc_patient(tmp_path / "bad", "training", "patient001", flat=True)
    one_error(capsys, lambda: data.acdc(str(tmp_path / "bad"), str(out)), "bad: none of 1")
    data.acdc(str(root), str(out))
    said = capsys.readouterr().out
    whys = ("_gt holds [0.", "frame09.nii.gz", "no frame numbers ED and ES", "some heart", "")
    for k, why in enumerate(whys, 2):
        line = [x for x in said.splitlines() if x.startswith(f"skipped patient{k:03d}: ")]
        assert len(line) == 1 and why in line[0], (why, said)
    assert "2 subjects, 5 skipped" in said
    assert sorted(os.listdir(out)) == ["patient001.h5", "patient101.h5"]
    d = data.load(out)                                           # a folder is one data set
    assert d.image.shape == (8, 256, 256) and data.check(out)
    assert d.attrs["mask_names"] == data.CINE and "1 RV" in d.attrs["source"]
    assert [d.label_names[k] for k in d.columns["label"][[0, -1]]] == ["HCM", "unknown"]
    assert d.columns["phase"].tolist() == [0, 0, 1, 1] * 2 and d.columns["slice"].tolist() == [1, 2] * 4
    assert not d.columns["view"].any() and list(d.subject) == ["patient001"] * 4 + ["patient101"] * 4
    for row in (0, 1, 2, 3):
        heart_is_upright_and_round(d, row, (18, 18, 12, 12)[row])
    assert d.label_names == ["DCM", "HCM", "MINF", "NOR", "RV", "unknown"]


def test_mms_layout_and_traps(tmp_path, capsys):
    root, out = tmp_path / "MnM2", tmp_path / "out"
    for k in (1, 2, 4):
        mms_subject(root, f"{k:03d}")
    mms_subject(root, "003", extra=5)
    os.remove(root / "dataset" / "004" / "004_LA_ES_gt.nii.gz")
    blank = ",,,,\r\n"
    (root / "dataset_information.csv").write_text(
        "\ufeffSUBJECT_CODE,DISEASE,VENDOR,SCANNER,FIELD\r\n1,NOR,SIEMENS,Avanto,1.5\r\n" + blank * 30_000
        + "2,FALL,GE MEDICAL SYSTEMS,Signa,1.5\r\n" + blank * 3, encoding="utf-8")
    data.mms(str(root), str(out))
    said = capsys.readouterr().out
    assert "skipped 003: 003_SA_ED_gt holds" in said
    assert "skipped 004: no " in said and "004_LA_ES_gt" in said
    d = data.load(out)
    c = d.columns
    assert d.image.shape == (12, 256, 256) and data.check(out)
    assert list(d.subject[::6]) == ["001", "002"]
    assert d.label_names == ["FALL", "NOR", "unknown"] and c["label"][::6].tolist() == [1, 0]
    assert c["view"][:6].tolist() == [0, 0, 0, 0, 1, 1] and c["phase"][:6].tolist() == [0, 0, 1, 1, 0, 1]
    for row, radius in ((0, 18), (2, 12), (4, 18), (5, 12)):
        heart_is_upright_and_round(d, row, radius)  # as ACDC's
    assert d.image[0].max() == 255 and d.image[1, :, :50].max() == 0  # window; padding


# ---------------------------------------------------------------- volumes

SMALL = dict(spacing=6.0, shape=(32, 40, 32))  # 192 x 240 x 192 mm in a few voxels


def head(shape=(32, 38, 30), zooms=5.0, at=(0, 0, 0), radius=22.0, spot=(-28, 35, 22)):
    """(X,Y,Z) towards right, anterior, superior: an ellipsoid of 100s in 0s, a ball of 300s at `spot` mm of
    its centre `at` (mm from the middle): on the left, in front, above. Edges are soft: partial volume."""
    mm = np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * z - a for n, z, a in
                       zip(shape, np.broadcast_to(zooms, 3), at)], indexing="ij")
    ellipsoid = np.sqrt(sum((m / r) ** 2 for m, r in zip(mm, (62, 76, 58))))
    ball = np.sqrt(sum((m - s) ** 2 for m, s in zip(mm, spot)))
    soft = np.mean(np.broadcast_to(zooms, 3))
    x = 100 * np.clip((1 - ellipsoid) * 62 / soft + 0.5, 0, 1)
    return x + (300 - x) * np.clip((radius - ball) / soft + 0.5, 0, 1)


def save(path, x, zooms=5.0, axes="RAS", turn=np.eye(3)):
    """Store towards-RAS voxels as NIfTI with other axes, and the affine that says so."""
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(np.broadcast_to(zooms, 3))
    way = nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("RAS"),
                                              nibabel.orientations.axcodes2ornt(axes))
    affine = affine @ nibabel.orientations.inv_ornt_aff(way, x.shape)
    nibabel.save(nibabel.Nifti1Image(nibabel.apply_orientation(x, way).astype(np.float32), affine), path)
    return str(path)


def convert(folder, header, rows, name="out.h5", **options):
    """Write a CSV, convert it, load the result."""
    folder = Path(folder)
    (folder / "table.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    data.volumes(str(folder / "table.csv"), str(folder / name), **(SMALL | options))
    return data.load(str(folder / name))


def one(folder, x, **options):
    save(folder / "a.nii", x)
    return convert(folder, "path,subject", ["a.nii,s"], **options).image[0]


def test_every_order_of_axes_lands_in_the_same_corner(tmp_path):
    zooms = (5.0, 4.0, 6.0)
    x = head((34, 46, 26), zooms)
    codes = ["RAS", "LAS", "PSR", "ILA", "SPL", "AIR"]
    for k, axes in enumerate(codes):
        save(tmp_path / f"{axes}.nii{'.gz' * (k % 2)}", x, zooms, axes)
    tilt = np.deg2rad(12)
    turn = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    save(tmp_path / "oblique.nii.gz", x, zooms, "LPS", turn)
    rows = [f"{a}.nii{'.gz' * (k % 2)},{a}" for k, a in enumerate(codes)]
    d = convert(tmp_path, "path,subject", [*rows, "oblique.nii.gz,o"])
    assert d.image.shape == (7, 32, 40, 32)
    for image in d.image:
        assert abs(image.astype(int) - d.image[0]).max() <= 1
    ball = np.argwhere(d.image[0] > 180).mean(0)  # at left 28, anterior 35, superior 22 mm
    middle = np.array([15.5, 19.5, 15.5])
    assert abs((ball - middle) * 6 - [22, -35, -28]).max() < 3


def test_spacing_of_the_header_keeps_volumes_in_mm(tmp_path):
    zooms, radius = (1.4, 1.7, 4.0), 27.0
    x = head((110, 110, 40), zooms, radius=radius, spot=(0, 0, 0))
    save(tmp_path / "a.nii.gz", x, zooms, "PSR")
    for spacing in (1.5, 3.0):
        d = convert(tmp_path, "path,subject", ["a.nii.gz,s"], spacing=spacing, shape=(60, 80, 60))
        inner, outer = (np.median(d.image[0][d.image[0] > t]) for t in (200, 20))
        count = (d.image[0] > (inner + outer) / 2).sum()
        assert abs(count * spacing ** 3 / (4 / 3 * np.pi * radius ** 3) - 1) < 0.02
        assert d.attrs["spacing_mm"] == [spacing] * 3


def test_cropped_and_padded_around_the_head(tmp_path):
    far = one(tmp_path, head((60, 60, 60), at=(40, -50, 35)))
    near = one(tmp_path, head())
    for image in (far, near):
        ends = np.array([np.flatnonzero(image.any(axes))[[0, -1]] for axes in ((1, 2), (0, 2), (0, 1))])
        assert abs(ends.mean(1) - [15.5, 19.5, 15.5]).max() <= 1
    assert abs((far > 50).sum() / (near > 50).sum() - 1) < 0.03
    assert near[:3].max() == 0 and near[:, :3].max() == 0  # padded: the input ends before the frame
    x = head((32, 38, 60), at=(0, 0, 70))
    x[12:20, 14:24, :30] = 100  # a neck that ends at the lower edge of a tall image
    with_neck = one(tmp_path, x, shape=(24, 40, 32))
    assert with_neck[-1].max() < 60 and with_neck[-2].max() > 0  # the crown is inside, the neck is not


def test_grey_window(tmp_path):
    noise = np.random.default_rng(0).rayleigh(1.0, (32, 38, 30))
    x = head()
    plain = one(tmp_path, x + noise)
    assert plain.max() == 255 and (plain[:2] == 0).all() and (plain[:, :, -2:] == 0).all()
    x[3, 3, 3] = 1e6  # one hot voxel in the air
    assert abs(one(tmp_path, x + noise).astype(int) - plain).mean() < 1
    brain = head() > 50
    x = np.where(brain, (head() + noise - 120) / 60, 0)  # z-scores: the background lies between the greys
    scored = one(tmp_path, x)
    assert (scored[:2] == 0).all() and np.corrcoef(scored.ravel(), plain.ravel())[0, 1] > 0.9


def test_columns_of_the_table(tmp_path, capsys):
    save(tmp_path / "a.nii", head())
    table = ("\ufeffPath ; SUBJECT; Age;Diagnosis;session;sex;time;event;MMSE;site;A/B;empty;\n"
             "a.nii;s1;63,5;CN;0;Male;;;29;x;1;;\n"
             "\n"
             ";;;;;;;;;;;;\n"
             'a.nii;s1;n/a;cn;6;M;;;NaN;"y;z";2;;\n'
             "a.nii;s2;70;MCI;12;female;100;1;20;;3;;\n"
             f"{tmp_path}/a.nii;s2;71;AD;18;F;50;0;15;;4;;\n"
             "a.nii;s3;72;ad;12,5;?;50;0;15;;5;;\n")
    (tmp_path / "t.csv").write_text(table, encoding="utf-8")
    data.volumes(str(tmp_path / "t.csv"), str(tmp_path / "t.h5"), **SMALL)
    said = capsys.readouterr()
    assert "line 2: site: 'x' is no number: column ignored" in said.err
    d = data.check(str(tmp_path / "t.h5"))
    assert d.subject.tolist() == ["s1", "s1", "s2", "s2", "s3"]
    assert d.columns["label"].tolist() == [0, 0, 2, 1, 1] and d.label_names == ["healthy", "AD", "MCI"]
    assert d.columns["session"].tolist() == [0, 6, 12, 18, 12.5]
    np.testing.assert_array_equal(d.columns["age"], np.float32([63.5, np.nan, 70, 71, 72]))
    assert d.columns["sex"].tolist() == ["M", "M", "F", "F", ""]
    np.testing.assert_array_equal(d.columns["time"], [np.nan, np.nan, 100, 50, 50])
    assert d.columns["event"].tolist() == [0, 0, 1, 0, 0]
    np.testing.assert_array_equal(d.columns["mmse"], [29, np.nan, 20, 15, 15])
    assert d.columns["a_b"].tolist() == [1, 2, 3, 4, 5] and "empty" not in d.columns
    d = convert(tmp_path, "path,subject,diagnosis,label,split", ["a.nii,a,AD,1,train", "a.nii,b,CN,3,TEST"])
    assert d.columns["label"].tolist() == [1, 3] and d.label_names == []  # label wins
    assert d.split.tolist() == ["train", "test"]


@pytest.mark.parametrize("text, words", [
    ("path,subject\n", ["no rows"]),
    ("path,subject\n,b\n", ["none of 1", "line 2: : no such file"]),
    ("paths,subject\na,b\n", ["no column path", "paths, subject"]),
    ("path,subject,Age,age\na,b,1,2\n", ["several columns", "age"]),
    ("path,subject,a b,a_b\na,b,1,2\n", ["several columns", "a_b"]),       # else one overwrites the other
    ("path,subject\na,b\na,b,c\n", ["line 3", "saw 3"]),
    ("path,subject,age\na,b,1\na,c,old\n", ["line 3", "age", "'old'"]),
    ("path,subject,age\na,b,inf\n", ["line 2", "age", "infinite"]),
    ("path,subject,session\na,b,M06\n", ["line 2", "session", "'M06' is no number"]),
    ("path,subject,session\na,b," + "9" * 50 + "\n", ["line 2", "session", "infinite"]),
    ("path,subject,session\na,b,06\n\nx,b,6\n", ["line 4", "subject b"]),
    ("path,subject\na,b\nx,b\n", ["line 3", "subject b", "column session"]),
    ("path,subject\na," + "b" * 201 + "\n", ["line 2", "longer than 200"]),
    ("path,subject,time,event\na,b,5,1\na,c,0,1\n", ["line 3", "time", "> 0"]),
    ("path,subject,time,event\na,b,5,1\na,c,9,\n", ["line 3", "event", "neither 0"]),
    ("path,subject,label\na,b,AD\n", ["line 2", "label", "'AD'", "diagnosis"]),
    ("path,subject,label\na,b,3000000000\n", ["line 2", "label", "2147483647"]),
    ("path,subject,diagnosis\na,b,AD\na,c,\n", ["line 3: diagnosis: missing"]),
    ("path,subject,split\na,b,train\na,c,dev\n", ["line 3", "split", "dev"]),
    ("path,subject,session,split\na,b,0,train\na,b,6,test\n", ["more than one part: b"]),
    ("path,subject\nmissing.nii,b\n", ["none of 1", "line 2", "missing.nii: no such file"]),
], ids=lambda x: x[0] if isinstance(x, list) else "")
def test_a_wrong_table_is_one_line(tmp_path, capsys, text, words):
    """What is written passes check: what check would refuse is refused before anything is read."""
    (tmp_path / "t.csv").write_text(text)
    one_error(capsys, lambda: data.volumes(str(tmp_path / "t.csv"), str(tmp_path / "t.h5"), **SMALL), *words)
    assert os.listdir(tmp_path) == ["t.csv"]  # nothing is left


def test_every_skipped_row_has_its_line_and_reason(tmp_path, capsys):
    x = head()
    save(tmp_path / "good.nii.gz", x)
    whole = (tmp_path / "good.nii.gz").read_bytes()
    (tmp_path / "short.nii.gz").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.nii").write_text("no image")
    damaged = nibabel.Nifti1Image(x.astype(np.float32), np.diag([5.0, 5, 5, 1]))
    nibabel.save(damaged, tmp_path / "flat.nii")
    raw = bytearray((tmp_path / "flat.nii").read_bytes())
    raw[80:92] = np.float32([5, 0, 5]).tobytes()  # pixdim, as no library would write it
    (tmp_path / "flat.nii").write_bytes(raw)
    for name, y in dict(nan=np.where(x > 290, np.nan, x), black=x * 0, mask=x > 50, fine=x).items():
        save(tmp_path / f"{name}.nii", y)
    for name, y in dict(plane=x[0], deep=x[..., None, None]).items():
        nifti = nibabel.Nifti1Image(y.astype(np.float32), np.diag([5.0, 5, 5, 1]))
        nibabel.save(nifti, tmp_path / f"{name}.nii")
    cases = [  # path, what the reason says; None is converted
        ("good.nii.gz", None), ("gone.nii.gz", "no such file"), ("short.nii.gz", ""), ("text.nii", ""),
        ("flat.nii", "spacing"), ("plane.nii", "expected one volume"), ("nan.nii", "NaN or Inf"),
        ("black.nii", "no brain"), ("mask.nii", "no brain"), ("fine.nii", None), ("deep.nii", None)]
    d = convert(tmp_path, "path,subject", [f"{p},s{i}" for i, (p, _) in enumerate(cases)])
    said = capsys.readouterr().out.splitlines()
    for i, (path, why) in enumerate(cases):
        lines = {text for text in said if text.startswith(f"skipped line {i + 2}: ")}
        assert len(lines) == (why is not None), (path, lines)
        assert all(path in t and (why or "") in t and len(t) > 20 + len(path) for t in lines), lines
    assert d.subject.tolist() == ["s0", "s9", "s10"] and (d.image == d.image[0]).all()


def test_memory_does_not_grow_with_the_table(tmp_path):
    save(tmp_path / "a.nii", head())
    rows = [f"a.nii,s{k}" for k in range(40)]
    (tmp_path / "t.csv").write_text("\n".join(["path,subject", *rows]))
    tracemalloc.start()
    data.volumes(str(tmp_path / "t.csv"), str(tmp_path / "o.h5"), spacing=3.0, shape=(96, 96, 96))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < data.load(str(tmp_path / "o.h5")).image.nbytes / 2


# ---------------------------------------------------------------- images

def images(path, size, **options):
    data.images(str(path), f"{path}.h5", size=size, **options)
    return data.check(f"{path}.h5")


def windowed(x):
    low, high = np.percentile(x, [0.5, 99.5])
    return np.rint(255 * np.clip((np.asarray(x) - low) / (high - low), 0, 1))


def test_greys_of_a_folder(tmp_path, capsys):
    """16 bits keep their range, colours become Pillow's grey, all images of a subject share one window."""
    folder, ramp = tmp_path / "in", np.arange(400, dtype=np.uint16).reshape(20, 20) * 160
    (folder / "ramp" / "deep").mkdir(parents=True)
    a, b = Image.fromarray(ramp), Image.fromarray(ramp // 2)
    a.save(folder / "ramp" / "A.PNG")
    a.save(folder / "ramp" / "deep" / "pages.tif", save_all=True, append_images=[b])
    np.save(folder / "ramp" / "z.npy", ramp * -1.5)
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 4), np.uint8))
    rows = {b"\xff_1.png": colours, b"q.bmp": colours.convert("RGB"), b"r_x_y.tif": colours.convert("P")}
    for name, picture in (rows | {b".hidden.png": a, b"other.gif": colours.convert("P")}).items():
        picture.save(folder / os.fsdecode(name))
    a.save(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    d = images(folder, 20, slice="axial:1:")        # of the pages, not of what is an image alone
    said = capsys.readouterr().out
    assert "7 images; 2 hidden" in said and "4 subjects, 6 images of 20 x 20, 1 skipped" in said
    assert "skipped link.png: a link that leads out" in said
    assert d.subject.tolist() == ["\\xff", "q", "r", *["ramp"] * 3] and "spacing_mm" not in d.attrs
    assert d.columns["slice"].tolist() == [0, 0, 0, 0, 1, 0]
    assert (d.image[3:] == windowed([ramp, ramp // 2, ramp * -1.5])).all()
    for image, picture in zip(d.image, rows.values()):
        assert (image == windowed(picture.convert("RGB").convert("L"))).all()


@pytest.mark.parametrize("axes", ["RAS", "LAS", "PSR"])
def test_slices_of_a_volume_stand_upright(tmp_path, axes):
    x = np.random.default_rng(0).normal(size=(16, 16, 16)).astype(np.float32)       # towards R, A, S
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / "s.nii.gz", x, 2.0, axes)
    for cut, number, expected in (("axial:mid", 8, x[:, ::-1, 8]), ("axial:-1:", 15, x[:, ::-1, 15]),
                                  ("coronal:3:4", 3, x[:, 12, ::-1]), ("sagittal:3:4", 3, x[3, ::-1, ::-1])):
        d = images(tmp_path / "in", 17, slice=cut, spacing=2.0)     # pixels stay as sharp as they were
        assert (d.image[0, 1:, 1:] == windowed(expected.T)).all() and d.columns["slice"] == [number], cut
        assert d.attrs["spacing_mm"] == [2.0, 2.0]


def test_two_diagnoses_are_class_0_and_class_1(tmp_path):
    for texts, classes in ((["DCM", "HCM"], [0, 1]), (["1", "0"], [1, 0]), (["Yes", "no"], [1, 0]), (["AD", "CN"], [1, 0])):
        table = pandas.DataFrame(dict(path=["a.png", "b.png"], subject=["a", "b"], diagnosis=texts))
        table.to_csv(tmp_path / "t.csv", index=False)
        _, columns, attrs = data.list_table(str(tmp_path / "t.csv"))
        assert columns["label"].tolist() == classes and len(attrs["label_names"]) == 2


def test_images_of_a_table(tmp_path, capsys):
    """NIfTI keeps its mm whatever its pixels, a picture fills the frame; slices have their line's columns."""
    for name, shape, zooms in (("a.nii", (90, 70), (1.0, 1.4)), ("b.nii", (60, 40), (2.0, 3.0))):
        mm = np.meshgrid(*((np.arange(n) - (n - 1) / 2) * z for n, z in zip(shape, zooms)), indexing="ij")
        save(tmp_path / name, (np.hypot(*mm) < 25)[..., None] * [7.0, 0, 7], (*zooms, 9.0))
    wrong = dict(flat=np.ones((20, 50)), nan=np.diag([np.nan] * 9), rgb=np.random.rand(9, 9, 3))
    for name, x in wrong.items():
        np.save(tmp_path / f"{name}.npy", x)
    np.save(tmp_path / "c.npy", np.arange(2000).reshape(50, 40) % 2 + np.eye(50, 40))
    rows = "path,subject,diagnosis,dose", "a.nii,s1,AD,1", "c.npy,s2,CN,2", "b.nii,s1,CN,3"
    (tmp_path / "t.csv").write_text("\n".join([*rows, *(f"{name}.npy,s,CN,4" for name in wrong)]))
    for spacing, mm in ((0.0, (98 + 120) / 2 / 64), (2.5, 2.5)):
        d = images(tmp_path / "t.csv", 64, spacing=spacing)
        said = capsys.readouterr().out
        assert d.subject.tolist() == ["s1"] * 4 + ["s2"] and d.columns["dose"].tolist() == [1, 1, 3, 3, 2]
        assert d.columns["label"].tolist() == [1, 1, 0, 0, 0] and d.label_names == ["healthy", "AD"]
        assert d.columns["path"].tolist() == ["a.nii"] * 2 + ["b.nii"] * 2 + ["c.npy"]
        for text in ("line 5: flat.npy: 20 x 50", "line 6: nan.npy: NaN", "line 7: rgb.npy: float64 (9,",
                     "3 images that are not square were", "2 images of one grey value were left out"):
            assert text in said
        assert ("2 images were cropped" in said) == (spacing == 0)      # b.nii is 120 mm wide
        for x in d.image[:4]:
            assert abs(np.sqrt((x / 255.0).sum() / np.pi) * mm - 25) < 0.6
            assert abs(np.argwhere(x > 127).mean(0) - 31.5).max() < 1.1
        assert d.image[4, :, :6].max() == 0 and d.image[4, :, 7:57].max(0).min() > 0
    for flags, words in (({"slice": "axial:-"}, "--slice axial:-"), ({"spacing": np.nan}, "--spacing nan"),
                         ({"out": str(tmp_path / "a.nii")}, "a.nii: expected the name of a new")):
        flags = dict(path=str(tmp_path / "t.csv"), out=str(tmp_path / "new.h5")) | flags
        one_error(capsys, lambda: data.images(**flags), words)
    (tmp_path / "t.csv").write_text("path,subject\na.nii,s\na.nii,t\n")
    one_error(capsys, lambda: images(tmp_path / "t.csv", 64), "line 3", "a.nii is listed twice")


def spoil(path, rng):
    """Damage one file, or put something else in its place."""
    old, at = path.read_bytes(), rng.integers(1, 99)
    path.unlink()
    rng.choice([
        lambda: os.mkfifo(path),
        lambda: path.mkdir(),
        lambda: path.symlink_to(rng.choice([__file__, path, "/dev/zero"])),
        lambda: np.save(f"{path}.npy", rng.choice([np.nan, 1, 1j]) * np.ones(rng.integers(1, 9, at % 5))),
        lambda: Path(f"{path}{rng.choice(['.png', '.npy', '.nii', '.nii.gz', '.bmp'])}").write_bytes(old),
        lambda: (path.parent / os.fsdecode(rng.choice([b"\xff\n.png", b" .png"]))).write_bytes(old),
        lambda: path.write_bytes(old[:at]),
        lambda: path.write_bytes(bytes(at)),
        lambda: path.write_bytes(old[:at] + rng.bytes(4) + old[at + 4:]),
        lambda: path.write_bytes(old[:16] + b"\x7f\xff\xff\xff" * 2 + old[24:]),       # the size of a PNG
    ])()


@pytest.mark.parametrize("seed", range(16))
def test_damage_is_skipped_or_one_line(tmp_path, capsys, monkeypatch, seed):
    rng, folder, out = np.random.default_rng(seed), tmp_path / "in", tmp_path / "o.h5"
    (folder / "P").mkdir(parents=True)
    paths = [folder / name for name in ("P/a.png", "P/b.tif", "f.jpg", "c_1.npy", "d.nii", "e.nii.gz")]
    x = head()
    for path in paths[:3]:
        Image.fromarray(x[15].astype(np.uint8)).save(path)
    np.save(paths[3], x)
    save(paths[4], x)
    save(paths[5], x)
    for path in rng.permutation(paths)[:rng.integers(1, 6)]:
        spoil(path, rng)
    text = "path,subject,age\n" + "".join(f"{p.relative_to(folder)},s,{k}\n" for k, p in enumerate(paths))
    at = rng.integers(len(text))
    piece = rng.choice(["", '"', ",", "\n", "\0", "age", "é;", "9" * 400, "../", "\t"])
    (folder / "t.csv").write_text(text[:at] + piece + text[at + rng.integers(20):])
    monkeypatch.setattr(sys, "argv", ["data.py", "images", str(folder / ["", "t.csv"][seed % 2]), str(out)])
    try:
        data.program(data.main)
    except SystemExit as e:
        error = capsys.readouterr().err
        assert e.code == 2 and error.count("\n") == 1 and error.startswith("error: "), error
        assert not out.exists()
    else:
        said, error = capsys.readouterr()
        assert all(line.startswith("warning: ") for line in error.splitlines()), error
        assert f", {said.count('skipped ')} skipped" in said
        data.check(str(out))
