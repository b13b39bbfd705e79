"""FLOPs and bytes of layers, the bounds of a GPU, and measured times."""
