import io

import numpy as np
import pytest
from PIL import Image

from m3agiqa.phash import FURTHEST, hash_image, near_pairs
from tests.corpora import picture


def photo(seed: int) -> Image.Image:
    """Smooth noise: a picture with structure at the frequencies that the hash looks at."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6), np.uint8)
    return Image.fromarray(small).resize((96, 96), Image.Resampling.BICUBIC).convert("RGB")


def bits_apart(one: int, other: int) -> int:
    return (one ^ other).bit_count()


def test_the_same_picture_in_other_files_is_near_and_another_is_far():
    image = photo(0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60)
    assert 0 <= hash_image(image) < 2**64
    assert bits_apart(hash_image(image), hash_image(Image.open(buffer))) <= 4
    assert bits_apart(hash_image(image), hash_image(image.resize((64, 64)))) <= 4
    assert all(bits_apart(hash_image(image), hash_image(photo(seed))) > 12 for seed in range(1, 6))


def test_a_hash_is_of_any_mode():
    image = photo(3)
    assert hash_image(image.convert("L")) == hash_image(image.convert("L").convert("RGB"))
    assert hash_image(picture(mode="P")) >= 0


@pytest.mark.parametrize("distance", [0, 1, 4, 9, FURTHEST])
def test_near_pairs_are_those_of_all_pairs(distance):
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 2**64, 300, np.uint64)
    # Copies with 0 to 19 bits turned: pairs on both sides of every distance.
    for i in range(100, 300):
        turned = rng.choice(64, size=i % 20, replace=False)
        hashes[i] = hashes[i % 100] ^ np.bitwise_or.reduce(np.uint64(1) << turned.astype(np.uint64), initial=0)
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    wanted = np.argwhere(np.triu(apart <= distance, k=1))
    assert len(wanted) > 0
    assert np.array_equal(near_pairs(hashes, distance), wanted)


def test_equal_hashes_are_all_paired():
    assert near_pairs(np.full(4, 7, np.uint64), 0).tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]


@pytest.mark.parametrize("n", [0, 1])
def test_few_hashes_have_no_pairs(n):
    assert near_pairs(np.zeros(n, np.uint64), 3).shape == (0, 2)


@pytest.mark.parametrize("distance", [-1, FURTHEST + 1])
def test_a_distance_that_means_nothing_is_refused(distance):
    with pytest.raises(ValueError, match="bits"):
        near_pairs(np.zeros(2, np.uint64), distance)
