"""Labeled images, in memory, in files or as a stream; texts; and the transforms of a batch.

`load_dataset` finds a data set by name or by path, and `make_loader` cuts a split of any kind into batches. A batch
then goes through `Preprocess` (uint8 to float) and, in training, through the module of `make_augment`, in that order
and on any device. For densities, `Dequantize` replaces both. `load_text` reads a text, and windows cut it into batches.

* `sources`: where data come from, one file per kind
* `tokens`: characters, or byte-level BPE, as the tokens of a text
* `splits`: labeled images in memory, in files or as a stream
* `decoding`: from an image file to pixels of the requested size
* `loading`: batches in a reproducible order, divided among processes, with a position that can be saved
* `transforms`: preprocessing, augmentation and dequantization of a batch

Names that `revnet` itself does not export are provisional: they may change in any release.
"""

from revnet.data.decoding.decode import load_image as load_image
from revnet.data.loading.loader import make_loader as make_loader
from revnet.data.loading.text_windows import ConsecutiveWindows as ConsecutiveWindows
from revnet.data.loading.text_windows import RandomWindows as RandomWindows
from revnet.data.sources.catalog import list_datasets as list_datasets
from revnet.data.sources.catalog import load_dataset as load_dataset
from revnet.data.sources.text import load_text as load_text
from revnet.data.splits.image_dataset import ImageDataset as ImageDataset
from revnet.data.tokens.byte_pairs import BytePairVocabulary as BytePairVocabulary
from revnet.data.tokens.vocabulary import Vocabulary as Vocabulary
from revnet.data.transforms.augment import make_augment as make_augment
from revnet.data.transforms.dequantize import Dequantize as Dequantize
from revnet.data.transforms.preprocess import Preprocess as Preprocess
from revnet.data.transforms.preprocess import make_preprocess as make_preprocess

__all__ = [  # noqa: RUF022 - sorted as a reader would, case-insensitively
    "BytePairVocabulary",
    "ConsecutiveWindows",
    "Dequantize",
    "ImageDataset",
    "list_datasets",
    "load_dataset",
    "load_image",
    "load_text",
    "make_augment",
    "make_loader",
    "make_preprocess",
    "Preprocess",
    "RandomWindows",
    "Vocabulary",
]
