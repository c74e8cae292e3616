"""What several metrics share; no metric imports another."""
