import io
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from m3agiqa.images import DecodedImage, ImageRejected, decode
from tests import corpora
from tests.corpora import LIMITS, encode, picture

# pytest sets its own filters; what users see is tested in a process of its own below
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def run(data: bytes, **limits) -> DecodedImage:
    return decode(data, **{**LIMITS, **limits})


def reason(data: bytes, **limits) -> str:
    with pytest.raises(ImageRejected) as caught:
        run(data, **limits)
    message = str(caught.value)
    assert "\n" not in message
    assert " at 0x" not in message  # no address of a Python object
    return message


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG2000"])
def test_lossless_formats_give_the_pixels_that_were_saved(kind):
    image = picture().quantize(200).convert("RGB") if kind == "GIF" else picture()
    options = {"lossless": True} if kind == "WEBP" else {}
    found = run(encode(image, kind, **options))
    assert found.pixels.dtype == np.uint8
    assert found.pixels.flags["C_CONTIGUOUS"]
    assert (found.width, found.height) == (48, 32)
    np.testing.assert_array_equal(found.pixels, np.asarray(image))


@pytest.mark.parametrize("kind", ["JPEG", "AVIF", "WEBP"])
def test_lossy_formats(kind):
    found = run(encode(picture(), kind, quality=95))
    # the blue channel has no jump, which coding would blur
    assert np.abs(found.pixels[..., 2].astype(int) - np.asarray(picture())[..., 2]).mean() < 6


def test_every_bad_input_ends_as_it_should(tmp_path):
    statuses = corpora.write_bad_inputs(tmp_path)
    files = {"corrupt": "corrupt.png", "truncated": "truncated.jpg", "truncated_png": "truncated.png"}
    files |= {"text_as_png": "text.png", "png_as_jpg": "really_a_png.jpg", "animated": "animated.gif"}
    files |= {"cmyk": "cmyk.jpg", "rotated": "rotated.jpg"}
    files |= {name: f"{name}.png" for name in ("good", "empty", "grey16", "rgb16", "palette", "tiny", "huge")}
    files |= {"elongated": "elongated.png"}
    assert set(files) <= set(statuses)
    for case, name in files.items():
        data = (tmp_path / name).read_bytes()
        if statuses[case] == "ok":
            assert run(data).pixels.shape[2] == 3, case
        else:
            assert reason(data), case


def test_reasons_say_what_is_wrong(tmp_path):
    corpora.write_bad_inputs(tmp_path)
    assert "empty" in reason(b"")
    assert "<html>404" in reason((tmp_path / "text.png").read_bytes())
    assert "truncated" in reason((tmp_path / "truncated.jpg").read_bytes())
    assert "animated image of 12 frames; export one frame" in reason((tmp_path / "animated.gif").read_bytes())
    assert "corrupt" in reason(encode(picture())[:20])
    assert "corrupt" in reason(b"\xff\xd8\xff\xe0 not really")
    huge = reason((tmp_path / "huge.png").read_bytes())
    assert "20000x20000" in huge
    assert "64,000,000" in huge
    assert "images.max_pixels" in huge
    assert "images.min_side" in reason(encode(picture(100, 7)))
    assert "images.max_aspect_ratio" in reason(encode(picture(100, 10)))


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "AVIF"])
def test_animated_stills_formats_are_rejected(kind):
    frames = [picture(seed=i) for i in range(3)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert "animated image of 3 frames" in reason(data)


def test_pages_of_a_tiff_are_rejected_and_second_pictures_of_a_jpeg_are_not():
    pages = {"save_all": True, "append_images": [picture(seed=1)]}
    assert "2 pages" in reason(encode(picture(), "TIFF", **pages))
    np.testing.assert_array_equal(run(encode(picture(), "MPO", **pages)).pixels, run(encode(picture(), "JPEG")).pixels)


@pytest.mark.parametrize("size", [1, 100, 1000, 5000])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000"])
def test_no_damage_raises_anything_but_a_rejection(kind, size):
    rng = np.random.default_rng(size)
    whole = bytearray(encode(Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)), kind))
    for trial in range(12):
        data = whole.copy()
        if trial % 2:
            del data[min(size, len(data) - 1) :]
        else:
            for _ in range(10):
                data[int(rng.integers(0, min(size, len(data))))] = int(rng.integers(0, 256))
        try:
            assert run(bytes(data)).pixels.shape[2] == 3
        except ImageRejected as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_the_limit_is_checked_before_pixels_are_decoded():
    # The header promises 20,000 x 20,000 pixels of 64 bits; decoding would take 3 GB, and there is nothing to decode.
    header_only = corpora.png(20_000, 20_000, 16, 6, b"")
    assert "images.max_pixels" in reason(header_only)
    assert "truncated" in reason(header_only[:-30], max_pixels=10**9, max_side=64)


def test_the_users_limit_may_lie_above_pillows():
    # 200 M pixels: Pillow by itself warns from 89 M and raises from 179 M on.
    found = run(corpora.png(20_000, 10_000, 1, 0, None), max_pixels=200_000_000, max_side=64)
    assert (found.width, found.height, found.pixels.shape) == (20_000, 10_000, (32, 64, 3))


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    found = run(encode(Image.fromarray(ramp)))
    np.testing.assert_array_equal(found.pixels[..., 0], ramp >> 8)
    np.testing.assert_array_equal(found.pixels[..., 0], found.pixels[..., 2])
    assert (run(corpora.png16_rgb(value=0x8040)).pixels == 0x80).all()
    grey_alpha = struct_row = b"\0" + b"\x80\x40\xff\xff" * 16
    assert (run(corpora.png(16, 16, 16, 4, struct_row * 16)).pixels == 0x80).all(), grey_alpha
    assert (run(b"P5 16 16 65535\n" + b"\x80\x40" * 256).pixels == 0x80).all()


