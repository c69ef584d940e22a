"""Labelled images, in memory, in files or as a stream, and what happens to a batch before the network sees it.

`load_dataset` finds a data set by name or by path; `make_loader` cuts a split into batches, whatever kind of split it
is; a batch then goes through `Preprocess` (uint8 to float) and, in training, through what `make_augment` built, in that
order and on any device. For densities, `Dequantize` takes the place of both. `load_text` reads a text, and windows cut
it into batches.

Names that `revnet` itself does not export are provisional: they may change in any release.
"""

from revnet.data._augment import make_augment as make_augment
from revnet.data._base import AbstractSplit as AbstractSplit
from revnet.data._base import ImageDataset as ImageDataset
from revnet.data._base import ImageSplit as ImageSplit
from revnet.data._color_distortion import make_color_distortion as make_color_distortion
from revnet.data._decode import load_image as load_image
from revnet.data._file_split import FileSplit as FileSplit
from revnet.data._loader import Loader as Loader
from revnet.data._loader import make_loader as make_loader
from revnet.data._preprocess import Preprocess as Preprocess
from revnet.data._preprocess import make_preprocess as make_preprocess
from revnet.data._registry import list_datasets as list_datasets
from revnet.data._registry import load_dataset as load_dataset
from revnet.data._stream_split import StreamSplit as StreamSplit
from revnet.data.dequantize import Dequantize as Dequantize
from revnet.data.dequantize import count_levels as count_levels
from revnet.data.text import ConsecutiveWindows as ConsecutiveWindows
from revnet.data.text import RandomWindows as RandomWindows
from revnet.data.text import TextDataset as TextDataset
from revnet.data.text import Vocabulary as Vocabulary
from revnet.data.text import load_text as load_text

__all__ = [  # noqa: RUF022 - sorted as a reader would, case-insensitively
    "AbstractSplit",
    "ConsecutiveWindows",
    "count_levels",
    "Dequantize",
    "FileSplit",
    "ImageDataset",
    "ImageSplit",
    "list_datasets",
    "load_dataset",
    "load_image",
    "load_text",
    "Loader",
    "make_augment",
    "make_color_distortion",
    "make_loader",
    "make_preprocess",
    "Preprocess",
    "RandomWindows",
    "StreamSplit",
    "TextDataset",
    "Vocabulary",
]
