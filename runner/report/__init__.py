"""What people look at: the strip, the curves, report.html."""
