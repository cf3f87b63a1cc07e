"""Files of weights: headers, restricted pickles, tensors; read within bounds, written the same each time."""
