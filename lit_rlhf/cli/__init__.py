"""The command line: LightningCLI runs, and a file for each further command."""
