"""The loss around a base, its experts and their merges: along lines, on planes, and how flat it is.

* :mod:`.scores`: losses and errors of many parameter vectors on the same images;
* :mod:`.running`: BatchNorm's statistics at a point;
* :mod:`.lines`: lines, error barriers and linear mode connectivity;
* :mod:`.planes`: planes through three points, or through all of them as well as a plane can;
* :mod:`.marks`: the merge of every method, as points;
* :mod:`.objective`, :mod:`.directions`, :mod:`.sharpness`, :mod:`.flatness`: how fast the loss rises around a point;
* :mod:`.figures`: pictures of all of it.

Heads are the experts' own after fine-tuning throughout, also at the base.  BatchNorm's running statistics are
coordinates like any other (``merged``), unless they are estimated again at every point (``reestimated``, ``task``).
"""
