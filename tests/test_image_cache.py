"""--image-cache: bit-equal features, shared by models with the same image size, never used for another image."""

import itertools
import os

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2

from dataloaders.own import read_shard_pairs
from eval_files import write_image, write_shard
from training.data.images import MODES, ImageReader
from training.eval.encode import CachedReader
from training.main import main
from training.readers.images import BrokenImageError


def transform(size=32, mode="shortest", mean=open_clip.OPENAI_DATASET_MEAN):
    return image_transform_v2(PreprocessCfg(size=size, resize_mode=mode, mean=mean), is_train=False)


@pytest.fixture
def files(tmp_path):
    return [write_image(tmp_path / "images" / f"{n}.jpg", n) for n in range(5)]


def read(reader, files):
    return [reader(file) for file in files]


@pytest.mark.parametrize(("resize", "mode"), list(itertools.product(("shortest", "longest", "squash"), MODES)))
def test_pixels_are_equal_when_kept_and_when_read_back(tmp_path, files, resize, mode):
    for _ in range(2):
        cached = CachedReader(tmp_path / "cache", transform(mode=resize), mode)
        for plain, kept in zip(read(ImageReader(transform(mode=resize), mode), files), read(cached, files)):
            assert torch.equal(plain, kept)


def test_cached_images_are_not_read_again_but_changed_files_are(tmp_path, files):
    read(CachedReader(tmp_path / "cache", transform(), "exact"), files)
    whole, status = files[0].read_bytes(), files[0].stat()
    other_mean = transform(mean=(0.1, 0.2, 0.3))
    wanted = read(ImageReader(other_mean), files)
    files[0].write_bytes(bytes(len(whole)))  # not an image any more, but with the same size ..
    os.utime(files[0], ns=(status.st_atime_ns, status.st_mtime_ns))  # .. and time
    again = read(CachedReader(tmp_path / "cache", other_mean, "exact"), files)
    assert all(map(torch.equal, again, wanted))  # another normalisation of the cached pixels
    with pytest.raises(BrokenImageError):
        CachedReader(tmp_path / "cache", transform(size=40), "exact")(files[0])
    os.utime(files[0])
    changed = CachedReader(tmp_path / "cache", transform(), "exact")
    with pytest.raises(BrokenImageError):
        changed(files[0])
    assert changed(files[1]).shape == wanted[1].shape


def test_a_damaged_file_is_read_again(tmp_path, files, caplog):
    """The cache does not wait for the disk, so a power failure may leave files with wrong content."""
    plain = read(CachedReader(tmp_path / "cache", transform(), "exact"), files)
    for path in (tmp_path / "cache").glob("*/*/*.npz"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    assert all(map(torch.equal, read(CachedReader(tmp_path / "cache", transform(), "exact"), files), plain))
    assert "can't be read (BadZipFile)" in caplog.text


def test_members_of_shards_are_told_apart(tmp_path):
    s = read_shard_pairs(str(write_shard(tmp_path / "a.tar")), ("caption",), "raw")
    for _ in range(2):
        kept = read(CachedReader(tmp_path / "cache", transform(), "exact"), s.image_paths)
        assert all(map(torch.equal, kept, read(ImageReader(transform()), s.image_paths)))
    assert len({pixels.numpy().tobytes() for pixels in kept}) == 4


def urban(root):
    for number in range(8):
        write_image(root / "image" / f"{number}.jpg", number)
        (root / "caption").mkdir(exist_ok=True)
        (root / "caption" / f"{number}.txt").write_text(f"Street {number} with {number} cars.")
    return root


def test_evaluations_share_a_cache_and_agree_by_loader_processes_too(tmp_path, tiny_clip):
    argv = ["--urban1k-retrieval", str(urban(tmp_path / "Urban1k")), "--model", tiny_clip, "--device", "cpu"]
    argv += ["--save-features", "--logs", str(tmp_path / "logs"), "--batch-size", "3"]
    features = []
    for name, workers in (("plain", "0"), ("first", "1"), ("second", "0")):
        flags = [] if name == "plain" else ["--image-cache", str(tmp_path / "cache")]
        assert main([*argv, "--name", name, "--workers", workers, *flags]) == 0
        (file,) = (tmp_path / "logs" / name / "features").glob("*.npz")
        features.append(np.load(file)["image_features"])
    assert len(list((tmp_path / "cache").glob("*/*/*.npz"))) == 8  # a file for each image, none twice
    assert (features[0] == features[1]).all() and (features[0] == features[2]).all()


def test_broken_caches_cost_a_warning_and_other_preprocessing_is_a_usage_error(tmp_path, tiny_clip, caplog):
    argv = ["--urban1k-retrieval", str(urban(tmp_path / "Urban1k")), "--model", tiny_clip, "--device", "cpu"]
    argv += ["--logs", str(tmp_path / "logs"), "--workers", "0", "--image-cache", str(tmp_path / "cache")]
    assert main(argv) == 0
    file = next((tmp_path / "cache").glob("*/*/*.npz"))
    file.write_bytes(file.read_bytes()[:100])
    assert main(argv) == 0 and "can't be read" in caplog.text
    with pytest.raises(ValueError, match="this model's preprocessing has no step ToTensor"):
        CachedReader(tmp_path, lambda image: image, "exact")
