"""Templates of the Triton model repository, readable as text; `missrec_t4r.export` fills them in."""
