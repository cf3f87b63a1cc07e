"""What `args` may hold, by optimizer; torch-free, so that planning can check it. A test compares it with the classes."""

OPTIMIZER_ARGS: dict[str, dict[str, type]] = {
    "adamw": {"amsgrad": bool, "maximize": bool, "foreach": bool, "fused": bool},
    "adamw8bit": {"amsgrad": bool, "min_8bit_size": int, "is_paged": bool},
}
