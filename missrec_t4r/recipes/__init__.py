"""Named settings as YAML, read by `missrec_t4r.config`."""
