"""Every random draw comes from a named seed: hypothesis derives its examples from the name of each test."""

from hypothesis import settings

settings.register_profile("named_seeds", derandomize=True, deadline=None)
settings.load_profile("named_seeds")
