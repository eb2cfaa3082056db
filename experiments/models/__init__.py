"""Networks: any timm model by name, families of growing size, the CIFAR ResNets, and small ones for the digits.

Conventions: every model is split into a *backbone* (merged) and a *head* (private to a task), see
:mod:`experiments.models.parts`.  BatchNorm is used in evaluation mode for everything that is measured.
"""

from experiments.models.build import build_model, list_models
from experiments.models.cifar_resnet import CifarResNet
from experiments.models.counting import count_flops, count_parameters
from experiments.models.digits import DIGIT_ARCHITECTURES, digit_resnet, digit_vit
from experiments.models.extraction import feature_dim, features, head_logits
from experiments.models.families import FamilyMember, closest, describe_family, resnet_family, vit_family
from experiments.models.form import input_format
from experiments.models.norms import NormLayer, normalisation_layers, statistics_advice
from experiments.models.parts import (
    forward_backbone,
    head_prefix,
    head_tensors,
    join_state,
    replace_head,
    split_state,
)

__all__ = [
    "DIGIT_ARCHITECTURES",
    "CifarResNet",
    "FamilyMember",
    "NormLayer",
    "build_model",
    "closest",
    "count_flops",
    "count_parameters",
    "describe_family",
    "digit_resnet",
    "digit_vit",
    "feature_dim",
    "features",
    "forward_backbone",
    "head_logits",
    "head_prefix",
    "head_tensors",
    "input_format",
    "join_state",
    "list_models",
    "normalisation_layers",
    "replace_head",
    "resnet_family",
    "split_state",
    "statistics_advice",
    "vit_family",
]
