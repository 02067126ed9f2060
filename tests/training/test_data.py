"""Data sets load complete, balanced and normalised, in an order that the seed decides.

Folders and torchvision's formats are small real files in a temporary folder. Anything missing,
damaged or malformed is refused with a message that names it.
"""

import hashlib
import pickle
import socket
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toys import image_folder

from hybrid_lib.training import data
from hybrid_lib.training.data import augmented, generator, load, normalised, order

JPEG_COPY = data.PROJECT / "data" / "cifar10-jpeg"
quick = settings(max_examples=50, deadline=None)


# --- The embedded digits. ---


def test_digits_are_1797_grey_images_of_8x8():
    d = load("digits")
    assert d.title == "handwritten digits"
    assert d.classes == tuple("0123456789")
    assert d.train_images.shape == (1200, 1, 8, 8)
    assert d.test_images.shape == (597, 1, 8, 8)
    assert d.train_images.dtype == d.test_images.dtype == torch.uint8
    assert d.train_images.min() == 0
    assert d.train_images.max() == 255, "16 grey levels must span the whole range"
    assert d.train_labels.dtype == torch.int64
    assert d.train_labels[:10].tolist() == list(range(10)), "file order, not shuffled"


def test_the_checksum_pins_images_and_labels():
    assert load("digits").checksum == load("digits", 1200, 597).checksum == "abaafa7197d0eff2"
    assert load("digits", train_limit=1199).checksum != load("digits").checksum


# --- Limits: a part of a data set, class-balanced. ---


@quick
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.data())
def test_a_limit_is_as_balanced_as_the_classes_allow(labels, draw):
    limit = draw.draw(st.integers(1, len(labels)))
    chosen = data._balanced(torch.tensor(labels), limit, "train_limit").tolist()
    assert len(set(chosen)) == limit
    assert chosen == sorted(chosen), "in file order"
    size, kept = Counter(labels), Counter(labels[i] for i in chosen)
    most = max(kept.values())
    # A class is behind by more than one only where it has no more images.
    assert all(kept[c] >= most - 1 or kept[c] == size[c] for c in size)
    for c in size:  # the first ones of each class
        assert [i for i in chosen if labels[i] == c] == [
            i for i, label in enumerate(labels) if label == c
        ][: kept[c]]


def test_limits_apply_to_both_parts():
    d = load("digits", train_limit=205, test_limit=31)
    assert sorted(d.train_labels.bincount().tolist()) == [20] * 5 + [21] * 5
    assert sorted(d.test_labels.bincount().tolist()) == [3] * 9 + [4]


@pytest.mark.parametrize("limit", [0, -1, 1201])
def test_impossible_limits_are_refused_by_name(limit):
    with pytest.raises(ValueError, match=rf"train_limit={limit}.*1200"):
        load("digits", train_limit=limit)


def test_a_validation_set_is_the_last_images_of_each_class_taken_out_of_the_training_set():
    whole, d = load("digits", train_limit=700), load("digits", 700, None, 105)
    assert sorted(d.validation_labels.bincount().tolist()) == [10] * 5 + [11] * 5
    for c in range(10):
        parts = d.train_images[d.train_labels == c], d.validation_images[d.validation_labels == c]
        assert torch.equal(torch.cat(parts), whole.train_images[whole.train_labels == c])
    assert torch.equal(d.test_images, whole.test_images)
    pixels = d.train_images.double() / 255
    assert d.mean.item() == pytest.approx(pixels.mean().item(), rel=1e-6)
    assert d.checksum != whole.checksum
    for limit in (0, 700, 701):
        with pytest.raises(ValueError, match=rf"validation_limit={limit}\b"):
            load("digits", 700, None, limit)


# --- From uint8 to batches. ---


