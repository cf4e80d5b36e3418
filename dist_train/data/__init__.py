"""Sources of pictures, the in-memory path and the DataLoader path. Imports nothing by itself."""
