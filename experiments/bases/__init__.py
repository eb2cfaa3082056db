"""Bases x_0: the weights that experts are fine-tuned from, each with what is known of where it comes from.

Kinds: ``pretrained`` (timm's published weights), ``checkpoint`` (any local file of weights), ``pretrain`` (made on the
spot at a graded quality), ``clip`` (CLIP image towers with zero-shot text heads) and ``random`` (a seeded start).
"""

from experiments.bases.base import Base, BaseError, Provenance, read_base, save_base, tensors_digest
from experiments.bases.spec import BaseSpec, load_base

__all__ = [
    "Base",
    "BaseError",
    "BaseSpec",
    "Provenance",
    "load_base",
    "read_base",
    "save_base",
    "tensors_digest",
]
