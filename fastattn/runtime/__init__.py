"""What every op is built on: its declaration, the backends, checks, tuned tables and files."""
