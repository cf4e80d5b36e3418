"""What a loss and a metric are."""
