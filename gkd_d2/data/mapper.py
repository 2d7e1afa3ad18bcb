"""Detectron2's own reading and augmentation of images, with the file named where it fails."""

from __future__ import annotations

from collections.abc import Callable


class FileNamingMapper:
    """A mapper whose errors name the image they are about.

    What Detectron2's DatasetMapper does with an image stays: greyscale, palette, 16-bit and RGBA images are converted
    by Pillow to its image_format, images are turned as their EXIF orientation says, and sizes that differ from the
    record's are refused.

    Args:
        mapper: Detectron2's DatasetMapper or one like it.
    """

    def __init__(self, mapper: Callable[[dict], dict]):
        self._mapper = mapper

    def __call__(self, dataset_dict: dict) -> dict:
        """Read and augment one image.

        Args:
            dataset_dict: a record of a dataset.

        Returns:
            What the mapper returns.

        Raises:
            ValueError: the image can't be read, or its size is not the record's; the message begins with the file.
        """
        try:
            return self._mapper(dataset_dict)
        # Pillow's readers of the many formats raise errors of many kinds on damaged files.
        except Exception as error:
            name = dataset_dict.get("file_name", "a record without file_name")
            reason = str(error) or type(error).__name__
            raise ValueError(f"{name}: Detectron2 can't use this image: {reason}") from error
