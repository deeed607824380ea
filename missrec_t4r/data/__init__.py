"""Catalogue and sessions as files and as tensors; imports neither Merlin nor Transformers4Rec."""
