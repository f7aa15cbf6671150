"""Every layout is read back by the library that trainers read it with."""

import io
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Image as ImageFeature
from datasets import load_dataset
from PIL import Image

from m3agiqa.cli import main
from m3agiqa.curate import curate
from m3agiqa.errors import UserError
from m3agiqa.export.rows import Captions
from m3agiqa.export.run import Options, export
from tests.corpora import encode, write_tar
from tests.curation.scored import files_of, kept, recipe, scored, write_pictures, write_scores
from tests.test_phash import photo

COUNT = 7


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[bytes]:
    return [Path(path).read_bytes() for path in write_pictures(tmp_path_factory.mktemp("pictures"), COUNT)]


@pytest.fixture(scope="module")
def curated(tmp_path_factory) -> Path:
    """Rows 0 to 6 of three prompts, with a split and pairs."""
    top = tmp_path_factory.mktemp("curated")
    paths = write_pictures(top / "in", COUNT)
    rows = [
        scored(f"{i}", 0.5 + i / 2, image=path, prompt=f"prompt {i % 3}", generator=None if i == 6 else "one")
        for i, path in enumerate(paths)
    ]
    rows.append(scored("bad", None, status="rejected", image=str(top / "in" / "gone.png")))
    write_scores(top / "run", rows, source=str(top / "in"))
    curate(recipe("split.validation=0.3", "pairs.margin=0.5"), str(top / "run"), str(top / "curated"))
    return top / "curated"


def rows_by_id(dataset) -> dict:
    return {row["id"]: (part, row) for part, rows in dataset.items() for row in rows}


def undecoded(dataset):
    return dataset.cast_column("image", ImageFeature(decode=False))


def data_of(image: dict) -> bytes:
    """The bytes of an image that `datasets` has not decoded."""
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("kind", ["imagefolder", "parquet"])
def test_datasets_reads_an_image_folder_and_parquet(curated, pictures, tmp_path, kind, reference):
    written = export(str(curated), str(tmp_path / "out"), Options(kind, reference=reference, rows_per_shard=2))
    assert sum(written.values()) == COUNT
    assert set(written) == {"train", "validation"}
    found = load_dataset(kind, data_dir=str(tmp_path / "out"))
    assert found["train"][0]["image"].size == (96, 96)
    rows = rows_by_id(undecoded(found))
    assert {part: [p for p, _ in rows.values()].count(part) for part in written} == written
    for i, picture in enumerate(pictures):
        _, row = rows[str(i)]
        assert data_of(row["image"]) == picture
        assert (row["text"], row["prompt"]) == (f"prompt {i % 3}", f"prompt {i % 3}")
        assert row["quality_mos"] == 0.5 + i / 2
        assert row["generator"] == (None if i == 6 else "one")
    # A score that no row has is no column: its type could not be known.
    assert "authenticity_mos" not in found["train"].column_names
    links = [one for one in (tmp_path / "out").rglob("*.png") if one.is_symlink()]
    assert len(links) == (COUNT if reference and kind == "imagefolder" else 0)


def test_an_image_folder_as_the_scripts_of_diffusers_load_it(curated, pictures, tmp_path):
    written = export(str(curated), str(tmp_path / "out"), Options("imagefolder", rows_per_shard=2))
    found = load_dataset("imagefolder", data_files={"train": str(tmp_path / "out" / "train" / "**")})["train"]
    assert found.num_rows == written["train"]
    assert {"image", "text"} <= set(found.column_names)
    for row in undecoded(found):
        assert data_of(row["image"]) == pictures[int(row["id"])]
        assert row["text"] == f"prompt {int(row['id']) % 3}"


