"""Data quality: checks while reading, the statistics and the page of `missrec report`."""
