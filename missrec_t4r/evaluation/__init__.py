"""Evaluation: full-catalogue ranking under three protocols, metrics with intervals, slices, report."""
