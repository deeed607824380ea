"""Search for settings by measurement: of a training on validation sessions (``missrec tune train``)."""
