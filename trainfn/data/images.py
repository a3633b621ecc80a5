"""Images: the collator that stacks them, and folders of them.

Images are float [C, H, W], from 0 to 1, unless they are normalised. Arrays and PIL images come as [H, W, C], tensors
as [C, H, W], both also as [H, W]; 8-bit values are divided by 255.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainfn.batch import TARGET_NAMES, Batch
from trainfn.data.collate import Collator, default
from trainfn.data.forms import as_tensor
from trainfn.errors import ConfigError, DataError, MissingPackageError, listed
from trainfn.tree import describe

_NAMES = ("pixel_values", "images", "image", "x", "img")
_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")


def image(
    *,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    grayscale: bool = False,
    shape: Sequence[int | None] | None = None,
) -> Collator:
    """Return the collator that stacks images, which must be of one shape, and normalises each channel.

    An item is an image, a tuple ``(image, label)`` or a dict with an image as its field ``pixel_values``, ``images``,
    ``image``, ``img`` or ``x``. Tensors and whole batches [B, C, H, W] or [B, H, W] are treated likewise.

        channel <- (channel - mean) / std

    Args:
        mean, std: one number, or one for each channel, in the units of the pixels (0 to 1); None: 0 and 1.
        grayscale: make one channel of three, 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601), before normalising.
        shape: what every image must be, (C, H, W) after ``grayscale``; None in it stands for any size.

    Raises:
        ConfigError: ``std`` is 0, or a number is not finite.
        DataError: (from the collator) images that differ in shape, or are not of ``shape``.

    >>> image(mean=0.5, std=0.5)([(torch.full((1, 2), 255, dtype=torch.uint8), 3)])
    (tensor([[[[1., 1.]]]]), tensor([3]))
    """
    means, stds = _channels("mean", mean, 0.0), _channels("std", std, 1.0)
    if bool((stds == 0).any()):
        raise ConfigError("std is out of range.", expected="numbers other than 0", got=repr(std))
    wanted = None if shape is None else tuple(shape)
    finish = partial(_finish, mean=means, std=stds, grayscale=grayscale, shape=wanted)
    return Collator(stack=_stack, finish=finish)


class ImageFolder:
    """Images in folders that are named after their classes, ``cat/1.png``: a map-style data set of (image, class).

    Classes and files are in the order of their names. Reading needs Pillow; a file is read when it is asked for.

    Args:
        folder: holds one folder a class, and nothing else that is an image.
        size: (height, width) that images are resized to; None leaves each as it is.
        mode: Pillow's name of the channels: ``"RGB"`` for three, ``"L"`` for one.

    Raises:
        MissingPackageError: Pillow is not installed.
        DataError: no such folder, no images in it; or, when it is read, a file that is none.

    >>> ImageFolder("no_such_folder")
    Traceback (most recent call last):
        ...
    trainfn.errors.DataError: There is no such folder.
      where: no_such_folder
    """

    draws = False

    def __init__(self, folder: str | Path, *, size: tuple[int, int] | None = None, mode: str = "RGB") -> None:
        root = Path(folder)
        if not root.is_dir():
            raise DataError("There is no such folder.", where=str(folder))
        _pillow()
        if mode not in ("RGB", "L"):
            raise ConfigError("There is no such mode.", expected="'RGB' or 'L'", got=repr(mode))
        if size is not None and (len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size)):
            raise ConfigError("size is out of range.", expected="(height, width), ints >= 1", got=repr(size))
        found = sorted(path for path in root.rglob("*") if path.suffix.lower() in _ENDINGS)
        loose = [path.name for path in found if path.parent == root]
        if loose or not found:
            raise DataError(
                "The folder does not hold images by class.",
                where=str(folder),
                expected=f"class/name.png, with one of {', '.join(_ENDINGS)}",
                got=f"images outside of a class: {listed(loose, 5)}" if loose else "no image",
            )
        self.classes = sorted({path.relative_to(root).parts[0] for path in found})
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.paths = found
        self.labels = [numbers[path.relative_to(root).parts[0]] for path in found]
        self.size, self.mode = size, mode

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        module = _pillow()
        try:
            with module.open(self.paths[index]) as opened:
                picture = opened.convert(self.mode)
        except OSError as error:
            raise DataError("A file is no image.", where=str(self.paths[index]), got=str(error)) from error
        if self.size is not None:
            picture = picture.resize((self.size[1], self.size[0]), module.Resampling.BILINEAR)
        return _pixels(np.array(picture)), self.labels[index]


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingPackageError(
            "Reading images needs Pillow.", where="trainfn.data.ImageFolder", hint="pip install pillow"
        ) from error
    return Image


def _channels(name: str, value: float | Sequence[float] | None, default: float) -> Tensor:
    numbers = torch.tensor(default if value is None else value, dtype=torch.float32).reshape(-1, 1, 1)  # (C, 1, 1)
    if not bool(numbers.isfinite().all()):
        raise ConfigError(f"{name} is out of range.", expected="finite numbers", got=repr(value))
    return numbers


def _field(names: Sequence[Any]) -> Any:
    for name in _NAMES:
        if name in names:
            return name
    inputs = [name for name in names if name not in TARGET_NAMES]
    if len(inputs) == 1:
        return inputs[0]
    raise DataError("Which field is the image?", expected=f"one of {', '.join(_NAMES)}", got=", ".join(map(str, names)))


def _stack(items: list[Any]) -> Batch:
    def one(item: Any) -> Any:
        if isinstance(item, Mapping):
            name = _field(list(item))
            return {**item, name: _pixels(item[name])}
        return (_pixels(item[0]), *item[1:]) if isinstance(item, tuple) else _pixels(item)

    return default().stack([one(item) for item in items])


def _pixels(value: Any) -> Tensor:
    """Return one image as a tensor [C, H, W], floats from 0 to 1 if it was made of bytes."""
    if isinstance(value, Tensor):
        pixels = value
    else:
        array = np.asarray(value)  # PIL images too
        pixels = as_tensor(array)
        if pixels.ndim == 3:
            pixels = pixels.permute(2, 0, 1)  # (H, W, C) -> (C, H, W)
    if pixels.ndim not in (2, 3):
        raise DataError("This is no image.", expected="[C, H, W] or [H, W]", got=describe(pixels))
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    return _scaled(pixels)


def _scaled(pixels: Tensor) -> Tensor:
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    return pixels if pixels.is_floating_point() else pixels.float()


def _finish(batch: Batch, *, mean: Tensor, std: Tensor, grayscale: bool, shape: tuple[int | None, ...] | None) -> Batch:
    def finished(pixels: Any) -> Tensor:
        if not isinstance(pixels, Tensor) or pixels.ndim not in (3, 4):
            raise DataError("This is no batch of images.", expected="[B, C, H, W] or [B, H, W]", got=describe(pixels))
        found = _scaled(pixels[:, None] if pixels.ndim == 3 else pixels)  # (B, C, H, W)
        if grayscale and found.shape[1] == 3:
            weights = found.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
            found = (found * weights).sum(1, keepdim=True)
        if shape is not None and not fits(tuple(found.shape[1:]), shape):
            raise DataError(
                "The images do not have the shape that the task says.",
                expected=f"[channels, height, width] = {list(shape)}",
                got=str(list(found.shape[1:])),
                hint="resize them where the data set is made, or change the task's shapes",
            )
        if len(mean) not in (1, found.shape[1]) or len(std) not in (1, found.shape[1]):
            raise DataError(
                "The images have another number of channels than mean and std.",
                expected=f"{max(len(mean), len(std))} channels",
                got=f"images {list(found.shape[1:])}",
            )
        return (found - mean.to(found)) / std.to(found)

    if isinstance(batch, Mapping):
        name = _field(list(batch))
        return {**batch, name: finished(batch[name])}
    return (finished(batch[0]), *batch[1:]) if isinstance(batch, tuple) else finished(batch)


def fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    """Return whether a shape is the wanted one, in which None stands for any size.

    >>> fits((3, 8, 9), (3, None, None)), fits((3, 8), (3, None, None))
    (True, False)
    """
    return len(shape) == len(wanted) and all(side in (None, size) for size, side in zip(shape, wanted, strict=True))
