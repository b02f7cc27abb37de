"""Config, model, connectors, key encoder, value encoder and memory bank; these files travel with every checkpoint."""
