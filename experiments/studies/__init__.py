"""The two studies: hyperparameters of experts, and merging at scale."""
