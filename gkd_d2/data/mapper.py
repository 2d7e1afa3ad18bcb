"""Detectron2's own reading and augmentation of images, with the file named where it fails."""

from __future__ import annotations

from detectron2.data import DatasetMapper


class FileNamingMapper(DatasetMapper):
    """DatasetMapper whose errors name the image they are about.

    What Detectron2 does with an image stays: greyscale, palette, 16-bit and RGBA images are converted by Pillow to
    cfg.INPUT.FORMAT, images are turned as their EXIF orientation says, and sizes that differ from the record's are
    refused.
    """

    def __call__(self, dataset_dict: dict) -> dict:
        """Read and augment one image.

        Args:
            dataset_dict: a record of a dataset.

        Returns:
            What DatasetMapper returns.

        Raises:
            ValueError: the image can't be read, or its size is not the record's; the message begins with the file.
        """
        try:
            return super().__call__(dataset_dict)
        # Pillow's readers of the many formats raise errors of many kinds on damaged files.
        except Exception as error:
            name = dataset_dict.get("file_name", "a record without file_name")
            reason = str(error) or type(error).__name__
            raise ValueError(f"{name}: Detectron2 can't use this image: {reason}") from error
