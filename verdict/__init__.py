"""Whether the verdicts of each precision are those of the original model."""