def test_normalised_training_images_have_mean_0_and_deviation_1(colour_folder):
    for name in ("digits", f"folder:{colour_folder}"):
        d = load(name)
        x = normalised(d.train_images, d).double()
        assert x.mean(dim=(0, 2, 3)).abs().max() < 1e-5
        assert (x.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-5


def test_a_channel_without_contrast_stays_at_zero(tmp_path):
    root = image_folder(tmp_path, lambda part, label, i: np.full((4, 4, 3), (7, 7 * i, 255), "u1"))
    d = load(f"folder:{root}")
    x = normalised(d.train_images, d)
    assert (x[:, 0] == 0).all()
    assert (x[:, 2] == 0).all()
    assert x[:, 1].std() > 0.5


@quick
@given(st.integers(1, 300), st.integers(0, 2**63 - 1), st.integers(0, 500))
def test_the_order_is_a_permutation_and_a_function_of_seed_and_epoch(n, seed, epoch):
    index = order(n, seed, epoch)
    assert sorted(index.tolist()) == list(range(n))
    assert index.equal(order(n, seed, epoch))


def test_each_purpose_seed_and_epoch_has_its_own_random_stream():
    keys = list(product(("order", "augmentation", "probes"), range(12), range(12)))
    draws = {torch.randint(0, 2**62, (1,), generator=generator(*key)).item() for key in keys}
    assert len(draws) == len(keys)  # seed 1, epoch 11 is not seed 11, epoch 1
    orders = {tuple(order(50, seed, epoch).tolist()) for seed in range(5) for epoch in range(20)}
    assert len(orders) == 100


@pytest.mark.parametrize("shape", [(5, 3, 32, 32), (4, 1, 28, 28), (6, 2, 16, 24), (3, 1, 7, 7)])
def test_augmented_crops_and_flips_each_image(shape):
    images = torch.randint(1, 256, shape, generator=generator("images", 0, 0), dtype=torch.uint8)
    fast = augmented(images, generator("draws", 0, 0))

    draws = generator("draws", 0, 0)  # the same draws again
    n, _, height, width = shape
    pad_y, pad_x = height // 8, width // 8
    top = torch.randint(0, 2 * pad_y + 1, (n, 1), generator=draws).flatten().tolist()
    left = torch.randint(0, 2 * pad_x + 1, (n, 1), generator=draws).flatten().tolist()
    flip = torch.randint(0, 2, (n, 1), generator=draws).flatten().tolist()
    for i in range(n):
        padded = np.pad(images[i].numpy(), ((0, 0), (pad_y, pad_y), (pad_x, pad_x)))
        crop = padded[:, top[i] : top[i] + height, left[i] : left[i] + width]
        assert np.array_equal(fast[i].numpy(), crop[:, :, ::-1] if flip[i] else crop)


# --- Folders of images. ---


@pytest.fixture
def colour_folder(tmp_path):
    return image_folder(tmp_path / "colours")


def test_a_folder_becomes_images_labels_and_a_title(tmp_path):
    grey = lambda part, label, i: np.full((5, 6, 3), label * 9 + i, "u1")  # noqa: E731
    root = image_folder(tmp_path / "zoo", grey)
    d = load(f"folder:{root}")
    assert d.title == "folder zoo"
    assert d.classes == ("cat", "dog")
    assert d.train_images.shape == d.test_images.shape == (6, 3, 5, 6)
    assert d.train_images[:, 0, 0, 0].tolist() == [0, 1, 2, 9, 10, 11]
    assert d.train_labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_image_formats_and_colour_modes_may_be_mixed(tmp_path):
    root = image_folder(tmp_path)
    cats = root / "train" / "cat"
    for mode in ("L", "RGBA", "P", "1"):
        Image.new(mode, (8, 8)).save(cats / f"{mode}.png")
    Image.new("CMYK", (8, 8)).save(cats / "CMYK.jpg")
    Image.fromarray(np.full((8, 8), 77, "u1")).save(cats / "GREY.JPEG")
    (cats / "notes.txt").write_text("not an image")
    files = sorted(f.name for f in cats.iterdir() if f.suffix != ".txt")
    d = load(f"folder:{root}")
    assert len(d.train_images) == 3 + len(files)
    assert d.train_images[files.index("GREY.JPEG")].tolist() == [[[77] * 8] * 8] * 3


def test_images_of_16_bits_are_scaled_to_8_bits(tmp_path):
    root = image_folder(tmp_path)
    ramp = np.linspace(0, 65535, 64).astype("u2").reshape(8, 8)
    Image.fromarray(ramp).save(root / "train" / "cat" / "0.png")
    image = load(f"folder:{root}").train_images[0]
    assert image.tolist() == [(ramp >> 8).tolist()] * 3


@pytest.mark.parametrize("dtype", ["i4", "f4"])
def test_images_of_32_bits_are_refused_rather_than_turned_black(tmp_path, dtype):
    file = image_folder(tmp_path) / "train" / "cat" / "0.tif"
    Image.fromarray(np.ones((8, 8), dtype)).save(file)
    with pytest.raises(ValueError, match=r"0\.tif: not a readable image .*32 bits"):
        load(f"folder:{tmp_path}")


def test_hidden_files_and_folders_are_ignored(colour_folder):
    expected = load(f"folder:{colour_folder}").checksum
    for part in ("train", "test"):
        (colour_folder / part / ".ipynb_checkpoints").mkdir()
        (colour_folder / part / "cat" / "._0.png").write_bytes(b"of macOS")
    assert load(f"folder:{colour_folder}").checksum == expected
    assert data.folder_sizes(f"folder:{colour_folder}") == {"train": 6, "test": 6}


def test_the_order_of_files_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    root = image_folder(tmp_path, n=5)
    first = load(f"folder:{root}").checksum
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: reversed(list(listed(self))))
    assert load(f"folder:{root}").checksum == first


