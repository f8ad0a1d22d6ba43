"""Training on images with texts: contrastive losses, texts of a data set, zero-shot classification."""
