"""Tests of bipolar/data/ and bipolar/seeding.py: sources, splits, batches, augmentation, streams of random numbers."""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from bipolar import build, sweep
from bipolar.data import sources
from bipolar.data.batches import PADDING_MODES, Augmentation, Batches, carve_validation
from bipolar.data.sources import Arrays, digits, gaussian, hold_out, npz, torchvision_images
from bipolar.errors import ConfigError, DataError
from bipolar.seeding import derive_seed, seed_everything

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CPU = torch.device("cpu")

some_examples = settings(deadline=None, max_examples=40)


def rows(array):
    """The samples as a list of bytes, which can be counted and compared."""
    return [np.ascontiguousarray(sample).tobytes() for sample in array]


def images_of(count=12, height=6, width=5, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def numbered(images):
    """Arrays whose labels are the indices of the samples, for train and test alike."""
    labels = np.arange(len(images))
    return Arrays(images, labels, images, labels, classes=len(images))


def batches_of(images, batch_size=4, seed=0, **augmentation):
    """Batches of training images whose targets are the indices of the images."""
    labels = np.arange(len(images))
    splits = dict.fromkeys(("train", "valid", "test"), (images, labels))
    return Batches(splits, len(images), CPU, batch_size, seed, Augmentation(**augmentation))


def targets_of(batches):
    return [targets.tolist() for _, targets in batches]


def assert_same_batches(one, other):
    one, other = list(one), list(other)
    assert len(one) == len(other)
    for (x, y), (expected_x, expected_y) in zip(one, other, strict=True):
        assert torch.equal(x, expected_x)
        assert torch.equal(y, expected_y)


# --- digits -----------------------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    data = digits()
    expected = zip(rows(bunch.images.astype(np.uint8)), bunch.target.tolist(), strict=True)
    images, labels = np.concatenate([data.x_train, data.x_test]), np.concatenate([data.y_train, data.y_test])
    assert Counter(zip(rows(images), labels.tolist(), strict=True)) == Counter(expected)


def test_form_of_digits():
    data = digits()
    assert data.x_train.shape == (1438, 8, 8, 1)
    assert data.x_test.shape == (359, 8, 8, 1)
    assert data.x_train.dtype == data.x_test.dtype == np.uint8
    assert data.y_train.dtype == data.y_test.dtype == np.int64
    assert data.x_train.max() == 16
    assert data.classes == 10
    assert set(data.y_train.tolist()) == set(data.y_test.tolist()) == set(range(10))


def test_digits_are_the_same_each_time():
    for array, again in zip(digits(), digits(), strict=True):
        assert np.array_equal(array, again)


@pytest.mark.parametrize("test_fraction", [0.1, 0.5])
def test_test_fraction(test_fraction):
    assert len(digits(test_fraction).y_test) == round(1797 * test_fraction)


def test_the_test_set_of_digits_follows_from_its_seed():
    assert not np.array_equal(digits(split_seed=0).x_test, digits(split_seed=1).x_test)


@pytest.mark.parametrize("test_fraction", [0.0, 1.0, -0.1, 2, "half", 1e-4, 1 - 1e-4])
def test_test_fractions_that_leave_nothing_on_one_side(test_fraction):
    with pytest.raises(ConfigError, match="test_fraction"):
        digits(test_fraction)


# --- gaussian ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8,), (3, 4, 4)])
def test_form_of_gaussian(shape):
    data = gaussian(shape, classes=4, train_samples=50, test_samples=20)
    assert data.x_train.shape == (50, *shape)
    assert data.x_test.shape == (20, *shape)
    assert data.x_train.dtype == data.x_test.dtype == np.float32
    assert data.y_train.dtype == data.y_test.dtype == np.int64
    assert set(data.y_train.tolist()) == set(range(4))
    assert data.classes == 4


@pytest.mark.parametrize("mean", [0.0, 5.0, -2.0])
@pytest.mark.parametrize("separation", [0.0, 1.0, 3.0])
def test_gaussian_has_the_mean_and_the_standard_deviations_it_promises(mean, separation):
    data = gaussian((400,), classes=20, train_samples=4000, test_samples=1000, mean=mean, separation=separation)
    for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        centres = np.stack([x[y == label].mean(0) for label in range(20)])
        assert (x - centres[y]).std() == pytest.approx(1, rel=0.02)
        assert centres.mean() == pytest.approx(mean, abs=0.02 + 0.05 * separation)
        # a mean over about len(x) / 20 samples is itself uncertain
        assert centres.std() ** 2 == pytest.approx(separation**2 + 20 / len(x), rel=0.1)


def test_gaussian_has_the_same_centres_in_training_and_test():
    data = gaussian((400,), classes=3, train_samples=900, test_samples=900, separation=2.0)
    centres = [
        np.stack([x[y == label].mean(0) for label in range(3)])
        for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test))
    ]
    assert np.abs(centres[0] - centres[1]).max() < 0.5