def test_a_folder_s_last_images_are_held_out_for_validation(tmp_path):
    d = load(f"folder:{image_folder(tmp_path, n=4)}", validation_limit=2)
    assert (len(d.train_labels), d.validation_labels.tolist()) == (6, [0, 1])


def test_paths_may_be_relative_and_hold_spaces_and_umlauts(tmp_path, monkeypatch):
    image_folder(tmp_path / "Bücher & Größen 'x'", classes=("Äpfel rot", "日本"), suffix=".jpg")
    monkeypatch.chdir(tmp_path)
    d = load("folder:Bücher & Größen 'x'")
    assert d.classes == ("Äpfel rot", "日本")
    assert d.title == "folder Bücher & Größen 'x'"


def test_only_the_images_that_a_limit_keeps_are_decoded(colour_folder):
    (colour_folder / "train" / "dog" / "2.png").write_bytes(b"broken, and not needed")
    d = load(f"folder:{colour_folder}", train_limit=4, test_limit=2)
    assert d.train_labels.tolist() == [0, 0, 1, 1]
    assert d.test_labels.tolist() == [0, 1]


def test_images_added_after_loading_are_found(colour_folder):
    assert len(load(f"folder:{colour_folder}").train_images) == 6
    source = colour_folder / "train" / "dog" / "0.png"
    source.with_name("new.png").write_bytes(source.read_bytes())
    assert len(load(f"folder:{colour_folder}").train_images) == 7


def at_dog(spoil):
    return lambda root: spoil(root / "train/dog/1.png")


def moved(*names):
    return lambda root: [(root / a).rename(root / b) for a, b in zip(names[::2], names[1::2])]


UNREADABLE = r"dog.1\.png: not a readable image"
FAULTY = [
    (at_dog(lambda file: Image.new("RGB", (9, 8)).save(file)),
     r"dog.1\.png has 8x9 pixels, .*cat.0\.png has 8x8.*one size"),
    (at_dog(lambda file: file.write_bytes(b"GIF? no")), UNREADABLE),
    (at_dog(lambda file: file.write_bytes(b"")), UNREADABLE),
    (at_dog(lambda file: file.write_bytes(file.read_bytes()[:-60])), UNREADABLE),
    (moved("test", "validation"), r"expected images in .*test/CLASS.*train: cat, dog, test: none"),
    (moved("test/dog", "test/wolf"), r"train: cat, dog, test: cat, wolf"),
    (moved("train/dog", "dogs", "test/dog", "more"), r"two or more classes.*train: cat, test: cat"),
    (moved("train", "x", "test", "y"), r"train: none, test: none"),
    (moved(".", "../elsewhere"), r"colours: no such folder.*train/CLASS"),
    (lambda root: [f.unlink() for f in (root / "test/dog").iterdir()], r"no image in .*test.dog"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), FAULTY)
