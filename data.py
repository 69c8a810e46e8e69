"""Data: the HDF5 schema, its checks, subject-level splits, batches, phantoms, converters.

    python data.py check   FILE_OR_FOLDER                  verify, naming file, dataset and row
    python data.py show    FILE_OR_FOLDER [--out X.png]    contact sheet with mask contours
    python data.py phantom hearts OUT.h5 [--subjects 100 --seed 0 --size 128 --jitter 1]
    python data.py phantom cohort OUT.h5 [--subjects 600 --patients 220 --seed 0 --size 128]
    python data.py phantom brains OUT.h5 [--subjects 120 --seed 0 --size 48]
    python data.py emidec  ROOT OUT.h5 [--spacing MM]      EMIDEC's NIfTI folders -> HDF5

    image    (N,H,W) or (N,D,H,W)  uint8, or float in [0,1]                             required
    subject  (N,) utf-8            the unit of every split, test and interval           required
    mask     as image, uint8       label map; attr mask_names
    label    (N,) int >= 0         classes; attr label_names
    age sex session time event     years, text, months, days > 0, 0/1;  NaN and "" are missing
    split    (N,) train/val/test   else made by split()
    anything else (N,) numeric is a probe target; factor_* are the known causes of a phantom
"""
import argparse, difflib, glob, hashlib, os, re, sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import h5py
import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw
from tqdm import tqdm


