"""Diagnosis of artifact tokens and their repair without training."""
