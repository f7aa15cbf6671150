"""Broken inputs by the thousand: none may crash, and each row that is read comes out once, with a status.

`python -m benchmarks.fuzz [--images 8000 --manifests 2000 --seed 0]` prints one JSON line.
"""

import argparse
import gzip
import io
import json
import random
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet as pq

from m3agiqa.config import AccessConfig, ImageConfig
from m3agiqa.corpus import FIXED_FIELDS, open_corpus
from m3agiqa.corpus.access import Access
from m3agiqa.decoding import decode_rows
from m3agiqa.errors import UserError
from m3agiqa.records import RESERVED_COLUMNS, Status

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "JPEG2000", "AVIF")
_SPECIAL = (b"\x00", b"\xff", b"\x7f", b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x80\x00\x00\x00", b"\n", b'"', b",")


def mutate(data: bytes, rng: random.Random) -> bytes:
    """The same with a few of: bytes changed, set to extremes, cut out, doubled, cut off; now and then noise alone."""
    if rng.random() < 0.02:
        return rng.randbytes(rng.randrange(64))
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, length = rng.randrange(len(found) + 1), rng.randrange(1, 32)
        if rng.random() < 0.4:  # headers are short, and most of what goes wrong is in them
            at = min(at, rng.randrange(64))
        kind = rng.randrange(5)
        if kind == 0:
            found[at : at + 1] = rng.randbytes(1)
        elif kind == 1:
            special = rng.choice(_SPECIAL)
            found[at : at + len(special)] = special
        elif kind == 2:
            del found[at : at + length]
        elif kind == 3:
            found[at:at] = found[at : at + length]
        elif rng.random() < 0.3:
            del found[at:]
    return bytes(found)


def seed_images() -> list[bytes]:
    """A small picture in every format that Pillow writes here, in colour, grey and with a palette."""
    y, x = np.mgrid[0:24, 0:32]
    pixels = np.stack([x * 8, y * 10, x * y], -1).astype(np.uint8)
    found = []
    for kind in _FORMATS:
        for mode in ("RGB", "L", "P"):
            buffer = io.BytesIO()
            try:
                Image.fromarray(pixels).convert(mode).save(buffer, kind)
            except (OSError, KeyError, ValueError):
                continue
            found.append(buffer.getvalue())
    return found


def fuzz_images(count: int, seed: int) -> Counter[str]:
    """Decodes so many mutated images as a run does. Returns how many rows came out by status.

    Raises:
        AssertionError: if a row is lost or doubled, or comes out with neither pixels nor a reason.
    """
    rng, seeds, statuses = random.Random(seed), seed_images(), Counter[str]()
    schema, limits = pa.schema(FIXED_FIELDS), ImageConfig.model_construct(max_pixels=10**6)
    for start in range(0, count, 100):
        blobs = [mutate(rng.choice(seeds), rng) for _ in range(min(100, count - start))]
        names = [f"{start + i}" for i in range(len(blobs))]
        none = [None] * len(blobs)
        columns = {"id": names, "image": names, "_uri": none, "_bytes": blobs, "prompt": none, "generator": none}
        rows = pa.table(columns, schema=schema)
        out = pa.concat_tables(decode_rows(rows, limits, Access((), AccessConfig())))
        assert out["id"].to_pylist() == names
        for row in out.select(["_status", "_error", "_pixels"]).to_pylist():
            assert (row["_status"] is None) == (row["_pixels"] is not None) == (row["_error"] is None)
            statuses[row["_status"] or Status.OK] += 1
    return statuses


def seed_manifests() -> dict[str, bytes]:
    """A small manifest of every kind, by file name."""
    image = seed_images()[0]
    rows = [{"id": f"row {i}", "image_path": f"{i}.png", "prompt": 'a "red", fox\n猫', "n": i} for i in range(20)]
    csv = "\n".join(["id,image_path,prompt,n", *(f'row {i},{i}.png,"a ""red"", fox",{i}' for i in range(20))])
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    parquet, embedded, tar = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    pq.write_table(pa.Table.from_pylist([{"image": image, "prompt": row["prompt"]} for row in rows]), embedded)
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for i in range(4):
            for name, data in ((f"{i}.png", image), (f"{i}.txt", b"a fox"), (f"{i}.json", b'{"prompt": "a"}')):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return {
        "m.csv": csv.encode(), "m.tsv": csv.replace(",", "\t").encode(), "m.jsonl": lines,
        "m.json": json.dumps(rows).encode(), "m.csv.gz": gzip.compress(csv.encode()),
        "m.parquet": parquet.getvalue(), "e.parquet": embedded.getvalue(), "m.tar": tar.getvalue(),
    }  # fmt: skip


def fuzz_manifests(count: int, seed: int, folder: Path, note: Callable[[bytes], None] = lambda _: None) -> Counter[str]:
    """Opens and reads so many mutated manifests. Returns how many were read, and how many refused with a reason.

    Args:
        note: given each manifest before it is opened, to know the last one of a process that crashed.

    Raises:
        AssertionError: if ids are missing or not unique, or not as many rows come out as were announced.
    """
    rng, seeds, outcomes = random.Random(seed), seed_manifests(), Counter[str]()
    for _ in range(count):
        name = rng.choice(sorted(seeds))
        path = folder / name
        path.write_bytes(mutate(seeds[name], rng))
        note(path.read_bytes())
        try:
            corpus = open_corpus(str(path), reserved=RESERVED_COLUMNS)
            ids = [name for shard in corpus.shards for rows in shard.read() for name in rows["id"].to_pylist()]
        except UserError:
            outcomes["refused"] += 1
        else:
            assert corpus.rows in (None, len(ids))
            assert len(set(ids)) == len(ids)
            assert all(ids)
            outcomes["read"] += 1
        path.unlink()
    return outcomes


def main() -> None:
    """Prints what came of it as a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--manifests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    images = fuzz_images(args.images, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        manifests = fuzz_manifests(args.manifests, args.seed, Path(folder))
    print(json.dumps({"images": images, "manifests": manifests, "seconds": round(time.monotonic() - started, 1)}))


if __name__ == "__main__":
    main()