def fail(message):
    """Print `error: message` as one line on stderr and exit with status 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


# ---------------------------------------------------------------------------------------------------
# Reading. libhdf5 will happily read other files through a crafted one (external links, external
# storage, virtual datasets), so only plain datasets at the top level are ever opened.

def open_h5(path):
    """Open one HDF5 file read-only. Fails in one line that says what is wrong with the file."""
    if not os.path.exists(path):
        fail(f"{path}: no such file or folder")
    if not os.path.isfile(path):  # a pipe or device would block
        fail(f"{path}: not a regular file")
    if os.path.getsize(path) == 0:
        fail(f"{path}: the file is empty (0 bytes); copy or convert it again")
    try:
        try:
            return h5py.File(path, "r")
        except OSError as error:  # locked by a writer, or a network disk that has no locks
            if not isinstance(error, BlockingIOError) and "unable to lock" not in str(error):
                raise
            return h5py.File(path, "r", locking=False)
    except PermissionError:
        fail(f"{path}: no permission to read it; try chmod u+r")
    except OSError as error:
        eof = re.search(r"eof = (\d+),.*stored_eof = (\d+)", str(error), re.S)
        if eof:
            fail(f"{path}: truncated: has {eof[1]} of {eof[2]} bytes; copy it again")
        if "signature not found" in str(error):
            fail(f"{path}: not an HDF5 file; `python data.py emidec` converts NIfTI folders")
        fail(f"{path}: cannot be opened as HDF5, it is damaged: {error}")


def plain(file, path, name):
    """The dataset `name` of an open file, or None for a group; fails if its bytes lie elsewhere."""
    link = file.get(name, getlink=True)  # looks at the link without following it
    if not isinstance(link, h5py.HardLink):
        fail(f"{path}: {name}: a {type(link).__name__}, refused: nothing outside the file is read; "
             "store the values themselves")
    if file.get(name, getclass=True) is not h5py.Dataset:
        return None
    dataset = file[name]
    if dataset.is_virtual or dataset.external:
        kind = "virtual dataset" if dataset.is_virtual else "dataset with external storage"
        fail(f"{path}: {name}: a {kind}, refused: nothing outside the file is read; "
             "store the values themselves")
    return dataset


class Rows:
    """The rows of `image` or `mask`, read from disk when indexed: rows[ints] -> (len,*S) uint8.

    Floats become round(255 x); `size` resizes in-plane. Fails naming file, dataset and row on NaN,
    Inf, a float outside [0,1] or a damaged chunk. Files are opened per call: safe with threads."""
    dtype = np.dtype(np.uint8)

    def __init__(self, name, paths, counts, shape, size=None):
        self.name, self.paths, self.size = name, paths, size
        self.starts = np.cumsum([0, *counts])
        self.shape = (int(self.starts[-1]), *((size, size) if size else shape))
        self.nbytes = int(np.prod(self.shape, dtype=object))

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        rows = np.arange(len(self))[rows]
        wanted, back = np.unique(rows, return_inverse=True)
        owner = np.searchsorted(self.starts, wanted, "right") - 1
        out = np.empty((len(wanted), *self.shape[1:]), np.uint8)
        for k in np.unique(owner):
            path, here = self.paths[k], np.flatnonzero(owner == k)
            with open_h5(path) as file:
                dataset = plain(file, path, self.name)
                for run in np.split(here, np.flatnonzero(np.diff(wanted[here]) > 1) + 1):
                    first = int(wanted[run[0]] - self.starts[k])
                    try:
                        block = dataset[first:first + len(run)]
                    except OSError as error:
                        fail(f"{path}: {self.name}[{first}..{first + len(run) - 1}]: damaged, "
                             f"copy the file again: {error}")
                    out[run] = self.to_uint8(block, path, first)
        return out[back.reshape(rows.shape)]

    def to_uint8(self, x, path, first):
        if x.dtype.kind == "f":
            for bad, what in ((~np.isfinite(x), "NaN or Inf"), ((x < 0) | (x > 1), "outside [0,1]")):
                if bad.any():
                    row = int(np.argmax(bad.reshape(len(x), -1).any(1)))
                    fail(f"{path}: {self.name}[{first + row}]: {int(bad[row].sum())} values {what} "
                         f"(first {x[row][bad[row]][0]:g}); rescale the image to [0,1]")
            x = x.astype(np.float32) * 255
        if self.size:
            x = resize(x, self.size, nearest=self.name == "mask")
        return x if x.dtype == np.uint8 else np.rint(x).astype(np.uint8)


def blocks(rows):
    """Cut an array or Rows into row ranges of about 64 MB, with a progress bar when that is slow."""
    step = max(1, int(64e6 // max(1, rows.nbytes // max(1, len(rows)))))
    for first in tqdm(range(0, len(rows), step), "reading", delay=2, leave=False, disable=None):
        yield np.arange(first, min(first + step, len(rows)))


def in_memory(rows):
    """Rows -> ndarray; an ndarray stays what it is."""
    if isinstance(rows, np.ndarray):
        return rows
    out = np.empty(rows.shape, rows.dtype)
    for block in blocks(rows):
        out[block] = rows[block]
    return out


# Resampling as one matrix per axis. Output pixel i covers the source from start + i*step to
# start + (i+1)*step, in source pixels; what lies outside the source is 0.

def axis_weights(n, start, step, size):
    """-> (size, n) float32: exact area average if step >= 1, else bilinear between centres."""
    left = start + step * np.arange(size)[:, None]
    pixel = np.arange(n)[None]
    if step >= 1:
        overlap = np.minimum(left + step, pixel + 1) - np.maximum(left, pixel)
        return (np.clip(overlap, 0, None) / step).astype(np.float32)
    tent = np.clip(1 - abs(left + step / 2 - 0.5 - pixel), 0, None)
    return (tent / np.maximum(tent.sum(1, keepdims=True), 1e-9)).astype(np.float32)


def resample(x, start, step, size, nearest=False):
    """(n,H,W) -> (n,size,size); start and step are (row, column) pairs. Labels: nearest."""
    if not nearest:
        rows, columns = (axis_weights(x.shape[a + 1], start[a], step[a], size) for a in (0, 1))
        return rows @ x.astype(np.float32) @ columns.T
    index = [np.floor(start[a] + (np.arange(size) + 0.5) * step[a]).astype(int) for a in (0, 1)]
    inside = [(i >= 0) & (i < n) for i, n in zip(index, x.shape[1:])]
    picked = x[:, np.where(inside[0], index[0], 0)][:, :, np.where(inside[1], index[1], 0)]
    return picked * (inside[0][:, None] & inside[1]).astype(x.dtype)


def resize(x, size, nearest=False):
    """(n,H,W) -> (n,size,size): zero-padded to a square, then area-averaged down or bilinear up."""
    side = max(x.shape[1:])
    start = [-((side - n) // 2) for n in x.shape[1:]]
    return resample(x, start, (side / size, side / size), size, nearest)


@dataclass
class Dataset:
    """What a path holds. N rows; image and mask are uint8 (N,H,W) or (N,D,H,W), Rows when too big."""
    path: str
    image: object
    mask: object          # or None
    subject: object       # (N,) str
    columns: dict         # name -> (N,): label, age, sex, session, time, event, factor_*, ...
    split: object         # (N,) "train"/"val"/"test", or None
    attrs: dict
    label_names: list
    fingerprint: str      # hash of image and subject, so that a resumed run knows its data
    warnings: list

    def __len__(self):
        return len(self.subject)


def as_python(value):
    """An HDF5 attribute as str, number or list."""
    value = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
    value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return value if isinstance(value, (str, int, float, list)) else str(value)


def read_columns(path, warnings):
    """Check all of one file but its pixels -> (columns, attrs); image and mask only as shapes."""
    known = ("image", "mask", "subject", "split", "label", "age", "sex", "session", "time", "event")
    columns = {}
    with open_h5(path) as file:
        names, attrs = list(file), {k: as_python(v) for k, v in file.attrs.items()}
        for need in ("image", "subject"):
            if need not in names:
                near = [n for n in names if n.lower().rstrip("s") == need]
                near = near or difflib.get_close_matches(need, names)
                fail(f"{path}: {need}: missing, the file has {', '.join(names) or 'nothing'}"
                     + (f"; rename {near[0]} to {need}" if near else ""))
        image = plain(file, path, "image")
        shape = getattr(image, "shape", "of a group")
        if image is None or image.ndim not in (3, 4):
            fail(f"{path}: image: shape {shape}, expected (N,H,W) or (N,D,H,W)")
        if image.ndim == 4 and shape[-1] in (1, 3, 4):
            fail(f"{path}: image: shape {shape} has channels last, expected (N,H,W); keep image[..., 0]")
        if image.dtype != np.uint8 and image.dtype.kind != "f":
            fail(f"{path}: image: type {image.dtype}, expected uint8 or float in [0,1]")
        if 0 in shape:
            fail(f"{path}: image: shape {shape} holds no pixel")
        for name in names:
            d = plain(file, path, name)
            if name not in known and (d is None or d.ndim != 1 or d.dtype.kind not in "biuf"):
                warnings.append(f"{path}: {name}: ignored, not an (N,) numeric column")
                continue
            if d is None:
                fail(f"{path}: {name}: a group, expected a dataset")
            if name == "mask" and (d.shape != shape or d.dtype != np.uint8):
                fail(f"{path}: mask: {d.dtype} {d.shape}, expected uint8 {shape} as image")
            if name not in ("image", "mask") and d.shape != shape[:1]:
                fail(f"{path}: {name}: shape {d.shape}, expected {shape[:1]}: image has {shape[0]} rows")
            stored = d.id.get_storage_size()
            if stored == 0:
                fail(f"{path}: {name}: declared but never written; write the file again")
            if d.nbytes > 50e9 and d.nbytes > 2000 * stored:
                fail(f"{path}: {name}: declares {d.nbytes / 1e9:.0f} GB but stores {stored / 1e6:.3g} MB; "
                     "refused as damaged or hostile")
            attrs.update({k: as_python(d.attrs[k]) for k in ("label_names", "mask_names") if k in d.attrs})
            if name in ("image", "mask"):
                columns[name] = d.shape
                continue
            try:
                x = d.asstr()[:] if h5py.check_string_dtype(d.dtype) else d[:]
            except (OSError, UnicodeDecodeError, TypeError) as error:
                fail(f"{path}: {name}: cannot be read, write the file again: {error}")
            columns[name] = check_column(path, name, x, warnings)
    return columns, attrs


def check_column(path, name, x, warnings):
    """Check the values of one (N,) column -> the column in its schema type."""
    def refuse(bad, why):
        if bad.any():
            row = int(np.argmax(bad))
            fail(f"{path}: {name}[{row}]: {x[row]!s:.40} {why} ({int(bad.sum())} such rows)")

    if name in ("subject", "sex", "split"):
        x = np.array([str(v).strip() for v in x])
        if name == "subject":
            refuse(x == "", "is an empty id; every row needs its subject")
        if name == "split":
            refuse(~np.isin(x, ["train", "val", "test"]), "is none of train, val, test")
        return x
    if x.dtype.kind not in "biuf":
        fail(f"{path}: {name}: type {x.dtype}, expected numbers")
    x = x.astype(np.uint8) if x.dtype == bool else x
    refuse(np.isinf(x), "is infinite")
    if name in ("label", "event"):
        refuse(~np.isfinite(x) | (x != np.floor(x)) | (x < 0), "is not a whole number >= 0")
        if name == "event":
            refuse(x > 1, "is neither 0 (censored) nor 1")
        return x.astype(np.int64 if name == "label" else np.uint8)
    if name == "time":
        refuse(x <= 0, "is not a time > 0 in days")
    missing = int(np.isnan(x).sum())
    if missing:
        warnings.append(f"{path}: {name}: {missing} of {len(x)} rows are NaN, taken as missing")
    return x.astype(np.float32) if name in ("age", "session", "time") else x


def load(path, size=None, max_gb=4.0, square=False):
    """Read a file, or a folder of one file per subject -> Dataset. Runs every check, see check().

    size resizes 2D images in-plane; others than squares are padded, or refused if square. What is
    larger than max_gb stays on disk, as Rows. Warnings go to stderr, a problem is one line and exit 2."""
    path, warnings, parts = str(path), [], []
    paths = [path]
    if os.path.isdir(path):
        paths = sorted(os.path.join(path, p) for p in os.listdir(path) if p.endswith((".h5", ".hdf5")))
        if not paths:
            fail(f"{path}: a folder without .h5 files")
    for p in tqdm(paths, "opening", delay=2, leave=False, disable=None):
        parts.append(read_columns(p, warnings))
        (here, _), (first, attrs) = parts[-1], parts[0]
        shape = first["image"][1:]
        if here["image"][1:] != shape:
            fail(f"{p}: image: {here['image'][1:]} but {shape} in {paths[0]}; all files need one size")
        if set(here) != set(first):
            fail(f"{p}: {', '.join(sorted(set(here) ^ set(first)))}: only in this file or only in "
                 f"{paths[0]}; all files need the same datasets")
    if size and len(shape) == 3:
        fail(f"{path}: image: volumes {shape} are not resized; drop --size or convert them again")
    if square and shape[0] != shape[1]:
        fail(f"{path}: image: {shape[0]}x{shape[1]} is not square; "
             f"--size {size or max(shape)} pads and resizes it")
    size = None if shape == (size, size) else size
    columns = {k: np.concatenate([c[k] for c, _ in parts]) for k in first if k not in ("image", "mask")}
    subject, split = columns.pop("subject"), columns.pop("split", None)
    if split is not None:
        used = {}
        for s, part in zip(subject, split):
            used.setdefault(s, set()).add(part)
        both = [s for s in used if len(used[s]) > 1]
        if both:
            fail(f"{path}: split: {len(both)} subjects are in more than one part: {', '.join(both[:5])}; "
                 "put each subject in one part")
    counts = [c["image"][0] for c, _ in parts]
    image = Rows("image", paths, counts, shape, size)
    mask = Rows("mask", paths, counts, shape, size) if "mask" in first else None
    sample = [np.unique(np.linspace(0, len(image) - 1, 64).astype(int))]
    if image.nbytes * (2 if mask else 1) <= max_gb * 1e9:
        image, mask = in_memory(image), in_memory(mask) if mask else None
        warn_constant(path, image, warnings)
        sample = blocks(image)
    digest = hashlib.sha256(repr((image.shape, subject.tolist())).encode())
    for rows in sample:
        digest.update(image[rows].tobytes())
    for line in warnings:
        print("warning:", line, file=sys.stderr)
    names = attrs.get("label_names", [])
    names = [n.strip() for n in names.split(",")] if isinstance(names, str) else names
    return Dataset(path, image, mask, subject, columns, split, attrs, names, digest.hexdigest()[:16],
                   warnings)


def warn_constant(path, image, warnings):
    """Warn of images that are one flat grey (nothing can be learnt from them); fail if all are."""
    flat = []
    for rows in blocks(image):
        x = image[rows].reshape(len(rows), -1)
        flat += rows[x.min(1) == x.max(1)].tolist()
    if len(flat) == len(image):
        fail(f"{path}: image: every image is constant; was the file written completely?")
    if flat:
        warnings.append(f"{path}: image: {len(flat)} constant images, rows {str(flat[:20])[1:-1]}"
                        + (" ..." if len(flat) > 20 else ""))


def check(path):
    """Verify a file or folder to the last pixel -> list of warnings; the first problem exits 2."""
    return check_pixels(load(path)).warnings


def check_pixels(data):
    """Read what load() left on disk because it is large -> data, with its warnings complete."""
    if isinstance(data.image, Rows):
        warn_constant(data.path, data.image, data.warnings)
        for rows in blocks(data.mask) if data.mask is not None else []:
            data.mask[rows]
    return data


def split(data, seed=0, fractions=(0.7, 0.1, 0.2)):
    """-> (N,) "train"/"val"/"test": the stored split, else by subject, stratified by label.

    A function of (seed, subject, label) only: row and file order do not matter. A subject's label is
    its largest; classes of fewer than 3 subjects are pooled. No part is empty where that can be."""
    if data.split is not None:
        return data.split
    subjects, row_of = np.unique(data.subject, return_inverse=True)
    label = np.zeros(len(subjects), int)
    np.maximum.at(label, row_of, data.columns.get("label", np.zeros(len(data), int)))
    values, size = np.unique(label, return_counts=True)
    label[np.isin(label, values[size < 3])] = -1
    order = [hashlib.sha256(f"{seed} {s}".encode()).hexdigest() for s in subjects]
    part = np.empty(len(subjects), "<U5")
    for value in np.unique(label):
        members = sorted(np.flatnonzero(label == value), key=lambda i: order[i])
        exact = np.array(fractions) * len(members) / sum(fractions)
        count = np.floor(exact + 1e-9).astype(int)
        for k in np.argsort(-(exact - count), kind="stable")[:len(members) - count.sum()]:
            count[k] += 1  # largest remainder
        for k in (0, 2, 1):  # when there are too few, train comes first and val last
            if count[k] == 0 and fractions[k] > 0 and count.max() > 1:
                count[count.argmax()] -= 1
                count[k] += 1
        part[members] = np.repeat(["train", "val", "test"], count)
    return part[row_of]


def load_study(path, test="", size=None, seed=0, square=True):
    """-> (Dataset, (N,) "train"/"val"/"test"): path by its split; or path to train and all of `test` to test.

    size: images are resized to it; square=True refuses other shapes instead of padding them (exit 2)."""
    data, *more = [load(p, size, square=square) for p in (path, test) if p]
    if not more:
        return data, split(data, seed)
    other = more[0]
    both = sorted(set(data.subject) & set(other.subject))
    if both:
        fail(f"{test}: subject: {len(both)} are also in {path}: "
             f"{', '.join(both[:5])}; a subject belongs to one part")
    if other.image.shape[1:] != data.image.shape[1:]:
        fail(f"{test}: image: {other.image.shape[1:]} but {path} has {data.image.shape[1:]}; give --size")
    if isinstance(data.image, Rows) or isinstance(other.image, Rows):
        fail(f"{path}, {test}: too large to join in memory; put both into one folder, with a split column")
    part = split(data, seed, (0.85, 0.15, 0)) if data.split is None else \
        np.where(data.split == "val", "val", "train")

    def join(a, b):
        return None if a is None or b is None else np.concatenate([a, b])
    columns = {k: join(v, other.columns[k]) for k, v in data.columns.items() if k in other.columns}
    joined = Dataset(f"{path} + {test}", join(data.image, other.image), join(data.mask, other.mask),
                     join(data.subject, other.subject), columns, None, data.attrs, data.label_names,
                     data.fingerprint, data.warnings + other.warnings)
    return joined, join(part, np.full(len(other), "test"))


class Loader:
    """Batches of named (N,...) arrays (or Rows) on `device`; with `rows` only those, numbered from 0.

    All of it is resident when that fits in limit_gb (uint8 stays uint8, so 10,000 images of 128x128
    take 164 MB); else it is read ahead from disk in a thread."""

    def __init__(self, arrays, device, rows=None, limit_gb=8.0):
        lengths = {k: len(a) for k, a in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"arrays of different length: {lengths}")
        self.device, limit = torch.device(device), limit_gb * 1e9
        self.rows = np.arange(*set(lengths.values())) if rows is None else np.asarray(rows)
        self.arrays = arrays
        if self.device.type == "cuda":  # half of what is free: the network needs the rest
            limit = min(limit, torch.cuda.mem_get_info(self.device)[0] / 2)
        share = len(self.rows) / len(next(iter(arrays.values())))
        self.resident = share * sum(a.nbytes for a in arrays.values()) <= limit
        if self.resident:
            self.arrays = {k: self.tensor(a[self.rows]).to(self.device) for k, a in arrays.items()}

    def __len__(self):
        return len(self.rows)

    def tensor(self, x):
        if x.dtype != np.uint8:
            x = x.astype(np.float32 if x.dtype.kind == "f" else np.int64, copy=False)
        return torch.from_numpy(np.ascontiguousarray(x))

    def read(self, rows):
        """The slow half of a batch, gathered from disk or host memory: what the thread does."""
        raw = {k: self.tensor(a[self.rows[rows]]) for k, a in self.arrays.items()}
        return {k: v.pin_memory() for k, v in raw.items()} if self.device.type == "cuda" else raw

    def finish(self, raw):
        batch = {k: v.to(self.device, non_blocking=True) for k, v in raw.items()}
        for name, x in batch.items():
            if name == "image" and x.dtype == torch.uint8:
                batch[name] = (x.float() / 127.5 - 1).unsqueeze(1)
            elif x.dtype == torch.uint8:
                batch[name] = x.long()
        return batch

    def batch(self, rows):
        """Row numbers (B,) -> dict of tensors: image (B,1,*S) float32 in [-1,1]; mask (B,*S) and
        other integers int64; floats float32."""
        if not self.resident:
            return self.finish(self.read(rows))
        index = torch.as_tensor(np.asarray(rows)).to(self.device, non_blocking=True)
        return self.finish({k: a[index] for k, a in self.arrays.items()})

    def stream(self, batches):
        """Iterable of row arrays -> iterator of batch(rows), two read ahead when not resident.

        What goes wrong in the thread is raised here; the thread ends when the consumer stops."""
        if self.resident:
            yield from map(self.batch, batches)
            return
        with ThreadPoolExecutor(1) as thread:
            ahead = deque()
            for rows in batches:
                ahead.append(thread.submit(self.read, rows))
                if len(ahead) > 2:
                    yield self.finish(ahead.popleft().result())
            while ahead:
                yield self.finish(ahead.popleft().result())


# ---------------------------------------------------------------------------------------------------
# Writing

def write(path, parts, attrs):
    """Write schema v1 from a list of column dicts: one checksummed gzip chunk per image.

    Complete or not at all (os.replace); a failure is one line and leaves an older file as it was."""
    columns = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    attrs, temporary = dict(attrs), f"{path}.{os.getpid()}.tmp"
    try:
        with h5py.File(temporary, "w") as file:
            for name, x in columns.items():
                if x.ndim > 1:
                    d = file.create_dataset(name, x.shape, x.dtype, chunks=(1, *x.shape[1:]),
                                            compression="gzip", compression_opts=4, fletcher32=True)
                    for i in tqdm(range(len(x)), f"writing {name}", delay=2, leave=False, disable=None):
                        d[i] = x[i]
                elif x.dtype.kind in "UO":
                    file.create_dataset(name, data=x.astype(object), dtype=h5py.string_dtype())
                else:
                    x = x.astype(np.float32) if x.dtype == np.float64 else x
                    file.create_dataset(name, data=x, chunks=x.shape, fletcher32=True)
                if f"{name}_names" in attrs:
                    file[name].attrs[f"{name}_names"] = attrs.pop(f"{name}_names")
            file.attrs.update(attrs)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        fail(f"{path}: cannot be written: {error}")
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


# ---------------------------------------------------------------------------------------------------
# Phantom hearts

UNIT = 1.3  # mm: the lengths below are in these
HEART = ["background", "LV cavity", "myocardium", "infarct", "no-reflow"]  # EMIDEC's mask ids


def smooth_noise(rng, n, size, cell, shared=0.8):
    """(n,size,size) noise of sd 1 with features of `cell` px at 128, alike in neighbouring slices."""
    knots = 128 // cell + 4
    grid = shared * rng.standard_normal((knots, knots)) \
        + np.sqrt(1 - shared ** 2) * rng.standard_normal((n, knots, knots))
    place = (np.arange(size) + 0.5) * 128 / size / cell + 1.5
    weight = np.exp(-0.5 * ((place[:, None] - np.arange(knots)) / 0.6) ** 2)
    noise = weight @ grid @ weight.T
    return noise / noise.std()


def heart(rng, size, jitter, infarcted):
    """One subject of phantom_hearts -> its columns, 6-8 slices from base to apex."""
    n = int(rng.integers(6, 9))
    z = ((np.arange(n) + 0.5) / n)[:, None, None]                       # 0 base ... 1 apex
    age, male = np.clip(rng.normal(60, 12), 25, 90), rng.random() < 0.7

    # Pose: scaled by jitter, drawn in any case so that jitter does not change the anatomy.
    shift, tilt = rng.normal(0, 4, 2) * jitter, rng.normal(0, 2.5, 2) * jitter
    breath = rng.normal(0, 0.8, (2, n, 1, 1)) * jitter                  # each slice is its own breath-hold
    rotation, scale, stretch = np.array([14, 0.06, 0.03]) * rng.normal(0, 1, 3) * jitter
    dx, dy = (np.clip(s, -14, 14) + t * (z - 0.5) + b for s, t, b in zip(shift, tilt, breath))
    scale, stretch, turn = np.exp(np.clip(scale, -.15, .15)), np.exp(stretch), np.deg2rad(rotation)
    pixel = ((np.arange(size) + 0.5) / size - 0.5) * 125 / UNIT         # the frame is 125 mm wide
    gx, gy = pixel[None, None, :] - dx, -pixel[None, :, None] - dy      # y points up
    x = (np.cos(turn) * gx + np.sin(turn) * gy) / (scale * stretch)
    y = (np.cos(turn) * gy - np.sin(turn) * gx) / (scale / stretch)
    rho, angle = np.sqrt(x * x + y * y) + 1e-3, np.arctan2(y, x)      # 0 lateral, 90 anterior, 180 septum

    def ripple(k, amount):
        return amount * np.cos(k * angle - rng.uniform(0, 2 * np.pi))

    def inside(distance):  # share of a pixel that lies inside: smooth partial volume
        return 0.5 - 0.5 * np.tanh(distance * 0.8 / max(0.75, 125 / UNIT / size))

    def over(colour, share):
        nonlocal image
        image = image + (colour - image) * share

    # Left ventricle: cavity, wall; the right one is an ellipse behind it.
    radius = np.clip(rng.normal(20 + male, 2), 15, 26) * (1 - 0.5 * z ** 2.4)
    thick = np.clip(rng.normal(9.5 + 0.04 * (age - 60), 1.0), 6.5, 13) * (1 - 0.15 * z ** 2)
    endo = radius * (1 + ripple(2, 0.04) + ripple(3, 0.03) + ripple(5, 0.008) + ripple(9, 0.01))
    wall = thick * (1 + ripple(1, 0.06) + ripple(2, 0.05))
    d_endo, d_epi = rho - endo, rho - endo - wall
    outer = radius + thick
    width = rng.normal(22, 2.5) * np.sqrt(np.clip(1 - (z / 0.98) ** 2.2, 0, 1))
    a, b = 0.28 * outer + width, outer * (1.02 - 0.25 * z ** 2) * rng.normal(1, 0.05)
    rx, ry = x + 0.72 * outer, y + rng.normal(2.5, 1.5) - 0.18 * (x + outer)
    corners = 1 + 0.07 * np.cos(3 * np.arctan2(ry, rx) + 0.5)
    ellipse = corners * np.sqrt((rx / a) ** 2 + (ry / b) ** 2) + 1e-3
    d_rv = ellipse * (ellipse - 1) / np.sqrt((rx / a ** 2) ** 2 + (ry / b ** 2) ** 2 + 1e-9)
    d_heart = np.minimum(d_epi, d_rv - 2.2)

    # Grey values as the inversion time leaves them: myocardium nulled, blood medium, scar and fat bright.
    blood, muscle = rng.uniform(0.52, 0.72), rng.uniform(0.12, 0.28)
    scar_grey, fat = rng.uniform(0.92, 1.05), rng.uniform(0.75, 0.95)
    coarse, fine = smooth_noise(rng, n, size, 14), smooth_noise(rng, n, size, 4, 0.3)

    # Thorax: lung with vessels, liver below, stomach, aorta, chest wall to the upper left.
    image = rng.uniform(0.05, 0.2) + 0.02 * fine + 0.02 * coarse
    spot = rng.uniform(-48, 48, (2, 1, 1, 45)) + rng.normal(0, 4, (2, n, 1, 45))  # drift between slices
    down, across = np.exp(-0.5 * ((pixel[:, None] - spot) / rng.uniform(0.5, 1.5, 45)) ** 2)
    image = image + 0.3 * (down * rng.uniform(0.2, 1, 45)) @ across.transpose(0, 2, 1)
    lean = rng.normal(0, 0.1)
    d_liver = rng.normal(37, 3) - 6 * z + y * np.cos(lean) + x * np.sin(lean) + 0.004 * (x + 20) ** 2
    over(fat * 0.85, inside(d_liver - 3))
    over(rng.uniform(0.26, 0.4) + 0.03 * fine + 0.02 * coarse, inside(d_liver))
    sx, sy = rng.normal(48, 6), rng.normal(-50, 4)
    d_stomach = np.sqrt((x - sx) ** 2 + 1.3 * (y - sy) ** 2) - rng.uniform(12, 22)
    over(rng.uniform(0.3, 0.5), inside(d_stomach))
    over(0.08 + 0.06 * abs(coarse), inside(d_stomach + 3))
    ax, ay = rng.normal(47, 3), rng.normal(-30, 3)
    d_aorta = np.sqrt((x - ax) ** 2 + (y - ay) ** 2) - rng.uniform(6, 8)
    over(0.25, inside(d_aorta - 1.5))
    over(blood * 1.05, inside(d_aorta))
    d_chest = rng.normal(46, 3) + 0.62 * x - 0.78 * y + 0.003 * (0.78 * x + 0.62 * y) ** 2
    over(0.3 + 0.08 * coarse, inside(d_chest))
    along = np.cos((0.78 * x + 0.62 * y) / rng.uniform(4.5, 6) + rng.uniform(0, 6))
    over(0.55, inside(np.maximum(abs(d_chest + 5) - 2.5, 3 * (0.3 - along))))
    over(fat, inside(d_chest + 11 + 2 * coarse))

    # Fat around the heart, then the heart itself.
    rim = 2.2 + ripple(1, 2.5) + ripple(2, 2.0) + 0.8 * coarse
    over(fat * 0.9, inside(np.maximum(d_chest, 0) + d_heart - rng.uniform(4, 18) - 2 * coarse))
    over(fat, inside(d_heart - np.maximum(rim, 0)) * np.clip(rim, 0, 1))
    over(muscle * 0.6, inside(d_heart - 0.8))
    over(muscle, inside(d_heart))
    over(blood * rng.normal(1, 0.04) + 0.03 * coarse, inside(np.maximum(d_rv, 0.8 - d_epi)))
    over(blood + 0.02 * coarse, inside(d_endo))
    belly = np.sqrt(np.clip(1 - ((z - 0.5) / 0.38) ** 2, 0, 1))        # papillary muscles: mid slices only
    for centre in (rng.normal(35, 8), rng.normal(238, 8)):
        px, py = (0.66 * radius * t for t in (np.cos(np.deg2rad(centre)), np.sin(np.deg2rad(centre))))
        d_pap = np.sqrt((x - px) ** 2 + (y - py) ** 2) - 0.21 * radius * belly
        over(muscle * 1.2, inside(d_pap) * belly)

    # Infarct: from the endocardium outwards (wavefront), in one coronary territory.
    territory = rng.choice(3, p=[0.45, 0.33, 0.22])
    centre = np.deg2rad([118, 245, 345][territory] + rng.normal(0, 10))
    half = np.deg2rad(rng.uniform(40, 90))
    middle, reach = rng.uniform([0.4, 0.2, 0.2], [0.8, 0.7, 0.7])[territory], rng.uniform(0.3, 0.65)
    deepest, core = rng.uniform(0.5, 1.1), rng.random() < 0.45
    taper = np.sqrt(np.clip(1 - ((z - middle) / reach) ** 2, 0, 1)) * infarcted
    taper = np.where(taper > 0.3, taper, 0)
    away = abs((angle - centre + np.pi) % (2 * np.pi) - np.pi) / (half * np.maximum(taper, 0.3))
    dome = np.clip(1 - away ** 2, 0, 1) ** 0.35 * (1 + 0.12 * coarse)
    depth = np.minimum(deepest * np.sqrt(taper) * dome, 1)              # share of the wall, 0 = no scar
    d_scar = np.maximum(-d_endo, d_endo - depth * wall)
    over(scar_grey, inside(d_scar) * np.clip(depth / 0.15, 0, 1))
    d_core = np.maximum(abs(d_endo - 0.42 * depth * wall) - 0.17 * depth * wall, (away - 0.4) * half * rho)
    d_core = np.where(core & (deepest > 0.6) & (depth > 0.6), d_core, 9)
    over(muscle, inside(d_core))
    mask = np.zeros((n, size, size), np.uint8)
    mask[d_epi < 0] = 2
    mask[(d_scar < 0) & (depth > 0.08)] = 3
    mask[(d_core < 0) & (mask == 3)] = 4
    mask[d_endo < 0] = 1

    # Scanner: texture, contrast, surface-coil bias, Rician noise (sd per pixel falls as pixels grow).
    gamma, sigma = np.exp(rng.normal(-0.05, 0.12)), rng.uniform(0.018, 0.03) * size / 128
    image = np.clip(image * (1 + 0.03 * fine + 0.03 * coarse), 0, None) ** gamma
    bias = np.exp(0.12 * smooth_noise(rng, 1, size, 64) + rng.uniform(0.0, 0.2) * (y - x) / 64)
    image = image * bias / bias.mean() * rng.normal(1, 0.03, (n, 1, 1))
    real, imaginary = rng.standard_normal((2, n, size, size), np.float32) * sigma
    image = np.sqrt((image + real) ** 2 + imaginary ** 2)
    fraction = infarct_fraction(mask)
    return dict(
        image=np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8), mask=mask, slice=np.arange(n),
        label=np.full(n, int(infarcted)), has_infarct=(fraction > 0).astype(np.uint8),
        infarct_fraction=fraction, age=np.full(n, age), sex=np.full(n, "M" if male else "F"),
        factor_infarct_fraction=fraction, factor_transmurality=np.where(fraction > 0, depth.max((1, 2)), 0),
        factor_wall_thickness=(thick * scale * UNIT).ravel(),
        factor_lv_radius=(radius * scale * UNIT).ravel(),
        factor_x=(dx * UNIT).ravel(), factor_y=(dy * UNIT).ravel(), factor_rotation=np.full(n, rotation),
        factor_contrast=np.full(n, blood ** gamma - muscle ** gamma))


def infarct_fraction(mask):
    """EMIDEC label maps (n,H,W) -> (n,) share of the myocardium (2, 3, 4) that is infarct (3, 4)."""
    return (mask >= 3).sum((1, 2)) / np.maximum((mask >= 2).sum((1, 2)), 1)


def phantom_hearts(path, subjects=100, seed=0, size=128, jitter=1.0):
    """Write LGE short-axis hearts with known causes; two thirds infarcted, mask ids as EMIDEC's.

    factor_*: x, y (right, up), lv_radius, wall_thickness in mm (the frame is 125 mm wide); rotation in
    degrees; infarct_fraction of the myocardium; transmurality of the wall (deepest point); contrast = blood -
    myocardium of full scale. jitter scales pose only, 0 = aligned. A subject depends on (seed, number)."""
    if subjects < 1 or size < 16 or jitter < 0:
        fail(f"{path}: phantom needs subjects >= 1, size >= 16, jitter >= 0")
    table = []
    for i in tqdm(range(subjects), "hearts", leave=False, disable=None):
        columns = heart(np.random.default_rng([seed, i]), size, jitter, infarcted=i % 3 > 0)
        columns["subject"] = np.repeat(f"heart{seed}-{i:03d}", len(columns["image"]))
        table.append(columns)
    write(path, table,
          dict(source=f"python data.py phantom hearts --subjects {subjects} --seed {seed} --size {size} "
                      f"--jitter {jitter:g}", licence="CC0", spacing_mm=[9.0, 125 / size, 125 / size],
               label_names=["normal", "pathological"], mask_names=HEART))


# ---------------------------------------------------------------------------------------------------
# Phantom brains: implicit functions of x (right), y (anterior), z (superior) in mm from the anterior
# commissure, so that one drawing serves slices and volumes. Grey values are shares of full scale.

MIDDLE = np.array([0.0, -16.0, 12.0])  # of the frame: the level of the thalami
BRAIN = ["background", "CSF", "grey matter", "white matter", "ventricle", "hippocampus"]


def waves(rng, x, y, z, length, n=8, slope=False):
    """Sum (sd 1) of n random plane waves of `length` mm at x, y, z; with slope also its three derivatives."""
    k = rng.standard_normal((n, 3))
    k *= 2 * np.pi / length / np.linalg.norm(k, axis=1, keepdims=True)
    total, slopes = 0, [0, 0, 0]
    for (a, b, c), phase in zip(k.tolist(), rng.uniform(0, 2 * np.pi, n).tolist()):
        angle = a * x + b * y + c * z + phase
        total = total + np.cos(angle) * (2 / n) ** 0.5
        if slope:
            sine = np.sin(angle) * -(2 / n) ** 0.5
            slopes = [s + t * sine for s, t in zip(slopes, (a, b, c))]
    return (total, slopes) if slope else total


def tube(x, y, z, points, tall=1.0):
    """Distance in mm to a chain of (x, y, z, radius); tall > 1 stretches its section along z."""
    best = np.float32(99)
    for (*a, r), (*b, s) in zip(points[:-1], points[1:]):
        a[2], b[2] = a[2] / tall, b[2] / tall
        d = [q - p for p, q in zip(a, b)]
        px, py, pz = x - a[0], y - a[1], z / tall - a[2]
        t = np.clip((px * d[0] + py * d[1] + pz * d[2]) / sum(q * q for q in d), 0, 1)
        away = np.sqrt((px - t * d[0]) ** 2 + (py - t * d[1]) ** 2 + (pz - t * d[2]) ** 2)
        best = np.minimum(best, away - r - t * (s - r))
    return best


def grid(shape, voxel):
    """x, y, z in mm of (D,H,W) voxels around MIDDLE: columns go right, rows back, slices up."""
    up, back, right = ((np.arange(n) + 0.5 - n / 2) * voxel for n in shape)
    return right[None, None] + MIDDLE[0], MIDDLE[1] - back[None, :, None], MIDDLE[2] + up[:, None, None]


def brain(rng, x, y, z, voxel, age=40.0, severity=0.0, alzheimer=0.0):
    """The noise-free T1 picture of one skull-stripped brain, and what it was drawn from.

    rng (freshly seeded) is the individual: the same seed is the same head at any age, in any disease.
    x, y, z: mm, broadcastable to (D,H,W); voxel: mm, the width of partial volume. age: of the brain, years.
    severity (0..1) of motor neuron disease, alzheimer (0..1). -> dict of image in [0,1], mask (BRAIN), and
    the share of each voxel that is head, ventricle, hippocampus."""
    x, y, z = (np.asarray(c, np.float32) for c in np.broadcast_arrays(x, y, z))

    def inside(distance):  # share of a voxel that lies inside: smooth partial volume
        return 0.5 - 0.5 * np.tanh(distance * (2 / max(1, voxel)))

    def over(colour, share, kind=None):
        nonlocal image
        image = image + (colour - image) * share
        if kind is not None:
            mask[share > 0.5] = kind

    def ball(at, radii, tilt=0.0):  # distance to an ellipsoid, turned about z by tilt (radians)
        p, q, s = X - at[0], y - at[1], z - at[2]
        c, d = float(np.cos(tilt)), float(np.sin(tilt))
        p, q = c * p - d * q, d * p + c * q
        e = np.sqrt((p / radii[0]) ** 2 + (q / radii[1]) ** 2 + (s / radii[2]) ** 2) + 1e-3
        return e * (e - 1) / np.sqrt((p / radii[0] ** 2) ** 2 + (q / radii[1] ** 2) ** 2
                                     + (s / radii[2] ** 2) ** 2 + 1e-9)

    def egg(at, radii, p=2.3):  # e = 1 on an ellipsoid with fuller corners -> e, unit normal, |grad e|
        e = sum(abs(c / r) ** p for c, r in zip(at, radii)) ** (1 / p) + 1e-3
        normal = [np.sign(c) * abs(c / r) ** (p - 1) / r for c, r in zip(at, radii)]
        steep = np.sqrt(sum(c * c for c in normal)) + 1e-9
        return e, [c / steep for c in normal], steep / e ** (p - 1)

    def sided(sd, mean=0.0):  # a value of its own in each hemisphere
        right, left = rng.normal(mean, sd, 2)
        return np.where(x > 0, np.float32(right), np.float32(left))

    # Ageing: slow at first, faster later. 0 at 20 years, 1 at 80.
    wear = 0.35 * (age - 20) / 60 + 0.65 * max(age - 45, 0) ** 2 / 35 ** 2

    # The individual: warped coordinates; X = distance from the midplane; the surface of the cerebrum.
    warp = [1.2 * waves(rng, x, y, z, 75, 6) + 0.4 * waves(rng, x, y, z, 34) for _ in range(3)]
    x, y, z = (c + d for c, d in zip((x, y, z), warp))
    X, back, high = abs(x), y + 16, z - 18                             # from the middle of the head
    stretch = np.exp(rng.normal(0, 0.023, 3)).tolist()
    radii = 66 * stretch[0] * (1 - 0.0011 * back), 79 * stretch[1], 58 * stretch[2]
    e, _, steep = egg((x, back, high), radii, 2.1)
    hull = (1 - e) / steep                                             # depth in mm
    lobe = np.minimum(np.minimum(X - 18, 37 - abs(back + 2)), z + 40)  # the temporal lobe hangs lower
    cerebrum = np.minimum(hull, np.maximum(z + 24 - 12 * inside((y + 42) * 0.2), lobe))
    centre = 1 - np.sqrt(((y + 4) / 40) ** 2 + ((z - 3) / 26) ** 2)  # > 0: below the corpus callosum's crest

    # Sulci are sheets that cut into the cerebrum: (distance, how far past the sheet's end, half width).
    gap, wide = 0.35 + 0.75 * wear, 0.7 + 0.5 * wear
    ends = 17 + sided(1.5)
    bend = [1.6 * waves(rng, x, y, z, 26) for _ in range(4)]
    strip = (y + 3 - sided(1.5) + 0.3 * (z - 16) + 0.28 * (62 - X)) * 0.92 + bend[0]  # central sulcus
    loss = np.clip(1 - (strip / 13) ** 2, 0, 1) * np.clip((34 - hull) / 12, 0, 1) * np.clip(z / 8, 0, 1)
    right, left = rng.permutation(np.float32([1, 0.65]))               # one side is worse
    loss = severity * loss * np.where(x > 0, right, left)
    insula = 39 - 0.8 * (y / 14) ** 2 + sided(1) + 0.6 * bend[3]
    lip = (z - 16 + 0.7 * (y + 25) + sided(2)) * 0.82 + 0.5 * bend[1]  # Sylvian fissure: climbs backwards
    over_lip = np.maximum(cerebrum - ends, 6 - lip)
    sheets = [(strip, over_lip, wide + 0.35 * gap + 3.6 * loss),
              (strip - 14 + bend[1], over_lip + 3, 0.7 * wide),
              (strip + 14 + bend[2], over_lip + 2, 0.7 * wide),
              (lip, np.maximum(insula - X, -44 - y), wide + 0.5 + 0.4 * wear + 1.0 * alzheimer),
              (X - insula, np.maximum(abs(y + 6) - 27, abs(z - 5) - 18), wide)]
    # Everywhere else: the zero set of random waves on the surface, carried inwards along rays.
    e, normal, _ = egg((X - 26, back, high), (np.where(X > 26, radii[0] - 26, 26), *radii[1:]))
    ray = np.maximum(e, 0.4)
    at = 26 + (X - 26) / ray + 99 * np.sign(x), back * (0.6 + 0.4 / ray), 0.65 * high / ray
    fold, slope = waves(rng, *at, 21, 16, slope=True)
    slope[2] = 0.65 * slope[2]                                         # sulci stand rather than lie
    along = sum(n * s for n, s in zip(normal, slope))
    fold = fold * ray / np.sqrt(sum(s * s for s in slope) - along ** 2 + 1e-3)
    deep = 18 + 5 * waves(rng, x, y, z, 45, 6)
    pia, half = np.float32(99), np.float32(99)                         # depth below the nearest surface

    def cut(depth, width):
        nonlocal pia, half
        half = np.where(depth < pia, width, half)
        pia = np.minimum(pia, depth) - np.maximum(4 - abs(pia - depth), 0) ** 2 / 16  # rounded gyri

    def sheet(s, past, width):
        cut(np.sqrt(s * s + np.maximum(past, 0) ** 2) - width, width)

    for each in sheets:
        sheet(*each)
    far = np.maximum(np.minimum(cerebrum, X) - deep, 34 * centre + 4)
    temporal = alzheimer * inside((lip + 2) * 0.4) * inside((15 - X) * 0.3)
    sheet(fold, np.maximum(far, 7 - pia), 0.85 * wide + 0.8 * temporal)
    sheet(x, 26 * centre, wide + 0.3)                                  # between the hemispheres
    cut(cerebrum - gap, 99)                                            # the surface itself
    thick = (3.3 - 0.5 * wear) * (1 - 0.5 * loss - 0.25 * temporal) + sided(0.1)

    # Ventricles, and hippocampi below and medial of the temporal horns.
    size = float(np.exp(rng.normal(0, 0.3))) * (0.75 + 1.1 * wear) * (1 + 0.6 * alzheimer)  # cross-section
    grow = size ** 0.5 * np.exp(sided(0.06))
    tip = float(rng.normal(-62, 3))
    d_body = tube(X, y, z, [(13, 29, 7, 1.6), (7, 20, 12, 3.2), (6, 5, 18, 3.4), (10, -16, 20, 3),
                            (21, -36, 14, 4.6), (22, -52, 11, 3), (19, tip, 9, 1)], 1.9) - (grow - 1) * 3.2
    d_horn = tube(X, y, z, [(22, -37, 12, 4), (32, -29, -3, 2.6), (33, -18, -13, 2), (29, -7, -17, 1.6)]) \
        - (grow - 1) * 2.4 - 2.2 * alzheimer
    d_third = np.maximum(X - 1.0 * grow, ball((0, -12, 4), (9, 16, 13)))
    shrink = float(np.exp(rng.normal(0, 0.06))) * (1 - 0.12 * wear) * (1 - 0.25 * alzheimer)
    d_ammon = tube(X, y, z, [(*p, r * shrink) for *p, r in (
        (25, -8, -18, 7), (28, -19, -15, 5.8), (29, -28, -9, 5), (24, -36, 0, 3.6))])

    texture = waves(rng, x, y, z, 9)
    white, grey = 0.80 + 0.008 * texture, 0.53 + 0.015 * texture
    image, mask = white, np.full(x.shape, 3, np.uint8)
    over(white - 0.18 * wear, np.exp(-np.maximum(np.minimum(d_body, d_horn), 0) / 5))
    tract = np.sqrt((X - 22.5) ** 2 + (y + 12 + 0.25 * (z - 16)) ** 2)  # corticospinal: internal capsule
    over(white - 0.34, severity * np.clip(1.8 - tract / 3.6, 0, 1) * np.clip(3 - abs(z - 12) / 10, 0, 1))
    over(grey, inside(pia - thick), 2)
    over(grey + 0.05, inside(ball((27, 3, 6), (5.5, 16, 15), -0.18)), 2)      # putamen
    over(grey + 0.17, inside(ball((20, -3, 2), (3.5, 8, 9), -0.45)), 2)       # pallidum
    over(grey + 0.03, inside(tube(X, y, z, [(14, 21, 8, 5), (14.5, 9, 14, 5), (17, -6, 20, 3.4),
                                            (22, -22, 20, 2)], 1.4)), 2)      # caudate
    over(grey + 0.08, inside(ball((11, -16, 12), (8.5, 14, 13), 0.45)), 2)    # thalamus
    ventricle, hippocampus = inside(np.minimum(np.minimum(d_body, d_horn), d_third)), inside(d_ammon)
    over(0.14, ventricle, 4)
    over(grey - 0.01, hippocampus, 5)
    pia = np.maximum(pia, -half)
    over(0.15, inside(pia) - inside(pia + 2 * half), 1)  # a sheet thinner than a voxel stays thin
    # Below the cerebrum: brainstem, cerebellum with leaves that fan out from its core, cisterns between.
    below = inside(cerebrum + 0.5)
    d_stem = np.maximum(tube(x, y, z, [(0, -16, -6, 13), (0, -19, -25, 13), (0, -32, -60, 7)]), -56 - z)
    d_leaf = ball((18, -56, -35), (30, 26, 20))
    fan, out = np.arctan2(z + 34, -y - 38), np.sqrt((z + 34) ** 2 + (y + 38) ** 2)
    d_leaves = abs(np.sin(8 * fan)) * out / 8
    over(0.15, below, 1)
    over(white - 0.04, below * inside(d_stem), 3)
    over(grey, below * inside(d_leaf), 2)
    over(white - 0.02, below * inside(np.maximum(d_leaf + 4, 2.2 - d_leaves)), 3)
    near = abs(np.minimum(d_leaf, d_stem) + cerebrum)
    head = inside(np.minimum(np.minimum(d_leaf, d_stem) - 1, -cerebrum) - np.maximum(12 - near, 0) ** 2 / 48)
    mask[head < 0.5] = 0
    return dict(image=image * head, mask=mask, head=head, ventricle=ventricle * (1 - hippocampus),
                hippocampus=hippocampus)


def pose(rng, x, y, z, amount=1.0):
    """What registration leaves: about 1 mm and 1.5 degrees, times amount -> x, y, z, float32."""
    a, b, c = amount * rng.normal(0, 0.016, 3)
    turn = np.array([[1, a, b], [-a, 1, c], [-b, -c, 1]])              # small angles
    shift = amount * rng.normal(0, 0.7, 3) - turn @ MIDDLE + MIDDLE
    return [np.asarray(t[0] * x + t[1] * y + t[2] * z + s, np.float32) for t, s in zip(turn, shift)]


def brain_volume(key, x, y, z, voxel, **factors):
    """brain() for volumes: the individual is default_rng(key). Drawn in slabs that fit the processor's cache,
    several times faster at 128x160x128; a slice does not depend on its neighbours."""
    step = max(1, 20000 // x[0].size)
    slabs = [brain(np.random.default_rng(key), *(c[i:i + step] for c in (x, y, z)), voxel, **factors)
             for i in range(0, len(x), step)]
    return {name: np.concatenate([s[name] for s in slabs]) for name in slabs[0]}


def scan(rng, drawn, x, y, z):
    """A picture by brain() as a scanner shows it: contrast, bias field, Rician noise; uint8, 0 outside."""
    image = drawn["image"] ** float(np.exp(rng.normal(0, 0.08))) * float(np.exp(rng.normal(0, 0.03)))
    image = image * np.exp(0.05 * waves(rng, x, y, z, 160, 4))
    sigma = drawn["head"] * float(rng.uniform(0.015, 0.03))
    real, imaginary = rng.standard_normal((2, *image.shape), np.float32) * sigma
    image = np.sqrt((image + real) ** 2 + imaginary ** 2)
    return np.rint(255 * np.clip(image, 0, 1) * (drawn["head"] > 0.05)).astype(np.uint8)


HAZARD = dict(severity=np.log(1 / 0.73), age=np.log(1.3), male=np.log(1.2))  # per SD, per 10 years, for men
SEVERITY = 0.5, 20 ** -0.5  # mean and SD of the population: Beta(2, 2)


def survival(rng, severity, age, male):
    """Planted survival of patients (n,) -> time in days, event 0/1. Proportional hazards, see HAZARD.

    Weibull of shape 1.3, median 2.5 years at mean severity, 62 years; censored by the study's end alone."""
    risk = HAZARD["severity"] * (severity - SEVERITY[0]) / SEVERITY[1] \
        + HAZARD["age"] * (age - 62) / 10 + HAZARD["male"] * (male - 0.58)
    median = 2.5 * np.exp(-risk / 1.3)
    death = median * (rng.exponential(size=np.shape(risk)) / np.log(2)) ** (1 / 1.3)
    end = rng.uniform(1.5, 6.5, np.shape(risk))                        # years of follow-up
    return np.maximum(365.25 * np.minimum(death, end), 1), (death <= end).astype(np.uint8)


