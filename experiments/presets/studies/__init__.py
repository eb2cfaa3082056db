"""Specifications of the studies that come with the package."""
