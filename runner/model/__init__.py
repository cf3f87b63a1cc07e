"""What is known of a model from its headers and configurations: facts that everything above builds on; torch-free."""