def person(rng, patient):
    """Who somebody in phantom_cohort is -> columns (1,) but for the picture. Years; time in days."""
    age = np.clip(rng.normal(62, 11, 1), 30, 85) if patient else rng.uniform(18, 90, 1)
    male = rng.random(1) < (0.58 if patient else 0.5)
    severity = rng.beta(2, 2, 1) * patient
    time, event = np.array([np.nan]), np.zeros(1, np.uint8)
    if patient:
        time, event = survival(rng, severity, age, male)
    return dict(label=np.array([int(patient)]), age=age, sex=np.where(male, "M", "F"), time=time, event=event,
                factor_severity=severity, factor_brain_age=np.clip(age + rng.normal(0, 5, 1), 18, 95))


def phantom_cohort(path, subjects=600, patients=220, seed=0, size=128):
    """Write one axial T1 slice each of healthy adults and of patients whose survival is planted.

    factor_severity 0..1 (0 = healthy); factor_ventricle in mm2; factor_brain_age in years. The hazard is
    1/0.73 times higher per SD of severity, see survival(). mask 4: where the disease changed this patient's
    own picture by more than 5 % of full scale. The frame is 176 mm wide. A subject depends on (seed, number)
    and on being a patient."""
    if subjects < 1 or patients < 0 or seed < 0 or size < 16:
        fail(f"{path}: phantom needs subjects >= 1, patients >= 0, seed >= 0, size >= 16")
    table, voxel = [], 176 / size
    # The level of the thalami. Stylised: the central sulcus, here only its lower end, is cut at full depth.
    x, y, z = grid((1, size, size), voxel)
    for i in tqdm(range(subjects + patients), "brains", leave=False, disable=None):
        ill = int(i >= subjects)
        key = seed, i - subjects * ill, ill
        rng = np.random.default_rng(key)
        columns = person(rng, ill)
        at, age = pose(rng, x, y, z), float(columns["factor_brain_age"][0])
        drawn, *well = (brain(np.random.default_rng([*key, 1]), *at, voxel, age, s)
                        for s in [float(columns["factor_severity"][0]), 0.0][:1 + ill])
        mask = np.array([0, 1, 2, 3, 1, 2], np.uint8)[drawn["mask"]]
        for healthy in well:                                           # the same brain without the disease
            mask[abs(drawn["image"] - healthy["image"]) > 0.05] = 4
        table.append(dict(image=scan(rng, drawn, *at), mask=mask, **columns,
                          subject=np.array([f"{['control', 'patient'][ill]}{seed}-{key[1]:03d}"]),
                          factor_ventricle=drawn["ventricle"].sum((1, 2), dtype=float) * voxel ** 2))
    write(path, table,
          dict(source=f"python data.py phantom cohort --subjects {subjects} --patients {patients} "
                      f"--seed {seed} --size {size}", licence="CC0", spacing_mm=[voxel, voxel],
               hr_per_sd=1 / 0.73, label_names=["healthy", "patient"],
               mask_names=[*BRAIN[:4], "lesion"]))


