"""What makes a site of README.md and docs/: `make docs`."""
