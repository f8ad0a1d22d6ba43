"""Images with a map of classes or of depth."""
