"""The model files of the Hub, foreign weights, and reading tokens out of any supported vision transformer."""
