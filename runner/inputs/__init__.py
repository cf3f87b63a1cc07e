"""What each stage is given; torch-free.

`facts()` of Inputs is what decides a stage's result, with the keys of run.toml that each fact comes from: its values make
the fingerprint. `bits` changes bytes but not the mathematics: it is recorded in state and lock. Runtime is where things lie
and how fast they go; it is never hashed.
"""
