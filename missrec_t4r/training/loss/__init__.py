"""The next-item softmax: full, chunked and sampled."""
