"""d, ours: the whole product, from files through Ray Data into parquet, with the states of every conversation."""

import tempfile

from benchmarks.common import Job


def measure(job: Job, capture: str = "states") -> dict[str, float]:
    """Seconds for the job's images, from the moment that the engine is up."""
    from m3agiqa.pipeline import run_scoring

    with tempfile.TemporaryDirectory() as out:
        done = run_scoring(job.config(f"capture.kind={capture}"), job.manifest, out)
    assert done.counts == {"ok": job.images}, done.counts
    assert done.images_per_second is not None
    return {"images": job.images, "seconds": job.images / done.images_per_second, **done.engine}


def measure_without_capture(job: Job) -> dict[str, float]:
    """The same, without capture: what the capture costs."""
    return measure(job, "none")
