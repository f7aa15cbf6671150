"""Near duplicates by perceptual hashes, the images read on a real Ray cluster."""

import numpy as np
import pyarrow as pa
import pytest

from m3agiqa.config import load_config
from m3agiqa.curate import curate, hash_images
from m3agiqa.curation.duplicates import near_hashes
from m3agiqa.curation.rows import Origin
from m3agiqa.phash import hash_image
from tests.corpora import encode, write_tar
from tests.curation.scored import kept_ids, recipe, removed, scored, write_pictures, write_scores
from tests.test_phash import photo


def test_every_one_that_goes_is_near_one_that_stays():
    # A chain: b is near a, c is near b but not near a, and so on; d is equal to a.
    hashes = {"a": 0b0000, "b": 0b0011, "c": 0b1111, "e": 0b111111, "f": 7 << 60, "d": 0b0000}
    table = pa.table({"id": list(hashes), "hash": pa.array(list(hashes.values()), pa.uint64())})
    assert near_hashes(table, 2).to_pylist() == ["b", "e", "d"]
    assert near_hashes(table, 0).to_pylist() == ["d"]
    assert near_hashes(table.slice(0, 0), 2).to_pylist() == []


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_pictures_in_files_and_in_tars_are_hashed_and_the_best_of_a_kind_stays(tmp_path):
    paths = write_pictures(tmp_path / "in", 4)
    (tmp_path / "in" / "0-again.jpg").write_bytes(encode(photo(0).resize((80, 80)), "JPEG", quality=70))
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    rows = [scored(str(i), 3.0, image=path) for i, path in enumerate(paths)]
    rows += [scored("again", 4.0, image=str(tmp_path / "in" / "0-again.jpg"))]
    rows += [scored("broken", 4.0, image=str(tmp_path / "in" / "broken.png"))]
    rows += [scored("gone", 4.0, image=str(tmp_path / "in" / "gone.png"))]
    write_scores(tmp_path / "run", rows, source=str(tmp_path / "in"))
    done = curate(recipe("duplicates.distance=6"), str(tmp_path / "run"), str(tmp_path / "out"))
    assert removed(tmp_path / "out") == {"0": "duplicates.distance: 6"}
    assert kept_ids(tmp_path / "out") == ["1", "2", "3", "again", "broken", "gone"]
    assert done.sheet["notes"] == ["2 images could not be read and are compared with none"]

    tar = write_tar(tmp_path / "in.tar", [(f"{seed}.png", encode(photo(seed))) for seed in range(3)])
    corpus = load_config(None, []).corpus.model_dump(mode="json")
    inside = pa.table({"id": ["in/0", "in/2"], "image": [f"{tar}::0.png", f"{tar}::2.png"]})
    hashed = hash_images(inside, Origin(str(tar), corpus, None, {})).to_pydict()
    expected = {f"in/{seed}": hash_image(photo(seed)) for seed in (0, 2)}
    assert dict(zip(hashed["id"], map(int, hashed["hash"]), strict=True)) == expected
    assert all(np.uint64(value) == value for value in expected.values())
