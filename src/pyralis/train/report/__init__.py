"""What people see of a run: terminal, metrics, picture, HTML report."""
