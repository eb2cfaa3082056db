"""Curvature of each task's risk: operators, eigenvalues, traces, Gram matrices of task vectors, smoothness.

Import from the modules: ``risk`` (a task's risk as a function of one flat point), ``operators``, ``lanczos``,
``density``, ``traces``, ``directional``, ``gram``, ``smoothness`` and ``report``.
"""
