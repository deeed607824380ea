"""Synthetic shop: interactions, texts and images without a download."""