def test_without_separation_the_inputs_do_not_depend_on_the_labels():
    same = gaussian((5,), classes=10, train_samples=30, test_samples=10, mean=3.0, separation=0.0)
    data = gaussian((2000,), classes=2, train_samples=400, test_samples=10, separation=0.0)
    difference = data.x_train[data.y_train == 0].mean(0) - data.x_train[data.y_train == 1].mean(0)
    assert difference.std() == pytest.approx(0.1, rel=0.1)  # sqrt(1/200 + 1/200): that of chance
    assert same.x_train.mean() == pytest.approx(3, abs=0.3)


def test_gaussian_follows_from_its_seed():
    one, same, other = (gaussian((6,), train_samples=20, data_seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not np.array_equal(one.x_train, other.x_train)
    assert not np.isin(one.x_train, one.x_test).any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"classes": 0},
        {"train_samples": 0},
        {"test_samples": 2.5},
        {"shape": [8, 0]},
        {"shape": ["8"]},
        {"shape": 8},
        {"mean": "zero"},
        {"separation": -1},
        {"data_seed": -1},
    ],
)
def test_wrong_options_of_gaussian(wrong):
    (name,) = wrong
    with pytest.raises(ConfigError, match=rf"^{name}=.* is not allowed; give "):
        gaussian(**wrong)


# --- npz --------------------------------------------------------------------------------------------------------------


def npz_arrays():
    return {
        "x_train": images_of(6, 4, 3),
        "y_train": np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8),
        "x_test": images_of(2, 4, 3, seed=1),
        "y_test": np.array([4, 0], dtype=np.int32),
    }


def saved(tmp_path, **changes):
    path = tmp_path / "images.npz"
    np.savez(path, **{key: value for key, value in (npz_arrays() | changes).items() if value is not None})
    return str(path)


def test_npz_round_trip(tmp_path):
    data = npz(saved(tmp_path))
    for key, expected in npz_arrays().items():
        assert np.array_equal(getattr(data, key), expected)
    assert data.x_train.dtype == np.uint8
    assert data.y_train.dtype == data.y_test.dtype == np.int64
    assert data.classes == 5


def test_npz_may_be_compressed_and_have_more_in_it(tmp_path):
    path = tmp_path / "more.npz"
    np.savez_compressed(path, **npz_arrays(), comment=np.array("mine"))
    assert np.array_equal(npz(str(path)).x_train, npz_arrays()["x_train"])


@pytest.mark.parametrize("path", [None, ""])
def test_npz_needs_a_path(path):
    with pytest.raises(DataError, match=r"needs dataset\.path=FILE\.npz \(keys x_train, y_train, x_test, y_test\)"):
        npz(path)


@pytest.mark.parametrize("name", ["missing.npz", "."])
def test_npz_that_is_no_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        npz(name)
    assert (
        str(caught.value) == f"dataset.path={name}: there is no such file (looked for {(tmp_path / name).absolute()})"
    )


def write_text(path):
    path.write_text("x_train")


def write_nothing(path):
    path.write_bytes(b"")


def write_npy(path):
    with path.open("wb") as file:
        np.save(file, images_of())


def write_half(path):
    np.savez(path, **npz_arrays())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_objects(path):
    np.savez(path, **npz_arrays() | {"y_test": np.array([{}, None], dtype=object)})


def write_flipped_bits(path):
    np.savez(path, **npz_arrays())
    content = bytearray(path.read_bytes())
    content[200] ^= 0xFF
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("write", [write_text, write_nothing, write_npy, write_half, write_objects, write_flipped_bits])
def test_npz_that_cannot_be_read(tmp_path, write):
    path = tmp_path / "images.npz"
    write(path)
    with pytest.raises(DataError, match=r"images\.npz is not a readable \.npz file \("):
        npz(str(path))


