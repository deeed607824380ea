"""Score terms: item-kNN, content-kNN, cold start and rare items."""
