"""RegViT: register tokens for Hugging Face vision models."""
