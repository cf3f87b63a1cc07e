"""From a configuration to a graph, from a graph and a store to a plan. Torch-free, and free of side effects."""
