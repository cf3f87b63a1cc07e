"""The model families. In each folder spec.py and architecture.py are torch-free (planning uses them); model.py holds torch."""
