"""Merging methods, one small file each."""
