"""data.py volumes: left stays left, a mm stays a mm, and what was killed goes on to the same file."""
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

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
    import nibabel
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


def one(folder, x, zooms=5.0, **options):
    np.save(folder / "a.npy", x)
    return convert(folder, "path,subject,spacing", [f'a.npy,s,"{zooms}"'], **options).image[0]


def one_error(capsys, call, *words):
    """`call` exits with 2 and says one line on stderr that holds all the words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    lines = [x for x in capsys.readouterr().err.strip().splitlines() if not x.startswith("warning")]
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(str(w) in lines[0] for w in words), (words, lines[0])


def contents(path):
    with h5py.File(path) as file:
        return {k: (file[k][()].tolist(), dict(file[k].attrs).keys()) for k in file} | {
            "attrs": {k: np.array(v).tolist() for k, v in file.attrs.items()}}


# ---------------------------------------------------------------- geometry and grey

def test_every_order_of_axes_lands_in_the_same_corner(tmp_path):
    pytest.importorskip("nibabel")
    zooms = (5.0, 4.0, 6.0)
    x = head((34, 46, 26), zooms)
    codes = ["RAS", "LAS", "PSR", "ILA", "SPL", "AIR"]
    for k, axes in enumerate(codes):
        save(tmp_path / f"{axes}.nii{'.gz' * (k % 2)}", x, zooms, axes)
    tilt = np.deg2rad(12)
    turn = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    save(tmp_path / "oblique.nii.gz", x, zooms, "LPS", turn)
    np.save(tmp_path / "plain.npy", x)
    rows = [f"{a}.nii{'.gz' * (k % 2)},{a}," for k, a in enumerate(codes)]
    d = convert(tmp_path, "path,subject,spacing", [*rows, "oblique.nii.gz,o,", 'plain.npy,p,"5 4 6"'])
    assert d.image.shape == (8, 32, 40, 32)
    for image in d.image:
        assert abs(image.astype(int) - d.image[0]).max() <= 1
    ball = np.argwhere(d.image[0] > 180).mean(0)  # at left 28, anterior 35, superior 22 mm
    middle = np.array([15.5, 19.5, 15.5])
    assert abs((ball - middle) * 6 - [22, -35, -28]).max() < 3


def test_spacing_of_the_header_keeps_volumes_in_mm(tmp_path):
    pytest.importorskip("nibabel")
    zooms, radius = (1.4, 1.7, 4.0), 27.0
    x = head((110, 110, 40), zooms, radius=radius, spot=(0, 0, 0))
    save(tmp_path / "a.nii.gz", x, zooms, "PSR")
    for spacing in (1.5, 3.0):
        d = convert(tmp_path, "path,subject", ["a.nii.gz,s"], spacing=spacing, shape=(60, 80, 60))
        inner, outer = (np.median(d.image[0][d.image[0] > t]) for t in (200, 20))
        count = (d.image[0] > (inner + outer) / 2).sum()
        assert abs(count * spacing ** 3 / (4 / 3 * np.pi * radius ** 3) - 1) < 0.02
        assert d.attrs["spacing_mm"] == [spacing] * 3


def test_cropped_and_padded_around_the_head(tmp_path, capsys):
    far = one(tmp_path, head((60, 60, 60), at=(40, -50, 35)))
    near = one(tmp_path, head())
    for image in (far, near):
        ends = np.array([np.flatnonzero(image.any(axes))[[0, -1]] for axes in ((1, 2), (0, 2), (0, 1))])
        assert abs(ends.mean(1) - [15.5, 19.5, 15.5]).max() <= 1
    assert abs((far > 50).sum() / (near > 50).sum() - 1) < 0.03
    assert "were cut" not in capsys.readouterr().err
    assert near[:3].max() == 0 and near[:, :3].max() == 0  # padded: the input ends before the frame
    x = head((32, 38, 60), at=(0, 0, 70))
    x[12:20, 14:24, :30] = 100  # a neck that ends at the lower edge of a tall image
    with_neck = one(tmp_path, x, shape=(24, 40, 32))
    assert "1 heads are larger than the frame" in capsys.readouterr().err
    assert with_neck[-1].max() < 60 and with_neck[-2].max() > 0  # the crown is inside, the neck is not
    assert one(tmp_path, head(), shape=(16, 20, 16)).shape == (16, 20, 16)


def test_grey_window(tmp_path):
    noise = np.random.default_rng(0).rayleigh(1.0, (32, 38, 30))
    x = head()
    plain = one(tmp_path, x + noise)
    assert plain.max() == 255 and (plain[:2] == 0).all() and (plain[:, :, -2:] == 0).all()
    x[3, 3, 3] = 1e6  # one hot voxel in the air
    assert abs(one(tmp_path, x + noise).astype(int) - plain).mean() < 1
    assert abs(one(tmp_path, 7 * head() + 7 * noise).astype(int) - plain).max() <= 1  # units do not matter
    brain = head() > 50
    x = np.where(brain, (head() + noise - 120) / 60, 0)  # z-scores: the background lies between the greys
    scored = one(tmp_path, x)
    assert (scored[:2] == 0).all() and np.corrcoef(scored.ravel(), plain.ravel())[0, 1] > 0.9


def test_openbhb_shape_and_spacing_column(tmp_path):
    x = head()
    for name, y in (("a", x), ("b", x[None, None]), ("c", x[..., None].astype(np.float64))):
        np.save(tmp_path / f"{name}.npy", np.asfortranarray(y))
    d = convert(tmp_path, "path,subject,spacing", ["a.npy,a,5", "b.npy,b,5x5x5", "c.npy,c,5.0"])
    assert (d.image == d.image[0]).all() and "spacing" not in d.columns
    thin = convert(tmp_path, "path,subject", ["a.npy,a"], spacing=1.0, shape=(40, 40, 40))
    assert abs((thin.image[0] > 20).sum() / (x > 20).sum() - 1) < 0.1  # 1 mm unless told


def test_a_slice_is_a_slice_of_the_volume(tmp_path, capsys):
    np.save(tmp_path / "a.npy", head())
    rows = ["path,subject,spacing", ["a.npy,s,5"]]
    cube = convert(tmp_path, *rows, spacing=6.0, shape=None, size=40).image[0]
    option = dict(spacing=6.0, shape=None, size=40)
    for where, expected in (("axial:mid", cube[20]), ("axial:25", cube[25]), ("axial:+12", cube[22]),
                            ("coronal:+30", cube[::-1, 15]), ("sagittal:-30", cube[::-1, :, 15])):
        d = convert(tmp_path, *rows, where=where, **option)
        assert d.image.shape == (1, 40, 40) and (d.image[0] == expected).all(), where
    data.check(str(tmp_path / "out.h5"))
    for where, words in (("axial", "expected"), ("axial:40", "0 to 39"), ("sagittal:+900", "outside")):
        one_error(capsys, lambda: convert(tmp_path, *rows, where=where, **option), "--slice", words)
    one_error(capsys, lambda: convert(tmp_path, *rows, where="axial:mid"), "--shape", "--size")
    one_error(capsys, lambda: convert(tmp_path, *rows, where="axial:1", **option), "none of 1 rows", "slice")


# ---------------------------------------------------------------- the table

def test_columns_of_the_table(tmp_path, capsys):
    np.save(tmp_path / "a.npy", head())
    table = ("﻿Path ; SUBJECT; Age;Diagnosis;session;sex;time;event;MMSE;site;A/B;empty;\n"
             "a.npy;s1;63,5;CN;bl;Male;;;29;x;1;;\n"
             "\n"
             ";;;;;;;;;;;;\n"
             'a.npy;s1;n/a;cn;ses-M006;M;;;NaN;"y;z";2;;\n'
             "a.npy;s2;70;MCI;M12;female;100;1;20;;3;;\n"
             f"{tmp_path}/a.npy;s2;71;AD;18;F;50;0;15;;4;;\n"
             "a.npy;s3;72;ad;d365;?;50;0;15;;5;;\n"
             "a.npy;s4;72;;baseline;F;50;0;15;;5;;\n")
    (tmp_path / "t.csv").write_text(table, encoding="utf-8")
    data.volumes(str(tmp_path / "t.csv"), str(tmp_path / "t.h5"), **SMALL)
    said = capsys.readouterr()
    assert "column site: ignored, line 2 holds 'x'" in said.err and "without a name" not in said.err
    assert said.out.count("line 9: no diagnosis or label") == 2  # at the time, and in the end
    d = data.load(str(tmp_path / "t.h5"))
    assert d.subject.tolist() == ["s1", "s1", "s2", "s2", "s3"]
    assert d.columns["label"].tolist() == [0, 0, 2, 1, 1] and d.label_names == ["CN", "AD", "MCI"]
    np.testing.assert_allclose(d.columns["session"], [0, 6, 12, 18, 365 / 30.4375], rtol=1e-6)
    np.testing.assert_array_equal(d.columns["age"], np.float32([63.5, np.nan, 70, 71, 72]))
    assert d.columns["sex"].tolist() == ["M", "M", "F", "F", ""]
    np.testing.assert_array_equal(d.columns["time"], [np.nan, np.nan, 100, 50, 50])
    assert d.columns["event"].tolist() == [0, 0, 1, 0, 0]
    np.testing.assert_array_equal(d.columns["MMSE".lower()], [29, np.nan, 20, 15, 15])
    assert d.columns["a_b"].tolist() == [1, 2, 3, 4, 5] and "empty" not in d.columns
    assert d.attrs["licence"] == "as the source's" and "volumes t.csv" in d.attrs["source"]
    data.check(str(tmp_path / "t.h5"))
    d = convert(tmp_path, "path,subject,diagnosis,label,split", ["a.npy,a,AD,1,train", "a.npy,b,CN,3,TEST"])
    assert d.columns["label"].tolist() == [1, 3] and d.label_names == []  # label wins
    assert d.split.tolist() == ["train", "test"]


@pytest.mark.parametrize("text, value", [
    ("6", 6), ("6.5", 6.5), ("M06", 6), ("ses-M006", 6), ("m120", 120), ("bl", 0), ("Baseline", 0),
    ("ses-bl", 0), ("d0183", 183 / 30.4375), ("ses-d31", 31 / 30.4375)])
def test_sessions_are_months(text, value):
    assert data.months(text) == value
    assert np.isnan(data.months("n/a"))


def test_diagnoses_are_classes():
    for healthy in ("CN", "hc", "Control", "HEALTHY", "normal"):
        label, names = data.classes(["MCI", "", healthy, "AD", "mci"])
        assert (label[healthy.casefold()], label["ad"], label["mci"]) == (0, 1, 2)
        assert names == [healthy, "AD", "MCI"]
    assert data.classes(["AD"])[1] == ["healthy", "AD"]


@pytest.mark.parametrize("text, words", [
    ("", ["no column path"]),
    ("path,subject\n", ["no rows"]),
    ("path,sub\0ject\n", ["not a text file"]),
    ("paths,subject\na,b\n", ["no column path", "rename paths to path"]),
    ("path,patient\na,b\n", ["no column subject", "path, patient"]),
    ("path,subject,Age,age\na,b,1,2\n", ["age", "2 times"]),
    ("path,subject\na,b\na,b,c\n", ["line 3", "3 cells", "has 2"]),
    ("path,subject,age\na,b,1\na,c,old\n", ["line 3", "age", "'old'"]),
    ("path,subject,age\na,b,inf\n", ["line 2", "age"]),
    ("path,subject,session\na,b,ses-1\n", ["line 2", "session", "'ses-1'", "months"]),
    ("path,subject,session\na,b,M06\n\nx,b,6\n", ["lines 2 and 4", "subject b", "month 6"]),
    ("path,subject\na,b\nx,b\n", ["lines 2 and 3", "subject b", "no session", "column session"]),
    ("path,subject,time,event\na,b,5,1\na,c,0,1\n", ["line 3", "time", "'0'", "> 0"]),
    ("path,subject,time,event\na,b,5,2\n", ["line 2", "event", "'2'", "neither 0"]),
    ("path,subject,time,event\na,b,5,1\na,c,9,\n", ["line 3", "time without an event"]),
    ("path,subject,label\na,b,AD\n", ["line 2", "label", "'AD'", "diagnosis"]),
    ("path,subject,label\na,b,1.5\n", ["line 2", "label", "'1.5'"]),
    ("path,subject,diagnosis\na,b,1\n", ["diagnosis", "numbers", "label"]),
    ("path,subject,split\na,b,train\na,c,dev\n", ["line 3", "split", "'dev'"]),
    ("path,subject,session,split\na,b,0,train\na,b,6,test\n", ["lines 2 and 3", "subject b", "two splits"]),
    ("path,subject\nmissing.npy,b\n", ["none of 1 rows", "line 2", "missing.npy: no such file"]),
], ids=lambda x: x[0] if isinstance(x, list) else "")
def test_a_wrong_table_is_one_line(tmp_path, capsys, text, words):
    (tmp_path / "t.csv").write_text(text)
    one_error(capsys, lambda: data.volumes(str(tmp_path / "t.csv"), str(tmp_path / "t.h5"), **SMALL), *words)
    assert os.listdir(tmp_path) == ["t.csv"]  # nothing is left


def test_other_errors_are_one_line(tmp_path, capsys, monkeypatch):
    one_error(capsys, lambda: data.volumes(str(tmp_path / "t.csv"), "t.h5"), "t.csv", "cannot be read")
    for bad in (dict(spacing=0), dict(spacing=np.nan), dict(shape=(32, 32)), dict(shape=(0, 32, 32))):
        one_error(capsys, lambda: convert(tmp_path, "path,subject", ["a.npy,s"], **bad), "spacing", "shape")
    one_error(capsys, lambda: convert(tmp_path, "path,subject", ["a.npy,s"], name=""), "a folder")
    one_error(capsys, lambda: convert(tmp_path, "path,subject", ["a.npy,s"], name="no/o.h5"), "be written")
    for encoding in ("latin-1", "utf-16", "utf-8-sig"):
        (tmp_path / "x.csv").write_bytes("path,subject\nä.npy,s\n".encode(encoding))
        one_error(capsys, lambda: data.volumes(str(tmp_path / "x.csv"), str(tmp_path / "x.h5")), "ä.npy: no such")
    monkeypatch.setitem(sys.modules, "nibabel", None)
    one_error(capsys, lambda: convert(tmp_path, "path,subject", ["a.nii.gz,s"]), "pip install nibabel")
    for words in (["--shape", "1,b"], ["--spacing", "fine"]):
        monkeypatch.setattr(sys, "argv", ["data.py", "volumes", "a.csv", "o.h5", *words])
        one_error(capsys, data.main, words[0])


def test_every_skipped_row_has_its_line_and_reason(tmp_path, capsys):
    nibabel = pytest.importorskip("nibabel")
    x = head()
    save(tmp_path / "good.nii.gz", x)
    whole = (tmp_path / "good.nii.gz").read_bytes()
    (tmp_path / "short.nii.gz").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "broken.nii.gz").write_bytes(whole[:4000] + bytes(64) + whole[4064:])
    (tmp_path / "text.nii").write_text("no image")
    (tmp_path / "zero.npy").write_bytes(b"")
    (tmp_path / "folder.nii").mkdir()
    for name, shape in (("five", (*x.shape, 2)), ("one", (*x.shape, 1))):
        nibabel.save(nibabel.Nifti1Image(np.broadcast_to(x[..., None], shape).astype(np.float32),
                                         np.diag([5.0, 5, 5, 1])), tmp_path / f"{name}.nii.gz")
    damaged = nibabel.Nifti1Image(x.astype(np.float32), np.diag([5.0, 5, 5, 1]))
    damaged.header["pixdim"][2] = 0
    nibabel.save(damaged, tmp_path / "flat.nii")
    raw = bytearray((tmp_path / "flat.nii").read_bytes())
    raw[80:92] = np.float32([5, 0, 5]).tobytes()  # pixdim, as no library would write it
    (tmp_path / "flat.nii").write_bytes(raw)
    spark = (np.arange(x.size) == 9).reshape(x.shape)
    for name, y in dict(plane=x[0], nan=np.where(x > 290, np.nan, x), inf=np.where(x > 290, np.inf, x),
                        black=x * 0, grey=x * 0 + 7, spark=spark, mask=x > 50, fine=x,
                        objects=np.array([{}] * 8).reshape(2, 2, 2)).items():
        np.save(tmp_path / f"{name}.npy", y, allow_pickle=True)
    cases = [  # path, spacing, what the reason says; "" is converted
        ("good.nii.gz", "", ""), ("gone.nii.gz", "", "no such file"), ("short.nii.gz", "", ""),
        ("broken.nii.gz", "", ""), ("text.nii", "", ""), ("zero.npy", "", ""),
        ("folder.nii", "", "no such file"), ("five.nii.gz", "", "(32, 38, 30, 2), expected one volume"),
        ("one.nii.gz", "", ""), ("flat.nii", "", "spacing"), ("plane.npy", "5", "expected one volume"),
        ("nan.npy", "5", "NaN or Inf"), ("inf.npy", "5", "NaN or Inf"),
        ("black.npy", "5", "every voxel is 0"), ("grey.npy", "5", "every voxel is 7"),
        ("spark.npy", "5", "no brain"), ("mask.npy", "5", "no brain"),
        ("objects.npy", "5", ""), ("fine.npy", "0", "spacing"), ("fine.npy", "nan?", "nan?"),
        ("scan.dcm", "", "none of .nii"), ("", "", "no path"), ("fine.npy", "5", "")]
    converted = {0, 8, 22}
    d = convert(tmp_path, "path,subject,spacing", [f"{p},s{i},{mm}" for i, (p, mm, _) in enumerate(cases)])
    said = capsys.readouterr().out
    for i, (path, _, why) in enumerate(cases):
        lines = [text for text in said.splitlines() if text.startswith(f"skipped line {i + 2}: ")]
        assert len(lines) == (0 if i in converted else 2), (path, lines)
        assert all(path in text and why in text and len(text) > 20 + len(path) for text in lines), lines
    assert "20 of 23 rows skipped" in said
    assert d.subject.tolist() == [f"s{i}" for i in sorted(converted)]
    assert (d.image == d.image[0]).all()


# ---------------------------------------------------------------- long conversions

def many(folder, n=40, shape=(64, 76, 60)):
    """A table of n rows of which every seventh is missing."""
    for k in range(3):
        np.save(folder / f"{k}.npy", head(shape, 2.5, radius=15 + 4 * k).astype(np.float32))
    rows = [f"{k % 3 if k % 7 != 3 else 'gone'}.npy,s{k // 2},{k % 2 * 6},{50 + k},2.5" for k in range(n)]
    (folder / "table.csv").write_text("\n".join(["path,subject,session,age,spacing", *rows]) + "\n")
    return [str(folder / "table.csv"), str(folder / "killed.h5")]


def test_killed_and_started_again_gives_the_same_file(tmp_path, capsys, monkeypatch):
    table, out = many(tmp_path)
    command = [sys.executable, str(ROOT / "data.py"), "volumes", table, out, "--spacing", "3",
               "--shape", "64,80,64"]
    log = Path(out + ".part.log")
    for least in (5, 16):
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while run.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > least):
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL and not os.path.exists(out)
    done = log.read_bytes().count(b"\n") - 1
    assert done < 40
    with open(out + ".part", "ab") as pixels:  # torn in the middle of a row
        pixels.write(b"half an image")
    with open(log, "ab") as file:
        file.write(b'[31, "", fal')
    Path(out + ".123.tmp").write_bytes(b"killed when it wrote the result")
    monkeypatch.setattr(sys, "argv", command[1:])
    data.main()
    said = capsys.readouterr().out
    assert f"goes on after {done} of 40 rows" in said
    assert said.count("gone.npy: no such file") >= 6 and "6 of 40 rows skipped" in said
    data.volumes(table, str(tmp_path / "whole.h5"), spacing=3.0, shape=(64, 80, 64))
    assert contents(out) == contents(tmp_path / "whole.h5")
    assert Path(out).read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["0.npy", "1.npy", "2.npy", "table.csv", "killed.h5", "whole.h5"])


def test_stopped_full_disk_and_other_options(tmp_path, capsys, monkeypatch):
    table, out = many(tmp_path, 8, (32, 38, 30))
    data.volumes(table, str(tmp_path / "whole.h5"), **SMALL)
    real, read = data.read_brain, []

    def until(n, error):
        def brain(path, *more):
            read.append(path)
            if len(read) > n:
                raise error
            return real(path, *more)
        return brain

    monkeypatch.setattr(data, "read_brain", until(3, KeyboardInterrupt()))
    with pytest.raises(SystemExit) as stop:
        data.volumes(table, out, **SMALL)
    assert stop.value.code == 130 and "same command goes on" in capsys.readouterr().out
    with monkeypatch.context() as full:
        full.setattr(data, "read_brain", real)
        full.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        one_error(capsys, lambda: data.volumes(table, out, **SMALL), "No space left", "goes on")
    read.clear()
    monkeypatch.setattr(data, "read_brain", until(99, None))
    data.volumes(table, out, **SMALL)
    assert len(read) == 4 and Path(out).read_bytes() == (tmp_path / "whole.h5").read_bytes()

    def interrupted():
        read.clear()
        monkeypatch.setattr(data, "read_brain", until(3, KeyboardInterrupt()))
        with pytest.raises(SystemExit):
            data.volumes(table, out, **SMALL)
        monkeypatch.setattr(data, "read_brain", real)
        capsys.readouterr()

    interrupted()  # other options
    data.volumes(table, out, **(SMALL | dict(spacing=5.0)))
    assert "other options or damaged; discarded" in capsys.readouterr().out
    interrupted()  # pixels that the log knows are gone
    os.remove(out + ".part")
    data.volumes(table, out, **SMALL)
    assert "discarded" in capsys.readouterr().out and contents(out) == contents(tmp_path / "whole.h5")
    interrupted()  # another table
    Path(table).write_text(Path(table).read_text().replace("50", "51"))
    data.volumes(table, out, **SMALL)
    assert "another table" in capsys.readouterr().out and data.load(out).columns["age"][0] == 51


@pytest.mark.skipif(data.fcntl is None, reason="no file locks here")
def test_two_conversions_to_one_file_are_refused(tmp_path, capsys):
    table, out = many(tmp_path, 2)
    with open(out + ".part.log", "ab") as log:
        data.fcntl.flock(log, data.fcntl.LOCK_EX)
        one_error(capsys, lambda: data.volumes(table, out, **SMALL), "in use")


def test_memory_does_not_grow_with_the_table(tmp_path):
    table, out = many(tmp_path, 42, (32, 38, 30))
    tracemalloc.start()
    data.volumes(table, out, spacing=3.0, shape=(96, 96, 96))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    stored = data.load(out).image.nbytes
    assert stored > 30e6 and peak < stored / 2, (stored, peak)


def test_command_line(tmp_path, capsys, monkeypatch):
    table, out = many(tmp_path, 3, (32, 38, 30))
    monkeypatch.setattr(sys, "argv", ["data.py", "volumes", table, out, "--spacing", "4", "--size", "48",
                                      "--slice", "axial:+10"])
    data.main()
    monkeypatch.setattr(sys, "argv", ["data.py", "check", out])
    data.main()
    said = capsys.readouterr().out
    assert "2 subjects, 3 images of 48 x 48 at 4 mm, 0 of 3 rows skipped" in said and said.endswith("ok\n")