IMAGES = images_of(6, 4, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, r"missing y_test; it has x_train, y_train, x_test$"),
        ({"x_test": None, "y_test": None}, r"missing x_test, y_test; it has x_train, y_train$"),
        (dict.fromkeys(npz_arrays()), r"missing x_test, x_train, y_test, y_train; it has nothing$"),
        ({"x_train": IMAGES / 255}, r"x_train must be uint8 \[N, H, W, C\], not float64 \[6, 4, 3, 3\]$"),
        ({"x_train": IMAGES.astype(np.int64)}, r"x_train must be uint8 \[N, H, W, C\], not int64"),
        ({"x_test": IMAGES[..., 0]}, r"x_test must be uint8 \[N, H, W, C\], not uint8 \[6, 4, 3\]$"),
        ({"x_train": IMAGES[:0], "y_train": np.arange(0)}, r"x_train must be .*, not uint8 \[0, 4, 3, 3\]$"),
        ({"y_train": np.arange(5)}, r"y_train must be integers \[6\], not int64 \[5\]$"),
        ({"y_train": np.arange(6.0)}, r"y_train must be integers \[6\], not float64 \[6\]$"),
        ({"y_train": np.ones(6, dtype=bool)}, r"y_train must be integers \[6\], not bool \[6\]$"),
        ({"y_test": np.eye(2, dtype=int)}, r"y_test must be integers \[2\], not int64 \[2, 2\]$"),
        ({"y_test": np.array([0, -3])}, r"y_test has the negative label -3; labels run from 0$"),
        ({"x_test": images_of(2, 5, 3)}, r"training images are \[4, 3, 3\], test images \[5, 3, 3\]$"),
        ({"x_test": images_of(2, 4, 3, 1)}, r"training images are \[4, 3, 3\], test images \[4, 3, 1\]$"),
    ],
)
def test_npz_with_wrong_arrays(tmp_path, changes, message):
    with pytest.raises(DataError, match=rf"images\.npz: {message}"):
        npz(saved(tmp_path, **changes))


# --- torchvision ------------------------------------------------------------------------------------------------------

TORCHVISION = {"MNIST": "mnist", "FashionMNIST": "fashion_mnist", "CIFAR10": "cifar10", "CIFAR100": "cifar100"}


@pytest.mark.parametrize(("dataset", "name"), TORCHVISION.items())
def test_missing_images_come_with_the_command_that_gets_them(tmp_path, dataset, name):
    with pytest.raises(DataError) as caught:
        torchvision_images(dataset, str(tmp_path), download=False)
    message = str(caught.value)
    assert message.startswith(f"{dataset} is missing or damaged below {tmp_path} (")
    assert message.endswith(f"get it with: python scripts/download.py {name} --root {tmp_path}")
    assert "\n" not in message


@pytest.mark.parametrize(("dataset", "name"), TORCHVISION.items())
def test_missing_images_of_the_configuration(tmp_path, dataset, name):
    cfg = sweep.compose([f"dataset={name}", "dataset.download=false", f"data.root={tmp_path}"])
    with pytest.raises(DataError, match=rf"^{dataset} is missing .* python scripts/download\.py {name} --root"):
        build.arrays(cfg)


