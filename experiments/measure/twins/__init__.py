"""Stability twins: coupled runs on S and on S^(j), sample j replaced by a fresh one (theory.md sections 3, 5 and 9).

``pairs`` says what is exchanged, ``train`` runs a base and its twins, ``estimates`` turns distances into eps_i with
intervals, ``merges`` carries twins through merging methods (c_i), ``theorem2`` puts the bound next to them, ``table``
measures many recipes.
"""
