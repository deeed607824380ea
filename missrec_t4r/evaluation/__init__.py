"""Evaluation: full-catalogue ranking under both protocols, metrics with intervals, slices, report."""
