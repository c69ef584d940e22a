"""Labelled images, held in memory as one uint8 tensor a split, and what happens to a batch before the network sees it.

`load_dataset` finds a data set by name or by folder; `make_loader` cuts a split into batches; a batch then goes through
`Preprocess` (uint8 to float) and, in training, through what `make_augment` built, in that order and on any device.
"""

from revnet.data._augment import make_augment as make_augment
from revnet.data._base import ImageDataset as ImageDataset
from revnet.data._base import ImageSplit as ImageSplit
from revnet.data._loader import make_loader as make_loader
from revnet.data._preprocess import Preprocess as Preprocess
from revnet.data._preprocess import make_preprocess as make_preprocess
from revnet.data._registry import list_datasets as list_datasets
from revnet.data._registry import load_dataset as load_dataset

__all__ = [  # noqa: RUF022 - sorted as a reader would, case-insensitively
    "ImageDataset",
    "ImageSplit",
    "list_datasets",
    "load_dataset",
    "make_augment",
    "make_loader",
    "make_preprocess",
    "Preprocess",
]
