"""The streaming benchmark measures what it says: every row once, and growth where there is growth."""

import pyarrow.parquet as pq
import pytest

from benchmarks.streaming import PICTURES, Usage, without_ray, write_corpus
from m3agiqa.config import load_config


def test_the_corpus_is_as_large_as_asked_and_can_be_scored(tmp_path):
    manifest, kilobytes = write_corpus(tmp_path, 250, 64)
    table = pq.read_table(manifest)
    assert table.num_rows == len(set(table["id"].to_pylist())) == 250
    assert len(set(table["image_path"].to_pylist())) == PICTURES
    assert 0.5 < kilobytes < 10
    found = without_ray(load_config(None, ["engine.kind=simulated"]), manifest)
    assert found["rows"] == 250
    assert found["cpu_ms_per_image"] > 0


@pytest.mark.parametrize(("grown_mb", "growth"), [(0.0, 1.0), (100.0, 2.0)])
def test_growth_is_the_last_tenth_by_the_second(grown_mb, growth):
    usage = Usage()
    usage._samples = [(float(i), 100.0 + (grown_mb if i >= 90 else 0.0), 50.0) for i in range(100)]
    found = usage.tenths(since=0.0)
    assert found["driver_growth"] == growth
    assert found["workers_growth"] == 1.0
    assert usage.tenths(since=95.0) == {}
