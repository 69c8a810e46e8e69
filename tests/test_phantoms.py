"""The phantoms keep their word: factors against masks, ageing, disease, planted survival. Edges of images:
Canny against skimage, strokes."""
import numpy as np
import pandas as pd
import pytest
from lifelines import CoxPHFitter
from scipy import ndimage

import data


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> Dataset of a small phantom."""
    folder = tmp_path_factory.mktemp("phantoms")
    data.phantom_hearts(str(folder / "hearts.h5"), subjects=24, seed=1)
    data.phantom_views(str(folder / "views.h5"), subjects=9, seed=1)
    data.phantom_cohort(str(folder / "cohort.h5"), subjects=8, patients=16, seed=3, size=64)
    data.phantom_brains(str(folder / "brains.h5"), subjects=8, seed=2, size=32)
    return {name: data.check(str(folder / f"{name}.h5")) for name in data.PHANTOMS}


def test_a_subject_depends_on_seed_and_number_only(made, tmp_path):
    for name, phantom in data.PHANTOMS.items():
        d, path = made[name], str(tmp_path / "p.h5")
        size = dict(size=d.image.shape[-1], **({"patients": 0} if name == "cohort" else {}))
        phantom(path, subjects=2, seed={"cohort": 3, "brains": 2}.get(name, 1), **size)
        few = data.load(path)
        assert (few.image == d.image[:len(few)]).all() and (few.mask == d.mask[:len(few)]).all(), name
        assert list(few.subject) == list(d.subject[:len(few)])
        phantom(path, subjects=2, seed=9, **size)
        assert not set(data.load(path).subject) & set(d.subject)


def test_hearts_are_what_they_were():
    """The README's numbers hang on these pictures."""
    c = data.heart(np.random.default_rng([7, 2]), 64, True)
    assert np.bincount(c["mask"].ravel()).tolist() == [19425, 2652, 2204, 257, 38]
    means = [128.792, 128.117, 122.542, 118.187, 107.298, 97.177]
    assert abs(c["image"].mean((1, 2)) - means).max() < 0.01


def test_factors_of_hearts_are_those_of_their_masks(made):
    d = made["hearts"]
    c, mask = d.columns, d.mask
    scar, muscle = (mask >= 3).sum((1, 2)), (mask >= 2).sum((1, 2))
    assert np.allclose(c["infarct_fraction"], scar / muscle) and (c["has_infarct"] == (scar > 0)).all()
    assert ((c["factor_transmurality"] > 0) == (scar > 0)).all()
    assert {*d.subject[scar > 0]} == {*d.subject[c["label"] == 1]}
    radius = np.sqrt((mask == 1).sum((1, 2)) / np.pi) * 125 / 128               # mm
    assert abs(radius - c["factor_lv_radius"]).mean() < 1
    centre = np.array([np.argwhere(m > 0).mean(0) for m in mask])
    assert abs((63.5 - centre[:, 0]) * 125 / 128 - c["factor_y"]).max() < 3
    assert abs((centre[:, 1] - 63.5) * 125 / 128 - c["factor_x"]).max() < 3
    grey = [np.mean([x[m == v].mean() for x, m in zip(d.image, mask) if (m == v).any()]) for v in range(5)]
    assert grey[2] < 0.7 * grey[1] and abs(grey[3] / grey[1] - 1) < 0.15 and grey[4] < grey[3]   # scar as bright as blood


def test_views_are_nested_and_beat(made):
    d = made["views"]
    c, m = d.columns, d.mask
    assert (data.cine_ids(d)[:4] == range(4)).all()
    around = np.array([ndimage.binary_dilation(x == 1) for x in m])
    short = c["view"] == 0
    assert np.isin(m[around & short[:, None, None]], (1, 2)).all()           # the cavity touches only muscle
    assert np.isin(m[around & ~short[:, None, None]], (1, 2)).mean() > 0.97  # but is open to the atrium
    area, ef = {v: (m == v).sum((1, 2)) for v in (1, 2, 3)}, []
    for s in np.unique(d.subject):
        for view in (0, 1):
            here = (d.subject == s) & (c["view"] == view)
            ed, es = (np.flatnonzero(here & (c["phase"] == p)) for p in (0, 1))
            assert (c["slice"][ed] == c["slice"][es]).all() and (area[1][es] < area[1][ed]).all()
            if view == 0:
                ef.append((1 - area[1][es].sum() / area[1][ed].sum(), c["factor_ejection_fraction"][ed[0]]))
    assert np.corrcoef(np.array(ef).T)[0, 1] > 0.95
    radius = np.sqrt(area[1][short] / np.pi) * d.attrs["spacing_mm"][1]
    assert abs(radius - c["factor_lv_radius"][short]).max() < 1.5


