"""The scaling benchmark: how fast, on how many ranks, and where the rest of the time goes."""
