"""Parameters and floating-point operations of a network."""

from __future__ import annotations

import torch
from torch import nn

from experiments.models.form import input_format
from experiments.models.parts import without_numbers
from theory.errors import MergeboundError


def count_parameters(model: nn.Module) -> int:
    """Numbers in the model's parameters (buffers such as running statistics do not count)."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def count_flops(model: nn.Module, image_size: int | None = None) -> int:
    """Floating-point operations of a forward pass on one image, a multiplication and an addition counting as two.

    Counted by :class:`torch.utils.flop_counter.FlopCounterMode`: matrix products, convolutions, attention; additions,
    activations and normalisations do not count.  Only shapes are computed, unless a layer needs numbers.

    Args:
        image_size: pixels; default the network's own.

    Raises:
        MergeboundError: the network does not run on such images.
    """
    form = input_format(model, image_size)
    shape = (1, form.channels, form.height, form.width)
    mode = model.training
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    try:
        return _counted(without_numbers(model).eval(), torch.empty(shape, device="meta", dtype=kind))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError, AssertionError):
        pass  # a layer that needs numbers, or images that do not fit: the real forward pass says which
    try:
        place = next((p.device for p in model.parameters()), torch.device("cpu"))
        return _counted(model.eval(), torch.zeros(shape, device=place, dtype=kind))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise MergeboundError(
            f"{type(model).__name__}: it does not run on images of shape {shape[1:]} ({reason}); give another size"
        ) from error
    finally:
        model.train(mode)


def _counted(model: nn.Module, images: torch.Tensor) -> int:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # written out as matrix products, which are counted on any device
        model(images)
    return int(counter.get_total_flops())
