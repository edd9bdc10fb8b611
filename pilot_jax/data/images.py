"""Reads images and converts them to the pixel values that the vision tower takes."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pilot_jax.config import LimitsConfig
from pilot_jax.data.llava.image_field import LIMITS, DrawnImage
from pilot_jax.data.llava.sample import Sample
from pilot_jax.errors import InputError
from pilot_jax.models.checkpoints.processors import load_image_processor

if TYPE_CHECKING:
    from pilot_jax.models.pretrained import PretrainedModel

# Other formats are refused: Pillow passes some of them to other programs, and some decoders are little reviewed.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")  # MPO, of some cameras, is read as JPEG
ORIENTATION = 0x0112  # the EXIF tag
Fit = Callable[[Image.Image], Image.Image]
FITS: dict[str, Fit] = {}  # a user's own values of `data.image_fit`


def image_fit(name: str) -> Callable[[Fit], Fit]:
    """Returns a decorator that registers a function from an RGB image to another, which `data.image_fit` can then name.

    It is called on every image before the checkpoint's image processor. Features of these images are computed anew in
    each run, because nothing says whether the function is still the same.

    Raises:
        ValueError: the name is one of the package's.
    """
    if name in ("processor", "pad"):
        raise ValueError(f"the package has an image_fit {name!r}: choose another name")

    def register(fit: Fit) -> Fit:
        FITS[name] = fit
        return fit

    return register


def check_image_fit(fit: str) -> None:
    """Raises an `InputError` if `data.image_fit` names nothing that this process knows."""
    known = ("processor", "pad", *FITS)
    if fit not in known:
        raise InputError(f"data.image_fit: {fit!r} is not known. Use one of {', '.join(known)}. For your own, name the "
                         "module that registers it: --use MODULE (in Python: import it).")


def fit_image(image: Image.Image, fit: str, processor: Any) -> Image.Image:
    """Returns an RGB image as the checkpoint's image processor gets it.

    Raises:
        InputError: `fit` is not known, or a user's function returns something else than an image.
    """
    check_image_fit(fit)
    if fit == "processor":
        return image
    if fit == "pad":
        red, green, blue = (int(255 * c) for c in processor.image_mean)
        return pad_to_square(image, (red, green, blue))
    fitted = FITS[fit](image)
    if not isinstance(fitted, Image.Image) or not all(fitted.size):
        raise InputError(f"data.image_fit: {fit} returned {type(fitted).__name__} for an image of {image.width}×"
                         f"{image.height}. It has to return an image of Pillow.")
    return fitted.convert("RGB")


def read_image(sample: Sample, limits: LimitsConfig = LIMITS) -> Image.Image:
    """Returns the sample's image in RGB as a viewer shows it: upright, and on white where it is transparent.

    Of an animated image, it is the first frame.

    Args:
        sample: a sample that has an image.

    Raises:
        InputError: the image cannot be decoded, or has more pixels than `limits` allow.
    """
    if isinstance(sample.image, DrawnImage):
        return sample.image.draw()
    assert sample.image is not None
    name = sample.image if isinstance(sample.image, Path) else "the image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of its own limit, and of oddities in a file
            if isinstance(sample.image, Image.Image):
                return _shown(sample.image, limits)
            file = sample.image if isinstance(sample.image, Path) else sample.image.open()
            with Image.open(file, formats=FORMATS) as image:
                return _shown(image, limits)
    except Image.DecompressionBombError:
        raise InputError(f"{sample.source}: image: {name} has more pixels than data.limits.image_pixels, "
                         f"{limits.image_pixels}. Shrink the image or raise the limit.") from None
    except UnidentifiedImageError:
        raise InputError(f"{sample.source}: image: {name} cannot be decoded (not a file of {', '.join(FORMATS)}). "
                         "Convert the file or remove the entry.") from None
    except Exception as error:  # Pillow's decoders raise whatever their formats' parsers do
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{sample.source}: image: {name} cannot be decoded ({why}). "
                         "Replace the file or remove the entry.") from None


def image_identity(sample: Sample) -> bytes:
    """Returns bytes that differ for samples with different images; a file is read, but not decoded.

    Raises:
        OSError: the file cannot be read.
    """
    image = sample.image
    if image is None:
        return b""
    if isinstance(image, DrawnImage):
        return image.name.encode()
    if isinstance(image, Image.Image):
        # Orientation, palette and transparent colours are not among the pixels.
        marks = (image.mode, image.size, image.getpalette(), image.info.get("transparency"),
                 image.getexif().get(ORIENTATION))
        content = repr(marks).encode() + image.tobytes()
    else:
        content = image.read_bytes() if isinstance(image, Path) else image.open().read()
    return hashlib.sha256(content).digest()


def _shown(image: Image.Image, limits: LimitsConfig) -> Image.Image:
    """Returns an image in RGB, turned as its EXIF data say, with white behind what is transparent."""
    if image.width * image.height > limits.image_pixels:
        raise Image.DecompressionBombError
    image = _eight_bit(_upright(image))
    if not image.has_transparency_data:
        return image.convert("RGB")
    # `convert("RGB")` would show the colours that were hidden. `convert("RGBA")` changes the palette of its image,
    # which may be the user's.
    layer = (image.copy() if image.mode == "P" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Returns the image turned as its EXIF data say; as it is if they are damaged, as viewers do."""
    try:
        return ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image
    except OSError:  # the pixels themselves cannot be decoded
        raise
    except Exception:  # the parser of EXIF data raises whatever it meets
        return image


