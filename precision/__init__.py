"""What makes typed graphs of the reference graph: conversions, and the search for INT8."""
