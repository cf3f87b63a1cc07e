"""The stages. inputs.py is torch-free; each other module runs one stage from its Inputs and Runtime alone."""