def phantom_brains(path, subjects=120, seed=0, size=48):
    """Write T1 volumes of controls (CN) and Alzheimer's disease (AD), 3-5 sessions each, 6 months apart.

    (D,H,W) = inferior to superior, anterior to posterior, left to right; D = W = size, H = size * 5/4 cut
    to a multiple of 8; isotropic, H is 176 mm. age and session (months) are the session's; factor_rate: years
    that this brain ages per year; factor_ventricle_ml, factor_hippocampus_ml: as drawn; factor_alzheimer
    0..1. All is held in memory, twice while writing: 480 volumes are 0.12 GB at 48x56x48, 2.5 GB at
    128x160x128. A subject depends on (seed, number); every second one has AD."""
    if subjects < 1 or seed < 0 or size < 16:
        fail(f"{path}: phantom needs subjects >= 1, seed >= 0, size >= 16")
    shape = size, size * 5 // 32 * 8, size
    table, voxel = [], 176 / shape[1]
    frame = grid(shape, voxel)
    for i in tqdm(range(subjects), "brains", leave=False, disable=None):
        rng, ill = np.random.default_rng([seed, i]), i % 2
        first, sex = rng.uniform(50, 90), "FM"[rng.integers(2)]
        rate = np.exp(rng.normal(0, 0.3)) * (1 + 1.5 * ill)
        ahead, stage = rng.normal(0, 5), rng.uniform(0.5, 0.9) * ill
        at, months, rows = pose(rng, *frame), 6.0 * np.arange(rng.integers(3, 6)), []
        for years in months / 12:
            ill_now, old = float(stage + 0.05 * ill * rate * years), float(first + ahead + rate * years)
            here = pose(rng, *at, 0.2)
            drawn = brain_volume([seed, i, 1], *here, voxel, age=old, alzheimer=ill_now)
            ml = {f"factor_{k}_ml": drawn[k].sum(dtype=float) * voxel ** 3 / 1000
                  for k in ("ventricle", "hippocampus")}
            rows.append(dict(image=scan(rng, drawn, *here), mask=drawn["mask"], age=first + years, **ml,
                             factor_brain_age=old, factor_alzheimer=ill_now))
        n = len(rows)
        table.append(dict({k: np.array([row[k] for row in rows]) for k in rows[0]}, session=months,
                          subject=np.repeat(f"brain{seed}-{i:03d}", n), label=np.full(n, ill),
                          sex=np.full(n, sex), factor_rate=np.full(n, rate)))
    write(path, table,
          dict(source=f"python data.py phantom brains --subjects {subjects} --seed {seed} --size {size}",
               licence="CC0", spacing_mm=[voxel] * 3, label_names=["CN", "AD"], mask_names=BRAIN))


