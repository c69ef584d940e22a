"""Networks by their published names, one family per file.

Names that `revnet` itself does not export are provisional: they may change in any release.
"""

from revnet.models._image_classifier import AbstractImageClassifier as AbstractImageClassifier
from revnet.models._registry import create_model as create_model
from revnet.models._registry import list_models as list_models
from revnet.models._registry import published_image_size as published_image_size
from revnet.models._registry import register_model as register_model
from revnet.models.irevnet import IRevNet as IRevNet
from revnet.models.irevnet import irevnet301 as irevnet301
from revnet.models.irevnet import irevnet_cifar as irevnet_cifar
from revnet.models.nice import NICE as NICE
from revnet.models.resnet import ResNet as ResNet
from revnet.models.resnet import resnet32 as resnet32
from revnet.models.resnet import resnet50 as resnet50
from revnet.models.resnet import resnet101 as resnet101
from revnet.models.resnet import resnet110 as resnet110
from revnet.models.resnet import resnet164 as resnet164
from revnet.models.reversible_transformer import ReversibleTransformer as ReversibleTransformer
from revnet.models.reversible_transformer import h_transformer_base as h_transformer_base
from revnet.models.reversible_transformer import h_transformer_large as h_transformer_large
from revnet.models.reversible_transformer import h_transformer_small as h_transformer_small
from revnet.models.reversible_transformer import reformer_enwik8 as reformer_enwik8
from revnet.models.reversible_vit import ReversibleViT as ReversibleViT
from revnet.models.reversible_vit import revvit_base as revvit_base
from revnet.models.reversible_vit import revvit_cifar as revvit_cifar
from revnet.models.reversible_vit import revvit_small as revvit_small
from revnet.models.revnet import RevNet as RevNet
from revnet.models.revnet import revnet38 as revnet38
from revnet.models.revnet import revnet56 as revnet56
from revnet.models.revnet import revnet104 as revnet104
from revnet.models.revnet import revnet110 as revnet110
from revnet.models.revnet import revnet164 as revnet164
from revnet.models.unet3d import UNet3d as UNet3d

# Without a list, a star import would also import the submodules, one of which is named `revnet`.
__all__ = [  # noqa: RUF022 - sorted as a reader would, case-insensitively
    "AbstractImageClassifier",
    "create_model",
    "h_transformer_base",
    "h_transformer_large",
    "h_transformer_small",
    "IRevNet",
    "irevnet301",
    "irevnet_cifar",
    "list_models",
    "NICE",
    "published_image_size",
    "reformer_enwik8",
    "register_model",
    "ResNet",
    "resnet101",
    "resnet110",
    "resnet164",
    "resnet32",
    "resnet50",
    "ReversibleTransformer",
    "ReversibleViT",
    "RevNet",
    "revnet104",
    "revnet110",
    "revnet164",
    "revnet38",
    "revnet56",
    "revvit_base",
    "revvit_cifar",
    "revvit_small",
    "UNet3d",
]
