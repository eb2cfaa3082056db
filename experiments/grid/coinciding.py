"""Where draws gave fewer different values than were asked for: whole numbers may coincide."""

from __future__ import annotations

from experiments.grid.axes import points
from experiments.grid.designs import design
from experiments.grid.spec import GridSpec


def coinciding(spec: GridSpec) -> list[str]:
    """One note for each axis with ``samples``, and each joint design, whose draws are not all different."""
    axes = [(name, name, axis) for name, axis in spec.axes().items()]
    for k, each in enumerate(spec.when):
        axes += [(f"when[{k}].set.{name}", name, axis) for name, axis in each.set.items()]
    found = [
        (place, axis.samples, len(points(name, axis, spec.draw_seed))) for place, name, axis in axes if axis.samples
    ]
    for kind in ("sobol", "random"):
        for k, joint in enumerate(getattr(spec, kind)):
            found.append((f"{kind}[{k}]", joint.count, len(design(kind, k, joint, spec.draw_seed)[1])))
    return [
        f"{place}: of {asked:,} values that were drawn {there:,} are different; widen the range for more"
        for place, asked, there in found
        if there < asked
    ]
