"""d, ours: the whole product, from files through Ray Data into parquet, with the states of every conversation."""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import Job
from benchmarks.inputs import write_predictor
from m3agiqa.models import hidden_width


def measure(job: Job, *settings: str) -> dict[str, float]:
    """Seconds for the job's images, from the moment that the engine is up."""
    from m3agiqa.pipeline import run_scoring

    with tempfile.TemporaryDirectory() as out:
        done = run_scoring(job.config(*(settings or ("capture.kind=states",))), job.manifest, out)
    assert done.counts == {"ok": job.images}, done.counts
    assert done.images_per_second is not None
    return {"images": job.images, "seconds": job.images / done.images_per_second, **done.engine}


def measure_without_capture(job: Job) -> dict[str, float]:
    """The same, without capture (and so without a predictor): what the capture costs."""
    return measure(job, "capture.kind=none", "predictor.path=null")


def measure_with_predictor(job: Job, **size: Any) -> dict[str, float]:
    """The same with a predictor for all aspects, its first layer folded; random weights, the published size."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_predictor(Path(folder) / "predictor", hidden_width(job.folder()), **size)
        return measure(job, f"predictor.path={path}")


def measure_with_small_predictor(job: Job) -> dict[str, float]:
    """The same with one of the size that the embedded model's has."""
    return measure_with_predictor(job, width=64, blocks=2, slstm_at=(1,), hidden=32)
