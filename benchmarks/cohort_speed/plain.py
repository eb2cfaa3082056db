"""The plain loop: one expert after the other, data resident, nothing but the step.  Knows nothing of the toolkit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Expert:
    """What one expert is trained with: its rate, and its batches as rows of the images, (steps, batch) int64."""

    learning_rate: float
    momentum: float
    weight_decay: float
    batches: Tensor


def plain_loop(
    network: nn.Module,
    starts: Sequence[Mapping[str, Tensor]],
    experts: Sequence[Expert],
    images: Tensor,
    labels: Tensor,
    *,
    bfloat16: bool = False,
) -> list[dict[str, Tensor]]:
    """Final states of the experts, trained with ``torch.optim.SGD``, as PyTorch's documentation writes a loop.

    Images are normalised and on the device already, and nothing is logged.
    """
    finals = []
    device = images.device.type
    for start, expert in zip(starts, experts, strict=True):
        network.load_state_dict(start)
        network.train()
        optimizer = torch.optim.SGD(
            network.parameters(), expert.learning_rate, momentum=expert.momentum, weight_decay=expert.weight_decay
        )
        for rows in expert.batches:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
                logits = network(images[rows])
            F.cross_entropy(logits.float(), labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        finals.append({name: tensor.detach().clone() for name, tensor in network.state_dict().items()})
    return finals