# ---------------------------------------------------------------- brains

VOXEL = 176 / 96
AT = data.grid((1, 96, 96), VOXEL)


def draw(number, **factors):
    return data.brain(np.random.default_rng(number), *AT, VOXEL, **factors)


def test_ageing_is_monotone_and_faster_after_60():
    ages = np.arange(20, 91, 10)
    drawn = [[draw(k, age=float(a)) for a in ages] for k in range(4)]
    ventricle = np.array([[d["ventricle"].sum() for d in row] for row in drawn])
    cortex = np.array([[(d["mask"] == 2).sum() for d in row] for row in drawn])
    assert (np.diff(ventricle) > 0).all() and (cortex[:, -1] < cortex[:, 0]).all()
    assert (np.diff(ventricle)[:, -3:].mean(1) > 1.5 * np.diff(ventricle)[:, :3].mean(1)).all()


def test_motor_neuron_disease_is_local_and_grows_with_severity():
    x, y, _ = np.broadcast_arrays(*AT)
    for k in range(4):
        healthy, *ill = (draw(k, age=60.0, severity=s)["image"] for s in (0, 0.25, 0.5, 0.75, 1.0))
        changes = [abs(image - healthy) for image in ill]
        assert (np.diff([(change > 0.05).sum() for change in changes]) > 0).all()
        assert changes[-1][(y > 30) | (y < -40) | (abs(x) < 8)].max() == 0   # frontal, occipital, midline


def test_cohort_file_says_what_was_planted(made):
    d = made["cohort"]
    c, ill = d.columns, d.columns["label"] == 1
    assert ill.sum() == 16
    assert np.isnan(c["time"][~ill]).all() and (c["time"][ill] >= 1).all() and not c["event"][~ill].any()
    assert not c["factor_severity"][~ill].any() and d.attrs["hr_per_sd"] == 1 / 0.73
    share = (d.mask == 4).sum((1, 2)) / (d.mask > 0).sum((1, 2))
    assert not share[~ill].any() and np.corrcoef(share[ill], c["factor_severity"][ill])[0, 1] > 0.8


def test_cox_recovers_the_planted_hazards():
    keys = [(seed, k, 1) for seed in range(14) for k in range(220)]
    people = [data.person(np.random.default_rng(key), True) for key in keys]
    who = {k: np.concatenate([p[k] for p in people]) for k in people[0]}
    severity, male = (who["factor_severity"] - data.SEVERITY[0]) / data.SEVERITY[1], who["sex"] == "M"
    x = pd.DataFrame(dict(severity=severity, age=who["age"] / 10, male=male * 1.0, time=who["time"],
                          event=who["event"]))
    cox = CoxPHFitter().fit(x, "time", "event")
    for name, truth in (("severity", np.log(1 / 0.73)), ("age", np.log(1.3)), ("male", np.log(1.2))):
        assert abs(cox.params_[name] - truth) < 3 * cox.standard_errors_[name] < 0.2, name
    assert abs(severity.mean()) < 0.06 and abs(severity.std() - 1) < 0.04
    assert who["event"].reshape(14, 220).sum(1).min() >= 120           # whatever the seed
    mean = np.full(4000, 0.5), np.full(4000, 62.0), np.full(4000, 0.58)
    alive = data.survival(np.random.default_rng(0), *mean)[0] > 365.25
    assert abs(alive.mean() - 0.5 ** (0.4 ** 1.3)) < 0.03              # S(1 y) of Weibull(1.3), median 2.5 y


def test_a_slice_of_a_brain_is_a_slice_of_the_volume():
    x, y, z = data.grid((9, 40, 36), 4.0)
    at = data.pose(np.random.default_rng(5), x, y, z)
    factors = dict(age=70.0, alzheimer=0.5)
    volume = data.brain_volume(7, *at, 4.0, **factors)
    for k in (0, 4, 8):
        one = data.brain(np.random.default_rng(7), *(c[k:k + 1] for c in at), 4.0, **factors)
        for name in one:
            np.testing.assert_array_equal(one[name][0], volume[name][k], err_msg=name)


def test_people_differ_three_times_as_much_where_three_times_as_much_is_their_own(made, tmp_path):
    """The variance of the mask of the head over six people; at its rim it grows as the differences do."""
    data.phantom_brains(str(tmp_path / "own.h5"), subjects=6, seed=2, size=32, own=3.0)
    first = lambda d: d.mask[np.unique(d.subject, return_index=True)[1][:6]] > 0
    spread = [first(d).var(0).sum() for d in (made["brains"], data.load(str(tmp_path / "own.h5")))]
    assert 2 < spread[1] / spread[0] < 4


