"""`tinyalign demo`, from weights to report."""