def test_a_damaged_cifar_file(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for file in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"):
        (folder / file).write_bytes(b"not the official file")
    with pytest.raises(DataError, match=r"^CIFAR10 is missing or damaged .* python scripts/download\.py cifar10 "):
        torchvision_images("CIFAR10", str(tmp_path), download=False)


@pytest.mark.parametrize("wrong", ["MNISTT", "mnist", "VisionDataset", None])
def test_other_names_are_refused(tmp_path, wrong):
    with pytest.raises(ConfigError, match=r"MNIST, FashionMNIST, CIFAR10"):
        torchvision_images(wrong, str(tmp_path), download=False)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The data beside the repository, unpacked."""
    if not (SHARED / "prepare.py").is_file():
        pytest.skip(f"there is no {SHARED / 'prepare.py'}")
    folder = tmp_path_factory.mktemp("shared")
    subprocess.run([sys.executable, str(SHARED / "prepare.py"), str(folder)], check=True, capture_output=True)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # prepare.py keeps the modes of its files, which may be read-only
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_mnist(shared, name):
    data = build.arrays(sweep.compose([f"dataset={name}", f"data.root={shared}"]))
    assert data.x_train.shape == (60_000, 28, 28, 1)
    assert data.x_test.shape == (10_000, 28, 28, 1)
    assert data.x_train.dtype == data.x_test.dtype == np.uint8
    assert data.y_train.dtype == data.y_test.dtype == np.int64
    assert data.classes == 10
    assert np.bincount(data.y_test, minlength=10).sum() == 10_000
    assert data.x_train.max() == 255
    # a linear look at the images tells the classes apart, so that images and labels belong together
    centres = np.stack([data.x_train[data.y_train == label].mean(0) for label in range(10)]).reshape(10, -1)
    distances = ((data.x_test[:500].reshape(500, 1, -1) - centres) ** 2).sum(-1)
    assert (distances.argmin(1) == data.y_test[:500]).mean() > 0.6


def test_cifar10_as_npz(shared):
    data = build.arrays(sweep.compose(["dataset=npz", f"dataset.path={shared / 'cifar10-heldout.npz'}"]))
    labels = np.load(SHARED / "cifar10" / "labels.npy")
    assert data.x_train.shape == (40_000, 32, 32, 3)
    assert data.x_test.shape == (10_000, 32, 32, 3)
    assert data.classes == 10
    assert np.array_equal(np.concatenate([data.y_train, data.y_test]), labels.ravel())


@pytest.fixture
def mnist_copy(shared, tmp_path):
    """The unpacked files of MNIST, to be damaged; its root is tmp_path."""
    torchvision_images("MNIST", str(shared))  # unpacks them
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (shared / "MNIST" / "raw").glob("*-ubyte"):
        shutil.copy(path, raw)
    return raw


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "removed"])
def test_a_damaged_mnist_file(mnist_copy, tmp_path, file, damage):
    content = (mnist_copy / file).read_bytes()
    (mnist_copy / file).write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    if damage == "removed":
        (mnist_copy / file).unlink()
    with pytest.raises(DataError, match=r"^MNIST is missing or damaged below .* python scripts/download\.py mnist "):
        torchvision_images("MNIST", str(tmp_path), download=False)


def test_mnist_files_that_do_not_belong_together(mnist_copy, tmp_path):
    shutil.copy(mnist_copy / "t10k-labels-idx1-ubyte", mnist_copy / "train-labels-idx1-ubyte")
    with pytest.raises(DataError, match=r"^MNIST is missing or damaged .*\(60000 images and 10000 labels\)"):
        torchvision_images("MNIST", str(tmp_path), download=False)


# --- splits -----------------------------------------------------------------------------------------------------------


def carved(count=100, valid_fraction=0.2, split_seed=0, train_size=None):
    """The indices of the samples in `train` and `valid`."""
    splits = carve_validation(numbered(images_of(count, 1, 1, 1)), valid_fraction, split_seed, train_size)
    return splits["train"][1].tolist(), splits["valid"][1].tolist()


@some_examples
@given(count=st.integers(3, 200), valid_fraction=st.floats(0.001, 0.7), split_seed=st.integers(0, 2**40))
def test_train_and_valid_share_out_the_training_samples(count, valid_fraction, split_seed):
    train, valid = carved(count, valid_fraction, split_seed)
    assert sorted(train + valid) == list(range(count))
    assert len(valid) == max(1, round(valid_fraction * count))


def test_inputs_and_labels_stay_together_and_the_test_set_stays():
    data = numbered(images_of(50))
    splits = carve_validation(data, 0.3, 0)
    for name in ("train", "valid"):
        inputs, labels = splits[name]
        assert np.array_equal(inputs, data.x_train[labels])
    assert splits["test"] == (data.x_test, data.y_test)


def test_the_splits_of_digits_are_disjoint():
    data = digits()
    order = np.arange(len(data.y_train))
    splits = carve_validation(data._replace(y_train=order), 0.1, 0)
    train, valid = splits["train"][1], splits["valid"][1]
    assert (len(train), len(valid), len(data.y_test)) == (1294, 144, 359)
    assert not set(train.tolist()) & set(valid.tolist())


def test_the_split_follows_from_the_split_seed():
    assert carved(split_seed=1) == carved(split_seed=1)
    assert sorted(carved(split_seed=1)[1]) != sorted(carved(split_seed=2)[1])


def split_targets(*overrides):
    cfg = sweep.compose(["dataset=digits", *overrides])
    made = build.batches(cfg, build.arrays(cfg), CPU)
    return {name: split.inputs for name, split in made.splits.items()}


def test_the_split_depends_on_the_split_seed_and_not_on_the_seed_of_the_run():
    one, same, other = (split_targets(*o) for o in (["seed=0"], ["seed=1"], ["seed=0", "dataset.split_seed=1"]))
    for name in ("train", "valid", "test"):
        assert torch.equal(one[name], same[name])
    assert not torch.equal(one["valid"], other["valid"])
    assert torch.equal(one["test"], other["test"])


@pytest.mark.parametrize("train_size", [1, 10, 80])
def test_train_size_keeps_the_first_of_the_training_samples(train_size):
    everything, valid = carved()
    train, same_valid = carved(train_size=train_size)
    assert train == everything[:train_size]
    assert valid == same_valid


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_size": 81}, r"^train_size=81 is not allowed; there are 80 training samples$"),
        ({"train_size": 0}, r"^train_size=0 .* integer of at least 1$"),
        ({"train_size": 2.5}, r"^train_size=2\.5 .* integer of at least 1$"),
        ({"valid_fraction": 0.0}, r"^valid_fraction=0\.0 .* in \(0, 1\)$"),
        ({"valid_fraction": 1.0}, r"^valid_fraction=1\.0 .* in \(0, 1\)$"),
        ({"valid_fraction": 0.999}, r"^valid_fraction=0\.999 leaves no training samples of 100$"),
        ({"split_seed": -1}, r"^split_seed=-1 .* integer of at least 0$"),
        ({"split_seed": "a"}, r"^split_seed='a' .* integer of at least 0$"),
    ],
)
def test_wrong_splits(options, message):
    with pytest.raises(ConfigError, match=message):
        carved(**options)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "batch_size", "steps"), [(12, 4, 3), (13, 4, 3), (15, 4, 3), (4, 4, 1), (5, 1, 5)])
def test_an_epoch_is_a_permutation_without_the_incomplete_last_batch(count, batch_size, steps):
    batches = batches_of(images_of(count), batch_size)
    assert batches.steps_per_epoch == steps
    for epoch in range(5):
        targets = targets_of(batches.train(epoch))
        assert [len(part) for part in targets] == [batch_size] * steps
        assert len(set(itertools.chain(*targets))) == steps * batch_size


def test_over_many_epochs_no_sample_is_left_out():
    batches = batches_of(images_of(15), 4)
    assert {target for epoch in range(20) for part in targets_of(batches.train(epoch)) for target in part} == {
        *range(15)
    }


def test_the_order_differs_between_epochs_and_between_seeds():
    one, other = batches_of(images_of(40), seed=0), batches_of(images_of(40), seed=1)
    orders = [str(targets_of(batches.train(epoch))) for batches in (one, other) for epoch in range(4)]
    assert len(set(orders)) == 8
    assert str([*range(40)]) not in orders


@pytest.mark.parametrize("augmentation", [{}, {"crop": 2, "flip": True}])
def test_the_same_seed_and_epoch_give_the_same_batches(augmentation):
    one, other = (batches_of(images_of(40), seed=3, **augmentation) for _ in range(2))
    list(other.train(0))
    torch.manual_seed(99)
    assert_same_batches(one.train(5), other.train(5))


@pytest.mark.parametrize("augmentation", [{}, {"crop": 2, "flip": True}])
@pytest.mark.parametrize("first_step", [0, 1, 4, 5, 6])
def test_an_epoch_can_be_entered_at_any_step(augmentation, first_step):
    batches = batches_of(images_of(20), **augmentation)
    assert_same_batches(batches.train(2, first_step), list(batches.train(2))[first_step:])


def test_batches_take_nothing_from_the_global_generators():
    batches = batches_of(images_of(20), crop=2, flip=True)
    before = torch.get_rng_state(), random.getstate()
    list(batches.train(0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_inputs_belong_to_their_targets():
    images = images_of(20)
    batches = batches_of(images)
    ordered = torch.cat([inputs for inputs, _ in batches.evaluation("train")])
    for inputs, targets in batches.train(0):
        assert torch.equal(inputs, ordered[targets])


@pytest.mark.parametrize("name", ["train", "valid", "test"])
@pytest.mark.parametrize(("batch_size", "sizes"), [(5, [5, 5, 2]), (12, [12]), (6, [6, 6]), (100, [12])])
def test_evaluation_covers_all_samples_in_order(name, batch_size, sizes):
    batches = batches_of(images_of(12), crop=2, flip=True)
    parts = list(batches.evaluation(name, batch_size))
    assert [len(inputs) for inputs, _ in parts] == [len(targets) for _, targets in parts] == sizes
    assert torch.cat([targets for _, targets in parts]).tolist() == list(range(12))


def test_a_sample_is_the_beginning_of_the_training_split_without_augmentation():
    batches = batches_of(images_of(12), crop=2, flip=True)
    (inputs, _), *_ = batches.evaluation("train")
    assert torch.equal(batches.sample(5), inputs[:5])
    assert torch.equal(batches.sample(100), inputs)


def test_a_batch_larger_than_the_training_set():
    batches_of(images_of(12), batch_size=12)
    with pytest.raises(ConfigError, match=r"batch_size=13 is not allowed; there are 12 training samples$"):
        batches_of(images_of(12), batch_size=13)


# --- normalisation ----------------------------------------------------------------------------------------------------


def shifted_images():
    """Channels of very different brightness and contrast."""
    return np.stack([images_of(60, channels=1)[..., 0], images_of(60, channels=1, seed=1)[..., 0] // 16 + 200], -1)


def test_normalisation_is_that_of_float64_numpy():
    images = shifted_images()
    expected = (images - images.mean((0, 1, 2))) / images.std((0, 1, 2))
    ((inputs, _),) = batches_of(images).evaluation("train")
    assert inputs.dtype == torch.float32
    assert_close(inputs.double(), torch.from_numpy(expected).permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)


def test_normalised_training_images_have_mean_0_and_standard_deviation_1():
    inputs = torch.cat([inputs for inputs, _ in batches_of(shifted_images()).evaluation("train")]).double()
    assert_close(inputs.mean((0, 2, 3)), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-5)
    assert_close(inputs.std((0, 2, 3), correction=0), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_every_split_is_normalised_with_the_moments_of_the_training_split(name):
    train = shifted_images()
    splits = {"train": train, "valid": train // 2, "test": 255 - train}
    arrays = {key: (images, np.arange(len(images))) for key, images in splits.items()}
    batches = Batches(arrays, 60, CPU, 4, seed=0)
    expected = (splits[name] - train.mean((0, 1, 2))) / train.std((0, 1, 2))
    ((inputs, _),) = batches.evaluation(name)
    assert_close(inputs.double(), torch.from_numpy(expected).permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0, 7, 255])
def test_a_constant_channel_is_only_centred(value):
    images = images_of(20)
    images[..., 1] = value
    ((inputs, _),) = batches_of(images).evaluation("train")
    assert (inputs[:, 1] == 0).all()
    assert inputs.isfinite().all()
    assert float(inputs[:, 0].std()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augmentation", [{}, {"crop": 2}, {"flip": True}, {"crop": 2, "flip": True}])
def test_images_come_as_channels_last(channels, augmentation):
    batches = batches_of(images_of(channels=channels), **augmentation)
    parts = [next(batches.train(0))[0], next(batches.evaluation("test"))[0], batches.sample(3)]
    assert batches.input_shape == (channels, 6, 5)
    for inputs in parts:
        assert inputs.shape[1:] == (channels, 6, 5)
        assert inputs.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(7,), (2, 3, 4)])
def test_numbers_that_are_no_images_pass_untouched(shape):
    x = (5 + np.random.default_rng(0).standard_normal((20, *shape))).astype(np.float32)
    batches = batches_of(x)
    assert batches.input_shape == shape
    for inputs, targets in [*batches.train(0), *batches.evaluation("test", 6), (batches.sample(9), torch.arange(9))]:
        assert torch.equal(inputs, torch.from_numpy(x)[targets])


# --- augmentation -----------------------------------------------------------------------------------------------------


def variants(image, crop, padding_mode, flip):
    """All that random crop and flip can make of one image [H, W, C]: {bytes: [(dy, dx, flipped), ...]}."""
    height, width, _ = image.shape
    mode = {"reflect": "reflect", "zero": "constant"}[padding_mode]
    padded = np.pad(image, ((crop, crop), (crop, crop), (0, 0)), mode)
    found = {}
    for dy, dx, mirror in itertools.product(range(2 * crop + 1), range(2 * crop + 1), (False, True)[: 1 + flip]):
        window = padded[dy : dy + height, dx : dx + width]
        made = window[:, ::-1] if mirror else window
        found.setdefault(rows([made])[0], []).append((dy, dx, mirror))
    return found


def augmented(images, batch_size, epochs, seed=0, **augmentation):
    """(epoch, step, index of the source image, image as uint8) of every training image."""
    batches = batches_of(images, batch_size, seed, **augmentation)
    mean, std = images.mean((0, 1, 2)), images.std((0, 1, 2))
    for epoch in range(epochs):
        for step, (inputs, targets) in enumerate(batches.train(epoch)):
            pixels = np.rint(inputs.permute(0, 2, 3, 1).double().numpy() * std + mean).astype(np.uint8)
            for index, image in zip(targets.tolist(), pixels, strict=True):
                yield epoch, step, index, image


def choices_made(images, batch_size=16, epochs=6, seed=0, **augmentation):
    """((epoch, step), (dy, dx, flipped)) of every training image; fails where no choice makes the image."""
    options = {"crop": 0, "padding_mode": "reflect", "flip": False} | augmentation
    possible = [variants(image, **options) for image in images]
    made = []
    for epoch, step, index, image in augmented(images, batch_size, epochs, seed, **augmentation):
        choices = possible[index].get(rows([image])[0], [])
        assert choices, f"no crop and flip of image {index} is what came in epoch {epoch}, step {step}"
        made.append(((epoch, step), choices[0] if len(choices) == 1 else None))
    return made


@some_examples
@given(
    height=st.integers(2, 7),
    width=st.integers(2, 7),
    channels=st.integers(1, 3),
    data=st.data(),
    padding_mode=st.sampled_from(PADDING_MODES),
    flip=st.booleans(),
)
def test_every_image_is_a_crop_and_flip_of_its_source(height, width, channels, data, padding_mode, flip):
    crop = data.draw(st.integers(0, min(height, width) - 1))
    images = images_of(8, height, width, channels, seed=data.draw(st.integers(0, 99)))
    made = choices_made(images, 4, epochs=2, crop=crop, padding_mode=padding_mode, flip=flip)
    assert len(made) == 16


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", [0, 1, 2])
def test_all_offsets_and_both_flips_occur_alike_and_independently(crop, flip, padding_mode):
    images = images_of(64, 6, 6)
    made = choices_made(images, epochs=16, crop=crop, flip=flip, padding_mode=padding_mode)
    counts = Counter(choice for _, choice in made)
    offsets = range(2 * crop + 1)
    assert set(counts) == set(itertools.product(offsets, offsets, (False, True)[: 1 + flip]))
    expected = len(made) / len(counts)
    # chi squared over its degrees of freedom: 1 on average where all are equally likely
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_squared / max(1, len(counts) - 1) < 2


def test_each_image_of_a_batch_has_choices_of_its_own():
    made = choices_made(images_of(32, 6, 6), batch_size=32, epochs=1, crop=2, flip=True)
    assert len({choice for _, choice in made}) > 15


def test_augmentation_differs_between_steps_epochs_and_seeds():
    images = np.repeat(images_of(1, 8, 8), 32, axis=0)  # one image, so that the order makes no difference
    sequences = {}
    for seed in (0, 1):
        for key, choice in choices_made(images, epochs=3, seed=seed, crop=2, flip=True):
            sequences.setdefault((seed, *key), []).append(choice)
    assert len(sequences) == 2 * 3 * 2
    assert len({tuple(choices) for choices in sequences.values()}) == len(sequences)


def test_without_augmentation_images_are_as_they_were():
    images = images_of(16)
    for _, _, index, image in augmented(images, 4, epochs=2):
        assert np.array_equal(image, images[index])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": -1}, r"^crop=-1 .* integer of at least 0$"),
        ({"crop": 1.5}, r"^crop=1\.5 .* integer of at least 0$"),
        ({"flip": "yes"}, r"^flip='yes' .* true or false$"),
        ({"padding_mode": "reflected"}, r"^padding_mode='reflected' .* reflect, zero \(did you mean 'reflect'\?\)$"),
    ],
)
def test_wrong_augmentation(options, message):
    with pytest.raises(ConfigError, match=message):
        Augmentation(**options)


@pytest.mark.parametrize("augmentation", [{"crop": 1}, {"flip": True}])
def test_augmentation_is_for_images(augmentation):
    with pytest.raises(ConfigError, match=r"augment is for images"):
        batches_of(np.zeros((20, 8), dtype=np.float32), **augmentation)


def test_a_crop_must_be_smaller_than_the_image():
    batches_of(images_of(height=6, width=5), crop=4)
    with pytest.raises(ConfigError, match=r"crop=5 is not allowed; images have 5 pixels$"):
        batches_of(images_of(height=6, width=5), crop=5)


# --- configuration ----------------------------------------------------------------------------------------------------


def built(*overrides):
    cfg = sweep.compose(overrides)
    return build.batches(cfg, build.arrays(cfg), CPU)


@pytest.mark.parametrize(("name", "shape"), [("digits", (1, 8, 8)), ("gaussian", (64,))])
def test_data_sets_that_need_no_file_work_as_they_are(name, shape):
    batches = built(f"dataset={name}")
    inputs, targets = next(batches.train(0))
    assert inputs.shape == (128, *shape)
    assert targets.shape == (128,)
    assert batches.classes == 10


def test_sizes_of_gaussian_data():
    cfg = sweep.compose(
        ["dataset=gaussian", "dataset.train_samples=200", "dataset.test_samples=30", "dataset.shape=[3,4,4]"]
    )
    data = build.arrays(cfg)
    assert data.x_train.shape == (200, 3, 4, 4)
    assert data.x_test.shape == (30, 3, 4, 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.batch_size=5000"], r"^trainer\.batch_size=5000 is not allowed; there are 1294 training samples$"),
        (["dataset.train_size=5000"], r"^dataset\.train_size=5000 is not allowed; there are 1294 training samples$"),
        (["dataset.valid_fraction=2"], r"^dataset\.valid_fraction=2 is not allowed"),
        (["dataset.test_fraction=2"], r"^dataset\.test_fraction=2 is not allowed"),
        (
            ["dataset.augment.padding_mode=zeros"],
            r"^dataset\.augment\.padding_mode='zeros' .*\(did you mean 'zero'\?\)$",
        ),
        (["dataset.augment.crop=8"], r"^dataset\.augment\.crop=8 is not allowed; images have 8 pixels$"),
        (["dataset=npz"], r"^dataset=npz needs dataset\.path=FILE\.npz"),
    ],
)
def test_wrong_options_are_named_as_on_the_command_line(overrides, message):
    with pytest.raises(ConfigError, match=message):
        built("dataset=digits", *overrides)


# --- streams of random numbers ----------------------------------------------------------------------------------------


@some_examples
@given(seed=st.integers(0, 2**64), names=st.lists(st.one_of(st.integers(0, 10**6), st.sampled_from("abc")), max_size=3))
def test_derived_seeds_are_seeds_for_torch(seed, names):
    derived = derive_seed(seed, *names)
    assert 0 <= derived < 2**63
    assert derived == derive_seed(seed, *names)
    torch.Generator().manual_seed(derived)


def test_every_stream_has_a_seed_of_its_own():
    streams = [
        *itertools.product(range(12), ["order"], range(30)),
        *itertools.product(range(12), ["augment"], range(10), range(30)),
        *((seed,) for seed in range(12)),
    ]
    assert len({derive_seed(*stream) for stream in streams}) == len(streams)


def test_derived_seeds_stay_the_same_from_release_to_release():
    assert derive_seed(0, "order", 0) == 3955691223199900983
    assert derive_seed(1, "augment", 2, 3) == 3823586506043343724


@pytest.fixture
def flags():
    """Puts cuDNN's flags back."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


def draws(seed):
    seed_everything(seed, deterministic=False)
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002 - the global generator


@pytest.mark.usefixtures("flags")
def test_seed_everything_seeds_all_generators():
    one, same, other = draws(1), draws(1), draws(2**40 + 2)
    assert one == same
    assert all(a != b for a, b in zip(one, other, strict=True))


@pytest.mark.usefixtures("flags")
@pytest.mark.parametrize("deterministic", [True, False])
def test_seed_everything_sets_the_flags_whatever_they_were(monkeypatch, deterministic):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for earlier in (not deterministic, deterministic):
        seed_everything(0, deterministic=earlier)
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.backends.cudnn.deterministic == deterministic
    assert torch.backends.cudnn.benchmark == (not deterministic)


# --- holding out training images --------------------------------------------------------------------------------------


def test_held_out_images_are_the_last_ones_and_the_test_set_is_not_read():
    x, y = np.arange(20, dtype=np.uint8).reshape(5, 2, 2, 1), np.arange(5)
    held = hold_out(Arrays(x, y, x[:0], y[:0], 7), 2)
    assert held.y_train.tolist() == [0, 1, 2]
    assert held.y_test.tolist() == [3, 4]
    assert (held.x_train == x[:3]).all()
    assert (held.x_test == x[3:]).all()
    assert held.classes == 7


@pytest.mark.parametrize("size", [0, 5, 6, -1, 1.5])
def test_as_many_held_out_as_there_are_or_none_is_refused(size):
    x, y = np.zeros((5, 2, 2, 1), np.uint8), np.arange(5)
    with pytest.raises(ConfigError, match=r"size=.* is not allowed"):
        hold_out(Arrays(x, y, x, y, 7), size)


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = sources._digits()
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert np.array_equal(images[..., 0], bunch.images)
    assert np.array_equal(labels, bunch.target)
