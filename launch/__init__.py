"""What runs where the user types: it starts ranks and imports no torch."""