def test_webdataset_reads_the_tars(curated, pictures, tmp_path):
    import webdataset as wds

    written = export(str(curated), str(tmp_path / "out"), Options("webdataset", rows_per_shard=3))
    found = {}
    for part, count in written.items():
        tars = sorted(map(str, (tmp_path / "out" / part).glob("*.tar")))
        assert len(tars) == -(-count // 3)
        samples = list(wds.WebDataset(tars, shardshuffle=False))
        assert len(samples) == count
        found |= {json.loads(sample["json"])["id"]: sample for sample in samples}
    for i, picture in enumerate(pictures):
        assert found[str(i)]["png"] == picture
        assert found[str(i)]["txt"].decode() == f"prompt {i % 3}"
        assert json.loads(found[str(i)]["json"])["quality_mos"] == 0.5 + i / 2


def read_as_kohya(folder: Path) -> dict[str, tuple[int, str]]:
    """The convention of sd-scripts, read anew: REPEATS_NAME folders, and captions of the same stem."""
    found = {}
    for subset in sorted(one for one in folder.iterdir() if one.is_dir()):
        repeats = int(subset.name.split("_")[0])
        for picture in sorted(subset.iterdir()):
            if picture.suffix in (".png", ".jpg", ".jpeg", ".webp", ".bmp"):
                with picture.with_suffix(".txt").open("rt", encoding="utf-8") as file:
                    lines = file.readlines()
                assert lines, "sd-scripts ends at a caption file without a line"
                found[str(picture)] = (repeats, lines[0].strip())
    return found


def test_kohya_finds_pictures_with_captions_of_words_for_the_scores(curated, pictures, tmp_path):
    captions = Captions("both", tags=True)
    written = export(str(curated), str(tmp_path / "out"), Options("kohya", captions, rows_per_shard=2))
    found = {}
    for part, count in written.items():
        of_part = read_as_kohya(tmp_path / "out" / part)
        assert len(of_part) == count
        found |= {Path(path).read_bytes(): told for path, told in of_part.items()}
    words = ["bad", "poor", "poor", "fair", "fair", "good", "good"]
    for i, picture in enumerate(pictures):
        assert found[picture] == (1, f"prompt {i % 3}. what {i} shows, {words[i]} quality")


def test_kohya_takes_a_picture_without_a_prompt(tmp_path):
    (path,) = write_pictures(tmp_path / "in", 1)
    write_scores(tmp_path / "run", [scored("a", 3.0, image=path, prompt=None)], source=str(tmp_path / "in"))
    export(str(tmp_path / "run"), str(tmp_path / "out"), Options("kohya"))
    assert list(read_as_kohya(tmp_path / "out" / "train").values()) == [(1, "")]


def test_pictures_that_kohya_would_pass_over_are_refused(tmp_path):
    rows = [
        scored("a", 3.0, image="/in/a.png"),
        scored("b", 3.0, image="/in/b.TIF"),
        scored("c", 3.0, image="/in/c.gif"),
    ]
    write_scores(tmp_path / "run", rows, source="/in")
    with pytest.raises(UserError, match=r"pass over \.gif, \.tif files"):
        export(str(tmp_path / "run"), str(tmp_path / "out"), Options("kohya"))
    assert not (tmp_path / "out").exists()


def test_datasets_reads_pairs_as_diffusion_dpo_does(curated, pictures, tmp_path):
    written = export(str(curated), str(tmp_path / "out"), Options("diffusion-dpo"))
    # --dataset_name=parquet --train_data_dir=OUT; only rows whose label_0 is 0 or 1 are taken.
    found = load_dataset("parquet", None, data_dir=str(tmp_path / "out"))
    pairs = [row for part in found.values() for row in part]
    assert len(pairs) == sum(written.values()) == 3
    for row in pairs:
        # As the trainers do: both pictures decoded, the better one by label_0.
        zero, one = (Image.open(io.BytesIO(row[name])).convert("RGB") for name in ("jpg_0", "jpg_1"))
        assert zero.size == one.size == (96, 96)
        better, worse = (0, 1) if row["label_0"] == 1.0 else (1, 0)
        assert int(row[f"id_{better}"]) > int(row[f"id_{worse}"])
        assert row[f"jpg_{better}"] == pictures[int(row[f"id_{better}"])]
        assert row["caption"] == f"prompt {int(row['id_0']) % 3}" == f"prompt {int(row['id_1']) % 3}"
        assert row["label_0"] + row["label_1"] == 1.0


@pytest.mark.parametrize("kind", ["imagefolder", "kohya", "webdataset", "parquet", "diffusion-dpo"])
def test_an_export_goes_on_where_it_was_stopped_and_gives_the_same_bytes(curated, tmp_path, kind):
    options = Options(kind, rows_per_shard=2)
    export(str(curated), str(tmp_path / "whole"), options)
    moved = curated.parent / "in" / "6.png"
    moved.rename(moved.with_suffix(".moved"))
    try:
        with pytest.raises(UserError, match=r"6\.png: the image cannot be read"):
            export(str(curated), str(tmp_path / "out"), options)
    finally:
        moved.with_suffix(".moved").rename(moved)
    assert not json.loads((tmp_path / "out" / "export.json").read_text())["finished"]
    kept = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in files_of(tmp_path / "out")}
    export(str(curated), str(tmp_path / "out"), options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    for name, time in kept.items():
        if Path(name).suffix in (".png", ".tar", ".parquet"):
            assert (tmp_path / "out" / name).stat().st_mtime_ns == time


@pytest.mark.parametrize("kind", ["imagefolder", "parquet", "diffusion-dpo"])
@pytest.mark.parametrize("change", ["seed", "margin", "composite"])
def test_what_has_changed_is_no_export_to_go_on_with(tmp_path, kind, change):
    paths = write_pictures(tmp_path / "in", COUNT)
    rows = [scored(str(i), i / 2, image=path, prompt=f"prompt {i % 3}") for i, path in enumerate(paths)]
    run, chosen, out = tmp_path / "run", str(tmp_path / "chosen"), str(tmp_path / "out")
    write_scores(run, rows, source=str(tmp_path / "in"))
    rules = ["split.validation=0.3", "pairs.margin=0.5", "composite.weights={quality_mos: 1}"]
    curate(recipe(*rules), str(run), chosen)
    export(chosen, out, Options(kind))
    before = files_of(tmp_path / "out")
    new = {"seed": "split.seed=7", "margin": "pairs.margin=1.6", "composite": "composite.weights={quality_mos_low: 1}"}
    shutil.rmtree(chosen)
    curate(recipe(*rules, new[change]), str(run), chosen)
    if change == "margin" and kind != "diffusion-dpo":
        export(chosen, out, Options(kind))  # the pairs are no part of it
    else:
        with pytest.raises(UserError, match="before it changed; give another folder"):
            export(chosen, out, Options(kind))
    assert files_of(tmp_path / "out") == before


def test_a_row_that_was_scored_anew_is_no_export_to_go_on_with(tmp_path):
    paths = write_pictures(tmp_path / "in", 3)
    rows = [scored(str(i), 3.0, image=path) for i, path in enumerate(paths)]
    for status in ("failed", "ok"):
        write_scores(tmp_path / "run", [rows[0] | {"status": status}, *rows[1:]], source=str(tmp_path / "in"))
        if status == "failed":
            export(str(tmp_path / "run"), str(tmp_path / "out"), Options("imagefolder"))
    with pytest.raises(UserError, match="before it changed"):
        export(str(tmp_path / "run"), str(tmp_path / "out"), Options("imagefolder"))


def test_pairs_are_of_the_parts_that_an_earlier_curation_made(tmp_path):
    paths = write_pictures(tmp_path / "in", 9)
    rows = [scored(str(i), i / 2, image=path, prompt=f"prompt {i % 3}") for i, path in enumerate(paths)]
    write_scores(tmp_path / "run", rows, source=str(tmp_path / "in"))
    curate(recipe("split.validation=0.3"), str(tmp_path / "run"), str(tmp_path / "parted"))
    curate(recipe("pairs.margin=0.2"), str(tmp_path / "parted"), str(tmp_path / "paired"))
    part_of = {row["id"]: {"val": "validation"}.get(row["split"], row["split"]) for row in kept(tmp_path / "parted")}
    assert set(export(str(tmp_path / "paired"), str(tmp_path / "out"), Options("diffusion-dpo"))) == {
        "train",
        "validation",
    }
    for part, pairs in load_dataset("parquet", None, data_dir=str(tmp_path / "out")).items():
        assert {part_of[row[name]] for row in pairs for name in ("id_0", "id_1")} == {part}
    table = pq.read_table(tmp_path / "paired" / "pairs.parquet")
    pq.write_table(table.drop_columns("split"), tmp_path / "paired" / "pairs.parquet")
    with pytest.raises(UserError, match="without its column split"):
        export(str(tmp_path / "paired"), str(tmp_path / "again"), Options("diffusion-dpo"))


def test_a_picture_that_a_tar_holds_no_more_is_named(tmp_path):
    tar = write_tar(tmp_path / "in.tar", [("0.jpg", encode(photo(0), "JPEG"))])
    rows = [scored(f"in/{seed}", 3.0, image=f"{tar}::{seed}.jpg") for seed in (0, 1)]
    write_scores(tmp_path / "run", rows, source=str(tar))
    with pytest.raises(UserError, match=r"row 'in/1': its image .*in\.tar::1\.jpg is not in"):
        export(str(tmp_path / "run"), str(tmp_path / "out"), Options("parquet"))


@pytest.mark.parametrize(
    ("kind", "reference"),
    [("imagefolder", False), ("imagefolder", True), ("kohya", True), ("webdataset", False), ("parquet", False)],
)
def test_scores_that_name_a_file_outside_of_their_corpus_get_nothing(tmp_path, kind, reference):
    inside, secret = tmp_path / "in", Path(*write_pictures(tmp_path / "mine", 1))
    inside.mkdir()
    (inside / "link.png").symlink_to(secret)
    for name, image in enumerate((str(secret), f"{inside}/link.png", f"{inside}/../mine/{secret.name}")):
        run, out = tmp_path / f"run{name}", tmp_path / f"out{name}"
        write_scores(run, [scored("a", 3.0, image=image)], source=str(inside))
        with pytest.raises(UserError, match="leads outside of the corpus"):
            export(str(run), str(out), Options(kind, reference=reference))
        assert not [one for one in out.rglob("*") if one.is_file() and secret.read_bytes() in one.read_bytes()]


def test_folders_that_the_run_was_allowed_to_read_are_read(tmp_path):
    paths = write_pictures(tmp_path / "elsewhere", 2)
    rows = [scored(str(i), 3.0, image=path) for i, path in enumerate(paths)]
    allowed = [f"access.roots=[{tmp_path / 'elsewhere'}]"]
    write_scores(tmp_path / "run", rows, source=str(tmp_path / "in" / "*.csv"), settings=allowed)
    curate(recipe(), str(tmp_path / "run"), str(tmp_path / "curated"))
    assert export(str(tmp_path / "curated"), str(tmp_path / "out"), Options("kohya")) == {"train": 2}


def test_a_picture_that_was_copied_in_part_is_copied_again(curated, pictures, tmp_path):
    export(str(curated), str(tmp_path / "out"), Options("kohya"))
    copied = sorted((tmp_path / "out" / "train").rglob("*.png"))[0]
    whole = copied.read_bytes()
    copied.write_bytes(whole[:100])
    export(str(curated), str(tmp_path / "out"), Options("kohya"))
    assert copied.read_bytes() == whole
    assert whole in pictures


@pytest.mark.parametrize("kind", ["imagefolder", "webdataset"])
def test_pictures_inside_of_tars_come_out_bit_for_bit(tmp_path, kind):
    pictures = [encode(photo(seed), "JPEG") for seed in range(3)]
    tar = write_tar(tmp_path / "in.tar", [(f"{seed}.jpg", data) for seed, data in enumerate(pictures)])
    rows = [scored(f"in/{seed}", 3.0, image=f"{tar}::{seed}.jpg") for seed in (0, 2)]
    write_scores(tmp_path / "run", rows, source=str(tar))
    assert export(str(tmp_path / "run"), str(tmp_path / "out"), Options(kind)) == {"train": 2}
    if kind == "imagefolder":
        found = load_dataset("imagefolder", data_dir=str(tmp_path / "out"))["train"]
        assert [data_of(row["image"]) for row in undecoded(found)] == [pictures[0], pictures[2]]
    else:
        import webdataset as wds

        samples = list(wds.WebDataset(str(tmp_path / "out" / "train" / "00000.tar"), shardshuffle=False))
        assert [sample["jpg"] for sample in samples] == [pictures[0], pictures[2]]
    assert not (tmp_path / "out" / "spool").exists()


def test_to_an_object_store_and_from_it(curated, pictures, tmp_path, bucket):
    for name, data in files_of(curated).items():
        bucket(f"export/curated/{name}", data)
    for kind in ("imagefolder", "webdataset"):
        local, there = tmp_path / kind, f"s3://m3agiqa-corpus/export/{kind}"
        export("s3://m3agiqa-corpus/export/curated", there, Options(kind))
        export("s3://m3agiqa-corpus/export/curated", str(local), Options(kind))
        from m3agiqa.corpus.files import fetch, join

        for name, data in files_of(local).items():
            assert fetch(join(there, name)) == data


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--format", "webdataset", "--images", "reference"], "holds the pictures themselves"),
        (["--format", "diffusion-dpo", "--caption", "both"], "a pair has one caption"),
        (["--format", "parquet", "--caption", "description", "--aspect", "authenticity"], "authenticity_description"),
        (["--format", "parquet", "--rows-per-shard", "0"], "one row at least"),
    ],
)
def test_what_cannot_be_written_is_refused(curated, tmp_path, capsys, flags, said):
    assert main(["export", str(curated), "--out", str(tmp_path / "out"), *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_folders_are_left_as_they_are(curated, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    command = ["export", str(curated), "--out", str(tmp_path / "out"), "--format", "kohya"]
    assert main(command) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main([*command[:3], str(tmp_path / "out" / "mine.txt"), *command[4:]]) == 2
    assert "is a file" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
    assert main(command) == 0
    assert "train: " in capsys.readouterr().out
    assert main([*command, "--tags"]) == 2
    assert "holds another export" in capsys.readouterr().err
    no_pairs = write_scores(tmp_path / "run", [scored("a", 3.0)])
    assert main(["export", str(no_pairs), "--out", str(tmp_path / "dpo"), "--format", "diffusion-dpo"]) == 2
    assert "holds no preference pairs" in capsys.readouterr().err
