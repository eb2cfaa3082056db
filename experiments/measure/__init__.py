"""Collecting from networks what the predictions of :mod:`theory` need."""
