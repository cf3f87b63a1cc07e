"""The stages that come with runner, an entry each; registry.py lists them."""
