"""``missrec etl --engine gpu``: the steps of the in-memory engine on frames of cuDF, at once or in partitions."""
