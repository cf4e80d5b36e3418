"""The process that watches the ranks of a node. No torch: it is small and starts at once."""
