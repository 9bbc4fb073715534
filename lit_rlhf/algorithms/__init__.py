"""One LightningModule a file, and what they share."""
