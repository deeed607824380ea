"""Score terms: item-kNN, content-kNN and cold start."""