# ---------------------------------------------------------------------------------------------------
# EMIDEC (Lalande et al. 2020): Case_N006/Images/Case_N006.nii.gz, Case_N006/Contours/..., "Case N006.txt"

def read_nifti(folder, case):
    """CASE.nii.gz of a folder -> (rows, columns, slices) float32 array, its spacing in mm.

    Also found: CASE.nii, and a folder of either name that holds the file. ValueError says why not."""
    import nibabel
    pattern = os.path.join(glob.escape(folder), case + ".nii")
    found = [p for end in (".gz", "", "/*.nii*", ".gz/*.nii*") for p in sorted(glob.glob(pattern + end))
             if os.path.isfile(p)]
    if not found:
        raise ValueError(f"no {pattern}.gz")
    volume = nibabel.load(found[0])
    zooms = np.array(volume.header.get_zooms()[:3], float)  # not the affine: here it says 1 mm, wrongly
    if len(volume.shape) != 3 or np.prod(volume.shape, dtype=object) > 1e9:
        raise ValueError(f"{found[0]}: shape {volume.shape}, expected one volume")
    if not (np.isfinite(zooms).all() and (zooms > 0).all()):
        raise ValueError(f"{found[0]}: spacing {zooms} mm in the header")
    voxels = volume.get_fdata(dtype=np.float32)
    if not np.isfinite(voxels).all():
        raise ValueError(f"{found[0]}: NaN or Inf")
    return voxels, zooms


