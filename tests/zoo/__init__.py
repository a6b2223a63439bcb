"""Every architecture of transformers at small size, and what a fusion must give on each, from slow oracles."""