def test_float_tiff():
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    for scale in (1, 255):
        found = run(encode(Image.fromarray(ramp * scale), "TIFF"))
        np.testing.assert_array_equal(found.pixels[..., 1], np.rint(ramp * 255).astype(np.uint8))
    assert "white level" in reason(encode(Image.fromarray(ramp * 5000), "TIFF"))
    assert "white level" in reason(encode(Image.fromarray(ramp * np.float32("nan")), "TIFF"))


def test_integers_of_32_bits():
    ramp = np.linspace(0, 65535, 64).astype(np.int32).reshape(8, 8)
    np.testing.assert_array_equal(run(encode(Image.fromarray(ramp), "TIFF")).pixels[..., 0], ramp >> 8)
    assert "65535" in reason(encode(Image.fromarray(ramp * 2), "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_composited_on_white(mode):
    if mode == "P":
        found = run(corpora.palette_with_transparency()).pixels
        assert (found[:, :16] == 255).all()
        assert (found[:, 16:] == [255, 0, 0]).all()
        return
    image = Image.new(mode, (16, 16), (0, 0) if mode == "LA" else (0, 0, 0, 0))
    image.paste((0, 128) if mode == "LA" else (0, 0, 0, 128), (0, 0, 8, 16))
    found = run(encode(image)).pixels
    assert (found[:, 8:] == 255).all()
    assert (np.abs(found[:, :8].astype(int) - 127) <= 1).all()


def test_a_transparent_colour_of_a_png_without_alpha():
    image = Image.new("RGB", (16, 16), (10, 20, 30))
    assert (run(encode(image, transparency=(10, 20, 30))).pixels == 255).all()
    assert (run(encode(image)).pixels == [10, 20, 30]).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_modes(mode):
    image = picture().convert(mode)
    found = run(encode(image, "TIFF"))
    np.testing.assert_array_equal(found.pixels, np.asarray(image.convert("RGB")))


def test_an_adobe_cmyk_jpeg_is_not_a_negative():
    found = run(corpora.cmyk_jpeg()).pixels.astype(int)
    assert np.abs(found - [255, 0, 0]).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation(kind, orientation):
    stored = Image.new("RGB", (60, 40), "blue")
    stored.paste("red", (0, 0, 20, 40))
    stored.paste("lime", (0, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = orientation
    # where the corner at the top left of what is stored is to be seen
    row, column = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}[
        orientation
    ]
    found = run(encode(stored, kind, exif=exif))
    assert (found.width, found.height) == ((60, 40) if orientation < 5 else (40, 60))
    assert found.pixels.shape == (found.height, found.width, 3)
    corner = found.pixels[row, column].astype(int)
    assert np.abs(corner - [0, 255, 0]).max() < 60
    reduced = run(encode(stored, kind, exif=exif), max_side=30)
    assert (reduced.width, reduced.height) == (found.width, found.height)
    assert reduced.pixels.shape[:2] == ((20, 30) if orientation < 5 else (30, 20))


def test_broken_exif_does_not_spoil_the_image():
    data = encode(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xff" * 40)
    assert run(data).pixels.shape == (32, 48, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_downscale_keeps_the_aspect_ratio_and_the_picture(kind):
    image = picture(2000, 1000)
    found = run(encode(image, kind, **({"quality": 97} if kind == "JPEG" else {})), max_side=256)
    assert (found.width, found.height, found.pixels.shape) == (2000, 1000, (128, 256, 3))
    plain = np.asarray(image.resize((256, 128), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(found.pixels.astype(int) - plain).mean() < 2.0


def test_an_image_at_the_limit_is_not_touched():
    np.testing.assert_array_equal(run(encode(picture(64, 32)), max_side=64).pixels, np.asarray(picture(64, 32)))


def test_threads_see_their_own_limits():
    data, wrong = encode(picture(600, 500)), []

    def work(limit: int) -> None:
        for _ in range(8):
            try:
                run(data, max_pixels=limit)
                if limit < 300_000:
                    wrong.append(limit)
            except ImageRejected:
                if limit >= 300_000:
                    wrong.append(limit)

    threads = [threading.Thread(target=work, args=(limit,)) for limit in (299_999, 300_000) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_nothing_is_written_to_stderr(tmp_path):
    corpora.write_bad_inputs(tmp_path)
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0" + b"\x12\x01\x03\0\xff\xff\xff\x7f\x01\0\0\0" * 3
    (tmp_path / "exif.jpg").write_bytes(encode(picture(), "JPEG", exif=exif))
    tiff = bytearray(encode(picture(), "TIFF"))
    tiff[-60:] = b"\x7f" * 60
    (tmp_path / "damaged.tif").write_bytes(tiff)
    (tmp_path / "lzw.tif").write_bytes(encode(picture(), "TIFF", compression="tiff_lzw")[:-400])
    program = f"""
import pathlib
from m3agiqa.images import ImageRejected, decode
for path in pathlib.Path({str(tmp_path)!r}).iterdir():
    for most in (1000, 10**8):
        try:
            decode(path.read_bytes(), max_pixels=most, min_side=8, max_side=64, max_aspect_ratio=8)
        except ImageRejected:
            pass
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_file_name_plays_no_part():
    assert Image.open(io.BytesIO(encode(picture(), "WEBP"))).format == "WEBP"
    assert run(encode(picture(), "WEBP", lossless=True)).pixels.shape == (32, 48, 3)
