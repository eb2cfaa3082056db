"""Gradient noise and everything the theory's constants are made of; see :func:`constants.constants_of`."""
