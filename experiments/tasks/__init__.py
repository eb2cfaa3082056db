"""Image-classification tasks: the embedded digits, and the user's own files."""
