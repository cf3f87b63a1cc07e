"""The training core: one loop, exact state, keyed randomness. Knows no family, no TOML and no store."""
