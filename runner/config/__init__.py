"""From the bytes of run.toml to a RunConfig, with every error located."""
