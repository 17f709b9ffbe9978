"""Where data comes from: each function returns the training and test arrays of one data set.

To add a data set: write a function like these and a file in `configs/dataset/` that names it. Images are uint8
[N, H, W, C]; anything else is float32 [N, ...] and reaches the network as it is. Labels are int64 [N].
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bipolar.errors import ConfigError, DataError, check_choice, check_float, check_int

Array = NDArray[Any]


class Arrays(NamedTuple):
    """A data set in host memory."""

    x_train: Array
    y_train: Array
    x_test: Array
    y_test: Array
    classes: int


def digits(test_fraction: float = 0.2, split_seed: int = 0) -> Arrays:
    """The 1,797 handwritten digits of 8 x 8 pixels (grey values 0 to 16) that ship with scikit-learn.

    They have no official test set: `test_fraction` of them, drawn with `split_seed`, is held out.
    """
    check_int("split_seed", split_seed, 0)
    check_float("test_fraction", test_fraction, 0, 1, open_low=True, open_high=True)
    images, labels = _digits()
    order = np.random.default_rng([split_seed, 0xD161]).permutation(len(labels))
    test, train = np.split(order, [round(test_fraction * len(labels))])
    if not (len(test) and len(train)):
        raise ConfigError(f"test_fraction={test_fraction} leaves {len(train)} training and {len(test)} test images")
    return Arrays(images[train], labels[train], images[test], labels[test], classes=10)


def _digits() -> tuple[Array, Array]:
    """uint8 [N, 8, 8, 1] and int64 [N], from the file that scikit-learn carries: to import it takes two seconds."""
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise DataError("dataset=digits needs scikit-learn, which carries it: pip install scikit-learn")
    path = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not path.exists():
        from sklearn.datasets import load_digits

        bunch = load_digits()
        return bunch.images.astype(np.uint8)[..., None], bunch.target.astype(np.int64)
    table = np.loadtxt(path, delimiter=",", dtype=np.int64)
    return table[:, :-1].astype(np.uint8).reshape(-1, 8, 8, 1), table[:, -1]


def check_shape(shape: Any) -> list[int]:
    """The shape of a sample, as a list of integers of at least 1."""
    if isinstance(shape, (str, int, float)) or not shape:
        raise ConfigError(f"shape={shape!r} is not allowed; give a list of integers, such as [64] or [3,8,8]")
    return [check_int("shape", size) for size in shape]


def gaussian(
    shape: Sequence[int] = (64,),
    classes: int = 10,
    train_samples: int = 2048,
    test_samples: int = 512,
    mean: float = 0.0,
    separation: float = 1.0,
    data_seed: int = 0,
) -> Arrays:
    """Synthetic: i.i.d. normal inputs with standard deviation 1 around a centre per class.

    Args:
        shape: shape of a sample, e.g. [64] or, as images, [C, H, W].
        classes: number of classes.
        train_samples, test_samples: how many are made (the validation split is carved from the training samples).
        mean: mean of every input, the same for all.
        separation: standard deviation of the centres around `mean`; 0 makes labels independent of the inputs.
        data_seed: seed of all that is drawn.
    """
    for name, value in (("classes", classes), ("train_samples", train_samples), ("test_samples", test_samples)):
        check_int(name, value)
    check_shape(shape)
    check_int("data_seed", data_seed, 0)
    check_float("mean", mean, -np.inf)
    check_float("separation", separation)
    rng = np.random.default_rng(data_seed)
    centres = mean + separation * rng.standard_normal((classes, *shape))

    def draw(size: int) -> tuple[Array, Array]:
        labels = rng.integers(classes, size=size)
        return (centres[labels] + rng.standard_normal((size, *shape))).astype(np.float32), labels

    return Arrays(*draw(train_samples), *draw(test_samples), classes=classes)


@contextmanager
def one_at_a_time(root: Path, dataset: str) -> Iterator[None]:
    """Keep the jobs of a sweep from downloading into one place at the same time."""
    from filelock import FileLock

    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f".{dataset}.lock")
        lock.acquire()
    except OSError:  # a folder that cannot be written to is not downloaded into
        yield
        return
    try:
        yield
    finally:
        lock.release()


TORCHVISION_DATASETS = ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100")


def torchvision_images(dataset: str, root: str, download: bool = True) -> Arrays:
    """An image data set of torchvision: MNIST, FashionMNIST, CIFAR10 or CIFAR100.

    torchvision downloads it below `root` where it is missing (unless `download` is off) and checks the checksums.

    Raises:
        DataError: missing and not to be had, or damaged: says what, where, and the command that gets it.
    """
    check_choice("dataset", dataset, TORCHVISION_DATASETS)
    import torchvision.datasets

    make: Callable[..., Any] = getattr(torchvision.datasets, dataset)
    splits: list[tuple[Array, Array]] = []
    for train in (True, False):
        try:
            with one_at_a_time(Path(root), dataset) if download else nullcontext():
                images = make(root, train=train, download=download)
            data = np.asarray(images.data)
            labels = np.asarray(images.targets, dtype=np.int64)
            if len(data) != len(labels) or len(data) == 0:
                raise RuntimeError(f"{len(data)} images and {len(labels)} labels")
        except Exception as error:  # torchvision raises many kinds: URLError, RuntimeError, OSError, pickle's, ...
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            name = {"FashionMNIST": "fashion_mnist"}.get(dataset, dataset.lower())
            raise DataError(
                f"{dataset} is missing or damaged below {Path(root).absolute()} ({reason}); "
                f"remove what is left of it and get it with: python scripts/download.py {name} --root {root}"
            ) from error
        splits.append((data if data.ndim == 4 else data[..., None], labels))
    return Arrays(*splits[0], *splits[1], classes=len(images.classes))


def hold_out(arrays: Arrays, size: int) -> Arrays:
    """The training samples alone, the last `size` of them as a test set: for work that leaves the test set unread."""
    if not 0 < check_int("size", size) < len(arrays.y_train):
        raise ConfigError(f"size={size} is not allowed; there are {len(arrays.y_train)} training samples")
    x, y = arrays.x_train, arrays.y_train
    return Arrays(x[:-size], y[:-size], x[-size:], y[-size:], arrays.classes)


def npz(path: str | None) -> Arrays:
    """A user's own images: a NumPy .npz file with x_train, y_train, x_test, y_test.

    The x are uint8 [N, H, W, C]; the y are integers [N] from 0 to classes - 1.

    Raises:
        DataError: no such file, not an .npz file, a key is missing, or an array is not as described.
    """
    if not path:
        raise DataError("dataset=npz needs dataset.path=FILE.npz (keys x_train, y_train, x_test, y_test)")
    file = Path(path)
    if not file.is_file():
        raise DataError(f"dataset.path={path}: there is no such file (looked for {file.absolute()})")
    arrays: dict[str, Array] = {}
    try:
        with np.load(file, allow_pickle=False) as archive:
            missing = {"x_train", "y_train", "x_test", "y_test"} - set(archive.files)
            if missing:
                raise DataError(
                    f"{path}: missing {', '.join(sorted(missing))}; it has {', '.join(archive.files) or 'nothing'}"
                )
            for key in ("x_train", "y_train", "x_test", "y_test"):
                arrays[key] = archive[key]
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path} is not a readable .npz file ({error})") from error
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if x.dtype != np.uint8 or x.ndim != 4 or x.size == 0:
            raise DataError(f"{path}: x_{split} must be uint8 [N, H, W, C], not {x.dtype} {list(x.shape)}")
        if not np.issubdtype(y.dtype, np.integer) or y.shape != x.shape[:1]:
            raise DataError(f"{path}: y_{split} must be integers [{len(x)}], not {y.dtype} {list(y.shape)}")
        if y.min() < 0:
            raise DataError(f"{path}: y_{split} has the negative label {y.min()}; labels run from 0")
        arrays[f"y_{split}"] = y.astype(np.int64)
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        raise DataError(
            f"{path}: training images are {list(arrays['x_train'].shape[1:])}, "
            f"test images {list(arrays['x_test'].shape[1:])}"
        )
    classes = 1 + int(max(arrays["y_train"].max(), arrays["y_test"].max()))
    return Arrays(arrays["x_train"], arrays["y_train"], arrays["x_test"], arrays["y_test"], classes)
