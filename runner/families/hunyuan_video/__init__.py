"""HunyuanVideo text to video."""
