"""Warm starts: transfer from a pre-trained run, or from an earlier run on the same shop's earlier catalogue."""