def read_case(root, case):
    """One EMIDEC case -> image and mask (rows, columns, slices), spacing in mm, age or NaN, sex or ""."""
    image, zooms = read_nifti(os.path.join(root, case, "Images"), case)
    stored, _ = read_nifti(os.path.join(root, case, "Contours"), case)
    mask = np.rint(stored).astype(np.uint8)  # some are floats like 1.9999
    if mask.shape != image.shape:
        raise ValueError(f"image {image.shape} but contours {mask.shape}")
    if abs(mask - stored).max() > 0.1 or mask.max() > 4 or not (mask >= 2).any():
        raise ValueError(f"contours hold {np.unique(stored)[:8]}, expected 0 to 4 and some myocardium")
    entry, text = {}, os.path.join(root, case.replace("_", " ") + ".txt")
    if os.path.isfile(text):
        with open(text, encoding="latin-1") as file:  # "Age\xa0: 61": no-break spaces, which strip() drops
            entry = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in file)}
    age = re.match(r"\d+(\.\d+)?", entry.get("age", ""))
    return image, mask, zooms, float(age[0]) if age else np.nan, entry.get("sex", "")[:1].upper()


def emidec(root, out, spacing=None):
    """Convert EMIDEC: 128x128 around each heart, the same mm per pixel for all; rows = first NIfTI axis.

    spacing None: the smallest at which every heart (myocardium + 25 % margin on each side) fits; pass
    that of the training file to convert others alike. Grey window: percentiles 0-99.5 of each cropped
    volume. Slices without myocardium are dropped; skipped cases are listed with the reason."""
    try:
        import nibabel
    except ImportError:
        fail("emidec reads NIfTI files: pip install nibabel")
    cases = sorted(c for c in (os.listdir(root) if os.path.isdir(root) else [])
                   if re.fullmatch(r"Case_[NP]\d+", c) and os.path.isdir(os.path.join(root, c)))
    if not cases:
        fail(f"{root}: no folders Case_N... or Case_P...; pass the folder that holds them")
    read, skipped, parts = {}, [], []
    for case in tqdm(cases, "reading", disable=None):
        try:
            read[case] = read_case(root, case)
        except (ValueError, OSError, EOFError, nibabel.filebasedimages.ImageFileError) as why:
            skipped.append(f"{case}: {' '.join(str(why).split())}")
            tqdm.write(f"skipped {skipped[-1]}")
    if not read:
        fail(f"{root}: none of {len(cases)} cases could be read; the first: {skipped[0]}")
    corners = {}
    for case, (_, mask, *_) in read.items():
        where = np.argwhere(mask >= 2)[:, :2]
        corners[case] = where.min(0), where.max(0) + 1
    zooms = {case: c[2] for case, c in read.items()}
    spacing = spacing or max(1.5 * ((b - a) * zooms[c][:2]).max() / 128 for c, (a, b) in corners.items())
    for case, (image, mask, _, age, sex) in read.items():
        step = spacing / zooms[case][:2]
        start = sum(corners[case]) / 2 - 64 * step
        keep = np.flatnonzero((mask >= 2).any((0, 1)))
        image = resample(image.transpose(2, 0, 1)[keep], start, step, 128)
        mask = resample(mask.transpose(2, 0, 1)[keep], start, step, 128, nearest=True)
        low, high = np.percentile(image, [0, 99.5])
        image, n = np.clip((image - low) / max(high - low, 1e-6), 0, 1), len(keep)
        parts.append(dict(
            image=np.rint(255 * image).astype(np.uint8), mask=mask, slice=keep, subject=np.full(n, case),
            label=np.full(n, int(case[5] == "P")), has_infarct=(mask >= 3).any((1, 2)).astype(np.uint8),
            infarct_fraction=infarct_fraction(mask), age=np.full(n, age), sex=np.full(n, sex)))
    write(out, parts, dict(
        source="EMIDEC (emidec.com, Lalande et al. 2020), python data.py emidec", licence="CC BY-NC-SA 4.0",
        spacing_mm=[float(np.median([z[2] for z in zooms.values()])), spacing, spacing],
        label_names=["normal", "pathological"], mask_names=HEART))
    print(f"{out}: {len(read)} subjects, {sum(len(p['slice']) for p in parts)} slices, {spacing:.4f} mm "
          f"per pixel, {len(skipped)} skipped")


