"""Verdicts: does each assumption of each theorem hold for these experts, and which tier follows.

Start with :func:`report.verdicts_of` (a subject and, where they are known, its recipes and logs).  Every judge can be
used alone from numbers: ``images`` (A1, A2), ``loss`` (A3 and what the loss is), ``smooth`` (A4, convexity, step
sizes), ``training`` (optimizer, momentum, clipping, decay, sampling, log), ``noise`` (gradient noise, gap, PL ratio),
``vectors`` (orthogonality of task vectors).  ``statements`` says which theorem needs what.
"""
