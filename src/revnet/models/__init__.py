"""Networks by their published names, one family per file.

Names that `revnet` itself does not export are provisional: they may change in any release.
"""

from revnet.models._image_classifier import AbstractImageClassifier as AbstractImageClassifier
from revnet.models._registry import create_model as create_model
from revnet.models._registry import list_models as list_models
from revnet.models._registry import published_image_size as published_image_size
from revnet.models._registry import register_model as register_model
from revnet.models.glow import Glow as Glow
from revnet.models.highway import Highway as Highway
from revnet.models.irevnet import IRevNet as IRevNet
from revnet.models.nice import NICE as NICE
from revnet.models.pretrained.mixin import from_pretrained as from_pretrained
from revnet.models.pretrained.shipped import list_pretrained as list_pretrained
from revnet.models.realnvp import RealNVP as RealNVP
from revnet.models.resnet import ResNet as ResNet
from revnet.models.reversible_transformer import ReversibleEncoderDecoder as ReversibleEncoderDecoder
from revnet.models.reversible_transformer import ReversibleTransformer as ReversibleTransformer
from revnet.models.reversible_transformer import h_transformer_base as h_transformer_base
from revnet.models.reversible_transformer import h_transformer_large as h_transformer_large
from revnet.models.reversible_transformer import h_transformer_small as h_transformer_small
from revnet.models.reversible_transformer import reformer_enwik8 as reformer_enwik8
from revnet.models.reversible_vit import ReversibleViT as ReversibleViT
from revnet.models.revnet import RevNet as RevNet
from revnet.models.unet3d import UNet3d as UNet3d

# Without a list, a star import would also import the submodules, one of which is named `revnet`.
__all__ = [  # noqa: RUF022 - sorted as a reader would, case-insensitively
    "AbstractImageClassifier",
    "create_model",
    "from_pretrained",
    "Glow",
    "h_transformer_base",
    "h_transformer_large",
    "h_transformer_small",
    "Highway",
    "IRevNet",
    "list_models",
    "list_pretrained",
    "NICE",
    "published_image_size",
    "RealNVP",
    "reformer_enwik8",
    "register_model",
    "ResNet",
    "ReversibleEncoderDecoder",
    "ReversibleTransformer",
    "ReversibleViT",
    "RevNet",
    "UNet3d",
]
