"""What makes downloads usable as datasets, for the tools."""
