"""A logger that keeps what it is given."""

from lightning.pytorch.loggers import Logger


class Other(Logger):
    """Has one config for all settings, as W&B's and MLflow's have."""

    name, version = "other", 0

    def __init__(self):
        super().__init__()
        self.config, self.metrics = {}, []

    def log_hyperparams(self, params):
        self.config |= params

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))
