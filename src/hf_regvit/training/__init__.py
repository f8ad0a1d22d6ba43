"""Parts that pretraining and fine-tuning share."""
