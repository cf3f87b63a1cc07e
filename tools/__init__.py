"""Scripts that make and check the built-in micro model. They need a checkout; nothing in the installed packages imports them."""
