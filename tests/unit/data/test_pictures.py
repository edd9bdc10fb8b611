"""Tests that images are read as a viewer shows them: upright, on white where transparent, with all grey levels."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from pilot_jax.config import LimitsConfig
from pilot_jax.data.images import image_identity, read_image
from pilot_jax.data.llava.image_field import EncodedImage
from pilot_jax.data.llava.sample import Sample
from pilot_jax.errors import InputError


def of(image):
    return Sample("1", image, (("human", "<image>"), ("gpt", "a")), "t", "c", "train", "f.json[0]")


def pixels(image):
    return np.asarray(read_image(of(image))).astype(int)


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return EncodedImage(file.getvalue())


def both(image, form, **options):
    """Returns the pixels of an image in memory, after checking that those of its file are the same."""
    value = pixels(image)
    np.testing.assert_array_equal(pixels(encoded(image, form, **options)), value)
    return value


# Left to right: opaque red, red of alpha 128, transparent red. On white: 255 - alpha in green and blue.
SHOWN = [[255, 0, 0], [255, 127, 127], [255, 255, 255]]


def test_what_is_transparent_is_white():
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(255, 0, 0, 255), (255, 0, 0, 128), (255, 0, 0, 0)])
    np.testing.assert_array_equal(both(rgba, "PNG")[0], SHOWN)
    np.testing.assert_array_equal(pixels(encoded(rgba, "WEBP", lossless=True, exact=True))[0], SHOWN)
    grey = Image.new("LA", (3, 1))
    grey.putdata([(0, 255), (0, 128), (0, 0)])
    np.testing.assert_array_equal(both(grey, "PNG")[0, :, 0], [0, 127, 255])
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    palette.info["transparency"] = 0  # the first colour, red
    np.testing.assert_array_equal(both(palette, "PNG", transparency=0)[0], [[255, 255, 255], [0, 0, 255]])
    np.testing.assert_array_equal(pixels(encoded(palette, "GIF", transparency=0))[0], [[255, 255, 255], [0, 0, 255]])
    rgb = Image.new("RGB", (2, 1), "red")
    rgb.putpixel((1, 0), (0, 0, 255))
    np.testing.assert_array_equal(pixels(encoded(rgb, "PNG", transparency=(255, 0, 0)))[0],
                                  [[255, 255, 255], [0, 0, 255]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_stand_upright(orientation):
    """The EXIF standard says of each orientation where row 0 and column 0 of the file are shown."""
    quarters = np.arange(1, 7).reshape(2, 3) * 40
    shown = {1: quarters, 2: quarters[:, ::-1], 3: quarters[::-1, ::-1], 4: quarters[::-1], 5: quarters.T,
             6: np.rot90(quarters, -1), 7: np.rot90(quarters, 2).T, 8: np.rot90(quarters)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = encoded(Image.fromarray(quarters.astype(np.uint8)), "PNG", exif=exif)
    np.testing.assert_array_equal(pixels(picture)[..., 0], shown)
    with Image.open(picture.open()) as opened:  # as a program passes it
        np.testing.assert_array_equal(pixels(opened)[..., 0], shown)
        if orientation > 1:
            assert image_identity(of(opened)) != image_identity(of(Image.fromarray(quarters.astype(np.uint8))))


def test_damaged_exif_data_leave_the_picture_as_it_is():
    picture = encoded(Image.new("RGB", (3, 2), "red"), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\0\1\1\x12")
    assert pixels(picture).shape == (2, 3, 3)


def test_grey_of_16_bits_keeps_its_levels():
    ramp = np.linspace(0, 65535, 12).astype(np.uint16).reshape(3, 4)
    np.testing.assert_array_equal(both(Image.fromarray(ramp), "PNG")[..., 1], ramp // 256)
    np.testing.assert_array_equal(both(Image.fromarray(ramp), "TIFF")[..., 1], ramp // 256)


def test_images_in_memory_are_limited_and_checked_as_files_are():
    with pytest.raises(InputError, match=r"f\.json\[0\]: image: the image has more pixels than data\.limits"):
        read_image(of(Image.new("RGB", (20, 20))), LimitsConfig(image_pixels=399))
    with pytest.raises(InputError, match="floating-point pixels"):
        read_image(of(Image.new("F", (2, 2))))
    cmyk = Image.new("CMYK", (2, 2), (0, 255, 255, 0))  # red
    np.testing.assert_array_equal(pixels(cmyk)[0, 0], [255, 0, 0])
    one = of(Image.new("P", (2, 2)))
    red = dataclasses.replace(one, image=Image.new("P", (2, 2)))
    red.image.putpalette([255, 0, 0])
    assert image_identity(one) != image_identity(red)
