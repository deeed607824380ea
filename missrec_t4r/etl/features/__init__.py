"""Modality vectors: texts and images of the items through frozen encoders."""
