"""Tests with malicious, damaged and unusual images: refused as in test_hostile.py, or read for what they show."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from conftest import QUICK, with_image, write
from PIL import Image

from pilot_jax.data.images import read_image
from pilot_jax.data.llava.sample import Entry, parse_sample
from tests.fuzz.refusing import refused


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def png(width, height):
    """Returns a PNG whose header claims the given size, with almost no pixel data."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))


def encoded(tmp_path, image, suffix, **options):
    image.save(tmp_path / f"tmp{suffix}", **options)
    content = (tmp_path / f"tmp{suffix}").read_bytes()
    (tmp_path / f"tmp{suffix}").unlink()
    return content


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
IMAGES = {
    "empty": lambda d: (b"", ["cannot be decoded"]),
    "a text": lambda d: (b"hello", ["cannot be decoded (not a file of JPEG, PNG, "]),
    "bomb": lambda d: (png(30_000, 30_000), ["more pixels than data.limits.image_pixels"]),
    "larger bomb": lambda d: (png(2**31 - 1, 2**31 - 1), ["more pixels than data.limits.image_pixels"]),
    "no pixels": lambda d: (png(0, 0), ["cannot be decoded"]),
    "claims more than it has": lambda d: (png(500, 500), ["cannot be decoded"]),
    "truncated PNG": lambda d: (encoded(d, NOISE, ".png")[:300], ["cannot be decoded"]),
    "truncated JPEG": lambda d: (encoded(d, NOISE, ".jpg")[:400], ["cannot be decoded"]),
    "truncated GIF": lambda d: (encoded(d, NOISE, ".gif")[:200], ["cannot be decoded"]),
    "PostScript": lambda d: (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n", ["cannot be decoded"]),
    "SVG": lambda d: (b"<svg xmlns='http://www.w3.org/2000/svg'/>", ["cannot be decoded"]),
    "floats": lambda d: (encoded(d, Image.fromarray(np.ones((8, 8), np.float32)), ".tiff"), ["floating-point pixels"]),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(call, tmp_path, name):
    content, wanted = IMAGES[name](tmp_path)
    (tmp_path / "x.png").write_bytes(content)
    write(tmp_path, "d.json", [with_image("x.png")])
    refused(call, tmp_path, ["run", QUICK, "--set", f"data.path={tmp_path / 'd.json'}", "--out", tmp_path / "out"],
            ["d.json[0]", *wanted])
    code, _, err = call("data", "check", tmp_path / "d.json")
    assert code == 2 and wanted[0] in err


def read(path):
    return np.asarray(read_image(parse_sample(Entry("x", with_image(path.name), "t", "c", "train"), path.parent)))


def test_unusual_images_are_read_for_what_they_show(tmp_path):
    """16-bit greys are scaled to 8 bits, animations give their first frame; CMYK, palettes and alpha are converted."""
    ramp = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    assert (read(tmp_path / "grey.png")[..., 0] == ramp >> 8).all()
    Image.fromarray(ramp).save(tmp_path / "grey.tiff")
    assert (read(tmp_path / "grey.tiff")[..., 1] == ramp >> 8).all()
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    red.save(tmp_path / "two.gif", save_all=True, append_images=[blue])
    assert (read(tmp_path / "two.gif") == [255, 0, 0]).all()
    red.save(tmp_path / "two.webp", save_all=True, append_images=[blue], lossless=True)
    assert (read(tmp_path / "two.webp") == [255, 0, 0]).all()
    red.save(tmp_path / "two.jpg", "MPO", save_all=True, append_images=[blue])
    assert np.abs(read(tmp_path / "two.jpg").astype(int) - [255, 0, 0]).max() < 8
    red.convert("CMYK").save(tmp_path / "four.jpg")
    assert np.abs(read(tmp_path / "four.jpg").astype(int) - [255, 0, 0]).max() < 8
    for mode in ("1", "L", "LA", "P", "RGBA"):
        red.convert(mode).save(tmp_path / f"{mode}.png")
        assert read(tmp_path / f"{mode}.png").shape == (8, 8, 3)
    Image.new("RGB", (1, 4000)).save(tmp_path / "thin.png")
    assert read(tmp_path / "thin.png").shape == (4000, 1, 3)
