"""The prediction study: every predictor of merged risk, judged on merges of a grid's experts."""