def _eight_bit(image: Image.Image) -> Image.Image:
    """Returns a 16-bit grey image scaled to 8 bits, and other images unchanged.

    Pillow's `convert` would clip 16-bit values at 255 instead.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))


def check_shape(sample: Sample, image: Image.Image, fit: str, limits: LimitsConfig = LIMITS, side: int = 336) -> None:
    """Refuses an image so narrow that it would exhaust memory when it is padded or enlarged to the tower's size.

    Args:
        fit: the value of `data.image_fit`.
        side: height and width of the vision tower's input, to which a processor enlarges the shorter side.

    Raises:
        InputError: the enlarged image has more pixels than `limits` allow.
    """
    long, short = max(image.size), min(image.size)
    pixels = long**2 if fit == "pad" else side * max(side, side * long // short)
    if pixels > limits.image_pixels:
        name = sample.image if isinstance(sample.image, Path) else "the image"
        raise InputError(f"{sample.source}: image: {name} is {image.width}×{image.height} and would be enlarged to "
                         f"{pixels} pixels, data.limits.image_pixels is {limits.image_pixels}. Crop it, or raise the "
                         "limit.")


def pad_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Returns the image in the middle of the smallest square that contains it, as in the training of LLaVA-1.5."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def pixel_values(model: PretrainedModel, images: list[Image.Image], fit: str = "processor") -> np.ndarray:
    """Returns the vision tower's input for these images, float32 [len(images), 3, H, W].

    Args:
        fit: the value of `data.image_fit`, see `fit_image`.

    Raises:
        InputError: the checkpoint's image processor fails, or its output has another size than the tower takes.
    """
    tower = model.config.tower
    assert model.image_directory is not None
    processor = load_image_processor(model.image_directory, tower.family)
    images = [fit_image(image, fit, processor) for image in images]
    try:
        pixels = processor(images=images, return_tensors="np")["pixel_values"]
    except Exception as error:  # the processor's checks of its own settings raise many kinds
        raise InputError(f"{model.image_directory}: the image processor fails ({error}). Correct "
                         "preprocessor_config.json.") from None
    side = tower.image_size
    if pixels.shape[1:] != (3, side, side):
        raise InputError(f"{model.image_directory}: the image processor gives {pixels.shape[1:]}, the tower takes "
                         f"{(3, side, side)}. Correct preprocessor_config.json or set data.image_fit: pad.")
    return pixels