def test_brains_shrink_as_their_factors_say(made):
    d = made["brains"]
    c, voxel = d.columns, d.attrs["spacing_mm"][0]
    assert d.image.shape[1:] == (32, 40, 32)
    ventricle, hippocampus = c["factor_ventricle_ml"], c["factor_hippocampus_ml"]
    counted = (d.mask == 5).sum((1, 2, 3)) * voxel ** 3 / 1000           # labels agree with the shares
    assert np.corrcoef(counted, hippocampus)[0, 1] > 0.9
    for s in np.unique(d.subject):
        rows = np.flatnonzero(d.subject == s)
        session = c["session"][rows]
        assert 3 <= len(rows) <= 5 and session[0] == 0 and (np.diff(session) > 0).all()
        np.testing.assert_allclose(c["age"][rows] - c["age"][rows[0]], session / 12, atol=1e-4)
        growth = 12 * np.log(ventricle[rows[-1]] / ventricle[rows[0]]) / session[-1]
        loss = 12 * np.log(hippocampus[rows[-1]] / hippocampus[rows[0]]) / session[-1]
        if c["label"][rows[0]]:                                          # AD: every visit is worse
            assert (np.diff(ventricle[rows]) > 0).all() and (np.diff(hippocampus[rows]) < 0).all()
            assert growth > 0.03 and loss < -0.02
        else:
            assert 0 < growth < 0.06 and -0.03 < loss < 0


# ---------------------------------------------------------------- edges

@pytest.mark.parametrize("sigma", [0.7, 1.5, 2.5])
def test_canny_equals_skimage(made, sigma):
    feature = pytest.importorskip("skimage.feature")
    i, j = np.mgrid[:61, :80]
    disc = (np.hypot(i - 30, j - 42) < 20).astype(float)
    noise = np.random.default_rng(0).random(disc.shape)
    views = made["views"].image
    for image in [disc + 0.3 * noise, noise, *(views[[0, 7, -1]] / 255.0)]:
        for low, high in ((0.3, 0.6), (0.5, 0.8), (0.7, 0.9)):  # pixel for pixel
            ours = data.canny(image, sigma, low, high, np.ones(image.shape, bool))
            assert (ours == feature.canny(image, sigma, low, high, use_quantiles=True)).all()


def pieces(x):
    part, _ = ndimage.label(x, np.ones((3, 3)))
    return np.bincount(part.ravel())[1:]


def test_edges_follow_the_anatomy_and_drop_noise(made):
    image, mask = made["views"].image[:12], made["views"].mask[:12]
    found = data.edges(image)
    assert found.dtype == bool and 0.01 < found.mean() < 0.12 and min(min(pieces(x)) for x in found) >= 8
    endo = data.edge_map(image, np.where(mask == 1, 1, 0).astype(np.uint8), "mask")
    near = np.array([ndimage.distance_transform_edt(~x) for x in found])
    assert (near[endo] <= 2).mean() > 0.9 and near[endo].mean() < near.mean() / 3    # blood against muscle
    dim = (image * 0.5).astype(np.uint8)                         # thresholds are relative to the image
    assert abs(data.edges(dim).mean() / found.mean() - 1) < 0.25
    padded = data.edges(np.pad(image, ((0, 0), (20, 20), (20, 20))))[:, 20:-20, 20:-20]
    assert (padded == found)[:, 3:-3, 3:-3].mean() > 0.99        # and not to how much surrounds it
    assert not data.edges(np.full((1, 40, 40), 90, np.uint8)).any()


def test_edge_modes(made):
    image, mask, rng = made["views"].image[:6], made["views"].mask[:6], np.random.default_rng
    full = data.edge_map(image)
    assert (full == data.edges(image)).all() and (full == data.edge_map(full)).all()
    a, b, c = (data.edge_map(x, mask, "sparse", rng(s)) for x, s in ((full, 3), (image, 3), (full, 4)))
    assert (a == b).all() and (a != c).any() and not (a & ~full).any()      # few whole edges
    assert all(1 <= len(pieces(x)) <= 8 and min(pieces(x)) >= 5 for x in a)
    assert not data.edge_map(image, mask, "none").any()
    square = np.pad(np.full((1, 4, 4), 2, np.uint8), ((0, 0), (3, 3), (3, 3)))
    square[0, 4:6, 4:6] = 1
    assert data.edge_map(square, square, "mask").sum() == 12     # one pixel wide: the ring of 2s
