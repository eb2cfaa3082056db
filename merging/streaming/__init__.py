"""Merge checkpoints at the speed of the disk, in bounded memory: plan, read in chunks, merge, write behind.

    Stream (what is merged)  ->  plan (programs, passes, bytes, memory)  ->  run (threads)  ->  output files

:mod:`~merging.streaming.source` hands out chunks of every checkpoint, :mod:`~merging.streaming.programs` knows which
compiled loop computes which method and proves nothing by itself: the readable definitions are in
:mod:`merging.methods`, and tests compare the two bit by bit.  Importing this package imports numba.
"""
