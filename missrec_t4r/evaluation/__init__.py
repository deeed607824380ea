"""Evaluation: the whole catalogue is ranked, in both protocols, beside popularity, item-kNN and content-kNN."""
