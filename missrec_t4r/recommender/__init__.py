"""A shop and its recommender as Python objects, over the functions of the commands."""
