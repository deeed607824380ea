"""Training from an earlier run: transfer to another shop, or to a later catalogue of the same one."""
