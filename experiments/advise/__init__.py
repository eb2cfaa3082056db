"""``mergebound advise``: how to merge experts that exist, and how to fine-tune experts that shall be merged."""