# ---------------------------------------------------------------------------------------------------
# Command line

def summary(path):
    """Check, then print what the file holds; ends with ok."""
    data = check_pixels(load(path))
    patients = lambda rows: len(np.unique(data.subject[rows]))
    shape = " x ".join(map(str, data.image.shape[1:]))
    print(f"{path}: {patients(...)} subjects, {len(data)} images of {shape}")
    for name, x in data.columns.items():
        if x.dtype.kind != "U" and name != "label":
            known = x[~np.isnan(x)]
            limits = f"{known.min():.4g} to {known.max():.4g}" if len(known) else "all missing"
            print(f"  {name}: {limits}")
            continue
        names = dict(enumerate(data.label_names)) if name == "label" else {"": "missing"}
        values = zip(*np.unique(x, return_counts=True))
        print(f"  {name}: " + ", ".join(f"{names.get(v, v)} {n}" for v, n in values))
    if data.mask is not None:
        print("  mask: " + (", ".join(data.attrs.get("mask_names", [])) or "labels without names"))
    part = split(data)
    print(f"  split ({'seed 0' if data.split is None else 'stored'}): "
          + ", ".join(f"{p} {patients(part == p)} subjects" for p in ("train", "val", "test")))
    print(f"  fingerprint {data.fingerprint}, {len(data.warnings)} warnings\nok")