def test_a_faulty_folder_is_refused_by_name(colour_folder, spoil, message):
    spoil(colour_folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load(f"folder:{colour_folder}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("suffix", "step"), [(".png", 1), (".jpg", 7)])
def test_an_image_damaged_at_any_byte_is_refused_by_name(tmp_path, suffix, step):
    file = image_folder(tmp_path, suffix=suffix) / "train" / "cat" / f"0{suffix}"
    content = file.read_bytes()
    messages = []
    for i in range(0, len(content), step):
        for damaged in (content[:i], content[:i] + bytes([content[i] ^ 0x10]) + content[i + 1 :]):
            file.write_bytes(damaged)
            try:
                data._decoded([file])
            except ValueError as error:
                messages.append(str(error))
    assert len(messages) > len(content) / step / 2
    assert all(m.startswith(f"{file}: not a readable image (") for m in messages)


@pytest.mark.parametrize("name", ["imagenet", "CIFAR10", "", " ", "folder", "folder:", "folder: "])
def test_an_unknown_data_set_is_refused_with_what_is_allowed(name):
    with pytest.raises(ValueError, match=r"folder:\w+") as caught:
        load(name)
    assert str(caught.value).startswith(f"dataset={name!r}: ")
    with pytest.raises(ValueError, match=r"python-docs.* is text"):
        load("python-docs")


@pytest.mark.skipif(not JPEG_COPY.is_dir(), reason="data/cifar10-jpeg is not unpacked")
def test_the_jpeg_copy_of_cifar10_is_complete_and_called_a_copy(tmp_path, monkeypatch):
    for part, count in (("train", 5000), ("test", 1000)):
        classes = sorted((JPEG_COPY / part).iterdir())
        assert len(classes) == 10
        assert {len(list(c.glob("*.jpg"))) for c in classes} == {count}
    monkeypatch.chdir(tmp_path)  # a relative folder is found from anywhere
    d = load("folder:data/cifar10-jpeg", train_limit=100, test_limit=50)
    assert d.title == "CIFAR-10 (JPEG copy)"
    assert d.train_images.shape == (100, 3, 32, 32)
    assert d.train_labels.bincount().tolist() == [10] * 10


# --- torchvision's data sets: small files in its own formats. ---


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """An empty download folder, and no network."""
    pytest.importorskip("torchvision")

    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HYBRID_DATA", str(tmp_path))
    return tmp_path


def write_cifar(root: Path, monkeypatch, name: str, n_classes: int) -> np.ndarray:
    """Both parts of CIFAR-10 or CIFAR-100 with 20 images each; returns those of the test part."""
    from torchvision import datasets

    cls = getattr(datasets, name)
    folder, rng, sums = root / cls.base_folder, np.random.default_rng(0), {}
    folder.mkdir()

    def put(name, content):
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()

    for part in ("train_list", "test_list"):
        names = [name for name, _ in getattr(cls, part)]
        for name in names:
            pixels = rng.integers(0, 256, (20 // len(names), 3072), "u1")
            labels = [i % n_classes for i in range(len(pixels))]
            put(name, {"data": pixels, "labels" if n_classes == 10 else "fine_labels": labels})
        monkeypatch.setattr(cls, part, [[name, sums[name]] for name in names])
    meta = cls.meta["filename"]
    put(meta, {cls.meta["key"]: [f"class {i}" for i in range(n_classes)]})
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": sums[meta]})
    return pixels.reshape(-1, 3, 32, 32)


def write_mnist(root: Path, monkeypatch, name: str, n_classes: int) -> np.ndarray:
    """Both parts in the idx format, 20 images each; returns those of the test part."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        pixels = np.random.default_rng(len(part)).integers(0, 256, (20, 28, 28), "u1")
        shape = np.array([0x803, 20, 28, 28], ">i4").tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(shape + pixels.tobytes())
        labels = np.array([0x801, 20], ">i4").tobytes() + bytes(i % 10 for i in range(20))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    return pixels[:, None]


FORMATS = {  # title, writer, torchvision's name, classes, shape
    "cifar10": ("CIFAR-10", write_cifar, "CIFAR10", 10, (3, 32, 32)),
    "cifar100": ("CIFAR-100", write_cifar, "CIFAR100", 100, (3, 32, 32)),
    "mnist": ("MNIST", write_mnist, "MNIST", 10, (1, 28, 28)),
    "fashion-mnist": ("Fashion-MNIST", write_mnist, "FashionMNIST", 10, (1, 28, 28)),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_data_set_is_read_from_its_own_file_format(downloads, monkeypatch, kind):
    title, write, name, n_classes, shape = FORMATS[kind]
    test_pixels = write(downloads, monkeypatch, name, n_classes)
    d = load(kind, train_limit=10)
    assert (d.title, len(d.classes)) == (title, n_classes)
    assert d.train_images.shape == (10, *shape)
    assert np.array_equal(d.test_images.numpy(), test_pixels)
    assert d.test_images.is_contiguous()
    assert d.test_labels.tolist() == [i % n_classes for i in range(20)]
    assert d.train_labels.dtype == d.test_labels.dtype == torch.int64


@pytest.mark.parametrize("kind", FORMATS)
def test_an_absent_data_set_says_offline_what_to_do(downloads, kind):
    with pytest.raises(FileNotFoundError, match=r"network.*HYBRID_DATA.*folder:PATH") as caught:
        load(kind)
    assert str(downloads) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [f for f in downloads.rglob("*") if f.is_file()]


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("cifar10", "cifar-10-batches-py/data_batch_3"),
        *[("mnist", f"MNIST/raw/train-{part}-ubyte") for part in ("images-idx3", "labels-idx1")],
    ],
)
def test_a_truncated_file_is_refused(downloads, monkeypatch, kind, file):
    title, write, *rest, _ = FORMATS[kind]
    write(downloads, monkeypatch, *rest)
    (downloads / file).write_bytes((downloads / file).read_bytes()[:-1])
    with pytest.raises(FileNotFoundError, match=f"{title} is not complete in .*{file[:5]}"):
        load(kind)


@pytest.mark.parametrize("trusted", [False, True])
def test_an_archive_that_is_not_the_original_is_refused(downloads, monkeypatch, trusted):
    """By its checksum, or where that fits, by the tar reader."""
    from torchvision import datasets

    (downloads / datasets.CIFAR10.filename).write_bytes(b"half of one")
    if trusted:
        monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(b"half of one").hexdigest())
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10 is not complete in .*unpack the orig"):
        load("cifar10")
