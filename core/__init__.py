"""What must be the same everywhere: names, files, metrics, records, tables; checkpoints, tokens, the export."""
