"""FLUX.1: dev, schnell, Krea and Kontext."""
