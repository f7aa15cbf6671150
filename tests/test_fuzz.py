"""A small part of `python -m benchmarks.fuzz`, with another seed."""

from benchmarks.fuzz import fuzz_images, fuzz_manifests


def test_mutated_images_give_a_row_each():
    statuses = fuzz_images(300, seed=1)
    assert statuses.total() == 300
    assert statuses["rejected"] > 30
    assert statuses["ok"] > 30
    assert statuses["failed"] == 0


def test_mutated_manifests_are_read_or_refused_with_a_reason(tmp_path):
    outcomes = fuzz_manifests(200, seed=1, folder=tmp_path)
    assert outcomes.total() == 200
    assert outcomes["refused"] > 20
    assert outcomes["read"] > 20