def show(path, out):
    """Contact sheet: up to 12 subjects as rows, 8 of their images (middle of volumes), mask contours."""
    data = load(path)
    subjects = np.sort(np.random.default_rng(0).permutation(np.unique(data.subject))[:12])
    zoom = max(1, 192 // data.image.shape[-1])
    colours = [(255, 80, 255), (255, 80, 80), (80, 255, 80), (255, 224, 64), (64, 192, 255)]
    h, w = (zoom * s for s in data.image.shape[-2:])
    sheet = Image.new("RGB", (8 * w, len(subjects) * (h + 14)))
    for r, subject in enumerate(subjects):
        rows = np.flatnonzero(data.subject == subject)
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, 8).astype(int))]
        known = [f"{k} {data.columns[k][rows[0]]:.4g}" for k in ("label", "age") if k in data.columns]
        ImageDraw.Draw(sheet).text((4, r * (h + 14) + 1), ", ".join([subject, *known]), fill="white")
        for c, row in enumerate(rows):
            image, *mask = (a[[row]][0] for a in (data.image, data.mask) if a is not None)
            if image.ndim == 3:
                image, *mask = (a[len(a) // 2] for a in (image, *mask))
            tile = np.array(Image.fromarray(image).resize((w, h), Image.BICUBIC).convert("RGB"))
            for m in mask:
                m = np.pad(m.repeat(zoom, 0).repeat(zoom, 1), 1, "edge")
                inner = m[1:-1, 1:-1]
                edge = np.any([inner != n for n in (m[2:, 1:-1], m[:-2, 1:-1], m[1:-1, 2:], m[1:-1, :-2])], 0)
                for value in np.unique(inner[inner > 0]):
                    tile[edge & (inner == value)] = colours[value % 5]
            sheet.paste(Image.fromarray(tile), (c * w, r * (h + 14) + 14))
    try:
        sheet.save(out)
    except (OSError, ValueError) as error:
        fail(f"{out}: cannot be written: {error}")
    print(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    verify, sheet, phantom, nifti = map(commands.add_parser, ("check", "show", "phantom", "emidec"))
    verify.add_argument("path")
    sheet.add_argument("path")
    sheet.add_argument("--out", default="sheet.png")
    phantom.add_argument("kind", choices=["hearts", "cohort", "brains"])
    phantom.add_argument("out")
    for name, kind, of in (("subjects", int, ""), ("patients", int, " (cohort)"), ("seed", int, ""),
                           ("size", int, ""), ("jitter", float, " (hearts)")):
        phantom.add_argument("--" + name, type=kind, help=f"default: see above{of}")
    nifti.add_argument("root")
    nifti.add_argument("out")
    nifti.add_argument("--spacing", type=float, help="mm per pixel; default: the smallest that fits all")
    for p in (parser, verify, sheet, phantom, nifti):
        p.error = lambda message: fail(f"{message}; see python data.py --help")  # one line, as all errors
    a = parser.parse_args()
    if a.command == "check":
        summary(a.path)
    elif a.command == "show":
        show(a.path, a.out)
    elif a.command == "phantom":
        given = {k: getattr(a, k) for k in ("subjects", "patients", "seed", "size", "jitter")
                 if getattr(a, k) is not None}
        for name, kind in (("patients", "cohort"), ("jitter", "hearts")):
            if name in given and a.kind != kind:
                fail(f"--{name} is for phantom {kind} only")
        dict(hearts=phantom_hearts, cohort=phantom_cohort, brains=phantom_brains)[a.kind](a.out, **given)
        print(a.out)
    else:
        emidec(a.root, a.out, a.spacing)


if __name__ == "__main__":
    main()
