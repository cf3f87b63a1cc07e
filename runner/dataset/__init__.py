"""What is trained on, torch-free: folders and captions, buckets, the order of an epoch."""
