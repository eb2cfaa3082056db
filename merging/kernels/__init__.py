"""Compiled loops for merging chunk by chunk: the bits of the readable definitions in :mod:`merging.methods`.

Products and sums are rounded separately and in the order of the experts (no fused multiply-add, no reordering), every
loop releases the interpreter's lock, and compiled code is cached on disk.  Importing these modules imports numba, so
they are imported where they are used.
"""
